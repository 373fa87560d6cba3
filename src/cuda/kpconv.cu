// KPConv on the GPU: features summed by kernel point, a warp for each query; the products with the weights are
// cuBLAS's.
//
// The sums (groups, rows, K, channels of a group) are those of some thousand queries at a time and stay in the
// second-level cache: nothing of all queries times kernel points is ever made.
//
// Each lane looks at a neighbor: which kernel points act on it. Then, kernel point by kernel point, all lanes sum the
// features of those it acts on, each some channels, in the order of the list: results do not depend on the launch. What
// is stored in 16 bits is summed in float, and rounded once for each 256 neighbors. The gradient of the features is
// the same on the transposed list with mirrored kernel points.
//
// Compiled for the types of geometry and features and the dimension, of which 3 stands for the others:
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
constexpr int at_once = 4;     // channels of a lane in registers
constexpr int kept = 256;      // choices of so many neighbors of a query are kept at a time
constexpr int most_warps = 4;  // of a block

enum Influence : int { linear, gaussian, constant };
enum Aggregation : int { sum, closest };
// What offsets, modulations and scales belong to: the query that sums or, on a transposed list, the neighbor gathered.
enum ParameterOwner : int { none, query, neighbor };

struct Kernel {
  const G* points;   // (K, D)
  const G* offsets;  // (queries or neighbors, K, D)
  int num, offsets_owner;
  G sign;  // -1 where the list is transposed
  G extent, inverse_extent, scale;
  int influence, aggregation;

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
  // Whether not all kernel points may act on all neighbors.
  __device__ bool chooses() const { return aggregation == closest || offsets_owner; }
  // Which may act on a neighbor: all (-1), none (-2), or one.
  __device__ int choice(const G* relative, int64_t q, int64_t i) const {
    if (!chooses()) return -1;
    int nearest = 0;
    G least = squared(relative, q, i, 0);
    for (int k = 1; k < num; ++k) {
      const G d2 = squared(relative, q, i, k);
      if (d2 < least) {
        least = d2;
        nearest = k;
      }
    }
    if (offsets_owner && !(least < extent * extent)) return -2;
    return aggregation == closest ? nearest : -1;
  }
  __device__ G weight(G d2) const {
    if (influence == linear) return d2 < extent * extent ? linear_influence(d2, inverse_extent) : G(0);
    return influence == gaussian ? exp(scale * d2) : G(1);
  }
};

}  // namespace
}  // namespace kp

using namespace kp;

