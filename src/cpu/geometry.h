// Bounding boxes and finiteness checks, the first step of searches and of subsampling.
#pragma once

#include <math.h>

#include <type_traits>

#include "kernels.h"
#include "formulas/neighbors.h"
#include "parallel.h"
#include "simd.h"

namespace kp {
namespace {

// Whether all values are finite. Bound by memory: below 2 MB a second thread costs more than it saves.
template <class T>
bool all_finite(const T* values, int64_t n, int threads) {
  threads = useful_threads(threads, n, (1 << 21) / int64_t(sizeof(T)));
  bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    Vec<T> sums = {};  // x - x is 0, or NaN where x is infinite or NaN
    int64_t i = share.begin;
    for (; i + lanes<T> <= share.end; i += lanes<T>) sums += load(values + i) - load(values + i);
    T bad = 0;
    for (int l = 0; l < lanes<T>; ++l) bad += sums[l];
    for (; i < share.end; ++i) bad += values[i] - values[i];
    finite = bad == 0;
  }
  return finite;
}

// Extends the box (low, high) by n points. Returns false if a coordinate is NaN or infinite. D = 0: the dimension is
// known only at run time.
template <class T, int D>
bool grow_box(const T* points, int64_t n, int dimension, double* low, double* high) {
  constexpr int stored = D ? D : max_dimension;
  const int dims = D ? D : dimension;
  // `dims` vectors hold lanes<T> points, so a lane of a vector belongs to the same axis in every iteration.
  Vec<T> lowest[stored], highest[stored], bad = {};
  for (int v = 0; v < dims; ++v) lowest[v] = broadcast(T(INFINITY)), highest[v] = broadcast(-T(INFINITY));
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>)
    for (int v = 0; v < dims; ++v) {
      const Vec<T> x = load(points + i * dims + v * lanes<T>);
      lowest[v] = min(lowest[v], x);
      highest[v] = max(highest[v], x);
      bad += x - x;
    }
  const auto extend = [&](int axis, T lo, T hi) {
    low[axis] = smaller(low[axis], double(lo));
    high[axis] = larger(high[axis], double(hi));
  };
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += bad[l];
  for (int v = 0; v < dims; ++v)
    for (int l = 0; l < lanes<T>; ++l) extend((v * lanes<T> + l) % dims, lowest[v][l], highest[v][l]);
  for (; i < n; ++i)
    for (int a = 0; a < dims; ++a) {
      const T x = points[i * dims + a];
      extend(a, x, x);
      sum += x - x;
    }
  return sum == 0;
}

// The bounding box of n points, (inf, -inf) without points. Returns false if a coordinate is NaN or infinite.
template <class T, int D>
bool bounding_box(const T* points, int64_t n, int threads, double* low, double* high, int dimension = D) {
  for (int a = 0; a < dimension; ++a) low[a] = INFINITY, high[a] = -INFINITY;
  threads = useful_threads(threads, n, 1 << 16);
  if (threads == 1) return grow_box<T, D>(points, n, dimension, low, high);
  bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    double share_low[max_dimension], share_high[max_dimension];
    for (int a = 0; a < dimension; ++a) share_low[a] = INFINITY, share_high[a] = -INFINITY;
    finite =
        grow_box<T, D>(points + share.begin * dimension, share.end - share.begin, dimension, share_low, share_high);
#pragma omp critical(kp_bounding_box)
    for (int a = 0; a < dimension; ++a) {
      low[a] = smaller(low[a], share_low[a]);
      high[a] = larger(high[a], share_high[a]);
    }
  }
  return finite;
}

// Whether distances within a box can tell points apart, in the dtype of the points: see formulas/neighbors.h.
template <class T>
bool is_measurable(Metric metric, const double* low, const double* high, int dimension, bool is_bounded) {
  T d[max_dimension];
  for (int a = 0; a < dimension; ++a) d[a] = T(high[a]) - T(low[a]);
  if (metric == Metric::l2) return is_measurable<Metric::l2>(d, dimension, is_bounded);
  if (metric == Metric::l1) return is_measurable<Metric::l1>(d, dimension, is_bounded);
  return is_measurable<Metric::linf>(d, dimension, is_bounded);
}

// Calls f(T(), integral_constant<int, D>()) for D = 2 or 3.
template <class F>
auto with_geometry(DType dtype, int64_t dimension, F f) {
  using two = std::integral_constant<int, 2>;
  using three = std::integral_constant<int, 3>;
  return with_real(dtype, [&](auto t) { return dimension == 2 ? f(t, two()) : f(t, three()); });
}

}  // namespace
}  // namespace kp
