// Where a neighbor lies in the filter of a continuous convolution (Ummenhofer et al. 2020): the mapping of a relative
// position to the cube of the filter, the cells that it is interpolated between, and the derivatives of both.
// V is a scalar or a vector of T; V{} + 1 is a one of that type. No function uses fused multiply-adds, so all machines
// choose the same cells.
#pragma once

#include <math.h>

#include "common.h"
#ifndef __CUDACC__
#include "cpu/simd.h"
#endif

namespace kp {

struct FilterOptions {
  CoordinateMapping mapping;
  Interpolation interpolation;
  int width, height, depth;  // cells along x, y and z
  bool align_corners;
};

namespace {

using ::sqrt;

template <class V>
KP_HD V magnitude(V x) {
  return x < 0 ? -x : x;
}

// atan(x) for |x| <= 1. For x > tan(pi / 8) it is pi / 4 + atan((x - 1) / (x + 1)); then the Taylor series, whose last
// term is below the rounding error: tan(pi / 8)^2 = 0.172, and 0.172^9 / 19 = 7e-9, 0.172^20 / 41 = 1e-17.
template <class T, class V>
KP_HD V arc_tangent(V x) {
  const V size = magnitude(x);
  const auto large = size > T(0.41421356237309503);
  const V reduced = large ? (size - 1) / (size + 1) : size;
  const V square = reduced * reduced;
  constexpr int terms = sizeof(T) == 4 ? 9 : 20;
  V sum = V{} + 1 / T(2 * terms - 1);
  for (int k = terms - 2; k >= 0; --k) sum = 1 / T(2 * k + 1) - square * sum;
  const V angle = large ? T(0.78539816339744828) + reduced * sum : reduced * sum;
  return x < 0 ? -angle : angle;
}

// Thresholds of Open3D: closer to the origin, or to the axis, points are mapped to it.
template <class T>
constexpr T least_coordinate = T(1e-8);
template <class T>
constexpr T least_square = T(1e-12);
template <class T>
constexpr T four_over_pi = T(1.2732395447351628);

// |p|_2 / |p|_inf, zero near the origin; also its numerator and denominator.
template <class T, class V>
KP_HD V radial_scale(const V* p, V& norm, V& largest) {
  norm = sqrt((p[0] * p[0] + p[1] * p[1]) + p[2] * p[2]);
  largest = V{};
  for (int a = 0; a < 3; ++a) largest = magnitude(p[a]) > largest ? magnitude(p[a]) : largest;
  return largest < least_coordinate<T> ? V{} : norm / largest;
}

// Maps the unit ball to the cube [-1, 1]^3 along rays: p |p|_2 / |p|_inf.
template <class T, class V>
KP_HD void ball_to_cube_radial(V* p) {
  V norm, largest;
  const V scale = radial_scale<T>(p, norm, largest);
  for (int a = 0; a < 3; ++a) p[a] = p[a] * scale;
}

// Replaces the gradient of the result by that of p. Where two coordinates are equally large, the derivative is that of
// the side on which the first is the larger; at the origin it is 0.
template <class T, class V>
KP_HD void ball_to_cube_radial_grad(const V* p, V* grad) {
  V norm, largest;
  const V scale = radial_scale<T>(p, norm, largest);
  const auto near_origin = largest < least_coordinate<T>;
  const V dot = (grad[0] * p[0] + grad[1] * p[1]) + grad[2] * p[2];
  const V by_norm = near_origin ? V{} : dot / (norm * largest), by_largest = near_origin ? V{} : dot * scale / largest;
  V rest = V{} + 1;  // 1 until the largest coordinate was seen
  for (int a = 0; a < 3; ++a) {
    const V is_largest = magnitude(p[a]) < largest ? V{} : rest;
    rest = rest - is_largest;
    grad[a] = (grad[a] * scale + p[a] * by_norm) - is_largest * (p[a] < 0 ? -by_largest : by_largest);
  }
}

// Maps the unit ball to the cube [-1, 1]^3 with the constant Jacobian determinant 6 / pi (Griepentrog et al. 2008): the
// ball to a cylinder about the z axis, whose discs are then mapped to squares. `flat`: |z| small, the cylinder's side.
template <class T, class V>
struct BallToCube {
  V x, y, z, disc2, norm;  // the point; squared distance from the z axis; distance from the origin
  V scale;                 // of x and y, ball to cylinder
  V radius, angle;         // of the disc point: distance from the axis; 4 / pi times the angle from the nearer axis

