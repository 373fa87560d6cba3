// Farthest point sampling: each next point is the one farthest from all points chosen so far, of equally far ones that
// with the smallest index. Every point keeps its squared distance to the nearest chosen point; choosing a point lowers
// the distances around it. Two algorithms choose the same points:
//
// Scan: each new point updates the distances of all points.
//
// Buckets: points are partitioned into buckets of at most 96 with tight bounding boxes, and the boxes form a tree with
// 16 children per node. Every node knows the largest distance below it. A new point q updates only nodes whose box is
// nearer to q than that:
//
//            [ root: largest distances 9 4 7 ... of 16 children ]          d(q, box) = 12, 3, 8, ...
//                |9           |4            |7                             only the second child is visited
//            [16 boxes]   [16 boxes]    [16 boxes]
//                              |
//                        buckets of points
//
// The distance to a box is summed in the order of squared_distance(), and rounding is monotonic, so no point is nearer
// to q than its box: the buckets give exactly the result of the scan.

#include "sampling.h"

#include <math.h>

#include "geometry.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t max_bucket_points = 96;  // the fastest of 32, 48, 64, 96 and 128

// The points of a batch item, how many of them to choose at most, the smallest squared distance that they keep from
// each other, and where to write the choice.
template <class T>
struct SampledItem {
  const T* points;
  int64_t n;
  int dimension;
  int64_t start, count;
  T least;
  int32_t *out, offset;

  // Whether the choice by distance ends because the farthest point is at this squared distance.
  bool ends_at(T distance) const { return !(distance > 0) || distance < least; }
};

// Once the largest distance is zero, all remaining points duplicate chosen ones: they are taken in order of index, or
// none if points keep a distance.
template <class T>
bool take_remaining(const SampledItem<T>& item, int64_t taken) {
  if (item.least > 0) return true;
  Buffer<uint8_t> is_taken;
  if (!is_taken.resize(item.n)) return false;
  memset(is_taken.data(), 0, size_t(item.n));
  for (int64_t s = 0; s < taken; ++s) is_taken[item.out[s] - item.offset] = 1;
  for (int64_t i = 0; taken < item.count; ++i)
    if (!is_taken[i]) item.out[taken++] = item.offset + int32_t(i);
  return true;
}

// ---- scan

template <class T, int D>
bool scan(const SampledItem<T>& item, int threads) {
  constexpr int64_t chunk = 64;  // blocks updated before their largest distance is compared with that so far
  const int64_t blocks = (item.n + points_per_block - 1) / points_per_block;
  Buffer<T> data;
  PointBlocks<T, D> all{nullptr, item.dimension};
  if (!data.resize(blocks * all.size())) return false;
  all.data = data.data();
  memset(all.data, 0,
         size_t(blocks * all.size()) * sizeof(T));  // padding of the last block: distance 0, never farthest
  for (int64_t i = 0; i < item.n; ++i) {
    for (int a = 0; a < all.dim(); ++a) *all.coordinate(i, a) = item.points[i * all.dim() + a];
    all.distance(i) = T(INFINITY);
  }
  threads = useful_threads(threads, item.n, 1 << 15);
  struct alignas(64) Farthest {  // among a thread's points
    T distance;
    int64_t point;
  };
  Buffer<Farthest> thread_farthest_points;  // for even and for odd steps, so that one barrier per step is enough
  if (!thread_farthest_points.resize(2 * int64_t(threads))) return false;
  int64_t taken = item.count;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), count = omp_get_num_threads();
    const Share share(blocks, t, count);
    int64_t chosen = item.start;
    for (int64_t s = 0; s < item.count; ++s) {
      if (t == 0) item.out[s] = item.offset + int32_t(chosen);
      if (s + 1 == item.count) break;
      Farthest thread_farthest{T(-1), 0};
      int64_t where = 0;
      for (int64_t b = share.begin; b < share.end; b += chunk) {
        Vec<T> lane_farthest;
        all.lower(b, smaller(share.end, b + chunk), item.points + chosen * all.dim(), &lane_farthest);
        const T most = largest_lane<T>(lane_farthest);
        if (most > thread_farthest.distance) thread_farthest.distance = most, where = b;
      }
      if (thread_farthest.distance >= 0) thread_farthest.point = all.find(where, thread_farthest.distance);
      Farthest* const step = thread_farthest_points.data() + (s & 1) * count;
      step[t] = thread_farthest;
#pragma omp barrier
      Farthest best = step[0];
      for (int u = 1; u < count; ++u)
        if (step[u].distance > best.distance) best = step[u];
      if (item.ends_at(best.distance)) {
        if (t == 0) taken = s + 1;
        break;
      }
      chosen = best.point;
    }
  }
  return taken == item.count || take_remaining(item, taken);
}

