// Radius search and k nearest neighbors over an index (grid.h or kdtree.h).
//
// Both indexes visit queries in groups: the queries of a cell, or of a leaf. Each group gathers its candidates once,
// and every query of the group tests all of them (candidates.h). The test is the same code for both indexes, so they
// return the same neighbors to the bit.

#include "formulas/neighbors.h"

#include <new>

#include "candidates.h"
#include "grid.h"
#include "kdtree.h"

namespace kp {
namespace KP_ISA {
namespace {

// ---- indexes -----------------------------------------------------------------------------------------------------

// What a search needs to know of an index type: how queries are sorted in the order of the index, and what visits them.
template <class T, int D>
struct GridKind {
  using Scalar = T;
  static constexpr int dimension = D;
  static constexpr bool is_grid = true;
  using IndexType = Grid<T, D>;
  using SortedQueries = CellSorted<T, D>;
  using Walker = GridWalker<T, D>;

  static const SortedPoints<T, D>& points(const IndexType& index) { return index.sorted.points; }
  static Status sort_queries(const IndexType& index, const Search& search, SortedQueries& queries) {
    return index.sort_queries(search, queries);
  }
  static Walker walker(const IndexType& index, const SortedQueries* queries, const Search&) {
    return Walker(index, queries ? *queries : index.sorted);
  }
};
template <class T, int DIM>
struct TreeKind {
  using Scalar = T;
  static constexpr int dimension = DIM;
  static constexpr bool is_grid = false;
  using IndexType = Tree<T, DIM>;
  using SortedQueries = LeafSorted<T, DIM>;
  using Walker = TreeWalker<T, DIM>;

  static const SortedPoints<T, DIM>& points(const IndexType& index) { return index.sorted; }
  static Status sort_queries(const IndexType& index, const Search& search, SortedQueries& queries) {
    return queries.sort(index, as<T>(search.queries), search.queries.rows,
                        ItemCursor(search.queries_row_splits, index.head.items), search.threads);
  }
  static Walker walker(const IndexType& index, const SortedQueries* queries, const Search& search) {
    return Walker(index, queries, search.metric);
  }
};

// Calls f(kind) with the GridKind or TreeKind of an index.
template <class T, class F>
auto with_kind_of(const Index& index, F f) {
  if (index.kind == IndexKind::grid) return index.dimension == 2 ? f(GridKind<T, 2>()) : f(GridKind<T, 3>());
  if (index.dimension == 2) return f(TreeKind<T, 2>());
  return index.dimension == 3 ? f(TreeKind<T, 3>()) : f(TreeKind<T, 0>());
}
template <class F>
auto with_kind(const Index& index, F f) {
  return with_real(index.dtype, [&](auto t) { return with_kind_of<decltype(t)>(index, f); });
}

template <class Kind>
const typename Kind::IndexType& index_as(const void* index) {
  return *static_cast<const typename Kind::IndexType*>(index);
}

template <class X>
X* create() {
  void* const memory = malloc(sizeof(X));
  return memory ? new (memory) X() : nullptr;
}
template <class X>
void destroy(void* x) {
  static_cast<X*>(x)->~X();
  free(x);
}

// ---- searches ----------------------------------------------------------------------------------------------------

// The largest measure of a neighbor, for each query.
template <class T>
struct Limits {
  const T* radii;
  T radius;
  Metric metric;
  bool is_inclusive;

  T operator()(int64_t id) const { return largest_measure(metric, radii ? radii[id] : radius, is_inclusive); }
};
template <class T>
KP_OUTLINE void put_distances(Metric metric, const T* measures, int64_t n, T* distances) {
  for (int64_t j = 0; j < n; ++j) distances[j] = metric == Metric::l2 ? T(::sqrt(measures[j])) : measures[j];
}

// The state of a search between counting and filling.
template <class Kind>
struct Plan {
  using T = typename Kind::Scalar;
  Search search;
  typename Kind::SortedQueries sorted_queries;
  Buffer<T> radii;  // a copy, because they are read in both phases and the caller's array may change in between
  int64_t* row_splits = nullptr;
  int64_t num_queries = 0;

