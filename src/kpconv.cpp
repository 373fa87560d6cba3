// KPConv, forward and backward, by tiles.
//
//   out[q] = sum over k of m[q, k] (sum over neighbours i of q of influence(|x_i - x_q - p_k - o_qk|) f_i) W_k
//   (Thomas et al. 2019; m and o where the kernel is modulated and deformed)
//
// A tile (src/tile.h) is some hundred queries: for every kernel point the rows of A_k, features summed with their
// influences, and the queries they are of. Then the tile's output is the sum over k of A_k W_k, added to the rows'
// queries by a micro-kernel over packed weights. Nothing larger than a tile ever exists.
//
// Backward: the gradient of the features is the same operator on the transposed neighbours with mirrored kernel points
// and transposed weights. The gradient of W_k sums A_k^T grad over the tiles, in their order. All that depends on where
// things are takes, for every pair, f_i . (grad W_k^T): the same tiles again, with the product before the sums. So no
// result depends on the number of threads.

#include <math.h>
#include <sched.h>

#include "gemm.h"
#include "tile.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t most_rows = 120;        // queries in a tile
constexpr int64_t cache_bytes = 1 << 19;  // what a tile of more than 60 queries may take: half a second-level cache
constexpr int64_t tile_bytes = 7 << 19;   // what any tile may take: 3.5 MiB
template <class T>
const T* as(const Array& array) {
  return static_cast<const T*>(array.data);
}

// Queries in a tile: what fits.
template <class F>
int64_t rows_of_tile(int64_t a_row, int64_t o_row) {
  const int64_t row = int64_t(sizeof(F)) * (a_row + o_row);
  const int64_t fit = larger(smaller<int64_t>(60, tile_bytes / row), smaller<int64_t>(most_rows, cache_bytes / row));
  return larger<int64_t>(row_step, fit / row_step * row_step);
}

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

// o (tile rows + 1, padded columns) = the tile's A times the packed weights; the last row is for sums that are dropped.
template <class F, class T>
void multiply(const T& tile, int64_t tile_rows, const Panels<F>& weights, int num_kernels, F* o) {
  const int64_t o_row = weights.groups * weights.padded_columns(), height = weights.rows / num_kernels;
  const int64_t channels = weights.groups * height;
  memset(o, 0, size_t(tile_rows * o_row) * sizeof(F));
  for (int k = 0; k < num_kernels; ++k) {
    const int64_t size = tile.size(k);
    const int32_t* const queries = tile.queries(k);
    for (int g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < weights.count(); ++p)
        with_vectors(weights.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = weights.row(g, p, k * height);
          const F* const a = tile.a(k) + g * height;
          F* const to = o + g * weights.padded_columns() + p * panel_width<F>;
          for (int64_t i = 0; i < size; i += MR)
            multiply_block<F, MR, NV, false>(
                height, a + i * channels, channels, 1, [=](int64_t c) { return panel + c * NV * lanes<F>; },
                [=](int64_t r) { return to + (i + r < size ? queries[i + r] : tile_rows) * o_row; });
        });
  }
}

// The same where every channel is its own group: o[q] += A_k[q] * W_k, and * the factors of (q, k).
template <class F, class T>
void scale_rows(const T& tile, int64_t rows, const Weights<F>& weights, const F* modulations, F* o) {
  const int64_t channels = weights.c_in, width = channels / weights.factors;
  memset(o, 0, size_t(rows * channels) * sizeof(F));
  for (int64_t k = 0; k < weights.num_kernels; ++k) {
    const F* const w = weights.row(k);
    for (int64_t i = 0; i < tile.size(k); ++i) {
      const int64_t q = tile.queries(k)[i];
      const F* const a = tile.a(k) + i * channels;
      F* const to = o + q * channels;
      if (!modulations) {
        for (int64_t c = 0; c < channels; ++c) to[c] += a[c] * w[c];
        continue;
      }
      const F* const factors = modulations + (q * weights.num_kernels + k) * weights.factors;
      for (int64_t f = 0; f < weights.factors; ++f)
        for (int64_t c = f * width; c < (f + 1) * width; ++c) to[c] += a[c] * w[c] * factors[f];
    }
  }
}

