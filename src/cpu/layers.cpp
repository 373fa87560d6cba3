// Layers on rows of features, forward and backward: linear, normalization, activations, dropout, softmax, cross
// entropy; steps of optimizers.
//
// All but the matrix products are bound by memory bandwidth and read their arrays as few times as the formulas allow.
// Sums over rows are float64, taken in blocks whose size does not depend on the number of threads and added in order,
// so no result depends on the number of threads.

#include "formulas/layers.h"

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t grain = 1 << 16;  // values that keep a thread busy for some 20 us

// out[i] = call(i, at) for i < n, a vector at a time. at(p) loads a vector from p; of the last, partial vector only the
// remaining values.
template <class T, class Call>
KP_INLINE void map(int64_t n, T* out, Call call) {
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(out + i, call(i, [](const T* p) { return load(p); }));
  if (const int rest = int(n - i))
    store_first(out + i, rest, call(i, [rest](const T* p) { return load_first(p, rest); }));
}

// The same with several threads.
template <class T, class Call>
void map_shared(int64_t n, int threads, T* out, Call call) {
#pragma omp parallel num_threads(useful_threads(threads, n, grain))
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    const int64_t begin = share.begin;
    map(share.end - begin, out + begin, [begin, call](int64_t i, auto at) { return call(begin + i, at); });
  }
}

// exp(x) for x <= 0; NaN for NaN.
template <class T>
KP_INLINE Vec<T> exponential(Vec<T> x) {
  return x == x ? exp_of<T>(x) : x;
}

// ---- sums of columns

// Splits the rows of every batch item into blocks, of a length that depends only on the number of columns.
class RowBlocks {
 public:
  bool split(const int64_t* row_splits, int64_t items, int64_t columns) {
    if (!columns) return true;  // no blocks
    const int64_t rows = larger<int64_t>(64, smaller<int64_t>(1024, (1 << 16) / columns));
    for (int64_t item = 0; item < items; ++item) count_ += (row_splits[item + 1] - row_splits[item] + rows - 1) / rows;
    if (!begin_.resize(count_) || !end_.resize(count_) || !item_.resize(count_)) return false;
    for (int64_t item = 0, b = 0; item < items; ++item)
      for (int64_t r = row_splits[item]; r < row_splits[item + 1]; r += rows, ++b) {
        begin_[b] = r;
        end_[b] = smaller(r + rows, row_splits[item + 1]);
        item_[b] = item;
      }
    return true;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t b) const { return begin_[b]; }
  int64_t end(int64_t b) const { return end_[b]; }
  int64_t item(int64_t b) const { return item_[b]; }

 private:
  Buffer<int64_t> begin_, end_, item_;
  int64_t count_ = 0;
};

template <class T>
constexpr int wide_vectors = sizeof(double) / sizeof(T);

// Converts a vector to float64, which takes wide_vectors<T> vectors.
template <class T>
KP_INLINE void widen(Vec<T> v, Vec<double>* wide) {
  if constexpr (wide_vectors<T> == 1) {
    wide[0] = v;
  } else {
    typedef float Half __attribute__((vector_size(KP_VECTOR_BYTES / 2)));
    Half halves[2];
    memcpy(halves, &v, sizeof(v));
    for (int i = 0; i < 2; ++i) wide[i] = __builtin_convertvector(halves[i], Vec<double>);
  }
}

// Adds the terms of rows r, ..., r + R - 1 to the two sums of every column; see sum_columns().
template <int R, class T, class Terms>
KP_INLINE void add_rows(int64_t item, int64_t r, int64_t columns, double* first, double* second, const Terms& terms) {
  const auto add = [&](int64_t c, auto at) {
    Vec<double> p[wide_vectors<T>], q[wide_vectors<T>];
    for (int i = 0; i < wide_vectors<T>; ++i) {
      p[i] = load(first + c + i * lanes<double>);
      q[i] = load(second + c + i * lanes<double>);
    }
    for (int k = 0; k < R; ++k) terms(item, r + k, c, at, p, q);
    for (int i = 0; i < wide_vectors<T>; ++i) {
      store(first + c + i * lanes<double>, p[i]);
      store(second + c + i * lanes<double>, q[i]);
    }
  };
  int64_t c = 0;
  for (; c + lanes<T> <= columns; c += lanes<T>) add(c, [](const T* p) { return load(p); });
  if (const int rest = int(columns - c)) add(c, [rest](const T* p) { return load_first(p, rest); });
}

// Computes two sums over the rows of every batch item, for every column. terms(item, row, column, at, p, q) adds a
// row's terms to the sums p and q of a vector of columns. `sums` becomes (items, 2, columns rounded up to vectors).
// Returns false if memory runs out.
template <class T, class Terms>
bool sum_columns(const RowBlocks& blocks, int64_t items, int64_t columns, int threads, Buffer<double>& sums,
                 Terms terms) {
  const int64_t padded = round_up(columns, lanes<T>), both = 2 * padded;
  Buffer<double> partial;
  if (!partial.resize(blocks.count() * both) || !sums.resize(items * both)) return false;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks.count(); ++b) {
    double *const first = partial.data() + b * both, *const second = first + padded;
    memset(first, 0, size_t(both) * sizeof(double));
    const int64_t item = blocks.item(b), end = blocks.end(b);
    int64_t r = blocks.begin(b);
    for (; r + 4 <= end; r += 4) add_rows<4, T>(item, r, columns, first, second, terms);
    for (; r < end; ++r) add_rows<1, T>(item, r, columns, first, second, terms);
  }
  memset(sums.data(), 0, size_t(items * both) * sizeof(double));
  for (int64_t b = 0; b < blocks.count(); ++b) {
    double* const to = sums.data() + blocks.item(b) * both;
    for (int64_t c = 0; c < both; ++c) to[c] += partial[b * both + c];
  }
  return true;
}

// ---- linear

