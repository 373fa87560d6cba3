// Convolutions with a filter of cells on the GPU: ContinuousConv, SparseConv, and their transposes.
//
// A warp for each query and 32 channels sums the features of the neighbors by cell; cuBLAS multiplies the sums by the
// filters. The sums (rows, cells, channels) of some thousand queries are computed at a time and stay in the
// second-level cache: no array over all queries and cells is allocated.
//
//    1. Each lane takes one neighbor and computes its lowest cell and the weights of the corners around it.
//    2. For one neighbor after the other, each lane adds its channel of the features to the corners' sums, which are in
//       shared memory, as many cells at a time as fit.
//
// Each sum is stored once, and the order of the sums is fixed, so results do not depend on the launch. The gradient of
// the features is the same sum over the transposed list, with reversed positions and transposed filters.
//
// Compiled for the types of geometry and features:
// compile: KP_G=float KP_F=float
// compile: KP_G=float KP_F=kp::Half
// compile: KP_G=float KP_F=kp::Bfloat
// compile: KP_G=double KP_F=double

#include "formulas/continuous.h"
#include "launch.h"
#include "storage.h"

namespace kp {
namespace {

using G = KP_G;
using S = KP_F;
using F = Real<S>;
constexpr int max_corners = 8, max_warps = 4;                   // of a neighbor; of a block
constexpr int cells_per_part = 4096 / (warp * int(sizeof(F)));  // 4 KiB of shared memory for each warp

// The neighbors of queries: relative positions in extents, or cells by kernel_index.
struct Pairs {
  const G *points, *queries, *extents;
  int64_t extent_rows;
  int extent_axes;
  bool reversed;
  const int32_t* index;
  const int32_t* kernel_index;       // or null
  const int64_t* long_kernel_index;  // or null
  int num_cells;

  __device__ bool are_positions() const { return !kernel_index && !long_kernel_index; }

  // The position of neighbor i relative to query q, or the reverse, and the inverse of half the extents.
  __device__ void relative(int64_t q, int64_t i, G* position, G* inverse) const {
    const int64_t owner = extent_rows > 1 ? (reversed ? i : q) : 0;
    for (int a = 0; a < 3; ++a) {
      position[a] = (reversed ? G(-1) : G(1)) * (points[i * 3 + a] - queries[q * 3 + a]);
      inverse[a] = 2 / extents[owner * extent_axes + (extent_axes > 1 ? a : 0)];
    }
  }
  // The cell that kernel_index names; negative if the filter does not have it.
  __device__ int named_cell(int64_t e) const {
    const int64_t k = kernel_index ? int64_t(kernel_index[e]) : long_kernel_index[e];
    return k >= 0 && k < num_cells ? int(k) : -1;
  }
};

__device__ F not_a_number() {
  return F(__longlong_as_double(0x7ff8000000000000ll));
}

// A neighbor's lowest cell and the weights of its corners, without the factors of the pair.
struct Corners {
  int cell;
  F weight[max_corners];

  __device__ Corners(const Pairs& pairs, const Filter<G>& filter, int count, int64_t q, int64_t e, bool is_pair) {
    cell = 0;
    for (int j = 0; j < max_corners; ++j) weight[j] = F(0);
    if (!is_pair) return;
    if (!pairs.are_positions()) {
      cell = pairs.named_cell(e);
      // Reading kernel_index to check it would wait for the device: a query with a wrong one gets NaN.
      weight[0] = cell < 0 ? not_a_number() : F(1);
      cell = cell < 0 ? 0 : cell;
      return;
    }
    G p[3], inverse[3];
    pairs.relative(q, pairs.index[e], p, inverse);
    for (int a = 0; a < 3; ++a) p[a] = p[a] * inverse[a];
    const Location<G, G> at(filter, p);
    cell = int(at.lowest(filter));
#pragma unroll
    for (int j = 0; j < max_corners; ++j)
      if (j < count) weight[j] = F(at.corner(filter.bits(j)));
  }
};

}  // namespace
}  // namespace kp

using namespace kp;

