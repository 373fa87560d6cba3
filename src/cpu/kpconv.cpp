// KPConv and the gradient of its features.
//
//   out[q] = sum over k of m[q, k] (sum over neighbors i of q of influence(|x_i - x_q - p_k - o_qk|) f_i) W_k
//   (Thomas et al. 2019; with modulations m and offsets o if the kernel is deformable; with kernel offsets each query
//   has weights of its own: kpconv_resampling.h)
//
// Queries are processed in tiles of some hundred (tile.h). A tile first sums features by kernel point into the rows of
// A_k. Its output is the sum over k of A_k W_k: a micro-kernel multiplies the rows of A_k by the packed weights
// (gemm.h) and adds the products to the rows' queries. No array larger than a tile is allocated.
//
// The gradient of the features is the same operator on the transposed neighbor list, with negated kernel points and
// transposed weights.

#include "kpconv_call.h"

namespace kp {
namespace KP_ISA {
namespace {

// The same for a depthwise kernel: o[q] = sum over k of A_k[q] * W_k, times the modulations of (q, k) if given.
template <class F>
void scale_rows(const TileSums<F>& tile, int64_t rows, const Weights<F>& weights, const F* modulations, F* o) {
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

// One thread's tile and its output.
template <class G, class F>
struct ConvolutionState {
  Tile<G, F> tile;
  MixedSums<F> mixed;
  Buffer<F> o;
};

template <class G, class F>
Status convolve(const KPConvPass<G, F>& pass, const Weights<F>& weights, F* out, int threads) {
  const bool dense = !weights.depthwise;
  Panels<F> panels;
  if (dense && !panels.pack(weights.data, weights.num_kernels, weights.c_in, weights.c_out, weights.groups,
                            pass.backward, threads))
    return Status::out_of_memory;
  const int64_t columns = pass.backward ? weights.c_in : weights.c_out, group_columns = columns / weights.groups;
  const int64_t o_row = dense ? weights.groups * panels.padded_columns() : columns;
  const int64_t tile_rows = rows_of_tile<F>(columns_of_sums(pass), o_row);
  const auto reserve = [&](ConvolutionState<G, F>& state) {
    return state.tile.reserve(pass, tile_rows) && state.o.resize((tile_rows + 1) * o_row) &&
           (!pass.mixes_sums() || state.mixed.reserve(pass.num_kernels, pass.channels, tile_rows));
  };
  return for_each_tile<ConvolutionState<G, F>>(
      pass.num_queries, tile_rows, threads_of_pass(pass, weights, threads), reserve,
      [&](ConvolutionState<G, F>& state, int64_t, int64_t first, int64_t rows) {
        const F* const o = state.o.data();
        state.tile.fill(pass, first, rows);
        if (pass.mixes_sums()) state.mixed.mix(pass.resampling, state.tile.rows(), first, rows);
        const TileSums<F> sums = pass.mixes_sums() ? state.mixed.rows() : state.tile.rows();
        if (!dense) {
          scale_rows(sums, rows, weights, modulations_at(pass, weights, first), state.o.data());
          memcpy(out + first * columns, o, size_t(rows * columns) * sizeof(F));
          return;
        }
        multiply(sums, tile_rows, panels, pass.num_kernels, state.o.data());
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t g = 0; g < weights.groups; ++g)
            memcpy(out + (first + r) * columns + g * group_columns, o + r * o_row + g * panels.padded_columns(),
                   size_t(group_columns) * sizeof(F));
      });
}

// The deformed kernel points of every query, (M, D, K padded with NaN to whole vectors).
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

}  // namespace

Status kpconv(const KPConv& args) {
  return with_forward_pass(args, [&](const auto& pass, const auto& weights) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*pass.points)>;
    return convolve<G, F>(pass, weights, into<F>(args.out), args.threads);
  });
}

Status kpconv_grad_features(const KPConv& args) {
  return with_forward_pass(args, [&](auto pass, const auto& weights) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*pass.points)>;
    Buffer<G> negated, deformed;
    if (!by_axis(args.kernel_points, G(-1), negated)) return Status::out_of_memory;
    if (pass.offsets && !deform(args, deformed)) return Status::out_of_memory;
    exchange(pass.points, pass.queries);
    exchange(pass.query_scale, pass.point_scale);
    pass.kernel_points = negated.data();
    pass.deformed = pass.offsets ? deformed.data() : nullptr;
    pass.offsets = nullptr;
    pass.backward = true;
    pass.index = as<int32_t>(args.transposed_index);
    pass.row_splits = as<int64_t>(args.transposed_row_splits);
    pass.num_queries = args.points.rows;
    pass.features = as<F>(args.grad_out);
    pass.channels = args.grad_out.cols;
    return convolve<G, F>(pass, weights, into<F>(args.grad_features), args.threads);
  });
}

}  // namespace KP_ISA
}  // namespace kp
