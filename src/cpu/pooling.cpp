// Pooling: features reduced over neighbors (neighbor_reduce) or over batch items (segment_reduce), their gradients,
// gathering of rows and inverse-distance weights.
//
// For each query, sums or maxima of up to 8 vectors of channels stay in registers while the rows of its neighbors are
// read, once each and prefetched some pairs ahead; no array over pairs and channels is allocated. The gradient of a sum
// is the same sum over the transposed list. The gradient of a maximum goes from every query to one point per channel: a
// thread owns some channels of some points and reads all queries in order. No result depends on the number of threads.

#include "formulas/pooling.h"

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t prefetch_distance = 6;  // pairs between prefetching a row and reading it
// Pairs summed before their sum is added to that of the blocks before: in float32, a million pairs then lose as little
// precision as 2000 do without blocks.
constexpr int64_t pairs_per_block = 512;
constexpr int64_t rows_per_block = 1024;  // rows of a batch item that one thread reduces at a time
constexpr int64_t grain = 1 << 15;        // values that keep a thread busy for some 20 us
constexpr int max_choice_vectors = KP_VECTOR_BYTES == 64 ? 8 : 4;  // maxima and their rows that fit the registers

// Calls call(number of vectors, whether they are whole, first channel) for blocks of channels until all are covered.
template <int max_vectors, class F, class Call>
KP_INLINE void for_channels(int64_t channels, Call call) {
  constexpr int64_t step = lanes<F>;
  int64_t c = 0;
  for (; c + max_vectors * step <= channels; c += max_vectors * step)
    call(std::integral_constant<int, max_vectors>(), std::true_type(), c);
  if constexpr (max_vectors > 4)
    if (c + 4 * step <= channels) {
      call(std::integral_constant<int, 4>(), std::true_type(), c);
      c += 4 * step;
    }
  if (c + 2 * step <= channels) {
    call(std::integral_constant<int, 2>(), std::true_type(), c);
    c += 2 * step;
  }
  if (c + step <= channels) {
    call(std::integral_constant<int, 1>(), std::true_type(), c);
    c += step;
  }
  if (c < channels) call(std::integral_constant<int, 1>(), std::false_type(), c);
}

// A matrix of features whose rows are read in vectors, the last of which may be partial.
template <class F>
struct FeatureMatrix {
  const F* data;
  int64_t channels, values;

  explicit FeatureMatrix(const Array& features)
      : data(as<F>(features)), channels(features.cols), values(features.rows * features.cols) {}

  // The v-th vector from channel c of a row. A partial vector has garbage past the end of the row: reading into the
  // next row is faster than masking, which only the very last row needs.
  template <bool whole>
  KP_INLINE Vec<F> vector(int64_t row, int64_t c, int v) const {
    const int64_t at = row * channels + c;
    if constexpr (whole) return load(data + at + v * lanes<F>);
    return at + lanes<F> <= values ? load(data + at) : load_first(data + at, int(channels - c));
  }
  template <int NV>
  KP_INLINE void prefetch(int64_t row, int64_t c) const {
    const char* const from = reinterpret_cast<const char*>(data + row * channels + c);
    for (int byte = 0; byte < NV * KP_VECTOR_BYTES; byte += 64) __builtin_prefetch(from + byte);
  }
  template <bool whole>
  KP_INLINE void put(F* to, int64_t c, int v, Vec<F> x) const {
    if constexpr (whole)
      store(to + c + v * lanes<F>, x);
    else
      store_first(to + c, int(channels - c), x);
  }
};

template <class F>
void fill(F* row, int64_t channels, F value) {
  for (int64_t c = 0; c < channels; ++c) row[c] = value;
}

// ---- over neighbors ---------------------------------------------------------------------------------------------

