// Products of the sums of a tile with weights, shared by the convolutions: see tile.h and cells.h for the sums. Also
// the division of queries into tiles that threads work on.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace {

// The result of a tile: for every kernel point k, size(k) rows a(k) and their queries, counted from the tile's first
// query. It does not depend on the type of geometry, so the code that uses it is compiled once per type of features.
template <class F>
struct TileSums {
  const F* sums;
  const int32_t* all_queries;
  const int32_t* sizes;
  int64_t max_rows, kernel_stride;  // of the queries and of the sums of one kernel point

  int64_t size(int64_t k) const { return sizes[k]; }
  const F* a(int64_t k) const { return sums + k * kernel_stride; }
  const int32_t* queries(int64_t k) const { return all_queries + k * max_rows; }
};

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

// Calls work(state, tile) for all tiles. Threads take tiles in ascending order; a thread that cannot reserve its state
// takes none, and the call fails only if no thread can.
template <class State, class Reserve, class Work>
Status for_each_of(int64_t tiles, int threads, Reserve reserve, Work work) {
  threads = int(smaller<int64_t>(threads, larger<int64_t>(1, tiles)));
  int64_t next = 0;
  bool reserved = false;
#pragma omp parallel num_threads(threads) reduction(|| : reserved)
  {
    State state;
    reserved = reserve(state);
    while (reserved) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= tiles) break;
      work(state, t);
    }
  }
  return reserved ? Status::ok : Status::out_of_memory;
}

// Divides queries into tiles and calls work(state, tile, first query, number of queries) for all of them.
template <class State, class Reserve, class Work>
Status for_each_tile(int64_t num_queries, int64_t tile_rows, int threads, Reserve reserve, Work work) {
  const Tiles tiles(num_queries, tile_rows);
  return for_each_of<State>(tiles.count, threads, reserve, [&](State& state, int64_t t) {
    work(state, t, tiles.begin(t), tiles.begin(t + 1) - tiles.begin(t));
  });
}

// o (tile rows + 1, padded columns) = sum over k of A_k W_(first + k), at the rows' queries. The last row of o receives
// the micro-kernel's excess rows.
template <class F>
void multiply(const TileSums<F>& tile, int64_t tile_rows, const Panels<F>& weights, int num_kernels, F* o,
              int64_t first = 0) {
  const int64_t o_row = weights.groups * weights.padded_columns(), height = weights.height;
  const int64_t channels = weights.groups * height;
  memset(o, 0, size_t(tile_rows * o_row) * sizeof(F));
  for (int k = 0; k < num_kernels; ++k) {
    const int64_t size = tile.size(k);
    const int32_t* const queries = tile.queries(k);
    for (int g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < weights.count(); ++p)
        with_vectors(weights.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = weights.row(g, p, (first + k) * height);
          const F* const a = tile.a(k) + g * height;
          F* const to = o + g * weights.padded_columns() + p * panel_width<F>;
          for (int64_t i = 0; i < size; i += MR)
            multiply_block<F, MR, NV, false>(
                height, a + i * channels, channels, 1, [=](int64_t c) { return panel + c * NV * lanes<F>; },
                [=](int64_t r) { return to + (i + r < size ? queries[i + r] : tile_rows) * o_row; });
        });
  }
}

}  // namespace
}  // namespace kp
