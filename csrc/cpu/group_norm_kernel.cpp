// Group norm, forward and backward, for one level.
//
// Forward: a group is summed, summed again around its mean (which is corrected by what that leaves), and written; small
// groups stay in the cache between the passes. Backward: sums over each channel, from which the group's two means follow,
// then dx. Floor: the bytes of x and y (grad, x and dx) over the bandwidth.
//
// Test: pytest tests/test_group_norm.py
#include "cpu/group_norm_kernel.h"

#include "cpu/channels_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// Coefficients of the group's channels; repeated for each position where channels are short.
template <class Body>
void lay_out(int64_t width, int64_t spatial, float* to, const Body& of) {
  const int64_t times = spatial < GROUP_NORM_SHORT ? spatial : 1;
  for (int64_t c = 0; c < width; ++c)
    for (int64_t i = 0; i < times; ++i) to[c * times + i] = of(c);
}

template <class T>
void forward(const GroupNormForwardArgs& a, int64_t row0, int64_t row1, float* scratch) {
  using Element = typename T::Element;
  const int64_t size = a.width * a.spatial;
  float* const slopes = scratch;
  float* const biases = scratch + group_norm_scratch(a.width, a.spatial) / 2;
  for (int64_t r = row0; r < row1; ++r) {
    const Element* x = (const Element*)a.x + r * size;
    Element* y = (Element*)a.y + r * size;
    float mean = (float)(run_sum<T>(x, size) / (double)size);
    const Sums sums = run_squares<T>(x, size, mean);
    // The squares were taken around a mean that is off by `rest`. An infinite mean stays what it is.
    const double rest = sums.first / (double)size;
    double variance = sums.second / (double)size;
    if (rest - rest == 0.0) {
      mean = (float)(mean + rest);
      variance -= rest * rest;
      if (variance < 0.0) variance = 0.0;  // rounding, where all values are equal and large
    }
    const float rstd = 1.0f / __builtin_sqrtf((float)variance + a.eps);
    a.mean[r] = mean;
    a.rstd[r] = rstd;
    const int64_t channel = r % a.groups * a.width, image = r / a.groups * a.groups * a.width + channel;
    const auto scale = [&](int64_t c) { return a.scale ? a.scale[image + c] : 1.0f; };
    lay_out(a.width, a.spatial, slopes,
            [&](int64_t c) { return scale(c) * (a.weight ? a.weight[channel + c] : 1.0f) * rstd; });
    lay_out(a.width, a.spatial, biases, [&](int64_t c) {
      return scale(c) * (a.bias ? a.bias[channel + c] : 0.0f) + (a.shift ? a.shift[image + c] : 0.0f);
    });
    if (a.spatial < GROUP_NORM_SHORT) {
      run_affine<T>(x, nullptr, y, size, One{mean}, Each{slopes}, Each{biases}, false);
      continue;
    }
    for (int64_t c = 0; c < a.width; ++c)
      run_affine<T>(x + c * a.spatial, nullptr, y + c * a.spatial, a.spatial, One{mean}, One{slopes[c]}, One{biases[c]},
                    false);
  }
}

// Over the positions of each of a group's channels: the sums of grad and of grad * h.
template <class T>
void channel_products(const GroupNormBackwardArgs& a, const typename T::Element* grad, const typename T::Element* x,
                      float mean, float rstd, float* sum, float* product) {
  if (a.spatial == 1) {
    for_row(a.width, [&](int64_t c, const auto& part, auto) FASTDL_STEP {
      const vf g = part.template load<T>(grad + c), d = vsub(part.template load<T>(x + c), vset1(mean));
      part.template store<F32>(sum + c, g);
      part.template store<F32>(product + c, vmul(vmul(g, d), vset1(rstd)));
    });
    return;
  }
  for (int64_t c = 0; c < a.width; ++c) {
    const Sums sums = run_products<T>(grad + c * a.spatial, nullptr, x + c * a.spatial, a.spatial, mean);
    sum[c] = (float)sums.first;
    product[c] = (float)(sums.second * rstd);
  }
}

template <class T>
void backward(const GroupNormBackwardArgs& a, int64_t row0, int64_t row1, float* scratch) {
  using Element = typename T::Element;
  const int64_t size = a.width * a.spatial;
  for (int64_t r = row0; r < row1; ++r) {
    const Element* grad = (const Element*)a.grad + r * size;
    const Element* x = (const Element*)a.x + r * size;
    Element* dx = (Element*)a.dx + r * size;
    const float mean = a.mean[r], rstd = a.rstd[r];
    const int64_t channel = r % a.groups * a.width, image = r / a.groups * a.groups * a.width + channel;
    const auto factor = [&](int64_t c) {
      return (a.scale ? a.scale[image + c] : 1.0f) * (a.weight ? a.weight[channel + c] : 1.0f);
    };
    channel_products<T>(a, grad, x, mean, rstd, a.sum + image, a.product + image);
    double sum = 0.0, product = 0.0;
    for (int64_t c = 0; c < a.width; ++c) {
      sum += factor(c) * a.sum[image + c];
      product += factor(c) * a.product[image + c];
    }
    // rstd * (g - mean(g) - h * mean(g * h))
    const float pull = (float)(-product / (double)size * rstd * rstd), shift = (float)(-sum / (double)size * rstd);
    lay_out(a.width, a.spatial, scratch, [&](int64_t c) { return factor(c) * rstd; });
    if (a.spatial < GROUP_NORM_SHORT) {
      run_gradient<T>(grad, nullptr, x, dx, nullptr, size, One{mean}, Each{scratch}, One{pull}, One{shift});
      continue;
    }
    for (int64_t c = 0; c < a.width; ++c) {
      const int64_t at = c * a.spatial;
      run_gradient<T>(grad + at, nullptr, x + at, dx + at, nullptr, a.spatial, One{mean}, One{scratch[c]}, One{pull},
                      One{shift});
    }
  }
}

void forward_any(const GroupNormForwardArgs& a, int64_t row0, int64_t row1, float* scratch) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, row0, row1, scratch); });
}

void backward_any(const GroupNormBackwardArgs& a, int64_t row0, int64_t row1, float* scratch) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, row0, row1, scratch); });
}

}  // namespace

extern const GroupNormKernels group_norm_kernels;
const GroupNormKernels group_norm_kernels = {to_floats, forward_any, backward_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
