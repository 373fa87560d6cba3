// Finds the pairs of a query's neighbors with the kernel points that act on them: see pairs.h.

#include "pairs.h"

#include <math.h>

#include "parallel.h"
#include "simd.h"

namespace kp {
namespace KP_ISA {
namespace {

// The pairs of one query. DIM is 3, or 0 for any dimension; a copy for 2 would take a third longer to compile.
template <class G, int DIM>
class Finder {
 public:
  Finder(const Geometry<G>& geometry, const PairArrays<G>& to, const FeatureRows& rows)
      : geometry_(geometry), to_(to), rows_(rows) {}

  void find(int64_t q, int64_t begin, int64_t n, int64_t first, int64_t num_pairs) {
    const int32_t* const index = geometry_.index + begin;
    const G* const center = geometry_.queries + q * D();
    for (int64_t i = 0; to_.edge && i < n; ++i) near_.edge[i] = int32_t(begin + i - first);
    for (int64_t i = 0; i < n; ++i) {
      near_.who[i] = index[i];
      const G* const x = geometry_.points + int64_t(index[i]) * D();
      for (int a = 0; a < D(); ++a) near_.relative[a][i] = x[a] - center[a];
    }
    if (!geometry_.offsets && !geometry_.deformed) prefetch(n);
    const G* kernel_points = geometry_.kernel_points;
    if (geometry_.offsets) {
      deform(q);
      kernel_points = to_.own_kernel_points;
      n = keep_in_reach(n);
    }
    for (int64_t i = n; i < (n + lanes<G> - 1) / lanes<G> * lanes<G>; ++i)
      for (int a = 0; a < D(); ++a) near_.relative[a][i] = 0;
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
    int32_t who[chunk + lanes<int32_t>], edge[chunk + lanes<int32_t>];
  };

  KP_INLINE int D() const { return DIM ? DIM : geometry_.dimension; }

  void prefetch(int64_t n) const {
    const int64_t bytes = smaller<int64_t>(rows_.bytes, 512);
    for (int64_t i = 0; i < n; ++i) {
      const char* const row = rows_.data + int64_t(near_.who[i]) * rows_.bytes;
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    }
  }

  // The query's own kernel points, by axis.
  void deform(int64_t q) {
    const int64_t K = geometry_.num_kernels;
    const G* const offsets = geometry_.offsets + q * K * D();
    for (int k = 0; k < K; ++k)
      for (int a = 0; a < D(); ++a)
        to_.own_kernel_points[a * K + k] = geometry_.kernel_points[a * K + k] + offsets[k * D() + a];
  }

  Vec<G> squared(int64_t i, const Vec<G>* kernel_point) const {
    Vec<G> d[stored];
    for (int a = 0; a < D(); ++a) d[a] = load(&near_.relative[a][i]) - kernel_point[a];
    return squared_distance(d, D());
  }
  void kernel_point_at(const G* kernel_points, int k, Vec<G>* p) const {
    for (int a = 0; a < D(); ++a) p[a] = broadcast(kernel_points[int64_t(a) * geometry_.num_kernels + k]);
  }

  int64_t keep(int64_t i, int64_t kept, unsigned mask) {
    for (int a = 0; a < D(); ++a) compress(&near_.relative[a][kept], mask, load(&near_.relative[a][i]));
    if (to_.edge) compress<G>(near_.edge + kept, mask, near_.edge + i);
    return kept + compress<G>(near_.who + kept, mask, near_.who + i);
  }

  // Leaves the neighbors closer than the extent to some kernel point of the query: first those near the box of all of
  // them (in the wide neighborhoods of deformable layers a fifth), by which the linear influence needs no more.
  int64_t keep_in_reach(int64_t n) {
    const int64_t K = geometry_.num_kernels;
    const G* const own = to_.own_kernel_points;
    Vec<G> low[stored], high[stored];
    for (int a = 0; a < D(); ++a) {
      G lowest = own[a * K], highest = lowest;
      for (int k = 1; k < K; ++k) {
        lowest = smaller(lowest, own[a * K + k]);
        highest = larger(highest, own[a * K + k]);
      }
      low[a] = broadcast(lowest);
      high[a] = broadcast(highest);
    }
    const Vec<G> extent = broadcast(geometry_.extent), limit = broadcast(geometry_.extent * geometry_.extent);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += lanes<G>) {
      unsigned mask = first_lanes<G>(n - i);
      for (int a = 0; a < D(); ++a) {
        const Vec<G> x = load(&near_.relative[a][i]);
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
        kernel_point_at(own, k, p);
        best = min(squared(i, p), best);
      }
      kept = keep(i, kept, mask_lt(best, limit) & first_lanes<G>(n - i));
    }
    return kept;
  }