constexpr int64_t tile_rows = 10 * row_step;

// out (n, columns) = left (n, length) times the weights or their transpose, plus the bias unless it is null.
template <class F>
Status multiply(const Array& left, const Array& weights, bool transposed, const F* bias, const Array& out,
                int threads) {
  const int64_t n = left.rows, length = left.cols, columns = out.cols;
  if (!n || !columns) return Status::ok;
  const int64_t tiles = (n + tile_rows - 1) / tile_rows, whole = n / row_step * row_step;
  const int64_t column_parts = (16 + tiles - 1) / tiles;  // few tiles: jobs also divide the columns
  Panels<F> panels;
  Buffer<F> start, last;  // initial sums: the bias or zero; the last rows, padded with zero rows for the micro-kernel
  if (!panels.pack(as<F>(weights), 1, weights.rows, weights.cols, 1, transposed, threads)) return Status::out_of_memory;
  if (!start.resize(panels.padded_columns()) || !last.resize(row_step * length)) return Status::out_of_memory;
  for (int64_t c = 0; c < panels.padded_columns(); ++c) start[c] = bias && c < columns ? bias[c] : F(0);
  memset(last.data(), 0, size_t(row_step * length) * sizeof(F));
  memcpy(last.data(), as<F>(left) + whole * length, size_t((n - whole) * length) * sizeof(F));
#pragma omp parallel for num_threads(useful_threads(threads, n * length * columns, 1 << 20)) schedule(dynamic, 1)
  for (int64_t job = 0; job < tiles * column_parts; ++job) {
    const int64_t t = job / column_parts, end = smaller(n, (t + 1) * tile_rows);
    const Share share(panels.count(), int(job % column_parts), int(column_parts));
    Vec<F> sums[row_step * panel_vectors];
    F* const spill = reinterpret_cast<F*>(sums);
    for (int64_t p = share.begin; p < share.end; ++p)
      with_vectors(panels.vectors(p), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
        const F *const panel = panels.row(0, p, 0), *const begin = start.data() + p * panel_width<F>;
        const int64_t width = smaller<int64_t>(panel_width<F>, columns - p * panel_width<F>);
        for (int64_t i = t * tile_rows; i < end; i += MR) {
          const F* const rows = i < whole ? as<F>(left) + i * length : last.data() + (i - whole) * length;
          F* const block = into<F>(out) + i * columns + p * panel_width<F>;
          const bool fits = i + MR <= end && width == NV * lanes<F>;
          F* const to = fits ? block : spill;
          const int64_t stride = fits ? columns : NV * lanes<F>;
          for (int r = 0; r < MR; ++r)
            for (int v = 0; v < NV; ++v) store(to + r * stride + v * lanes<F>, load(begin + v * lanes<F>));
          multiply_block<F, MR, NV, false>(
              length, rows, length, 1, [=](int64_t c) { return panel + c * NV * lanes<F>; },
              [=](int64_t r) { return to + r * stride; });
          for (int64_t r = 0; !fits && r < smaller<int64_t>(MR, end - i); ++r)
            memcpy(block + r * columns, spill + r * stride, size_t(width) * sizeof(F));
        }
      });
  }
  return Status::ok;
}

// Packs a tile for the product features^T grad: `count` rows of some channels in strips of row_step channels, and of
// the gradient in panels, both padded with zeros. Without packing, rows whose stride is a power of two would compete
// for a few sets of the cache.
template <class F>
void pack_tile(const F* rows, int64_t stride, int64_t channels, const F* grad, int64_t c_out, int64_t count, F* left,
               F* right) {
  const int64_t padded = round_up(c_out, lanes<F>);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < channels; c += row_step) {
      F* const to = left + c * tile_rows + i * row_step;
      const F* const from = rows + i * stride + c;
      if (c + row_step <= channels)
        memcpy(to, from, row_step * sizeof(F));
      else
        for (int64_t k = 0; k < row_step; ++k) to[k] = c + k < channels ? from[k] : F(0);
    }
    for (int64_t v = 0; v < padded; v += panel_width<F>) {
      const int64_t width = smaller<int64_t>(panel_width<F>, padded - v), copied = smaller(width, c_out - v);
      F* const to = right + v * tile_rows + i * width;
      memcpy(to, grad + i * c_out + v, size_t(copied) * sizeof(F));
      for (int64_t k = copied; k < width; ++k) to[k] = 0;
    }
  }
}

