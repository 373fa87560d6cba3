// The cells of a filter that a neighbor acts on, and their weights: see formulas/continuous.h. They depend on the dtype
// of the geometry, not on the features, and are compiled once for each (cells.cpp).
#pragma once

#include "formulas/continuous.h"
#include "kernels.h"

namespace kp {
namespace {

constexpr int64_t cell_chunk = 128;  // neighbors processed together
constexpr int max_corners = 8;

}  // namespace

// Positions and neighbor lists of one pass of a convolution. `queries` gather the features of neighboring `points`.
template <class G>
struct CellGeometry {
  const G *points, *queries;
  const G* extents;
  int64_t extent_rows;  // 1: the same extents for all
  int extent_axes;      // 1: the same extent for all axes
  bool reversed;        // positions of the query relative to the neighbor, in the extents of the neighbor
  const int32_t* index;
  FilterOptions options;
  const G* offset;  // (3,) or null
};

#ifdef KP_ISA
namespace KP_ISA {

// For the neighbors index[begin, begin + n) of query q, n <= cell_chunk: the lowest cell and, for corner j, the weight
// at weights[j * cell_chunk + i]. Whole vectors are written.
void find_cells(const CellGeometry<float>&, int64_t q, int64_t begin, int64_t n, int32_t* cells, float* weights);
void find_cells(const CellGeometry<double>&, int64_t q, int64_t begin, int64_t n, int32_t* cells, double* weights);

// From the gradients of these weights, those of the relative positions and of the extents, for axis a at
// [a * cell_chunk + i]. Not for reversed passes.
void find_cell_grads(const CellGeometry<float>&, int64_t q, int64_t begin, int64_t n, const float* weight_grads,
                     float* position_grads, float* extent_grads);
void find_cell_grads(const CellGeometry<double>&, int64_t q, int64_t begin, int64_t n, const double* weight_grads,
                     double* position_grads, double* extent_grads);

}  // namespace KP_ISA
#endif

}  // namespace kp
