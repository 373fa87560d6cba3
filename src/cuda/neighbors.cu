// Neighbor search on the GPU: a warp for each query, one candidate per lane. There are two kinds of index:
//
//   cells  for a known radius, by up to three axes. Points are sorted by cell, so a row of cells is a run of
//          points, and a query's candidates are some runs. The table of cells has a fixed size and wraps around, so no
//          cloud is too wide for it. Far points that wrap into the same cell fail the distance test.
//
//              table:  |  0  |  1  |  2  |  3  |        cell number = floor(x / cell) modulo 4
//              x / cell: 0..1  1..2  2..3  3..4
//                        4..5  5..6  ...
//
//   boxes  for everything else. Points are sorted along a Morton curve. 32 consecutive points are a leaf, 32 leaves a
//          node and so on, each with its bounding box. A warp tests 32 boxes at once.
//
// The distance from a query to a box is computed with the formula for points. Rounding is monotonic, so no point is
// nearer than its box and nothing is missed. Distances are those of formulas/neighbors.h, compiled without contraction.
//
// Compiled for one coordinate type, dimension, metric and kind of index; 3 dimensions stand for the others, 16 for the
// most registers:
// compile: KP_T=float KP_DIM=3 KP_METRIC=0 KP_TREE=0
// compile: KP_T=float KP_DIM=3 KP_METRIC=0 KP_TREE=1
// compile: KP_T=float KP_DIM=3 KP_METRIC=1 KP_TREE=0
// compile: KP_T=float KP_DIM=3 KP_METRIC=2 KP_TREE=1
// compile: KP_T=double KP_DIM=3 KP_METRIC=0 KP_TREE=0
// compile: KP_T=double KP_DIM=3 KP_METRIC=0 KP_TREE=1
// compile: KP_T=float KP_DIM=16 KP_METRIC=0 KP_TREE=1
// compile: KP_T=double KP_DIM=16 KP_METRIC=0 KP_TREE=1

#include "launch.h"
#include "rows.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

using T = KP_T;
constexpr int D = KP_DIM;
constexpr int axes = D < 3 ? D : 3;  // axes by which cells and the curve order the points
constexpr Metric metric = Metric(KP_METRIC);

// A point with its original number; the index stores points in its own order.
struct alignas(sizeof(T) * D + 4 == 16 ? 16 : sizeof(T)) IndexedPoint {
  T at[D];
  int32_t number;
};

__device__ bool is_finite(const T* at, unsigned* not_finite) {
  bool finite = true;
  for (int a = 0; a < D; ++a) finite = finite && at[a] - at[a] == 0;
  if (!finite) atomicOr(not_finite, 1u);
  return finite;
}

// ---- queries

struct Query {
  T at[D];
  T limit;         // the largest measure of a neighbor
  double reach;    // the radius, slightly enlarged
  int begin, end;  // numbers of the points of the query's batch item
  int32_t number;
  Ignore ignore;

  __device__ bool is_neighbor(const IndexedPoint& p, T& measured) const {
    T d[D];
    bool equal = true;
    for (int a = 0; a < D; ++a) {
      d[a] = p.at[a] - at[a];
      equal = equal && p.at[a] == at[a];
    }
    measured = measure<metric>(d, D);
    return measured <= limit && p.number >= begin && p.number < end && !(ignore == Ignore::equal && equal) &&
           !(ignore == Ignore::index && p.number == number);
  }
};

__device__ Query query_of(const T* queries, const T* radii, int64_t radius_stride, int is_inclusive,
                          const int64_t* row_splits, const int64_t* queries_row_splits, int num_items, Ignore ignore,
                          int64_t q) {
  Query query;
  for (int a = 0; a < D; ++a) query.at[a] = queries[q * D + a];
  const T radius = radii[q * radius_stride];
  query.limit = largest_measure(metric, radius, is_inclusive);
  query.reach = double(radius) * (1 + 1e-6);  // the rounded measure may accept points just beyond the radius
  const int item = item_of(queries_row_splits, num_items, q);
  query.begin = int(row_splits[item]);
  query.end = int(row_splits[item + 1]);
  query.number = int32_t(q);
  query.ignore = ignore;
  return query;
}

// ---- cells

