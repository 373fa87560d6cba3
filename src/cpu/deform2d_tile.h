// Tiles of the convolutions of images: sums over the taps of each position where the kernel is depthwise, and else the
// samples of all taps, which the micro-kernel multiplies by the kernel (gemm.h).
#pragma once

#include "deform2d.h"

namespace kp {
namespace {

// The interpolated values of NV vectors at `from`; without interpolation those of one row.
template <int NV, bool interpolates, class F>
KP_INLINE void sample_vectors(const F* from, const int64_t* at, const F* factors, Vec<F>* to) {
  for (int v = 0; v < NV; ++v) {
    const F* const p = from + v * lanes<F>;
    if constexpr (interpolates) {
      to[v] = broadcast(factors[0]) * load(p + at[0]);
      for (int i = 1; i < 4; ++i) to[v] = fma(broadcast(factors[i]), load(p + at[i]), to[v]);
    } else {
      to[v] = load(p + at[0]);
    }
  }
}

// A tap with the factors of the four rows that each of its samples interpolates; those of the data times the
// modulation.
template <class F>
struct WeightedTap {
  int64_t data_at[4], kernel_at[4];
  F data_factors[4], kernel_factors[4];
};

// Sums the products of data and kernel over taps for NV vectors of channels from channel c on.
template <int NV, bool samples_images, bool samples_kernels, class F>
KP_INLINE void sum_taps(const WeightedTap<F>* taps, int64_t count, const F* image, const F* kernel, F* to) {
  Vec<F> sums[NV];
  for (int v = 0; v < NV; ++v) sums[v] = Vec<F>{};
  for (const WeightedTap<F>* tap = taps; tap < taps + count; ++tap) {
    Vec<F> data[NV], values[NV];
    sample_vectors<NV, samples_images>(image, tap->data_at, tap->data_factors, data);
    sample_vectors<NV, samples_kernels>(kernel, tap->kernel_at, tap->kernel_factors, values);
    for (int v = 0; v < NV; ++v) sums[v] = fma(data[v], values[v], sums[v]);
  }
  for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, sums[v]);
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
    for (int64_t p = 0; p < count; ++p, to += order.stored)
      for (int64_t i = 0; i < order.classes; ++i) {
        const int64_t y = (first + p) / width, x = (first + p) % width;
        const int64_t found = find<samples_images, samples_kernels>(finder, order, item, y, x, i);
        int64_t c = order.begin[i];
        const int64_t end = order.begin[i + 1];
        for (; c + 4 * lanes<F> <= end; c += 4 * lanes<F>)
          sum_taps<4, samples_images, samples_kernels>(taps_.data(), found, image + c, kernel + c, to + c);
        for (; c < end; c += lanes<F>)
          sum_taps<1, samples_images, samples_kernels>(taps_.data(), found, image + c, kernel + c, to + c);
      }
  }

 private:
  // Finds the taps of class i of channels at (y, x); returns their number.
  template <bool samples_images, bool samples_kernels>
  int64_t find(const TapFinder<F>& finder, const ChannelOrder& order, int64_t item, int64_t y, int64_t x, int64_t i) {
    int64_t count = 0;
    for (int64_t k = 0; k < finder.images.taps; ++k) {
      Tap<F> tap;
      if (!finder.template find<samples_images, samples_kernels>(item, y, x, k, order.kernel_group(i),
                                                                 order.data_group(i), tap))
        continue;
      if (samples_images && is_outside(tap.data)) continue;
      WeightedTap<F>& to = taps_[count++];
      for (int j = 0; j < (samples_images ? 4 : 1); ++j) to.data_at[j] = tap.data.at[j];
      for (int j = 0; j < (samples_kernels ? 4 : 1); ++j) to.kernel_at[j] = tap.kernel.at[j];
      for (int j = 0; samples_images && j < 4; ++j) to.data_factors[j] = tap.data.factor(j) * tap.modulation;
      for (int j = 0; samples_kernels && j < 4; ++j) to.kernel_factors[j] = tap.kernel.factor(j);
    }
    return count;
  }

