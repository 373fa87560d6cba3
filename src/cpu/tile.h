// The tile engine of KPConv: for up to 120 queries at a time, the features of their neighbors summed by kernel point,
//
//   A_k[q] = sum over neighbors i of q of influence(|x_i - x_q - p_k|) f_i
//
// Influences are sparse (about 1.6 kernel points per neighbor). The pairs (neighbor, kernel point) of a query are
// listed by kernel point; each list is summed in registers and stored once, as a new row of A_k:
//
//    pairs of query q                 rows of the tile, each with its query
//    k = 0: neighbors 3, 7     -->    A_0:  w f_3 + w f_7  (q)     ...  (q + 1)     ...  (q + 2)
//    k = 1: none                      A_1:                         ...  (q + 1)
//    k = 2: neighbor 3         -->    A_2:  w f_3          (q)                      ...  (q + 2)
//
// Only pairs with an influence make rows: on surfaces a quarter of the (query, kernel point) combinations have none and
// cost nothing in the product with the weights (kpconv.cpp).
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "formulas/kpconv.h"
#include "kpconv_resampling.h"
#include "pairs.h"
#include "parallel.h"
#include "tile_products.h"

namespace kp {
namespace {

constexpr int64_t pair_batch = 256;  // pairs that are collected before their lists are summed

// One pass of the operator, forward or transposed: see PassGeometry. `features` are what is gathered: in the transposed
// pass the gradients of the operator's output.
template <class G, class F>
struct KPConvPass : PassGeometry<G> {
  const F* features;
  int64_t channels;
  const F *query_scale, *point_scale;  // a factor of each query and of each gathered row, or null
  const F* modulations;                // (the operator's queries, K, factors), or null
  int factors;                         // groups of channels of a kernel point, each with its own modulation
  bool backward;                       // transposed pass
  Resampling<G> resampling;

  // With one factor, the modulation is part of a pair's weight.
  bool modulates_pairs() const { return modulations && factors == 1; }
  bool mixes_pairs() const { return resampling.offsets && backward; }
  bool mixes_sums() const { return resampling.offsets && !backward; }
};

// The pairs of one query and one kernel point.
struct PairList {
  int64_t begin;  // first pair; the list ends where the next one begins
  int32_t row;    // row of the tile, counted over all kernel points
  int32_t kernel;
  bool is_new;  // starts a row; otherwise the sum continues that of earlier neighbors of the query
};

// Collects the pairs of a batch of queries, grouped by (query, kernel point), and to which query each row of A_k
// belongs; A_k has at most `rows` rows.
template <class G, class F>
class Pairs {
 public:
  Buffer<G> d2;
  Buffer<F> weight;             // influence times scales and modulation
  Buffer<int32_t> point, edge;  // see PairArrays
  Buffer<G> difference[max_dimension];
  Buffer<PairList> lists;
  int64_t num_lists = 0, num_pairs = 0;

