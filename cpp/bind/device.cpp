#include "bind/device.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "bind/random.hpp"
#include "core/check.hpp"
#include "cuda/backend.hpp"

namespace bnext::bind {
namespace {

// -- DLPack (dlpack.h, version 0.8: the one that consumers ask for by default) -------------------

struct DLDevice {
  std::int32_t type, id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr std::int32_t dl_cuda = 2, dl_cuda_managed = 13;
constexpr std::uint8_t dl_float = 2, dl_bfloat = 4;
constexpr const char *dl_name = "dltensor", *dl_used_name = "used_dltensor";

// -- arrays ---------------------------------------------------------------------------------------

// Memory of a GPU that is ours.
struct Memory {
  Place place;
  void* data;

  Memory(const Place& place_, std::size_t bytes)
      : place(place_), data(cuda::allocate(place_, bytes)) {}
  ~Memory() { cuda::release(place, data); }
  Memory(const Memory&) = delete;
};

// An array of a GPU, with whatever keeps its memory.
struct DeviceArray {
  Array array;
  Stream stream = nullptr;  // where our results are made
  py::object owner = py::none();
  std::shared_ptr<Memory> memory = nullptr;
};

DType dtype_named(const std::string& name) {
#define BNEXT_MATCH(known, type, compute) \
  if (name == #known) return DType::known;
  BNEXT_DTYPES(BNEXT_MATCH)
#undef BNEXT_MATCH
  throw DTypeError("expected a dtype of float32, float64, float16 or bfloat16, got " + name);
}

Stream stream_at(std::uintptr_t handle) {
  return reinterpret_cast<Stream>(handle);
}

Array array_on(void* data, const std::string& dtype, const Shape& shape, int device) {
  Array array(data, dtype_named(dtype), shape);
  array.device = {DeviceKind::cuda, device};
  return array;
}

DeviceArray borrow(std::uintptr_t pointer, const std::string& dtype, const Shape& shape, int device,
                   py::object owner) {
  return {array_on(reinterpret_cast<void*>(pointer), dtype, shape, device), nullptr,
          std::move(owner), nullptr};
}

DeviceArray empty(const Shape& shape, const std::string& dtype, int device, std::uintptr_t stream) {
  DeviceArray made{array_on(nullptr, dtype, shape, device), stream_at(stream), py::none(), nullptr};
  made.memory = std::make_shared<Memory>(Place{device, made.stream},
                                         static_cast<std::size_t>(made.array.bytes()));
  made.array.data = made.memory->data;
  return made;
}

DeviceArray from_dlpack(const py::capsule& capsule) {
  if (std::string(capsule.name()) != dl_name)
    throw py::type_error("DLPack: expected a capsule that nobody has used");
  auto* managed = capsule.get_pointer<DLManagedTensor>();
  const DLTensor& t = managed->tensor;
  if (t.device.type != dl_cuda && t.device.type != dl_cuda_managed)
    throw py::value_error("DLPack: expected memory of a CUDA device");
  const bool is_float =
      t.dtype.lanes == 1 && (t.dtype.code == dl_float || t.dtype.code == dl_bfloat);
  const std::string dtype = !is_float                   ? "code " + std::to_string(t.dtype.code)
                            : t.dtype.code == dl_bfloat ? "bfloat16"
                                                        : "float" + std::to_string(t.dtype.bits);
  const Shape shape(t.shape, t.shape + t.ndim);
  std::int64_t expected = 1;
  for (int axis = t.ndim; t.strides != nullptr && axis-- > 0; expected *= t.shape[axis])
    if (t.shape[axis] != 1 && t.strides[axis] != expected)
      throw py::value_error("DLPack: expected a C-contiguous array");
  DeviceArray result{
      array_on(static_cast<unsigned char*>(t.data) + t.byte_offset, dtype, shape, t.device.id)};
  PyCapsule_SetName(capsule.ptr(), dl_used_name);
  result.owner = py::capsule(managed, [](void* owned) {
    auto* tensor = static_cast<DLManagedTensor*>(owned);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  });
  return result;
}

// What a consumer holds, until it calls the deleter.
struct Exported {
  DLManagedTensor managed;
  DeviceArray array;
};

py::capsule to_dlpack(const DeviceArray& a, py::handle stream) {
  // -1 asks for no order between the streams.
  if (!stream.is_none() && stream.cast<std::int64_t>() != -1)
    cuda::order({a.array.device.index, a.stream}, stream_at(stream.cast<std::uintptr_t>()));
  auto exported = std::make_unique<Exported>(Exported{{}, a});
  DLTensor& t = exported->managed.tensor;
  t.data = a.array.data;
  t.device = {dl_cuda, a.array.device.index};
  t.ndim = static_cast<std::int32_t>(a.array.shape.size());
  t.dtype = {a.array.dtype == DType::bfloat16 ? dl_bfloat : dl_float,
             static_cast<std::uint8_t>(dtype_size(a.array.dtype) * 8), 1};
  t.shape = exported->array.array.shape.data();
  exported->managed.context = exported.get();
  exported->managed.deleter = [](DLManagedTensor* of) {
    const py::gil_scoped_acquire acquire;
    delete static_cast<Exported*>(of->context);
  };
  PyObject* const capsule = PyCapsule_New(&exported->managed, dl_name, [](PyObject* object) {
    if (!PyCapsule_IsValid(object, dl_name)) return;  // somebody has taken it
    auto* of = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(object, dl_name));
    of->deleter(of);
  });
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::dict array_interface(const DeviceArray& a) {
  if (a.array.dtype == DType::bfloat16)
    throw py::attribute_error("__cuda_array_interface__ has no bfloat16; use DLPack");
  py::dict interface;
  interface["shape"] = py::tuple(py::cast(a.array.shape));
  interface["typestr"] = "<f" + std::to_string(dtype_size(a.array.dtype));
  interface["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(a.array.data), false);
  interface["version"] = 3;
  // 0 would be ambiguous there: 1 is the legacy default stream.
  const auto stream = reinterpret_cast<std::uintptr_t>(a.stream);
  interface["stream"] = stream == 0 ? 1 : stream;
  return interface;
}

// -- operations -----------------------------------------------------------------------------------

Array optional(const DeviceArray* array) {
  return array != nullptr ? array->array : Array();
}

DropoutDraw draw_of(std::uint64_t seed, std::uint64_t offset, std::uintptr_t device_seed) {
  return {seed, offset, reinterpret_cast<const std::uint64_t*>(device_seed)};
}

void forward(const DeviceArray& x, const DeviceArray* weight, const DeviceArray* bias,
             const DeviceArray* residual, const DeviceArray& y, const DeviceArray& mean,
             const DeviceArray& var, const DeviceArray& inv_std, std::uintptr_t passes,
             py::handle eps, py::handle channel_axis, py::handle activation,
             py::handle negative_slope, py::handle dropout, std::uint64_t seed,
             std::uint64_t offset, std::uintptr_t device_seed, std::uintptr_t stream) {
  constexpr const char* operation = "batch_norm_forward";
  BatchNormForward args;
  args.x = x.array;
  args.weight = optional(weight);
  args.bias = optional(bias);
  args.eps = number(operation, "eps", eps);
  args.channel_axis = integer(operation, "channel_axis", channel_axis);
  args.residual = optional(residual);
  args.activation = activation_of(operation, activation);
  args.negative_slope = number(operation, "negative_slope", negative_slope);
  args.dropout = number(operation, "dropout", dropout);
  args.draw = draw_of(seed, offset, device_seed);
  args.passes = reinterpret_cast<std::uint8_t*>(passes);
  args.y = y.array;
  args.mean = mean.array;
  args.var = var.array;
  args.inv_std = inv_std.array;
  args.stream = stream_at(stream);
  const py::gil_scoped_release release;
  batch_norm_forward(args);
}

void backward(const DeviceArray& grad_y, const DeviceArray& x, const DeviceArray* weight,
              const DeviceArray* bias, const DeviceArray& mean, const DeviceArray& inv_std,
              const DeviceArray* residual, std::uintptr_t passes, const DeviceArray& grad_x,
              const DeviceArray* grad_residual, const DeviceArray* grad_weight,
              const DeviceArray* grad_bias, int channel_axis, py::handle activation,
              double negative_slope, double dropout, std::uint64_t seed, std::uint64_t offset,
              std::uintptr_t device_seed, bool batch_statistics, bool from_result,
              std::uintptr_t stream) {
  BatchNormBackward args;
  args.grad_y = grad_y.array;
  args.x = x.array;
  args.weight = optional(weight);
  args.bias = optional(bias);
  args.mean = mean.array;
  args.inv_std = inv_std.array;
  args.channel_axis = channel_axis;
  args.residual = optional(residual);
  args.activation = activation_of("batch_norm_backward", activation);
  args.negative_slope = negative_slope;
  args.dropout = dropout;
  args.draw = draw_of(seed, offset, device_seed);
  args.passes = reinterpret_cast<const std::uint8_t*>(passes);
  args.batch_statistics = batch_statistics;
  args.from_result = from_result;
  args.grad_x = grad_x.array;
  args.grad_residual = optional(grad_residual);
  args.grad_weight = optional(grad_weight);
  args.grad_bias = optional(grad_bias);
  args.stream = stream_at(stream);
  const py::gil_scoped_release release;
  batch_norm_backward(args);
}

void inference(const DeviceArray& x, const DeviceArray* mean, const DeviceArray* var,
               const DeviceArray* weight, const DeviceArray* bias, const DeviceArray* residual,
               const DeviceArray& y, py::handle eps, py::handle channel_axis, py::handle activation,
               py::handle negative_slope, std::uintptr_t stream) {
  constexpr const char* operation = "batch_norm_inference";
  BatchNormInference args;
  args.x = x.array;
  args.mean = optional(mean);
  args.var = optional(var);
  args.weight = optional(weight);
  args.bias = optional(bias);
  args.eps = number(operation, "eps", eps);
  args.channel_axis = integer(operation, "channel_axis", channel_axis);
  args.residual = optional(residual);
  args.activation = activation_of(operation, activation);
  args.negative_slope = number(operation, "negative_slope", negative_slope);
  args.y = y.array;
  args.stream = stream_at(stream);
  const py::gil_scoped_release release;
  batch_norm_inference(args);
}

void dropout(const DeviceArray& x, const DeviceArray& y, py::handle p, const Shape& mask_shape,
             bool alpha, bool is_backward, std::uint64_t seed, std::uint64_t offset,
             std::uintptr_t device_seed, std::uintptr_t stream) {
  const double probability = number(is_backward ? "dropout_backward" : "dropout_forward", "p", p);
  const DropoutDraw draw = draw_of(seed, offset, device_seed);
  const py::gil_scoped_release release;
  if (is_backward)
    dropout_backward({x.array, probability, draw, y.array, mask_shape, alpha, stream_at(stream)});
  else
    dropout_forward({x.array, probability, y.array, mask_shape, alpha, stream_at(stream)}, draw);
}

}  // namespace

bool is_on_device(py::handle object) {
  // Exact NumPy arrays, the usual case, cost nothing here.
  PyTypeObject* const type = Py_TYPE(object.ptr());
  if (type == py::detail::npy_api::get().PyArray_Type_ || type == &PyList_Type ||
      type == &PyTuple_Type)
    return false;
  if (py::isinstance<DeviceArray>(object) || py::hasattr(object, "__cuda_array_interface__"))
    return true;
  if (!py::hasattr(object, "__dlpack_device__")) return false;
  const py::tuple device = object.attr("__dlpack_device__")();
  const auto kind = py::int_(device[0]).cast<std::int32_t>();
  return kind == dl_cuda || kind == dl_cuda_managed;
}

bool is_of_device(py::handle saved) {
  return py::hasattr(saved, "_of_device");
}

py::object device_operation(const char* operation) {
  return py::module_::import("bnext._device").attr(operation);
}

}  // namespace bnext::bind

void bind_device(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace py::literals;
  using namespace bnext::bind;
  py::class_<DeviceArray>(m, "DeviceArray", "An array of a GPU: its memory, or that of `owner`.")
      .def(py::init(&borrow), "pointer"_a, "dtype"_a, "shape"_a, "device"_a, "owner"_a = py::none())
      .def_static("empty", &empty, "shape"_a, "dtype"_a, "device"_a, "stream"_a)
      .def_static("from_dlpack", &from_dlpack, "capsule"_a)
      .def_property_readonly(
          "pointer",
          [](const DeviceArray& a) { return reinterpret_cast<std::uintptr_t>(a.array.data); })
      .def_property_readonly("dtype",
                             [](const DeviceArray& a) { return bnext::to_string(a.array.dtype); })
      .def_property_readonly(
          "shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.array.shape)); })
      .def_property_readonly("device", [](const DeviceArray& a) { return a.array.device.index; })
      .def_property_readonly("nbytes", [](const DeviceArray& a) { return a.array.bytes(); })
      .def_property_readonly("__cuda_array_interface__", &array_interface)
      .def(
          "__dlpack__",
          [](const DeviceArray& a, py::handle stream, const py::kwargs&) {
            return to_dlpack(a, stream);
          },
          "stream"_a = py::none())
      .def("__dlpack_device__",
           [](const DeviceArray& a) { return py::make_tuple(dl_cuda, a.array.device.index); })
      .def("__repr__", [](const DeviceArray& a) {
        return "DeviceArray(shape=" + bnext::to_string(a.array.shape) +
               ", dtype=" + bnext::to_string(a.array.dtype) +
               ", device=" + bnext::to_string(a.array.device) + ")";
      });
  m.def("device_of", [](std::uintptr_t pointer) {
    return bnext::cuda::device_of(reinterpret_cast<const void*>(pointer));
  });
  m.def("passes_bytes", bnext::passes_bytes);
  m.def("dtype_size", [](const std::string& name) { return bnext::dtype_size(dtype_named(name)); });
  m.def("is_gated", [](py::handle activation) {
    return bnext::is_gated(activation_of("is_gated", activation));
  });
  m.def("is_invertible", [](py::handle activation, double negative_slope) {
    // Of any dtype; batch_norm_backward judges by that of x.
    return bnext::is_invertible(activation_of("is_invertible", activation), negative_slope,
                                bnext::DType::float64);
  });
  m.def("device_batch_norm_forward", forward, "x"_a, "weight"_a.none(true), "bias"_a.none(true),
        "residual"_a.none(true), "y"_a, "mean"_a, "var"_a, "inv_std"_a, "passes"_a, "eps"_a,
        "channel_axis"_a, "activation"_a, "negative_slope"_a, "dropout"_a, "seed"_a, "offset"_a,
        "device_seed"_a, "stream"_a);
  m.def("device_batch_norm_backward", backward, "grad_y"_a, "x"_a, "weight"_a.none(true),
        "bias"_a.none(true), "mean"_a, "inv_std"_a, "residual"_a.none(true), "passes"_a, "grad_x"_a,
        "grad_residual"_a.none(true), "grad_weight"_a.none(true), "grad_bias"_a.none(true),
        "channel_axis"_a, "activation"_a, "negative_slope"_a, "dropout"_a, "seed"_a, "offset"_a,
        "device_seed"_a, "batch_statistics"_a, "from_result"_a, "stream"_a);
  m.def("device_batch_norm_inference", inference, "x"_a, "mean"_a.none(true), "var"_a.none(true),
        "weight"_a.none(true), "bias"_a.none(true), "residual"_a.none(true), "y"_a, "eps"_a,
        "channel_axis"_a, "activation"_a, "negative_slope"_a, "stream"_a);
  m.def("device_dropout", dropout, "x"_a, "y"_a, "p"_a, "mask_shape"_a, "alpha"_a, "is_backward"_a,
        "seed"_a, "offset"_a, "device_seed"_a, "stream"_a);
}
