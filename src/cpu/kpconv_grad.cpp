// Gradients of KPConv, except that of the features, in one pass over the tiles of its queries.
//
// The gradient of W_k is the sum over the tiles of A_k^T grad. Gradients of positions (points, queries, kernel points,
// offsets) and of modulations start from the gradient of every pair's weight, f_i . (grad W_k^T), and multiply it by
// the slope of the influence. With kernel offsets W_k are the query's resampled weights (kpconv_resampling.h), and
// their gradient goes to the kernel offsets and kernel points. Tiles are added in their order, so no result depends on
// the number of threads.

#include "kpconv_call.h"
#include "tile_gradients.h"

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
  G* kernel_offsets;      // (M, K, D)

  bool need_shares(const Resampling<G>& resampling) const {
    return kernel_offsets || (kernel_points && resampling.offsets);
  }
  bool need_sums(const Resampling<G>& resampling) const { return weights || factors || need_shares(resampling); }
  bool need_pairs() const { return points || queries || kernel_points || offsets || modulations; }
  bool need_geometry() const { return need_pairs() || kernel_offsets; }
};

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

// One thread's gradients of positions and modulations, for one tile at a time.
template <class G, class F>
class GeometryGradients {
 public:
  // max_edges: the most edges of a tile, 0 if the points need no gradient.
  bool reserve(const KPConvPass<G, F>& pass, const Weights<F>& weights, int64_t rows, int64_t max_edges) {
    const int64_t K = pass.num_kernels;
    if (!products_.reserve(weights, rows, Tile<G, F>::max_pairs + K * chunk)) return false;
    if (pass.mixes_sums()) {
      if (!unmixed_.reserve(weights, rows, 0) || !queries_.resize(rows) || !counts_.resize(K)) return false;
      for (int64_t r = 0; r < rows; ++r) queries_[r] = int32_t(r);
    }
    const int64_t all_rows = K * products_.rows_stored();
    stride_ = round_up(pass.dimension, 4);
    return factor_.resize(all_rows) && modulation_.resize(all_rows) && sums_.resize(all_rows * stride_) &&
           kernel_points_.resize(K * pass.dimension) && edges_.resize(max_edges * stride_);
  }

  // Starts a tile with `count` queries from `first` on. `panels`: the transposed weights.
  void start(const KPConvPass<G, F>& pass, const Weights<F>& weights, const Panels<F>& panels, const F* grad_out,
             int64_t first, int64_t count, int64_t num_edges) {
    first_ = first;
    products_.start();
    if (pass.mixes_sums()) {
      for (int64_t k = 0; k < pass.num_kernels; ++k) counts_[k] = int32_t(count);
      unmixed_.start();
      unmixed_.multiply({nullptr, queries_.data(), counts_.data(), 0, 0}, weights, panels,
                        grad_out + first * weights.c_out);
    }
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
    if (pass.mixes_sums())
      mix_products(pass, tile);
    else
      products_.multiply(tile, weights, panels, grad_out + first_ * weights.c_out);
    for (const PairList* list = pairs.lists.data(); list < pairs.lists.data() + pairs.num_lists; ++list) {
      const Vec<int32_t> number = broadcast(list->row + list->kernel * int32_t(products_.spare_rows));
      for (int64_t i = list->begin; i < list[1].begin; i += lanes<int32_t>) store(&products_.row[i], number);
    }
    products_.dot(pairs.point.data(), products_.row.data(), pairs.num_pairs, pass.features, pass.channels,
                  products_.weight_grad.data());
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
    for (int64_t k = 0; to.need_pairs() && k < K; ++k)
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
    if (to.need_shares(pass.resampling)) write_kernel_offsets(pass, to, count, tile);
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
  // The products of rows of A_k with kernel offsets: the sum over j of share(k, j) grad W_j^T.
  KP_OUTLINE void mix_products(const KPConvPass<G, F>& pass, const TileSums<F>& tile) {
    const Resampling<G> shares = pass.resampling;
    const int64_t channels = pass.channels;
    products_.make_rows(tile, channels, [&](int64_t r, int64_t k, F* row) {
      memset(row, 0, size_t(channels) * sizeof(F));
      shares.for_each_share(first_ + r, k, [&](int64_t j, G share, G) {
        add_share(unmixed_row(j, r, channels), F(share), channels, false, row);
      });
    });
  }
  const F* unmixed_row(int64_t j, int64_t r, int64_t channels) const {
    return unmixed_.products() + unmixed_.number(j, r) * channels;
  }

  // Gradients through the shares, of which that of share(k, j) is A_k . (grad W_j^T): writes that of the kernel offsets
  // and adds that of the kernel points.
  KP_OUTLINE void write_kernel_offsets(const KPConvPass<G, F>& pass, const Gradients<G, F>& to, int64_t count,
                                       const TileSums<F>& tile) {
    const int64_t D = pass.dimension, K = pass.num_kernels, channels = pass.channels;
    const Resampling<G> shares = pass.resampling;
    const G inverse_extent = 1 / shares.extent;
    if (to.kernel_offsets) memset(to.kernel_offsets + first_ * K * D, 0, size_t(count * K * D) * sizeof(G));
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < tile.size(k); ++i) {
        const int64_t r = tile.queries(k)[i], q = first_ + r;
        shares.for_each_share(q, k, [&](int64_t j, G, G d2) {
          const F share_grad = dot_product(tile.a(k) + i * channels, unmixed_row(j, r, channels), channels);
          const G slope = G(share_grad) * linear_slope(d2, inverse_extent);
          for (int a = 0; a < D; ++a) {
            const G part = slope * shares.difference(q, k, j, a);
            if (to.kernel_offsets) to.kernel_offsets[(q * K + k) * D + a] += part;
            kernel_points_[k * D + a] += double(part);
            kernel_points_[j * D + a] -= double(part);
          }
        });
      }
  }

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
          transpose_four<G>(by_axis, by_pair);
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
  GradientProducts<F> unmixed_;       // with kernel offsets: grad W_j^T of all queries of the tile
  Buffer<int32_t> queries_, counts_;  // 0, 1, ...; for each kernel point, the number of queries
  Buffer<G> factor_;                  // of each row: modulation times normalization of the query
  Buffer<G> sums_;        // (rows, stride_): gradient of the differences of each row's pairs, without factor_
  Buffer<G> edges_;       // (edges, stride_): gradient of the point of each edge
  Buffer<F> modulation_;  // of each row
  Buffer<double> kernel_points_;
  int64_t first_ = 0, stride_ = 0;
};

