// Gradients of the convolutions of images, in one pass over the tiles of the output.
//
// With g the gradient of the output at a position, x its sample of tap k, w the tap's weight and m its modulation:
//
//   the gradients of m, x and w are g x w, g m w and g m x; those of the offsets follow by the slopes of the samples.
//
// The gradient of w is added up for every value of the kernel and carried on to the weight (and the routing and the
// global offsets) at the end. A gradient of x is scattered to the pixels that the sample interpolates. Tiles add to
// what they share in their order, so no result depends on the number of threads.

#include "deform2d_kernels.h"
#include "deform2d_tile.h"
#include "tile_gradients.h"

namespace kp {
namespace KP_ISA {
namespace {

// The requested gradients; null if not requested.
template <class F>
struct Gradients {
  F *x, *weight, *routing, *global_offsets;
  PixelArray<F> kernel_offsets, data_offsets, modulations;

  explicit Gradients(const Images<F>& images)
      : x(into<F>(images.args.grad_x)),
        weight(into<F>(images.args.grad_weight)),
        routing(into<F>(images.args.grad_routing)),
        global_offsets(images.args.is_local ? nullptr : into<F>(images.args.grad_kernel_offsets)),
        kernel_offsets(images.by_pixel(images.args.is_local ? into<F>(images.args.grad_kernel_offsets) : nullptr,
                                       images.kernel_offsets.channels)),
        data_offsets(images.by_pixel(into<F>(images.args.grad_data_offsets), images.data_offsets.channels)),
        modulations(images.by_pixel(into<F>(images.args.grad_modulations), images.modulations.channels)) {}

  bool need_kernels() const { return weight || routing || global_offsets; }
  bool need_offsets() const { return kernel_offsets.data || data_offsets.data || modulations.data; }
  // Whether the gradients of samples are needed.
  bool need_samples() const { return x || data_offsets.data || modulations.data; }
};

// A sample and its derivatives by the position along the two axes.
template <class F>
struct Interpolated {
  Vec<F> value, by_row, by_column;
};

// Sample l from the values of its four cells, of which `at` reads one.
template <class F, class At>
KP_INLINE Interpolated<F> interpolate(const Samples<F>& samples, int64_t l, At at) {
  const Hats<F>&y = samples.rows, &x = samples.columns;
  const Vec<F> low_low = at(0), low_high = at(1), high_low = at(2), high_high = at(3);
  const Vec<F> low = x.low_factor[l] * low_low + x.high_factor[l] * low_high;
  const Vec<F> high = x.low_factor[l] * high_low + x.high_factor[l] * high_high;
  const Vec<F> low_slope = x.low_slope[l] * low_low + x.high_slope[l] * low_high;
  const Vec<F> high_slope = x.low_slope[l] * high_low + x.high_slope[l] * high_high;
  return {y.low_factor[l] * low + y.high_factor[l] * high, y.low_slope[l] * low + y.high_slope[l] * high,
          y.low_factor[l] * low_slope + y.high_factor[l] * high_slope};
}
template <bool interpolates, class F>
KP_INLINE Interpolated<F> interpolate_at(const Samples<F>& samples, int64_t l, const F* from, int64_t row_size) {
  if constexpr (interpolates)
    return interpolate<F>(samples, l, [&](int i) { return load(from + samples.cell[i][l] * row_size); });
  return {load(from + samples.cell[0][l] * row_size), Vec<F>{}, Vec<F>{}};
}

// ---- depthwise

// One thread's gradients of a depthwise convolution.
template <class F>
class DepthwiseGradients {
 public:
  bool reserve(const Images<F>& images, const ChannelOrder& order) {
    const Deform2d& a = images.args;
    num_kernel_ = images.samples_kernels() ? a.kernel_groups * images.taps * 2 : 0;
    num_data_ = images.samples_images() ? a.data_groups * images.taps * 3 : 0;
    const int64_t sums = round_up(num_kernel_ + num_data_, lanes<F>);
    return taps_.resize(images.taps * order.classes) && kernel_.resize(images.kernel_rows() * order.stored) &&
           sums_.resize(sums * lanes<F>) && totals_.resize(sums);
  }