// sums[r, k, c] of the queries [first, first + rows): the features of their neighbors, weighted by cell k
extern "C" __global__ void aggregate_cells(const G* points, const G* queries, const G* extents, int64_t extent_rows,
                                           int extent_axes, int reversed, const int32_t* index,
                                           const int64_t* row_splits, const int32_t* kernel_index,
                                           const int64_t* long_kernel_index, const S* features, int channels,
                                           const S* neighbor_importances, const F* point_scale, const F* query_scale,
                                           int width, int height, int depth, CoordinateMapping mapping,
                                           Interpolation interpolation, int align_corners, const G* offset,
                                           int64_t first, int64_t rows, S* sums) {
  __shared__ F shared[max_warps * cells_per_part * warp];
  const Filter<G> filter({mapping, interpolation, width, height, depth, align_corners != 0}, offset);
  const int num_cells = width * height * depth, blocks = (channels + warp - 1) / warp, lane = lane_number();
  const Pairs pairs{points,        queries, extents,      extent_rows,       extent_axes,
                    reversed != 0, index,   kernel_index, long_kernel_index, num_cells};
  const int corners = pairs.are_positions() ? filter.corners() : 1;
  F* const column = shared + int(threadIdx.x) / warp * cells_per_part * warp + lane;
  for (int64_t job = first_warp(); job < rows * blocks; job += num_warps()) {
    const int64_t r = job / blocks, q = first + r, begin = row_splits[q], end = row_splits[q + 1];
    const int c = int(job % blocks) * warp + lane;
    for (int part = 0; part < num_cells; part += cells_per_part) {
      const int size = num_cells - part < cells_per_part ? num_cells - part : cells_per_part;
      for (int k = 0; k < size; ++k) column[k * warp] = F(0);
      for (int64_t batch = begin; batch < end; batch += warp) {
        const bool is_pair = batch + lane < end;
        const int64_t e = is_pair ? batch + lane : begin;
        const int32_t point = index[e];
        const Corners own(pairs, filter, corners, q, e, is_pair);
        F scale = query_scale ? query_scale[q] : F(1);
        if (neighbor_importances) scale *= F(neighbor_importances[e]);
        if (point_scale) scale *= point_scale[point];
        const int count = end - batch < warp ? int(end - batch) : warp;
        for (int source = 0; source < count; ++source) {
          const int64_t i = __shfl_sync(all_lanes, point, source);
          const int cell = __shfl_sync(all_lanes, own.cell, source) - part;
          const F factor = __shfl_sync(all_lanes, scale, source);
          const F feature = c < channels ? factor * F(features[i * channels + c]) : F(0);
#pragma unroll
          for (int j = 0; j < max_corners; ++j) {
            if (j >= corners) continue;
            const F weight = __shfl_sync(all_lanes, own.weight[j], source);
            const int k = cell + filter.step(j);
            if (k >= 0 && k < size) column[k * warp] += weight * feature;
          }
        }
      }
      for (int k = 0; k < size && c < channels; ++k)
        sums[(r * num_cells + part + k) * channels + c] = S(column[k * warp]);
    }
  }
}

// scale[q] = 1 / the sum of neighbor_importances of query q, ones if null; 1 where that sum is zero
extern "C" __global__ void inverse_sums(const int64_t* row_splits, int64_t num_queries, const S* neighbor_importances,
                                        F* scale) {
  for (int64_t q = first_thread(); q < num_queries; q += num_threads()) {
    F sum = F(row_splits[q + 1] - row_splits[q]);
    if (neighbor_importances) {
      sum = F(0);
      for (int64_t e = row_splits[q]; e < row_splits[q + 1]; ++e) sum += F(neighbor_importances[e]);
    }
    scale[q] = sum == F(0) ? F(1) : F(1) / sum;
  }
}