// grad_weights = features^T grad_out. Tiles are divided among a number of partial sums that depends only on the sizes;
// the partial sums are then added in order. Within a partial sum, each tile's product is computed in registers.
template <class F>
Status weight_gradient(const Array& features, const Array& grad_out, const Array& grad_weights, int threads) {
  const int64_t n = features.rows, c_in = features.cols, c_out = grad_out.cols;
  if (!c_in || !c_out) return Status::ok;
  const int64_t height = round_up(c_in, row_step), padded = round_up(c_out, lanes<F>);
  const int64_t tiles = (n + tile_rows - 1) / tile_rows;
  const int64_t fit = (int64_t(1) << 21) / (height * padded);  // partial sums that fit 8 MiB of float32
  const int64_t sums = larger<int64_t>(1, smaller(smaller<int64_t>(64, tiles / 16), fit));
  // A job is a block of input channels of one partial sum. Every job packs the gradient again, so blocks should be few.
  threads = useful_threads(threads, n * c_in * c_out, 1 << 20);
  const int64_t jobs = (4 * threads + sums - 1) / sums, share = (c_in + jobs - 1) / jobs;
  const int64_t block = round_up(smaller<int64_t>(32 * row_step, larger<int64_t>(8 * row_step, share)), row_step);
  const int64_t blocks = (c_in + block - 1) / block;
  Buffer<F> partial;
  if (!partial.resize(sums * height * padded)) return Status::out_of_memory;
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    Buffer<F> left, right;
    enough = left.resize(tile_rows * block) && right.resize(tile_rows * padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < sums * blocks; ++job) {
      if (!enough) continue;
      const int64_t sum = job / blocks, first = job % blocks * block, end = smaller(height, first + block);
      F* const to = partial.data() + sum * height * padded;
      memset(to + first * padded, 0, size_t((end - first) * padded) * sizeof(F));
      const Share share(tiles, int(sum), int(sums));
      for (int64_t t = share.begin; t < share.end; ++t) {
        const int64_t row = t * tile_rows, count = smaller(tile_rows, n - row);
        pack_tile(as<F>(features) + row * c_in + first, c_in, smaller(c_in, end) - first, as<F>(grad_out) + row * c_out,
                  c_out, count, left.data(), right.data());
        for (int64_t v = 0; v < padded; v += panel_width<F>)
          with_vectors(int(smaller<int64_t>(panel_width<F>, padded - v) / lanes<F>), [&](auto vectors) {
            constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
            const F* const panel = right.data() + v * tile_rows;
            for (int64_t c = 0; c < end - first; c += MR)
              multiply_block<F, MR, NV, false>(
                  count, &left[c / row_step * row_step * tile_rows + c % row_step], 1, row_step,
                  [=](int64_t i) { return panel + i * NV * lanes<F>; },
                  [=](int64_t r) { return to + (first + c + r) * padded + v; });
          });
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < c_in; ++c) {
      F* const row = into<F>(grad_weights) + c * c_out;
      memcpy(row, &partial[c * padded], size_t(c_out) * sizeof(F));
      for (int64_t sum = 1; sum < sums; ++sum) {
        const F* const from = &partial[(sum * height + c) * padded];
        for (int64_t v = 0; v < c_out; ++v) row[v] += from[v];
      }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

template <class F>
Status sum_all_rows(const Array& rows, const Array& sums, int threads) {
  const int64_t whole[] = {0, rows.rows}, columns = rows.cols;
  const F* const from = as<F>(rows);
  RowBlocks blocks;
  Buffer<double> wide;
  threads = useful_threads(threads, rows.rows * columns, grain);
  if (!blocks.split(whole, 1, columns) ||
      !sum_columns<F>(blocks, 1, columns, threads, wide,
                      [=](int64_t, int64_t r, int64_t c, auto at, Vec<double>* p, Vec<double>*) {
                        Vec<double> value[wide_vectors<F>];
                        widen<F>(at(from + r * columns + c), value);
                        for (int i = 0; i < wide_vectors<F>; ++i) p[i] += value[i];
                      }))
    return Status::out_of_memory;
  for (int64_t c = 0; c < columns; ++c) into<F>(sums)[c] = F(wide[c]);
  return Status::ok;
}

// ---- normalization

// Mean and variance from sums relative to the first row of each batch item. The variance of n values is at threshold 1
// / n times the squared distance of the first one from the mean, so the subtraction below loses at most a factor of n
// in precision, however large the values are.
template <class T>
Status compute_moments(const Moments& args) {
  const Array &mean = args.mean, &variance = args.variance;
  const int64_t columns = args.features.cols, items = args.row_splits.rows - 1, padded = round_up(columns, lanes<T>);
  const int64_t groups = mean.cols, group_size = groups ? columns / groups : 0;
  const T* const x = as<T>(args.features);
  const int64_t* const row_splits = as<int64_t>(args.row_splits);
  const int threads = useful_threads(args.threads, args.features.rows * columns, grain);
  RowBlocks blocks;
  Buffer<double> origins, sums;
  if (!blocks.split(row_splits, items, columns) || !origins.resize(items * padded)) return Status::out_of_memory;
  for (int64_t item = 0; item < items; ++item)
    for (int64_t c = 0; c < padded; ++c)
      origins[item * padded + c] =
          c < columns && row_splits[item] < row_splits[item + 1] ? double(x[row_splits[item] * columns + c]) : 0;
  const double* const origin = origins.data();
  if (!sum_columns<T>(blocks, items, columns, threads, sums,
                      [=](int64_t item, int64_t r, int64_t c, auto at, Vec<double>* p, Vec<double>* q) {
                        Vec<double> d[wide_vectors<T>];
                        widen<T>(at(x + r * columns + c), d);
                        for (int i = 0; i < wide_vectors<T>; ++i) {
                          d[i] -= load(origin + item * padded + c + i * lanes<double>);
                          p[i] += d[i];
                          q[i] = fma(d[i], d[i], q[i]);
                        }
                      }))
    return Status::out_of_memory;
  for (int64_t item = 0; item < items; ++item) {
    const double n = double(row_splits[item + 1] - row_splits[item]);
    const double *const first = &sums[item * 2 * padded], *const second = first + padded;
    const double* const at = origin + item * padded;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group_size, end = begin + group_size;
      double middle = 0, squares = 0;
      for (int64_t c = begin; n > 0 && c < end; ++c) middle += (at[c] + first[c] / n) / double(group_size);
      for (int64_t c = begin; n > 0 && c < end; ++c) {
        const double off = at[c] + first[c] / n - middle;
        squares += larger(second[c] / n - first[c] / n * (first[c] / n), 0.0) + off * off;  // larger() keeps NaN
      }
      into<double>(mean)[item * groups + g] = middle;
      into<double>(variance)[item * groups + g] = squares / double(group_size);
    }
  }
  return Status::ok;
}

// Normalization as y = (x - center) * factor + offset for every batch item and channel, in the dtype of the features.
// `center` is the mean rounded to that dtype; `offset` corrects for the rounding, which at a mean of 1e4 in float32 is
// up to 5e-4, half a thousandth of a standard deviation of 1.
template <class T>
struct Affine {
  Buffer<T> center, factor, offset;
  int64_t padded;

  bool set(const Normalize& args) {
    const int64_t columns = args.features.cols, items = args.row_splits.rows - 1, groups = args.mean.cols;
    padded = round_up(columns, lanes<T>);
    if (!center.resize(items * padded) || !factor.resize(items * padded) || !offset.resize(items * padded))
      return false;
    for (int64_t item = 0; item < items; ++item)
      for (int64_t c = 0; c < padded; ++c) {
        const bool is_channel = c < columns;
        const int64_t g = is_channel ? item * groups + c * groups / columns : 0, i = item * padded + c;
        const double scale = is_channel ? as<double>(args.inverse_std)[g] * double(as<T>(args.scale)[c]) : 0;
        const double mean = is_channel ? as<double>(args.mean)[g] : 0;
        center[i] = T(mean);
        factor[i] = T(scale);
        offset[i] = T((is_channel ? double(as<T>(args.shift)[c]) : 0) - (mean - double(center[i])) * scale);
      }
    return true;
  }
};

template <class T>
Status apply(const Normalize& args) {
  const Array& out = args.out;
  const int64_t columns = args.features.cols, items = args.row_splits.rows - 1;
  const int threads = useful_threads(args.threads, args.features.rows * columns, grain);
  Affine<T> affine;
  RowBlocks blocks;
  if (!affine.set(args) || !blocks.split(as<int64_t>(args.row_splits), items, columns)) return Status::out_of_memory;
  const T* const x = as<T>(args.features);
  T* const y = into<T>(out);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const int64_t item_offset = blocks.item(b) * affine.padded;
    const T *const center = &affine.center[item_offset], *const factor = &affine.factor[item_offset];
    const T* const offset = &affine.offset[item_offset];
    const Vec<T> slope = broadcast(T(args.negative_slope));
    for (int64_t r = blocks.begin(b); r < blocks.end(b); ++r)
      map(columns, y + r * columns, [=](int64_t c, auto at) {
        return leaky_relu(fma(at(x + r * columns + c) - load(center + c), load(factor + c), load(offset + c)), slope);
      });
  }
  return Status::ok;
}

// Backward of the normalization (Ioffe and Szegedy 2015, section 3). With s = inverse_std, n = (x - mean) s, y = n
// scale + shift and the gradient g of y, where means are over all values of an item and group:
//   grad_scale = sum of g n,  grad_shift = sum of g,
//   grad_x = s (g scale - mean of (g scale) - n mean of (g scale n)),
// without the last two terms if the statistics are fixed.
template <class T>
Status differentiate(const Normalize& args) {
  const int64_t columns = args.features.cols, items = args.row_splits.rows - 1, groups = args.mean.cols;
  const int64_t* const row_splits = as<int64_t>(args.row_splits);
  const T *const x = as<T>(args.features), *const grad = as<T>(args.grad_out);
  const int threads = useful_threads(args.threads, args.features.rows * columns, grain);
  Affine<T> affine;
  RowBlocks blocks;
  if (!affine.set(args) || !blocks.split(row_splits, items, columns)) return Status::out_of_memory;
  const int64_t padded = affine.padded;
  const T *const center = affine.center.data(), *const factor = affine.factor.data();
  const T* const offset = affine.offset.data();
  const Vec<T> slope = broadcast(T(args.negative_slope));
  // The gradient before the leaky ReLU; its argument is computed exactly as in the forward pass.
  const auto grad_before_relu = [=](Vec<T> d, Vec<T> g, int64_t i) {
    return leaky_relu_grad(fma(d, load(factor + i), load(offset + i)), g, slope);
  };

  Buffer<T> x_slope, constant;  // grad_x = g factor + (x - center) x_slope + constant
  if (!x_slope.resize(items * padded) || !constant.resize(items * padded)) return Status::out_of_memory;
  memset(x_slope.data(), 0, size_t(items * padded) * sizeof(T));
  memset(constant.data(), 0, size_t(items * padded) * sizeof(T));
  if (args.grad_scale.data || args.grad_shift.data || !args.statistics_fixed) {
    Buffer<double> sums;
    if (!sum_columns<T>(blocks, items, columns, threads, sums,
                        [=](int64_t item, int64_t r, int64_t c, auto at, Vec<double>* p, Vec<double>* q) {
                          const Vec<T> narrow = at(x + r * columns + c) - load(center + item * padded + c);
                          Vec<double> d[wide_vectors<T>], g[wide_vectors<T>];
                          widen<T>(narrow, d);
                          widen<T>(grad_before_relu(narrow, at(grad + r * columns + c), item * padded + c), g);
                          for (int i = 0; i < wide_vectors<T>; ++i) {
                            p[i] += g[i];
                            q[i] = fma(g[i], d[i], q[i]);
                          }
                        }))
      return Status::out_of_memory;
    for (int64_t item = 0; item < items; ++item) {
      double *const shifts = &sums[item * 2 * padded], *const scales = shifts + padded;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t g = item * groups + c * groups / columns;
        const double center_error = as<double>(args.mean)[g] - double(center[item * padded + c]);
        scales[c] = as<double>(args.inverse_std)[g] * (scales[c] - center_error * shifts[c]);
      }
      const double values = double(row_splits[item + 1] - row_splits[item]) * double(groups ? columns / groups : 0);
      for (int64_t g = 0; g < groups && !args.statistics_fixed && values > 0; ++g) {
        const int64_t begin = g * (columns / groups), end = begin + columns / groups;
        double mean_grad = 0, mean_product = 0;
        for (int64_t c = begin; c < end; ++c) {
          mean_grad += double(as<T>(args.scale)[c]) * shifts[c] / values;
          mean_product += double(as<T>(args.scale)[c]) * scales[c] / values;
        }
        const double inverse = as<double>(args.inverse_std)[item * groups + g];
        const double mean = as<double>(args.mean)[item * groups + g], slope_of_x = -inverse * inverse * mean_product;
        for (int64_t i = item * padded + begin; i < item * padded + end; ++i) {
          x_slope[i] = T(slope_of_x);
          constant[i] = T(-inverse * mean_grad - slope_of_x * (mean - double(center[i])));
        }
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      double shift = 0, scale = 0;
      for (int64_t item = 0; item < items; ++item) {
        shift += sums[item * 2 * padded + c];
        scale += sums[(item * 2 + 1) * padded + c];
      }
      if (args.grad_shift.data) into<T>(args.grad_shift)[c] = T(shift);
      if (args.grad_scale.data) into<T>(args.grad_scale)[c] = T(scale);
    }
  }
  if (!args.grad_features.data) return Status::ok;
  const T *const x_slopes = x_slope.data(), *const constants = constant.data();
  T* const to = into<T>(args.grad_features);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const int64_t item_offset = blocks.item(b) * padded;
    for (int64_t r = blocks.begin(b); r < blocks.end(b); ++r)
      map(columns, to + r * columns, [=](int64_t c, auto at) {
        const int64_t i = item_offset + c;
        const Vec<T> d = at(x + r * columns + c) - load(center + i);
        const Vec<T> g = grad_before_relu(d, at(grad + r * columns + c), i);
        return fma(g, load(factor + i), fma(d, load(x_slopes + i), load(constants + i)));
      });
  }
  return Status::ok;
}

