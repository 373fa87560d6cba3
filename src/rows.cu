// Layers on rows of features on the GPU. Products are cuBLAS's; all else is bound by memory and goes over it once.
//
// Compiled for the type of the features, KP_F. Sums over rows are float64, in blocks of rows whose number depends on the
// sizes alone, joined in their order.

#include "launch.h"
#include "rows.h"

namespace kp {
namespace {

using F = KP_F;
constexpr int64_t block_of_rows = 1024;

enum Activation : int { leaky, rectified, logistic };

__device__ F exp_minus_abs(F x) {
  return exp(x < 0 ? x : -x);
}

// The largest of a row and the sum of exp(x - largest), by a warp.
struct Exponentials {
  F largest, sum;
  __device__ Exponentials(const F* row, int64_t columns) : largest(row[0]), sum(0) {
    for (int64_t c = lane_number(); c < columns; c += warp) largest = row[c] > largest ? row[c] : largest;
    for (int bit = warp / 2; bit; bit /= 2) {
      const F other = __shfl_xor_sync(all_lanes, largest, bit);
      largest = other > largest ? other : largest;
    }
    for (int64_t c = lane_number(); c < columns; c += warp) sum += exp(row[c] - largest);
    for (int bit = warp / 2; bit; bit /= 2) sum += __shfl_xor_sync(all_lanes, sum, bit);
  }
};

}  // namespace
}  // namespace kp

using namespace kp;

extern "C" __global__ void activate(const F* x, int64_t n, int activation, F slope, F* out) {
  for (int64_t i = first_thread(); i < n; i += num_threads())
    out[i] = activation == leaky       ? leaky_relu(x[i], slope)
             : activation == rectified ? relu(x[i])
                                       : sigmoid(x[i], exp_minus_abs(x[i]));
}

extern "C" __global__ void activate_grad(const F* x, const F* grad, int64_t n, int activation, F slope, F* out) {
  for (int64_t i = first_thread(); i < n; i += num_threads())
    out[i] = activation == leaky       ? leaky_relu_grad(x[i], grad[i], slope)
             : activation == rectified ? relu_grad(x[i], grad[i])
                                       : grad[i] * sigmoid_grad(exp_minus_abs(x[i]));
}

// A thread makes the four words of a counter, and so four values 16 places apart. `least` of the words keep theirs.
extern "C" __global__ void dropout(const F* x, int64_t n, uint64_t seed, uint32_t least, F scale, F* out) {
  const int64_t counters = (n + words_of_block - 1) / words_of_block * counters_of_block;
  for (int64_t i = first_thread(); i < counters; i += num_threads()) {
    uint64_t word[4] = {uint64_t(i), uint64_t(i) >> 32, 0, 0};
    philox(word, seed, [](uint64_t a, uint32_t b) { return uint64_t(uint32_t(a)) * b; });
    for (int w = 0; w < 4; ++w) {
      const int64_t at = i / counters_of_block * words_of_block + w * counters_of_block + i % counters_of_block;
      if (at < n) out[at] = uint32_t(word[w]) >= least ? x[at] * scale : F(0);
    }
  }
}

extern "C" __global__ void softmax(const F* x, int64_t rows, int64_t columns, F* out) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const Exponentials found(x + r * columns, columns);
    for (int64_t c = lane_number(); c < columns; c += warp)
      out[r * columns + c] = exp(x[r * columns + c] - found.largest) / found.sum;
  }
}

// With y the softmax: y (g - sum of g y).
extern "C" __global__ void softmax_grad(const F* x, const F* grad, int64_t rows, int64_t columns, F* out) {
  for (int64_t r = first_warp(); r < rows; r += num_warps()) {
    const Exponentials found(x + r * columns, columns);
    const auto y = [&](int64_t c) { return exp(x[r * columns + c] - found.largest) / found.sum; };
    F mean = F(0);
    for (int64_t c = lane_number(); c < columns; c += warp) mean += y(c) * grad[r * columns + c];
    for (int bit = warp / 2; bit; bit /= 2) mean += __shfl_xor_sync(all_lanes, mean, bit);
    for (int64_t c = lane_number(); c < columns; c += warp)
      out[r * columns + c] = y(c) * (grad[r * columns + c] - mean);
  }
}

// partial[b] = the sums of the columns of block b
extern "C" __global__ void sum_blocks(const F* rows, int64_t num_rows, int64_t columns, double* partial) {
  const int64_t blocks = (num_rows + block_of_rows - 1) / block_of_rows;
  for (int64_t i = first_thread(); i < blocks * columns; i += num_threads()) {
    const int64_t first = i / columns * block_of_rows, c = i % columns;
    const int64_t end = first + block_of_rows < num_rows ? first + block_of_rows : num_rows;
    double sum = 0;
    for (int64_t r = first; r < end; ++r) sum += double(rows[r * columns + c]);
    partial[i] = sum;
  }
}

extern "C" __global__ void join_sums(const double* partial, int64_t blocks, int64_t columns, F* sums) {
  for (int64_t c = first_thread(); c < columns; c += num_threads()) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * columns + c];
    sums[c] = F(sum);
  }
}
