// The tile of a convolution with a filter of cells: for up to max_tile_rows queries at a time, the features of their
// neighbors summed by cell,
//
//   A_k[q] = sum over neighbors i of q of (weight of cell k for i) f_i
//
// KPConv (tile.h) lists its pairs by kernel point before it sums them, because a neighbor acts on some 1.6 of 15 kernel
// points. Here a neighbor acts on eight cells at fixed steps from the lowest, so its features are read once and added
// to the query's eight rows, which are in the first-level cache. Both have the same rows: a query has one in A_k only
// if a neighbor acts on cell k, so that the others cost nothing in the product with the filters (tile_products.h).
#pragma once

#include "cells.h"
#include "tile_products.h"

namespace kp {
namespace KP_ISA {
namespace {

// One pass of the operator: the pairs of each query and their factors.
template <class G, class F>
struct CellPass : CellGeometry<G> {
  const int64_t* row_splits;
  int64_t num_queries;
  Array kernel_index;  // data is null for a continuous convolution
  const F* features;
  int64_t channels;
  const F *neighbor_importances, *point_scale, *query_scale;  // or null
  Filter<G> filter;

  int64_t num_cells() const { return int64_t(filter.size[0]) * filter.size[1] * filter.size[2]; }
  int corners() const { return kernel_index.data ? 1 : filter.corners(); }
  F pair_scale(int64_t q, int64_t e) const {
    F scale = query_scale ? query_scale[q] : F(1);
    if (neighbor_importances) scale *= neighbor_importances[e];
    return point_scale ? scale * point_scale[this->index[e]] : scale;
  }
};

// The neighbors of a query, up to cell_chunk of them: their lowest cells and their weights by corner.
template <class G, class F>
struct CellChunk {
  int32_t cells[cell_chunk + lanes<int32_t>];
  alignas(64) G found[max_corners * cell_chunk + lanes<G>];
  alignas(64) F converted[max_corners * cell_chunk];
  F* weights;

  // Returns false if an entry of kernel_index is not a cell.
  bool find(const CellPass<G, F>& pass, int64_t q, int64_t begin, int64_t n) {
    const int count = pass.corners();
    if constexpr (std::is_same_v<G, F>)
      weights = found;
    else
      weights = converted;
    if (!pass.kernel_index.data) {
      find_cells(pass, q, begin, n, cells, found);
      if constexpr (!std::is_same_v<G, F>)
        for (int j = 0; j < count; ++j)
          for (int64_t i = j * cell_chunk; i < j * cell_chunk + n; ++i) converted[i] = F(found[i]);
      return true;
    }
    bool are_cells = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = pass.kernel_index.dtype == DType::int32 ? read_once(as<int32_t>(pass.kernel_index) + begin + i)
                                                                : read_once(as<int64_t>(pass.kernel_index) + begin + i);
      const bool is_cell = uint64_t(k) < uint64_t(pass.num_cells());
      cells[i] = is_cell ? int32_t(k) : 0;
      weights[i] = F(1);
      are_cells &= is_cell;
    }
    return are_cells;
  }

  // Multiplies the weights by the factors of the pairs.
  void scale(const CellPass<G, F>& pass, int64_t q, int64_t begin, int64_t n) {
    if (!pass.neighbor_importances && !pass.point_scale && !pass.query_scale) return;
    F factors[cell_chunk];
    for (int64_t i = 0; i < n; ++i) factors[i] = pass.pair_scale(q, begin + i);
    for (int j = 0; j < pass.corners(); ++j)
      for (int64_t i = 0; i < n; ++i) weights[j * cell_chunk + i] *= factors[i];
  }
};

// The rows of one thread's tile: which queries have a row in A_k, and the rows themselves.
template <class F>
class CellTile {
 public:
  // with_sums: sum features. Otherwise rows are only assigned, in an array of the caller with a row for each query and
  // cell; cell_stride is the distance of the rows of two cells in it.
  template <class G>
  bool reserve(const CellPass<G, F>& pass, int64_t rows, bool with_sums, int64_t cell_stride = 0) {
    const int64_t num_cells = pass.num_cells(), channels = pass.channels;
    rows_ = rows, channels_ = channels, corners_ = pass.corners(), num_cells_ = num_cells;
    // An odd number of cache lines, so that the rows of a query are spread over all sets of the first-level cache. With
    // 60 rows of 32 channels they would be in a quarter of them and take twice as long to add to.
    constexpr int64_t line = 64 / int64_t(sizeof(F));
    cell_stride_ = with_sums ? (round_up(rows * channels, line) / line | 1) * line : cell_stride;
    around_ = 0;
    for (int j = 0; j < corners_; ++j) {
      steps_[j] = pass.filter.step(j);
      if (num_cells <= 64) around_ |= uint64_t(1) << steps_[j];
    }
    words_ = (num_cells + 63) / 64;
    if (!queries_.resize(num_cells * rows) || !sizes_.resize(num_cells) || !row_of_.resize(num_cells)) return false;
    if (!present_.resize(words_) || !marked_.resize(words_)) return false;
    if (!with_sums) return true;
    // The micro-kernel also reads rows up to the next multiple of row_step, but drops their products.
    if (!a_.resize(num_cells * cell_stride_ + row_step * channels)) return false;
    memset(a_.data(), 0, size_t(a_.size()) * sizeof(F));
    return true;
  }

