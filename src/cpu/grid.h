// A cell list without a cell table: the index for searches in two and three dimensions with a radius known beforehand.
//
// Points are sorted by cell, cells by row: a row is all cells of equal (item, z, y), its points are contiguous and in
// x order. A query looks at 3^(D-1) rows; its candidates in each are one run. Queries are visited in the same order, so
// the runs move along their rows like fingers, and nothing depends on how empty the bounding box is. Cells are counted
// from the lowest corner of their item's box, so items may lie anywhere.
#pragma once

#include "candidates.h"
#include "geometry.h"

namespace kp {
namespace {

constexpr int max_cell_bits = 31;  // cells per axis, and all axes and the item in 63 together: else cells get wider
constexpr int64_t most_in_wide_cell = 64;  // points; a cell as wide as the radius holds some ten of 37 neighbours

// Where the cells are. Fields of a key from the top: item, z, y, x; each cell number is stored plus two, so that the
// rows beside a row have the keys beside its key.
template <class T, int D>
struct Lattice {
  Buffer<double> low, high;  // (items, D): the boxes of the items
  double per_cell[D];        // cell number = (p - low) * per_cell
  int64_t cells[D];          // of the widest item
  int shift[D], item_shift, bits;
  bool is_wide;  // some axis has cells more than twice as wide as asked

  // From the boxes of the items.
  void set_cells(double cell, int64_t items) {
    const int item_bits = bits_for(uint64_t(items));
    // A little wider than asked: the test rounds (relative 4e-7 in float32), and may see pairs just beyond the radius.
    const double width = cell * (1 + 1e-5);
    double extent[D];
    int axis_bits = max_cell_bits + 1, sum = 0;
    for (int a = 0; a < D; ++a) {
      extent[a] = 0;
      for (int64_t b = 0; b < items; ++b) extent[a] = larger(extent[a], high[b * D + a] - low[b * D + a]);
      extent[a] = smaller(extent[a], 1e308);  // the difference of two finite numbers may be infinite
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
      per_cell[a] = 1 / larger(width, extent[a] * (1 + 1e-9) / widest);
      is_wide |= per_cell[a] * width < 0.5;
      cells[a] = int64_t(extent[a] * per_cell[a]) + 1;
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
      // Queries may lie anywhere; two cells away they all see nothing. So does what has become NaN since it was
      // checked.
      const double c = floor((double(p[a]) - begin[a]) * per_cell[a]);
      key |= uint64_t(int64_t(smaller(larger(-2.0, c), double(cells[a] + 1))) + 2) << shift[a];
    }
    return key;
  }
  int64_t field(uint64_t key, int axis) const {
    const int end = axis + 1 < D ? shift[axis + 1] : item_shift;
    return int64_t(key >> shift[axis] & ((uint64_t(1) << (end - shift[axis])) - 1));
  }
};

// Points or queries in cell order.
template <class T, int D>
struct InCells {
  Sorted<T, D> points;
  Buffer<uint64_t> keys;

