// Batch Normalization over one tile of a Grid: serial loops, written once, compiled once per
// instruction set. No std templates here: their inline code would be offered to the linker for
// processors that cannot run it.
#pragma once

#include "cpu/fusion.hpp"
#include "cpu/launch.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// -- sums -----------------------------------------------------------------------------------------

// Sums of x - center and of its square.
struct ShiftedSums {
  double total, squares;
};

// float32 and what is less need no center as a rule: their products are exact in float64, and what
// cancels in sum x^2 - (sum x)^2 / n is at most 30 of its 53 bits. Where more would, the sums are
// made again around the mean. float64 has no such reserve and is always centered.
template <class S>
constexpr bool exact_products = sizeof(S) <= 4;

// Half types are added in float32 first, a few packs at a time, which loses next to nothing of them
// and saves most of the widening.
template <class S>
constexpr bool added_narrow = sizeof(S) == 2;

// Whether products of two values, with next to nothing lost, are so too: those of bfloat16 have 16
// digits, of the 24 that float32 has.
template <class S>
constexpr bool products_added_narrow = false;
template <>
constexpr bool products_added_narrow<bfloat16> = true;

// The center that sums of `count` values around zero ask for; 0 if they are good enough.
template <class S>
double wanted_center(const ShiftedSums& s, double count) {
  double least = 1e-9 * s.squares;
  if constexpr (added_narrow<S>) {
    if (!__builtin_isfinite(s.squares)) return 1;  // too large for float32; any center will do
    least = s.squares > 1e-30 * count ? 0.25 * s.squares : s.squares;  // or too small for it
  }
  const bool good = s.squares - s.total * (s.total / count) > least;
  return good ? 0 : static_cast<double>(static_cast<Compute<S>>(s.total / count));
}

// Vectors of sums that a vector of values is added to.
template <class S>
constexpr int wide_vectors = sizeof(double) / sizeof(Compute<S>);

// What is added of a vector of values: doubles, or floats.
template <class A, class V>
BNEXT_INLINE auto addends(V v) {
  if constexpr (sizeof(A) == sizeof v[0])
    return Vectors<V, 1>{v};
  else
    return widen(Vectors<V, 1>{v});
}
template <class A, class S>
using Addends = decltype(addends<A>(Vector<S>{}));
// Of a place of a row.
template <class A, class P, class S>
BNEXT_INLINE Addends<A, S> addends_at(P at, const S* row) {
  if constexpr (P::whole && sizeof(S) == 4 && sizeof(A) == 8)
    return Access<Addends<A, S>>::widened(row + at.i);
  else
    return addends<A>(at(row));
}

// What sums are made around, if anything: a base, since a field takes room even if it is empty, and
// compilers copy such objects through memory.
template <bool centered, class Center = double>
struct Around {
  Pack<Center> center;
};
template <class Center>
struct Around<false, Center> {};

// Accumulates packs of one channel.
template <class S, bool centered>
struct MomentSums : Around<centered> {
  static constexpr bool narrow = added_narrow<S> && !centered;
  using Value = typename Choice<narrow, float, double>::type;
  // Packs that are added at once: where a run is split, it is after a multiple of them.
  static constexpr std::int64_t unit = narrow ? 4 : 2;
  Pack<double> total;
  // Two sums: their additions wait less for each other.
  Pack<double> squares, more_squares;

  MomentSums() = default;  // leaves everything undefined
  explicit BNEXT_INLINE MomentSums(double center_) : total{}, squares{}, more_squares{} {
    if constexpr (centered) this->center = broadcast(center_);
  }

  // `count` packs at p, around one center; as many are fetched at `ahead`.
  BNEXT_INLINE void add(const S* p, const S* ahead, std::int64_t count, Ones ones) {
    if constexpr (narrow) {
      const auto add_packs = [&](std::int64_t some) __attribute__((always_inline)) {
        for (std::int64_t k = 0; k < some; ++k) fetch_pack(ahead + k * lanes, k);
        by_vectors<2>(
            0,
            [&](std::int64_t i, auto& sum, auto& sum_of_squares) __attribute__((always_inline)) {
              add_narrow(
                  some,
                  [&](std::int64_t k) __attribute__((always_inline)) {
                    return Vectors<f32v, 1>{load_values(p + i + k * lanes)};
                  },
                  sum, sum_of_squares);
            },
            total, squares);
      };
      for (; count >= unit; count -= unit, p += unit * lanes, ahead += unit * lanes)
        add_packs(unit);
      if (count > 0) add_packs(count);
    } else {
      if constexpr (sizeof(S) >= 4)
        for (; count >= 2; count -= 2, p += 2 * lanes, ahead += 2 * lanes) {
          fetch_pack(ahead, 0);
          fetch_pack(ahead + lanes, 1);
          by_vector(
              0,
              [&](std::int64_t i, f64v& sum, f64v& first, f64v& second)
                  __attribute__((always_inline)) {
                    const f64v a = shifted(load_wide_vector(p + i));
                    const f64v b = shifted(load_wide_vector(p + lanes + i));
                    first = square_add(a, first);
                    second = square_add(b, second);
                    sum = add_by_multiplying(a + b, ones, sum);
                  },
              total, squares, more_squares);
        }
      for (; count > 0; --count, p += lanes, ahead += lanes) {
        fetch_pack(ahead, 0);
        add_first(p, lanes);
      }
    }
  }
  // The first `count` values of a pack.
  BNEXT_INLINE void add_first(const S* p, std::int64_t count) {
    by_vectors<wide_vectors<S>>(
        0,
        [&](std::int64_t i, auto& sum, auto& sum_of_squares) __attribute__((always_inline)) {
          if (i >= count) return;
          const auto center = center_as<Addends<double, S>>();
          if (i + vector_length<S> <= count)
            add_rows(Place<S>{i}, p, 0, 1, center, sum, sum_of_squares);
          else
            add_rows(PartialPlace<S>{i, count - i}, p, 0, 1, center, sum, sum_of_squares);
        },
        total, squares);
  }
  // The values at a place of `count` rows, `stride` apart, around `center`, to the sums of those
  // lanes.
  template <class P, class Wide>
  static BNEXT_INLINE void add_rows(P at, const S* row, std::int64_t stride, std::int64_t count,
                                    Wide center, Wide& sum, Wide& sum_of_squares) {
    std::int64_t k = 0;
    const auto read = [&](std::int64_t j) __attribute__((always_inline)) {
      return addends_at<Value>(at, row + (k + j) * stride);
    };
    if constexpr (narrow) {
      for (; k + unit <= count; k += unit) add_narrow(unit, read, sum, sum_of_squares);
      if (k < count) add_narrow(count - k, read, sum, sum_of_squares);
    } else {
      const auto shifted = [&](std::int64_t j) __attribute__((always_inline)) {
        if constexpr (!centered)
          return read(j);
        else if constexpr (P::whole)
          return read(j) - center;
        else
          return first_lanes_of(read(j) - center, at.count, Wide{});
      };
      for (; k + 2 <= count; k += 2) {
        const Wide first = shifted(0), second = shifted(1);
        sum = sum + (first + second);
        sum_of_squares = square_add(second, square_add(first, sum_of_squares));
      }
      if (k < count) {
        const Wide last = shifted(0);
        sum = sum + last;
        sum_of_squares = square_add(last, sum_of_squares);
      }
    }
  }
  BNEXT_INLINE ShiftedSums sums() const { return {sum(total), sum(squares + more_squares)}; }

 private:
  template <class Wide>
  BNEXT_INLINE Wide center_as() const {
    if constexpr (centered)
      return Access<Wide>::each(0, [&](std::int64_t) __attribute__((always_inline)) {
        return first_vector(this->center);
      });
    else
      return Wide();
  }
  // The floats that read(0) to read(count - 1) give.
  template <class Read, class Wide>
  static BNEXT_INLINE void add_narrow(std::int64_t count, Read read, Wide& sum,
                                      Wide& sum_of_squares) {
    auto t = read(0), s = t * t;
    for (std::int64_t k = 1; k < count; ++k) {
      const auto x = read(k);
      t = t + x;
      s = multiply_add(x, x, s);
    }
    sum = sum + widen(t);
    sum_of_squares = sum_of_squares + widen(s);
  }
  BNEXT_INLINE f64v shifted(f64v x) const {
    if constexpr (centered) return x - first_vector(this->center);
    return x;
  }
  template <class V>
  static BNEXT_INLINE V square_add(V a, V sum) {
    if constexpr (centered) return a * a + sum;
    return multiply_add(a, a, sum);
  }
};

