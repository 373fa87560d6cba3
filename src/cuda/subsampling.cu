// Grid subsampling on the GPU: points are sorted by (batch item, Morton key of their voxel), then a thread for each
// voxel and column reduces the points in input order, as on the CPU, so the results are the same bits.
//
// Compiled for the type of geometry, its dimension and the type of the rows that are reduced:
// compile: KP_T=float KP_DIM=3 KP_S=float
// compile: KP_T=double KP_DIM=2 KP_S=kp::Half

#include "launch.h"
#include "storage.h"
#include "formulas/subsampling.h"

namespace kp {
namespace {

using T = KP_T;
using S = KP_S;  // type of features, or T when points are reduced
using F = Real<S>;
constexpr int D = KP_DIM;
constexpr int max_axis_bits = 21;

enum InputError : unsigned { not_finite = 1, out_of_range = 2 };

// The origin of an item's grid along axis a: that of all items, of this item or, without any, published_origin().
// `lowest`: the lowest coordinates of each item, as ordered integers.
__device__ T origin_of(int item, int a, const T* origins, int num_origins, const T* voxel_size,
                       const unsigned long long* lowest) {
  if (num_origins) return origins[num_origins > 1 ? item * D + a : a];
  return published_origin(T(from_ordered(lowest[item * D + a])), voxel_size[a]);
}

// Spreads the bits of x to every D-th place.
__device__ uint64_t spread(uint64_t x) {
  uint64_t out = 0;
  for (int b = 0; b < max_axis_bits; ++b) out |= (x >> b & 1) << b * D;
  return out;
}

}  // namespace
}  // namespace kp

using namespace kp;

// lowest[item] = the lowest coordinates of the item, as ordered integers. Sets the bits of InputError that occur.
extern "C" __global__ void lowest_coordinates(const T* points, int64_t num_points, const int64_t* row_splits,
                                              int num_items, unsigned long long* lowest, unsigned* input_errors) {
  // Most threads see points of one item only: the minima are written when another item begins.
  double low[D];
  int item = -1;
  const auto write = [&] {
    for (int a = 0; a < D && item >= 0; ++a) atomicMin(&lowest[item * D + a], ordered(low[a]));
  };
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    const int next_item = item_of(row_splits, num_items, i);
    if (next_item != item) {
      write();
      item = next_item;
      for (int a = 0; a < D; ++a) low[a] = __longlong_as_double(0x7ff0000000000000);  // infinity
    }
    for (int a = 0; a < D; ++a) {
      const T x = points[i * D + a];
      if (!(x - x == 0)) atomicOr(input_errors, unsigned(not_finite));
      if (double(x) < low[a]) low[a] = double(x);
    }
  }
  write();
}

// keys[i] = Morton key of the voxel of point i, counted from its item's lowest voxel. Subtraction, division and floor
// are monotonic, so that is the voxel of the lowest coordinates.
extern "C" __global__ void voxel_keys(const T* points, int64_t num_points, const int64_t* row_splits, int num_items,
                                      const T* origins, int num_origins, const T* voxel_size,
                                      const unsigned long long* lowest, int64_t* keys, unsigned* input_errors) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    const int item = item_of(row_splits, num_items, i);
    uint64_t key = 0;
    for (int a = 0; a < D; ++a) {
      const T origin = origin_of(item, a, origins, num_origins, voxel_size, lowest);
      const T low = voxel_index(T(from_ordered(lowest[item * D + a])), origin, voxel_size[a]);
      const double from_low = double(voxel_index(points[i * D + a], origin, voxel_size[a])) - double(low);
      if (from_low < double(1 << max_axis_bits))
        key |= spread(uint64_t(from_low)) << a;
      else
        atomicOr(input_errors, unsigned(out_of_range));  // or not finite
    }
    keys[i] = int64_t(key);
  }
}

extern "C" __global__ void items_of(const int64_t* order, int64_t num_points, const int64_t* row_splits, int num_items,
                                    int32_t* items) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads())
    items[i] = int32_t(item_of(row_splits, num_items, order[i]));
}

