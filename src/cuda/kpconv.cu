// KPConv on the GPU: a warp for each query sums features by kernel point; cuBLAS multiplies the sums by the weights.
//
// The sums (groups, rows, K, channels of a group) of some thousand queries are computed at a time and stay in the
// second-level cache: no array over all queries and kernel points is allocated.
//
//    1. Each lane takes one neighbor and computes the influence of kernel point k on it.
//    2. All lanes sum the features of the neighbors with an influence, each lane its channels, in the order of the
//    list.
//
// These steps are repeated for every kernel point k. The order of the sums is fixed, so results do not depend on the
// launch. Features of 16 bits are summed in float and rounded once per 256 neighbors. The gradient of the features is
// the same sum over the transposed list with negated kernel points.
//
// With kernel offsets the weights of each query are resampled (src/cpu/kpconv_resampling.h): the sums are mixed before
// they are multiplied by the weights, and products with the weights before gradients of positions are computed from
// them. In the gradient of the features, every neighbor has its own shares, and weights of pairs are mixed.
//
// Compiled for the types of geometry and features and the dimension (3 stands for all dimensions):
// compile: KP_G=float KP_F=float KP_DIM=3
// compile: KP_G=float KP_F=kp::Half KP_DIM=3
// compile: KP_G=float KP_F=kp::Bfloat KP_DIM=3
// compile: KP_G=double KP_F=double KP_DIM=3

#include "formulas/kpconv.h"
#include "launch.h"
#include "formulas/neighbors.h"
#include "storage.h"

namespace kp {
namespace {

using G = KP_G;
using S = KP_F;
using F = Real<S>;
constexpr int D = KP_DIM;
constexpr int channels_per_lane = 4;     // sums that a lane keeps in registers
constexpr int neighbors_per_part = 256;  // long lists are processed in parts: shared memory holds a choice per neighbor
constexpr int max_warps = 4;             // warps per block

// Which index selects the offsets, modulations or scale: the query in the forward pass, the gathered neighbor in the
// transposed pass, none if absent.
enum ParameterOwner : int { none, query, neighbor };
// Which kernel points may act on a neighbor: one of them (its number >= 0), all, or none.
enum Choice : int { all_kernel_points = -1, no_kernel_point = -2 };

struct Kernel {
  const G* points;   // (K, D)
  const G* offsets;  // (queries or neighbors, K, D)
  int num, offsets_owner;
  G sign;  // -1 where the list is transposed
  G extent, inverse_extent, scale;
  Influence influence;
  Aggregation aggregation;

  // The squared distance of neighbor i of query q, at `relative`, from kernel point k.
  __device__ G squared(const G* relative, int64_t q, int64_t i, int64_t k) const {
    G d[D];
    for (int a = 0; a < D; ++a) {
      G p = points[k * D + a];
      if (offsets_owner) p = p + offsets[((offsets_owner == query ? q : i) * num + k) * D + a];
      d[a] = relative[a] - sign * p;
    }
    return squared_distance(d, D);
  }
  // Whether choice() may be other than all_kernel_points.
  __device__ bool has_choices() const { return aggregation == Aggregation::closest || offsets_owner; }
  __device__ int choice(const G* relative, int64_t q, int64_t i) const {
    if (!has_choices()) return all_kernel_points;
    int nearest = 0;
    G least = squared(relative, q, i, 0);
    for (int k = 1; k < num; ++k) {
      const G d2 = squared(relative, q, i, k);
      if (d2 < least) {
        least = d2;
        nearest = k;
      }
    }
    if (offsets_owner && !(least < extent * extent)) return no_kernel_point;
    return aggregation == Aggregation::closest ? nearest : int(all_kernel_points);
  }
  __device__ G weight(G d2) const {
    if (influence == Influence::linear) return d2 < extent * extent ? linear_influence(d2, inverse_extent) : G(0);
    return influence == Influence::gaussian ? exp(scale * d2) : G(1);
  }
};

// The shares of W_j in the weights of kernel point k of query q.
struct Resampling {
  const G* points;   // (K, D)
  const G* offsets;  // (queries, K, D)
  int num;
  G extent;