// The cell of a coordinate along an axis, counted from the origin; in float64, because there may be more than 2^31. It
// is monotonic in x, so a query's range of cells misses no neighbor.
__device__ double cell_of(double x, double inverse_cell) {
  return floor(x * inverse_cell);
}
__device__ int wrapped(double cell, int bits) {
  const double size = double(1 << bits);
  return int(cell - floor(cell / size) * size);
}

struct Cells {
  const IndexedPoint* points;
  const int32_t* starts;  // first point of every cell, and a sentinel
  double inverse_cell;
  int bits[3];  // log2 of the number of cells along each axis of the table; 0 for missing axes

  __device__ int number(const int* cell) const { return ((cell[2] << bits[1] | cell[1]) << bits[0]) | cell[0]; }

  // Calls visit(candidate, is_candidate) in all lanes together, for 32 candidates at a time.
  template <class Visit>
  __device__ void for_candidates(const Query& query, Visit visit) const {
    int low[3] = {}, count[3] = {1, 1, 1};
    for (int a = 0; a < axes; ++a) {
      // Enlarged by more than the rounding error of a neighbor's cell.
      const double below = double(query.at[a]) - query.reach, above = double(query.at[a]) + query.reach;
      const double first = cell_of(below - fabs(below) * 2.3e-16, inverse_cell);
      const double last = cell_of(above + fabs(above) * 2.3e-16, inverse_cell);
      const bool everything = last - first + 1 >= double(1 << bits[a]);
      low[a] = everything ? 0 : wrapped(first, bits[a]);
      count[a] = everything ? 1 << bits[a] : int(last - first) + 1;
    }
    // A row of cells is one run of points, or two if the row wraps around. Each lane takes one run.
    const int runs = 2 * count[1] * count[2], lane = lane_number();
    for (int base = 0; base < runs; base += warp) {
      const int run = base + lane;
      int32_t begin = 0, length = 0;
      if (run < runs) {
        const int size = 1 << bits[0], before_end = size - low[0] < count[0] ? size - low[0] : count[0];
        int cell[3] = {run % 2 ? 0 : low[0], (low[1] + run / 2 % count[1]) & ((1 << bits[1]) - 1),
                       (low[2] + run / 2 / count[1]) & ((1 << bits[2]) - 1)};
        const int cells = run % 2 ? count[0] - before_end : before_end, row = number(cell);
        begin = starts[row];
        length = starts[row + cells] - begin;
      }
      // The candidates of all 32 runs are numbered consecutively (prefix sum of lengths) and divided evenly among the
      // lanes, whatever the lengths of their runs.
      int32_t end = length;
      for (int by = 1; by < warp; by *= 2) {
        const int32_t before = __shfl_up_sync(all_lanes, end, unsigned(by));
        if (lane >= by) end += before;
      }
      const int32_t total = __shfl_sync(all_lanes, end, warp - 1), shift = begin - (end - length);
      for (int32_t chunk = 0; chunk < total; chunk += warp) {
        const int32_t candidate = chunk + lane;
        int source = 0;  // the lane whose run has the candidate: the first one that ends after it
        for (int bit = warp / 2; bit; bit /= 2) {
          const int32_t end_before = __shfl_sync(all_lanes, end, source + bit - 1);
          if (candidate >= end_before) source += bit;
        }
        const int32_t source_shift = __shfl_sync(all_lanes, shift, source);
        const bool is_candidate = candidate < total;
        visit(points[is_candidate ? candidate + source_shift : 0], is_candidate);
      }
    }
  }
};

// ---- boxes

constexpr int max_levels = 7;  // 32^7 > 2^31

// The number of parents of so many nodes: one for every 32.
__device__ int32_t parents_of(int32_t nodes) {
  return nodes / warp + (nodes % warp != 0);
}

struct Boxes {
  const IndexedPoint* points;
  const T* boxes;  // (nodes, 2, D): lowest and highest coordinates, level by level from the leaves
  int32_t num_points;

  struct Level {
    int32_t nodes, first;  // number of nodes, and the number of the first one's box
  };
  Level levels[max_levels];
  int top;

  __device__ Boxes(const IndexedPoint* points, const T* boxes, int32_t num_points)
      : points(points), boxes(boxes), num_points(num_points), top(-1) {
    int32_t nodes = num_points, first = 0;
    do {
      nodes = parents_of(nodes);
      levels[++top] = {nodes, first};
      first += nodes;
    } while (nodes > warp);
  }

