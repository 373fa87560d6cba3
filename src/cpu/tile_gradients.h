// Products of the gradient of a tile's output, shared by the convolutions: the gradient of the weights, and that of the
// tile's sums, from which gradients of positions follow.
#pragma once

#include "tile_products.h"

namespace kp {
namespace {

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
      if (tries > 1000) yield_core();
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

// One thread's products grad W_k^T, a row for each row of the tile, and the gradients of its pairs' weights.
template <class F>
class GradientProducts {
 public:
  Buffer<F> weight_grad;  // f_i . (grad W_k^T) of every pair
  Buffer<int32_t> row;    // row of the products for every pair: number(k, i) for row i of kernel point k

  bool reserve(const Weights<F>& weights, int64_t rows, int64_t max_pairs) {
    rows_ = rows;
    return grad_w_.resize(weights.num_kernels * rows_stored() * weights.c_in) &&
           rows_done_.resize(weights.num_kernels) && gathered_.resize((rows + row_step) * weights.c_out) &&
           weight_grad.resize(max_pairs + 2 * lanes<F>) && row.resize(max_pairs + lanes<int32_t>);
  }

  // The micro-kernel also stores rows up to the next multiple of row_step. An odd number of rows, so that those of one
  // query are spread over the first-level cache: with 72 rows of 32 channels all were in an eighth of it.
  static constexpr int64_t spare_rows = row_step + 1;
  int64_t rows_stored() const { return rows_ + spare_rows; }
  const F* products() const { return grad_w_.data(); }
  int64_t number(int64_t k, int64_t i) const { return k * rows_stored() + i; }
  void start() {
    for (int64_t k = 0; k < rows_done_.size(); ++k) rows_done_[k] = 0;
  }
  int64_t done(int64_t k) const { return rows_done_[k]; }

  // Computes the products of the tile's rows added since the last call. `panels`: the transposed weights, of which the
  // tile's are those from `first` on. `grad_out`: from the tile's first query on.
  KP_OUTLINE void multiply(const TileSums<F>& tile, const Weights<F>& weights, const Panels<F>& panels,
                           const F* grad_out, int64_t first = 0) {
    for (int k = 0; k < weights.num_kernels; ++k) {
      gather_gradients(tile, k, weights.c_out, grad_out);
      if (weights.depthwise)
        scale_gradients(tile, weights, k);
      else
        multiply_gradients(tile, weights, panels, k, first);
      rows_done_[k] = tile.size(k);
    }
  }

  // The same, but calls make(query, k, row) to write each row of the products.
  template <class Make>
  void make_rows(const TileSums<F>& tile, int64_t channels, Make make) {
    for (int64_t k = 0; k < rows_done_.size(); ++k) {
      for (int64_t i = rows_done_[k]; i < tile.size(k); ++i)
        make(tile.queries(k)[i], k, &grad_w_[number(k, i) * channels]);
      rows_done_[k] = tile.size(k);
    }
  }

  // Computes to[i] = f_i . (grad W_k^T) for pairs with these points and rows of the products, a vector at a time.
  KP_OUTLINE void dot(const int32_t* points, const int32_t* rows, int64_t num_pairs, const F* features,
                      int64_t channels, F* to) const {
    const int rest = int(channels % lanes<F>);
    for (int64_t i = 0; i < num_pairs; i += lanes<F>) {
      Vec<F> sums[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l) {
        const int64_t pair = smaller(i + l, num_pairs - 1);
        const F* const f = features + int64_t(points[pair]) * channels;
        const F* const g = &grad_w_[rows[pair] * channels];
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
      store(to + i, sums_of<F>(sums));
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
  void multiply_gradients(const TileSums<F>& tile, const Weights<F>& weights, const Panels<F>& panels, int k,
                          int64_t first) {
    const int64_t size = tile.size(k) - rows_done_[k], c_out = weights.c_out, height = c_out / weights.groups;
    for (int64_t g = 0; size && g < weights.groups; ++g)
      for (int64_t p = 0; p < panels.count(); ++p)
        with_vectors(panels.vectors(p), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
          const F* const panel = panels.row(g, p, (first + k) * height);
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

}  // namespace
}  // namespace kp
