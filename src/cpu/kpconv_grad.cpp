// Gradients of KPConv in one pass over the tiles of its queries: of the weights, of factors of channels, and of where
// things are.
//
// That of W_k sums A_k^T grad over the tiles, in their order. All that depends on where things are takes, for every
// pair, f_i . (grad W_k^T), the product before the sums. So no result depends on the number of threads.

#include <sched.h>

#include "kpconv_call.h"

namespace kp {
namespace KP_ISA {
namespace {

// What to find; null for what is not asked for.
template <class G, class F>
struct Gradients {
  F* weights;       // like the weights
  F* factors;       // (M, K, factors), of channels
  G* points;        // (N, D)
  G* queries;       // (M, D)
  double* kernels;  // (K, D), of the kernel points
  G* offsets;       // (M, K, D)
  F* modulations;   // (M, K)

  bool of_sums() const { return weights || factors; }
  bool of_places() const { return points || queries || kernels || offsets || modulations; }
};

// Tiles are filled by whichever thread is free, but must be added in order: each part of a result counts the tiles it
// has got. A thread waits only for the one just ahead of it, and gives its core away if that takes long. (Barriers
// would be simpler; on a machine with other work to do, two of them per tile made the gradient forty times slower.)
class Turns {
 public:
  bool reserve(int64_t parts) {
    if (!turn_.resize(parts * line)) return false;
    memset(turn_.data(), 0, size_t(parts * line) * sizeof(int64_t));
    return true;
  }
  void wait(int64_t part, int64_t tile) {
    for (int tries = 0; __atomic_load_n(&turn_[part * line], __ATOMIC_ACQUIRE) != tile; ++tries)
      if (tries > 1000) sched_yield();
  }
  void pass(int64_t part, int64_t tile) { __atomic_store_n(&turn_[part * line], tile + 1, __ATOMIC_RELEASE); }

 private:
  static constexpr int64_t line = 8;  // a cache line each
  Buffer<int64_t> turn_;
};

// Adds A_k^T grad to channels [first, end), all of one group, of the gradient of W_k; `grad` holds the tile's rows of
// grad_out, padded to whole vectors and a panel more.
template <class F>
void add_transposed_product(const Rows<F>& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
                            const F* grad, int64_t grad_row, F* grad_weights) {
  const int64_t size = tile.size(k), channels = weights.c_in, c_out = weights.c_out;
  const int64_t height = channels / weights.groups, columns = c_out / weights.groups, group = first / height;
  const int32_t* const queries = tile.queries(k);
  Vec<F> sums[row_step * panel_vectors];
  F* const spill = reinterpret_cast<F*>(sums);
  for (int64_t v = group * columns, last = v + columns; size && v < last; v += panel_width<F>) {
    const auto right = [=](int64_t i) { return grad + queries[i] * grad_row + v; };
    const int64_t width = smaller<int64_t>(panel_width<F>, last - v);
    with_vectors(int((width + lanes<F> - 1) / lanes<F>), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
      for (int64_t c = first; c < end; c += MR) {
        F* const to = grad_weights + (k * height + c - group * height) * c_out + v;
        const F* const a = tile.a(k) + c;
        if (c + MR <= end && width == NV * lanes<F>) {
          multiply_block<F, MR, NV, false>(size, a, 1, channels, right, [=](int64_t r) { return to + r * c_out; });
          continue;
        }
        multiply_block<F, MR, NV, true>(size, a, 1, channels, right,
                                        [=](int64_t r) { return spill + r * NV * lanes<F>; });
        for (int64_t x = 0; x < smaller<int64_t>(MR, end - c); ++x)
          for (int64_t y = 0; y < width; ++y) to[x * c_out + y] += spill[x * NV * lanes<F> + y];
      }
    });
  }
}

// The same where every channel is its own group.
template <class F>
void add_scaled_rows(const Rows<F>& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
                     const F* modulations, const F* grad, int64_t grad_row, F* grad_weights) {
  const int64_t channels = weights.c_in, width = channels / weights.factors;
  F* const to = grad_weights + k * channels;
  for (int64_t i = 0; i < tile.size(k); ++i) {
    const int64_t q = tile.queries(k)[i];
    const F* const a = tile.a(k) + i * channels;
    const F* const g = grad + q * grad_row;
    if (!modulations) {
      for (int64_t c = first; c < end; ++c) to[c] += a[c] * g[c];
      continue;
    }
    const F* const factors = modulations + (q * weights.num_kernels + k) * weights.factors;
    for (int64_t c = first; c < end;) {
      const F factor = factors[c / width];
      for (const int64_t next = smaller(end, (c / width + 1) * width); c < next; ++c) to[c] += a[c] * g[c] * factor;
    }
  }
}

// Channels of a kernel point whose gradients have their turn together, never of two groups.
struct Blocks {
  int64_t height, block, of_group, of_kernel, num_kernels;

