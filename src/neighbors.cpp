// Fixed-radius search over a cell list without a cell table, and the transpose of a neighbour list.
//
// Points are sorted by cell, cells by row: a row is all cells of equal (item, z, y), its points are contiguous and in
// x order. A query looks at 3^(D-1) rows; its candidates in each are one run. Queries are visited in the same order, so
// the runs move along their rows like fingers, and nothing depends on how large or how empty the bounding box is.
// The candidates of a cell are copied side by side once, sorted by index if the result is to be, and then every query
// of the cell tests them all: no tree, no branch per candidate, and rows come out sorted because the candidates are.

#include "neighbors.h"

#include <math.h>

#include <new>

#include "geometry.h"
#include "kernels.h"
#include "sort.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int max_cell_bits = 21;  // cells per axis; a box wider than 2^21 radii gets wider cells

// Where the cells are. Fields of a key from the top: item, z, y, x; each cell number is stored plus one, so that the
// rows beside a row have the keys beside its key.
template <class T, int D>
struct Lattice {
  double low[D], per_cell[D];  // cell number = (p - low) * per_cell
  int64_t cells[D];
  int shift[D], item_shift, bits;

  uint64_t key(int64_t item, const T* p) const {
    uint64_t key = uint64_t(item) << item_shift;
    for (int a = 0; a < D; ++a) {
      // Queries may lie anywhere; beyond the first empty cell they all see nothing.
      double c = (double(p[a]) - low[a]) * per_cell[a];
      c = smaller(larger(floor(c), -1.0), double(cells[a]));
      key |= uint64_t(int64_t(c) + 1) << shift[a];
    }
    return key;
  }
};

template <class T, int D>
Lattice<T, D> make_lattice(const double* low, const double* high, double radius, int64_t items) {
  Lattice<T, D> lattice;
  const int item_bits = bits_for(uint64_t(items));
  const int axis_bits = smaller(max_cell_bits, (63 - item_bits) / D);
  // A little wider than the radius: the test rounds (relative 4e-7 in float32), and may see pairs just beyond it.
  const double width = radius * (1 + 1e-5);
  int shift = 0;
  for (int a = 0; a < D; ++a) {
    const double widest = ldexp(1.0, axis_bits) - 3;
    const double extent = smaller(high[a] - low[a], 1e308);  // the difference of two finite numbers may be infinite
    const double side = larger(width, extent * (1 + 1e-9) / widest);
    lattice.low[a] = low[a];
    lattice.per_cell[a] = 1 / side;
    lattice.cells[a] = int64_t(extent * lattice.per_cell[a]) + 1;
    lattice.shift[a] = shift;
    shift += bits_for(uint64_t(lattice.cells[a]) + 1);
  }
  lattice.item_shift = shift;
  lattice.bits = shift + item_bits;
  return lattice;
}

// Points in cell order, one array per axis.
template <class T, int D>
struct Sorted {
  Buffer<uint64_t> keys;
  Buffer<int32_t> ids;
  Buffer<T> x[D];

  Status sort(const Lattice<T, D>& lattice, const T* points, const int64_t* row_splits, int64_t items, int64_t n,
              int threads) {
    if (!keys.resize(n) || !ids.resize(n)) return Status::out_of_memory;
    for (int a = 0; a < D; ++a)
      if (!x[a].resize(n)) return Status::out_of_memory;
    threads = useful_threads(threads, n, 1 << 13);
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      int64_t item = 0;
      for (int64_t i = share.begin; i < share.end; ++i) {
        while (item + 1 < items && i >= row_splits[item + 1]) ++item;
        keys[i] = lattice.key(item, points + i * D);
        ids[i] = int32_t(i);
      }
    }
    if (Status status = radix_sort(keys, ids, n, lattice.bits, threads); status != Status::ok) return status;
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      for (int64_t i = share.begin; i < share.end; ++i) {
        if (i + 16 < n) __builtin_prefetch(points + int64_t(ids[i + 16]) * D);
        for (int a = 0; a < D; ++a) x[a][i] = points[int64_t(ids[i]) * D + a];
      }
    }
    return Status::ok;
  }
};

// The occupied cells and rows of sorted points; both end with a sentinel.
struct Directory {
  Buffer<uint32_t> cell_x, cell_begin, row_cell;
  Buffer<uint64_t> row_key;
  int64_t cells, rows;