// ---- activations

template <class T>
KP_INLINE Vec<T> exp_minus_abs(Vec<T> x) {
  return exponential<T>(-max(x, -x));
}

template <class T>
Status activate_all(const Activate& args, T* out) {
  const int64_t n = args.features.rows * args.features.cols;
  const T* const x = as<T>(args.features);
  const T slope = T(args.negative_slope);
  if (args.activation == Activation::leaky_relu)
    map_shared(n, args.threads, out, [=](int64_t i, auto at) { return leaky_relu(at(x + i), broadcast(slope)); });
  else if (args.activation == Activation::relu)
    map_shared(n, args.threads, out, [=](int64_t i, auto at) { return relu(at(x + i)); });
  else if (args.activation == Activation::relu6)
    map_shared(n, args.threads, out, [=](int64_t i, auto at) { return relu6(at(x + i)); });
  else
    map_shared(n, args.threads, out, [=](int64_t i, auto at) {
      const Vec<T> value = at(x + i);
      return sigmoid(value, exp_minus_abs<T>(value));
    });
  return Status::ok;
}

template <class T>
Status activate_all_grad(const Activate& args, const T* grad, T* out) {
  const int64_t n = args.features.rows * args.features.cols;
  const T* const x = as<T>(args.features);
  const T slope = T(args.negative_slope);
  if (args.activation == Activation::leaky_relu)
    map_shared(n, args.threads, out,
               [=](int64_t i, auto at) { return leaky_relu_grad(at(x + i), at(grad + i), broadcast(slope)); });
  else if (args.activation == Activation::relu)
    map_shared(n, args.threads, out, [=](int64_t i, auto at) { return relu_grad(at(x + i), at(grad + i)); });
  else if (args.activation == Activation::relu6)
    map_shared(n, args.threads, out, [=](int64_t i, auto at) { return relu6_grad(at(x + i), at(grad + i)); });
  else
    map_shared(n, args.threads, out,
               [=](int64_t i, auto at) { return at(grad + i) * sigmoid_grad(exp_minus_abs<T>(at(x + i))); });
  return Status::ok;
}

