// Shared by the convolutions of images and their gradients: copies of images with the channels last, the kernel of each
// image, and the taps of a position.
//
//   out[j] = sum over taps k of m_jk x(s j - p + d k + o_jk) W(g_k + r_jk)      (formulas/deform2d.h)
//
// Some images at a time are copied with their channels last, unless they are stored so, because neighboring pixels of
// one channel are of no use to a position whose taps are elsewhere than those of its neighbors. Positions are then
// processed in tiles, each within one image.
#pragma once

#include <math.h>

#include "formulas/deform2d.h"
#include "kernels.h"
#include "tile_products.h"

namespace kp {
namespace {

constexpr int64_t copied_bytes = 16 << 20;  // images copied at a time, unless one is larger

// Values for each pixel of several images: (batch, channels, pixels), or (batch, pixels, channels) if channels_last.
template <class F>
struct PixelArray {
  F* data;
  int64_t channels, pixels;
  bool channels_last;

  F& at(int64_t item, int64_t channel, int64_t pixel) const {
    const int64_t in_item = channels_last ? pixel * channels + channel : channel * pixels + pixel;
    return data[item * channels * pixels + in_item];
  }
};

// The arguments with their types.
template <class F>
struct Images {
  const Deform2d& args;
  int64_t taps, cells, in_pixels, out_pixels;  // cells: of the scope
  const F *weight, *routing, *global_offsets;
  PixelArray<const F> kernel_offsets, data_offsets, modulations;  // kernel_offsets: local ones

  explicit Images(const Deform2d& a)
      : args(a),
        taps(a.kernel_height * a.kernel_width),
        cells(a.scope_height * a.scope_width),
        in_pixels(a.height * a.width),
        out_pixels(a.out_height * a.out_width),
        weight(as<F>(a.weight)),
        routing(as<F>(a.routing)),
        global_offsets(a.is_local ? nullptr : as<F>(a.kernel_offsets)),
        kernel_offsets{by_pixel(a.is_local ? as<F>(a.kernel_offsets) : nullptr, a.kernel_groups * taps * 2)},
        data_offsets{by_pixel(as<F>(a.data_offsets), a.data_groups * taps * 2)},
        modulations{by_pixel(as<F>(a.modulations), a.data_groups * taps)} {}

  template <class T>
  PixelArray<T> by_pixel(T* data, int64_t channels) const {
    return {data, channels, out_pixels, args.channels_last};
  }
  // Whether taps are interpolated between pixels or scaled. Otherwise each is one pixel.
  bool samples_images() const { return data_offsets.data || modulations.data; }
  // Whether the taps' weights are interpolated for each position. Otherwise each tap has one weight in an image.
  bool samples_kernels() const { return args.is_local; }
  // Whether each image has a kernel of its own.
  bool has_item_kernels() const { return routing || global_offsets; }
  // The values of a kernel by channel: one for each tap, or each cell of the scope if positions interpolate them.
  int64_t kernel_rows() const { return samples_kernels() ? cells : taps; }
};

// The order in which the channels of copied images are stored. Depthwise, channels that share offsets of kernel and
// data are a class, stored one after another and padded to whole vectors: `slot` of every channel, `begin` of every
// class. Otherwise the channels keep their order.
struct ChannelOrder {
  Buffer<int64_t> slot, begin;
  int64_t channels = 0, classes = 0, stored = 0, kernel_groups = 1;

  int64_t kernel_group(int64_t c) const { return c % kernel_groups; }  // of a class
  int64_t data_group(int64_t c) const { return c / kernel_groups; }

