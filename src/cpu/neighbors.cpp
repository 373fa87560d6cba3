// Neighbour searches over an index, grid or kd-tree, and the transpose of a neighbour list.
//
// Both indexes visit queries in groups: those of a cell, or of a leaf. The candidates of a group are copied side by
// side once, sorted by index if the result is to be, and then every query of the group tests them all: no branch per
// candidate, and rows come out sorted because the candidates are. Which pairs are neighbours is decided in one place,
// so the indexes agree to the bit.

#include "formulas/neighbors.h"

#include <new>

#include "candidates.h"
#include "grid.h"
#include "kdtree.h"

namespace kp {
namespace KP_ISA {
namespace {

// ---- indexes -----------------------------------------------------------------------------------------------------

// How queries in the order of an index are held and walked through.
template <class T, int D>
struct GridKind {
  using Scalar = T;
  static constexpr int dimension = D;
  static constexpr bool is_grid = true;
  using Built = Grid<T, D>;
  using Placed = InCells<T, D>;
  using Walker = GridWalker<T, D>;

  static const Sorted<T, D>& points(const Built& index) { return index.own.points; }
  static Status place(const Built& index, const Search& search, Placed& queries) {
    return index.place(search, queries);
  }
  static Walker walker(const Built& index, const Placed* queries, const Search&) {
    return Walker(index, queries ? *queries : index.own);
  }
};
template <class T, int DIM>
struct TreeKind {
  using Scalar = T;
  static constexpr int dimension = DIM;
  static constexpr bool is_grid = false;
  using Built = Tree<T, DIM>;
  using Placed = InLeaves<T, DIM>;
  using Walker = TreeWalker<T, DIM>;