  const typename Kind::IndexType& index() const { return index_as<Kind>(search.index); }
  // Null if the points search among themselves.
  const typename Kind::SortedQueries* separate_queries() const {
    return search.queries.data ? &sorted_queries : nullptr;
  }
  const SortedPoints<T, Kind::dimension>& queries() const {
    return search.queries.data ? sorted_queries.points : Kind::points(index());
  }
  Limits<T> limits() const {
    return {search.radii.data ? radii.data() : nullptr, T(search.radius), search.metric, search.is_inclusive};
  }

  // Checks and sorts the queries. `any` becomes false if there are no points or no queries.
  Status prepare(const Search& arguments, bool& any) {
    search = arguments;
    const Index& head = index().head;
    num_queries = search.queries.data ? search.queries.rows : head.num_points;
    any = head.num_points && num_queries;
    if (search.radii.data) {
      if (!radii.resize(num_queries)) return Status::out_of_memory;
      memcpy(radii.data(), search.radii.data, size_t(num_queries) * sizeof(T));
    }
    if (!search.queries.data) return Status::ok;
    const auto* coordinates = as<T>(search.queries);
    if (!all_finite(coordinates, num_queries * head.dimension, search.threads)) return Status::not_finite;
    return any ? Kind::sort_queries(index(), search, sorted_queries) : Status::ok;
  }

