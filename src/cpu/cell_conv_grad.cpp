// Gradients of the convolutions with a filter of cells by pair: of neighbor importances, positions and extents. (Those
// of features and filters are sums over pairs: see cell_conv.cpp.)
//
// They start from the gradient of the weight of every pair and corner, f_i . (grad W_k^T). Tiles are added in their
// order, so no result depends on the number of threads.

#include "cell_tile.h"
#include "tile_gradients.h"

namespace kp {
namespace KP_ISA {
namespace {

// The requested gradients; null if not requested.
template <class G, class F>
struct CellGradients {
  G *points, *queries;      // (N, 3), (M, 3)
  G* extents;               // (M, 1 or 3), of the extents of each query also if all have the same
  F* neighbor_importances;  // (E,)

  bool need_positions() const { return points || queries || extents; }
};

// One thread's gradients by pair, for one tile at a time.
template <class G, class F>
class PairGradients {
 public:
  // max_pairs: the most pairs of a tile, 0 if the points need no gradient.
  bool reserve(const Weights<F>& filters, int64_t rows, int64_t max_pairs) {
    stride_ = max_pairs;
    return products_.reserve(filters, rows, 0) && positions_.resize(3 * max_pairs);
  }

  int64_t cell_stride(const CellPass<G, F>& pass) const { return products_.rows_stored() * pass.channels; }

  // Computes the gradients of the pairs of a tile, which was filled before, and writes those of its queries and pairs.
  void compute(const CellPass<G, F>& pass, const Weights<F>& filters, const Panels<F>& panels, const F* grad_out,
               bool is_normalized, int64_t first, int64_t count, CellChunk<G, F>& neighbors, CellTile<F>& tile,
               const CellGradients<G, F>& to) {
    products_.start();
    products_.multiply(tile.rows(), filters, panels, grad_out + first * filters.c_out);
    tile.start();  // the rows are assigned once more, in the same order
    for (int64_t r = 0; r < count; ++r) {
      const int64_t q = first + r, begin = pass.row_splits[q], end = pass.row_splits[q + 1];
      const F query_scale = pass.query_scale ? pass.query_scale[q] : F(1);
      F result_grad = 0, sum = 0;  // of the result before query_scale; of neighbor_importances
      G query[3] = {}, extent[3] = {};
      tile.start_query(int32_t(r));
      prefetch_features(pass, end, r + 1 < count ? pass.row_splits[q + 2] : end);
      for (int64_t e = begin; e < end; e += cell_chunk) {
        const int64_t n = smaller(cell_chunk, end - e);
        neighbors.find(pass, q, e, n);
        tile.template add_rows<false>(neighbors.cells, n);
        dot(pass, e, n, neighbors.cells, tile);
        load_scales(pass, q, e, n);
        if (to.neighbor_importances) {
          add_importance_grads(pass, e, n, neighbors.weights, result_grad, sum);
          for (int64_t i = 0; i < n; ++i) to.neighbor_importances[e + i] = query_scale * importance_grads_[i];
        }
        if (to.need_positions())
          add_positions(pass, q, e, n, to.points ? positions_.data() + e - pass.row_splits[first] : nullptr, query,
                        extent);
      }
      if (to.neighbor_importances && is_normalized && sum != 0)  // query_scale is 1 / sum
        for (int64_t e = begin; e < end; ++e) to.neighbor_importances[e] -= result_grad * query_scale * query_scale;
      for (int a = 0; a < 3 && to.queries; ++a) to.queries[q * 3 + a] = -query[a];
      if (to.extents && pass.extent_axes == 1) to.extents[q] = (extent[0] + extent[1]) + extent[2];
      for (int a = 0; a < 3 && to.extents && pass.extent_axes > 1; ++a) to.extents[q * 3 + a] = extent[a];
    }
  }

  // Adds to the gradient of the points, which tiles share, for pairs from `begin` on. Called in the order of the tiles.
  void add_points(const CellPass<G, F>& pass, int64_t begin, int64_t num_pairs, G* points) const {
    for (int64_t e = 0; e < num_pairs; ++e) {
      G* const to = points + int64_t(pass.index[begin + e]) * 3;
      for (int a = 0; a < 3; ++a) to[a] += positions_[a * stride_ + e];
    }
  }