  // The gradient of the kernel from the tile's pixels; writes those of their offsets and modulations.
  template <bool samples_images, bool samples_kernels>
  void fill(const TapFinder<F>& finder, const ChannelOrder& order, int64_t item, int64_t first, int64_t count,
            const F* image, const F* kernel, const F* grad, const Gradients<F>& to) {
    const int64_t taps = finder.images.taps;
    memset(kernel_.data(), 0, size_t(kernel_.size()) * sizeof(F));
    for (int64_t p = 0; p < count; p += block_size) {
      const Positions at(first + p, smaller(block_size, count - p), finder.images.args.out_width);
      find<samples_images, samples_kernels>(finder, order, item, at);
      for (int64_t l = 0; l < at.count; ++l) {
        if (to.need_offsets()) memset(sums_.data(), 0, size_t(sums_.size()) * sizeof(F));
        for (int64_t i = 0; i < order.classes; ++i)
          for (int64_t k = 0; k < taps; ++k) {
            const TapBlock<F>& tap = taps_[i * taps + k];
            if (!tap.inside[l]) continue;
            add<samples_images, samples_kernels>(
                tap, l, order.begin[i], order.begin[i + 1], order.stored, image, kernel,
                grad + (at.first + l) * order.stored, &sums_[(order.kernel_group(i) * taps + k) * 2 * lanes<F>],
                &sums_[(num_kernel_ + (order.data_group(i) * taps + k) * 3) * lanes<F>]);
          }
        if (to.need_offsets()) write_offsets(item, at.first + l, to);
      }
    }
  }

  // Adds the gradients of the samples of the tile's pixels to that of the image.
  template <bool samples_kernels>
  void scatter(const TapFinder<F>& finder, const ChannelOrder& order, int64_t item, int64_t first, int64_t count,
               const F* kernel, const F* grad, F* to) {
    const int64_t taps = finder.images.taps;
    for (int64_t p = 0; p < count; p += block_size) {
      const Positions at(first + p, smaller(block_size, count - p), finder.images.args.out_width);
      find<true, samples_kernels>(finder, order, item, at);
      for (int64_t l = 0; l < at.count; ++l)
        for (int64_t i = 0; i < order.classes; ++i)
          for (int64_t k = 0; k < taps; ++k) {
            const TapBlock<F>& tap = taps_[i * taps + k];
            if (!tap.inside[l]) continue;
            for (int64_t c = order.begin[i]; c < order.begin[i + 1]; c += lanes<F>) {
              Vec<F> value;
              sample_vectors<1, samples_kernels>(tap.kernel, l, kernel + c, order.stored, &value);
              value *= load(grad + (at.first + l) * order.stored + c);
              for (int j = 0; j < 4; ++j) {
                F* const pixel = to + tap.data.cell[j][l] * order.stored + c;
                store(pixel, fma(broadcast(tap.data.factor[j][l]), value, load(pixel)));
              }
            }
          }
    }
  }

  const F* kernel() const { return kernel_.data(); }

 private:
  template <bool samples_images, bool samples_kernels>
  void find(const TapFinder<F>& finder, const ChannelOrder& order, int64_t item, const Positions& at) {
    for (int64_t i = 0; i < order.classes; ++i)
      for (int64_t k = 0; k < finder.images.taps; ++k)
        finder.template find<samples_images, samples_kernels>(item, at, k, order.kernel_group(i), order.data_group(i),
                                                              taps_[i * finder.images.taps + k]);
  }

