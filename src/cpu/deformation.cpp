// What keeps the deformed kernel points p_qk = p_k + o_qk of the queries in order: two losses and their gradients.
//
//   fitting   = sum over q and k of min over neighbors i of q of |x_i - x_q - p_qk|² / extent²
//   repulsion = sum over q, k and j != k of min(0, |p_qk - p_qj| / extent - repulse_extent)²     (Thomas et al. 2019)
//
// The nearest neighbors of a query's kernel points are found with a kernel point in each lane: they stay in registers
// with the least distance so far while the neighbors pass, so no array over neighbors and kernel points is made. The
// repulsion of pairs has a query in each lane, and each pair once.
//
// Sums are float64 over blocks of queries, which do not depend on the number of threads, and then over the blocks in
// their order. Nothing is fused, so losses and gradients are the same bits with every instruction set too.

#include "formulas/deformation.h"

#include "kernels.h"
#include "formulas/neighbors.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t most_blocks = 256;
constexpr int64_t least_queries = 256;  // in a block, of which all but the last have whole vectors of queries

template <class G>
struct Problem {
  const G *points, *queries;
  const int32_t* index;
  const int64_t* row_splits;
  const G *kernel_points, *offsets;
  int dimension;
  int64_t num_kernels, num_queries;

  explicit Problem(const Deformation& args)
      : points(as<G>(args.points)),
        queries(as<G>(args.queries)),
        index(as<int32_t>(args.index)),
        row_splits(as<int64_t>(args.row_splits)),
        kernel_points(as<G>(args.kernel_points)),
        offsets(as<G>(args.offsets)),
        dimension(int(args.kernel_points.cols)),
        num_kernels(args.kernel_points.rows),
        num_queries(args.offsets.rows / args.kernel_points.rows) {}

  int64_t row() const { return num_kernels * dimension; }  // of offsets
};

// One thread's scratch memory, zero at first.
template <class G>
struct Scratch {
  Buffer<G> values;
  bool enough;
  explicit Scratch(int64_t size) : enough(values.resize(size)) {
    if (enough) memset(values.data(), 0, size_t(size) * sizeof(G));
  }
};

