// The squared distance that decides whether a point is a neighbour, and which kernel point is nearest. V is a scalar or
// a vector of the geometry dtype; the sum is in this order and never contracted, so that every machine decides alike.
#pragma once

#include "common.h"

namespace kp {
namespace {

template <class V>
KP_HD V squared_distance(const V* d, int dimension) {
  V sum = d[0] * d[0];
  for (int a = 1; a < dimension; ++a) sum = sum + d[a] * d[a];
  return sum;
}

}  // namespace
}  // namespace kp
