// SIMD vectors of the instruction set that the file is compiled for. Arithmetic uses the vector extensions of GCC and
// Clang; intrinsics only what these lack (fused multiply-add, square root, compress, masked load and store). Everything
// has internal linkage.
#pragma once

#include <type_traits>
#include <utility>

#include "formulas/common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KP_VECTOR_BYTES 32
#else
#define KP_VECTOR_BYTES 16
#endif

#define KP_INLINE inline __attribute__((always_inline))
// Neither inlined nor cloned for constant arguments: for functions with several calls, or with fewer template arguments
// than their callers, that are to be compiled once.
#if defined(__clang__)
#define KP_OUTLINE __attribute__((noinline))
#else
#define KP_OUTLINE __attribute__((noinline, noclone))
#endif

namespace kp {
namespace {

template <class T>
constexpr int lanes = KP_VECTOR_BYTES / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(KP_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(KP_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
KP_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
KP_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

// As many 32-bit integers as a vector of T has lanes.
template <class T>
struct IntegersOf {
  typedef int32_t type __attribute__((vector_size(lanes<T> * 4)));
};
template <class T>
KP_INLINE typename IntegersOf<T>::type to_integers(Vec<T> v) {
  return __builtin_convertvector(v, typename IntegersOf<T>::type);
}

KP_INLINE Vec<float> whole(Vec<float> x) {
  return __builtin_convertvector(to_integers<float>(x), Vec<float>);
}
KP_INLINE Vec<double> whole(Vec<double> x) {
  return __builtin_convertvector(to_integers<double>(x), Vec<double>);
}

// Subtracts zero, because adding it would turn -0 into +0. Compiles to one broadcast instruction.
template <class T>
KP_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

#if defined(__AVX512F__)
KP_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
KP_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
KP_INLINE Vec<float> sqrt(Vec<float> a) {
  return _mm512_sqrt_ps(a);
}
KP_INLINE Vec<double> sqrt(Vec<double> a) {
  return _mm512_sqrt_pd(a);
}
KP_INLINE unsigned mask_le(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
KP_INLINE unsigned mask_le(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ);
}
KP_INLINE unsigned mask_lt(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
KP_INLINE unsigned mask_lt(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ);
}
KP_INLINE unsigned mask_eq(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
KP_INLINE unsigned mask_eq(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
}
KP_INLINE Vec<float> load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
}
KP_INLINE Vec<double> load_first(const double* p, int n) {
  return _mm512_maskz_loadu_pd((1u << n) - 1, p);
}
KP_INLINE void store_first(float* p, int n, Vec<float> v) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
}
KP_INLINE void store_first(double* p, int n, Vec<double> v) {
  _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
}
KP_INLINE void store_first(int32_t* p, int n, Vec<int32_t> v) {
  _mm512_mask_storeu_epi32(p, (1u << n) - 1, (__m512i)v);
}
#else
#if defined(__AVX2__)
KP_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
KP_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
KP_INLINE Vec<float> sqrt(Vec<float> a) {
  return _mm256_sqrt_ps(a);
}
KP_INLINE Vec<double> sqrt(Vec<double> a) {
  return _mm256_sqrt_pd(a);
}
template <class V>
KP_INLINE unsigned mask_of(V v) {
  if constexpr (sizeof(v[0]) == 4)
    return _mm256_movemask_ps((__m256)v);
  else
    return _mm256_movemask_pd((__m256d)v);
}
#else
template <class V>
KP_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#if defined(__SSE2__)
KP_INLINE Vec<float> sqrt(Vec<float> a) {
  return _mm_sqrt_ps(a);
}
KP_INLINE Vec<double> sqrt(Vec<double> a) {
  return _mm_sqrt_pd(a);
}
template <class V>
KP_INLINE unsigned mask_of(V v) {
  if constexpr (sizeof(v[0]) == 4)
    return _mm_movemask_ps((__m128)v);
  else
    return _mm_movemask_pd((__m128d)v);
}
#else
KP_INLINE Vec<float> sqrt(Vec<float> a) {
  for (int i = 0; i < lanes<float>; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
KP_INLINE Vec<double> sqrt(Vec<double> a) {
  for (int i = 0; i < lanes<double>; ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
}
template <class V>
KP_INLINE unsigned mask_of(V v) {
  unsigned mask = 0;
  for (int i = 0; i < int(sizeof(v) / sizeof(v[0])); ++i) mask |= unsigned(v[i] & 1) << i;
  return mask;
}
#endif
#endif
template <class V>
KP_INLINE unsigned mask_le(V a, V b) {
  return mask_of(a <= b);
}
template <class V>
KP_INLINE unsigned mask_lt(V a, V b) {
  return mask_of(a < b);
}
template <class V>
KP_INLINE unsigned mask_eq(V a, V b) {
  return mask_of(a == b);
}
template <class T>
KP_INLINE Vec<T> load_first(const T* p, int n) {
  Vec<T> v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
KP_INLINE void store_first(T* p, int n, Vec<T> v) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

template <class V>
KP_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
KP_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

// The integer as wide as T, so that vectors of both have the same number of lanes.
template <class T>
using IndexBeside = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
KP_INLINE T sum_of_lanes(Vec<T> v) {
  T lane[lanes<T>];
  store(lane, v);
  for (int half = lanes<T> / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Transposed sum: lane l of the result is the sum of the lanes of v[l]; v is overwritten. Adjacent lanes are added
// until one is left of each vector.
template <class T, int... I>
KP_INLINE Vec<T> add_neighbors(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <class T>
KP_INLINE Vec<T> sums_of(Vec<T>* v) {
#pragma GCC unroll 4
  for (int n = lanes<T> / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      v[i] = add_neighbors<T>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, lanes<T>>());
  return v[0];
}

// Four values, such as coordinates.
template <class G>
struct FourOf {
  typedef G type __attribute__((vector_size(4 * sizeof(G)), aligned(alignof(G)), may_alias));
};
template <class G>
using Four = typename FourOf<G>::type;

// Transposes a 4 x 4 matrix.
template <class G>
KP_INLINE void transpose_four(const Four<G>* rows, Four<G>* columns) {
  const Four<G> low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Four<G> high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Four<G> more_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Four<G> more_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  columns[0] = __builtin_shufflevector(low, more_low, 0, 1, 4, 5);
  columns[1] = __builtin_shufflevector(low, more_low, 2, 3, 6, 7);
  columns[2] = __builtin_shufflevector(high, more_high, 0, 1, 4, 5);
  columns[3] = __builtin_shufflevector(high, more_high, 2, 3, 6, 7);
}

// Transposes a square matrix of lanes<T> vectors in place. The step for N, a power of two, exchanges the bit N of the
// numbers of row and lane.
template <class T, int N, int... L>
KP_INLINE void exchange_lanes(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  const Vec<T> first = __builtin_shufflevector(a, b, (L & N ? lanes<T> + (L ^ N) : L)...);
  b = __builtin_shufflevector(a, b, (L & N ? lanes<T> + L : L ^ N)...);
  a = first;
}
template <class T, int N = 1>
KP_INLINE void transpose_square(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i)
    if (!(i & N)) exchange_lanes<T, N>(v[i], v[i + N], std::make_integer_sequence<int, lanes<T>>());
  if constexpr (2 * N < lanes<T>) transpose_square<T, 2 * N>(v);
}

// exp(x) to about one unit in the last place, 0 below the normal range: 2^n times the Taylor series of exp(r), with
// x = n ln 2 + r and |r| <= ln(2) / 2; ln 2 in two parts (Cody and Waite 1980) keeps r exact.
template <class T>
KP_INLINE Vec<T> exp_of(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  using Bits = std::conditional_t<single, uint32_t, uint64_t>;
  const Vec<T> one = broadcast(T(1)), magic = broadcast(single ? T(12582912) : T(6755399441055744));
  const Vec<T> lowest = broadcast(single ? T(-87) : T(-708));
  const Vec<T> clamped = max(x, lowest);
  const Vec<T> shifted = fma(clamped, broadcast(T(1.4426950408889634)), magic);  // n in the low bits
  const Vec<T> n = shifted - magic;
  Vec<T> r = fma(n, broadcast(single ? T(-0.693359375) : T(-6.93147180369123816490e-01)), clamped);
  r = fma(n, broadcast(single ? T(2.12194440e-4) : T(-1.90821492927058770002e-10)), r);
  T factorial = single ? 720 : 6227020800.0;  // 6! or 13!
  Vec<T> sum = broadcast(1 / factorial);
  for (int i = single ? 6 : 13; i > 0; --i) {
    factorial /= i;
    sum = fma(sum, r, broadcast(1 / factorial));
  }
  const Vec<Bits> exponent = ((Vec<Bits>)shifted - (Vec<Bits>)magic) << (single ? 23 : 52);
  const Vec<T> power = (Vec<T>)((Vec<Bits>)one + exponent);
  return x < lowest ? Vec<T>{} : sum * power;
}

KP_INLINE int popcount(unsigned mask) {
  return __builtin_popcount(mask);
}

// A mask with the first n lanes set.
template <class T>
KP_INLINE unsigned first_lanes(int64_t n) {
  return n >= lanes<T> ? (1u << lanes<T>)-1u : (1u << n) - 1u;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// lane[mask][i]: the i-th lane of those set in `mask`.
struct CompressOrder {
  uint8_t lane[256][8];
  constexpr CompressOrder() : lane() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, n = 0; bit < 8; ++bit)
        if (mask >> bit & 1) lane[mask][n++] = uint8_t(bit);
  }
};
constexpr CompressOrder compress_order;
KP_INLINE __m256i compressing(unsigned mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)compress_order.lane[mask]));
}
#endif

// Writes the lanes of `mask` to p, packed; the rest of the vector at p becomes garbage. Returns the number of lanes
// set.
KP_INLINE int compress(float* p, unsigned mask, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(mask), v));
#elif defined(__AVX2__)
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(v, compressing(mask)));
#else
  for (int i = 0, n = 0; i < lanes<float>; n += mask >> i++ & 1) p[n] = v[i];
#endif
  return popcount(mask);
}
KP_INLINE int compress(double* p, unsigned mask, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_storeu_pd(p, _mm512_maskz_compress_pd(__mmask8(mask), v));
#else
  for (int i = 0, n = 0; i < lanes<double>; n += mask >> i++ & 1) p[n] = v[i];
#endif
  return popcount(mask);
}
// The same for lanes<T> integers that belong to a vector of T.
template <class T>
KP_INLINE int compress(int32_t* p, unsigned mask, const int32_t* from) {
#if defined(__AVX512F__)
  if constexpr (lanes<T> == 16)
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(from)));
  else
    _mm256_storeu_si256((__m256i*)p,
                        _mm256_maskz_compress_epi32(__mmask8(mask), _mm256_loadu_si256((const __m256i*)from)));
#else
#if defined(__AVX2__)
  if constexpr (lanes<T> == 8) {
    _mm256_storeu_si256((__m256i*)p,
                        _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)from), compressing(mask)));
    return popcount(mask);
  }
#endif
  for (int i = 0, n = 0; i < lanes<T>; n += mask >> i++ & 1) p[n] = from[i];
#endif
  return popcount(mask);
}

}  // namespace
}  // namespace kp
