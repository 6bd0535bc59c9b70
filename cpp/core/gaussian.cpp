// Normal random numbers that follow from (seed, offset, element), by the method of Box and Muller.
// Compiled once, of operations that IEEE defines: the same bits on every processor.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bnext/dropout.hpp"
#include "core/check.hpp"
#include "core/philox.hpp"
#include "cpu/parallel.hpp"

namespace bnext {
namespace {

// A span of elements uses as many consecutive Philox blocks as there are lanes; element e of the
// span has word e / lanes of block e % lanes. Words 0 and 1 make a pair of normal numbers, and so
// do words 2 and 3.
constexpr int lanes = 64, span = 4 * lanes;

// ln u for positive normal u, within 1e-7 of it (the coefficients are those of Cephes' logf).
inline float log_of(float u) {
  std::uint32_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  auto exponent = static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 126);
  bits = (bits & 0x7FFFFFu) | 0x3F000000u;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const bool small = m < 0.70710678f;
  exponent -= small ? 1.0f : 0.0f;
  m = (small ? m + m : m) - 1.0f;
  const float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z - 2.12194440e-4f * exponent - 0.5f * z;
  return m + y + 0.693359375f * exponent;
}

// Two normal numbers of two random words.
inline void normals(std::uint32_t radius_word, std::uint32_t angle_word, float* first,
                    float* second) {
  // u in [2^-33, 1]. Two halves, since only signed integers have a vector instruction for it.
  const auto high = static_cast<float>(static_cast<std::int32_t>(radius_word >> 16));
  const auto low = static_cast<float>(static_cast<std::int32_t>(radius_word & 0xFFFFu));
  const float u = high * 0x1p-16f + (low + 0.5f) * 0x1p-32f;
  const float radius = std::sqrt(std::max(-2.0f * log_of(u), 0.0f));
  // The angle as a quarter of the circle and a rest of at most pi/4 to both sides.
  const std::uint32_t quarter = (angle_word + 0x20000000u) >> 30;
  const auto rest = static_cast<std::int32_t>(angle_word - (quarter << 30));
  const float a = static_cast<float>(rest) * 1.46291808e-9f;  // 2 pi / 2^32
  const float z = a * a;
  const float sine =
      ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * a + a;
  const float cosine =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swapped = (quarter & 1u) != 0;
  const float x = swapped ? -sine : cosine, y = swapped ? cosine : sine;
  const float sign = (quarter & 2u) != 0 ? -radius : radius;
  *first = sign * x;
  *second = sign * y;
}

void make_span(const DropoutDraw& draw, std::int64_t number, float* z) {
  std::uint32_t word[4][lanes];
  neighbour_blocks(draw.seed, draw.offset, static_cast<std::uint64_t>(number) * lanes, word);
  for (int w = 0; w < 4; w += 2)
    for (int lane = 0; lane < lanes; ++lane)
      normals(word[w][lane], word[w + 1][lane], z + w * lanes + lane, z + (w + 1) * lanes + lane);
}

}  // namespace

void gaussian_dropout_noise(double p, const DropoutDraw& draw, std::int64_t first,
                            std::int64_t count, float* noise) {
  const Check check("gaussian_dropout_noise", {});
  if (!(p >= 0 && p < 1)) check.fail("p", "expected a probability in [0, 1), got " + to_string(p));
  check.elements(first, count, "noise", noise);
  if (count == 0) return;
  const auto deviation = static_cast<float>(std::sqrt(p / (1 - p)));
  constexpr std::int64_t spans_per_task = 32;
  // Nothing is rounded up beyond `end`, which may be the largest of all numbers.
  const std::int64_t end = first + count, first_span = first / span;
  const std::int64_t spans = (end - 1) / span + 1 - first_span;
  parallel_for((spans + spans_per_task - 1) / spans_per_task, count, [&](std::int64_t task) {
    const std::int64_t begin = first_span + task * spans_per_task;
    const std::int64_t stop = std::min(begin + spans_per_task, first_span + spans);
    for (std::int64_t number = begin; number < stop; ++number) {
      float z[span];
      make_span(draw, number, z);
      const std::int64_t start = number * span, last = std::min<std::int64_t>(span, end - start);
      for (std::int64_t i = std::max<std::int64_t>(first - start, 0); i < last; ++i)
        noise[start - first + i] = 1.0f + deviation * z[i];
    }
  });
}

}  // namespace bnext