// ---- buckets

template <class T, int D>
class Buckets {
 public:
  // False: no memory.
  bool build(const SampledItem<T>& item) {
    points_.dimension = dimension_ = item.dimension;
    const int64_t n = item.n;
    const int64_t room = n + n / 4;  // enough for buckets of some 70 points in blocks of 16; pack() resizes if not
    if (!x_.resize(dim() * n) || !data_.resize((dim() + 1) * room)) return false;
    if (!ids_.resize(n) || !packed_ids_.resize(room) || !begin_.resize(n + 1)) return false;
    stride_ = n;
    for (int a = 0; a < dim(); ++a)
      for (int64_t i = 0; i < n; ++i) x(a)[i] = item.points[i * dim() + a];
    for (int64_t i = 0; i < n; ++i) ids_[i] = int32_t(i);
    partition_all(n);
    if (!pack()) return false;
    build_levels();
    return true;
  }

  bool sample(const SampledItem<T>& item) {
    int64_t chosen = item.start;
    for (int64_t s = 0;; ++s) {
      item.out[s] = item.offset + int32_t(chosen);
      if (s + 1 == item.count) return true;
      const Farthest far = lower_below(levels_ - 1, 0, item.points + chosen * dim());
      if (item.ends_at(far.distance)) return take_remaining(item, s + 1);
      chosen = far.id;
    }
  }

 private:
  static constexpr int children = 16, max_levels = 8;  // 16^8 is beyond 2^31
  struct Farthest {
    T distance;
    int32_t id;
  };

  int dim() const { return D ? D : dimension_; }
  T* x(int axis) { return x_.data() + axis * stride_; }

  // Partitions the points into buckets, in order of index within each; begin_[i] is where bucket i begins.
  void partition_all(int64_t n) {
    struct Range {
      int64_t begin, end;
      int depth;
    };
    Range pending[max_depth + 1];
    int waiting = 0;
    buckets_ = 0;
    pending[waiting++] = {0, n, 0};
    while (waiting) {
      const Range r = pending[--waiting];
      if (r.end - r.begin <= max_bucket_points) {
        begin_[buckets_++] = r.begin;
        continue;
      }
      const int64_t middle = r.depth < max_depth ? split(r.begin, r.end) : r.begin;
      // Equal points, a cloud too uneven for max_depth, or NaN that another thread wrote meanwhile: split anywhere.
      if (middle == r.begin || middle == r.end) {
        for (int64_t i = r.begin; i < r.end; i += max_bucket_points) begin_[buckets_++] = i;
        continue;
      }
      pending[waiting++] = {middle, r.end, r.depth + 1};
      pending[waiting++] = {r.begin, middle, r.depth + 1};
    }
    begin_[buckets_] = n;
  }

  // Splits the points [begin, end) near the median of their box's widest axis; both parts keep their order. Returns
  // where the second part begins, or `begin` if all points are equal.
  int64_t split(int64_t begin, int64_t end) {
    int axis = 0;
    T low = 0, high = 0, widest = 0;
    for (int a = 0; a < dim(); ++a) {
      T lo, hi;
      range(x(a), begin, end, &lo, &hi);
      if (hi / 2 - lo / 2 > widest || (lo < hi && !(low < high)))
        axis = a, low = lo, high = hi, widest = hi / 2 - lo / 2;
    }
    if (!(low < high)) return begin;
    T pivot = near_median(x(axis) + begin, end - begin);
    if (pivot == high) pivot = next_below(pivot);
    return partition(axis, begin, end, pivot);
  }

