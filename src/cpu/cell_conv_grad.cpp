// Gradients of the convolutions with a filter of cells, except that of the features, in one pass over the tiles of the
// queries.
//
// The gradient of filter cell W_k is the sum over the tiles of A_k^T grad. All others start from the gradient of the
// weight of every pair and corner, f_i . (grad W_k^T). Tiles are added in their order, so no result depends on the
// number of threads.

#include "cell_tile.h"
#include "tile_gradients.h"

namespace kp {
namespace KP_ISA {
namespace {

// The requested gradients; null if not requested.
template <class G, class F>
struct CellGradients {
  F* filters;
  G *points, *queries;      // (N, 3), (M, 3)
  G* extents;               // (M, 1 or 3), of the extents of each query also if all have the same
  F* neighbor_importances;  // (E,)

  bool need_positions() const { return points || queries || extents; }
  bool need_pairs() const { return need_positions() || neighbor_importances; }
};

// One thread's gradients by pair, for one tile at a time.
template <class G, class F>
class PairGradients {
 public:
  bool reserve(const Weights<F>& filters, int64_t rows, int64_t max_edges, const CellGradients<G, F>& to) {
    return products_.reserve(filters, rows, max_corners * cell_chunk) && point_.resize(max_corners * cell_chunk) &&
           (!to.points || position_.resize(max_edges * 3));
  }
  int64_t rows_stored() const { return products_.rows_stored(); }

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
      for (int64_t e = begin; e < end; e += cell_chunk) {
        const int64_t n = smaller(cell_chunk, end - e), at = e - pass.row_splits[first];
        neighbors.find(pass, q, e, n);
        tile.template add_rows<false>(neighbors.cells, n);
        dot(pass, e, n, neighbors.cells, tile);
        if (to.need_positions()) add_positions(pass, q, e, n, at, to.points, query, extent);
        for (int64_t i = 0; i < n; ++i) {
          F weight_grad = 0;  // of the pair's factors together
          for (int j = 0; j < corners_; ++j)
            weight_grad += neighbors.weights[j * cell_chunk + i] * products_.weight_grad[i * corners_ + j];
          const F importance = pass.neighbor_importances ? pass.neighbor_importances[e + i] : F(1);
          const F point_scale = pass.point_scale ? pass.point_scale[pass.index[e + i]] : F(1);
          if (to.neighbor_importances) to.neighbor_importances[e + i] = query_scale * point_scale * weight_grad;
          result_grad += point_scale * importance * weight_grad;
          sum += importance;
        }
      }
      if (to.neighbor_importances && is_normalized && sum != 0)  // query_scale is 1 / sum
        for (int64_t e = begin; e < end; ++e) to.neighbor_importances[e] -= result_grad * query_scale * query_scale;
      for (int a = 0; a < 3 && to.queries; ++a) to.queries[q * 3 + a] = -query[a];
      if (to.extents && pass.extent_axes == 1) to.extents[q] = (extent[0] + extent[1]) + extent[2];
      for (int a = 0; a < 3 && to.extents && pass.extent_axes > 1; ++a) to.extents[q * 3 + a] = extent[a];
    }
  }

  // Adds to the gradient of the points, which tiles share. Called in the order of the tiles, for edges from `begin` on.
  void add_shared(const CellPass<G, F>& pass, int64_t begin, int64_t num_edges, const CellGradients<G, F>& to) const {
    for (int64_t e = 0; e < num_edges; ++e) {
      const int64_t i = pass.index[begin + e];
      for (int a = 0; a < 3; ++a) to.points[i * 3 + a] += position_[e * 3 + a];
    }
  }

 private:
  // Computes weight_grad[i * corners + j] = f_i . (grad W^T) of the cell of corner j, for n neighbors from e on.
  void dot(const CellPass<G, F>& pass, int64_t e, int64_t n, const int32_t* cells, const CellTile<F>& tile) {
    corners_ = pass.corners();
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < corners_; ++j) {
        const int64_t k = tile.cell(cells, i, j);
        point_[i * corners_ + j] = pass.index[e + i];
        products_.row[i * corners_ + j] = int32_t(products_.number(k, tile.row(k)));
      }
    products_.dot(point_.data(), n * corners_, pass.features, pass.channels);
  }

