#include "bnext/random.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bind/arrays.hpp"
#include "bind/random.hpp"

namespace bnext::bind {
namespace {

py::dict get_state(const Generator& generator) {
  py::dict state;
  state["seed"] = generator.seed();
  state["offset"] = generator.offset();
  return state;
}

void set_state(Generator& generator, const py::object& state) {
  if (!py::isinstance<py::dict>(state))
    throw py::type_error("Generator: state: expected a dict, got " + type_name(state));
  const auto dict = state.cast<py::dict>();
  if (dict.size() != 2 || !dict.contains("seed") || !dict.contains("offset"))
    throw py::value_error("Generator: state: expected the keys 'seed' and 'offset', got " +
                          py::repr(dict).cast<std::string>());
  const std::uint64_t seed = word("Generator", "seed", dict["seed"]);
  generator.set(seed, word("Generator", "offset", dict["offset"]));
}

}  // namespace

std::uint64_t word(const char* operation, const char* argument, py::handle object) {
  const std::string where = std::string(operation) + ": " + argument + ": ";
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index || PyBool_Check(object.ptr())) {
    PyErr_Clear();
    throw py::type_error(where + "expected an integer, got " + type_name(object));
  }
  const unsigned long long value = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw py::value_error(where + "expected 0 <= " + argument + " < 2**64, got " +
                          py::str(index).cast<std::string>());
  }
  return value;
}

std::shared_ptr<Generator> generator_of(const char* operation, py::handle object) {
  if (object.is_none())
    return py::module_::import("bnext._core")
        .attr("default_generator")
        .cast<std::shared_ptr<Generator>>();
  if (py::isinstance<Generator>(object)) return object.cast<std::shared_ptr<Generator>>();
  throw py::type_error(std::string(operation) + ": generator: expected a bnext.Generator, got " +
                       type_name(object));
}

}  // namespace bnext::bind

void bind_random(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace bnext::bind;
  using bnext::Generator;
  py::class_<Generator, std::shared_ptr<Generator>>(
      m, "Generator",
      R"(A source of random numbers for dropout: Philox4x32-10, counter-based.

Parameters
----------
seed : int
    0 <= seed < 2**64.

Attributes
----------
state : dict
    ``{"seed": int, "offset": int}``, where `offset` is the number of the next call that draws;
    assign it to go back to where it was.

Notes
-----
Each call of an operation takes one offset, whatever the size of its array, and the bits of
element i follow from (seed, offset, i) alone. Threads may share a generator: no two calls get
the same offset.)")
      .def(py::init([](py::handle seed) {
             return std::make_shared<Generator>(word("Generator", "seed", seed));
           }),
           py::arg("seed"))
      .def_property("state", get_state, set_state)
      .def("__repr__",
           [](const Generator& generator) {
             return "Generator(seed=" + std::to_string(generator.seed()) +
                    ", offset=" + std::to_string(generator.offset()) + ")";
           })
      .def(py::pickle([](const Generator& generator) { return get_state(generator); },
                      [](const py::dict& state) {
                        auto generator = std::make_shared<Generator>(0);
                        set_state(*generator, state);
                        return generator;
                      }));

  m.attr("default_generator") = std::make_shared<Generator>(0);
  m.def("philox4x32_10", bnext::philox4x32_10, py::arg("counter"), py::arg("key"),
        "The four words of one block; counter is four words, key two.");
}