// to = the (weighted) sum of n rows, divided by `divisor`. `last`: the last entry of the whole index, beyond which
// nothing is prefetched.
template <bool weighted, class F>
void sum_row(const FeatureMatrix<F>& rows, const int32_t* index, const int32_t* last, const F* weights, int64_t n,
             F divisor, F* to) {
  for_channels<8, F>(rows.channels, [&](auto vectors, auto whole, int64_t c) {
    constexpr int NV = decltype(vectors)::value;
    constexpr bool all = decltype(whole)::value;
    Vec<F> total[NV];
    for (int64_t first = 0; first < n; first += pairs_per_block) {
      const int64_t end = smaller(n, first + pairs_per_block);
      Vec<F> sums[NV] = {};
      for (int64_t i = first; i < end; ++i) {
        rows.template prefetch<NV>(*smaller(index + i + prefetch_distance, last), c);
        const int64_t row = index[i];
        for (int v = 0; v < NV; ++v) {
          const Vec<F> x = rows.template vector<all>(row, c, v);
          sums[v] = weighted ? fma(broadcast(weights[i]), x, sums[v]) : sums[v] + x;
        }
      }
      for (int v = 0; v < NV; ++v) total[v] = first ? total[v] + sums[v] : sums[v];
    }
    for (int v = 0; v < NV; ++v)
      rows.template put<all>(to, c, v, divisor != 1 ? total[v] / broadcast(divisor) : total[v]);
  });
}

