// Convolutions of images with deformable kernels, deformable sampling positions or kernels of each image, on the GPU.
//
//   out[j] = sum over taps k of m_jk x(s j - p + d k + o_jk) W(g_k + r_jk)      (formulas/deform2d.h)
//
// Depthwise: one launch. A block takes some pixels, and the channels that share the offsets of kernel and data. It
// computes where each tap of each pixel reads once, into shared memory, for all of these channels.
//
// Otherwise the samples of all taps are computed for some thousand positions at a time, and cuBLAS multiplies them by
// the kernel. The gradient of an image that is not sampled is the same sum, of the gradient of the output.
//
// The gradients of samples are computed for some thousand positions at a time, too. A pair is a pixel with a sample
// that interpolates it; the gradient of a pixel is the sum over its pairs in their order.
//
// Neighboring threads have neighboring pixels, or channels where these are last. All sums have a fixed order, so
// results do not depend on the launch. Blocks have 128 threads.
//
// Compiled for the type of images and weights:
// compile: KP_F=float
// compile: KP_F=double
// compile: KP_F=kp::Half
// compile: KP_F=kp::Bfloat

#include "formulas/deform2d.h"
#include "launch.h"
#include "storage.h"

namespace kp {
namespace {

using S = KP_F;
using F = Real<S>;
constexpr int threads = 128;  // of a block
// Shared memory for the taps of some pixels: with it fit at least four blocks on a multiprocessor.
constexpr int tile_bytes = 15360;
constexpr int bytes_per_tap = 2 * (8 + 4 * int(sizeof(F)));
constexpr int max_sums = 16384 / 2 / (threads * int(sizeof(F)));  // that a thread keeps in half of the shared memory

template <class T>
__device__ T sum_of_warp(T x) {
  for (int bit = warp / 2; bit; bit /= 2) x += __shfl_xor_sync(all_lanes, x, bit);
  return x;
}

// ---- the arguments

#define KP_IMAGES                                                                                                  \
  int64_t channels, int height, int width, int64_t out_channels, int out_height, int out_width, int kernel_height, \
      int kernel_width, int scope_height, int scope_width, int64_t row_stride, int64_t column_stride,              \
      int64_t row_padding, int64_t column_padding, int64_t row_dilation, int64_t column_dilation,                  \
      const S *kernel_offsets, const S *data_offsets, const S *modulations, int kernel_groups, int data_groups,    \
      int is_local, int uniform_grid, int clips, int channels_last
#define KP_MAKE_IMAGES                                                                                        \
  Images {                                                                                                    \
    channels, height, width, out_channels, out_height, out_width, kernel_height, kernel_width, scope_height,  \
        scope_width, row_stride, column_stride, row_padding, column_padding, row_dilation, column_dilation,   \
        kernel_offsets, data_offsets, modulations, kernel_groups, data_groups, is_local, uniform_grid, clips, \
        channels_last                                                                                         \
  }

// A hat with cells that are integers.
using CellHat = Hat<F, int32_t>;
__device__ CellHat cells_at(F at, int size, bool clips) {
  const Hat<F> hat = hat_at<F>(at, size, clips);
  return {int32_t(hat.low), int32_t(hat.high), hat.low_factor, hat.high_factor, hat.low_slope, hat.high_slope};
}

// Where a sample is, in an image or in the scope of a kernel.
struct Place {
  CellHat row, column;

  // Whether all factors are zero.
  __device__ bool is_outside() const {
    return (row.low_factor == 0 && row.high_factor == 0) || (column.low_factor == 0 && column.high_factor == 0);
  }
  __device__ F factor(int corner) const {
    return (corner < 2 ? row.low_factor : row.high_factor) * (corner % 2 ? column.high_factor : column.low_factor);
  }
  // The pixel or cell of a corner in rows of `size`.
  template <class Offset>
  __device__ Offset corner(int corner, Offset size) const {
    return (corner < 2 ? row.low : row.high) * size + (corner % 2 ? column.high : column.low);
  }
};

struct Pixel {
  int y, x;

  __device__ static Pixel numbered(int64_t number, int width) { return {int(number / width), int(number % width)}; }
  __device__ int64_t number(int width) const { return int64_t(y) * width + x; }
  // The pixel that comes `count` later, less than 2^16.
  __device__ Pixel after(int count, int width) const {
    const uint32_t right = uint32_t(x) + uint32_t(count);
    return {y + int(right / uint32_t(width)), int(right % uint32_t(width))};
  }
};

struct Images {
  int64_t channels;
  int height, width;
  int64_t out_channels;
  int out_height, out_width, kernel_height, kernel_width, scope_height, scope_width;
  int64_t row_stride, column_stride, row_padding, column_padding, row_dilation, column_dilation;
  const S *kernel_offsets, *data_offsets, *modulations;
  int kernel_groups, data_groups, is_local, uniform_grid, clips, channels_last;

  __device__ int taps() const { return kernel_height * kernel_width; }
  __device__ int cells() const { return scope_height * scope_width; }
  // The values of a kernel by channel: one for each tap, or each cell of the scope if positions interpolate them.
  __device__ int kernel_rows() const { return is_local ? cells() : taps(); }
  __device__ int64_t in_pixels() const { return int64_t(height) * width; }
  __device__ int64_t out_pixels() const { return int64_t(out_height) * out_width; }
  __device__ bool samples_images() const { return data_offsets || modulations; }
  // Whether the kernel of an image is interpolated between the weight's cells, at the same places for all positions.
  __device__ bool interpolates_weight() const {
    return !is_local && (kernel_offsets || scope_height != kernel_height || scope_width != kernel_width);
  }
  // The place of a value in an array of images with `count` channels.
  __device__ int64_t at(int64_t item, int64_t count, int64_t channel, int64_t pixels, int64_t pixel) const {
    return channels_last ? (item * pixels + pixel) * count + channel : (item * count + channel) * pixels + pixel;
  }
  // Between neighboring pixels of an array with `count` channels, and between its channels.
  __device__ int64_t pixel_step(int64_t count) const { return channels_last ? count : 1; }
  __device__ int64_t channel_step(int64_t pixels) const { return channels_last ? 1 : pixels; }