// Accumulates gradients g and g (x - origin), which is 0 for float32. `as_stored`: gradients have
// no more digits than S. Products of half types are exact in float32 then: see origin_of.
template <class S, bool as_stored,
          class Addend_ = typename Choice<added_narrow<S> && as_stored, float, double>::type>
struct GradientSums : Around<sums_have_origin<S>, Addend_> {
  using Addend = Addend_;
  static constexpr bool narrow = sizeof(Addend) == 4, shifted = sums_have_origin<S>;
  static constexpr std::int64_t unit = narrow ? 4 : 2;
  Pack<double> total;
  Pack<double> products, more_products;

  GradientSums() = default;  // leaves everything undefined
  explicit BNEXT_INLINE GradientSums(double origin) : total{}, products{}, more_products{} {
    if constexpr (shifted) this->center = broadcast(static_cast<Addend>(origin));
  }

  // `count` packs, of which gradient(k, i) and value(k, i) give the vector from element i of the
  // k-th on, as addends, also where that is in the next one; fetch(k) is called once for each. A
  // run is split after a multiple of `unit`.
  template <class Gradient, class Value, class Fetch>
  BNEXT_INLINE void add(std::int64_t count, Gradient gradient, Value value, Fetch fetch,
                        Ones ones) {
    by_vectors<wide_vectors<S>>(
        0,
        [&](std::int64_t i, auto& total_lanes, auto& product_lanes,
            auto& more_lanes) __attribute__((always_inline)) {
          auto sum = total_lanes, sum_of_products = product_lanes, more = more_lanes;
          const auto center = center_as<decltype(gradient(0, i))>();
          const auto gradient_of = [&](std::int64_t k)
                                       __attribute__((always_inline)) { return gradient(k, i); };
          const auto value_of = [&](std::int64_t k)
                                    __attribute__((always_inline)) { return value(k, i); };
          if constexpr (narrow) {
            if (i == 0)
              for (std::int64_t k = 0; k < count; ++k) fetch(k);
            add_lanes(count, gradient_of, value_of, center, sum, sum_of_products);
          } else {
            std::int64_t k = 0;
            for (; k + 2 <= count; k += 2) {
              if (i == 0) {
                fetch(k);
                fetch(k + 1);
              }
              const auto a = gradient(k, i), b = gradient(k, i + lanes);
              sum = add_by_multiplying(a + b, ones, sum);
              sum_of_products = product_add(a, value(k, i), center, sum_of_products);
              more = product_add(b, value(k, i + lanes), center, more);
            }
            if (k < count) {
              if (i == 0) fetch(k);
              add_lanes(
                  1, [&](std::int64_t) __attribute__((always_inline)) { return gradient_of(k); },
                  [&](std::int64_t) __attribute__((always_inline)) { return value_of(k); }, center,
                  sum, sum_of_products);
            }
          }
          total_lanes = sum;
          product_lanes = sum_of_products;
          more_lanes = more;
          // Those of other lanes are not to take their registers.
          if constexpr (!many_registers)
            __asm__("" : "+m"(total_lanes), "+m"(product_lanes), "+m"(more_lanes));
        },
        total, products, more_products);
  }
  // The first `count` values of a pack.
  template <class Gradient, class Value>
  BNEXT_INLINE void add_first(std::int64_t count, Gradient gradient, Value value) {
    by_vectors<wide_vectors<S>>(
        0,
        [&](std::int64_t i, auto& sum, auto& sum_of_products) __attribute__((always_inline)) {
          if (i >= count) return;
          add_lanes(
              1, [&](std::int64_t) __attribute__((always_inline)) { return gradient(0, i); },
              [&](std::int64_t) __attribute__((always_inline)) { return value(0, i); },
              center_as<decltype(gradient(0, i))>(), sum, sum_of_products);
        },
        total, products);
  }
  // What gradient(0) to gradient(count - 1) and value(0) ... give of some lanes, around `center`,
  // to the sums of those lanes.
  template <class Gradient, class Value, class Center, class Wide>
  static BNEXT_INLINE void add_lanes(std::int64_t count, Gradient gradient, Value value,
                                     Center center, Wide& sum, Wide& sum_of_products) {
    std::int64_t k = 0;
    if constexpr (narrow) {
      const auto add = [&](std::int64_t some) __attribute__((always_inline)) {
        add_narrow(
            some, [&](std::int64_t j) __attribute__((always_inline)) { return gradient(k + j); },
            [&](std::int64_t j) __attribute__((always_inline)) { return value(k + j) - center; },
            sum, sum_of_products);
      };
      for (; k + unit <= count; k += unit) add(unit);
      if (k < count) add(count - k);
    } else {
      for (; k < count; ++k) {
        const Wide g = gradient(k);
        sum = sum + g;
        sum_of_products = product_add(g, value(k), center, sum_of_products);
      }
    }
  }
  BNEXT_INLINE GradSums sums(double scale) const {
    return {scale * sum(total), scale * sum(products + more_products)};
  }

 private:
  template <class P>
  BNEXT_INLINE auto center_as() const {
    if constexpr (shifted)
      return Access<P>::each(0, [&](std::int64_t) __attribute__((always_inline)) {
        return first_vector(this->center);
      });
    else
      return 0;
  }
  // Gradients and values from the center on, floats of which products are added first.
  template <class Gradient, class Value, class Wide>
  static BNEXT_INLINE void add_narrow(std::int64_t count, Gradient gradient, Value value, Wide& sum,
                                      Wide& sum_of_products) {
    auto gradients = gradient(0), products = gradients * value(0);
    for (std::int64_t k = 1; k < count; ++k) {
      const auto g = gradient(k), product = g * value(k);
      gradients = gradients + g;
      if constexpr (products_added_narrow<S>) {
        products = products + product;
      } else {
        sum_of_products = sum_of_products + widen(products);
        products = product;
      }
    }
    sum = sum + widen(gradients);
    sum_of_products = sum_of_products + widen(products);
  }
  template <class P, class Center>
  static BNEXT_INLINE P product_add(P g, P x, Center center, P sum) {
    if constexpr (shifted)
      return g * (x - center) + sum;
    else
      return multiply_add(g, x, sum);
  }
};

// What the loops go by, at a place, as type A.
template <class A, class P, class Run, class S>
BNEXT_INLINE Addends<A, S> value_addends(P at, const Run& run, const S* x) {
  if constexpr (Run::invertible)
    return addends<A>(run.input(at(x)));
  else
    return addends_at<A>(at, x);
}

// z = (mean - x) minus_scale + shift of some x, when it is asked for.
template <class F, class V>
struct Normalised {
  const F& f;
  const V x;

  BNEXT_INLINE V operator()() const { return apply(f, x); }
  // z <= 0, without the addition: no rounding of a sum changes its sign.
  BNEXT_INLINE auto not_positive() const { return (f.mean - x) * f.minus_scale <= -f.shift - V{}; }
};
template <class F, class V>
BNEXT_INLINE Normalised<F, V> normalised(const F& f, V x) {
  return {f, x};
}

// The gradients at the normalised values of a place. f gives its coefficients, g and x point to
// gradients at results and to values.
template <class A, class Tail, class P, class S, class Coefficients>
BNEXT_INLINE Addends<A, S> gradient_addends(P at, const typename Tail::Run& run, const S* g,
                                            const S* x, Coefficients f) {
  if constexpr (Tail::linear) {
    return addends_at<A>(at, g);
  } else {
    const auto& coefficients = f(at);
    const auto v = run.gradient(at(g), at, normalised(coefficients, run.input(at(x))));
    return addends<A>(P::whole ? v : first_lanes_of(v, at.count, decltype(v){}));
  }
}

// -- rows: some channels, in runs of contiguous values --------------------------------------------

// In a run of `length` values, the next of which begins `to_next` elements after it.
template <class T>
Ahead ahead_in_run(std::int64_t length, std::int64_t to_next) {
  return {length, to_next - length, length < prefetch_distance<T> ? length : prefetch_distance<T>};
}