  void start() { memset(sizes_.data(), 0, size_t(num_cells_) * sizeof(int32_t)); }
  void start_query(int32_t number) {
    number_ = number;
    memset(present_.data(), 0, size_t(words_) * sizeof(uint64_t));
  }

  // Gives the query a row in the cells around n neighbors; new rows of the sums are zero.
  template <bool with_sums>
  KP_OUTLINE void add_rows(const int32_t* cells, int64_t n) {
    uint64_t *const marked = marked_.data(), *const present = present_.data();
    if (words_ == 1) {
      uint64_t mask = 0;
      for (int64_t i = 0; i < n; ++i) mask |= around_ << cells[i];
      marked[0] = mask;
    } else {
      memset(marked, 0, size_t(words_) * sizeof(uint64_t));
      for (int64_t i = 0; i < n; ++i)
        for (int j = 0; j < corners_; ++j) {
          const int64_t cell = cells[i] + steps_[j];
          marked[cell / 64] |= uint64_t(1) << cell % 64;
        }
    }
    for (int64_t w = 0; w < words_; ++w) {
      for (uint64_t rest = marked[w] & ~present[w]; rest; rest &= rest - 1) {
        const int64_t k = w * 64 + __builtin_ctzll(rest), row = sizes_[k]++;
        queries_[k * rows_ + row] = number_;
        row_of_[k] = k * cell_stride_ + row * channels_;
        if constexpr (with_sums) {
          F* const to = &a_[row_of_[k]];
          int64_t c = 0;
          for (; c + lanes<F> <= channels_; c += lanes<F>) store(to + c, Vec<F>{});
          for (; c < channels_; ++c) to[c] = 0;
        }
      }
      present[w] |= marked[w];
    }
  }

  // Adds the features of n neighbors, times their weights, to the rows of the query.
  KP_OUTLINE void add_features(const int32_t* cells, const F* weights, const int32_t* points, int64_t n,
                               const F* features) {
    int64_t c = 0;
    for (; c + 4 * lanes<F> <= channels_; c += 4 * lanes<F>) add_channels<4>(cells, weights, points, n, features, c);
    if (c + 2 * lanes<F> <= channels_) {
      add_channels<2>(cells, weights, points, n, features, c);
      c += 2 * lanes<F>;
    }
    if (c + lanes<F> <= channels_) {
      add_channels<1>(cells, weights, points, n, features, c);
      c += lanes<F>;
    }
    const int rest = int(channels_ - c);
    for (int64_t i = 0; rest && i < n; ++i) {
      const Vec<F> f = load_first(features + int64_t(points[i]) * channels_ + c, rest);
      for (int j = 0; j < corners_; ++j) {
        F* const to = &a_[row_of_[cells[i] + steps_[j]] + c];
        store_first(to, rest, fma(broadcast(weights[j * cell_chunk + i]), f, load_first(to, rest)));
      }
    }
  }

  // Where the query's row of the cell of corner j begins, for neighbors in a lowest cell.
  int64_t row_of(int32_t lowest, int j) const { return row_of_[lowest + steps_[j]]; }

  TileSums<F> rows() const { return {a_.data(), queries_.data(), sizes_.data(), rows_, cell_stride_}; }

 private:
  template <int NV>
  KP_INLINE void add_channels(const int32_t* cells, const F* weights, const int32_t* points, int64_t n,
                              const F* features, int64_t c) {
    if (corners_ == 8)
      add_corners<NV, 8>(cells, weights, points, n, features, c);
    else
      add_corners<NV, 0>(cells, weights, points, n, features, c);
  }

  template <int NV, int NC>
  KP_INLINE void add_corners(const int32_t* cells, const F* weights, const int32_t* points, int64_t n,
                             const F* features, int64_t c) {
    F* const a = a_.data() + c;
    const int64_t channels = channels_, row = steps_[2], layer = steps_[4];  // of eight corners
    for (int64_t i = 0; i < n; ++i) {
      const F* const from = features + int64_t(points[i]) * channels + c;
      Vec<F> f[NV];
      for (int v = 0; v < NV; ++v) f[v] = load(from + v * lanes<F>);
      const int64_t* const rows = row_of_.data() + cells[i];
      const int count = NC ? NC : corners_;
      for (int j = 0; j < count; ++j) {
        // With steps_[j] in the place of the sum, GCC reads it again for each neighbor.
        F* const to = a + rows[NC ? (j & 1) + (j & 2 ? row : 0) + (j & 4 ? layer : 0) : steps_[j]];
        const Vec<F> w = broadcast(weights[j * cell_chunk + i]);
        for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, fma(w, f[v], load(to + v * lanes<F>)));
      }
    }
  }

