// Pooling: a maximum or a mean over the windows of every plane of a batch of images.
#pragma once

#include <cstdint>

#include "core/im2col.hpp"

namespace bnext {

// All of these take contiguous images and windows with dilation 1 that reach at least one element
// each. They run on num_threads() threads; no result depends on how many.

// y = the largest element in each window, NaN if there is one. If `index` is not null, it receives
// where in its plane the first such element is; padding never counts.
template <class T>
void max_pool(const T* x, const Images& images, const Window& window, T* y, std::int32_t* index);

template <class T>
void max_pool_backward(const T* grad_y, const std::int32_t* index, const Images& images,
                       const Window& window, T* grad_x);

// y = the sum of each window over its number of elements; with `count_padding` those in the padding
// count as zeros.
template <class T>
void avg_pool(const T* x, const Images& images, const Window& window, bool count_padding, T* y);

template <class T>
void avg_pool_backward(const T* grad_y, const Images& images, const Window& window,
                       bool count_padding, T* grad_x);

}  // namespace bnext