  // Between neighboring values of a channel in a depthwise kernel, of fewer than 2^31 values, and between channels.
  __device__ int kernel_value_step() const { return channels_last ? int(channels) : 1; }
  __device__ int64_t kernel_channel_step() const { return channels_last ? 1 : kernel_rows(); }

  // The row and the column of the image at which tap k of the output's pixel is without offsets.
  __device__ int64_t row(Pixel pixel, int k) const {
    return pixel.y * row_stride - row_padding + k / kernel_width * row_dilation;
  }
  __device__ int64_t column(Pixel pixel, int k) const {
    return pixel.x * column_stride - column_padding + k % kernel_width * column_dilation;
  }
  // The pixel of the image at which the output's pixel has tap k, if images are not sampled. False if it is outside.
  __device__ bool read_by(Pixel pixel, int k, Pixel& read) const {
    const int64_t y = row(pixel, k), x = column(pixel, k);
    read = {int(y), int(x)};
    return y >= 0 && x >= 0 && y < height && x < width;
  }
  // The output's pixel that has tap k at this pixel of the image. False if there is none.
  __device__ bool reader_of(Pixel pixel, int k, Pixel& reader) const {
    const int64_t y = pixel.y + row_padding - k / kernel_width * row_dilation;
    const int64_t x = pixel.x + column_padding - k % kernel_width * column_dilation;
    if (y < 0 || x < 0) return false;
    const uint32_t rows = uint32_t(row_stride), columns = uint32_t(column_stride);
    const uint32_t output_y = uint32_t(y) / rows, output_x = uint32_t(x) / columns;
    reader = {int(output_y), int(output_x)};
    return uint32_t(y) % rows == 0 && uint32_t(x) % columns == 0 && output_y < uint32_t(out_height) &&
           output_x < uint32_t(out_width);
  }
  // Where tap k of the output's pixel samples the image.
  __device__ Place data_place(int64_t item, int group, int k, Pixel pixel) const {
    F y = F(row(pixel, k)), x = F(column(pixel, k));
    if (data_offsets) {
      const int64_t count = int64_t(data_groups) * taps() * 2, channel = (int64_t(group) * taps() + k) * 2;
      y += F(data_offsets[at_output(item, count, channel, pixel)]);
      x += F(data_offsets[at_output(item, count, channel + 1, pixel)]);
    }
    return {cells_at(y, height, false), cells_at(x, width, false)};
  }
  __device__ F modulation(int64_t item, int group, int k, Pixel pixel) const {
    const int64_t channel = int64_t(group) * taps() + k;
    return modulations ? F(modulations[at_output(item, int64_t(data_groups) * taps(), channel, pixel)]) : F(1);
  }
  // Where tap k samples the scope. `group` and `pixel` matter only if kernel offsets are local.
  __device__ Place kernel_place(int64_t item, int group, int k, Pixel pixel) const {
    F y = grid_position<F>(k / kernel_width, kernel_height, scope_height, uniform_grid != 0);
    F x = grid_position<F>(k % kernel_width, kernel_width, scope_width, uniform_grid != 0);
    if (kernel_offsets) {
      const int64_t count = int64_t(kernel_groups) * taps() * 2, channel = (int64_t(group) * taps() + k) * 2;
      y += F(kernel_offsets[is_local ? at_output(item, count, channel, pixel) : item * count + channel]);
      x += F(kernel_offsets[is_local ? at_output(item, count, channel + 1, pixel) : item * count + channel + 1]);
    }
    return {cells_at(y, scope_height, clips != 0), cells_at(x, scope_width, clips != 0)};
  }
  // The place of a value in an array with `count` channels for each pixel of the output.
  __device__ int64_t at_output(int64_t item, int64_t count, int64_t channel, Pixel pixel) const {
    return at(item, count, channel, out_pixels(), pixel.number(out_width));
  }
};

// The channels that share the offsets of kernel and data: `step` apart.
struct ChannelClass {
  int kernel_group, data_group;
  int64_t first, count, step;

  __device__ ChannelClass(const Images& images, int kernel_group, int data_group)
      : kernel_group(kernel_group), data_group(data_group), step(images.kernel_groups) {
    const int64_t width = images.channels / images.data_groups, begin = data_group * width;
    first = begin + (kernel_group - begin % step + step) % step;
    count = first < begin + width ? (begin + width - first + step - 1) / step : 0;
  }
  __device__ int64_t channel(int64_t i) const { return first + i * step; }
};

// ---- samples and their derivatives

struct Interpolated {
  F value, by_row, by_column;
};

// The sample, and its derivatives by the position, of the values at the corners.
__device__ Interpolated interpolate(const Place& place, const F* corners) {
  const CellHat &y = place.row, &x = place.column;
  const F low = x.low_factor * corners[0] + x.high_factor * corners[1];
  const F high = x.low_factor * corners[2] + x.high_factor * corners[3];
  return {y.low_factor * low + y.high_factor * high, y.low_slope * low + y.high_slope * high,
          y.low_factor * (x.low_slope * corners[0] + x.high_slope * corners[1]) +
              y.high_factor * (x.low_slope * corners[2] + x.high_slope * corners[3])};
}
// Of the cells of a scope.
__device__ Interpolated interpolate(const Place& place, const S* cells, int width) {
  F corners[4];
  for (int j = 0; j < 4; ++j) corners[j] = F(cells[place.corner(j, width)]);
  return interpolate(place, corners);
}

// ---- tiles: the taps of some pixels in shared memory

// Samples with the factors of their four corners. A code is the lowest pixel or cell times four, and whether there are
// a next row and a next column.
template <int size>
struct Samples {
  int64_t codes[size];
  F factors[4][size];

  __device__ void write(int i, const Place& place, int64_t row_size, F scale) {
    codes[i] = place.corner<int64_t>(0, row_size) * 4 + (place.row.high > place.row.low) * 2 +
               (place.column.high > place.column.low);
    for (int j = 0; j < 4; ++j) factors[j][i] = place.factor(j) * scale;
  }
};
template <int size>
struct Tile {
  Samples<size> data, kernel;
};
constexpr int64_t outside = -1;  // a code
constexpr int tile_size = tile_bytes / bytes_per_tap;

__device__ Tile<tile_size>& shared_tile() {
  __shared__ Tile<tile_size> tile;
  return tile;
}

// Reads one sample from several channels.
template <bool interpolates, class Offset = int64_t>
struct Sample {
  Offset at, row, column;  // the lowest corner, and what is added for the next row and column
  F factors[4];

