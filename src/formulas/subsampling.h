// Which voxel a coordinate lies in, where the voxel's center is and how far from it a point is; which value is a
// maximum. Written once and never contracted, so that every machine agrees.
#pragma once

#include "common.h"

namespace kp {
namespace {

template <class T>
KP_HD T rounded_down(T x) {
#ifdef __CUDACC__
  return floor(x);
#else
  if constexpr (sizeof(T) == 4)
    return __builtin_floorf(x);
  else
    return __builtin_floor(x);
#endif
}

// True division and floor in the geometry dtype. Without an origin (0) the difference is the coordinate itself.
template <class T>
KP_HD T voxel_index(T coordinate, T origin, T voxel_size) {
  return rounded_down((coordinate - origin) / voxel_size);
}

// Along an axis, from the lowest coordinate of an item. The published code multiplies by the reciprocal here and
// divides in voxel_index, so on a lattice the lowest point may lie below the origin by a rounding, in voxel -1.
template <class T>
KP_HD T published_origin(T lowest, T voxel_size) {
  return rounded_down(lowest * (T(1) / voxel_size)) * voxel_size;
}

// In float64 whatever the geometry dtype: at a kilometer in voxels of 2 cm a float32 center would be 0.3 % of a voxel
// off.
template <class T>
KP_HD double voxel_center(T index, T origin, T voxel_size) {
  return (double(index) + 0.5) * double(voxel_size) + double(origin);
}

// ((d0 d0 + d1 d1) + d2 d2) of the coordinates less the center, in float64.
template <int D, class T>
KP_HD double squared_distance(const T* point, const double* center) {
  double sum = 0;
  for (int a = 0; a < D; ++a) {
    const double d = double(point[a]) - center[a];
    sum += d * d;
  }
  return sum;
}

// Whether x takes the place of the largest so far: the first of equals stays, and so does the first NaN. For numbers
// and for vectors of them.
template <class V>
KP_HD auto exceeds(V x, V largest) {
  return (x > largest) | ((x != x) & (largest == largest));
}

}  // namespace
}  // namespace kp
