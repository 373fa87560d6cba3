// Farthest point sampling: the block of points that both of its forms sweep. A block is 16 points, whatever the
// instruction set: their first coordinates, their second ones, ..., and then each one's squared distance to the nearest
// point chosen so far.
#pragma once

#include "kernels.h"
#include "formulas/neighbors.h"
#include "simd.h"
#include "sort.h"

namespace kp {
namespace {

constexpr int block_points = 16;

template <class T, int H = lanes<T> / 2>
KP_INLINE T largest_lane(Vec<T> v) {
  v = max(v, xor_lanes<H>(v, std::make_index_sequence<lanes<T>>()));
  if constexpr (H > 1)
    return largest_lane<T, H / 2>(v);
  else
    return v[0];
}

// D = 0: the dimension is known at run time.
template <class T, int D>
struct Blocks {
  T* data;
  int dimension;

  int dim() const { return D ? D : dimension; }
  int64_t size() const { return int64_t(dim() + 1) * block_points; }

  T* coordinate(int64_t point, int axis) const {
    return data + point / block_points * size() + axis * block_points + point % block_points;
  }
  T& distance(int64_t point) const { return *coordinate(point, dim()); }

  // Lowers the distances of the blocks [begin, end) to those from q. True: some fell. `most` holds the largest left.
  KP_INLINE bool lower(int64_t begin, int64_t end, const T* q, Vec<T>* most) const {
    *most = broadcast(T(-1));
    unsigned fell = 0;
    T* block = data + begin * size();
    for (int64_t b = begin; b < end; ++b, block += size())
      for (int i = 0; i < block_points; i += lanes<T>) {
        Vec<T> d[D ? D : max_dimension];
        for (int a = 0; a < dim(); ++a) d[a] = load(block + a * block_points + i) - broadcast(q[a]);
        T* const distance = block + dim() * block_points + i;
        const Vec<T> d2 = squared_distance(d, dim()), old = load(distance), now = min(d2, old);
        fell |= mask_lt(d2, old);
        store(distance, now);
        *most = max(*most, now);
      }
    return fell;
  }

  // The first point of the blocks from `begin` on whose distance is `value`; there is one.
  KP_INLINE int64_t find(int64_t begin, T value) const {
    for (const T* block = data + begin * size() + dim() * block_points;; ++begin, block += size())
      for (int i = 0; i < block_points; i += lanes<T>)
        if (const unsigned mask = mask_eq(load(block + i), broadcast(value)))
          return begin * block_points + i + __builtin_ctz(mask);
  }
};

}  // namespace
}  // namespace kp