  __device__ G difference(int64_t q, int64_t k, int64_t j, int a) const {
    return points[k * D + a] + offsets[(q * num + k) * D + a] - points[j * D + a];
  }
  __device__ G squared(int64_t q, int64_t k, int64_t j) const {
    G d[D];
    for (int a = 0; a < D; ++a) d[a] = difference(q, k, j, a);
    return squared_distance(d, D);
  }
  __device__ G share(int64_t q, int64_t k, int64_t j) const {
    const G d2 = squared(q, k, j);
    return d2 < extent * extent ? linear_influence(d2, 1 / extent) : G(0);
  }
};

// The weight of a pair: its influence, if the kernel point may act on the neighbor, times its modulation.
struct PairWeight {
  const Kernel& kernel;
  const S* modulations;
  int modulations_owner, factors;

  __device__ F operator()(const G* relative, int64_t q, int64_t i, int64_t k, int choice) const {
    if (choice != all_kernel_points && choice != k) return F(0);
    F weight = F(kernel.weight(kernel.squared(relative, q, i, k)));
    if (modulations_owner && factors == 1)
      weight *= F(modulations[(modulations_owner == query ? q : i) * kernel.num + k]);
    return weight;
  }
};

// sums[g, r, k, c] of the queries [first, first + rows): the features of their neighbors, times the weight of kernel
// point k, weigh(relative position, q, i, k, choice), and the scale
template <class Weigh>
__device__ void sum_features(const Kernel& kernel, const G* points, const G* queries, const int32_t* index,
                             const int64_t* row_splits, const S* features, int channels, const S* modulations,
                             int modulations_owner, int factors, const F* scale, int scale_owner, int groups,
                             int64_t first, int64_t rows, S* sums, Weigh weigh) {
  __shared__ int32_t choices[max_warps * neighbors_per_part];
  const int lane = lane_number(), width = channels / groups;
  int32_t* const choice_of = choices + int(threadIdx.x) / warp * neighbors_per_part;
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t q = first + r, begin = row_splits[q], end = row_splits[q + 1];
    const auto at = [=](int k, int c) { return sums + ((c / width * rows + r) * kernel.num + k) * width + c % width; };
    // The lane's current neighbor. With up to 32 neighbors it is loaded only once.
    int64_t loaded = -1;
    int32_t i = 0;
    G relative[D];
    const auto load = [&](int64_t e) {
      if (e == loaded) return;
      loaded = e;
      i = e < end ? index[e] : 0;
      for (int a = 0; a < D; ++a) relative[a] = e < end ? points[int64_t(i) * D + a] - queries[q * D + a] : G(0);
    };
    int64_t part = begin;
    do {  // an empty list also writes its zero sums
      const int64_t stop = end - part < neighbors_per_part ? end : part + neighbors_per_part;
      for (int64_t e = part + lane; kernel.has_choices() && e < stop; e += warp) {
        load(e);
        choice_of[e - part] = kernel.choice(relative, q, i);
      }
      __syncwarp();
      for (int k = 0; k < kernel.num; ++k)
        for (int from = 0; from < channels; from += warp * channels_per_lane) {
          F sum[channels_per_lane];
          for (int j = 0; j < channels_per_lane; ++j) {
            const int c = from + j * warp + lane;
            sum[j] = c < channels && part != begin ? F(*at(k, c)) : F(0);
          }
          for (int64_t batch = part; batch < stop; batch += warp) {
            load(batch + lane);
            const int choice = batch + lane >= stop   ? int(no_kernel_point)
                               : kernel.has_choices() ? choice_of[batch + lane - part]
                                                      : int(all_kernel_points);
            F weight = weigh(relative, q, i, k, choice);
            if (scale_owner && weight != F(0)) weight *= scale[scale_owner == query ? q : int64_t(i)];
            for (unsigned rest = __ballot_sync(all_lanes, weight != F(0)); rest; rest &= rest - 1) {
              const int source = __ffs(int(rest)) - 1;
              const F w = __shfl_sync(all_lanes, weight, source);
              const int64_t point = __shfl_sync(all_lanes, i, source);
              const S* const row = features + point * channels;
              const S* const row_factors = modulations + (point * kernel.num + k) * factors;
              for (int j = 0; j < channels_per_lane; ++j) {
                const int c = from + j * warp + lane;
                // Several factors of a neighbor each scale some channels here; factors of queries scale the sums later.
                if (c < channels)
                  sum[j] += modulations_owner == neighbor && factors > 1
                                ? w * F(row_factors[int64_t(c) * factors / channels]) * F(row[c])
                                : w * F(row[c]);
              }
            }
          }
          for (int j = 0; j < channels_per_lane; ++j) {
            const int c = from + j * warp + lane;
            if (c < channels) *at(k, c) = S(sum[j]);
          }
        }
      __syncwarp();
      part += neighbors_per_part;
    } while (part < end);
  }
}

}  // namespace
}  // namespace kp

