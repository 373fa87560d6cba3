// Some hundred queries of a KPConv at a time: which of their neighbours each kernel point acts on and how much, and the
// features summed by kernel point.
//
// Influences are sparse (about 1.6 kernel points per neighbour), so for each query the pairs with an influence are
// listed by kernel point, and each list is summed in registers and stored once: as one more row of the tile's A_k,
// beside the number of the query. On surfaces a quarter of the (query, kernel point) have no pair, and so no row: they
// cost nothing.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "formulas/kpconv.h"
#include "formulas/neighbors.h"
#include "parallel.h"

namespace kp {
namespace {

constexpr int64_t chunk = 128;  // neighbours looked at together
constexpr int64_t batch = 256;  // pairs after which their rows are summed

// One direction of the operator: what is gathered, from where, for whom. On the way back the two exchange their roles:
// what is gathered are the gradients of the operator's queries.
template <class G, class F>
struct Problem {
  const G *points, *queries;
  int dimension;
  const int32_t* index;
  const int64_t* row_splits;
  int64_t num_queries;
  const F* features;
  int64_t channels;
  const G* kernel_points;  // (D, K), mirrored on the way back
  int num_kernels;
  G extent;
  Influence influence;
  Aggregation aggregation;
  const F *query_scale, *point_scale;  // factors of a query's row and of a gathered row, or null
  const G* offsets;                    // (queries, K, D) of the kernel points, or null; only on the way there
  const G* deformed;                   // (points, D, K padded): on the way back the kernel points of what is gathered
  const F* modulations;                // (the operator's queries, K, factors), or null
  int factors;                         // of a kernel point's channels; more than one are not in the weight of a pair
  bool backward;

  bool deforms() const { return offsets || deformed; }
  bool modulates_pairs() const { return modulations && factors == 1; }
};

// Pairs of one query and one kernel point.
struct List {
  int64_t begin;  // of its pairs; they end where the next list begins
  int32_t row;    // of the tile, counted over all kernel points
  int32_t kernel;
  bool is_new;  // row: otherwise it goes on with what earlier neighbours of the query left there
};

// Pairs of some queries, by query and kernel point; and the rows of the tile, of which every kernel point has up to
// `rows`.
template <class G, class F, int DIM>
class Pairs {
 public:
  static constexpr int stored = DIM ? DIM : max_dimension;

  Buffer<G> d2;
  Buffer<F> weight;        // influence times the factors of the problem
  Buffer<int32_t> point;   // what is gathered
  Buffer<int32_t> edge;    // its place in the problem's index, from the tile's first; and where it is from the kernel
  Buffer<G> from[stored];  // point: only if asked for
  Buffer<List> lists;
  int64_t num_lists = 0, num_pairs = 0;

  // Room for the pairs of `most` and of one more chunk of neighbours.
  bool reserve(const Problem<G, F>& problem, int64_t rows, int64_t most, bool with_places) {
    const int64_t K = problem.num_kernels, room = most + K * chunk + lanes<G>, D = problem.dimension;
    rows_ = rows;
    with_places_ = with_places;
    if (!query_.resize(K * rows) || !size_.resize(K) || !ends_.resize(K + 1) || !lists.resize(most + K + 1))
      return false;
    if (with_places && !edge.resize(room)) return false;
    for (int a = 0; with_places && a < D; ++a)
      if (!from[a].resize(room)) return false;
    if (problem.offsets && !own_.resize(K * D)) return false;
    if (problem.deformed) {
      const int64_t padded = K + lanes<G>, found = K * chunk + lanes<G> + lanes<int32_t>;
      if (!row_d2_.resize(padded) || !numbers_.resize(padded) || !found_d2_.resize(found)) return false;
      if (!found_kernel_.resize(found) || !found_point_.resize(found)) return false;
      for (int64_t k = 0; k < padded; ++k) numbers_[k] = int32_t(k);
    }
    return d2.resize(room) && weight.resize(room) && point.resize(room);
  }
  void start_rows() {
    for (int64_t k = 0; k < size_.size(); ++k) size_[k] = 0;
  }
  void start_pairs() { num_lists = num_pairs = 0; }

  const int32_t* sizes() const { return size_.data(); }
  const int32_t* all_queries() const { return query_.data(); }
  const G* deformed_kernel() const { return own_.data(); }  // (D, K), of the query looked at last

