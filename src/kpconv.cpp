// Rigid KPConv, forward and backward, by tiles.
//
//   out[q] = sum over k of (sum over neighbours i of q of influence(|x_i - x_q - p_k|) f_i) W_k     (Thomas et al.
//   2019)
//
// A tile is some hundred queries. Influences are sparse (about 1.6 kernel points per neighbour), so for each query the
// pairs with an influence are listed by kernel point, and each list is summed in registers and stored once: as one more
// row of the tile's A_k, beside the number of the query. On surfaces a quarter of the (query, kernel point) have no
// pair, and so no row: they cost nothing. Then the tile's output is the sum over k of A_k W_k, added to the rows'
// queries by a micro-kernel over packed weights. Nothing larger than a tile ever exists.
//
// Backward: the gradient of the features is the same operator on the transposed neighbours with mirrored kernel points
// and transposed weights. The gradient of W_k sums A_k^T grad over the tiles, in their order. So no result depends on
// the number of threads.

#include "kpconv.h"

#include <sched.h>

#include "gemm.h"
#include "kernels.h"
#include "neighbors.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t chunk = 128;            // neighbours looked at together
constexpr int64_t batch = 256;            // pairs after which their rows are summed
constexpr int64_t most_rows = 120;        // queries in a tile
constexpr int64_t cache_bytes = 1 << 19;  // what a tile of more than 60 queries may take: half a second-level cache
constexpr int64_t tile_bytes = 7 << 19;   // what any tile may take: 3.5 MiB
template <class T>
const T* as(const Array& array) {
  return static_cast<const T*>(array.data);
}

// One direction of the operator: what is gathered, from where, for whom.
template <class G, class F>
struct Problem {
  const G *points, *queries;
  int dimension;
  const int32_t* index;
  const int64_t* row_splits;
  int64_t num_queries;
  const F* features;
  int64_t channels;
  const G* kernel_points;  // (D, K)
  int num_kernels;
  G extent;
  Influence influence;
  Aggregation aggregation;
  const F *query_scale, *point_scale;  // factors of a query's row and of a gathered row, or null
};

// Pairs of one query and one kernel point: the sum of their feature rows, weighted, becomes a row of the tile or is
// added to what earlier neighbours of the query left there.
template <class F>
struct List {
  int64_t begin;  // of its pairs; they end where the next list begins
  F* to;
  bool is_new;
};