  static const Sorted<T, DIM>& points(const Built& index) { return index.sorted; }
  static Status place(const Built& index, const Search& search, Placed& queries) {
    return queries.sort(index, as<T>(search.queries), search.queries.rows,
                        Items(search.queries_row_splits, index.head.items), search.threads);
  }
  static Walker walker(const Built& index, const Placed* queries, const Search& search) {
    return Walker(index, queries, search.metric);
  }
};

// Calls f(kind) for the index at hand.
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
const typename Kind::Built& built(const void* index) {
  return *static_cast<const typename Kind::Built*>(index);
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

// A radius in the measure that is compared: squared for L2.
template <class T>
struct Limits {
  const T* radii;
  T radius;
  Metric metric;

  T operator()(int64_t id) const {
    const T r = radii ? radii[id] : radius;
    return metric == Metric::l2 ? r * r : r;
  }
};
template <class T>
KP_OUTLINE void put_distances(Metric metric, const T* measures, int64_t n, T* distances) {
  for (int64_t j = 0; j < n; ++j) distances[j] = metric == Metric::l2 ? T(::sqrt(measures[j])) : measures[j];
}

template <class Kind>
struct Plan {
  using T = typename Kind::Scalar;
  Search search;
  typename Kind::Placed placed;
  Buffer<T> radii;  // read twice: a copy, as the caller's may change in between
  int64_t* row_splits = nullptr;
  int64_t num_queries = 0;

  const typename Kind::Built& index() const { return built<Kind>(search.index); }
  const typename Kind::Placed* others() const { return search.queries.data ? &placed : nullptr; }
  const Sorted<T, Kind::dimension>& queries() const {
    return search.queries.data ? placed.points : Kind::points(index());
  }
  Limits<T> limits() const { return {search.radii.data ? radii.data() : nullptr, T(search.radius), search.metric}; }

  // Checks and places the queries; `any`: whether there is something to find.
  Status prepare(const Search& given, bool& any) {
    search = given;
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
    return any ? Kind::place(index(), search, placed) : Status::ok;
  }

  // Whether distances tell the points of every item apart, seen from its queries.
  bool is_measurable() const {
    const Index& head = index().head;
    const int D = head.dimension;
    const bool is_bounded = search.radii.data || search.radius - search.radius == 0;
    const auto* splits = as<int64_t>(search.queries_row_splits);
    const int64_t sets = search.queries.data ? search.queries_row_splits.rows - 1 : head.items;
    for (int64_t s = 0; s < sets; ++s) {
      double low[max_dimension], high[max_dimension], its_low[max_dimension], its_high[max_dimension];
      index().box_of(s % head.items, low, high);
      if (!(low[0] <= high[0])) continue;  // no points
      if (search.queries.data) {
        if (splits[s] == splits[s + 1]) continue;
        bounding_box<T, Kind::dimension>(as<T>(search.queries) + splits[s] * D, splits[s + 1] - splits[s],
                                         search.threads, its_low, its_high, D);
        for (int a = 0; a < D; ++a) low[a] = smaller(low[a], its_low[a]), high[a] = larger(high[a], its_high[a]);
      }
      if (!kp::is_measurable<T>(search.metric, low, high, D, is_bounded)) return false;
    }
    return true;
  }
};

constexpr int64_t block_of_queries = 512;

// Calls visit(walker, begin, end) for every group of queries, blocks of them in parallel; false: no memory.
template <class Kind, class Scratch, class Visit>
Status for_each_group(const Plan<Kind>& plan, Visit visit) {
  const int64_t n = plan.num_queries, blocks = (n + block_of_queries - 1) / block_of_queries;
  const int threads = useful_threads(plan.search.threads, blocks, 1);
  // Blocks that a thread takes at a time. The more, the longer a walker goes on from where it is; but of four blocks
  // taken by fours, the second thread got none.
  const int64_t taken = larger<int64_t>(1, smaller<int64_t>(4, blocks / (2 * threads)));
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    auto walker = Kind::walker(plan.index(), plan.others(), plan.search);
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

// One thread's candidates, and the row it makes.
template <class Kind>
struct GroupScratch {
  using T = typename Kind::Scalar;
  Candidates<T, Kind::dimension> candidates;
  RowScratch<T> row;

  explicit GroupScratch(const Plan<Kind>& plan)
      : candidates(plan.index().head.dimension, plan.search.metric, plan.search.ignore) {}
};

template <class T, int D>
KP_INLINE void query_at(const Sorted<T, D>& queries, int64_t i, int dimension, T* q) {
  for (int a = 0; a < (D ? D : dimension); ++a) q[a] = queries.x[a][i];
}

// The largest limit of a group.
template <class T, class Queries>
T group_limit(const Limits<T>& limits, const Queries& queries, int64_t begin, int64_t end) {
  T limit = limits(queries.ids[begin]);
  for (int64_t i = begin + 1; limits.radii && i < end; ++i) limit = larger(limit, limits(queries.ids[i]));
  return limit;
}

// Bounds of rows from their lengths, of which none counts more than `most`, in row_splits[1], ...
void add_up(int64_t num_rows, int64_t most, int64_t* row_splits) {
  for (int64_t i = 0; i < num_rows; ++i) row_splits[i + 1] = row_splits[i] + smaller(row_splits[i + 1], most);
}

// Counts the neighbours of the queries of one group. With the index that the candidates are from, this and fill_rows()
// would be compiled ten times and not six.
template <class T, int D>
KP_OUTLINE void count_rows(const Candidates<T, D>& candidates, const Sorted<T, D>& queries, int dimension,
                           const Limits<T>& limits, int64_t begin, int64_t end, int64_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    // Rows lie where the caller's order puts them; writing to one costs a cache miss unless it was asked for.
    if (i + 16 < queries.size) __builtin_prefetch(&counts[queries.ids[i + 16]], 1);
    T q[Sorted<T, D>::stored];
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
  add_up(plan->num_queries, search.most < 0 ? INT64_MAX : search.most, row_splits);
  return status;
}

// Lists being written.
template <class T>
struct Lists {
  const int64_t* row_splits;
  int32_t* index;
  T* distance;  // or null
};

// Writes the rows of the queries of one group. False: no memory.
template <class T, int D>
KP_OUTLINE bool fill_rows(const Candidates<T, D>& candidates, const Sorted<T, D>& queries, int dimension,
                          const Limits<T>& limits, const Search& search, int64_t group, int64_t group_end,
                          RowScratch<T>& row, const Lists<T>& to) {
  const bool by_distance = search.sort == Sort::distance, measured = search.most >= 0 || by_distance || to.distance;
  const int64_t* const row_splits = to.row_splits;
  if (!row.reserve(candidates.size())) return false;
  for (int64_t i = group; i < group_end; ++i) {
    if (i + 16 < queries.size) __builtin_prefetch(&row_splits[queries.ids[i + 16]]);
    if (i + 8 < queries.size) {
      const int32_t* const ahead = to.index + row_splits[queries.ids[i + 8]];
      for (int line = 0; line < 3; ++line) __builtin_prefetch(ahead + 16 * line, 1);
    }
    T q[Sorted<T, D>::stored];
    query_at(queries, i, dimension, q);
    const int32_t id = queries.ids[i];
    const int64_t begin = row_splits[id], n = row_splits[id + 1] - begin;
    int32_t* const ids = row.ids.data();
    if (!measured) {
      candidates.template collect<false>(q, id, limits(id), ids, nullptr);
    } else {
      const int64_t found = candidates.template collect<true>(q, id, limits(id), ids, row.measures.data());
      if (by_distance)
        row.sort_by_distance(found);
      else if (found > n)
        row.keep_nearest(found, n);
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
  if (search.most >= 0 && !plan.is_measurable()) return Status::not_finite;
  const auto& queries = plan.queries();
  const Limits<T> limits = plan.limits();
  const Lists<T> to{plan.row_splits, index, distance};
  const int dimension = plan.index().head.dimension;
  return for_each_group<Kind, GroupScratch<Kind>>(
      plan, [&](auto& walker, GroupScratch<Kind>& scratch, int64_t begin, int64_t end) {
        return walker.move_to(begin, end, group_limit(limits, queries, begin, end), search.sort == Sort::index,
                              scratch.candidates) &&
               fill_rows(scratch.candidates, queries, dimension, limits, search, begin, end, scratch.row, to);
      });
}

// ---- k nearest neighbours ----------------------------------------------------------------------------------------

// One thread's points around a leaf, and the order of their distances.
template <class Kind>
struct NearestScratch : GroupScratch<Kind> {
  using T = typename Kind::Scalar;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Candidates<T, Kind::dimension> around;
  Sorter<Bits> sorter;
  Buffer<T> limits;

  explicit NearestScratch(const Plan<Kind>& plan)
      : GroupScratch<Kind>(plan), around(plan.index().head.dimension, plan.search.metric, plan.search.ignore) {}

  // The k-th smallest of the row's n measures, which order like their bits.
  T kth(int64_t n, int64_t k) {
    Bits* const keys = sorter.keys(n);
    memcpy(keys, this->row.measures.data(), size_t(n) * sizeof(T));
    T result;
    memcpy(&result, &sorter.sort(n)[k - 1], sizeof(T));
    return result;
  }
};

// The k nearest within the radius: rows of k in (M, k) arrays and how many of each are there. The k-th nearest among
// the points around a query's leaf bounds how far the search has to go; for four of five queries it already is the
// answer. Its time depends on k, not on how many points the radius holds.
template <class Kind>
Status nearest(const Search& search, int32_t* index, typename Kind::Scalar* distance, int64_t* counts) {
  using T = typename Kind::Scalar;
  Plan<Kind> plan;
  bool any = false;
  Status status = plan.prepare(search, any);
  if (status != Status::ok) return status;
  memset(counts, 0, size_t(plan.num_queries) * sizeof(int64_t));
  const int64_t k = search.most;
  if (!any || !k) return Status::ok;
  if (!plan.is_measurable()) return Status::not_finite;
  const auto& queries = plan.queries();
  const Limits<T> limits = plan.limits();
  const int dimension = plan.index().head.dimension;
  return for_each_group<Kind, NearestScratch<Kind>>(
      plan, [&](auto& walker, NearestScratch<Kind>& s, int64_t group, int64_t group_end) {
        // Of one nearest point the leaf gives a bound, and nothing needs sorting.
        const Run around = walker.around(group, k == 1 ? 1 : larger<int64_t>(4 * leaf_size, 2 * k), k);
        if (!s.around.gather(Kind::points(plan.index()), &around, 1, false)) return false;
        if (!s.row.reserve(s.around.size()) || !s.sorter.keys(s.around.size()) || !s.limits.resize(group_end - group))
          return false;
        T q[Sorted<T, Kind::dimension>::stored], farthest = 0;
        T guess = T(INFINITY);  // half as much again as the query before: 24 of 16 to sort, not 190
        for (int64_t i = group; i < group_end; ++i) {
          query_at(queries, i, dimension, q);
          const int32_t id = queries.ids[i];
          const T most = limits(id);
          T limit = most;
          if (k == 1) {
            limit = smaller(most, s.around.smallest(q, id));
          } else {
            int64_t n = 0;
            for (T within = smaller(guess, most);; within = most) {
              n = s.around.template collect<true>(q, id, within, s.row.ids.data(), s.row.measures.data());
              if (n >= k || within == most) break;
            }
            if (n >= k) limit = s.kth(n, k);
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
          const int64_t found =
              s.candidates.template collect<true>(q, id, s.limits[i - group], s.row.ids.data(), s.row.measures.data());
          if (k > 1)
            s.row.sort_by_distance(found);
          else if (found > 1)
            s.row.put_nearest_first(found);
          const int64_t n = smaller(found, k);
          if (search.sort == Sort::index) s.row.sort_by_index(n);
          counts[id] = n;
          copy_row(index + id * k, s.row.ids.data(), n);
          if (distance) put_distances(search.metric, s.row.measures.data(), n, distance + id * k);
        }
        return true;
      });
}

}  // namespace

Status build_index(const IndexPoints& args, void** index) {
  const Index head{args.kind, args.points.dtype, int(args.points.cols), args.points.rows, args.row_splits.rows - 1};
  const Status status = with_kind(head, [&](auto kind) {
    auto* const made = create<typename decltype(kind)::Built>();
    if (!made) return Status::out_of_memory;
    *index = made;
    made->head = head;
    return made->build(args);
  });
  if (status != Status::crowded) return status;
  free_index(*index);
  *index = nullptr;
  IndexPoints as_tree = args;
  as_tree.kind = IndexKind::tree;
  return build_index(as_tree, index);
}

// Of a tree it is not known: infinity.
double crowding(const void* index) {
  return with_kind(*static_cast<const Index*>(index), [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (Kind::is_grid)
      return built<Kind>(index).crowding();
    else
      return double(INFINITY);
  });
}

void free_index(void* index) {
  with_kind(*static_cast<const Index*>(index), [&](auto kind) {
    destroy<typename decltype(kind)::Built>(index);
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
  const auto with = [&](auto kind) {
    using Kind = decltype(kind);
    return nearest<Kind>(search, index, static_cast<typename Kind::Scalar*>(distance), counts);
  };
  const auto of = [&](auto t) {
    using T = decltype(t);
    if (head.dimension == 2) return with(TreeKind<T, 2>());
    return head.dimension == 3 ? with(TreeKind<T, 3>()) : with(TreeKind<T, 0>());
  };
  return with_real(head.dtype, of);
}

// A counting sort by index. Each thread takes a range of rows and, after the counts are known, writes its own slice of
// every column, so that columns hold their rows in order whatever the number of threads.
Status transpose(const Transpose& args) {
  const Array &distance = args.distance, &out_distance = args.transposed_distance;
  const auto* from = as<int32_t>(args.index);
  const auto* rows = as<int64_t>(args.row_splits);
  auto* to = into<int32_t>(args.transposed_index);
  auto* splits = into<int64_t>(args.transposed_row_splits);
  const int64_t m = args.row_splits.rows - 1, n = args.transposed_row_splits.rows - 1, pairs = rows[m];
  // One counter per thread and column: no more threads than make the counters half as large as the list. Up to half a
  // million pairs one thread's cache holds all, and two take longer.
  const int threads =
      int(larger<int64_t>(1, smaller<int64_t>(useful_threads(args.threads, pairs, 1 << 17), pairs / (4 * (n + 1)))));
  Buffer<int64_t> next;
  if (!next.resize(int64_t(threads) * n)) return Status::out_of_memory;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), count = omp_get_num_threads();
    const Share share(m, t, count), columns(n, t, count);
    int64_t* const mine = next.data() + int64_t(t) * n;
    memset(mine, 0, size_t(n) * sizeof(int64_t));
    for (int64_t e = rows[share.begin]; e < rows[share.end]; ++e) ++mine[from[e]];
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
        const int64_t at = mine[from[e]]++;
        to[at] = int32_t(i);
        if (!distance.data) continue;
        if (distance.dtype == DType::float32)
          into<float>(out_distance)[at] = as<float>(distance)[e];
        else
          into<double>(out_distance)[at] = as<double>(distance)[e];
      }
  }
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
