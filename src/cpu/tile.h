// Some hundred queries of a KPConv at a time: which of their neighbors each kernel point acts on and how much, and the
// features summed by kernel point.
//
// Influences are sparse (about 1.6 kernel points per neighbor), so for each query the pairs with an influence are
// listed by kernel point, and each list is summed in registers and stored once: as one more row of the tile's A_k,
// beside the number of the query. On surfaces a quarter of the (query, kernel point) have no pair, and so no row: they
// cost nothing.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "formulas/kpconv.h"
#include "pairs.h"
#include "parallel.h"

namespace kp {
namespace {

constexpr int64_t batch = 256;  // pairs after which their rows are summed

// One direction of the operator: what is gathered, from where, for whom. On the way back the two exchange their roles:
// what is gathered are the gradients of the operator's queries.
template <class G, class F>
struct Problem : Geometry<G> {
  const F* features;
  int64_t channels;
  const F *query_scale, *point_scale;  // factors of a query's row and of a gathered row, or null
  const F* modulations;                // (the operator's queries, K, factors), or null
  int factors;                         // of a kernel point's channels; more than one are not in the weight of a pair
  bool backward;

  bool modulates_pairs() const { return modulations && factors == 1; }
};

// Pairs of one query and one kernel point.
struct List {
  int64_t begin;  // of its pairs; they end where the next list begins
  int32_t row;    // of the tile, counted over all kernel points
  int32_t kernel;
  bool is_new;  // row: otherwise it goes on with what earlier neighbors of the query left there
};

// Pairs of some queries, by query and kernel point; and the rows of the tile, of which every kernel point has up to
// `rows`.
template <class G, class F>
class Pairs {
 public:
  Buffer<G> d2;
  Buffer<F> weight;             // influence times the factors of the problem
  Buffer<int32_t> point, edge;  // see PairArrays
  Buffer<G> from[max_dimension];
  Buffer<List> lists;
  int64_t num_lists = 0, num_pairs = 0;

  // Room for the pairs of `most` and of one more chunk of neighbors.
  bool reserve(const Problem<G, F>& problem, int64_t rows, int64_t most, bool with_places) {
    const int64_t K = problem.num_kernels, room = most + K * chunk + lanes<G>, D = problem.dimension;
    rows_ = rows;
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
    if (!d2.resize(room) || !weight.resize(room) || !point.resize(room)) return false;
    arrays_ = {d2.data(),       point.data(),         edge.data(),        {},
               ends_.data(),    own_.data(),          row_d2_.data(),     found_d2_.data(),
               numbers_.data(), found_kernel_.data(), found_point_.data()};
    for (int a = 0; a < D; ++a) arrays_.from[a] = from[a].data();
    return true;
  }
  void start_rows() {
    for (int64_t k = 0; k < size_.size(); ++k) size_[k] = 0;
  }
  void start_pairs() { num_lists = num_pairs = 0; }

  const int32_t* sizes() const { return size_.data(); }
  const int32_t* all_queries() const { return query_.data(); }

  // Lists the pairs of query q, row r of the tile, with n <= chunk of its neighbors. `first`: the tile's first edge.
  KP_OUTLINE void look_at(const Problem<G, F>& problem, int64_t q, int32_t r, int64_t begin, int64_t n, int64_t first) {
    const FeatureRows rows{reinterpret_cast<const char*>(problem.features), problem.channels * int64_t(sizeof(F))};
    KP_ISA::find_pairs(problem, rows, q, begin, n, first, num_pairs, arrays_);
    make_lists(problem, q, r);
  }

 private:
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
  PairArrays<G> arrays_;
  Buffer<int32_t> query_, size_;
  Buffer<int64_t> ends_;
  Buffer<G> own_, row_d2_, found_d2_;
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
template <class G, class F>
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
        // A list is added to the sum of the same query's earlier neighbors, which must be there.
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
  KP_OUTLINE void sum_batch(const Problem<G, F>& problem) {
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

  Pairs<G, F> pairs_;
  Buffer<F> a_;
  Buffer<int32_t> order_;
  int64_t rows_ = 0, channels_ = 0, summed_ = 0, summed_pairs_ = 0;  // lists, and pairs, that are in the sums
  bool with_sums_ = true;
};

}  // namespace
}  // namespace kp
