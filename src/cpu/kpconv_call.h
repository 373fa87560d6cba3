// Shared by the kernels of KPConv: converts the arguments of a call to typed structs, and divides queries into tiles
// that threads work on.
#pragma once

#include <math.h>

#include "gemm.h"
#include "tile.h"

namespace kp {
namespace {

constexpr int64_t max_tile_rows = 120;    // queries in a tile
constexpr int64_t cache_bytes = 1 << 19;  // limit of a tile of more than 60 queries: half a second-level cache
constexpr int64_t tile_bytes = 7 << 19;   // limit of any tile: 3.5 MiB

// The most queries per tile within these limits, for rows of A and of the output with so many columns.
template <class F>
int64_t rows_of_tile(int64_t a_row, int64_t o_row) {
  const int64_t row = int64_t(sizeof(F)) * (a_row + o_row);
  const int64_t fit =
      larger(smaller<int64_t>(60, tile_bytes / row), smaller<int64_t>(max_tile_rows, cache_bytes / row));
  return larger<int64_t>(row_step, fit / row_step * row_step);
}

// Divides queries evenly into the fewest tiles that hold them, in multiples of row_step. Filling tiles one after
// another instead cut 309 queries into five tiles of 60 and one of 9, and two threads were busy for 6 / 7 of the time.
struct Tiles {
  int64_t num_queries, steps, count;
  Tiles(int64_t queries, int64_t tile_rows)
      : num_queries(queries),
        steps((queries + row_step - 1) / row_step),
        count((queries + tile_rows - 1) / tile_rows) {}
  int64_t begin(int64_t t) const { return count ? smaller(num_queries, steps * t / count * row_step) : 0; }
};

// The weights: (K, Cin / groups, Cout), or (K, C) if depthwise.
template <class F>
struct Weights {
  const F* data;
  int num_kernels, groups;
  int64_t c_in, c_out;
  bool depthwise;
  const F* modulations;  // (M, K, factors) if factors > 1, else null: a single factor is part of the pairs' weights
  int factors;

  const F* row(int64_t k) const { return data + k * c_out; }
};

// The modulations from query `first` on if they scale the tile's sums, else null.
template <class G, class F>
const F* modulations_at(const KPConvPass<G, F>& pass, const Weights<F>& weights, int64_t first) {
  if (!weights.modulations || pass.backward) return nullptr;
  return weights.modulations + first * weights.num_kernels * weights.factors;
}

// Threads worth starting for a pass: finding a pair costs as much as some 256 multiply-adds.
template <class G, class F>
int threads_of_pass(const KPConvPass<G, F>& pass, const Weights<F>& weights, int threads) {
  const int64_t products = weights.depthwise ? weights.c_out : weights.c_in * weights.c_out / weights.groups;
  return useful_threads(threads, pass.row_splits[pass.num_queries] * (256 + products), 1 << 19);
}

// Calls work(state, tile, first query, number of queries) for all tiles. Threads take tiles in ascending order; a
// thread that cannot reserve its state takes none, and the call fails only if no thread can.
template <class State, class Reserve, class Work>
Status for_each_tile(int64_t num_queries, int64_t tile_rows, int threads, Reserve reserve, Work work) {
  const Tiles tiles(num_queries, tile_rows);
  threads = int(smaller<int64_t>(threads, larger<int64_t>(1, tiles.count)));
  int64_t next = 0;
  bool reserved = false;
#pragma omp parallel num_threads(threads) reduction(|| : reserved)
  {
    State state;
    reserved = reserve(state);
    while (reserved) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= tiles.count) break;
      work(state, t, tiles.begin(t), tiles.begin(t + 1) - tiles.begin(t));
    }
  }
  return reserved ? Status::ok : Status::out_of_memory;
}

// Whether a feature row sums to more than zero. Summed in float64 in eight interleaved sums: the same on every machine.
template <class F>
bool sums_positive(const F* row, int64_t channels) {
  double sums[8] = {};
  for (int64_t c = 0; c < channels; ++c) sums[c % 8] += double(row[c]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) > 0;
}

// scale[q] = 1 / max(1, number of neighbors of q), for Normalization::positive only those whose features sum to more
// than zero. Without a normalization `scale` stays empty.
template <class F>
Status normalize(const KPConv& args, Buffer<F>& scale) {
  if (args.normalization == Normalization::none) return Status::ok;
  const int64_t m = args.queries.rows, n = args.points.rows, channels = args.features.cols;
  const auto* splits = as<int64_t>(args.row_splits);
  const auto* index = as<int32_t>(args.index);
  Buffer<uint8_t> positive;
  if (!scale.resize(m) || !positive.resize(n)) return Status::out_of_memory;
  const bool all = args.normalization == Normalization::count;
#pragma omp parallel num_threads(useful_threads(args.threads, n, 1 << 12))
  {
    if (!all) {
#pragma omp for
      for (int64_t i = 0; i < n; ++i) positive[i] = sums_positive(as<F>(args.features) + i * channels, channels);
    }
#pragma omp for
    for (int64_t q = 0; q < m; ++q) {
      int64_t count = splits[q + 1] - splits[q];
      if (!all) {
        count = 0;
        for (int64_t e = splits[q]; e < splits[q + 1]; ++e) count += positive[index[e]];
      }
      scale[q] = F(1) / F(larger<int64_t>(1, count));
    }
  }
  return Status::ok;
}

// Kernel points as (D, K), times `sign`: -1 in the transposed pass.
template <class G>
bool by_axis(const Array& kernel_points, G sign, Buffer<G>& to) {
  const int64_t K = kernel_points.rows, D = kernel_points.cols;
  if (!to.resize(K * D)) return false;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t a = 0; a < D; ++a) to[a * K + k] = sign * as<G>(kernel_points)[k * D + a];
  return true;
}

// Calls call(G(), F()) with the types of geometry and features.
template <class Call>
Status with_types(const KPConv& args, Call call) {
  return with_real(args.points.dtype,
                   [&](auto g) { return with_real(args.features.dtype, [&](auto f) { return call(g, f); }); });
}

template <class F>
Weights<F> weights_of(const KPConv& args) {
  return {as<F>(args.weights),
          int(args.kernel_points.rows),
          args.depthwise ? 1 : args.groups,
          args.features.cols,
          args.weights.cols,
          args.depthwise,
          args.factors > 1 ? as<F>(args.modulations) : nullptr,
          args.factors};
}

template <class G, class F>
KPConvPass<G, F> forward_pass(const KPConv& args, const Buffer<G>& kernel_points, const Buffer<F>& scale) {
  return {{as<G>(args.points), as<G>(args.queries), int(args.points.cols), as<int32_t>(args.index),
           as<int64_t>(args.row_splits), args.queries.rows, kernel_points.data(), int(args.kernel_points.rows),
           G(args.extent), args.influence, args.aggregation, as<G>(args.offsets), nullptr},
          as<F>(args.features),
          args.features.cols,
          scale.data(),
          nullptr,
          as<F>(args.modulations),
          args.factors,
          false};
}

// Calls call(forward pass, weights).
template <class Call>
Status with_forward_pass(const KPConv& args, Call call) {
  return with_types(args, [&](auto g, auto f) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return call(forward_pass(args, kernel_points, scale), weights_of<F>(args));
  });
}

}  // namespace
}  // namespace kp
