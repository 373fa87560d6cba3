// Which voxel a coordinate lies in, where the voxel's centre is and how far from it a point is; which value is a
// maximum. Written once and never contracted, so that every machine agrees.
#pragma once

#include "common.h"

namespace kp {
namespace {

// True division and floor in the geometry dtype. Without an origin (0) the difference is the coordinate itself.
template <class T>
KP_HD T voxel_index(T coordinate, T origin, T voxel_size) {
#ifdef __CUDACC__
  return floor((coordinate - origin) / voxel_size);
#else
  if constexpr (sizeof(T) == 4)
    return __builtin_floorf((coordinate - origin) / voxel_size);
  else
    return __builtin_floor((coordinate - origin) / voxel_size);
#endif
}

// In float64 whatever the geometry dtype: at a kilometre in voxels of 2 cm a float32 centre would be 0.3 % of a voxel
// off.
template <class T>
KP_HD double voxel_center(T index, T origin, T voxel_size) {
  return (double(index) + 0.5) * double(voxel_size) + double(origin);
}

// ((d0 d0 + d1 d1) + d2 d2) of the coordinates less the centre, in float64.
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