  template <class F>
  explicit Blocks(const Weights<F>& weights)
      : height(weights.depthwise ? weights.c_in : weights.c_in / weights.groups),
        block(smaller<int64_t>(height, 8 * row_step)),
        of_group((height + block - 1) / block),
        of_kernel(weights.c_in / height * of_group),
        num_kernels(weights.num_kernels) {}

  int64_t count() const { return num_kernels * of_kernel; }
  int64_t kernel(int64_t i) const { return i / of_kernel; }
  int64_t begin(int64_t i) const { return i % of_kernel / of_group * height + i % of_group * block; }
  int64_t end(int64_t i) const { return smaller(i % of_kernel / of_group * height + height, begin(i) + block); }
};

// Adds the tile's part of the gradient of the weights, when it is its turn. `padded` is for its rows of grad_out.
template <class F>
void add_weights(const Rows<F>& tile, const Weights<F>& weights, const F* modulations, const Blocks& blocks,
                 const F* grad_out, int64_t t, int64_t first, int64_t rows, Turns& turns, F* padded, F* to) {
  const int64_t c_out = weights.c_out, grad_row = round_up(c_out, lanes<F>);
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(padded + r * grad_row, grad_out + (first + r) * c_out, size_t(c_out) * sizeof(F));
    for (int64_t v = c_out; v < grad_row; ++v) padded[r * grad_row + v] = 0;
  }
  for (int64_t i = 0; i < blocks.count(); ++i) {
    turns.wait(i, t);
    if (weights.depthwise)
      add_scaled_rows(tile, blocks.kernel(i), blocks.begin(i), blocks.end(i), weights, modulations, padded, grad_row,
                      to);
    else
      add_transposed_product(tile, blocks.kernel(i), blocks.begin(i), blocks.end(i), weights, padded, grad_row, to);
    turns.pass(i, t);
  }
}

// Of (q, k, f) the sum of A_k[q] * W_k * grad[q] over the channels of f.
template <class F>
void find_factors(const Rows<F>& tile, const Weights<F>& weights, const F* grad_out, int64_t first, int64_t rows,
                  F* to) {
  const int64_t channels = weights.c_in, K = weights.num_kernels, width = channels / weights.factors;
  memset(to + first * K * weights.factors, 0, size_t(rows * K * weights.factors) * sizeof(F));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < tile.size(k); ++i) {
      const int64_t q = first + tile.queries(k)[i];
      const F *const a = tile.a(k) + i * channels, *const g = grad_out + q * channels, *const w = weights.row(k);
      for (int64_t f = 0; f < weights.factors; ++f) {
        F sum = 0;
        for (int64_t c = f * width; c < (f + 1) * width; ++c) sum += a[c] * w[c] * g[c];
        to[(q * K + k) * weights.factors + f] = sum;
      }
    }
}

// Four numbers of a place; places of more dimensions take several.
template <class G>
struct FourOf {
  typedef G type __attribute__((vector_size(4 * sizeof(G)), aligned(alignof(G)), may_alias));
};
template <class G>
using Four = typename FourOf<G>::type;

// The columns of four rows.
template <class G>
KP_INLINE void transpose(const Four<G>* rows, Four<G>* columns) {
  const Four<G> low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Four<G> high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Four<G> more_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Four<G> more_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  columns[0] = __builtin_shufflevector(low, more_low, 0, 1, 4, 5);
  columns[1] = __builtin_shufflevector(low, more_low, 2, 3, 6, 7);
  columns[2] = __builtin_shufflevector(high, more_high, 0, 1, 4, 5);
  columns[3] = __builtin_shufflevector(high, more_high, 2, 3, 6, 7);
}

// One thread's products grad W_k^T, a row for each row of the tile, and of these with the features of its pairs.
template <class F>
class Products {
 public:
  Buffer<F> along;      // of every pair f_i . (grad W_k^T)
  Buffer<int32_t> row;  // of every pair