// The runs of a tile: in each of `blocks` samples, `length` values of each of `channels` channels,
// side by side.
struct Runs {
  static constexpr bool of_columns = false;
  std::int64_t first_channel, channels, length, blocks;

  Runs(const Grid& grid, std::int64_t group, std::int64_t chunk)
      : first_channel(grid.first_channel(group)),
        channels(grid.last_channel(group) - first_channel),
        length(grid.last_value(chunk) - grid.first_value(chunk)),
        blocks(grid.last_row(chunk) - grid.first_row(chunk)),
        between_samples(grid.problem.c * grid.problem.s),
        between_noted(grid.groups * grid.pieces * grid.noted_bytes()),
        first_noted(
            ((grid.first_row(chunk) * grid.groups + group) * grid.pieces + chunk % grid.pieces) *
            grid.noted_bytes()),
        start(grid.first_row(chunk) * between_samples + first_channel * grid.problem.s +
              grid.first_value(chunk)) {}

  std::int64_t run_length() const { return channels * length; }
  std::int64_t length_of(std::int64_t) const { return run_length(); }
  std::int64_t channel_length(std::int64_t) const { return length; }
  std::int64_t offset(std::int64_t block) const { return start + block * between_samples; }
  // Where the bits are that the first pass notes for the second.
  std::int64_t noted(std::int64_t block) const { return first_noted + block * between_noted; }
  std::int64_t values() const { return blocks * length; }  // of each channel
  // Calls body(channel, first, last) for blocks [first, last) of a channel, `some` of those from
  // `first` on, and for all channels before it goes on to the next blocks: few streams of memory.
  template <class Body>
  BNEXT_INLINE void each_some(std::int64_t first, std::int64_t some, Body body) const {
    for (; first < blocks; first += some)
      for (std::int64_t c = 0; c < channels; ++c)
        body(c, first, first + some < blocks ? first + some : blocks);
  }
  // What is to be asked for in a run, in the order of the first pass,
  template <class T>
  Ahead ahead(const Grid& grid, std::int64_t block) const {
    return grid.far ? ahead_to<T>(block + 1 < blocks, between_samples) : Ahead();
  }
  // in that of the second, backwards,
  template <class T>
  Ahead ahead_backwards(std::int64_t block) const {
    return ahead_to<T>(block > 0, -between_samples);
  }
  // and of what the first pass has read.
  template <class T>
  Ahead ahead_again(const Grid& grid, std::int64_t) const {
    if (!grid.streaming || grid.summed_before) return {};
    return {run_length(), 0, prefetch_distance<T>};
  }

 private:
  template <class T>
  Ahead ahead_to(bool exists, std::int64_t to_next) const {
    return ahead_in_run<T>(run_length(), exists ? to_next : run_length());
  }

  std::int64_t between_samples, between_noted, first_noted, start;
};

// Coefficients of both directions.
template <class F, class K>
struct BothAffine {
  F forward;
  K backward;
};

// Those of `before` in the first n lanes, of `after` in the others.
template <class T>
BNEXT_INLINE Vector<T> lanes_of_two(T before, std::int64_t n, T after) {
  return first_lanes_of(before - Vector<T>{}, n, after - Vector<T>{});
}
template <class T>
BNEXT_INLINE Affine<Vector<T>> lanes_of_two(const Affine<T>& before, std::int64_t n,
                                            const Affine<T>& after) {
  return {lanes_of_two(before.mean, n, after.mean),
          lanes_of_two(before.minus_scale, n, after.minus_scale),
          lanes_of_two(before.shift, n, after.shift)};
}
template <class T>
BNEXT_INLINE GradAffine<Vector<T>> lanes_of_two(const GradAffine<T>& before, std::int64_t n,
                                                const GradAffine<T>& after) {
  return {lanes_of_two(before.g_mean, n, after.g_mean),
          lanes_of_two(before.minus_g_scale, n, after.minus_g_scale),
          lanes_of_two(before.x_mean, n, after.x_mean),
          lanes_of_two(before.minus_x_scale, n, after.minus_x_scale),
          lanes_of_two(before.shift, n, after.shift)};
}
template <class T>
BNEXT_INLINE BothAffine<Affine<Vector<T>>, GradAffine<Vector<T>>> lanes_of_two(
    const BothAffine<Affine<T>, GradAffine<T>>& before, std::int64_t n,
    const BothAffine<Affine<T>, GradAffine<T>>& after) {
  return {lanes_of_two(before.forward, n, after.forward),
          lanes_of_two(before.backward, n, after.backward)};
}

// Coefficients around the place where one channel ends and the next begins.
template <class F>
struct AroundBegin {
  F before, after;
  std::int64_t begin;

  template <class P>
  BNEXT_INLINE auto operator()(P at) const {
    return lanes_of_two(before, at.lanes_before(begin), after);
  }
};

// Coefficients of the channels of a row, as `write` asks for them.
template <class F>
struct ChannelsOfRow {
  const F* first;
  std::int64_t channels;

  struct Same {
    F coefficients;
    template <class P>
    BNEXT_INLINE const F& operator()(P) const {
      return coefficients;
    }
  };
  BNEXT_INLINE void reach(std::int64_t) {}
  BNEXT_INLINE Same of(std::int64_t c) const { return {first[c]}; }
  BNEXT_INLINE AroundBegin<F> around(std::int64_t c, std::int64_t begin) const {
    return {first[c > 0 ? c - 1 : 0], first[c < channels ? c : channels - 1], begin};
  }
};

// How much is summed at once on the way of writing something else: more where that is a call, which
// has to fetch the sums and put them back.
constexpr std::int64_t units_of_a_call = 4;
constexpr std::int64_t units_on_the_way = many_registers ? 1 : units_of_a_call;

// As many are added at once where nothing else is to be done.
constexpr std::int64_t some_values = 256;

// After the last value of any run.
constexpr std::int64_t never = std::int64_t{1} << 62;

// Adds to the sums of a run the values before `end`: whole steps, and the rest of each channel that
// ends there or before.
template <class Run>
BNEXT_INLINE void add_channels_until(Run& run, std::int64_t end) {
  for (;;) {
    const std::int64_t until = end < run.channel_end ? end : run.channel_end;
    auto local = run.sums;  // reads of bytes, which may be anything's, cannot mean these
    while (run.i + Run::step <= until) run.add(local, Run::step);
    if (end < run.channel_end) {
      run.sums = local;
      return;
    }
    if (run.i < run.channel_end) run.add(local, run.channel_end - run.i);
    *run.home = local;
    if (run.i == run.length) {
      run.end_of_run();
      run.i = run.channel_end = never;
      return;
    }
    run.channel_end += run.channel_length;
    run.sums = *++run.home;
    run.next_channel();
  }
}

// The sums of a tile: channel after channel, some blocks of each at once, or run after run and a
// bit at a time on the way of something else. The blocks of a channel must come in order.
template <class S, bool centered>
class MomentTile {
 public:
  using Sums = MomentSums<S, centered>;

  // Around `centers`, or, if that is null and a center is needed, around the first value.
  MomentTile(const Grid& grid, const Runs& runs, const S* x, const double* centers)
      : grid_(grid), runs_(runs), x_(x), ones_(unknown_ones()) {
    for (std::int64_t c = 0; c < runs_.channels; ++c) {
      centers_[c] = 0;
      if constexpr (centered) {
        if (centers != nullptr)
          centers_[c] = centers[c];
        else if constexpr (!exact_products<S>)
          centers_[c] = static_cast<double>(x[runs_.offset(0) + c * runs_.length]);
      }
      sums_[c] = Sums(centers_[c]);
    }
  }

  // One run, of which the values before `i` have been added.
  struct Run {
    Sums sums;   // of the channel that i is in
    Sums* home;  // where they belong
    const S* from;
    std::int64_t i, channel_end, channel_length, length;
    Ahead ahead;
    Ones ones;

    static constexpr std::int64_t step = units_on_the_way * Sums::unit * lanes;

