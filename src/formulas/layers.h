// Formulas of layers for one value: activations with their gradients, random words of dropout, and optimizer steps. V
// is a scalar or a vector.
#pragma once

#include <math.h>

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {
namespace {

using ::sqrt;

template <class V>
KP_HD V leaky_relu(V x, V slope) {
  return x > 0 ? x : x * slope;
}
template <class V>
KP_HD V leaky_relu_grad(V x, V grad, V slope) {
  return x > 0 ? grad : grad * slope;
}

// A leaky ReLU of slope 0 would turn minus infinity into NaN. NaN for NaN.
template <class V>
KP_HD V relu(V x) {
  return x <= 0 ? V{} : x;
}
template <class V>
KP_HD V relu_grad(V x, V grad) {
  return x <= 0 ? V{} : grad;
}

// min(max(x, 0), 6), NaN for NaN.
template <class V>
KP_HD V relu6(V x) {
  return x <= 0 ? V{} : x >= 6 ? V{} + 6 : x;
}
template <class V>
KP_HD V relu6_grad(V x, V grad) {
  return x <= 0 ? V{} : x >= 6 ? V{} : grad;
}

// 1 / (1 + exp(-x)), computed from e = exp(-|x|), which never overflows.
template <class V>
KP_HD V sigmoid(V x, V e) {
  const V inverse = 1 / (1 + e);
  return x < 0 ? e * inverse : inverse;
}
// The derivative s (1 - s), which is the same for x and -x.
template <class V>
KP_HD V sigmoid_grad(V e) {
  const V inverse = 1 / (1 + e);
  return e * inverse * inverse;
}

// A step of stochastic gradient descent with momentum.
template <class V>
KP_HD void sgd_step(V& value, V grad, V& moment, V lr, V momentum, V weight_decay) {
  moment = momentum * moment + (grad + weight_decay * value);
  value -= lr * moment;
}

// A step of Adam with decoupled weight decay (Loshchilov and Hutter 2019). first, second: decay rates (beta 1, beta 2).
// keep = 1 - lr * weight_decay; rate and inverse_root include the bias corrections.
template <class V>
KP_HD void adamw_step(V& value, V grad, V& mean, V& square, V keep, V first, V second, V rate, V inverse_root, V eps) {
  mean += (1 - first) * (grad - mean);
  square = second * square + (1 - second) * grad * grad;
  value = keep * value - rate * mean / (sqrt(square) * inverse_root + eps);
}

// Philox4x32-10 (Salmon et al. 2011): turns a counter of four 32-bit words into four random words. Words are in the
// lower halves of 64-bit values; the upper halves become garbage. multiply(a, b): 64-bit product of the lower halves.
template <class V, class Multiply>
KP_HD void philox(V* word, uint64_t key, Multiply multiply) {
  uint32_t key_0 = uint32_t(key), key_1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const V product_0 = multiply(word[0], 0xD2511F53u), product_1 = multiply(word[2], 0xCD9E8D57u);
    word[0] = (product_1 >> 32) ^ word[1] ^ key_0;
    word[1] = product_1;
    word[2] = (product_0 >> 32) ^ word[3] ^ key_1;
    word[3] = product_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

// Value i uses word (i / 16) % 4 of counter i / 64 * 16 + i % 16, so sixteen counters serve a block of 64 values. This
// order suits every vector width, and adjacent GPU threads write adjacent values.
constexpr int64_t counters_of_block = 16;
constexpr int64_t words_of_block = 4 * counters_of_block;

}  // namespace
}  // namespace kp