  // Lists the pairs of query q, row r of the tile, with n <= chunk of its neighbours. `first`: the tile's first edge.
  void look_at(const Problem<G, F>& problem, int64_t q, int32_t r, int64_t begin, int64_t n, int64_t first) {
    const int D = DIM ? DIM : problem.dimension;
    Neighborhood near;
    const int32_t* const index = problem.index + begin;
    const G* const center = problem.queries + q * D;
    for (int64_t i = 0; with_places_ && i < n; ++i) near.edge[i] = int32_t(begin + i - first);
    for (int64_t i = 0; i < n; ++i) {
      near.who[i] = index[i];
      const G* const x = problem.points + int64_t(index[i]) * D;
      for (int a = 0; a < D; ++a) near.relative[a][i] = x[a] - center[a];
    }
    if (!problem.deforms()) prefetch(problem, near, n);
    const G* kernel_points = problem.kernel_points;
    if (problem.offsets) {
      deform(problem, q);
      kernel_points = own_.data();
      n = keep_in_reach(problem, near, n);
    }
    for (int64_t i = n; i < round_up(n, lanes<G>); ++i)
      for (int a = 0; a < D; ++a) near.relative[a][i] = 0;
    if (problem.deformed)
      find_by_neighbor(problem, near, n);
    else if (with_places_)
      find_by_kernel<true>(problem, kernel_points, near, n);
    else
      find_by_kernel<false>(problem, kernel_points, near, n);
    make_lists(problem, q, r);
  }

 private:
  struct alignas(64) Neighborhood {
    G relative[stored][chunk + lanes<G>], nearest[chunk];
    int32_t who[chunk + lanes<int32_t>], edge[chunk + lanes<int32_t>];
  };

  void prefetch(const Problem<G, F>& problem, const Neighborhood& near, int64_t n) const {
    const int64_t channels = smaller<int64_t>(problem.channels, 512 / int64_t(sizeof(F)));
    for (int64_t i = 0; i < n; ++i) {
      const F* const row = problem.features + int64_t(near.who[i]) * problem.channels;
      for (int64_t c = 0; c < channels; c += 64 / int64_t(sizeof(F))) __builtin_prefetch(row + c);
    }
  }

  // The query's own kernel points, by axis.
  void deform(const Problem<G, F>& problem, int64_t q) {
    const int64_t D = DIM ? DIM : problem.dimension, K = problem.num_kernels;
    const G* const offsets = problem.offsets + q * K * D;
    for (int k = 0; k < K; ++k)
      for (int a = 0; a < D; ++a) own_[a * K + k] = problem.kernel_points[a * K + k] + offsets[k * D + a];
  }

  static Vec<G> squared(const Problem<G, F>& problem, const Neighborhood& near, int64_t i, const Vec<G>* kernel_point) {
    const int D = DIM ? DIM : problem.dimension;
    Vec<G> d[stored];
    for (int a = 0; a < D; ++a) d[a] = load(&near.relative[a][i]) - kernel_point[a];
    return squared_distance(d, D);
  }
  static void kernel_point_at(const Problem<G, F>& problem, const G* kernel_points, int k, Vec<G>* p) {
    for (int a = 0; a < (DIM ? DIM : problem.dimension); ++a)
      p[a] = broadcast(kernel_points[int64_t(a) * problem.num_kernels + k]);
  }

  int64_t keep(const Problem<G, F>& problem, Neighborhood& near, int64_t i, int64_t kept, unsigned mask) const {
    for (int a = 0; a < (DIM ? DIM : problem.dimension); ++a)
      compress(&near.relative[a][kept], mask, load(&near.relative[a][i]));
    if (with_places_) compress<G>(near.edge + kept, mask, near.edge + i);
    return kept + compress<G>(near.who + kept, mask, near.who + i);
  }