  static void range(const T* x, int64_t begin, int64_t end, T* low, T* high) {
    Vec<T> least = broadcast(x[begin]), most = least;
    int64_t i = begin;
    for (; i + lanes<T> <= end; i += lanes<T>) {
      least = min(least, load(x + i));
      most = max(most, load(x + i));
    }
    T lo = -largest_lane<T>(-least), hi = largest_lane<T>(most);
    for (; i < end; ++i) {
      lo = smaller(lo, x[i]);
      hi = larger(hi, x[i]);
    }
    *low = lo;
    *high = hi;
  }

  // The median of 16 of the values.
  static T near_median(const T* x, int64_t n) {
    constexpr int samples = 16;
    T values[samples];
    for (int i = 0; i < samples; ++i) values[i] = x[(2 * i + 1) * n / (2 * samples)];
    for (int i = 0; i < samples; ++i) {
      int rank = 0;
      for (int j = 0; j < samples; ++j) rank += j < i ? values[j] <= values[i] : values[j] < values[i];
      if (rank == samples / 2) return values[i];
    }
    return values[0];  // only if another thread wrote NaN after the check
  }

  // Stable partition by coordinate <= pivot. The first part is compressed in place, the second into the memory that
  // will hold the blocks, and then copied behind the first.
  int64_t partition(int axis, int64_t begin, int64_t end, T pivot) {
    int64_t kept = begin, moved = 0, i = begin;
    const T* const key = x(axis);
    T* const spare = data_.data();
    int32_t *const ids = ids_.data(), *const spare_ids = packed_ids_.data();
    for (; i + lanes<T> <= end; i += lanes<T>) {
      const unsigned first = mask_le(load(key + i), broadcast(pivot)), others = ~first & first_lanes<T>(lanes<T>);
      for (int a = 0; a < dim(); ++a) {
        const Vec<T> v = load(x(a) + i);
        compress(spare + a * stride_ + moved, others, v);
        compress(x(a) + kept, first, v);
      }
      compress<T>(spare_ids + moved, others, ids + i);
      compress<T>(ids + kept, first, ids + i);
      kept += popcount(first);
      moved += popcount(others);
    }
    for (; i < end; ++i) {
      const bool first = key[i] <= pivot;
      for (int a = 0; a < dim(); ++a) (first ? x(a)[kept] : spare[a * stride_ + moved]) = x(a)[i];
      (first ? ids[kept] : spare_ids[moved]) = ids[i];
      ++(first ? kept : moved);
    }
    for (int a = 0; a < dim(); ++a) memcpy(x(a) + kept, spare + a * stride_, size_t(moved) * sizeof(T));
    memcpy(ids + kept, spare_ids, size_t(moved) * sizeof(int32_t));
    return kept;
  }