  // Pairs in the order of the kernel points, each with vectors of neighbors.
  template <bool places>
  void find_by_kernel(const G* kernel_points, int64_t n, int64_t pairs) {
    const int K = geometry_.num_kernels;
    const bool linear = geometry_.influence == Influence::linear;
    const bool closest = geometry_.aggregation == Aggregation::closest;
    Vec<G> p[stored];
    if (closest)
      for (int64_t i = 0; i < n; i += lanes<G>) {
        kernel_point_at(kernel_points, 0, p);
        Vec<G> best = squared(i, p), which = {};
        for (int k = 1; k < K; ++k) {
          kernel_point_at(kernel_points, k, p);
          const Vec<G> squares = squared(i, p);
          which = squares < best ? broadcast(G(k)) : which;
          best = min(squares, best);
        }
        store(&near_.nearest[i], which);
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
        if (closest) mask &= mask_eq(load(&near_.nearest[i]), broadcast(G(k)));
        compress(all_d2 + pairs, mask, squares);
        if (places) {
          compress<G>(all_edges + pairs, mask, near_.edge + i);
          for (int a = 0; a < D(); ++a) compress(to_.from[a] + pairs, mask, load(&near_.relative[a][i]) - p[a]);
        }
        pairs += compress<G>(all_points + pairs, mask, near_.who + i);
      }
      to_.ends[k] = pairs;
    }
  }

  // Where every neighbor brings its own kernel points: vectors of those, then the pairs sorted by kernel point.
  void find_by_neighbor(int64_t n, int64_t pairs) {
    const int K = geometry_.num_kernels;
    const int64_t padded = (K + lanes<G> - 1) / lanes<G> * lanes<G>;
    const bool linear = geometry_.influence == Influence::linear;
    const bool closest = geometry_.aggregation == Aggregation::closest;
    const G limit = geometry_.extent * geometry_.extent;
    int64_t* const ends = to_.ends;
    G *const row_d2 = to_.row_d2, *const found_d2 = to_.found_d2;
    int32_t *const found_kernel = to_.found_kernel, *const found_point = to_.found_point;
    for (int k = 0; k <= K; ++k) ends[k] = 0;
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const G* const own = geometry_.deformed + near_.who[i] * (D() * padded);
      if (i + 4 < n)
        for (int64_t b = 0; b < D() * padded; b += 64 / int64_t(sizeof(G)))
          __builtin_prefetch(geometry_.deformed + near_.who[i + 4] * (D() * padded) + b);
      unsigned reached = 0;
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        Vec<G> d[stored];
        for (int a = 0; a < D(); ++a) d[a] = broadcast(-near_.relative[a][i]) - load(own + a * padded + b);
        const Vec<G> squares = squared_distance(d, D());
        store(row_d2 + b, squares);
        reached |= mask_lt(squares, broadcast(limit));  // what pads a row is NaN
      }
      if (!reached) continue;
      G best = row_d2[0];
      for (int k = 1; closest && k < K; ++k) best = smaller(best, row_d2[k]);
      const char* const row = rows_.data + int64_t(near_.who[i]) * rows_.bytes;
      for (int64_t b = 0; b < smaller<int64_t>(rows_.bytes, 512); b += 64) __builtin_prefetch(row + b);
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        const Vec<G> squares = load(row_d2 + b);
        unsigned mask = first_lanes<G>(K - b);
        if (linear) mask &= mask_lt(squares, broadcast(limit));
        if (closest) {
          mask &= mask_eq(squares, broadcast(best));
          mask &= 0u - mask;  // the first of equals
        }
        compress(found_d2 + found, mask, squares);
        for (int l = 0; l < lanes<G>; l += lanes<int32_t>) store(found_point + found + l, broadcast(near_.who[i]));
        found += compress<G>(found_kernel + found, mask, to_.numbers + b);
        if (closest && mask) break;
      }
    }
    for (int64_t j = 0; j < found; ++j) ++ends[found_kernel[j] + 1];
    ends[0] = pairs;
    for (int k = 0; k < K; ++k) ends[k + 1] += ends[k];
    for (int64_t j = 0; j < found; ++j) {
      const int64_t at = ends[found_kernel[j]]++;  // the end of the list before becomes its own
      to_.d2[at] = found_d2[j];
      to_.point[at] = found_point[j];
    }
  }

  const Geometry<G>& geometry_;
  const PairArrays<G>& to_;
  const FeatureRows& rows_;
  Neighborhood near_;
};

template <class G>
void find(const Geometry<G>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n, int64_t first,
          int64_t num_pairs, const PairArrays<G>& to) {
  if (geometry.dimension == 3)
    Finder<G, 3>(geometry, to, rows).find(q, begin, n, first, num_pairs);
  else
    Finder<G, 0>(geometry, to, rows).find(q, begin, n, first, num_pairs);
}

}  // namespace

void find_pairs(const Geometry<float>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n,
                int64_t first, int64_t num_pairs, const PairArrays<float>& to) {
  find(geometry, rows, q, begin, n, first, num_pairs, to);
}

void find_pairs(const Geometry<double>& geometry, const FeatureRows& rows, int64_t q, int64_t begin, int64_t n,
                int64_t first, int64_t num_pairs, const PairArrays<double>& to) {
  find(geometry, rows, q, begin, n, first, num_pairs, to);
}

}  // namespace KP_ISA
}  // namespace kp