  // Reserves room for max_pairs pairs and those of one more chunk of neighbors.
  bool reserve(const KPConvPass<G, F>& pass, int64_t rows, int64_t max_pairs, bool with_positions) {
    const int64_t K = pass.num_kernels, room = max_pairs + K * chunk + lanes<G>, D = pass.dimension;
    rows_ = rows;
    if (!query_.resize(K * rows) || !size_.resize(K) || !ends_.resize(K + 1) || !lists.resize(max_pairs + K + 1))
      return false;
    if (with_positions && !edge.resize(room)) return false;
    for (int a = 0; with_positions && a < D; ++a)
      if (!difference[a].resize(room)) return false;
    if (pass.offsets && !query_kernel_points_.resize(K * D)) return false;
    if (pass.deformed) {
      const int64_t padded = K + lanes<G>, room_unsorted = K * chunk + lanes<G> + lanes<int32_t>;
      if (!kernel_d2_.resize(padded) || !kernel_numbers_.resize(padded) || !unsorted_d2_.resize(room_unsorted))
        return false;
      if (!unsorted_kernel_.resize(room_unsorted) || !unsorted_point_.resize(room_unsorted)) return false;
      for (int64_t k = 0; k < padded; ++k) kernel_numbers_[k] = int32_t(k);
    }
    if (!d2.resize(room) || !weight.resize(room) || !point.resize(room)) return false;
    if (pass.mixes_pairs() && !mixed_.resize(chunk * pass.resampling.padded())) return false;
    arrays_ = {d2.data(),
               point.data(),
               edge.data(),
               {},
               ends_.data(),
               query_kernel_points_.data(),
               kernel_d2_.data(),
               unsorted_d2_.data(),
               kernel_numbers_.data(),
               unsorted_kernel_.data(),
               unsorted_point_.data()};
    for (int a = 0; a < D; ++a) arrays_.difference[a] = difference[a].data();
    return true;
  }
  void start_rows() {
    for (int64_t k = 0; k < size_.size(); ++k) size_[k] = 0;
  }
  void start_pairs() { num_lists = num_pairs = 0; }

  const int32_t* sizes() const { return size_.data(); }
  const int32_t* all_queries() const { return query_.data(); }

  // Adds the pairs of query q, number r of the tile, with its neighbors index[begin, begin + n), n <= chunk. `first`:
  // the tile's first edge.
  KP_OUTLINE void add_neighbors(const KPConvPass<G, F>& pass, int64_t q, int32_t r, int64_t begin, int64_t n,
                                int64_t first) {
    const FeatureRows rows{reinterpret_cast<const char*>(pass.features), pass.channels * int64_t(sizeof(F))};
    KP_ISA::find_pairs(pass, rows, q, begin, n, first, num_pairs, arrays_);
    weigh(pass, q);
    if (pass.mixes_pairs()) mix(pass.resampling, pass.index + begin, n);
    make_lists(pass.num_kernels, r);
  }