  template <int size>
  __device__ Sample(const Samples<size>& samples, int i, Offset row_size, Offset step) {
    const int64_t code = samples.codes[i];
    at = Offset(interpolates ? code >> 2 : code) * step;
    if constexpr (interpolates) {
      row = code & 2 ? row_size * step : 0;
      column = code & 1 ? step : 0;
      for (int j = 0; j < 4; ++j) factors[j] = samples.factors[j][i];
    }
  }
  __device__ Offset corner(int j) const { return at + (j < 2 ? 0 : row) + (j % 2 ? column : 0); }
  __device__ F read(const S* from) const {
    if constexpr (!interpolates) return F(from[at]);
    F value = factors[0] * F(from[at]);
    for (int j = 1; j < 4; ++j) value = fma(factors[j], F(from[corner(j)]), value);
    return value;
  }
};

// Writes taps [begin, begin + count) of `num_pixels` pixels from `first` on to a tile, tap after tap. Backward, these
// are pixels of the image, and a tap reads from the output, which is possible if images are not sampled.
template <bool samples_images, bool samples_kernels, int size>
__device__ void fill(Tile<size>& tile, const Images& images, bool backward, int64_t item, const ChannelClass& shared,
                     Pixel first, int num_pixels, int begin, int count) {
  const int row_size = backward ? images.width : images.out_width;
  const int rows = backward ? images.height : images.out_height;
  // Neighboring threads read neighboring offsets.
  const int length = images.channels_last ? count : num_pixels;
  const auto for_each = [&](auto call) {
    for (int t = int(threadIdx.x); t < count * num_pixels; t += threads) {
      const int tap = images.channels_last ? t % length : t / length;
      const int p = images.channels_last ? t / length : t % length;
      call(tap * num_pixels + p, begin + tap, first.after(p, row_size));
    }
  };
  for_each([&](int i, int k, Pixel pixel) {
    tile.data.codes[i] = outside;
    if (pixel.y >= rows) return;
    if constexpr (samples_images) {
      const Place place = images.data_place(item, shared.data_group, k, pixel);
      if (!place.is_outside())
        tile.data.write(i, place, images.width, images.modulation(item, shared.data_group, k, pixel));
    } else {
      Pixel read;
      if (backward ? images.reader_of(pixel, k, read) : images.read_by(pixel, k, read))
        tile.data.codes[i] = read.number(backward ? images.out_width : images.width);
    }
    if constexpr (!samples_kernels) tile.kernel.codes[i] = k;
  });
  if constexpr (samples_kernels)
    for_each([&](int i, int k, Pixel pixel) {  // both at once would take too many registers
      if (tile.data.codes[i] == outside) return;
      Pixel position = pixel;  // of the output
      if (backward) images.reader_of(pixel, k, position);
      tile.kernel.write(i, images.kernel_place(item, shared.kernel_group, k, position), images.scope_width, F(1));
    });
}

// The pixel and the channel of a thread of a block: neighboring threads have neighboring pixels, or channels where
// these are last.
struct Lanes {
  int pixels, channels, pixel, channel;

