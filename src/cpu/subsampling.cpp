// Grid subsampling: sorts points by (batch item, Morton key of their voxel), then reduces the points of each voxel.
//
// The sort is stable and each voxel is reduced by one thread, so sums run over a voxel's points in input order and no
// result depends on the number of threads. The Morton key of a voxel interleaves the bits of its indices along the
// axes; an axis has only as many bits as its range needs, which saves sorting passes and does not change the order.

#include "formulas/subsampling.h"

#include <new>

#include "geometry.h"
#include "simd.h"
#include "sort.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int max_axis_bits = 21;

// Computes Morton keys, with x in the lowest bit. table[axis][byte][value] holds the bits of a byte of an index at
// their places in the key.
template <int D>
struct Interleaver {
  uint64_t table[D][3][256];
  int bits = 0, bytes = 1;

  explicit Interleaver(const int* axis_bits) {
    uint64_t place[D][24] = {};
    for (int level = 0; level < max_axis_bits; ++level)
      for (int a = 0; a < D; ++a)
        if (level < axis_bits[a]) {
          place[a][level] = uint64_t(1) << bits++;
          bytes = level / 8 + 1;
        }
    for (int a = 0; a < D; ++a)
      for (int byte = 0; byte < 3; ++byte)
        for (int value = 0; value < 256; ++value) {
          table[a][byte][value] = 0;
          for (int bit = 0; bit < 8; ++bit)
            if (value >> bit & 1) table[a][byte][value] |= place[a][8 * byte + bit];
        }
  }
  uint64_t key(const uint32_t* voxel) const {
    uint64_t key = 0;
    for (int byte = 0; byte < bytes; ++byte)
      for (int a = 0; a < D; ++a) key |= table[a][byte][voxel[a] >> 8 * byte & 255];
    return key;
  }
};

// The state of a subsampling between counting and filling.
struct Plan {
  GridSubsample args;
  Buffer<double> origins;  // (1, D) for all items or (B, D); the values are of the geometry dtype
  Buffer<int32_t> ids;     // points in the order of their voxels
  Buffer<uint32_t> begin;  // first point of each voxel, and a sentinel
  int64_t voxels = 0;

  bool has_item_origins() const { return !args.origin.data || args.origin.cols > 1; }
  const double* origin(int64_t item) const {
    return origins.data() + (has_item_origins() ? item * args.points.cols : 0);
  }
};

// Finds where voxels begin among the sorted points: the first position of every run of equal keys.
template <class K>
Status find_voxels(const K* keys, int64_t n, int threads, Plan& plan) {
  threads = useful_threads(threads, n, 1 << 16);
  Buffer<int64_t> counts;
  if (!counts.resize(threads)) return Status::out_of_memory;
  bool enough = true;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num();
    const Share share(n, t, omp_get_num_threads());
    int64_t v = 0;
    for (int64_t i = share.begin; i < share.end; ++i) v += !i || keys[i] != keys[i - 1];
    counts[t] = v;
#pragma omp barrier
#pragma omp single
    {
      int64_t sum = 0;
      for (int u = 0; u < omp_get_num_threads(); ++u) {
        const int64_t count = counts[u];
        counts[u] = sum;
        sum += count;
      }
      plan.voxels = sum;
      enough = plan.begin.resize(sum + 1);
      if (enough) plan.begin[sum] = uint32_t(n);
    }
    v = counts[t];
    for (int64_t i = share.begin; enough && i < share.end; ++i)
      if (!i || keys[i] != keys[i - 1]) plan.begin[v++] = uint32_t(i);
  }
  return enough ? Status::ok : Status::out_of_memory;
}