  // Copies the buckets into blocks and computes their boxes.
  bool pack() {
    if (!first_.resize(buckets_ + 1)) return false;
    int64_t blocks = 0;
    for (int64_t i = 0; i < buckets_; ++i) {
      first_[i] = blocks;
      blocks += (begin_[i + 1] - begin_[i] + points_per_block - 1) / points_per_block;
    }
    first_[buckets_] = blocks;
    int64_t nodes = 0;
    levels_ = 0;
    for (int64_t n = buckets_; !levels_ || n > 1; nodes += n) {
      level_[levels_++] = nodes;
      n = (n + children - 1) / children;
    }
    if (!data_.resize(blocks * points_.size()) || !packed_ids_.resize(blocks * points_per_block)) return false;
    if (!nodes_.resize(nodes * node_size()) || !node_ids_.resize(nodes * children)) return false;
    points_.data = data_.data();
    for (int64_t i = 0; i < buckets_; ++i) {
      T* const box = child(0, i);
      int64_t to = first_[i] * points_per_block;
      for (int a = 0; a < dim(); ++a)
        range(x(a), begin_[i], begin_[i + 1], box + 2 * a * children, box + (2 * a + 1) * children);
      // Initially infinite, so that the first point visits every bucket.
      box[2 * dim() * children] = T(INFINITY);
      node_ids_[i] = ids_[begin_[i]];
      for (int64_t j = begin_[i]; j < begin_[i + 1]; ++j, ++to) {
        for (int a = 0; a < dim(); ++a) *points_.coordinate(to, a) = x(a)[j];
        points_.distance(to) = T(INFINITY);
        packed_ids_[to] = ids_[j];
      }
      for (; to % points_per_block; ++to) {  // padding at distance 0, so never the farthest
        for (int a = 0; a < dim(); ++a) *points_.coordinate(to, a) = 0;
        points_.distance(to) = 0;
      }
    }
    return true;
  }

  // Builds the levels of the tree over the buckets. Missing children are padded with boxes that are never visited.
  void build_levels() {
    int64_t n = buckets_;
    for (int l = 0; l < levels_; ++l) {
      const int64_t full = (n + children - 1) / children * children;
      for (int64_t i = n; i < full; ++i) {
        T* const box = child(l, i);
        for (int a = 0; a < dim(); ++a) box[2 * a * children] = T(INFINITY), box[(2 * a + 1) * children] = -T(INFINITY);
        box[2 * dim() * children] = -1;
      }
      const int64_t before = n;
      n = full / children;
      for (int64_t i = 0; l + 1 < levels_ && i < n; ++i) {
        const T* const children_rows = child(l, i * children);
        T* const box = child(l + 1, i);
        for (int row = 0; row < 2 * dim(); ++row) {
          T side = children_rows[row * children];
          for (int c = 1; c < children; ++c)
            side = row % 2 ? larger(side, children_rows[row * children + c])
                           : smaller(side, children_rows[row * children + c]);
          box[row * children] = side;
        }
        box[2 * dim() * children] = T(INFINITY);
        int32_t first = INT32_MAX;
        for (int64_t c = i * children; c < smaller(before, (i + 1) * children); ++c)
          first = smaller(first, node_ids_[level_[l] * children + c]);
        node_ids_[level_[l + 1] * children + i] = first;
      }
    }
  }

  // A node holds, for each axis, the low sides of its 16 children's boxes and the high sides, then the largest
  // distances.
  int64_t node_size() const { return int64_t(2 * dim() + 1) * children; }
  T* child(int level, int64_t i) { return &nodes_[(level_[level] + i / children) * node_size() + i % children]; }

  // Lowers the distances below a node to those from the new point q; returns the farthest point below the node.
  Farthest lower_below(int level, int64_t i, const T* q) {
    T* const node = child(level, i * children);
    T* const distance = node + 2 * dim() * children;
    int32_t* const id = &node_ids_[(level_[level] + i) * children];
    unsigned nearer = 0;
    for (int c = 0; c < children; c += lanes<T>) {
      Vec<T> d[D ? D : max_dimension];
      for (int a = 0; a < dim(); ++a) {
        const Vec<T> x = broadcast(q[a]), low = load(node + 2 * a * children + c);
        const Vec<T> high = load(node + (2 * a + 1) * children + c);
        d[a] = max(max(low - x, x - high), Vec<T>{});
      }
      nearer |= mask_lt(squared_distance(d, dim()), load(distance + c)) << c;
    }
    for (; nearer; nearer &= nearer - 1) {
      const int c = __builtin_ctz(nearer);
      const int64_t below = i * children + c;
      const Farthest far = level ? lower_below(level - 1, below, q) : lower(below, q, {distance[c], id[c]});
      distance[c] = far.distance;
      id[c] = far.id;
    }
    Vec<T> most = load(distance);
    for (int c = lanes<T>; c < children; c += lanes<T>) most = max(most, load(distance + c));
    Farthest far{largest_lane<T>(most), INT32_MAX};
    unsigned equals = 0;
    for (int c = 0; c < children; c += lanes<T>) equals |= mask_eq(load(distance + c), broadcast(far.distance)) << c;
    for (; equals; equals &= equals - 1) far.id = smaller(far.id, id[__builtin_ctz(equals)]);
    return far;
  }