// Modulations from the tile's first query on, where they act on its sums.
template <class G, class F>
const F* modulations_at(const Problem<G, F>& problem, const Weights<F>& weights, int64_t first) {
  if (!weights.modulations || problem.backward) return nullptr;
  return weights.modulations + first * weights.num_kernels * weights.factors;
}

template <class G, class F, int DIM>
Status convolve(const Problem<G, F>& problem, const Weights<F>& weights, F* out, int threads) {
  const bool dense = !weights.depthwise;
  Panels<F> panels;
  if (dense && !panels.pack(weights.data, weights.num_kernels, weights.c_in, weights.c_out, weights.groups,
                            problem.backward, threads))
    return Status::out_of_memory;
  const int64_t columns = problem.backward ? weights.c_in : weights.c_out, group_columns = columns / weights.groups;
  const int64_t o_row = dense ? weights.groups * panels.padded_columns() : columns;
  const int64_t tile_rows = rows_of_tile<F>(problem.num_kernels * problem.channels, o_row);
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
  threads = useful_threads(threads, tiles, 1);
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    Tile<G, F, DIM> tile;
    Buffer<F> o;
    enough = tile.reserve(problem, tile_rows, row_step) && o.resize((tile_rows + 1) * o_row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      if (!enough) continue;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.fill(problem, first, rows);
      if (dense) {
        multiply(tile, tile_rows, panels, problem.num_kernels, o.data());
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t g = 0; g < weights.groups; ++g)
            memcpy(out + (first + r) * columns + g * group_columns, &o[r * o_row + g * panels.padded_columns()],
                   size_t(group_columns) * sizeof(F));
      } else {
        scale_rows(tile, rows, weights, modulations_at(problem, weights, first), o.data());
        memcpy(out + first * columns, o.data(), size_t(rows * columns) * sizeof(F));
      }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

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
template <class F, class T>
void add_transposed_product(const T& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
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
template <class F, class T>
void add_scaled_rows(const T& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
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

// grad_weights, like the weights
template <class G, class F, int DIM>
Status weight_gradient(const Problem<G, F>& problem, const Weights<F>& weights, const F* grad_out, F* grad_weights,
                       int threads) {
  const int64_t channels = problem.channels, c_out = weights.c_out, K = problem.num_kernels;
  const int64_t grad_row = round_up(c_out, lanes<F>), tile_rows = rows_of_tile<F>(K * channels, grad_row);
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
  // Channels that have their turn together, never of two groups.
  const int64_t height = weights.depthwise ? channels : channels / weights.groups;
  const int64_t block = smaller<int64_t>(height, 8 * row_step), blocks = (height + block - 1) / block;
  const int64_t parts = K * (channels / height) * blocks;
  const int64_t size = K * (weights.depthwise ? 1 : height) * c_out;
  Turns turns;
  if (!turns.reserve(parts)) return Status::out_of_memory;
  memset(grad_weights, 0, size_t(size) * sizeof(F));
  int64_t next = 0;
  bool some = false;  // thread had the memory to take part
#pragma omp parallel num_threads(useful_threads(threads, tiles, 1)) reduction(|| : some)
  {
    Tile<G, F, DIM> tile;
    Buffer<F> grad;
    some = tile.reserve(problem, tile_rows, row_step) && grad.resize(tile_rows * grad_row + panel_width<F>);
    while (some) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= tiles) break;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.fill(problem, first, rows);
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(&grad[r * grad_row], grad_out + (first + r) * c_out, size_t(c_out) * sizeof(F));
        for (int64_t v = c_out; v < grad_row; ++v) grad[r * grad_row + v] = 0;
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t k = part / (parts / K), of_kernel = part % (parts / K);
        const int64_t group = of_kernel / blocks * height, c = group + of_kernel % blocks * block;
        const int64_t end = smaller(group + height, c + block);
        turns.wait(part, t);
        if (weights.depthwise)
          add_scaled_rows(tile, k, c, end, weights, modulations_at(problem, weights, first), grad.data(), grad_row,
                          grad_weights);
        else
          add_transposed_product(tile, k, c, end, weights, grad.data(), grad_row, grad_weights);
        turns.pass(part, t);
      }
    }
  }
  return some ? Status::ok : Status::out_of_memory;
}

