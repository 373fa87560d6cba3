// Which voxel a coordinate lies in: true division and floor in the geometry dtype, so that every machine agrees.
#pragma once

#include "common.h"

namespace kp {
namespace {

template <class T>
KP_HD T voxel_index(T coordinate, T voxel_size) {
  if constexpr (sizeof(T) == 4)
    return __builtin_floorf(coordinate / voxel_size);
  else
    return __builtin_floor(coordinate / voxel_size);
}

}  // namespace
}  // namespace kp
