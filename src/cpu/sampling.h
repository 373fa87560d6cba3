// The memory layout of farthest point sampling: points in blocks of 16. A block holds the 16 first coordinates, the 16
// second ones, ..., and then the squared distance of each point to the nearest point chosen so far:
//
//   | x x ... x | y y ... y | z z ... z | d² d² ... d² |  next block ...
#pragma once

#include "kernels.h"
#include "formulas/neighbors.h"
#include "simd.h"
#include "sort.h"

namespace kp {
namespace {

constexpr int points_per_block = 16;

template <class T, int H = lanes<T> / 2>
KP_INLINE T largest_lane(Vec<T> v) {
  v = max(v, xor_lanes<H>(v, std::make_index_sequence<lanes<T>>()));
  if constexpr (H > 1)
    return largest_lane<T, H / 2>(v);
  else
    return v[0];
}

// D = 0: the dimension is known only at run time.
template <class T, int D>
struct PointBlocks {
  T* data;
  int dimension;

  int dim() const { return D ? D : dimension; }
  int64_t size() const { return int64_t(dim() + 1) * points_per_block; }

  T* coordinate(int64_t point, int axis) const {
    return data + point / points_per_block * size() + axis * points_per_block + point % points_per_block;
  }
  T& distance(int64_t point) const { return *coordinate(point, dim()); }

  // Lowers the distances of the blocks [begin, end) to the distances from q where these are smaller. Returns whether
  // any was lowered; *most receives the largest distance in each lane.
  KP_INLINE bool lower(int64_t begin, int64_t end, const T* q, Vec<T>* most) const {
    *most = broadcast(T(-1));
    unsigned lowered = 0;
    T* block = data + begin * size();
    for (int64_t b = begin; b < end; ++b, block += size())
      for (int i = 0; i < points_per_block; i += lanes<T>) {
        Vec<T> d[D ? D : max_dimension];
        for (int a = 0; a < dim(); ++a) d[a] = load(block + a * points_per_block + i) - broadcast(q[a]);
        T* const distance = block + dim() * points_per_block + i;
        const Vec<T> d2 = squared_distance(d, dim()), old = load(distance), now = min(d2, old);
        lowered |= mask_lt(d2, old);
        store(distance, now);
        *most = max(*most, now);
      }
    return lowered;
  }

  // The first point from block `begin` on whose distance is `value`; there must be one.
  KP_INLINE int64_t find(int64_t begin, T value) const {
    for (const T* block = data + begin * size() + dim() * points_per_block;; ++begin, block += size())
      for (int i = 0; i < points_per_block; i += lanes<T>)
        if (const unsigned mask = mask_eq(load(block + i), broadcast(value)))
          return begin * points_per_block + i + __builtin_ctz(mask);
  }
};

}  // namespace
}  // namespace kp