  __device__ T distance(const Query& query, const T* box) const {
    T d[D];
    for (int a = 0; a < D; ++a) {
      const T below = box[a] - query.at[a], above = query.at[a] - box[D + a];
      d[a] = below > 0 ? below : above > 0 ? above : T(0);
    }
    return measure<metric>(d, D);
  }
  __device__ bool is_in_reach(const Query& query, int level, int32_t node) const {
    const int64_t width = int64_t(1) << 5 * (level + 1);  // points below a node
    if (node >= levels[level].nodes || (node + 1) * width <= query.begin || node * width >= query.end) return false;
    return distance(query, boxes + int64_t(levels[level].first + node) * 2 * D) <= query.limit;
  }
  __device__ unsigned children_in_reach(const Query& query, int level, int32_t first) const {
    return __ballot_sync(all_lanes, is_in_reach(query, level, first + lane_number()));
  }
  template <class Visit>
  __device__ void visit_leaf(int32_t leaf, Visit visit) const {
    const int64_t i = int64_t(leaf) * warp + lane_number();
    visit(points[i < num_points ? i : 0], i < num_points);
  }

  // As for cells, except for the points of leaf `except`. visit() may lower query.limit.
  template <class Visit>
  __device__ void for_candidates(const Query& query, Visit visit, int32_t except = -1) const {
    unsigned pending[max_levels];  // per level: children still to visit, a bit each
    int32_t first[max_levels];     // per level: number of the first child
    int level = top;
    first[top] = 0;
    pending[top] = children_in_reach(query, top, 0);
    for (;;) {
      if (!pending[level]) {
        if (level == top) return;
        ++level;
        continue;
      }
      const int32_t node = first[level] + __ffs(int(pending[level])) - 1;
      pending[level] &= pending[level] - 1;
      if (!is_in_reach(query, level, node)) continue;  // the limit may have been lowered since
      if (level == 0) {
        if (node != except) visit_leaf(node, visit);
        continue;
      }
      --level;
      first[level] = node * warp;
      pending[level] = children_in_reach(query, level, first[level]);
    }
  }
};

// Spreads the `bits` lowest bits of x to every axes-th place.
__device__ uint64_t spread(uint64_t x, int bits) {
  uint64_t out = 0;
  for (int b = 0; b < bits; ++b) out |= (x >> b & 1) << b * axes;
  return out;
}
__device__ int64_t curve_key(const T* at, const T* low, const T* high, int item, int bits) {
  uint64_t key = 0;
  const double steps = double((int64_t(1) << bits) - 1);
  for (int a = 0; a < axes; ++a) {
    const double extent = double(high[a]) - double(low[a]);
    double place = extent > 0 ? (double(at[a]) - double(low[a])) / extent * steps : 0;
    place = place > 0 ? place < steps ? place : steps : 0;  // queries may lie outside
    key |= spread(uint64_t(place), bits) << a;
  }
  return int64_t(key | uint64_t(item) << bits * axes);
}

// The parameters of every search kernel, for both kinds of index: `starts` is null for boxes, `boxes` is null for
// cells.
#define KP_INDEX                                                                                               \
  const IndexedPoint *located, const T *boxes, int32_t num_points, const int32_t *starts, double inverse_cell, \
      int bits_x, int bits_y, int bits_z
#if KP_TREE
using Index = Boxes;
#define KP_MAKE_INDEX Index(located, boxes, num_points)
#else
using Index = Cells;
#define KP_MAKE_INDEX                \
  Index {                            \
    located, starts, inverse_cell, { \
      bits_x, bits_y, bits_z         \
    }                                \
  }
#endif
#define KP_QUERIES                                                                                \
  const T *queries, int64_t num_queries, const T *radii, int64_t radius_stride, int is_inclusive, \
      const int64_t *row_splits, const int64_t *queries_row_splits, int num_items, Ignore ignore
#define KP_QUERY(q) \
  query_of(queries, radii, radius_stride, is_inclusive, row_splits, queries_row_splits, num_items, ignore, q)

}  // namespace
}  // namespace kp

using namespace kp;

#if KP_TREE

// keys[i] = (batch item, position on the Morton curve) of point i
extern "C" __global__ void curve_keys(const T* points, int64_t num_points, const int64_t* row_splits, int num_items,
                                      const T* low, const T* high, int bits, int64_t* keys, unsigned* not_finite) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    is_finite(points + i * D, not_finite);
    keys[i] = curve_key(points + i * D, low, high, item_of(row_splits, num_items, i), bits);
  }
}