// The gradient of factors of channels: of (q, k, f) the sum of A_k[q] * W_k * grad[q] over the channels of f.
template <class G, class F, int DIM>
Status factor_gradient(const Problem<G, F>& problem, const Weights<F>& weights, const F* grad_out, F* grad_factors,
                       int threads) {
  const int64_t channels = problem.channels, K = problem.num_kernels, width = channels / weights.factors;
  const int64_t tile_rows = rows_of_tile<F>(K * channels, channels), per_query = K * weights.factors;
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
  bool enough = true;
#pragma omp parallel num_threads(useful_threads(threads, tiles, 1)) reduction(&& : enough)
  {
    Tile<G, F, DIM> tile;
    enough = tile.reserve(problem, tile_rows, row_step);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      if (!enough) continue;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.fill(problem, first, rows);
      memset(grad_factors + first * per_query, 0, size_t(rows * per_query) * sizeof(F));
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < tile.size(k); ++i) {
          const int64_t q = first + tile.queries(k)[i];
          const F *const a = tile.a(k) + i * channels, *const g = grad_out + q * channels, *const w = weights.row(k);
          for (int64_t f = 0; f < weights.factors; ++f) {
            F sum = 0;
            for (int64_t c = f * width; c < (f + 1) * width; ++c) sum += a[c] * w[c] * g[c];
            grad_factors[(q * K + k) * weights.factors + f] = sum;
          }
        }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

// ---- gradients of where things are -------------------------------------------------------------------------------

// What to find; null for what is not asked for.
template <class G, class F>
struct Places {
  G* queries;       // (M, D)
  G* edges;         // (E, D): of the point of every pair
  double* kernels;  // (tiles, K, D)
  G* offsets;       // (M, K, D)
  F* modulations;   // (M, K)
};

// One thread's products grad W_k^T, a row for each query and kernel point with a pair, and what follows from them. The
// problem is that of the way there, without factors of its pairs.
template <class G, class F, int DIM>
class PlaceTile {
 public:
  bool reserve(const Problem<G, F>& problem, const Weights<F>& weights, int64_t rows) {
    const int64_t K = problem.num_kernels, most = most_pairs + K * chunk;
    rows_ = rows;
    return pairs_.reserve(problem, rows, most_pairs, true) && g_.resize(K * rows * problem.channels) &&
           gathered_.resize((rows + row_step) * weights.c_out) && along_.resize(most + lanes<F> + lanes<G>) &&
           row_.resize(most);
  }

  // Queries [first, first + count). `panels`: of the transposed weights; `scale`, `modulations`: of every query, and
  // kernel point, or null; `kernels`: this tile's part of the gradient of the kernel points.
  void add(const Problem<G, F>& problem, const Weights<F>& weights, const Panels<F>& panels, const F* scale,
           const F* modulations, const F* grad_out, int64_t first, int64_t count, const Places<G, F>& to,
           double* kernels) {
    const int D = DIM ? DIM : problem.dimension;
    const int64_t K = problem.num_kernels, base = problem.row_splits[first];
    if (to.queries) memset(to.queries + first * D, 0, size_t(count * D) * sizeof(G));
    if (to.offsets) memset(to.offsets + first * K * D, 0, size_t(count * K * D) * sizeof(G));
    if (to.modulations) memset(to.modulations + first * K, 0, size_t(count * K) * sizeof(F));
    if (to.edges) memset(to.edges + base * D, 0, size_t((problem.row_splits[first + count] - base) * D) * sizeof(G));
    if (kernels) memset(kernels, 0, size_t(K * D) * sizeof(double));
    const auto finish = [&] {
      for (int64_t k = 0; k < K; ++k) {
        gather_gradients(k, weights.c_out, scale, grad_out, first);
        if (weights.depthwise)
          scale_gradients(weights, k);
        else
          multiply_gradients(weights, panels, k);
      }
      take_products(problem);
      spread(problem, modulations, first, base, to, kernels);
      pairs_.start_rows();
      pairs_.start_pairs();
    };
    pairs_.start_rows();
    pairs_.start_pairs();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t q = first + r, begin = problem.row_splits[q], end = problem.row_splits[q + 1];
      for (int64_t e = begin; e < end; e += chunk) {
        if (pairs_.num_pairs >= most_pairs) finish();
        pairs_.look_at(problem, q, int32_t(r), e, smaller(chunk, end - e), base);
      }
    }
    finish();
  }

 private:
  static constexpr int64_t most_pairs = 1 << 14;

  // grad_out of the queries that have a pair with kernel point k
  void gather_gradients(int64_t k, int64_t c_out, const F* scale, const F* grad_out, int64_t first) {
    for (int64_t i = 0; i < pairs_.size(k); ++i) {
      const int64_t q = first + pairs_.queries(k)[i];
      const F* const grad = grad_out + q * c_out;
      F* const row = &gathered_[i * c_out];
      for (int64_t c = 0; c < c_out; ++c) row[c] = scale ? grad[c] * scale[q] : grad[c];
    }
  }
  void scale_gradients(const Weights<F>& weights, int64_t k) {
    for (int64_t i = 0; i < pairs_.size(k); ++i)
      for (int64_t c = 0; c < weights.c_out; ++c)
        g_[(k * rows_ + i) * weights.c_out + c] = gathered_[i * weights.c_out + c] * weights.row(k)[c];
  }
  void multiply_gradients(const Weights<F>& weights, const Panels<F>& panels, int64_t k) {
    const int64_t size = pairs_.size(k), c_out = weights.c_out, height = c_out / weights.groups;
    for (int64_t g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < panels.count(); ++p)
        with_vectors(panels.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = panels.row(g, p, k * height);
          F* const to = &g_[k * rows_ * weights.c_in + g * panels.columns + p * panel_width<F>];
          const int64_t width = smaller<int64_t>(NV * lanes<F>, panels.columns - p * panel_width<F>);
          Vec<F> products[MR * NV];
          const F* const product = reinterpret_cast<const F*>(products);
          for (int64_t i = 0; i < size; i += MR) {
            multiply_block<F, MR, NV, true>(
                height, &gathered_[i * c_out + g * height], c_out, 1,
                [=](int64_t c) { return panel + c * NV * lanes<F>; },
                [&](int64_t r) { return reinterpret_cast<F*>(products + r * NV); });
            for (int64_t r = 0; r < smaller<int64_t>(MR, size - i); ++r)
              memcpy(to + (i + r) * weights.c_in, product + r * NV * lanes<F>, size_t(width) * sizeof(F));
          }
        });
  }

  // along_[pair] = f_i . (grad W_k^T), as many pairs at a time as a vector has lanes
  void take_products(const Problem<G, F>& problem) {
    const int64_t channels = problem.channels, num_pairs = pairs_.num_pairs;
    const int rest = int(channels % lanes<F>);
    for (int64_t l = 0; l < pairs_.num_lists; ++l)
      for (int64_t i = pairs_.lists[l].begin; i < pairs_.lists[l + 1].begin; ++i) row_[i] = pairs_.lists[l].row;
    for (int64_t i = 0; i < num_pairs; i += lanes<F>) {
      Vec<F> sums[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l) {
        const int64_t pair = smaller(i + l, num_pairs - 1);
        const F* const f = problem.features + int64_t(pairs_.point[pair]) * channels;
        const F* const g = &g_[row_[pair] * channels];
        Vec<F> sum = {};
        int64_t c = 0;
        for (; c + lanes<F> <= channels; c += lanes<F>) sum = fma(load(f + c), load(g + c), sum);
        if (rest) sum = fma(load_first(f + c, rest), load_first(g + c, rest), sum);
        sums[l] = sum;
      }
      store(&along_[i], sums_of<F>(sums));
    }
  }

  void spread(const Problem<G, F>& problem, const F* modulations, int64_t first, int64_t base, const Places<G, F>& to,
              double* kernels) {
    const int D = DIM ? DIM : problem.dimension, K = problem.num_kernels;
    constexpr int stored = DIM ? DIM : max_dimension;
    push(problem);
    for (int64_t l = 0; l < pairs_.num_lists; ++l) {
      const List& list = pairs_.lists[l];
      const int k = list.kernel;
      const int64_t q = first + pairs_.queries(k)[list.row - k * rows_];
      const G modulation = modulations ? G(modulations[q * K + k]) : G(1);
      const int64_t begin = list.begin, end = pairs_.lists[l + 1].begin;
      G sum[stored] = {};
      for (int64_t i = begin; i < end; ++i)
        for (int a = 0; a < D; ++a) sum[a] += modulation * pairs_.from[a][i];
      for (int64_t i = begin; to.edges && i < end; ++i) {
        G* const edge = to.edges + (base + pairs_.edge[i]) * D;
        for (int a = 0; a < D; ++a) edge[a] += modulation * pairs_.from[a][i];
      }
      F of_modulation = 0;
      for (int64_t i = begin; to.modulations && i < end; ++i) of_modulation += pairs_.weight[i] * along_[i];
      for (int a = 0; a < D; ++a) {
        if (to.queries) to.queries[q * D + a] -= sum[a];
        if (to.offsets) to.offsets[(q * K + k) * D + a] -= sum[a];
        if (kernels) kernels[k * D + a] -= double(sum[a]);
      }
      if (to.modulations) to.modulations[q * K + k] += of_modulation;
    }
  }

  // Turns where the pairs are from their kernel points into the gradients of that, but for the modulations.
  void push(const Problem<G, F>& problem) {
    const int D = DIM ? DIM : problem.dimension;
    const Vec<G> inverse_extent = broadcast(1 / problem.extent), scale = broadcast(gaussian_scale(problem.extent));
    for (int64_t i = 0; i < pairs_.num_pairs; i += lanes<G>) {
      const Vec<G> d2 = load(&pairs_.d2[i]);
      Vec<G> factor = {};
      if (problem.influence == Influence::linear)
        factor = linear_slope(d2, inverse_extent);
      else if (problem.influence == Influence::gaussian)
        factor = 2 * scale * exp_of<G>(d2 * scale);
      if constexpr (std::is_same_v<G, F>)
        factor *= load(&along_[i]);
      else
        for (int l = 0; l < lanes<G>; ++l) factor[l] *= G(along_[i + l]);
      for (int a = 0; a < D; ++a) store(&pairs_.from[a][i], factor * load(&pairs_.from[a][i]));
    }
  }

  Pairs<G, F, DIM> pairs_;
  Buffer<F> g_, gathered_, along_;
  Buffer<int32_t> row_;
  int64_t rows_ = 0;
};

