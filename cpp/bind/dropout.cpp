#include "bnext/dropout.hpp"

#include "bind/arrays.hpp"
#include "bind/random.hpp"

namespace bnext::bind {
namespace {

// What backward needs: no mask, since the same bits can be drawn again.
struct DropoutSaved {
  double p;
  DropoutDraw draw;
};

py::tuple forward(py::handle x, py::handle p, py::handle generator, py::handle out) {
  constexpr const char* operation = "dropout_forward";
  const auto source = generator_of(operation, generator);
  const py::array from = input(operation, "x", x);
  DropoutForward args;
  args.x = view(from);
  args.p = number(operation, "p", p);
  const py::array y = output(operation, out, from);
  args.y = view(y);
  DropoutSaved saved{args.p, {}};
  {
    const py::gil_scoped_release release;
    saved.draw = dropout_forward(args, *source);
  }
  return py::make_tuple(y, saved);
}

py::array backward(py::handle grad_y, py::handle saved, py::handle out) {
  constexpr const char* operation = "dropout_backward";
  if (!py::isinstance<DropoutSaved>(saved))
    throw py::type_error(std::string(operation) +
                         ": saved: expected what dropout_forward returned, got " +
                         type_name(saved));
  const auto& s = saved.cast<const DropoutSaved&>();
  const py::array from = input(operation, "grad_y", grad_y);
  const py::array grad_x = output(operation, out, from);
  const DropoutBackward args{view(from), s.p, s.draw, view(grad_x)};
  const py::gil_scoped_release release;
  dropout_backward(args);
  return grad_x;
}

}  // namespace
}  // namespace bnext::bind

void bind_dropout(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace bnext::bind;
  py::class_<DropoutSaved>(m, "DropoutSaved",
                           "What `dropout_backward` needs: p and where the mask was drawn.")
      .def_readonly("p", &DropoutSaved::p)
      .def_property_readonly("seed", [](const DropoutSaved& s) { return s.draw.seed; })
      .def_property_readonly("offset", [](const DropoutSaved& s) { return s.draw.offset; })
      .def("__repr__", [](const DropoutSaved& s) {
        return "DropoutSaved(p=" + py::repr(py::float_(s.p)).cast<std::string>() +
               ", seed=" + std::to_string(s.draw.seed) +
               ", offset=" + std::to_string(s.draw.offset) + ")";
      });

  m.def("dropout_forward", forward, py::arg("x"), py::arg("p") = 0.5, py::kw_only(),
        py::arg("generator") = py::none(), py::arg("out") = py::none(),
        R"(Zero each element with probability `p`, scale the others by 1 / (1 - p).

Parameters
----------
x : array_like, float32 or float64, any shape
p : float, default 0.5
    Probability of a zero, exact to 2**-32. 0 copies and draws nothing, 1 gives zeros.
generator : Generator, optional
    Where to draw from; `bnext.random.default_generator` if not given.
out : ndarray, optional
    Where to write, of x's shape and dtype; may be `x` itself.

Returns
-------
y : ndarray, like x
saved : DropoutSaved
    For `dropout_backward`: ``p``, ``seed``, ``offset``.

Raises
------
ValueError
    If `p` is outside [0, 1], or `out` has another shape, is read-only, not contiguous or
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

  m.def("dropout_backward", backward, py::arg("grad_y"), py::arg("saved"), py::kw_only(),
        py::arg("out") = py::none(),
        R"(Gradient of `dropout_forward`: grad_y / (1 - p) where x was kept, 0 elsewhere.

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
    As `dropout_forward`.)");
}