  // Leaves the neighbours closer than the extent to some kernel point of the query: first those near the box of all of
  // them (in the wide neighbourhoods of deformable layers a fifth), by which the linear influence needs no more.
  int64_t keep_in_reach(const Problem<G, F>& problem, Neighborhood& near, int64_t n) {
    const int64_t D = DIM ? DIM : problem.dimension, K = problem.num_kernels;
    Vec<G> low[stored], high[stored];
    for (int a = 0; a < D; ++a) {
      G lowest = own_[a * K], highest = lowest;
      for (int k = 1; k < K; ++k) {
        lowest = smaller(lowest, own_[a * K + k]);
        highest = larger(highest, own_[a * K + k]);
      }
      low[a] = broadcast(lowest);
      high[a] = broadcast(highest);
    }
    const Vec<G> extent = broadcast(problem.extent), limit = broadcast(problem.extent * problem.extent);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += lanes<G>) {
      unsigned mask = first_lanes<G>(n - i);
      for (int a = 0; a < D; ++a) {
        const Vec<G> x = load(&near.relative[a][i]);
        mask &= mask_lt(max(x - high[a], low[a] - x), extent);
      }
      kept = keep(problem, near, i, kept, mask);
    }
    prefetch(problem, near, kept);
    if (problem.influence == Influence::linear) return kept;
    n = kept;
    kept = 0;
    for (int64_t i = 0; i < n; i += lanes<G>) {
      Vec<G> best = broadcast(G(INFINITY)), p[stored];
      for (int k = 0; k < K; ++k) {
        kernel_point_at(problem, own_.data(), k, p);
        best = min(squared(problem, near, i, p), best);
      }
      kept = keep(problem, near, i, kept, mask_lt(best, limit) & first_lanes<G>(n - i));
    }
    return kept;
  }

  // Pairs in the order of the kernel points, each with vectors of neighbours.
  template <bool places>
  void find_by_kernel(const Problem<G, F>& problem, const G* kernel_points, Neighborhood& near, int64_t n) {
    const int K = problem.num_kernels;
    const bool linear = problem.influence == Influence::linear, closest = problem.aggregation == Aggregation::closest;
    Vec<G> p[stored];
    if (closest)
      for (int64_t i = 0; i < n; i += lanes<G>) {
        kernel_point_at(problem, kernel_points, 0, p);
        Vec<G> best = squared(problem, near, i, p), which = {};
        for (int k = 1; k < K; ++k) {
          kernel_point_at(problem, kernel_points, k, p);
          const Vec<G> squares = squared(problem, near, i, p);
          which = squares < best ? broadcast(G(k)) : which;
          best = min(squares, best);
        }
        store(&near.nearest[i], which);
      }
    const Vec<G> limit = broadcast(problem.extent * problem.extent);
    unsigned valid[chunk / lanes<G>];
    for (int64_t i = 0; i < n; i += lanes<G>) valid[i / lanes<G>] = first_lanes<G>(n - i);
    G* const all_d2 = d2.data();
    int32_t *const all_points = point.data(), *const all_edges = edge.data();
    int64_t pairs = num_pairs;
    for (int k = 0; k < K; ++k) {
      kernel_point_at(problem, kernel_points, k, p);
      for (int64_t i = 0; i < n; i += lanes<G>) {
        const Vec<G> squares = squared(problem, near, i, p);
        unsigned mask = valid[i / lanes<G>];
        if (linear) mask &= mask_lt(squares, limit);
        if (closest) mask &= mask_eq(load(&near.nearest[i]), broadcast(G(k)));
        compress(all_d2 + pairs, mask, squares);
        if (places) {
          compress<G>(all_edges + pairs, mask, near.edge + i);
          for (int a = 0; a < (DIM ? DIM : problem.dimension); ++a)
            compress(from[a].data() + pairs, mask, load(&near.relative[a][i]) - p[a]);
        }
        pairs += compress<G>(all_points + pairs, mask, near.who + i);
      }
      ends_[k] = pairs;
    }
  }