template <class T, int D, class K>
Status sort_points(const Interleaver<D>& interleaver, const double* low, int bits, Plan& plan) {
  const GridSubsample& args = plan.args;
  const auto* points = as<T>(args.points);
  const auto* splits = as<int64_t>(args.row_splits);
  const int64_t n = args.points.rows;
  Buffer<K> keys;
  if (!keys.resize(n) || !plan.ids.resize(n)) return Status::out_of_memory;
#pragma omp parallel num_threads(useful_threads(args.threads, n, 1 << 13))
  {
    const Share share(n, omp_get_thread_num(), omp_get_num_threads());
    constexpr int64_t block = 64;
    int64_t item = 0;
    T voxel_size[block * D], origin[block * D];  // repeated for every point of a block: one loop over all coordinates
    const auto repeat_origin = [&](int64_t count) {
      const double* const item_origin = plan.origin(item);
      for (int64_t j = 0; j < count * D; ++j) origin[j] = T(item_origin[j % D]);
    };
    for (int64_t j = 0; j < block * D; ++j) voxel_size[j] = as<T>(args.voxel_size)[j % D];
    if (!plan.has_item_origins()) repeat_origin(block);
    for (int64_t i = share.begin, count; i < share.end; i += count) {
      count = smaller(block, share.end - i);
      if (plan.has_item_origins()) {
        while (i >= splits[item + 1]) ++item;
        count = smaller(count, splits[item + 1] - i);
        repeat_origin(count);
      }
      T voxel[block * D];
      for (int64_t j = 0; j < count * D; ++j) voxel[j] = voxel_index(points[i * D + j], origin[j], voxel_size[j]);
      for (int64_t j = 0; j < count; ++j) {
        while (i + j >= splits[item + 1]) ++item;
        uint32_t offset[D];
        for (int a = 0; a < D; ++a) offset[a] = uint32_t(int64_t(double(voxel[j * D + a]) - low[item * D + a]));
        keys[i + j] = K(interleaver.key(offset) | (interleaver.bits < 64 ? uint64_t(item) << interleaver.bits : 0));
        plan.ids[i + j] = int32_t(i + j);
      }
    }
  }
  if (Status status = radix_sort(keys, plan.ids, n, bits, args.threads); status != Status::ok) return status;
  return find_voxels(keys.data(), n, args.threads, plan);
}

template <class T, int D>
Status count(const GridSubsample& args, int64_t* row_splits, void** result) {
  Plan* const plan = static_cast<Plan*>(malloc(sizeof(Plan)));
  if (!plan) return Status::out_of_memory;
  new (plan) Plan();
  *result = plan;
  plan->args = args;
  const auto* points = as<T>(args.points);
  const auto* voxel_size = as<T>(args.voxel_size);
  const auto* splits = as<int64_t>(args.row_splits);
  const int64_t items = args.row_splits.rows - 1;
  memset(row_splits, 0, size_t(items + 1) * sizeof(int64_t));
  if (!args.points.rows) return Status::ok;

  Buffer<double> low;
  const int64_t num_origins = plan->has_item_origins() ? items : 1;
  if (!low.resize(items * D) || !plan->origins.resize(num_origins * D)) return Status::out_of_memory;
  for (int64_t j = 0; j < num_origins * D; ++j)
    plan->origins[j] = args.origin.data ? double(as<T>(args.origin)[j]) : 0;  // 0 remains for empty items
  int axis_bits[D] = {};
  for (int64_t b = 0; b < items; ++b) {
    double high[D];
    if (!bounding_box<T, D>(points + splits[b] * D, splits[b + 1] - splits[b], args.threads, &low[b * D], high))
      return Status::not_finite;
    if (splits[b] == splits[b + 1]) continue;
    for (int a = 0; a < D; ++a) {
      if (!args.origin.data) plan->origins[b * D + a] = double(published_origin(T(low[b * D + a]), voxel_size[a]));
      // Subtraction, division and floor are monotonic, so the voxels of the box's corners bound those of all points.
      const T origin = T(plan->origin(b)[a]);
      low[b * D + a] = double(voxel_index(T(low[b * D + a]), origin, voxel_size[a]));
      const double range = double(voxel_index(T(high[a]), origin, voxel_size[a])) - low[b * D + a];
      if (!(range < double(1 << max_axis_bits))) return Status::out_of_range;
      axis_bits[a] = larger(axis_bits[a], bits_for(uint64_t(range)));
    }
  }
  const Interleaver<D> interleaver(axis_bits);
  const int bits = larger(1, interleaver.bits + bits_for(uint64_t(items - 1)));
  if (bits > 64) return Status::out_of_range;
  const Status status = bits <= 32 ? sort_points<T, D, uint32_t>(interleaver, low.data(), bits, *plan)
                                   : sort_points<T, D, uint64_t>(interleaver, low.data(), bits, *plan);
  if (status != Status::ok) return status;
  // Points are sorted by item first, so an item's first voxel begins at the item's first point.
  for (int64_t b = 1, v = 0; b <= items; ++b) {
    while (int64_t(plan->begin[v]) < splits[b]) ++v;
    row_splits[b] = v;
  }
  return Status::ok;
}