template <class G, class F, int DIM>
Status place_gradients(const Problem<G, F>& problem, const Weights<F>& weights, const F* scale, const F* modulations,
                       const F* grad_out, const Places<G, F>& to, int64_t tile_rows, int threads) {
  Panels<F> panels;
  if (!weights.depthwise &&
      !panels.pack(weights.data, weights.num_kernels, weights.c_in, weights.c_out, weights.groups, true, threads))
    return Status::out_of_memory;
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows, D = problem.dimension;
  bool enough = true;
#pragma omp parallel num_threads(useful_threads(threads, tiles, 1)) reduction(&& : enough)
  {
    PlaceTile<G, F, DIM> tile;
    enough = tile.reserve(problem, weights, tile_rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      if (!enough) continue;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.add(problem, weights, panels, scale, modulations, grad_out, first, rows, to,
               to.kernels ? to.kernels + t * problem.num_kernels * D : nullptr);
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

// Adds up the gradients of all pairs of a point, in their order; every thread has some of the points.
template <class G>
void sum_edges(const G* edges, const int32_t* index, int64_t num_edges, int64_t D, int64_t num_points, G* points,
               int threads) {
#pragma omp parallel num_threads(useful_threads(threads, num_points, 1 << 12))
  {
    const Share share(num_points, omp_get_thread_num(), omp_get_num_threads());
    memset(points + share.begin * D, 0, size_t((share.end - share.begin) * D) * sizeof(G));
    for (int64_t e = 0; e < num_edges; ++e)
      if (index[e] >= share.begin && index[e] < share.end)
        for (int64_t a = 0; a < D; ++a) points[index[e] * D + a] += edges[e * D + a];
  }
}

// Whether a feature row sums to more than zero, in float64 and eight interleaved sums: alike on every machine.
template <class F>
bool sums_positive(const F* row, int64_t channels) {
  double sums[8] = {};
  for (int64_t c = 0; c < channels; ++c) sums[c % 8] += double(row[c]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) > 0;
}

// 1 / max(1, neighbours that count) of every query; none: an empty buffer.
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

// Every query's own kernel points, by axis and padded with NaN to whole vectors.
template <class G>
bool deform(const KPConv& args, Buffer<G>& to) {
  const int64_t K = args.kernel_points.rows, D = args.kernel_points.cols, padded = round_up(K, lanes<G>);
  const int64_t m = args.queries.rows;
  if (!to.resize(m * D * padded)) return false;
#pragma omp parallel for num_threads(useful_threads(args.threads, m, 1 << 8))
  for (int64_t q = 0; q < m; ++q)
    for (int64_t a = 0; a < D; ++a)
      for (int64_t k = 0; k < padded; ++k)
        to[(q * D + a) * padded + k] =
            k < K ? as<G>(args.kernel_points)[k * D + a] + as<G>(args.offsets)[(q * K + k) * D + a] : G(NAN);
  return true;
}

// Calls f(geometry type, feature type, dimension or 0 for any).
template <class Call>
Status with_types(const KPConv& args, Call call) {
  const auto with_feature = [&](auto g, auto f) {
    if (args.points.cols == 2) return call(g, f, std::integral_constant<int, 2>());
    if (args.points.cols == 3) return call(g, f, std::integral_constant<int, 3>());
    return call(g, f, std::integral_constant<int, 0>());
  };
  const auto with_geometry = [&](auto g) {
    return args.features.dtype == DType::float32 ? with_feature(g, float()) : with_feature(g, double());
  };
  return args.points.dtype == DType::float32 ? with_geometry(float()) : with_geometry(double());
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
  return {as<G>(args.points),
          as<G>(args.queries),
          int(args.points.cols),
          as<int32_t>(args.index),
          as<int64_t>(args.row_splits),
          args.queries.rows,
          as<F>(args.features),
          args.features.cols,
          kernel_points.data(),
          int(args.kernel_points.rows),
          G(args.extent),
          args.influence,
          args.aggregation,
          scale.data(),
          nullptr,
          as<G>(args.offsets),
          nullptr,
          as<F>(args.modulations),
          args.factors,
          false};
}

// Calls f(the problem of the way there, weights, dimension, the queries' scale).
template <class Call>
Status with_problem(const KPConv& args, Call call) {
  return with_types(args, [&](auto g, auto f, auto dim) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return call(forward_problem(args, kernel_points, scale), weights_of<F>(args), dim);
  });
}

}  // namespace

Status kpconv(const KPConv& args, const Array& out) {
  return with_problem(args, [&](const auto& problem, const auto& weights, auto dim) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    return convolve<G, F, decltype(dim)::value>(problem, weights, static_cast<F*>(out.data), args.threads);
  });
}

