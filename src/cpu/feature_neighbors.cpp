// The k nearest neighbors in the space of features, where a kd-tree would visit every leaf: each query is compared with
// every point of its batch item. A product of matrices selects, and the formula of all searches decides.
//
//   1. A block of queries is multiplied by one panel of points after the other. One more row of the panel holds the
//      squared norms of its points, so the product is the key of KeyBounds (formulas/neighbors.h).
//   2. While the product is in the first-level cache, keys up to the query's limit are packed into its list. No matrix
//      of all queries and points exists.
//   3. A full list shrinks: its k-th smallest upper bound is the new limit, and what is beyond it goes. If that leaves
//      most of the list, because distances are closer to each other than the rounding error of the product, its
//      entries are measured, and the k nearest remain.
//   4. In the end the entries are measured by the formula, and sorted. The bounds are rigorous, so no neighbor is
//      missed, and the row is that of a search that measures all points.
//
//            points -> [ panel 0 ][ panel 1 ][ panel 2 ] ...      D rows of coordinates, and the squared norms
//   queries ---------- [  keys   ] -> keys <= limit -> list of each query -> measure -> sort -> row
#include "formulas/neighbors.h"

#include <math.h>

#include "candidates.h"
#include "geometry.h"
#include "gemm.h"
#include "kernels.h"
#include "tile_products.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t max_block_rows = 240;       // queries in a block: packing a panel then takes 3 % of the time
constexpr int64_t max_block_bytes = 1 << 20;  // of their coordinates and lists: a second-level cache
constexpr int64_t samples_of_center = 64;

// The sizes of one search.
template <class T>
struct Sizes {
  int dimension;
  int64_t k, trigger, room, block_rows;

  Sizes(const FeatureSearch& args, int threads)
      : dimension(int(args.points.cols)),
        k(args.k),
        trigger(2 * k + 2 * panel_width<T>),  // a list with more entries shrinks
        room(trigger + panel_width<T> +
             lanes<T>)  // of a list: one more panel, of which the last store is a whole vector
  {
    const int64_t row = (dimension + 1) * int64_t(sizeof(T)) + room * int64_t(sizeof(T) + sizeof(int32_t));
    const int64_t fit = smaller(max_block_rows, max_block_bytes / row);
    const int64_t most = larger<int64_t>(row_step, fit / row_step * row_step), queries = args.queries.rows;
    const int64_t blocks = (queries + threads * most - 1) / (threads * most) * threads;  // as many for every thread
    block_rows = larger<int64_t>(row_step, round_up((queries + blocks - 1) / larger<int64_t>(1, blocks), row_step));
  }
};

// The rows that a search writes.
template <class T>
struct Rows {
  int32_t* index;
  T* distance;  // or null
  int64_t* counts;
};

// A block of queries of one batch item.
struct Block {
  int64_t points_begin, points_end, begin, end;
};

// One thread's block of queries, with their lists. The first entries of a list have been measured: their values are
// squared distances, in ascending order. The values of the others are keys.
template <class T>
class BlockSearch {
 public:
  bool reserve(const FeatureSearch& args, const Sizes<T>& sizes, const Rows<T>& to) {
    args_ = &args;
    sizes_ = &sizes;
    to_ = to;
    const int64_t rows = sizes.block_rows, D = sizes.dimension;
    return center_.resize(D) && queries_.resize(rows * (D + 1)) && panel_.resize((D + 1) * panel_width<T>) &&
           lists_.resize(rows) && values_.resize(rows * sizes.room) && ids_.resize(rows * sizes.room) &&
           row_.reserve(sizes.room) && sorter_.keys(sizes.room);
  }

  // Writes the rows of the block's queries; `scale` brings the coordinates of the batch item to the order of 1.
  KP_OUTLINE void search(const Block& block, T scale) {
    block_ = block;
    scale_ = scale;
    bounds_ = key_bounds<T>(dimension(), double(scale));
    find_center();
    pack_queries();
    const int64_t rows = block.end - block.begin;
    constexpr int MR = rows_for(panel_vectors);
    T keys[MR * panel_width<T>];
    for (int64_t first = block.points_begin; first < block.points_end; first += panel_width<T>) {
      pack_panel(first);
      for (int64_t r = 0; r < rows; r += MR) {
        multiply_block<T, MR, panel_vectors, true>(
            dimension() + 1, queries_.data() + r * (dimension() + 1), dimension() + 1, 1,
            [&](int64_t c) { return panel_.data() + c * panel_width<T>; },
            [&](int64_t i) { return keys + i * panel_width<T>; });
        for (int64_t i = 0; i < MR && r + i < rows; ++i) collect(r + i, keys + i * panel_width<T>, first);
      }
    }
    for (int64_t r = 0; r < rows; ++r) write(r);
  }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  struct List {
    T limit;  // the largest key to collect
    T query_norm;
    int64_t size, measured;
  };

