// What the extension module may call: every kernel and its fields, declared once.
//
//   KP_FIELDS_KPConv(...)   the fields of a call: from them come the struct that the kernel gets, and the table of
//   names,
//                           kinds and offsets (fields.h) by which the module fills it from Python's arguments
//   KP_KERNELS(...)         the kernels, each with its struct: from them come their declarations, and a table of
//                           functions for each instruction set
//
// Arrays come checked, contiguous and in C order.
#pragma once

#include "formulas/common.h"

namespace kp {

enum class DType : int { float32, float64, int32, int64, uint8 };

struct Array {
  void* data;
  int64_t rows, cols;  // a vector has cols = 1; weights (K, Cin, Cout) are rows = K * Cin, cols = Cout
  DType dtype;
};

// An array that may be None: `data` is null then. So it is for an output of which only the shape is told.
struct Optional : Array {};

struct OptionalInt {
  int64_t value;
  bool is_set;
};

// not_finite: a coordinate is NaN or infinite, or distances overflow or vanish: see is_measurable(). crowded: of a
// grid, in whose place a tree is made.
enum class Status : int { ok, out_of_memory, not_finite, out_of_range, crowded };

namespace {

// The elements of an array, to read and to write.
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

enum class VoxelPoint : int { barycenter, center, nearest };
enum class VoxelFeature : int { mean, max, nearest };
enum class Sort : int { none, index, distance };
enum class Sampling : int { fastest, exact, bucketed };
enum class Influence : int { linear, gaussian, constant };
enum class Aggregation : int { sum, closest };
enum class Normalization : int { none, count, positive };
enum class Reduction : int { mean, sum, max, min };

enum class Activation : int { leaky_relu, relu, sigmoid };
enum class CrossEntropyReduction : int { mean, sum, none };

// Points ready to be searched; the first member of every index.
enum class IndexKind : int { grid, tree };
struct Index {
  IndexKind kind;
  DType dtype;
  int dimension;
  int64_t num_points, items;
};
struct IndexPoints {
  IndexKind kind;
  Array points, row_splits;
  double cell;  // of a grid: the largest radius it can be searched with. Points too far apart for cells get a tree
  int threads;
};

// Which point near a query is not a neighbour: none, those of equal coordinates, the one of equal index.
enum class Ignore : int { none, equal, index };
struct Search {
  const void* index;
  Array queries, queries_row_splits;  // no queries: the points themselves; or several sets of all items
  Array radii;                        // one for each query, or none
  double radius;                      // for all queries
  int64_t most;                       // neighbours of a query, the nearest; < 0: no limit
  Sort sort;
  Metric metric;
  Ignore ignore;
  int threads;
};

struct GridSubsample {
  Array points, features, labels, row_splits;
  Array voxel_size;  // (D,), dtype of the points
  Array origin;      // the same, or (B, D); not given: where the published code puts it
  VoxelPoint position;
  VoxelFeature feature;
  OptionalInt ignore_label;
  int threads;
};

struct Subsampled {
  Array points, features, labels, inverse, counts;
  Array nearest;  // to the voxel's centre; given if the position or the feature asks for it
};

// ---- the fields of each call, F(type, name); gradients are fields of the call whose gradients they are

#define KP_FIELDS_Transpose(F)    \
  F(Array, index)                 \
  F(Array, row_splits)            \
  F(Optional, distance)           \
  F(Array, transposed_index)      \
  F(Array, transposed_row_splits) \
  F(Optional, transposed_distance)

// A list from outside, int32 or int64. The bounds are always copied, the index where there is a place for it.
#define KP_FIELDS_CheckList(F) \
  F(Array, index)              \
  F(Array, row_splits)         \
  F(int64_t, num_points)       \
  F(Optional, checked_index)   \
  F(Array, checked_row_splits)

#define KP_FIELDS_LongestRow(F) \
  F(Array, row_splits)          \
  F(Array, longest)

// A list as a matrix (M, width) of int32 or int64; `fill` where a row has no more neighbours.
#define KP_FIELDS_PadList(F) \
  F(Array, index)            \
  F(Array, row_splits)       \
  F(int64_t, fill)           \
  F(Array, padded)

// A matrix as a list: count_padded writes row_splits, unpad the index. -1 and num_points are no neighbours.
#define KP_FIELDS_Unpad(F) \
  F(Array, padded)         \
  F(int64_t, num_points)   \
  F(Array, row_splits)     \
  F(Optional, index)

// `nearest` only where that is the feature.
#define KP_FIELDS_GridSubsampleGrad(F) \
  F(Array, features)                   \
  F(Array, inverse)                    \
  F(Array, counts)                     \
  F(Optional, nearest)                 \
  F(VoxelFeature, feature)             \
  F(Array, grad_out)                   \
  F(Array, grad_features)

#define KP_FIELDS_FarthestPoints(F) \
  F(Array, points)                  \
  F(Array, row_splits)              \
  F(Array, start)                   \
  F(Array, out_row_splits)          \
  F(Sampling, method)               \
  F(Array, index)

// weights: one of each pair. forward_row_splits: of a mean's backward pass, a sum over the transposed list in which row
// j is scaled by 1 / the length of forward list j. Rows shorter than `width` also see pad_value, in a maximum or
// minimum, which also gives the chosen rows, -1 for none.
#define KP_FIELDS_NeighborReduce(F) \
  F(Array, features)                \
  F(Array, index)                   \
  F(Array, row_splits)              \
  F(Optional, weights)              \
  F(Optional, forward_row_splits)   \
  F(Reduction, reduction)           \
  F(double, empty)                  \
  F(double, pad_value)              \
  F(int64_t, width)                 \
  F(Optional, out)                  \
  F(Optional, choice)               \
  F(Optional, grad_out)             \
  F(Optional, grad_weights)

#define KP_FIELDS_SegmentReduce(F) \
  F(Optional, features)            \
  F(Array, row_splits)             \
  F(Reduction, reduction)          \
  F(double, empty)                 \
  F(Optional, out)                 \
  F(Optional, choice)              \
  F(Optional, grad_out)            \
  F(Optional, grad_features)

// Every value of the gradient to the row that was chosen for it.
#define KP_FIELDS_Unpool(F) \
  F(Array, choice)          \
  F(Array, grad_out)        \
  F(Array, grad_features)

// The rows of an index or, with row_splits, of the first entry of each range of it; zeros for an empty range.
#define KP_FIELDS_GatherRows(F) \
  F(Array, features)            \
  F(Array, index)               \
  F(Optional, row_splits)       \
  F(Array, out)

#define KP_FIELDS_InverseDistanceWeights(F) \
  F(Array, distance)                        \
  F(Array, row_splits)                      \
  F(double, power)                          \
  F(Array, weights)

// The first `fixed` points are held: 0, 1 (centre) or 3 (centre and two on the last axis). radii: (num,) of the points'
// shells; without, points are free.
#define KP_FIELDS_KernelPoints(F) \
  F(int, num)                     \
  F(int, dimension)               \
  F(int, fixed)                   \
  F(Optional, radii)              \
  F(uint64_t, seed)               \
  F(Array, out)

// offsets (M, K, D); modulations (M, K), or (M, K, factors) where depthwise; depthwise: weights (K, C). The transposed
// list is for grad_features alone.
#define KP_FIELDS_KPConv(F)          \
  F(Array, points)                   \
  F(Array, queries)                  \
  F(Array, index)                    \
  F(Array, row_splits)               \
  F(Array, features)                 \
  F(Array, weights)                  \
  F(Array, kernel_points)            \
  F(Optional, offsets)               \
  F(Optional, modulations)           \
  F(double, extent)                  \
  F(Influence, influence)            \
  F(Aggregation, aggregation)        \
  F(Normalization, normalization)    \
  F(int, groups)                     \
  F(int, factors)                    \
  F(bool, depthwise)                 \
  F(Optional, out)                   \
  F(Optional, grad_out)              \
  F(Optional, transposed_index)      \
  F(Optional, transposed_row_splits) \
  F(Optional, grad_features)         \
  F(Optional, grad_weights)          \
  F(Optional, grad_points)           \
  F(Optional, grad_queries)          \
  F(Optional, grad_kernel_points)    \
  F(Optional, grad_offsets)          \
  F(Optional, grad_modulations)

// The list and `nearest` (M, K), the neighbours that attain the minima, -1 where there are none, are of the fitting
// loss alone, repulse_extent of the repulsion loss. `weight` is that of one term of the sum. The gradient of the
// repulsion loss holds the other kernel points fixed: times two it is the derivative.
#define KP_FIELDS_Deformation(F) \
  F(Optional, points)            \
  F(Optional, queries)           \
  F(Optional, index)             \
  F(Optional, row_splits)        \
  F(Array, kernel_points)        \
  F(Array, offsets)              \
  F(double, extent)              \
  F(double, repulse_extent)      \
  F(double, weight)              \
  F(Optional, loss)              \
  F(Optional, nearest)           \
  F(Optional, grad_out)          \
  F(Optional, grad_offsets)      \
  F(Optional, grad_kernel_points)

#define KP_FIELDS_Linear(F)  \
  F(Optional, features)      \
  F(Optional, weights)       \
  F(Optional, bias)          \
  F(Optional, out)           \
  F(Optional, grad_out)      \
  F(Optional, grad_features) \
  F(Optional, grad_weights)

#define KP_FIELDS_SumRows(F) \
  F(Array, rows)             \
  F(Array, sums)

// mean, variance: (B, groups) float64, of all values of an item and group; 0 of none.
#define KP_FIELDS_Moments(F) \
  F(Array, features)         \
  F(Array, row_splits)       \
  F(Array, mean)             \
  F(Array, variance)

// Normalisation of every group of channels over the rows of every batch item, and a leaky ReLU after it (slope 1:
// none). scale, shift: (C,). mean, inverse_std: (B, groups) float64; statistics_fixed: they do not depend on the
// features.
#define KP_FIELDS_Normalize(F) \
  F(Array, features)           \
  F(Array, row_splits)         \
  F(Array, scale)              \
  F(Array, shift)              \
  F(Array, mean)               \
  F(Array, inverse_std)        \
  F(bool, statistics_fixed)    \
  F(double, negative_slope)    \
  F(Optional, out)             \
  F(Optional, grad_out)        \
  F(Optional, grad_features)   \
  F(Optional, grad_scale)      \
  F(Optional, grad_shift)

#define KP_FIELDS_Activate(F) \
  F(Array, features)          \
  F(Activation, activation)   \
  F(double, negative_slope)   \
  F(Optional, out)            \
  F(Optional, grad_out)       \
  F(Optional, grad_features)

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
  F(Optional, out)           \
  F(Optional, grad_out)      \
  F(Optional, grad_features)

#define KP_FIELDS_CrossEntropy(F)     \
  F(Array, logits)                    \
  F(Array, labels)                    \
  F(OptionalInt, ignore_index)        \
  F(Optional, class_weights)          \
  F(CrossEntropyReduction, reduction) \
  F(Optional, out)                    \
  F(Optional, grad_out)               \
  F(Optional, grad_logits)

// Arrays side by side, joined to one or cut from it; of a part that is not wanted only the shape is told.
#define KP_FIELDS_Concatenate(F) \
  F(Optional, first)             \
  F(Optional, second)            \
  F(Optional, third)             \
  F(Optional, fourth)            \
  F(Array, out)

#define KP_KERNELS(X)                                 \
  X(transpose, Transpose)                             \
  X(check_list, CheckList)                            \
  X(longest_row, LongestRow)                          \
  X(pad_list, PadList)                                \
  X(count_padded, Unpad)                              \
  X(unpad, Unpad)                                     \
  X(grid_subsample_grad, GridSubsampleGrad)           \
  X(farthest_points, FarthestPoints)                  \
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
  X(NeighborReduce)         \
  X(SegmentReduce)          \
  X(Unpool)                 \
  X(GatherRows)             \
  X(InverseDistanceWeights) \
  X(KernelPoints)           \
  X(KPConv)                 \
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
  X(Concatenate)

#define KP_MEMBER(type, name) type name;
#define KP_STRUCT(name)                      \
  struct name {                              \
    KP_FIELDS_##name(KP_MEMBER) int threads; \
  };
KP_STRUCTS(KP_STRUCT)
#undef KP_STRUCT
#undef KP_MEMBER

// Kernels of two phases, whose results have sizes that only the first one knows, with functions of their own in the
// extension module: a search and a subsampling first count, so that the caller allocates exactly, then fill. `plan`
// carries what the first phase knows; the caller frees it.
#define KP_PHASES(X)                                                                        \
  X(Status, build_index, (const IndexPoints&, void** index))                                \
  X(double, crowding, (const void* index))                                                  \
  X(void, free_index, (void* index))                                                        \
  X(Status, radius_search_count, (const Search&, int64_t* row_splits, void** plan))         \
  X(Status, radius_search_fill, (void* plan, int32_t* index, void* distance))               \
  X(void, radius_search_free, (void* plan))                                                 \
  /* The nearest within the radius: rows of `most`, of which `counts` are used. */          \
  X(Status, knn_search, (const Search&, int32_t* index, void* distance, int64_t* counts))   \
  X(Status, grid_subsample_count, (const GridSubsample&, int64_t* row_splits, void** plan)) \
  X(Status, grid_subsample_fill, (void* plan, const Subsampled&))                           \
  X(void, grid_subsample_free, (void* plan))                                                \
  X(double, fma_rate, (DType))

// What one instruction set provides. Its functions have these names in the namespace KP_ISA of its archive; `kernels`
// are in the order of KP_KERNELS.
struct Functions {
  const char* isa;
  Status (*const* kernels)(const void* fields);
#define KP_POINTER(result, name, arguments) result(*name) arguments;
  KP_PHASES(KP_POINTER)
#undef KP_POINTER
};

#ifdef KP_ISA
namespace KP_ISA {
#define KP_DECLARE(name, fields) Status name(const fields&);
KP_KERNELS(KP_DECLARE)
#undef KP_DECLARE
#define KP_DECLARE(result, name, arguments) result name arguments;
KP_PHASES(KP_DECLARE)
#undef KP_DECLARE
}  // namespace KP_ISA
#endif

const Functions& functions();
bool set_isa(const char* name);  // false: not one of isas()
const char* const* isas();       // the usable ones, best last, null-terminated
bool has_openmp();
const char* openmp_library();
bool pause_threads();

extern const Functions functions_base, functions_avx2, functions_avx512;

}  // namespace kp