  bool reserve(const Weights<F>& weights, int64_t rows, int64_t most_pairs) {
    rows_ = rows;
    return g_.resize(weights.num_kernels * rows_stored() * weights.c_in) && done_.resize(weights.num_kernels) &&
           gathered_.resize((rows + row_step) * weights.c_out) && along.resize(most_pairs + 2 * lanes<F>) &&
           row.resize(most_pairs + lanes<int32_t>);
  }

  // The micro-kernel also stores rows up to the next multiple of row_step.
  int64_t rows_stored() const { return rows_ + row_step; }
  void start() {
    for (int64_t k = 0; k < done_.size(); ++k) done_[k] = 0;
  }
  int64_t done(int64_t k) const { return done_[k]; }

  // Adds the tile's new rows. `panels`: of the transposed weights; `grad_out` from the tile's first query on
  KP_OUTLINE void multiply(const Rows<F>& tile, const Weights<F>& weights, const Panels<F>& panels, const F* grad_out) {
    for (int k = 0; k < weights.num_kernels; ++k) {
      gather_gradients(tile, k, weights.c_out, grad_out);
      if (weights.depthwise)
        scale_gradients(tile, weights, k);
      else
        multiply_gradients(tile, weights, panels, k);
      done_[k] = tile.size(k);
    }
  }

  // Finds `along` and `row`, of as many pairs at a time as a vector has lanes.
  KP_OUTLINE void dot(const List* lists, int64_t num_lists, const int32_t* points, int64_t num_pairs, const F* features,
                      int64_t channels) {
    const int rest = int(channels % lanes<F>);
    for (const List* list = lists; list < lists + num_lists; ++list) {
      const Vec<int32_t> number = broadcast(list->row + list->kernel * row_step);
      for (int64_t i = list->begin; i < list[1].begin; i += lanes<int32_t>) store(&row[i], number);
    }
    for (int64_t i = 0; i < num_pairs; i += lanes<F>) {
      Vec<F> sums[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l) {
        const int64_t pair = smaller(i + l, num_pairs - 1);
        const F* const f = features + int64_t(points[pair]) * channels;
        const F* const g = &g_[row[pair] * channels];
        Vec<F> sum = {}, other = {};
        int64_t c = 0;
        for (; c + 4 * lanes<F> <= channels; c += 4 * lanes<F>)
          for (int v = 0; v < 4; v += 2) {
            sum = fma(load(f + c + v * lanes<F>), load(g + c + v * lanes<F>), sum);
            other = fma(load(f + c + (v + 1) * lanes<F>), load(g + c + (v + 1) * lanes<F>), other);
          }
        sum += other;
        for (; c + lanes<F> <= channels; c += lanes<F>) sum = fma(load(f + c), load(g + c), sum);
        if (rest) sum = fma(load_first(f + c, rest), load_first(g + c, rest), sum);
        sums[l] = sum;
      }
      store(&along[i], sums_of<F>(sums));
    }
  }

