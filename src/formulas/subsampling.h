// Formulas of grid subsampling: the voxel of a coordinate, the center of a voxel, and distances from it. Never
// contracted, so that every machine finds the same voxels.
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

// The index of a voxel along an axis: division and floor in the geometry dtype, without multiplying by a reciprocal.
template <class T>
KP_HD T voxel_index(T coordinate, T origin, T voxel_size) {
  return rounded_down((coordinate - origin) / voxel_size);
}

// The default origin of an item's grid along an axis, from its lowest coordinate. As in the published code this
// multiplies by the reciprocal, whereas voxel_index() divides: on a lattice the lowest point may be below the origin by
// a rounding error, in voxel -1.
template <class T>
KP_HD T published_origin(T lowest, T voxel_size) {
  return rounded_down(lowest * (T(1) / voxel_size)) * voxel_size;
}

// The center of a voxel along an axis, in float64 for every geometry dtype: a kilometer from the origin, with voxels of
// 2 cm, a float32 center would be off by 0.3 % of a voxel.
template <class T>
KP_HD double voxel_center(T index, T origin, T voxel_size) {
  return (double(index) + 0.5) * double(voxel_size) + double(origin);
}

// The squared distance from the center, ((d0 d0 + d1 d1) + d2 d2) in float64.
template <int D, class T>
KP_HD double squared_distance(const T* point, const double* center) {
  double sum = 0;
  for (int a = 0; a < D; ++a) {
    const double d = double(point[a]) - center[a];
    sum += d * d;
  }
  return sum;
}

}  // namespace
}  // namespace kp
