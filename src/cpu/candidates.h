// The part of a search that grid and kd-tree share: a group of nearby queries copies its candidate points side by side
// once, then every query of the group tests all of them, a vector of candidates at a time.
//
//   index:       runs of points near the group     ..[######]....[####].........[########]..
//   gather():    copied, one array per axis          ###### #### ########        (then sorted by index if asked)
//   collect():   for each query: distances to all    0 1 1 0 0 1 0 0 1 ...       mask of those within the radius
//                packed into the query's row         ids[] and measures[]
#pragma once

#include <math.h>

#include "kernels.h"
#include "formulas/neighbors.h"
#include "parallel.h"
#include "simd.h"
#include "sort.h"

namespace kp {
namespace {

// Points in the order of an index: one array of coordinates per axis, and the original index of each point. DIM is the
// dimension, or 0 if it is known only at run time.
template <class T, int DIM>
struct SortedPoints {
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

// Finds the batch item of each row; rows must be asked for in ascending order. Queries may be several sets, one after
// another, each with all batch items.
class ItemCursor {
 public:
  ItemCursor(const Array& row_splits, int64_t items)
      : splits_(as<int64_t>(row_splits)), last_(row_splits.rows - 1), items_(items) {}

  int64_t item_of(int64_t row) {
    while (next_ < last_ && row >= splits_[next_]) {
      ++next_;
      item_ = item_ + 1 == items_ ? 0 : item_ + 1;
    }
    return item_;
  }

 private:
  const int64_t* const splits_;
  const int64_t last_, items_;
  int64_t next_ = 1, item_ = 0;
};

// The points near a group of queries, and the test which of them are neighbors of one query.
template <class T, int DIM>
class Candidates {
 public:
  static constexpr int stored = DIM ? DIM : max_dimension;

  Candidates(int dimension, Metric metric, Ignore ignore) : dimension_(dimension), metric_(metric), ignore_(ignore) {}

  // Copies runs of points side by side, sorted by index if `by_index`. Returns false if memory runs out.
  KP_OUTLINE bool gather(const SortedPoints<T, DIM>& points, const Run* runs, int64_t num_runs, bool by_index) {
    const int D = dimension();
    int64_t n = 0;
    for (int64_t i = 0; i < num_runs; ++i) n += runs[i].end - runs[i].begin;
    count_ = n;
    for (int a = 0; a < D; ++a)
      if (!x_[a].resize(n + lanes<T>)) return false;
    if (!ids_.resize(n + lanes<T>)) return false;
    T* to[stored];
    const T* from[stored];
    for (int a = 0; a < D; ++a) to[a] = x_[a].data(), from[a] = points.x[a].data();
    int32_t* to_ids = ids_.data();
    const int32_t* const from_ids = points.ids.data();
    for (int64_t i = 0; i < num_runs; ++i) {
      const int64_t begin = runs[i].begin, size = runs[i].end - begin;
      for (int64_t j = 0; j < size; j += lanes<T>) {  // whole vectors: the next run overwrites the excess of the last
        for (int a = 0; a < D; ++a) store(to[a] + j, load(from[a] + begin + j));
      }
      for (int64_t j = 0; j < size; j += lanes<int32_t>) store(to_ids + j, load(from_ids + begin + j));
      for (int a = 0; a < D; ++a) to[a] += size;
      to_ids += size;
    }
    if (by_index && !sort_by_index()) return false;
    for (int l = 0; l < lanes<T>; ++l)
      x_[0][n + l] = T(NAN);  // the last vector is padded with points beyond any radius
    return true;
  }

  int64_t size() const { return count_; }

  KP_OUTLINE int64_t count_within(const T* q, int32_t id, T limit) const {
    return with_test([&](auto test) { return test_all<false, false>(test, q, id, limit, nullptr, nullptr); });
  }

  // Writes the neighbors of q in the order of the candidates and returns their number. ids and measures need room for
  // all candidates and one more vector.
  template <bool with_measures>
  KP_OUTLINE int64_t collect(const T* q, int32_t id, T limit, int32_t* ids, T* measures) const {
    return with_test([&](auto test) { return test_all<true, with_measures>(test, q, id, limit, ids, measures); });
  }

  // The measure of the candidate nearest to q, infinity without candidates.
  KP_OUTLINE T smallest_measure(const T* q, int32_t id) const {
    return with_test([&](auto test) { return smallest_of(test, q, id); });
  }

 private:
  KP_INLINE int dimension() const { return DIM ? DIM : dimension_; }

  // Metric and Ignore as template arguments: a branch on them inside the test's loop costs 4 % of a search.
  template <Metric metric, bool ignoring>
  struct Test {};
  template <bool ignoring, class Call>
  KP_INLINE auto with_metric(Call call) const {
    if (metric_ == Metric::l2) return call(Test<Metric::l2, ignoring>());
    if (metric_ == Metric::l1) return call(Test<Metric::l1, ignoring>());
    return call(Test<Metric::linf, ignoring>());
  }
  template <class Call>
  KP_INLINE auto with_test(Call call) const {
    return ignore_ == Ignore::none ? with_metric<false>(call) : with_metric<true>(call);
  }

