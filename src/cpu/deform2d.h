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

constexpr int64_t copied_bytes = 16 << 20;  // copied of images, or of their kernels, at a time, unless one is larger

inline int64_t images_at_once(int64_t bytes_of_one) {
  return larger<int64_t>(1, copied_bytes / larger<int64_t>(1, bytes_of_one));
}

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
  // Copies the values of `count` pixels from `first` on.
  template <class T>
  void load(int64_t item, int64_t channel, int64_t first, int64_t count, T* to) const {
    for (int64_t p = 0; p < count; ++p) to[p] = at(item, channel, first + p);
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
  // Whether the kernels of the images differ.
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

// Whether the three channels after c exist and are stored behind it.
inline bool are_four(const int64_t* slot, int64_t c, int64_t channels) {
  return c + 4 <= channels && slot[c + 1] == slot[c] + 1 && slot[c + 2] == slot[c] + 2 && slot[c + 3] == slot[c] + 3;
}

// Copies four rows of four values each to four columns.
template <class F>
KP_INLINE void transpose_block(const F* from, int64_t from_row, F* to, int64_t to_row) {
  Four<F> rows[4], columns[4];
  for (int i = 0; i < 4; ++i) rows[i] = *reinterpret_cast<const Four<F>*>(from + i * from_row);
  transpose_four<F>(rows, columns);
  for (int i = 0; i < 4; ++i) *reinterpret_cast<Four<F>*>(to + i * to_row) = columns[i];
}

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
      for (int64_t c = 0; c < order.channels; ++c) {
        int64_t p = begin;
        if (!images.channels_last && are_four(order.slot.data(), c, order.channels)) {
          const F* const from = &images.at(first + item, c, 0);
          for (; p + 4 <= end; p += 4) transpose_block(from + p, pixels_, to + p * stored_ + order.slot[c], stored_);
          for (; p < end; ++p)
            for (int64_t i = 0; i < 4; ++i) to[p * stored_ + order.slot[c] + i] = from[i * pixels_ + p];
          c += 3;
        }
        for (; p < end; ++p) to[p * stored_ + order.slot[c]] = images.at(first + item, c, p);
      }
    }
    return true;
  }
  const F* item(int64_t i) const { return data_ + i * pixels_ * stored_; }

 private:
  Buffer<F> copy_;
  const F* data_ = nullptr;
  int64_t stored_ = 0, pixels_ = 0;
};

// Writes `count` rows of a tile, pixels from `first` on, to an image; adds the bias unless it is null. `slot`: the
// place of each channel in a row.
template <class F>
void write_pixels(F* rows, int64_t row_size, const int64_t* slot, int64_t count, const F* bias, const PixelArray<F>& to,
                  int64_t item, int64_t first) {
  for (int64_t p = 0; bias && p < count; ++p)
    for (int64_t c = 0; c < to.channels; ++c) rows[p * row_size + slot[c]] += bias[c];
  if (to.channels_last) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < to.channels; ++c) to.at(item, c, first + p) = rows[p * row_size + slot[c]];
    return;
  }
  constexpr int64_t block = 16;  // rows whose values of one channel are in the first-level cache for the next channels
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = smaller(count, begin + block);
    for (int64_t c = 0; c < to.channels; ++c) {
      F* const plane = &to.at(item, c, first);
      int64_t p = begin;
      if (are_four(slot, c, to.channels)) {
        for (; p + 4 <= end; p += 4) transpose_block(rows + p * row_size + slot[c], row_size, plane + p, to.pixels);
        for (; p < end; ++p)
          for (int64_t i = 0; i < 4; ++i) plane[i * to.pixels + p] = rows[p * row_size + slot[c] + i];
        c += 3;
      }
      for (; p < end; ++p) plane[p] = rows[p * row_size + slot[c]];
    }
  }
}

// ---- taps

// Positions for which taps are found together, in loops that the compiler makes vectors of.
constexpr int64_t block_size = 16;

// Consecutive positions of an image: pixels of the output, or backward of the input.
struct Positions {
  int64_t first, count;
  int32_t row[block_size], column[block_size];

