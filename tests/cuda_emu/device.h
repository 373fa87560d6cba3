// Implements CUDA C++ for a host compiler: included before a kernel's source, it defines the CUDA keywords, variables
// and functions that kernels use. A CUDA thread is a fiber (runtime.cpp); the threads of a block take turns on one
// core, in an order that tests choose. Only what kpcore's kernels use is defined: anything else is a compile error, to
// be added here.
#pragma once

#include <math.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "runtime.h"

#undef INFINITY  // the compiler for GPUs has no such macros
#undef NAN

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ static const
// All shared variables of a file are in one section, which is overwritten with NaN before each block.
#define __shared__ static __attribute__((section("emu_shared")))
// emulator.py replaces "extern __shared__ T name[];" by this.
#define EMU_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emu::dynamic_shared)

#define threadIdx (emu::self->index)
#define blockIdx (emu::block)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)

// For functions that implement CUDA: the memory accesses of kernels are checked, not those of these functions.
#define EMU_FUNCTION __attribute__((no_sanitize_thread)) inline
#define EMU_LINE int line = __builtin_LINE()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// ---- barriers

EMU_FUNCTION void __syncthreads(EMU_LINE) {
  emu::barrier(0, line);
}
EMU_FUNCTION int __syncthreads_count(int predicate, EMU_LINE) {
  return int(emu::barrier(predicate, line));
}
EMU_FUNCTION int __syncthreads_or(int predicate, EMU_LINE) {
  return emu::barrier(predicate, line) != 0;
}
EMU_FUNCTION void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
  uint64_t values[32];
  emu::meet(emu::Meeting::sync, mask, 0, values, line);
}

// ---- warps

template <class T>
EMU_FUNCTION uint64_t emu_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
EMU_FUNCTION T emu_shuffle(unsigned mask, T value, unsigned from, int line) {
  uint64_t values[32];
  const uint32_t there = emu::meet(emu::Meeting::shuffle, mask, emu_bits(value), values, line);
  if (!(there >> from & 1))
    emu::fail("line %d: a shuffle reads lane %u, which is not in its mask %08x", line, from, mask);
  memcpy(&value, &values[from], sizeof(T));
  return value;
}
template <class T>
EMU_FUNCTION T __shfl_sync(unsigned mask, T value, int from, EMU_LINE) {
  return emu_shuffle(mask, value, unsigned(from) % 32, line);
}
template <class T>
EMU_FUNCTION T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMU_LINE) {
  const unsigned lane = emu::self->lane;
  return emu_shuffle(mask, value, lane < delta ? lane : lane - delta, line);
}
template <class T>
EMU_FUNCTION T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMU_LINE) {
  const unsigned lane = emu::self->lane;
  return emu_shuffle(mask, value, lane + delta > 31 ? lane : lane + delta, line);
}
template <class T>
EMU_FUNCTION T __shfl_xor_sync(unsigned mask, T value, int bits, EMU_LINE) {
  return emu_shuffle(mask, value, (emu::self->lane ^ unsigned(bits)) % 32, line);
}

