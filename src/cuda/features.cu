// Features of the local surface on the GPU: a thread for each query fits a plane to its neighbors.
//
// Compiled for the type of the points:
// compile: KP_T=float
// compile: KP_T=double

#include "launch.h"
#include "formulas/features.h"

using namespace kp;

// viewpoints: one for each query, or one for all, or null. normals, eigenvalues: (M, 3), or null.
extern "C" __global__ void fit_planes(const KP_T* points, const KP_T* queries, const int32_t* index,
                                      const int64_t* row_splits, int64_t num_queries, const KP_T* viewpoints,
                                      int64_t num_viewpoints, KP_T* normals, KP_T* eigenvalues) {
  for (int64_t q = first_thread(); q < num_queries; q += num_threads())
    fit_plane(points, queries + q * 3, index + row_splits[q], row_splits[q + 1] - row_splits[q],
              viewpoints ? viewpoints + (num_viewpoints == 1 ? 0 : q * 3) : nullptr,
              normals ? normals + q * 3 : nullptr, eigenvalues ? eigenvalues + q * 3 : nullptr);
}
