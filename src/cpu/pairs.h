// The pairs of a query's neighbors with the kernel points that act on them: where a KPConv is sparse.
//
// This depends on the dtype of the geometry and on the dimension, not on the features, and is compiled once for each,
// in pairs.cpp. As part of the loops over features it was compiled 16 times, up to 27 KB of code each.
#pragma once

#include "kernels.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

constexpr int64_t chunk = 128;  // neighbors looked at together

}  // namespace

// Where things are in one direction of the operator.
template <class G>
struct Geometry {
  const G *points, *queries;
  int dimension;
  const int32_t* index;
  const int64_t* row_splits;
  int64_t num_queries;
  const G* kernel_points;  // (D, K), mirrored on the way back
  int num_kernels;
  G extent;
  Influence influence;
  Aggregation aggregation;
  const G* offsets;   // (queries, K, D) of the kernel points, or null; only on the way there
  const G* deformed;  // (points, D, K padded): on the way back the kernel points of what is gathered
};

// Rows of features, which are asked for while their pairs are found.
struct FeatureRows {
  const char* data;
  int64_t bytes;  // of a row
};

// Where pairs are written to. There is room for one more chunk of neighbors and a vector.
template <class G>
struct PairArrays {
  G* d2;
  int32_t* point;          // what is gathered
  int32_t* edge;           // its place in the index, from the tile's first; and where it is from the
  G* from[max_dimension];  // kernel point: null if not asked for
  int64_t* ends;           // (K + 1,) of the last query's pairs of every kernel point
  G* own_kernel_points;    // scratch of deformed kernels: (D, K), those of the query
  G *row_d2, *found_d2;    // of a neighbor with all kernel points; of its pairs
  int32_t *numbers, *found_kernel, *found_point;
};

#ifdef KP_ISA
namespace KP_ISA {

// Writes the pairs of query q with n <= chunk of its neighbors from `num_pairs` on, by kernel point, and where those
// of each kernel point end. `begin`: the first of these neighbors in the index, `first`: that of the tile.
void find_pairs(const Geometry<float>&, const FeatureRows&, int64_t q, int64_t begin, int64_t n, int64_t first,
                int64_t num_pairs, const PairArrays<float>&);
void find_pairs(const Geometry<double>&, const FeatureRows&, int64_t q, int64_t begin, int64_t n, int64_t first,
                int64_t num_pairs, const PairArrays<double>&);

}  // namespace KP_ISA
#endif

}  // namespace kp
