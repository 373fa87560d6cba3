// What decides whether a point is a neighbor, and which kernel point is nearest. V is a scalar or a vector of the
// geometry dtype; sums are in this order and never contracted, so that every machine decides alike.
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

// |x|, +0 for both zeros: distances are sorted by their bits, and those of -0 lie beyond all other numbers'.
template <class V>
KP_HD V absolute(V x) {
  return x > 0 ? x : 0 - x;
}

// The distance, squared for L2: it orders as the distance does.
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

// Whether distances within a box of these sides tell points apart: the measure of its diagonal is zero, or a normal
// number of the dtype. What overflows or vanishes would all be equally near. Only `is_bounded`, by a radius: what
// overflows is beyond it, as it should be.
template <Metric metric, class T>
KP_HD bool is_measurable(const T* sides, int dimension, bool is_bounded) {
  const T smallest = sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);
  bool is_place = true;
  for (int a = 0; a < dimension; ++a) is_place = is_place && !(sides[a] > 0);  // of no points sides are -inf
  const T measured = measure<metric>(sides, dimension);
  return is_place || (measured >= smallest && (is_bounded || measured - measured == 0));
}

}  // namespace
}  // namespace kp
