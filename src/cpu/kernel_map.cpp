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

// What both passes over the pairs of a kernel map read.
template <int D>
struct Pairs {
  const int64_t *cells, *out_splits;
  const int32_t *order, *out_coords, *out_order;
  int64_t num_cells, items, num_outputs, runs, length;
  Box<D> box;
  Kernel<D> kernel;
  Buffer<int64_t> offsets;    // (runs, D)
  Buffer<int64_t> distances;  // (runs,) from the number of the cell at `scale * o` to that of the run's first cell

  Status prepare(const KernelPairs& args) {
    cells = as<int64_t>(args.cells);
    order = as<int32_t>(args.order);
    out_coords = as<int32_t>(args.out_coords);
    out_splits = as<int64_t>(args.out_row_splits);
    out_order = as<int32_t>(args.out_order);
    num_cells = args.cells.rows;
    items = args.out_row_splits.rows - 1;
    num_outputs = args.row_splits.rows - 1;
    box = box_of<D>(args.low, args.sizes);
    for (int a = 0; a < D; ++a) {
      kernel.size[a] = as<int64_t>(args.kernel_size)[a];
      kernel.scale[a] = as<int64_t>(args.scale)[a];
      kernel.first[a] = as<int64_t>(args.first)[a];
      kernel.dilation[a] = as<int64_t>(args.dilation)[a];
    }
    runs = kernel.num_runs();
    length = kernel.run_length();
    if (!offsets.resize(runs * D) || !distances.resize(runs)) return Status::out_of_memory;
    for (int64_t r = 0; r < runs; ++r) {
      int64_t* const offset = offsets.data() + r * D;
      kernel.offset_of_run(r, offset);
      uint64_t distance = 0;  // unsigned, since it overflows where a kernel is larger than the box
      for (int a = 0; a < D; ++a) distance = distance * uint64_t(box.sizes[a]) + uint64_t(offset[a]);
      distances[r] = int64_t(distance);
    }
    return Status::ok;
  }

  int64_t output(int64_t s) const { return out_order ? out_order[s] : s; }

  // Calls on_run(begin, end, first kernel cell, origin) for the inputs of each run of output o that has some.
  template <class OnRun>
  void visit(int64_t o, int64_t item, int64_t* places, OnRun on_run) const {
    int64_t scaled[D];
    bool inside = true;  // all that the kernel reads is in the box
    for (int a = 0; a < D; ++a) {
      scaled[a] = kernel.scale[a] * out_coords[o * D + a];
      const int64_t first = scaled[a] + kernel.first[a] - box.low[a];
      inside &= first >= 0 && first + (kernel.size[a] - 1) * kernel.dilation[a] < box.sizes[a];
    }
    int64_t cell = item;
    for (int a = 0; inside && a < D; ++a) cell = cell * box.sizes[a] + scaled[a] - box.low[a];
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t first = inside ? cell + distances[r] : 0;
      const Run run =
          inside ? Run{first, first + length - 1, first} : run_of<D>(scaled, offsets.data() + r * D, item, length, box);
      if (run.to < run.from) continue;
      const int64_t begin = places[r] = first_from(cells, places[r], num_cells, run.from);
      int64_t end = begin;
      while (end < num_cells && cells[end] <= run.to) ++end;
      on_run(begin, end, r * length, run.origin);
    }
  }
};

