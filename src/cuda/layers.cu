// Layers on rows of features on the GPU, all bound by memory bandwidth; cuBLAS computes the products of linear layers.
//
// Sums over rows are float64: first within blocks of 1024 rows of a batch item (moment_blocks, grad_blocks), then over
// the blocks in order (join_moments, join_grads). Results do not depend on the launch.
//
// Compiled for the type of the features:
// compile: KP_F=float
// compile: KP_F=double
// compile: KP_F=kp::Half
// compile: KP_F=kp::Bfloat

#include "launch.h"
#include "formulas/layers.h"
#include "storage.h"

namespace kp {
namespace {

using S = KP_F;
using F = Real<S>;

__device__ F exp_minus_abs(F x) {
  return exp(x < 0 ? x : -x);
}

// The largest value of a row and the sum of exp(x - largest), computed by a warp.
struct Exponentials {
  F largest, sum;
  __device__ Exponentials(const S* row, int64_t columns) : largest(F(row[0])), sum(0) {
    for (int64_t c = lane_number(); c < columns; c += warp) largest = F(row[c]) > largest ? F(row[c]) : largest;
    for (int bit = warp / 2; bit; bit /= 2) {
      const F other = __shfl_xor_sync(all_lanes, largest, bit);
      largest = other > largest ? other : largest;
    }
    for (int64_t c = lane_number(); c < columns; c += warp) sum += exp(F(row[c]) - largest);
    for (int bit = warp / 2; bit; bit /= 2) sum += __shfl_xor_sync(all_lanes, sum, bit);
  }
};

}  // namespace
}  // namespace kp

using namespace kp;

extern "C" __global__ void activate(const S* features, int64_t size, Activation activation, F negative_slope, S* out) {
  for (int64_t i = first_thread(); i < size; i += num_threads())
    out[i] = S(activation == Activation::leaky_relu ? leaky_relu(F(features[i]), negative_slope)
               : activation == Activation::relu     ? relu(F(features[i]))
               : activation == Activation::relu6    ? relu6(F(features[i]))
                                                    : sigmoid(F(features[i]), exp_minus_abs(F(features[i]))));
}

extern "C" __global__ void activate_grad(const S* features, const S* grad_out, int64_t size, Activation activation,
                                         F negative_slope, S* grad_features) {
  for (int64_t i = first_thread(); i < size; i += num_threads())
    grad_features[i] =
        S(activation == Activation::leaky_relu ? leaky_relu_grad(F(features[i]), F(grad_out[i]), negative_slope)
          : activation == Activation::relu     ? relu_grad(F(features[i]), F(grad_out[i]))
          : activation == Activation::relu6    ? relu6_grad(F(features[i]), F(grad_out[i]))
                                               : F(grad_out[i]) * sigmoid_grad(exp_minus_abs(F(features[i]))));
}

extern "C" __global__ void sgd(F* value, const F* grad, F* moment, int64_t size, F lr, F momentum, F weight_decay) {
  for (int64_t i = first_thread(); i < size; i += num_threads())
    sgd_step(value[i], grad[i], moment[i], lr, momentum, weight_decay);
}

extern "C" __global__ void adamw(F* value, const F* grad, F* mean, F* square, int64_t size, F keep, F first, F second,
                                 F rate, F inverse_root, F eps) {
  for (int64_t i = first_thread(); i < size; i += num_threads())
    adamw_step(value[i], grad[i], mean[i], square[i], keep, first, second, rate, inverse_root, eps);
}

// A thread computes the four random words of a counter, for four values 16 places apart. A value is kept if its word is
// at threshold `threshold`.
extern "C" __global__ void dropout(const S* features, int64_t size, uint64_t seed, uint32_t threshold, F scale,
                                   S* out) {
  const int64_t counters = (size + words_of_block - 1) / words_of_block * counters_of_block;
  for (int64_t i = first_thread(); i < counters; i += num_threads()) {
    uint64_t word[4] = {uint64_t(i), uint64_t(i) >> 32, 0, 0};
    philox(word, seed, [](uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; });
    for (int w = 0; w < 4; ++w) {
      const int64_t at = i / counters_of_block * words_of_block + w * counters_of_block + i % counters_of_block;
      if (at < size) out[at] = S(uint32_t(word[w]) >= threshold ? F(features[at]) * scale : F(0));
    }
  }
}

