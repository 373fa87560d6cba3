// Pooling on the GPU: reductions over neighbors, with a warp for each query and a lane for each channel; reductions
// over batch items, in blocks of 1024 rows that are then joined; their gradients, gathering and inverse-distance
// weights. Sums are taken in the order of the rows, without atomics.
//
// Compiled for the types of the features and of distances:
// compile: KP_F=float KP_G=float
// compile: KP_F=double KP_G=float
// compile: KP_F=kp::Half KP_G=float
// compile: KP_F=kp::Bfloat KP_G=float

#include "launch.h"
#include "formulas/pooling.h"
#include "storage.h"

namespace kp {
namespace {

using S = KP_F;
using F = Real<S>;
using G = KP_G;

// Finds the largest (or smallest) value of n rows in column c, and the row that has it. row(i): the i-th row.
template <bool minimum, class Row>
__device__ void choose(const S* features, int64_t channels, int64_t c, Row row, int64_t n, F& best, int32_t& chosen) {
  for (int64_t i = 0; i < n; ++i) {
    const F x = F(features[row(i) * channels + c]);
    if (i && !displaces<minimum>(x, best)) continue;
    best = x;
    chosen = int32_t(row(i));
  }
}

}  // namespace
}  // namespace kp

using namespace kp;

// weights: (E,), or null. forward_row_splits: set only in the backward pass of a mean: grad_out of query i is divided
// by i's number of neighbors, read from forward_row_splits.
extern "C" __global__ void sum_neighbors(const S* features, int64_t channels, const int32_t* index,
                                         const int64_t* row_splits, int64_t num_queries, const S* weights,
                                         const int64_t* forward_row_splits, Reduction reduction, F empty, S* out) {
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    const int64_t begin = row_splits[q], end = row_splits[q + 1];
    const F divisor = reduction == Reduction::mean ? F(end - begin) : F(1);
    for (int64_t c = lane_number(); c < channels; c += warp) {
      F sum = F(0);
      for (int64_t e = begin; e < end; ++e) {
        const int64_t i = index[e];
        F weight = weights ? F(weights[e]) : F(1);
        if (forward_row_splits) weight /= F(forward_row_splits[i + 1] - forward_row_splits[i]);
        sum += weight * F(features[i * channels + c]);
      }
      out[q * channels + c] = S(begin == end ? empty : sum / divisor);
    }
  }
}

// Maxima and minima. Neighbor lists shorter than `width` are padded with pad_value, after their neighbors.
extern "C" __global__ void choose_neighbors(const S* features, int64_t channels, const int32_t* index,
                                            const int64_t* row_splits, int64_t num_queries, Reduction reduction,
                                            F empty, F pad_value, int64_t width, S* out, int32_t* choice) {
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    const int64_t begin = row_splits[q], n = row_splits[q + 1] - begin;
    const auto row = [=](int64_t i) { return int64_t(index[begin + i]); };
    for (int64_t c = lane_number(); c < channels; c += warp) {
      F best = n || !width ? empty : pad_value;
      int32_t chosen = -1;
      if (reduction == Reduction::max)
        choose<false>(features, channels, c, row, n, best, chosen);
      else
        choose<true>(features, channels, c, row, n, best, chosen);
      if (n && n < width &&
          (reduction == Reduction::max ? displaces<false>(pad_value, best) : displaces<true>(pad_value, best))) {
        best = pad_value;
        chosen = -1;
      }
      out[q * channels + c] = S(best);
      if (choice) choice[q * channels + c] = chosen;
    }
  }
}

// Gradient of the weights: for every pair, the dot product of the point's features and the query's gradient. A warp for
// each query.
extern "C" __global__ void neighbor_products(const S* features, int64_t channels, const int32_t* index,
                                             const int64_t* row_splits, int64_t num_queries, Reduction reduction,
                                             const S* grad_out, S* grad_weights) {
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    const int64_t begin = row_splits[q], end = row_splits[q + 1];
    const F divisor = reduction == Reduction::mean ? F(end - begin) : F(1);
    for (int64_t e = begin; e < end; ++e) {
      F product = F(0);
      for (int64_t c = lane_number(); c < channels; c += warp)
        product += F(features[int64_t(index[e]) * channels + c]) * F(grad_out[q * channels + c]);
      for (int bit = warp / 2; bit; bit /= 2) product += __shfl_xor_sync(all_lanes, product, bit);
      if (lane_number() == 0) grad_weights[e] = S(product / divisor);
    }
  }
}

// keys[i] = row * channels + channel of the value that entry i of choice (M, C) names; num_rows * channels for -1
extern "C" __global__ void chosen_values(const int32_t* choice, int64_t num_values, int64_t channels, int64_t num_rows,
                                         int64_t* keys) {
  for (int64_t i = first_thread(); i < num_values; i += num_threads())
    keys[i] = choice[i] < 0 ? num_rows * channels : choice[i] * channels + i % channels;
}