// Gradients by pair for queries [first, first + rows), from products (rows, cells, channels) = grad_out W_k^T. Writes
// pair_grads (E, 3), the gradient of each pair's point; grad_queries (M, 3); grad_extents (M, extent_axes), each only
// if there are positions; and grad_neighbor_importances (E,). Not for reversed positions.
extern "C" __global__ void __launch_bounds__(max_warps* warp, 4)
    cell_grads(const G* points, const G* queries, const G* extents, int64_t extent_rows, int extent_axes,
               const int32_t* index, const int64_t* row_splits, const int32_t* kernel_index,
               const int64_t* long_kernel_index, const S* features, int channels, const S* neighbor_importances,
               const F* point_scale, const F* query_scale, int width, int height, int depth, CoordinateMapping mapping,
               Interpolation interpolation, int align_corners, const G* offset, int is_normalized, int64_t first,
               int64_t rows, const S* products, G* pair_grads, G* grad_queries, G* grad_extents,
               F* grad_neighbor_importances) {
  const Filter<G> filter({mapping, interpolation, width, height, depth, align_corners != 0}, offset);
  const int num_cells = width * height * depth, lane = lane_number();
  const Pairs pairs{points, queries, extents,      extent_rows,       extent_axes,
                    false,  index,   kernel_index, long_kernel_index, num_cells};
  const int corners = pairs.are_positions() ? filter.corners() : 1;
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t q = first + r, begin = row_splits[q], end = row_splits[q + 1];
    const F of_query = query_scale ? query_scale[q] : F(1);
    F result_grad = F(0), sum = F(0);  // of the result before query_scale; of neighbor_importances
    G query_grad[3] = {}, extent_grad[3] = {};
    for (int64_t batch = begin; batch < end; batch += warp) {
      const bool is_pair = batch + lane < end;
      const int64_t e = is_pair ? batch + lane : begin;
      const int32_t point = index[e];
      const int lowest = Corners(pairs, filter, corners, q, e, is_pair).cell;
      F dots[max_corners];  // f_i . (grad W^T) of each corner's cell
      for (int j = 0; j < max_corners; ++j) dots[j] = F(0);
      const int count = end - batch < warp ? int(end - batch) : warp;
      for (int source = 0; source < count; ++source) {
        const S* const row = features + int64_t(__shfl_sync(all_lanes, point, source)) * channels;
        const int cell = __shfl_sync(all_lanes, lowest, source);
#pragma unroll 1
        for (int j = 0; j < max_corners; ++j) {
          if (j >= corners) continue;
          const S* const product = products + (r * num_cells + cell + filter.step(j)) * channels;
          F dot = F(0);
          for (int c = lane; c < channels; c += warp) dot += F(row[c]) * F(product[c]);
          for (int bit = warp / 2; bit; bit /= 2) dot += __shfl_xor_sync(all_lanes, dot, bit);
          if (lane == source) dots[j] = dot;
        }
      }
      if (!is_pair) continue;
      // The weights of the corners are computed once more: kept until here they would take too many registers.
      G p[3] = {}, mapped[3], inverse[3] = {}, grad[3] = {};
      F weight_grad = dots[0];
      if (pairs.are_positions()) {
        pairs.relative(q, point, p, inverse);
        for (int a = 0; a < 3; ++a) mapped[a] = p[a] = p[a] * inverse[a];
        const Location<G, G> at(filter, mapped);
        weight_grad = F(0);
#pragma unroll 1
        for (int j = 0; j < corners; ++j) {
          weight_grad += F(at.corner(filter.bits(j))) * dots[j];
          at.add_slopes(filter.bits(j), G(dots[j]), grad);
        }
        Location<G, G>::pull_back(filter, p, grad);
      } else if (pairs.named_cell(e) < 0) {
        weight_grad = not_a_number();
      }
      const F importance = neighbor_importances ? F(neighbor_importances[e]) : F(1);
      const F of_point = point_scale ? point_scale[point] : F(1);
      grad_neighbor_importances[e] = of_query * of_point * weight_grad;
      result_grad += of_point * importance * weight_grad;
      sum += importance;
      if (!pairs.are_positions()) continue;
      const G scale = G(of_query * importance * of_point);
      for (int a = 0; a < 3; ++a) {
        const G position_grad = scale * (grad[a] * inverse[a]);
        pair_grads[e * 3 + a] = position_grad;
        query_grad[a] -= position_grad;
        extent_grad[a] -= scale * (grad[a] * p[a] * inverse[a] * G(0.5));  // p = 2 x / extent
      }
    }
    for (int bit = warp / 2; bit; bit /= 2) {
      result_grad += __shfl_xor_sync(all_lanes, result_grad, bit);
      sum += __shfl_xor_sync(all_lanes, sum, bit);
      for (int a = 0; a < 3; ++a) {
        query_grad[a] += __shfl_xor_sync(all_lanes, query_grad[a], bit);
        extent_grad[a] += __shfl_xor_sync(all_lanes, extent_grad[a], bit);
      }
    }
    if (is_normalized && sum != F(0))  // query_scale is 1 / sum
      for (int64_t e = begin + lane; e < end; e += warp)
        grad_neighbor_importances[e] -= result_grad * of_query * of_query;
    if (lane || !pairs.are_positions()) continue;
    for (int a = 0; a < 3; ++a) grad_queries[q * 3 + a] = query_grad[a];
    for (int a = 0; a < extent_axes; ++a)
      grad_extents[q * extent_axes + a] =
          extent_axes > 1 ? extent_grad[a] : (extent_grad[0] + extent_grad[1]) + extent_grad[2];
  }
}
