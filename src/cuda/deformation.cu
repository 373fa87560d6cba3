// The losses of deformed kernel points on the GPU: a thread for each query and kernel point computes its term. Terms
// are then summed in float64 in a fixed order (sum_columns in gpu_layers.py). Nothing is contracted, as on the CPU.
//
// Compiled for the type of geometry and the dimension:
// compile: KP_T=float KP_DIM=3
// compile: KP_T=double KP_DIM=2

#include "formulas/deformation.h"
#include "launch.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

using T = KP_T;
constexpr int D = KP_DIM;

// Coordinate a of the deformed kernel point k of query q.
__device__ T deformed(const T* kernel_points, const T* offsets, int64_t num_kernels, int64_t q, int64_t k, int a) {
  return kernel_points[k * D + a] + offsets[(q * num_kernels + k) * D + a];
}

}  // namespace
}  // namespace kp

using namespace kp;

// nearest[q, k] = the neighbor nearest to a deformed kernel point, of equally near ones the first, -1 without
// neighbors; smallest[q, k] = its squared distance, or NaN if any distance is NaN.
extern "C" __global__ void fit(const T* points, const T* queries, const int32_t* index, const int64_t* row_splits,
                               const T* kernel_points, const T* offsets, int64_t num_queries, int64_t num_kernels,
                               int32_t* nearest, T* smallest) {
  for (int64_t i = first_thread(); i < num_queries * num_kernels; i += num_threads()) {
    const int64_t q = i / num_kernels, k = i % num_kernels;
    T best = T(0), nan = T(0);
    int32_t best_point = -1;
    for (int64_t e = row_splits[q]; e < row_splits[q + 1]; ++e) {
      T d[D];
      for (int a = 0; a < D; ++a)
        d[a] = from_neighbor(points[int64_t(index[e]) * D + a], queries[q * D + a],
                             deformed(kernel_points, offsets, num_kernels, q, k, a));
      const T d2 = squared_distance(d, D);
      if (d2 != d2) nan = d2;
      if (best_point >= 0 && !(d2 < best)) continue;
      best = d2;
      best_point = index[e];
    }
    nearest[i] = best_point;
    smallest[i] = nan != nan ? nan : best;
  }
}

extern "C" __global__ void fit_gradient(const T* points, const T* queries, const T* kernel_points, const T* offsets,
                                        const int32_t* nearest, int64_t num_queries, int64_t num_kernels, T scale,
                                        const T* grad_out, T* grad_offsets) {
  const T factor = scale * *grad_out;
  for (int64_t i = first_thread(); i < num_queries * num_kernels; i += num_threads()) {
    const int64_t q = i / num_kernels, k = i % num_kernels;
    for (int a = 0; a < D; ++a)
      grad_offsets[i * D + a] = nearest[i] < 0
                                    ? T(0)
                                    : factor * from_neighbor(points[int64_t(nearest[i]) * D + a], queries[q * D + a],
                                                             deformed(kernel_points, offsets, num_kernels, q, k, a));
  }
}

// losses[q, k] = the repulsion between kernel point k and those after it
extern "C" __global__ void repel(const T* kernel_points, const T* offsets, int64_t num_queries, int64_t num_kernels,
                                 T inverse_extent, T repulse_extent, T* losses) {
  for (int64_t i = first_thread(); i < num_queries * num_kernels; i += num_threads()) {
    const int64_t q = i / num_kernels, k = i % num_kernels;
    T sum = T(0);
    for (int64_t j = k + 1; j < num_kernels; ++j) {
      T d[D];
      for (int a = 0; a < D; ++a)
        d[a] = deformed(kernel_points, offsets, num_kernels, q, k, a) -
               deformed(kernel_points, offsets, num_kernels, q, j, a);
      const T overlapped = overlap(T(sqrt(squared_distance(d, D))), inverse_extent, repulse_extent);
      sum += overlapped * overlapped;
    }
    losses[i] = sum;
  }
}

extern "C" __global__ void repel_gradient(const T* kernel_points, const T* offsets, int64_t num_queries,
                                          int64_t num_kernels, T inverse_extent, T repulse_extent, T weight,
                                          const T* grad_out, T* grad_offsets) {
  const T factor = weight * *grad_out;
  for (int64_t i = first_thread(); i < num_queries * num_kernels; i += num_threads()) {
    const int64_t q = i / num_kernels, k = i % num_kernels;
    T sum[D] = {};
    for (int64_t j = 0; j < num_kernels; ++j) {
      if (j == k) continue;
      T d[D];
      for (int a = 0; a < D; ++a)
        d[a] = deformed(kernel_points, offsets, num_kernels, q, k, a) -
               deformed(kernel_points, offsets, num_kernels, q, j, a);
      const T slope = repulsion_slope(squared_distance(d, D), inverse_extent, repulse_extent);
      for (int a = 0; a < D; ++a) sum[a] += slope * d[a];
    }
    for (int a = 0; a < D; ++a) grad_offsets[i * D + a] = factor * sum[a];
  }
}
