// Convolutions with a filter of cells: ContinuousConv (Ummenhofer et al. 2020), SparseConv, and their transposes.
//
//   out[q] = s_q sum over neighbors i of q of a_qi t_i (sum over the cells k around i of w_qik f_i W_k)
//
// s, t and a are query_scale, point_scale and neighbor_importances (kpcore/cells.py). A neighbor acts on the eight
// cells around its position in the filter, with trilinear weights w, or on one cell. As in kpconv.cpp queries are
// processed in tiles: a tile first sums features by cell into the rows of A_k (cell_tile.h); its output is the sum over
// k of A_k W_k (tile_products.h).
//
// The gradient of the features is the same operator on the transposed neighbor list, with reversed positions and
// transposed filters. The gradient of W_k is the sum over the tiles of A_k^T grad; with the transposed list it is that
// of W_k^T, from f^T times the same sums as the gradient of the features.

#include "cell_tile.h"
#include "tile_gradients.h"

namespace kp {
namespace KP_ISA {
namespace {

template <class G, class F>
struct CellState {
  CellTile<F> tile;
  CellChunk<G, F> neighbors;
  Buffer<F> o;
  Buffer<F> grad;  // the rows of grad_out of the tile's queries, padded
};

template <class G, class F>
Status convolve(const CellConv& args) {
  const CellPass<G, F> pass = pass_of<G, F>(args);
  const Weights<F> filters = filters_of<F>(args);
  const int64_t K = filters.num_kernels, columns = args.transposed_filters ? filters.c_in : filters.c_out;
  F *const out = into<F>(args.out), *const grad_filters = into<F>(args.grad_filters);
  const auto* const grad_out = as<F>(args.grad_out);
  // The gradient of the filters (cells, channels of the features, columns).
  Weights<F> gradient = filters;
  gradient.c_in = pass.channels;
  gradient.c_out = columns;
  const ChannelBlocks blocks(gradient);
  Turns turns;
  Panels<F> panels;
  if (out && !panels.pack(filters.data, K, filters.c_in, filters.c_out, 1, args.transposed_filters, args.threads))
    return Status::out_of_memory;
  if (grad_filters) {
    if (!turns.reserve(blocks.count())) return Status::out_of_memory;
    memset(grad_filters, 0, size_t(K * pass.channels * columns) * sizeof(F));
  }
  const int64_t o_row = round_up(columns, lanes<F>), tile_rows = rows_of_tile<F>(K * pass.channels, o_row);
  int outside = 0;
  const auto reserve = [&](CellState<G, F>& state) {
    return state.tile.reserve(pass, tile_rows, true) && (!out || state.o.resize((tile_rows + 1) * o_row)) &&
           (!grad_filters || state.grad.resize(tile_rows * o_row + panel_width<F>));
  };
  const auto work = [&](CellState<G, F>& state, int64_t t, int64_t first, int64_t rows) {
    if (!fill(pass, first, rows, true, state.neighbors, state.tile)) __atomic_store_n(&outside, 1, __ATOMIC_RELAXED);
    if (out) multiply(state.tile.rows(), tile_rows, panels, int(K), state.o.data());
    for (int64_t r = 0; out && r < rows; ++r)
      memcpy(out + (first + r) * columns, &state.o[r * o_row], size_t(columns) * sizeof(F));
    if (grad_filters)
      add_weights(state.tile.rows(), gradient, static_cast<const F*>(nullptr), blocks, grad_out, t, first, rows, turns,
                  state.grad.data(), grad_filters);
  };
  const Status status = for_each_tile<CellState<G, F>>(pass.num_queries, tile_rows,
                                                       threads_of_pass(pass, filters, args.threads), reserve, work);
  return status == Status::ok && outside ? Status::out_of_range : status;
}

}  // namespace

Status cell_conv(const CellConv& args) {
  return with_types(args, [&](auto g, auto f) { return convolve<decltype(g), decltype(f)>(args); });
}

Status inverse_sums(const InverseSums& args) {
  const int64_t num_queries = args.row_splits.rows - 1;
  const auto* const splits = as<int64_t>(args.row_splits);
  const int threads = useful_threads(args.threads, splits[num_queries] + num_queries, 1 << 15);
  with_real(args.scale.dtype, [&](auto t) {
    using F = decltype(t);
    const F* const importances = as<F>(args.neighbor_importances);
#pragma omp parallel for num_threads(threads)
    for (int64_t q = 0; q < num_queries; ++q) {
      F sum = F(splits[q + 1] - splits[q]);
      if (importances) {
        sum = 0;
        for (int64_t e = splits[q]; e < splits[q + 1]; ++e) sum += importances[e];
      }
      into<F>(args.scale)[q] = sum == 0 ? F(1) : 1 / sum;
    }
  });
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