 private:
  // grad_out of the queries that have a pair with kernel point k, but for those done
  void gather_gradients(const Rows<F>& tile, int k, int64_t c_out, const F* grad_out) {
    for (int64_t i = done_[k]; i < tile.size(k); ++i) {
      const F* const grad = grad_out + tile.queries(k)[i] * c_out;
      F* const row = &gathered_[(i - done_[k]) * c_out];
      int64_t c = 0;  // memcpy is a call, as long as the copy of 64 channels
      for (; c + lanes<F> <= c_out; c += lanes<F>) store(row + c, load(grad + c));
      for (; c < c_out; ++c) row[c] = grad[c];
    }
  }
  void scale_gradients(const Rows<F>& tile, const Weights<F>& weights, int k) {
    for (int64_t i = done_[k]; i < tile.size(k); ++i)
      for (int64_t c = 0; c < weights.c_out; ++c)
        g_[(k * rows_stored() + i) * weights.c_out + c] =
            gathered_[(i - done_[k]) * weights.c_out + c] * weights.row(k)[c];
  }
  void multiply_gradients(const Rows<F>& tile, const Weights<F>& weights, const Panels<F>& panels, int k) {
    const int64_t size = tile.size(k) - done_[k], c_out = weights.c_out, height = c_out / weights.groups;
    for (int64_t g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < panels.count(); ++p)
        with_vectors(panels.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = panels.row(g, p, k * height);
          F* const to = &g_[(k * rows_stored() + done_[k]) * weights.c_in + g * panels.columns + p * panel_width<F>];
          const int64_t width = smaller<int64_t>(NV * lanes<F>, panels.columns - p * panel_width<F>);
          const auto right = [=](int64_t c) { return panel + c * NV * lanes<F>; };
          Vec<F> products[MR * NV];
          for (int64_t i = 0; i < size; i += MR) {
            const F* const left = &gathered_[i * c_out + g * height];
            if (width == NV * lanes<F>) {
              multiply_block<F, MR, NV, true>(height, left, c_out, 1, right,
                                              [=](int64_t r) { return to + (i + r) * weights.c_in; });
              continue;
            }
            multiply_block<F, MR, NV, true>(height, left, c_out, 1, right,
                                            [&](int64_t r) { return reinterpret_cast<F*>(products + r * NV); });
            for (int64_t r = 0; r < smaller<int64_t>(MR, size - i); ++r)
              memcpy(to + (i + r) * weights.c_in, products + r * NV, size_t(width) * sizeof(F));
          }
        });
  }

  Buffer<F> g_, gathered_;
  Buffer<int64_t> done_;  // rows of the tile that g_ has
  int64_t rows_ = 0;
};

// One thread's gradients of where things are, from the products of its tile.
template <class G, class F>
class Places {
 public:
  // `most_edges` of a tile.
  bool reserve(const Problem<G, F>& problem, const Weights<F>& weights, int64_t rows, int64_t most_edges) {
    const int64_t K = problem.num_kernels;
    if (!products_.reserve(weights, rows, Tile<G, F>::most_pairs + K * chunk)) return false;
    const int64_t all_rows = K * products_.rows_stored();
    stride_ = round_up(problem.dimension, 4);
    return factor_.resize(all_rows) && modulation_.resize(all_rows) && sums_.resize(all_rows * stride_) &&
           kernels_.resize(K * problem.dimension) && edges_.resize(most_edges * stride_);
  }

