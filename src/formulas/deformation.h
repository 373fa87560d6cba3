// The two losses that keep the deformed kernel points of a query where points are and apart from each other (Thomas et
// al. 2019, section 3.2), each with its derivative. V is a scalar or a vector of the geometry dtype. Which neighbor is
// nearest is a decision; nothing here is contracted.
#pragma once

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {
namespace {

// From a neighbor to a deformed kernel point, along one axis. Its squared length over extent² is the fitting loss, and
// 2 / extent² times itself the derivative of that by the kernel point.
template <class V>
KP_HD V from_neighbor(V point, V query, V deformed) {
  return deformed - (point - query);
}

// min(0, d / extent - repulse_extent): its square is the repulsion of two kernel points. NaN stays NaN.
template <class V>
KP_HD V overlap(V distance, V inverse_extent, V repulse_extent) {
  const V apart = distance * inverse_extent - repulse_extent;
  return apart > 0 ? V{} : apart;
}

// The derivative of a repulsion by the distance, over the distance: times the difference of the two kernel points it is
// that by the first of them. 0 at distance zero.
template <class V>
KP_HD V repulsion_slope(V d2, V inverse_extent, V repulse_extent) {
  const V distance = sqrt(d2), under = overlap(distance, inverse_extent, repulse_extent);
  return distance == 0 ? V{} : (under + under) * inverse_extent / distance;
}

}  // namespace
}  // namespace kp
