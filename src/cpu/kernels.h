// What the extension module may call: one table of functions per instruction set, all with the same arguments.
// Arrays come checked, contiguous and in C order; a null `data` is an argument that was not given.
#pragma once

#include "formulas/common.h"

namespace kp {

enum class DType : int { float32, float64, int32, int64, uint8 };

struct Array {
  void* data;
  int64_t rows, cols;  // a vector has cols = 1; weights (K, Cin, Cout) are rows = K * Cin, cols = Cout
  DType dtype;
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
  int64_t ignore_label;
  bool has_ignore_label;
  int threads;
};

struct Subsampled {
  Array points, features, labels, inverse, counts;
  Array nearest;  // to the voxel's centre; given if the position or the feature asks for it
};

struct GridSubsampleGrad {
  Array features, inverse, counts, nearest, grad_out;  // nearest only where it is the feature
  VoxelFeature feature;
  int threads;
};

struct FarthestPoints {
  Array points, row_splits, start, out_row_splits;
  Sampling method;
  int threads;
};

struct Transpose {
  Array index, row_splits, distance, out_index, out_row_splits, out_distance;
  int threads;
};

// A list from outside. The bounds are always copied, the index where out_index is given.
struct CheckList {
  Array index, row_splits;  // int32 or int64
  int64_t num_points;
  Array out_index, out_row_splits;  // int32, int64
  int threads;
};

struct NeighborReduce {
  Array features, index, row_splits, weights;  // weights: one of each pair, or none
  Array shared;  // row_splits of lists, one of each row of features, which counts one over its length; or none
  Reduction reduction;
  double empty, pad_value;
  int64_t width;  // rows shorter than this also see pad_value, in a maximum or minimum
  int threads;
};

struct SegmentReduce {
  Array features, row_splits;  // for the gradient, features are that of the items
  Reduction reduction;
  double empty;
  int threads;
};

struct KernelPoints {
  int num, dimension, fixed;  // the first `fixed` points are held: 0, 1 (centre) or 3 (centre and two on the last axis)
  Array radii;                // (num,) float64, of the points' shells; not given: points are free
  uint64_t seed;
  int threads;
};

struct KPConv {
  Array points, queries, index, row_splits, features, weights, kernel_points;
  Array offsets, modulations;                     // (M, K, D) and (M, K, factors), or none
  Array transposed_index, transposed_row_splits;  // of the neighbours; for grad_features only
  double extent;
  Influence influence;
  Aggregation aggregation;
  Normalization normalization;
  int groups, factors;  // more than one factor of a (query, kernel point) only where depthwise
  bool depthwise;       // weights (K, C)
  int threads;
};
struct KPConvGrads {  // like these; none where not wanted
  Array weights, points, queries, kernel_points, offsets, modulations;
};

struct Deformation {
  Array points, queries, index, row_splits;  // of the fitting loss alone
  Array kernel_points, offsets;              // (K, D), (M, K, D)
  double extent, repulse_extent;             // the latter of the repulsion loss alone
  double weight;                             // of one term of the sum
  int threads;
};

struct DeformationGrads {
  Array offsets, kernel_points;  // those that are wanted
};

// Normalisation of every group of channels over the rows of every batch item, and a leaky ReLU after it.
struct Normalize {
  Array features, row_splits;
  Array scale, shift;       // (C,)
  Array mean, inverse_std;  // (B, groups) float64
  bool is_given;            // they do not depend on the features
  double negative_slope;    // 1: no leaky ReLU
  int threads;
};
struct NormalizeGrad {
  Array grad_features, grad_scale, grad_shift;  // those asked for
};

enum class Activation : int { leaky_relu, relu, sigmoid };
struct Activate {
  Array features;
  Activation activation;
  double negative_slope;
  int threads;
};

struct Sgd {
  Array value, grad, moment;
  double lr, momentum, weight_decay;
  int threads;
};
struct AdamW {
  Array value, grad, mean, square;
  double keep, first, second, rate, inverse_root, eps;
  int threads;
};

struct Dropout {
  Array features;
  double rate;
  uint64_t seed;
  int threads;
};

enum class CrossEntropyReduction : int { mean, sum, none };
struct CrossEntropy {
  Array logits, labels, class_weights;
  int64_t ignore_index;
  bool has_ignore_index;
  CrossEntropyReduction reduction;
  int threads;
};

struct Columns {
  Array parts[4];  // side by side; one without data is passed over, one without columns is none
  int threads;
};

// What one instruction set provides. Its functions have these names in the namespace KP_ISA of its archive.
#define KP_KERNELS(X)                                                                                          \
  X(Status, build_index, (const IndexPoints&, void** index))                                                   \
  X(double, crowding, (const void* index))                                                                     \
  X(void, free_index, (void* index))                                                                           \
  /* Counts first, so that the caller allocates exactly; then fills. `plan` carries the queries in between. */ \
  X(Status, radius_search_count, (const Search&, int64_t* row_splits, void** plan))                            \
  X(Status, radius_search_fill, (void* plan, int32_t* index, void* distance))                                  \
  X(void, radius_search_free, (void* plan))                                                                    \
  /* The nearest within the radius: rows of `most`, of which `counts` are used. */                             \
  X(Status, knn_search, (const Search&, int32_t* index, void* distance, int64_t* counts))                      \
  X(Status, transpose, (const Transpose&))                                                                     \
  X(Status, check_list, (const CheckList&))                                                                    \
  X(int64_t, longest_row, (const Array& row_splits, int threads))                                              \
  X(Status, pad_list, (const Array& index, const Array& row_splits, int64_t fill, const Array& out, int))      \
  /* Padded matrices of int32 or int64: counts first, then fills. */                                           \
  X(Status, count_padded, (const Array& padded, int64_t num_points, const Array& row_splits, int threads))     \
  X(Status, unpad, (const Array& padded, int64_t num_points, const Array& row_splits, const Array& out, int))  \
  X(Status, grid_subsample_count, (const GridSubsample&, int64_t* row_splits, void** plan))                    \
  X(Status, grid_subsample_fill, (void* plan, const Subsampled&))                                              \
  X(void, grid_subsample_free, (void* plan))                                                                   \
  X(Status, grid_subsample_grad, (const GridSubsampleGrad&, const Array& grad_features))                       \
  X(Status, farthest_points, (const FarthestPoints&, int32_t* index))                                          \
  /* A maximum or minimum also gives the chosen rows, -1 for none; of others choice is null. */                \
  X(Status, neighbor_reduce, (const NeighborReduce&, const Array& out, int32_t* choice))                       \
  X(Status, neighbor_reduce_grad_weights, (const NeighborReduce&, const Array& grad_out, const Array& grad))   \
  X(Status, segment_reduce, (const SegmentReduce&, const Array& out, int32_t* choice))                         \
  X(Status, segment_reduce_grad, (const SegmentReduce&, const Array& grad_features))                           \
  X(Status, unpool, (const Array& choice, const Array& grad_out, const Array& grad_features, int threads))     \
  /* The rows of an index, or the first of each range of it. */                                                \
  X(Status, gather_rows,                                                                                       \
    (const Array& features, const Array& index, const Array& row_splits, const Array& out, int threads))       \
  X(Status, inverse_distance_weights,                                                                          \
    (const Array& distance, const Array& row_splits, double power, const Array& weights, int threads))         \
  X(Status, kpconv, (const KPConv&, const Array& out))                                                         \
  X(Status, kpconv_grad_features, (const KPConv&, const Array& grad_out, const Array& grad_features))          \
  X(Status, kpconv_grads, (const KPConv&, const Array& grad_out, const KPConvGrads&))                          \
  X(Status, kernel_points, (const KernelPoints&, double* out))                                                 \
  X(Status, lloyd, (const KernelPoints&, double* out))                                                         \
  /* nearest (M, K): the neighbours that attain the minima, -1 where there are none */                         \
  X(Status, fitting_loss, (const Deformation&, const Array& loss, const Array& nearest))                       \
  X(Status, fitting_loss_grad, (const Deformation&, const Array& nearest, const DeformationGrads&))            \
  /* The gradient holds the other kernel points fixed: times two it is the derivative. */                      \
  X(Status, repulsion_loss, (const Deformation&, const Array& loss))                                           \
  X(Status, repulsion_loss_grad, (const Deformation&, const DeformationGrads&))                                \
  X(Status, linear, (const Array& rows, const Array& weights, const Array& bias, const Array& to, int))        \
  X(Status, linear_grad_features, (const Array& weights, const Array& grad, const Array& to, int threads))     \
  X(Status, linear_grad_weights, (const Array& rows, const Array& grad, const Array& to, int threads))         \
  X(Status, sum_rows, (const Array& rows, const Array& sums, int threads))                                     \
  X(Status, moments, (const Normalize&, const Array& mean, const Array& variance))                             \
  X(Status, normalize, (const Normalize&, const Array& out))                                                   \
  X(Status, normalize_grad, (const Normalize&, const Array& grad_out, const NormalizeGrad&))                   \
  X(Status, activate, (const Activate&, const Array& out))                                                     \
  X(Status, activate_grad, (const Activate&, const Array& grad_out, const Array& grad_features))               \
  X(Status, add, (const Array& first, const Array& second, const Array& to, int threads))                      \
  X(Status, sum_squares, (const Array& values, double* sum, int threads))                                      \
  X(Status, sgd, (const Sgd&))                                                                                 \
  X(Status, adamw, (const AdamW&))                                                                             \
  X(Status, dropout, (const Dropout&, const Array& out))                                                       \
  X(Status, softmax, (const Array& rows, const Array& to, int threads))                                        \
  X(Status, softmax_grad, (const Array& rows, const Array& grad, const Array& to, int threads))                \
  X(Status, cross_entropy, (const CrossEntropy&, const Array& out))                                            \
  X(Status, cross_entropy_grad, (const CrossEntropy&, const Array& grad_out, const Array& grad_logits))        \
  X(Status, concatenate, (const Columns&, const Array& whole))                                                 \
  X(Status, split, (const Columns&, const Array& whole))                                                       \
  X(double, fma_rate, (DType))

struct Kernels {
  const char* isa;
#define KP_MEMBER(result, name, arguments) result(*name) arguments;
  KP_KERNELS(KP_MEMBER)
#undef KP_MEMBER
};

#ifdef KP_ISA
namespace KP_ISA {
#define KP_DECLARE(result, name, arguments) result name arguments;
KP_KERNELS(KP_DECLARE)
#undef KP_DECLARE
}  // namespace KP_ISA
#endif

const Kernels& kernels();
bool set_isa(const char* name);  // false: not one of isas()
const char* const* isas();       // the usable ones, best last, null-terminated
bool has_openmp();
const char* openmp_library();
void pause_threads();

extern const Kernels kernels_base, kernels_avx2, kernels_avx512;

}  // namespace kp
