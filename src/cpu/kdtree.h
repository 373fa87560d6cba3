// A kd-tree with leaves of up to 32 points: the index for any dimension, any radius and k nearest neighbors.
//
// Building: a node is split along its widest axis at the median of a sample, or at the exact median if the sample's
// would leave less than an eighth of the points on one side, so the depth is bounded. Points with equal coordinates
// form one leaf, however many, ordered by index: a search for k neighbors needs only the first of them.
//
// Searching: queries of the same leaf search together. One walk with their bounding box collects all leaves within the
// radius of that box. Nodes are stored in preorder, each with the number of the node after its subtree (`next`), so the
// walk needs no stack:
//
//                  0                     for i = root; i < end:
//               /     \                    if the box of node i is farther than the radius: i = next[i]  (skip)
//             1         4                  else: if node i is a leaf, collect its points;  i = i + 1
//            / \       / \             leaves: 2, 3, 5, 6
//           2   3     5   6      next = 7, 4, 3, 4, 7, 6, 7
//
// Boxes are tight, and the distance between boxes is computed with the formula for points. Floating-point rounding is
// monotonic, so no pair of points is nearer than their boxes and nothing is missed.
#pragma once

#include "candidates.h"
#include "geometry.h"

namespace kp {
namespace {

constexpr int64_t leaf_size = 32;

template <class T, int DIM>
struct Record {
  T x[DIM ? DIM : max_dimension];
  int32_t id;
};

// The n-th smallest of values[0, size), which are reordered (quickselect).
template <class T>
T select(T* values, int64_t size, int64_t n) {
  int64_t low = 0, high = size - 1;
  while (low < high) {
    const T pivot = values[(low + high) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] < pivot) ++i;
      while (pivot < values[j]) --j;
      if (i <= j) exchange(values[i++], values[j--]);
    }
    if (n <= j)
      high = j;
    else if (n >= i)
      low = i;
    else
      return values[n];
  }
  return values[n];
}

template <class T, int DIM>
struct Tree {
  static constexpr int stored = DIM ? DIM : max_dimension;
  struct Node {
    uint32_t begin, end;  // points of the subtree
    uint32_t next;        // the node after the subtree; the node is a leaf if this is the following node
    int32_t axis;         // split axis; of a leaf: its position in `leaves`
    T split;              // points above it are in the second child; points equal to it may be in either
  };

  Index head;
  SortedPoints<T, DIM> sorted;
  Buffer<Node> nodes;
  Buffer<T> boxes;          // (nodes, 2, D): lowest and highest coordinates
  Buffer<uint32_t> roots;   // root node of each batch item, and a sentinel
  Buffer<uint32_t> leaves;  // leaf nodes in order
  Buffer<uint32_t> starts;  // first point of each leaf, and a sentinel
  int64_t num_leaves = 0, num_nodes = 0;

  int dimension() const { return DIM ? DIM : head.dimension; }
  const T* low(int64_t node) const { return boxes.data() + node * 2 * dimension(); }
  const T* high(int64_t node) const { return low(node) + dimension(); }
  const SortedPoints<T, DIM>& points() const { return sorted; }

