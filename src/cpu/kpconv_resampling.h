// KPConv with kernel offsets: the weights of each query are resampled around the kernel points,
//
//   w_k(q) = sum over j of share(k, j) W_j   with   share(k, j) = max(0, 1 - |p_k + offset_qk - p_j| / extent),
//
// where p_k and p_j are the same kernel points. With an extent of about the distance between neighboring kernel points
// two or three of the shares of a kernel point are above zero. They are computed where they are needed: an array of all
// shares, (M, K, K), would have 225 numbers for each query of a kernel with 15 points.
//
// The output is the sum over j of A'_j W_j with the mixed sums A'_j = sum over k of share(k, j) A_k, and the gradient
// of A_k is the sum over j of share(k, j) P_j with P_j = grad W_j^T. So rows of a tile are mixed, not pairs. Only the
// gradient of the features gathers from queries that have shares of their own, and mixes pairs (tile.h).
#pragma once

#include <math.h>

#include "kernels.h"
#include "formulas/kpconv.h"
#include "formulas/neighbors.h"
#include "tile_products.h"

namespace kp {
namespace {

template <class G>
struct Resampling {
  const G* kernel_points;  // (D, K padded with NaN to whole vectors)
  const G* offsets;        // (the operator's queries, K, D), or null: the weights are used as they are
  int dimension, num_kernels;
  G extent;

  int64_t padded() const { return round_up(num_kernels, lanes<G>); }

  // The rows of the neighbors of a query are anywhere in `offsets`.
  void prefetch(int64_t q) const {
    const int64_t row = int64_t(num_kernels) * dimension;
    for (int64_t i = 0; i < row; i += 64 / int64_t(sizeof(G))) __builtin_prefetch(offsets + q * row + i);
  }

  // p_k + offset_qk - p_j along an axis.
  KP_INLINE G difference(int64_t q, int64_t k, int64_t j, int axis) const {
    return place(q, k, axis) - kernel_points[axis * padded() + j];
  }
  KP_INLINE G place(int64_t q, int64_t k, int axis) const {
    return kernel_points[axis * padded() + k] + offsets[(q * num_kernels + k) * dimension + axis];
  }

  // Calls use(j, vector of share(k, j), share(k, j + 1), ..., their squared distances) for j = 0, lanes, 2 lanes, ...
  template <class Use>
  KP_INLINE void for_each_vector(int64_t q, int64_t k, Use use) const {
    const auto call = [&](auto dim) {
      constexpr int DIM = decltype(dim)::value, stored = DIM ? DIM : max_dimension;
      const int D = DIM ? DIM : dimension;
      const Vec<G> inverse_extent = broadcast(1 / extent);
      Vec<G> places[stored], d[stored];
      for (int a = 0; a < D; ++a) places[a] = broadcast(place(q, k, a));
      for (int64_t j = 0; j < padded(); j += lanes<G>) {
        for (int a = 0; a < D; ++a) d[a] = places[a] - load(kernel_points + a * padded() + j);
        const Vec<G> squares = squared_distance(d, D);
        use(j, linear_influence(squares, inverse_extent), squares);  // 0 for the padding
      }
    };
    if (dimension == 3)
      call(std::integral_constant<int, 3>());
    else
      call(std::integral_constant<int, 0>());
  }

  // Calls use(j, share(k, j), squared distance) for every share above zero, in the order of j.
  template <class Use>
  KP_INLINE void for_each_share(int64_t q, int64_t k, Use use) const {
    for_each_vector(q, k, [&](int64_t first, Vec<G> vector, Vec<G> squares) {
      unsigned mask = mask_lt(Vec<G>{}, vector);
      if (!mask) return;
      G shares[lanes<G>], d2[lanes<G>];
      store(shares, vector);
      store(d2, squares);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        use(first + lane, shares[lane], d2[lane]);
      }
    });
  }
};

// to = share * from, or to += share * from
template <class F>
KP_INLINE void add_share(const F* from, F share, int64_t channels, bool is_new, F* to) {
  const Vec<F> factor = broadcast(share);
  int64_t c = 0;
  for (; c + lanes<F> <= channels; c += lanes<F>)
    store(to + c, fma(factor, load(from + c), is_new ? Vec<F>{} : load(to + c)));
  if (const int rest = int(channels - c))
    store_first(to + c, rest, fma(factor, load_first(from + c, rest), is_new ? Vec<F>{} : load_first(to + c, rest)));
}

template <class F>
KP_INLINE F dot_product(const F* a, const F* b, int64_t channels) {
  Vec<F> sum = {};
  int64_t c = 0;
  for (; c + lanes<F> <= channels; c += lanes<F>) sum = fma(load(a + c), load(b + c), sum);
  if (const int rest = int(channels - c)) sum = fma(load_first(a + c, rest), load_first(b + c, rest), sum);
  return sum_of_lanes<F>(sum);
}

// One thread's mixed sums A'_j of a tile.
template <class F>
class MixedSums {
 public:
  // `rows`: a multiple of row_step.
  bool reserve(int64_t num_kernels, int64_t channels, int64_t rows) {
    rows_ = rows;
    channels_ = channels;
    if (!sums_.resize(num_kernels * stride() + row_step) || !query_.resize(num_kernels * rows) ||
        !size_.resize(num_kernels) || !next_.resize(num_kernels))
      return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, but drops their products.
    memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(F));
    return true;
  }

  // Mixes the sums of `count` queries from `first` on.
  template <class G>
  KP_OUTLINE void mix(const Resampling<G>& resampling, const TileSums<F>& tile, int64_t first, int64_t count) {
    const Resampling<G> shares = resampling;  // a copy, which no store can change: it stays in registers
    const int64_t K = shares.num_kernels, channels = channels_, max_rows = rows_, kernel_stride = stride();
    F* const sums = sums_.data();
    int32_t *const all_queries = query_.data(), *const size = size_.data(), *const next = next_.data();
    for (int64_t k = 0; k < K; ++k) size[k] = next[k] = 0;
    for (int32_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < K; ++k) {
        if (next[k] == tile.size(k) || tile.queries(k)[next[k]] != r) continue;
        const F* const from = tile.a(k) + next[k]++ * channels;
        shares.for_each_share(first + r, k, [&](int64_t j, G share, G) {
          int32_t* const queries = all_queries + j * max_rows;
          const bool is_new = !size[j] || queries[size[j] - 1] != r;
          const int64_t row = size[j] - !is_new;
          queries[row] = r;
          size[j] = int32_t(row + 1);
          add_share(from, F(share), channels, is_new, sums + j * kernel_stride + row * channels);
        });
      }
  }

  TileSums<F> rows() const { return {sums_.data(), query_.data(), size_.data(), rows_, stride()}; }

 private:
  // An odd number of rows, so that those of one query are spread over the first-level cache.
  int64_t stride() const { return (rows_ + 1) * channels_; }

  Buffer<F> sums_;
  Buffer<int32_t> query_, size_, next_;  // next_: the next row of each kernel point of the tile
  int64_t rows_ = 0, channels_ = 0;
};

}  // namespace
}  // namespace kp