EMU_FUNCTION unsigned emu_equal_lanes(emu::Meeting meeting, unsigned mask, uint64_t own, uint64_t wanted, int line) {
  uint64_t values[32];
  const uint32_t there = emu::meet(meeting, mask, own, values, line);
  unsigned lanes = 0;
  for (int l = 0; l < 32; ++l)
    if (there >> l & 1 && values[l] == wanted) lanes |= 1u << l;
  return lanes;
}
EMU_FUNCTION unsigned __ballot_sync(unsigned mask, int predicate, EMU_LINE) {
  return emu_equal_lanes(emu::Meeting::ballot, mask, predicate != 0, 1, line);
}
EMU_FUNCTION int __any_sync(unsigned mask, int predicate, EMU_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
EMU_FUNCTION int __all_sync(unsigned mask, int predicate, EMU_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
template <class T>
EMU_FUNCTION unsigned __match_any_sync(unsigned mask, T value, EMU_LINE) {
  return emu_equal_lanes(emu::Meeting::match, mask, emu_bits(value), emu_bits(value), line);
}

// ---- atomics: fibers switch only inside before_atomic(), so the operation itself is atomic

#define EMU_ATOMIC(word, result)                                        \
  template <class T>                                                    \
  EMU_FUNCTION T word(T* at, std::common_type_t<T> operand, EMU_LINE) { \
    emu::before_atomic(at, sizeof(T), line);                            \
    const T old = *at;                                                  \
    *at = T(result);                                                    \
    return old;                                                         \
  }
EMU_ATOMIC(atomicAdd, old + operand)
EMU_ATOMIC(atomicMin, operand < old ? operand : old)
EMU_ATOMIC(atomicMax, operand > old ? operand : old)
EMU_ATOMIC(atomicOr, old | operand)
EMU_ATOMIC(atomicExch, operand)
template <class T>
EMU_FUNCTION T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> desired, EMU_LINE) {
  emu::before_atomic(at, sizeof(T), line);
  const T old = *at;
  if (old == expected) *at = desired;
  return old;
}

// ---- numbers

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
template <class T>
EMU_FUNCTION T emu_from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}
inline unsigned __float_as_uint(float x) {
  return unsigned(emu_bits(x));
}
inline float __uint_as_float(unsigned x) {
  return emu_from_bits<float>(x);
}
inline long long __double_as_longlong(double x) {
  return (long long)emu_bits(x);
}
inline double __longlong_as_double(long long x) {
  return emu_from_bits<double>(uint64_t(x));
}

// Conversion of float16, for which kernels use an instruction.
inline float emu_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
                     : exponent     ? ldexpf(float(1024 + fraction), exponent - 25)
                                    : ldexpf(float(fraction), -24);
  return bits >> 15 ? -size : size;
}
inline uint16_t emu_half_of(float x) {
  const uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (size == 0) return sign;
  if (!(size < 65520)) return uint16_t(sign | (size == size ? 0x7c00 : 0x7e00));
  int exponent;
  frexpf(size, &exponent);  // size = [0.5, 1) 2^exponent
  const int unit = exponent < -13 ? -24 : exponent - 11;
  const int fraction = int(nearbyintf(ldexpf(size, -unit)));  // 1024 to 2048; less for subnormal numbers
  return uint16_t(sign | (unit == -24 ? fraction : ((unit + 24) << 10) + fraction));
}

// ---- exported for every kernel: a text with the types of its parameters, and a call with pointers to the arguments

namespace emu {

template <class T>
struct Letter {
  static constexpr char value = std::is_floating_point<T>::value ? 'f'
                                : std::is_same<T, bool>::value   ? 'b'
                                : std::is_enum<T>::value         ? 'i'
                                : !std::is_integral<T>::value    ? 'v'  // a struct, such as float4
                                : std::is_unsigned<T>::value     ? 'u'
                                                                 : 'i';
};

// "*" for a pointer, "*c" for a pointer to const, then the letter of the type and its bytes: "*cf4 *i4 i8 "
template <class T>
void describe(char*& out) {
  using V = std::remove_cv_t<std::remove_pointer_t<T>>;
  if (std::is_pointer<T>::value) {
    *out++ = '*';
    if (std::is_const<std::remove_pointer_t<T>>::value) *out++ = 'c';
  }
  *out++ = Letter<V>::value;
  if (sizeof(V) >= 10) *out++ = char('0' + sizeof(V) / 10);
  *out++ = char('0' + sizeof(V) % 10);
  *out++ = ' ';
}
template <class... A>
const char* signature(void (*)(A...)) {
  static char text[8 * sizeof...(A) + 1];
  char* out = text;
  (describe<A>(out), ...);
  *out = 0;
  return text;
}
template <class... A, size_t... I>
EMU_FUNCTION void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}
template <class... A>
EMU_FUNCTION void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::make_index_sequence<sizeof...(A)>());
}

}  // namespace emu

#define EMU_EXPORT(kernel)                                                                                         \
  extern "C" __attribute__((visibility("default"), no_sanitize_thread)) void emu_call_##kernel(void** arguments) { \
    emu::call(kernel, arguments);                                                                                  \
  }                                                                                                                \
  extern "C" __attribute__((visibility("default"))) const char* emu_signature_##kernel() {                         \
    return emu::signature(kernel);                                                                                 \
  }
