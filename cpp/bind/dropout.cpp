#include "bnext/dropout.hpp"

#include <pybind11/stl.h>

#include "bind/arrays.hpp"
#include "bind/device.hpp"
#include "bind/random.hpp"
#include "core/check.hpp"

namespace bnext::bind {
namespace {

// What backward needs: no mask, since the same bits can be drawn again.
struct DropoutSaved {
  double p;
  DropoutDraw draw;
  Shape shape;
  Shape mask_shape;  // empty: that of x
  bool alpha;
};

}  // namespace

Shape shape_argument(const char* operation, const char* argument, py::handle object) {
  Shape shape;
  try {
    for (const py::handle extent : object) shape.push_back(extent.cast<std::int64_t>());
  } catch (const std::exception&) {
    throw py::type_error(std::string(operation) + ": " + argument +
                         ": expected a tuple of integers, got " +
                         py::repr(object).cast<std::string>());
  }
  return shape;
}

namespace {

py::object run_forward(const char* operation, py::handle x, py::handle p, py::handle mask_shape,
                       py::handle generator, py::handle out, bool alpha) {
  if (is_on_device(x)) return device_operation(operation)(x, p, mask_shape, generator, out);
  const auto source = generator_of(operation, generator);
  const py::array from = input(operation, "x", x);
  DropoutForward args;
  args.x = view(from);
  args.p = number(operation, "p", p);
  args.alpha = alpha;
  if (!mask_shape.is_none()) {
    args.mask_shape = shape_argument(operation, "mask_shape", mask_shape);
    if (args.mask_shape.size() != args.x.shape.size())
      throw py::value_error(std::string(operation) + ": mask_shape: expected " +
                            std::to_string(args.x.shape.size()) + " extents, as x has, got " +
                            py::repr(mask_shape).cast<std::string>());
  }
  const py::array y = output(operation, out, from);
  args.y = view(y);
  DropoutSaved saved{args.p, {}, args.x.shape, args.mask_shape, alpha};
  {
    const py::gil_scoped_release release;
    saved.draw = dropout_forward(args, *source);
  }
  return py::make_tuple(y, saved);
}

py::object forward(py::handle x, py::handle p, py::handle mask_shape, py::handle generator,
                   py::handle out) {
  return run_forward("dropout_forward", x, p, mask_shape, generator, out, false);
}

py::object alpha_forward(py::handle x, py::handle p, py::handle mask_shape, py::handle generator,
                         py::handle out) {
  return run_forward("alpha_dropout_forward", x, p, mask_shape, generator, out, true);
}

py::object backward(py::handle grad_y, py::handle saved, py::handle out) {
  constexpr const char* operation = "dropout_backward";
  if (is_of_device(saved)) return device_operation(operation)(grad_y, saved, out);
  if (!py::isinstance<DropoutSaved>(saved))
    throw py::type_error(std::string(operation) +
                         ": saved: expected what dropout_forward returned, got " +
                         type_name(saved));
  const auto& s = saved.cast<const DropoutSaved&>();
  const py::array from = input(operation, "grad_y", grad_y);
  if (shape_of(from) != s.shape)
    throw py::value_error(std::string(operation) + ": grad_y: expected shape " +
                          to_string(s.shape) + ", got " + to_string(shape_of(from)));
  const py::array grad_x = output(operation, out, from);
  const DropoutBackward args{view(from), s.p, s.draw, view(grad_x), s.mask_shape, s.alpha};
  {
    const py::gil_scoped_release release;
    dropout_backward(args);
  }
  return grad_x;
}

// A new array that make(p, draw, count, memory) fills.
template <class T, class Make>
py::array_t<T> filled(const char* operation, py::handle seed, py::handle offset, py::handle shape,
                      py::handle p, Make make) {
  const DropoutDraw source{word(operation, "seed", seed), word(operation, "offset", offset)};
  const double probability = number(operation, "p", p);
  const Shape extents = shape_argument(operation, "shape", shape);
  std::int64_t count = 1;
  for (const std::int64_t extent : extents) {
    if (extent < 0)
      throw py::value_error(std::string(operation) + ": shape: expected no negative extent, got " +
                            to_string(extents));
    count *= extent;
  }
  py::array_t<T> array(extents);
  T* const to = array.mutable_data();
  const py::gil_scoped_release release;
  make(probability, source, count, to);
  return array;
}

py::array mask(py::handle seed, py::handle offset, py::handle shape, py::handle p,
               std::int64_t first) {
  return filled<bool>(
      "dropout_mask", seed, offset, shape, p,
      [&](double probability, const DropoutDraw& source, std::int64_t count, bool* to) {
        dropout_mask(probability, source, first, count, reinterpret_cast<std::uint8_t*>(to));
      });
}

py::array gaussian_noise(py::handle seed, py::handle offset, py::handle shape, py::handle p,
                         std::int64_t first) {
  return filled<float>(
      "gaussian_dropout_noise", seed, offset, shape, p,
      [&](double probability, const DropoutDraw& source, std::int64_t count, float* to) {
        gaussian_dropout_noise(probability, source, first, count, to);
      });
}

// What operations that are written in Python do at the border: see input, output and Check.
py::tuple prepare(const std::string& operation, const std::string& argument, py::handle x,
                  py::handle out) {
  const py::array from = input(operation.c_str(), argument.c_str(), x);
  const py::array to = output(operation.c_str(), out, from);
  const Check check(operation.c_str(), view(from));
  check.same_kind("out", view(to), view(from));
  check.no_overlap({{"out", view(to)}}, {{argument.c_str(), view(from)}}, {});
  return py::make_tuple(from, to);
}

py::tuple draw(const std::string& operation, py::handle generator, bool advance) {
  const auto source = generator_of(operation.c_str(), generator);
  const std::uint64_t offset = advance ? source->next() : source->offset();
  return py::make_tuple(source->seed(), offset);
}

}  // namespace
}  // namespace bnext::bind