  __device__ Lanes(const Images& images, int num_pixels, int64_t num_channels) {
    channels = threads / num_pixels;
    if (images.channels_last)
      for (channels = warp; channels > 4 && channels / 2 >= num_channels;) channels /= 2;
    pixels = threads / channels;
    pixel = int(threadIdx.x) % pixels;
    channel = int(threadIdx.x) / pixels;
    if (!images.channels_last) return;
    channel = int(threadIdx.x) % channels;
    pixel = int(threadIdx.x) / channels;
  }
};

template <bool value>
struct Constant {
  static constexpr bool is = value;
};
// Calls call(Constant) with a value that is known only when the kernel runs.
template <class Call>
__device__ void with_constant(bool value, Call call) {
  if (value)
    call(Constant<true>());
  else
    call(Constant<false>());
}

// ---- depthwise convolution

struct Depthwise {
  int64_t batch;
  bool backward;
  int tile_pixels;
  const S *from, *kernels;
  int64_t kernel_step;
  const S* bias;
  S* to;
};

template <bool samples_images, bool samples_kernels>
__device__ void convolve(const Images& images, const Depthwise& a) {
  Tile<tile_size>& tile = shared_tile();
  // As many as there are registers for.
  constexpr bool is_wide = sizeof(F) == 8, is_half = sizeof(S) == 2;
  constexpr int channels_per_thread = samples_images && samples_kernels   ? (is_wide ? 1 : 2)
                                      : samples_images || samples_kernels ? (is_wide   ? 1
                                                                             : is_half ? 3
                                                                                       : 4)
                                                                          : 4;
  const int taps = images.taps(), taps_at_once = tile_size / a.tile_pixels;
  const int from_width = a.backward ? images.out_width : images.width;
  const int to_width = a.backward ? images.width : images.out_width;
  const int64_t from_pixels = a.backward ? images.out_pixels() : images.in_pixels();
  const int64_t pixels = a.backward ? images.in_pixels() : images.out_pixels();
  const int64_t step = images.pixel_step(images.channels), tiles = (pixels + a.tile_pixels - 1) / a.tile_pixels;
  const int classes = images.kernel_groups * images.data_groups;
  const Lanes lanes(images, a.tile_pixels, images.channels / classes);
  // Between the channels of a thread.
  const int64_t next_channel = int64_t(lanes.channels) * images.kernel_groups;
  const int64_t next_source = next_channel * images.channel_step(from_pixels),
                next_kernel = next_channel * images.kernel_channel_step();
  for (int64_t job = blockIdx.x; job < a.batch * tiles * classes; job += gridDim.x) {
    const int64_t item = job / classes / tiles, first = job / classes % tiles * a.tile_pixels;
    const int i = int(job % classes);
    const ChannelClass shared(images, i % images.kernel_groups, i / images.kernel_groups);
    bool is_filled = false;
    for (int begin_pixel = 0; begin_pixel < a.tile_pixels; begin_pixel += lanes.pixels)
      for (int64_t begin = 0; begin < shared.count; begin += lanes.channels * channels_per_thread) {
        const int p = begin_pixel + lanes.pixel;
        const int64_t c = shared.channel(begin + lanes.channel);
        // How many channels the thread has, 0 beyond the last pixel.
        const int64_t left = (shared.count - begin - lanes.channel + lanes.channels - 1) / lanes.channels;
        const int num_channels = p < a.tile_pixels && first + p < pixels && begin + lanes.channel < shared.count
                                     ? int(left < channels_per_thread ? left : channels_per_thread)
                                     : 0;
        const S* const sources = a.from + images.at(item, images.channels, c, from_pixels, 0);
        const S* const weights = a.kernels + item * a.kernel_step + c * images.kernel_channel_step();
        F sums[channels_per_thread];
        for (int j = 0; j < channels_per_thread; ++j) sums[j] = F(0);
        for (int begin_tap = 0; begin_tap < taps; begin_tap += taps_at_once) {
          const int count = taps - begin_tap < taps_at_once ? taps - begin_tap : taps_at_once;
          if (!is_filled) {
            __syncthreads();
            fill<samples_images, samples_kernels>(tile, images, a.backward, item, shared,
                                                  Pixel::numbered(first, to_width), a.tile_pixels, begin_tap, count);
            __syncthreads();
          }
          for (int k = 0; num_channels && k < count; ++k) {
            const int at = k * a.tile_pixels + p;
            if (tile.data.codes[at] == outside) continue;
            const Sample<samples_images> data(tile.data, at, from_width, step);
            const Sample<samples_kernels, int> kernel(tile.kernel, at, images.scope_width, images.kernel_value_step());
#pragma unroll
            for (int j = 0; j < channels_per_thread; ++j)
              if (j < num_channels)
                sums[j] = fma(data.read(sources + j * next_source), kernel.read(weights + j * next_kernel), sums[j]);
          }
          is_filled = taps <= taps_at_once;  // else the next channels need other taps first
        }
#pragma unroll
        for (int j = 0; j < channels_per_thread; ++j)
          if (j < num_channels) {
            const int64_t to = images.at(item, images.channels, c + j * next_channel, pixels, first + p);
            a.to[to] = S(a.bias ? sums[j] + F(a.bias[c + j * next_channel]) : sums[j]);
          }
      }
  }
}

// ---- gradients of local kernel offsets

struct LocalOffsets {
  int64_t batch;
  const S *x, *grad_out, *kernels;
  int64_t kernel_step;
  S* grad_kernel_offsets;
};

// With the channels last, neighboring warps have the taps of one position, else neighboring threads one tap.
template <bool samples_images>
__device__ void sum_by_tap(const Images& images, const LocalOffsets& a) {
  const int taps = images.taps(), all_taps = images.kernel_groups * taps, lanes = images.channels_last ? warp : 1;
  const int64_t pixels = images.out_pixels(), channels = images.channels, step = images.pixel_step(channels);
  const int lane = int(first_thread() % lanes);
  for (int64_t job = first_thread() / lanes; job < a.batch * all_taps * pixels; job += num_threads() / lanes) {
    const int64_t item = job / pixels / all_taps;
    const int at = int(images.channels_last ? job % all_taps : job / pixels % all_taps), k = at % taps;
    const Pixel pixel =
        Pixel::numbered(images.channels_last ? job / all_taps % pixels : job % pixels, images.out_width);
    const Place place = images.kernel_place(item, at / taps, k, pixel);
    // The weight is linear in the values at its corners, so these are summed, and interpolated once.
    F sums[4] = {};
    for (int group = 0; group < images.data_groups; ++group) {
      const ChannelClass shared(images, at / taps, group);
      Place data;
      Pixel read;
      F modulation = F(1);
      if constexpr (samples_images) {
        data = images.data_place(item, group, k, pixel);
        modulation = images.modulation(item, group, k, pixel);
        if (data.is_outside()) continue;
      } else {
        if (!images.read_by(pixel, k, read)) continue;
      }
      const int64_t first = shared.channel(lane), next = lanes * shared.step;
      const S* image = a.x + images.at(item, channels, first, images.in_pixels(), 0);
      const S* grad = a.grad_out + images.at(item, channels, first, pixels, pixel.number(images.out_width));
      const S* weights = a.kernels + item * a.kernel_step + first * images.kernel_channel_step();
#pragma unroll 1  // several channels at a time take too many registers
      for (int64_t j = lane; j < shared.count; j += lanes) {
        F value = F(0);
        if constexpr (samples_images) {
          for (int corner = 0; corner < 4; ++corner)
            value = fma(data.factor(corner), F(image[data.corner(corner, int64_t(images.width)) * step]), value);
        } else {
          value = F(image[read.number(images.width) * step]);
        }
        value *= modulation * F(*grad);
        for (int corner = 0; corner < 4; ++corner)
          sums[corner] = fma(value, F(weights[place.corner(corner, images.scope_width) * images.kernel_value_step()]),
                             sums[corner]);
        image += next * images.channel_step(images.in_pixels());
        grad += next * images.channel_step(pixels);
        weights += next * images.kernel_channel_step();
      }
    }
    for (int corner = 0; images.channels_last && corner < 4; ++corner) sums[corner] = sum_of_warp(sums[corner]);
    if (lane) continue;
    const Interpolated grads = interpolate(place, sums);
    for (int axis = 0; axis < 2; ++axis)
      a.grad_kernel_offsets[images.at_output(item, all_taps * 2, at * 2 + axis, pixel)] =
          S(axis ? grads.by_column : grads.by_row);
  }
}

// Samples of taps, or gradients of samples, of the pixels [first_pixel, first_pixel + num_pixels) of some images, as
// matrices that cuBLAS multiplies.
struct Matrices {
  int64_t item_step, group_step, group_channels, channel_step, tap_step, pixel_step;

  __device__ int64_t channel(int64_t i, int64_t c) const {
    return i * item_step + c / group_channels * group_step + c % group_channels * channel_step;
  }
};
#define KP_MATRICES                                                                                      \
  int64_t item_step, int64_t group_step, int64_t group_channels, int64_t channel_step, int64_t tap_step, \
      int64_t pixel_step
#define KP_MAKE_MATRICES                                                      \
  Matrices {                                                                  \
    item_step, group_step, group_channels, channel_step, tap_step, pixel_step \
  }

}  // namespace
}  // namespace kp