  // `vector`: lanes of a vector, or 1 for channels that keep their order.
  bool make(int64_t num_channels, int64_t groups_of_kernel, int64_t groups_of_data, int64_t vector) {
    channels = num_channels;
    kernel_groups = groups_of_kernel;
    classes = kernel_groups * groups_of_data;
    if (!slot.resize(channels) || !begin.resize(classes + 1)) return false;
    const int64_t width = channels / groups_of_data;
    stored = 0;
    for (int64_t i = 0; i < classes; ++i) {
      begin[i] = stored;
      for (int64_t c = data_group(i) * width; c < (data_group(i) + 1) * width; ++c)
        if (c % kernel_groups == kernel_group(i)) slot[c] = stored++;
      stored = round_up(stored, vector);
    }
    begin[classes] = stored;
    return true;
  }
  bool is_identity() const { return classes == 1 && stored == channels; }
};

// Images with the channels last, in the order of a ChannelOrder: those of a chunk, copied unless they are stored so.
template <class F>
class ChannelsLast {
 public:
  // Copies `count` images from `first` on.
  bool copy(const PixelArray<const F>& images, int64_t first, int64_t count, const ChannelOrder& order, int threads) {
    stored_ = order.stored;
    pixels_ = images.pixels;
    if (images.channels_last && order.is_identity()) {
      data_ = images.data + first * images.pixels * images.channels;
      return true;
    }
    if (!copy_.resize(count * pixels_ * stored_)) return false;
    data_ = copy_.data();
    constexpr int64_t block = 64;
    const int64_t blocks = (pixels_ + block - 1) / block;
    threads = useful_threads(threads, count * pixels_ * stored_, 1 << 15);
#pragma omp parallel for num_threads(threads)
    for (int64_t job = 0; job < count * blocks; ++job) {
      const int64_t item = job / blocks, begin = job % blocks * block, end = smaller(pixels_, begin + block);
      F* const to = copy_.data() + item * pixels_ * stored_;
      if (order.stored != order.channels) memset(to + begin * stored_, 0, size_t((end - begin) * stored_) * sizeof(F));
      for (int64_t c = 0; c < order.channels; ++c)
        for (int64_t p = begin; p < end; ++p) to[p * stored_ + order.slot[c]] = images.at(first + item, c, p);
    }
    return true;
  }
  const F* item(int64_t i) const { return data_ + i * pixels_ * stored_; }

 private:
  Buffer<F> copy_;
  const F* data_ = nullptr;
  int64_t stored_ = 0, pixels_ = 0;
};

// Writes `count` rows of a tile, pixels from `first` on, to an image; adds the bias unless it is null.
template <class F>
void write_pixels(const F* rows, int64_t row_size, const int64_t* slot, int64_t count, const F* bias,
                  const PixelArray<F>& to, int64_t item, int64_t first) {
  if (to.channels_last) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < to.channels; ++c)
        to.at(item, c, first + p) = rows[p * row_size + slot[c]] + (bias ? bias[c] : F(0));
    return;
  }
  constexpr int64_t block = 16;  // rows whose values of one channel are in the first-level cache for the next channels
  for (int64_t begin = 0; begin < count; begin += block)
    for (int64_t c = 0; c < to.channels; ++c) {
      F* const plane = &to.at(item, c, first);
      for (int64_t p = begin; p < smaller(count, begin + block); ++p)
        plane[p] = rows[p * row_size + slot[c]] + (bias ? bias[c] : F(0));
    }
}

// ---- the kernel of an image

// Computes kernels from the weight: the mixture of the experts, interpolated at the taps unless positions do that
// themselves. A pair is an output channel with an input channel of its group.
template <class F>
class Kernels {
 public:
  explicit Kernels(const Images<F>& images) : images_(images) {}

  int64_t pairs() const {
    const Deform2d& a = images_.args;
    return a.depthwise ? a.channels : a.out_channels * (a.channels / a.groups);
  }
  bool interpolates() const {
    const Deform2d& a = images_.args;
    return !images_.samples_kernels() &&
           (images_.global_offsets || a.scope_height != a.kernel_height || a.scope_width != a.kernel_width);
  }

  // Prepares the kernel of `item`.
  bool start(int64_t item) {
    const Deform2d& a = images_.args;
    item_ = item;
    if (!interpolates()) return true;
    if (!rows_.resize(images_.taps) || !columns_.resize(images_.taps)) return false;
    for (int64_t k = 0; k < images_.taps; ++k) {
      const int64_t u = k / a.kernel_width, v = k % a.kernel_width;
      const F* const offset = images_.global_offsets ? images_.global_offsets + (item * images_.taps + k) * 2 : nullptr;
      const F row = grid_position<F>(u, a.kernel_height, a.scope_height, a.uniform_grid);
      const F column = grid_position<F>(v, a.kernel_width, a.scope_width, a.uniform_grid);
      rows_[k] = hat_at<F>(offset ? row + offset[0] : row, a.scope_height, a.clips);
      columns_[k] = hat_at<F>(offset ? column + offset[1] : column, a.scope_width, a.clips);
    }
    return true;
  }

