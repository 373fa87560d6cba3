// Finds the pairs (neighbor, kernel point) of a query in which the kernel point has an influence: see pairs.h.
//
// Rigid kernels: for each kernel point, a vector of neighbors at a time, so pairs come out ordered by kernel point.
//
//                neighbors 0..7    mask d2 < extent²     compressed into the arrays
//      k = 0     d2 d2 d2 ... d2   0 1 0 0 1 1 0 0       1 4 5
//      k = 1     d2 d2 d2 ... d2   1 0 0 0 0 0 1 0       1 4 5 | 0 6          ends = 3, 5, ...
//
// Transposed pass of deformed kernels: every neighbor has its own kernel points, so for each neighbor a vector of
// kernel points at a time, then a counting sort by kernel point.

#include "pairs.h"

#include <math.h>

#include "parallel.h"
#include "simd.h"

namespace kp {
namespace KP_ISA {
namespace {

// DIM is 3, or 0 for any dimension; one more instance for 2 would take a third longer to compile.
template <class G, int DIM>
class PairFinder {
 public:
  PairFinder(const PassGeometry<G>& geometry, const PairArrays<G>& to, const FeatureRows& rows)
      : geometry_(geometry), to_(to), rows_(rows) {}

  void find(int64_t q, int64_t begin, int64_t n, int64_t first, int64_t num_pairs) {
    const int32_t* const index = geometry_.index + begin;
    const G* const center = geometry_.queries + q * D();
    for (int64_t i = 0; to_.edge && i < n; ++i) neighborhood_.edge[i] = int32_t(begin + i - first);
    for (int64_t i = 0; i < n; ++i) {
      neighborhood_.point[i] = index[i];
      const G* const x = geometry_.points + int64_t(index[i]) * D();
      for (int a = 0; a < D(); ++a) neighborhood_.relative[a][i] = x[a] - center[a];
    }
    if (!geometry_.offsets && !geometry_.deformed) prefetch(n);
    const G* kernel_points = geometry_.kernel_points;
    if (geometry_.offsets) {
      deform(q);
      kernel_points = to_.query_kernel_points;
      n = keep_in_reach(n);
    }
    for (int64_t i = n; i < (n + lanes<G> - 1) / lanes<G> * lanes<G>; ++i)
      for (int a = 0; a < D(); ++a) neighborhood_.relative[a][i] = 0;
    if (geometry_.deformed)
      find_by_neighbor(n, num_pairs);
    else if (to_.edge)
      find_by_kernel<true>(kernel_points, n, num_pairs);
    else
      find_by_kernel<false>(kernel_points, n, num_pairs);
  }

 private:
  static constexpr int stored = DIM ? DIM : max_dimension;
  struct alignas(64) Neighborhood {
    G relative[stored][chunk + lanes<G>], nearest[chunk];
    int32_t point[chunk + lanes<int32_t>], edge[chunk + lanes<int32_t>];
  };

  KP_INLINE int D() const { return DIM ? DIM : geometry_.dimension; }

  void prefetch(int64_t n) const {
    const int64_t bytes = smaller<int64_t>(rows_.bytes, 512);
    for (int64_t i = 0; i < n; ++i) {
      const char* const row = rows_.data + int64_t(neighborhood_.point[i]) * rows_.bytes;
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
      __builtin_prefetch(row + bytes - 1);  // rows need not begin where a cache line does
    }
  }

  // Adds the query's offsets to the kernel points.
  void deform(int64_t q) {
    const int64_t K = geometry_.num_kernels;
    const G* const offsets = geometry_.offsets + q * K * D();
    for (int k = 0; k < K; ++k)
      for (int a = 0; a < D(); ++a)
        to_.query_kernel_points[a * K + k] = geometry_.kernel_points[a * K + k] + offsets[k * D() + a];
  }

  Vec<G> squared(int64_t i, const Vec<G>* kernel_point) const {
    Vec<G> d[stored];
    for (int a = 0; a < D(); ++a) d[a] = load(&neighborhood_.relative[a][i]) - kernel_point[a];
    return squared_distance(d, D());
  }
  void kernel_point_at(const G* kernel_points, int k, Vec<G>* p) const {
    for (int a = 0; a < D(); ++a) p[a] = broadcast(kernel_points[int64_t(a) * geometry_.num_kernels + k]);
  }