  KP_INLINE int dimension() const { return sizes_->dimension; }
  const T* point(int64_t i) const { return as<T>(args_->points) + i * dimension(); }
  const T* query(int64_t r) const { return as<T>(args_->queries) + (block_.begin + r) * dimension(); }
  T* values(int64_t r) { return values_.data() + r * sizes_->room; }
  int32_t* ids(int64_t r) { return ids_.data() + r * sizes_->room; }

  // About the mean of the points: the bounds are the narrower the shorter the vectors. Differences from the first
  // point do not overflow, unlike a sum of coordinates.
  void find_center() {
    const int64_t n = block_.points_end - block_.points_begin, samples = smaller(samples_of_center, n);
    const T* const origin = point(block_.points_begin);
    T* const center = center_.data();
    for (int a = 0; a < dimension(); ++a) center[a] = 0;
    for (int64_t s = 0; s < samples; ++s) {
      const T* const x = point(block_.points_begin + n * s / samples);
      for (int a = 0; a < dimension(); ++a) center[a] += (x[a] - origin[a]) / T(samples);
    }
    for (int a = 0; a < dimension(); ++a) center[a] += origin[a];
  }

  void pack_queries() {
    const int64_t D = dimension(), rows = block_.end - block_.begin;
    for (int64_t r = 0; r < round_up(rows, row_step); ++r) {
      T* const packed = queries_.data() + r * (D + 1);
      T norm = 0;
      for (int64_t a = 0; a < D; ++a) {
        const T at = r < rows ? (query(r)[a] - center_[a]) * scale_ : T(0);
        norm += at * at;
        packed[a] = -2 * at;
      }
      packed[D] = r < rows;
      lists_[r] = {T(INFINITY), norm, 0, 0};
    }
  }

  // Calls visit(axis, vectors, n) for some axes at a time: vectors[a] holds the coordinates of the points rows[0], ...
  // along axis + a minus those of `origin`, a point in each lane, for a < n.
  template <class Visit>
  KP_INLINE void for_axes(const T* const* rows, const T* origin, Visit visit) const {
    const int D = dimension();
    for (int a = 0; a < D; a += lanes<T>) {
      const int n = smaller(lanes<T>, D - a);
      Vec<T> d[lanes<T>];
      if (n == lanes<T>) {
        const Vec<T> from = load(origin + a);
        for (int l = 0; l < lanes<T>; ++l) d[l] = load(rows[l] + a) - from;
      } else {
        const Vec<T> from = load_first(origin + a, n);
        for (int l = 0; l < lanes<T>; ++l) d[l] = load_first(rows[l] + a, n) - from;
      }
      transpose_square<T>(d);
      visit(a, d, n);
    }
  }

  // Packs the points from `first` on. The panel is filled up with points whose keys are NaN, which no limit admits.
  KP_OUTLINE void pack_panel(int64_t first) {
    const Vec<T> scale = broadcast(scale_);
    for (int v = 0; v < panel_vectors; ++v) {
      const T* rows[lanes<T>];
      const int64_t begin = first + v * lanes<T>;
      for (int l = 0; l < lanes<T>; ++l) rows[l] = point(smaller(begin + l, block_.points_end - 1));
      T* const to = panel_.data() + v * lanes<T>;
      Vec<T> norms = {};
      for_axes(rows, center_.data(), [&](int axis, const Vec<T>* d, int n) {
        for (int a = 0; a < n; ++a) {
          const Vec<T> at = d[a] * scale;
          norms += at * at;
          store(to + (axis + a) * panel_width<T>, at);
        }
      });
      norms *= broadcast(T(1 - bounds_.error));
      for (int l = 0; l < lanes<T>; ++l)
        if (begin + l >= block_.points_end) norms[l] = T(NAN);
      store(to + dimension() * panel_width<T>, norms);
    }
  }