  // Adds the gradients of positions and extents; writes those of the points to position_, from edge `at` on.
  void add_positions(const CellPass<G, F>& pass, int64_t q, int64_t e, int64_t n, int64_t at, bool need_points,
                     G* query, G* extent) {
    for (int j = 0; j < corners_; ++j)
      for (int64_t i = 0; i < n; ++i) corner_grads_[j * cell_chunk + i] = G(products_.weight_grad[i * corners_ + j]);
    find_cell_grads(pass, q, e, n, corner_grads_, position_grads_, extent_grads_);
    for (int64_t i = 0; i < n; ++i) {
      const G scale = G(pass.pair_scale(q, e + i));
      for (int a = 0; a < 3; ++a) {
        const G grad = scale * position_grads_[a * cell_chunk + i];
        if (need_points) position_[(at + i) * 3 + a] = grad;
        query[a] += grad;
        extent[a] += scale * extent_grads_[a * cell_chunk + i];
      }
    }
  }

  GradientProducts<F> products_;
  Buffer<int32_t> point_;
  Buffer<G> position_;  // (edges, 3): gradient of the point of each edge
  alignas(64) G corner_grads_[max_corners * cell_chunk + lanes<G>];
  alignas(64) G position_grads_[3 * cell_chunk + lanes<G>], extent_grads_[3 * cell_chunk + lanes<G>];
  int corners_ = 0;
};

template <class G, class F>
struct CellGradState {
  CellTile<F> tile;
  CellChunk<G, F> neighbors;
  PairGradients<G, F> pairs;
  Buffer<F> grad;  // the rows of grad_out of the tile's queries, padded
};

template <class G, class F>
Status compute_gradients(const CellConv& args) {
  const CellPass<G, F> pass = pass_of<G, F>(args);
  const Weights<F> filters = filters_of<F>(args);
  const F* const grad_out = as<F>(args.grad_out);
  const CellGradients<G, F> to = {into<F>(args.grad_filters), into<G>(args.grad_points), into<G>(args.grad_queries),
                                  into<G>(args.grad_extents), into<F>(args.grad_neighbor_importances)};
  const int64_t K = filters.num_kernels, tile_rows = rows_of_tile<F>(K * pass.channels, filters.c_out);
  const int64_t* const splits = pass.row_splits;
  const ChannelBlocks blocks(filters);
  Turns turns;
  Panels<F> panels;
  if (!turns.reserve(blocks.count() + 1)) return Status::out_of_memory;
  if (to.filters) memset(to.filters, 0, size_t(K * filters.c_in * filters.c_out) * sizeof(F));
  if (to.points) memset(to.points, 0, size_t(args.points.rows * 3) * sizeof(G));
  if (to.need_pairs() && !panels.pack(filters.data, K, filters.c_in, filters.c_out, 1, true, args.threads))
    return Status::out_of_memory;
  int64_t max_edges = 0;
  const Tiles tiles(pass.num_queries, tile_rows);
  for (int64_t t = 0; to.points && t < tiles.count; ++t)
    max_edges = larger(max_edges, splits[tiles.begin(t + 1)] - splits[tiles.begin(t)]);
  int outside = 0;
  using State = CellGradState<G, F>;
  const auto reserve = [&](State& state) {
    return state.tile.reserve(pass, tile_rows, to.filters) &&
           (!to.need_pairs() || state.pairs.reserve(filters, tile_rows, max_edges, to)) &&
           (!to.filters || state.grad.resize(tile_rows * round_up(filters.c_out, lanes<F>) + panel_width<F>));
  };
  const auto work = [&](State& state, int64_t t, int64_t first, int64_t rows) {
    if (!fill(pass, first, rows, to.filters, state.neighbors, state.tile))
      __atomic_store_n(&outside, 1, __ATOMIC_RELAXED);
    if (to.filters)
      add_weights(state.tile.rows(), filters, static_cast<const F*>(nullptr), blocks, grad_out, t, first, rows, turns,
                  state.grad.data(), to.filters);
    if (!to.need_pairs()) return;
    state.pairs.compute(pass, filters, panels, grad_out, args.is_normalized, first, rows, state.neighbors, state.tile,
                        to);
    if (!to.points) return;
    turns.wait(blocks.count(), t);
    state.pairs.add_shared(pass, splits[first], splits[first + rows] - splits[first], to);
    turns.pass(blocks.count(), t);
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