  // Moves the neighbors i, ..., i + lanes - 1 in `mask` to position `kept`; returns the position after them.
  int64_t keep(int64_t i, int64_t kept, unsigned mask) {
    for (int a = 0; a < D(); ++a) compress(&neighborhood_.relative[a][kept], mask, load(&neighborhood_.relative[a][i]));
    if (to_.edge) compress<G>(neighborhood_.edge + kept, mask, neighborhood_.edge + i);
    return kept + compress<G>(neighborhood_.point + kept, mask, neighborhood_.point + i);
  }

  // Drops the neighbors that are farther than the extent from all kernel points of a deformed kernel; returns how many
  // are left. The bounding box of the kernel points decides first: in the wide neighborhoods of deformable layers it
  // leaves a fifth. For the linear influence that is enough, as find_by_kernel() tests every pair anyway.
  int64_t keep_in_reach(int64_t n) {
    const int64_t K = geometry_.num_kernels;
    const G* const kernel_points = to_.query_kernel_points;
    Vec<G> low[stored], high[stored];
    for (int a = 0; a < D(); ++a) {
      G lowest = kernel_points[a * K], highest = lowest;
      for (int k = 1; k < K; ++k) {
        lowest = smaller(lowest, kernel_points[a * K + k]);
        highest = larger(highest, kernel_points[a * K + k]);
      }
      low[a] = broadcast(lowest);
      high[a] = broadcast(highest);
    }
    const Vec<G> extent = broadcast(geometry_.extent), limit = broadcast(geometry_.extent * geometry_.extent);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += lanes<G>) {
      unsigned mask = first_lanes<G>(n - i);
      for (int a = 0; a < D(); ++a) {
        const Vec<G> x = load(&neighborhood_.relative[a][i]);
        mask &= mask_lt(max(x - high[a], low[a] - x), extent);
      }
      kept = keep(i, kept, mask);
    }
    prefetch(kept);
    if (geometry_.influence == Influence::linear) return kept;
    n = kept;
    kept = 0;
    for (int64_t i = 0; i < n; i += lanes<G>) {
      Vec<G> best = broadcast(G(INFINITY)), p[stored];
      for (int k = 0; k < K; ++k) {
        kernel_point_at(kernel_points, k, p);
        best = min(squared(i, p), best);
      }
      kept = keep(i, kept, mask_lt(best, limit) & first_lanes<G>(n - i));
    }
    return kept;
  }

  // For each kernel point in turn, a vector of neighbors at a time.
  template <bool with_positions>
  void find_by_kernel(const G* kernel_points, int64_t n, int64_t pairs) {
    const int K = geometry_.num_kernels;
    const bool linear = geometry_.influence == Influence::linear;
    const bool closest = geometry_.aggregation == Aggregation::closest;
    Vec<G> p[stored];
    if (closest)
      for (int64_t i = 0; i < n; i += lanes<G>) {
        kernel_point_at(kernel_points, 0, p);
        Vec<G> best = squared(i, p), nearest = {};
        for (int k = 1; k < K; ++k) {
          kernel_point_at(kernel_points, k, p);
          const Vec<G> squares = squared(i, p);
          nearest = squares < best ? broadcast(G(k)) : nearest;
          best = min(squares, best);
        }
        store(&neighborhood_.nearest[i], nearest);
      }
    const Vec<G> limit = broadcast(geometry_.extent * geometry_.extent);
    unsigned valid[chunk / lanes<G>];
    for (int64_t i = 0; i < n; i += lanes<G>) valid[i / lanes<G>] = first_lanes<G>(n - i);
    G* const all_d2 = to_.d2;
    int32_t *const all_points = to_.point, *const all_edges = to_.edge;
    for (int k = 0; k < K; ++k) {
      kernel_point_at(kernel_points, k, p);
      for (int64_t i = 0; i < n; i += lanes<G>) {
        const Vec<G> squares = squared(i, p);
        unsigned mask = valid[i / lanes<G>];
        if (linear) mask &= mask_lt(squares, limit);
        if (closest) mask &= mask_eq(load(&neighborhood_.nearest[i]), broadcast(G(k)));
        compress(all_d2 + pairs, mask, squares);
        if (with_positions) {
          compress<G>(all_edges + pairs, mask, neighborhood_.edge + i);
          for (int a = 0; a < D(); ++a)
            compress(to_.difference[a] + pairs, mask, load(&neighborhood_.relative[a][i]) - p[a]);
        }
        pairs += compress<G>(all_points + pairs, mask, neighborhood_.point + i);
      }
      to_.ends[k] = pairs;
    }
  }