  template <bool samples_images, bool samples_kernels>
  KP_INLINE void add(const TapBlock<F>& tap, int64_t l, int64_t begin, int64_t end, int64_t row_size, const F* image,
                     const F* kernel, const F* grad, F* kernel_sums, F* data_sums) {
    Vec<F> rows = {}, columns = {}, data_rows = {}, data_columns = {}, modulations = {};
    for (int64_t c = begin; c < end; c += lanes<F>) {
      const Interpolated<F> data = interpolate_at<samples_images>(tap.data, l, image + c, row_size);
      const Interpolated<F> values = interpolate_at<samples_kernels>(tap.kernel, l, kernel + c, row_size);
      const Vec<F> g = load(grad + c), scaled = samples_images ? g * tap.modulation[l] : g;
      const Vec<F> by_value = scaled * data.value;
      if constexpr (samples_kernels) {
        rows = fma(by_value, values.by_row, rows);
        columns = fma(by_value, values.by_column, columns);
      }
      if constexpr (samples_images) {
        const Vec<F> by_sample = scaled * values.value;
        data_rows = fma(by_sample, data.by_row, data_rows);
        data_columns = fma(by_sample, data.by_column, data_columns);
        modulations = fma(g * values.value, data.value, modulations);
      }
      for (int j = 0; j < (samples_kernels ? 4 : 1); ++j) {
        F* const to = &kernel_[tap.kernel.cell[j][l] * row_size + c];
        const Vec<F> factor = broadcast(samples_kernels ? tap.kernel.factor[j][l] : F(1));
        store(to, fma(factor, by_value, load(to)));
      }
    }
    if constexpr (samples_kernels) {
      store(kernel_sums, load(kernel_sums) + rows);
      store(kernel_sums + lanes<F>, load(kernel_sums + lanes<F>) + columns);
    }
    if constexpr (samples_images) {
      store(data_sums, load(data_sums) + data_rows);
      store(data_sums + lanes<F>, load(data_sums + lanes<F>) + data_columns);
      store(data_sums + 2 * lanes<F>, load(data_sums + 2 * lanes<F>) + modulations);
    }
  }

  void write_offsets(int64_t item, int64_t pixel, const Gradients<F>& to) {
    for (int64_t i = 0; i < totals_.size(); i += lanes<F>) {
      Vec<F> vectors[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l) vectors[l] = load(&sums_[(i + l) * lanes<F>]);
      store(&totals_[i], sums_of<F>(vectors));
    }
    for (int64_t i = 0; to.kernel_offsets.data && i < num_kernel_; ++i)
      to.kernel_offsets.at(item, i, pixel) = totals_[i];
    for (int64_t i = 0; i < num_data_ / 3; ++i) {
      const F* const total = &totals_[num_kernel_ + i * 3];
      for (int axis = 0; to.data_offsets.data && axis < 2; ++axis)
        to.data_offsets.at(item, i * 2 + axis, pixel) = total[axis];
      if (to.modulations.data) to.modulations.at(item, i, pixel) = total[2];
    }
  }

  Buffer<TapBlock<F>> taps_;  // (classes, taps) of a block of positions
  Buffer<F> kernel_;          // (kernel rows, stored channels)
  Buffer<F> sums_, totals_;   // of the kernel offsets, then of data offsets and modulation: vectors, and their sums
  int64_t num_kernel_ = 0, num_data_ = 0;
};

// ---- dense

// One thread's gradients of a dense convolution.
template <class F>
class DenseGradients {
 public:
  bool reserve(const Images<F>& images, const Weights<F>& weights, int64_t rows, const Gradients<F>& to) {
    const bool with_samples = to.need_samples();
    return tile_.reserve(images, rows, weights.c_in, with_samples) &&
           (!with_samples || products_.reserve(weights, rows, 0)) &&
           grad_.resize(rows * round_up(weights.c_out, lanes<F>) + panel_width<F>);
  }

  DenseTile<F>& tile() { return tile_; }
  F* padded_grad() { return grad_.data(); }