using namespace kp;

// sums[g, r, k, c] of the queries [first, first + rows): the features of their neighbors, weighted by kernel point k
extern "C" __global__ void aggregate(const G* points, const G* queries, const int32_t* index, const int64_t* row_splits,
                                     const S* features, int channels, const G* kernel_points, int num_kernels,
                                     const G* offsets, int offsets_owner, const S* modulations, int modulations_owner,
                                     int factors, const F* scale, int scale_owner, G sign, G extent,
                                     Influence influence, Aggregation aggregation, int groups, int64_t first,
                                     int64_t rows, S* sums) {
  const Kernel kernel{kernel_points,          offsets,   num_kernels, offsets_owner, sign, extent, 1 / extent,
                      gaussian_scale(extent), influence, aggregation};
  sum_features(kernel, points, queries, index, row_splits, features, channels, modulations, modulations_owner, factors,
               scale, scale_owner, groups, first, rows, sums,
               PairWeight{kernel, modulations, modulations_owner, factors});
}

// The same over the transposed list with the kernel offsets of each neighbor: in the place of kernel point j, the sum
// over k of share(k, j) times the weight of the pair with kernel point k.
extern "C" __global__ void aggregate_mixed(const G* points, const G* queries, const int32_t* index,
                                           const int64_t* row_splits, const S* features, int channels,
                                           const G* kernel_points, int num_kernels, const G* offsets, int offsets_owner,
                                           const S* modulations, int modulations_owner, int factors, const F* scale,
                                           int scale_owner, G sign, G extent, Influence influence,
                                           Aggregation aggregation, const G* kernel_offsets, G kernel_extent,
                                           int groups, int64_t first, int64_t rows, S* sums) {
  const Kernel kernel{kernel_points,          offsets,   num_kernels, offsets_owner, sign, extent, 1 / extent,
                      gaussian_scale(extent), influence, aggregation};
  const Resampling resampling{kernel_points, kernel_offsets, num_kernels, kernel_extent};
  const PairWeight weight_of{kernel, modulations, modulations_owner, factors};
  const auto weigh = [&](const G* relative, int64_t q, int64_t i, int64_t j, int choice) {
    F sum = F(0);
    for (int64_t k = 0; choice != no_kernel_point && k < num_kernels; ++k) {
      const F weight = weight_of(relative, q, i, k, choice);
      if (weight != F(0)) sum += F(resampling.share(i, k, j)) * weight;
    }
    return sum;
  };
  sum_features(kernel, points, queries, index, row_splits, features, channels, modulations, modulations_owner, factors,
               scale, scale_owner, groups, first, rows, sums, weigh);
}

