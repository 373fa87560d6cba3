// Two sorts. `Sorter` sorts some hundred distinct keys: blocks of 16 vectors by a sorting network in registers, then a
// merge sort of the blocks. `radix_sort` sorts millions of (key, id) pairs, stably and with several threads.
#pragma once

#include <utility>

#include "parallel.h"
#include "simd.h"

namespace kp {
namespace {

// ---- sorting network over R registers ---------------------------------------------------------------------------
// First each lane is sorted across the R registers (Batcher's network, no shuffles), then groups of 1, 2, 4, ... lanes
// are merged (bitonic). The element in lane l of register r ends at rank l * R + r, so strides below R compare
// registers and need no shuffle:
//
//            lane 0  lane 1  lane 2  lane 3
//    v[0]       0       4       8      12
//    v[1]       1       5       9      13       ranks for R = 4
//    v[2]       2       6      10      14
//    v[3]       3       7      11      15

template <class V>
KP_INLINE void order(V& a, V& b) {
  const V low = min(a, b);
  b = max(a, b);
  a = low;
}

template <int X, class V, size_t... L>
KP_INLINE V xor_lanes(V v, std::index_sequence<L...>) {
  return __builtin_shufflevector(v, v, (L ^ X)...);
}
// Takes lanes whose number has bit H set from `high`, the others from `low`.
template <int H, class V, size_t... L>
KP_INLINE V choose(V low, V high, std::index_sequence<L...>) {
  return __builtin_shufflevector(low, high, (L & H ? L + sizeof...(L) : L)...);
}

template <int H, int R, class K>
KP_INLINE void halve_lanes(Vec<K>* v) {
  constexpr auto all = std::make_index_sequence<lanes<K>>();
  for (int r = 0; r < R; ++r) {
    const Vec<K> other = xor_lanes<H>(v[r], all);
    v[r] = choose<H>(min(v[r], other), max(v[r], other), all);
  }
  if constexpr (H > 1) halve_lanes<H / 2, R, K>(v);
}

// Bitonic merge of groups of 2 * G lanes whose halves are sorted: compares with the mirrored half, then with strides
// that halve each time.
template <int G, int R, class K>
KP_INLINE void merge_lanes(Vec<K>* v) {
  constexpr auto all = std::make_index_sequence<lanes<K>>();
  for (int r = 0; r < (R + 1) / 2; ++r) {
    const Vec<K> a = v[r], b = v[R - 1 - r];
    const Vec<K> b_mirrored = xor_lanes<2 * G - 1>(b, all), a_mirrored = xor_lanes<2 * G - 1>(a, all);
    v[r] = choose<G>(min(a, b_mirrored), max(a, b_mirrored), all);
    v[R - 1 - r] = choose<G>(min(b, a_mirrored), max(b, a_mirrored), all);
  }
  if constexpr (G >= 8)
    halve_lanes<4, R, K>(v);
  else if constexpr (G >= 4)
    halve_lanes<2, R, K>(v);
  else if constexpr (G >= 2)
    halve_lanes<1, R, K>(v);
  for (int stride = R / 2; stride; stride /= 2)
    for (int r = 0; r < R; ++r)
      if (!(r & stride)) order(v[r], v[r + stride]);
}
// The comparators of Batcher's odd-even merge sort of R elements, R a power of two, in order.
template <int R>
struct Comparators {
  uint8_t first[R * R / 2] = {}, second[R * R / 2] = {};
  int count = 0;
  constexpr Comparators() {
    for (int p = 1; p < R; p *= 2)
      for (int k = p; k; k /= 2)
        for (int j = k % p; j + k < R; j += 2 * k)
          for (int i = j; i < j + k && i + k < R; ++i)
            if (i / (2 * p) == (i + k) / (2 * p)) {
              first[count] = uint8_t(i);
              second[count++] = uint8_t(i + k);
            }
  }
};
template <int R, class V, size_t... C>
KP_INLINE void sort_registers(V* v, std::index_sequence<C...>) {
  constexpr Comparators<R> comparators;
  (order(v[comparators.first[C]], v[comparators.second[C]]), ...);
}

// Sorts R * lanes<K> keys in place.
template <int R, class K>
void sort_block(K* keys) {
  Vec<K> v[R];
  for (int r = 0; r < R; ++r) v[r] = load(keys + r * lanes<K>);
  sort_registers<R>(v, std::make_index_sequence<Comparators<R>().count>());
  if constexpr (lanes<K> >= 2) merge_lanes<1, R, K>(v);
  if constexpr (lanes<K> >= 4) merge_lanes<2, R, K>(v);
  if constexpr (lanes<K> >= 8) merge_lanes<4, R, K>(v);
  if constexpr (lanes<K> >= 16) merge_lanes<8, R, K>(v);
  K by_register[R][lanes<K>];
  for (int r = 0; r < R; ++r) store(by_register[r], v[r]);
  for (int l = 0; l < lanes<K>; ++l)
    for (int r = 0; r < R; ++r) keys[l * R + r] = by_register[r][l];
}

// Stable merge of the sorted runs [0, middle) and [middle, n) of `from`.
template <class T, class Less>
KP_INLINE void merge_runs(const T* from, int64_t middle, int64_t n, T* to, Less less) {
  int64_t i = 0, j = middle, k = 0;
  while (i < middle && j < n) {
    const bool second = less(from[j], from[i]);
    to[k++] = second ? from[j] : from[i];
    j += second;
    i += !second;
  }
  while (i < middle) to[k++] = from[i++];
  while (j < n) to[k++] = from[j++];
}

// Merge sort of n elements, of which blocks of `run` are sorted already. Returns the array with the result, a or spare.
template <class T, class Less>
inline T* merge_sort(T* a, T* spare, int64_t n, int64_t run, Less less) {
  for (; run < n; run *= 2) {
    for (int64_t i = 0; i < n; i += 2 * run)
      merge_runs(a + i, smaller(run, n - i), smaller(2 * run, n - i), spare + i, less);
    exchange(a, spare);
  }
  return a;
}

// Sorts distinct unsigned keys, all below the type's largest value (which pads the last block).
template <class K>
class Sorter {
 public:
  static constexpr int block = 16 * lanes<K>;

