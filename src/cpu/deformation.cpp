// The two losses that regularize deformed kernel points p_qk = p_k + o_qk, and their gradients (Thomas et al. 2019):
//
//   fitting   = sum over q and k of min over neighbors i of q of |x_i - x_q - p_qk|² / extent²
//   repulsion = sum over q, k and j != k of min(0, |p_qk - p_qj| / extent - repulse_extent)²
//
// Fitting: each lane of a vector has one kernel point of a query and keeps its smallest distance in a register while
// the neighbors are read, so no array over neighbors and kernel points is allocated. Repulsion: each lane has one
// query, and each pair of kernel points is computed once.
//
// Sums are float64 over blocks of queries, whose size does not depend on the number of threads, then over the blocks in
// order. No multiply-adds are fused, so losses and gradients are the same bits with every instruction set.

#include "formulas/deformation.h"

#include "kernels.h"
#include "formulas/neighbors.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t max_blocks = 256;
constexpr int64_t min_block_queries = 256;  // a multiple of 64, so only the last block has partial vectors of queries

template <class G>
struct DeformationArrays {
  const G *points, *queries;
  const int32_t* index;
  const int64_t* row_splits;
  const G *kernel_points, *offsets;
  int dimension;
  int64_t num_kernels, num_queries;

  explicit DeformationArrays(const Deformation& args)
      : points(as<G>(args.points)),
        queries(as<G>(args.queries)),
        index(as<int32_t>(args.index)),
        row_splits(as<int64_t>(args.row_splits)),
        kernel_points(as<G>(args.kernel_points)),
        offsets(as<G>(args.offsets)),
        dimension(int(args.kernel_points.cols)),
        num_kernels(args.kernel_points.rows),
        num_queries(args.offsets.rows / args.kernel_points.rows) {}

  int64_t row() const { return num_kernels * dimension; }  // length of a row of offsets
};

// One thread's scratch memory, initially zero.
template <class G>
struct Scratch {
  Buffer<G> values;
  bool enough;
  explicit Scratch(int64_t size) : enough(values.resize(size)) {
    if (enough) memset(values.data(), 0, size_t(size) * sizeof(G));
  }
};

// Calls visit(scratch, first query, end, sums) for every block of queries. Every block has `width` sums; the total over
// the blocks is sums[0, width) in the end. Each thread has `size` numbers of scratch memory.
template <class G, class Visit>
Status for_each_block(int64_t queries, int64_t width, int64_t size, int threads, Buffer<double>& sums, Visit visit) {
  const int64_t block = larger(min_block_queries, (queries / max_blocks + 64) / 64 * 64);
  const int64_t blocks = larger<int64_t>(1, (queries + block - 1) / block);
  if (!sums.resize(blocks * width)) return Status::out_of_memory;
  memset(sums.data(), 0, size_t(blocks * width) * sizeof(double));
  threads = int(smaller<int64_t>(threads, blocks));
  bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    Scratch<G> scratch(size);
    enough = scratch.enough;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < blocks; ++b)
      if (enough) visit(scratch.values.data(), b * block, smaller(queries, (b + 1) * block), &sums[b * width]);
  }
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[b * width + i];
  return enough ? Status::ok : Status::out_of_memory;
}

// Adds each lane to a float64 sum of its own.
template <class G>
KP_INLINE void add_lanes(double* sums, Vec<G> values) {
  typedef G Part __attribute__((vector_size(sizeof(G) * lanes<double>)));
  Part parts[sizeof(double) / sizeof(G)];
  memcpy(parts, &values, sizeof(values));
  for (const Part& part : parts) {
    store(sums, load(sums) + __builtin_convertvector(part, Vec<double>));
    sums += lanes<double>;
  }
}