using namespace kp;

// kernels[i, pair, r], or [i, r, pair] if pairs_last, of the images from `first` on: the mixture of the experts,
// interpolated at the taps unless positions do that themselves. A pair is an output channel with an input channel of
// its group.
extern "C" __global__ void make_kernels(KP_IMAGES, const S* weight, const S* routing, int64_t experts, int64_t pairs,
                                        int64_t first, int64_t count, int pairs_last, S* kernels) {
  const Images images = KP_MAKE_IMAGES;
  const int64_t rows = images.kernel_rows(), cells = images.cells();
  const bool interpolates = images.interpolates_weight();
  for (int64_t t = first_thread(); t < count * pairs * rows; t += num_threads()) {
    const int64_t item = first + t / rows / pairs, at = t % (rows * pairs);
    const int64_t pair = pairs_last ? at % pairs : at / rows, r = pairs_last ? at / pairs : at % rows;
    Place place{};
    if (interpolates) place = images.kernel_place(item, 0, int(r), Pixel{});
    F sum = F(0);
    for (int64_t e = 0; e < experts; ++e) {
      const S* const scope = weight + (e * pairs + pair) * cells;
      const F value = interpolates ? interpolate(place, scope, scope_width).value : F(scope[r]);
      sum += (routing ? F(routing[item * experts + e]) : F(1)) * value;
    }
    kernels[t] = S(sum);
  }
}

// ---- forward, and the gradient of images that are not sampled

// Depthwise: `to` from `from`, which are `out` from x, or backward grad_x from grad_out. kernels: (channels, values)
// for each image, or (values, channels) if these are last, kernel_step apart. A kernel for each way of sampling, since
// one for all would take too many registers.
#define KP_DEPTHWISE                                                                                                 \
  int64_t batch, int backward, int tile_pixels, const S *from, const S *kernels, int64_t kernel_step, const S *bias, \
      S *to
#define KP_CONVOLVE(samples_images, samples_kernels)        \
  convolve<samples_images, samples_kernels>(KP_MAKE_IMAGES, \
                                            {batch, backward != 0, tile_pixels, from, kernels, kernel_step, bias, to})

extern "C" __global__ void __launch_bounds__(threads, 4) convolve_pixels(KP_IMAGES, KP_DEPTHWISE) {
  KP_CONVOLVE(false, false);
}
extern "C" __global__ void __launch_bounds__(threads, 4) convolve_samples(KP_IMAGES, KP_DEPTHWISE) {
  KP_CONVOLVE(true, false);
}
extern "C" __global__ void __launch_bounds__(threads, 4) convolve_pixels_locally(KP_IMAGES, KP_DEPTHWISE) {
  KP_CONVOLVE(false, true);
}
extern "C" __global__ void __launch_bounds__(threads, 4) convolve_samples_locally(KP_IMAGES, KP_DEPTHWISE) {
  KP_CONVOLVE(true, true);
}

// samples[...]: those of all taps of `num_pixels` positions from first_pixel on of `count` images from `first` on, in
// `from`, which is x, or backward grad_out.
extern "C" __global__ void __launch_bounds__(threads, 4)
    sample_taps(KP_IMAGES, int64_t first, int64_t count, int64_t first_pixel, int64_t num_pixels, int backward,
                int tile_pixels, const S* from, KP_MATRICES, S* samples) {
  Tile<tile_size>& tile = shared_tile();
  const Images images = KP_MAKE_IMAGES;
  const Matrices matrices = KP_MAKE_MATRICES;
  const int taps = images.taps(), taps_at_once = tile_size / tile_pixels;
  const int from_width = backward ? out_width : width, to_width = backward ? width : out_width;
  const int64_t from_pixels = backward ? images.out_pixels() : images.in_pixels();
  const int64_t from_channels = backward ? out_channels : channels;
  const int64_t step = images.pixel_step(from_channels), tiles = (num_pixels + tile_pixels - 1) / tile_pixels;
  const int64_t group_size = from_channels / data_groups;
  const Lanes lanes(images, tile_pixels, group_size);
  for (int64_t job = blockIdx.x; job < count * tiles * data_groups; job += gridDim.x) {
    const int64_t i = job / data_groups / tiles, begin_pixel = job / data_groups % tiles * tile_pixels;
    const ChannelClass shared(images, 0, int(job % data_groups));
    const S* const image = from + images.at(first + i, from_channels, 0, from_pixels, 0);
    for (int begin_tap = 0; begin_tap < taps; begin_tap += taps_at_once) {
      const int size = taps - begin_tap < taps_at_once ? taps - begin_tap : taps_at_once;
      with_constant(images.samples_images(), [&](auto with_images) {
        constexpr bool samples_images = decltype(with_images)::is;
        __syncthreads();
        fill<samples_images, false>(tile, images, backward != 0, first + i, shared,
                                    Pixel::numbered(first_pixel + begin_pixel, to_width), tile_pixels, begin_tap, size);
        __syncthreads();
        for (int p = lanes.pixel; p < tile_pixels && begin_pixel + p < num_pixels; p += lanes.pixels)
          for (int64_t j = lanes.channel; j < group_size; j += lanes.channels) {
            const int64_t c = shared.data_group * group_size + j;
            const S* const source = image + c * images.channel_step(from_pixels);
            S* const to = samples + matrices.channel(i, c) + (begin_pixel + p) * pixel_step;
            for (int k = 0; k < size; ++k) {
              const int place = k * tile_pixels + p;
              F value = F(0);
              if (tile.data.codes[place] != outside)
                value = Sample<samples_images>(tile.data, place, from_width, step).read(source);
              to[(begin_tap + k) * tap_step] = S(value);
            }
          }
      });
    }
  }
}

// ---- gradients of samples