// Calls pass(pairs, output, item, places) for all outputs, in the order of their cells. `places` holds, for each run of
// kernel cells, its place among the inputs. ahead(output) is called some outputs before that if the outputs are not
// sorted, and so anywhere in memory.
template <class Ahead, class Pass>
Status for_outputs(const KernelPairs& args, Ahead ahead, Pass pass) {
  return with_axes(args.low.rows, [&](auto axes) {
    constexpr int D = decltype(axes)::value;
    constexpr int64_t distance = 12;
    Pairs<D> pairs;
    if (pairs.prepare(args) != Status::ok) return Status::out_of_memory;
    const int threads = useful_threads(args.threads, pairs.num_outputs * pairs.runs, cells_per_thread);
    const int64_t line = pairs.runs + 8;  // in another cache line than those of other threads
    Buffer<int64_t> all_places;
    if (!all_places.resize(threads * line)) return Status::out_of_memory;
#pragma omp parallel num_threads(threads)
    {
      const int t = omp_get_thread_num();
      const Share share(pairs.num_outputs, t, omp_get_num_threads());
      int64_t* const places = all_places.data() + t * line;
      memset(places, 0, size_t(pairs.runs) * sizeof(int64_t));
      int64_t item = share.begin < share.end ? item_of(pairs.out_splits, pairs.items, pairs.output(share.begin)) : 0;
      for (int64_t s = share.begin; s < share.end; ++s) {
        if (pairs.out_order && s + 2 * distance < share.end) {
          const int64_t next = pairs.output(s + 2 * distance);
          __builtin_prefetch(pairs.out_coords + next * D);
          __builtin_prefetch(as<int64_t>(args.row_splits) + next);
          ahead(pairs.output(s + distance));
        }
        const int64_t o = pairs.output(s);
        while (o >= pairs.out_splits[item + 1]) ++item;
        pass(pairs, o, item, places);
      }
    }
    return Status::ok;
  });
}

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
  const Status status = for_outputs(
      args, [](int64_t) {},
      [&](const auto& pairs, int64_t o, int64_t item, int64_t* places) {
        int64_t count = 0;
        pairs.visit(o, item, places, [&](int64_t begin, int64_t end, int64_t, int64_t) { count += end - begin; });
        splits[o + 1] = count;
      });
  splits[0] = 0;
  for (int64_t o = 0; o + 1 < args.row_splits.rows; ++o) splits[o + 1] += splits[o];
  return status;
}

Status fill_pairs(const KernelPairs& args) {
  const auto* const splits = as<int64_t>(args.row_splits);
  auto* const index = into<int32_t>(args.index);
  auto* const kernel_index = into<int32_t>(args.kernel_index);
  const auto prefetch_row = [&](int64_t o) {
    for (int64_t e = splits[o]; e < splits[o + 1]; e += 64 / int64_t(sizeof(int32_t))) {
      __builtin_prefetch(index + e, 1);
      __builtin_prefetch(kernel_index + e, 1);
    }
  };
  return for_outputs(args, prefetch_row, [&](const auto& pairs, int64_t o, int64_t item, int64_t* places) {
    int64_t e = splits[o];
    pairs.visit(o, item, places, [&](int64_t begin, int64_t end, int64_t kernel, int64_t origin) {
      for (int64_t j = 0; j < end - begin; ++j) {
        index[e + j] = pairs.order[begin + j];
        kernel_index[e + j] = int32_t(kernel + pairs.cells[begin + j] - origin);
      }
      e += end - begin;
    });
  });
}

// The pairs of a row differ in (kernel cell, index), and rows are in order of the index: sorting both as one number is
// a stable sort by the kernel cell.
Status sort_pairs(const SortPairs& args) {
  const auto* const splits = as<int64_t>(args.row_splits);
  auto* const index = into<int32_t>(args.index);
  auto* const kernel_index = into<int32_t>(args.kernel_index);
  const int64_t m = args.row_splits.rows - 1;
  int failed = 0;
#pragma omp parallel num_threads(useful_threads(args.threads, args.index.rows, cells_per_thread)) reduction(| : failed)
  {
    Sorter<uint64_t> sorter;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < m; ++o) {
      const int64_t begin = splits[o], n = splits[o + 1] - begin;
      uint64_t* const keys = sorter.keys(n);
      if (!keys) {
        failed = 1;
        continue;
      }
      for (int64_t j = 0; j < n; ++j) keys[j] = uint64_t(kernel_index[begin + j]) << 32 | uint64_t(index[begin + j]);
      const uint64_t* const sorted = sorter.sort(n);
      for (int64_t j = 0; j < n; ++j) {
        kernel_index[begin + j] = int32_t(sorted[j] >> 32);
        index[begin + j] = int32_t(sorted[j] & 0xffffffff);
      }
    }
  }
  return failed ? Status::out_of_memory : Status::ok;
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
      const auto past_equal = [&](int64_t i) {
        while (i && i < n && cells[i] == cells[i - 1]) ++i;
        return i;
      };
      // Channel by channel over blocks of rows, so that each channel is written in order of the cells.
      constexpr int64_t block = 256;
      int64_t at[block];
      const int64_t end = past_equal(share.end);
      for (int64_t i = past_equal(share.begin); i < end; i += block) {
        const int64_t rows = smaller(block, end - i);
        for (int64_t j = 0; j < rows; ++j) at[j] = cells[i + j] / volume * channels * volume + cells[i + j] % volume;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t j = 0; j < rows; ++j) out[at[j] + c * volume] += features[order[i + j] * channels + c];
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