    // Whole steps, and the rest of channels that end there or before.
    BNEXT_INLINE void add_until(std::int64_t end) {
      if constexpr (many_registers)
        add_until_here(end);
      else if (i + step <= end || channel_end <= end)
        add_until_once(end);
    }
    // Not among the registers that what is written needs.
    __attribute__((noinline)) void add_until_once(std::int64_t end) { add_until_here(end); }
    BNEXT_INLINE void add_until_here(std::int64_t end) { add_channels_until(*this, end); }
    BNEXT_INLINE void finish() { add_until(length); }

    BNEXT_INLINE void add(Sums& to, std::int64_t count) {
      add_values(to, from, i, count, ahead, ones);
      i += count;
    }
    BNEXT_INLINE void next_channel() {}
    BNEXT_INLINE void end_of_run() {}
  };
  BNEXT_INLINE Run run(std::int64_t block) {
    if (block >= runs_.blocks) return {sums_[0], nullptr, x_, never, never, 0, 0, {}, ones_};
    return {
        sums_[0],     &sums_[0],    x_ + runs_.offset(block), 0,
        runs_.length, runs_.length, runs_.run_length(),       runs_.template ahead<S>(grid_, block),
        ones_};
  }
  void add_all() { add_blocks_from(0); }
  void add_blocks_from(std::int64_t block) {
    runs_.each_some(block, grid_.streaming ? 4 : 16,
                    [&](std::int64_t c, std::int64_t first, std::int64_t last) {
                      Sums sums = sums_[c];
                      for (std::int64_t b = first; b < last; ++b) {
                        const S* from = x_ + runs_.offset(b);
                        const Ahead ahead = runs_.template ahead<S>(grid_, b);
                        const std::int64_t end = (c + 1) * runs_.length;
                        for (std::int64_t i = c * runs_.length; i < end; i += some_values) {
                          const std::int64_t count = end - i < some_values ? end - i : some_values;
                          add_values(sums, from, i, count, ahead, ones_);
                        }
                      }
                      sums_[c] = sums;
                    });
  }
  void store(std::int64_t chunk, Moments* partials) const {
    const auto count = static_cast<double>(runs_.values());
    ShiftedSums sums[Grid::max_group_channels];
    double center[Grid::max_group_channels];
    bool again = false;
    for (std::int64_t c = 0; c < runs_.channels; ++c) {
      sums[c] = sums_[c].sums();
      center[c] = centered ? centers_[c] : wanted_center<S>(sums[c], count);
      again |= !(center[c] == 0);
    }
    if constexpr (!centered)
      if (again) {
        MomentTile<S, true> tile(grid_, runs_, x_, center);
        tile.add_all();
        // What one channel needs changes nothing in another.
        for (std::int64_t c = 0; c < runs_.channels; ++c)
          if (!(center[c] == 0)) sums[c] = tile.sums(c);
      }
    for (std::int64_t c = 0; c < runs_.channels; ++c)
      partials[chunk * grid_.problem.c + runs_.first_channel + c] =
          moments_from_shifted(count, center[c], sums[c].total, sums[c].squares);
  }
  ShiftedSums sums(std::int64_t channel) const { return sums_[channel].sums(); }

 private:
  // `count` values from element i of a run on: fewer than a pack only where a channel ends.
  static BNEXT_INLINE void add_values(Sums& sums, const S* from, std::int64_t i, std::int64_t count,
                                      const Ahead& ahead, Ones ones) {
    const std::int64_t rest = count % lanes, whole = count - rest;
    const S* to_fetch = unknown(from + ahead.of(i));
    sums.add(from + i, to_fetch, count / lanes, ones);
    if (rest == 0) return;
    fetch_pack(to_fetch + whole, 0);
    sums.add_first(from + i + whole, rest);
  }

  const Grid& grid_;
  const Runs runs_;
  const S* x_;
  Ones ones_;
  double centers_[Grid::max_group_channels];
  Sums sums_[Grid::max_group_channels];
};

// In place of a tile to be summed on the way, where there is none.
struct NoTile {
  struct Run {
    BNEXT_INLINE void add_until(std::int64_t) {}
    BNEXT_INLINE void finish() {}
  };
  BNEXT_INLINE Run run(std::int64_t) { return {}; }
  void add_blocks_from(std::int64_t) {}
};

template <class S>
using FirstMomentTile = MomentTile<S, !exact_products<S>>;

template <class S>
void moments_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* x,
                  Moments* partials) {
  FirstMomentTile<S> tile(grid, Runs(grid, group, chunk), x, nullptr);
  tile.add_all();
  tile.store(chunk, partials);
}

// The sums of gradients of a tile, as MomentTile.
template <class S, class Tail>
class GradTile {
 public:
  using Sums = GradientSums<S, Tail::known>;
  using Addend = typename Sums::Addend;
  using F = Affine<Compute<S>>;

  GradTile(const Grid& grid, const Runs& runs, const S* grad_y, const S* x, const double* origin,
           const F* forward, const Fusion& fusion)
      : grid_(grid),
        runs_(runs),
        grad_y_(grad_y),
        x_(x),
        forward_(forward + runs.first_channel),
        ones_(unknown_ones()),
        tail_(fusion) {
    for (std::int64_t c = 0; c < runs_.channels; ++c)
      sums_[c] = Sums(origin[runs.first_channel + c]);
  }

  struct Run {
    typename Tail::Run tail;
    Sums sums;
    Sums* home;
    const F* f;
    const S *g, *x;
    std::int64_t i, channel_end, channel_length, length;
    Ahead ahead;
    Ones ones;

    static constexpr std::int64_t step =
        (Tail::plain ? units_on_the_way : units_of_a_call) * Sums::unit * lanes;

    BNEXT_INLINE void add_until(std::int64_t end) {
      if constexpr (many_registers && Tail::plain)
        add_until_here(end);
      else if (i + step <= end || channel_end <= end)
        add_until_once(end);
    }
    BNEXT_INLINE void finish() { add_until(length); }

    __attribute__((noinline)) void add_until_once(std::int64_t end) { add_until_here(end); }
    BNEXT_INLINE void add_until_here(std::int64_t end) { add_channels_until(*this, end); }
    BNEXT_INLINE void add(Sums& to, std::int64_t count) {
      tail.fetch(i, count);
      tail.ready(i, count);
      add_values(to, tail, *f, g, x, i, count, ahead, ones);
      i += count;
    }
    BNEXT_INLINE void next_channel() { ++f; }
    BNEXT_INLINE void end_of_run() { tail.finish(); }
  };
  BNEXT_INLINE Run run(std::int64_t block) {
    const bool exists = block < runs_.blocks;
    if (!exists) block = 0;
    const std::int64_t offset = runs_.offset(block);
    return {tail_of(block),
            sums_[0],
            &sums_[0],
            forward_,
            grad_y_ + offset,
            x_ + offset,
            exists ? 0 : never,
            exists ? runs_.length : never,
            runs_.length,
            runs_.run_length(),
            runs_.template ahead<S>(grid_, block),
            ones_};
  }
  void add_all() { add_blocks_from(0); }
  void add_blocks_from(std::int64_t block) {
    if constexpr (!Tail::draws) {
      runs_.each_some(block, grid_.streaming ? 4 : 16,
                      [&](std::int64_t c, std::int64_t first, std::int64_t last) {
                        Sums sums = sums_[c];
                        for (std::int64_t b = first; b < last; ++b) {
                          auto tail = tail_of(b);
                          add_channel(sums, tail, c, b);
                        }
                        sums_[c] = sums;
                      });
    } else {
      for (; block < runs_.blocks; ++block) {
        auto tail = tail_of(block);
        for (std::int64_t c = 0; c < runs_.channels; ++c) {
          Sums sums = sums_[c];
          add_channel(sums, tail, c, block);
          sums_[c] = sums;
        }
        tail.finish();
      }
    }
  }
  void store(std::int64_t chunk, GradSums* partials) const {
    for (std::int64_t c = 0; c < runs_.channels; ++c)
      partials[chunk * grid_.problem.c + runs_.first_channel + c] =
          sums_[c].sums(tail_.scale_of_sums());
  }

