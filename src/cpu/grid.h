// A sparse cell list: the index for radius searches in two and three dimensions. Cells are as wide as the largest
// radius, so all neighbors of a query lie in its cell and the cells around it.
//
// Only occupied cells are stored. Points are sorted by (item, z, y, x) of their cell, so the points of a row of cells,
// with equal (item, z, y), are contiguous and ordered by x. A query in cell (x, y) needs one run of each of the 3^(D-1)
// rows around it:
//
//          x-2   x-1    x    x+1   x+2
//   y+1  |  .  [  ..  |     |  . ]  .  |     q: the query
//   y    |     [   .  | q.  |    ] ... |     [ ]: one run of points per row
//   y-1  |  .  [      |  .  | .. ]     |
//
// Queries are visited in the same order, so the run in each row only moves forward (RowWindow). Neither time nor memory
// depends on how empty the bounding box is. Cells are numbered from the lowest corner of their batch item's box, so
// items may lie anywhere.
#pragma once

#include "candidates.h"
#include "geometry.h"

namespace kp {
namespace {

constexpr int max_cell_bits = 31;  // per axis; if the axes and the item need more than 63 bits, cells are made wider
constexpr int64_t max_points_in_wide_cell = 64;  // at 37 neighbors per query, a cell as wide as the radius holds ten

// Maps points to cells and cells to sort keys. A key holds, from the top, the item and the cell numbers z, y, x. Stored
// cell number = cell + 2. Stored 2 is the lowest cell with points, 1 the cell below it, 0 holds all queries farther
// below. Likewise stored cells + 2 is the cell above the highest, and cells + 3 holds all queries farther above.
template <class T, int D>
struct Lattice {
  Buffer<double> low, high;  // (items, D): the bounding boxes
  double cells_per_unit[D];  // cell number = (p - low) * cells_per_unit
  int64_t cells[D];          // number of cells along each axis in the widest item
  int shift[D], item_shift, bits;
  bool is_wide;  // along some axis, cells are more than twice as wide as asked

  // Chooses the cells for the boxes low and high.
  void set_cells(double cell, int64_t items) {
    const int item_bits = bits_for(uint64_t(items));
    // Cells are slightly wider than the radius: the distance test rounds (relative error 4e-7 in float32), so it may
    // accept pairs just beyond the radius.
    const double width = cell * (1 + 1e-5);
    double extent[D];
    int axis_bits = max_cell_bits + 1, sum = 0;
    for (int a = 0; a < D; ++a) {
      extent[a] = 0;
      for (int64_t b = 0; b < items; ++b) extent[a] = larger(extent[a], high[b * D + a] - low[b * D + a]);
      extent[a] = smaller(extent[a], 1e308);  // the difference of two finite numbers may overflow
    }
    do {
      --axis_bits;
      sum = 0;
      for (int a = 0; a < D; ++a) sum += bits_for(uint64_t(smaller(extent[a] / width + 5, ldexp(1.0, axis_bits) - 1)));
    } while (sum + item_bits > 63);
    is_wide = false;
    sum = 0;
    for (int a = 0; a < D; ++a) {
      const double widest = ldexp(1.0, axis_bits) - 5;
      cells_per_unit[a] = 1 / larger(width, extent[a] * (1 + 1e-9) / widest);
      is_wide |= cells_per_unit[a] * width < 0.5;
      cells[a] = int64_t(extent[a] * cells_per_unit[a]) + 1;
      shift[a] = sum;
      sum += bits_for(uint64_t(cells[a]) + 3);
    }
    item_shift = sum;
    bits = sum + item_bits;
  }

  uint64_t key(int64_t item, const T* p) const {
    uint64_t key = uint64_t(item) << item_shift;
    const double* const begin = low.data() + item * D;
    for (int a = 0; a < D; ++a) {
      // Queries may lie anywhere: those two or more cells away have no neighbors, so their cell number is clamped. A
      // coordinate that another thread has overwritten with NaN since the check is clamped too.
      const double c = floor((double(p[a]) - begin[a]) * cells_per_unit[a]);
      key |= uint64_t(int64_t(smaller(larger(-2.0, c), double(cells[a] + 1))) + 2) << shift[a];
    }
    return key;
  }
  int64_t field(uint64_t key, int axis) const {
    const int end = axis + 1 < D ? shift[axis + 1] : item_shift;
    return int64_t(key >> shift[axis] & ((uint64_t(1) << (end - shift[axis])) - 1));
  }
};

// Points or queries sorted by cell.
template <class T, int D>
struct CellSorted {
  SortedPoints<T, D> points;
  Buffer<uint64_t> keys;