  // Appends the points of a panel whose keys are within the limit to the list of query r.
  KP_INLINE void collect(int64_t r, const T* keys, int64_t first) {
    List& list = lists_[r];
    const Vec<T> limit = broadcast(list.limit);
    int64_t n = list.size;
    for (int v = 0; v < panel_vectors; ++v) {
      const Vec<T> key = load(keys + v * lanes<T>);
      const unsigned mask = mask_le(key, limit);
      if (!mask) continue;
      compress(values(r) + n, mask, key);
      int32_t* const to = ids(r) + n;
      for (unsigned rest = mask, i = 0; rest; rest &= rest - 1, ++i)
        to[i] = int32_t(first + v * lanes<T> + __builtin_ctz(rest));
      n += popcount(mask);
    }
    list.size = n;
    if (n > sizes_->trigger) {
      shrink(r);
      if (4 * list.size > 3 * sizes_->trigger) measure(r);
    }
  }

  // Drops entries that are not among the k nearest of the list, as far as the bounds tell.
  KP_OUTLINE void shrink(int64_t r) {
    List& list = lists_[r];
    keep(r, [&](T key, int32_t id) { return !is_ignored(r, key, id); });
    if (list.size <= sizes_->k) return;
    Bits* const keys = sorter_.keys(list.size);
    for (int64_t i = 0; i < list.size; ++i) {
      const double value = double(values(r)[i]);
      const T bound = T(i < list.measured ? scaled(value) : bounds_.farthest(value, double(list.query_norm)));
      memcpy(&keys[i], &bound, sizeof bound);
    }
    T kth;
    memcpy(&kth, &sorter_.sort(list.size)[sizes_->k - 1], sizeof kth);
    lower_limit(list, double(kth));
    keep(r, [&](T key, int32_t) { return key <= list.limit; });
  }

  // Measures all entries and keeps the k nearest.
  KP_OUTLINE void measure(int64_t r) {
    List& list = lists_[r];
    memcpy(row_.ids.data(), ids(r), size_t(list.size) * sizeof(int32_t));
    memcpy(row_.measures.data(), values(r), size_t(list.measured) * sizeof(T));
    for (int64_t i = list.measured; i < list.size; i += lanes<T>) {
      const T* rows[lanes<T>];
      for (int l = 0; l < lanes<T>; ++l) rows[l] = point(ids(r)[smaller(i + l, list.size - 1)]);
      Vec<T> sums = {};
      for_axes(rows, query(r), [&](int, const Vec<T>* d, int n) { sums = add_squares(sums, d, n); });
      store(row_.measures.data() + i, sums);
    }
    row_.sort_by_distance(list.size);
    list.size = list.measured = smaller(list.size, sizes_->k);
    memcpy(ids(r), row_.ids.data(), size_t(list.size) * sizeof(int32_t));
    memcpy(values(r), row_.measures.data(), size_t(list.size) * sizeof(T));
    if (list.size < sizes_->k) return;
    const T farthest = values(r)[list.size - 1];
    if (farthest > 0)
      lower_limit(list, scaled(double(farthest)));
    else
      list.limit = -T(INFINITY);  // the points that follow have larger indices, so none of them comes before these
  }

  double scaled(double measured) const { return measured * bounds_.scale * bounds_.scale; }

  // Lowers the limit so that it admits no point farther than `farthest`, a scaled squared distance.
  void lower_limit(List& list, double farthest) const {
    list.limit = smaller(list.limit, T(bounds_.largest_key(farthest, double(list.query_norm))));
  }

  // Keeps the entries that are not measured and for which `wanted` is true.
  template <class Wanted>
  void keep(int64_t r, Wanted wanted) {
    List& list = lists_[r];
    int64_t to = list.measured;
    for (int64_t i = to; i < list.size; ++i) {
      const T key = values(r)[i];
      const int32_t id = ids(r)[i];
      values(r)[to] = key;
      ids(r)[to] = id;
      to += wanted(key, id);
    }
    list.size = to;
  }

  bool is_ignored(int64_t r, T key, int32_t id) const {
    if (args_->ignore == Ignore::index) return id == block_.begin + r;
    // A point with the coordinates of the query is at distance 0, which its key admits.
    if (args_->ignore == Ignore::none || double(key) > bounds_.largest_key(0, double(lists_[r].query_norm)))
      return false;
    for (int a = 0; a < dimension(); ++a)
      if (point(id)[a] != query(r)[a]) return false;
    return true;
  }

  void write(int64_t r) {
    shrink(r);
    measure(r);
    const int64_t n = lists_[r].size, row = block_.begin + r, begin = row * sizes_->k;
    to_.counts[row] = n;
    memcpy(to_.index + begin, ids(r), size_t(n) * sizeof(int32_t));
    for (int64_t i = 0; to_.distance && i < n; ++i) to_.distance[begin + i] = ::sqrt(values(r)[i]);
  }