// Sums NV vectors of one list's rows, from channel c.
template <int NV, class F>
KP_INLINE void sum_rows(const F* features, int64_t channels, int64_t c, const int32_t* rows, const F* weights,
                        const List<F>* list) {
  F* const to = list->to + c;
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
void sum_lists(const F* features, int64_t channels, const int32_t* rows, const F* weights, const List<F>* lists,
               const int32_t* order, int64_t count) {
  int64_t c = 0;
  for (; c + 8 * lanes<F> <= channels; c += 8 * lanes<F>)
    for (int64_t l = 0; l < count; ++l) sum_rows<8>(features, channels, c, rows, weights, lists + order[l]);
  if (c + 4 * lanes<F> <= channels) {
    for (int64_t l = 0; l < count; ++l) sum_rows<4>(features, channels, c, rows, weights, lists + order[l]);
    c += 4 * lanes<F>;
  }
  for (; c + lanes<F> <= channels; c += lanes<F>)
    for (int64_t l = 0; l < count; ++l) sum_rows<1>(features, channels, c, rows, weights, lists + order[l]);
  const int rest = int(channels - c);
  for (int64_t l = 0; rest && l < count; ++l) {
    const List<F>* const list = lists + order[l];
    Vec<F> sum = list->is_new ? Vec<F>{} : load_first(list->to + c, rest);
    for (int64_t i = list->begin; i < list[1].begin; ++i)
      sum = fma(broadcast(weights[i]), load_first(features + rows[i] * channels + c, rest), sum);
    store_first(list->to + c, rest, sum);
  }
}

// One thread's tile: for every kernel point the summed rows and the queries, counted from the tile's first, they are
// of.
template <class G, class F, int DIM>
class Tile {
 public:
  // Rows are a multiple of row_step.
  bool reserve(const Problem<G, F>& problem, int64_t rows) {
    const int64_t K = problem.num_kernels, pairs = batch + K * chunk + lanes<G>;
    rows_ = rows;
    channels_ = problem.channels;
    if (!a_.resize(K * rows * channels_ + row_step) || !query_.resize(K * rows) || !size_.resize(K)) return false;
    if (!lists_.resize(batch + K + 1) || !order_.resize(batch + K)) return false;
    if (!d2_.resize(pairs) || !weight_.resize(pairs) || !point_.resize(pairs)) return false;
    // The micro-kernel also reads rows up to the next multiple of row_step, for sums that are dropped.
    memset(a_.data(), 0, size_t(a_.size()) * sizeof(F));
    return true;
  }

  void fill(const Problem<G, F>& problem, int64_t first, int64_t count) {
    for (int k = 0; k < problem.num_kernels; ++k) size_[k] = 0;
    num_lists_ = num_pairs_ = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t q = first + r, begin = problem.row_splits[q], end = problem.row_splits[q + 1];
      for (int64_t e = begin; e < end; e += chunk) {
        // A list is added to the sum of the same query's earlier neighbours, which must be there.
        if (num_pairs_ >= batch || e > begin) sum_batch(problem);
        list_pairs(problem, q, int32_t(r), problem.index + e, smaller(chunk, end - e));
      }
    }
    sum_batch(problem);
  }

  int64_t size(int64_t k) const { return size_[k]; }
  const F* a(int64_t k) const { return a_.data() + k * rows_ * channels_; }
  const int32_t* queries(int64_t k) const { return query_.data() + k * rows_; }

 private:
  // Lists the pairs of a query with an influence, kernel point by kernel point, and computes their influences.
  void list_pairs(const Problem<G, F>& problem, int64_t q, int32_t r, const int32_t* index, int64_t n) {
    const int D = DIM ? DIM : problem.dimension, K = problem.num_kernels;
    constexpr int stored = DIM ? DIM : max_dimension;
    const bool linear = problem.influence == Influence::linear, closest = problem.aggregation == Aggregation::closest;
    alignas(64) G relative[stored][chunk], nearest[chunk];
    alignas(64) int32_t who[chunk];
    const G* const center = problem.queries + q * D;
    const int64_t prefetched = smaller<int64_t>(problem.channels, 512 / int64_t(sizeof(F)));
    for (int64_t i = 0; i < n; ++i) {
      who[i] = index[i];
      const F* const row = problem.features + int64_t(index[i]) * problem.channels;
      for (int64_t c = 0; c < prefetched; c += 64 / int64_t(sizeof(F))) __builtin_prefetch(row + c);
      const G* const x = problem.points + int64_t(index[i]) * D;
      for (int a = 0; a < D; ++a) relative[a][i] = x[a] - center[a];
    }
    for (int64_t i = n; i < round_up(n, lanes<G>); ++i)
      for (int a = 0; a < D; ++a) relative[a][i] = 0;

    const auto squared = [&](int64_t i, const Vec<G>* kernel_point) {
      Vec<G> d[stored];
      for (int a = 0; a < D; ++a) d[a] = load(&relative[a][i]) - kernel_point[a];
      return squared_distance(d, D);
    };
    const auto kernel_point = [&](int k, Vec<G>* p) {
      for (int a = 0; a < D; ++a) p[a] = broadcast(problem.kernel_points[a * K + k]);
    };
    Vec<G> p[stored];
    if (closest)
      for (int64_t i = 0; i < n; i += lanes<G>) {
        kernel_point(0, p);
        Vec<G> best = squared(i, p), which = {};
        for (int k = 1; k < K; ++k) {
          kernel_point(k, p);
          const Vec<G> d2 = squared(i, p);
          which = d2 < best ? broadcast(G(k)) : which;
          best = min(d2, best);
        }
        store(&nearest[i], which);
      }

    const Vec<G> limit = broadcast(problem.extent * problem.extent);
    unsigned valid[chunk / lanes<G>];
    for (int64_t i = 0; i < n; i += lanes<G>) valid[i / lanes<G>] = first_lanes<G>(n - i);
    G* const all_d2 = d2_.data();
    F* const a = a_.data();
    int32_t *const all_points = point_.data(), *const all_queries = query_.data(), *const size = size_.data();
    const int64_t rows = rows_, channels = channels_;
    List<F>* list = lists_.data() + num_lists_;
    int64_t pairs = num_pairs_;
    for (int k = 0; k < K; ++k) {
      const int64_t begin = pairs;
      kernel_point(k, p);
      for (int64_t i = 0; i < n; i += lanes<G>) {
        const Vec<G> d2 = squared(i, p);
        unsigned mask = valid[i / lanes<G>];
        if (linear) mask &= mask_lt(d2, limit);
        if (closest) mask &= mask_eq(load(&nearest[i]), broadcast(G(k)));
        compress(all_d2 + pairs, mask, d2);
        pairs += compress<G>(all_points + pairs, mask, who + i);
      }
      // No branch: a quarter of the lists have no pair, at random.
      int32_t* const queries = all_queries + k * rows;
      const bool is_new = !size[k] || queries[size[k] - 1] != r, some = pairs > begin;
      const int64_t row = size[k] - !is_new;
      queries[row] = r;
      *list = {begin, a + (k * rows + row) * channels, is_new};
      size[k] += some & is_new;
      list += some;
    }
    weigh(problem, q, num_pairs_, pairs);
    num_lists_ = list - lists_.data();
    num_pairs_ = pairs;
  }

  void weigh(const Problem<G, F>& problem, int64_t q, int64_t begin, int64_t end) {
    const Vec<G> inverse_extent = broadcast(1 / problem.extent), scale = broadcast(gaussian_scale(problem.extent));
    for (int64_t i = begin; i < end; i += lanes<G>) {
      const Vec<G> d2 = load(&d2_[i]);
      Vec<G> influence = {};
      switch (problem.influence) {
        case Influence::linear:
          influence = linear_influence(d2, inverse_extent);
          break;
        case Influence::gaussian:
          influence = exp_of<G>(d2 * scale);
          break;
        case Influence::constant:
          influence = broadcast(G(1));
          break;
      }
      if constexpr (std::is_same_v<G, F>)
        store(&weight_[i], influence);
      else
        for (int l = 0; l < lanes<G>; ++l) weight_[i + l] = F(influence[l]);
    }
    if (problem.query_scale)
      for (int64_t i = begin; i < end; ++i) weight_[i] *= problem.query_scale[q];
    if (problem.point_scale)
      for (int64_t i = begin; i < end; ++i) weight_[i] *= problem.point_scale[point_[i]];
  }

  // Sums the lists so far, by length: the end of a loop that runs as often as the one before it is foreseen, which
  // otherwise costs as much as three pairs, with five pairs in a list.
  void sum_batch(const Problem<G, F>& problem) {
    constexpr int64_t longest = 31;  // longer ones are rare
    int32_t place[longest + 1] = {};
    lists_[num_lists_].begin = num_pairs_;
    const auto length = [&](int64_t l) { return smaller(longest, lists_[l + 1].begin - lists_[l].begin); };
    for (int64_t l = 0; l < num_lists_; ++l) ++place[length(l)];
    int32_t before = 0;
    for (int32_t& p : place) {
      const int32_t count = p;
      p = before;
      before += count;
    }
    for (int64_t l = 0; l < num_lists_; ++l) order_[place[length(l)]++] = int32_t(l);
    sum_lists(problem.features, channels_, point_.data(), weight_.data(), lists_.data(), order_.data(), num_lists_);
    num_lists_ = num_pairs_ = 0;
  }

  Buffer<F> a_, weight_;
  Buffer<G> d2_;
  Buffer<List<F>> lists_;
  Buffer<int32_t> point_, query_, size_, order_;
  int64_t rows_ = 0, channels_ = 0, num_lists_ = 0, num_pairs_ = 0;
};