// ---- sums of squares

// The sum of term(i) for begin <= i < end by pairwise summation, whose rounding error hardly grows with the number of
// terms. Up to 128 terms are summed in eight running sums, with every vector width the same.
template <class Term>
double sum_pairwise(int64_t begin, int64_t end, const Term& term) {
  constexpr int64_t smallest = 128;
  constexpr int running = 8;
  if (end - begin > smallest) {
    const int64_t middle = begin + round_up((end - begin) / 2, smallest);
    return sum_pairwise(begin, middle, term) + sum_pairwise(middle, end, term);
  }
  double sums[running] = {};
  int64_t i = begin;
  for (; i + running <= end; i += running)
    for (int l = 0; l < running; ++l) sums[l] += term(i + l);
  for (int l = 0; i + l < end; ++l) sums[l] += term(i + l);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
Status sum_all_squares(const Array& values, double* sum, int threads) {
  constexpr int64_t block = 1 << 16;
  const T* const x = as<T>(values);
  const int64_t n = values.rows * values.cols, blocks = (n + block - 1) / block;
  Buffer<double> partial;
  if (!partial.resize(blocks)) return Status::out_of_memory;
#pragma omp parallel for num_threads(useful_threads(threads, n, grain)) schedule(static)
  for (int64_t b = 0; b < blocks; ++b)
    partial[b] = sum_pairwise(b * block, smaller(n, (b + 1) * block), [=](int64_t i) {
      const double value = double(x[i]);
      return value * value;
    });
  *sum = sum_pairwise(0, blocks, [&](int64_t b) { return partial[b]; });
  return Status::ok;
}

// ---- optimizers

// Calls step(load, store) for every vector of n values, with several threads. load(p) and store(p, v) access the
// current vector of array p.
template <class T, class Step>
void step_shared(int64_t n, int threads, Step step) {
#pragma omp parallel num_threads(useful_threads(threads, n, grain))
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    int64_t i = share.begin;
    for (; i + lanes<T> <= share.end; i += lanes<T>)
      step([i](const T* p) { return load(p + i); }, [i](T* p, Vec<T> v) { store(p + i, v); });
    if (const int rest = int(share.end - i))
      step([i, rest](const T* p) { return load_first(p + i, rest); },
           [i, rest](T* p, Vec<T> v) { store_first(p + i, rest, v); });
  }
}