  Status build(const IndexArguments& args) {
    const int D = dimension();
    const auto* points = as<T>(args.points);
    const auto* splits = as<int64_t>(args.row_splits);
    const int64_t n = args.points.rows;
    Buffer<Record<T, DIM>> records, spare;
    Buffer<Branch> branches;  // a subtree of n points has room for max(1, n / 2 - 1) of them, so the array has gaps
    if (!records.resize(n) || !spare.resize(n) || !branches.resize(n / 2 + head.items + 1))
      return Status::out_of_memory;
    if (!sorted.resize(n, D) || !roots.resize(head.items + 1)) return Status::out_of_memory;
    const int threads = useful_threads(args.threads, n, 1 << 14);
    if (!all_finite(points, n * D, threads)) return Status::not_finite;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
      for (int a = 0; a < D; ++a) records[i].x[a] = points[i * D + a];
      records[i].id = int32_t(i);
    }
#pragma omp parallel num_threads(threads)
#pragma omp single
    for (int64_t b = 0; b < head.items; ++b)
      if (splits[b + 1] > splits[b]) {
        Record<T, DIM>* const all = records.data();
        Record<T, DIM>* const other = spare.data();
        Branch* const branch = branches.data() + first_branch(splits, b);
#pragma omp task
        grow(all, other, splits[b], splits[b + 1], branch, false);
      }
    return flatten(records.data(), splits, branches.data(), threads);
  }

  // The bounding box of an item's points; (inf, -inf) for an empty item.
  void box_of(int64_t item, double* box_low, double* box_high) const {
    const bool empty = roots[item] == roots[item + 1];
    for (int a = 0; a < dimension(); ++a) {
      box_low[a] = empty ? double(INFINITY) : double(low(roots[item])[a]);
      box_high[a] = empty ? -double(INFINITY) : double(high(roots[item])[a]);
    }
  }

  // The points of a leaf that a search for max_neighbors needs. A leaf of more than leaf_size points holds equal points
  // by index: the first max_neighbors are enough, and one more because the query itself may be ignored.
  Run run_of(const Node& leaf, int64_t max_neighbors) const {
    const int64_t size = leaf.end - leaf.begin;
    return {leaf.begin, size > leaf_size && max_neighbors < size ? leaf.begin + max_neighbors + 1 : leaf.end};
  }

  // Writes the runs of points of all leaves within `limit` of a box; returns their number. Adjacent leaves are joined.
  template <Metric metric>
  int64_t walk(int64_t item, const T* box_low, const T* box_high, T limit, int64_t max_neighbors,
               Buffer<Run>& runs) const {
    const int D = dimension();
    int64_t n = 0;
    const uint32_t end = roots[item + 1];
    for (uint32_t i = roots[item]; i < end;) {
      const Node& node = nodes[i];
      const T *const l = low(i), *const h = high(i);
      T gap[stored];
      for (int a = 0; a < D; ++a) {
        const T above = l[a] - box_high[a], below = box_low[a] - h[a];
        gap[a] = larger(T(0), larger(above, below));
      }
      if (!(measure<metric>(gap, D) <= limit)) {
        i = node.next;
        continue;
      }
      if (node.next == ++i) {
        const Run run = run_of(node, max_neighbors);
        if (n && runs[n - 1].end == run.begin)
          runs[n - 1].end = run.end;
        else
          runs[n++] = run;
      }
    }
    return n;
  }

  // The position in `leaves` of the leaf where a query would be inserted.
  int64_t leaf_of(int64_t item, const T* q) const {
    uint32_t i = roots[item];
    while (nodes[i].next != i + 1) {
      const uint32_t children[] = {i + 1, nodes[i + 1].next};
      i = children[q[nodes[i].axis] >= nodes[i].split];  // a branch would be unpredictable
    }
    return nodes[i].axis;
  }
  // The position in `leaves` of the leaf that holds the i-th sorted point.
  int64_t leaf_with_point(int64_t i) const {
    int64_t first = 0, last = num_leaves;
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (int64_t(starts[middle]) <= i ? first : last) = middle;
    }
    return first;
  }

 private:
  // A node while the tree is built in parallel: flatten() numbers them in preorder afterwards.
  struct Branch {
    int64_t begin, end;
    int64_t second;  // distance to the branch of the second child; 0 for a leaf. The first child's is the next one.
    int32_t axis;
    T split;
  };
  // Room for the branches of n points: a split leaves at least an eighth of them, and so 4, on either side.
  static int64_t max_branches(int64_t n) { return larger<int64_t>(1, n / 2 - 1); }
  static int64_t first_branch(const int64_t* splits, int64_t item) { return splits[item] / 2 + item; }

  // Builds the subtree of points [begin, end) of `a` by partitioning them into `b`. Recursion swaps the two arrays at
  // each level. The final points must be in the root's `a`; if `swapped`, that array is `b`, and a leaf copies its
  // points there.
  void grow(Record<T, DIM>* a, Record<T, DIM>* b, int64_t begin, int64_t end, Branch* branch, bool swapped) const {
    const int64_t n = end - begin;
    *branch = {begin, end, 0, 0, T(0)};
    int axis = 0;
    T split = 0;
    bool leaf = n <= leaf_size;
    if (!leaf) {
      split = sample(a + begin, n, axis);
      if ((leaf = all_equal(a + begin, n))) {
        const auto by_id = [](const Record<T, DIM>& x, const Record<T, DIM>& y) { return x.id < y.id; };
        if (merge_sort(a + begin, b + begin, n, int64_t(1), by_id) != a + begin) exchange(a, b), swapped = !swapped;
      }
    }
    if (leaf) {
      if (swapped) memcpy(static_cast<void*>(b + begin), a + begin, size_t(n) * sizeof *a);
      return;
    }
    int64_t left = begin, right = end - 1;
    for (int64_t i = begin; i < end; ++i) {  // write to both sides and advance one: a branch would be unpredictable
      const bool second = !(a[i].x[axis] < split);
      b[left] = a[i];
      b[right] = a[i];
      left += !second;
      right -= second;
    }
    if (left - begin < n / 8 || end - left < n / 8) {
      left = begin + n / 2;
      split = halve(b + begin, n, axis);
    }
    branch->second = 1 + max_branches(left - begin);
    branch->axis = axis;
    branch->split = split;
    Branch *const first = branch + 1, *const second = branch + branch->second;
#pragma omp task if (n > (1 << 14))
    grow(b, a, begin, left, first, !swapped);
    grow(b, a, left, end, second, !swapped);
  }

  // Finds the widest axis of a sample of the points; returns the sample's median along it.
  T sample(const Record<T, DIM>* points, int64_t n, int& axis) const {
    constexpr int max_samples = 128;
    const int D = dimension();
    const int taken = n < 512 ? 17 : max_samples;
    T values[max_samples], widest = -1;
    for (int a = 0; a < D; ++a) {
      T low = points[0].x[a], high = low;
      for (int i = 1; i < taken; ++i) {
        const T x = points[i * n / taken].x[a];
        low = smaller(low, x);
        high = larger(high, x);
      }
      const T width = high / 2 - low / 2;  // halved first, or it may overflow
      if (width > widest) widest = width, axis = a;
    }
    for (int i = 0; i < taken; ++i) values[i] = points[i * n / taken].x[axis];
    return select(values, taken, taken / 2);
  }

  bool all_equal(const Record<T, DIM>* points, int64_t n) const {
    for (int64_t i = 1; i < n; ++i)
      for (int a = 0; a < dimension(); ++a)
        if (points[i].x[a] != points[0].x[a]) return false;
    return true;
  }

  // Moves the n / 2 lowest points along the axis to the front; returns the lowest coordinate of the others.
  static T halve(Record<T, DIM>* points, int64_t n, int axis) {
    int64_t low = 0, high = n - 1, middle = n / 2;
    while (low < high) {
      T samples[9];
      for (int i = 0; i < 9; ++i) samples[i] = points[low + i * (high - low) / 8].x[axis];
      const T pivot = select(samples, 9, 4);
      int64_t i = low, j = high;
      while (i <= j) {
        while (points[i].x[axis] < pivot) ++i;
        while (pivot < points[j].x[axis]) --j;
        if (i <= j) {
          exchange(points[i], points[j]);
          ++i, --j;
        }
      }
      if (middle <= j)
        high = j;
      else if (middle >= i)
        low = i;
      else
        break;
    }
    return points[middle].x[axis];
  }

  // Makes nodes in preorder from the branches, the arrays of coordinates, and the boxes.
  Status flatten(const Record<T, DIM>* records, const int64_t* splits, const Branch* branches, int threads) {
    const int D = dimension();
    num_nodes = num_leaves = 0;
    for (int64_t b = 0; b < head.items; ++b)
      if (splits[b + 1] > splits[b]) count(branches + first_branch(splits, b));
    if (!nodes.resize(num_nodes) || !boxes.resize(num_nodes * 2 * D)) return Status::out_of_memory;
    if (!leaves.resize(num_leaves) || !starts.resize(num_leaves + 1)) return Status::out_of_memory;
    num_nodes = num_leaves = 0;
    for (int64_t b = 0; b < head.items; ++b) {
      roots[b] = uint32_t(num_nodes);
      if (splits[b + 1] > splits[b]) place(branches + first_branch(splits, b));
    }
    roots[head.items] = uint32_t(num_nodes);
    starts[num_leaves] = uint32_t(sorted.size);
#pragma omp parallel for num_threads(threads)
    for (int64_t l = 0; l < num_leaves; ++l) {
      const uint32_t node = leaves[l];
      T *const lowest = boxes.data() + int64_t(node) * 2 * D, *const highest = lowest + D;
      for (int a = 0; a < D; ++a) {
        T lo = T(INFINITY), hi = -T(INFINITY);
        for (int64_t i = starts[l]; i < starts[l + 1]; ++i) {
          const T x = records[i].x[a];
          sorted.x[a][i] = x;
          lo = smaller(lo, x);
          hi = larger(hi, x);
        }
        lowest[a] = lo;
        highest[a] = hi;
      }
      for (int64_t i = starts[l]; i < starts[l + 1]; ++i) sorted.ids[i] = records[i].id;
    }
    for (int64_t i = num_nodes - 1; i >= 0; --i) {
      if (nodes[i].next == i + 1) continue;
      const int64_t first = i + 1, second = nodes[first].next;
      for (int a = 0; a < D; ++a) {
        boxes[i * 2 * D + a] = smaller(low(first)[a], low(second)[a]);
        boxes[i * 2 * D + D + a] = larger(high(first)[a], high(second)[a]);
      }
    }
    return Status::ok;
  }
  void count(const Branch* branch) {
    ++num_nodes;
    if (!branch->second) {
      ++num_leaves;
      return;
    }
    count(branch + 1);
    count(branch + branch->second);
  }
  void place(const Branch* branch) {
    const int64_t i = num_nodes++;
    nodes[i] = {uint32_t(branch->begin), uint32_t(branch->end), 0, branch->axis, branch->split};
    if (branch->second) {
      place(branch + 1);
      place(branch + branch->second);
    } else {
      nodes[i].axis = int32_t(num_leaves);
      leaves[num_leaves] = uint32_t(i);
      starts[num_leaves++] = uint32_t(branch->begin);
    }
    nodes[i].next = uint32_t(num_nodes);
  }
};

