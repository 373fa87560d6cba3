// Random points in a ball from an integer generator, and the start of held kernel points: the same bits on every
// machine.
#pragma once

#include <math.h>

#include "common.h"

namespace kp {
namespace {

// splitmix64 (Steele, Lea, Flood 2014)
inline uint64_t next(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// The initial state of random stream `number` of a seed.
inline uint64_t stream_of(uint64_t seed, uint64_t number) {
  uint64_t stream = seed * 0x9e3779b97f4a7c15 + number;
  next(stream);
  return stream;
}

// Draws a point uniformly from the ball with this squared radius, by rejection from the cube around it.
inline void draw(uint64_t& state, double squared_radius, int dimension, double* p, int64_t stride) {
  const double half_side = ::sqrt(squared_radius);
  double squared;
  do {
    squared = 0;
    for (int a = 0; a < dimension; ++a) {
      const double x = (double(next(state) >> 11) * (1.0 / 4503599627370496.0) - 1) * half_side;
      p[a * stride] = x;
      squared += x * x;
    }
  } while (squared >= squared_radius);
}

// Sets the start of held kernel point i: point 0 at the center, points 1 and 2 above and below it on the last axis.
inline void place_held(int i, int dimension, double* p, int64_t stride) {
  for (int a = 0; a < dimension; ++a) p[a * stride] = 0;
  if (i) p[(dimension - 1) * stride] = i == 1 ? 2.0 / 3 : -2.0 / 3;
}

}  // namespace
}  // namespace kp
