// Tiles of the convolutions of images: sums over the taps of each position where the kernel is depthwise, and else the
// samples of all taps, which the micro-kernel multiplies by the kernel (gemm.h).
#pragma once

#include "deform2d.h"

namespace kp {
namespace {

// NV vectors of one tap of a position: the interpolated values of four rows, or those of one.
template <int NV, bool interpolates, class F>
KP_INLINE void sample_vectors(const Samples<F>& samples, int64_t l, const F* from, int64_t row_size, Vec<F>* to) {
  for (int v = 0; v < NV; ++v) to[v] = load(from + samples.cell[0][l] * row_size + v * lanes<F>);
  if constexpr (interpolates) {
    const Vec<F> factor = broadcast(samples.factor[0][l]);
    for (int v = 0; v < NV; ++v) to[v] *= factor;
    for (int i = 1; i < 4; ++i) {
      const F* const row = from + samples.cell[i][l] * row_size;
      const Vec<F> weight = broadcast(samples.factor[i][l]);
      for (int v = 0; v < NV; ++v) to[v] = fma(weight, load(row + v * lanes<F>), to[v]);
    }
  }
}

// Calls call(samples_images, samples_kernels) with both as compile-time constants.
template <class Call>
void with_sampling(bool samples_images, bool samples_kernels, Call call) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (samples_images) return samples_kernels ? call(Yes(), Yes()) : call(Yes(), No());
  return samples_kernels ? call(No(), Yes()) : call(No(), No());
}

// One thread's positions of a depthwise convolution.
template <class F>
class DepthwiseTile {
 public:
  bool reserve(int64_t taps) { return taps_.resize(taps); }

  // Writes the rows (count, stored channels) of the pixels from `first` on, in an image of this width.
  template <bool samples_images, bool samples_kernels>
  void fill(const TapFinder<F>& finder, const ChannelOrder& order, int64_t item, int64_t first, int64_t count,
            int64_t width, const F* image, const F* kernel, F* to) {
    constexpr int NV = 4;
    for (int64_t p = 0; p < count; p += block_size) {
      const Positions at(first + p, smaller(block_size, count - p), width);
      for (int64_t i = 0; i < order.classes; ++i) {
        for (int64_t k = 0; k < finder.images.taps; ++k)
          finder.template find<samples_images, samples_kernels>(item, at, k, order.kernel_group(i), order.data_group(i),
                                                                taps_[k]);
        const int64_t end = order.begin[i + 1];
        for (int64_t l = 0; l < at.count; ++l) {
          F* const row = to + (p + l) * order.stored;
          int64_t c = order.begin[i];
          for (; c + NV * lanes<F> <= end; c += NV * lanes<F>)
            sum<NV, samples_images, samples_kernels>(finder.images.taps, l, image + c, kernel + c, order.stored,
                                                     row + c);
          for (; c < end; c += lanes<F>)
            sum<1, samples_images, samples_kernels>(finder.images.taps, l, image + c, kernel + c, order.stored,
                                                    row + c);
        }
      }
    }
  }

 private:
  // Sums the products of data and kernel over the taps of position l, for NV vectors of channels.
  template <int NV, bool samples_images, bool samples_kernels>
  KP_INLINE void sum(int64_t num_taps, int64_t l, const F* image, const F* kernel, int64_t row_size, F* to) const {
    Vec<F> sums[NV];
    for (int v = 0; v < NV; ++v) sums[v] = Vec<F>{};
    for (const TapBlock<F>* tap = taps_.data(); tap < taps_.data() + num_taps; ++tap) {
      if (!tap->inside[l]) continue;
      Vec<F> data[NV], values[NV];
      sample_vectors<NV, samples_images>(tap->data, l, image, row_size, data);
      sample_vectors<NV, samples_kernels>(tap->kernel, l, kernel, row_size, values);
      for (int v = 0; v < NV; ++v) sums[v] = fma(data[v], values[v], sums[v]);
    }
    for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, sums[v]);
  }

  Buffer<TapBlock<F>> taps_;
};