// Queries sorted by the leaf where each would be inserted.
template <class T, int DIM>
struct LeafSorted {
  SortedPoints<T, DIM> points;
  Buffer<uint64_t> keys;  // (item, leaf)

  Status sort(const Tree<T, DIM>& tree, const T* queries, int64_t n, const ItemCursor& items, int threads) {
    if (!keys.resize(n) || !points.resize(n, tree.dimension())) return Status::out_of_memory;
    threads = useful_threads(threads, n, 1 << 11);
    const int leaf_bits = bits_for(uint64_t(tree.num_leaves) + 1);
#pragma omp parallel num_threads(threads)
    {
      const Share share(n, omp_get_thread_num(), omp_get_num_threads());
      ItemCursor cursor = items;
      for (int64_t i = share.begin; i < share.end; ++i) {
        const int64_t item = cursor.item_of(i);
        const T* const q = queries + i * tree.dimension();
        const bool empty = tree.roots[item] == tree.roots[item + 1];
        keys[i] = uint64_t(item) << leaf_bits | uint64_t(empty ? 0 : tree.leaf_of(item, q));
        points.ids[i] = int32_t(i);
      }
    }
    const int bits = leaf_bits + bits_for(uint64_t(tree.head.items));
    if (Status status = radix_sort(keys, points.ids, n, bits, threads); status != Status::ok) return status;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i)
      for (int a = 0; a < tree.dimension(); ++a)
        points.x[a][i] = queries[int64_t(points.ids[i]) * tree.dimension() + a];
    return Status::ok;
  }
};