// The points of a voxel lie anywhere in memory, so every row is a cache miss unless prefetched: sixteen points ahead,
// also beyond the voxel's end (Buffers have that much room past their end).
constexpr int64_t prefetch_distance = 16;

// The mean of a voxel's rows. Differences from the first row are summed: they are as small as the voxel, so no
// precision is lost far from the origin.
template <class T>
KP_INLINE void mean_row(const T* rows, int64_t columns, const int32_t* ids, int64_t n, double* sums, T* mean) {
  const T* const first = rows + ids[0] * columns;
  for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
  __builtin_prefetch(rows + ids[prefetch_distance] * columns);
  for (int64_t i = 1; i < n; ++i) {
    __builtin_prefetch(rows + ids[i + prefetch_distance] * columns);
    const T* const row = rows + ids[i] * columns;
    for (int64_t c = 0; c < columns; ++c) sums[c] += double(row[c]) - double(first[c]);
  }
  for (int64_t c = 0; c < columns; ++c) mean[c] = T(double(first[c]) + sums[c] / double(n));
}

// The maximum of each column of a voxel's rows. Unless argmax_row is null, also the rows with the maxima, padded to
// whole vectors.
template <class T>
KP_INLINE void max_row(const T* rows, int64_t columns, const int32_t* ids, int64_t n, T* largest,
                       IndexBeside<T>* argmax_row) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    const int width = int(smaller<int64_t>(lanes<T>, columns - c));
    const auto row = [&](int32_t i) {
      const T* const p = rows + i * columns + c;
      return width == lanes<T> ? load(p) : load_first(p, width);
    };
    Vec<T> most = row(ids[0]);
    Vec<IndexBeside<T>> argmax = broadcast(IndexBeside<T>(ids[0]));
    for (int64_t i = 1; i < n; ++i) {
      if (!c) __builtin_prefetch(rows + ids[i + prefetch_distance] * columns);
      const Vec<T> x = row(ids[i]);
      const auto more = exceeds(x, most);
      most = more ? x : most;
      argmax = more ? broadcast(IndexBeside<T>(ids[i])) : argmax;
    }
    store_first(largest + c, width, most);
    if (argmax_row) store(argmax_row + c, argmax);
  }
}

// Finds the most frequent label of a voxel in one column of labels; of equally frequent labels the smallest. Labels of
// a range below 65,536 are counted with one counter each, others are sorted.
//
// U is the unsigned integer of the size of a label, `sign` its highest bit if labels are signed, else 0: with this bit
// inverted, labels are in the order of unsigned integers. In here all labels are.
template <class U>
class LabelVote {
 public:
  LabelVote(const GridSubsample& args, int64_t column, U sign, U smallest, U largest)
      : labels_(as<U>(args.labels) + column),
        columns_(args.labels.cols),
        sign_(sign),
        smallest_(smallest),
        ignored_(U(U(args.ignore_label.value) ^ sign)),
        has_ignored_(args.ignore_label.is_set),
        use_counters_(U(largest - smallest) < (1 << 16)) {
    if (!use_counters_) return;
    range_ = uint64_t(U(largest - smallest)) + 1;
    enough_ = counts_.resize(int64_t(range_));
    if (enough_) memset(counts_.data(), 0, size_t(range_) * sizeof(int32_t));
  }
  bool enough() const { return enough_; }