template <class F>
Status sum_neighbors(const NeighborReduce& args, const Array& out) {
  const FeatureMatrix<F> rows(args.features);
  const auto* weights = as<F>(args.weights);
  const auto *splits = as<int64_t>(args.row_splits), *forward_splits = as<int64_t>(args.forward_row_splits);
  const auto* index = as<int32_t>(args.index);
  auto* const to = into<F>(out);
  const int64_t m = out.rows, pairs = splits[m];
  const int32_t* const last = index + pairs - 1;
  const bool mean = args.reduction == Reduction::mean;
  const F empty = F(args.empty);
  bool enough = true;
#pragma omp parallel num_threads(useful_threads(args.threads, (pairs + m) * rows.channels, grain)) \
    reduction(&& : enough)
  {
    Buffer<F> row_weights;
#pragma omp for schedule(dynamic, 64)
    for (int64_t q = 0; q < m; ++q) {
      const int64_t begin = splits[q], n = splits[q + 1] - begin;
      F* const row = to + q * rows.channels;
      const F* factors = weights ? weights + begin : nullptr;
      if (!n) {
        fill(row, rows.channels, empty);
        continue;
      }
      if (forward_splits) {
        enough = enough && row_weights.resize(n);
        if (!enough) continue;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t j = index[begin + i];
          row_weights[i] = (factors ? factors[i] : F(1)) / F(forward_splits[j + 1] - forward_splits[j]);
        }
        factors = row_weights.data();
      }
      const F divisor = mean ? F(n) : F(1);
      if (factors)
        sum_row<true>(rows, index + begin, last, factors, n, divisor, row);
      else
        sum_row<false>(rows, index + begin, last, factors, n, divisor, row);
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

KP_INLINE void put_index(int32_t* to, Vec<int32_t> x) {
  store(to, x);
}
KP_INLINE void put_index(int32_t* to, Vec<int64_t> x) {
  typedef int32_t Half __attribute__((vector_size(KP_VECTOR_BYTES / 2), aligned(4), may_alias));
  *reinterpret_cast<Half*>(to) = __builtin_convertvector(x, Half);
}

// The i-th row to reduce: IndexedRows for the neighbors of a query, ConsecutiveRows for a batch item.
struct IndexedRows {
  const int32_t *index, *last;
  KP_INLINE int64_t operator()(int64_t i) const { return index[i]; }
  template <int NV, class F>
  KP_INLINE void prefetch(const FeatureMatrix<F>& rows, int64_t i, int64_t c) const {
    rows.template prefetch<NV>(*smaller(index + i + prefetch_distance, last), c);
  }
};
struct ConsecutiveRows {
  int64_t first;
  KP_INLINE int64_t operator()(int64_t i) const { return first + i; }
  template <int NV, class F>
  KP_INLINE void prefetch(const FeatureMatrix<F>&, int64_t, int64_t) const {}
};

// Neighbor lists shorter than `width` are reduced as if padded with `value`.
template <class F>
struct Padding {
  int64_t width;
  F value;
};

// Replaces `best` by x of row `from` where x is better: larger, or smaller if `minimum`.
template <bool minimum, class I, class V, class W>
KP_INLINE void replace_if_better(V x, I from, V& best, W& chosen) {
  const auto better = displaces<minimum>(x, best);
  best = better ? x : best;
  chosen = better ? broadcast(from) : chosen;
}

// to = the largest (or smallest) values of n rows, choice = the rows they come from. Padding comes last, so a neighbor
// of equal value wins over it; where the padding wins, and without rows, choice is -1.
template <bool minimum, class F, class Row>
void choose_row(const FeatureMatrix<F>& rows, Row row, int64_t n, const Padding<F>& padding, F* to, int32_t* choice) {
  for_channels<max_choice_vectors, F>(rows.channels, [&](auto vectors, auto whole, int64_t c) {
    constexpr int NV = decltype(vectors)::value;
    constexpr bool all = decltype(whole)::value;
    using I = IndexBeside<F>;
    Vec<F> best[NV];
    Vec<I> chosen[NV];
    // Propagating NaN takes two more comparisons per value, so a first scan does without. It returns false if it has
    // seen a value that is NaN or infinite; then a second scan propagates NaN.
    const auto scan = [&](auto keep_nan) {
      Vec<F> nan_check[2] = {};  // sums of value * 0: NaN after the first NaN or infinity
      for (int v = 0; v < NV; ++v) {
        best[v] = n ? rows.template vector<all>(row(0), c, v) : broadcast(padding.value);
        chosen[v] = broadcast(n ? I(row(0)) : I(-1));
        nan_check[v % 2] = fma(best[v], Vec<F>{}, nan_check[v % 2]);
      }
      for (int64_t i = 1; i < n; ++i) {
        row.template prefetch<NV>(rows, i, c);
        const int64_t r = row(i);
        for (int v = 0; v < NV; ++v) {
          Vec<F> x = rows.template vector<all>(r, c, v);
#if defined(__x86_64__)
          asm("" : "+v"(x));  // otherwise GCC loads x again for each use, unaligned most of the time
#endif
          if constexpr (decltype(keep_nan)::value) {
            replace_if_better<minimum>(x, I(r), best[v], chosen[v]);
          } else {
            chosen[v] = (minimum ? x < best[v] : x > best[v]) ? broadcast(I(r)) : chosen[v];
            best[v] = minimum ? min(x, best[v]) : max(x, best[v]);
            nan_check[v % 2] = fma(x, Vec<F>{}, nan_check[v % 2]);
          }
        }
      }
      const Vec<F> sum = nan_check[0] + nan_check[1];
      return mask_eq(sum, sum) == first_lanes<F>(lanes<F>);
    };
    if (!scan(std::false_type())) scan(std::true_type());
    for (int v = 0; v < NV; ++v) {
      if (n < padding.width) replace_if_better<minimum>(broadcast(padding.value), I(-1), best[v], chosen[v]);
      rows.template put<all>(to, c, v, best[v]);
      if constexpr (all)
        put_index(choice + c + v * lanes<F>, chosen[v]);
      else
        for (int64_t l = 0; l < rows.channels - c; ++l) choice[c + l] = int32_t(chosen[v][l]);
    }
  });
}

template <bool minimum, class F>
Status choose_neighbors(const NeighborReduce& args, const Array& out, int32_t* choice) {
  const FeatureMatrix<F> rows(args.features);
  const auto* splits = as<int64_t>(args.row_splits);
  const auto* index = as<int32_t>(args.index);
  auto* const to = into<F>(out);
  const int64_t m = out.rows, channels = rows.channels, pairs = splits[m];
  const int32_t* const last = index + pairs - 1;
  const Padding<F> padding{args.width, F(args.pad_value)};
  const F empty = F(args.empty);
#pragma omp parallel for num_threads(useful_threads(args.threads, (pairs + m) * channels, grain)) schedule(dynamic, 64)
  for (int64_t q = 0; q < m; ++q) {
    const int64_t begin = splits[q], n = splits[q + 1] - begin;
    F* const row = to + q * channels;
    int32_t* const chosen = choice + q * channels;
    if (n || padding.width) {
      choose_row<minimum>(rows, IndexedRows{index + begin, last}, n, padding, row, chosen);
      continue;
    }
    fill(row, channels, empty);
    fill(chosen, channels, -1);
  }
  return Status::ok;
}

// The dot product of two rows.
template <class F>
KP_INLINE F dot(const F* a, const F* b, int64_t n) {
  constexpr int64_t step = lanes<F>;
  Vec<F> sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * step <= n; c += 4 * step)
    for (int v = 0; v < 4; ++v) sums[v] = fma(load(a + c + v * step), load(b + c + v * step), sums[v]);
  for (; c + step <= n; c += step) sums[0] = fma(load(a + c), load(b + c), sums[0]);
  F sum = sum_of_lanes<F>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

// ---- over batch items --------------------------------------------------------------------------------------------

// Splits batch items of more than 1024 rows into blocks, so that several threads reduce one item. The results of the
// blocks are then joined in their order.
class ItemBlocks {
 public:
  const int64_t* splits;
  int64_t items;

  // Returns false if memory runs out.
  bool split(const Array& row_splits) {
    splits = as<int64_t>(row_splits);
    items = row_splits.rows - 1;
    if (!first_.resize(items + 1)) return false;
    first_[0] = 0;
    for (int64_t b = 0; b < items; ++b)
      first_[b + 1] = first_[b] + (is_split(b) ? (rows(b) - 1) / rows_per_block + 1 : 0);
    if (!item_.resize(count())) return false;
    for (int64_t b = 0; b < items; ++b)
      for (int64_t k = first_[b]; k < first_[b + 1]; ++k) item_[k] = int32_t(b);
    return true;
  }
  int64_t rows(int64_t b) const { return splits[b + 1] - splits[b]; }
  bool is_split(int64_t b) const { return rows(b) > rows_per_block; }
  int64_t count() const { return first_[items]; }

  // Calls whole(item, first row, number of rows) for items that are not split and part(block, first row, number of
  // rows) for all blocks; then join(item, first block, end of its blocks) for items that are split.
  template <class Whole, class Part, class Join>
  void for_each(int threads, Whole whole, Part part, Join join) const {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 64) nowait
      for (int64_t b = 0; b < items; ++b)
        if (!is_split(b)) whole(b, splits[b], rows(b));
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < count(); ++k) {
        const int64_t b = item_[k], row = splits[b] + (k - first_[b]) * rows_per_block;
        part(k, row, smaller(rows_per_block, splits[b + 1] - row));
      }
#pragma omp for schedule(dynamic, 64)
      for (int64_t b = 0; b < items; ++b)
        if (is_split(b)) join(b, first_[b], first_[b + 1]);
    }
  }

 private:
  Buffer<int64_t> first_;  // number of each item's first block; items that are not split have no blocks
  Buffer<int32_t> item_;   // item of each block
};