template <class T>
Status descend(const Sgd& args) {
  T *const value = into<T>(args.value), *const moment = into<T>(args.moment);
  const T* const grad = as<T>(args.grad);
  const Vec<T> lr = broadcast(T(args.lr)), momentum = broadcast(T(args.momentum));
  const Vec<T> weight_decay = broadcast(T(args.weight_decay));
  step_shared<T>(args.value.rows * args.value.cols, args.threads, [=](auto load, auto store) {
    Vec<T> v = load(value), m = load(moment);
    sgd_step(v, load(grad), m, lr, momentum, weight_decay);
    store(value, v);
    store(moment, m);
  });
  return Status::ok;
}

template <class T>
Status adapt(const AdamW& args) {
  T *const value = into<T>(args.value), *const mean = into<T>(args.mean), *const square = into<T>(args.square);
  const T* const grad = as<T>(args.grad);
  const Vec<T> keep = broadcast(T(args.keep)), first = broadcast(T(args.first)), second = broadcast(T(args.second));
  const Vec<T> rate = broadcast(T(args.rate)), inverse_root = broadcast(T(args.inverse_root));
  const Vec<T> eps = broadcast(T(args.eps));
  step_shared<T>(args.value.rows * args.value.cols, args.threads, [=](auto load, auto store) {
    Vec<T> v = load(value), m = load(mean), s = load(square);
    adamw_step(v, load(grad), m, s, keep, first, second, rate, inverse_root, eps);
    store(value, v);
    store(mean, m);
    store(square, s);
  });
  return Status::ok;
}

// ---- dropout

using Words = Vec<uint64_t>;

// The 64-bit products of the lower 32 bits of each lane.
KP_INLINE Words multiply_words(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

KP_INLINE void random_words(uint64_t seed, int64_t block, uint32_t* words) {
  constexpr int width = lanes<uint64_t>;
  typedef uint32_t Half __attribute__((vector_size(KP_VECTOR_BYTES / 2)));
  Words lane;
  for (int l = 0; l < width; ++l) lane[l] = uint64_t(l);
  for (int64_t first = 0; first < counters_of_block; first += width) {
    Words word[4] = {};
    word[0] = lane + uint64_t(block * counters_of_block + first);
    word[1] = word[0] >> 32;
    philox(word, seed, [](Words a, uint32_t b) { return multiply_words(a, b); });
    for (int j = 0; j < 4; ++j) {
      const Half half = __builtin_convertvector(word[j], Half);
      memcpy(words + j * counters_of_block + first, &half, sizeof(half));
    }
  }
}

template <class T>
Status drop(const Dropout& args, T* out) {
  const int64_t n = args.features.rows * args.features.cols, blocks = (n + words_of_block - 1) / words_of_block;
  const T* const x = as<T>(args.features);
  const bool all = args.rate >= 1;
  const uint32_t threshold = all ? 0 : uint32_t(args.rate * 4294967296.0);  // random words below it drop their value
  const T scale = all ? T(0) : T(1 / (1 - args.rate));
#pragma omp parallel for num_threads(useful_threads(args.threads, n, grain)) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) uint32_t words[words_of_block];
    const T* const from = x + b * words_of_block;
    T* const to = out + b * words_of_block;
    const int64_t count = smaller(words_of_block, n - b * words_of_block);
    const auto keep = [&](int64_t values) {
      for (int64_t i = 0; i < values; ++i) {
        const T value = from[i] * scale;  // computed also for dropped values, so that there is no branch
        to[i] = words[i] >= threshold ? value : T(0);
      }
    };
    if (all) {
      memset(to, 0, size_t(count) * sizeof(T));
      continue;
    }
    random_words(args.seed, b, words);
    if (count == words_of_block)
      keep(words_of_block);  // a constant count, so the loop is vectorized
    else
      keep(count);
  }
  return Status::ok;
}

// ---- softmax

// A vector of the first n values at p, minus infinity after them.
template <class T>
KP_INLINE Vec<T> load_row_end(const T* p, int64_t n) {
  if (n >= lanes<T>) return load(p);
  Vec<T> lane;
  for (int l = 0; l < lanes<T>; ++l) lane[l] = T(l);
  return lane < broadcast(T(n)) ? load_first(p, int(n)) : broadcast(-T(INFINITY));
}

// The largest value of a row and the sum of exp(x - largest). The exponentials are written to `e` unless it is null.
template <class T>
struct Exponentials {
  T largest, sum;
  Exponentials(const T* x, int64_t n, T* e) {
    Vec<T> most = broadcast(-T(INFINITY)), total = {};
    for (int64_t c = 0; c < n; c += lanes<T>) most = max(most, load_row_end(x + c, n - c));
    largest = most[0];
    for (int l = 1; l < lanes<T>; ++l) largest = larger(largest, most[l]);
    for (int64_t c = 0; c < n; c += lanes<T>) {
      const Vec<T> value = exponential<T>(load_row_end(x + c, n - c) - largest);
      total += value;
      if (e) store_first_or_all(e + c, n - c, value);
    }
    sum = sum_of_lanes<T>(total);
  }

 private:
  static KP_INLINE void store_first_or_all(T* p, int64_t n, Vec<T> v) {
    if (n >= lanes<T>)
      store(p, v);
    else
      store_first(p, int(n), v);
  }
};

template <class T>
Status softmax_rows(const Array& features, T* out, int threads) {
  const int64_t n = features.rows, columns = features.cols;
  if (!columns) return Status::ok;
#pragma omp parallel for num_threads(useful_threads(threads, n* columns, grain / 4)) schedule(static)
  for (int64_t r = 0; r < n; ++r) {
    T* const row = out + r * columns;
    const Exponentials<T> exponentials(as<T>(features) + r * columns, columns, row);
    map(columns, row, [&](int64_t c, auto at) { return at(row + c) / exponentials.sum; });
  }
  return Status::ok;
}