extern "C" __global__ void softmax(const S* features, int64_t rows, int64_t columns, S* out) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const Exponentials row(features + r * columns, columns);
    for (int64_t c = lane_number(); c < columns; c += warp)
      out[r * columns + c] = S(exp(F(features[r * columns + c]) - row.largest) / row.sum);
  }
}

// Backward of y = softmax: y (g - sum of g y).
extern "C" __global__ void softmax_grad(const S* features, const S* grad_out, int64_t rows, int64_t columns,
                                        S* grad_features) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const Exponentials row(features + r * columns, columns);
    const auto y = [&](int64_t c) { return exp(F(features[r * columns + c]) - row.largest) / row.sum; };
    F mean = F(0);
    for (int64_t c = lane_number(); c < columns; c += warp) mean += y(c) * F(grad_out[r * columns + c]);
    for (int bit = warp / 2; bit; bit /= 2) mean += __shfl_xor_sync(all_lanes, mean, bit);
    for (int64_t c = lane_number(); c < columns; c += warp)
      grad_features[r * columns + c] = S(y(c) * (F(grad_out[r * columns + c]) - mean));
  }
}

// partial[b] = the sums of the columns of block b
extern "C" __global__ void sum_blocks(const S* rows, int64_t num_rows, int64_t columns, double* partial) {
  const int64_t blocks = (num_rows + block_of_rows - 1) / block_of_rows;
  for (int64_t i = first_thread(); i < blocks * columns; i += num_threads()) {
    const int64_t first = i / columns * block_of_rows, c = i % columns;
    const int64_t end = first + block_of_rows < num_rows ? first + block_of_rows : num_rows;
    double sum = 0;
    for (int64_t r = first; r < end; ++r) sum += double(F(rows[r * columns + c]));
    partial[i] = sum;
  }
}

extern "C" __global__ void join_sums(const double* partial, int64_t blocks, int64_t columns, S* sums) {
  for (int64_t c = first_thread(); c < columns; c += num_threads()) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * columns + c];
    sums[c] = S(F(sum));
  }
}

// ---- normalization: items are cut into blocks of rows; first_blocks[b] is the number of the first block of item b

namespace kp {
namespace {

struct Block {
  int item;
  int64_t begin, end;
  __device__ Block(const int64_t* row_splits, const int64_t* first_blocks, int num_items, int64_t k)
      : item(item_of(first_blocks, num_items, k)), begin(row_splits[item] + (k - first_blocks[item]) * block_of_rows) {
    end = begin + block_of_rows < row_splits[item + 1] ? begin + block_of_rows : row_splits[item + 1];
  }
};

// y = (x - center) * factor + offset for an item and channel; see layers.cpp.
struct Affine {
  F center, factor, offset;
};
__device__ Affine affine_of(const double* mean, const double* inverse_std, const S* scale, const S* shift,
                            int64_t columns, int64_t groups, int64_t item, int64_t c) {
  const int64_t g = item * groups + c * groups / columns;
  const double factor = inverse_std[g] * double(F(scale[c]));
  const F center = F(mean[g]);
  return {center, F(factor), F(double(F(shift[c])) - (mean[g] - double(center)) * factor)};
}

}  // namespace
}  // namespace kp

// For each block and column, the sums of d and d², where d is the difference from the item's first row.
extern "C" __global__ void moment_blocks(const S* features, int64_t columns, const int64_t* row_splits, int num_items,
                                         const int64_t* first_blocks, int64_t max_blocks, double* sums,
                                         double* squares) {
  for (int64_t i = first_thread(); i < max_blocks * columns; i += num_threads()) {
    const int64_t k = i / columns, c = i % columns;
    if (k >= first_blocks[num_items]) continue;
    const Block block(row_splits, first_blocks, num_items, k);
    const double origin = double(F(features[row_splits[block.item] * columns + c]));
    double sum = 0, square = 0;
    for (int64_t r = block.begin; r < block.end; ++r) {
      const double d = double(F(features[r * columns + c])) - origin;
      sum += d;
      square += d * d;
    }
    sums[i] = sum;
    squares[i] = square;
  }
}

