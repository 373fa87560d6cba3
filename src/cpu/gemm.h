// Small dense matrix products at the peak rate of fused multiply-adds: a micro-kernel that keeps an MR x NV block of
// sums in registers, and the packed layout of its right-hand side (Panels).
//
//                      panel: NV vectors wide
//                     [ right(0)    ]
//                     [ right(1)    ]     one row is loaded per step c
//                     [ ...         ]
//    a (MR x length)  [ sums, in    ]     sums[i][v] += a[i][c] * right(c)[v]
//                     [ registers   ]
#pragma once

#include "parallel.h"
#include "simd.h"

namespace kp {
namespace {

constexpr int panel_vectors = KP_VECTOR_BYTES == 64 ? 4 : 2;
template <class F>
constexpr int panel_width = panel_vectors * lanes<F>;

// MR for a panel of so many vectors: 32 registers hold 6 x 4 sums, 16 hold 6 x 2. Panels of half that width need 12
// rows, because fewer sums do not hide the latency of the multiply-adds. Tiles have a multiple of `row_step` rows.
constexpr int rows_for(int vectors) {
  return vectors <= panel_vectors / 2 ? 12 : 6;
}
constexpr int row_step = 12;

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The micro-kernel. For i < MR, the NV vectors at to(i) = (or += unless `replace`) the sum over c < length of
// a[i * a_row + c * a_step] times the NV vectors at right(c).
template <class F, int MR, int NV, bool replace, class Right, class To>
KP_INLINE void multiply_block(int64_t length, const F* a, int64_t a_row, int64_t a_step, Right right, To to) {
  Vec<F> sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = Vec<F>{};
  for (int64_t c = 0; c < length; ++c, a += a_step) {
    const F* const row = right(c);
    Vec<F> factors[NV];
    for (int v = 0; v < NV; ++v) factors[v] = load(row + v * lanes<F>);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const Vec<F> left = broadcast(a[i * a_row]);
      for (int v = 0; v < NV; ++v) sums[i][v] = fma(left, factors[v], sums[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    F* const o = to(i);
    for (int v = 0; v < NV; ++v) store(o + v * lanes<F>, replace ? sums[i][v] : load(o + v * lanes<F>) + sums[i][v]);
  }
}

// Calls call(vectors) with the number of vectors as a compile-time constant.
template <class Call>
KP_INLINE void with_vectors(int vectors, Call call) {
  if (vectors == 1) return call(std::integral_constant<int, 1>());
  if (vectors == 2) return call(std::integral_constant<int, 2>());
  if constexpr (panel_vectors > 2) {
    if (vectors == 3) return call(std::integral_constant<int, 3>());
    return call(std::integral_constant<int, 4>());
  }
}

// A packed matrix (rows, columns) for each group of channels. It is divided into panels of panel_width columns, and
// each panel is stored row after row. The last panel is only as many vectors wide as it needs, padded with zeros.
template <class F>
struct Panels {
  Buffer<F> data;
  int64_t rows = 0, columns = 0, groups = 1, height = 0;  // height: rows of one kernel

  int64_t count() const { return (columns + panel_width<F> - 1) / panel_width<F>; }
  int vectors(int64_t p) const {
    return int((smaller<int64_t>(panel_width<F>, columns - p * panel_width<F>) + lanes<F> - 1) / lanes<F>);
  }
  int64_t padded_columns() const { return round_up(columns, lanes<F>); }
  const F* row(int64_t group, int64_t p, int64_t r) const {
    return data.data() + group * padded_columns() * rows + p * panel_width<F> * rows + r * vectors(p) * lanes<F>;
  }

  // Packs weights (K, Cin / groups, Cout): for each group, the K matrices (Cin / groups, Cout / groups), or their
  // transposes, stacked as rows. Returns false if memory runs out.
  bool pack(const F* weights, int64_t kernels, int64_t c_in, int64_t c_out, int64_t num_groups, bool transposed,
            int threads) {
    const int64_t inputs = c_in / num_groups, outputs = c_out / num_groups;
    height = transposed ? outputs : inputs;
    rows = kernels * height;
    columns = transposed ? inputs : outputs;
    groups = num_groups;
    if (!data.resize(groups * padded_columns() * rows)) return false;
    const int64_t jobs = groups * count() * kernels;
    threads = useful_threads(threads, groups * rows * columns, 1 << 16);
#pragma omp parallel for num_threads(threads)
    for (int64_t job = 0; job < jobs; ++job) {
      const int64_t group = job / (count() * kernels), p = job / kernels % count(), k = job % kernels;
      const int64_t width = vectors(p) * lanes<F>;
      const F* const from = weights + k * inputs * c_out + group * outputs;
      for (int64_t r = 0; r < height; ++r) {
        F* const to = const_cast<F*>(row(group, p, k * height + r));
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
