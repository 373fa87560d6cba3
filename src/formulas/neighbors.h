// Distance formulas. They decide which points are neighbors and which kernel point is nearest. V is a scalar or a
// vector of the geometry dtype. Sums are in this order and never contracted, so that every machine finds the same
// neighbors.
#pragma once

#include "common.h"

namespace kp {
namespace {

constexpr int max_dimension = 16;

template <class V>
KP_HD V squared_distance(const V* d, int dimension) {
  V sum = d[0] * d[0];
  for (int a = 1; a < dimension; ++a) sum = sum + d[a] * d[a];
  return sum;
}

// |x|, with +0 for -0: distances are sorted by their bits, and the bits of -0 are above those of all positive numbers.
template <class V>
KP_HD V absolute(V x) {
  return x > 0 ? x : 0 - x;
}

// The measure that is compared instead of the distance: the squared distance for L2, the distance for L1 and Linf.
template <Metric metric, class V>
KP_HD V measure(const V* d, int dimension) {
  if constexpr (metric == Metric::l2) {
    return squared_distance(d, dimension);
  } else {
    V result = absolute(d[0]);
    for (int a = 1; a < dimension; ++a) {
      const V size = absolute(d[a]);
      result = metric == Metric::l1 ? result + size : size > result ? size : result;
    }
    return result;
  }
}

// Whether measures within a box with these sides can tell points apart: the measure of its diagonal must be zero or a
// normal number of the dtype. If it overflows or underflows, different points seem equally near. If a radius bounds the
// search (is_bounded), overflow is allowed, since infinity is beyond the radius.
template <Metric metric, class T>
KP_HD bool is_measurable(const T* sides, int dimension, bool is_bounded) {
  const T smallest = sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);
  bool is_point = true;
  for (int a = 0; a < dimension; ++a) is_point = is_point && !(sides[a] > 0);  // sides are -inf without points
  const T measured = measure<metric>(sides, dimension);
  return is_point || (measured >= smallest && (is_bounded || measured - measured == 0));
}

}  // namespace
}  // namespace kp