// Queries in a tile: what fits.
template <class F>
int64_t rows_of_tile(int64_t a_row, int64_t o_row) {
  const int64_t row = int64_t(sizeof(F)) * (a_row + o_row);
  const int64_t fit = larger(smaller<int64_t>(60, tile_bytes / row), smaller<int64_t>(most_rows, cache_bytes / row));
  return larger<int64_t>(row_step, fit / row_step * row_step);
}

// o (tile rows + 1, padded columns) = the tile's A times the packed weights; the last row is for sums that are dropped.
template <class F, class T>
void multiply(const T& tile, int64_t tile_rows, int num_kernels, int64_t channels, const Panels<F>& weights, F* o) {
  const int64_t o_row = weights.padded_columns();
  memset(o, 0, size_t(tile_rows * o_row) * sizeof(F));
  for (int k = 0; k < num_kernels; ++k) {
    const int64_t size = tile.size(k);
    const int32_t* const queries = tile.queries(k);
    for (int64_t p = 0; size && p < weights.count(); ++p)
      with_vectors(weights.vectors(p), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
        const F* const panel = weights.row(p, k * channels);
        F* const to = o + p * panel_width<F>;
        for (int64_t i = 0; i < size; i += MR)
          multiply_block<F, MR, NV, false>(
              channels, tile.a(k) + i * channels, channels, 1, [=](int64_t c) { return panel + c * NV * lanes<F>; },
              [=](int64_t r) { return to + (i + r < size ? queries[i + r] : tile_rows) * o_row; });
      });
  }
}