 private:
  BNEXT_INLINE typename Tail::Run tail_of(std::int64_t block) {
    return tail_.run(runs_.offset(block), runs_.run_length(), runs_.noted(block),
                     runs_.template ahead<S>(grid_, block));
  }
  // The values that a channel has in a block.
  BNEXT_INLINE void add_channel(Sums& sums, typename Tail::Run& tail, std::int64_t c,
                                std::int64_t block) const {
    const S *g = grad_y_ + runs_.offset(block), *x = x_ + runs_.offset(block);
    const Ahead ahead = runs_.template ahead<S>(grid_, block);
    const std::int64_t end = (c + 1) * runs_.length;
    for (std::int64_t i = c * runs_.length; i < end; i += some_values) {
      const std::int64_t count = end - i < some_values ? end - i : some_values;
      tail.fetch(i, count);
      tail.ready(i, count);
      add_values(sums, tail, forward_[c], g, x, i, count, ahead, ones_);
    }
  }
  // As MomentTile's.
  static BNEXT_INLINE void add_values(Sums& sums, typename Tail::Run& tail, const F& f, const S* g,
                                      const S* x, std::int64_t i, std::int64_t count,
                                      const Ahead& ahead, Ones ones) {
    const std::int64_t at = ahead.of(i);
    const S *to_fetch_g = unknown(g + at), *to_fetch_x = unknown(x + at);
    const F coefficients = f;
    const auto f_at = [&](auto) __attribute__((always_inline)) { return coefficients; };
    const auto gradient = [&](auto at) __attribute__((always_inline)) {
      return gradient_addends<Addend, Tail>(at, tail, g, x, f_at);
    };
    const auto value = [&](auto at) __attribute__((always_inline)) {
      return value_addends<Addend>(at, tail, x);
    };
    const std::int64_t rest = count % lanes, last = i + count - rest;
    const auto place = [&](std::int64_t k, std::int64_t element) __attribute__((always_inline)) {
      return Place<S>{i + k * lanes + element, element};
    };
    sums.add(
        count / lanes,
        [&](std::int64_t k, std::int64_t element)
            __attribute__((always_inline)) { return gradient(place(k, element)); },
        [&](std::int64_t k, std::int64_t element)
            __attribute__((always_inline)) { return value(place(k, element)); },
        [&](std::int64_t k) __attribute__((always_inline)) {
          fetch_pack(to_fetch_g + k * lanes, k);
          fetch_pack(to_fetch_x + k * lanes, k);
        },
        ones);
    if (rest == 0) return;
    fetch_pack(to_fetch_g + count - rest, 0);
    fetch_pack(to_fetch_x + count - rest, 0);
    const auto last_place = [&](std::int64_t element) __attribute__((always_inline)) {
      return PartialPlace<S>{last + element, rest - element};
    };
    sums.add_first(
        rest,
        [&](std::int64_t, std::int64_t element)
            __attribute__((always_inline)) { return gradient(last_place(element)); },
        [&](std::int64_t, std::int64_t element)
            __attribute__((always_inline)) { return value(last_place(element)); });
  }

  const Grid& grid_;
  const Runs runs_;
  const S *grad_y_, *x_;
  const F* forward_;
  Ones ones_;
  Tail tail_;
  Sums sums_[Grid::max_group_channels];
};

template <class S, class Tail>
void grad_sums_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* grad_y,
                    const S* x, const double* origin, const Affine<Compute<S>>* forward,
                    const Fusion& fusion, GradSums* partials) {
  GradTile<S, Tail> tile(grid, Runs(grid, group, chunk), grad_y, x, origin, forward, fusion);
  tile.add_all();
  tile.store(chunk, partials);
}

// -- columns: some channels, as columns of a matrix -----------------------------------------------

// The columns of one group: where they start, how many, and the channel of each.
struct Columns {
  std::int64_t first, width, first_channel, channels;

  Columns(const Grid& grid, std::int64_t group) {
    first_channel = grid.first_channel(group);
    channels = grid.last_channel(group) - first_channel;
    const std::int64_t per_channel = grid.problem.channels_last ? grid.replicas : grid.problem.s;
    first = grid.problem.channels_last ? first_channel : first_channel * per_channel;
    width = channels * per_channel;
  }
};

// Arrays over the columns of a group, with room for a whole pack at the end.
constexpr std::int64_t max_columns = Grid::max_group_width + lanes;

// to[w] = value(channel) for each column w, channels counted from the group's first, and on from
// the first column for `more`.
template <class T, class Value>
BNEXT_INLINE void spread(const Grid& grid, const Columns& columns, std::int64_t more,
                         T* __restrict to, Value value) {
  std::int64_t done;
  if (grid.problem.channels_last) {
    done = columns.channels;
    for (std::int64_t c = 0; c < columns.channels; ++c) to[c] = value(c);
  } else {
    done = columns.width;
    // Whole packs: what one channel writes too much, the next one and the end overwrite.
    const std::int64_t s = grid.problem.s;
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      const Pack<T> v = broadcast(value(c));
      for (std::int64_t i = 0; i < s; i += lanes) store(v, to + c * s + i);
    }
  }
  const std::int64_t end = columns.width + more;
  while (done < end) {
    const std::int64_t count = done < end - done ? done : end - done;
    __builtin_memcpy(to + done, to, static_cast<std::size_t>(count) * sizeof(T));
    done += count;
  }
}

// sums[c] = the sum of the columns of channel c.
BNEXT_INLINE void gather(const Grid& grid, const Columns& columns,
                         const double* __restrict columns_of, double* __restrict sums) {
  if (grid.problem.channels_last) {
    for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] = columns_of[c];
    for (std::int64_t w = columns.channels; w < columns.width; w += columns.channels)
      for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] += columns_of[w + c];
    return;
  }
  const std::int64_t s = grid.problem.s;
  for (std::int64_t c = 0; c < columns.channels; ++c) {
    Pack<double> total{};
    std::int64_t i = 0;
    for (; i + lanes <= s; i += lanes) total = total + load(columns_of + c * s + i);
    if (i < s) total = total + load_first(columns_of + c * s + i, s - i);
    sums[c] = sum(total);
  }
}

// Columns of this group that row r has.
inline std::int64_t row_width(const Grid& grid, const Columns& columns, std::int64_t r) {
  return r + 1 < grid.rows || grid.replicas == 1 ? columns.width : grid.last_width;
}

// The runs of a tile of columns: a row of the group each, or, where they lie side by side, as many
// rows as make a run long enough.
class ColumnRuns {
 public:
  static constexpr bool of_columns = true;

  ColumnRuns(const Grid& grid, std::int64_t group, std::int64_t chunk_)
      : columns(grid, group),
        chunk(chunk_),
        one_run_(grid.one_run()),
        rows_(one_run_ && long_run > grid.width ? long_run / grid.width : 1),
        width_(grid.width),
        row_length_(columns.width),
        start_(grid.first_row(chunk) * width_ + columns.first),
        between_noted_((one_run_ ? 1 : grid.groups) * grid.noted_bytes()),
        first_noted_(one_run_
                         ? chunk * grid.noted_bytes()
                         : grid.first_row(chunk) * between_noted_ + group * grid.noted_bytes()) {
    const std::int64_t rows = grid.last_row(chunk) - grid.first_row(chunk);
    blocks = (rows + rows_ - 1) / rows_;
    last_length_ = (rows - 1 - (blocks - 1) * rows_) * width_ +
                   row_width(grid, columns, grid.last_row(chunk) - 1);
  }

  Columns columns;
  std::int64_t chunk, blocks;

  std::int64_t offset(std::int64_t block) const { return start_ + block * rows_ * width_; }
  std::int64_t length_of(std::int64_t block) const {
    return block + 1 < blocks ? (rows_ - 1) * width_ + row_length_ : last_length_;
  }
  std::int64_t channel_length(std::int64_t block) const { return length_of(block); }
  std::int64_t noted(std::int64_t block) const { return noted_of_row(block * rows_); }
  // Of a row of the chunk, counted from its first.
  std::int64_t noted_of_row(std::int64_t row) const {
    if (!one_run_) return first_noted_ + row * between_noted_;
    const std::int64_t words = (start_ + row * width_) / mask_word_size - start_ / mask_word_size;
    return first_noted_ + words * mask_word_bytes;
  }
  // Whether results are written some rows at once: not where lines have to be whole, or where what
  // the rows have of a column all wants the same set of the first cache.
  template <class T>
  bool rows_at_once(const Grid& grid) const {
    constexpr std::int64_t way_of_first_cache = 4096;
    return !grid.streaming &&
           width_ * static_cast<std::int64_t>(sizeof(T)) % way_of_first_cache != 0;
  }
  template <class T>
  Ahead ahead_backwards(std::int64_t block) const {
    const std::int64_t length = length_of(block);
    return ahead_in_run<T>(length, block > 0 ? -rows_ * width_ : length);
  }
  template <class T>
  Ahead ahead_again(const Grid& grid, std::int64_t block) const {
    if (!grid.streaming || grid.summed_before) return {};
    return ahead_backwards<T>(block);
  }