// Depthwise: products[...] = grad_out times the weight of each tap, which is the gradient of its sample divided by the
// modulation; zero if the sample is outside of its image.
extern "C" __global__ void __launch_bounds__(threads, 4)
    weigh_taps(KP_IMAGES, int64_t first, int64_t count, int64_t first_pixel, int64_t num_pixels, int tile_pixels,
               const S* grad_out, const S* kernels, int64_t kernel_step, KP_MATRICES, S* products) {
  Tile<tile_size>& tile = shared_tile();
  const Images images = KP_MAKE_IMAGES;
  const Matrices matrices = KP_MAKE_MATRICES;
  const int taps = images.taps(), taps_at_once = tile_size / tile_pixels;
  const int64_t tiles = (num_pixels + tile_pixels - 1) / tile_pixels;
  const int classes = kernel_groups * data_groups;
  const Lanes lanes(images, tile_pixels, channels / classes);
  for (int64_t job = blockIdx.x; job < count * tiles * classes; job += gridDim.x) {
    const int64_t i = job / classes / tiles, begin_pixel = job / classes % tiles * tile_pixels;
    const ChannelClass shared(images, int(job % classes) % kernel_groups, int(job % classes) / kernel_groups);
    for (int begin_tap = 0; begin_tap < taps; begin_tap += taps_at_once) {
      const int size = taps - begin_tap < taps_at_once ? taps - begin_tap : taps_at_once;
      with_constant(is_local != 0, [&](auto with_kernels) {
        constexpr bool samples_kernels = decltype(with_kernels)::is;
        __syncthreads();
        fill<true, samples_kernels>(tile, images, false, first + i, shared,
                                    Pixel::numbered(first_pixel + begin_pixel, out_width), tile_pixels, begin_tap,
                                    size);
        __syncthreads();
        for (int p = lanes.pixel; p < tile_pixels && begin_pixel + p < num_pixels; p += lanes.pixels)
          for (int64_t j = lanes.channel; j < shared.count; j += lanes.channels) {
            const int64_t c = shared.channel(j), pixel = first_pixel + begin_pixel + p;
            const F grad = F(grad_out[images.at(first + i, channels, c, images.out_pixels(), pixel)]);
            const S* const weights = kernels + (first + i) * kernel_step + c * images.kernel_channel_step();
            S* const to = products + matrices.channel(i, c) + (begin_pixel + p) * pixel_step;
            for (int k = 0; k < size; ++k) {
              const int place = k * tile_pixels + p;
              F value = F(0);
              if (tile.data.codes[place] != outside)
                value = grad * Sample<samples_kernels, int>(tile.kernel, place, scope_width, images.kernel_value_step())
                                   .read(weights);
              to[(begin_tap + k) * tap_step] = S(value);
            }
          }
      });
    }
  }
}

// Gradients of data offsets and modulations, each unless null, from the products of weigh_taps or of cuBLAS.
extern "C" __global__ void __launch_bounds__(threads, 4)
    data_grads(KP_IMAGES, int64_t first, int64_t count, int64_t first_pixel, int64_t num_pixels, const S* x,
               KP_MATRICES, const S* products, S* grad_data_offsets, S* grad_modulations) {
  const Images images = KP_MAKE_IMAGES;
  const Matrices matrices = KP_MAKE_MATRICES;
  const int taps = images.taps(), lanes = channels_last ? warp : 1;
  const int64_t group_size = channels / data_groups, jobs = count * data_groups * taps * num_pixels;
  const int64_t lane = first_thread() % lanes;
  for (int64_t job = first_thread() / lanes; job < jobs; job += num_threads() / lanes) {
    // With the channels last, neighboring warps have the taps of one position, else neighboring threads one tap.
    const int64_t p = channels_last ? job / taps / data_groups % num_pixels : job % num_pixels;
    const int64_t at = channels_last ? job % (data_groups * taps) : job / num_pixels % (data_groups * taps);
    const int64_t i = job / num_pixels / taps / data_groups;
    const Pixel pixel = Pixel::numbered(first_pixel + p, out_width);
    const int group = int(at / taps), k = int(at % taps);
    const Place place = images.data_place(first + i, group, k, pixel);
    const bool is_outside = place.is_outside();
    // The samples are linear in the values at the corners, so these are summed, and interpolated once.
    int64_t corners[4];
    F sums[4] = {};
    for (int corner = 0; corner < 4; ++corner)
      corners[corner] = place.corner(corner, int64_t(width)) * images.pixel_step(channels);
    for (int64_t j = lane; !is_outside && j < group_size; j += lanes) {
      const int64_t c = group * group_size + j;
      const F grad = F(products[matrices.channel(i, c) + k * tap_step + p * pixel_step]);
      const S* const image = x + images.at(first + i, channels, c, images.in_pixels(), 0);
      for (int corner = 0; corner < 4; ++corner) sums[corner] = fma(grad, F(image[corners[corner]]), sums[corner]);
    }
    for (int corner = 0; channels_last && corner < 4; ++corner) sums[corner] = sum_of_warp(sums[corner]);
    if (lane) continue;
    const Interpolated grads = interpolate(place, sums);
    if (grad_data_offsets) {
      const F modulation = images.modulation(first + i, group, k, pixel);
      const int64_t channels_of_offsets = int64_t(data_groups) * taps * 2;
      for (int axis = 0; axis < 2; ++axis)
        grad_data_offsets[images.at_output(first + i, channels_of_offsets, at * 2 + axis, pixel)] =
            S(modulation * (axis ? grads.by_column : grads.by_row));
    }
    if (grad_modulations)
      grad_modulations[images.at_output(first + i, int64_t(data_groups) * taps, at, pixel)] = S(grads.value);
  }
}

// The four pairs of each sample: the pixel as a key, which counts through images, data groups and pixels; where the
// gradient of the sample is in the products of a channel; the factor. Pairs with a factor of zero get the key after
// all.
extern "C" __global__ void find_pairs(KP_IMAGES, int64_t first, int64_t count, int64_t first_pixel, int64_t num_pixels,
                                      int64_t tap_step, int64_t pixel_step, int32_t* keys, int64_t* sources,
                                      F* factors) {
  const Images images = KP_MAKE_IMAGES;
  const int64_t taps = images.taps(), samples = count * data_groups * taps * num_pixels;
  for (int64_t t = first_thread(); t < samples; t += num_threads()) {
    const int64_t p = t % num_pixels, k = t / num_pixels % taps, at = t / num_pixels / taps;
    const int64_t item = first + at / data_groups;
    const Pixel pixel = Pixel::numbered(first_pixel + p, out_width);
    const int group = int(at % data_groups);
    const Place place = images.data_place(item, group, int(k), pixel);
    const F modulation = images.modulation(item, group, int(k), pixel);
    const bool is_outside = place.is_outside();
    for (int j = 0; j < 4; ++j) {
      const F factor = place.factor(j);
      keys[t * 4 + j] = int32_t(is_outside || factor == 0 ? count * data_groups * images.in_pixels()
                                                          : at * images.in_pixels() + place.corner<int64_t>(j, width));
      sources[t * 4 + j] = k * tap_step + p * pixel_step;
      factors[t * 4 + j] = factor * modulation;
    }
  }
}