 private:
  // dots_[j * cell_chunk + i] = f_i . (grad W^T) of the cell of corner j, for n neighbors from e on; zeros up to a
  // whole vector.
  void dot(const CellPass<G, F>& pass, int64_t e, int64_t n, const int32_t* cells, const CellTile<F>& tile) {
    corners_ = pass.corners();
    if (corners_ == max_corners)
      dot_eight(pass, pass.index + e, n, cells, tile);
    else
      for (int j = 0; j < corners_; ++j) {
        for (int64_t i = 0; i < n; ++i) rows_[i] = int32_t(tile.row_of(cells[i], j) / pass.channels);
        products_.dot(pass.index + e, rows_, n, pass.features, pass.channels, dots_ + j * cell_chunk);
      }
    for (int j = 0; j < corners_; ++j)
      for (int64_t i = n; i < round_up(n, lanes<F>); ++i) dots_[j * cell_chunk + i] = 0;
  }

  // The same for eight corners: the features of a neighbor are loaded once for all of them, or for as many as a vector
  // has lanes.
  KP_OUTLINE void dot_eight(const CellPass<G, F>& pass, const int32_t* points, int64_t n, const int32_t* cells,
                            const CellTile<F>& tile) {
    constexpr int corners = lanes<F> < max_corners ? lanes<F> : max_corners, neighbors = lanes<F> / corners;
    for (int64_t i = 0; i < n; i += neighbors)
      for (int first = 0; first < max_corners; first += corners) {
        Vec<F> sums[lanes<F>] = {};
        for (int l = 0; l < neighbors; ++l) {
          const int64_t at = smaller(i + l, n - 1);
          const F* const f = pass.features + int64_t(points[at]) * pass.channels;
          const F* rows[corners];
          for (int j = 0; j < corners; ++j) rows[j] = products_.products() + tile.row_of(cells[at], first + j);
          int64_t c = 0;
          for (; c + 2 * lanes<F> <= pass.channels; c += 2 * lanes<F>) {
            const Vec<F> low = load(f + c), high = load(f + c + lanes<F>);
            for (int j = 0; j < corners; ++j)
              sums[l * corners + j] =
                  fma(high, load(rows[j] + c + lanes<F>), fma(low, load(rows[j] + c), sums[l * corners + j]));
          }
          for (; c < pass.channels; c += lanes<F>) {
            const int rest = int(smaller<int64_t>(lanes<F>, pass.channels - c));
            const Vec<F> last = load_first(f + c, rest);
            for (int j = 0; j < corners; ++j)
              sums[l * corners + j] = fma(last, load_first(rows[j] + c, rest), sums[l * corners + j]);
          }
        }
        const Vec<F> totals = sums_of<F>(sums);
        for (int l = 0; l < neighbors && i + l < n; ++l)
          for (int j = 0; j < corners; ++j) dots_[(first + j) * cell_chunk + i + l] = totals[l * corners + j];
      }
  }

  // scales_: the factors of the pairs, zeros up to a whole vector.
  void load_scales(const CellPass<G, F>& pass, int64_t q, int64_t e, int64_t n) {
    for (int64_t i = 0; i < n; ++i) scales_[i] = pass.pair_scale(q, e + i);
    for (int64_t i = n; i < round_up(n, lanes<F>); ++i) scales_[i] = 0;
  }

  // importance_grads_: the gradients of neighbor_importances before query_scale.
  void add_importance_grads(const CellPass<G, F>& pass, int64_t e, int64_t n, const F* weights, F& result_grad,
                            F& sum) {
    for (int64_t i = 0; i < n; ++i) importance_grads_[i] = weights[i] * dots_[i];
    for (int j = 1; j < corners_; ++j)
      for (int64_t i = 0; i < n; ++i) importance_grads_[i] += weights[j * cell_chunk + i] * dots_[j * cell_chunk + i];
    for (int64_t i = 0; i < n; ++i) {
      const F importance = pass.neighbor_importances ? pass.neighbor_importances[e + i] : F(1);
      if (pass.point_scale) importance_grads_[i] *= pass.point_scale[pass.index[e + i]];
      result_grad += importance * importance_grads_[i];
      sum += importance;
    }
  }