  // Memory for n keys, which the caller fills; null if memory runs out.
  K* keys(int64_t n) {
    const int64_t size = (n + block - 1) / block * block;
    return a_.resize(size) && spare_.resize(size) ? a_.data() : nullptr;
  }
  // Sorts the n keys in that memory.
  const K* sort(int64_t n) {
    K* const a = a_.data();
    const int64_t whole = n / block * block, rest = n - whole;
    for (int64_t i = 0; i < whole; i += block) sort_block<16>(a + i);
    const auto sort_rest = [&](auto registers) {
      constexpr int R = decltype(registers)::value;
      for (int64_t i = n; i < whole + R * lanes<K>; ++i) a[i] = K(-1);
      sort_block<R>(a + whole);
    };
    if (rest > 8 * lanes<K>)
      sort_rest(std::integral_constant<int, 16>());
    else if (rest > 4 * lanes<K>)
      sort_rest(std::integral_constant<int, 8>());
    else if (rest > 2 * lanes<K>)
      sort_rest(std::integral_constant<int, 4>());
    else if (rest)
      sort_rest(std::integral_constant<int, 2>());
    return merge_sort(a, spare_.data(), n, block, [](K x, K y) { return x < y; });
  }

 private:
  Buffer<K> a_, spare_;
};

// ---- radix sort of (key, id) -------------------------------------------------------------------------------------

// Radix sort with stable counting passes over digits of up to 8 bits, least significant first. Alternates between the
// two pairs of arrays; returns true if the result is in the second pair.
template <class K>
inline bool radix_passes(K* keys, int32_t* ids, K* keys2, int32_t* ids2, int64_t n, int bits) {
  bool second = false;
  const int passes = (bits + 7) / 8;
  for (int pass = 0, low = 0; pass < passes; ++pass) {
    const int width = (bits - low + passes - pass - 1) / (passes - pass);
    const int shift = low;
    const K mask = (K(1) << width) - 1;
    low += width;
    int64_t start[256] = {};
    for (int64_t i = 0; i < n; ++i) ++start[keys[i] >> shift & mask];
    if (start[keys[0] >> shift & mask] == n) continue;
    for (int64_t d = 0, sum = 0; d <= int64_t(mask); ++d) {
      const int64_t count = start[d];
      start[d] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = start[keys[i] >> shift & mask]++;
      keys2[to] = keys[i];
      ids2[to] = ids[i];
    }
    exchange(keys, keys2);
    exchange(ids, ids2);
    second = !second;
  }
  return second;
}

// Stable sort of n (key, id) pairs with keys below 2^bits. All threads first distribute the pairs into 256 parts by the
// top 8 bits of their keys; then one thread sorts each part, which fits its cache. A stable sort has only one result,
// so it does not depend on `threads`.
template <class K>
inline Status radix_sort(Buffer<K>& keys, Buffer<int32_t>& ids, int64_t n, int bits, int threads) {
  Buffer<K> keys2;
  Buffer<int32_t> ids2;
  if (!keys2.resize(n) || !ids2.resize(n)) return Status::out_of_memory;
  if (n < (1 << 14) || bits <= 8) {
    if (radix_passes(keys.data(), ids.data(), keys2.data(), ids2.data(), n, bits)) {
      keys.swap(keys2);
      ids.swap(ids2);
    }
    return Status::ok;
  }
  constexpr int parts = 256;
  const int shift = bits - 8;
  threads = useful_threads(threads, n, 1 << 14);
  Buffer<int64_t> starts;  // one row of `parts` per thread
  if (!starts.resize(int64_t(threads) * parts + 1)) return Status::out_of_memory;
  int64_t part_begin[parts + 1];
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num();
    const Share share(n, t, omp_get_num_threads());
    int64_t* const start = starts.data() + int64_t(t) * parts;
    memset(start, 0, parts * sizeof(int64_t));
    for (int64_t i = share.begin; i < share.end; ++i) ++start[keys[i] >> shift];
#pragma omp barrier
#pragma omp single
    {
      int64_t sum = 0;
      for (int p = 0; p < parts; ++p) {
        part_begin[p] = sum;
        for (int u = 0; u < omp_get_num_threads(); ++u) {
          int64_t& s = starts[int64_t(u) * parts + p];
          const int64_t count = s;
          s = sum;
          sum += count;
        }
      }
      part_begin[parts] = sum;
    }
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int64_t to = start[keys[i] >> shift]++;
      keys2[to] = keys[i];
      ids2[to] = ids[i];
    }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int p = 0; p < parts; ++p) {
      const int64_t b = part_begin[p], size = part_begin[p + 1] - b;
      if (size && !radix_passes(&keys2[b], &ids2[b], &keys[b], &ids[b], size, shift)) {
        memcpy(&keys[b], &keys2[b], size_t(size) * sizeof(K));
        memcpy(&ids[b], &ids2[b], size_t(size) * sizeof(int32_t));
      }
    }
  }
  return Status::ok;
}

}  // namespace
}  // namespace kp