 private:
  void make_lists(int K, int32_t r) {
    PairList* list = lists.data() + num_lists;
    int32_t *const all_queries = query_.data(), *const size = size_.data();
    int64_t begin = num_pairs;
    for (int k = 0; k < K; ++k) {
      // Without a branch, which would be unpredictable: a quarter of the lists have no pair.
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
  }

  // Computes the weights of the latest query's pairs.
  void weigh(const KPConvPass<G, F>& pass, int64_t q) {
    const int64_t begin = num_pairs, end = ends_[pass.num_kernels - 1];
    const Vec<G> inverse_extent = broadcast(1 / pass.extent), scale = broadcast(gaussian_scale(pass.extent));
    for (int64_t i = begin; i < end; i += lanes<G>) {
      const Vec<G> squares = load(&d2[i]);
      Vec<G> influence = {};
      switch (pass.influence) {
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
    if (pass.query_scale)
      for (int64_t i = begin; i < end; ++i) weight[i] *= pass.query_scale[q];
    if (pass.point_scale)
      for (int64_t i = begin; i < end; ++i) weight[i] *= pass.point_scale[point[i]];
    if (!pass.modulates_pairs()) return;
    for (int64_t k = 0, i = begin; k < pass.num_kernels; ++k)
      for (; i < ends_[k]; ++i) weight[i] *= pass.modulations[(pass.backward ? point[i] : q) * pass.num_kernels + k];
  }

  // Transposed pass with kernel offsets: replaces the pairs (neighbor, k) of the latest query, which has the neighbors
  // index[0, n), by at most one pair (neighbor, j) for each neighbor and kernel point, whose weight is the sum over k
  // of share(k, j) times the weights.
  KP_OUTLINE void mix(const Resampling<G>& resampling, const int32_t* index, int64_t n) {
    const Resampling<G> shares = resampling;  // a copy, which no store can change: it stays in registers
    const int64_t K = shares.num_kernels, padded = shares.padded();
    G* const mixed = mixed_.data();
    for (int64_t neighbor = 0; neighbor < n; ++neighbor) shares.prefetch(index[neighbor]);
    memset(mixed, 0, size_t(n * padded) * sizeof(G));
    for (int64_t k = 0, i = num_pairs; k < K; ++k)
      for (int64_t neighbor = 0; i < ends_[k]; ++i) {
        while (index[neighbor] != point[i]) ++neighbor;  // the pairs of k are in the order of the neighbors
        const Vec<G> factor = broadcast(G(weight[i]));
        shares.for_each_vector(point[i], k, [&](int64_t j, Vec<G> vector, Vec<G>) {
          G* const to = mixed + neighbor * padded + j;
          store(to, fma(factor, vector, load(to)));
        });
      }
    int64_t end = num_pairs;
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t neighbor = 0; neighbor < n; ++neighbor) {  // without a branch, which would be unpredictable
        const G sum = mixed[neighbor * padded + j];
        weight[end] = F(sum);
        point[end] = index[neighbor];
        end += sum != 0;
      }
      ends_[j] = end;
    }
  }

  int64_t rows_ = 0;
  PairArrays<G> arrays_;
  Buffer<int32_t> query_, size_;
  Buffer<int64_t> ends_;
  Buffer<G> query_kernel_points_, kernel_d2_, unsorted_d2_;
  Buffer<int32_t> kernel_numbers_, unsorted_kernel_, unsorted_point_;
  Buffer<G> mixed_;  // (chunk, K padded)
};

// Sums the features of one list: NV vectors of channels from channel c on.
template <int NV, class F>
KP_INLINE void sum_rows(const F* features, int64_t channels, int64_t c, const int32_t* rows, const F* weights,
                        const PairList* list, F* a) {
  F* const to = a + list->row * channels + c;
  Vec<F> sums[NV];
  for (int v = 0; v < NV; ++v) sums[v] = list->is_new ? Vec<F>{} : load(to + v * lanes<F>);
  const char* const base = reinterpret_cast<const char*>(features + c);
  const int64_t stride = channels * int64_t(sizeof(F)), end = list[1].begin;
  for (int64_t i = list->begin; i < end; ++i) {
    const Vec<F> w = broadcast(weights[i]);
    const char* row = base + rows[i] * stride;
    asm("" : "+r"(row));  // otherwise GCC keeps one base address per vector and runs out of registers
    const F* const from = reinterpret_cast<const F*>(row);
    for (int v = 0; v < NV; ++v) sums[v] = fma(w, load(from + v * lanes<F>), sums[v]);
  }
  for (int v = 0; v < NV; ++v) store(to + v * lanes<F>, sums[v]);
}

// Sums lists[order[0]], lists[order[1]], ...: one block of channels for all lists, then the next block.
template <class F>
void sum_lists(const F* features, int64_t channels, const int32_t* rows, const F* weights, const PairList* lists,
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
    const PairList* const list = lists + order[l];
    F* const to = a + list->row * channels + c;
    Vec<F> sum = list->is_new ? Vec<F>{} : load_first(to, rest);
    for (int64_t i = list->begin; i < list[1].begin; ++i)
      sum = fma(broadcast(weights[i]), load_first(features + rows[i] * channels + c, rest), sum);
    store_first(to, rest, sum);
  }
}

// One thread's tile.
template <class G, class F>
class Tile {
 public:
  static constexpr int64_t max_pairs = 1 << 14;  // pairs kept at a time if the caller of fill() uses them

  // `rows`: a multiple of row_step. with_sums: compute the sums. with_positions: keep max_pairs pairs with their edges
  // and differences.
  bool reserve(const KPConvPass<G, F>& pass, int64_t rows, bool with_sums = true, bool with_positions = false) {
    const int64_t K = pass.num_kernels;
    rows_ = rows;
    channels_ = pass.channels;
    with_sums_ = with_sums;
    if (!pairs_.reserve(pass, rows, with_positions ? max_pairs : pair_batch, with_positions)) return false;
    if (!with_sums) return true;
    if (!a_.resize(K * rows * channels_ + row_step) || !order_.resize(pair_batch + K)) return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, but drops their products.
    memset(a_.data(), 0, size_t(a_.size()) * sizeof(F));
    return true;
  }