  const FeatureSearch* args_ = nullptr;
  const Sizes<T>* sizes_ = nullptr;
  Rows<T> to_{};
  Block block_;
  T scale_ = 1;
  KeyBounds bounds_;
  Buffer<T> center_, queries_, panel_, values_;
  Buffer<int32_t> ids_;
  Buffer<List> lists_;
  RowScratch<T> row_;
  Sorter<Bits> sorter_;
};

// The scale of KeyBounds for an item; 0 if distances within the box around its points and queries cannot tell points
// apart.
template <class T>
T scale_of(const FeatureSearch& args, const Block& item, T* low, T* high) {
  const int D = int(args.points.cols);
  for (int a = 0; a < D; ++a) low[a] = T(INFINITY), high[a] = -T(INFINITY);
  const auto extend = [&](const T* rows, int64_t begin, int64_t end) {
    for (const T* x = rows + begin * D; x < rows + end * D; x += D)
      for (int a = 0; a < D; ++a) {
        low[a] = smaller(low[a], x[a]);
        high[a] = larger(high[a], x[a]);
      }
  };
  extend(as<T>(args.points), item.points_begin, item.points_end);
  if (args.queries.data != args.points.data) extend(as<T>(args.queries), item.begin, item.end);
  T longest = 0;
  for (int a = 0; a < D; ++a) {
    high[a] -= low[a];
    longest = larger(longest, high[a]);
  }
  if (!is_measurable<Metric::l2>(high, D, false)) return 0;
  return T(KeyBounds::scale_of(double(longest)));
}

template <class T>
Status search(const FeatureSearch& args, const Rows<T>& to) {
  const int64_t num_points = args.points.rows, num_queries = args.queries.rows, D = args.points.cols;
  if (!all_finite(as<T>(args.points), num_points * D, args.threads) ||
      (args.queries.data != args.points.data && !all_finite(as<T>(args.queries), num_queries * D, args.threads)))
    return Status::not_finite;
  // One query with so many coordinates of points takes 20 us.
  const int64_t grain = larger<int64_t>(1, (1 << 19) / larger<int64_t>(1, num_points * D));
  const int threads = useful_threads(args.threads, num_queries, grain);
  const Sizes<T> sizes(args, threads);
  const int64_t items = args.row_splits.rows - 1;
  const auto* splits = as<int64_t>(args.row_splits);
  const auto* queries_splits = as<int64_t>(args.queries_row_splits);
  Buffer<int64_t> first_blocks;  // of each item
  Buffer<T> scales, low, high;
  if (!first_blocks.resize(items + 1) || !scales.resize(items) || !low.resize(D) || !high.resize(D))
    return Status::out_of_memory;
  int64_t blocks = 0;
  for (int64_t item = 0; item < items; ++item) {
    const Block whole{splits[item], splits[item + 1], queries_splits[item], queries_splits[item + 1]};
    first_blocks[item] = blocks;
    blocks += (whole.end - whole.begin + sizes.block_rows - 1) / sizes.block_rows;
    if (whole.points_begin == whole.points_end || whole.begin == whole.end) continue;
    scales[item] = scale_of(args, whole, low.data(), high.data());
    if (!scales[item]) return Status::not_finite;
  }
  first_blocks[items] = blocks;
  memset(to.counts, 0, size_t(num_queries) * sizeof(int64_t));
  return for_each_of<BlockSearch<T>>(
      blocks, threads, [&](BlockSearch<T>& state) { return state.reserve(args, sizes, to); },
      [&](BlockSearch<T>& state, int64_t b) {
        int64_t item = 0, end = items;
        while (item + 1 < end) {
          const int64_t middle = item + (end - item) / 2;
          (first_blocks[middle] <= b ? item : end) = middle;
        }
        const int64_t begin = queries_splits[item] + (b - first_blocks[item]) * sizes.block_rows;
        const Block block{splits[item], splits[item + 1], begin,
                          smaller(begin + sizes.block_rows, queries_splits[item + 1])};
        if (block.points_begin < block.points_end) state.search(block, scales[item]);
      });
}

}  // namespace

Status feature_search(const FeatureSearch& args, int32_t* index, void* distance, int64_t* counts) {
  return with_real(args.points.dtype, [&](auto t) {
    using T = decltype(t);
    return search<T>(args, {index, static_cast<T*>(distance), counts});
  });
}

}  // namespace KP_ISA
}  // namespace kp
