// What both indexes share: points in the order of an index, the candidates of a group of queries, and a row being made.
#pragma once

#include <math.h>

#include "kernels.h"
#include "neighbors.h"
#include "parallel.h"
#include "simd.h"
#include "sort.h"

namespace kp {
namespace {

constexpr int max_dimension = 16;

// Coordinates an axis at a time, and whose they are. DIM is the dimension, or 0 where it is known only at run time.
template <class T, int DIM>
struct Sorted {
  static constexpr int stored = DIM ? DIM : max_dimension;
  Buffer<T> x[stored];
  Buffer<int32_t> ids;
  int64_t size = 0;

  bool resize(int64_t n, int dimension) {
    size = n;
    bool enough = ids.resize(n);
    for (int a = 0; a < dimension; ++a) enough = enough && x[a].resize(n);
    return enough;
  }
};

struct Run {
  int64_t begin, end;
};

// Which of the points near a group of queries are the neighbours of one of them.
template <class T, int DIM>
class Candidates {
 public:
  static constexpr int stored = DIM ? DIM : max_dimension;

  Candidates(int dimension, Metric metric, Ignore ignore) : dimension_(dimension), metric_(metric), ignore_(ignore) {}

  // Copies runs of points side by side, by index if asked. False: no memory.
  bool gather(const Sorted<T, DIM>& points, const Run* runs, int64_t num_runs, bool by_index) {
    const int D = dimension();
    int64_t n = 0;
    for (int64_t i = 0; i < num_runs; ++i) n += runs[i].end - runs[i].begin;
    count_ = n;
    for (int a = 0; a < D; ++a)
      if (!x_[a].resize(n + lanes<T>)) return false;
    if (!ids_.resize(n + lanes<T>)) return false;
    int64_t to = 0;
    for (int64_t i = 0; i < num_runs; ++i) {
      const int64_t begin = runs[i].begin, size = runs[i].end - begin;
      for (int a = 0; a < D; ++a) copy_over(&x_[a][to], &points.x[a][begin], size);
      copy_over(&ids_[to], &points.ids[begin], size);
      to += size;
    }
    if (by_index && !sort_by_index()) return false;
    for (int l = 0; l < lanes<T>; ++l) x_[0][n + l] = T(NAN);  // no distance to it is within anything
    return true;
  }

  int64_t size() const { return count_; }

  int64_t count_within(const T* q, int32_t id, T limit) const {
    int64_t n = 0;
    with_metric([&](auto metric) {
      for (int64_t i = 0; i < count_; i += lanes<T>) n += popcount(within(metric, q, id, limit, i, nullptr));
    });
    return n;
  }

  // Neighbours of q, in candidate order; ids and measures have room for the candidates and a vector more.
  template <bool with_measures>
  int64_t collect(const T* q, int32_t id, T limit, int32_t* ids, T* measures) const {
    int64_t n = 0;
    with_metric([&](auto metric) {
      for (int64_t i = 0; i < count_; i += lanes<T>) {
        Vec<T> measure;
        const unsigned mask = within(metric, q, id, limit, i, &measure);
        if constexpr (with_measures) compress(measures + n, mask, measure);
        n += compress<T>(ids + n, mask, &ids_[i]);
      }
    });
    return n;
  }

 private:
  KP_INLINE int dimension() const { return DIM ? DIM : dimension_; }

  template <class Call>
  KP_INLINE void with_metric(Call call) const {
    if (metric_ == Metric::l2) return call(std::integral_constant<Metric, Metric::l2>());
    if (metric_ == Metric::l1) return call(std::integral_constant<Metric, Metric::l1>());
    return call(std::integral_constant<Metric, Metric::linf>());
  }

  template <class M>
  KP_INLINE unsigned within(M metric, const T* q, int32_t id, T limit, int64_t i, Vec<T>* out) const {
    Vec<T> d[stored];
    for (int a = 0; a < dimension(); ++a) d[a] = load(&x_[a][i]) - broadcast(q[a]);
    const Vec<T> measured = measure<metric>(d, dimension());
    if (out) *out = measured;
    unsigned mask = mask_le(measured, broadcast(limit));
    if (ignore_ != Ignore::none && mask) mask &= ~ignored(q, id, i);
    return mask;
  }

  // The lanes of the query itself: the point of its index, or all points of its very coordinates.
  unsigned ignored(const T* q, int32_t id, int64_t i) const {
    unsigned mask = first_lanes<T>(lanes<T>);
    if (ignore_ == Ignore::equal) {
      for (int a = 0; a < dimension(); ++a) mask &= mask_eq(load(&x_[a][i]), broadcast(q[a]));
      return mask;
    }
    for (int l = 0; l < lanes<T>; ++l)
      if (ids_[i + l] != id) mask &= ~(1u << l);
    return mask;
  }

  // Whole vectors, the last one past the end: into room that the next run overwrites.
  template <class U>
  static void copy_over(U* to, const U* from, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes<U>) store(to + i, load(from + i));
  }

