// Distance formulas. They decide which points are neighbors and which kernel point is nearest. V is a scalar or a
// vector of the geometry dtype. Sums are in this order and never contracted, so that every machine finds the same
// neighbors.
#pragma once

#include <math.h>

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

// Continues this sum by n more axes. It may start at 0, which adds nothing to a square.
template <class V>
KP_HD V add_squares(V sum, const V* d, int n) {
  for (int a = 0; a < n; ++a) sum = sum + d[a] * d[a];
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

// The largest number below x, which is not the lowest of its type.
template <class T>
KP_HD T next_below(T x) {
  if constexpr (sizeof(T) == 4)
    return nextafterf(x, -3.40282347e38f);
  else
    return nextafter(x, -1.7976931348623157e308);
}

// The largest measure of a neighbor: that of the radius, or the next smaller number if the radius is exclusive.
template <class T>
KP_HD T largest_measure(Metric metric, T radius, bool is_inclusive) {
  const T measured = metric == Metric::l2 ? radius * radius : radius;
  return is_inclusive ? measured : next_below(measured);
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

// What a product of matrices tells about squared distances, in the space of features. Let x and q be a point and a
// query relative to a common center, times a power of two `scale`, both rounded, and
//
//   key = (1 - error) |x|^2 - 2 x.q        computed in any order, with or without fused multiply-adds.
//
// Then scale^2 times the squared distance as squared_distance() computes it is between key + (1 - error) |q|^2 and
// key + 2 error |x|^2 + (1 + error) |q|^2, up to `absolute`, which stands for all underflow. With the unit roundoff u
// the rounding errors are, in units of u (|x|^2 + |q|^2): 4 of centering, 2 (D + 2) of the squared distance,
// 2 (D + 1) of the product, and D + 2 of the squared norms. `error` is 6 (D + 8) u instead of their sum (5 D + 12) u;
// what is left, more than 36 u, covers the terms of second order and the rounding of the two functions below.
struct KeyBounds {
  double error, absolute, scale;

  // A bound of scale^2 times the squared distance from above. Since |x|^2 <= 2 |q|^2 + 2 |x - q|^2, it depends on x
  // only through the key, and increases with it.
  KP_HD double farthest(double key, double query_norm) const {
    const double bound = key + query_norm + 6 * error * query_norm + absolute;
    return (bound > 0 ? bound : 0) * (1 + 5 * error);
  }
  // The largest key of a point whose squared distance times scale^2 may be `measured` or less.
  KP_HD double largest_key(double measured, double query_norm) const {
    return measured - (1 - error) * query_norm + absolute;
  }
  // The power of two that brings the longest side of the box around points and queries to [1, 2), so that no product
  // of coordinates overflows.
  static KP_HD double scale_of(double longest_side) { return longest_side > 0 ? ldexp(1.0, -ilogb(longest_side)) : 1; }
};
// `inputs`: a bound of further errors of the product, relative like `error`.
template <class T>
KP_HD KeyBounds key_bounds(int dimension, double scale, double inputs = 0) {
  const double roundoff = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53, smallest = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022;
  return {6 * (dimension + 8) * roundoff + inputs, 16 * (dimension + 16) * (smallest + smallest * scale * scale),
          scale};
}

}  // namespace
}  // namespace kp
