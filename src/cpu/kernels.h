// Declares every CPU kernel and its arguments, once.
//
//   KP_FIELDS_<Name>   the fields of one argument struct. They expand to the struct itself and to a table of names,
//                      kinds and offsets (fields.h) with which the extension module fills it from Python arguments.
//   KP_KERNELS         the kernels, each with its struct. They expand to declarations and to one function table per
//                      instruction set.
//
// The caller has checked all arrays; they are contiguous and in C order.
#pragma once

#include "formulas/common.h"

namespace kp {

// The types after uint8 are those of labels only.
enum class DType : int { float32, float64, int32, int64, uint8, int8, int16, uint16, uint32, uint64 };

struct Array {
  void* data;
  int64_t rows, cols;  // a vector has cols = 1; weights (K, Cin, Cout) are rows = K * Cin, cols = Cout
  DType dtype;
};

// An array that may be None or left out: `data` is null, and so is the shape. For an output that is not wanted Python
// may pass a shape in its place (ops.Shaped): then `data` is null and the shape is set.
struct OptionalArray : Array {};

struct OptionalInt {
  int64_t value;
  bool is_set;
};

enum class Status : int {
  ok,
  out_of_memory,
  not_finite,  // a coordinate is NaN or infinite, or squared distances overflow or underflow: see is_measurable()
  out_of_range,
  crowded,  // internal: the cells of a grid would hold too many points, so a kd-tree is built instead
};

namespace {

// The elements of an array: as<T> for reading, into<T> for writing.
template <class T>
const T* as(const Array& array) {
  return static_cast<const T*>(array.data);
}
template <class T>
T* into(const Array& array) {
  return static_cast<T*>(array.data);
}

constexpr int64_t size_of(DType real) {
  return real == DType::float32 ? 4 : 8;
}

// Calls call(float()) or call(double()).
template <class Call>
auto with_real(DType dtype, Call call) {
  return dtype == DType::float32 ? call(float()) : call(double());
}

}  // namespace

// Options that no GPU kernel takes; all others are in formulas/common.h. The tuples of their names in kpcore/*.py are
// in the same order.
enum class VoxelPoint : int { barycenter, center, nearest };
enum class VoxelFeature : int { mean, max, nearest };
enum class Sampling : int { fastest, exact, bucketed };
enum class Normalization : int { none, count, positive };
enum class CrossEntropyReduction : int { mean, sum, none };

// The head of every index: Grid (grid.h) and Tree (kdtree.h) begin with it.
enum class IndexKind : int { grid, tree };
struct Index {
  IndexKind kind;
  DType dtype;
  int dimension;
  int64_t num_points, items;
};
struct IndexArguments {
  IndexKind kind;  // where a grid would be crowded, a kd-tree is built instead
  Array points, row_splits;
  double cell;  // grid only: cell width, and so the largest radius that can be searched
  int threads;
};

struct Search {
  const void* index;
  // Null queries: the points search among themselves. Several sets of queries, each with all batch items, may follow
  // one another.
  Array queries, queries_row_splits;
  Array radii;  // (M,), one for each query; null: `radius` for all queries
  double radius;
  bool is_inclusive;      // whether points at exactly the radius are neighbors
  int64_t max_neighbors;  // keep only the nearest; negative: no limit
  Sort sort;
  Metric metric;
  Ignore ignore;
  int threads;
};

// A search of the k nearest points by L2 in any number of dimensions; it writes rows as knn_search does.
struct FeatureSearch {
  Array points, row_splits, queries, queries_row_splits;
  int64_t k;
  Ignore ignore;
  int threads;
};

struct GridSubsample {
  Array points, features, labels, row_splits;
  Array voxel_size;  // (D,), dtype of the points
  Array origin;      // (D,) or (B, D), dtype of the points; null: published_origin() of every batch item
  VoxelPoint position;
  VoxelFeature feature;
  OptionalInt ignore_label;
  int threads;
};

// The outputs of grid subsampling.
struct Subsampled {
  Array points, features, labels, inverse, counts;
  Array nearest;  // (V,) the point nearest to each voxel's center; null unless position or feature needs it
};

// ---- argument structs as lists of F(type, name). An operator and its backward pass share one struct.

// values: one of 4 or 8 bytes for each pair, which is moved along.
#define KP_FIELDS_Transpose(F)    \
  F(Array, index)                 \
  F(Array, row_splits)            \
  F(OptionalArray, values)        \
  F(Array, transposed_index)      \
  F(Array, transposed_row_splits) \
  F(OptionalArray, transposed_values)

// Checks a neighbor list that a caller passed (int32 or int64). Copies row_splits always, and index if checked_index is
// not null.
#define KP_FIELDS_CheckList(F)    \
  F(Array, index)                 \
  F(Array, row_splits)            \
  F(int64_t, num_points)          \
  F(OptionalArray, checked_index) \
  F(Array, checked_row_splits)

#define KP_FIELDS_LongestRow(F) \
  F(Array, row_splits)          \
  F(Array, longest)

// Writes a neighbor list as a matrix (M, width) of int32 or int64; `fill` stands where a row has no more neighbors.
#define KP_FIELDS_PadList(F) \
  F(Array, index)            \
  F(Array, row_splits)       \
  F(int64_t, fill)           \
  F(Array, padded)

// Converts a padded matrix to a neighbor list: count_padded writes row_splits, unpad writes index. Entries of -1 and
// num_points are padding.
#define KP_FIELDS_Unpad(F) \
  F(Array, padded)         \
  F(int64_t, num_points)   \
  F(Array, row_splits)     \
  F(OptionalArray, index)

// `nearest` is set only if `feature` is VoxelFeature::nearest.
#define KP_FIELDS_GridSubsampleGrad(F) \
  F(Array, features)                   \
  F(Array, inverse)                    \
  F(Array, counts)                     \
  F(OptionalArray, nearest)            \
  F(VoxelFeature, feature)             \
  F(Array, grad_out)                   \
  F(Array, grad_features)

#define KP_FIELDS_FarthestPoints(F) \
  F(Array, points)                  \
  F(Array, row_splits)              \
  F(Array, start)                   \
  F(Array, out_row_splits)          \
  F(double, min_distance)           \
  F(Sampling, method)               \
  F(Array, index)

// Of the neighbors of each query the normal of the plane through them, and the eigenvalues of their covariance, the
// largest first, both (M, 3). viewpoints: (M, 3), or (1, 3) for all, towards which normals point.
#define KP_FIELDS_FitPlanes(F) \
  F(Array, points)             \
  F(Array, queries)            \
  F(Array, index)              \
  F(Array, row_splits)         \
  F(OptionalArray, viewpoints) \
  F(OptionalArray, normals)    \
  F(OptionalArray, eigenvalues)

// weights: (E,), one for each pair. forward_row_splits: set only in the backward pass of a mean: grad_out of query j is
// divided by j's number of neighbors, read from forward_row_splits. For max and min: lists shorter than `width` are
// padded with pad_value, and `choice` receives the row that was chosen, -1 for padding.
#define KP_FIELDS_NeighborReduce(F)    \
  F(Array, features)                   \
  F(Array, index)                      \
  F(Array, row_splits)                 \
  F(OptionalArray, weights)            \
  F(OptionalArray, forward_row_splits) \
  F(Reduction, reduction)              \
  F(double, empty)                     \
  F(double, pad_value)                 \
  F(int64_t, width)                    \
  F(OptionalArray, out)                \
  F(OptionalArray, choice)             \
  F(OptionalArray, grad_out)           \
  F(OptionalArray, grad_weights)

#define KP_FIELDS_SegmentReduce(F) \
  F(OptionalArray, features)       \
  F(Array, row_splits)             \
  F(Reduction, reduction)          \
  F(double, empty)                 \
  F(OptionalArray, out)            \
  F(OptionalArray, choice)         \
  F(OptionalArray, grad_out)       \
  F(OptionalArray, grad_features)

// Backward of max and min: adds every value of grad_out to the row that `choice` names for it.
#define KP_FIELDS_Unpool(F) \
  F(Array, choice)          \
  F(Array, grad_out)        \
  F(Array, grad_features)

// out[q] = features[index[q]]; with row_splits the features of the first neighbor of q, or zeros for an empty list.
#define KP_FIELDS_GatherRows(F) \
  F(Array, features)            \
  F(Array, index)               \
  F(OptionalArray, row_splits)  \
  F(Array, out)

#define KP_FIELDS_InverseDistanceWeights(F) \
  F(Array, distance)                        \
  F(Array, row_splits)                      \
  F(double, power)                          \
  F(Array, weights)

// The first `fixed` kernel points are constrained: 0, 1 (one stays at the center) or 3 (and two stay on the last axis).
// radii: (num,), each point stays on a sphere of that radius; null: points move freely.
#define KP_FIELDS_KernelPoints(F) \
  F(int, num)                     \
  F(int, dimension)               \
  F(int, fixed)                   \
  F(OptionalArray, radii)         \
  F(uint64_t, seed)               \
  F(Array, out)

// weights (K, Cin / groups, Cout), or (K, C) if depthwise; offsets (M, K, D); modulations (M, K), or (M, K, factors)
// if depthwise. The transposed list is used by grad_features only. kernel_offsets (M, K, D): the weights of each query
// are resampled, with a linear influence of extent kernel_extent.
#define KP_FIELDS_KPConv(F)               \
  F(Array, points)                        \
  F(Array, queries)                       \
  F(Array, index)                         \
  F(Array, row_splits)                    \
  F(Array, features)                      \
  F(Array, weights)                       \
  F(Array, kernel_points)                 \
  F(OptionalArray, offsets)               \
  F(OptionalArray, modulations)           \
  F(OptionalArray, kernel_offsets)        \
  F(double, extent)                       \
  F(double, kernel_extent)                \
  F(Influence, influence)                 \
  F(Aggregation, aggregation)             \
  F(Normalization, normalization)         \
  F(int, groups)                          \
  F(int, factors)                         \
  F(bool, depthwise)                      \
  F(OptionalArray, out)                   \
  F(OptionalArray, grad_out)              \
  F(OptionalArray, transposed_index)      \
  F(OptionalArray, transposed_row_splits) \
  F(OptionalArray, grad_features)         \
  F(OptionalArray, grad_weights)          \
  F(OptionalArray, grad_points)           \
  F(OptionalArray, grad_queries)          \
  F(OptionalArray, grad_kernel_points)    \
  F(OptionalArray, grad_offsets)          \
  F(OptionalArray, grad_modulations)      \
  F(OptionalArray, grad_kernel_offsets)

// Convolutions with a filter of depth * height * width cells, in which a neighbor acts on the cells around its
// position, or on the cell kernel_index (E,) if that is set; then there are no points, queries and extents (their rows
// or 1, 1 or 3). Positions in the filter are those of the neighbors relative to their query, in the query's extents; if
// `reversed`, those of the query relative to its neighbors, in their extents. neighbor_importances (E,), point_scale
// (N,) and query_scale (M,) are factors of pairs, gathered features and results. transposed_filters: features have as
// many channels as filters (cells * Cin, Cout) have columns.
//
// cell_conv writes `out`, and grad_filters (cells, channels of the features, channels of out) if grad_out is the
// gradient of `out`. cell_conv_grads writes the other gradients, of passes that are neither reversed nor transposed.
// is_normalized: query_scale is the inverse of the sum of neighbor_importances, unless that is zero, and depends on
// them.
#define KP_FIELDS_CellConv(F)            \
  F(OptionalArray, points)               \
  F(OptionalArray, queries)              \
  F(OptionalArray, extents)              \
  F(OptionalArray, offset)               \
  F(OptionalArray, kernel_index)         \
  F(Array, index)                        \
  F(Array, row_splits)                   \
  F(Array, features)                     \
  F(Array, filters)                      \
  F(OptionalArray, neighbor_importances) \
  F(OptionalArray, point_scale)          \
  F(OptionalArray, query_scale)          \
  F(int, depth)                          \
  F(int, height)                         \
  F(int, width)                          \
  F(CoordinateMapping, mapping)          \
  F(Interpolation, interpolation)        \
  F(bool, align_corners)                 \
  F(bool, reversed)                      \
  F(bool, transposed_filters)            \
  F(bool, is_normalized)                 \
  F(OptionalArray, out)                  \
  F(OptionalArray, grad_out)             \
  F(OptionalArray, grad_filters)         \
  F(OptionalArray, grad_points)          \
  F(OptionalArray, grad_queries)         \
  F(OptionalArray, grad_extents)         \
  F(OptionalArray, grad_point_scale)     \
  F(OptionalArray, grad_neighbor_importances)

// scale[q] = 1 / the sum of neighbor_importances of query q (ones if null); 1 where that sum is zero
#define KP_FIELDS_InverseSums(F)         \
  F(Array, row_splits)                   \
  F(OptionalArray, neighbor_importances) \
  F(Array, scale)

// Convolution of `batch` images x (batch, channels, height, width), or (batch, height, width, channels) if
// channels_last, which is also the order of grad_x, of `out` and of all offsets and modulations that have an output
// position each. weight: (experts, out_channels, channels / groups, scope_height, scope_width), where depthwise
// (experts, channels, scope_height, scope_width). routing (batch, experts), else there is one expert. kernel_offsets:
// (batch, kernel_groups * taps * 2, out_height, out_width) if is_local, else (batch, taps * 2). data_offsets: (batch,
// data_groups * taps * 2, out_height, out_width), modulations the same with data_groups * taps. src/formulas/deform2d.h
// has the formulas. deform2d_grad_x writes grad_x where there are neither data_offsets nor modulations; deform2d_grads
// writes all other gradients.
#define KP_FIELDS_Deform2d(F)           \
  F(Array, x)                           \
  F(Array, weight)                      \
  F(OptionalArray, routing)             \
  F(OptionalArray, kernel_offsets)      \
  F(OptionalArray, data_offsets)        \
  F(OptionalArray, modulations)         \
  F(OptionalArray, bias)                \
  F(int64_t, batch)                     \
  F(int64_t, channels)                  \
  F(int64_t, height)                    \
  F(int64_t, width)                     \
  F(int64_t, out_channels)              \
  F(int64_t, out_height)                \
  F(int64_t, out_width)                 \
  F(int64_t, kernel_height)             \
  F(int64_t, kernel_width)              \
  F(int64_t, scope_height)              \
  F(int64_t, scope_width)               \
  F(int64_t, row_stride)                \
  F(int64_t, column_stride)             \
  F(int64_t, row_padding)               \
  F(int64_t, column_padding)            \
  F(int64_t, row_dilation)              \
  F(int64_t, column_dilation)           \
  F(int64_t, groups)                    \
  F(int64_t, experts)                   \
  F(int64_t, kernel_groups)             \
  F(int64_t, data_groups)               \
  F(bool, depthwise)                    \
  F(bool, is_local)                     \
  F(bool, uniform_grid)                 \
  F(bool, clips)                        \
  F(bool, channels_last)                \
  F(OptionalArray, out)                 \
  F(OptionalArray, grad_out)            \
  F(OptionalArray, grad_x)              \
  F(OptionalArray, grad_weight)         \
  F(OptionalArray, grad_routing)        \
  F(OptionalArray, grad_kernel_offsets) \
  F(OptionalArray, grad_data_offsets)   \
  F(OptionalArray, grad_modulations)    \
  F(OptionalArray, grad_bias)

// Both losses share this struct. The fitting loss uses points, queries, the neighbor list and `nearest` (M, K), the
// neighbor nearest to each kernel point, -1 without neighbors; the repulsion loss uses repulse_extent. `weight` scales
// every term. repulsion_loss_grad keeps the other kernel points fixed: twice its result is the full derivative.
#define KP_FIELDS_Deformation(F) \
  F(OptionalArray, points)       \
  F(OptionalArray, queries)      \
  F(OptionalArray, index)        \
  F(OptionalArray, row_splits)   \
  F(Array, kernel_points)        \
  F(Array, offsets)              \
  F(double, extent)              \
  F(double, repulse_extent)      \
  F(double, weight)              \
  F(OptionalArray, loss)         \
  F(OptionalArray, nearest)      \
  F(OptionalArray, grad_out)     \
  F(OptionalArray, grad_offsets) \
  F(OptionalArray, grad_kernel_points)

#define KP_FIELDS_Linear(F)       \
  F(OptionalArray, features)      \
  F(OptionalArray, weights)       \
  F(OptionalArray, bias)          \
  F(OptionalArray, out)           \
  F(OptionalArray, grad_out)      \
  F(OptionalArray, grad_features) \
  F(OptionalArray, grad_weights)

#define KP_FIELDS_SumRows(F) \
  F(Array, rows)             \
  F(Array, sums)

// mean, variance: (B, groups) float64, over all values of a batch item and group; 0 for an empty item.
#define KP_FIELDS_Moments(F) \
  F(Array, features)         \
  F(Array, row_splits)       \
  F(Array, mean)             \
  F(Array, variance)

// Normalizes every group of channels over the rows of each batch item, then applies a leaky ReLU (slope 1: none).
// scale, shift: (C,). mean, inverse_std: (B, groups) float64. statistics_fixed: mean and inverse_std are constants in
// the backward pass, not functions of the features.
#define KP_FIELDS_Normalize(F)    \
  F(Array, features)              \
  F(Array, row_splits)            \
  F(Array, scale)                 \
  F(Array, shift)                 \
  F(Array, mean)                  \
  F(Array, inverse_std)           \
  F(bool, statistics_fixed)       \
  F(double, negative_slope)       \
  F(OptionalArray, out)           \
  F(OptionalArray, grad_out)      \
  F(OptionalArray, grad_features) \
  F(OptionalArray, grad_scale)    \
  F(OptionalArray, grad_shift)

#define KP_FIELDS_Activate(F) \
  F(Array, features)          \
  F(Activation, activation)   \
  F(double, negative_slope)   \
  F(OptionalArray, out)       \
  F(OptionalArray, grad_out)  \
  F(OptionalArray, grad_features)

#define KP_FIELDS_Add(F) \
  F(Array, first)        \
  F(Array, second)       \
  F(Array, out)

#define KP_FIELDS_SumSquares(F) \
  F(Array, values)              \
  F(Array, sum)

#define KP_FIELDS_Sgd(F) \
  F(Array, value)        \
  F(Array, grad)         \
  F(Array, moment)       \
  F(double, lr)          \
  F(double, momentum)    \
  F(double, weight_decay)

// mean and square are the running means of the gradient and its square, first and second their decay rates (beta 1 and
// beta 2). keep = 1 - lr * weight_decay; rate and inverse_root include the bias corrections.
#define KP_FIELDS_AdamW(F) \
  F(Array, value)          \
  F(Array, grad)           \
  F(Array, mean)           \
  F(Array, square)         \
  F(double, keep)          \
  F(double, first)         \
  F(double, second)        \
  F(double, rate)          \
  F(double, inverse_root)  \
  F(double, eps)

#define KP_FIELDS_Dropout(F) \
  F(Array, features)         \
  F(double, rate)            \
  F(uint64_t, seed)          \
  F(Array, out)

#define KP_FIELDS_Softmax(F) \
  F(Array, features)         \
  F(OptionalArray, out)      \
  F(OptionalArray, grad_out) \
  F(OptionalArray, grad_features)

#define KP_FIELDS_CrossEntropy(F)     \
  F(Array, logits)                    \
  F(Array, labels)                    \
  F(OptionalInt, ignore_index)        \
  F(OptionalArray, class_weights)     \
  F(CrossEntropyReduction, reduction) \
  F(OptionalArray, out)               \
  F(OptionalArray, grad_out)          \
  F(OptionalArray, grad_logits)

// Joins up to four arrays side by side into `out`, or splits `out` into them. A part with a null `data` is skipped; its
// shape says how many columns.
#define KP_FIELDS_Concatenate(F) \
  F(OptionalArray, first)        \
  F(OptionalArray, second)       \
  F(OptionalArray, third)        \
  F(OptionalArray, fourth)       \
  F(Array, out)

// The lowest and the highest coordinate along each axis, (2, D) int32, of at least one row of coordinates.
#define KP_FIELDS_CellBounds(F) \
  F(Array, coords)              \
  F(Array, bounds)

// Numbers the cells floor(coords / stride) of a box (src/formulas/kernel_map.h) and sorts the numbers, stably: row
// order[i] of the coordinates is in cell cells[i]. low, sizes, stride: (D,) int64.
#define KP_FIELDS_SortCells(F) \
  F(Array, coords)             \
  F(Array, row_splits)         \
  F(Array, low)                \
  F(Array, sizes)              \
  F(Array, stride)             \
  F(Array, cells)              \
  F(Array, order)

// Replaces the coordinate along one axis of each cell by the outputs that read it: spread_cell() in
// src/formulas/kernel_map.h. `spread` has the same number of places for every cell.
#define KP_FIELDS_SpreadCells(F) \
  F(Array, cells)                \
  F(int64_t, inner)              \
  F(int64_t, low)                \
  F(int64_t, size)               \
  F(int64_t, out_low)            \
  F(int64_t, out_size)           \
  F(int64_t, kernel_size)        \
  F(int64_t, stride)             \
  F(int64_t, dilation)           \
  F(int64_t, padding)            \
  F(int64_t, end)                \
  F(Array, spread)

// The different numbers below `end` in rising order, and how many there are, (1,) int64. `unique` is as long as
// `cells`.
#define KP_FIELDS_UniqueCells(F) \
  F(Array, cells)                \
  F(int64_t, end)                \
  F(Array, unique)               \
  F(Array, num_unique)

// The coordinates of sorted cells, times `stride`, and the row_splits of their batch items.
#define KP_FIELDS_CellCoords(F) \
  F(Array, cells)               \
  F(Array, low)                 \
  F(Array, sizes)               \
  F(Array, stride)              \
  F(Array, coords)              \
  F(Array, row_splits)

// The pairs of a kernel map: count_pairs writes row_splits, fill_pairs index and kernel_index. cells and order: the
// sorted input cells of the box `low`, `sizes`. out_order sorts the outputs; null if they are sorted. kernel_size,
// scale, first, dilation: (D,) int64, as in src/formulas/kernel_map.h.
#define KP_FIELDS_KernelPairs(F) \
  F(Array, cells)                \
  F(Array, order)                \
  F(Array, low)                  \
  F(Array, sizes)                \
  F(Array, out_coords)           \
  F(Array, out_row_splits)       \
  F(OptionalArray, out_order)    \
  F(Array, kernel_size)          \
  F(Array, scale)                \
  F(Array, first)                \
  F(Array, dilation)             \
  F(Array, row_splits)           \
  F(OptionalArray, index)        \
  F(OptionalArray, kernel_index)

// Sorts the pairs of each row by kernel_index and then by index, in place. Pairs of a row differ in one of the two.
#define KP_FIELDS_SortPairs(F) \
  F(Array, row_splits)         \
  F(int64_t, num_kernels)      \
  F(Array, index)              \
  F(Array, kernel_index)

// Sums the features of the rows in each cell into a dense array (B, C, volume): out, or of grad_out, the gradient.
#define KP_FIELDS_ToDense(F) \
  F(Array, cells)            \
  F(Array, order)            \
  F(int64_t, volume)         \
  F(OptionalArray, features) \
  F(OptionalArray, out)      \
  F(OptionalArray, grad_out) \
  F(OptionalArray, grad_features)

#define KP_KERNELS(X)                                 \
  X(transpose, Transpose)                             \
  X(check_list, CheckList)                            \
  X(longest_row, LongestRow)                          \
  X(pad_list, PadList)                                \
  X(count_padded, Unpad)                              \
  X(unpad, Unpad)                                     \
  X(grid_subsample_grad, GridSubsampleGrad)           \
  X(farthest_points, FarthestPoints)                  \
  X(fit_planes, FitPlanes)                            \
  X(neighbor_reduce, NeighborReduce)                  \
  X(neighbor_reduce_grad_weights, NeighborReduce)     \
  X(segment_reduce, SegmentReduce)                    \
  X(segment_reduce_grad, SegmentReduce)               \
  X(unpool, Unpool)                                   \
  X(gather_rows, GatherRows)                          \
  X(inverse_distance_weights, InverseDistanceWeights) \
  X(kpconv, KPConv)                                   \
  X(kpconv_grad_features, KPConv)                     \
  X(kpconv_grads, KPConv)                             \
  X(cell_conv, CellConv)                              \
  X(cell_conv_grads, CellConv)                        \
  X(inverse_sums, InverseSums)                        \
  X(deform2d, Deform2d)                               \
  X(deform2d_grad_x, Deform2d)                        \
  X(deform2d_grads, Deform2d)                         \
  X(kernel_points, KernelPoints)                      \
  X(lloyd, KernelPoints)                              \
  X(fitting_loss, Deformation)                        \
  X(fitting_loss_grad, Deformation)                   \
  X(repulsion_loss, Deformation)                      \
  X(repulsion_loss_grad, Deformation)                 \
  X(linear, Linear)                                   \
  X(linear_grad_features, Linear)                     \
  X(linear_grad_weights, Linear)                      \
  X(sum_rows, SumRows)                                \
  X(moments, Moments)                                 \
  X(normalize, Normalize)                             \
  X(normalize_grad, Normalize)                        \
  X(activate, Activate)                               \
  X(activate_grad, Activate)                          \
  X(add, Add)                                         \
  X(sum_squares, SumSquares)                          \
  X(sgd, Sgd)                                         \
  X(adamw, AdamW)                                     \
  X(dropout, Dropout)                                 \
  X(softmax, Softmax)                                 \
  X(softmax_grad, Softmax)                            \
  X(cross_entropy, CrossEntropy)                      \
  X(cross_entropy_grad, CrossEntropy)                 \
  X(concatenate, Concatenate)                         \
  X(cell_bounds, CellBounds)                          \
  X(sort_cells, SortCells)                            \
  X(spread_cells, SpreadCells)                        \
  X(unique_cells, UniqueCells)                        \
  X(cell_coords, CellCoords)                          \
  X(count_pairs, KernelPairs)                         \
  X(fill_pairs, KernelPairs)                          \
  X(sort_pairs, SortPairs)                            \
  X(to_dense, ToDense)                                \
  X(to_dense_grad, ToDense)                           \
  X(split, Concatenate)

// One struct for each list of fields; several kernels may share one.
#define KP_STRUCTS(X)       \
  X(Transpose)              \
  X(CheckList)              \
  X(LongestRow)             \
  X(PadList)                \
  X(Unpad)                  \
  X(GridSubsampleGrad)      \
  X(FarthestPoints)         \
  X(FitPlanes)              \
  X(NeighborReduce)         \
  X(SegmentReduce)          \
  X(Unpool)                 \
  X(GatherRows)             \
  X(InverseDistanceWeights) \
  X(KernelPoints)           \
  X(KPConv)                 \
  X(CellConv)               \
  X(InverseSums)            \
  X(Deform2d)               \
  X(Deformation)            \
  X(Linear)                 \
  X(SumRows)                \
  X(Moments)                \
  X(Normalize)              \
  X(Activate)               \
  X(Add)                    \
  X(SumSquares)             \
  X(Sgd)                    \
  X(AdamW)                  \
  X(Dropout)                \
  X(Softmax)                \
  X(CrossEntropy)           \
  X(CellBounds)             \
  X(SortCells)              \
  X(SpreadCells)            \
  X(UniqueCells)            \
  X(CellCoords)             \
  X(KernelPairs)            \
  X(SortPairs)              \
  X(ToDense)                \
  X(Concatenate)

#define KP_MEMBER(type, name) type name;
#define KP_STRUCT(name)                      \
  struct name {                              \
    KP_FIELDS_##name(KP_MEMBER) int threads; \
  };
KP_STRUCTS(KP_STRUCT)
#undef KP_STRUCT
#undef KP_MEMBER

// Functions with a signature of their own, which the extension module calls one by one. The output size of a radius
// search and of a grid subsampling is known only after counting: *_count counts, the caller allocates, *_fill fills.
// `plan` carries the state between the two; the caller frees it.
#define KP_FUNCTIONS(X)                                                                           \
  X(Status, build_index, (const IndexArguments&, void** index))                                   \
  X(double, crowding, (const void* index))                                                        \
  X(void, free_index, (void* index))                                                              \
  X(Status, radius_search_count, (const Search&, int64_t* row_splits, void** plan))               \
  X(Status, radius_search_fill, (void* plan, int32_t* index, void* distance))                     \
  X(void, radius_search_free, (void* plan))                                                       \
  /* The nearest within the radius: rows of max_neighbors entries, of which `counts` are used. */ \
  X(Status, knn_search, (const Search&, int32_t* index, void* distance, int64_t* counts))         \
  X(Status, feature_search, (const FeatureSearch&, int32_t* index, void* distance, int64_t*))     \
  X(Status, grid_subsample_count, (const GridSubsample&, int64_t* row_splits, void** plan))       \
  X(Status, grid_subsample_fill, (void* plan, const Subsampled&))                                 \
  X(void, grid_subsample_free, (void* plan))                                                      \
  X(double, fma_rate, (DType))

// The function table of one instruction set. The functions have these names in namespace KP_ISA of that instruction
// set's archive; `kernels` are in the order of KP_KERNELS.
struct Functions {
  const char* isa;
  Status (*const* kernels)(const void* fields);
#define KP_POINTER(result, name, arguments) result(*name) arguments;
  KP_FUNCTIONS(KP_POINTER)
#undef KP_POINTER
};

#ifdef KP_ISA
namespace KP_ISA {
#define KP_DECLARE(name, fields) Status name(const fields&);
KP_KERNELS(KP_DECLARE)
#undef KP_DECLARE
#define KP_DECLARE(result, name, arguments) result name arguments;
KP_FUNCTIONS(KP_DECLARE)
#undef KP_DECLARE
}  // namespace KP_ISA
#endif

const Functions& functions();
bool set_isa(const char* name);  // false if `name` is not one of isas()
const char* const* isas();       // the instruction sets that this machine runs, best last, null-terminated
bool has_openmp();
const char* openmp_library();
int bound_processors();
int thread_limit();
bool pause_threads();

extern const Functions functions_base, functions_avx2, functions_avx512;

}  // namespace kp