  // Computes the gradients of all samples of the tile. `grad`: from its first pixel on.
  // `first`: its first kernel among the panels.
  void multiply(const Weights<F>& weights, const Panels<F>& panels, const F* grad, int64_t first) {
    products_.start();
    products_.multiply(tile_.rows(), weights, panels, grad, first);
  }

  // Writes the gradients of offsets and modulations of `count` pixels.
  void write_offsets(const Images<F>& images, int64_t item, int64_t first, int64_t count, const F* image,
                     const Gradients<F>& to) const {
    const int64_t channels = images.args.channels;
    for (const PixelArray<F>* array : {&to.data_offsets, &to.modulations})
      for (int64_t c = 0; array->data && c < array->channels; ++c)
        for (int64_t p = 0; p < count; ++p) array->at(item, c, first + p) = 0;
    for_each_sample(images, [&](const TapBlock<F>& tap, int64_t l, int64_t k, int64_t p, int64_t g, int64_t begin,
                                int64_t end, const F* grad) {
      Vec<F> by_row = {}, by_column = {}, by_modulation = {};
      const auto add = [&](Vec<F> grads, const Interpolated<F>& sample) {
        by_row = fma(grads, sample.by_row, by_row);
        by_column = fma(grads, sample.by_column, by_column);
        by_modulation = fma(grads, sample.value, by_modulation);
      };
      int64_t c = begin;
      for (; c + lanes<F> <= end; c += lanes<F>)
        add(load(grad + c), interpolate_at<true>(tap.data, l, image + c, channels));
      if (const int rest = int(end - c))
        add(load_first(grad + c, rest), interpolate<F>(tap.data, l, [&](int i) {
              return load_first(image + tap.data.cell[i][l] * channels + c, rest);
            }));
      const int64_t at = g * images.taps + k, pixel = first + p;
      if (to.data_offsets.data) {
        to.data_offsets.at(item, at * 2, pixel) = tap.modulation[l] * sum_of_lanes<F>(by_row);
        to.data_offsets.at(item, at * 2 + 1, pixel) = tap.modulation[l] * sum_of_lanes<F>(by_column);
      }
      if (to.modulations.data) to.modulations.at(item, at, pixel) = sum_of_lanes<F>(by_modulation);
    });
  }

  // Adds the gradients of the samples to that of the image.
  void scatter(const Images<F>& images, F* to) const {
    const int64_t channels = images.args.channels;
    for_each_sample(images, [&](const TapBlock<F>& tap, int64_t l, int64_t, int64_t, int64_t, int64_t begin,
                                int64_t end, const F* grad) {
      for (int j = 0; j < 4; ++j) {
        const F factor = tap.data.factor[j][l];
        F* const pixel = to + tap.data.cell[j][l] * channels;
        int64_t c = begin;
        for (; c + lanes<F> <= end; c += lanes<F>)
          store(pixel + c, fma(broadcast(factor), load(grad + c), load(pixel + c)));
        for (; c < end; ++c) pixel[c] += factor * grad[c];
      }
    });
  }

 private:
  // Calls call(tap, place in its block, k, pixel of the tile, group, first and end of its channels, gradient of the
  // sample) for all samples of the tile that are inside.
  template <class Call>
  void for_each_sample(const Images<F>& images, Call call) const {
    const int64_t groups = images.args.data_groups, channels = images.args.channels;
    const TileSums<F> rows = tile_.rows();
    for (int64_t k = 0; k < images.taps; ++k)
      for (int64_t i = 0; i < rows.size(k); ++i)
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t p = rows.queries(k)[i];
          const TapBlock<F>& tap = tile_.taps_of(k, p, g);
          if (tap.inside[p % block_size])
            call(tap, p % block_size, k, p, g, channels * g / groups, channels * (g + 1) / groups,
                 products_.products() + products_.number(k, i) * channels);
        }
  }