  void fill(const KPConvPass<G, F>& pass, int64_t first, int64_t count) {
    fill(pass, first, count, pair_batch, [](const auto&) {});
  }

  // Fills the tile with `count` queries from `first` on. Calls finish(pairs) whenever max_collected pairs have been
  // collected, and at the end; the pairs are then discarded.
  template <class Finish>
  void fill(const KPConvPass<G, F>& pass, int64_t first, int64_t count, int64_t max_collected, Finish finish) {
    pairs_.start_rows();
    start_pairs();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t q = first + r, begin = pass.row_splits[q], end = pass.row_splits[q + 1];
      for (int64_t e = begin; e < end; e += chunk) {
        // A further chunk of neighbors adds to rows of the same query, so these must have been summed.
        if (pairs_.num_pairs - summed_pairs_ >= pair_batch || e > begin) sum_batch(pass);
        if (pairs_.num_pairs >= max_collected) {
          sum_batch(pass);
          finish(pairs_);
          start_pairs();
        }
        pairs_.add_neighbors(pass, q, int32_t(r), e, smaller(chunk, end - e), pass.row_splits[first]);
      }
    }
    sum_batch(pass);
    finish(pairs_);
  }

  TileSums<F> rows() const { return {a_.data(), pairs_.all_queries(), pairs_.sizes(), rows_, rows_ * channels_}; }

 private:
  void start_pairs() {
    pairs_.start_pairs();
    summed_ = summed_pairs_ = 0;
  }

  // Sums the lists collected since the last batch, ordered by length. The processor then predicts the end of the loop
  // over a list: each misprediction costs as much as three pairs, and a list has about five.
  KP_OUTLINE void sum_batch(const KPConvPass<G, F>& pass) {
    constexpr int64_t longest = 31;  // longer lists are rare and need not be ordered
    const PairList* const lists = pairs_.lists.data() + summed_;
    const int64_t count = with_sums_ ? pairs_.num_lists - summed_ : 0;
    summed_ = pairs_.num_lists;
    summed_pairs_ = pairs_.num_pairs;
    if (pass.backward && pass.modulations && pass.factors > 1) return sum_modulated(pass, lists, count);
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
    sum_lists(pass.features, channels_, pairs_.point.data(), pairs_.weight.data(), lists, order_.data(), count,
              a_.data());
  }

  // Transposed pass with several factors: each gathered row has its own factors, each for some of its channels.
  void sum_modulated(const KPConvPass<G, F>& pass, const PairList* lists, int64_t count) {
    const int64_t width = channels_ / pass.factors;
    for (int64_t l = 0; l < count; ++l) {
      const PairList& list = lists[l];
      F* const to = &a_[list.row * channels_];
      if (list.is_new) memset(to, 0, size_t(channels_) * sizeof(F));
      for (int64_t i = list.begin; i < lists[l + 1].begin; ++i) {
        const int64_t point = pairs_.point[i];
        const F* const factors = pass.modulations + (point * pass.num_kernels + list.kernel) * pass.factors;
        const F* const from = pass.features + point * channels_;
        for (int64_t f = 0; f < pass.factors; ++f) {
          const F w = pairs_.weight[i] * factors[f];
          for (int64_t c = f * width; c < (f + 1) * width; ++c) to[c] += w * from[c];
        }
      }
    }
  }

  Pairs<G, F> pairs_;
  Buffer<F> a_;
  Buffer<int32_t> order_;
  int64_t rows_ = 0, channels_ = 0;
  int64_t summed_ = 0, summed_pairs_ = 0;  // number of lists and pairs already summed
  bool with_sums_ = true;
};

}  // namespace
}  // namespace kp
