// Cells of integer coordinates in a box, and which input cells an output of a sparse convolution reads.
#pragma once

#include "formulas/common.h"

namespace kp {
namespace {

// A box of `sizes` cells from the cell `low` on. Its cells, and those of the batch items after one another, are
// numbered in C order: the last axis changes fastest.
template <int D>
struct Box {
  int64_t low[D], sizes[D];

  // Number of cells in the box.
  KP_HD int64_t volume() const {
    int64_t v = 1;
    for (int a = 0; a < D; ++a) v *= sizes[a];
    return v;
  }
};

// The largest integer that is not above a / b, for b > 0.
KP_HD int64_t floor_quotient(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// The number of the cell floor(coords / stride), which must be in the box.
template <int D>
KP_HD int64_t cell_of(const int32_t* coords, int64_t item, const Box<D>& box, const int64_t* stride) {
  int64_t cell = item;
  for (int a = 0; a < D; ++a) cell = cell * box.sizes[a] + floor_quotient(coords[a], stride[a]) - box.low[a];
  return cell;
}

// The coordinates of a cell, times `stride`. Returns its batch item.
template <int D>
KP_HD int64_t coords_of(int64_t cell, const Box<D>& box, const int64_t* stride, int32_t* coords) {
  for (int a = D - 1; a >= 0; --a) {
    coords[a] = int32_t((cell % box.sizes[a] + box.low[a]) * stride[a]);
    cell /= box.sizes[a];
  }
  return cell;
}

// Writes the outputs o along one axis that read a cell, whose coordinate there is c: o * stride = c + padding - k *
// dilation, for k from 0 to kernel_size - 1 and o from out_low to out_low + out_size - 1. `inner`: the number of cells
// of the axes after this one. The other of the `places` get the number `end`.
KP_HD void spread_cell(int64_t cell, int64_t inner, int64_t low, int64_t size, int64_t out_low, int64_t out_size,
                       int64_t kernel_size, int64_t stride, int64_t dilation, int64_t padding, int64_t end,
                       int64_t* spread, int64_t places) {
  const int64_t outer = cell / inner / size, c = cell / inner % size + low;
  int64_t written = 0;
  for (int64_t k = 0; k < kernel_size; ++k) {
    const int64_t scaled = c + padding - k * dilation, out = scaled / stride - out_low;
    if (scaled % stride == 0 && out >= 0 && out < out_size)
      spread[written++] = (outer * out_size + out) * inner + cell % inner;
  }
  while (written < places) spread[written++] = end;
}

// Along each axis, kernel cell k of output o reads the input at `scale * o + first + k * dilation`. With coordinates of
// 32 bits and numbers below 2^31 the sum fits 64 bits.
template <int D>
struct Kernel {
  int64_t size[D], scale[D], first[D], dilation[D];

  // Kernel cells come in runs whose inputs are adjacent along the last axis, so that one search finds a whole run. With
  // a dilation there every cell is a run of its own.
  KP_HD int64_t run_length() const { return dilation[D - 1] == 1 ? size[D - 1] : 1; }
  KP_HD int64_t num_runs() const {
    int64_t n = size[D - 1] / run_length();
    for (int a = 0; a + 1 < D; ++a) n *= size[a];
    return n;
  }
  // Where the first kernel cell of a run reads, from `scale * o` on.
  KP_HD void offset_of_run(int64_t run, int64_t* offset) const {
    int64_t rest = run * run_length();
    for (int a = D - 1; a >= 0; --a) {
      offset[a] = first[a] + rest % size[a] * dilation[a];
      rest /= size[a];
    }
  }
};

// The cells of the box that a run of kernel cells reads; `to` is below `from` if there are none. `origin` is where the
// first kernel cell reads, even outside of the box: cell c is read by kernel cell `c - origin` of the run.
struct Run {
  int64_t from, to, origin;
};

template <int D>
KP_HD Run run_of(const int64_t* scaled_output, const int64_t* offset, int64_t item, int64_t length, const Box<D>& box) {
  int64_t row = item;
  for (int a = 0; a + 1 < D; ++a) {
    const int64_t at = scaled_output[a] + offset[a] - box.low[a];
    if (uint64_t(at) >= uint64_t(box.sizes[a])) return {0, -1, 0};
    row = row * box.sizes[a] + at;
  }
  const int64_t at = scaled_output[D - 1] + offset[D - 1] - box.low[D - 1], size = box.sizes[D - 1];
  if (at >= size || at + length <= 0) return {0, -1, 0};
  row *= size;
  return {row + (at < 0 ? 0 : at), row + (at + length > size ? size : at + length) - 1, row + at};
}

}  // namespace
}  // namespace kp