template <class G, class F, int DIM>
Status convolve(const Problem<G, F>& problem, const F* weights, int64_t c_in, int64_t c_out, bool transposed, F* out,
                int threads) {
  Panels<F> panels;
  if (!panels.pack(weights, problem.num_kernels, c_in, c_out, transposed, threads)) return Status::out_of_memory;
  const int64_t tile_rows = rows_of_tile<F>(problem.num_kernels * problem.channels, panels.padded_columns());
  const int64_t columns = panels.columns;
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
  threads = useful_threads(threads, tiles, 1);
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    Tile<G, F, DIM> tile;
    Buffer<F> o;
    enough = tile.reserve(problem, tile_rows) && o.resize((tile_rows + 1) * panels.padded_columns());
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      if (!enough) continue;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.fill(problem, first, rows);
      multiply(tile, tile_rows, problem.num_kernels, problem.channels, panels, o.data());
      for (int64_t r = 0; r < rows; ++r)
        memcpy(out + (first + r) * columns, &o[r * panels.padded_columns()], size_t(columns) * sizeof(F));
    }
  }
  return enough ? Status::ok : Status::out_of_memory;
}

// Tiles are filled by whichever thread is free, but must be added in order: each part of a result counts the tiles it
// has got. A thread waits only for the one just ahead of it, and gives its core away if that takes long. (Barriers
// would be simpler; on a machine with other work to do, two of them per tile made the gradient forty times slower.)
class Turns {
 public:
  bool reserve(int64_t parts) {
    if (!turn_.resize(parts * line)) return false;
    memset(turn_.data(), 0, size_t(parts * line) * sizeof(int64_t));
    return true;
  }
  void wait(int64_t part, int64_t tile) {
    for (int tries = 0; __atomic_load_n(&turn_[part * line], __ATOMIC_ACQUIRE) != tile; ++tries)
      if (tries > 1000) sched_yield();
  }
  void pass(int64_t part, int64_t tile) { __atomic_store_n(&turn_[part * line], tile + 1, __ATOMIC_RELEASE); }

 private:
  static constexpr int64_t line = 8;  // a cache line each
  Buffer<int64_t> turn_;
};

