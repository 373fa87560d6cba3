// Kernel maps of sparse convolutions: which inputs each output reads, by which kernel cell.
//
// The input cells are sorted by number, in C order of their coordinates. The outputs are taken in the same order, so
// the cells that a run of kernel cells reads only move forward: each run keeps its place among the inputs, and finds
// the next one a few cells further on. That reads memory in order; a hash table would read it at random, 27 times for
// each output of a 3x3x3 kernel instead of 9.
#include "formulas/kernel_map.h"

#include "kernels.h"
#include "parallel.h"
#include "sort.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t cells_per_thread = 1 << 13;

// Calls call(std::integral_constant<int, D>()), D = 1 to 4.
template <class Call>
auto with_axes(int64_t axes, Call call) {
  switch (axes) {
    case 1:
      return call(std::integral_constant<int, 1>());
    case 2:
      return call(std::integral_constant<int, 2>());
    case 3:
      return call(std::integral_constant<int, 3>());
    default:
      return call(std::integral_constant<int, 4>());
  }
}

template <int D>
Box<D> box_of(const Array& low, const Array& sizes) {
  Box<D> box;
  for (int a = 0; a < D; ++a) {
    box.low[a] = as<int64_t>(low)[a];
    box.sizes[a] = as<int64_t>(sizes)[a];
  }
  return box;
}

// The batch item of row i: the last one that begins at or before it.
int64_t item_of(const int64_t* splits, int64_t items, int64_t i) {
  int64_t low = 0, high = items;
  while (low + 1 < high) {
    const int64_t middle = low + (high - low) / 2;
    (splits[middle] <= i ? low : high) = middle;
  }
  return low;
}

// The first position in [begin, n) whose sorted number is at least `cell`. Steps that double make this fast where the
// position is near `begin`.
inline int64_t first_from(const int64_t* cells, int64_t begin, int64_t n, int64_t cell) {
  if (begin >= n || cells[begin] >= cell) return begin;
  int64_t step = 1;
  while (begin + step < n && cells[begin + step] < cell) {
    begin += step;
    step *= 2;
  }
  int64_t end = smaller(begin + step, n);  // cells[begin] < cell, and cells[end] >= cell or end == n
  while (begin + 1 < end) {
    const int64_t middle = begin + (end - begin) / 2;
    (cells[middle] < cell ? begin : end) = middle;
  }
  return end;
}

// Sorts n numbers below 2^bits from `cells` stably into `sorted` (not if that is null), and writes their order; with
// K = uint32_t if the numbers fit.
template <class K>
Status sort_numbers(const int64_t* cells, int64_t n, int bits, int max_threads, Buffer<K>& keys, Buffer<int32_t>& ids) {
  if (!keys.resize(n) || !ids.resize(n)) return Status::out_of_memory;
#pragma omp parallel for num_threads(useful_threads(max_threads, n, 1 << 15)) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = K(cells[i]);
    ids[i] = int32_t(i);
  }
  return n ? radix_sort(keys, ids, n, bits, max_threads) : Status::ok;
}

bool is_sorted(const int64_t* cells, int64_t n, int max_threads) {
  int falls = 0;
#pragma omp parallel for num_threads(useful_threads(max_threads, n, 1 << 16)) schedule(static) reduction(| : falls)
  for (int64_t i = 1; i < n; ++i) falls |= cells[i] < cells[i - 1];
  return !falls;
}