// grad_features[v] = the sum of the gradients of the entries that name value v, in their order
extern "C" __global__ void sum_chosen(const int64_t* keys, const int64_t* order, int64_t num_keys, const S* grad_out,
                                      int64_t num_values, S* grad_features) {
  for (int64_t v = first_thread(); v < num_values; v += num_threads()) {
    F sum = F(0);
    for (int64_t at = lower_bound(keys, int64_t(0), num_keys, v); at < num_keys && keys[at] == v; ++at)
      sum += F(grad_out[order[at]]);
    grad_features[v] = S(sum);
  }
}

// out[q] = the features of the first neighbor of q, or zeros for an empty list
extern "C" __global__ void gather_first(const S* features, int64_t channels, const int32_t* index,
                                        const int64_t* row_splits, int64_t num_queries, S* out) {
  for (int64_t i = first_thread(); i < num_queries * channels; i += num_threads()) {
    const int64_t q = i / channels, begin = row_splits[q];
    out[i] = begin < row_splits[q + 1] ? features[index[begin] * channels + i % channels] : S(F(0));
  }
}

extern "C" __global__ void weigh_distances(const G* distance, const int64_t* row_splits, int64_t num_queries,
                                           double power, S* weights) {
  for (int64_t q = first_thread(); q < num_queries; q += num_threads()) {
    const int64_t begin = row_splits[q], end = row_splits[q + 1];
    double total = 0;
    for (int64_t e = begin; e < end; ++e) {
      const double weight = inverse_distance(double(distance[e]), double(distance[begin]), power);
      weights[e] = S(F(weight));
      total += weight;
    }
    for (int64_t e = begin; e < end; ++e) weights[e] = S(F(double(F(weights[e])) / total));
  }
}

// The sum of each block and channel, or its maximum (minimum) and the row that has it. first_blocks: the number of each
// item's first block.
extern "C" __global__ void reduce_blocks(const S* features, int64_t channels, const int64_t* row_splits, int num_items,
                                         const int64_t* first_blocks, int64_t max_blocks, Reduction reduction,
                                         double* sums, F* bests, int32_t* choices) {
  for (int64_t i = first_thread(); i < max_blocks * channels; i += num_threads()) {
    const int64_t k = i / channels, c = i % channels;
    if (k >= first_blocks[num_items]) continue;
    const int b = item_of(first_blocks, num_items, k);
    const int64_t first = row_splits[b] + (k - first_blocks[b]) * block_of_rows;
    const int64_t end = first + block_of_rows < row_splits[b + 1] ? first + block_of_rows : row_splits[b + 1];
    if (reduction == Reduction::mean || reduction == Reduction::sum) {
      double sum = 0;
      for (int64_t row = first; row < end; ++row) sum += double(F(features[row * channels + c]));
      sums[i] = sum;
      continue;
    }
    const auto row = [=](int64_t j) { return first + j; };
    if (reduction == Reduction::max)
      choose<false>(features, channels, c, row, end - first, bests[i], choices[i]);
    else
      choose<true>(features, channels, c, row, end - first, bests[i], choices[i]);
  }
}

// Joins the blocks of each item in their order.
extern "C" __global__ void join_blocks(const int64_t* row_splits, int64_t num_items, int64_t channels,
                                       const int64_t* first_blocks, Reduction reduction, F empty, const double* sums,
                                       const F* bests, const int32_t* choices, S* out, int32_t* choice) {
  for (int64_t i = first_thread(); i < num_items * channels; i += num_threads()) {
    const int64_t b = i / channels, c = i % channels, begin = first_blocks[b], end = first_blocks[b + 1];
    if (reduction == Reduction::mean || reduction == Reduction::sum) {
      double sum = 0;
      for (int64_t k = begin; k < end; ++k) sum += sums[k * channels + c];
      out[i] =
          S(begin == end ? empty
                         : F(sum / (reduction == Reduction::mean ? double(row_splits[b + 1] - row_splits[b]) : 1)));
      continue;
    }
    F best = empty;
    int32_t chosen = -1;
    for (int64_t k = begin; k < end; ++k) {
      const F x = bests[k * channels + c];
      if (k > begin && !(reduction == Reduction::max ? displaces<false>(x, best) : displaces<true>(x, best))) continue;
      best = x;
      chosen = choices[k * channels + c];
    }
    out[i] = S(best);
    if (choice) choice[i] = chosen;
  }
}

// Every row receives the gradient of its item, divided by the item's number of rows for a mean.
extern "C" __global__ void spread_items(const S* grad_out, int64_t channels, const int64_t* row_splits, int num_items,
                                        int64_t num_rows, Reduction reduction, S* grad_features) {
  for (int64_t i = first_thread(); i < num_rows * channels; i += num_threads()) {
    const int b = item_of(row_splits, num_items, i / channels);
    const F divisor = reduction == Reduction::mean ? F(row_splits[b + 1] - row_splits[b]) : F(1);
    grad_features[i] = S(F(grad_out[b * channels + i % channels]) / divisor);
  }
}