  Positions(int64_t begin, int64_t num, int64_t width) : first(begin), count(num) {
    int64_t y = begin / width, x = begin % width;
    for (int64_t l = 0; l < block_size; ++l) {
      row[l] = int32_t(y);
      column[l] = int32_t(x);
      if (++x == width) {
        x = 0;
        ++y;
      }
    }
  }
};

// The cells around positions along one axis, with their factors: see Hat.
template <class F>
struct Hats {
  int32_t low[block_size], high[block_size];
  F low_factor[block_size], high_factor[block_size], low_slope[block_size], high_slope[block_size];

  void set(const F* at, int64_t size, bool clips) {
    for (int64_t l = 0; l < block_size; l += lanes<F>) {
      const Hat<Vec<F>> hat = hat_at<Vec<F>, F>(load(at + l), F(size), clips);
      const auto put = [=](int32_t* to, Vec<F> cells) {
        const auto numbers = to_integers<F>(cells);
        memcpy(to + l, &numbers, sizeof(numbers));
      };
      put(low, hat.low);
      put(high, hat.high);
      store(low_factor + l, hat.low_factor);
      store(high_factor + l, hat.high_factor);
      store(low_slope + l, hat.low_slope);
      store(high_slope + l, hat.high_slope);
    }
  }
};

// Where one tap of several positions reads, in an image or in a kernel: four cells each with their factors, and the
// hats that these are products of. If nothing is interpolated, the first cell.
template <class F>
struct Samples {
  Hats<F> rows, columns;
  int32_t cell[4][block_size];
  F factor[4][block_size];

  // Interpolates at `row` and `column` in an array of this size; factors are multiplied by `scale` unless it is null.
  void set(const F* row, const F* column, int64_t height, int64_t width, bool clips, const F* scale) {
    rows.set(row, height, clips);
    columns.set(column, width, clips);
    for (int64_t l = 0; l < block_size; ++l) {
      const F low = scale ? scale[l] * rows.low_factor[l] : rows.low_factor[l];
      const F high = scale ? scale[l] * rows.high_factor[l] : rows.high_factor[l];
      factor[0][l] = low * columns.low_factor[l];
      factor[1][l] = low * columns.high_factor[l];
      factor[2][l] = high * columns.low_factor[l];
      factor[3][l] = high * columns.high_factor[l];
      cell[0][l] = rows.low[l] * int32_t(width) + columns.low[l];
      cell[1][l] = rows.low[l] * int32_t(width) + columns.high[l];
      cell[2][l] = rows.high[l] * int32_t(width) + columns.low[l];
      cell[3][l] = rows.high[l] * int32_t(width) + columns.high[l];
    }
  }
  // Whether sample l is inside: not all of its factors are zero. They may be NaN.
  bool is_inside(int64_t l) const {
    return ((rows.low_factor[l] != 0) | (rows.high_factor[l] != 0)) &
           ((columns.low_factor[l] != 0) | (columns.high_factor[l] != 0));
  }
};

// One tap of several positions. Factors of the data include the modulation.
template <class F>
struct TapBlock {
  bool inside[block_size];
  Samples<F> data, kernel;
  F modulation[block_size];
};

// Finds the taps of positions. In the backward direction a position is a pixel of the input, and its taps are the
// positions of the output that it acts on, which is possible where images are not sampled.
template <class F>
struct TapFinder {
  const Images<F>& images;
  bool backward;

