// The plane through a neighborhood: the covariance of its points, the eigenvalues and eigenvectors of that, and a
// normal.
//
// Everything is computed in float64 from coordinates relative to one point of the neighborhood, without contraction, so
// that host and device have the same bits: coordinates of a map, some 5e6, would leave no digits for a surface of
// millimeters in sums of squares.
#pragma once

#include <math.h>

#include "common.h"

namespace kp {
namespace {

// The mean and the products of coordinates of points, whose number is known beforehand: every term is divided by it
// before it is added, so that sums of squared distances that float64 can hold do not overflow.
struct Covariance {
  double weight;
  double x = 0, y = 0, z = 0, xx = 0, xy = 0, xz = 0, yy = 0, yz = 0, zz = 0;

  KP_HD explicit Covariance(int64_t number) : weight(1.0 / double(number)) {}
  KP_HD void add(double dx, double dy, double dz) {
    const double wx = dx * weight, wy = dy * weight, wz = dz * weight;
    x += wx, y += wy, z += wz;
    xx += wx * dx, xy += wx * dy, xz += wx * dz;
    yy += wy * dy, yz += wy * dz, zz += wz * dz;
  }
  KP_HD void center() {
    xx -= x * x, xy -= x * y, xz -= x * z;
    yy -= y * y, yz -= y * z, zz -= z * z;
  }
};

// The eigenvalues of a covariance, falling and not negative, and its eigenvectors: vector[i] has value[i].
struct Eigen {
  double value[3], vector[3][3];
};

// Jacobi's rotation in the plane of the axes p and q: afterwards the entry pq is zero. r is the third axis; u and v are
// the eigenvectors so far.
KP_HD void rotate(double& pp, double& qq, double& pq, double& pr, double& qr, double* u, double* v) {
  if (pq == 0) return;
  const double ratio = (qq - pp) / (2 * pq);  // infinite where pq has no effect: the tangent is then zero
  const double tangent = (ratio < 0 ? -1 : 1) / (fabs(ratio) + sqrt(ratio * ratio + 1));
  const double cosine = 1 / sqrt(tangent * tangent + 1), sine = tangent * cosine;
  pp -= tangent * pq;
  qq += tangent * pq;
  pq = 0;
  const double p = pr;
  pr = cosine * p - sine * qr;
  qr = sine * p + cosine * qr;
  for (int a = 0; a < 3; ++a) {
    const double b = u[a];
    u[a] = cosine * b - sine * v[a];
    v[a] = sine * b + cosine * v[a];
  }
}

KP_HD void sort_two(Eigen& eigen, int i, int j) {
  if (!(eigen.value[i] < eigen.value[j])) return;
  const double value = eigen.value[i];
  eigen.value[i] = eigen.value[j];
  eigen.value[j] = value;
  for (int a = 0; a < 3; ++a) {
    const double x = eigen.vector[i][a];
    eigen.vector[i][a] = eigen.vector[j][a];
    eigen.vector[j][a] = x;
  }
}

// Jacobi's method rather than a closed form: that loses half of the digits where eigenvalues are close, and every flat
// surface has one close to zero.
KP_HD Eigen eigen_of(const Covariance& c) {
  Eigen eigen{{0, 0, 0}, {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  const double size = c.xx + c.yy + c.zz;
  if (!(size > 0)) return eigen;
  double xx = c.xx / size, yy = c.yy / size, zz = c.zz / size, xy = c.xy / size, xz = c.xz / size, yz = c.yz / size;
  // Off the diagonal the entries are squared in each round: 4 to 6 rounds reach 1e-18, of which 16 digits see nothing.
  for (int round = 0; round < 16 && fabs(xy) + fabs(xz) + fabs(yz) > 1e-18; ++round) {
    rotate(xx, yy, xy, xz, yz, eigen.vector[0], eigen.vector[1]);
    rotate(xx, zz, xz, xy, yz, eigen.vector[0], eigen.vector[2]);
    rotate(yy, zz, yz, xy, xz, eigen.vector[1], eigen.vector[2]);
  }
  const double values[3] = {xx, yy, zz};
  for (int i = 0; i < 3; ++i) eigen.value[i] = values[i] > 0 ? values[i] * size : 0;
  sort_two(eigen, 0, 1);
  sort_two(eigen, 1, 2);
  sort_two(eigen, 0, 1);
  return eigen;
}

// normal = the unit vector in the space of the last `dimension` eigenvectors that is nearest to a direction. False, and
// nothing is written, if the direction is zero, or perpendicular to that space: if the cosine of the angle between them
// is at most `least`.
KP_HD bool point_towards(const Eigen& eigen, int dimension, double least, double dx, double dy, double dz,
                         double* normal) {
  const double largest = fmax(fabs(dx), fmax(fabs(dy), fabs(dz)));
  if (!(largest > 0 && largest - largest == 0)) return false;
  const double d[3] = {dx / largest, dy / largest, dz / largest};
  double p[3] = {d[0], d[1], d[2]};
  if (dimension < 3) {  // onto the third eigenvector, or off the first
    const double* const v = dimension == 1 ? eigen.vector[2] : eigen.vector[0];
    const double along = d[0] * v[0] + d[1] * v[1] + d[2] * v[2];
    for (int a = 0; a < 3; ++a) p[a] = dimension == 1 ? along * v[a] : d[a] - along * v[a];
  }
  const double length = sqrt(p[0] * p[0] + p[1] * p[1] + p[2] * p[2]);
  if (!(length > least * sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]))) return false;
  for (int a = 0; a < 3; ++a) normal[a] = p[a] / length;
  return true;
}

// The normal of the plane through `num` > 0 points around a query, and the eigenvalues of their covariance. Of the
// eigenvectors of the smallest eigenvalue the normal is the one nearest to the viewpoint, if there is one, else to +z,
// +y, +x. Eigenvalues are equal if the rounding of the coordinates can make the difference. `normal` and `eigenvalues`
// may be null.
template <class T>
KP_HD void fit_plane(const T* points, const T* query, const int32_t* index, int64_t num, const T* viewpoint, T* normal,
                     T* eigenvalues) {
  const double qx = double(query[0]), qy = double(query[1]), qz = double(query[2]);
  Covariance covariance(num > 0 ? num : 1);
  for (int64_t i = 0; i < num; ++i) {
    const T* const p = points + int64_t(index[i]) * 3;
    covariance.add(double(p[0]) - qx, double(p[1]) - qy, double(p[2]) - qz);
  }
  covariance.center();
  const Eigen eigen = eigen_of(covariance);
  if (eigenvalues)
    for (int i = 0; i < 3; ++i) eigenvalues[i] = T(eigen.value[i]);
  if (!normal) return;
  // Rounding of coordinates moves the roots of the eigenvalues by as much as the points; that of the sums above moves
  // the eigenvalues by some 1e-16 of the largest.
  const double deviation = sqrt(eigen.value[0]);
  const double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  const double rounding = 2 * unit * (fmax(fabs(qx), fmax(fabs(qy), fabs(qz))) + deviation);
  int dimension = 1;
  for (int i = 1; i >= 0 && dimension == 2 - i; --i) {
    const double difference = eigen.value[i] - eigen.value[i + 1];
    if (difference <= 1e-14 * eigen.value[0] || sqrt(eigen.value[i]) - sqrt(eigen.value[i + 1]) <= rounding)
      ++dimension;
  }
  // Rounding turns the plane by about its ratio to the extent. An axis passes in any case: one is within 55 degrees.
  const double angle = dimension < 3 ? rounding / sqrt(eigen.value[2 - dimension]) : 0;
  const double least = angle < 1e-6 ? 1e-6 : angle < 0.1 ? angle : 0.1;
  double n[3] = {0, 0, 1};
  bool is_set = viewpoint && point_towards(eigen, dimension, least, double(viewpoint[0]) - qx,
                                           double(viewpoint[1]) - qy, double(viewpoint[2]) - qz, n);
  for (int axis = 2; axis >= 0 && !is_set; --axis)
    is_set = point_towards(eigen, dimension, least, axis == 0, axis == 1, axis == 2, n);
  for (int a = 0; a < 3; ++a) normal[a] = T(n[a]);
}

}  // namespace
}  // namespace kp