  DenseTile<F> tile_;
  GradientProducts<F> products_;
  Buffer<F> grad_;
};

// ---- from the gradient of a kernel to that of the weight

// The sum of the products of two rows, in an order that no instruction set changes.
template <class F>
double dot(const F* a, const F* b, int64_t size) {
  constexpr int64_t step = 16;
  F sums[step] = {};
  int64_t j = 0;
  for (; j + step <= size; j += step)
    for (int64_t l = 0; l < step; ++l) sums[l] += a[j + l] * b[j + l];
  for (; j < size; ++j) sums[j % step] += a[j] * b[j];
  double sum = 0;
  for (int64_t l = 0; l < step; ++l) sum += double(sums[l]);
  return sum;
}

// Carries gradients of kernels on to the weight, and to the routing and the global offsets of their images. Sums over
// columns are made in blocks, which are then added up; those over images in their order.
template <class F>
class KernelGradients {
 public:
  KernelGradients(const Images<F>& images, const Kernels<F>& kernels, const Gradients<F>& to)
      : images_(images), kernels_(kernels), to_(to) {}

  bool reserve() {
    if (!to_.weight) return true;
    if (!experts_.resize(images_.args.experts * images_.cells * kernels_.columns())) return false;
    memset(experts_.data(), 0, size_t(experts_.size()) * sizeof(F));
    return true;
  }

  // Adds the gradients of the kernels of `count` images from `first` on, or that of the kernel of all images.
  bool add(int64_t first, int64_t count, const F* grads, int threads) {
    const Deform2d& a = images_.args;
    const int64_t num_offsets = to_.global_offsets ? 2 * images_.taps : 0;
    const int64_t num_sums = num_offsets + (to_.routing ? a.experts : 0), blocks = kernels_.blocks();
    Buffer<double> sums;
    if (!sums.resize(count * blocks * num_sums)) return false;
    bool reserved = true;
#pragma omp parallel num_threads(useful_threads(threads, count* kernels_.size() * a.experts, 1 << 14)) \
    reduction(&& : reserved)
    {
      Taps<F> taps;
      Buffer<F> mixture, by_cell;
      reserved = mixture.resize(images_.cells * kernels_.block) && by_cell.resize(images_.cells * kernels_.block);
#pragma omp for
      for (int64_t job = 0; job < blocks; ++job)
        for (int64_t i = 0; reserved && i < count; ++i) {
          const int64_t begin = job * kernels_.block;
          const Block<const F> grad = {grads + i * kernels_.size() + begin, kernels_.columns()};
          double* const offsets = sums.data() + (i * blocks + job) * num_sums;
          if (!kernels_.interpolates()) {
            add_to_experts(first + i, begin, grad, offsets + num_offsets);
            continue;
          }
          if (!(reserved = taps.find(images_, first + i))) break;
          const Block<F> cells = {by_cell.data(), kernels_.block};
          add_to_cells(taps, grad, kernels_.width(begin), cells);
          if (num_offsets)
            add_to_offsets(taps, grad, kernels_.scope(first + i, begin, {mixture.data(), kernels_.block}),
                           kernels_.width(begin), offsets);
          add_to_experts(first + i, begin, {cells.data, cells.row_size}, offsets + num_offsets);
        }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < num_sums; ++j) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += sums[(i * blocks + b) * num_sums + j];
        if (j < num_offsets)
          to_.global_offsets[(first + i) * num_offsets + j] = F(sum);
        else
          to_.routing[(first + i) * a.experts + j - num_offsets] = F(sum);
      }
    return reserved;
  }

  void write(int threads) const {
    if (to_.weight)
      kernels_.for_each_expert(threads, [&](F& weight, int64_t copied) { weight = experts_[copied]; }, to_.weight);
  }