 private:
  static constexpr std::int64_t long_run = 4096;

  bool one_run_;
  std::int64_t rows_, width_, row_length_, start_, between_noted_, first_noted_, last_length_;
};

// Coefficients of a run of columns, as `write` asks for them: those of a row, again and again.
template <class Coefficients>
struct RepeatedRow {
  Coefficients coefficients;
  std::int64_t width;
  std::int64_t begun = 0;  // where the row began of which places are asked for

  BNEXT_INLINE void reach(std::int64_t i) {
    while (i - begun >= width) begun += width;
  }
  BNEXT_INLINE const RepeatedRow& of(std::int64_t) const { return *this; }
  BNEXT_INLINE const RepeatedRow& around(std::int64_t, std::int64_t) const { return *this; }
  template <class P>
  BNEXT_INLINE auto operator()(P at) const {
    at.i -= begun;
    return coefficients(at);
  }
};
template <class Coefficients>
BNEXT_INLINE RepeatedRow<Coefficients> repeated_row(Coefficients coefficients, std::int64_t width) {
  return {coefficients, width};
}

// Calls body(r, count, width) for blocks of up to row_block rows [r, r + count) of equal width.
template <class Body>
BNEXT_INLINE void for_each_rows(const Grid& grid, const Columns& columns, std::int64_t chunk,
                                std::int64_t row_block, Body body) {
  const std::int64_t end = grid.last_row(chunk), last_width = row_width(grid, columns, end - 1);
  const std::int64_t whole = last_width == columns.width ? end : end - 1;
  for (std::int64_t r = grid.first_row(chunk); r < end;) {
    const std::int64_t left = (r < whole ? whole : end) - r;
    const std::int64_t count = left < row_block ? left : row_block;
    body(r, count, r < whole ? columns.width : last_width);
    r += count;
  }
}

// Calls add(at, k, rows, first, second) with vectors of columns, `rows` rows of them from row k on
// of `count`, and their sums; before(w, columns) once for all rows. `together`: sixteen columns at
// once and `unit` rows after the other, so that additions wait less for each other, and lines that
// the rows have in the same set of a cache are read once.
template <class S, std::int64_t unit, bool together, class Before, class Add>
BNEXT_INLINE void for_each_columns(std::int64_t width, std::int64_t count, double* first,
                                   double* second, Before before, Add add) {
  std::int64_t w = 0;
  if constexpr (together)
    for (; w + lanes <= width; w += lanes) {
      before(w, lanes);
      auto a = load_vectors<Pack<double>>(first + w), b = load_vectors<Pack<double>>(second + w);
      const auto add_rows = [&](std::int64_t k, std::int64_t rows) __attribute__((always_inline)) {
        by_vectors<wide_vectors<S>>(
            w,
            [&](std::int64_t i, auto& some, auto& others)
                __attribute__((always_inline)) { add(Place<S>{i}, k, rows, some, others); },
            a, b);
      };
      std::int64_t k = 0;
      for (; k + unit <= count; k += unit) add_rows(k, unit);
      if (k < count) add_rows(k, count - k);
      store(a, first + w);
      store(b, second + w);
    }
  using Wide = Addends<double, S>;
  const auto add_at = [&](auto at) __attribute__((always_inline)) {
    before(at.i, at.count);
    auto a = load_vectors<Wide>(first + at.i), b = load_vectors<Wide>(second + at.i);
    add(at, 0, count, a, b);
    Access<Wide>::store(a, first + at.i);
    Access<Wide>::store(b, second + at.i);
  };
  for (; w + vector_length<S> <= width; w += vector_length<S>) add_at(Place<S>{w});
  if (w < width) add_at(PartialPlace<S>{w, width - w});
}

template <class S, bool centered>
void shifted_sums_columns(const Grid& grid, const Columns& columns, std::int64_t chunk, const S* x,
                          const double* center, double* total, double* squares) {
  using Sums = MomentSums<S, centered>;
  constexpr int row_block = 8;
  for (std::int64_t w = 0; w < columns.width + lanes; ++w) total[w] = squares[w] = 0;
  for_each_rows(
      grid, columns, chunk, row_block, [&](std::int64_t r, std::int64_t count, std::int64_t width) {
        const S* row = x + r * grid.width + columns.first;
        for_each_columns<S, Sums::unit, !compact && !centered>(
            width, count, total, squares,
            [&](std::int64_t w, std::int64_t some) {
              if (grid.fetch_rows) fetch(row + count * (width + w), count * some);
            },
            [&](auto at, std::int64_t k, std::int64_t rows, auto& sum,
                auto& sum_of_squares) __attribute__((always_inline)) {
              Sums::add_rows(at, row + k * grid.width, grid.width, rows,
                             load_vectors<Addends<double, S>>(center + at.i), sum, sum_of_squares);
            });
      });
}

template <class S>
void moments_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* x,
                     Moments* partials) {
  const Columns columns(grid, group);
  double center[max_columns], total[max_columns], squares[max_columns];
  double centers[Grid::max_group_width], sums[Grid::max_group_width], sumsqs[Grid::max_group_width];
  const std::int64_t begin = grid.first_row(chunk), rows = grid.last_row(chunk) - begin;
  // Values of one channel in this tile: a short last row has fewer.
  const std::int64_t missing = columns.width - row_width(grid, columns, begin + rows - 1);
  const auto count = static_cast<double>((rows * columns.width - missing) / columns.channels);

  bool again = !exact_products<S>;
  if constexpr (exact_products<S>) {
    shifted_sums_columns<S, false>(grid, columns, chunk, x, center, total, squares);
    gather(grid, columns, total, sums);
    gather(grid, columns, squares, sumsqs);
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      centers[c] = wanted_center<S>({sums[c], sumsqs[c]}, count);
      again |= !(centers[c] == 0);
    }
  } else {
    const std::int64_t step = grid.problem.channels_last ? 1 : grid.problem.s;
    const S* head = x + begin * grid.width + columns.first;
    for (std::int64_t c = 0; c < columns.channels; ++c)
      centers[c] = static_cast<double>(head[c * step]);
  }
  if (again) {
    spread(grid, columns, lanes, center, [&](std::int64_t c) { return centers[c]; });
    double centered_sums[Grid::max_group_width], centered_sumsqs[Grid::max_group_width];
    shifted_sums_columns<S, true>(grid, columns, chunk, x, center, total, squares);
    gather(grid, columns, total, centered_sums);
    gather(grid, columns, squares, centered_sumsqs);
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      // What one channel needs changes nothing in another.
      if (exact_products<S> && centers[c] == 0) continue;
      sums[c] = centered_sums[c];
      sumsqs[c] = centered_sumsqs[c];
    }
  }
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[chunk * grid.problem.c + columns.first_channel + c] =
        moments_from_shifted(count, centers[c], sums[c], sumsqs[c]);
}

// Coefficients of each column, one array per field so that loops over columns are vectors. Those of
// rows that follow each other go on from the first column as far as `write` reaches at once.
template <class S>
constexpr std::int64_t repeated_columns = Grid::max_group_width + longest_step<S> + lanes;

template <class S>
struct ColumnAffine {
  using T = Compute<S>;
  T mean[repeated_columns<S>], minus_scale[repeated_columns<S>], shift[repeated_columns<S>];

  ColumnAffine(const Grid& grid, const Columns& columns, const Affine<T>* forward) {
    const std::int64_t more = grid.one_run() ? longest_step<S> : 0;
    const Affine<T>* f = forward + columns.first_channel;
    spread(grid, columns, more, mean, [&](std::int64_t c) { return f[c].mean; });
    spread(grid, columns, more, minus_scale, [&](std::int64_t c) { return f[c].minus_scale; });
    spread(grid, columns, more, shift, [&](std::int64_t c) { return f[c].shift; });
  }