Status kpconv_grad_features(const KPConv& args, const Array& grad_out, const Array& grad_features) {
  return with_problem(args, [&](auto problem, const auto& weights, auto dim) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    Buffer<G> mirrored, deformed;
    if (!by_axis(args.kernel_points, G(-1), mirrored)) return Status::out_of_memory;
    if (problem.offsets && !deform(args, deformed)) return Status::out_of_memory;
    exchange(problem.points, problem.queries);
    exchange(problem.query_scale, problem.point_scale);
    problem.kernel_points = mirrored.data();
    problem.deformed = problem.offsets ? deformed.data() : nullptr;
    problem.offsets = nullptr;
    problem.backward = true;
    problem.index = as<int32_t>(args.transposed_index);
    problem.row_splits = as<int64_t>(args.transposed_row_splits);
    problem.num_queries = args.points.rows;
    problem.features = as<F>(grad_out);
    problem.channels = grad_out.cols;
    return convolve<G, F, decltype(dim)::value>(problem, weights, static_cast<F*>(grad_features.data), args.threads);
  });
}

Status kpconv_grad_weights(const KPConv& args, const Array& grad_out, const Array& grad_weights) {
  return with_problem(args, [&](const auto& problem, const auto& weights, auto dim) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    return weight_gradient<G, F, decltype(dim)::value>(problem, weights, as<F>(grad_out),
                                                       static_cast<F*>(grad_weights.data), args.threads);
  });
}