// Finds the neighbor nearest to every kernel point of query q, of equally near ones the first, and adds the squared
// distances to `sums`. `deformed`: the kernel points (D, stride), stride a multiple of the lanes.
template <class G, int DIM>
void fit(const DeformationArrays<G>& arrays, int64_t q, const G* deformed, int64_t stride, int32_t* nearest,
         double* sums) {
  const int D = DIM ? DIM : arrays.dimension;
  constexpr int stored = DIM ? DIM : max_dimension;
  const int64_t K = arrays.num_kernels;
  const int32_t* const row = arrays.index + arrays.row_splits[q];
  const int64_t n = arrays.row_splits[q + 1] - arrays.row_splits[q];
  if (!n) {
    for (int64_t k = 0; k < K; ++k) nearest[k] = -1;
    return;
  }
  // The query is broadcast to memory and read back, so that the compiler does not know all lanes are equal. Otherwise
  // it subtracts first and broadcasts afterwards: three more instructions per neighbor, a tenth of the time.
  alignas(64) G lanes_of_query[stored * lanes<G>];
  for (int a = 0; a < D; ++a) store(lanes_of_query + a * lanes<G>, broadcast(arrays.queries[q * D + a]));
  const G* read = lanes_of_query;
  asm("" : "+r"(read) : : "memory");
  Vec<G> center[stored], p[stored];
  for (int a = 0; a < D; ++a) center[a] = load(read + a * lanes<G>);
  for (int64_t k = 0; k < K; k += lanes<G>) {
    for (int a = 0; a < D; ++a) p[a] = load(deformed + a * stride + k);
    const auto squared = [&](int32_t i) {
      const G* const x = arrays.points + int64_t(i) * D;
      Vec<G> d[stored];
      for (int a = 0; a < D; ++a) d[a] = from_neighbor(broadcast(x[a]), center[a], p[a]);
      return squared_distance(d, D);
    };
    Vec<G> least = squared(row[0]), all = least;
    Vec<IndexBeside<G>> nearest_point = broadcast(IndexBeside<G>(row[0]));
    for (int64_t e = 1; e < n; ++e) {
      const Vec<G> d2 = squared(row[e]);
      nearest_point = d2 < least ? broadcast(IndexBeside<G>(row[e])) : nearest_point;
      least = min(d2, least);
      all += d2;
    }
    // min() ignores NaN, the sum of all distances does not: it is NaN only if a distance is.
    least = all == all ? least : all;
    add_lanes<G>(sums + k, least);
    const int count = int(smaller<int64_t>(lanes<G>, K - k));
    if constexpr (sizeof(G) == 4)
      store_first(nearest + k, count, nearest_point);
    else
      for (int l = 0; l < count; ++l) nearest[k + l] = int32_t(nearest_point[l]);
  }
}

// The deformed kernel points of query q, (D, stride).
template <class G, int DIM>
void deform(const DeformationArrays<G>& arrays, int64_t q, int64_t stride, G* deformed) {
  const int D = DIM ? DIM : arrays.dimension;
  const G* const offsets = arrays.offsets + q * arrays.row();
  for (int64_t k = 0; k < arrays.num_kernels; ++k)
    for (int a = 0; a < D; ++a) deformed[a * stride + k] = arrays.kernel_points[k * D + a] + offsets[k * D + a];
}

template <class G, int DIM>
Status fitting(const Deformation& args) {
  const Array &loss = args.loss, &nearest = args.nearest;
  const DeformationArrays<G> arrays(args);
  const int64_t K = arrays.num_kernels, stride = (K + lanes<G> - 1) / lanes<G> * lanes<G>;
  const int64_t pairs = arrays.row_splits[arrays.num_queries];
  auto* const to = into<int32_t>(nearest);
  Buffer<double> sums;
  const Status status = for_each_block<G>(arrays.num_queries, stride, arrays.dimension * stride,
                                          useful_threads(args.threads, pairs * K, 1 << 17), sums,
                                          [=, &arrays](G* deformed, int64_t begin, int64_t end, double* block_sums) {
                                            for (int64_t q = begin; q < end; ++q) {
                                              deform<G, DIM>(arrays, q, stride, deformed);
                                              fit<G, DIM>(arrays, q, deformed, stride, to + q * K, block_sums);
                                            }
                                          });
  if (status != Status::ok) return status;
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += sums[k];
  *into<G>(loss) = G(sum * (args.weight / (args.extent * args.extent)));
  return Status::ok;
}

// Where a block writes gradients. The gradient of a query's deformed kernel points is the gradient of its offsets; the
// sum over all queries is the gradient of the kernel points.
template <class G>
struct BlockGrads {
  G* offsets;             // of all queries; null if not requested
  double* kernel_points;  // the block's sum; null if not requested
  int64_t row;

  G* row_of(int64_t q, G* scratch) const { return offsets ? offsets + q * row : scratch; }
  void add(const G* query_grad) const {
    if (!kernel_points) return;
    for (int64_t i = 0; i < row; ++i) kernel_points[i] += double(query_grad[i]);
  }
};

// The weight of a term, times the gradient of the loss.
template <class G>
double gradient_weight(const Deformation& args) {
  return args.weight * double(*as<G>(args.grad_out));
}