  Status build(const uint64_t* keys, int64_t n, int x_bits, int threads) {
    threads = useful_threads(threads, n, 1 << 16);
    Buffer<int64_t> found;  // per thread: cells, rows
    if (!found.resize(2 * threads)) return Status::out_of_memory;
    bool enough = true;
    const uint64_t x_mask = (uint64_t(1) << x_bits) - 1;
#pragma omp parallel num_threads(threads)
    {
      const int t = omp_get_thread_num();
      const Share share(n, t, omp_get_num_threads());
      int64_t c = 0, r = 0;
      for (int64_t i = share.begin; i < share.end; ++i) {
        const uint64_t change = i ? keys[i] ^ keys[i - 1] : ~uint64_t(0);
        c += change != 0;
        r += change > x_mask;
      }
      found[2 * t] = c;
      found[2 * t + 1] = r;
#pragma omp barrier
#pragma omp single
      {
        cells = rows = 0;
        for (int u = 0; u < omp_get_num_threads(); ++u) {
          const int64_t cell_count = found[2 * u], row_count = found[2 * u + 1];
          found[2 * u] = cells;
          found[2 * u + 1] = rows;
          cells += cell_count;
          rows += row_count;
        }
        enough =
            cell_x.resize(cells) && cell_begin.resize(cells + 1) && row_cell.resize(rows + 1) && row_key.resize(rows);
        if (enough) {
          cell_begin[cells] = uint32_t(n);
          row_cell[rows] = uint32_t(cells);
        }
      }
      if (enough) {
        c = found[2 * t];
        r = found[2 * t + 1];
        for (int64_t i = share.begin; i < share.end; ++i) {
          const uint64_t change = i ? keys[i] ^ keys[i - 1] : ~uint64_t(0);
          if (!change) continue;
          if (change > x_mask) {
            row_key[r] = keys[i] >> x_bits;
            row_cell[r++] = uint32_t(c);
          }
          cell_x[c] = uint32_t(keys[i] & x_mask);
          cell_begin[c++] = uint32_t(i);
        }
      }
    }
    return enough ? Status::ok : Status::out_of_memory;
  }
};