// Visits queries in the order of their leaves and gathers the candidates of each group.
template <class T, int DIM>
class TreeWalker {
 public:
  static constexpr int stored = DIM ? DIM : max_dimension;

  // `queries` null: the points of the tree search among themselves.
  TreeWalker(const Tree<T, DIM>& tree, const LeafSorted<T, DIM>* queries, Metric metric)
      : tree_(tree), queries_(queries), metric_(metric), leaf_bits_(bits_for(uint64_t(tree.num_leaves) + 1)) {}

  bool reserve() { return runs_.resize(tree_.num_leaves); }

  // A group is up to leaf_size queries of one leaf: the end of the group that begins at query i.
  int64_t group_end(int64_t i, int64_t end) {
    if (!queries_) {
      leaf_ = tree_.leaf_with_point(i);
      return smaller<int64_t>(end, tree_.starts[leaf_ + 1]);
    }
    const uint64_t key = queries_->keys[i];
    leaf_ = int64_t(key & ((uint64_t(1) << leaf_bits_) - 1));
    // A query far from its leaf's box may be far from the others too, and would widen their box: it searches alone.
    const int64_t last = smaller(end, i + leaf_size);
    if (!is_near_leaf(i)) return i + 1;
    while (++i < last && queries_->keys[i] == key && is_near_leaf(i)) {
    }
    return i;
  }