// Calls visit(scratch, first query, end, sums) for every block of queries. Each has `width` sums, which are then added
// up by block into the first ones. Threads get `size` numbers of scratch memory each.
template <class G, class Visit>
Status for_each_block(int64_t queries, int64_t width, int64_t size, int threads, Buffer<double>& sums, Visit visit) {
  const int64_t block = larger(least_queries, (queries / most_blocks + 64) / 64 * 64);
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

// Adds the lanes to as many float64 sums.
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

// A query's nearest neighbor of every kernel point, the first of equals, and the squared distances added to `sums`.
// `deformed` holds the kernel points by axis, `stride` each, a multiple of the lanes.
template <class G, int DIM>
void fit(const Problem<G>& problem, int64_t q, const G* deformed, int64_t stride, int32_t* nearest, double* sums) {
  const int D = DIM ? DIM : problem.dimension;
  constexpr int stored = DIM ? DIM : max_dimension;
  const int64_t K = problem.num_kernels;
  const int32_t* const row = problem.index + problem.row_splits[q];
  const int64_t n = problem.row_splits[q + 1] - problem.row_splits[q];
  if (!n) {
    for (int64_t k = 0; k < K; ++k) nearest[k] = -1;
    return;
  }
  // Read back where the compiler cannot know it is one number: or it subtracts first and broadcasts then, which is
  // three more instructions a neighbor and a tenth of the time.
  alignas(64) G lanes_of_query[stored * lanes<G>];
  for (int a = 0; a < D; ++a) store(lanes_of_query + a * lanes<G>, broadcast(problem.queries[q * D + a]));
  const G* read = lanes_of_query;
  asm("" : "+r"(read) : : "memory");
  Vec<G> center[stored], p[stored];
  for (int a = 0; a < D; ++a) center[a] = load(read + a * lanes<G>);
  for (int64_t k = 0; k < K; k += lanes<G>) {
    for (int a = 0; a < D; ++a) p[a] = load(deformed + a * stride + k);
    const auto squared = [&](int32_t i) {
      const G* const x = problem.points + int64_t(i) * D;
      Vec<G> d[stored];
      for (int a = 0; a < D; ++a) d[a] = from_neighbor(broadcast(x[a]), center[a], p[a]);
      return squared_distance(d, D);
    };
    Vec<G> least = squared(row[0]), all = least;
    Vec<IndexBeside<G>> which = broadcast(IndexBeside<G>(row[0]));
    for (int64_t e = 1; e < n; ++e) {
      const Vec<G> d2 = squared(row[e]);
      which = d2 < least ? broadcast(IndexBeside<G>(row[e])) : which;
      least = min(d2, least);
      all += d2;
    }
    // A minimum passes over NaN, a sum does not; no other sum of squares is one.
    least = all == all ? least : all;
    add_lanes<G>(sums + k, least);
    const int count = int(smaller<int64_t>(lanes<G>, K - k));
    if constexpr (sizeof(G) == 4)
      store_first(nearest + k, count, which);
    else
      for (int l = 0; l < count; ++l) nearest[k + l] = int32_t(which[l]);
  }
}

// A query's deformed kernel points by axis.
template <class G, int DIM>
void deform(const Problem<G>& problem, int64_t q, int64_t stride, G* deformed) {
  const int D = DIM ? DIM : problem.dimension;
  const G* const offsets = problem.offsets + q * problem.row();
  for (int64_t k = 0; k < problem.num_kernels; ++k)
    for (int a = 0; a < D; ++a) deformed[a * stride + k] = problem.kernel_points[k * D + a] + offsets[k * D + a];
}

template <class G, int DIM>
Status fitting(const Deformation& args) {
  const Array &loss = args.loss, &nearest = args.nearest;
  const Problem<G> problem(args);
  const int64_t K = problem.num_kernels, stride = (K + lanes<G> - 1) / lanes<G> * lanes<G>;
  const int64_t pairs = problem.row_splits[problem.num_queries];
  auto* const to = into<int32_t>(nearest);
  Buffer<double> sums;
  const Status status = for_each_block<G>(problem.num_queries, stride, problem.dimension * stride,
                                          useful_threads(args.threads, pairs * K, 1 << 17), sums,
                                          [=, &problem](G* deformed, int64_t begin, int64_t end, double* block_sums) {
                                            for (int64_t q = begin; q < end; ++q) {
                                              deform<G, DIM>(problem, q, stride, deformed);
                                              fit<G, DIM>(problem, q, deformed, stride, to + q * K, block_sums);
                                            }
                                          });
  if (status != Status::ok) return status;
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += sums[k];
  *into<G>(loss) = G(sum * (args.weight / (args.extent * args.extent)));
  return Status::ok;
}

// Where the gradients of a block go. That of a query's deformed kernel points is that of its offsets, and their sum
// over all queries that of the kernel points.
template <class G>
struct BlockGrads {
  G* offsets;             // of all queries; null: not wanted
  double* kernel_points;  // the block's sums; null: not wanted
  int64_t row;

  G* place(int64_t q, G* scratch) const { return offsets ? offsets + q * row : scratch; }
  void add(const G* of_query) const {
    if (!kernel_points) return;
    for (int64_t i = 0; i < row; ++i) kernel_points[i] += double(of_query[i]);
  }
};

// The weight of one term of the sum in the backward pass.
template <class G>
double gradient_weight(const Deformation& args) {
  return args.weight * double(*as<G>(args.grad_out));
}

// Calls visit(scratch, first query, end, where to) for every block of queries.
template <class G, class Visit>
Status differentiate(const Problem<G>& problem, int64_t size, int threads, const Deformation& args, Visit visit) {
  const int64_t row = problem.row();
  auto* const offsets = into<G>(args.grad_offsets);
  auto* const kernel_points = into<G>(args.grad_kernel_points);
  Buffer<double> sums;
  const Status status =
      for_each_block<G>(problem.num_queries, kernel_points ? row : 0, size, threads, sums,
                        [=](G* scratch, int64_t begin, int64_t end, double* block_sums) {
                          visit(scratch, begin, end, BlockGrads<G>{offsets, kernel_points ? block_sums : nullptr, row});
                        });
  for (int64_t i = 0; status == Status::ok && kernel_points && i < row; ++i) kernel_points[i] = G(sums[i]);
  return status;
}

template <class G, int DIM>
void fit_gradient(const Problem<G>& problem, int64_t q, const int32_t* nearest, G scale, G* grad) {
  const int D = DIM ? DIM : problem.dimension;
  const int64_t K = problem.num_kernels;
  const G* const offsets = problem.offsets + q * K * D;
  if (nearest[0] < 0) {
    memset(grad, 0, size_t(K * D) * sizeof(G));
    return;
  }
  for (int64_t k = 0; k < K; ++k)
    for (int a = 0; a < D; ++a) {
      const G deformed = problem.kernel_points[k * D + a] + offsets[k * D + a];
      const G x = problem.points[int64_t(nearest[k]) * D + a];
      grad[k * D + a] = scale * from_neighbor(x, problem.queries[q * D + a], deformed);
    }
}

template <class G, int DIM>
Status fitting_gradient(const Deformation& args) {
  const Array& nearest = args.nearest;
  const Problem<G> problem(args);
  const int64_t K = problem.num_kernels;
  const auto* of_all = as<int32_t>(nearest);
  const G scale = G(2 * gradient_weight<G>(args) / (args.extent * args.extent));
  return differentiate<G>(problem, problem.row(), useful_threads(args.threads, problem.num_queries * K, 1 << 14), args,
                          [=, &problem](G* scratch, int64_t begin, int64_t end, const BlockGrads<G>& to) {
                            for (int64_t q = begin; q < end; ++q) {
                              G* const grad = to.place(q, scratch);
                              fit_gradient<G, DIM>(problem, q, of_all + q * K, scale, grad);
                              to.add(grad);
                            }
                          });
}

// The deformed kernel points of some queries, a query in each lane: (K, D) vectors.
template <class G>
void deform_across(const Problem<G>& problem, int64_t first, int64_t count, G* deformed) {
  const int64_t row = problem.row();
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < row; ++i)
      deformed[i * lanes<G> + l] = problem.kernel_points[i] + problem.offsets[(first + l) * row + i];
}