// Calls visit(scratch, first query, end, BlockGrads) for every block of queries and writes the requested gradients.
template <class G, class Visit>
Status differentiate(const DeformationArrays<G>& arrays, int64_t size, int threads, const Deformation& args,
                     Visit visit) {
  const int64_t row = arrays.row();
  auto* const offsets = into<G>(args.grad_offsets);
  auto* const kernel_points = into<G>(args.grad_kernel_points);
  Buffer<double> sums;
  const Status status =
      for_each_block<G>(arrays.num_queries, kernel_points ? row : 0, size, threads, sums,
                        [=](G* scratch, int64_t begin, int64_t end, double* block_sums) {
                          visit(scratch, begin, end, BlockGrads<G>{offsets, kernel_points ? block_sums : nullptr, row});
                        });
  for (int64_t i = 0; status == Status::ok && kernel_points && i < row; ++i) kernel_points[i] = G(sums[i]);
  return status;
}

template <class G, int DIM>
void fit_gradient(const DeformationArrays<G>& arrays, int64_t q, const int32_t* nearest, G scale, G* grad) {
  const int D = DIM ? DIM : arrays.dimension;
  const int64_t K = arrays.num_kernels;
  const G* const offsets = arrays.offsets + q * K * D;
  if (nearest[0] < 0) {
    memset(grad, 0, size_t(K * D) * sizeof(G));
    return;
  }
  for (int64_t k = 0; k < K; ++k)
    for (int a = 0; a < D; ++a) {
      const G deformed = arrays.kernel_points[k * D + a] + offsets[k * D + a];
      const G x = arrays.points[int64_t(nearest[k]) * D + a];
      grad[k * D + a] = scale * from_neighbor(x, arrays.queries[q * D + a], deformed);
    }
}

template <class G, int DIM>
Status fitting_gradient(const Deformation& args) {
  const Array& nearest = args.nearest;
  const DeformationArrays<G> arrays(args);
  const int64_t K = arrays.num_kernels;
  const auto* all_nearest = as<int32_t>(nearest);
  const G scale = G(2 * gradient_weight<G>(args) / (args.extent * args.extent));
  return differentiate<G>(arrays, arrays.row(), useful_threads(args.threads, arrays.num_queries * K, 1 << 14), args,
                          [=, &arrays](G* scratch, int64_t begin, int64_t end, const BlockGrads<G>& to) {
                            for (int64_t q = begin; q < end; ++q) {
                              G* const grad = to.row_of(q, scratch);
                              fit_gradient<G, DIM>(arrays, q, all_nearest + q * K, scale, grad);
                              to.add(grad);
                            }
                          });
}

// The deformed kernel points of up to a vector of queries, (K, D, lanes): a query in each lane.
template <class G>
void deform_lanes(const DeformationArrays<G>& arrays, int64_t first, int64_t count, G* deformed) {
  const int64_t row = arrays.row();
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < row; ++i)
      deformed[i * lanes<G> + l] = arrays.kernel_points[i] + arrays.offsets[(first + l) * row + i];
}

template <class G>
struct Repulsion {
  Vec<G> inverse_extent, repulse_extent;
  explicit Repulsion(const Deformation& args)
      : inverse_extent(broadcast(1 / G(args.extent))), repulse_extent(broadcast(G(args.repulse_extent))) {}
};

// Adds the repulsion of all pairs of kernel points of each lane's query to `sums`.
template <class G, int DIM>
void repel(const Repulsion<G>& repulsion, int64_t K, int dimension, const G* deformed, double* sums) {
  const int D = DIM ? DIM : dimension;
  constexpr int stored = DIM ? DIM : max_dimension;
  Vec<G> p[stored], d[stored];
  for (int64_t k = 0; k + 1 < K; ++k) {
    for (int a = 0; a < D; ++a) p[a] = load(deformed + (k * D + a) * lanes<G>);
    Vec<G> sum = {};
    for (int64_t j = k + 1; j < K; ++j) {
      for (int a = 0; a < D; ++a) d[a] = p[a] - load(deformed + (j * D + a) * lanes<G>);
      const Vec<G> overlapped =
          overlap(sqrt(squared_distance(d, D)), repulsion.inverse_extent, repulsion.repulse_extent);
      sum += overlapped * overlapped;
    }
    add_lanes<G>(sums, sum);
  }
}

int repulsion_threads(const Deformation& args, int64_t queries, int64_t K) {
  return useful_threads(args.threads, queries * K * K, 1 << 17);
}