  Buffer<F> a_;
  Buffer<int32_t> queries_, sizes_;
  Buffer<int64_t> row_of_;    // where the row of the current query begins, for each cell
  Buffer<uint64_t> present_;  // bits of the cells in which the current query has a row
  Buffer<uint64_t> marked_;   // bits of the cells around a chunk of neighbors
  int64_t rows_ = 0, channels_ = 0, cell_stride_ = 0, num_cells_ = 0, words_ = 0;
  uint64_t around_ = 0;  // bits of the corners of cell 0, with up to 64 cells
  int corners_ = 0;
  int64_t steps_[max_corners] = {};
  int32_t number_ = 0;
};

// Loads features of the next query's neighbors into the second-level cache while the current query is processed. In a
// cloud in random order their rows are elsewhere in memory, and half of the time of the sums was spent waiting for
// them.
template <class G, class F>
KP_INLINE void prefetch_features(const CellPass<G, F>& pass, int64_t begin, int64_t end) {
  const int64_t bytes = pass.channels * int64_t(sizeof(F));
  end = smaller(end, begin + cell_chunk);
  for (int64_t e = begin; e < end; ++e) {
    const char* const row = reinterpret_cast<const char*>(pass.features) + pass.index[e] * bytes;
    for (int64_t b = 0; b < smaller<int64_t>(bytes, 512); b += 64) __builtin_prefetch(row + b, 0, 2);
    __builtin_prefetch(row + bytes - 1, 0, 2);  // rows need not begin where a cache line does
  }
}

// Fills a tile with `count` queries from `first` on. Returns false if an entry of kernel_index is not a cell.
template <class G, class F>
bool fill(const CellPass<G, F>& pass, int64_t first, int64_t count, bool with_sums, CellChunk<G, F>& neighbors,
          CellTile<F>& tile) {
  bool are_cells = true;
  tile.start();
  for (int64_t r = 0; r < count; ++r) {
    const int64_t q = first + r, end = pass.row_splits[q + 1];
    tile.start_query(int32_t(r));
    if (with_sums) prefetch_features(pass, end, r + 1 < count ? pass.row_splits[q + 2] : end);
    for (int64_t e = pass.row_splits[q]; e < end; e += cell_chunk) {
      const int64_t n = smaller(cell_chunk, end - e);
      are_cells &= neighbors.find(pass, q, e, n);
      if (!with_sums) {
        tile.template add_rows<false>(neighbors.cells, n);
        continue;
      }
      neighbors.scale(pass, q, e, n);
      tile.template add_rows<true>(neighbors.cells, n);
      tile.add_features(neighbors.cells, neighbors.weights, pass.index + e, n, pass.features);
    }
  }
  return are_cells;
}

template <class F>
Weights<F> filters_of(const CellConv& args) {
  const int64_t cells = int64_t(args.depth) * args.height * args.width;
  Weights<F> filters{};
  filters.data = as<F>(args.filters);
  filters.num_kernels = int(cells);
  filters.groups = filters.factors = 1;
  filters.c_in = args.filters.rows / larger<int64_t>(1, cells);
  filters.c_out = args.filters.cols;
  return filters;
}

template <class G, class F>
CellPass<G, F> pass_of(const CellConv& args) {
  const FilterOptions options{args.mapping, args.interpolation, args.width,
                              args.height,  args.depth,         args.align_corners};
  const G* const offset = as<G>(args.offset);
  return {{as<G>(args.points), as<G>(args.queries), as<G>(args.extents), args.extents.rows, int(args.extents.cols),
           args.reversed, as<int32_t>(args.index), options, offset},
          as<int64_t>(args.row_splits),
          args.row_splits.rows - 1,
          args.kernel_index,
          as<F>(args.features),
          args.features.cols,
          as<F>(args.neighbor_importances),
          as<F>(args.point_scale),
          as<F>(args.query_scale),
          Filter<G>(options, offset)};
}

// Calls call(G(), F()) with the types of geometry and features; without geometry G is F.
template <class Call>
Status with_types(const CellConv& args, Call call) {
  return with_real(args.features.dtype, [&](auto f) {
    if (!args.points.data) return call(f, f);
    return with_real(args.points.dtype, [&](auto g) { return call(g, f); });
  });
}

// Threads worth starting for a pass: finding the cells of a pair costs as much as some 64 multiply-adds.
template <class G, class F>
int threads_of_pass(const CellPass<G, F>& pass, const Weights<F>& filters, int threads) {
  const int64_t products = filters.c_in * filters.c_out;
  return useful_threads(threads, pass.row_splits[pass.num_queries] * (64 + products), 1 << 19);
}

}  // namespace
}  // namespace KP_ISA
}  // namespace kp