  // Where every neighbour brings its own kernel points: vectors of those, then the pairs sorted by kernel point.
  void find_by_neighbor(const Problem<G, F>& problem, const Neighborhood& near, int64_t n) {
    const int D = DIM ? DIM : problem.dimension, K = problem.num_kernels;
    const int64_t padded = round_up(K, lanes<G>);
    const bool linear = problem.influence == Influence::linear, closest = problem.aggregation == Aggregation::closest;
    const G limit = problem.extent * problem.extent;
    for (int k = 0; k <= K; ++k) ends_[k] = 0;
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const G* const own = problem.deformed + near.who[i] * (D * padded);
      if (i + 4 < n)
        for (int64_t b = 0; b < D * padded; b += 64 / int64_t(sizeof(G)))
          __builtin_prefetch(problem.deformed + near.who[i + 4] * (D * padded) + b);
      unsigned reached = 0;
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        Vec<G> d[stored];
        for (int a = 0; a < D; ++a) d[a] = broadcast(-near.relative[a][i]) - load(own + a * padded + b);
        const Vec<G> squares = squared_distance(d, D);
        store(&row_d2_[b], squares);
        reached |= mask_lt(squares, broadcast(limit));  // what pads a row is NaN
      }
      if (!reached) continue;
      G best = row_d2_[0];
      for (int k = 1; closest && k < K; ++k) best = smaller(best, row_d2_[k]);
      const F* const row = problem.features + int64_t(near.who[i]) * problem.channels;
      const int64_t prefetched = smaller<int64_t>(problem.channels, 512 / int64_t(sizeof(F)));
      for (int64_t c = 0; c < prefetched; c += 64 / int64_t(sizeof(F))) __builtin_prefetch(row + c);
      for (int64_t b = 0; b < padded; b += lanes<G>) {
        const Vec<G> squares = load(&row_d2_[b]);
        unsigned mask = first_lanes<G>(K - b);
        if (linear) mask &= mask_lt(squares, broadcast(limit));
        if (closest) {
          mask &= mask_eq(squares, broadcast(best));
          mask &= 0u - mask;  // the first of equals
        }
        compress(&found_d2_[found], mask, squares);
        for (int l = 0; l < lanes<G>; l += lanes<int32_t>) store(&found_point_[found + l], broadcast(near.who[i]));
        found += compress<G>(&found_kernel_[found], mask, &numbers_[b]);
        if (closest && mask) break;
      }
    }
    for (int64_t j = 0; j < found; ++j) ++ends_[found_kernel_[j] + 1];
    ends_[0] = num_pairs;
    for (int k = 0; k < K; ++k) ends_[k + 1] += ends_[k];
    for (int64_t j = 0; j < found; ++j) {
      const int64_t at = ends_[found_kernel_[j]]++;  // the end of the list before becomes its own
      d2[at] = found_d2_[j];
      point[at] = found_point_[j];
    }
  }

  void make_lists(const Problem<G, F>& problem, int64_t q, int32_t r) {
    const int K = problem.num_kernels;
    const int64_t first_list = num_lists, first_pair = num_pairs;
    List* list = lists.data() + num_lists;
    int32_t *const all_queries = query_.data(), *const size = size_.data();
    int64_t begin = num_pairs;
    for (int k = 0; k < K; ++k) {
      // No branch: a quarter of the lists have no pair, at random.
      int32_t* const queries = all_queries + k * rows_;
      const int64_t end = ends_[k];
      const bool is_new = !size[k] || queries[size[k] - 1] != r, some = end > begin;
      const int64_t row = size[k] - !is_new;
      queries[row] = r;
      *list = {begin, int32_t(k * rows_ + row), k, is_new};
      size[k] += some & is_new;
      list += some;
      begin = end;
    }
    num_lists = list - lists.data();
    num_pairs = begin;
    lists[num_lists].begin = num_pairs;
    weigh(problem, q, first_pair, first_list);
  }

  void weigh(const Problem<G, F>& problem, int64_t q, int64_t begin, int64_t first_list) {
    const Vec<G> inverse_extent = broadcast(1 / problem.extent), scale = broadcast(gaussian_scale(problem.extent));
    for (int64_t i = begin; i < num_pairs; i += lanes<G>) {
      const Vec<G> squares = load(&d2[i]);
      Vec<G> influence = {};
      switch (problem.influence) {
        case Influence::linear:
          influence = linear_influence(squares, inverse_extent);
          break;
        case Influence::gaussian:
          influence = exp_of<G>(squares * scale);
          break;
        case Influence::constant:
          influence = broadcast(G(1));
          break;
      }
      if constexpr (std::is_same_v<G, F>)
        store(&weight[i], influence);
      else
        for (int l = 0; l < lanes<G>; ++l) weight[i + l] = F(influence[l]);
    }
    if (problem.query_scale)
      for (int64_t i = begin; i < num_pairs; ++i) weight[i] *= problem.query_scale[q];
    if (problem.point_scale)
      for (int64_t i = begin; i < num_pairs; ++i) weight[i] *= problem.point_scale[point[i]];
    if (!problem.modulates_pairs()) return;
    for (int64_t l = first_list; l < num_lists; ++l)
      for (int64_t i = lists[l].begin; i < lists[l + 1].begin; ++i)
        weight[i] *= problem.modulations[(problem.backward ? point[i] : q) * problem.num_kernels + lists[l].kernel];
  }

  int64_t rows_ = 0;
  bool with_places_ = false;
  Buffer<int32_t> query_, size_;
  Buffer<int64_t> ends_;
  Buffer<G> own_;                // kernel points of a query, (D, K)
  Buffer<G> row_d2_, found_d2_;  // of a neighbour with all kernel points; of its pairs
  Buffer<int32_t> numbers_, found_kernel_, found_point_;
};

