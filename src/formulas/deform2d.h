// Bilinear interpolation in images and in the scope of deformable kernels, one axis at a time (Gao et al. 2020, eq. 12
// and 13), and the positions of a kernel's taps.
#pragma once

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {
namespace {

// The two cells around a position along one axis, and the factors with which they are interpolated; the slopes are the
// derivatives of these factors by the position. A cell that does not exist has factors and slopes of 0. V is a scalar
// or a vector; the numbers of the cells are whole ones of that type.
template <class V, class Cell = V>
struct Hat {
  Cell low, high;
  V low_factor, high_factor, low_slope, high_slope;
};

// The cells 0, ..., size - 1 around `at`. Outside of them values fall to 0 within one cell; if `clips`, the position is
// clipped to [0, size - 1] instead. At a cell the slope is that to the right. At the last cell of a clipped axis it is
// that to the left: to the right it is zero, and a tap that starts there could never move. NaN gives factors of NaN.
template <class V, class T>
KP_HD Hat<V> hat_at(V at, T size, bool clips) {
  const V zero = V{}, one = zero + 1, last = zero + (size - 1);
  const V clipped = at < 0 ? zero : at > last ? last : at;
  const V position = clips ? clipped : at;
  const auto inside = (position > -1) & (position < size);
  const V within = inside ? position : zero;
  V low = whole(within), slope = one;
  low = low > within ? low - 1 : low;
  if (clips && size > 1) {
    low = low == last ? low - 1 : low;
    slope = at == clipped ? one : zero;
  } else if (clips) {
    slope = zero;
  }
  const V fraction = within - low, zero_or_nan = position == position ? zero : position;
  const auto has_low = inside & (low >= 0), has_high = inside & (low < last);
  return {low < 0 ? zero : low,
          low < last ? low + 1 : last,
          (has_low ? one - fraction : zero) + zero_or_nan,
          (has_high ? fraction : zero) + zero_or_nan,
          (has_low ? -slope : zero) + zero_or_nan,
          (has_high ? slope : zero) + zero_or_nan};
}

// The position of tap u of `taps` along an axis of the scope: a centered grid of unit spacing, or spread over it.
template <class T>
KP_HD T grid_position(int32_t u, int32_t taps, int32_t scope, bool uniform) {
  if (uniform && taps > 1) return T(u) * T(scope - 1) / T(taps - 1);
  return T(uniform ? 0 : u) + T(scope - (uniform ? 1 : taps)) / 2;
}

}  // namespace
}  // namespace kp