// mixed[g, r, j, c] = the sum over k of share(k, j) sums[g, r, k, c]; if `transposed`, of share(j, k)
extern "C" __global__ void mix(const S* sums, const G* kernel_points, int num_kernels, const G* kernel_offsets,
                               G kernel_extent, int groups, int channels, int transposed, int64_t first, int64_t rows,
                               S* mixed) {
  const Resampling resampling{kernel_points, kernel_offsets, num_kernels, kernel_extent};
  const int lane = lane_number(), width = channels / groups;
  for (int64_t w = first_warp(); w < rows * num_kernels; w += num_warps()) {
    const int64_t r = w / num_kernels, j = w % num_kernels, q = first + r;
    const auto at = [=](int64_t k, int c) { return ((c / width * rows + r) * num_kernels + k) * width + c % width; };
    for (int from = 0; from < channels; from += warp * channels_per_lane) {
      F sum[channels_per_lane] = {};
      for (int batch = 0; batch < num_kernels; batch += warp) {
        const int64_t k = batch + lane;
        F share = F(0);
        if (k < num_kernels) share = F(transposed ? resampling.share(q, j, k) : resampling.share(q, k, j));
        for (unsigned rest = __ballot_sync(all_lanes, share != F(0)); rest; rest &= rest - 1) {
          const int source = __ffs(int(rest)) - 1;
          const F factor = __shfl_sync(all_lanes, share, source);
          for (int i = 0; i < channels_per_lane; ++i) {
            const int c = from + i * warp + lane;
            if (c < channels) sum[i] += factor * F(sums[at(batch + source, c)]);
          }
        }
      }
      for (int i = 0; i < channels_per_lane; ++i) {
        const int c = from + i * warp + lane;
        if (c < channels) mixed[at(j, c)] = S(sum[i]);
      }
    }
  }
}

// Gradients through the shares, from sums and products = grad_out W_j^T, both (groups, rows, K, width): that of
// share(k, j) is the product of the rows k and j. Writes grad_kernel_offsets (M, K, D), and place_grads (M, K, D), the
// gradient of the kernel points at each query.
extern "C" __global__ void share_grads(const S* sums, const S* products, const G* kernel_points, int num_kernels,
                                       const G* kernel_offsets, G kernel_extent, int groups, int channels,
                                       int64_t first, int64_t rows, G* grad_kernel_offsets, G* place_grads) {
  const Resampling resampling{kernel_points, kernel_offsets, num_kernels, kernel_extent};
  const int lane = lane_number(), width = channels / groups;
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t q = first + r;
    const auto at = [=](int64_t k, int c) { return ((c / width * rows + r) * num_kernels + k) * width + c % width; };
    for (int64_t i = lane; i < int64_t(num_kernels) * D; i += warp) place_grads[q * num_kernels * D + i] = G(0);
    for (int64_t k = 0; k < num_kernels; ++k) {
      G grad_offset[D] = {};
      __syncwarp();
      for (int64_t batch = 0; batch < num_kernels; batch += warp) {
        const int64_t j = batch + lane;
        const G d2 = j < num_kernels ? resampling.squared(q, k, j) : G(0);
        const bool has_share = j < num_kernels && d2 < kernel_extent * kernel_extent;
        F share_grad = F(0);
        for (unsigned rest = __ballot_sync(all_lanes, has_share); rest; rest &= rest - 1) {
          const int source = __ffs(int(rest)) - 1;
          F product = F(0);
          for (int c = lane; c < channels; c += warp) product += sums[at(k, c)] * products[at(batch + source, c)];
          for (int bit = warp / 2; bit; bit /= 2) product += __shfl_xor_sync(all_lanes, product, bit);
          if (lane == source) share_grad = product;
        }
        const G slope = has_share ? G(share_grad) * linear_slope(d2, 1 / kernel_extent) : G(0);
        for (int a = 0; a < D; ++a) {
          G part = has_share ? slope * resampling.difference(q, k, j, a) : G(0);
          if (has_share) place_grads[(q * num_kernels + j) * D + a] -= part;
          for (int bit = warp / 2; bit; bit /= 2) part += __shfl_xor_sync(all_lanes, part, bit);
          grad_offset[a] += part;
        }
      }
      __syncwarp();
      for (int a = 0; lane == 0 && a < D; ++a) {
        grad_kernel_offsets[(q * num_kernels + k) * D + a] = grad_offset[a];
        place_grads[(q * num_kernels + k) * D + a] += grad_offset[a];
      }
    }
  }
}

// positive[i] = whether feature row i sums to more than zero, in float64 and eight interleaved sums, as on the CPU
extern "C" __global__ void find_positive(const S* features, int64_t num_points, int channels, int32_t* positive) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    double sums[8] = {};
    for (int c = 0; c < channels; ++c) sums[c % 8] += double(features[i * channels + c]);
    positive[i] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) > 0;
  }
}

