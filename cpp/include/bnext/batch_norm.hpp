// Batch Normalization (Ioffe & Szegedy, 2015, arXiv:1502.03167).
//
// Arrays of data are (N, C, *) with channel_axis 1, or (N, *, C) with channel_axis -1, of two or
// more dimensions, C-contiguous, of any dtype. Everything per channel is (C,): weight, bias and
// their gradients have parameter_dtype() of the data's dtype (float32 for float16 and bfloat16);
// statistics that pass from forward to backward are float64, so that nothing is lost where |mean|
// is far larger than the standard deviation.
// m is the number of values per channel, r = 1 / sqrt(var + eps), n = (x - mean) r.
//
// Errors: std::invalid_argument for shapes, values and overlapping memory, DTypeError for dtypes.
// They are thrown before anything is written. All arrays of a call are of one device; what needs
// their values (var < 0, a weight of 0 with from_result) is not checked in the memory of a GPU.
// y may be the very array of x or of the residual, grad_x that of grad_y or of x. Outputs overlap
// no array of the call in another way. Results do not depend on the number of threads, nor on the
// instruction set.
#pragma once

#include <bnext/dropout.hpp>
#include <bnext/types.hpp>

namespace bnext {

// What follows the normalisation in the same pass over memory: none, relu, leaky_relu, ...
enum class Activation {
#define BNEXT_ENUMERATOR(name) name,
  BNEXT_EPILOGUES(BNEXT_ENUMERATOR)
#undef BNEXT_ENUMERATOR
};

// Whether the gradient of an activation follows from one bit an element (relu, leaky_relu, relu6).
bool is_gated(Activation activation);
// Whether what it was of can be found from the result, for data of this dtype: none; leaky_relu
// with a slope that is positive, and its inverse finite, in parameter_dtype(dtype).
bool is_invertible(Activation activation, double negative_slope, DType dtype);
// Bytes that `passes` needs for so many elements.
std::int64_t passes_bytes(std::int64_t size);

// y = dropout(activation(weight n + bias + residual)), with the biased variance of this batch.
// Raises if a channel has one value only (m = 1). An empty x (m = 0) gives an empty y and
// statistics that are NaN.
struct BatchNormForward {
  Array x;
  Array weight;  // optional: 1
  Array bias;    // optional: 0
  double eps = 1e-5;
  int channel_axis = 1;
  Array residual;  // optional, like x: 0
  Activation activation = Activation::none;
  double negative_slope = 0.01;
  double dropout = 0;  // probability in [0, 1] of a zero, as for dropout_forward
  DropoutDraw draw;    // which random numbers dropout takes
  // Out, optional, passes_bytes(x.size()) bytes, for gated activations: bit i tells whether the
  // gradient passes at element i. With it, backward does not need the residual.
  std::uint8_t* passes = nullptr;
  Array y;        // out, like x
  Array mean;     // out, (C,) float64
  Array var;      // out, (C,) float64: sum (x - mean)^2 / m
  Array inv_std;  // out, (C,) float64: r
  Stream stream = nullptr;
};
void batch_norm_forward(const BatchNormForward& args);
// With a dropout that takes the generator's next offset, and not args.draw, and says which it was.
DropoutDraw batch_norm_forward(const BatchNormForward& args, Generator& generator);

// With g = dropout(grad_y) activation'(weight n + bias + residual), and <.> the mean over a
// channel:
//   grad_residual = g,  grad_bias = sum g,  grad_weight = sum g n,
//   grad_x = weight r (g - <g> - n <g n>)   (batch_statistics)
//   grad_x = weight r g                      (otherwise: mean and inv_std were constants)
struct BatchNormBackward {
  Array grad_y;
  Array x;        // or, with from_result, y
  Array weight;   // as in forward
  Array bias;     // as in forward; read only if there is an activation
  Array mean;     // from forward
  Array inv_std;  // from forward
  int channel_axis = 1;
  Array residual;  // as in forward; not needed with `passes`, nor without an activation
  Activation activation = Activation::none;
  double negative_slope = 0.01;
  double dropout = 0;                    // as in forward
  DropoutDraw draw;                      // as in forward
  const std::uint8_t* passes = nullptr;  // from forward
  bool batch_statistics = true;
  // x is not there any more, but y, since forward ran with y = x: n = (activation^-1(y) - bias) /
  // weight (Rota Bulo et al., 2018, "In-place activated BatchNorm", arXiv:1712.02616). Needs an
  // activation that is_invertible, no residual, no `passes`, no dropout, and no weight of 0. n is
  // as exact as y is: its error grows with |bias / weight|.
  bool from_result = false;
  Array grad_x;         // out, like x
  Array grad_residual;  // out, like x, optional
  Array grad_weight;    // out, (C,), optional
  Array grad_bias;      // out, (C,), optional
  Stream stream = nullptr;
};
void batch_norm_backward(const BatchNormBackward& args);

// y = activation((x - mean) / sqrt(var + eps) weight + bias + residual), with given statistics.
struct BatchNormInference {
  Array x;
  Array mean;    // (C,), as weight
  Array var;     // (C,), as weight, not negative
  Array weight;  // optional: 1
  Array bias;    // optional: 0
  double eps = 1e-5;
  int channel_axis = 1;
  Array residual;  // optional, like x: 0
  Activation activation = Activation::none;
  double negative_slope = 0.01;
  Array y;  // out, like x
  Stream stream = nullptr;
};
void batch_norm_inference(const BatchNormInference& args);

}  // namespace bnext
