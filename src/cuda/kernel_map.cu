// Kernel maps on the GPU. Inputs are sorted by the number of their cell, and a thread for each output finds the cells
// that it reads by binary search: one for each run of kernel cells along the last axis.
//
// Compiled for the number of axes, or for the type of the features of to_dense:
// compile:
// compile: KP_DIM=1
// compile: KP_DIM=3
// compile: KP_S=float
// compile: KP_S=kp::Half

#include "launch.h"
#include "storage.h"
#include "formulas/kernel_map.h"

#ifdef KP_DIM
// Numbers for each axis, of which D are used; passed one by one, since an array would have to be copied to the GPU.
#define KP_BOX \
  int64_t low0, int64_t low1, int64_t low2, int64_t low3, int64_t sizes0, int64_t sizes1, int64_t sizes2, int64_t sizes3
#define KP_STRIDE int64_t stride0, int64_t stride1, int64_t stride2, int64_t stride3
#define KP_KERNEL                                                                                                     \
  int64_t kernel_size0, int64_t kernel_size1, int64_t kernel_size2, int64_t kernel_size3, int64_t scale0,             \
      int64_t scale1, int64_t scale2, int64_t scale3, int64_t first0, int64_t first1, int64_t first2, int64_t first3, \
      int64_t dilation0, int64_t dilation1, int64_t dilation2, int64_t dilation3

namespace kp {
namespace {

constexpr int D = KP_DIM;

struct Axes {
  int64_t of[4];
};

__device__ Box<D> box_of(Axes low, Axes sizes) {
  Box<D> box;
  for (int a = 0; a < D; ++a) {
    box.low[a] = low.of[a];
    box.sizes[a] = sizes.of[a];
  }
  return box;
}

__device__ Kernel<D> kernel_of(Axes size, Axes scale, Axes first, Axes dilation) {
  Kernel<D> kernel;
  for (int a = 0; a < D; ++a) {
    kernel.size[a] = size.of[a];
    kernel.scale[a] = scale.of[a];
    kernel.first[a] = first.of[a];
    kernel.dilation[a] = dilation.of[a];
  }
  return kernel;
}

// Calls visit(position among the sorted inputs, kernel cell) for each pair of output o, by kernel cell.
template <class Visit>
__device__ void visit_pairs(const int64_t* cells, int64_t num_cells, const int32_t* out_coords, int64_t o, int64_t item,
                            const Box<D>& box, const Kernel<D>& kernel, Visit visit) {
  int64_t scaled[D], offset[D];
  for (int a = 0; a < D; ++a) scaled[a] = kernel.scale[a] * out_coords[o * D + a];
  const int64_t runs = kernel.num_runs(), length = kernel.run_length();
  for (int64_t r = 0; r < runs; ++r) {
    kernel.offset_of_run(r, offset);
    const Run run = run_of<D>(scaled, offset, item, length, box);
    if (run.to < run.from) continue;
    for (int64_t at = lower_bound(cells, int64_t(0), num_cells, run.from); at < num_cells && cells[at] <= run.to; ++at)
      visit(at, int32_t(r * length + cells[at] - run.origin));
  }
}

}  // namespace
}  // namespace kp

using namespace kp;

// cells[i] = number of the cell of row i
extern "C" __global__ void number_cells(const int32_t* coords, int64_t num_rows, const int64_t* row_splits,
                                        int num_items, KP_BOX, KP_STRIDE, int64_t* cells) {
  const Box<D> box = box_of({low0, low1, low2, low3}, {sizes0, sizes1, sizes2, sizes3});
  const Axes stride = {stride0, stride1, stride2, stride3};
  for (int64_t i = first_thread(); i < num_rows; i += num_threads())
    cells[i] = cell_of<D>(coords + i * D, item_of(row_splits, num_items, i), box, stride.of);
}

// The coordinates of sorted cells, and the row_splits of their batch items.
extern "C" __global__ void coords_of_cells(const int64_t* cells, int64_t num_cells, KP_BOX, KP_STRIDE,
                                           int64_t num_items, int32_t* coords, int64_t* row_splits) {
  const Box<D> box = box_of({low0, low1, low2, low3}, {sizes0, sizes1, sizes2, sizes3});
  const Axes stride = {stride0, stride1, stride2, stride3};
  for (int64_t i = first_thread(); i < num_cells; i += num_threads())
    coords_of<D>(cells[i], box, stride.of, coords + i * D);
  for (int64_t b = first_thread(); b <= num_items; b += num_threads())
    row_splits[b] = lower_bound(cells, int64_t(0), num_cells, b * box.volume());
}

// counts[o] = number of pairs of output o
extern "C" __global__ void count_inputs(const int64_t* cells, int64_t num_cells, KP_BOX, const int32_t* out_coords,
                                        int64_t num_outputs, const int64_t* out_row_splits, int num_items, KP_KERNEL,
                                        int64_t* counts) {
  const Box<D> box = box_of({low0, low1, low2, low3}, {sizes0, sizes1, sizes2, sizes3});
  const Kernel<D> kernel =
      kernel_of({kernel_size0, kernel_size1, kernel_size2, kernel_size3}, {scale0, scale1, scale2, scale3},
                {first0, first1, first2, first3}, {dilation0, dilation1, dilation2, dilation3});
  for (int64_t o = first_thread(); o < num_outputs; o += num_threads()) {
    int64_t count = 0;
    visit_pairs(cells, num_cells, out_coords, o, item_of(out_row_splits, num_items, o), box, kernel,
                [&](int64_t, int32_t) { ++count; });
    counts[o] = count;
  }
}

