// Bilinear interpolation in images and in the scope of deformable kernels, one axis at a time (Gao et al. 2020, eq. 12
// and 13), and the positions of a kernel's taps.
#pragma once

#include "common.h"

namespace kp {
namespace {

// The two cells around a position along one axis, and the factors with which they are interpolated; the slopes are the
// derivatives of these factors by the position. A cell that does not exist has factors of 0.
template <class T>
struct Hat {
  int64_t low, high;
  T low_factor, high_factor, low_slope, high_slope;
};

// The cells 0, ..., size - 1 around `at`. Outside of them values fall to 0 within one cell; if `clips`, the position is
// clipped to [0, size - 1] instead. At a cell the slope is that to the right. At the last cell of a clipped axis it is
// that to the left: to the right it is zero, and a tap that starts there could never move. NaN gives factors of NaN.
template <class T>
KP_HD Hat<T> hat_at(T at, int64_t size, bool clips) {
  const T last = T(size - 1);
  T slope = T(1);
  if (clips && !(at >= 0 && at <= last)) {
    slope = T(0);
    at = at < 0 ? T(0) : at > last ? last : at;
  }
  if (at != at) return {0, 0, at, at, at, at};
  if (!(at > -1 && at < T(size))) return {0, 0, T(0), T(0), T(0), T(0)};
  int64_t low = int64_t(at);
  if (T(low) > at) --low;
  if (clips && low == size - 1) {
    if (size == 1)
      slope = T(0);
    else
      --low;
  }
  const T fraction = at - T(low);
  const bool has_low = low >= 0, has_high = low + 1 < size;
  return {has_low ? low : 0,          has_high ? low + 1 : size - 1, has_low ? 1 - fraction : T(0),
          has_high ? fraction : T(0), has_low ? -slope : T(0),       has_high ? slope : T(0)};
}

// The position of tap u of `taps` along an axis of the scope: a centered grid of unit spacing, or spread over it.
template <class T>
KP_HD T grid_position(int64_t u, int64_t taps, int64_t scope, bool uniform) {
  if (uniform && taps > 1) return T(u) * T(scope - 1) / T(taps - 1);
  return T(uniform ? 0 : u) + T(scope - (uniform ? 1 : taps)) / 2;
}

}  // namespace
}  // namespace kp
