// The influence of a kernel point on a neighbor as a function of their squared distance (Thomas et al. 2019, eq. 3; the
// gaussian has sigma = 0.3 extent, as in the published code), and its slope. V is a scalar or a vector.
#pragma once

#include <math.h>

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {
namespace {

using ::sqrt;

// max(0, 1 - d / extent)
template <class V>
KP_HD V linear_influence(V d2, V inverse_extent) {
  const V influence = 1 - sqrt(d2) * inverse_extent;
  return influence > 0 ? influence : V{};
}

// The derivative of the linear influence by d, divided by d; 0 at d = 0. Valid only for d < extent.
template <class V>
KP_HD V linear_slope(V d2, V inverse_extent) {
  return d2 > 0 ? -inverse_extent / sqrt(d2) : V{};
}

// The gaussian influence is exp(scale d²) with scale = -1 / (2 (0.3 extent)²). Its derivative by d, divided by d, is
// 2 scale exp(scale d²).
template <class T>
KP_HD T gaussian_scale(T extent) {
  const T sigma = T(0.3) * extent;
  return T(-1) / (T(2) * sigma * sigma);
}

}  // namespace
}  // namespace kp