// Backward of y = softmax(x): y (g - sum of g y).
template <class T>
Status softmax_rows_grad(const Array& features, const T* grad, T* out, int threads) {
  const int64_t n = features.rows, columns = features.cols;
  if (!columns) return Status::ok;
#pragma omp parallel for num_threads(useful_threads(threads, n* columns, grain / 4)) schedule(static)
  for (int64_t r = 0; r < n; ++r) {
    T* const row = out + r * columns;
    const T* const g = grad + r * columns;
    const Exponentials<T> exponentials(as<T>(features) + r * columns, columns, row);
    Vec<T> products = {};
    int64_t c = 0;
    for (; c + lanes<T> <= columns; c += lanes<T>) products = fma(load(row + c), load(g + c), products);
    if (const int rest = int(columns - c)) products = fma(load_first(row + c, rest), load_first(g + c, rest), products);
    const T mean = sum_of_lanes<T>(products) / exponentials.sum;
    map(columns, row, [&](int64_t i, auto at) { return at(row + i) / exponentials.sum * (at(g + i) - mean); });
  }
  return Status::ok;
}

// ---- cross entropy

constexpr int64_t rows_of_block = 1024;

// Labels and class weights of a cross entropy.
template <class T, class L>
class LabeledRows {
 public:
  explicit LabeledRows(const CrossEntropy& args)
      : labels_(as<L>(args.labels)),
        weights_(as<T>(args.class_weights)),
        classes_(args.logits.cols),
        ignore_(args.ignore_index.value),
        has_ignore_(args.ignore_index.is_set) {}
  int64_t label(int64_t r) const { return int64_t(read_once(labels_ + r)); }
  bool is_ignored(int64_t label) const { return has_ignore_ && label == ignore_; }
  bool is_valid(int64_t label) const { return label >= 0 && label < classes_; }
  double weight(int64_t label) const { return weights_ ? double(weights_[label]) : 1; }

 private:
  const L* labels_;
  const T* weights_;
  int64_t classes_, ignore_;
  bool has_ignore_;
};

// The loss of a row is weight * (log(sum of exp(x)) - x[label]). Writes the losses, their sum, or their sum divided by
// the sum of the weights, depending on the reduction.
template <class T, class L>
Status cross_entropies(const CrossEntropy& args, T* out) {
  const int64_t n = args.logits.rows, classes = args.logits.cols, blocks = (n + rows_of_block - 1) / rows_of_block;
  const LabeledRows<T, L> rows(args);
  const bool reduce = args.reduction != CrossEntropyReduction::none;
  Buffer<double> losses, weights;
  if (!losses.resize(blocks) || !weights.resize(blocks)) return Status::out_of_memory;
  bool valid = true;
#pragma omp parallel for num_threads(useful_threads(args.threads, n* classes, grain / 4)) schedule(static) \
    reduction(&& : valid)
  for (int64_t b = 0; b < blocks; ++b) {
    double loss_sum = 0, weight_sum = 0;
    for (int64_t r = b * rows_of_block; r < smaller(n, (b + 1) * rows_of_block); ++r) {
      double loss = 0;
      if (const int64_t label = rows.label(r); !rows.is_ignored(label)) {
        if (!rows.is_valid(label)) {
          valid = false;
          break;
        }
        const T* const x = as<T>(args.logits) + r * classes;
        const Exponentials<T> exponentials(x, classes, nullptr);
        loss = rows.weight(label) * (log(double(exponentials.sum)) + (double(exponentials.largest) - double(x[label])));
        weight_sum += rows.weight(label);
      }
      loss_sum += loss;
      if (!reduce) out[r] = T(loss);
    }
    losses[b] = loss_sum;
    weights[b] = weight_sum;
  }
  if (!valid) return Status::out_of_range;
  if (!reduce) return Status::ok;
  double loss = 0, weight = 0;
  for (int64_t b = 0; b < blocks; ++b) loss += losses[b], weight += weights[b];
  if (args.reduction == CrossEntropyReduction::mean) loss = weight != 0 ? loss / weight : 0;
  *out = T(loss);
  return Status::ok;
}

// The sum of the weights of the rows that are not ignored.
template <class T, class L>
Status sum_weights(const LabeledRows<T, L>& rows, int64_t n, int threads, double* sum) {
  const int64_t blocks = (n + rows_of_block - 1) / rows_of_block;
  Buffer<double> weights;
  if (!weights.resize(blocks)) return Status::out_of_memory;
  bool valid = true;
#pragma omp parallel for num_threads(useful_threads(threads, n, grain)) schedule(static) reduction(&& : valid)
  for (int64_t b = 0; b < blocks; ++b) {
    weights[b] = 0;
    for (int64_t r = b * rows_of_block; valid && r < smaller(n, (b + 1) * rows_of_block); ++r) {
      const int64_t label = rows.label(r);
      if (rows.is_ignored(label)) continue;
      valid = rows.is_valid(label);
      if (valid) weights[b] += rows.weight(label);
    }
  }
  *sum = 0;
  for (int64_t b = 0; b < blocks; ++b) *sum += weights[b];
  return valid ? Status::ok : Status::out_of_range;
}

// Backward of the cross entropy: weight * (softmax - one-hot) * gradient of the row's loss.
template <class T, class L>
Status cross_entropies_grad(const CrossEntropy& args, const T* grad, T* out) {
  const int64_t n = args.logits.rows, classes = args.logits.cols;
  const LabeledRows<T, L> rows(args);
  const bool each = args.reduction == CrossEntropyReduction::none;
  double share = each ? 1 : double(*grad), weight;
  if (Status status = sum_weights(rows, n, args.threads, &weight); status != Status::ok) return status;
  if (args.reduction == CrossEntropyReduction::mean) share = weight != 0 ? share / weight : 0;
  bool valid = true;
#pragma omp parallel for num_threads(useful_threads(args.threads, n* classes, grain / 4)) schedule(static) \
    reduction(&& : valid)
  for (int64_t r = 0; r < n; ++r) {
    T* const row = out + r * classes;
    const int64_t label = rows.label(r);
    if (rows.is_ignored(label) || !rows.is_valid(label)) {
      valid = valid && rows.is_ignored(label);
      memset(row, 0, size_t(classes) * sizeof(T));
      continue;
    }
    const Exponentials<T> exponentials(as<T>(args.logits) + r * classes, classes, row);
    const T factor = T((each ? double(grad[r]) : share) * rows.weight(label));
    map(classes, row, [&](int64_t c, auto at) { return at(row + c) / exponentials.sum * factor; });
    row[label] -= factor;
  }
  return valid ? Status::ok : Status::out_of_range;
}

