// Bilinear interpolation in images and in the scope of deformable kernels, one axis at a time (Gao et al. 2020, eq. 12
// and 13), and the positions of a kernel's taps.
#pragma once

#include "common.h"

namespace kp {
namespace {

// The two cells around a position along one axis, and the factors with which they are interpolated; the slopes are the
// derivatives of these factors by the position. A cell that does not exist has factors and slopes of 0.
template <class T>
struct Hat {
  int32_t low, high;
  T low_factor, high_factor, low_slope, high_slope;
};

// The cells 0, ..., size - 1 around `at`. Outside of them values fall to 0 within one cell; if `clips`, the position is
// clipped to [0, size - 1] instead. At a cell the slope is that to the right. At the last cell of a clipped axis it is
// that to the left: to the right it is zero, and a tap that starts there could never move. NaN gives factors of NaN.
// Selects and no branches, so that compilers make vectors of it.
template <class T>
KP_HD Hat<T> hat_at(T at, int32_t size, bool clips) {
  const T last = T(size - 1);
  const T clipped = at < 0 ? T(0) : at > last ? last : at;
  const T position = clips ? clipped : at;
  const bool inside = (position > -1) & (position < T(size)), moves = !clips | ((at == clipped) & (size > 1));
  const T within = inside ? position : T(0);
  int32_t low = int32_t(within);
  low -= T(low) > within;
  low -= int32_t(clips & (low == size - 1) & (size > 1));
  const T fraction = within - T(low), nan_or_zero = position == position ? T(0) : position, slope = moves ? T(1) : T(0);
  const bool has_low = inside & (low >= 0), has_high = inside & (low + 1 < size);
  return {low < 0 ? 0 : low,
          low + 1 < size ? low + 1 : size - 1,
          (has_low ? 1 - fraction : T(0)) + nan_or_zero,
          (has_high ? fraction : T(0)) + nan_or_zero,
          (has_low ? -slope : T(0)) + nan_or_zero,
          (has_high ? slope : T(0)) + nan_or_zero};
}

// The position of tap u of `taps` along an axis of the scope: a centered grid of unit spacing, or spread over it.
template <class T>
KP_HD T grid_position(int32_t u, int32_t taps, int32_t scope, bool uniform) {
  if (uniform && taps > 1) return T(u) * T(scope - 1) / T(taps - 1);
  return T(uniform ? 0 : u) + T(scope - (uniform ? 1 : taps)) / 2;
}

}  // namespace
}  // namespace kp