KP_INLINE Vec<double> widened(const double* p) {
  return load(p);
}
KP_INLINE Vec<double> widened(const float* p) {
  typedef float Half __attribute__((vector_size(KP_VECTOR_BYTES / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Vec<double>);
}

// sums = the sum of n consecutive rows, in float64: float32 loses precision from some thousand rows on.
template <class F>
void sum_consecutive(const F* rows, int64_t n, int64_t channels, double* sums) {
  for_channels<8, double>(channels, [=](auto vectors, auto whole, int64_t c) {
    constexpr int NV = decltype(vectors)::value;
    if constexpr (decltype(whole)::value) {
      Vec<double> sum[NV] = {};
      for (int64_t i = 0; i < n; ++i)
        for (int v = 0; v < NV; ++v) sum[v] = sum[v] + widened(rows + i * channels + c + v * lanes<double>);
      for (int v = 0; v < NV; ++v) store(sums + c + v * lanes<double>, sum[v]);
    } else {
      for (; c < channels; ++c) {
        double sum[4] = {};  // four independent sums hide the latency of the additions
        int64_t i = 0;
        for (; i + 4 <= n; i += 4)
          for (int s = 0; s < 4; ++s) sum[s] += double(rows[(i + s) * channels + c]);
        for (; i < n; ++i) sum[0] += double(rows[i * channels + c]);
        sums[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    }
  });
}

template <class F>
Status sum_segments(const SegmentReduce& args, const Array& out) {
  const auto* from = as<F>(args.features);
  auto* const to = into<F>(out);
  const int64_t channels = args.features.cols;
  const int threads = useful_threads(args.threads, (args.features.rows + out.rows) * channels, grain);
  const bool mean = args.reduction == Reduction::mean;
  const F empty = F(args.empty);
  ItemBlocks blocks;
  Buffer<double> partial;  // a row for each block, and one for each thread for items that are not split
  if (!blocks.split(args.row_splits) || !partial.resize((blocks.count() + threads) * channels))
    return Status::out_of_memory;
  const auto finish = [=, &blocks](int64_t b, const double* sums) {
    const double divisor = mean ? double(blocks.rows(b)) : 1;
    for (int64_t c = 0; c < channels; ++c) to[b * channels + c] = F(sums[c] / divisor);
  };
  blocks.for_each(
      threads,
      [&](int64_t b, int64_t first, int64_t n) {
        double* const sums = &partial[(blocks.count() + omp_get_thread_num()) * channels];
        if (!n) return fill(to + b * channels, channels, empty);
        sum_consecutive(from + first * channels, n, channels, sums);
        finish(b, sums);
      },
      [&](int64_t k, int64_t first, int64_t n) {
        sum_consecutive(from + first * channels, n, channels, &partial[k * channels]);
      },
      [&](int64_t b, int64_t k, int64_t end) {
        double* const sums = &partial[k * channels];
        while (++k < end)
          for (int64_t c = 0; c < channels; ++c) sums[c] += partial[k * channels + c];
        finish(b, sums);
      });
  return Status::ok;
}

template <bool minimum, class F>
Status choose_segments(const SegmentReduce& args, const Array& out, int32_t* choice) {
  const FeatureMatrix<F> rows(args.features);
  auto* const to = into<F>(out);
  const int64_t channels = rows.channels;
  const F empty = F(args.empty);
  ItemBlocks blocks;
  Buffer<F> partial;
  Buffer<int32_t> partial_choice;
  if (!blocks.split(args.row_splits) || !partial.resize(blocks.count() * channels) ||
      !partial_choice.resize(blocks.count() * channels))
    return Status::out_of_memory;
  const auto choose = [&](int64_t first, int64_t n, F* best, int32_t* chosen) {
    choose_row<minimum>(rows, ConsecutiveRows{first}, n, Padding<F>{0, F(0)}, best, chosen);
  };
  blocks.for_each(
      useful_threads(args.threads, (args.features.rows + out.rows) * channels, grain),
      [&](int64_t b, int64_t first, int64_t n) {
        if (n) return choose(first, n, to + b * channels, choice + b * channels);
        fill(to + b * channels, channels, empty);
        fill(choice + b * channels, channels, -1);
      },
      [&](int64_t k, int64_t first, int64_t n) {
        choose(first, n, &partial[k * channels], &partial_choice[k * channels]);
      },
      [&](int64_t b, int64_t k, int64_t end) {
        F* const best = to + b * channels;
        int32_t* const chosen = choice + b * channels;
        memcpy(best, &partial[k * channels], size_t(channels) * sizeof(F));
        memcpy(chosen, &partial_choice[k * channels], size_t(channels) * sizeof(int32_t));
        while (++k < end)
          for (int64_t c = 0; c < channels; ++c)
            if (displaces<minimum>(partial[k * channels + c], best[c])) {
              best[c] = partial[k * channels + c];
              chosen[c] = partial_choice[k * channels + c];
            }
      });
  return Status::ok;
}

// Backward of a sum or mean over batch items: every row receives its item's gradient, divided by the number of rows for
// a mean.
template <class F>
Status spread_segments(const SegmentReduce& args) {
  const Array& grad_features = args.grad_features;
  const auto* grad_out = as<F>(args.grad_out);
  const auto* splits = as<int64_t>(args.row_splits);
  auto* const to = into<F>(grad_features);
  const int64_t n = grad_features.rows, items = args.row_splits.rows - 1, channels = grad_features.cols;
  if (!channels) return Status::ok;
  const int64_t blocks = (n + rows_per_block - 1) / rows_per_block;
  const bool mean = args.reduction == Reduction::mean;
  bool enough = true;
#pragma omp parallel num_threads(useful_threads(args.threads, n* channels, grain)) reduction(&& : enough)
  {
    Buffer<F> share;
    enough = share.resize(channels);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < blocks; ++k) {
      if (!enough) continue;
      int64_t i = k * rows_per_block;
      const int64_t end = smaller(n, i + rows_per_block);
      int64_t b = 0;  // the last item that begins at row i or before it
      for (int64_t above = items; above - b > 1;) {
        const int64_t middle = (b + above) / 2;
        (splits[middle] <= i ? b : above) = middle;
      }
      for (; i < end; ++b) {
        if (splits[b + 1] <= i) continue;
        const F divisor = mean ? F(splits[b + 1] - splits[b]) : F(1);
        for (int64_t c = 0; c < channels; ++c) share[c] = grad_out[b * channels + c] / divisor;
        for (const int64_t stop = smaller(end, splits[b + 1]); i < stop; ++i)
          memcpy(to + i * channels, share.data(), size_t(channels) * sizeof(F));
      }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

// ---- unpooling and gathering -------------------------------------------------------------------------------------

// grad_features[choice[q, c], c] += grad_out[q, c]; -1 is skipped.
template <class F>
void unpool_rows(const Array& choice, const Array& grad_out, const Array& grad_features, int threads) {
  const auto* chosen = as<int32_t>(choice);
  const auto* grad = as<F>(grad_out);
  auto* const to = into<F>(grad_features);
  const int64_t m = grad_out.rows, n = grad_features.rows, channels = grad_features.cols;
  threads = useful_threads(threads, (m + n) * channels, grain);
  // Threads first divide the channels among them, at least a cache line each, then the points.
  const int64_t line = 64 / int64_t(sizeof(F));
  const int column_parts = int(larger<int64_t>(1, smaller<int64_t>(threads, channels / line)));
  const int row_parts = (threads + column_parts - 1) / column_parts;
#pragma omp parallel num_threads(threads)
  {
    const Share zeroed(n, omp_get_thread_num(), omp_get_num_threads());
    memset(to + zeroed.begin * channels, 0, size_t((zeroed.end - zeroed.begin) * channels) * sizeof(F));
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int part = 0; part < column_parts * row_parts; ++part) {
      const Share columns(channels, part % column_parts, column_parts), rows(n, part / column_parts, row_parts);
      for (int64_t q = 0; q < m; ++q)
        for (int64_t c = columns.begin; c < columns.end; ++c) {
          const int64_t i = chosen[q * channels + c];
          if (i >= rows.begin && i < rows.end) to[i * channels + c] += grad[q * channels + c];
        }
    }
  }
}

// out[q] = row index[q] of the features or, with row_splits, the row of the first neighbor of q; zeros for an empty
// list. Returns false if an index is out of range.
template <class I>
bool copy_rows(const Array& features, const Array& index, const Array& row_splits, const Array& out, int threads) {
  const auto* numbers = as<I>(index);
  const auto* splits = as<int64_t>(row_splits);
  const int64_t m = out.rows, bytes = features.cols * size_of(features.dtype);
  const auto* from = as<char>(features);
  auto* const to = into<char>(out);
  const auto row_of = [=, &features](int64_t q, bool& valid) -> const char* {
    if (splits && splits[q] == splits[q + 1]) return nullptr;
    const int64_t i = int64_t(read_once(numbers + (splits ? splits[q] : q)));
    if (i >= 0 && i < features.rows) return from + i * bytes;
    valid = false;
    return nullptr;
  };
  bool valid = true;
#pragma omp parallel for num_threads(useful_threads(threads, m* features.cols, grain)) schedule(static) \
    reduction(&& : valid)
  for (int64_t q = 0; q < m; ++q) {
    if (const char* const later = row_of(smaller(q + prefetch_distance, m - 1), valid))
      for (int64_t byte = 0; byte < smaller<int64_t>(bytes, 512); byte += 64) __builtin_prefetch(later + byte);
    if (const char* const row = row_of(q, valid))
      memcpy(to + q * bytes, row, size_t(bytes));
    else
      memset(to + q * bytes, 0, size_t(bytes));
  }
  return valid;
}

template <class G, class F>
void weigh(const Array& distance, const Array& row_splits, double power, const Array& weights, int threads) {
  const auto* d = as<G>(distance);
  const auto* splits = as<int64_t>(row_splits);
  auto* const to = into<F>(weights);
  const int64_t m = row_splits.rows - 1;
#pragma omp parallel for num_threads(useful_threads(threads, splits[m], 1 << 12)) schedule(static)
  for (int64_t q = 0; q < m; ++q) {
    double total = 0;
    for (int64_t e = splits[q]; e < splits[q + 1]; ++e) {
      const double weight = inverse_distance(double(d[e]), double(d[splits[q]]), power);
      to[e] = F(weight);
      total += weight;
    }
    for (int64_t e = splits[q]; e < splits[q + 1]; ++e) to[e] = F(double(to[e]) / total);
  }
}

}  // namespace

Status neighbor_reduce(const NeighborReduce& args) {
  const Array& out = args.out;
  auto* const choice = into<int32_t>(args.choice);
  return with_real(out.dtype, [&](auto f) {
    using F = decltype(f);
    if (args.reduction == Reduction::max) return choose_neighbors<false, F>(args, out, choice);
    if (args.reduction == Reduction::min) return choose_neighbors<true, F>(args, out, choice);
    return sum_neighbors<F>(args, out);
  });
}

Status neighbor_reduce_grad_weights(const NeighborReduce& args) {
  const Array& grad_out = args.grad_out;
  return with_real(grad_out.dtype, [&](auto f) {
    using F = decltype(f);
    const auto *features = as<F>(args.features), *grad = as<F>(grad_out);
    const auto* splits = as<int64_t>(args.row_splits);
    const auto* index = as<int32_t>(args.index);
    auto* const to = into<F>(args.grad_weights);
    const int64_t m = grad_out.rows, channels = grad_out.cols, last = splits[m] - 1;
    const bool mean = args.reduction == Reduction::mean;
#pragma omp parallel for num_threads(useful_threads(args.threads, splits[m] * channels, grain)) schedule(dynamic, 64)
    for (int64_t q = 0; q < m; ++q) {
      const F divisor = mean ? F(splits[q + 1] - splits[q]) : F(1);
      for (int64_t e = splits[q]; e < splits[q + 1]; ++e) {
        const F* const later = features + index[smaller(e + prefetch_distance, last)] * channels;
        for (int64_t c = 0; c < smaller<int64_t>(channels, 512 / sizeof(F)); c += 64 / sizeof(F))
          __builtin_prefetch(later + c);
        to[e] = dot(features + index[e] * channels, grad + q * channels, channels) / divisor;
      }
    }
    return Status::ok;
  });
}

Status unpool(const Unpool& args) {
  return with_real(args.grad_out.dtype, [&](auto f) {
    unpool_rows<decltype(f)>(args.choice, args.grad_out, args.grad_features, args.threads);
    return Status::ok;
  });
}

Status gather_rows(const GatherRows& args) {
  const Array &features = args.features, &index = args.index, &row_splits = args.row_splits, &out = args.out;
  const bool valid = index.dtype == DType::int32 ? copy_rows<int32_t>(features, index, row_splits, out, args.threads)
                                                 : copy_rows<int64_t>(features, index, row_splits, out, args.threads);
  return valid ? Status::ok : Status::out_of_range;
}

Status inverse_distance_weights(const InverseDistanceWeights& args) {
  return with_real(args.distance.dtype, [&](auto g) {
    return with_real(args.weights.dtype, [&](auto f) {
      weigh<decltype(g), decltype(f)>(args.distance, args.row_splits, args.power, args.weights, args.threads);
      return Status::ok;
    });
  });
}

Status segment_reduce(const SegmentReduce& args) {
  const Array& out = args.out;
  auto* const choice = into<int32_t>(args.choice);
  return with_real(out.dtype, [&](auto f) {
    using F = decltype(f);
    if (args.reduction == Reduction::max) return choose_segments<false, F>(args, out, choice);
    if (args.reduction == Reduction::min) return choose_segments<true, F>(args, out, choice);
    return sum_segments<F>(args, out);
  });
}

Status segment_reduce_grad(const SegmentReduce& args) {
  return with_real(args.grad_out.dtype, [&](auto f) { return spread_segments<decltype(f)>(args); });
}

}  // namespace KP_ISA
}  // namespace kp
