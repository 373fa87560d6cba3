// Gradients of KPConv, except that of the features, in one pass over the tiles of its queries.
//
// The gradient of W_k is the sum over the tiles of A_k^T grad. Gradients of positions (points, queries, kernel points,
// offsets) and of modulations start from the gradient of every pair's weight, f_i . (grad W_k^T), and multiply it by
// the slope of the influence. Tiles are added in their order, so no result depends on the number of threads.

#include <sched.h>

#include "kpconv_call.h"

namespace kp {
namespace KP_ISA {
namespace {

// The requested gradients; null if not requested.
template <class G, class F>
struct Gradients {
  F* weights;             // shape of the weights
  F* factors;             // (M, K, factors), of modulations with several factors
  G* points;              // (N, D)
  G* queries;             // (M, D)
  double* kernel_points;  // (K, D)
  G* offsets;             // (M, K, D)
  F* modulations;         // (M, K), with one factor

  bool need_sums() const { return weights || factors; }
  bool need_geometry() const { return points || queries || kernel_points || offsets || modulations; }
};

// Makes threads add their tiles to a shared result in the order of the tiles. The result is divided into parts, each
// with a counter of the tiles added so far. A thread waits only for the thread one tile ahead of it, and yields its
// core if that takes long. (Barriers would be simpler; on a machine with other work to do, two of them per tile made
// the gradient forty times slower.)
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
  static constexpr int64_t line = 8;  // one cache line for each counter
  Buffer<int64_t> turn_;
};

// Adds A_k^T grad to rows [first, end) of the gradient of W_k, input channels of one group. `grad` holds the tile's
// rows of grad_out, padded to whole vectors and by one more panel.
template <class F>
void add_transposed_product(const TileSums<F>& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
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

// The same for a depthwise kernel.
template <class F>
void add_scaled_rows(const TileSums<F>& tile, int64_t k, int64_t first, int64_t end, const Weights<F>& weights,
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

// Divides the input channels of every kernel point into blocks, each within one group: the parts of the gradient of the
// weights for which threads take turns.
struct ChannelBlocks {
  int64_t height, block, blocks_per_group, blocks_per_kernel, num_kernels;  // height: input channels per group

  template <class F>
  explicit ChannelBlocks(const Weights<F>& weights)
      : height(weights.depthwise ? weights.c_in : weights.c_in / weights.groups),
        block(smaller<int64_t>(height, 8 * row_step)),
        blocks_per_group((height + block - 1) / block),
        blocks_per_kernel(weights.c_in / height * blocks_per_group),
        num_kernels(weights.num_kernels) {}

  int64_t count() const { return num_kernels * blocks_per_kernel; }
  int64_t kernel(int64_t i) const { return i / blocks_per_kernel; }
  int64_t begin(int64_t i) const {
    return i % blocks_per_kernel / blocks_per_group * height + i % blocks_per_group * block;
  }
  int64_t end(int64_t i) const {
    return smaller(i % blocks_per_kernel / blocks_per_group * height + height, begin(i) + block);
  }
};

// Adds tile t to the gradient of the weights, block by block when it is its turn. `padded` is scratch for its rows of
// grad_out.
template <class F>
void add_weights(const TileSums<F>& tile, const Weights<F>& weights, const F* modulations, const ChannelBlocks& blocks,
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

// Gradient of modulations with several factors: at (q, k, f) the sum of A_k[q] * W_k * grad[q] over the channels of
// factor f.
template <class F>
void write_factor_gradients(const TileSums<F>& tile, const Weights<F>& weights, const F* grad_out, int64_t first,
                            int64_t rows, F* to) {
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

// Four coordinates; vectors of more dimensions take several.
template <class G>
struct FourOf {
  typedef G type __attribute__((vector_size(4 * sizeof(G)), aligned(alignof(G)), may_alias));
};
template <class G>
using Four = typename FourOf<G>::type;

// Transposes a 4 x 4 matrix.
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

// One thread's products grad W_k^T, a row for each row of the tile, and the gradients of its pairs' weights.
template <class F>
class GradientProducts {
 public:
  Buffer<F> weight_grad;  // f_i . (grad W_k^T) of every pair
  Buffer<int32_t> row;    // row of the products for every pair

  bool reserve(const Weights<F>& weights, int64_t rows, int64_t max_pairs) {
    rows_ = rows;
    return grad_w_.resize(weights.num_kernels * rows_stored() * weights.c_in) &&
           rows_done_.resize(weights.num_kernels) && gathered_.resize((rows + row_step) * weights.c_out) &&
           weight_grad.resize(max_pairs + 2 * lanes<F>) && row.resize(max_pairs + lanes<int32_t>);
  }

  // The micro-kernel also stores rows up to the next multiple of row_step.
  int64_t rows_stored() const { return rows_ + row_step; }
  void start() {
    for (int64_t k = 0; k < rows_done_.size(); ++k) rows_done_[k] = 0;
  }
  int64_t done(int64_t k) const { return rows_done_[k]; }

  // Computes the products of the tile's rows added since the last call. `panels`: the transposed weights. `grad_out`:
  // from the tile's first query on.
  KP_OUTLINE void multiply(const TileSums<F>& tile, const Weights<F>& weights, const Panels<F>& panels,
                           const F* grad_out) {
    for (int k = 0; k < weights.num_kernels; ++k) {
      gather_gradients(tile, k, weights.c_out, grad_out);
      if (weights.depthwise)
        scale_gradients(tile, weights, k);
      else
        multiply_gradients(tile, weights, panels, k);
      rows_done_[k] = tile.size(k);
    }
  }

  // Computes weight_grad and row, for a vector of pairs at a time.
  KP_OUTLINE void dot(const PairList* lists, int64_t num_lists, const int32_t* points, int64_t num_pairs,
                      const F* features, int64_t channels) {
    const int rest = int(channels % lanes<F>);
    for (const PairList* list = lists; list < lists + num_lists; ++list) {
      const Vec<int32_t> number = broadcast(list->row + list->kernel * row_step);
      for (int64_t i = list->begin; i < list[1].begin; i += lanes<int32_t>) store(&row[i], number);
    }
    for (int64_t i = 0; i < num_pairs; i += lanes<F>) {
      Vec<F> sums[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l) {
        const int64_t pair = smaller(i + l, num_pairs - 1);
        const F* const f = features + int64_t(points[pair]) * channels;
        const F* const g = &grad_w_[row[pair] * channels];
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
      store(&weight_grad[i], sums_of<F>(sums));
    }
  }

 private:
  // Copies grad_out of the queries of the new rows of kernel point k.
  void gather_gradients(const TileSums<F>& tile, int k, int64_t c_out, const F* grad_out) {
    for (int64_t i = rows_done_[k]; i < tile.size(k); ++i) {
      const F* const grad = grad_out + tile.queries(k)[i] * c_out;
      F* const row = &gathered_[(i - rows_done_[k]) * c_out];
      int64_t c = 0;  // not memcpy: the call takes as long as copying 64 channels
      for (; c + lanes<F> <= c_out; c += lanes<F>) store(row + c, load(grad + c));
      for (; c < c_out; ++c) row[c] = grad[c];
    }
  }
  void scale_gradients(const TileSums<F>& tile, const Weights<F>& weights, int k) {
    for (int64_t i = rows_done_[k]; i < tile.size(k); ++i)
      for (int64_t c = 0; c < weights.c_out; ++c)
        grad_w_[(k * rows_stored() + i) * weights.c_out + c] =
            gathered_[(i - rows_done_[k]) * weights.c_out + c] * weights.row(k)[c];
  }
  void multiply_gradients(const TileSums<F>& tile, const Weights<F>& weights, const Panels<F>& panels, int k) {
    const int64_t size = tile.size(k) - rows_done_[k], c_out = weights.c_out, height = c_out / weights.groups;
    for (int64_t g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < panels.count(); ++p)
        with_vectors(panels.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = panels.row(g, p, k * height);
          F* const to =
              &grad_w_[(k * rows_stored() + rows_done_[k]) * weights.c_in + g * panels.columns + p * panel_width<F>];
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

  Buffer<F> grad_w_, gathered_;
  Buffer<int64_t> rows_done_;  // rows of each kernel point that are in grad_w_
  int64_t rows_ = 0;
};

// One thread's gradients of positions and modulations, for one tile at a time.
template <class G, class F>
class GeometryGradients {
 public:
  // max_edges: the most edges of a tile, 0 if the points need no gradient.
  bool reserve(const KPConvPass<G, F>& pass, const Weights<F>& weights, int64_t rows, int64_t max_edges) {
    const int64_t K = pass.num_kernels;
    if (!products_.reserve(weights, rows, Tile<G, F>::max_pairs + K * chunk)) return false;
    const int64_t all_rows = K * products_.rows_stored();
    stride_ = round_up(pass.dimension, 4);
    return factor_.resize(all_rows) && modulation_.resize(all_rows) && sums_.resize(all_rows * stride_) &&
           kernel_points_.resize(K * pass.dimension) && edges_.resize(max_edges * stride_);
  }

  // Starts a tile with queries from `first` on.
  void start(int64_t first, int64_t num_edges) {
    first_ = first;
    products_.start();
    memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(G));
    memset(modulation_.data(), 0, size_t(modulation_.size()) * sizeof(F));
    if (edges_.size()) memset(edges_.data(), 0, size_t(num_edges * stride_) * sizeof(G));
  }

  // Adds some pairs of the tile. `panels`: the transposed weights.
  KP_OUTLINE void add(const KPConvPass<G, F>& pass, const Weights<F>& weights, const Panels<F>& panels,
                      const F* grad_out, const TileSums<F>& tile, const Pairs<G, F>& pairs, const Gradients<G, F>& to) {
    const int64_t K = pass.num_kernels;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = products_.done(k); i < tile.size(k); ++i) {
        const int64_t q = first_ + tile.queries(k)[i];
        factor_[k * products_.rows_stored() + i] =
            G(pass.modulations ? pass.modulations[q * K + k] : F(1)) * G(pass.query_scale ? pass.query_scale[q] : F(1));
      }
    products_.multiply(tile, weights, panels, grad_out + first_ * weights.c_out);
    products_.dot(pairs.lists.data(), pairs.num_lists, pairs.point.data(), pairs.num_pairs, pass.features,
                  pass.channels);
    const auto spread_pairs = [&](auto need_points) {
      if (pass.dimension == 3)
        spread<3, decltype(need_points)::value>(pass, pairs, to.modulations);
      else
        spread<0, decltype(need_points)::value>(pass, pairs, to.modulations);
    };
    if (to.points)
      spread_pairs(std::true_type());
    else
      spread_pairs(std::false_type());
  }

  // Writes the gradients of the tile's `count` queries, which belong to this tile alone.
  void write_queries(const KPConvPass<G, F>& pass, const Gradients<G, F>& to, int64_t count, const TileSums<F>& tile) {
    const int64_t D = pass.dimension, K = pass.num_kernels;
    if (to.queries) memset(to.queries + first_ * D, 0, size_t(count * D) * sizeof(G));
    if (to.offsets) memset(to.offsets + first_ * K * D, 0, size_t(count * K * D) * sizeof(G));
    if (to.modulations) memset(to.modulations + first_ * K, 0, size_t(count * K) * sizeof(F));
    for (int64_t i = 0; i < K * D; ++i) kernel_points_[i] = 0;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < tile.size(k); ++i) {
        const int64_t row = k * products_.rows_stored() + i, q = first_ + tile.queries(k)[i];
        for (int a = 0; a < D; ++a) {
          const G part = factor_[row] * sums_[row * stride_ + a];
          if (to.queries) to.queries[q * D + a] -= part;
          if (to.offsets) to.offsets[(q * K + k) * D + a] = -part;
          kernel_points_[k * D + a] -= double(part);
        }
        if (to.modulations)
          to.modulations[q * K + k] = modulation_[row] * (pass.query_scale ? pass.query_scale[q] : F(1));
      }
  }

  // Adds to the gradients that tiles share, of points and kernel points. Called in the order of the tiles.
  void add_shared(const KPConvPass<G, F>& pass, const Gradients<G, F>& to, int64_t num_edges) const {
    const int D = pass.dimension;
    const int32_t* const index = pass.index + pass.row_splits[first_];
    for (int64_t e = 0; to.points && e < num_edges; ++e)
      for (int a = 0; a < D; ++a) to.points[int64_t(index[e]) * D + a] += edges_[e * stride_ + a];
    for (int64_t i = 0; to.kernel_points && i < int64_t(pass.num_kernels) * D; ++i)
      to.kernel_points[i] += kernel_points_[i];
  }

 private:
  // Computes the gradient of every pair's difference (neighbor - kernel point) and adds it to the tile's row and, for
  // the points, to the edge. One loop over all pairs: a loop for each list, of about five pairs, would end unpredicted.
  template <int DIM, bool need_points>
  void spread(const KPConvPass<G, F>& pass, const Pairs<G, F>& pairs, bool need_modulations) {
    constexpr int step = lanes<G> < 4 ? 4 : lanes<G>, stored = DIM ? (DIM + 3) / 4 * 4 : max_dimension;
    const int D = DIM ? DIM : pass.dimension;
    const Vec<G> inverse_extent = broadcast(1 / pass.extent), scale = broadcast(gaussian_scale(pass.extent));
    alignas(64) G gradients[stored][step] = {}, influences[step];
    for (int64_t i = 0; i < pairs.num_pairs; i += step) {
      for (int v = 0; v < step; v += lanes<G>) {
        const Vec<G> d2 = load(&pairs.d2[i + v]);
        Vec<G> weight_grad, slope = {}, influence = broadcast(G(1));
        if constexpr (std::is_same_v<G, F>)
          weight_grad = load(&products_.weight_grad[i + v]);
        else
          for (int l = 0; l < lanes<G>; ++l) weight_grad[l] = G(products_.weight_grad[i + v + l]);
        if (pass.influence == Influence::linear) {
          slope = linear_slope(d2, inverse_extent);
          influence = linear_influence(d2, inverse_extent);
        } else if (pass.influence == Influence::gaussian) {
          influence = exp_of<G>(d2 * scale);
          slope = 2 * scale * influence;
        }
        for (int a = 0; a < D; ++a) store(&gradients[a][v], weight_grad * slope * load(&pairs.difference[a][i + v]));
        store(&influences[v], influence);
      }
      const int count = int(smaller<int64_t>(step, pairs.num_pairs - i));
      for (int j = 0; need_modulations && j < count; ++j)
        modulation_[products_.row[i + j]] += F(influences[j]) * products_.weight_grad[i + j];
      for (int a = 0; a < D; a += 4)
        for (int j = 0; j < count; j += 4) {
          Four<G> by_axis[4], by_pair[4];
          for (int b = 0; b < 4; ++b) by_axis[b] = *reinterpret_cast<const Four<G>*>(&gradients[a + b][j]);
          transpose<G>(by_axis, by_pair);
          for (int64_t l = 0; l < 4 && j + l < count; ++l) {
            const int64_t pair = i + j + l, row = products_.row[pair];
            *reinterpret_cast<Four<G>*>(&sums_[row * stride_ + a]) += by_pair[l];
            if (need_points)
              *reinterpret_cast<Four<G>*>(&edges_[pairs.edge[pair] * stride_ + a]) += by_pair[l] * factor_[row];
          }
        }
    }
  }

  GradientProducts<F> products_;
  Buffer<G> factor_;      // of each row: modulation times normalization of the query
  Buffer<G> sums_;        // (rows, stride_): gradient of the differences of each row's pairs, without factor_
  Buffer<G> edges_;       // (edges, stride_): gradient of the point of each edge
  Buffer<F> modulation_;  // of each row
  Buffer<double> kernel_points_;
  int64_t first_ = 0, stride_ = 0;
};

template <class G, class F>
struct GradState {
  Tile<G, F> tile;
  GeometryGradients<G, F> geometry;
  Buffer<F> grad;  // the rows of grad_out of the tile's queries, padded
};

template <class G, class F>
Status compute_gradients(const KPConvPass<G, F>& pass, const Weights<F>& weights, const F* grad_out,
                         const Gradients<G, F>& to, int threads) {
  const int64_t K = pass.num_kernels, D = pass.dimension, num_queries = pass.num_queries;
  const int64_t tile_rows = rows_of_tile<F>(K * pass.channels, weights.c_out);
  const ChannelBlocks blocks(weights);
  Turns turns;
  Panels<F> panels;
  if (!turns.reserve(blocks.count() + 1)) return Status::out_of_memory;
  if (to.weights)
    memset(to.weights, 0, size_t(K * (weights.depthwise ? 1 : blocks.height) * weights.c_out) * sizeof(F));
  for (int64_t i = 0; to.kernel_points && i < K * D; ++i) to.kernel_points[i] = 0;
  if (to.need_geometry() && !weights.depthwise &&
      !panels.pack(weights.data, K, weights.c_in, weights.c_out, weights.groups, true, threads))
    return Status::out_of_memory;
  const int64_t* const splits = pass.row_splits;
  int64_t max_edges = 0;
  const Tiles tiles(num_queries, tile_rows);
  for (int64_t t = 0; to.points && t < tiles.count; ++t)
    max_edges = larger(max_edges, splits[tiles.begin(t + 1)] - splits[tiles.begin(t)]);
  using State = GradState<G, F>;
  const auto reserve = [&](State& state) {
    return state.tile.reserve(pass, tile_rows, to.need_sums(), to.need_geometry()) &&
           (!to.need_geometry() || state.geometry.reserve(pass, weights, tile_rows, max_edges)) &&
           (!to.weights || state.grad.resize(tile_rows * round_up(weights.c_out, lanes<F>) + panel_width<F>));
  };
  threads = threads_of_pass(pass, weights, threads);
  const auto work = [&](State& state, int64_t t, int64_t first, int64_t rows) {
    const int64_t num_edges = splits[first + rows] - splits[first];
    if (to.need_geometry()) state.geometry.start(first, num_edges);
    state.tile.fill(pass, first, rows, to.need_geometry() ? state.tile.max_pairs : pair_batch,
                    [&](const Pairs<G, F>& pairs) {
                      if (to.need_geometry())
                        state.geometry.add(pass, weights, panels, grad_out, state.tile.rows(), pairs, to);
                    });
    if (to.need_geometry()) state.geometry.write_queries(pass, to, rows, state.tile.rows());
    if (to.points || to.kernel_points) {
      turns.wait(blocks.count(), t);
      state.geometry.add_shared(pass, to, num_edges);
      turns.pass(blocks.count(), t);
    }
    if (to.factors) write_factor_gradients(state.tile.rows(), weights, grad_out, first, rows, to.factors);
    if (to.weights)
      add_weights(state.tile.rows(), weights, modulations_at(pass, weights, first), blocks, grad_out, t, first, rows,
                  turns, state.grad.data(), to.weights);
  };
  return for_each_tile<State>(num_queries, tile_rows, threads, reserve, work);
}

}  // namespace

Status kpconv_grads(const KPConv& args) {
  return with_forward_pass(args, [&](const auto& pass, const auto& weights) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*pass.points)>;
    const int64_t size = int64_t(pass.num_kernels) * pass.dimension;
    Buffer<double> kernel_point_sums;
    if (!kernel_point_sums.resize(size)) return Status::out_of_memory;
    F* const modulations = into<F>(args.grad_modulations);
    G *const points = into<G>(args.grad_points), *const kernel_points = into<G>(args.grad_kernel_points);
    if (points) memset(points, 0, size_t(args.points.rows * pass.dimension) * sizeof(G));
    const Gradients<G, F> grads = {into<F>(args.grad_weights),
                                   weights.factors > 1 ? modulations : nullptr,
                                   points,
                                   into<G>(args.grad_queries),
                                   kernel_points ? kernel_point_sums.data() : nullptr,
                                   into<G>(args.grad_offsets),
                                   weights.factors > 1 ? nullptr : modulations};
    const Status status = compute_gradients<G, F>(pass, weights, as<F>(args.grad_out), grads, args.threads);
    for (int64_t i = 0; grads.kernel_points && i < size; ++i) kernel_points[i] = G(kernel_point_sums[i]);
    return status;
  });
}

}  // namespace KP_ISA
}  // namespace kp