// The boxes of the leaves, a warp for each.
extern "C" __global__ void leaf_boxes(const IndexedPoint* located, int32_t num_points, T* boxes) {
  const int32_t leaves = parents_of(num_points);
  for (int64_t leaf = first_warp(); leaf < leaves; leaf += num_warps()) {
    const int64_t i = leaf * warp + lane_number();
    const IndexedPoint& p = located[i < num_points ? i : num_points - 1];
    for (int a = 0; a < D; ++a) {
      T low = p.at[a], high = low;
      for (int bit = warp / 2; bit; bit /= 2) {
        const T other_low = __shfl_xor_sync(all_lanes, low, bit), other_high = __shfl_xor_sync(all_lanes, high, bit);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
      }
      if (lane_number() == 0) {
        boxes[leaf * 2 * D + a] = low;
        boxes[leaf * 2 * D + D + a] = high;
      }
    }
  }
}

// The boxes of a level from those of the level below, a thread for each box and axis.
extern "C" __global__ void node_boxes(const T* below, int32_t num_below, T* boxes) {
  const int32_t nodes = parents_of(num_below);
  for (int64_t i = first_thread(); i < int64_t(nodes) * D; i += num_threads()) {
    const int64_t node = i / D, a = i % D, end = (node + 1) * warp < num_below ? (node + 1) * warp : num_below;
    T low = below[node * warp * 2 * D + a], high = below[node * warp * 2 * D + D + a];
    for (int64_t child = node * warp + 1; child < end; ++child) {
      const T child_low = below[child * 2 * D + a], child_high = below[child * 2 * D + D + a];
      low = child_low < low ? child_low : low;
      high = child_high > high ? child_high : high;
    }
    boxes[node * 2 * D + a] = low;
    boxes[node * 2 * D + D + a] = high;
  }
}

#else

// keys[i] = the cell of point i in the table
extern "C" __global__ void cell_keys(const T* points, int64_t num_points, double inverse_cell, int bits_x, int bits_y,
                                     int bits_z, int32_t* keys, unsigned* not_finite) {
  const Cells cells{nullptr, nullptr, inverse_cell, {bits_x, bits_y, bits_z}};
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    int cell[3] = {};  // points that are not finite go to cell 0; they are never neighbors
    if (is_finite(points + i * D, not_finite))
      for (int a = 0; a < axes; ++a) cell[a] = wrapped(cell_of(double(points[i * D + a]), inverse_cell), cells.bits[a]);
    keys[i] = cells.number(cell);
  }
}

// starts[c] = how many keys are below c, which is where cell c begins
extern "C" __global__ void cell_starts(const int32_t* keys, int32_t num_points, int32_t num_cells, int32_t* starts) {
  for (int64_t c = first_thread(); c <= num_cells; c += num_threads()) starts[c] = lower_bound(keys, 0, num_points, c);
}

#endif

// located[i] = the point order[i]
extern "C" __global__ void locate(const T* points, const int64_t* order, int64_t num_points, IndexedPoint* located) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    IndexedPoint p;
    p.number = int32_t(order[i]);
    for (int a = 0; a < D; ++a) p.at[a] = points[int64_t(p.number) * D + a];
    located[i] = p;
  }
}

// counts[q] = the number of neighbors of query q, at most max_neighbors
extern "C" __global__ void radius_count(KP_INDEX, KP_QUERIES, int64_t max_neighbors, int64_t* counts,
                                        unsigned* not_finite) {
  const Index candidates = KP_MAKE_INDEX;
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    const Query query = KP_QUERY(q);
    int64_t count = 0;
    const auto visit = [&](const IndexedPoint& p, bool is_candidate) {
      T measured;
      count += is_candidate && query.is_neighbor(p, measured);
    };
    if (is_finite(query.at, not_finite)) candidates.for_candidates(query, visit);
    count = sum_over_warp(count);
    if (lane_number() == 0) counts[q] = count < max_neighbors ? count : max_neighbors;
  }
}

