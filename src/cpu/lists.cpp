// Neighbor lists: their transpose; checks of lists that a caller passed, and conversions from and to padded matrices.
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace {

constexpr int64_t pairs_per_thread = 1 << 15;

// Calls call(int32_t()) or call(int64_t()).
template <class Call>
auto with_integer(DType dtype, Call call) {
  return dtype == DType::int32 ? call(int32_t()) : call(int64_t());
}

// Copies row_splits and checks the copy, since another thread may be writing to the caller's array: they must start at
// 0, be non-decreasing and end at max_end or before.
template <class T>
bool copy_row_splits(const T* from, int64_t size, int64_t max_end, int64_t* to) {
  bool good = size > 0;
  for (int64_t i = 0; i < size; ++i) to[i] = from[i];
  for (int64_t i = 1; i < size; ++i) good &= to[i - 1] <= to[i];
  return good && to[0] == 0 && to[size - 1] <= max_end;
}

// Whether the first `used` entries of an index are points. Also copies all `size` entries, unless `to` is null.
template <class T>
bool check_index(const T* from, int64_t size, int64_t used, int64_t num_points, int32_t* to, int max_threads) {
  using Unsigned = std::make_unsigned_t<T>;
  const Unsigned limit = Unsigned(num_points);
  const int threads = useful_threads(max_threads, size, pairs_per_thread);
  int bad = 0;
#pragma omp parallel num_threads(threads) reduction(| : bad)
  {
    const Share share(size, omp_get_thread_num(), omp_get_num_threads());
    const int64_t checked = larger(share.begin, smaller(share.end, used));
    // Each entry is read once, so that the copy holds what was checked: another thread may be writing to the array.
    if (to) {
      for (int64_t e = share.begin; e < checked; ++e) {
        const T point = from[e];
        to[e] = int32_t(point);
        bad |= Unsigned(point) >= limit;
      }
      for (int64_t e = checked; e < share.end; ++e) to[e] = int32_t(from[e]);
    } else {
      for (int64_t e = share.begin; e < checked; ++e) bad |= Unsigned(from[e]) >= limit;
    }
  }
  return !bad;
}

// Whether an entry of a padded matrix is a point (0 <= value < num_points), in one comparison.
template <class T>
bool is_point(T value, int64_t num_points) {
  return std::make_unsigned_t<T>(value) < std::make_unsigned_t<T>(num_points);
}

}  // namespace

namespace KP_ISA {

// Transposes a neighbor list by a counting sort: row j of the result lists the queries that have point j, in ascending
// order. Each thread counts, then writes, a contiguous range of queries; its slice of every row of the result begins
// after those of the threads before it, so the result does not depend on the number of threads.
Status transpose(const Transpose& args) {
  const Array &distance = args.distance, &out_distance = args.transposed_distance;
  const auto* from = as<int32_t>(args.index);
  const auto* rows = as<int64_t>(args.row_splits);
  auto* to = into<int32_t>(args.transposed_index);
  auto* splits = into<int64_t>(args.transposed_row_splits);
  const int64_t m = args.row_splits.rows - 1, n = args.transposed_row_splits.rows - 1, pairs = rows[m];
  // Each thread has a counter for every point, so there are no more threads than keep all counters below half the size
  // of the list. Up to half a million pairs fit the cache of one core, and two threads are slower.
  const int threads =
      int(larger<int64_t>(1, smaller<int64_t>(useful_threads(args.threads, pairs, 1 << 17), pairs / (4 * (n + 1)))));
  Buffer<int64_t> next;
  if (!next.resize(int64_t(threads) * n)) return Status::out_of_memory;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), count = omp_get_num_threads();
    const Share share(m, t, count), columns(n, t, count);
    int64_t* const counters = next.data() + int64_t(t) * n;
    memset(counters, 0, size_t(n) * sizeof(int64_t));
    for (int64_t e = rows[share.begin]; e < rows[share.end]; ++e) ++counters[from[e]];
#pragma omp barrier
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      int64_t sum = 0;
      for (int u = 0; u < count; ++u) sum += next[int64_t(u) * n + j];
      splits[j + 1] = sum;
    }
#pragma omp barrier
#pragma omp single
    {
      splits[0] = 0;
      for (int64_t j = 0; j < n; ++j) splits[j + 1] += splits[j];
    }
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      int64_t at = splits[j];
      for (int u = 0; u < count; ++u) {
        int64_t& s = next[int64_t(u) * n + j];
        const int64_t size = s;
        s = at;
        at += size;
      }
    }