template <class G, int DIM>
Status repelling(const Deformation& args) {
  const Array& loss = args.loss;
  const DeformationArrays<G> arrays(args);
  const Repulsion<G> repulsion(args);
  const int64_t K = arrays.num_kernels;
  Buffer<double> sum;
  const Status status =
      for_each_block<G>(arrays.num_queries, 1, arrays.row() * lanes<G>, repulsion_threads(args, arrays.num_queries, K),
                        sum, [=, &arrays, &repulsion](G* deformed, int64_t begin, int64_t end, double* block_sum) {
                          for (int64_t q = begin; q < end; q += lanes<G>) {
                            const int64_t count = smaller<int64_t>(lanes<G>, end - q);
                            double sums[lanes<G>] = {};
                            deform_lanes(arrays, q, count, deformed);
                            repel<G, DIM>(repulsion, K, arrays.dimension, deformed, sums);
                            for (int64_t l = 0; l < count; ++l) *block_sum += sums[l];
                          }
                        });
  if (status != Status::ok) return status;
  *into<G>(loss) = G(2 * args.weight * sum[0]);  // each pair of kernel points was counted once
  return Status::ok;
}

// The gradient of each lane's repulsion by kernel point k, with the kernel points j fixed. `grad` must be zero.
template <class G, int DIM>
void repel_gradient(const Repulsion<G>& repulsion, int64_t K, int dimension, const G* deformed, G* grad) {
  const int D = DIM ? DIM : dimension;
  constexpr int stored = DIM ? DIM : max_dimension;
  Vec<G> p[stored], d[stored], sum[stored];
  for (int64_t k = 0; k + 1 < K; ++k) {
    for (int a = 0; a < D; ++a) {
      p[a] = load(deformed + (k * D + a) * lanes<G>);
      sum[a] = load(grad + (k * D + a) * lanes<G>);
    }
    for (int64_t j = k + 1; j < K; ++j) {
      for (int a = 0; a < D; ++a) d[a] = p[a] - load(deformed + (j * D + a) * lanes<G>);
      const Vec<G> slope = repulsion_slope(squared_distance(d, D), repulsion.inverse_extent, repulsion.repulse_extent);
      for (int a = 0; a < D; ++a) {
        G* const other = grad + (j * D + a) * lanes<G>;
        const Vec<G> part = slope * d[a];
        sum[a] += part;
        store(other, load(other) - part);
      }
    }
    for (int a = 0; a < D; ++a) store(grad + (k * D + a) * lanes<G>, sum[a]);
  }
}

template <class G, int DIM>
Status repelling_gradient(const Deformation& args) {
  const DeformationArrays<G> arrays(args);
  const Repulsion<G> repulsion(args);
  const int64_t K = arrays.num_kernels, row = arrays.row(), vectors = row * lanes<G>;
  const G scale = G(gradient_weight<G>(args));
  return differentiate<G>(arrays, 2 * vectors + row, repulsion_threads(args, arrays.num_queries, K), args,
                          [=, &arrays, &repulsion](G* deformed, int64_t begin, int64_t end, const BlockGrads<G>& to) {
                            G *const lane_grads = deformed + vectors, *const scratch = lane_grads + vectors;
                            for (int64_t q = begin; q < end; q += lanes<G>) {
                              const int64_t count = smaller<int64_t>(lanes<G>, end - q);
                              deform_lanes(arrays, q, count, deformed);
                              memset(lane_grads, 0, size_t(vectors) * sizeof(G));
                              repel_gradient<G, DIM>(repulsion, K, arrays.dimension, deformed, lane_grads);
                              for (int64_t l = 0; l < count; ++l) {
                                G* const grad = to.row_of(q + l, scratch);
                                for (int64_t i = 0; i < row; ++i) grad[i] = scale * lane_grads[i * lanes<G> + l];
                                to.add(grad);
                              }
                            }
                          });
}

// Calls call(G(), integral_constant<int, dimension or 0>()).
template <class Call>
Status with_types(const Deformation& args, Call call) {
  const auto with_dimension = [&](auto g) {
    if (args.kernel_points.cols == 2) return call(g, std::integral_constant<int, 2>());
    if (args.kernel_points.cols == 3) return call(g, std::integral_constant<int, 3>());
    return call(g, std::integral_constant<int, 0>());
  };
  return with_real(args.kernel_points.dtype, with_dimension);
}

}  // namespace

Status fitting_loss(const Deformation& args) {
  return with_types(args, [&](auto g, auto dim) { return fitting<decltype(g), decltype(dim)::value>(args); });
}

Status fitting_loss_grad(const Deformation& args) {
  return with_types(args, [&](auto g, auto dim) { return fitting_gradient<decltype(g), decltype(dim)::value>(args); });
}

Status repulsion_loss(const Deformation& args) {
  return with_types(args, [&](auto g, auto dim) { return repelling<decltype(g), decltype(dim)::value>(args); });
}

Status repulsion_loss_grad(const Deformation& args) {
  return with_types(args,
                    [&](auto g, auto dim) { return repelling_gradient<decltype(g), decltype(dim)::value>(args); });
}

}  // namespace KP_ISA
}  // namespace kp