// Calls visit(output, row of the input, kernel cell) for all pairs of outputs [begin, end) in sorted order: for each
// output by kernel cell, then by row.
template <int D, class Visit>
void visit_pairs(const KernelPairs& args, const Box<D>& box, const Kernel<D>& kernel, const int64_t* offsets,
                 int64_t* places, int64_t begin, int64_t end, Visit visit) {
  const auto* const cells = as<int64_t>(args.cells);
  const auto* const order = as<int32_t>(args.order);
  const auto* const out_coords = as<int32_t>(args.out_coords);
  const auto* const out_splits = as<int64_t>(args.out_row_splits);
  const auto* const out_order = as<int32_t>(args.out_order);
  const int64_t n = args.cells.rows, items = args.out_row_splits.rows - 1;
  const int64_t runs = kernel.num_runs(), length = kernel.run_length();
  int64_t item = 0;
  memset(places, 0, size_t(runs) * sizeof(int64_t));
  for (int64_t s = begin; s < end; ++s) {
    const int64_t o = out_order ? out_order[s] : s;
    if (s == begin) item = item_of(out_splits, items, o);
    while (o >= out_splits[item + 1]) ++item;
    int64_t scaled[D];
    for (int a = 0; a < D; ++a) scaled[a] = kernel.scale[a] * out_coords[o * D + a];
    for (int64_t r = 0; r < runs; ++r) {
      const Run run = run_of<D>(scaled, offsets + r * D, item, length, box);
      if (run.to < run.from) continue;
      int64_t at = places[r] = first_from(cells, places[r], n, run.from);
      for (; at < n && cells[at] <= run.to; ++at) visit(o, order[at], int32_t(r * length + cells[at] - run.origin));
    }
  }
}

// Calls call(begin, end, visit_all) in every thread with its share of the sorted outputs; visit_all(visit) visits their
// pairs.
template <class Call>
Status share_pairs(const KernelPairs& args, Call call) {
  return with_axes(args.low.rows, [&](auto axes) {
    constexpr int D = decltype(axes)::value;
    const Box<D> box = box_of<D>(args.low, args.sizes);
    Kernel<D> kernel;
    for (int a = 0; a < D; ++a) {
      kernel.size[a] = as<int64_t>(args.kernel_size)[a];
      kernel.scale[a] = as<int64_t>(args.scale)[a];
      kernel.first[a] = as<int64_t>(args.first)[a];
      kernel.dilation[a] = as<int64_t>(args.dilation)[a];
    }
    const int64_t m = args.row_splits.rows - 1, runs = kernel.num_runs();
    const int threads = useful_threads(args.threads, m * runs, cells_per_thread);
    Buffer<int64_t> offsets, places;
    if (!offsets.resize(runs * D) || !places.resize(threads * (runs + 8))) return Status::out_of_memory;
    for (int64_t r = 0; r < runs; ++r) kernel.offset_of_run(r, offsets.data() + r * D);
#pragma omp parallel num_threads(threads)
    {
      const int t = omp_get_thread_num();
      const Share share(m, t, omp_get_num_threads());
      call([&](auto visit) {
        visit_pairs<D>(args, box, kernel, offsets.data(), places.data() + t * (runs + 8), share.begin, share.end,
                       visit);
      });
    }
    return Status::ok;
  });
}

struct Pair {
  int32_t kernel, index;
};

}  // namespace

Status cell_bounds(const CellBounds& args) {
  const auto* const coords = as<int32_t>(args.coords);
  const int64_t n = args.coords.rows;
  return with_axes(args.coords.cols, [&](auto axes) {
    constexpr int D = decltype(axes)::value;
    int32_t low[D], high[D];
    for (int a = 0; a < D; ++a) low[a] = high[a] = coords[a];
#pragma omp parallel for num_threads(useful_threads(args.threads, n, 1 << 15)) schedule(static) \
    reduction(min : low[ : D]) reduction(max : high[ : D])
    for (int64_t i = 0; i < n; ++i)
      for (int a = 0; a < D; ++a) {
        low[a] = smaller(low[a], coords[i * D + a]);
        high[a] = larger(high[a], coords[i * D + a]);
      }
    for (int a = 0; a < D; ++a) {
      into<int32_t>(args.bounds)[a] = low[a];
      into<int32_t>(args.bounds)[D + a] = high[a];
    }
    return Status::ok;
  });
}

