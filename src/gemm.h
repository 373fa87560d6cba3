// Small dense products at the rate of the fused multiply-adds: a micro-kernel that keeps an MR x NV block of sums in
// registers, and the packing it reads its right-hand side from.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace kp {
namespace {

constexpr int panel_vectors = KP_VECTOR_BYTES == 64 ? 4 : 2;
template <class F>
constexpr int panel_width = panel_vectors * lanes<F>;

// Rows of sums held at once: 32 registers hold 6 x 4 sums, 16 hold 6 x 2; narrow panels need more rows to hide the
// latency of the additions. Tiles have a multiple of `row_step` rows.
constexpr int rows_for(int vectors) {
  return vectors <= panel_vectors / 2 ? 12 : 6;
}
constexpr int row_step = 12;

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// sums[i, v] = sum over s < segments, c < length of a[i * a_row + (s * length + c) * a_step] * b[s][c * b_step + v];
// they replace o or are added to it.
template <class F, int MR, int NV>
inline void multiply_block(int64_t segments, int64_t length, const F* a, int64_t a_row, int64_t a_step,
                           const F* const* b, int64_t b_step, F* o, int64_t o_row, bool replace) {
  Vec<F> sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = Vec<F>{};
  for (int64_t s = 0; s < segments; ++s) {
    const F* row = b[s];
    for (int64_t c = 0; c < length; ++c, a += a_step, row += b_step) {
      Vec<F> right[NV];
      for (int v = 0; v < NV; ++v) right[v] = load(row + v * lanes<F>);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const Vec<F> left = broadcast(a[i * a_row]);
        for (int v = 0; v < NV; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
      }
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      F* const to = o + i * o_row + v * lanes<F>;
      store(to, replace ? sums[i][v] : load(to) + sums[i][v]);
    }
}

// Calls f(vectors) with the number of vectors as a constant.
template <class Call>
KP_INLINE void with_vectors(int vectors, Call call) {
  if (vectors == 1) return call(std::integral_constant<int, 1>());
  if (vectors == 2) return call(std::integral_constant<int, 2>());
  if constexpr (panel_vectors > 2) {
    if (vectors == 3) return call(std::integral_constant<int, 3>());
    return call(std::integral_constant<int, 4>());
  }
}

// A (rows, columns) matrix cut into panels of panel_width columns, each panel's rows one after another; the last panel
// is as many vectors wide as it needs, filled with zeros.
template <class F>
struct Panels {
  Buffer<F> data;
  int64_t rows = 0, columns = 0;

  int64_t count() const { return (columns + panel_width<F> - 1) / panel_width<F>; }
  int vectors(int64_t p) const {
    return int((smaller<int64_t>(panel_width<F>, columns - p * panel_width<F>) + lanes<F> - 1) / lanes<F>);
  }
  int64_t padded_columns() const { return round_up(columns, lanes<F>); }
  const F* row(int64_t p, int64_t r) const {
    return data.data() + p * panel_width<F> * rows + r * vectors(p) * lanes<F>;
  }

  // Packs K matrices (Cin, Cout) stacked as rows, or their transposes. False: no memory.
  bool pack(const F* weights, int64_t kernels, int64_t c_in, int64_t c_out, bool transposed, int threads) {
    const int64_t height = transposed ? c_out : c_in;
    rows = kernels * height;
    columns = transposed ? c_in : c_out;
    if (!data.resize(padded_columns() * rows)) return false;
    const int64_t jobs = count() * kernels;
    threads = useful_threads(threads, rows * columns, 1 << 16);
#pragma omp parallel for num_threads(threads)
    for (int64_t job = 0; job < jobs; ++job) {
      const int64_t p = job / kernels, k = job % kernels, width = vectors(p) * lanes<F>;
      const F* const from = weights + k * c_in * c_out;
      for (int64_t r = 0; r < height; ++r) {
        F* const to = const_cast<F*>(row(p, k * height + r));
        for (int64_t v = 0; v < width; ++v) {
          const int64_t c = p * panel_width<F> + v;
          to[v] = c < columns ? (transposed ? from[c * c_out + r] : from[r * c_out + c]) : F(0);
        }
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace kp