  // For each neighbor in turn, a vector of its kernel points at a time; then sorts the pairs by kernel point.
  void find_by_neighbor(int64_t n, int64_t pairs) {
    const int K = geometry_.num_kernels;
    const int64_t padded = (K + lanes<G> - 1) / lanes<G> * lanes<G>;
    const bool linear = geometry_.influence == Influence::linear;
    const bool closest = geometry_.aggregation == Aggregation::closest;
    const G limit = geometry_.extent * geometry_.extent;
    int64_t* const ends = to_.ends;
    G *const kernel_d2 = to_.kernel_d2, *const unsorted_d2 = to_.unsorted_d2;
    int32_t *const unsorted_kernel = to_.unsorted_kernel, *const unsorted_point = to_.unsorted_point;
    for (int k = 0; k <= K; ++k) ends[k] = 0;
    int64_t num_unsorted = 0;
    for (int64_t i = 0; i < n; ++i) {
      const G* const kernel_points = geometry_.deformed + neighborhood_.point[i] * (D() * padded);
      if (i + 4 < n)
        for (int64_t b = 0; b < D() * padded; b += 64 / int64_t(sizeof(G)))
          __builtin_prefetch(geometry_.deformed + neighborhood_.point[i + 4] * (D() * padded) + b);
      unsigned reached = 0;
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        Vec<G> d[stored];
        for (int a = 0; a < D(); ++a)
          d[a] = broadcast(-neighborhood_.relative[a][i]) - load(kernel_points + a * padded + b);
        const Vec<G> squares = squared_distance(d, D());
        store(kernel_d2 + b, squares);
        reached |= mask_lt(squares, broadcast(limit));  // false for the padding, which is NaN
      }
      if (!reached) continue;
      G best = kernel_d2[0];
      for (int k = 1; closest && k < K; ++k) best = smaller(best, kernel_d2[k]);
      const char* const row = rows_.data + int64_t(neighborhood_.point[i]) * rows_.bytes;
      for (int64_t b = 0; b < smaller<int64_t>(rows_.bytes, 512); b += 64) __builtin_prefetch(row + b);
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        const Vec<G> squares = load(kernel_d2 + b);
        unsigned mask = first_lanes<G>(K - b);
        if (linear) mask &= mask_lt(squares, broadcast(limit));
        if (closest) {
          mask &= mask_eq(squares, broadcast(best));
          mask &= 0u - mask;  // of equally near kernel points the first
        }
        compress(unsorted_d2 + num_unsorted, mask, squares);
        for (int l = 0; l < lanes<G>; l += lanes<int32_t>)
          store(unsorted_point + num_unsorted + l, broadcast(neighborhood_.point[i]));
        num_unsorted += compress<G>(unsorted_kernel + num_unsorted, mask, to_.kernel_numbers + b);
        if (closest && mask) break;
      }
    }
    for (int64_t j = 0; j < num_unsorted; ++j) ++ends[unsorted_kernel[j] + 1];
    ends[0] = pairs;
    for (int k = 0; k < K; ++k) ends[k + 1] += ends[k];
    for (int64_t j = 0; j < num_unsorted; ++j) {
      const int64_t at = ends[unsorted_kernel[j]]++;  // ends[k] starts as the end of list k - 1 and becomes that of k
      to_.d2[at] = unsorted_d2[j];
      to_.point[at] = unsorted_point[j];
    }
  }

  const PassGeometry<G>& geometry_;
  const PairArrays<G>& to_;
  const FeatureRows& rows_;
  Neighborhood neighborhood_;
};

template <class G>
void find(const PassGeometry<G>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n, int64_t first,
          int64_t num_pairs, const PairArrays<G>& to) {
  if (geometry.dimension == 3)
    PairFinder<G, 3>(geometry, to, rows).find(q, begin, n, first, num_pairs);
  else
    PairFinder<G, 0>(geometry, to, rows).find(q, begin, n, first, num_pairs);
}

}  // namespace

void find_pairs(const PassGeometry<float>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n,
                int64_t first, int64_t num_pairs, const PairArrays<float>& to) {
  find(geometry, rows, q, begin, n, first, num_pairs, to);
}

void find_pairs(const PassGeometry<double>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n,
                int64_t first, int64_t num_pairs, const PairArrays<double>& to) {
  find(geometry, rows, q, begin, n, first, num_pairs, to);
}

}  // namespace KP_ISA
}  // namespace kp