  // Of the tile's queries from `first` on.
  void start(int64_t first, int64_t num_edges) {
    first_ = first;
    products_.start();
    memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(G));
    memset(modulation_.data(), 0, size_t(modulation_.size()) * sizeof(F));
    if (edges_.size()) memset(edges_.data(), 0, size_t(num_edges * stride_) * sizeof(G));
  }

  // Adds what follows from some of its pairs. `panels`: of the transposed weights
  KP_OUTLINE void add(const Problem<G, F>& problem, const Weights<F>& weights, const Panels<F>& panels,
                      const F* grad_out, const Rows<F>& tile, const Pairs<G, F>& pairs, const Gradients<G, F>& to) {
    const int64_t K = problem.num_kernels;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = products_.done(k); i < tile.size(k); ++i) {
        const int64_t q = first_ + tile.queries(k)[i];
        factor_[k * products_.rows_stored() + i] = G(problem.modulations ? problem.modulations[q * K + k] : F(1)) *
                                                   G(problem.query_scale ? problem.query_scale[q] : F(1));
      }
    products_.multiply(tile, weights, panels, grad_out + first_ * weights.c_out);
    products_.dot(pairs.lists.data(), pairs.num_lists, pairs.point.data(), pairs.num_pairs, problem.features,
                  problem.channels);
    const auto spread_pairs = [&](auto of_points) {
      if (problem.dimension == 3)
        spread<3, decltype(of_points)::value>(problem, pairs, to.modulations);
      else
        spread<0, decltype(of_points)::value>(problem, pairs, to.modulations);
    };
    if (to.points)
      spread_pairs(std::true_type());
    else
      spread_pairs(std::false_type());
  }

  // Gives the gradients of the tile's `count` queries.
  void give(const Problem<G, F>& problem, const Gradients<G, F>& to, int64_t count, const Rows<F>& tile) {
    const int64_t D = problem.dimension, K = problem.num_kernels;
    if (to.queries) memset(to.queries + first_ * D, 0, size_t(count * D) * sizeof(G));
    if (to.offsets) memset(to.offsets + first_ * K * D, 0, size_t(count * K * D) * sizeof(G));
    if (to.modulations) memset(to.modulations + first_ * K, 0, size_t(count * K) * sizeof(F));
    for (int64_t i = 0; i < K * D; ++i) kernels_[i] = 0;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < tile.size(k); ++i) {
        const int64_t row = k * products_.rows_stored() + i, q = first_ + tile.queries(k)[i];
        for (int a = 0; a < D; ++a) {
          const G part = factor_[row] * sums_[row * stride_ + a];
          if (to.queries) to.queries[q * D + a] -= part;
          if (to.offsets) to.offsets[(q * K + k) * D + a] = -part;
          kernels_[k * D + a] -= double(part);
        }
        if (to.modulations)
          to.modulations[q * K + k] = modulation_[row] * (problem.query_scale ? problem.query_scale[q] : F(1));
      }
  }

  // Adds the gradients of what other tiles add to.
  void give_shared(const Problem<G, F>& problem, const Gradients<G, F>& to, int64_t num_edges) const {
    const int D = problem.dimension;
    const int32_t* const index = problem.index + problem.row_splits[first_];
    for (int64_t e = 0; to.points && e < num_edges; ++e)
      for (int a = 0; a < D; ++a) to.points[int64_t(index[e]) * D + a] += edges_[e * stride_ + a];
    for (int64_t i = 0; to.kernels && i < int64_t(problem.num_kernels) * D; ++i) to.kernels[i] += kernels_[i];
  }

 private:
  // Adds up, by the tile's rows and by pairs of query and point, the gradients of where a pair's point is from its
  // kernel point. One pair after the other: a loop over the five pairs of a list ends unforeseen.
  template <int DIM, bool of_points>
  void spread(const Problem<G, F>& problem, const Pairs<G, F>& pairs, bool of_modulations) {
    constexpr int step = lanes<G> < 4 ? 4 : lanes<G>, stored = DIM ? (DIM + 3) / 4 * 4 : max_dimension;
    const int D = DIM ? DIM : problem.dimension;
    const Vec<G> inverse_extent = broadcast(1 / problem.extent), scale = broadcast(gaussian_scale(problem.extent));
    alignas(64) G pushed[stored][step] = {}, influences[step];
    for (int64_t i = 0; i < pairs.num_pairs; i += step) {
      for (int v = 0; v < step; v += lanes<G>) {
        const Vec<G> d2 = load(&pairs.d2[i + v]);
        Vec<G> along, slope = {}, influence = broadcast(G(1));
        if constexpr (std::is_same_v<G, F>)
          along = load(&products_.along[i + v]);
        else
          for (int l = 0; l < lanes<G>; ++l) along[l] = G(products_.along[i + v + l]);
        if (problem.influence == Influence::linear) {
          slope = linear_slope(d2, inverse_extent);
          influence = linear_influence(d2, inverse_extent);
        } else if (problem.influence == Influence::gaussian) {
          influence = exp_of<G>(d2 * scale);
          slope = 2 * scale * influence;
        }
        for (int a = 0; a < D; ++a) store(&pushed[a][v], along * slope * load(&pairs.from[a][i + v]));
        store(&influences[v], influence);
      }
      const int count = int(smaller<int64_t>(step, pairs.num_pairs - i));
      for (int j = 0; of_modulations && j < count; ++j)
        modulation_[products_.row[i + j]] += F(influences[j]) * products_.along[i + j];
      for (int a = 0; a < D; a += 4)
        for (int j = 0; j < count; j += 4) {
          Four<G> axes[4], places[4];
          for (int b = 0; b < 4; ++b) axes[b] = *reinterpret_cast<const Four<G>*>(&pushed[a + b][j]);
          transpose<G>(axes, places);
          for (int64_t l = 0; l < 4 && j + l < count; ++l) {
            const int64_t pair = i + j + l, row = products_.row[pair];
            *reinterpret_cast<Four<G>*>(&sums_[row * stride_ + a]) += places[l];
            if (of_points)
              *reinterpret_cast<Four<G>*>(&edges_[pairs.edge[pair] * stride_ + a]) += places[l] * factor_[row];
          }
        }
    }
  }

  Products<F> products_;
  Buffer<G> factor_;        // of a row: its modulation and its query's normalization
  Buffer<G> sums_, edges_;  // rows of stride_
  Buffer<F> modulation_;
  Buffer<double> kernels_;
  int64_t first_ = 0, stride_ = 0;
};