  Buffer<WeightedTap<F>> taps_;
};

// A sample of an image and its modulation.
template <class F>
struct ScaledSample {
  Sample<F> data;
  F modulation;
};

// One thread's samples of a dense convolution: for every tap k, the rows of the positions at which it is inside.
template <class F>
class DenseTile {
 public:
  // `num_samples`: for each row of a tap, the samples that are kept; 0 if they are not needed.
  bool reserve(int64_t taps, int64_t rows, int64_t channels, int64_t num_samples = 0) {
    rows_ = rows;
    num_samples_ = num_samples;
    channels_ = channels;
    if (!sums_.resize(taps * rows * channels + row_step) || !positions_.resize(taps * rows) || !sizes_.resize(taps) ||
        !samples_.resize(taps * rows * num_samples))
      return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, but drops their products.
    memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(F));
    return true;
  }

  // Samples the taps of `count` pixels from `first` on, in an image of this width. `image` has the channels last.
  template <bool samples_images>
  void fill(const TapFinder<F>& finder, int64_t item, int64_t first, int64_t count, int64_t width, const F* image) {
    const int64_t groups = samples_images ? finder.images.args.data_groups : 1;
    for (int64_t k = 0; k < finder.images.taps; ++k) {
      int64_t size = 0;
      for (int64_t p = 0; p < count; ++p) {
        F* const row = &sums_[(k * rows_ + size) * channels_];
        bool inside = false;
        for (int64_t g = 0; g < groups; ++g) {
          Tap<F> tap;
          if (!finder.template find<samples_images, false>(item, (first + p) / width, (first + p) % width, k, 0, g,
                                                           tap))
            break;
          inside = true;
          if constexpr (samples_images)
            if (num_samples_) samples_[(k * rows_ + size) * groups + g] = {tap.data, tap.modulation};
          sample<samples_images>(tap, image, channels_ * g / groups, channels_ * (g + 1) / groups, row);
        }
        positions_[k * rows_ + size] = int32_t(p);
        size += inside;
      }
      sizes_[k] = int32_t(size);
    }
  }

  // Sample g of row i of tap k.
  const ScaledSample<F>& sample_of(int64_t k, int64_t i, int64_t g) const {
    return samples_[(k * rows_ + i) * num_samples_ + g];
  }
  TileSums<F> rows() const { return {sums_.data(), positions_.data(), sizes_.data(), rows_, rows_ * channels_}; }

 private:
  template <bool interpolates>
  static void sample(const Tap<F>& tap, const F* image, int64_t begin, int64_t end, F* to) {
    if constexpr (!interpolates) {
      const F* const from = image + tap.data.at[0];
      int64_t c = begin;  // not memcpy: the call takes as long as copying 64 channels
      for (; c + lanes<F> <= end; c += lanes<F>) store(to + c, load(from + c));
      for (; c < end; ++c) to[c] = from[c];
      return;
    }
    F factors[4];
    for (int i = 0; i < 4; ++i) factors[i] = tap.data.factor(i) * tap.modulation;
    int64_t c = begin;
    for (; c + lanes<F> <= end; c += lanes<F>) {
      Vec<F> value;
      sample_vectors<1, true>(image + c, tap.data.at, factors, &value);
      store(to + c, value);
    }
    for (; c < end; ++c) {
      F value = factors[0] * image[tap.data.at[0] + c];
      for (int i = 1; i < 4; ++i) value = fma(factors[i], image[tap.data.at[i] + c], value);
      to[c] = value;
    }
  }
  static F fma(F a, F b, F c) { return a * b + c; }

  Buffer<F> sums_;
  Buffer<int32_t> positions_, sizes_;
  Buffer<ScaledSample<F>> samples_;
  int64_t rows_ = 0, channels_ = 0, num_samples_ = 0;
};

}  // namespace
}  // namespace kp