// Writes the pairs of each output from row_splits[o] on.
extern "C" __global__ void write_inputs(const int64_t* cells, const int32_t* order, int64_t num_cells, KP_BOX,
                                        const int32_t* out_coords, int64_t num_outputs, const int64_t* out_row_splits,
                                        int num_items, KP_KERNEL, const int64_t* row_splits, int32_t* index,
                                        int32_t* kernel_index) {
  const Box<D> box = box_of({low0, low1, low2, low3}, {sizes0, sizes1, sizes2, sizes3});
  const Kernel<D> kernel =
      kernel_of({kernel_size0, kernel_size1, kernel_size2, kernel_size3}, {scale0, scale1, scale2, scale3},
                {first0, first1, first2, first3}, {dilation0, dilation1, dilation2, dilation3});
  for (int64_t o = first_thread(); o < num_outputs; o += num_threads()) {
    int64_t e = row_splits[o];
    visit_pairs(cells, num_cells, out_coords, o, item_of(out_row_splits, num_items, o), box, kernel,
                [&](int64_t at, int32_t cell) {
                  index[e] = order[at];
                  kernel_index[e++] = cell;
                });
  }
}
#endif

#ifdef KP_S
namespace kp {
namespace {

using S = KP_S;  // type of features
using F = Real<S>;

// Position of channel c of a cell in a dense array (B, C, volume).
__device__ int64_t dense_position(int64_t cell, int64_t c, int64_t channels, int64_t volume) {
  return (cell / volume * channels + c) * volume + cell % volume;
}

}  // namespace
}  // namespace kp

using namespace kp;

// Adds up the features of the rows of each cell, which follow one another in `order`. Neighboring threads write to
// neighboring cells.
extern "C" __global__ void sum_cells(const int64_t* cells, const int32_t* order, int64_t num_rows, const S* features,
                                     int64_t channels, int64_t volume, S* out) {
  for (int64_t v = first_thread(); v < num_rows * channels; v += num_threads()) {
    const int64_t c = v / num_rows, i = v % num_rows;
    if (i && cells[i] == cells[i - 1]) continue;
    F sum = F(0);
    for (int64_t at = i; at < num_rows && cells[at] == cells[i]; ++at)
      sum += F(features[int64_t(order[at]) * channels + c]);
    out[dense_position(cells[i], c, channels, volume)] = S(sum);
  }
}

// grad_features[i] = the gradient at the cell of row i
extern "C" __global__ void read_cells(const int64_t* cells, const int32_t* order, int64_t num_rows, const S* grad_out,
                                      int64_t channels, int64_t volume, S* grad_features) {
  for (int64_t v = first_thread(); v < num_rows * channels; v += num_threads()) {
    const int64_t c = v / num_rows, i = v % num_rows;
    grad_features[int64_t(order[i]) * channels + c] = grad_out[dense_position(cells[i], c, channels, volume)];
  }
}
#endif

#if !defined(KP_DIM) && !defined(KP_S)
using namespace kp;

// The outputs that read each cell, along one axis, as in src/cpu/kernels.h; `places` for each cell.
extern "C" __global__ void spread(const int64_t* cells, int64_t num_cells, int64_t places, int64_t inner, int64_t low,
                                  int64_t size, int64_t out_low, int64_t out_size, int64_t kernel_size, int64_t stride,
                                  int64_t dilation, int64_t padding, int64_t end, int64_t* spread) {
  for (int64_t i = first_thread(); i < num_cells; i += num_threads())
    spread_cell(cells[i], inner, low, size, out_low, out_size, kernel_size, stride, dilation, padding, end,
                spread + i * places, places);
}

// heads[i] = whether sorted cell i, below `end`, is the first with its number
extern "C" __global__ void mark_heads(const int64_t* cells, int64_t num_cells, int64_t end, int32_t* heads) {
  for (int64_t i = first_thread(); i < num_cells; i += num_threads())
    heads[i] = cells[i] < end && (i == 0 || cells[i] != cells[i - 1]);
}

// numbers[i]: how many heads there are among the first i + 1 sorted cells
extern "C" __global__ void keep_heads(const int64_t* cells, const int32_t* heads, const int64_t* numbers,
                                      int64_t num_cells, int64_t* unique) {
  for (int64_t i = first_thread(); i < num_cells; i += num_threads())
    if (heads[i]) unique[numbers[i] - 1] = cells[i];
}

// keys[e]: the row of pair e, then its kernel cell
extern "C" __global__ void keys_of_pairs(const int64_t* row_splits, int num_rows, const int32_t* kernel_index,
                                         int64_t num_pairs, int64_t num_kernels, int64_t* keys) {
  for (int64_t e = first_thread(); e < num_pairs; e += num_threads())
    keys[e] = item_of(row_splits, num_rows, e) * num_kernels + kernel_index[e];
}
#endif
