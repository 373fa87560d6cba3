// Measures the peak rate of fused multiply-adds of one core, with which benchmarks compare.
#include "gemm.h"

#include "kernels.h"

namespace kp {
namespace KP_ISA {
namespace {

// The best of twenty runs of the micro-kernel of 5 ms each, on operands that stay in the first-level cache.
template <class F>
double measure() {
  constexpr int length = 64, rows = rows_for(panel_vectors);
  Buffer<F> a, b, o;
  if (!a.resize(rows * length) || !b.resize(length * panel_width<F>) || !o.resize(rows * panel_width<F>)) return 0;
  for (int64_t i = 0; i < a.size(); ++i) a[i] = F(1);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = F(1);
  double best = 0;
  for (int run = 0; run < 20; ++run) {
    const double start = seconds();
    int64_t blocks = 0;
    double elapsed;
    do {
      for (int i = 0; i < 1000; ++i, ++blocks)
        multiply_block<F, rows, panel_vectors, true>(
            length, a.data(), length, 1, [&](int64_t c) { return &b[c * panel_width<F>]; },
            [&](int64_t r) { return &o[r * panel_width<F>]; });
      elapsed = seconds() - start;
    } while (elapsed < 5e-3);
    best = larger(best, 2.0 * rows * length * panel_width<F> * double(blocks) / elapsed);
  }
  return best;
}

}  // namespace

double fma_rate(DType dtype) {
  return with_real(dtype, [](auto t) { return measure<decltype(t)>(); });
}

}  // namespace KP_ISA
}  // namespace kp
