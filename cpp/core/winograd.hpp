// 3x3 convolution with stride 1 by Winograd's F(2x2, 3x3): Lavin & Gray, "Fast algorithms for
// convolutional neural networks", arXiv:1509.09308.
//
// The output is cut into tiles of 2x2, each of which needs 4x4 elements d of the padded input:
//   y = A^T [(G g G^T) * (B^T d B)] A
// with * element by element, g the kernel, and
//   B^T = | 1  0 -1  0 |   G = | 1    0    0   |   A^T = | 1  1  1  0 |
//         | 0  1  1  0 |       | 1/2  1/2  1/2 |         | 0  1 -1 -1 |
//         | 0 -1  1  0 |       | 1/2 -1/2  1/2 |
//         | 0  1  0 -1 |       | 0    0    1   |
// Summed over channels, each of the 16 elements is a matrix product of its own: 16 multiplications
// for 4 outputs instead of 36. Here are the transforms of the images on both sides of it, and
// their transposes, which gradients need.
#pragma once

#include <cstdint>

#include "core/im2col.hpp"

namespace bnext {

// How a plane (height, width) of the input is tiled.
struct Tiling {
  std::int64_t padding[2];
  std::int64_t output(int axis, std::int64_t size) const { return size + 2 * padding[axis] - 2; }
  std::int64_t tiles(int axis, std::int64_t size) const { return (output(axis, size) + 1) / 2; }
};

// tiles(4 i + j, c, n, p, q) = (B^T d B)(i, j) with d the tile (p, q) of x(n, c).
// `images` describes x, here and below; tiles are contiguous.
template <class T>
void winograd_input(const T* x, const Images& images, const Tiling& tiling, T* tiles);

template <class T>
void winograd_input_transpose(const T* tiles, const Images& images, const Tiling& tiling, T* x);

// y(n, c) = the plane whose tile (p, q) is A^T m A, with m(i, j) = tiles(4 i + j, c, n, p, q).
// `images` describes y.
template <class T>
void winograd_output(const T* tiles, const Images& images, T* y);

template <class T>
void winograd_output_transpose(const T* y, const Images& images, T* tiles);

}  // namespace bnext
