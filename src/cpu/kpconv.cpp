// KPConv and the gradient of its features, by tiles.
//
//   out[q] = sum over k of m[q, k] (sum over neighbors i of q of influence(|x_i - x_q - p_k - o_qk|) f_i) W_k
//   (Thomas et al. 2019; m and o where the kernel is modulated and deformed)
//
// A tile (src/tile.h) is some hundred queries: for every kernel point the rows of A_k, features summed with their
// influences, and the queries they are of. Then the tile's output is the sum over k of A_k W_k, added to the rows'
// queries by a micro-kernel over packed weights. Nothing larger than a tile ever exists.
//
// The gradient of the features is the same operator on the transposed neighbors with mirrored kernel points and
// transposed weights.

#include "kpconv_call.h"

namespace kp {
namespace KP_ISA {
namespace {

// o (tile rows + 1, padded columns) = the tile's A times the packed weights; the last row is for sums that are dropped.
template <class F>
void multiply(const Rows<F>& tile, int64_t tile_rows, const Panels<F>& weights, int num_kernels, F* o) {
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
template <class F>
void scale_rows(const Rows<F>& tile, int64_t rows, const Weights<F>& weights, const F* modulations, F* o) {
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

template <class G, class F>
struct Convolution {
  Tile<G, F> tile;
  Buffer<F> o;
};

template <class G, class F>
Status convolve(const Problem<G, F>& problem, const Weights<F>& weights, F* out, int threads) {
  const bool dense = !weights.depthwise;
  Panels<F> panels;
  if (dense && !panels.pack(weights.data, weights.num_kernels, weights.c_in, weights.c_out, weights.groups,
                            problem.backward, threads))
    return Status::out_of_memory;
  const int64_t columns = problem.backward ? weights.c_in : weights.c_out, group_columns = columns / weights.groups;
  const int64_t o_row = dense ? weights.groups * panels.padded_columns() : columns;
  const int64_t tile_rows = rows_of_tile<F>(problem.num_kernels * problem.channels, o_row);
  const auto reserve = [&](Convolution<G, F>& own) {
    return own.tile.reserve(problem, tile_rows) && own.o.resize((tile_rows + 1) * o_row);
  };
  return over_tiles<Convolution<G, F>>(
      problem.num_queries, tile_rows, threads_of_pass(problem, weights, threads), reserve,
      [&](Convolution<G, F>& own, int64_t, int64_t first, int64_t rows) {
        const F* const o = own.o.data();
        own.tile.fill(problem, first, rows);
        if (!dense) {
          scale_rows(own.tile.rows(), rows, weights, modulations_at(problem, weights, first), own.o.data());
          memcpy(out + first * columns, o, size_t(rows * columns) * sizeof(F));
          return;
        }
        multiply(own.tile.rows(), tile_rows, panels, problem.num_kernels, own.o.data());
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t g = 0; g < weights.groups; ++g)
            memcpy(out + (first + r) * columns + g * group_columns, o + r * o_row + g * panels.padded_columns(),
                   size_t(group_columns) * sizeof(F));
      });
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

}  // namespace

Status kpconv(const KPConv& args) {
  return with_problem(args, [&](const auto& problem, const auto& weights) {
    using F = std::decay_t<decltype(*weights.data)>;
    using G = std::decay_t<decltype(*problem.points)>;
    return convolve<G, F>(problem, weights, into<F>(args.out), args.threads);
  });
}

Status kpconv_grad_features(const KPConv& args) {
  return with_problem(args, [&](auto problem, const auto& weights) {
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
    problem.features = as<F>(args.grad_out);
    problem.channels = args.grad_out.cols;
    return convolve<G, F>(problem, weights, into<F>(args.grad_features), args.threads);
  });
}

}  // namespace KP_ISA
}  // namespace kp