  // The values of the pair in the scope: those of the weight, or mixed in `scratch` (cells).
  const F* scope(int64_t pair, F* scratch) const {
    const F* const one = images_.weight + pair * images_.cells;
    if (!images_.routing) return one;
    const F* const factors = images_.routing + item_ * images_.args.experts;
    for (int64_t s = 0; s < images_.cells; ++s) scratch[s] = factors[0] * one[s];
    for (int64_t e = 1; e < images_.args.experts; ++e)
      for (int64_t s = 0; s < images_.cells; ++s) scratch[s] += factors[e] * expert(e, pair)[s];
    return scratch;
  }
  const F* expert(int64_t e, int64_t pair) const { return images_.weight + (e * pairs() + pair) * images_.cells; }

  // Value r of the kernel's rows from the values in the scope.
  F value(const F* scope, int64_t r) const {
    if (!interpolates()) return scope[r];
    const int64_t width = images_.args.scope_width;
    const Hat<F>&y = rows_[r], &x = columns_[r];
    return y.low_factor *
               (x.low_factor * scope[y.low * width + x.low] + x.high_factor * scope[y.low * width + x.high]) +
           y.high_factor *
               (x.low_factor * scope[y.high * width + x.low] + x.high_factor * scope[y.high * width + x.high]);
  }
  const Hat<F>& row(int64_t k) const { return rows_[k]; }
  const Hat<F>& column(int64_t k) const { return columns_[k]; }

  // Writes the kernel of the item that was started: (rows, stored channels), or (rows, Cin / groups, Cout).
  bool write(const ChannelOrder& order, F* to, int threads) const {
    const Deform2d& a = images_.args;
    const int64_t rows = images_.kernel_rows(), height = a.depthwise ? 1 : a.channels / a.groups;
    const int64_t outputs = a.depthwise ? a.channels : a.out_channels;
    constexpr int64_t block = 16;  // output channels: one cache line of every row
    const int64_t jobs = (outputs + block - 1) / block;
    if (a.depthwise) memset(to, 0, size_t(rows * order.stored) * sizeof(F));
    bool reserved = true;
#pragma omp parallel num_threads(useful_threads(threads, pairs() * rows, 1 << 14)) reduction(&& : reserved)
    {
      Buffer<F> scratch, values;
      reserved = scratch.resize(images_.cells) && values.resize(block * rows);
#pragma omp for
      for (int64_t job = 0; job < jobs; ++job)
        for (int64_t c = 0; reserved && c < height; ++c) {
          const int64_t first = job * block, end = smaller(outputs, first + block);
          for (int64_t o = first; o < end; ++o) {
            const F* const values_of_scope = scope(o * height + c, scratch.data());
            for (int64_t r = 0; r < rows; ++r) values[r * block + o - first] = value(values_of_scope, r);
          }
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t o = first; o < end; ++o)
              to[a.depthwise ? r * order.stored + order.slot[o] : (r * height + c) * outputs + o] =
                  values[r * block + o - first];
        }
    }
    return reserved;
  }

 private:
  const Images<F>& images_;
  Buffer<Hat<F>> rows_, columns_;  // of the taps
  int64_t item_ = 0;
};

// The kernels of some images: one for all of them, or one each.
template <class F>
bool write_kernels(const Images<F>& images, const ChannelOrder& order, int64_t first, int64_t count, int64_t size,
                   int threads, Buffer<F>& to) {
  if (!to.resize(count * size)) return false;
  for (int64_t i = 0; i < count; ++i) {
    Kernels<F> kernels(images);
    if (!kernels.start(first + i) || !kernels.write(order, &to[i * size], threads)) return false;
  }
  return true;
}

// ---- taps