  // Whether distances within the box of every batch item's points and queries can tell points apart.
  bool is_measurable() const {
    const Index& head = index().head;
    const int D = head.dimension;
    const bool is_bounded = search.radii.data || search.radius - search.radius == 0;
    const auto* splits = as<int64_t>(search.queries_row_splits);
    const int64_t sets = search.queries.data ? search.queries_row_splits.rows - 1 : head.items;
    for (int64_t s = 0; s < sets; ++s) {
      double low[max_dimension], high[max_dimension], queries_low[max_dimension], queries_high[max_dimension];
      index().box_of(s % head.items, low, high);
      if (!(low[0] <= high[0])) continue;  // no points
      if (search.queries.data) {
        if (splits[s] == splits[s + 1]) continue;
        bounding_box<T, Kind::dimension>(as<T>(search.queries) + splits[s] * D, splits[s + 1] - splits[s],
                                         search.threads, queries_low, queries_high, D);
        for (int a = 0; a < D; ++a)
          low[a] = smaller(low[a], queries_low[a]), high[a] = larger(high[a], queries_high[a]);
      }
      if (!kp::is_measurable<T>(search.metric, low, high, D, is_bounded)) return false;
    }
    return true;
  }
};

constexpr int64_t block_of_queries = 512;

// Calls visit(walker, scratch, begin, end) for every group of queries, in parallel over blocks of 512 queries. `visit`
// returns false if memory runs out.
template <class Kind, class Scratch, class Visit>
Status for_each_group(const Plan<Kind>& plan, Visit visit) {
  const int64_t n = plan.num_queries, blocks = (n + block_of_queries - 1) / block_of_queries;
  const int threads = useful_threads(plan.search.threads, blocks, 1);
  // Blocks that a thread takes at a time. A walker is faster when it continues where it stopped, so up to four; but
  // every thread must get some: when four blocks were taken by fours, the second thread had nothing to do.
  const int64_t taken = larger<int64_t>(1, smaller<int64_t>(4, blocks / (2 * threads)));
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    auto walker = Kind::walker(plan.index(), plan.separate_queries(), plan.search);
    Scratch scratch(plan);
    enough = walker.reserve();
#pragma omp for schedule(dynamic, taken)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = smaller(n, (b + 1) * block_of_queries);
      for (int64_t i = b * block_of_queries; enough && i < end;) {
        const int64_t next = walker.group_end(i, end);
        enough = visit(walker, scratch, i, next);
        i = next;
      }
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

// One thread's candidates of the current group, and the row it builds.
template <class Kind>
struct GroupScratch {
  using T = typename Kind::Scalar;
  Candidates<T, Kind::dimension> candidates;
  RowScratch<T> row;

  explicit GroupScratch(const Plan<Kind>& plan)
      : candidates(plan.index().head.dimension, plan.search.metric, plan.search.ignore) {}
};

template <class T, int D>
KP_INLINE void query_at(const SortedPoints<T, D>& queries, int64_t i, int dimension, T* q) {
  for (int a = 0; a < (D ? D : dimension); ++a) q[a] = queries.x[a][i];
}

// The largest limit of the queries [begin, end).
template <class T, class Queries>
T group_limit(const Limits<T>& limits, const Queries& queries, int64_t begin, int64_t end) {
  T limit = limits(queries.ids[begin]);
  for (int64_t i = begin + 1; limits.radii && i < end; ++i) limit = larger(limit, limits(queries.ids[i]));
  return limit;
}

// Turns row lengths, stored from row_splits[1] on, into row_splits; no row is longer than max_length.
void accumulate_lengths(int64_t num_rows, int64_t max_length, int64_t* row_splits) {
  for (int64_t i = 0; i < num_rows; ++i) row_splits[i + 1] = row_splits[i] + smaller(row_splits[i + 1], max_length);
}

// Counts the neighbors of the queries of one group. This and fill_rows() do not depend on the type of index, so they
// are compiled six times and not ten.
template <class T, int D>
KP_OUTLINE void count_rows(const Candidates<T, D>& candidates, const SortedPoints<T, D>& queries, int dimension,
                           const Limits<T>& limits, int64_t begin, int64_t end, int64_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    // Results are written in the caller's order of queries: without a prefetch each write would be a cache miss.
    if (i + 16 < queries.size) __builtin_prefetch(&counts[queries.ids[i + 16]], 1);
    T q[SortedPoints<T, D>::stored];
    query_at(queries, i, dimension, q);
    const int32_t id = queries.ids[i];
    counts[id] = candidates.count_within(q, id, limits(id));
  }
}

template <class Kind>
Status count(const Search& search, int64_t* row_splits, void** result) {
  using T = typename Kind::Scalar;
  auto* const plan = create<Plan<Kind>>();
  if (!plan) return Status::out_of_memory;
  *result = plan;
  plan->row_splits = row_splits;
  bool any = false;
  Status status = plan->prepare(search, any);
  if (status != Status::ok) return status;
  memset(row_splits, 0, size_t(plan->num_queries + 1) * sizeof(int64_t));
  if (!any) return Status::ok;

  const auto& queries = plan->queries();
  const Limits<T> limits = plan->limits();
  const int dimension = plan->index().head.dimension;
  status = for_each_group<Kind, GroupScratch<Kind>>(
      *plan, [&](auto& walker, GroupScratch<Kind>& scratch, int64_t begin, int64_t end) {
        if (!walker.move_to(begin, end, group_limit(limits, queries, begin, end), false, scratch.candidates))
          return false;
        count_rows(scratch.candidates, queries, dimension, limits, begin, end, row_splits + 1);
        return true;
      });
  accumulate_lengths(plan->num_queries, search.max_neighbors < 0 ? INT64_MAX : search.max_neighbors, row_splits);
  return status;
}

// The neighbor list that a search writes.
template <class T>
struct OutputList {
  const int64_t* row_splits;
  int32_t* index;
  T* distance;  // or null
};

// Writes the rows of the queries [group, group_end). Returns false if memory runs out.
template <class T, int D>
KP_OUTLINE bool fill_rows(const Candidates<T, D>& candidates, const SortedPoints<T, D>& queries, int dimension,
                          const Limits<T>& limits, const Search& search, int64_t group, int64_t group_end,
                          RowScratch<T>& row, const OutputList<T>& to) {
  const bool by_distance = search.sort == Sort::distance;
  const bool needs_measures = search.max_neighbors >= 0 || by_distance || to.distance;
  const int64_t* const row_splits = to.row_splits;
  if (!row.reserve(candidates.size())) return false;
  for (int64_t i = group; i < group_end; ++i) {
    if (i + 16 < queries.size) __builtin_prefetch(&row_splits[queries.ids[i + 16]]);
    if (i + 8 < queries.size) {
      const int32_t* const ahead = to.index + row_splits[queries.ids[i + 8]];
      for (int line = 0; line < 3; ++line) __builtin_prefetch(ahead + 16 * line, 1);
    }
    T q[SortedPoints<T, D>::stored];
    query_at(queries, i, dimension, q);
    const int32_t id = queries.ids[i];
    const int64_t begin = row_splits[id], n = row_splits[id + 1] - begin;
    int32_t* const ids = row.ids.data();
    if (!needs_measures) {
      candidates.template collect<false>(q, id, limits(id), ids, nullptr);
    } else {
      const int64_t collected = candidates.template collect<true>(q, id, limits(id), ids, row.measures.data());
      if (by_distance)
        row.sort_by_distance(collected);
      else if (collected > n)
        row.keep_nearest(collected, n);
    }
    copy_row(to.index + begin, ids, n);
    if (to.distance) put_distances(search.metric, row.measures.data(), n, to.distance + begin);
  }
  return true;
}

template <class Kind>
Status fill(const Plan<Kind>& plan, int32_t* index, typename Kind::Scalar* distance) {
  using T = typename Kind::Scalar;
  const Search& search = plan.search;
  if (!plan.row_splits[plan.num_queries]) return Status::ok;
  if (search.max_neighbors >= 0 && !plan.is_measurable()) return Status::not_finite;
  const auto& queries = plan.queries();
  const Limits<T> limits = plan.limits();
  const OutputList<T> to{plan.row_splits, index, distance};
  const int dimension = plan.index().head.dimension;
  return for_each_group<Kind, GroupScratch<Kind>>(
      plan, [&](auto& walker, GroupScratch<Kind>& scratch, int64_t begin, int64_t end) {
        return walker.move_to(begin, end, group_limit(limits, queries, begin, end), search.sort == Sort::index,
                              scratch.candidates) &&
               fill_rows(scratch.candidates, queries, dimension, limits, search, begin, end, scratch.row, to);
      });
}

// ---- k nearest neighbors ----------------------------------------------------------------------------------------

template <class Kind>
struct NearestScratch : GroupScratch<Kind> {
  using T = typename Kind::Scalar;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Candidates<T, Kind::dimension> nearby;  // the points around the group's leaf
  Sorter<Bits> sorter;
  Buffer<T> limits;  // of each query of the group

