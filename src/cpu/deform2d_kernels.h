// The kernels of images: mixtures of the experts, interpolated at the taps unless positions do that themselves; and the
// gradients of what they are made of.
//
// The experts are copied with the channels last, a row of columns for each cell of the scope. A column is a pair of an
// input channel of a group and an output channel, or depthwise a channel in its order. So kernels are sums of whole
// rows, in blocks of columns for which all experts stay in the second-level cache from image to image. Pair by pair,
// 100 images of 4 x 4 pixels with 8 experts each took 14 ms, of which their convolution is 1 ms.
#pragma once

#include "deform2d.h"

namespace kp {
namespace {

// The taps of one kernel in its scope.
template <class F>
struct Taps {
  Buffer<Hat<F>> rows, columns;

  bool find(const Images<F>& images, int64_t item) {
    const Deform2d& a = images.args;
    if (!rows.resize(images.taps) || !columns.resize(images.taps)) return false;
    for (int64_t k = 0; k < images.taps; ++k) {
      const int64_t u = k / a.kernel_width, v = k % a.kernel_width;
      const F* const offset = images.global_offsets ? images.global_offsets + (item * images.taps + k) * 2 : nullptr;
      const F row = grid_position<F>(u, a.kernel_height, a.scope_height, a.uniform_grid);
      const F column = grid_position<F>(v, a.kernel_width, a.scope_width, a.uniform_grid);
      rows[k] = hat_at<F, F>(offset ? row + offset[0] : row, F(a.scope_height), a.clips);
      columns[k] = hat_at<F, F>(offset ? column + offset[1] : column, F(a.scope_width), a.clips);
    }
    return true;
  }
};

// Rows of some columns of a larger array.
template <class F>
struct Block {
  F* data;
  int64_t row_size;

  F* row(int64_t i) const { return data + i * row_size; }
};

template <class F>
class Kernels {
 public:
  static constexpr int64_t block = 128;  // columns: 16 cells and 8 experts of these take 64 KB

  Kernels(const Images<F>& images, const ChannelOrder& order)
      : images_(images),
        order_(order),
        inputs_(images.args.depthwise ? 1 : images.args.channels / images.args.groups),
        outputs_(images.args.depthwise ? images.args.channels : images.args.out_channels),
        columns_(images.args.depthwise ? order.stored : inputs_ * outputs_) {}

  int64_t columns() const { return columns_; }
  int64_t blocks() const { return (columns_ + block - 1) / block; }
  // The number of values of a kernel.
  int64_t size() const { return images_.kernel_rows() * columns_; }
  bool interpolates() const {
    const Deform2d& a = images_.args;
    return !images_.samples_kernels() &&
           (images_.global_offsets || a.scope_height != a.kernel_height || a.scope_width != a.kernel_width);
  }
  // Kernel i of those made last; all images have kernel 0 unless they differ.
  const F* data(int64_t i = 0) const {
    return is_expert() ? experts_.data() : kernels_.data() + (images_.has_item_kernels() ? i * size() : 0);
  }
  Block<const F> expert(int64_t e, int64_t begin) const {
    return {experts_.data() + e * images_.cells * columns_ + begin, columns_};
  }

  // Copies the experts. Returns false if memory runs out, as all of these.
  bool copy_experts(int threads) {
    const int64_t cells = images_.cells;
    if (!experts_.resize(images_.args.experts * cells * columns_)) return false;
    if (images_.args.depthwise) memset(experts_.data(), 0, size_t(experts_.size()) * sizeof(F));
    for_each_expert(threads, [&](const F& weight, int64_t copied) { experts_[copied] = weight; }, images_.weight);
    return true;
  }

