// Formulas of the two losses of deformed kernel points (Thomas et al. 2019, section 3.2), with their derivatives: the
// fitting loss pulls kernel points to the nearest neighbors, the repulsion loss pushes them apart. V is a scalar or a
// vector of the geometry dtype. Nothing is contracted, so that every machine finds the same nearest neighbors.
#pragma once

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {
namespace {

// The difference d between a deformed kernel point and a neighbor, along one axis. The fitting loss is |d|² / extent²,
// its derivative by the kernel point 2 d / extent².
template <class V>
KP_HD V from_neighbor(V point, V query, V deformed) {
  return deformed - (point - query);
}

// min(0, d / extent - repulse_extent), NaN for NaN. Its square is the repulsion of two kernel points at distance d.
template <class V>
KP_HD V overlap(V distance, V inverse_extent, V repulse_extent) {
  const V apart = distance * inverse_extent - repulse_extent;
  return apart > 0 ? V{} : apart;
}

// The derivative of the repulsion by the distance, divided by the distance; 0 at distance zero. Multiplied by the
// difference p - p' of the two kernel points it is the derivative by p.
template <class V>
KP_HD V repulsion_slope(V d2, V inverse_extent, V repulse_extent) {
  const V distance = sqrt(d2), under = overlap(distance, inverse_extent, repulse_extent);
  return distance == 0 ? V{} : (under + under) * inverse_extent / distance;
}

}  // namespace
}  // namespace kp
