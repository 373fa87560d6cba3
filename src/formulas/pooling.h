// Formulas of pooling: the comparison of maxima and minima, and inverse-distance weights.
#pragma once

#include "common.h"

namespace kp {
namespace {

// Whether x replaces the best value so far, the largest or, if `minimum`, the smallest. Of equal values the first
// stays; NaN wins over numbers and the first NaN stays. V is a scalar or a vector.
template <bool minimum, class V>
KP_HD auto displaces(V x, V best) {
  if constexpr (minimum)
    return (x < best) | ((x != x) & (best == best));
  else
    return exceeds(x, best);
}

// The weight 1 / d^power of a neighbor, divided by that of the nearest neighbor: (nearest / d)^power. The nearest one,
// and all at distance zero, weigh 1, so nothing overflows and neither 0 / 0 nor inf / inf occurs.
KP_HD double inverse_distance(double d, double nearest, double power) {
  const double ratio = d == nearest ? 1 : nearest / d;
#ifdef __CUDACC__
  return power == 2 ? ratio * ratio : power == 1 ? ratio : pow(ratio, power);
#else
  return power == 2 ? ratio * ratio : power == 1 ? ratio : __builtin_pow(ratio, power);
#endif
}

}  // namespace
}  // namespace kp
