// Shared by the kernels of KPConv: converts the arguments of a call to typed structs, and divides queries into tiles
// that threads work on.
#pragma once

#include <math.h>

#include "tile.h"

namespace kp {
namespace {

// The modulations from query `first` on if they scale the tile's sums, else null.
template <class G, class F>
const F* modulations_at(const KPConvPass<G, F>& pass, const Weights<F>& weights, int64_t first) {
  if (!weights.modulations || pass.backward) return nullptr;
  return weights.modulations + first * weights.num_kernels * weights.factors;
}

// Columns of the sums that a tile keeps for each query: with kernel offsets also the mixed sums.
template <class G, class F>
int64_t columns_of_sums(const KPConvPass<G, F>& pass) {
  return pass.num_kernels * pass.channels * (pass.mixes_sums() ? 2 : 1);
}

// Threads worth starting for a pass: finding a pair costs as much as some 256 multiply-adds.
template <class G, class F>
int threads_of_pass(const KPConvPass<G, F>& pass, const Weights<F>& weights, int threads) {
  const int64_t products = weights.depthwise ? weights.c_out : weights.c_in * weights.c_out / weights.groups;
  return useful_threads(threads, pass.row_splits[pass.num_queries] * (256 + products), 1 << 19);
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

// The kernel points of a Resampling, (D, K padded).
template <class G>
bool pad_kernel_points(const Array& kernel_points, Buffer<G>& to) {
  const int64_t K = kernel_points.rows, D = kernel_points.cols, padded = round_up(K, lanes<G>);
  if (!to.resize(D * padded)) return false;
  for (int64_t k = 0; k < padded; ++k)
    for (int64_t a = 0; a < D; ++a) to[a * padded + k] = k < K ? as<G>(kernel_points)[k * D + a] : G(NAN);
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
KPConvPass<G, F> forward_pass(const KPConv& args, const Buffer<G>& kernel_points, const Buffer<G>& padded,
                              const Buffer<F>& scale) {
  return {{as<G>(args.points), as<G>(args.queries), int(args.points.cols), as<int32_t>(args.index),
           as<int64_t>(args.row_splits), args.queries.rows, kernel_points.data(), int(args.kernel_points.rows),
           G(args.extent), args.influence, args.aggregation, as<G>(args.offsets), nullptr},
          as<F>(args.features),
          args.features.cols,
          scale.data(),
          nullptr,
          as<F>(args.modulations),
          args.factors,
          false,
          {padded.data(), as<G>(args.kernel_offsets), int(args.points.cols), int(args.kernel_points.rows),
           G(args.kernel_extent)}};
}

// Calls call(forward pass, weights).
template <class Call>
Status with_forward_pass(const KPConv& args, Call call) {
  return with_types(args, [&](auto g, auto f) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points, padded;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (args.kernel_offsets.data && !pad_kernel_points(args.kernel_points, padded)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return call(forward_pass(args, kernel_points, padded, scale), weights_of<F>(args));
  });
}

}  // namespace
}  // namespace kp