  // Returns false if memory runs out.
  bool vote(const int32_t* ids, int64_t n, U* winner) {
    U label = ignored_;
    const bool enough = use_counters_ ? count(ids, n, &label) : sort(ids, n, &label);
    *winner = U(label ^ sign_);
    return enough;
  }

 private:
  U label_of(int32_t id) const { return U(read_once(labels_ + id * columns_) ^ sign_); }
  bool is_ignored(U label) const { return has_ignored_ && label == ignored_; }
  // The counter of a label. At least range_ if the caller changed the label after smallest and largest were determined.
  uint64_t counter_of(U label) const { return uint64_t(label) - uint64_t(smallest_); }

  // The counters used are reset by going over the points again.
  bool count(const int32_t* ids, int64_t n, U* winner) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const U label = label_of(ids[i]);
      if (is_ignored(label) || counter_of(label) >= range_) continue;
      const int32_t c = ++counts_[int64_t(counter_of(label))];
      if (c > most || (c == most && label < *winner)) {
        most = c;
        *winner = label;
      }
    }
    for (int64_t i = 0; i < n; ++i)
      if (const uint64_t at = counter_of(label_of(ids[i])); at < range_) counts_[int64_t(at)] = 0;
    return true;
  }
  bool sort(const int32_t* ids, int64_t n, U* winner) {
    if (!a_.resize(n) || !spare_.resize(n)) return false;
    int64_t voters = 0;
    for (int64_t i = 0; i < n; ++i) {
      const U label = label_of(ids[i]);
      if (!is_ignored(label)) a_[voters++] = label;
    }
    const U* sorted = merge_sort(a_.data(), spare_.data(), voters, int64_t(1), [](U a, U b) { return a < b; });
    int64_t most = 0;
    for (int64_t i = 0, run = 0; i < voters; ++i) {
      run = i && sorted[i] == sorted[i - 1] ? run + 1 : 1;
      if (run > most) {
        most = run;
        *winner = sorted[i];
      }
    }
    return true;
  }

  const U* labels_;
  int64_t columns_;
  U sign_, smallest_, ignored_;
  uint64_t range_ = 0;
  bool has_ignored_, use_counters_, enough_ = true;
  Buffer<int32_t> counts_;
  Buffer<U> a_, spare_;
};

constexpr int64_t voxels_per_block = 1024;