  template <bool with_ids, bool with_measures, Metric metric, bool ignoring>
  KP_INLINE int64_t test_all(Test<metric, ignoring>, const T* q, int32_t id, T limit, int32_t* ids, T* measures) const {
    Vec<T> query[stored];
    for (int a = 0; a < dimension(); ++a) query[a] = broadcast(q[a]);
    const Vec<T> limits = broadcast(limit);
    int64_t n = 0;
    for (int64_t i = 0; i < count_; i += lanes<T>) {
      Vec<T> d[stored];
      for (int a = 0; a < dimension(); ++a) d[a] = load(&x_[a][i]) - query[a];
      const Vec<T> measured = measure<metric>(d, dimension());
      unsigned mask = mask_le(measured, limits);
      if (ignoring && mask) mask &= ~ignored(q, id, i);
      if constexpr (with_measures) compress(measures + n, mask, measured);
      if constexpr (with_ids)
        n += compress<T>(ids + n, mask, &ids_[i]);
      else
        n += popcount(mask);
    }
    return n;
  }

  template <Metric metric, bool ignoring>
  KP_INLINE T smallest_of(Test<metric, ignoring>, const T* q, int32_t id) const {
    Vec<T> query[stored];
    for (int a = 0; a < dimension(); ++a) query[a] = broadcast(q[a]);
    Vec<T> smallest = broadcast(T(INFINITY));
    for (int64_t i = 0; i < count_; i += lanes<T>) {
      Vec<T> d[stored];
      for (int a = 0; a < dimension(); ++a) d[a] = load(&x_[a][i]) - query[a];
      Vec<T> measured = measure<metric>(d, dimension());
      if (ignoring) {
        const unsigned mask = ignored(q, id, i);
        for (int l = 0; mask && l < lanes<T>; ++l)
          if (mask >> l & 1) measured[l] = T(INFINITY);
      }
      smallest = min(measured, smallest);  // min() returns its second argument for the NaN padding
    }
    for (int l = lanes<T> / 2; l; l /= 2)
      for (int i = 0; i < l; ++i) smallest[i] = smaller(smallest[i], smallest[i + l]);
    return smallest[0];
  }

  // The lanes of candidates that never count as neighbors of the query: see Ignore.
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

  // Sorts the candidates by index, once for the group: the rows of its dozen queries then come out sorted. The sort key
  // is (index - lowest index, position), in 32 bits if it fits.
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
  KP_OUTLINE bool permute(Sorter<K>& sorter, int32_t low, int position_bits) {
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

// One query's row while it is built: the neighbors collected so far, and the ways to sort them. Ties in distance are
// broken by index, so the order is unique.
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
      return unsorted_.resize(n) && spare_.resize(n);
  }
  KP_OUTLINE void sort_by_distance(int64_t n) { write_row<0>(sorted<0>(n, nearer), n); }
  KP_OUTLINE void sort_by_index(int64_t n) {
    write_row<32>(sorted<32>(n, [](const Neighbor& a, const Neighbor& b) { return a.id < b.id; }), n);
  }
  // Overwrites the first of n > 0 neighbors with the nearest of them.
  KP_OUTLINE void put_nearest_first(int64_t n) {
    Neighbor first = {measures[0], ids[0]};
    for (int64_t i = 1; i < n; ++i) {
      const Neighbor one = {measures[i], ids[i]};
      if (nearer(one, first)) first = one;
    }
    measures[0] = first.measure;
    ids[0] = first.id;
  }
  // Keeps the `kept` nearest of n neighbors, in their present order.
  KP_OUTLINE void keep_nearest(int64_t n, int64_t kept) {
    if (!kept) return;
    const Neighbor last = unpack<0>(sorted<0>(n, nearer)[kept - 1]);
    for (int64_t i = 0, to = 0; to < kept; ++i) {
      const Neighbor one = {measures[i], ids[i]};
      measures[to] = one.measure;
      ids[to] = one.id;
      to += !nearer(last, one);
    }
  }

 private:
  struct Neighbor {
    T measure;
    int32_t id;
  };
  static bool nearer(const Neighbor& a, const Neighbor& b) {
    return (a.measure < b.measure) | ((a.measure == b.measure) & (a.id < b.id));  // a branch would be unpredictable
  }

  // Non-negative float32 values order like their bits, so a measure and an index pack into one 64-bit sort key. The
  // index is in the low half (id_shift 0: by distance, then index) or in the high half (id_shift 32: by index).
  static constexpr bool packs = sizeof(T) == 4;
  using Key = std::conditional_t<packs, uint64_t, Neighbor>;

  template <int id_shift>
  static Neighbor unpack(const Key& key) {
    if constexpr (packs) {
      const auto bits = uint32_t(key >> (32 - id_shift));
      Neighbor one = {0, int32_t(key >> id_shift)};
      memcpy(&one.measure, &bits, sizeof bits);
      return one;
    } else {
      return key;
    }
  }
  // The keys of the row in sorted order; the row itself is unchanged.
  template <int id_shift, class Less>
  const Key* sorted(int64_t n, Less less) {
    if constexpr (packs) {
      uint64_t* const keys = sorter_.keys(n);
      for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, &measures[i], sizeof bits);
        keys[i] = uint64_t(bits) << (32 - id_shift) | uint64_t(uint32_t(ids[i])) << id_shift;
      }
      return sorter_.sort(n);
    } else {
      for (int64_t i = 0; i < n; ++i) unsorted_[i] = {measures[i], ids[i]};
      return merge_sort(unsorted_.data(), spare_.data(), n, int64_t(1), less);
    }
  }
  template <int id_shift>
  void write_row(const Key* keys, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const Neighbor one = unpack<id_shift>(keys[i]);
      measures[i] = one.measure;
      ids[i] = one.id;
    }
  }

  Sorter<uint64_t> sorter_;
  Buffer<Neighbor> unsorted_, spare_;
};

// Copies n indices in whole vectors, of which the last overlaps the one before it so as to end with the row. A call to
// memcpy would cost as much as the search.
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