// The first position in [from, end) whose value is not below `value`, looked for in growing steps from `from`.
template <class K>
int64_t gallop(const K* values, int64_t from, int64_t end, K value) {
  int64_t step = 1, low = from, high = from;
  while (high < end && values[high] < value) {
    low = high + 1;
    high += step;
    step *= 2;
  }
  high = smaller(high, end);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One of the rows beside the current one, and the window of its cells within one cell of the current x.
struct Finger {
  int64_t offset;   // of the row's key
  int64_t row = 0;  // first row whose key is not below the wanted one
  int64_t low = 0, high = 0, end = 0;
};

template <class T, int D>
struct Plan {
  RadiusSearch args;
  Lattice<T, D> lattice;
  Directory directory;
  Sorted<T, D> points, other;
  const Sorted<T, D>* queries;
  int64_t* row_splits;
  int64_t num_queries, longest = 0;
  T squared_radius;
};

// Moves through the sorted queries and holds the candidates of the current cell.
template <class T, int D>
class Walker {
 public:
  explicit Walker(const Plan<T, D>& plan) : plan_(plan) {
    const int row_shift = plan.lattice.shift[1];
    for (int i = 0; i < fingers; ++i) {
      int64_t offset = (i % 3 - 1) * (int64_t(1) << plan.lattice.shift[1]);
      if (D == 3) offset += (i / 3 - 1) * (int64_t(1) << plan.lattice.shift[D - 1]);
      finger_[i].offset = offset >> row_shift;
    }
  }

  // Gathers the candidates of the cell `key`, by index if asked. False: no memory.
  bool move_to(uint64_t key, bool by_index) {
    const Directory& dir = plan_.directory;
    const int x_bits = plan_.lattice.shift[1];
    const uint64_t row_key = key >> x_bits;
    const uint32_t x = uint32_t(key & ((uint64_t(1) << x_bits) - 1));
    if (row_key != row_key_) {
      const bool forward = row_key > row_key_ && row_key_ != no_row;
      row_key_ = row_key;
      for (Finger& f : finger_) {
        bool occupied = in_box(row_key, f.offset);
        if (occupied) {
          const uint64_t wanted = row_key + uint64_t(f.offset);
          f.row = gallop(dir.row_key.data(), forward ? f.row : 0, dir.rows, wanted);
          occupied = f.row < dir.rows && dir.row_key[f.row] == wanted;
        }
        f.low = f.high = occupied ? dir.row_cell[f.row] : 0;
        f.end = occupied ? dir.row_cell[f.row + 1] : 0;
      }
    }
    int64_t n = 0;
    int64_t begin[fingers], end[fingers];
    for (int i = 0; i < fingers; ++i) {
      Finger& f = finger_[i];
      f.low = gallop(dir.cell_x.data(), f.low, f.end, x ? x - 1 : 0);
      f.high = gallop(dir.cell_x.data(), larger(f.low, f.high), f.end, x + 2);
      begin[i] = f.low < f.high ? dir.cell_begin[f.low] : 0;
      end[i] = f.low < f.high ? dir.cell_begin[f.high] : 0;
      n += end[i] - begin[i];
    }
    count_ = n;
    for (int a = 0; a < D; ++a)
      if (!x_[a].resize(n + lanes<T>)) return false;
    if (!ids_.resize(n + lanes<T>)) return false;
    int64_t to = 0;
    for (int i = 0; i < fingers; ++i) {
      const int64_t size = end[i] - begin[i];
      for (int a = 0; a < D; ++a) copy_over(&x_[a][to], &plan_.points.x[a][begin[i]], size);
      copy_over(&ids_[to], &plan_.points.ids[begin[i]], size);
      to += size;
    }
    if (by_index && !sort_by_index()) return false;
    for (int l = 0; l < lanes<T>; ++l) x_[0][n + l] = T(NAN);  // no distance to it is within anything
    return true;
  }

  int64_t count_neighbors(const T* q) const {
    int64_t n = 0;
    for (int64_t i = 0; i < count_; i += lanes<T>) n += popcount(within(q, i, nullptr));
    return n;
  }

  // Neighbours of q, in candidate order; ids and d2 have room for the candidates.
  template <bool with_d2>
  int64_t collect(const T* q, int32_t* ids, T* d2) const {
    int64_t n = 0;
    for (int64_t i = 0; i < count_; i += lanes<T>) {
      Vec<T> distance;
      const unsigned mask = within(q, i, &distance);
      if constexpr (with_d2) compress(d2 + n, mask, distance);
      n += compress<T>(ids + n, mask, &ids_[i]);
    }
    return n;
  }

  int64_t candidates() const { return count_; }

 private:
  static constexpr int fingers = D == 3 ? 9 : 3;
  static constexpr uint64_t no_row = ~uint64_t(0);

  // Whether the row beside `row_key` exists at all, so that an offset never reaches into the next field.
  bool in_box(uint64_t row_key, int64_t offset) const {
    const Lattice<T, D>& l = plan_.lattice;
    const uint64_t from = row_key << l.shift[1], to = (row_key + uint64_t(offset)) << l.shift[1];
    const int top = l.item_shift;
    if (from >> top != to >> top) return false;
    for (int a = 1; a < D; ++a) {
      const int bits = (a + 1 < D ? l.shift[a + 1] : top) - l.shift[a];
      const uint64_t mask = (uint64_t(1) << bits) - 1;
      const int64_t difference = int64_t(to >> l.shift[a] & mask) - int64_t(from >> l.shift[a] & mask);
      if (difference < -1 || difference > 1) return false;
    }
    return true;
  }

  // Whole vectors, the last one past the end: into room that the next run overwrites.
  template <class U>
  static void copy_over(U* to, const U* from, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes<U>) store(to + i, load(from + i));
  }

  KP_INLINE unsigned within(const T* q, int64_t i, Vec<T>* distance) const {
    Vec<T> d[D];
    for (int a = 0; a < D; ++a) d[a] = load(&x_[a][i]) - broadcast(q[a]);
    const Vec<T> d2 = squared_distance(d, D);
    if (distance) *distance = d2;
    return mask_le(d2, broadcast(plan_.squared_radius));
  }

  // Sorted once per cell, on (index, position); a dozen queries then find their rows sorted.
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
    K* const keys = sorter.keys(n);
    for (int a = 0; a < D; ++a)
      if (!sorted_x_[a].resize(n + lanes<T>)) return false;
    if (!keys) return false;
    for (int64_t i = 0; i < n; ++i) keys[i] = K(ids_[i] - low) << position_bits | K(i);
    const K* const sorted = sorter.sort(n);
    const K mask = (K(1) << position_bits) - 1;
    int32_t* const ids = ids_.data();
    const T* from[D];
    T* to[D];
    for (int a = 0; a < D; ++a) from[a] = x_[a].data(), to[a] = sorted_x_[a].data();
    for (int64_t i = 0; i < n; ++i) ids[i] = int32_t(sorted[i] >> position_bits) + low;
    for (int64_t i = 0; i < n; ++i)
      for (int a = 0; a < D; ++a) to[a][i] = from[a][sorted[i] & mask];
    for (int a = 0; a < D; ++a) x_[a].swap(sorted_x_[a]);
    return true;
  }

  const Plan<T, D>& plan_;
  Finger finger_[fingers];
  uint64_t row_key_ = no_row;
  Buffer<T> x_[D], sorted_x_[D];
  Buffer<int32_t> ids_;
  Sorter<uint32_t> narrow_;
  Sorter<uint64_t> wide_;
  int64_t count_ = 0;
};