  // Adds the gradients of the query and of its extents; writes those of the points to `points`, an array of stride_
  // pairs for each axis, unless it is null.
  void add_positions(const CellPass<G, F>& pass, int64_t q, int64_t e, int64_t n, G* points, G* query, G* extent) {
    const G* corner_grads;
    const G* scales;
    if constexpr (std::is_same_v<G, F>) {
      corner_grads = dots_;
      scales = scales_;
    } else {
      for (int j = 0; j < corners_; ++j)
        for (int64_t i = 0; i < round_up(n, lanes<G>); ++i)
          converted_[j * cell_chunk + i] = i < n ? G(dots_[j * cell_chunk + i]) : G(0);
      for (int64_t i = 0; i < round_up(n, lanes<G>); ++i) converted_scales_[i] = i < n ? G(scales_[i]) : G(0);
      corner_grads = converted_;
      scales = converted_scales_;
    }
    find_cell_grads(pass, q, e, n, corner_grads, position_grads_, extent_grads_);
    for (int a = 0; a < 3; ++a) {
      Vec<G> sum = {}, extent_sum = {};
      for (int64_t i = 0; i < n; i += lanes<G>) {
        const Vec<G> scale = load(scales + i), grad = scale * load(&position_grads_[a * cell_chunk + i]);
        sum += grad;
        extent_sum += scale * load(&extent_grads_[a * cell_chunk + i]);
        if (!points) continue;
        if (i + lanes<G> <= n)
          store(points + a * stride_ + i, grad);
        else
          store_first(points + a * stride_ + i, int(n - i), grad);
      }
      query[a] += sum_of_lanes<G>(sum);
      extent[a] += sum_of_lanes<G>(extent_sum);
    }
  }

  GradientProducts<F> products_;
  Buffer<G> positions_;  // (3, stride_): gradient of the point of each pair
  int64_t stride_ = 0;
  int corners_ = 0;
  int32_t rows_[cell_chunk];
  alignas(64) F dots_[max_corners * cell_chunk + lanes<F>];
  alignas(64) F scales_[cell_chunk + lanes<F>];
  alignas(64) F importance_grads_[cell_chunk];
  alignas(64) G converted_[max_corners * cell_chunk + lanes<G>];
  alignas(64) G converted_scales_[cell_chunk + lanes<G>];
  alignas(64) G position_grads_[3 * cell_chunk + lanes<G>], extent_grads_[3 * cell_chunk + lanes<G>];
};

template <class G, class F>
struct CellGradState {
  CellTile<F> tile;
  CellChunk<G, F> neighbors;
  PairGradients<G, F> pairs;
};

template <class G, class F>
Status compute_gradients(const CellConv& args) {
  const CellPass<G, F> pass = pass_of<G, F>(args);
  const Weights<F> filters = filters_of<F>(args);
  const F* const grad_out = as<F>(args.grad_out);
  const CellGradients<G, F> to = {into<G>(args.grad_points), into<G>(args.grad_queries), into<G>(args.grad_extents),
                                  into<F>(args.grad_neighbor_importances)};
  const int64_t K = filters.num_kernels, tile_rows = rows_of_tile<F>(K * pass.channels, filters.c_out);
  const int64_t* const splits = pass.row_splits;
  Turns turns;
  Panels<F> panels;
  if (!turns.reserve(1) || !panels.pack(filters.data, K, filters.c_in, filters.c_out, 1, true, args.threads))
    return Status::out_of_memory;
  if (to.points) memset(to.points, 0, size_t(args.points.rows * 3) * sizeof(G));
  int64_t max_pairs = 0;
  const Tiles tiles(pass.num_queries, tile_rows);
  for (int64_t t = 0; to.points && t < tiles.count; ++t)
    max_pairs = larger(max_pairs, splits[tiles.begin(t + 1)] - splits[tiles.begin(t)]);
  int outside = 0;
  using State = CellGradState<G, F>;
  const auto reserve = [&](State& state) {
    return state.pairs.reserve(filters, tile_rows, max_pairs) &&
           state.tile.reserve(pass, tile_rows, false, state.pairs.cell_stride(pass));
  };
  const auto work = [&](State& state, int64_t t, int64_t first, int64_t rows) {
    if (!fill(pass, first, rows, false, state.neighbors, state.tile)) __atomic_store_n(&outside, 1, __ATOMIC_RELAXED);
    state.pairs.compute(pass, filters, panels, grad_out, args.is_normalized, first, rows, state.neighbors, state.tile,
                        to);
    if (!to.points) return;
    turns.wait(0, t);
    state.pairs.add_points(pass, splits[first], splits[first + rows] - splits[first], to.points);
    turns.pass(0, t);
  };
  const Status status =
      for_each_tile<State>(pass.num_queries, tile_rows, threads_of_pass(pass, filters, args.threads), reserve, work);
  return status == Status::ok && outside ? Status::out_of_range : status;
}

}  // namespace

Status cell_conv_grads(const CellConv& args) {
  return with_types(args, [&](auto g, auto f) { return compute_gradients<decltype(g), decltype(f)>(args); });
}

}  // namespace KP_ISA
}  // namespace kp
