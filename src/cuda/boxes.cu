// Computes the bounding box of every batch item's points and queries, and whether distances within it can tell points
// apart (is_measurable in formulas/neighbors.h).
//
// Compiled for one coordinate type and metric:
// compile: KP_T=float KP_METRIC=0
// compile: KP_T=double KP_METRIC=1

#include "launch.h"
#include "formulas/neighbors.h"

namespace kp {
namespace {

using T = KP_T;

}  // namespace
}  // namespace kp

using namespace kp;

// boxes (items, 2, D): the minima of the coordinates and of the negated coordinates, as ordered integers
extern "C" __global__ void grow_boxes(const T* points, int64_t num_points, int dimension, const int64_t* row_splits,
                                      int num_items, unsigned long long* boxes) {
  const int D = dimension;
  const double infinity = __longlong_as_double(0x7ff0000000000000);
  for (int a = 0; a < D; ++a) {  // one axis after the other: sixteen at once would take 156 registers
    // Most threads see points of one item only: the minima are written when another item begins.
    double low = infinity, negated = infinity;
    int item = -1;
    const auto write = [&] {
      if (item < 0) return;
      atomicMin(&boxes[int64_t(item) * 2 * D + a], ordered(low));
      atomicMin(&boxes[int64_t(item) * 2 * D + D + a], ordered(negated));
    };
    for (int64_t i = first_thread(); i < num_points; i += num_threads()) {
      const int next_item = item_of(row_splits, num_items, i);
      if (next_item != item) {
        write();
        item = next_item;
        low = negated = infinity;
      }
      const double x = double(points[i * D + a]);
      low = x < low ? x : low;
      negated = -x < negated ? -x : negated;
    }
    write();
  }
}

// Writes the sides (items, D) of the boxes of items with points and queries. Sets not_measurable to 1 if distances
// within one of them cannot tell points apart.
extern "C" __global__ void check_boxes(const unsigned long long* boxes, int dimension, const int64_t* row_splits,
                                       const int64_t* queries_row_splits, int num_items, T* sides,
                                       unsigned* not_measurable) {
  const int D = dimension;
  for (int64_t item = first_thread(); item < num_items; item += num_threads()) {
    if (row_splits[item] == row_splits[item + 1] || queries_row_splits[item] == queries_row_splits[item + 1]) continue;
    T* const of_item = sides + item * D;
    for (int a = 0; a < D; ++a)
      of_item[a] = T(-from_ordered(boxes[item * 2 * D + D + a])) - T(from_ordered(boxes[item * 2 * D + a]));
    if (!is_measurable<Metric(KP_METRIC)>(of_item, D, false)) atomicOr(not_measurable, 1u);
  }
}