// heads[i] = 1 where the i-th point in order is the first of its voxel
extern "C" __global__ void voxel_heads(const int64_t* keys, const int64_t* order, int64_t num_points,
                                       const int64_t* row_splits, int num_items, int32_t* heads) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    bool is_head = i == 0 || keys[order[i]] != keys[order[i - 1]];
    if (!is_head) is_head = item_of(row_splits, num_items, order[i]) != item_of(row_splits, num_items, order[i - 1]);
    heads[i] = is_head;
  }
}

// numbers[i]: how many voxels begin among the first i + 1 sorted points. Writes the voxel of every point, where each
// voxel begins among the sorted points, and the row_splits of the voxels.
extern "C" __global__ void number_voxels(const int64_t* order, const int64_t* numbers, int64_t num_points,
                                         const int64_t* row_splits, int num_items, int32_t* inverse, int64_t* begins,
                                         int64_t* out_row_splits) {
  for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
    const int64_t voxel = numbers[i] - 1;
    inverse[order[i]] = int32_t(voxel);
    if (i == 0 || numbers[i - 1] != numbers[i]) begins[voxel] = i;
    if (i + 1 == num_points) begins[voxel + 1] = num_points;
  }
  for (int64_t b = first_thread(); b <= num_items; b += num_threads())
    out_row_splits[b] = row_splits[b] ? numbers[row_splits[b] - 1] : 0;
}

extern "C" __global__ void count_points(const int64_t* begins, int64_t num_voxels, int32_t* counts) {
  for (int64_t v = first_thread(); v < num_voxels; v += num_threads()) counts[v] = int32_t(begins[v + 1] - begins[v]);
}

// The mean of the rows of each voxel, summed relative to the first row.
extern "C" __global__ void average(const S* rows, int64_t columns, const int64_t* order, const int64_t* begins,
                                   int64_t num_voxels, S* out) {
  for (int64_t i = first_thread(); i < num_voxels * columns; i += num_threads()) {
    const int64_t v = i / columns, c = i % columns, begin = begins[v], end = begins[v + 1];
    const double first = double(F(rows[order[begin] * columns + c]));
    double sum = 0;
    for (int64_t at = begin + 1; at < end; ++at) sum += double(F(rows[order[at] * columns + c])) - first;
    out[i] = S(F(first + sum / double(end - begin)));
  }
}

// The largest values of the rows of each voxel.
extern "C" __global__ void maximize(const S* rows, int64_t columns, const int64_t* order, const int64_t* begins,
                                    int64_t num_voxels, S* out) {
  for (int64_t i = first_thread(); i < num_voxels * columns; i += num_threads()) {
    const int64_t v = i / columns, c = i % columns;
    F largest = F(rows[order[begins[v]] * columns + c]);
    for (int64_t at = begins[v] + 1; at < begins[v + 1]; ++at) {
      const F x = F(rows[order[at] * columns + c]);
      if (exceeds(x, largest)) largest = x;
    }
    out[i] = S(largest);
  }
}

// The center of each voxel, and the point nearest to it, of equally near ones the first. Either output may be null.
extern "C" __global__ void use_centers(const T* points, const int64_t* row_splits, int num_items, const int64_t* order,
                                       const int64_t* begins, int64_t num_voxels, const T* origins, int num_origins,
                                       const T* voxel_size, const unsigned long long* lowest, T* centers,
                                       int32_t* nearest) {
  for (int64_t v = first_thread(); v < num_voxels; v += num_threads()) {
    const int item = item_of(row_splits, num_items, order[begins[v]]);
    double center[D];
    for (int a = 0; a < D; ++a) {
      const T origin = origin_of(item, a, origins, num_origins, voxel_size, lowest);
      const T index = voxel_index(points[order[begins[v]] * D + a], origin, voxel_size[a]);
      center[a] = voxel_center(index, origin, voxel_size[a]);
      if (centers) centers[v * D + a] = T(center[a]);
    }
    if (!nearest) continue;
    int64_t best = order[begins[v]];
    double smallest = squared_distance<D>(points + best * D, center);
    for (int64_t at = begins[v] + 1; at < begins[v + 1]; ++at) {
      const double squared = squared_distance<D>(points + order[at] * D, center);
      if (squared < smallest) {
        smallest = squared;
        best = order[at];
      }
    }
    nearest[v] = int32_t(best);
  }
}

