// What a call of KPConv gives its kernels, and how its queries are cut into tiles.
#pragma once

#include <math.h>

#include "gemm.h"
#include "tile.h"

namespace kp {
namespace {

constexpr int64_t most_rows = 120;        // queries in a tile
constexpr int64_t cache_bytes = 1 << 19;  // what a tile of more than 60 queries may take: half a second-level cache
constexpr int64_t tile_bytes = 7 << 19;   // what any tile may take: 3.5 MiB

// Queries in a tile: what fits.
template <class F>
int64_t rows_of_tile(int64_t a_row, int64_t o_row) {
  const int64_t row = int64_t(sizeof(F)) * (a_row + o_row);
  const int64_t fit = larger(smaller<int64_t>(60, tile_bytes / row), smaller<int64_t>(most_rows, cache_bytes / row));
  return larger<int64_t>(row_step, fit / row_step * row_step);
}

// Queries dealt evenly to as few tiles as hold them, by whole steps of the micro-kernel: of 309 in tiles of 60, the
// last of which had 9, two threads were busy for 6 / 7 of the time.
struct Tiles {
  int64_t num_queries, steps, count;
  Tiles(int64_t queries, int64_t tile_rows)
      : num_queries(queries),
        steps((queries + row_step - 1) / row_step),
        count((queries + tile_rows - 1) / tile_rows) {}
  int64_t begin(int64_t t) const { return count ? smaller(num_queries, steps * t / count * row_step) : 0; }
};

// The weights: (K, Cin / groups, Cout), or (K, C) where every channel is its own group.
template <class F>
struct Weights {
  const F* data;
  int num_kernels, groups;
  int64_t c_in, c_out;
  bool depthwise;
  const F* modulations;  // (M, K, factors), where a kernel point has more than one factor
  int factors;

  const F* row(int64_t k) const { return data + k * c_out; }
};

// Modulations from the tile's first query on, where they act on its sums.
template <class G, class F>
const F* modulations_at(const Problem<G, F>& problem, const Weights<F>& weights, int64_t first) {
  if (!weights.modulations || problem.backward) return nullptr;
  return weights.modulations + first * weights.num_kernels * weights.factors;
}

// Threads worth starting for a pass over all pairs: to place one costs as much as some 256 products.
template <class G, class F>
int threads_of_pass(const Problem<G, F>& problem, const Weights<F>& weights, int threads) {
  const int64_t products = weights.depthwise ? weights.c_out : weights.c_in * weights.c_out / weights.groups;
  return useful_threads(threads, problem.row_splits[problem.num_queries] * (256 + products), 1 << 19);
}

// Calls work(state, tile, its first query, their number) for all tiles, in their order on as many threads as could
// reserve a state.
template <class State, class Reserve, class Work>
Status over_tiles(int64_t num_queries, int64_t tile_rows, int threads, Reserve reserve, Work work) {
  const Tiles tiles(num_queries, tile_rows);
  threads = int(smaller<int64_t>(threads, larger<int64_t>(1, tiles.count)));
  int64_t next = 0;
  bool some = false;
#pragma omp parallel num_threads(threads) reduction(|| : some)
  {
    State state;
    some = reserve(state);
    while (some) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= tiles.count) break;
      work(state, t, tiles.begin(t), tiles.begin(t + 1) - tiles.begin(t));
    }
  }
  return some ? Status::ok : Status::out_of_memory;
}

// Whether a feature row sums to more than zero, in float64 and eight interleaved sums: alike on every machine.
template <class F>
bool sums_positive(const F* row, int64_t channels) {
  double sums[8] = {};
  for (int64_t c = 0; c < channels; ++c) sums[c % 8] += double(row[c]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) > 0;
}

// 1 / max(1, neighbors that count) of every query; none: an empty buffer.
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

// Kernel points as (D, K), mirrored for the way back.
template <class G>
bool by_axis(const Array& kernel_points, G sign, Buffer<G>& to) {
  const int64_t K = kernel_points.rows, D = kernel_points.cols;
  if (!to.resize(K * D)) return false;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t a = 0; a < D; ++a) to[a * K + k] = sign * as<G>(kernel_points)[k * D + a];
  return true;
}

// Calls f(geometry type, feature type).
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
Problem<G, F> forward_problem(const KPConv& args, const Buffer<G>& kernel_points, const Buffer<F>& scale) {
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

// Calls f(the problem of the way there, weights).
template <class Call>
Status with_problem(const KPConv& args, Call call) {
  return with_types(args, [&](auto g, auto f) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return call(forward_problem(args, kernel_points, scale), weights_of<F>(args));
  });
}

}  // namespace
}  // namespace kp