// grad_x = the sum over the sorted pairs of each pixel, those with key k from begins[k] on; added to grad_x if `adds`.
extern "C" __global__ void sum_pixel_pairs(KP_IMAGES, int64_t first, int64_t count, KP_MATRICES, const S* products,
                                           const int64_t* begins, const int64_t* sources, const F* factors, int adds,
                                           F* grad_x) {
  const Images images = KP_MAKE_IMAGES;
  const Matrices matrices = KP_MAKE_MATRICES;
  const int64_t pixels = images.in_pixels(), group_size = channels / data_groups;
  for (int64_t t = first_thread(); t < count * channels * pixels; t += num_threads()) {
    const int64_t i = t / pixels / channels, pixel = channels_last ? t / channels % pixels : t % pixels;
    const int64_t c = channels_last ? t % channels : t / pixels % channels;
    const int64_t key = (i * data_groups + c / group_size) * pixels + pixel;
    const S* const from = products + matrices.channel(i, c);
    F sum = F(0);
    for (int64_t e = begins[key]; e < begins[key + 1]; ++e) sum = fma(factors[e], F(from[sources[e]]), sum);
    F& to = grad_x[first * channels * pixels + t];
    to = adds ? to + sum : sum;
  }
}

// ---- depthwise: gradients of local kernel offsets and of the kernel's values

// Depthwise: gradients of local kernel offsets. A kernel for each way of sampling, as above.
#define KP_KERNEL_OFFSETS \
  int64_t batch, const S *x, const S *grad_out, const S *kernels, int64_t kernel_step, S *grad_kernel_offsets

extern "C" __global__ void __launch_bounds__(threads, 4) kernel_offset_grads(KP_IMAGES, KP_KERNEL_OFFSETS) {
  sum_by_tap<false>(KP_MAKE_IMAGES, {batch, x, grad_out, kernels, kernel_step, grad_kernel_offsets});
}
extern "C" __global__ void __launch_bounds__(threads, 4) kernel_offset_grads_of_samples(KP_IMAGES, KP_KERNEL_OFFSETS) {
  sum_by_tap<true>(KP_MAKE_IMAGES, {batch, x, grad_out, kernels, kernel_step, grad_kernel_offsets});
}

// partial[item, block, c, r] = the gradient of the kernel's values from the positions of a block of block_size, a
// multiple of 32. Each thread adds to separate sums in shared memory, as many of a channel's values as fit; the sums
// of the threads with the same channel are then added up.
extern "C" __global__ void __launch_bounds__(threads, 4)
    kernel_blocks(KP_IMAGES, int64_t batch, int64_t blocks, int64_t block_size, const S* x, const S* grad_out,
                  F* partial) {
  constexpr int size = tile_size / 2 - tile_size / 2 % warp;
  __shared__ Tile<size> tile;
  __shared__ F sums[max_sums * threads];
  const Images images = KP_MAKE_IMAGES;
  const int taps = images.taps(), rows = images.kernel_rows(), thread = int(threadIdx.x);
  const int classes = kernel_groups * data_groups;
  const int64_t pixels = images.out_pixels(), step = images.pixel_step(channels);
  const Lanes lanes(images, warp, warp);
  const int64_t rounds = (channels / data_groups + int64_t(kernel_groups) * lanes.channels - 1) /
                         (int64_t(kernel_groups) * lanes.channels);
  for (int64_t job = blockIdx.x; job < batch * blocks * classes * rounds; job += gridDim.x) {
    const int64_t block = job / rounds / classes % blocks, item = job / rounds / classes / blocks;
    const int i = int(job / rounds % classes);
    const ChannelClass shared(images, i % kernel_groups, i / kernel_groups);
    const int64_t begin_channel = job % rounds * lanes.channels, left = shared.count - begin_channel;
    if (left <= 0) continue;
    const int64_t c = shared.channel(begin_channel + (lanes.channel < left ? lanes.channel : left - 1));
    const S* const image = x + images.at(item, channels, c, images.in_pixels(), 0);
    const S* const grads = grad_out + images.at(item, channels, c, pixels, 0);
    const int64_t end = (block + 1) * block_size < pixels ? (block + 1) * block_size : pixels;
    for (int part = 0; part < rows; part += max_sums) {
      const int count = rows - part < max_sums ? rows - part : max_sums;
      const int end_tap = is_local ? taps : part + count;  // value r of a kernel that is not local is that of tap r
      for (int r = 0; r < count; ++r) sums[r * threads + thread] = F(0);
      for (int64_t first = block * block_size; first < end; first += warp)
        for (int begin = is_local ? 0 : part; begin < end_tap; begin += size / warp) {
          const int num_taps = end_tap - begin < size / warp ? end_tap - begin : size / warp;
          const auto add_taps = [&](auto with_images, auto with_kernels) {
            constexpr bool samples_images = decltype(with_images)::is, samples_kernels = decltype(with_kernels)::is;
            __syncthreads();
            fill<samples_images, samples_kernels>(tile, images, false, item, shared, Pixel::numbered(first, out_width),
                                                  warp, begin, num_taps);
            __syncthreads();
            for (int p = lanes.pixel; p < warp && first + p < end; p += lanes.pixels) {
              const F grad = F(grads[(first + p) * step]);
              for (int k = 0; k < num_taps; ++k) {
                const int at = k * warp + p;
                if (tile.data.codes[at] == outside) continue;
                const F value = grad * Sample<samples_images>(tile.data, at, width, step).read(image);
                if constexpr (samples_kernels) {
                  const Sample<true, int> kernel(tile.kernel, at, scope_width, 1);
                  for (int j = 0; j < 4; ++j) {
                    const int r = kernel.corner(j) - part;
                    if (r < 0 || r >= count) continue;
                    F& sum = sums[r * threads + thread];
                    sum = fma(kernel.factors[j], value, sum);
                  }
                } else {
                  sums[(begin + k - part) * threads + thread] += value;
                }
              }
            }
          };
          with_constant(images.samples_images(), [&](auto with_images) {
            with_constant(is_local != 0, [&](auto with_kernels) { add_taps(with_images, with_kernels); });
          });
        }
      __syncthreads();
      for (int t = thread; t < lanes.channels * count; t += threads) {
        const int channel = t % lanes.channels, r = t / lanes.channels;
        F sum = F(0);
        for (int j = 0; j < lanes.pixels; ++j) {
          const int p = (j + r) % lanes.pixels;  // neighboring threads read from different banks of the memory
          sum += sums[r * threads + (channels_last ? p * lanes.channels + channel : channel * lanes.pixels + p)];
        }
        if (channel < left)
          partial[((item * blocks + block) * channels + shared.channel(begin_channel + channel)) * rows + part + r] =
              sum;
      }
      __syncthreads();
    }
  }
}