Status sort_cells(const SortCells& args) {
  const auto* const coords = as<int32_t>(args.coords);
  const auto* const splits = as<int64_t>(args.row_splits);
  const auto* const stride = as<int64_t>(args.stride);
  auto* const cells = into<int64_t>(args.cells);
  auto* const order = into<int32_t>(args.order);
  const int64_t n = args.coords.rows, items = args.row_splits.rows - 1;
  const int threads = useful_threads(args.threads, n, cells_per_thread);
  int64_t num_cells = 0;
  with_axes(args.coords.cols, [&](auto axes) {
    constexpr int D = decltype(axes)::value;
    const Box<D> box = box_of<D>(args.low, args.sizes);
    num_cells = items * box.volume();
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      int64_t item = item_of(splits, items, share.begin);
      for (int64_t i = share.begin; i < share.end; ++i) {
        while (i >= splits[item + 1]) ++item;
        cells[i] = cell_of<D>(coords + i * D, item, box, stride);
        order[i] = int32_t(i);
      }
    }
  });
  if (is_sorted(cells, n, args.threads)) return Status::ok;
  const int bits = bits_for(uint64_t(num_cells - 1));
  const auto sort = [&](auto key) {
    Buffer<decltype(key)> keys;
    Buffer<int32_t> ids;
    const Status status = sort_numbers(cells, n, bits, args.threads, keys, ids);
    if (status != Status::ok) return status;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      cells[i] = int64_t(keys[i]);
      order[i] = ids[i];
    }
    return status;
  };
  return bits <= 32 ? sort(uint32_t()) : sort(uint64_t());
}

Status spread_cells(const SpreadCells& args) {
  const auto* const cells = as<int64_t>(args.cells);
  const int64_t n = args.cells.rows, places = n ? args.spread.rows / n : 0;
#pragma omp parallel for num_threads(useful_threads(args.threads, n* places, cells_per_thread)) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    spread_cell(cells[i], args.inner, args.low, args.size, args.out_low, args.out_size, args.kernel_size, args.stride,
                args.dilation, args.padding, args.end, into<int64_t>(args.spread) + i * places, places);
  return Status::ok;
}

Status unique_cells(const UniqueCells& args) {
  const auto* cells = as<int64_t>(args.cells);
  auto* const unique = into<int64_t>(args.unique);
  const int64_t n = args.cells.rows;
  const auto keep_one_each = [&](const auto* sorted) {
    int64_t count = 0;
    for (int64_t i = 0; i < n && int64_t(sorted[i]) < args.end; ++i)
      if (!i || sorted[i] != sorted[i - 1]) unique[count++] = int64_t(sorted[i]);
    *into<int64_t>(args.num_unique) = count;
    return Status::ok;
  };
  if (is_sorted(cells, n, args.threads)) return keep_one_each(cells);
  const int bits = bits_for(uint64_t(args.end));
  const auto sort = [&](auto key) {
    Buffer<decltype(key)> keys;
    Buffer<int32_t> ids;
    const Status status = sort_numbers(cells, n, bits, args.threads, keys, ids);
    return status == Status::ok ? keep_one_each(keys.data()) : status;
  };
  return bits <= 32 ? sort(uint32_t()) : sort(uint64_t());
}

Status cell_coords(const CellCoords& args) {
  const auto* const cells = as<int64_t>(args.cells);
  auto* const splits = into<int64_t>(args.row_splits);
  const int64_t n = args.cells.rows, items = args.row_splits.rows - 1;
  with_axes(args.low.rows, [&](auto axes) {
    constexpr int D = decltype(axes)::value;
    const Box<D> box = box_of<D>(args.low, args.sizes);
#pragma omp parallel for num_threads(useful_threads(args.threads, n, cells_per_thread)) schedule(static)
    for (int64_t i = 0; i < n; ++i)
      coords_of<D>(cells[i], box, as<int64_t>(args.stride), into<int32_t>(args.coords) + i * D);
    for (int64_t b = 0; b <= items; ++b) splits[b] = first_from(cells, b ? splits[b - 1] : 0, n, b * box.volume());
  });
  return Status::ok;
}

Status count_pairs(const KernelPairs& args) {
  auto* const splits = into<int64_t>(args.row_splits);
  const int64_t m = args.row_splits.rows - 1;
  memset(splits, 0, size_t(m + 1) * sizeof(int64_t));
  const Status status =
      share_pairs(args, [&](auto visit_all) { visit_all([&](int64_t o, int32_t, int32_t) { ++splits[o + 1]; }); });
  for (int64_t o = 0; o < m; ++o) splits[o + 1] += splits[o];
  return status;
}