  Status sort(const Lattice<T, D>& lattice, const T* coordinates, int64_t n, const Items& items, int threads) {
    if (!keys.resize(n) || !points.resize(n, D)) return Status::out_of_memory;
    Buffer<int32_t>& ids = points.ids;
    threads = useful_threads(threads, n, 1 << 13);
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      Items item = items;
      for (int64_t i = share.begin; i < share.end; ++i) {
        keys[i] = lattice.key(item.of(i), coordinates + i * D);
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

template <class T, int D>
struct Grid {
  static constexpr int dimensions = D;
  Index head;
  Lattice<T, D> lattice;
  InCells<T, D> own;
  Directory directory;

  // Status::crowded: cells are so much wider than asked that some hold more than a few points.
  Status build(const IndexPoints& args) {
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
    Status status = own.sort(lattice, points, n, Items(args.row_splits, items), args.threads);
    if (status == Status::ok) status = directory.build(own.keys.data(), n, lattice.shift[1], args.threads);
    return status == Status::ok && lattice.is_wide && fullest_cell() > most_in_wide_cell ? Status::crowded : status;
  }
  int64_t fullest_cell() const {
    int64_t most = 0;
    for (int64_t c = 0; c < directory.cells; ++c)
      most = larger<int64_t>(most, directory.cell_begin[c + 1] - directory.cell_begin[c]);
    return most;
  }
  // Points in the cell of a point, on average.
  double crowding() const {
    double sum = 0;
    for (int64_t c = 0; head.num_points && c < directory.cells; ++c) {
      const double n = double(directory.cell_begin[c + 1] - directory.cell_begin[c]);
      sum += n * n;
    }
    return head.num_points ? sum / double(head.num_points) : 0;
  }
  Status place(const Search& search, InCells<T, D>& queries) const {
    return queries.sort(lattice, as<T>(search.queries), search.queries.rows,
                        Items(search.queries_row_splits, head.items), search.threads);
  }
  const Sorted<T, D>& points() const { return own.points; }
  // The box of an item's points; (inf, -inf) of none.
  void box_of(int64_t item, double* low, double* high) const {
    for (int a = 0; a < D; ++a) low[a] = lattice.low[item * D + a], high[a] = lattice.high[item * D + a];
  }
};

// One of the rows beside the current one, and the window of its cells within one cell of the current x.
struct Finger {
  int step[2];      // rows along y and z
  int64_t row = 0;  // first row whose key is not below the wanted one
  int64_t low = 0, high = 0, end = 0;
};

// Moves through queries in cell order and gathers the candidates of each cell.
template <class T, int D>
class GridWalker {
 public:
  GridWalker(const Grid<T, D>& grid, const InCells<T, D>& queries) : grid_(grid), queries_(queries) {
    for (int i = 0; i < fingers; ++i) {
      fingers_[i].step[0] = i % 3 - 1;
      fingers_[i].step[1] = D == 3 ? i / 3 - 1 : 0;
    }
  }

  bool reserve() { return true; }

  // The end of the group of queries that begins at i.
  int64_t group_end(int64_t i, int64_t end) const {
    const uint64_t key = queries_.keys[i];
    while (++i < end && queries_.keys[i] == key) {
    }
    return i;
  }

  // Gathers what the queries [begin, end) of one cell may see. False: no memory.
  bool move_to(int64_t begin, int64_t /*end*/, T /*limit*/, bool by_index, Candidates<T, D>& candidates) {
    const Directory& dir = grid_.directory;
    const Lattice<T, D>& lattice = grid_.lattice;
    const uint64_t key = queries_.keys[begin];
    const int x_bits = lattice.shift[1];
    const uint64_t row_key = key >> x_bits;
    if (row_key != row_key_) {
      const bool forward = row_key > row_key_ && row_key_ != no_row;
      row_key_ = row_key;
      for (int i = 0; i < fingers; ++i) {
        Finger& f = fingers_[i];
        uint64_t wanted = row_key;
        bool occupied = true;
        for (int a = 1; a < D; ++a) {
          const int64_t cell = lattice.field(key, a) + f.step[a - 1];
          occupied = occupied && cell > 1 && cell <= lattice.cells[a] + 1;
          wanted += uint64_t(int64_t(f.step[a - 1]) * (int64_t(1) << (lattice.shift[a] - x_bits)));
        }
        if (occupied) {
          f.row = gallop(dir.row_key.data(), forward ? f.row : 0, dir.rows, wanted);
          occupied = f.row < dir.rows && dir.row_key[f.row] == wanted;
        }
        f.low = f.high = occupied ? dir.row_cell[f.row] : 0;
        f.end = occupied ? dir.row_cell[f.row + 1] : 0;
      }
    }
    const auto x = uint32_t(lattice.field(key, 0));
    Run runs[fingers];
    for (int i = 0; i < fingers; ++i) {
      Finger& f = fingers_[i];
      f.low = gallop(dir.cell_x.data(), f.low, f.end, x ? x - 1 : 0);
      f.high = gallop(dir.cell_x.data(), larger(f.low, f.high), f.end, x + 2);
      runs[i] = f.low < f.high ? Run{dir.cell_begin[f.low], dir.cell_begin[f.high]} : Run{0, 0};
    }
    return candidates.gather(grid_.own.points, runs, fingers, by_index);
  }

 private:
  static constexpr int fingers = D == 3 ? 9 : 3;
  static constexpr uint64_t no_row = ~uint64_t(0);

  const Grid<T, D>& grid_;
  const InCells<T, D>& queries_;
  Finger fingers_[fingers];
  uint64_t row_key_ = no_row;
};

}  // namespace
}  // namespace kp
