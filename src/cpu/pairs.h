// Finds the pairs (neighbor, kernel point) of a query in which the kernel point has an influence on the neighbor. The
// linear influence is zero beyond the extent, so there are few: about 1.6 per neighbor.
//
// Pairs depend on the dtype of the geometry and on the dimension, not on the features, and are compiled once for each
// (pairs.cpp). As part of the loops over features they were compiled 16 times, up to 27 KB of code each.
#pragma once

#include "kernels.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

constexpr int64_t chunk = 128;  // neighbors processed together

}  // namespace

// Positions and neighbor lists of one pass of the operator. In the forward pass, queries gather the features of
// neighboring points. The gradient of the features is a pass over the transposed list, in which points and queries
// change roles: `queries` are then the operator's points.
template <class G>
struct PassGeometry {
  const G *points, *queries;
  int dimension;
  const int32_t* index;
  const int64_t* row_splits;
  int64_t num_queries;
  const G* kernel_points;  // (D, K); negated in the transposed pass
  int num_kernels;
  G extent;
  Influence influence;
  Aggregation aggregation;
  // Deformed kernels: in the forward pass the offsets (queries, K, D) of each query's kernel points, in the transposed
  // pass the deformed kernel points (points, D, K padded) of each gathered point. Otherwise null.
  const G* offsets;
  const G* deformed;
};

// Rows of features, which are prefetched while their pairs are found.
struct FeatureRows {
  const char* data;
  int64_t bytes;  // per row
};

// Output and scratch of find_pairs(). Output arrays have room for one more chunk of neighbors and one more vector.
template <class G>
struct PairArrays {
  G* d2;                         // squared distance between neighbor and kernel point
  int32_t* point;                // the neighbor
  int32_t* edge;                 // position in the index, counted from the tile's first; null if not needed
  G* difference[max_dimension];  // neighbor - kernel point, by axis; null if not needed
  int64_t* ends;                 // (K + 1,) where the pairs of each kernel point end; for the latest query only

  // Scratch of deformed kernels.
  G* query_kernel_points;   // (D, K), of the query
  G* kernel_d2;             // (K,) squared distances from one neighbor to all kernel points
  G* unsorted_d2;           // pairs ordered by neighbor, before they are sorted by kernel point
  int32_t* kernel_numbers;  // 0, 1, ..., K - 1
  int32_t *unsorted_kernel, *unsorted_point;
};

#ifdef KP_ISA
namespace KP_ISA {

// Finds the pairs of query q with its neighbors index[begin, begin + n), n <= chunk. Writes them from position
// num_pairs on, ordered by kernel point, and where the pairs of each kernel point end. `first`: the tile's first edge.
void find_pairs(const PassGeometry<float>&, const FeatureRows&, int64_t q, int64_t begin, int64_t n, int64_t first,
                int64_t num_pairs, const PairArrays<float>&);
void find_pairs(const PassGeometry<double>&, const FeatureRows&, int64_t q, int64_t begin, int64_t n, int64_t first,
                int64_t num_pairs, const PairArrays<double>&);

}  // namespace KP_ISA
#endif

}  // namespace kp