  template <class Place>
  BNEXT_INLINE Affine<Vector<T>> operator()(Place place) const {
    return {place(mean), place(minus_scale), place(shift)};
  }
};

template <class S>
struct ColumnGradAffine {
  using T = Compute<S>;
  T g_mean[repeated_columns<S>], minus_g_scale[repeated_columns<S>], x_mean[repeated_columns<S>],
      minus_x_scale[repeated_columns<S>], shift[repeated_columns<S>];

  ColumnGradAffine(const Grid& grid, const Columns& columns, const GradAffine<T>* backward) {
    const std::int64_t more = grid.one_run() ? longest_step<S> : 0;
    const GradAffine<T>* k = backward + columns.first_channel;
    spread(grid, columns, more, g_mean, [&](std::int64_t c) { return k[c].g_mean; });
    spread(grid, columns, more, minus_g_scale, [&](std::int64_t c) { return k[c].minus_g_scale; });
    spread(grid, columns, more, x_mean, [&](std::int64_t c) { return k[c].x_mean; });
    spread(grid, columns, more, minus_x_scale, [&](std::int64_t c) { return k[c].minus_x_scale; });
    spread(grid, columns, more, shift, [&](std::int64_t c) { return k[c].shift; });
  }

  template <class Place>
  BNEXT_INLINE GradAffine<Vector<T>> operator()(Place place) const {
    return {place(g_mean), place(minus_g_scale), place(x_mean), place(minus_x_scale), place(shift)};
  }
};

template <class S, class Tail>
void grad_sums_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* grad_y,
                       const S* x, const double* origin, const Affine<Compute<S>>* forward,
                       const Fusion& fusion, GradSums* partials) {
  using Sums = GradientSums<S, Tail::known>;
  using Addend = typename Sums::Addend;
  const ColumnRuns all(grid, group, chunk);
  const Columns& columns = all.columns;
  Addend origins[max_columns];
  double total[max_columns], products[max_columns], sums_g[Grid::max_group_width],
      sums_gx[Grid::max_group_width];
  origin += columns.first_channel;
  if constexpr (Sums::shifted)
    spread(grid, columns, lanes, origins,
           [&](std::int64_t c) { return static_cast<Addend>(origin[c]); });
  const ColumnAffine<S> f(grid, columns, forward);
  for (std::int64_t w = 0; w < columns.width + lanes; ++w) total[w] = products[w] = 0;
  Tail tail(fusion);

  // As many rows as have something of their own in registers, or nearly so, and of both tensors no
  // more lines than a set of the first cache has: rows of 2^n bytes all want the same one.
  constexpr int row_block = 4;
  for_each_rows(
      grid, columns, chunk, row_block, [&](std::int64_t r, std::int64_t count, std::int64_t width) {
        const std::int64_t first = r * grid.width + columns.first;
        const S *values = x + first, *g = grad_y + first;
        const auto run_of = [&](std::int64_t k) {
          if (k >= count) k = 0;
          return tail.run(first + k * grid.width, width,
                          all.noted_of_row(r + k - grid.first_row(chunk)), {});
        };
        typename Tail::Run runs[row_block] = {run_of(0), run_of(1), run_of(2), run_of(3)};
        for (std::int64_t k = 0; k < count; ++k) runs[k].ready(0, width);
        for_each_columns<S, Sums::unit, !compact && Tail::plain>(
            width, count, total, products,
            [&](std::int64_t w, std::int64_t some) {
              if (!grid.fetch_rows) return;
              fetch(g + count * (width + w), count * some);
              fetch(values + count * (width + w), count * some);
            },
            [&](auto at, std::int64_t first_row, std::int64_t rows, auto& sum,
                auto& sum_of_products) __attribute__((always_inline)) {
              const auto coefficients = [&](auto) __attribute__((always_inline)) { return f(at); };
              const auto middle = load_vectors<Addends<Addend, S>>(origins + at.i);
              const auto gradient = [&](std::int64_t row) __attribute__((always_inline)) {
                const std::int64_t k = first_row + row;
                return gradient_addends<Addend, Tail>(at, runs[Tail::plain ? 0 : k],
                                                      g + k * grid.width, values + k * grid.width,
                                                      coefficients);
              };
              const auto value = [&](std::int64_t row) __attribute__((always_inline)) {
                const std::int64_t k = first_row + row;
                return value_addends<Addend>(at, runs[Tail::plain ? 0 : k],
                                             values + k * grid.width);
              };
              Sums::add_lanes(rows, gradient, value, middle, sum, sum_of_products);
            });
      });
  gather(grid, columns, total, sums_g);
  gather(grid, columns, products, sums_gx);
  const double scale = tail.scale_of_sums();
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[chunk * grid.problem.c + columns.first_channel + c] = {scale * sums_g[c],
                                                                    scale * sums_gx[c]};
}

// -- results --------------------------------------------------------------------------------------

// Writes value(coefficients, place, offset) to each place of a tile, counted from the offset, some
// rows at once: coefficients are loaded once for them.
template <class S, class Coefficients, class Value>
BNEXT_INLINE void write_rows(const Grid& grid, const ColumnRuns& runs, Coefficients coefficients,
                             S* to, Value value) {
  constexpr std::int64_t row_block = 4, whole_length = vector_bytes / sizeof(S);
  for_each_rows(
      grid, runs.columns, runs.chunk, row_block,
      [&](std::int64_t r, std::int64_t count, std::int64_t width) __attribute__((always_inline)) {
        const std::int64_t stride = grid.width, offset = r * stride + runs.columns.first;
        // In column w of rows from `row` on, counted in values from the offset: rows share pointers
        // so, of which there would be too many for registers.
        const auto write_whole = [&](std::int64_t row, std::int64_t rows,
                                     std::int64_t w) __attribute__((always_inline)) {
          constexpr std::int64_t last = whole_length - vector_length<S>;
          const decltype(coefficients(Place<S>{w})) f[] = {coefficients(Place<S>{w}),
                                                           coefficients(Place<S>{w + last})};
#pragma GCC unroll 4
          for (std::int64_t k = 0; k < rows; ++k) {
            const std::int64_t i = row + k * stride + w;
            const u32v bits =
                Storage<S>::encode_whole([&](std::int64_t at) __attribute__((always_inline)) {
                  return value(f[at > 0], Place<S>{i + at}, offset);
                });
            store_vector(bits, to + offset + i);
          }
        };
        std::int64_t whole = 0;
        if (count == row_block) {
          for (; whole + whole_length <= width; whole += whole_length)
            write_whole(0, row_block, whole);
          if (whole == width) return;
        }
        for (std::int64_t row = 0; row < count * stride; row += stride) {
          std::int64_t w = whole;
          for (; w + whole_length <= width; w += whole_length) write_whole(row, 1, w);
          for (; w < width; w += vector_length<S>) {
            const std::int64_t left = width - w;
            const std::int64_t some = left < vector_length<S> ? left : vector_length<S>;
            const PartialPlace<S> place{row + w, some};
            place.write(value(coefficients(PartialPlace<S>{w, some}), place, offset), to + offset);
          }
        }
      });
}

// Writes value(run, coefficients, place, offset of the run) to each place of `to`, of a tile that
// was last read forwards, with what it goes by asked for again. `next` is summed on the way: reads
// of the one tile and writes of the other share memory better than either of them alone would use
// it, and it hides the time of the sums. `two`: as of `write`.
template <class S, class Tail, bool two, class Runs, class Channels, class Tile, class Value,
          int inputs>
