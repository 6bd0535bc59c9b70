// A convolution's windows as the columns of a matrix, so that a matrix product does the rest.
#pragma once

#include <cstdint>

namespace bnext {

// How a window slides over the (height, width) plane of an image.
struct Window {
  std::int64_t kernel[2];
  std::int64_t stride[2];
  std::int64_t padding[2];
  std::int64_t dilation[2];

  // Number of window positions along `axis` of an image of `size`; 0 if none fits.
  std::int64_t positions(int axis, std::int64_t size) const;
};

// The window positions [begin, end) along `axis` of an image of `size` at which the element that
// lies `offset` into the window is inside the image.
struct Range {
  std::int64_t begin, end;
};
Range inside(const Window& window, int axis, std::int64_t offset, std::int64_t size);

// A batch of images (samples, channels, height, width). The last three dimensions are contiguous;
// `sample_stride` elements lie between two samples, so a range of channels needs no copy.
struct Images {
  std::int64_t samples, channels, height, width, sample_stride;
};

// cols(n, c, i, j, p, q) = x(n, c, p * stride - padding + i * dilation, the same of q and j),
// and 0 where that is outside of x. cols is contiguous.
template <class T>
void im2col(const T* x, const Images& images, const Window& window, T* cols);

// The transpose of im2col: writes to x the sum of the elements of cols that come from there.
template <class T>
void col2im(const T* cols, const Images& images, const Window& window, T* x);

}  // namespace bnext