// scale[q] = 1 / max(1, number of neighbors), of the positive ones alone where `positive` is not null
extern "C" __global__ void normalize(const int32_t* index, const int64_t* row_splits, int64_t num_queries,
                                     const int32_t* positive, F* scale) {
  for (int64_t q = first_thread(); q < num_queries; q += num_threads()) {
    int64_t count = row_splits[q + 1] - row_splits[q];
    if (positive) {
      count = 0;
      for (int64_t e = row_splits[q]; e < row_splits[q + 1]; ++e) count += positive[index[e]];
    }
    scale[q] = F(1) / F(count > 1 ? count : 1);
  }
}

// Depthwise: out[q, c] = the sum over k of sums * weights, times the factors of (q, k) if there are several.
extern "C" __global__ void scale_sums(const S* sums, int64_t first, int64_t rows, int num_kernels, int channels,
                                      const S* weights, const S* modulations, int factors, S* out) {
  for (int64_t i = first_thread(); i < rows * channels; i += num_threads()) {
    const int64_t r = i / channels, c = i % channels;
    F sum = F(0);
    for (int64_t k = 0; k < num_kernels; ++k) {
      const F product = sums[(r * num_kernels + k) * channels + c] * weights[k * channels + c];
      sum += factors > 1 ? product * modulations[((first + r) * num_kernels + k) * factors + c * factors / channels]
                         : product;
    }
    out[(first + r) * channels + c] = S(sum);
  }
}

// Depthwise: products[r, k, c] = sums * grad_out, times the factors of (q, k) if there are several. Their sum over r is
// the gradient of the weights.
extern "C" __global__ void weights_products(const S* sums, int64_t first, int64_t rows, int num_kernels, int channels,
                                            const S* grad_out, const S* modulations, int factors, S* products) {
  for (int64_t i = first_thread(); i < rows * num_kernels * channels; i += num_threads()) {
    const int64_t q = first + i / channels / num_kernels, k = i / channels % num_kernels, c = i % channels;
    const F product = sums[i] * grad_out[q * channels + c];
    products[i] =
        S(factors > 1 ? product * modulations[(q * num_kernels + k) * factors + c * factors / channels] : product);
  }
}

// grad_modulations[q, k, f] = the sum of sums * weights * grad_out over the channels of factor f
extern "C" __global__ void factors_grad(const S* sums, int64_t first, int64_t rows, int num_kernels, int channels,
                                        const S* weights, const S* grad_out, int factors, S* grad_modulations) {
  const int width = channels / factors;
  for (int64_t i = first_thread(); i < rows * num_kernels * factors; i += num_threads()) {
    const int64_t r = i / factors / num_kernels, k = i / factors % num_kernels, f = i % factors;
    F sum = F(0);
    for (int64_t c = f * width; c < (f + 1) * width; ++c)
      sum +=
          sums[(r * num_kernels + k) * channels + c] * weights[k * channels + c] * grad_out[(first + r) * channels + c];
    grad_modulations[first * num_kernels * factors + i] = S(sum);
  }
}

// Depthwise: products[r, k, c] = grad_out * weights
extern "C" __global__ void grad_products(int64_t first, int64_t rows, int num_kernels, int channels, const S* weights,
                                         const S* grad_out, S* products) {
  for (int64_t i = first_thread(); i < rows * num_kernels * channels; i += num_threads()) {
    const int64_t r = i / channels / num_kernels, k = i / channels % num_kernels, c = i % channels;
    products[i] = S(weights[k * channels + c] * grad_out[(first + r) * channels + c]);
  }
}