// Sums NV vectors of one list's rows, from channel c.
template <int NV, class F>
KP_INLINE void sum_rows(const F* features, int64_t channels, int64_t c, const int32_t* rows, const F* weights,
                        const List* list, F* a) {
  F* const to = a + list->row * channels + c;
  Vec<F> sums[NV];
  for (int v = 0; v < NV; ++v) sums[v] = list->is_new ? Vec<F>{} : load(to + v * lanes<F>);
  const char* const base = reinterpret_cast<const char*>(features + c);
  const int64_t stride = channels * int64_t(sizeof(F)), end = list[1].begin;
  for (int64_t i = list->begin; i < end; ++i) {
    const Vec<F> w = broadcast(weights[i]);
    const char* row = base + rows[i] * stride;
    asm("" : "+r"(row));  // or GCC keeps a base for every vector and runs out of registers
    const F* const from = reinterpret_cast<const F*>(row);
    for (int v = 0; v < NV; ++v) sums[v] = fma(w, load(from + v * lanes<F>), sums[v]);
  }
  for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, sums[v]);
}

// Sums lists[order[0]], lists[order[1]], ..., some channels of all of them at a time.
template <class F>
void sum_lists(const F* features, int64_t channels, const int32_t* rows, const F* weights, const List* lists,
               const int32_t* order, int64_t count, F* a) {
  int64_t c = 0;
  for (; c + 8 * lanes<F> <= channels; c += 8 * lanes<F>)
    for (int64_t l = 0; l < count; ++l) sum_rows<8>(features, channels, c, rows, weights, lists + order[l], a);
  if (c + 4 * lanes<F> <= channels) {
    for (int64_t l = 0; l < count; ++l) sum_rows<4>(features, channels, c, rows, weights, lists + order[l], a);
    c += 4 * lanes<F>;
  }
  for (; c + lanes<F> <= channels; c += lanes<F>)
    for (int64_t l = 0; l < count; ++l) sum_rows<1>(features, channels, c, rows, weights, lists + order[l], a);
  const int rest = int(channels - c);
  for (int64_t l = 0; rest && l < count; ++l) {
    const List* const list = lists + order[l];
    F* const to = a + list->row * channels + c;
    Vec<F> sum = list->is_new ? Vec<F>{} : load_first(to, rest);
    for (int64_t i = list->begin; i < list[1].begin; ++i)
      sum = fma(broadcast(weights[i]), load_first(features + rows[i] * channels + c, rest), sum);
    store_first(to, rest, sum);
  }
}

// What is summed: for every kernel point some rows, and the queries, counted from the tile's first, they are of. What
// follows from them depends on the type of features only, and so is compiled twice and not for every geometry.
template <class F>
struct Rows {
  const F* sums;
  const int32_t* all_queries;
  const int32_t* sizes;
  int64_t most, channels;

  int64_t size(int64_t k) const { return sizes[k]; }
  const F* a(int64_t k) const { return sums + k * most * channels; }
  const int32_t* queries(int64_t k) const { return all_queries + k * most; }
};

// One thread's tile.
template <class G, class F, int DIM>
class Tile {
 public:
  static constexpr int64_t most_pairs = 1 << 14;  // kept where somebody wants them