  // Gathers the candidates within `limit` of the group of queries [begin, end). Returns false if memory runs out.
  KP_OUTLINE bool move_to(int64_t begin, int64_t end, T limit, bool by_index, Candidates<T, DIM>& candidates,
                          int64_t max_neighbors = INT64_MAX) {
    const int D = tree_.dimension();
    const SortedPoints<T, DIM>& queries = queries_ ? queries_->points : tree_.sorted;
    T low[stored], high[stored];
    for (int a = 0; a < D; ++a) {
      low[a] = high[a] = queries.x[a][begin];
      for (int64_t i = begin + 1; i < end; ++i) {
        low[a] = smaller(low[a], queries.x[a][i]);
        high[a] = larger(high[a], queries.x[a][i]);
      }
    }
    const int64_t item = item_of(begin);
    int64_t num_runs = 0;
    if (metric_ == Metric::l2)
      num_runs = tree_.template walk<Metric::l2>(item, low, high, limit, max_neighbors, runs_);
    else if (metric_ == Metric::l1)
      num_runs = tree_.template walk<Metric::l1>(item, low, high, limit, max_neighbors, runs_);
    else
      num_runs = tree_.template walk<Metric::linf>(item, low, high, limit, max_neighbors, runs_);
    return candidates.gather(tree_.sorted, runs_.data(), num_runs, by_index);
  }

  // The points of the smallest node around the group's leaf that has at least min_points, or else of the whole item.
  Run points_around(int64_t begin, int64_t min_points, int64_t max_neighbors) const {
    const int64_t item = item_of(begin);
    if (tree_.roots[item] == tree_.roots[item + 1]) return {0, 0};
    const uint32_t leaf = tree_.leaves[leaf_];
    uint32_t best = tree_.roots[item];
    for (uint32_t i = best; tree_.nodes[i].end - tree_.nodes[i].begin >= min_points;) {
      best = i;
      if (i == leaf) break;
      const uint32_t second = tree_.nodes[i + 1].next;
      i = leaf < second ? i + 1 : second;
    }
    return best == leaf ? tree_.run_of(tree_.nodes[best], max_neighbors)
                        : Run{tree_.nodes[best].begin, tree_.nodes[best].end};
  }

 private:
  int64_t item_of(int64_t query) const {
    if (queries_) return int64_t(queries_->keys[query] >> leaf_bits_);
    const uint32_t leaf = tree_.leaves[leaf_];
    int64_t first = 0, last = tree_.head.items;
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (tree_.roots[middle] <= leaf ? first : last) = middle;
    }
    return first;
  }
  // Whether a query is in the box of its leaf or no farther from it than the box's longest side, along each axis.
  bool is_near_leaf(int64_t query) const {
    if (!tree_.num_leaves) return false;
    const T *const low = tree_.low(tree_.leaves[leaf_]), *const high = tree_.high(tree_.leaves[leaf_]);
    T margin = 0;
    for (int a = 0; a < tree_.dimension(); ++a) margin = larger(margin, high[a] - low[a]);
    for (int a = 0; a < tree_.dimension(); ++a) {
      const T x = queries_->points.x[a][query];
      if (x < low[a] - margin || x > high[a] + margin) return false;
    }
    return true;
  }

  const Tree<T, DIM>& tree_;
  const LeafSorted<T, DIM>* queries_;
  const Metric metric_;
  const int leaf_bits_;
  Buffer<Run> runs_;
  int64_t leaf_ = 0;
};

}  // namespace
}  // namespace kp