template <class G, class F>
struct Pass {
  Tile<G, F> tile;
  Places<G, F> places;
  Buffer<F> grad;  // the tile's rows of grad_out, padded
};

template <class G, class F>
Status find_gradients(const Problem<G, F>& problem, const Weights<F>& weights, const F* grad_out,
                      const Gradients<G, F>& to, int threads) {
  const int64_t K = problem.num_kernels, D = problem.dimension, num_queries = problem.num_queries;
  const int64_t tile_rows = rows_of_tile<F>(K * problem.channels, weights.c_out);
  const Blocks blocks(weights);
  Turns turns;
  Panels<F> panels;
  if (!turns.reserve(blocks.count() + 1)) return Status::out_of_memory;
  if (to.weights)
    memset(to.weights, 0, size_t(K * (weights.depthwise ? 1 : blocks.height) * weights.c_out) * sizeof(F));
  for (int64_t i = 0; to.kernels && i < K * D; ++i) to.kernels[i] = 0;
  if (to.of_places() && !weights.depthwise &&
      !panels.pack(weights.data, K, weights.c_in, weights.c_out, weights.groups, true, threads))
    return Status::out_of_memory;
  const int64_t* const splits = problem.row_splits;
  int64_t most_edges = 0;
  const Tiles tiles(num_queries, tile_rows);
  for (int64_t t = 0; to.points && t < tiles.count; ++t)
    most_edges = larger(most_edges, splits[tiles.begin(t + 1)] - splits[tiles.begin(t)]);
  using Own = Pass<G, F>;
  const auto reserve = [&](Own& own) {
    return own.tile.reserve(problem, tile_rows, to.of_sums(), to.of_places()) &&
           (!to.of_places() || own.places.reserve(problem, weights, tile_rows, most_edges)) &&
           (!to.weights || own.grad.resize(tile_rows * round_up(weights.c_out, lanes<F>) + panel_width<F>));
  };
  threads = threads_of_pass(problem, weights, threads);
  const auto work = [&](Own& own, int64_t t, int64_t first, int64_t rows) {
    const int64_t num_edges = splits[first + rows] - splits[first];
    if (to.of_places()) own.places.start(first, num_edges);
    own.tile.fill(problem, first, rows, to.of_places() ? own.tile.most_pairs : batch, [&](const Pairs<G, F>& pairs) {
      if (to.of_places()) own.places.add(problem, weights, panels, grad_out, own.tile.rows(), pairs, to);
    });
    if (to.of_places()) own.places.give(problem, to, rows, own.tile.rows());
    if (to.points || to.kernels) {
      turns.wait(blocks.count(), t);
      own.places.give_shared(problem, to, num_edges);
      turns.pass(blocks.count(), t);
    }
    if (to.factors) find_factors(own.tile.rows(), weights, grad_out, first, rows, to.factors);
    if (to.weights)
      add_weights(own.tile.rows(), weights, modulations_at(problem, weights, first), blocks, grad_out, t, first, rows,
                  turns, own.grad.data(), to.weights);
  };
  return over_tiles<Own>(num_queries, tile_rows, threads, reserve, work);
}

}  // namespace

Status kpconv_grads(const KPConv& args) {
  return with_problem(args, [&](const auto& problem, const auto& weights) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    const int64_t size = int64_t(problem.num_kernels) * problem.dimension;
    Buffer<double> kernels;
    if (!kernels.resize(size)) return Status::out_of_memory;
    F* const modulations = into<F>(args.grad_modulations);
    G *const points = into<G>(args.grad_points), *const kernel_points = into<G>(args.grad_kernel_points);
    if (points) memset(points, 0, size_t(args.points.rows * problem.dimension) * sizeof(G));
    const Gradients<G, F> found = {into<F>(args.grad_weights),
                                   weights.factors > 1 ? modulations : nullptr,
                                   points,
                                   into<G>(args.grad_queries),
                                   kernel_points ? kernels.data() : nullptr,
                                   into<G>(args.grad_offsets),
                                   weights.factors > 1 ? nullptr : modulations};
    const Status status = find_gradients<G, F>(problem, weights, as<F>(args.grad_out), found, args.threads);
    for (int64_t i = 0; found.kernels && i < size; ++i) kernel_points[i] = G(kernels[i]);
    return status;
  });
}

}  // namespace KP_ISA
}  // namespace kp
