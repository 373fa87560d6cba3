// What searches and subsampling both do first: find the bounding box, and that every coordinate is finite.
#pragma once

#include <math.h>

#include <type_traits>

#include "kernels.h"
#include "formulas/neighbors.h"
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

// The box of n points, grown from what low and high hold. False: some coordinate is NaN or infinite. D = 0: the
// dimension is known at run time.
template <class T, int D>
bool grow_box(const T* points, int64_t n, int dimension, double* low, double* high) {
  constexpr int stored = D ? D : max_dimension;
  const int dims = D ? D : dimension;
  Vec<T> least[stored], most[stored], bad = {};  // `dims` vectors hold a vector of points: a lane's axis stays the same
  for (int v = 0; v < dims; ++v) least[v] = broadcast(T(INFINITY)), most[v] = broadcast(-T(INFINITY));
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>)
    for (int v = 0; v < dims; ++v) {
      const Vec<T> x = load(points + i * dims + v * lanes<T>);
      least[v] = min(least[v], x);
      most[v] = max(most[v], x);
      bad += x - x;  // 0, or NaN where x is infinite or NaN
    }
  const auto take = [&](int axis, T lo, T hi) {
    low[axis] = smaller(low[axis], double(lo));
    high[axis] = larger(high[axis], double(hi));
  };
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += bad[l];
  for (int v = 0; v < dims; ++v)
    for (int l = 0; l < lanes<T>; ++l) take((v * lanes<T> + l) % dims, least[v][l], most[v][l]);
  for (; i < n; ++i)
    for (int a = 0; a < dims; ++a) {
      const T x = points[i * dims + a];
      take(a, x, x);
      sum += x - x;
    }
  return sum == 0;
}

// False: some coordinate is NaN or infinite. Of no points the box is (inf, -inf).
template <class T, int D>
bool bounding_box(const T* points, int64_t n, int threads, double* low, double* high, int dimension = D) {
  for (int a = 0; a < dimension; ++a) low[a] = INFINITY, high[a] = -INFINITY;
  threads = useful_threads(threads, n, 1 << 16);
  if (threads == 1) return grow_box<T, D>(points, n, dimension, low, high);
  bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    double its_low[max_dimension], its_high[max_dimension];
    for (int a = 0; a < dimension; ++a) its_low[a] = INFINITY, its_high[a] = -INFINITY;
    finite = grow_box<T, D>(points + share.begin * dimension, share.end - share.begin, dimension, its_low, its_high);
#pragma omp critical(kp_bounding_box)
    for (int a = 0; a < dimension; ++a) {
      low[a] = smaller(low[a], its_low[a]);
      high[a] = larger(high[a], its_high[a]);
    }
  }
  return finite;
}

// is_measurable() of a box, in the dtype of the points.
template <class T>
bool is_measurable(Metric metric, const double* low, const double* high, int dimension, bool is_bounded) {
  T d[max_dimension];
  for (int a = 0; a < dimension; ++a) d[a] = T(high[a]) - T(low[a]);
  if (metric == Metric::l2) return is_measurable<Metric::l2>(d, dimension, is_bounded);
  if (metric == Metric::l1) return is_measurable<Metric::l1>(d, dimension, is_bounded);
  return is_measurable<Metric::linf>(d, dimension, is_bounded);
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