template <class G>
struct Repulsion {
  Vec<G> inverse_extent, repulse_extent;
  explicit Repulsion(const Deformation& args)
      : inverse_extent(broadcast(1 / G(args.extent))), repulse_extent(broadcast(G(args.repulse_extent))) {}
};

// The repulsion of every pair in each lane, added to `sums` in float64 kernel point by kernel point.
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
      const Vec<G> under = overlap(sqrt(squared_distance(d, D)), repulsion.inverse_extent, repulsion.repulse_extent);
      sum += under * under;
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
  const Problem<G> problem(args);
  const Repulsion<G> repulsion(args);
  const int64_t K = problem.num_kernels;
  Buffer<double> sum;
  const Status status = for_each_block<G>(
      problem.num_queries, 1, problem.row() * lanes<G>, repulsion_threads(args, problem.num_queries, K), sum,
      [=, &problem, &repulsion](G* deformed, int64_t begin, int64_t end, double* block_sum) {
        for (int64_t q = begin; q < end; q += lanes<G>) {
          const int64_t count = smaller<int64_t>(lanes<G>, end - q);
          double sums[lanes<G>] = {};
          deform_across(problem, q, count, deformed);
          repel<G, DIM>(repulsion, K, problem.dimension, deformed, sums);
          for (int64_t l = 0; l < count; ++l) *block_sum += sums[l];
        }
      });
  if (status != Status::ok) return status;
  *into<G>(loss) = G(2 * args.weight * sum[0]);  // of each pair both
  return Status::ok;
}

// The gradient of the sum over k and j != k by the kernel points k alone, in each lane; `grad` is zero.
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
        const Vec<G> by = slope * d[a];
        sum[a] += by;
        store(other, load(other) - by);
      }
    }
    for (int a = 0; a < D; ++a) store(grad + (k * D + a) * lanes<G>, sum[a]);
  }
}

template <class G, int DIM>
Status repelling_gradient(const Deformation& args) {
  const Problem<G> problem(args);
  const Repulsion<G> repulsion(args);
  const int64_t K = problem.num_kernels, row = problem.row(), vectors = row * lanes<G>;
  const G scale = G(gradient_weight<G>(args));
  return differentiate<G>(problem, 2 * vectors + row, repulsion_threads(args, problem.num_queries, K), args,
                          [=, &problem, &repulsion](G* deformed, int64_t begin, int64_t end, const BlockGrads<G>& to) {
                            G *const across = deformed + vectors, *const scratch = across + vectors;
                            for (int64_t q = begin; q < end; q += lanes<G>) {
                              const int64_t count = smaller<int64_t>(lanes<G>, end - q);
                              deform_across(problem, q, count, deformed);
                              memset(across, 0, size_t(vectors) * sizeof(G));
                              repel_gradient<G, DIM>(repulsion, K, problem.dimension, deformed, across);
                              for (int64_t l = 0; l < count; ++l) {
                                G* const grad = to.place(q + l, scratch);
                                for (int64_t i = 0; i < row; ++i) grad[i] = scale * across[i * lanes<G> + l];
                                to.add(grad);
                              }
                            }
                          });
}

// Calls f(geometry type, dimension or 0 for any).
template <class Call>
Status with_types(const Deformation& args, Call call) {
  const auto of_dimension = [&](auto g) {
    if (args.kernel_points.cols == 2) return call(g, std::integral_constant<int, 2>());
    if (args.kernel_points.cols == 3) return call(g, std::integral_constant<int, 3>());
    return call(g, std::integral_constant<int, 0>());
  };
  return with_real(args.kernel_points.dtype, of_dimension);
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
