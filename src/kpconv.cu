// KPConv on the GPU: sums of features by kernel point, a warp for each query; the products with the weights are cuBLAS's.
//
// Compiled for the types of geometry and features and the dimension: KP_G, KP_F, KP_DIM. The sums A (rows, groups, K,
// channels of a group) of some thousand queries at a time stay in the second-level cache, so that nothing of all queries
// times kernel points is ever made.
//
// Each lane looks at a neighbour: which kernel points act on it. Then, kernel point by kernel point, all lanes sum the
// features of those it acts on, in the order of the list: results do not depend on the launch. The gradient of the
// features is the same on the transposed list with mirrored kernel points.

#include "kpconv.h"
#include "neighbors.h"

namespace kp {
namespace {

using G = KP_G;
using F = KP_F;
constexpr int D = KP_DIM;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp = 32;
constexpr int slice = 4;  // channels of a lane at a time

enum Influence : int { linear, gaussian, constant };
enum Aggregation : int { sum, closest };

__device__ int lane_number() {
  return int(threadIdx.x) % warp;
}

struct Kernel {
  const G* points;  // (K, D)
  const G* offsets;  // (queries, K, D) of the kernel points, or null
  int num;
  G sign;  // -1 where the list is transposed
  G extent;
  int influence, aggregation;

  // The squared distance of kernel point k, for a query, from a neighbour at `relative`.
  __device__ G squared(const G* relative, int64_t query, int k) const {
    G d[D];
    for (int a = 0; a < D; ++a) {
      G p = points[k * D + a];
      if (offsets) p = p + offsets[(query * num + k) * D + a];
      d[a] = relative[a] - sign * p;
    }
    return squared_distance(d, D);
  }
};

}  // namespace
}  // namespace kp
