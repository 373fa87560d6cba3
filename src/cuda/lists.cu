// Neighbor lists on the GPU: keys for transposing them by sorting, packing of rows with unused entries, sums over the
// pairs of each point, and the number of blocks of rows of each batch item.
//
// Compiled without definitions and, for pack_rows and sum_pairs, for the type of values:
// compile:
// compile: KP_T=float
// compile: KP_T=double

#include "launch.h"

using namespace kp;

// The point and the query of every pair. Entries of the index past the end of the list get the point num_points.
extern "C" __global__ void rows_of_pairs(const int32_t* index, int64_t num_pairs, const int64_t* row_splits,
                                         int num_queries, int num_points, int32_t* points, int32_t* queries) {
  for (int64_t e = first_thread(); e < num_pairs; e += num_threads()) {
    points[e] = e < row_splits[num_queries] ? index[e] : num_points;
    queries[e] = int32_t(item_of(row_splits, num_queries, e));
  }
}

// begins[k] = how many of the sorted keys are below k, which is where the entries with key k begin
extern "C" __global__ void begins_of_keys(const int32_t* keys, int64_t num_keys, int64_t num_begins, int64_t* begins) {
  for (int64_t k = first_thread(); k < num_begins; k += num_threads())
    begins[k] = lower_bound(keys, int64_t(0), num_keys, k);
}

// counts[b] = blocks of rows of item b
extern "C" __global__ void count_blocks(const int64_t* row_splits, int64_t num_items, int64_t* counts) {
  for (int64_t b = first_thread(); b < num_items; b += num_threads())
    counts[b] = (row_splits[b + 1] - row_splits[b] + block_of_rows - 1) / block_of_rows;
}

#ifdef KP_T
// Copies the used entries of rows of `width` one after the other; row_splits say how many are used.
extern "C" __global__ void pack_rows(const int32_t* index, const KP_T* distance, int64_t width,
                                     const int64_t* row_splits, int64_t num_rows, int32_t* packed_index,
                                     KP_T* packed_distance) {
  for (int64_t i = first_thread(); i < num_rows * width; i += num_threads()) {
    const int64_t row = i / width, at = row_splits[row] + i % width;
    if (at >= row_splits[row + 1]) continue;
    packed_index[at] = index[i];
    if (packed_distance) packed_distance[at] = distance[i];
  }
}

// sums[i] = the sum of the values (pairs, columns) of the pairs of point i, in their order
extern "C" __global__ void sum_pairs(const KP_T* values, const int64_t* order, const int64_t* begins,
                                     int64_t num_points, int columns, KP_T* sums) {
  for (int64_t i = first_thread(); i < num_points * columns; i += num_threads()) {
    KP_T sum = KP_T(0);
    for (int64_t at = begins[i / columns]; at < begins[i / columns + 1]; ++at)
      sum += values[order[at] * columns + i % columns];
    sums[i] = sum;
  }
}
#endif
