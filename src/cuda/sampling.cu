// Farthest point sampling on the GPU: a thread block for each batch item lowers the distances of all points for each
// chosen point, and finds the largest.
//
// A chosen point gets distance -1, so it is never chosen again. Once all others are at distance 0 they follow by index.
//
// Compiled for the type of the points and their dimension:
// compile: KP_T=float KP_DIM=3
// compile: KP_T=double KP_DIM=16

#include "launch.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

using T = KP_T;
constexpr int D = KP_DIM;

struct Farthest {
  T distance;
  int32_t point;

  // Keeps the farther of two points, of equally far ones that with the smaller index.
  __device__ void take(T other_distance, int32_t other_point) {
    if (other_distance < distance || (other_distance == distance && other_point >= point)) return;
    distance = other_distance;
    point = other_point;
  }
};

}  // namespace
}  // namespace kp

using namespace kp;

// index = the chosen points of each item, in the order of choice; `distances` (N,) is scratch. An item ends early, and
// the rest of its index is not written, where the next point is nearer to the chosen ones than min_distance.
extern "C" __global__ void farthest(const T* points, const int64_t* row_splits, const int64_t* start,
                                    const int64_t* out_row_splits, int num_items, double min_distance, T* distances,
                                    int32_t* index, unsigned* not_finite) {
  __shared__ T distance_of[warp];
  __shared__ int32_t point_of[warp];
  const T least = T(min_distance) * T(min_distance);
  const int thread = int(threadIdx.x), warp_number = thread / warp, num_warps = int(blockDim.x) / warp;
  for (int item = int(blockIdx.x); item < num_items; item += int(gridDim.x)) {
    const int64_t begin = row_splits[item], end = row_splits[item + 1];
    for (int64_t i = begin + thread; i < end; i += int(blockDim.x))
      for (int a = 0; a < D; ++a) {
        const T x = points[i * D + a];
        if (x - x != 0) atomicOr(not_finite, 1u);
      }
    int32_t chosen = int32_t(begin + start[item]);
    for (int64_t s = out_row_splits[item]; s < out_row_splits[item + 1]; ++s) {
      if (thread == 0) index[s] = chosen;
      Farthest best{T(-2), 0};
      for (int64_t i = begin + thread; i < end; i += int(blockDim.x)) {
        T d[D];
        for (int a = 0; a < D; ++a) d[a] = points[i * D + a] - points[int64_t(chosen) * D + a];
        const T d2 = squared_distance(d, D);
        const bool falls = s == out_row_splits[item] || d2 < distances[i];
        const T now = i == chosen ? T(-1) : falls ? d2 : distances[i];
        distances[i] = now;
        best.take(now, int32_t(i));
      }
      for (int bit = warp / 2; bit; bit /= 2) {
        const T other_distance = __shfl_xor_sync(all_lanes, best.distance, bit);
        best.take(other_distance, __shfl_xor_sync(all_lanes, best.point, bit));
      }
      if (lane_number() == 0) {
        distance_of[warp_number] = best.distance;
        point_of[warp_number] = best.point;
      }
      __syncthreads();
      for (int w = 0; w < num_warps; ++w) best.take(distance_of[w], point_of[w]);
      chosen = best.point;
      __syncthreads();
      if (best.distance < least) break;  // the same in all threads
    }
  }
}
