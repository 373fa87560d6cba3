// What searches and subsampling both do first: find the bounding box, and that every coordinate is finite.
#pragma once

#include <math.h>

#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kp {
namespace {

// Whether no value is NaN or infinite. It reads memory once: below 2 MB a second thread costs more than it saves.
template <class T>
bool all_finite(const T* values, int64_t n, int threads) {
  threads = useful_threads(threads, n, (1 << 21) / int64_t(sizeof(T)));
  bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    Vec<T> sums = {};  // 0, or NaN where x is infinite or NaN
    int64_t i = share.begin;
    for (; i + lanes<T> <= share.end; i += lanes<T>) sums += load(values + i) - load(values + i);
    T bad = 0;
    for (int l = 0; l < lanes<T>; ++l) bad += sums[l];
    for (; i < share.end; ++i) bad += values[i] - values[i];
    finite = bad == 0;
  }
  return finite;
}

// False: some coordinate is NaN or infinite. Of no points the box is (inf, -inf).
template <class T, int D>
bool bounding_box(const T* points, int64_t n, int threads, double* low, double* high) {
  threads = useful_threads(threads, n, 1 << 15);
  for (int a = 0; a < D; ++a) low[a] = INFINITY, high[a] = -INFINITY;
  bool finite = true;
#pragma omp parallel num_threads(threads)
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    T lo[D], hi[D], bad = 0;
    for (int a = 0; a < D; ++a) lo[a] = T(INFINITY), hi[a] = -T(INFINITY);
    for (int64_t i = share.begin; i < share.end; ++i)
      for (int a = 0; a < D; ++a) {
        const T x = points[i * D + a];
        lo[a] = smaller(lo[a], x);
        hi[a] = larger(hi[a], x);
        bad += x - x;  // 0, or NaN where x is infinite or NaN
      }
#pragma omp critical(kp_bounding_box)
    {
      for (int a = 0; a < D; ++a) {
        low[a] = smaller(low[a], double(lo[a]));
        high[a] = larger(high[a], double(hi[a]));
      }
      finite &= bad == 0;
    }
  }
  return finite;
}

// Calls f(T(), integral_constant<int, D>()).
template <class F>
auto with_geometry(DType dtype, int64_t dimension, F f) {
  using two = std::integral_constant<int, 2>;
  using three = std::integral_constant<int, 3>;
  return with_real(dtype, [&](auto t) { return dimension == 2 ? f(t, two()) : f(t, three()); });
}

}  // namespace
}  // namespace kp