constexpr int64_t block_of_queries = 512;

// Calls visit(walker, query's coordinates, query's id) for every query, cell by cell, blocks of them in parallel.
template <class T, int D, class Scratch, class Announce, class Visit>
Status for_each_query(const Plan<T, D>& plan, bool by_index, Announce announce, Visit visit) {
  const Sorted<T, D>& queries = *plan.queries;
  const int64_t n = plan.num_queries, blocks = (n + block_of_queries - 1) / block_of_queries;
  const int threads = useful_threads(plan.args.threads, blocks, 2);
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    Walker<T, D> walker(plan);
    Scratch scratch;
#pragma omp for schedule(dynamic, 4)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = smaller(n, (b + 1) * block_of_queries);
      for (int64_t i = b * block_of_queries; enough && i < end;) {
        const uint64_t key = queries.keys[i];
        enough = walker.move_to(key, by_index) && scratch.reserve(walker.candidates());
        for (; enough && i < end && queries.keys[i] == key; ++i) {
          // Rows lie where the caller's order puts them; writing to one costs a cache miss unless it was asked for.
          if (i + 16 < n) __builtin_prefetch(&plan.row_splits[queries.ids[i + 16]], 1);
          if (i + 8 < n) announce(queries.ids[i + 8]);
          T q[D];
          for (int a = 0; a < D; ++a) q[a] = queries.x[a][i];
          visit(walker, scratch, q, int64_t(queries.ids[i]));
        }
      }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

struct NoScratch {
  bool reserve(int64_t) { return true; }
};

template <class T, int D>
Status count(const RadiusSearch& args, int64_t* row_splits, void** result) {
  auto* plan = static_cast<Plan<T, D>*>(malloc(sizeof(Plan<T, D>)));
  if (!plan) return Status::out_of_memory;
  new (plan) Plan<T, D>();
  *result = plan;
  plan->args = args;
  plan->row_splits = row_splits;
  const bool self = !args.queries.data;
  const auto* points = static_cast<const T*>(args.points.data);
  const auto* queries = self ? points : static_cast<const T*>(args.queries.data);
  const int64_t n = args.points.rows;
  plan->num_queries = self ? n : args.queries.rows;
  const T radius = T(args.radius);
  plan->squared_radius = radius * radius;

  const int64_t items = args.points_row_splits.rows - 1;
  double low[D], high[D], query_low[D], query_high[D];
  if (!bounding_box<T, D>(points, n, args.threads, low, high)) return Status::not_finite;
  if (!self && !bounding_box<T, D>(queries, plan->num_queries, args.threads, query_low, query_high))
    return Status::not_finite;
  memset(row_splits, 0, size_t(plan->num_queries + 1) * sizeof(int64_t));
  if (!n || !plan->num_queries) return Status::ok;

  plan->lattice = make_lattice<T, D>(low, high, double(radius), items);
  const auto* splits = static_cast<const int64_t*>(args.points_row_splits.data);
  Status status = plan->points.sort(plan->lattice, points, splits, items, n, args.threads);
  if (status == Status::ok)
    status = plan->directory.build(plan->points.keys.data(), n, plan->lattice.shift[1], args.threads);
  plan->queries = &plan->points;
  if (status == Status::ok && !self) {
    splits = static_cast<const int64_t*>(args.queries_row_splits.data);
    status = plan->other.sort(plan->lattice, queries, splits, items, plan->num_queries, args.threads);
    plan->queries = &plan->other;
  }
  if (status != Status::ok) return status;

  int64_t* const counts = row_splits + 1;
  status = for_each_query<T, D, NoScratch>(
      *plan, false, [](int32_t) {},
      [=](const Walker<T, D>& walker, NoScratch&, const T* q, int64_t id) { counts[id] = walker.count_neighbors(q); });
  const int64_t limit = args.max_neighbors < 0 ? INT64_MAX : args.max_neighbors;
  for (int64_t i = 0; i < plan->num_queries; ++i) {
    counts[i] = smaller(counts[i], limit);
    counts[i] += row_splits[i];
  }
  return status;
}

// A row being made: what the query collected, and its sorts. Neither order has equals, since points differ.
template <class T>
struct RowScratch {
  Buffer<int32_t> ids;
  Buffer<T> d2;

  bool reserve(int64_t n) {
    const int64_t room = n + 2 * lanes<T>;
    if (!ids.resize(room) || !d2.resize(room)) return false;
    if constexpr (packs)
      return sorter_.keys(n);
    else
      return near_.resize(n) && spare_.resize(n);
  }
  void sort_by_distance(int64_t n) {
    sort<0>(n, [](const Near& a, const Near& b) { return a.d2 < b.d2 || (a.d2 == b.d2 && a.id < b.id); });
  }
  void sort_by_index(int64_t n) {
    sort<32>(n, [](const Near& a, const Near& b) { return a.id < b.id; });
  }

 private:
  // A float32 that is not negative orders like its bits, so with the index it makes one key of 64.
  static constexpr bool packs = sizeof(T) == 4;
  struct Near {
    T d2;
    int32_t id;
  };

  template <int id_shift, class Less>
  void sort(int64_t n, Less less) {
    if (n < 2) return;
    if constexpr (packs) {
      uint64_t* const keys = sorter_.keys(n);
      for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, &d2[i], sizeof bits);
        keys[i] = uint64_t(bits) << (32 - id_shift) | uint64_t(uint32_t(ids[i])) << id_shift;
      }
      const uint64_t* const sorted = sorter_.sort(n);
      for (int64_t i = 0; i < n; ++i) {
        const auto bits = uint32_t(sorted[i] >> (32 - id_shift));
        memcpy(&d2[i], &bits, sizeof bits);
        ids[i] = int32_t(sorted[i] >> id_shift);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) near_[i] = {d2[i], ids[i]};
      const Near* const sorted = merge_sort(near_.data(), spare_.data(), n, int64_t(1), less);
      for (int64_t i = 0; i < n; ++i) {
        ids[i] = sorted[i].id;
        d2[i] = sorted[i].d2;
      }
    }
  }

  Sorter<uint64_t> sorter_;
  Buffer<Near> near_, spare_;
};