// Adds a tile's A_k^T grad to channels [first, end) of the gradient of W_k; `grad` holds the tile's rows of grad_out,
// padded to whole vectors.
template <class F, class T>
void add_transposed_product(const T& tile, int64_t k, int64_t first, int64_t end, int64_t channels, const F* grad,
                            int64_t c_out, F* grad_weights) {
  const int64_t size = tile.size(k), padded = round_up(c_out, lanes<F>);
  const int32_t* const queries = tile.queries(k);
  Vec<F> sums[row_step * panel_vectors];
  F* const spill = reinterpret_cast<F*>(sums);
  for (int64_t v = 0; size && v < c_out; v += panel_width<F>) {
    const auto right = [=](int64_t i) { return grad + queries[i] * padded + v; };
    const int64_t width = smaller<int64_t>(panel_width<F>, c_out - v);
    with_vectors(int((width + lanes<F> - 1) / lanes<F>), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value, MR = rows_for(NV);
      for (int64_t c = first; c < end; c += MR) {
        F* const to = grad_weights + (k * channels + c) * c_out + v;
        const F* const a = tile.a(k) + c;
        if (c + MR <= end && width == NV * lanes<F>) {
          multiply_block<F, MR, NV, false>(size, a, 1, channels, right, [=](int64_t r) { return to + r * c_out; });
          continue;
        }
        multiply_block<F, MR, NV, true>(size, a, 1, channels, right,
                                        [=](int64_t r) { return spill + r * NV * lanes<F>; });
        for (int64_t x = 0; x < smaller<int64_t>(MR, end - c); ++x)
          for (int64_t y = 0; y < width; ++y) to[x * c_out + y] += spill[x * NV * lanes<F> + y];
      }
    });
  }
}

// grad_weights (K, Cin, Cout)
template <class G, class F, int DIM>
Status weight_gradient(const Problem<G, F>& problem, const F* grad_out, int64_t c_out, F* grad_weights, int threads) {
  const int64_t channels = problem.channels, K = problem.num_kernels;
  const int64_t padded = round_up(c_out, lanes<F>), tile_rows = rows_of_tile<F>(K * channels, padded);
  const int64_t tiles = (problem.num_queries + tile_rows - 1) / tile_rows;
  constexpr int64_t block = 8 * row_step;  // channels that have their turn together
  const int64_t blocks = (channels + block - 1) / block;
  Turns turns;
  if (!turns.reserve(K * blocks)) return Status::out_of_memory;
  memset(grad_weights, 0, size_t(K * channels * c_out) * sizeof(F));
  int64_t next = 0;
  bool some = false;  // thread had the memory to take part
#pragma omp parallel num_threads(useful_threads(threads, tiles, 1)) reduction(|| : some)
  {
    Tile<G, F, DIM> tile;
    Buffer<F> grad;
    some = tile.reserve(problem, tile_rows) && grad.resize(tile_rows * padded);
    while (some) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= tiles) break;
      const int64_t first = t * tile_rows, rows = smaller(tile_rows, problem.num_queries - first);
      tile.fill(problem, first, rows);
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(&grad[r * padded], grad_out + (first + r) * c_out, size_t(c_out) * sizeof(F));
        for (int64_t v = c_out; v < padded; ++v) grad[r * padded + v] = 0;
      }
      for (int64_t part = 0; part < K * blocks; ++part) {
        const int64_t k = part / blocks, c = part % blocks * block;
        turns.wait(part, t);
        add_transposed_product(tile, k, c, smaller(channels, c + block), channels, grad.data(), c_out, grad_weights);
        turns.pass(part, t);
      }
    }
  }
  return some ? Status::ok : Status::out_of_memory;
}

// Whether a feature row sums to more than zero, in float64 and eight interleaved sums: alike on every machine.
template <class F>
bool sums_positive(const F* row, int64_t channels) {
  double sums[8] = {};
  for (int64_t c = 0; c < channels; ++c) sums[c % 8] += double(row[c]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) > 0;
}

// 1 / max(1, neighbours that count) of every query; none: an empty buffer.
template <class F>
Status normalize(const KPConv& args, Buffer<F>& scale) {
  if (args.normalization == Normalization::none) return Status::ok;
  const int64_t m = args.queries.rows, n = args.points.rows, channels = args.features.cols;
  const auto* splits = as<int64_t>(args.row_splits);
  const auto* index = as<int32_t>(args.index);
  Buffer<uint8_t> positive;
  if (!scale.resize(m) || !positive.resize(n)) return Status::out_of_memory;
  const bool all = args.normalization == Normalization::count;
#pragma omp parallel num_threads(useful_threads(args.threads, n, 1 << 12))
  {
    if (!all) {
#pragma omp for
      for (int64_t i = 0; i < n; ++i) positive[i] = sums_positive(as<F>(args.features) + i * channels, channels);
    }
#pragma omp for
    for (int64_t q = 0; q < m; ++q) {
      int64_t count = splits[q + 1] - splits[q];
      if (!all) {
        count = 0;
        for (int64_t e = splits[q]; e < splits[q + 1]; ++e) count += positive[index[e]];
      }
      scale[q] = F(1) / F(larger<int64_t>(1, count));
    }
  }
  return Status::ok;
}