// Writes the rows counted by radius_count. `distance`: (E,), or null.
extern "C" __global__ void radius_fill(KP_INDEX, KP_QUERIES, const int64_t* out_row_splits, Sort sort, int32_t* index,
                                       T* distance) {
  const Index candidates = KP_MAKE_INDEX;
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    const Query query = KP_QUERY(q);
    const int64_t begin = out_row_splits[q], end = out_row_splits[q + 1];
    int64_t n = 0;
    candidates.for_candidates(query, [&](const IndexedPoint& p, bool is_candidate) {
      T measured;
      const bool is_neighbor = is_candidate && query.is_neighbor(p, measured);
      const unsigned lanes = __ballot_sync(all_lanes, is_neighbor);
      const int64_t at = begin + n + __popc(lanes & ((1u << lane_number()) - 1));
      if (is_neighbor && at < end) {  // the caller may have changed a query since it was counted
        index[at] = p.number;
        if (distance) distance[at] = measured;
      }
      n += __popc(lanes);
    });
    if (n > end - begin) n = end - begin;
    for (int64_t at = begin + n + lane_number(); at < end; at += warp) index[at] = 0;
    __syncwarp();
    T* const row = distance ? distance + begin : nullptr;
    if (sort != Sort::none) sort_row(index + begin, row, n, sort == Sort::distance);
    if (distance && metric == Metric::l2)
      for (int64_t i = lane_number(); i < n; i += warp) row[i] = sqrt(row[i]);
  }
}

#if KP_TREE

namespace kp {
namespace {

// The k nearest neighbors of a query so far, sorted by (distance, number), in the query's row of the output.
struct NearestRow {
  int32_t* index;
  T* distance;
  int64_t k, n;

  // Called by all lanes with the same entry.
  __device__ void insert(T measured, int32_t number) {
    const int lane = lane_number();
    if (n == k && !comes_before(measured, number, distance[k - 1], index[k - 1], true)) return;
    int64_t place = 0;
    for (int64_t i = 0; i < n; i += warp) {
      const bool before = i + lane < n && comes_before(distance[i + lane], index[i + lane], measured, number, true);
      place += __popc(__ballot_sync(all_lanes, before));
    }
    if (n < k) ++n;
    __syncwarp();
    // Moves the entries after `place` up by one, 32 at a time from the end.
    for (int64_t end = n - 1; end > place; end -= warp) {
      const int64_t from = end - 1 - lane;
      const bool moves = from >= place;
      const T d = moves ? distance[from] : T(0);
      const int32_t i = moves ? index[from] : 0;
      __syncwarp();
      if (moves) {
        distance[from + 1] = d;
        index[from + 1] = i;
      }
      __syncwarp();
    }
    if (lane == 0) {
      distance[place] = measured;
      index[place] = number;
    }
    __syncwarp();
  }
};

}  // namespace
}  // namespace kp

// The k nearest neighbors of each query within its radius: rows of k entries, of which counts[q] are used.
extern "C" __global__ void nearest(KP_INDEX, KP_QUERIES, const int64_t* keys, const T* low, const T* high, int bits,
                                   int64_t k, Sort sort, int32_t* index, T* distance, int64_t* counts,
                                   unsigned* not_finite) {
  const Index candidates = KP_MAKE_INDEX;
  for (int64_t q = first_warp(); q < num_queries; q += num_warps()) {
    Query query = KP_QUERY(q);
    NearestRow best{index + q * k, distance + q * k, k, 0};
    const auto visit = [&](const IndexedPoint& p, bool is_candidate) {
      T measured = 0;
      unsigned lanes = __ballot_sync(all_lanes, is_candidate && query.is_neighbor(p, measured));
      for (; lanes; lanes &= lanes - 1) {
        const int from = __ffs(int(lanes)) - 1;
        best.insert(__shfl_sync(all_lanes, measured, from), __shfl_sync(all_lanes, p.number, from));
      }
      if (best.n == k) query.limit = best.distance[k - 1];
    };
    if (is_finite(query.at, not_finite) && query.begin < query.end) {
      // The leaf where the query would be inserted comes first: its points lower the limit, which excludes most others.
      const int item = item_of(queries_row_splits, num_items, q);
      const int64_t key = curve_key(query.at, low, high, item, bits);
      const int32_t leaf = lower_bound(keys, query.begin, query.end - 1, key) / warp;
      candidates.visit_leaf(leaf, visit);
      candidates.for_candidates(query, visit, leaf);
    }
    __syncwarp();
    if (sort != Sort::distance) sort_row(best.index, best.distance, best.n, false);
    if (metric == Metric::l2)
      for (int64_t i = lane_number(); i < best.n; i += warp) best.distance[i] = sqrt(best.distance[i]);
    if (lane_number() == 0) counts[q] = best.n;
  }
}

#endif