  KP_HD auto at_origin() const { return norm * norm < least_square<T>; }
  KP_HD auto polar() const { return T(1.25) * (z * z) > disc2; }
  KP_HD auto on_axis() const { return radius * radius < least_square<T>; }
  KP_HD auto along_x() const { return magnitude(y) <= magnitude(x); }

  KP_HD explicit BallToCube(const V* p) : x(p[0]), y(p[1]), z(p[2]) {
    disc2 = x * x + y * y;
    norm = sqrt(disc2 + z * z);
    const V size_z = magnitude(z);
    scale = polar() ? sqrt(3 * norm / (norm + size_z)) : norm / sqrt(disc2);
    radius = scale * sqrt(disc2);
    angle = four_over_pi<T> * arc_tangent<T>(along_x() ? y / x : x / y);
  }

  KP_HD void map(V* to) const {
    const V first = x < 0 ? -radius : radius, second = y < 0 ? -radius : radius;
    const V height = polar() ? (z < 0 ? -norm : norm) : T(1.5) * z;
    to[0] = at_origin() | on_axis() ? V{} : along_x() ? first : second * angle;
    to[1] = at_origin() | on_axis() ? V{} : along_x() ? first * angle : second;
    to[2] = at_origin() ? V{} : height;
  }

  // Replaces the gradient of the result by that of the point; 0 where the map is constant, at the origin and, for x and
  // y, on the z axis. At the seams the derivative is that of the branch which map() takes.
  KP_HD void pull_back(V* grad) const {
    // Disc to square: (s, s * angle) with s = +-radius.
    const V sign = along_x() ? (x < 0 ? V{} - 1 : V{} + 1) : (y < 0 ? V{} - 1 : V{} + 1);
    const V by_long = along_x() ? grad[0] : grad[1], by_short = along_x() ? grad[1] : grad[0];
    V by_radius = (by_long + by_short * angle) * sign;
    const V by_angle = by_short * sign * radius * four_over_pi<T>;  // of the angle from the nearer axis
    // The angle does not depend on the scale of x and y; the radius is scale * sqrt(x^2 + y^2).
    const auto is_degenerate = at_origin() | on_axis();
    const V disc = sqrt(disc2);
    const V turn = is_degenerate ? V{} : (along_x() ? by_angle : -by_angle) / disc2;
    by_radius = is_degenerate ? V{} : by_radius;
    const V by_disc = by_radius * scale, by_scale = by_radius * disc;
    // Ball to cylinder.
    const V size_z = magnitude(z), sum = norm + size_z, sign_z = z < 0 ? V{} - 1 : V{} + 1;
    const V by_square = by_scale / (2 * scale) * 3 / (sum * sum);  // times the derivative of norm / (norm + |z|)
    const V by_norm = polar() ? by_square * size_z + grad[2] * sign_z : by_scale / disc;
    const V by_size_z = polar() ? -by_square * norm : V{};
    const V by_disc_below = polar() ? V{} : by_scale * norm / disc2;
    const V along_disc = is_degenerate ? V{} : (by_disc - by_disc_below) / disc;
    const V along = at_origin() ? V{} : by_norm / norm;
    const V height = polar() ? by_size_z * sign_z : T(1.5) * grad[2];
    grad[0] = (x * along_disc - y * turn) + x * along;
    grad[1] = (y * along_disc + x * turn) + y * along;
    grad[2] = at_origin() ? V{} : height + z * along;
  }
};

// A filter of size[0] x size[1] x size[2] cells along x, y and z. Cell coordinates are 0, 1, ..., size - 1 at the
// centers of the cells; position u in [-1/2, 1/2] of the filter's shape is at scale * u + shift.
template <class T>
struct Filter {
  CoordinateMapping mapping;
  Interpolation interpolation;
  int size[3];
  T scale[3], shift[3];

  KP_HD Filter(const FilterOptions& options, const T* offset)
      : mapping(options.mapping),
        interpolation(options.interpolation),
        size{options.width, options.height, options.depth} {
    for (int a = 0; a < 3; ++a) {
      scale[a] = T(options.align_corners ? size[a] - 1 : size[a]);
      shift[a] = T(size[a] - 1) / 2 + (options.align_corners || !offset ? T(0) : offset[a]);
    }
  }