// winners[v, column] = the most frequent label of voxel v, of equally frequent ones the smallest. `labels` are those of
// one column, sorted within each voxel. They are only compared for equality: U is an unsigned integer of their size.
template <class U>
__device__ void elect(const U* labels, const int64_t* begins, int64_t num_voxels, int has_ignore_label,
                      int64_t ignore_label, int64_t column, int64_t columns, U* winners) {
  for (int64_t v = first_thread(); v < num_voxels; v += num_threads()) {
    U winner = U(ignore_label);
    int64_t most = 0, run = 0;
    for (int64_t at = begins[v]; at < begins[v + 1]; ++at) {
      run = at > begins[v] && labels[at] == labels[at - 1] ? run + 1 : 1;
      if (run > most && !(has_ignore_label && labels[at] == U(ignore_label))) {
        most = run;
        winner = labels[at];
      }
    }
    winners[v * columns + column] = winner;
  }
}
extern "C" __global__ void elect_uint8(const uint8_t* labels, const int64_t* begins, int64_t num_voxels,
                                       int has_ignore_label, int64_t ignore_label, int64_t column, int64_t columns,
                                       uint8_t* winners) {
  elect(labels, begins, num_voxels, has_ignore_label, ignore_label, column, columns, winners);
}
extern "C" __global__ void elect_uint16(const uint16_t* labels, const int64_t* begins, int64_t num_voxels,
                                        int has_ignore_label, int64_t ignore_label, int64_t column, int64_t columns,
                                        uint16_t* winners) {
  elect(labels, begins, num_voxels, has_ignore_label, ignore_label, column, columns, winners);
}
extern "C" __global__ void elect_uint32(const uint32_t* labels, const int64_t* begins, int64_t num_voxels,
                                        int has_ignore_label, int64_t ignore_label, int64_t column, int64_t columns,
                                        uint32_t* winners) {
  elect(labels, begins, num_voxels, has_ignore_label, ignore_label, column, columns, winners);
}
extern "C" __global__ void elect_uint64(const uint64_t* labels, const int64_t* begins, int64_t num_voxels,
                                        int has_ignore_label, int64_t ignore_label, int64_t column, int64_t columns,
                                        uint64_t* winners) {
  elect(labels, begins, num_voxels, has_ignore_label, ignore_label, column, columns, winners);
}

// ---- gradient of features

// Backward of a mean (`nearest` null): each point receives its voxel's gradient divided by the number of points.
// Backward of "nearest": the nearest point receives all of it, the others zero.
extern "C" __global__ void mean_grad(const int32_t* inverse, const int32_t* counts, const int32_t* nearest,
                                     const S* grad_out, int64_t num_points, int64_t columns, S* grad_features) {
  for (int64_t i = first_thread(); i < num_points * columns; i += num_threads()) {
    const int64_t point = i / columns, v = inverse[point];
    const F grad = F(grad_out[v * columns + i % columns]);
    grad_features[i] = S(!nearest ? grad / F(counts[v]) : nearest[v] == point ? grad : F(0));
  }
}

// Backward of a maximum: the point with the maximum receives the gradient of the voxel and column, the others zero.
// `order`: points sorted by voxel.
extern "C" __global__ void maximum_grad(const S* features, int64_t columns, const int64_t* order, const int64_t* begins,
                                        int64_t num_voxels, const S* grad_out, S* grad_features) {
  for (int64_t i = first_thread(); i < num_voxels * columns; i += num_threads()) {
    const int64_t v = i / columns, c = i % columns;
    int64_t largest = order[begins[v]];
    for (int64_t at = begins[v] + 1; at < begins[v + 1]; ++at)
      if (exceeds(F(features[order[at] * columns + c]), F(features[largest * columns + c]))) largest = order[at];
    for (int64_t at = begins[v]; at < begins[v + 1]; ++at)
      grad_features[order[at] * columns + c] = order[at] == largest ? grad_out[i] : S(F(0));
  }
}