  // Tap k of positions in image `item`. A tap that is not inside of the image contributes nothing.
  template <bool samples_images, bool samples_kernels>
  void find(int64_t item, const Positions& at, int64_t k, int64_t kernel_group, int64_t data_group,
            TapBlock<F>& to) const {
    const Deform2d& a = images.args;
    const int32_t u = int32_t(k / a.kernel_width), v = int32_t(k % a.kernel_width);
    if constexpr (samples_images)
      sample_image(item, at, u, v, data_group * images.taps + k, to);
    else
      find_pixels(at, u, v, to);
    if constexpr (samples_kernels) {
      const int64_t channel = (kernel_group * images.taps + k) * 2;
      F row[block_size] = {}, column[block_size] = {};
      if (!samples_images && backward) {
        for (int64_t l = 0; l < at.count; ++l) {
          if (!to.inside[l]) continue;
          row[l] = images.kernel_offsets.at(item, channel, to.data.cell[0][l]);
          column[l] = images.kernel_offsets.at(item, channel + 1, to.data.cell[0][l]);
        }
      } else {
        images.kernel_offsets.load(item, channel, at.first, at.count, row);
        images.kernel_offsets.load(item, channel + 1, at.first, at.count, column);
      }
      const F first_row = grid_position<F>(u, int32_t(a.kernel_height), int32_t(a.scope_height), a.uniform_grid);
      const F first_column = grid_position<F>(v, int32_t(a.kernel_width), int32_t(a.scope_width), a.uniform_grid);
      for (int64_t l = 0; l < block_size; ++l) {
        row[l] += first_row;
        column[l] += first_column;
      }
      to.kernel.set(row, column, a.scope_height, a.scope_width, a.clips, nullptr);
    } else {
      for (int64_t l = 0; l < block_size; ++l) to.kernel.cell[0][l] = int32_t(k);
    }
  }

 private:
  // The pixels at which tap (u, v) reads, without offsets.
  void find_pixels(const Positions& at, int32_t u, int32_t v, TapBlock<F>& to) const {
    const Deform2d& a = images.args;
    const int32_t row_stride = int32_t(a.row_stride), column_stride = int32_t(a.column_stride);
    const int32_t first_row = u * int32_t(a.row_dilation) - int32_t(a.row_padding);
    const int32_t first_column = v * int32_t(a.column_dilation) - int32_t(a.column_padding);
    for (int64_t l = 0; l < block_size; ++l) {
      if (backward) {
        const int32_t row = at.row[l] - first_row, column = at.column[l] - first_column;
        const int32_t y = row / row_stride, x = column / column_stride;
        to.inside[l] = (l < at.count) & (row >= 0) & (column >= 0) & (y * row_stride == row) &
                       (x * column_stride == column) & (y < a.out_height) & (x < a.out_width);
        to.data.cell[0][l] = to.inside[l] ? y * int32_t(a.out_width) + x : 0;
      } else {
        const int32_t y = at.row[l] * row_stride + first_row, x = at.column[l] * column_stride + first_column;
        to.inside[l] = (l < at.count) & (y >= 0) & (x >= 0) & (y < a.height) & (x < a.width);
        to.data.cell[0][l] = to.inside[l] ? y * int32_t(a.width) + x : 0;
      }
    }
  }

  // The samples of tap (u, v); its offsets and modulations are those of a tap of a data group.
  void sample_image(int64_t item, const Positions& at, int32_t u, int32_t v, int64_t tap, TapBlock<F>& to) const {
    const Deform2d& a = images.args;
    const int32_t first_row = u * int32_t(a.row_dilation) - int32_t(a.row_padding);
    const int32_t first_column = v * int32_t(a.column_dilation) - int32_t(a.column_padding);
    F row[block_size] = {}, column[block_size] = {};
    if (images.data_offsets.data) {
      images.data_offsets.load(item, tap * 2, at.first, at.count, row);
      images.data_offsets.load(item, tap * 2 + 1, at.first, at.count, column);
    }
    for (int64_t l = 0; l < block_size; ++l) {
      row[l] += F(at.row[l] * int32_t(a.row_stride) + first_row);
      column[l] += F(at.column[l] * int32_t(a.column_stride) + first_column);
      to.modulation[l] = F(1);
    }
    if (images.modulations.data) images.modulations.load(item, tap, at.first, at.count, to.modulation);
    to.data.set(row, column, a.height, a.width, false, images.modulations.data ? to.modulation : nullptr);
    for (int64_t l = 0; l < block_size; ++l) to.inside[l] = (l < at.count) & to.data.is_inside(l);
  }
};

}  // namespace
}  // namespace kp