// Whole vectors, the last one drawn back to end with the row: a call to memcpy costs as much as the search.
void copy_row(int32_t* to, const int32_t* from, int64_t n) {
  constexpr int64_t width = lanes<int32_t>;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  if (i == n) return;
  if (n >= width)
    store(to + n - width, load(from + n - width));
  else
    for (; i < n; ++i) to[i] = from[i];
}

template <class T, int D>
Status fill(Plan<T, D>& plan, int32_t* index, T* distance) {
  const RadiusSearch& args = plan.args;
  const bool limited = args.max_neighbors >= 0, by_distance = args.sort == Sort::distance;
  const bool by_index = args.sort == Sort::index;
  const bool with_d2 = limited || by_distance || distance;
  const int64_t* const row_splits = plan.row_splits;
  if (!row_splits[plan.num_queries]) return Status::ok;
  const auto announce = [=](int32_t id) {
    const int32_t* const row = index + row_splits[id];
    for (int line = 0; line < 3; ++line) __builtin_prefetch(row + 16 * line, 1);
  };
  return for_each_query<T, D, RowScratch<T>>(
      plan, by_index, announce, [=](const Walker<T, D>& walker, RowScratch<T>& row, const T* q, int64_t id) {
        const int64_t begin = row_splits[id], n = row_splits[id + 1] - begin;
        int32_t* const ids = row.ids.data();
        if (!with_d2) {
          walker.template collect<false>(q, ids, nullptr);
        } else {
          const int64_t found = walker.template collect<true>(q, ids, row.d2.data());
          if (by_distance || found > n) row.sort_by_distance(found);
          if (!by_distance && found > n) row.sort_by_index(n);
        }
        copy_row(index + begin, ids, n);
        if (distance)
          for (int64_t i = 0; i < n; ++i) distance[begin + i] = T(::sqrt(row.d2[i]));
      });
}

}  // namespace