// Calls call(T(), L()) with the types of logits and labels.
template <class Call>
Status with_types(const CrossEntropy& args, Call call) {
  return with_real(args.logits.dtype, [&](auto t) {
    if (args.labels.dtype == DType::uint8) return call(t, uint8_t());
    return args.labels.dtype == DType::int32 ? call(t, int32_t()) : call(t, int64_t());
  });
}

// ---- concatenation

// Calls copy(row of the part, its place in the joined row, bytes) for every row and part.
template <class Copy>
void for_each_part(const Concatenate& args, Copy copy) {
  const Array& joined = args.out;
  if (!joined.cols) return;
  const int64_t size = size_of(joined.dtype), stride = joined.cols * size;
  const int threads = useful_threads(args.threads, joined.rows * joined.cols, grain);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < joined.rows; ++r) {
    char* to = into<char>(joined) + r * stride;
    for (const OptionalArray* part : {&args.first, &args.second, &args.third, &args.fourth}) {
      if (part->data) copy(into<char>(*part) + r * part->cols * size, to, size_t(part->cols * size));
      to += part->cols * size;
    }
  }
}

}  // namespace

Status linear(const Linear& args) {
  return with_real(args.out.dtype, [&](auto t) {
    using F = decltype(t);
    return multiply<F>(args.features, args.weights, false, as<F>(args.bias), args.out, args.threads);
  });
}

Status linear_grad_features(const Linear& args) {
  return with_real(args.grad_out.dtype, [&](auto t) {
    return multiply<decltype(t)>(args.grad_out, args.weights, true, nullptr, args.grad_features, args.threads);
  });
}

Status linear_grad_weights(const Linear& args) {
  return with_real(args.grad_out.dtype, [&](auto t) {
    return weight_gradient<decltype(t)>(args.features, args.grad_out, args.grad_weights, args.threads);
  });
}

Status sum_rows(const SumRows& args) {
  return with_real(args.rows.dtype,
                   [&](auto t) { return sum_all_rows<decltype(t)>(args.rows, args.sums, args.threads); });
}

Status moments(const Moments& args) {
  return with_real(args.features.dtype, [&](auto t) { return compute_moments<decltype(t)>(args); });
}

Status normalize(const Normalize& args) {
  return with_real(args.features.dtype, [&](auto t) { return apply<decltype(t)>(args); });
}

Status normalize_grad(const Normalize& args) {
  return with_real(args.features.dtype, [&](auto t) { return differentiate<decltype(t)>(args); });
}

Status activate(const Activate& args) {
  return with_real(args.out.dtype, [&](auto t) { return activate_all(args, into<decltype(t)>(args.out)); });
}

Status activate_grad(const Activate& args) {
  return with_real(args.grad_out.dtype, [&](auto t) {
    using T = decltype(t);
    return activate_all_grad(args, as<T>(args.grad_out), into<T>(args.grad_features));
  });
}

Status add(const Add& args) {
  const Array& out = args.out;
  return with_real(out.dtype, [&](auto t) {
    using T = decltype(t);
    const T *const a = as<T>(args.first), *const b = as<T>(args.second);
    map_shared(out.rows * out.cols, args.threads, into<T>(out),
               [=](int64_t i, auto at) { return at(a + i) + at(b + i); });
    return Status::ok;
  });
}

Status sum_squares(const SumSquares& args) {
  return with_real(args.values.dtype, [&](auto t) {
    return sum_all_squares<decltype(t)>(args.values, into<double>(args.sum), args.threads);
  });
}

Status sgd(const Sgd& args) {
  return with_real(args.value.dtype, [&](auto t) { return descend<decltype(t)>(args); });
}

Status adamw(const AdamW& args) {
  return with_real(args.value.dtype, [&](auto t) { return adapt<decltype(t)>(args); });
}

Status dropout(const Dropout& args) {
  return with_real(args.out.dtype, [&](auto t) { return drop(args, into<decltype(t)>(args.out)); });
}

Status softmax(const Softmax& args) {
  return with_real(args.out.dtype,
                   [&](auto t) { return softmax_rows(args.features, into<decltype(t)>(args.out), args.threads); });
}

Status softmax_grad(const Softmax& args) {
  return with_real(args.grad_out.dtype, [&](auto t) {
    using T = decltype(t);
    return softmax_rows_grad(args.features, as<T>(args.grad_out), into<T>(args.grad_features), args.threads);
  });
}

Status cross_entropy(const CrossEntropy& args) {
  return with_types(args, [&](auto t, auto l) {
    using T = decltype(t);
    return cross_entropies<T, decltype(l)>(args, into<T>(args.out));
  });
}

Status cross_entropy_grad(const CrossEntropy& args) {
  return with_types(args, [&](auto t, auto l) {
    using T = decltype(t);
    return cross_entropies_grad<T, decltype(l)>(args, as<T>(args.grad_out), into<T>(args.grad_logits));
  });
}

Status concatenate(const Concatenate& args) {
  for_each_part(args, [](char* part, char* joined, size_t bytes) { memcpy(joined, part, bytes); });
  return Status::ok;
}

Status split(const Concatenate& args) {
  for_each_part(args, [](char* part, char* joined, size_t bytes) { memcpy(part, joined, bytes); });
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