Status kpconv_grad_factors(const KPConv& args, const Array& grad_out, const Array& grad_factors) {
  return with_problem(args, [&](const auto& problem, const auto& weights, auto dim) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    return factor_gradient<G, F, decltype(dim)::value>(problem, weights, as<F>(grad_out),
                                                       static_cast<F*>(grad_factors.data), args.threads);
  });
}

Status kpconv_grad_places(const KPConv& args, const Array& grad_out, const KPConvPlaces& to) {
  return with_problem(args, [&](auto problem, const auto& weights, auto dim) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    const int64_t D = problem.dimension, K = problem.num_kernels, num_edges = problem.row_splits[problem.num_queries];
    const int64_t tile_rows = rows_of_tile<F>(K * problem.channels, weights.c_out);
    const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
    Buffer<G> edges;
    Buffer<double> kernels;
    if (to.points.data && !edges.resize(num_edges * D)) return Status::out_of_memory;
    if (to.kernel_points.data && !kernels.resize(tiles * K * D)) return Status::out_of_memory;
    const Places<G, F> places = {static_cast<G*>(to.queries.data), to.points.data ? edges.data() : nullptr,
                                 to.kernel_points.data ? kernels.data() : nullptr, static_cast<G*>(to.offsets.data),
                                 static_cast<F*>(to.modulations.data)};
    const F *const scale = problem.query_scale, *const modulations = problem.modulations;
    problem.query_scale = problem.modulations = nullptr;
    const Status status = place_gradients<G, F, decltype(dim)::value>(problem, weights, scale, modulations,
                                                                      as<F>(grad_out), places, tile_rows, args.threads);
    if (status != Status::ok) return status;
    if (places.edges)
      sum_edges(places.edges, problem.index, num_edges, D, args.points.rows, static_cast<G*>(to.points.data),
                args.threads);
    for (int64_t i = 0; places.kernels && i < K * D; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tiles; ++t) sum += places.kernels[t * K * D + i];
      static_cast<G*>(to.kernel_points.data)[i] = G(sum);
    }
    return Status::ok;
  });
}

}  // namespace KP_ISA
}  // namespace kp