// Gradients of positions, offsets and modulations for queries [first, first + rows), from products (groups, rows, K,
// width) = grad_out W_k^T. Writes pair_grads (E, D), the gradient of each pair's point; grad_queries (M, D);
// grad_offsets (M, K, D); grad_modulations (M, K).
extern "C" __global__ void position_grads(const G* points, const G* queries, const int32_t* index,
                                          const int64_t* row_splits, const S* features, int channels,
                                          const G* kernel_points, int num_kernels, const G* offsets, int offsets_owner,
                                          const S* modulations, int modulations_owner, const F* scale, int scale_owner,
                                          G extent, Influence influence, Aggregation aggregation, int groups,
                                          int64_t first, int64_t rows, const S* products, G* pair_grads,
                                          G* grad_queries, G* grad_offsets, F* grad_modulations) {
  const Kernel kernel{kernel_points,          offsets,   num_kernels, offsets_owner, G(1), extent, 1 / extent,
                      gaussian_scale(extent), influence, aggregation};
  const int lane = lane_number(), width = channels / groups;
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t q = first + r, begin = row_splits[q], end = row_splits[q + 1];
    G grad_query[D] = {};
    for (int64_t i = lane; i < int64_t(num_kernels) * D; i += warp) grad_offsets[q * num_kernels * D + i] = G(0);
    for (int64_t k = lane; k < num_kernels; k += warp) grad_modulations[q * num_kernels + k] = F(0);
    __syncwarp();
    for (int64_t batch = begin; batch < end; batch += warp) {
      const bool is_pair = batch + lane < end;
      const int32_t i = is_pair ? index[batch + lane] : 0;
      G relative[D], grad_point[D] = {};
      for (int a = 0; a < D; ++a) relative[a] = is_pair ? points[int64_t(i) * D + a] - queries[q * D + a] : G(0);
      const int choice = is_pair ? kernel.choice(relative, q, i) : int(no_kernel_point);
      for (int64_t k = 0; k < num_kernels; ++k) {
        const bool may_act = choice == all_kernel_points || choice == k;
        const G d2 = may_act ? kernel.squared(relative, q, i, k) : G(0);
        const bool acts = may_act && !(influence == Influence::linear && !(d2 < extent * extent));
        const unsigned acting = __ballot_sync(all_lanes, acts);
        if (!acting) continue;
        F weight_grad = F(0);  // gradient of the pair's weight: f_i . (grad W_k^T)
        for (unsigned rest = acting; rest; rest &= rest - 1) {
          const int source = __ffs(int(rest)) - 1;
          const S* const row = features + int64_t(__shfl_sync(all_lanes, i, source)) * channels;
          F product = F(0);
          for (int c = lane; c < channels; c += warp)
            product += row[c] * products[((c / width * rows + r) * num_kernels + k) * width + c % width];
          for (int bit = warp / 2; bit; bit /= 2) product += __shfl_xor_sync(all_lanes, product, bit);
          if (lane == source) weight_grad = product;
        }
        if (scale_owner) weight_grad *= scale[q];
        F grad_modulation = acts ? F(kernel.weight(d2)) * weight_grad : F(0);
        if (modulations_owner) weight_grad *= modulations[q * num_kernels + k];
        G slope = G(0);
        if (acts && influence == Influence::linear) slope = linear_slope(d2, kernel.inverse_extent);
        if (acts && influence == Influence::gaussian) slope = 2 * kernel.scale * kernel.weight(d2);
        G difference_grad[D];
        for (int a = 0; a < D; ++a) {
          G p = kernel_points[k * D + a];
          if (offsets_owner) p = p + offsets[(q * num_kernels + k) * D + a];
          difference_grad[a] = G(weight_grad) * slope * (relative[a] - p);
          grad_point[a] += difference_grad[a];
        }
        for (int bit = warp / 2; bit; bit /= 2) {
          grad_modulation += __shfl_xor_sync(all_lanes, grad_modulation, bit);
          for (int a = 0; a < D; ++a) difference_grad[a] += __shfl_xor_sync(all_lanes, difference_grad[a], bit);
        }
        if (lane == 0) {
          grad_modulations[q * num_kernels + k] += grad_modulation;
          for (int a = 0; a < D; ++a) grad_offsets[(q * num_kernels + k) * D + a] -= difference_grad[a];
        }
      }
      for (int a = 0; a < D; ++a) {
        if (is_pair) pair_grads[(batch + lane) * D + a] = grad_point[a];
        grad_query[a] -= grad_point[a];
      }
    }
    for (int a = 0; a < D; ++a) {
      for (int bit = warp / 2; bit; bit /= 2) grad_query[a] += __shfl_xor_sync(all_lanes, grad_query[a], bit);
      if (lane == 0) grad_queries[q * D + a] = grad_query[a];
    }
  }
}