template <class G, class F>
struct GradState {
  Tile<G, F> tile;
  MixedSums<F> mixed;
  GeometryGradients<G, F> geometry;
  Buffer<F> grad;  // the rows of grad_out of the tile's queries, padded
};

template <class G, class F>
Status compute_gradients(const KPConvPass<G, F>& pass, const Weights<F>& weights, const F* grad_out,
                         const Gradients<G, F>& to, int threads) {
  const int64_t K = pass.num_kernels, D = pass.dimension, num_queries = pass.num_queries;
  const int64_t tile_rows = rows_of_tile<F>(columns_of_sums(pass), weights.c_out);
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
    return state.tile.reserve(pass, tile_rows, to.need_sums(pass.resampling), to.need_pairs()) &&
           (!to.weights || !pass.mixes_sums() || state.mixed.reserve(K, pass.channels, tile_rows)) &&
           (!to.need_geometry() || state.geometry.reserve(pass, weights, tile_rows, max_edges)) &&
           (!to.weights || state.grad.resize(tile_rows * round_up(weights.c_out, lanes<F>) + panel_width<F>));
  };
  threads = threads_of_pass(pass, weights, threads);
  const auto work = [&](State& state, int64_t t, int64_t first, int64_t rows) {
    const int64_t num_edges = splits[first + rows] - splits[first];
    if (to.need_geometry()) state.geometry.start(pass, weights, panels, grad_out, first, rows, num_edges);
    state.tile.fill(pass, first, rows, to.need_pairs() ? state.tile.max_pairs : pair_batch,
                    [&](const Pairs<G, F>& pairs) {
                      if (to.need_pairs())
                        state.geometry.add(pass, weights, panels, grad_out, state.tile.rows(), pairs, to);
                    });
    if (to.need_geometry()) state.geometry.write_queries(pass, to, rows, state.tile.rows());
    if (to.points || to.kernel_points) {
      turns.wait(blocks.count(), t);
      state.geometry.add_shared(pass, to, num_edges);
      turns.pass(blocks.count(), t);
    }
    if (to.factors) write_factor_gradients(state.tile.rows(), weights, grad_out, first, rows, to.factors);
    if (!to.weights) return;
    if (pass.mixes_sums()) state.mixed.mix(pass.resampling, state.tile.rows(), first, rows);
    add_weights(pass.mixes_sums() ? state.mixed.rows() : state.tile.rows(), weights,
                modulations_at(pass, weights, first), blocks, grad_out, t, first, rows, turns, state.grad.data(),
                to.weights);
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
                                   weights.factors > 1 ? nullptr : modulations,
                                   into<G>(args.grad_kernel_offsets)};
    const Status status = compute_gradients<G, F>(pass, weights, as<F>(args.grad_out), grads, args.threads);
    for (int64_t i = 0; grads.kernel_points && i < size; ++i) kernel_points[i] = G(kernel_point_sums[i]);
    return status;
  });
}

}  // namespace KP_ISA
}  // namespace kp
