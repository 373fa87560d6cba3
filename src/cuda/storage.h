// Types of features in 16 bits, float16 and bfloat16. They are only storage: all arithmetic is done in Real<S>, which
// is float for these and S itself for float and double.
#pragma once

#include "formulas/common.h"

namespace kp {

// IEEE 754 binary16, NumPy's float16.
struct Half {
  uint16_t bits;

  Half() = default;
  __device__ explicit Half(float x) {
#ifdef __CUDACC_RTC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    bits = emu_half_of(x);
#endif
  }
  __device__ operator float() const {
#ifdef __CUDACC_RTC__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return emu_of_half(bits);
#endif
  }
};

// bfloat16: the upper half of a float.
struct Bfloat {
  uint16_t bits;

  Bfloat() = default;
  __device__ explicit Bfloat(float x) {
    const unsigned whole = __float_as_uint(x);
    // Rounds to nearest even; NaN stays NaN.
    bits = uint16_t(x == x ? (whole + 0x7fff + (whole >> 16 & 1)) >> 16 : whole >> 16 | 0x40);
  }
  __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

namespace {

template <class S>
struct Computed {
  using type = S;
};
template <>
struct Computed<Half> {
  using type = float;
};
template <>
struct Computed<Bfloat> {
  using type = float;
};
template <class S>
using Real = typename Computed<S>::type;

}  // namespace
}  // namespace kp