#pragma omp barrier
    for (int64_t i = share.begin; i < share.end; ++i)
      for (int64_t e = rows[i]; e < rows[i + 1]; ++e) {
        const int64_t at = counters[from[e]]++;
        to[at] = int32_t(i);
        if (!distance.data) continue;
        if (distance.dtype == DType::float32)
          into<float>(out_distance)[at] = as<float>(distance)[e];
        else if (distance.dtype == DType::int32)
          into<int32_t>(out_distance)[at] = as<int32_t>(distance)[e];
        else
          into<double>(out_distance)[at] = as<double>(distance)[e];
      }
  }
  return Status::ok;
}

Status check_list(const CheckList& args) {
  const Array &index = args.index, &row_splits = args.row_splits;
  auto* const bounds = into<int64_t>(args.checked_row_splits);
  const bool bounded = with_integer(row_splits.dtype, [&](auto t) {
    return copy_row_splits(as<decltype(t)>(row_splits), row_splits.rows, index.rows, bounds);
  });
  if (!bounded) return Status::out_of_range;
  const int64_t used = bounds[row_splits.rows - 1];
  const bool good = with_integer(index.dtype, [&](auto t) {
    return check_index(as<decltype(t)>(index), index.rows, used, args.num_points, into<int32_t>(args.checked_index),
                       args.threads);
  });
  return good ? Status::ok : Status::out_of_range;
}

Status longest_row(const LongestRow& args) {
  const auto* const bounds = as<int64_t>(args.row_splits);
  const int64_t num_rows = args.row_splits.rows - 1;
  const int threads = useful_threads(args.threads, num_rows, pairs_per_thread);
  int64_t longest = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : longest)
  for (int64_t i = 0; i < num_rows; ++i) longest = larger(longest, bounds[i + 1] - bounds[i]);
  *into<int64_t>(args.longest) = longest;
  return Status::ok;
}

Status pad_list(const PadList& args) {
  const Array& out = args.padded;
  const auto* const from = as<int32_t>(args.index);
  const auto* const bounds = as<int64_t>(args.row_splits);
  const int64_t width = out.cols;
  const int threads = useful_threads(args.threads, out.rows * width, pairs_per_thread);
  with_integer(out.dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < out.rows; ++i) {
      const int32_t* const row = from + bounds[i];
      const int64_t size = smaller(width, bounds[i + 1] - bounds[i]);
      T* const to = into<T>(out) + i * width;
      for (int64_t j = 0; j < size; ++j) to[j] = row[j];
      for (int64_t j = size; j < width; ++j) to[j] = T(args.fill);
    }
  });
  return Status::ok;
}

// Counts the points in each row. Entries other than points, -1 and num_points are out of range.
Status count_padded(const Unpad& args) {
  const Array& padded = args.padded;
  const int64_t num_points = args.num_points;
  auto* const bounds = into<int64_t>(args.row_splits);
  const int64_t width = padded.cols;
  const int threads = useful_threads(args.threads, padded.rows * width, pairs_per_thread);
  const bool good = with_integer(padded.dtype, [&](auto t) {
    using T = decltype(t);
    using Unsigned = std::make_unsigned_t<T>;
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
    for (int64_t i = 0; i < padded.rows; ++i) {
      const T* const row = as<T>(padded) + i * width;
      Unsigned count = 0, wrong = 0;  // of the entries' type, so that the loop vectorizes; rows are shorter than 2^31
      for (int64_t j = 0; j < width; ++j) {
        count += is_point(row[j], num_points);
        wrong |= Unsigned(row[j]) + 1 > Unsigned(num_points) + 1;  // + 1 maps -1 to 0
      }
      bounds[i + 1] = int64_t(count);
      bad |= wrong != 0;
    }
    return !bad;
  });
  bounds[0] = 0;
  for (int64_t i = 0; i < padded.rows; ++i) bounds[i + 1] += bounds[i];
  return good ? Status::ok : Status::out_of_range;
}

// Returns out_of_range if another thread wrote to the matrix after its rows were counted.
Status unpad(const Unpad& args) {
  const Array& padded = args.padded;
  const int64_t num_points = args.num_points;
  const auto* const bounds = as<int64_t>(args.row_splits);
  const int64_t width = padded.cols;
  const int threads = useful_threads(args.threads, args.index.rows, pairs_per_thread);
  int changed = 0;
  with_integer(padded.dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : changed)
    for (int64_t i = 0; i < padded.rows; ++i) {
      const T* const row = as<T>(padded) + i * width;
      int32_t* to = into<int32_t>(args.index) + bounds[i];
      const int64_t count = bounds[i + 1] - bounds[i];
      T outside = 0;
      for (int64_t j = 0; j < count; ++j) {  // padding usually comes last, and then need not be read
        to[j] = int32_t(row[j]);
        outside |= !is_point(to[j], num_points);
      }
      if (!outside) continue;
      int32_t* const end = to + count;
      for (int64_t j = 0; j < width && to < end; ++j) {
        *to = int32_t(row[j]);
        to += is_point(*to, num_points);
      }
      changed |= to < end;
    }
  });
  return changed ? Status::out_of_range : Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
