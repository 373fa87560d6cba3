// The k nearest neighbors in the space of features on the GPU: see src/cpu/feature_neighbors.cpp. A product of matrices
// by cuBLAS, of some thousand queries and points at a time, gives keys (KeyBounds in formulas/neighbors.h); a warp for
// each query collects those up to its limit in a list, and measures the list by the formula of all searches when it is
// full. Only the k nearest remain, and the k-th of them is the new limit.
//
// Compiled for the type of coordinates:
// compile: KP_T=float
// compile: KP_T=double

#include "launch.h"
#include "rows.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

using T = KP_T;

// cuBLAS may round float32 to the 11 significant bits of TF32 before it multiplies (CUPY_TF32), which is an error of
// 2^-10 (|x|^2 + |q|^2); the rest is for sums that are truncated.
constexpr double error_of_inputs = sizeof(T) == 4 ? 0x1p-9 : 0;

constexpr int64_t samples_of_center = 64;

// What a query has collected: `size` entries, of which the first `measured` are squared distances in ascending order
// and the others keys.
struct List {
  int32_t size, measured;
  T limit, query_norm;
};

__device__ T infinity() {
  return T(__longlong_as_double(0x7ff0000000000000));
}

}  // namespace
}  // namespace kp

using namespace kp;

// Sets not_finite to 1 if a coordinate is NaN or infinite.
extern "C" __global__ void check_finite(const T* points, int64_t num_points, int dimension, unsigned* not_finite) {
  bool finite = true;
  for (int64_t i = first_thread(); i < num_points * dimension; i += num_threads())
    finite = finite && points[i] - points[i] == 0;
  if (!finite) atomicOr(not_finite, 1u);
}

// The center (D,) of a batch item, about the mean of its points, and the scale of KeyBounds from the sides of its box.
extern "C" __global__ void find_center(const T* points, int64_t num_points, int dimension, const T* sides, T* center,
                                       double* scale) {
  const int64_t samples = num_points < samples_of_center ? num_points : samples_of_center;
  for (int64_t a = first_thread(); a < dimension; a += num_threads()) {
    T sum = 0;
    for (int64_t s = 0; s < samples; ++s)
      sum += (points[num_points * s / samples * dimension + a] - points[a]) / T(samples);
    center[a] = points[a] + sum;
  }
  if (first_thread() > 0) return;
  T longest = 0;
  for (int a = 0; a < dimension; ++a) longest = sides[a] > longest ? sides[a] : longest;
  *scale = KeyBounds::scale_of(double(longest));
}

// Rows relative to the center and scaled, and their squared norms: a warp for each row.
extern "C" __global__ void pack(const T* rows, int64_t num_rows, int dimension, const T* center, const double* scale,
                                T* packed, T* norms) {
  const T factor = T(*scale);
  for (int64_t i = first_warp(); i < num_rows; i += num_warps()) {
    T norm = 0;
    for (int a = lane_number(); a < dimension; a += warp) {
      const T at = (rows[i * dimension + a] - center[a]) * factor;
      packed[i * dimension + a] = at;
      norm += at * at;
    }
    norm = sum_over_warp(norm);
    if (lane_number() == 0) norms[i] = norm;
  }
}

// Empty lists.
extern "C" __global__ void clear_lists(const T* norms, int64_t num_queries, List* lists) {
  for (int64_t q = first_thread(); q < num_queries; q += num_threads()) lists[q] = {0, 0, infinity(), norms[q]};
}

namespace kp {
namespace {

// The search of one query by a warp.
struct QueryList {
  const T* points;  // of the batch item
  const T* query;
  int dimension;
  int64_t k;
  bool drops_equal;
  KeyBounds bounds;
  List list;
  T* values;
  int32_t* ids;

  // Measures all entries and keeps the k nearest; called by all lanes.
  __device__ void measure() {
    int dropped = 0;
    for (int i = list.measured + lane_number(); i < list.size; i += warp) {
      const T* const point = points + int64_t(ids[i]) * dimension;
      T sum = 0;
      bool equal = drops_equal;
      for (int a = 0; a < dimension; ++a) {
        const T d = point[a] - query[a];
        sum = add_squares(sum, &d, 1);
        equal = equal && point[a] == query[a];
      }
      values[i] = equal ? infinity() : sum;  // behind all others
      dropped += equal;
    }
    __syncwarp();
    sort_row(ids, values, list.size, true);
    const int64_t size = list.size - sum_over_warp(dropped);
    list.size = list.measured = int32_t(size < k ? size : k);
    if (list.size < k) return;
    const T farthest = values[k - 1];
    const T limit = T(bounds.largest_key(double(farthest) * bounds.scale * bounds.scale, double(list.query_norm)));
    if (farthest == 0)
      list.limit = -infinity();  // the points that follow have larger indices, so none of them comes before these
    else if (limit < list.limit)
      list.limit = limit;
  }
};

}  // namespace
}  // namespace kp

// Collects points from `products` (num_queries, num_points) of packed queries and the points from first_point on.
// ignored: the number of the point that the first query ignores; the other queries ignore the next ones
#define KP_LISTS                                                                                     \
  const T *points, const T *queries, int64_t num_queries, int dimension, int64_t k, int drops_equal, \
      const double *scale, List *lists, T *values, int32_t *ids, int64_t room
#define KP_LIST(q)                                                                                         \
  QueryList {                                                                                              \
    points, queries + (q) * dimension, dimension, k, drops_equal != 0,                                     \
        key_bounds<T>(dimension, *scale, error_of_inputs), lists[q], values + (q) * room, ids + (q) * room \
  }
extern "C" __global__ void collect(KP_LISTS, const T* products, const T* norms, int64_t num_points, int64_t first_point,
                                   int64_t ignored) {
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    QueryList to = KP_LIST(q);
    const T factor = T(1 - to.bounds.error);
    for (int64_t first = 0; first < num_points; first += warp) {
      const int64_t i = first + lane_number();
      const T key = i < num_points ? factor * norms[i] - 2 * products[q * num_points + i] : infinity();
      const bool is_near = i < num_points && key <= to.list.limit && first_point + i != ignored + q;
      const unsigned lanes = __ballot_sync(all_lanes, is_near);
      if (!lanes) continue;
      if (is_near) {
        const int at = to.list.size + __popc(lanes & ((1u << lane_number()) - 1));
        to.values[at] = key;
        to.ids[at] = int32_t(first_point + i);
      }
      to.list.size += __popc(lanes);
      __syncwarp();
      if (to.list.size > room - warp) to.measure();
    }
    __syncwarp();  // all lanes have read the list
    if (lane_number() == 0) lists[q] = to.list;
  }
}

// Writes rows of k entries, of which `counts` are used.
extern "C" __global__ void finish(KP_LISTS, int64_t first_point, int32_t* index, T* distance, int64_t* counts) {
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    QueryList from = KP_LIST(q);
    from.measure();
    __syncwarp();
    for (int64_t i = lane_number(); i < from.list.size; i += warp) {
      index[q * k + i] = int32_t(from.ids[i] + first_point);
      distance[q * k + i] = sqrt(from.values[i]);
    }
    if (lane_number() == 0) counts[q] = from.list.size;
  }
}