Status radius_search_count(const RadiusSearch& args, int64_t* row_splits, void** plan) {
  return with_geometry(args.points.dtype, args.points.cols,
                       [&](auto t, auto d) { return count<decltype(t), decltype(d)::value>(args, row_splits, plan); });
}

Status radius_search_fill(void* plan, int32_t* index, void* distance) {
  const RadiusSearch& args = *static_cast<RadiusSearch*>(plan);  // a Plan begins with its arguments
  return with_geometry(args.points.dtype, args.points.cols, [&](auto t, auto d) {
    using T = decltype(t);
    return fill(*static_cast<Plan<T, decltype(d)::value>*>(plan), index, static_cast<T*>(distance));
  });
}

void radius_search_free(void* plan) {
  const RadiusSearch& args = *static_cast<RadiusSearch*>(plan);
  with_geometry(args.points.dtype, args.points.cols, [&](auto t, auto d) {
    using P = Plan<decltype(t), decltype(d)::value>;
    static_cast<P*>(plan)->~P();
    return 0;
  });
  free(plan);
}

// A counting sort by index. Each thread takes a range of rows and, after the counts are known, writes its own slice of
// every column, so that columns hold their rows in order whatever the number of threads.
Status transpose(const Transpose& args) {
  const Array &distance = args.distance, &out_distance = args.out_distance;
  const auto* from = static_cast<const int32_t*>(args.index.data);
  const auto* rows = static_cast<const int64_t*>(args.row_splits.data);
  auto* to = static_cast<int32_t*>(args.out_index.data);
  auto* splits = static_cast<int64_t*>(args.out_row_splits.data);
  const int64_t m = args.row_splits.rows - 1, n = args.out_row_splits.rows - 1, pairs = rows[m];
  // One counter per thread and column: no more threads than make the counters half as large as the list.
  const int threads =
      int(larger<int64_t>(1, smaller<int64_t>(useful_threads(args.threads, pairs, 1 << 15), pairs / (4 * (n + 1)))));
  Buffer<int64_t> next;
  if (!next.resize(int64_t(threads) * n)) return Status::out_of_memory;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), count = omp_get_num_threads();
    const Share share(m, t, count), columns(n, t, count);
    int64_t* const mine = next.data() + int64_t(t) * n;
    memset(mine, 0, size_t(n) * sizeof(int64_t));
    for (int64_t e = rows[share.begin]; e < rows[share.end]; ++e) ++mine[from[e]];
#pragma omp barrier
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      int64_t sum = 0;
      for (int u = 0; u < count; ++u) sum += next[int64_t(u) * n + j];
      splits[j + 1] = sum;
    }
#pragma omp barrier
#pragma omp single
    {
      splits[0] = 0;
      for (int64_t j = 0; j < n; ++j) splits[j + 1] += splits[j];
    }
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      int64_t at = splits[j];
      for (int u = 0; u < count; ++u) {
        int64_t& s = next[int64_t(u) * n + j];
        const int64_t size = s;
        s = at;
        at += size;
      }
    }
#pragma omp barrier
    for (int64_t i = share.begin; i < share.end; ++i)
      for (int64_t e = rows[i]; e < rows[i + 1]; ++e) {
        const int64_t at = mine[from[e]]++;
        to[at] = int32_t(i);
        if (!distance.data) continue;
        if (distance.dtype == DType::float32)
          static_cast<float*>(out_distance.data)[at] = static_cast<const float*>(distance.data)[e];
        else
          static_cast<double*>(out_distance.data)[at] = static_cast<const double*>(distance.data)[e];
      }
  }
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
