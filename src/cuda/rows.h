// What all searches share: sums over a warp, and the order of a row of neighbors.
#pragma once

#include "launch.h"

namespace kp {
namespace {

template <class V>
__device__ V sum_over_warp(V x) {
  for (int bit = warp / 2; bit; bit /= 2) x += __shfl_xor_sync(all_lanes, x, bit);
  return x;
}

// Whether entry a of a row comes before entry b: by distance and then number, or by number alone.
template <class T>
__device__ bool comes_before(T distance_a, int32_t a, T distance_b, int32_t b, bool by_distance) {
  return by_distance && distance_a != distance_b ? distance_a < distance_b : a < b;
}

// Sorts a row by a warp: a bitonic sort in the form in which every exchange moves the larger entry towards the end.
// Entries past the end count as largest, so exchanges with them are skipped and n may be any number.
template <class T>
__device__ void sort_row(int32_t* index, T* distance, int64_t n, bool by_distance) {
  const auto put_in_order = [=](int64_t low, int64_t high) {
    if (high >= n) return;
    const int32_t a = index[low], b = index[high];
    const T da = distance ? distance[low] : T(0), db = distance ? distance[high] : T(0);
    if (!comes_before(db, b, da, a, by_distance)) return;
    index[low] = b;
    index[high] = a;
    if (distance) {
      distance[low] = db;
      distance[high] = da;
    }
  };
  for (int64_t size = 2; size < 2 * n; size *= 2) {
    const int64_t half = size / 2;
    for (int64_t i = lane_number(); i / half * size < n; i += warp) {
      const int64_t block = i / half * size, j = i % half;
      put_in_order(block + j, block + size - 1 - j);
    }
    __syncwarp();
    for (int64_t by = half / 2; by; by /= 2) {
      for (int64_t i = lane_number(); i / by * 2 * by < n; i += warp)
        put_in_order(i / by * 2 * by + i % by, i / by * 2 * by + i % by + by);
      __syncwarp();
    }
  }
}

}  // namespace
}  // namespace kp