void bind_dropout(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace bnext::bind;
  py::class_<DropoutSaved>(m, "DropoutSaved",
                           R"(What `dropout_backward` needs: p and where the mask was drawn.

Attributes
----------
p : float
seed, offset : int
mask_shape : tuple of int
    ``dropout_mask(seed, offset, mask_shape, p)`` is the mask.)")
      .def_readonly("p", &DropoutSaved::p)
      .def_property_readonly("seed", [](const DropoutSaved& s) { return s.draw.seed; })
      .def_property_readonly("offset", [](const DropoutSaved& s) { return s.draw.offset; })
      .def_property_readonly(
          "mask_shape",
          [](const DropoutSaved& s) {
            return py::tuple(py::cast(s.mask_shape.empty() ? s.shape : s.mask_shape));
          })
      .def("__repr__", [](const DropoutSaved& s) {
        return "DropoutSaved(p=" + py::repr(py::float_(s.p)).cast<std::string>() +
               ", seed=" + std::to_string(s.draw.seed) +
               ", offset=" + std::to_string(s.draw.offset) + ")";
      });

  m.def("dropout_forward", forward, py::arg("x"), py::arg("p") = 0.5, py::kw_only(),
        py::arg("mask_shape") = py::none(), py::arg("generator") = py::none(),
        py::arg("out") = py::none(),
        R"(Zero each element with probability `p`, scale the others by 1 / (1 - p).

Parameters
----------
x : array_like, float32, float64, float16 or bfloat16, any shape
p : float, default 0.5
    Probability of a zero, exact to 2**-32. 0 copies and draws nothing, 1 gives zeros.
mask_shape : tuple of int, optional
    Shape of a mask that is broadcast to x, with 1 for the axes that share it (Keras calls it
    `noise_shape`): (N, C, 1, 1) drops whole channels, (1, C, H, W) the same elements of all
    samples. By default the shape of x. Axes of 1 may lie in at most two groups of neighbours.
generator : Generator, optional
    Where to draw from; `bnext.random.default_generator` if not given.
out : ndarray, optional
    Where to write, of x's shape and dtype; may be `x` itself.

Returns
-------
y : ndarray, like x
saved : DropoutSaved
    For `dropout_backward`: ``p``, ``seed``, ``offset``, ``mask_shape``.

Raises
------
ValueError
    If `p` is outside [0, 1], `mask_shape` does not fit, or `out` has another shape, is read-only, not contiguous or
    overlaps `x` in part. Nothing has been written or drawn then.
TypeError
    For other dtypes and kinds of arguments.

Notes
-----
Element i in C order is dropped where 32 random bits that follow from (seed, offset, i) alone
are below p 2**32: the mask does not depend on threads, processor or dtype.

References
----------
Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
JMLR 15 (2014).

Examples
--------
>>> import numpy as np, bnext
>>> y, saved = bnext.functional.dropout_forward(np.ones(6), 0.5, generator=bnext.Generator(1))
>>> grad_x = bnext.functional.dropout_backward(np.ones(6), saved)
>>> bool(np.array_equal(y, grad_x))
True)");

  m.def("alpha_dropout_forward", alpha_forward, py::arg("x"), py::arg("p") = 0.5, py::kw_only(),
        py::arg("mask_shape") = py::none(), py::arg("generator") = py::none(),
        py::arg("out") = py::none(),
        R"(Set each element to what SELU saturates at with probability `p`, then scale and shift.

y = a (x - p s) where x is kept and a s (1 - p) where it is dropped, with s = -1.7580993408473766
and a = ((1 - p) (1 + p s^2))^(-1/2): of inputs with mean 0 and variance 1, as SELU makes them,
both stay what they are.

Parameters
----------
x, p, mask_shape, generator, out
    As `dropout_forward`, with the same mask. p=0 copies and draws nothing, p=1 gives zeros.

Returns
-------
y : ndarray, like x
saved : DropoutSaved
    For `dropout_backward`, which is a grad_y where x was kept, 0 elsewhere.

Raises
------
ValueError, TypeError
    As `dropout_forward`.

References
----------
Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, arXiv:1706.02515.

Examples
--------
>>> import numpy as np, bnext
>>> x = np.random.default_rng(0).normal(size=100_000)
>>> y, saved = bnext.functional.alpha_dropout_forward(x, 0.3, generator=bnext.Generator(1))
>>> bool(abs(y.mean()) < 0.01), bool(abs(y.std() - 1) < 0.01)
(True, True))");

  m.def("dropout_backward", backward, py::arg("grad_y"), py::arg("saved"), py::kw_only(),
        py::arg("out") = py::none(),
        R"(Gradient of `dropout_forward`: grad_y / (1 - p) where x was kept, 0 elsewhere.

Also of the other functions that return a `DropoutSaved`, with the factors they used.

Parameters
----------
grad_y : array_like
    Of the shape and dtype that forward returned.
saved : DropoutSaved
    From forward.
out : ndarray, optional
    Where to write; may be `grad_y` itself.

Returns
-------
grad_x : ndarray, like grad_y

Raises
------
ValueError, TypeError
    As `dropout_forward`; also if `grad_y` has not the shape of x.)");

  m.def("dropout_mask", mask, py::arg("seed"), py::arg("offset"), py::arg("shape"), py::arg("p"),
        py::kw_only(), py::arg("first") = 0,
        R"(The mask that `dropout_forward` uses: True where an element is kept.

Parameters
----------
seed, offset : int
    As `DropoutSaved` has them.
shape : tuple of int
    Of x, or its `mask_shape`.
p : float
    Probability of a False.
first : int, default 0
    Number in C order of the first element, for a part of a larger mask.

Returns
-------
kept : ndarray of bool

Raises
------
ValueError
    If `p` is outside [0, 1] or an extent is negative.
TypeError
    For other kinds of arguments.

Examples
--------
>>> import numpy as np, bnext
>>> x = np.ones((2, 8))
>>> y, saved = bnext.functional.dropout_forward(x, 0.5, generator=bnext.Generator(1))
>>> kept = bnext.functional.dropout_mask(saved.seed, saved.offset, x.shape, saved.p)
>>> bool(np.array_equal(y, np.where(kept, x / (1 - saved.p), 0)))
True)");

  m.def("gaussian_dropout_noise", gaussian_noise, py::arg("seed"), py::arg("offset"),
        py::arg("shape"), py::arg("p"), py::kw_only(), py::arg("first") = 0,
        R"(The factors of `gaussian_dropout_forward`, from N(1, p / (1 - p)).

Parameters
----------
seed, offset : int
    As `GaussianDropoutSaved` has them.
shape : tuple of int
    Of x, or its `mask_shape`.
p : float
    In [0, 1).
first : int, default 0
    Number in C order of the first element, for a part of a larger array.

Returns
-------
noise : ndarray of float32
    That of an element follows from (seed, offset), its number and p alone.

Raises
------
ValueError
    If `p` is outside [0, 1) or an extent is negative.
TypeError
    For other kinds of arguments.

References
----------
Box & Muller, "A note on the generation of random normal deviates", 1958.

Examples
--------
>>> from bnext import functional as F
>>> noise = F.gaussian_dropout_noise(0, 0, (100_000,), 0.2)
>>> bool(abs(noise.mean() - 1) < 0.01), bool(abs(noise.var() - 0.25) < 0.01)
(True, True))");

  m.def("prepare", prepare, py::arg("operation"), py::arg("argument"), py::arg("x"), py::arg("out"),
        "(x, y) as the core takes them: arrays of a known dtype, checked");
  m.def(
      "draw", draw, py::arg("operation"), py::arg("generator"), py::arg("advance"),
      "(seed, offset) of the next call of a generator, or of the default one; `advance` takes it");
}