  // Cells that a neighbor is interpolated between: along each axis with more than one cell, two.
  KP_HD int corners() const {
    int count = 1;
    for (int a = 0; a < 3 && interpolation != Interpolation::nearest_neighbor; ++a) count *= size[a] > 1 ? 2 : 1;
    return count;
  }
  // The axes' bits of corner j: bit a is set if the corner is the upper one along axis a.
  KP_HD int bits(int j) const {
    int axes = 0;
    for (int a = 0; a < 3; ++a)
      if (size[a] > 1) {
        axes |= (j & 1) << a;
        j >>= 1;
      }
    return axes;
  }
  // Cells from the lowest corner to corner j. A filter is stored as (depth, height, width).
  KP_HD int step(int j) const {
    const int axes = bits(j);
    return (axes & 1) + size[0] * ((axes >> 1 & 1) + size[1] * (axes >> 2));
  }
};

// Where a neighbor lies in a filter: along each axis its lower cell, and the weights of that cell and the next one with
// their derivatives by the coordinate. Along an axis of one cell, and for the nearest cell, only the first is used.
template <class T, class V>
struct Location {
  V cell[3], weight[3][2], slope[3][2];

  // `p`: the relative position divided by half the extent. It is replaced by the position in the cube [-1, 1]^3.
  KP_HD Location(const Filter<T>& filter, V* p) {
    if (filter.mapping == CoordinateMapping::ball_to_cube_radial) ball_to_cube_radial<T>(p);
    if (filter.mapping == CoordinateMapping::ball_to_cube_volume_preserving) BallToCube<T, V>(p).map(p);
    for (int a = 0; a < 3; ++a) find(filter, a, p[a] * T(0.5) * filter.scale[a] + filter.shift[a]);
  }

  // The weight of a corner of the filter, from its axes' bits.
  KP_HD V corner(int bits) const { return of(weight[0], bits) * (of(weight[1], bits >> 1) * of(weight[2], bits >> 2)); }
  // Adds the derivatives of that weight by the coordinates, times `by_weight`.
  KP_HD void add_slopes(int bits, V by_weight, V* grad) const {
    const V x = of(weight[0], bits), y = of(weight[1], bits >> 1), z = of(weight[2], bits >> 2);
    grad[0] = grad[0] + by_weight * of(slope[0], bits) * (y * z);
    grad[1] = grad[1] + by_weight * of(slope[1], bits >> 1) * (x * z);
    grad[2] = grad[2] + by_weight * of(slope[2], bits >> 2) * (x * y);
  }

  // The gradient of p before the mapping from that of the cell coordinates.
  KP_HD static void pull_back(const Filter<T>& filter, const V* p, V* grad) {
    for (int a = 0; a < 3; ++a) grad[a] = grad[a] * (T(0.5) * filter.scale[a]);
    if (filter.mapping == CoordinateMapping::ball_to_cube_radial) ball_to_cube_radial_grad<T>(p, grad);
    if (filter.mapping == CoordinateMapping::ball_to_cube_volume_preserving) BallToCube<T, V>(p).pull_back(grad);
  }

  // The lowest cell, as a number of type T.
  KP_HD V lowest(const Filter<T>& filter) const {
    return cell[0] + (cell[1] * T(filter.size[0]) + cell[2] * T(filter.size[0] * filter.size[1]));
  }

 private:
  // The value of the lower or upper cell. Not an index, for which a GPU would keep the arrays in memory.
  KP_HD static V of(const V* values, int upper) { return upper & 1 ? values[1] : values[0]; }

  KP_HD void find(const Filter<T>& filter, int a, V c) {
    const T last = T(filter.size[a] - 1), last_lower = last > 1 ? last - 1 : T(0);
    const V positive = c > 0 ? c : V{};  // 0 if c is NaN, which must not be converted to an integer
    if (filter.interpolation == Interpolation::nearest_neighbor) {
      const V inside = positive < last ? positive : V{} + last;
      const V below = whole(inside);
      cell[a] = inside - below < T(0.5) ? below : below + 1;  // halves are rounded up, as in Open3D
      weight[a][0] = c == c ? V{} + 1 : c;
      weight[a][1] = slope[a][0] = slope[a][1] = V{};
      return;
    }
    cell[a] = whole(positive < last_lower ? positive : V{} + last_lower);
    V clamped = c, passes = V{} + 1;
    if (filter.interpolation == Interpolation::linear) {
      clamped = c < 0 ? V{} : c > last ? V{} + last : c;
      passes = c < 0 ? V{} : c < last ? V{} + 1 : V{};
    }
    for (int j = 0; j < 2; ++j) {
      const V distance = clamped - cell[a] - T(j), hat = 1 - magnitude(distance);
      weight[a][j] = hat < 0 ? V{} : hat;
      slope[a][j] = distance < -1 ? V{} : distance < 0 ? passes : distance < 1 ? -passes : V{};
    }
  }
};

}  // namespace
}  // namespace kp