  explicit NearestScratch(const Plan<Kind>& plan)
      : GroupScratch<Kind>(plan), nearby(plan.index().head.dimension, plan.search.metric, plan.search.ignore) {}

  // The k-th smallest of the row's n measures. They are not negative, so they order like their bits.
  T kth_smallest(int64_t n, int64_t k) {
    Bits* const keys = sorter.keys(n);
    memcpy(keys, this->row.measures.data(), size_t(n) * sizeof(T));
    T result;
    memcpy(&result, &sorter.sort(n)[k - 1], sizeof(T));
    return result;
  }
};

// The k nearest neighbors within the radius, in two steps for each group of queries:
//
//   1. For each query, the distance to its k-th nearest point among the points around the group's leaf. The k nearest
//      neighbors cannot be farther. For four of five queries these points already are the k nearest.
//   2. A radius search of the group with these distances, of which each row keeps the k nearest.
//
//        + - - - - - - - - +
//        '   . +-----+  .  '       inner box: the leaf and the points around it (step 1)
//        '     |. q .|     '       outer box: the largest distance of step 1 around the group's queries (step 2)
//        '  .  |  .  |   . '
//        '     +-----+     '       The time depends on k, not on how many points are within the radius.
//        + - - - - - - - - +
//
// Writes rows of k entries, of which counts[q] are used.
template <class Kind>
Status nearest(const Search& search, int32_t* index, typename Kind::Scalar* distance, int64_t* counts) {
  using T = typename Kind::Scalar;
  Plan<Kind> plan;
  bool any = false;
  Status status = plan.prepare(search, any);
  if (status != Status::ok) return status;
  memset(counts, 0, size_t(plan.num_queries) * sizeof(int64_t));
  const int64_t k = search.max_neighbors;
  if (!any || !k) return Status::ok;
  if (!plan.is_measurable()) return Status::not_finite;
  const auto& queries = plan.queries();
  const Limits<T> limits = plan.limits();
  const int dimension = plan.index().head.dimension;
  return for_each_group<Kind, NearestScratch<Kind>>(
      plan, [&](auto& walker, NearestScratch<Kind>& s, int64_t group, int64_t group_end) {
        // For k = 1 the leaf alone gives a good bound, the smallest distance.
        const Run nearby = walker.points_around(group, k == 1 ? 1 : larger<int64_t>(4 * leaf_size, 2 * k), k);
        if (!s.nearby.gather(Kind::points(plan.index()), &nearby, 1, false)) return false;
        if (!s.row.reserve(s.nearby.size()) || !s.sorter.keys(s.nearby.size()) || !s.limits.resize(group_end - group))
          return false;
        T q[SortedPoints<T, Kind::dimension>::stored], farthest = 0;
        // 1.5 times the limit of the query before is tried first: with k = 16 it leaves 24 measures to sort, not 190.
        T guess = T(INFINITY);
        for (int64_t i = group; i < group_end; ++i) {
          query_at(queries, i, dimension, q);
          const int32_t id = queries.ids[i];
          const T radius_limit = limits(id);
          T limit = radius_limit;
          if (k == 1) {
            limit = smaller(radius_limit, s.nearby.smallest_measure(q, id));
          } else {
            int64_t n = 0;
            for (T within = smaller(guess, radius_limit);; within = radius_limit) {
              n = s.nearby.template collect<true>(q, id, within, s.row.ids.data(), s.row.measures.data());
              if (n >= k || within == radius_limit) break;
            }
            if (n >= k) limit = s.kth_smallest(n, k);
            guess = limit > 0 ? T(1.5) * limit : T(INFINITY);
          }
          s.limits[i - group] = limit;
          farthest = larger(farthest, limit);
        }
        if (!walker.move_to(group, group_end, farthest, false, s.candidates, k) || !s.row.reserve(s.candidates.size()))
          return false;
        for (int64_t i = group; i < group_end; ++i) {
          query_at(queries, i, dimension, q);
          const int32_t id = queries.ids[i];
          const int64_t collected =
              s.candidates.template collect<true>(q, id, s.limits[i - group], s.row.ids.data(), s.row.measures.data());
          if (k > 1)
            s.row.sort_by_distance(collected);
          else if (collected > 1)
            s.row.put_nearest_first(collected);
          const int64_t n = smaller(collected, k);
          if (search.sort == Sort::index) s.row.sort_by_index(n);
          counts[id] = n;
          copy_row(index + id * k, s.row.ids.data(), n);
          if (distance) put_distances(search.metric, s.row.measures.data(), n, distance + id * k);
        }
        return true;
      });
}

}  // namespace

Status build_index(const IndexArguments& args, void** index) {
  const Index head{args.kind, args.points.dtype, int(args.points.cols), args.points.rows, args.row_splits.rows - 1};
  const Status status = with_kind(head, [&](auto kind) {
    auto* const created = create<typename decltype(kind)::IndexType>();
    if (!created) return Status::out_of_memory;
    *index = created;
    created->head = head;
    return created->build(args);
  });
  if (status != Status::crowded) return status;
  free_index(*index);
  *index = nullptr;
  IndexArguments as_tree = args;
  as_tree.kind = IndexKind::tree;
  return build_index(as_tree, index);
}

// Mean over the points of how many points share their cell; infinity for a kd-tree, which has no cells.
double crowding(const void* index) {
  return with_kind(*static_cast<const Index*>(index), [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (Kind::is_grid)
      return index_as<Kind>(index).crowding();
    else
      return double(INFINITY);
  });
}

void free_index(void* index) {
  with_kind(*static_cast<const Index*>(index), [&](auto kind) {
    destroy<typename decltype(kind)::IndexType>(index);
    return 0;
  });
}

Status radius_search_count(const Search& search, int64_t* row_splits, void** plan) {
  return with_kind(*static_cast<const Index*>(search.index),
                   [&](auto kind) { return count<decltype(kind)>(search, row_splits, plan); });
}

Status radius_search_fill(void* plan, int32_t* index, void* distance) {
  const Search& search = *static_cast<const Search*>(plan);  // a Plan begins with its search
  return with_kind(*static_cast<const Index*>(search.index), [&](auto kind) {
    using Kind = decltype(kind);
    return fill(*static_cast<const Plan<Kind>*>(plan), index, static_cast<typename Kind::Scalar*>(distance));
  });
}

void radius_search_free(void* plan) {
  const Search& search = *static_cast<const Search*>(plan);
  with_kind(*static_cast<const Index*>(search.index), [&](auto kind) {
    destroy<Plan<decltype(kind)>>(plan);
    return 0;
  });
}

Status knn_search(const Search& search, int32_t* index, void* distance, int64_t* counts) {
  const Index& head = *static_cast<const Index*>(search.index);
  const auto search_tree = [&](auto kind) {
    using Kind = decltype(kind);
    return nearest<Kind>(search, index, static_cast<typename Kind::Scalar*>(distance), counts);
  };
  return with_real(head.dtype, [&](auto t) {
    using T = decltype(t);
    if (head.dimension == 2) return search_tree(TreeKind<T, 2>());
    return head.dimension == 3 ? search_tree(TreeKind<T, 3>()) : search_tree(TreeKind<T, 0>());
  });
}

}  // namespace KP_ISA
}  // namespace kp