  // Rows are a multiple of row_step. Sums only `with_sums`; where the pairs are from only `with_places`.
  bool reserve(const Problem<G, F>& problem, int64_t rows, bool with_sums = true, bool with_places = false) {
    const int64_t K = problem.num_kernels;
    rows_ = rows;
    channels_ = problem.channels;
    with_sums_ = with_sums;
    if (!pairs_.reserve(problem, rows, with_places ? most_pairs : batch, with_places)) return false;
    if (!with_sums) return true;
    if (!a_.resize(K * rows * channels_ + row_step) || !order_.resize(batch + K)) return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, for sums that are dropped.
    memset(a_.data(), 0, size_t(a_.size()) * sizeof(F));
    return true;
  }

  void fill(const Problem<G, F>& problem, int64_t first, int64_t count) {
    fill(problem, first, count, batch, [](const auto&) {});
  }

  // Also calls finish(pairs), after which they are forgotten, whenever they are `most`, and in the end.
  template <class Finish>
  void fill(const Problem<G, F>& problem, int64_t first, int64_t count, int64_t most, Finish finish) {
    pairs_.start_rows();
    start_pairs();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t q = first + r, begin = problem.row_splits[q], end = problem.row_splits[q + 1];
      for (int64_t e = begin; e < end; e += chunk) {
        // A list is added to the sum of the same query's earlier neighbours, which must be there.
        if (pairs_.num_pairs - summed_pairs_ >= batch || e > begin) sum_batch(problem);
        if (pairs_.num_pairs >= most) {
          sum_batch(problem);
          finish(pairs_);
          start_pairs();
        }
        pairs_.look_at(problem, q, int32_t(r), e, smaller(chunk, end - e), problem.row_splits[first]);
      }
    }
    sum_batch(problem);
    finish(pairs_);
  }

  Rows<F> rows() const { return {a_.data(), pairs_.all_queries(), pairs_.sizes(), rows_, channels_}; }

 private:
  void start_pairs() {
    pairs_.start_pairs();
    summed_ = summed_pairs_ = 0;
  }

  // Sums the lists so far, by length: the end of a loop that runs as often as the one before it is foreseen, which
  // otherwise costs as much as three pairs, with five pairs in a list.
  void sum_batch(const Problem<G, F>& problem) {
    constexpr int64_t longest = 31;  // longer ones are rare
    const List* const lists = pairs_.lists.data() + summed_;
    const int64_t count = with_sums_ ? pairs_.num_lists - summed_ : 0;
    summed_ = pairs_.num_lists;
    summed_pairs_ = pairs_.num_pairs;
    if (problem.backward && problem.modulations && problem.factors > 1) return sum_modulated(problem, lists, count);
    int32_t place[longest + 1] = {};
    const auto length = [&](int64_t l) { return smaller(longest, lists[l + 1].begin - lists[l].begin); };
    for (int64_t l = 0; l < count; ++l) ++place[length(l)];
    int32_t before = 0;
    for (int32_t& p : place) {
      const int32_t size = p;
      p = before;
      before += size;
    }
    for (int64_t l = 0; l < count; ++l) order_[place[length(l)]++] = int32_t(l);
    sum_lists(problem.features, channels_, pairs_.point.data(), pairs_.weight.data(), lists, order_.data(), count,
              a_.data());
  }

  // On the way back every gathered row has factors of its own, each for some of its channels.
  void sum_modulated(const Problem<G, F>& problem, const List* lists, int64_t count) {
    const int64_t width = channels_ / problem.factors;
    for (int64_t l = 0; l < count; ++l) {
      const List& list = lists[l];
      F* const to = &a_[list.row * channels_];
      if (list.is_new) memset(to, 0, size_t(channels_) * sizeof(F));
      for (int64_t i = list.begin; i < lists[l + 1].begin; ++i) {
        const int64_t who = pairs_.point[i];
        const F* const factors = problem.modulations + (who * problem.num_kernels + list.kernel) * problem.factors;
        const F* const from = problem.features + who * channels_;
        for (int64_t f = 0; f < problem.factors; ++f) {
          const F w = pairs_.weight[i] * factors[f];
          for (int64_t c = f * width; c < (f + 1) * width; ++c) to[c] += w * from[c];
        }
      }
    }
  }

  Pairs<G, F, DIM> pairs_;
  Buffer<F> a_;
  Buffer<int32_t> order_;
  int64_t rows_ = 0, channels_ = 0, summed_ = 0, summed_pairs_ = 0;  // lists, and pairs, that are in the sums
  bool with_sums_ = true;
};

}  // namespace
}  // namespace kp