  Status sort(const Lattice<T, D>& lattice, const T* coordinates, int64_t n, const ItemCursor& items, int threads) {
    if (!keys.resize(n) || !points.resize(n, D)) return Status::out_of_memory;
    Buffer<int32_t>& ids = points.ids;
    threads = useful_threads(threads, n, 1 << 13);
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      ItemCursor cursor = items;
      for (int64_t i = share.begin; i < share.end; ++i) {
        keys[i] = lattice.key(cursor.item_of(i), coordinates + i * D);
        ids[i] = int32_t(i);
      }
    }
    if (Status status = radix_sort(keys, ids, n, lattice.bits, threads); status != Status::ok) return status;
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      for (int64_t i = share.begin; i < share.end; ++i) {
        if (i + 16 < n) __builtin_prefetch(coordinates + int64_t(ids[i + 16]) * D);
        for (int a = 0; a < D; ++a) points.x[a][i] = coordinates[int64_t(ids[i]) * D + a];
      }
    }
    return Status::ok;
  }
};

// The occupied cells, and the occupied rows of cells, of points sorted by cell.
struct Directory {
  Buffer<uint32_t> cell_x;      // x of each cell
  Buffer<uint32_t> cell_begin;  // first point of each cell, and a sentinel
  Buffer<uint32_t> row_cell;    // first cell of each row, and a sentinel
  Buffer<uint64_t> row_key;     // key of each row: item, z, y
  int64_t cells, rows;