// Joins the blocks of each item: mean and variance (items, groups). A thread for each item and group.
extern "C" __global__ void join_moments(const S* features, int64_t columns, int64_t groups, const int64_t* row_splits,
                                        int64_t num_items, const int64_t* first_blocks, const double* sums,
                                        const double* squares, double* mean, double* variance) {
  const int64_t width = columns / groups;
  for (int64_t i = first_thread(); i < num_items * groups; i += num_threads()) {
    const int64_t b = i / groups, begin = i % groups * width;
    const double n = double(row_splits[b + 1] - row_splits[b]);
    const auto mean_of = [=](const double* of_blocks, int64_t c) {
      double sum = 0;
      for (int64_t k = first_blocks[b]; k < first_blocks[b + 1]; ++k) sum += of_blocks[k * columns + c];
      return sum / n;
    };
    const auto middle_of = [=](int64_t c) {
      return double(F(features[row_splits[b] * columns + c])) + mean_of(sums, c);
    };
    double middle = 0, spread = 0;
    for (int64_t c = begin; n > 0 && c < begin + width; ++c) middle += middle_of(c) / double(width);
    for (int64_t c = begin; n > 0 && c < begin + width; ++c) {
      const double off = middle_of(c) - middle, first = mean_of(sums, c),
                   channel_variance = mean_of(squares, c) - first * first;
      spread += (channel_variance < 0 ? 0 : channel_variance) + off * off;
    }
    mean[i] = middle;
    variance[i] = spread / double(width);
  }
}

extern "C" __global__ void normalize(const S* features, int64_t rows, int64_t columns, const int64_t* row_splits,
                                     int num_items, const S* scale, const S* shift, const double* mean,
                                     const double* inverse_std, int64_t groups, F negative_slope, S* out) {
  for (int64_t i = first_thread(); i < rows * columns; i += num_threads()) {
    const int item = item_of(row_splits, num_items, i / columns);
    const Affine a = affine_of(mean, inverse_std, scale, shift, columns, groups, item, i % columns);
    out[i] = S(leaky_relu(F(fma(F(features[i]) - a.center, a.factor, a.offset)), negative_slope));
  }
}

// For each block and column, the sums of g and g (x - center), where g is the gradient before the leaky ReLU.
extern "C" __global__ void grad_blocks(const S* features, const S* grad_out, int64_t columns, const int64_t* row_splits,
                                       int num_items, const S* scale, const S* shift, const double* mean,
                                       const double* inverse_std, int64_t groups, F negative_slope,
                                       const int64_t* first_blocks, int64_t max_blocks, double* shifts,
                                       double* scales) {
  for (int64_t i = first_thread(); i < max_blocks * columns; i += num_threads()) {
    const int64_t k = i / columns, c = i % columns;
    if (k >= first_blocks[num_items]) continue;
    const Block block(row_splits, first_blocks, num_items, k);
    const Affine a = affine_of(mean, inverse_std, scale, shift, columns, groups, block.item, c);
    double sum = 0, product = 0;
    for (int64_t r = block.begin; r < block.end; ++r) {
      const F d = F(features[r * columns + c]) - a.center;
      const double g =
          double(leaky_relu_grad(F(fma(d, a.factor, a.offset)), F(grad_out[r * columns + c]), negative_slope));
      sum += g;
      product += g * double(d);
    }
    shifts[i] = sum;
    scales[i] = product;
  }
}

// Joins the blocks of each item: shift_grads and scale_grads (items, columns).
extern "C" __global__ void join_grads(int64_t columns, int64_t num_items, const int64_t* first_blocks,
                                      const double* mean, const double* inverse_std, int64_t groups,
                                      const double* shifts, const double* scales, double* shift_grads,
                                      double* scale_grads) {
  for (int64_t i = first_thread(); i < num_items * columns; i += num_threads()) {
    const int64_t b = i / columns, c = i % columns, g = b * groups + c * groups / columns;
    double shift = 0, scale = 0;
    for (int64_t k = first_blocks[b]; k < first_blocks[b + 1]; ++k) {
      shift += shifts[k * columns + c];
      scale += scales[k * columns + c];
    }
    shift_grads[i] = shift;
    scale_grads[i] = inverse_std[g] * (scale - (mean[g] - double(F(mean[g]))) * shift);
  }
}