 private:
  // The gradient of the values in the scope from that of the taps.
  void add_to_cells(const Taps<F>& taps, const Block<const F>& grad, int64_t columns, const Block<F>& cells) const {
    for (int64_t s = 0; s < images_.cells; ++s) memset(cells.row(s), 0, size_t(columns) * sizeof(F));
    for_each_cell(taps, [&](int64_t k, int64_t cell, F factor) {
      F* const sum = cells.row(cell);
      const F* const from = grad.row(k);
      for (int64_t j = 0; j < columns; ++j) sum[j] += factor * from[j];
    });
  }
  // Calls f(tap, cell, factor) for the four cells of each tap.
  template <class Call>
  void for_each_cell(const Taps<F>& taps, Call call) const {
    const int64_t width = images_.args.scope_width;
    for (int64_t k = 0; k < images_.taps; ++k) {
      const Hat<F>&y = taps.rows[k], &x = taps.columns[k];
      const int64_t low = int64_t(y.low) * width, high = int64_t(y.high) * width;
      call(k, low + int64_t(x.low), y.low_factor * x.low_factor);
      call(k, low + int64_t(x.high), y.low_factor * x.high_factor);
      call(k, high + int64_t(x.low), y.high_factor * x.low_factor);
      call(k, high + int64_t(x.high), y.high_factor * x.high_factor);
    }
  }

  void add_to_offsets(const Taps<F>& taps, const Block<const F>& grad, const Block<const F>& scope, int64_t columns,
                      double* offsets) const {
    const int64_t width = images_.args.scope_width;
    for (int64_t k = 0; k < images_.taps; ++k) {
      const Hat<F>&y = taps.rows[k], &x = taps.columns[k];
      const int64_t low = int64_t(y.low) * width, high = int64_t(y.high) * width;
      const auto product = [&](int64_t cell) { return dot(grad.row(k), scope.row(cell), columns); };
      const double low_low = product(low + int64_t(x.low)), low_high = product(low + int64_t(x.high));
      const double high_low = product(high + int64_t(x.low)), high_high = product(high + int64_t(x.high));
      offsets[2 * k] = y.low_slope * (x.low_factor * low_low + x.high_factor * low_high) +
                       y.high_slope * (x.low_factor * high_low + x.high_factor * high_high);
      offsets[2 * k + 1] = y.low_factor * (x.low_slope * low_low + x.high_slope * low_high) +
                           y.high_factor * (x.low_slope * high_low + x.high_slope * high_high);
    }
  }

  // `cells`: the gradient of the columns from `begin` on of the values in the scope.
  void add_to_experts(int64_t item, int64_t begin, const Block<const F>& cells, double* routing) {
    const int64_t experts = images_.args.experts, columns = kernels_.width(begin);
    for (int64_t e = 0; e < experts; ++e) {
      const F factor = images_.routing ? images_.routing[item * experts + e] : F(1);
      if (to_.routing) routing[e] = 0;
      for (int64_t s = 0; s < images_.cells; ++s) {
        const F* const from = cells.row(s);
        if (to_.routing) routing[e] += dot(from, kernels_.expert(e, begin).row(s), columns);
        if (!to_.weight) continue;
        F* const sum = &experts_[(e * images_.cells + s) * kernels_.columns() + begin];
        for (int64_t j = 0; j < columns; ++j) sum[j] += factor * from[j];
      }
    }
  }

  const Images<F>& images_;
  const Kernels<F>& kernels_;
  const Gradients<F>& to_;
  Buffer<F> experts_;  // the gradient of the weight, in the order of the copied experts
};

// The sums of grad_out over images and pixels, in eight interleaved sums in float64.
template <class F>
void sum_bias(const PixelArray<const F>& grad, int64_t batch, F* to, int threads) {
#pragma omp parallel for num_threads(useful_threads(threads, batch* grad.channels* grad.pixels, 1 << 15))
  for (int64_t c = 0; c < grad.channels; ++c) {
    double sums[8] = {};
    for (int64_t item = 0; item < batch; ++item)
      for (int64_t p = 0; p < grad.pixels; ++p) sums[p % 8] += double(grad.at(item, c, p));
    to[c] = F(((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])));
  }
}

// ---- the pass over all tiles

template <class F>
struct GradState {
  DepthwiseGradients<F> depthwise;
  DenseGradients<F> dense;
};