// Calls visit(state, voxel, ids of its points, number of points) for every voxel. Each thread creates a state with
// make().
template <class Make, class Visit>
Status for_each_voxel(const Plan& plan, Make make, Visit visit) {
  const int64_t blocks = (plan.voxels + voxels_per_block - 1) / voxels_per_block;
  bool enough = true;
#pragma omp parallel num_threads(useful_threads(plan.args.threads, plan.args.points.rows, 1 << 12)) \
    reduction(&& : enough)
  {
    auto state = make();
    enough = state.enough();
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = smaller(plan.voxels, (block + 1) * voxels_per_block);
      for (int64_t v = block * voxels_per_block; enough && v < end; ++v)
        enough = visit(state, v, &plan.ids[plan.begin[v]], int64_t(plan.begin[v + 1]) - plan.begin[v]);
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

template <class T>
struct RowScratch {
  Buffer<T> values;
  bool reserved;
  explicit RowScratch(int64_t columns) : reserved(values.resize(columns)) {}
  bool enough() const { return reserved; }
};

template <class T>
Status average(const Plan& plan, const Array& rows, const Array& means) {
  const auto* from = as<T>(rows);
  auto* to = into<T>(means);
  const int64_t columns = rows.cols;
  return for_each_voxel(
      plan, [=] { return RowScratch<double>(columns); },
      [=](RowScratch<double>& sums, int64_t v, const int32_t* ids, int64_t n) {
        if (columns == 3)
          mean_row<T>(from, 3, ids, n, sums.values.data(), to + v * 3);
        else
          mean_row<T>(from, columns, ids, n, sums.values.data(), to + v * columns);
        return true;
      });
}

// The point of a voxel nearest to its center, of equally near ones the first.
template <class T, int D>
int32_t nearest_point(const T* points, const double* center, const int32_t* ids, int64_t n) {
  int32_t nearest = ids[0];
  double smallest = squared_distance<D>(points + nearest * int64_t(D), center);
  __builtin_prefetch(points + ids[prefetch_distance] * int64_t(D));
  for (int64_t i = 1; i < n; ++i) {
    __builtin_prefetch(points + ids[i + prefetch_distance] * int64_t(D));
    const double squared = squared_distance<D>(points + ids[i] * int64_t(D), center);
    if (squared < smallest) smallest = squared, nearest = ids[i];
  }
  return nearest;
}

void copy_row(const Array& from, int64_t i, const Array& to, int64_t v) {
  const int64_t bytes = from.cols * size_of(from.dtype);
  memcpy(into<char>(to) + v * bytes, as<char>(from) + i * bytes, size_t(bytes));
}

struct NoState {
  bool enough() const { return true; }
};

// The origin of an item's grid, in the geometry dtype.
template <class T, int D>
struct GridOrigin {
  T origin[D];
  explicit GridOrigin(const double* from) {
    for (int a = 0; a < D; ++a) origin[a] = T(from[a]);
  }
  bool enough() const { return true; }
};

// The batch item of a point: the last one that begins at or before it.
int64_t item_of(const Array& row_splits, int64_t point) {
  const auto* splits = as<int64_t>(row_splits);
  int64_t first = 0, last = row_splits.rows - 1;
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (splits[middle] <= point ? first : last) = middle;
  }
  return first;
}

// Writes the outputs that depend on voxel centers: the centers, the nearest points, and their coordinates and features.
template <class T, int D>
Status write_centers_and_nearest(const Plan& plan, const Subsampled& out) {
  const GridSubsample& args = plan.args;
  const auto* points = as<T>(args.points);
  const auto* voxel_size = as<T>(args.voxel_size);
  auto* const centers = into<T>(out.points);
  auto* const nearest = into<int32_t>(out.nearest);
  const bool has_item_origins = plan.has_item_origins();
  return for_each_voxel(
      plan, [&] { return GridOrigin<T, D>(plan.origin(0)); },
      [=, &args, &plan](GridOrigin<T, D>& corner, int64_t v, const int32_t* ids, int64_t n) {
        if (has_item_origins) corner = GridOrigin<T, D>(plan.origin(item_of(args.row_splits, ids[0])));
        double center[D];
        for (int a = 0; a < D; ++a) {
          const T index = voxel_index(points[ids[0] * int64_t(D) + a], corner.origin[a], voxel_size[a]);
          center[a] = voxel_center(index, corner.origin[a], voxel_size[a]);
        }
        if (args.position == VoxelPoint::center)
          for (int a = 0; a < D; ++a) centers[v * D + a] = T(center[a]);
        if (!nearest) return true;
        nearest[v] = nearest_point<T, D>(points, center, ids, n);
        if (args.position == VoxelPoint::nearest) copy_row(args.points, nearest[v], out.points, v);
        if (args.feature == VoxelFeature::nearest && args.features.data)
          copy_row(args.features, nearest[v], out.features, v);
        return true;
      });
}

template <class T>
Status maximize(const Plan& plan, const Array& rows, const Array& maxima) {
  const auto* from = as<T>(rows);
  auto* to = into<T>(maxima);
  const int64_t columns = rows.cols;
  return for_each_voxel(
      plan, [] { return NoState(); },
      [=](NoState&, int64_t v, const int32_t* ids, int64_t n) {
        max_row<T>(from, columns, ids, n, to + v * columns, nullptr);
        return true;
      });
}

// One column after the other. `sign`: see LabelVote.
template <class U>
Status vote_labels(const Plan& plan, const Array& labels, U sign) {
  const Array& from = plan.args.labels;
  const int64_t n = from.rows, columns = from.cols;
  Status status = Status::ok;
  for (int64_t c = 0; status == Status::ok && c < columns; ++c) {
    U smallest = U(as<U>(from)[c] ^ sign), largest = smallest;
    const auto extend = [&, column = as<U>(from) + c](auto stride) {
      for (int64_t i = 1; i < n; ++i) {
        const U label = U(column[i * stride] ^ sign);
        smallest = smaller(smallest, label);
        largest = larger(largest, label);
      }
    };
    if (columns == 1)  // vectorized
      extend(std::integral_constant<int64_t, 1>());
    else
      extend(columns);
    status = for_each_voxel(
        plan, [&, c] { return LabelVote<U>(plan.args, c, sign, smallest, largest); },
        [=, to = into<U>(labels) + c](LabelVote<U>& majority, int64_t v, const int32_t* ids, int64_t n) {
          return majority.vote(ids, n, to + v * columns);
        });
  }
  return status;
}
Status vote_labels(const Plan& plan, const Array& labels) {
  switch (labels.dtype) {
    case DType::int8:
      return vote_labels(plan, labels, uint8_t(1 << 7));
    case DType::uint8:
      return vote_labels(plan, labels, uint8_t(0));
    case DType::int16:
      return vote_labels(plan, labels, uint16_t(1 << 15));
    case DType::uint16:
      return vote_labels(plan, labels, uint16_t(0));
    case DType::int32:
      return vote_labels(plan, labels, uint32_t(1) << 31);
    case DType::uint32:
      return vote_labels(plan, labels, uint32_t(0));
    case DType::int64:
      return vote_labels(plan, labels, uint64_t(1) << 63);
    default:
      return vote_labels(plan, labels, uint64_t(0));
  }
}

// Backward of a mean: each point receives its voxel's gradient divided by the number of points. Backward of "nearest":
// the nearest point receives all of it, the others zero.
template <class T>
Status spread_gradient(const GridSubsampleGrad& args) {
  const Array& grad_features = args.grad_features;
  const auto* inverse = as<int32_t>(args.inverse);
  const auto* counts = as<int32_t>(args.counts);
  const auto* nearest = as<int32_t>(args.nearest);
  const auto* grad_out = as<T>(args.grad_out);
  auto* const to = into<T>(grad_features);
  const int64_t n = args.inverse.rows, columns = grad_features.cols;
#pragma omp parallel for num_threads(useful_threads(args.threads, n, 1 << 13)) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t v = inverse[i];
    const T* const grad_row = grad_out + v * columns;
    T* const row = to + i * columns;
    if (args.feature == VoxelFeature::mean)
      for (int64_t c = 0; c < columns; ++c) row[c] = grad_row[c] / T(counts[v]);
    else if (nearest[v] == i)
      memcpy(row, grad_row, size_t(columns) * sizeof(T));
    else
      memset(row, 0, size_t(columns) * sizeof(T));
  }
  return Status::ok;
}