Status fill_pairs(const KernelPairs& args) {
  const auto* const splits = as<int64_t>(args.row_splits);
  auto* const index = into<int32_t>(args.index);
  auto* const kernel_index = into<int32_t>(args.kernel_index);
  return share_pairs(args, [&](auto visit_all) {
    int64_t output = -1, e = 0;
    visit_all([&](int64_t o, int32_t row, int32_t kernel) {
      if (o != output) e = splits[output = o];
      index[e] = row;
      kernel_index[e++] = kernel;
    });
  });
}

Status sort_pairs(const SortPairs& args) {
  const auto* const splits = as<int64_t>(args.row_splits);
  auto* const index = into<int32_t>(args.index);
  auto* const kernel_index = into<int32_t>(args.kernel_index);
  const int64_t m = args.row_splits.rows - 1;
  int64_t longest = 0;
  for (int64_t o = 0; o < m; ++o) longest = larger(longest, splits[o + 1] - splits[o]);
  const int threads = useful_threads(args.threads, args.index.rows, cells_per_thread);
  Buffer<Pair> pairs;
  if (!pairs.resize(threads * 2 * longest)) return Status::out_of_memory;
#pragma omp parallel num_threads(threads)
  {
    Pair* const a = pairs.data() + omp_get_thread_num() * 2 * longest;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < m; ++o) {
      const int64_t begin = splits[o], n = splits[o + 1] - begin;
      for (int64_t j = 0; j < n; ++j) a[j] = {kernel_index[begin + j], index[begin + j]};
      const Pair* const sorted = merge_sort(a, a + n, n, 1, [](Pair x, Pair y) { return x.kernel < y.kernel; });
      for (int64_t j = 0; j < n; ++j) {
        kernel_index[begin + j] = sorted[j].kernel;
        index[begin + j] = sorted[j].index;
      }
    }
  }
  return Status::ok;
}

// Each thread writes the cells of its share of the sorted rows; a cell on the border of two shares is that of the
// thread in whose share it begins.
Status to_dense(const ToDense& args) {
  const auto* const cells = as<int64_t>(args.cells);
  const auto* const order = as<int32_t>(args.order);
  const int64_t n = args.cells.rows, channels = args.features.cols, volume = args.volume;
  const int64_t num_values = args.out.rows * args.out.cols;
  return with_real(args.features.dtype, [&](auto real) {
    using F = decltype(real);
    const auto* const features = as<F>(args.features);
    auto* const out = into<F>(args.out);
#pragma omp parallel num_threads(useful_threads(args.threads, num_values + n * channels, 1 << 16))
    {
      const int t = omp_get_thread_num(), threads = omp_get_num_threads();
      const Share values(num_values, t, threads), share(n, t, threads);
      memset(out + values.begin, 0, size_t(values.end - values.begin) * sizeof(F));
#pragma omp barrier
      int64_t i = share.begin;
      while (i < share.end && i && cells[i] == cells[i - 1]) ++i;
      while (i < share.end) {
        const int64_t cell = cells[i];
        F* const to = out + cell / volume * channels * volume + cell % volume;
        for (; i < n && cells[i] == cell; ++i)
          for (int64_t c = 0; c < channels; ++c) to[c * volume] += features[order[i] * channels + c];
      }
    }
    return Status::ok;
  });
}

Status to_dense_grad(const ToDense& args) {
  const auto* const cells = as<int64_t>(args.cells);
  const auto* const order = as<int32_t>(args.order);
  const int64_t n = args.cells.rows, channels = args.grad_features.cols, volume = args.volume;
  return with_real(args.grad_out.dtype, [&](auto real) {
    using F = decltype(real);
#pragma omp parallel for num_threads(useful_threads(args.threads, n* channels, 1 << 14)) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const F* const from = as<F>(args.grad_out) + cells[i] / volume * channels * volume + cells[i] % volume;
      for (int64_t c = 0; c < channels; ++c) into<F>(args.grad_features)[order[i] * channels + c] = from[c * volume];
    }
    return Status::ok;
  });
}

}  // namespace KP_ISA
}  // namespace kp
