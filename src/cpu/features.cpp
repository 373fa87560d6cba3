// Features of the local surface: a plane through the neighbors of each query. No array over pairs is allocated.

#include "formulas/features.h"

#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int64_t grain = 1 << 10;      // pairs that keep a thread busy for some 20 us
constexpr int64_t pairs_of_a_fit = 40;  // that take the time of the eigenvectors

template <class T>
void fit(const FitPlanes& args) {
  const auto *points = as<T>(args.points), *queries = as<T>(args.queries), *viewpoints = as<T>(args.viewpoints);
  const auto* index = as<int32_t>(args.index);
  const auto* splits = as<int64_t>(args.row_splits);
  auto *normals = into<T>(args.normals), *eigenvalues = into<T>(args.eigenvalues);
  const int64_t m = args.queries.rows, step = args.viewpoints.rows == 1 ? 0 : 3;
  const int threads = useful_threads(args.threads, splits[m] + m * pairs_of_a_fit, grain);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t q = 0; q < m; ++q)
    fit_plane(points, queries + q * 3, index + splits[q], splits[q + 1] - splits[q],
              viewpoints ? viewpoints + q * step : nullptr, normals ? normals + q * 3 : nullptr,
              eigenvalues ? eigenvalues + q * 3 : nullptr);
}

}  // namespace

Status fit_planes(const FitPlanes& args) {
  with_real(args.points.dtype, [&](auto real) { fit<decltype(real)>(args); });
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