// Restores the points of each voxel, in input order, from `inverse` and `counts`.
Status group_by_voxel(const GridSubsampleGrad& args, Plan& plan) {
  const auto* inverse = as<int32_t>(args.inverse);
  const auto* counts = as<int32_t>(args.counts);
  const int64_t n = args.inverse.rows;
  plan.args.points = args.inverse;
  plan.args.threads = args.threads;
  plan.voxels = args.counts.rows;
  if (!plan.ids.resize(n) || !plan.begin.resize(plan.voxels + 1)) return Status::out_of_memory;
  uint32_t* const next = plan.begin.data() + 1;  // where a voxel's next point goes; finally the end of the voxel
  plan.begin[0] = 0;
  for (int64_t v = 0, sum = 0; v < plan.voxels; ++v) next[v] = uint32_t(sum), sum += counts[v];
  for (int64_t i = 0; i < n; ++i) plan.ids[next[inverse[i]]++] = int32_t(i);
  return Status::ok;
}

template <class T>
struct Maxima {
  RowScratch<T> largest;
  RowScratch<IndexBeside<T>> argmax;
  explicit Maxima(int64_t columns) : largest(columns), argmax(columns) {}
  bool enough() const { return largest.reserved && argmax.reserved; }
};

// Backward of a maximum: the row with the maximum of a column receives the gradient, the others zero.
template <class T>
Status gradient_of_maxima(const GridSubsampleGrad& args) {
  const Array& grad_features = args.grad_features;
  const auto* features = as<T>(args.features);
  const auto* grad_out = as<T>(args.grad_out);
  auto* const to = into<T>(grad_features);
  const int64_t columns = grad_features.cols;
  Plan plan;
  if (Status status = group_by_voxel(args, plan); status != Status::ok) return status;
  return for_each_voxel(
      plan, [=] { return Maxima<T>(columns); },
      [=](Maxima<T>& maxima, int64_t v, const int32_t* ids, int64_t n) {
        IndexBeside<T>* const argmax = maxima.argmax.values.data();
        max_row<T>(features, columns, ids, n, maxima.largest.values.data(), argmax);
        const T* const grad_row = grad_out + v * columns;
        for (int64_t i = 0; i < n; ++i) {
          T* const row = to + ids[i] * columns;
          for (int64_t c = 0; c < columns; ++c) row[c] = argmax[c] == ids[i] ? grad_row[c] : T(0);
        }
        return true;
      });
}

}  // namespace