// One thread's samples of a dense convolution: for every tap k, the rows of the positions at which it is inside.
template <class F>
class DenseTile {
 public:
  // `keeps_taps`: keep the taps of the whole tile, not only of one block at a time.
  bool reserve(const Images<F>& images, int64_t rows, int64_t channels, bool keeps_taps) {
    const int64_t taps = images.taps, blocks = keeps_taps ? (rows + block_size - 1) / block_size : 1;
    rows_ = rows;
    channels_ = channels;
    groups_ = images.samples_images() ? images.args.data_groups : 1;
    blocks_ = blocks;
    if (!sums_.resize(taps * rows * channels + row_step) || !positions_.resize(taps * rows) || !sizes_.resize(taps) ||
        !taps_.resize(taps * blocks * groups_))
      return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, but drops their products.
    memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(F));
    return true;
  }

  // Samples the taps of `count` pixels from `first` on, in an image of this width. `image` has the channels last.
  template <bool samples_images>
  void fill(const TapFinder<F>& finder, int64_t item, int64_t first, int64_t count, int64_t width, const F* image) {
    for (int64_t k = 0; k < finder.images.taps; ++k) sizes_[k] = 0;
    for (int64_t p = 0; p < count; p += block_size) {
      const Positions at(first + p, smaller(block_size, count - p), width);
      for (int64_t k = 0; k < finder.images.taps; ++k) {
        TapBlock<F>* const taps = &taps_[(k * blocks_ + (blocks_ > 1 ? p / block_size : 0)) * groups_];
        for (int64_t g = 0; g < groups_; ++g) finder.template find<samples_images, false>(item, at, k, 0, g, taps[g]);
        for (int64_t l = 0; l < at.count; ++l) {
          bool inside = false;
          for (int64_t g = 0; g < groups_; ++g) inside |= taps[g].inside[l];
          if (!inside) continue;
          F* const row = &sums_[(k * rows_ + sizes_[k]) * channels_];
          for (int64_t g = 0; g < groups_; ++g) {
            const int64_t begin = channels_ * g / groups_, end = channels_ * (g + 1) / groups_;
            if (taps[g].inside[l])
              sample<samples_images>(taps[g].data, l, image, begin, end, row);
            else  // its cells are some pixel, times zero: NaN if that pixel is
              memset(row + begin, 0, size_t(end - begin) * sizeof(F));
          }
          positions_[k * rows_ + sizes_[k]++] = int32_t(p + l);
        }
      }
    }
  }

  // The taps of group g of the block of position p, if they are kept.
  const TapBlock<F>& taps_of(int64_t k, int64_t p, int64_t g) const {
    return taps_[(k * blocks_ + p / block_size) * groups_ + g];
  }
  TileSums<F> rows() const { return {sums_.data(), positions_.data(), sizes_.data(), rows_, rows_ * channels_}; }

 private:
  template <bool interpolates>
  KP_INLINE void sample(const Samples<F>& samples, int64_t l, const F* image, int64_t begin, int64_t end, F* to) const {
    int64_t c = begin;  // not memcpy: the call takes as long as copying 64 channels
    for (; c + 4 * lanes<F> <= end; c += 4 * lanes<F>) sample_at<4, interpolates>(samples, l, image + c, to + c);
    for (; c + lanes<F> <= end; c += lanes<F>) sample_at<1, interpolates>(samples, l, image + c, to + c);
    for (; c < end; ++c) {
      const F* const from = image + c;
      to[c] = from[samples.cell[0][l] * channels_];
      if (!interpolates) continue;
      to[c] *= samples.factor[0][l];
      for (int i = 1; i < 4; ++i) to[c] += samples.factor[i][l] * from[samples.cell[i][l] * channels_];
    }
  }
  template <int NV, bool interpolates>
  KP_INLINE void sample_at(const Samples<F>& samples, int64_t l, const F* from, F* to) const {
    Vec<F> values[NV];
    sample_vectors<NV, interpolates>(samples, l, from, channels_, values);
    for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, values[v]);
  }

  Buffer<F> sums_;
  Buffer<int32_t> positions_, sizes_;
  Buffer<TapBlock<F>> taps_;
  int64_t rows_ = 0, channels_ = 0, groups_ = 1, blocks_ = 1;
};

}  // namespace
}  // namespace kp