// sums[i, j] = the sum over b of partial[i, b, j]
extern "C" __global__ void join_blocks(const F* partial, int64_t items, int64_t blocks, int64_t columns, F* sums) {
  for (int64_t t = first_thread(); t < items * columns; t += num_threads()) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += double(partial[(t / columns * blocks + b) * columns + t % columns]);
    sums[t] = F(sum);
  }
}

// ---- from the gradients grad_kernels (count, pairs, rows) of the kernels of images from `first` on, or of the one
// kernel that all share, to those of the weight, the routing and the global offsets

extern "C" __global__ void add_weight_grads(KP_IMAGES, const S* routing, int64_t experts, int64_t pairs, int64_t first,
                                            int64_t count, const F* grad_kernels, F* grad_weight) {
  const Images images = KP_MAKE_IMAGES;
  const int taps = images.taps(), cells = images.cells();
  for (int64_t t = first_thread(); t < experts * pairs * cells; t += num_threads()) {
    const int64_t e = t / cells / pairs, pair = t / cells % pairs;
    const int cell = int(t % cells), row = cell / scope_width, column = cell % scope_width;
    F sum = F(0);
    for (int64_t i = 0; i < count; ++i) {
      const F* const grads = grad_kernels + (i * pairs + pair) * images.kernel_rows();
      F grad = F(0);
      for (int k = 0; images.interpolates_weight() && k < taps; ++k) {
        const Place place = images.kernel_place(first + i, 0, k, Pixel{});
        for (int j = 0; j < 4; ++j)
          if ((j < 2 ? place.row.low : place.row.high) == row &&
              (j % 2 ? place.column.high : place.column.low) == column)
            grad = fma(grads[k], place.factor(j), grad);
      }
      if (!images.interpolates_weight()) grad = grads[cell];
      sum = fma(routing ? F(routing[(first + i) * experts + e]) : F(1), grad, sum);
    }
    grad_weight[t] += sum;
  }
}

// partial[b, i, e] = the gradient of the routing from a block of the kernel's values
extern "C" __global__ void routing_blocks(KP_IMAGES, const S* weight, int64_t experts, int64_t pairs, int64_t first,
                                          int64_t count, const F* grad_kernels, double* partial) {
  const Images images = KP_MAKE_IMAGES;
  const int64_t rows = images.kernel_rows(), values = pairs * rows;
  const int64_t blocks = (values + block_of_rows - 1) / block_of_rows;
  for (int64_t job = first_warp(); job < blocks * count * experts; job += num_warps()) {
    const int64_t e = job % experts, i = job / experts % count, begin = job / experts / count * block_of_rows;
    double sum = 0;
    for (int64_t v = begin + lane_number(); v < begin + block_of_rows && v < values; v += warp) {
      const S* const scope = weight + (e * pairs + v / rows) * images.cells();
      const F value =
          images.interpolates_weight()
              ? interpolate(images.kernel_place(first + i, 0, int(v % rows), Pixel{}), scope, scope_width).value
              : F(scope[v % rows]);
      sum += double(grad_kernels[i * values + v] * value);
    }
    sum = sum_of_warp(sum);
    if (lane_number() == 0) partial[job] = sum;
  }
}

// partial[b, i, k, axis] = the gradient of the global kernel offsets from a block of pairs
extern "C" __global__ void global_offset_blocks(KP_IMAGES, const S* weight, const S* routing, int64_t experts,
                                                int64_t pairs, int64_t first, int64_t count, const F* grad_kernels,
                                                double* partial) {
  const Images images = KP_MAKE_IMAGES;
  const int64_t taps = images.taps(), blocks = (pairs + block_of_rows - 1) / block_of_rows;
  for (int64_t job = first_warp(); job < blocks * count * taps; job += num_warps()) {
    const int64_t k = job % taps, i = job / taps % count, begin = job / taps / count * block_of_rows;
    const Place place = images.kernel_place(first + i, 0, int(k), Pixel{});
    double by_row = 0, by_column = 0;
    for (int64_t pair = begin + lane_number(); pair < begin + block_of_rows && pair < pairs; pair += warp) {
      F row = F(0), column = F(0);
      for (int64_t e = 0; e < experts; ++e) {
        const Interpolated value = interpolate(place, weight + (e * pairs + pair) * images.cells(), scope_width);
        const F factor = routing ? F(routing[(first + i) * experts + e]) : F(1);
        row = fma(factor, value.by_row, row);
        column = fma(factor, value.by_column, column);
      }
      const F grad = grad_kernels[(i * pairs + pair) * taps + k];
      by_row += double(grad * row);
      by_column += double(grad * column);
    }
    by_row = sum_of_warp(by_row);
    by_column = sum_of_warp(by_column);
    if (lane_number()) continue;
    partial[job * 2] = by_row;
    partial[job * 2 + 1] = by_column;
  }
}

// sums[i] = the sum of plane i, `pixels` values
extern "C" __global__ void sum_planes(const S* values, int64_t planes, int64_t pixels, double* sums) {
  for (int64_t i = first_warp(); i < planes; i += num_warps()) {
    double sum = 0;
    for (int64_t p = lane_number(); p < pixels; p += warp) sum += double(F(values[i * pixels + p]));
    sum = sum_of_warp(sum);
    if (lane_number() == 0) sums[i] = sum;
  }
}