Status grid_subsample_count(const GridSubsample& args, int64_t* row_splits, void** plan) {
  return with_geometry(args.points.dtype, args.points.cols,
                       [&](auto t, auto d) { return count<decltype(t), decltype(d)::value>(args, row_splits, plan); });
}

Status grid_subsample_fill(void* opaque, const Subsampled& out) {
  const Plan& plan = *static_cast<Plan*>(opaque);
  const GridSubsample& args = plan.args;
  if (!plan.voxels) return Status::ok;
  auto* const inverse = into<int32_t>(out.inverse);
  auto* const counts = into<int32_t>(out.counts);
  const auto write_means = [&](const Array& rows, const Array& means) {
    return with_real(rows.dtype, [&](auto t) { return average<decltype(t)>(plan, rows, means); });
  };
  Status status = Status::ok;
  if (args.position == VoxelPoint::barycenter) status = write_means(args.points, out.points);
  if (status == Status::ok && (args.position == VoxelPoint::center || out.nearest.data))
    status = with_geometry(args.points.dtype, args.points.cols, [&](auto t, auto d) {
      return write_centers_and_nearest<decltype(t), decltype(d)::value>(plan, out);
    });
  if (status == Status::ok)
    status = for_each_voxel(
        plan, [] { return NoState(); },
        [=](NoState&, int64_t v, const int32_t* ids, int64_t n) {
          counts[v] = int32_t(n);
          for (int64_t i = 0; i < n; ++i) inverse[ids[i]] = int32_t(v);
          return true;
        });
  if (status == Status::ok && args.features.data) {
    if (args.feature == VoxelFeature::mean)
      status = write_means(args.features, out.features);
    else if (args.feature == VoxelFeature::max)
      status = with_real(args.features.dtype,
                         [&](auto t) { return maximize<decltype(t)>(plan, args.features, out.features); });
  }
  if (status == Status::ok && args.labels.data) status = vote_labels(plan, out.labels);
  return status;
}

Status grid_subsample_grad(const GridSubsampleGrad& args) {
  return with_real(args.features.dtype, [&](auto t) {
    using T = decltype(t);
    return args.feature == VoxelFeature::max ? gradient_of_maxima<T>(args) : spread_gradient<T>(args);
  });
}

void grid_subsample_free(void* plan) {
  static_cast<Plan*>(plan)->~Plan();
  free(plan);
}

}  // namespace KP_ISA
}  // namespace kp