  // Sorted once per group, on (index, position); a dozen queries then find their rows sorted.
  bool sort_by_index() {
    const int64_t n = count_;
    if (!n) return true;
    Vec<int32_t> lows = broadcast(ids_[0]), highs = lows;
    int64_t i = 0;
    for (; i + lanes<int32_t> <= n; i += lanes<int32_t>) {
      lows = min(lows, load(&ids_[i]));
      highs = max(highs, load(&ids_[i]));
    }
    int32_t low = lows[0], high = highs[0];
    for (int l = 1; l < lanes<int32_t>; ++l) {
      low = smaller(low, lows[l]);
      high = larger(high, highs[l]);
    }
    for (; i < n; ++i) {
      low = smaller(low, ids_[i]);
      high = larger(high, ids_[i]);
    }
    const int position_bits = bits_for(uint64_t(n));
    return position_bits + bits_for(uint64_t(high - low)) < 32 ? permute(narrow_, low, position_bits)
                                                               : permute(wide_, low, position_bits);
  }
  template <class K>
  bool permute(Sorter<K>& sorter, int32_t low, int position_bits) {
    const int64_t n = count_;
    const int D = dimension();
    K* const keys = sorter.keys(n);
    for (int a = 0; a < D; ++a)
      if (!sorted_x_[a].resize(n + lanes<T>)) return false;
    if (!keys) return false;
    for (int64_t i = 0; i < n; ++i) keys[i] = K(ids_[i] - low) << position_bits | K(i);
    const K* const sorted = sorter.sort(n);
    const K mask = (K(1) << position_bits) - 1;
    int32_t* const ids = ids_.data();
    const T* from[stored];
    T* to[stored];
    for (int a = 0; a < D; ++a) from[a] = x_[a].data(), to[a] = sorted_x_[a].data();
    for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(sorted[i] >> position_bits) + low;
    for (int64_t i = 0; i < n; ++i)
      for (int a = 0; a < D; ++a) to[a][i] = from[a][sorted[i] & mask];
    for (int a = 0; a < D; ++a) x_[a].swap(sorted_x_[a]);
    return true;
  }

  const int dimension_;
  const Metric metric_;
  const Ignore ignore_;
  Buffer<T> x_[stored], sorted_x_[stored];
  Buffer<int32_t> ids_;
  Sorter<uint32_t> narrow_;
  Sorter<uint64_t> wide_;
  int64_t count_ = 0;
};

// A row being made: what the query collected, and its sorts. Neither order has equals, since points differ.
template <class T>
struct RowScratch {
  Buffer<int32_t> ids;
  Buffer<T> measures;

  bool reserve(int64_t n) {
    const int64_t room = n + 2 * lanes<T>;
    if (!ids.resize(room) || !measures.resize(room)) return false;
    if constexpr (packs)
      return sorter_.keys(n);
    else
      return near_.resize(n) && spare_.resize(n);
  }
  void sort_by_distance(int64_t n) {
    sort<0>(n, [](const Near& a, const Near& b) {
      return a.measure < b.measure || (a.measure == b.measure && a.id < b.id);
    });
  }
  void sort_by_index(int64_t n) {
    sort<32>(n, [](const Near& a, const Near& b) { return a.id < b.id; });
  }

 private:
  // A float32 that is not negative orders like its bits, so with the index it makes one key of 64.
  static constexpr bool packs = sizeof(T) == 4;
  struct Near {
    T measure;
    int32_t id;
  };

  template <int id_shift, class Less>
  void sort(int64_t n, Less less) {
    if (n < 2) return;
    if constexpr (packs) {
      uint64_t* const keys = sorter_.keys(n);
      for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, &measures[i], sizeof bits);
        keys[i] = uint64_t(bits) << (32 - id_shift) | uint64_t(uint32_t(ids[i])) << id_shift;
      }
      const uint64_t* const sorted = sorter_.sort(n);
      for (int64_t i = 0; i < n; ++i) {
        const auto bits = uint32_t(sorted[i] >> (32 - id_shift));
        memcpy(&measures[i], &bits, sizeof bits);
        ids[i] = int32_t(sorted[i] >> id_shift);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) near_[i] = {measures[i], ids[i]};
      const Near* const sorted = merge_sort(near_.data(), spare_.data(), n, int64_t(1), less);
      for (int64_t i = 0; i < n; ++i) {
        ids[i] = sorted[i].id;
        measures[i] = sorted[i].measure;
      }
    }
  }

  Sorter<uint64_t> sorter_;
  Buffer<Near> near_, spare_;
};

// Whole vectors, the last one drawn back to end with the row: a call to memcpy costs as much as the search.
inline void copy_row(int32_t* to, const int32_t* from, int64_t n) {
  constexpr int64_t width = lanes<int32_t>;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  if (i == n) return;
  if (n >= width)
    store(to + n - width, load(from + n - width));
  else
    for (; i < n; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace kp