  Status build(const uint64_t* keys, int64_t n, int x_bits, int threads) {
    threads = useful_threads(threads, n, 1 << 16);
    Buffer<int64_t> counts;  // per thread: cells and rows in its share, then the numbers of its first cell and row
    if (!counts.resize(2 * threads)) return Status::out_of_memory;
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
      counts[2 * t] = c;
      counts[2 * t + 1] = r;
#pragma omp barrier
#pragma omp single
      {
        cells = rows = 0;
        for (int u = 0; u < omp_get_num_threads(); ++u) {
          const int64_t cell_count = counts[2 * u], row_count = counts[2 * u + 1];
          counts[2 * u] = cells;
          counts[2 * u + 1] = rows;
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
        c = counts[2 * t];
        r = counts[2 * t + 1];
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

// The first position in [from, end) whose value is at least `value`; `end` if there is none. An exponential search from
// `from`, fast when the position is near.
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

template <class T, int D>
struct Grid {
  static constexpr int dimensions = D;
  Index head;
  Lattice<T, D> lattice;
  CellSorted<T, D> sorted;
  Directory directory;

  // Returns Status::crowded if cells had to be made so wide that one holds more than max_points_in_wide_cell points.
  Status build(const IndexArguments& args) {
    const auto* points = as<T>(args.points);
    const auto* splits = as<int64_t>(args.row_splits);
    const int64_t n = args.points.rows, items = head.items;
    if (!lattice.low.resize(items * D) || !lattice.high.resize(items * D)) return Status::out_of_memory;
    for (int64_t b = 0; b < items; ++b)
      if (!bounding_box<T, D>(points + splits[b] * D, splits[b + 1] - splits[b], args.threads, &lattice.low[b * D],
                              &lattice.high[b * D]))
        return Status::not_finite;
    if (!n) return Status::ok;
    lattice.set_cells(args.cell, items);
    Status status = sorted.sort(lattice, points, n, ItemCursor(args.row_splits, items), args.threads);
    if (status == Status::ok) status = directory.build(sorted.keys.data(), n, lattice.shift[1], args.threads);
    return status == Status::ok && lattice.is_wide && fullest_cell() > max_points_in_wide_cell ? Status::crowded
                                                                                               : status;
  }
  int64_t fullest_cell() const {
    int64_t most = 0;
    for (int64_t c = 0; c < directory.cells; ++c)
      most = larger<int64_t>(most, directory.cell_begin[c + 1] - directory.cell_begin[c]);
    return most;
  }
  // Mean over the points of how many points share their cell.
  double crowding() const {
    double sum = 0;
    for (int64_t c = 0; head.num_points && c < directory.cells; ++c) {
      const double n = double(directory.cell_begin[c + 1] - directory.cell_begin[c]);
      sum += n * n;
    }
    return head.num_points ? sum / double(head.num_points) : 0;
  }
  Status sort_queries(const Search& search, CellSorted<T, D>& queries) const {
    return queries.sort(lattice, as<T>(search.queries), search.queries.rows,
                        ItemCursor(search.queries_row_splits, head.items), search.threads);
  }
  const SortedPoints<T, D>& points() const { return sorted.points; }
  // The bounding box of an item's points; (inf, -inf) for an empty item.
  void box_of(int64_t item, double* low, double* high) const {
    for (int a = 0; a < D; ++a) low[a] = lattice.low[item * D + a], high[a] = lattice.high[item * D + a];
  }
};

// One of the 3^(D-1) rows around the current cell, and the window of its cells from x - 1 to x + 1.
struct RowWindow {
  int step[2];                         // this row's offset from the current row, in y and z
  int64_t row = 0;                     // number of the row, or of the first row after where it would be
  int64_t low = 0, high = 0, end = 0;  // cells [low, high) are in the window; the row ends at `end`
};

// Visits queries in cell order and gathers the candidates of each cell.
template <class T, int D>
class GridWalker {
 public:
  GridWalker(const Grid<T, D>& grid, const CellSorted<T, D>& queries) : grid_(grid), queries_(queries) {
    for (int i = 0; i < num_windows; ++i) {
      windows_[i].step[0] = i % 3 - 1;
      windows_[i].step[1] = D == 3 ? i / 3 - 1 : 0;
    }
  }

  bool reserve() { return true; }

  // A group is the queries of one cell: the end of the group that begins at query i.
  int64_t group_end(int64_t i, int64_t end) const {
    const uint64_t key = queries_.keys[i];
    while (++i < end && queries_.keys[i] == key) {
    }
    return i;
  }

  // Gathers the candidates of the group of queries that begins at `begin`. Returns false if memory runs out.
  bool move_to(int64_t begin, int64_t /*end*/, T /*limit*/, bool by_index, Candidates<T, D>& candidates) {
    const Directory& dir = grid_.directory;
    const Lattice<T, D>& lattice = grid_.lattice;
    const uint64_t key = queries_.keys[begin];
    const int x_bits = lattice.shift[1];
    const uint64_t row_key = key >> x_bits;
    if (row_key != row_key_) {
      const bool forward = row_key > row_key_ && row_key_ != no_row;
      row_key_ = row_key;
      for (int i = 0; i < num_windows; ++i) {
        RowWindow& window = windows_[i];
        uint64_t wanted = row_key;
        bool occupied = true;
        for (int a = 1; a < D; ++a) {
          const int64_t cell = lattice.field(key, a) + window.step[a - 1];
          occupied = occupied && cell > 1 && cell <= lattice.cells[a] + 1;
          wanted += uint64_t(int64_t(window.step[a - 1]) * (int64_t(1) << (lattice.shift[a] - x_bits)));
        }
        if (occupied) {
          window.row = gallop(dir.row_key.data(), forward ? window.row : 0, dir.rows, wanted);
          occupied = window.row < dir.rows && dir.row_key[window.row] == wanted;
        }
        window.low = window.high = occupied ? dir.row_cell[window.row] : 0;
        window.end = occupied ? dir.row_cell[window.row + 1] : 0;
      }
    }
    const auto x = uint32_t(lattice.field(key, 0));
    Run runs[num_windows];
    for (int i = 0; i < num_windows; ++i) {
      RowWindow& window = windows_[i];
      window.low = gallop(dir.cell_x.data(), window.low, window.end, x ? x - 1 : 0);
      window.high = gallop(dir.cell_x.data(), larger(window.low, window.high), window.end, x + 2);
      runs[i] = window.low < window.high ? Run{dir.cell_begin[window.low], dir.cell_begin[window.high]} : Run{0, 0};
    }
    return candidates.gather(grid_.sorted.points, runs, num_windows, by_index);
  }

 private:
  static constexpr int num_windows = D == 3 ? 9 : 3;
  static constexpr uint64_t no_row = ~uint64_t(0);

  const Grid<T, D>& grid_;
  const CellSorted<T, D>& queries_;
  RowWindow windows_[num_windows];
  uint64_t row_key_ = no_row;
};

}  // namespace
}  // namespace kp
