// Types and formulas shared by all kernels, on host and device. NVRTC has no standard library, so nothing here uses it.
#pragma once

#ifdef __CUDACC__
#define KP_HD __host__ __device__ inline
#else
#define KP_HD inline
#endif
#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stddef.h>
#include <stdint.h>
#endif

namespace kp {

// Options of operators. The tuples of their names in kpcore/*.py (_METRICS, _SORTS, _IGNORES, _REDUCES, INFLUENCES,
// AGGREGATIONS, _ACTIVATIONS, _MAPPINGS, _INTERPOLATIONS) are in the same order, since only the number of an option is
// passed.
enum class Metric : int { l2, l1, linf };
enum class Sort : int { none, index, distance };
// Which points are never neighbors of a query: none, those with equal coordinates, the one with the same index.
enum class Ignore : int { none, equal, index };
enum class Influence : int { linear, gaussian, constant };
enum class Aggregation : int { sum, closest };
enum class Reduction : int { mean, sum, max, min };
enum class Activation : int { leaky_relu, relu, relu6, sigmoid };
enum class CoordinateMapping : int { ball_to_cube_radial, ball_to_cube_volume_preserving, identity };
enum class Interpolation : int { linear, linear_border, nearest_neighbor };

namespace {

// The integer part of x, rounded towards zero, for x that int32 can hold.
KP_HD float whole(float x) {
  return float(int32_t(x));
}
KP_HD double whole(double x) {
  return double(int32_t(x));
}

// Whether x replaces the largest value so far. Of equal values the first stays; NaN wins over numbers and the first NaN
// stays. V is a scalar or a vector.
template <class V>
KP_HD auto exceeds(V x, V largest) {
  return (x > largest) | ((x != x) & (largest == largest));
}

}  // namespace
}  // namespace kp