  KP_INLINE Farthest lower(int64_t bucket, const T* q, Farthest before) {
    Vec<T> most;
    if (!points_.lower(first_[bucket], first_[bucket + 1], q, &most)) return before;
    const bool stays = mask_eq(most, broadcast(before.distance));
    const T distance = stays ? before.distance : largest_lane<T>(most);
    return {distance, packed_ids_[points_.find(first_[bucket], distance)]};
  }

  static constexpr int max_depth = 64;
  int dimension_ = D, levels_ = 0;
  int64_t buckets_ = 0, level_[max_levels];
  int64_t stride_ = 0;
  Buffer<T> x_, data_, nodes_;
  Buffer<int32_t> ids_, packed_ids_, node_ids_;
  Buffer<int64_t> begin_, first_;
  PointBlocks<T, D> points_{nullptr, D};
};

// Building the buckets of 100,000 points costs as much as 110 steps of the scan in 3-D and 200 in 6-D. For more steps,
// buckets are slower only if the points fill 16 dimensions evenly (1.3 times the time of the scan for 2,048 of 50,000)
// and 13 times faster if they lie on a surface in them.
bool use_buckets(Sampling method, int64_t count, int dimension) {
  return method == Sampling::fastest ? count >= 32 * dimension : method == Sampling::bucketed;
}

template <class T, int D>
Status sample(const FarthestPoints& args, int32_t* index) {
  const auto* splits = as<int64_t>(args.row_splits);
  const auto* out_splits = as<int64_t>(args.out_row_splits);
  const auto* start = as<int64_t>(args.start);
  const int64_t items = args.row_splits.rows - 1;
  const int dimension = int(args.points.cols);
  const T min_distance = T(args.min_distance);
  const int64_t cost =
      args.points.rows + 32 * out_splits[items];  // a step costs as much as putting 32 points in buckets
  const int threads = useful_threads(int(smaller<int64_t>(args.threads, items)), cost, 1 << 10);
  bool enough = true, measurable = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough, measurable)
  {
    Buckets<T, D> buckets;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < items; ++b) {
      const int64_t n = splits[b + 1] - splits[b], count = out_splits[b + 1] - out_splits[b];
      if (!enough || !measurable || !count) continue;
      const SampledItem<T> item{as<T>(args.points) + splits[b] * dimension,
                                n,
                                dimension,
                                start[b],
                                count,
                                min_distance * min_distance,
                                index + out_splits[b],
                                int32_t(splits[b])};
      const int threads = items == 1 ? args.threads : 1;
      double low[max_dimension], high[max_dimension];
      measurable = bounding_box<T, D>(item.points, n, threads, low, high, dimension) &&
                   is_measurable<T>(Metric::l2, low, high, dimension, false);
      if (!measurable) continue;
      if (use_buckets(args.method, count, dimension))
        enough = buckets.build(item) && buckets.sample(item);
      else
        enough = scan<T, D>(item, threads);
    }
  }
  return !measurable ? Status::not_finite : enough ? Status::ok : Status::out_of_memory;
}

}  // namespace

Status farthest_points(const FarthestPoints& args) {
  auto* const index = into<int32_t>(args.index);
  const Array& points = args.points;
  const auto with_dimension = [&](auto t) {
    using T = decltype(t);
    if (points.cols == 2) return sample<T, 2>(args, index);
    return points.cols == 3 ? sample<T, 3>(args, index) : sample<T, 0>(args, index);
  };
  return with_real(points.dtype, with_dimension);
}

}  // namespace KP_ISA
}  // namespace kp