// Where a tap reads, in an image or in the kernel: the offsets of four neighbors in rows of stored channels, with the
// hats along the two axes; if nothing is interpolated, of one.
template <class F>
struct Sample {
  int64_t at[4];
  Hat<F> row, column;

  F factor(int i) const {
    return (i < 2 ? row.low_factor : row.high_factor) * (i % 2 ? column.high_factor : column.low_factor);
  }
  void place(int64_t width, int64_t stored) {
    at[0] = (row.low * width + column.low) * stored;
    at[1] = (row.low * width + column.high) * stored;
    at[2] = (row.high * width + column.low) * stored;
    at[3] = (row.high * width + column.high) * stored;
  }
};

template <class F>
struct Tap {
  int64_t number;
  Sample<F> data, kernel;
  F modulation;
};

// Finds the taps of positions. In the backward direction a position is a pixel of the input, and its taps are the
// positions of the output that it acts on, which is possible where images are not sampled.
template <class F>
struct TapFinder {
  const Images<F>& images;
  int64_t image_row, kernel_row;  // stored channels of an image and of a kernel
  bool backward;

  // Sets `tap` to tap k of pixel (y, x) of image `item`; false if the tap is outside.
  template <bool samples_images, bool samples_kernels>
  bool find(int64_t item, int64_t y, int64_t x, int64_t k, int64_t kernel_group, int64_t data_group,
            Tap<F>& tap) const {
    const Deform2d& a = images.args;
    const int64_t u = k / a.kernel_width, v = k % a.kernel_width;
    int64_t pixel = y * a.out_width + x;  // of the output
    tap.number = k;
    if (!samples_images && backward) {
      const int64_t row = y + a.row_padding - u * a.row_dilation, column = x + a.column_padding - v * a.column_dilation;
      if (row < 0 || column < 0 || row % a.row_stride || column % a.column_stride) return false;
      if (row / a.row_stride >= a.out_height || column / a.column_stride >= a.out_width) return false;
      pixel = row / a.row_stride * a.out_width + column / a.column_stride;
      tap.data.at[0] = pixel * image_row;
    } else {
      const int64_t row = y * a.row_stride - a.row_padding + u * a.row_dilation;
      const int64_t column = x * a.column_stride - a.column_padding + v * a.column_dilation;
      if constexpr (!samples_images) {
        if (row < 0 || column < 0 || row >= a.height || column >= a.width) return false;
        tap.data.at[0] = (row * a.width + column) * image_row;
      } else {
        const int64_t at = data_group * images.taps + k;
        const auto offset = [&](int axis) {
          return images.data_offsets.data ? images.data_offsets.at(item, at * 2 + axis, pixel) : F(0);
        };
        tap.data.row = hat_at<F>(F(row) + offset(0), a.height, false);
        tap.data.column = hat_at<F>(F(column) + offset(1), a.width, false);
        tap.data.place(a.width, image_row);
        tap.modulation = images.modulations.data ? images.modulations.at(item, at, pixel) : F(1);
      }
    }
    if constexpr (samples_kernels) {
      const int64_t at = (kernel_group * images.taps + k) * 2;
      const auto position = [&](int axis, int64_t tap_of_axis, int64_t taps, int64_t scope) {
        return grid_position<F>(tap_of_axis, taps, scope, a.uniform_grid) +
               images.kernel_offsets.at(item, at + axis, pixel);
      };
      tap.kernel.row = hat_at<F>(position(0, u, a.kernel_height, a.scope_height), a.scope_height, a.clips);
      tap.kernel.column = hat_at<F>(position(1, v, a.kernel_width, a.scope_width), a.scope_width, a.clips);
      tap.kernel.place(a.scope_width, kernel_row);
    } else {
      tap.kernel.at[0] = k * kernel_row;
    }
    return true;
  }
};

// Whether all factors of the sample are zero: it is outside of its image.
template <class F>
bool is_outside(const Sample<F>& sample) {
  return (sample.row.low_factor == 0 && sample.row.high_factor == 0) ||
         (sample.column.low_factor == 0 && sample.column.high_factor == 0);
}

}  // namespace
}  // namespace kp