BNEXT_INLINE void write_runs(const Grid& grid, const Runs& runs, const Channels& channels,
                             const S* const (&from)[inputs], const Fusion& fusion, S* to,
                             Tile& next, Value value) {
  Tail tail(fusion);
  if constexpr (Runs::of_columns && Tail::plain)
    if (runs.template rows_at_once<S>(grid)) {
      auto run = tail.run(0, 0, 0, {});
      write_rows(
          grid, runs, channels.coefficients, to,
          [&](const auto& coefficients, auto at, std::int64_t offset)
              __attribute__((always_inline)) { return value(run, coefficients, at, offset); });
      return;
    }
  for (std::int64_t b = runs.blocks; b-- > 0;) {
    const std::int64_t offset = runs.offset(b), length = runs.length_of(b);
    const Ahead ahead = runs.template ahead_again<S>(grid, b);
    auto run = tail.run(offset, length, runs.noted(b), runs.template ahead_backwards<S>(b));
    auto summed = next.run(runs.blocks - 1 - b);
    write<!Tail::known, two, !Runs::of_columns && !Tail::adds>(
        to + offset, length, runs.channel_length(b), grid.streaming, channels,
        [&](const auto& coefficients, auto at)
            __attribute__((always_inline)) { return value(run, coefficients, at, offset); },
        [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
          for (const S* x : from) ahead.fetch(x + offset, i, count);
          run.fetch(i, count);
          run.ready(i, count);
          summed.add_until(i + count);
        });
    run.finish();
    summed.finish();
  }
  next.add_blocks_from(runs.blocks);
}

template <class S, class Tail, class Runs, class Channels, class Tile>
void apply_runs(const Grid& grid, const Runs& runs, const Channels& channels, const S* x,
                const Fusion& fusion, S* y, Tile& next) {
  write_runs<S, Tail, false>(
      grid, runs, channels, {x}, fusion, y, next,
      [&](auto& run, const auto& affine, auto at, std::int64_t offset)
          __attribute__((always_inline)) { return run.value(apply(affine, at(x + offset)), at); });
}

template <class S, class Tail, class Tile>
void apply_rows(const Grid& grid, const Runs& runs, const S* x, const Affine<Compute<S>>* forward,
                const Fusion& fusion, S* y, Tile& next) {
  const ChannelsOfRow<Affine<Compute<S>>> channels{forward + runs.first_channel, runs.channels};
  apply_runs<S, Tail>(grid, runs, channels, x, fusion, y, next);
}

template <class S, class Tail>
void apply_columns(const Grid& grid, const ColumnRuns& runs, const S* x,
                   const Affine<Compute<S>>* forward, const Fusion& fusion, S* y) {
  const ColumnAffine<S> f(grid, runs.columns, forward);
  NoTile none;
  apply_runs<S, Tail>(grid, runs,
                      repeated_row([&](auto at) __attribute__((always_inline)) { return f(at); },
                                   runs.columns.width),
                      x, fusion, y, none);
}

template <class S, class Tail, class Runs, class Channels, class Tile>
void apply_grad_runs(const Grid& grid, const Runs& runs, const Channels& channels, const S* grad_y,
                     const S* x, const Fusion& fusion, S* grad_x, S* grad_residual, Tile& next) {
  const auto value = [&](auto& run, const auto& affine, auto at,
                         std::int64_t offset) __attribute__((always_inline)) {
    const auto v = run.input(at(x + offset));
    const auto through = run.gradient(at(grad_y + offset), at, normalised(affine.forward, v));
    if constexpr (Tail::adds)
      if (grad_residual != nullptr) at.write(through, grad_residual + offset);
    auto backward = affine.backward;
    // The same number, from which x is taken away once.
    if constexpr (!Tail::linear && Tail::known) backward.x_mean = affine.forward.mean;
    if constexpr (Tail::known)
      return apply(backward, through, v);
    else
      return apply_if_it_depends(backward, through, v);
  };
  write_runs<S, Tail, Tail::adds>(grid, runs, channels, {grad_y, x}, fusion, grad_x, next, value);
}

template <class S, class Tail, class Tile>
void apply_grad_rows(const Grid& grid, const Runs& runs, const S* grad_y, const S* x,
                     const Affine<Compute<S>>* forward, const GradAffine<Compute<S>>* backward,
                     const Fusion& fusion, S* grad_x, S* grad_residual, Tile& next) {
  using Both = BothAffine<Affine<Compute<S>>, GradAffine<Compute<S>>>;
  Both both[Grid::max_group_channels];
  for (std::int64_t c = 0; c < runs.channels; ++c)
    both[c] = {forward[runs.first_channel + c], backward[runs.first_channel + c]};
  apply_grad_runs<S, Tail>(grid, runs, ChannelsOfRow<Both>{both, runs.channels}, grad_y, x, fusion,
                           grad_x, grad_residual, next);
}

template <class S, class Tail>
void apply_grad_columns(const Grid& grid, const ColumnRuns& runs, const S* grad_y, const S* x,
                        const Affine<Compute<S>>* forward, const GradAffine<Compute<S>>* backward,
                        const Fusion& fusion, S* grad_x, S* grad_residual) {
  const ColumnAffine<S> f(grid, runs.columns, forward);
  const ColumnGradAffine<S> k(grid, runs.columns, backward);
  NoTile none;
  apply_grad_runs<S, Tail>(grid, runs,
                           repeated_row(
                               [&](auto at) __attribute__((always_inline)) {
                                 return BothAffine<decltype(f(at)), decltype(k(at))>{f(at), k(at)};
                               },
                               runs.columns.width),
                           grad_y, x, fusion, grad_x, grad_residual, none);
}

// -- the choice between the two -------------------------------------------------------------------

// Whether loops that write results also make the sums of the next group on their way: not where
// that would take too much code. Shorter vectors leave too few registers for sums of gradients in
// float64, or beside a residual or a mask, and a call that makes them costs more than it hides.
template <class S, class Tail>
constexpr bool sums_next = !compact && (Tail::plain || (many_registers && sizeof(S) != 8));
template <class S, class Tail>
constexpr bool grad_sums_next = sums_next<S, Tail> && (many_registers || sizeof(S) == 2);

template <class S>
void moments(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* x,
             Moments* partials) {
  (grid.columns ? moments_columns<S> : moments_rows<S>)(grid, group, chunk, x, partials);
}

template <class S, class Tail>
void apply(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* x,
           const Affine<Compute<S>>* forward, const Fusion& fusion, S* y, Moments* next_partials) {
  if (grid.columns) {
    apply_columns<S, Tail>(grid, ColumnRuns(grid, group, chunk), x, forward, fusion, y);
    return;
  }
  const Runs runs(grid, group, chunk);
  if constexpr (sums_next<S, Tail>)
    if (next_partials != nullptr) {
      const std::int64_t mirrored = grid.chunks - 1 - chunk;
      FirstMomentTile<S> next(grid, Runs(grid, group + 1, mirrored), x, nullptr);
      apply_rows<S, Tail>(grid, runs, x, forward, fusion, y, next);
      next.store(mirrored, next_partials);
      return;
    }
  NoTile none;
  apply_rows<S, Tail>(grid, runs, x, forward, fusion, y, none);
}

template <class S, class Tail>
void grad_sums(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* grad_y,
               const S* x, const double* origin, const Affine<Compute<S>>* forward,
               const Fusion& fusion, GradSums* partials) {
  (grid.columns ? grad_sums_columns<S, Tail> : grad_sums_rows<S, Tail>)(grid, group, chunk, grad_y,
                                                                        x, origin, forward, fusion,
                                                                        partials);
}

// SumTail: of the sums that are made on the way.
template <class S, class Tail, class SumTail>
void apply_grad(const Grid& grid, std::int64_t group, std::int64_t chunk, const S* grad_y,
                const S* x, const double* origin, const Affine<Compute<S>>* forward,
                const GradAffine<Compute<S>>* backward, const Fusion& fusion, S* grad_x,
                S* grad_residual, GradSums* next_partials) {
  if (grid.columns) {
    apply_grad_columns<S, Tail>(grid, ColumnRuns(grid, group, chunk), grad_y, x, forward, backward,
                                fusion, grad_x, grad_residual);
    return;
  }
  const Runs runs(grid, group, chunk);
  if constexpr (grad_sums_next<S, Tail>)
    if (next_partials != nullptr) {
      const std::int64_t mirrored = grid.chunks - 1 - chunk;
      GradTile<S, SumTail> next(grid, Runs(grid, group + 1, mirrored), grad_y, x, origin, forward,
                                fusion);
      apply_grad_rows<S, Tail>(grid, runs, grad_y, x, forward, backward, fusion, grad_x,
                               grad_residual, next);
      next.store(mirrored, next_partials);
      return;
    }
  NoTile none;
  apply_grad_rows<S, Tail>(grid, runs, grad_y, x, forward, backward, fusion, grad_x, grad_residual,
                           none);
}

}  // namespace
}  // namespace bnext