// sums[g, r, k, c] of the queries [first, first + rows): the features of their neighbors, weighted by kernel point k
extern "C" __global__ void aggregate(const G* points, const G* queries, const int32_t* index, const int64_t* row_splits,
                                     const S* features, int channels, const G* kernel_points, int num_kernels,
                                     const G* offsets, int offsets_owner, const S* modulations, int modulations_owner,
                                     int factors, const F* scale, int scale_owner, G sign, G extent, int influence,
                                     int aggregation, int groups, int64_t first, int64_t rows, S* sums) {
  __shared__ int32_t choices[most_warps * kept];
  const Kernel kernel{kernel_points,          offsets,   num_kernels, offsets_owner, sign, extent, 1 / extent,
                      gaussian_scale(extent), influence, aggregation};
  const int lane = lane_number(), width = channels / groups;
  int32_t* const choice_of = choices + int(threadIdx.x) / warp * kept;
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t q = first + r, begin = row_splits[q], end = row_splits[q + 1];
    const auto at = [=](int k, int c) { return sums + ((c / width * rows + r) * num_kernels + k) * width + c % width; };
    // A lane's neighbor; of a list of 32 and less it stays in registers.
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
    do {  // once for an empty list too
      const int64_t stop = end - part < kept ? end : part + kept;
      for (int64_t e = part + lane; kernel.chooses() && e < stop; e += warp) {
        load(e);
        choice_of[e - part] = kernel.choice(relative, q, i);
      }
      __syncwarp();
      for (int k = 0; k < num_kernels; ++k)
        for (int from = 0; from < channels; from += warp * at_once) {
          F sum[at_once];
          for (int j = 0; j < at_once; ++j) {
            const int c = from + j * warp + lane;
            sum[j] = c < channels && part != begin ? F(*at(k, c)) : F(0);
          }
          for (int64_t batch = part; batch < stop; batch += warp) {
            load(batch + lane);
            const int choice = batch + lane >= stop ? -2 : kernel.chooses() ? choice_of[batch + lane - part] : -1;
            F weight = F(0);
            if (choice == -1 || choice == k) {
              weight = F(kernel.weight(kernel.squared(relative, q, i, k)));
              if (modulations_owner && factors == 1)
                weight *= F(modulations[(modulations_owner == query ? q : int64_t(i)) * num_kernels + k]);
              if (scale_owner) weight *= scale[scale_owner == query ? q : int64_t(i)];
            }
            for (unsigned rest = __ballot_sync(all_lanes, weight != F(0)); rest; rest &= rest - 1) {
              const int source = __ffs(int(rest)) - 1;
              const F w = __shfl_sync(all_lanes, weight, source);
              const int64_t point = __shfl_sync(all_lanes, i, source);
              const S* const row = features + point * channels;
              const S* const row_factors = modulations + (point * num_kernels + k) * factors;
              for (int j = 0; j < at_once; ++j) {
                const int c = from + j * warp + lane;
                // Several factors of a kernel point are each for some channels; those of queries come after the sums.
                if (c < channels)
                  sum[j] += modulations_owner == neighbor && factors > 1
                                ? w * F(row_factors[int64_t(c) * factors / channels]) * F(row[c])
                                : w * F(row[c]);
              }
            }
          }
          for (int j = 0; j < at_once; ++j) {
            const int c = from + j * warp + lane;
            if (c < channels) *at(k, c) = S(sum[j]);
          }
        }
      __syncwarp();
      part += kept;
    } while (part < end);
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

// Depthwise: out[q, c] = the sum over k of sums * weights, and * the factors of (q, k).
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

// Depthwise: products[r, k, c] = sums * grad_out, and * the factors of (q, k); their sum over r is the weights'
// gradient.
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

// Gradients of positions, offsets and modulations, from products (groups, rows, K, width) = grad_out W_k^T of queries
// [first, first + rows): pair_grads (E, D), of the point of each pair; grad_queries (M, D); grad_offsets (M, K, D);
// grad_modulations (M, K).
extern "C" __global__ void place_grads(const G* points, const G* queries, const int32_t* index,
                                       const int64_t* row_splits, const S* features, int channels,
                                       const G* kernel_points, int num_kernels, const G* offsets, int offsets_owner,
                                       const S* modulations, int modulations_owner, const F* scale, int scale_owner,
                                       G extent, int influence, int aggregation, int groups, int64_t first,
                                       int64_t rows, const S* products, G* pair_grads, G* grad_queries, G* grad_offsets,
                                       F* grad_modulations) {
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
      const int choice = is_pair ? kernel.choice(relative, q, i) : -2;
      for (int64_t k = 0; k < num_kernels; ++k) {
        const bool may = choice == -1 || choice == k;
        const G d2 = may ? kernel.squared(relative, q, i, k) : G(0);
        const bool acts = may && !(influence == linear && !(d2 < extent * extent));
        const unsigned acting = __ballot_sync(all_lanes, acts);
        if (!acting) continue;
        F along = F(0);  // f_i . (grad W_k^T)
        for (unsigned rest = acting; rest; rest &= rest - 1) {
          const int source = __ffs(int(rest)) - 1;
          const S* const row = features + int64_t(__shfl_sync(all_lanes, i, source)) * channels;
          F product = F(0);
          for (int c = lane; c < channels; c += warp)
            product += row[c] * products[((c / width * rows + r) * num_kernels + k) * width + c % width];
          for (int bit = warp / 2; bit; bit /= 2) product += __shfl_xor_sync(all_lanes, product, bit);
          if (lane == source) along = product;
        }
        if (scale_owner) along *= scale[q];
        F grad_modulation = acts ? F(kernel.weight(d2)) * along : F(0);
        if (modulations_owner) along *= modulations[q * num_kernels + k];
        G slope = G(0);
        if (acts && influence == linear) slope = linear_slope(d2, kernel.inverse_extent);
        if (acts && influence == gaussian) slope = 2 * kernel.scale * kernel.weight(d2);
        G move[D];
        for (int a = 0; a < D; ++a) {
          G p = kernel_points[k * D + a];
          if (offsets_owner) p = p + offsets[(q * num_kernels + k) * D + a];
          move[a] = G(along) * slope * (relative[a] - p);
          grad_point[a] += move[a];
        }
        for (int bit = warp / 2; bit; bit /= 2) {
          grad_modulation += __shfl_xor_sync(all_lanes, grad_modulation, bit);
          for (int a = 0; a < D; ++a) move[a] += __shfl_xor_sync(all_lanes, move[a], bit);
        }
        if (lane == 0) {
          grad_modulations[q * num_kernels + k] += grad_modulation;
          for (int a = 0; a < D; ++a) grad_offsets[(q * num_kernels + k) * D + a] -= move[a];
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

// grad_points[i] = the sum over the pairs of point i, in their order
extern "C" __global__ void sum_pairs(const G* pair_grads, const int64_t* order, const int64_t* begins,
                                     int64_t num_points, G* grad_points) {
  for (int64_t i = first_thread(); i < num_points * D; i += num_threads()) {
    G sum = G(0);
    for (int64_t at = begins[i / D]; at < begins[i / D + 1]; ++at) sum += pair_grads[order[at] * D + i % D];
    grad_points[i] = sum;
  }
}
