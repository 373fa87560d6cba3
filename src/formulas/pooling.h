// Which of two values is the larger or the smaller one of a row, and what a neighbor at a distance weighs.
#pragma once

#include "common.h"
#include "subsampling.h"

namespace kp {
namespace {

// Whether x takes the place of the best so far, the largest or the smallest: the first of equals stays, and so does the
// first NaN. For numbers and for vectors of them.
template <bool least, class V>
KP_HD auto displaces(V x, V best) {
  if constexpr (least)
    return (x < best) | ((x != x) & (best == best));
  else
    return exceeds(x, best);
}

// 1 / d^power in units of that of the nearest neighbor, which so weighs 1, and all at distance zero with it: none can
// overflow, and 0 / 0 or inf / inf does not come up.
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