  // Makes the kernels of `count` images from `first` on, or that of all images.
  bool make(int64_t first, int64_t count, int threads) {
    if (is_expert()) return true;
    const int64_t num = images_.has_item_kernels() ? count : 1;
    if (!kernels_.resize(num * size())) return false;
    bool reserved = true;
#pragma omp parallel num_threads(useful_threads(threads, num* size() * images_.args.experts, 1 << 14)) \
    reduction(&& : reserved)
    {
      Taps<F> taps;
      Buffer<F> mixture;
      reserved = mixture.resize(images_.cells * block);
#pragma omp for
      for (int64_t job = 0; job < blocks() * num; ++job) {
        const int64_t i = job % num, begin = job / num * block;
        const Block<F> to = {&kernels_[i * size() + begin], columns_};
        if (!interpolates())
          mix(first + i, begin, to);
        else if (reserved && (reserved = taps.find(images_, first + i)))
          resample(taps, scope(first + i, begin, {mixture.data(), block}), width(begin), to);
      }
    }
    return reserved;
  }

  // The columns from `begin` on of the values in the scope: those of the weight, or mixed in `mixture`.
  Block<const F> scope(int64_t item, int64_t begin, const Block<F>& mixture) const {
    if (!images_.routing) return expert(0, begin);
    mix(item, begin, mixture);
    return {mixture.data, mixture.row_size};
  }
  int64_t width(int64_t begin) const { return smaller(block, columns_ - begin); }

  // Calls f(the value in the weight, its number in a copy) for all experts.
  template <class T, class Call>
  void for_each_expert(int threads, Call call, T* weight) const {
    const int64_t cells = images_.cells, experts = images_.args.experts;
    constexpr int64_t step = 16;  // output channels: one cache line of every row
    const int64_t steps = (outputs_ + step - 1) / step;
#pragma omp parallel for num_threads(useful_threads(threads, experts * cells * columns_, 1 << 14))
    for (int64_t job = 0; job < experts * steps; ++job) {
      const int64_t e = job / steps, begin = job % steps * step, end = smaller(outputs_, begin + step);
      for (int64_t c = 0; c < inputs_; ++c)
        for (int64_t s = 0; s < cells; ++s)
          for (int64_t o = begin; o < end; ++o) {
            const int64_t column = images_.args.depthwise ? order_.slot[o] : c * outputs_ + o;
            call(weight[((e * outputs_ + o) * inputs_ + c) * cells + s], (e * cells + s) * columns_ + column);
          }
    }
  }

 private:
  // Whether the copy of the one expert is the kernel of all images.
  bool is_expert() const { return !images_.has_item_kernels() && !interpolates(); }

  void mix(int64_t item, int64_t begin, const Block<F>& to) const {
    const F* const factors = images_.routing + item * images_.args.experts;
    const int64_t columns = width(begin);
    for (int64_t s = 0; s < images_.cells; ++s)
      for (int64_t e = 0; e < images_.args.experts; ++e) {
        F* const sum = to.row(s);
        const F* const from = expert(e, begin).row(s);
        if (e == 0)
          for (int64_t j = 0; j < columns; ++j) sum[j] = factors[0] * from[j];
        else
          for (int64_t j = 0; j < columns; ++j) sum[j] += factors[e] * from[j];
      }
  }

  void resample(const Taps<F>& taps, const Block<const F>& scope, int64_t columns, const Block<F>& to) const {
    const int64_t scope_width = images_.args.scope_width;
    for (int64_t k = 0; k < images_.taps; ++k) {
      const Hat<F>&y = taps.rows[k], &x = taps.columns[k];
      const int64_t low = int64_t(y.low) * scope_width, high = int64_t(y.high) * scope_width;
      const F *const low_low = scope.row(low + int64_t(x.low)), *const low_high = scope.row(low + int64_t(x.high));
      const F *const high_low = scope.row(high + int64_t(x.low)), *const high_high = scope.row(high + int64_t(x.high));
      F* const value = to.row(k);
      for (int64_t j = 0; j < columns; ++j)
        value[j] = y.low_factor * (x.low_factor * low_low[j] + x.high_factor * low_high[j]) +
                   y.high_factor * (x.low_factor * high_low[j] + x.high_factor * high_high[j]);
    }
  }

  const Images<F>& images_;
  const ChannelOrder& order_;
  int64_t inputs_, outputs_, columns_;
  Buffer<F> experts_, kernels_;
};

}  // namespace
}  // namespace kp