template <class F>
Status compute_gradients(const Images<F>& images, const Gradients<F>& to) {
  const Deform2d& a = images.args;
  const bool dense = !a.depthwise, by_item = images.has_item_kernels();
  const PixelArray<const F> x = {as<F>(a.x), a.channels, images.in_pixels, a.channels_last};
  const PixelArray<const F> grad_out = {as<F>(a.grad_out), a.out_channels, images.out_pixels, a.channels_last};
  ChannelOrder order, out_order;
  if (!order.make(a.channels, dense ? 1 : a.kernel_groups, dense ? 1 : a.data_groups, dense ? 1 : lanes<F>) ||
      !out_order.make(a.out_channels, dense ? 1 : a.kernel_groups, dense ? 1 : a.data_groups, dense ? 1 : lanes<F>))
    return Status::out_of_memory;
  Kernels<F> kernels(images, order);
  KernelGradients<F> kernel_gradients(images, kernels, to);
  const int64_t kernel_size = kernels.size();
  const int64_t tile_rows = dense ? rows_of_tile<F>(images.taps * a.channels, a.out_channels)
                                  : rows_of_tile<F>(0, larger<int64_t>(1, 2 * order.stored));
  const Tiles tiles(images.out_pixels, tile_rows);
  const int64_t item_bytes = (images.in_pixels + images.out_pixels) * order.stored * int64_t(sizeof(F));
  const int64_t kernel_bytes = by_item ? kernel_size * int64_t(sizeof(F)) : 0;
  const int64_t at_once = images_at_once(larger(item_bytes, 3 * kernel_bytes));  // kernels, panels and gradients
  const int64_t work = images.taps * (dense ? 2 * a.channels / a.groups * a.out_channels : 16 * order.stored);
  const TapFinder<F> finder{images, false};
  if (!kernels.copy_experts(a.threads) || !kernel_gradients.reserve()) return Status::out_of_memory;
  ChannelsLast<F> copies, grads;
  Buffer<F> grad_kernels, grad_images;
  Panels<F> panels;
  Weights<F> weights = {nullptr, int(images.taps), int(a.groups), a.channels, a.out_channels, false, nullptr, 1};
  const ChannelBlocks blocks(weights);
  for (int64_t first = 0; first < a.batch; first += at_once) {
    const int64_t count = smaller(at_once, a.batch - first), num_kernels = by_item ? count : 1;
    if (!copies.copy(x, first, count, order, a.threads) || !grads.copy(grad_out, first, count, out_order, a.threads))
      return Status::out_of_memory;
    if (first == 0 || by_item) {
      if (!kernels.make(first, count, a.threads) || !grad_kernels.resize(num_kernels * kernel_size))
        return Status::out_of_memory;
      memset(grad_kernels.data(), 0, size_t(num_kernels * kernel_size) * sizeof(F));
      weights.data = kernels.data();
      if (dense && to.need_samples() &&
          !panels.pack(kernels.data(), num_kernels * images.taps, a.channels, a.out_channels, a.groups, true,
                       a.threads))
        return Status::out_of_memory;
    }
    const int64_t image_size = images.in_pixels * order.stored;
    if (to.x) {
      if (!grad_images.resize(count * image_size)) return Status::out_of_memory;
      memset(grad_images.data(), 0, size_t(count * image_size) * sizeof(F));
    }
    Turns kernel_turns, image_turns;
    if (!kernel_turns.reserve(larger(count, blocks.count())) || !image_turns.reserve(count))
      return Status::out_of_memory;
    const auto reserve = [&](GradState<F>& state) {
      return dense ? state.dense.reserve(images, weights, tile_rows, to) : state.depthwise.reserve(images, order);
    };
    const int threads = useful_threads(a.threads, count * images.out_pixels * work, 1 << 19);
    const Status status =
        for_each_of<GradState<F>>(count * tiles.count, threads, reserve, [&](GradState<F>& state, int64_t t) {
          const int64_t i = t % count, tile = t / count, begin = tiles.begin(tile);
          const int64_t rows = tiles.begin(tile + 1) - begin, item = first + i;
          const F *const image = copies.item(i), *const grad = grads.item(i);
          F* const grad_image = to.x ? &grad_images[i * image_size] : nullptr;
          if (dense) {
            DenseGradients<F>& gradients = state.dense;
            if (images.samples_images())
              gradients.tile().template fill<true>(finder, item, begin, rows, a.out_width, image);
            else
              gradients.tile().template fill<false>(finder, item, begin, rows, a.out_width, image);
            if (to.need_samples()) {
              gradients.multiply(weights, panels, grad + begin * a.out_channels, by_item ? i * images.taps : 0);
              if (to.need_offsets()) gradients.write_offsets(images, item, begin, rows, image, to);
            }
            if (to.need_kernels())
              add_weights<F>(gradients.tile().rows(), weights, nullptr, blocks, grad, t, begin, rows, kernel_turns,
                             gradients.padded_grad(), &grad_kernels[by_item ? i * kernel_size : 0]);
            if (to.x) {
              image_turns.wait(i, tile);
              gradients.scatter(images, grad_image);
              image_turns.pass(i, tile);
            }
            return;
          }
          DepthwiseGradients<F>& gradients = state.depthwise;
          const F* const kernel = kernels.data(i);
          with_sampling(images.samples_images(), images.samples_kernels(), [&](auto with_images, auto with_kernels) {
            gradients.template fill<decltype(with_images)::value, decltype(with_kernels)::value>(
                finder, order, item, begin, rows, image, kernel, grad, to);
          });
          if (to.need_kernels()) {
            const int64_t part = by_item ? i : 0, turn = by_item ? tile : t;
            F* const sum = &grad_kernels[part * kernel_size];
            kernel_turns.wait(part, turn);
            for (int64_t j = 0; j < kernel_size; ++j) sum[j] += gradients.kernel()[j];
            kernel_turns.pass(part, turn);
          }
          if (to.x) {
            image_turns.wait(i, tile);
            if (images.samples_kernels())
              gradients.template scatter<true>(finder, order, item, begin, rows, kernel, grad, grad_image);
            else
              gradients.template scatter<false>(finder, order, item, begin, rows, kernel, grad, grad_image);
            image_turns.pass(i, tile);
          }
        });
    if (status != Status::ok) return status;
    if (to.x) {
      const PixelArray<F> grad_x = {to.x, a.channels, images.in_pixels, a.channels_last};
#pragma omp parallel for num_threads(useful_threads(a.threads, count* image_size, 1 << 15))
      for (int64_t i = 0; i < count; ++i)
        write_pixels<F>(&grad_images[i * image_size], order.stored, order.slot.data(), images.in_pixels, nullptr,
                        grad_x, first + i, 0);
    }
    if (by_item && to.need_kernels() && !kernel_gradients.add(first, count, grad_kernels.data(), a.threads))
      return Status::out_of_memory;
  }
  if (!by_item && to.need_kernels() && a.batch && !kernel_gradients.add(0, 1, grad_kernels.data(), a.threads))
    return Status::out_of_memory;
  kernel_gradients.write(a.threads);
  return Status::ok;
}

}  // namespace

Status deform2d_grads(const Deform2d& args) {
  return with_real(args.x.dtype, [&](auto f) {
    using F = decltype(f);
    const Images<F> images(args);
    const Gradients<F> grads(images);
    if (args.grad_bias.data)
      sum_bias<F>({as<F>(args.grad_out), args.out_channels, images.out_pixels, args.channels_last}, args.batch,
                  into<F>(args.grad_bias), args.threads);
    if (!grads.need_kernels() && !grads.need_offsets() && !grads.x) return Status::ok;
    return compute_gradients(images, grads);
  });
}

}  // namespace KP_ISA
}  // namespace kp
