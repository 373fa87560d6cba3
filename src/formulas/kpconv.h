// Influence of a kernel point on a neighbor, from the squared distance between them (Thomas et al. 2019, eq. 3; the
// gaussian's sigma is 0.3 extent, as in the published code), and its slope. V is a scalar or a vector.
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

// Its derivative by d, over d; 0 at d = 0, and only to be asked for where d is below the extent.
template <class V>
KP_HD V linear_slope(V d2, V inverse_extent) {
  return d2 > 0 ? -inverse_extent / sqrt(d2) : V{};
}

// exp(-d² / (2 (0.3 extent)²)); `scale` is -1 / (2 (0.3 extent)²). Its derivative by d, over d, is 2 scale times it.
template <class T>
KP_HD T gaussian_scale(T extent) {
  const T sigma = T(0.3) * extent;
  return T(-1) / (T(2) * sigma * sigma);
}

}  // namespace
}  // namespace kp