// Statistics that depend on the features: grad_x = g factor + (x - center) x_slope + constant for each item and group.
extern "C" __global__ void statistics_grads(int64_t columns, int64_t groups, const int64_t* row_splits,
                                            int64_t num_items, const S* scale, const double* mean,
                                            const double* inverse_std, const double* shift_grads,
                                            const double* scale_grads, F* x_slope, F* constant) {
  const int64_t width = columns / groups;
  for (int64_t i = first_thread(); i < num_items * groups; i += num_threads()) {
    const int64_t b = i / groups, begin = i % groups * width;
    const double values = double(row_splits[b + 1] - row_splits[b]) * double(width);
    double mean_grad = 0, mean_product = 0;
    for (int64_t c = begin; values > 0 && c < begin + width; ++c) {
      mean_grad += double(F(scale[c])) * shift_grads[b * columns + c] / values;
      mean_product += double(F(scale[c])) * scale_grads[b * columns + c] / values;
    }
    const double slope = -inverse_std[i] * inverse_std[i] * mean_product;
    x_slope[i] = F(slope);
    constant[i] = F(-inverse_std[i] * mean_grad - slope * (mean[i] - double(F(mean[i]))));
  }
}

extern "C" __global__ void normalize_grad(const S* features, const S* grad_out, int64_t rows, int64_t columns,
                                          const int64_t* row_splits, int num_items, const S* scale, const S* shift,
                                          const double* mean, const double* inverse_std, int64_t groups,
                                          F negative_slope, const F* x_slope, const F* constant, S* grad_features) {
  for (int64_t i = first_thread(); i < rows * columns; i += num_threads()) {
    const int64_t c = i % columns;
    const int item = item_of(row_splits, num_items, i / columns);
    const Affine a = affine_of(mean, inverse_std, scale, shift, columns, groups, item, c);
    const int64_t g = item * groups + c * groups / columns;
    const F d = F(features[i]) - a.center;
    const F before = leaky_relu_grad(F(fma(d, a.factor, a.offset)), F(grad_out[i]), negative_slope);
    grad_features[i] = S(F(fma(before, a.factor, F(fma(d, x_slope[g], constant[g])))));
  }
}

// sums[c] = the sum of item_grads[b, c] over the items b
extern "C" __global__ void sum_items(const double* item_grads, int64_t num_items, int64_t columns, S* sums) {
  for (int64_t c = first_thread(); c < columns; c += num_threads()) {
    double sum = 0;
    for (int64_t b = 0; b < num_items; ++b) sum += item_grads[b * columns + c];
    sums[c] = S(F(sum));
  }
}

// ---- cross entropy: a warp for each row

// The loss and the weight of every row, both 0 if its label is ignored. Sets invalid_label to 1 if a label is not a
// class. class_weights may be null.
extern "C" __global__ void cross_entropies(const S* logits, int64_t rows, int64_t classes, const int64_t* labels,
                                           const S* class_weights, int64_t ignore_index, int has_ignore_index,
                                           double* losses, double* weights, unsigned* invalid_label) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t label = labels[r];
    double loss = 0, weight = 0;
    if (!(has_ignore_index && label == ignore_index)) {
      if (label < 0 || label >= classes) {
        if (lane_number() == 0) atomicOr(invalid_label, 1u);
      } else {
        const Exponentials row(logits + r * classes, classes);
        weight = class_weights ? double(F(class_weights[label])) : 1;
        loss = weight * (log(double(row.sum)) + (double(row.largest) - double(F(logits[r * classes + label]))));
      }
    }
    if (lane_number() == 0) {
      losses[r] = loss;
      weights[r] = weight;
    }
  }
}

// Backward of the cross entropy: weight * (softmax - one-hot) * gradient. If `each` row has a loss, the gradient is
// that of the row's loss; otherwise that of the one loss, divided by the sum of the weights for a mean.
extern "C" __global__ void cross_entropies_grad(const S* logits, int64_t rows, int64_t classes, const int64_t* labels,
                                                const double* weights, int64_t ignore_index, int has_ignore_index,
                                                const S* grad_out, int each, const double* total, int is_mean,
                                                S* grad_logits) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const int64_t label = labels[r];
    const bool counts = !(has_ignore_index && label == ignore_index) && label >= 0 && label < classes;
    double share = double(F(grad_out[each ? r : 0]));
    if (is_mean) share = *total != 0 ? share / *total : 0;
    const F factor = F(share * weights[r]);
    const Exponentials row(logits + r * classes, classes);
    for (int64_t c = lane_number(); c < classes; c += warp) {
      const F y = exp(F(logits[r * classes + c]) - row.largest) / row.sum * factor;
      grad_logits[r * classes + c] = S(counts ? y - (c == label ? factor : F(0)) : F(0));
    }
  }
}