// Kernel points as (D, K), mirrored for the way back.
template <class G>
bool by_axis(const Array& kernel_points, G sign, Buffer<G>& to) {
  const int64_t K = kernel_points.rows, D = kernel_points.cols;
  if (!to.resize(K * D)) return false;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t a = 0; a < D; ++a) to[a * K + k] = sign * as<G>(kernel_points)[k * D + a];
  return true;
}

// Calls f(geometry type, feature type, dimension or 0 for any).
template <class Call>
Status with_types(const KPConv& args, Call call) {
  const auto with_feature = [&](auto g, auto f) {
    if (args.points.cols == 2) return call(g, f, std::integral_constant<int, 2>());
    if (args.points.cols == 3) return call(g, f, std::integral_constant<int, 3>());
    return call(g, f, std::integral_constant<int, 0>());
  };
  const auto with_geometry = [&](auto g) {
    return args.features.dtype == DType::float32 ? with_feature(g, float()) : with_feature(g, double());
  };
  return args.points.dtype == DType::float32 ? with_geometry(float()) : with_geometry(double());
}

template <class G, class F>
Problem<G, F> forward_problem(const KPConv& args, const Buffer<G>& kernel_points, const Buffer<F>& scale) {
  return {as<G>(args.points),
          as<G>(args.queries),
          int(args.points.cols),
          as<int32_t>(args.index),
          as<int64_t>(args.row_splits),
          args.queries.rows,
          as<F>(args.features),
          args.features.cols,
          kernel_points.data(),
          int(args.kernel_points.rows),
          G(args.extent),
          args.influence,
          args.aggregation,
          scale.data(),
          nullptr};
}

}  // namespace

Status kpconv(const KPConv& args, const Array& out) {
  return with_types(args, [&](auto g, auto f, auto dim) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return convolve<G, F, decltype(dim)::value>(forward_problem(args, kernel_points, scale), as<F>(args.weights),
                                                args.features.cols, out.cols, false, static_cast<F*>(out.data),
                                                args.threads);
  });
}

Status kpconv_grad_features(const KPConv& args, const Array& grad_out, const Array& grad_features) {
  return with_types(args, [&](auto g, auto f, auto dim) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(-1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    Problem<G, F> problem = forward_problem(args, kernel_points, scale);
    exchange(problem.points, problem.queries);
    exchange(problem.query_scale, problem.point_scale);
    problem.index = as<int32_t>(args.transposed_index);
    problem.row_splits = as<int64_t>(args.transposed_row_splits);
    problem.num_queries = args.points.rows;
    problem.features = as<F>(grad_out);
    problem.channels = grad_out.cols;
    return convolve<G, F, decltype(dim)::value>(problem, as<F>(args.weights), args.features.cols, grad_out.cols, true,
                                                static_cast<F*>(grad_features.data), args.threads);
  });
}

Status kpconv_grad_weights(const KPConv& args, const Array& grad_out, const Array& grad_weights) {
  return with_types(args, [&](auto g, auto f, auto dim) {
    using G = decltype(g);
    using F = decltype(f);
    Buffer<G> kernel_points;
    Buffer<F> scale;
    if (!by_axis(args.kernel_points, G(1), kernel_points)) return Status::out_of_memory;
    if (Status status = normalize(args, scale); status != Status::ok) return status;
    return weight_gradient<G, F, decltype(dim)::value>(forward_problem(args, kernel_points, scale), as<F>(grad_out),
                                                       grad_out.cols, static_cast<F*>(grad_weights.data), args.threads);
  });
}

}  // namespace KP_ISA
}  // namespace kp
