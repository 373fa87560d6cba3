// Kernel point dispositions by Lloyd's relaxation (Lloyd 1982): a fixed uniform sample of the unit ball is divided
// among the nearest points, each point moves to the mean of its part, and again.
//
// A sample's next point is looked for only near its last one: if it is r from point k, a point nearer to it is less
// than 2 r from k. So a round costs K² distances between points and some tens for each sample, not K.
//
// Only + - * / on float64 in one written order, never contracted: the same bits on every machine. A point's candidates
// and its mean are one thread's own.

#include "formulas/dispositions.h"
#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int max_rounds = 100;  // the published code takes 500 steps of a tenth of the way, with a fresh sample each
constexpr double slack = 1 + 1e-9;  // more than the rounding of three distances
constexpr int64_t sample_size(int64_t num) {
  return 64 * num + (1 << 16);
}

struct Relaxation {
  const KernelPoints& args;
  double* const points;  // (num, dimension)
  int64_t samples;
  Buffer<double> sample;        // (samples, dimension)
  Buffer<double> axes;          // (dimension, num): the points again, side by side
  Buffer<int32_t> owner, next;  // of each sample
  Buffer<int32_t> ids;          // samples by owner, in order
  Buffer<int64_t> begin;        // of each point's, and the end

  explicit Relaxation(const KernelPoints& a, double* out) : args(a), points(out), samples(sample_size(a.num)) {}

  bool allocate() {
    return sample.resize(samples * args.dimension) && axes.resize(int64_t(args.num) * args.dimension) &&
           owner.resize(samples) && next.resize(samples) && ids.resize(samples) && begin.resize(args.num + 2);
  }

  void start() {
    uint64_t stream = stream_of(args.seed, 0);
    for (int i = 0; i < args.num; ++i) {
      draw(stream, 1, args.dimension, points + int64_t(i) * args.dimension, 1);
      if (i < args.fixed) place_held(i, args.dimension, points + int64_t(i) * args.dimension, 1);
    }
    // Whoever owns them first is too far away to spare a candidate: the first round looks at all, on all threads.
    for (int64_t s = 0; s < samples; ++s) {
      draw(stream, 1, args.dimension, &sample[s * args.dimension], 1);
      owner[s] = int32_t(s % args.num);
    }
  }

  void group() {
    memset(begin.data(), 0, size_t(args.num + 2) * sizeof(int64_t));
    for (int64_t s = 0; s < samples; ++s) ++begin[owner[s] + 2];
    for (int k = 0; k < args.num; ++k) begin[k + 2] += begin[k + 1];
    for (int64_t s = 0; s < samples; ++s) ids[begin[owner[s] + 1]++] = int32_t(s);
  }

  // Squared distances of n points, given axis by axis, from one.
  void distances(const double* from_axes, int64_t stride, int64_t n, const double* p, double* squared) const {
    for (int64_t j = 0; j < n; ++j) squared[j] = 0;
    for (int a = 0; a < args.dimension; ++a) {
      const double* const x = from_axes + a * stride;
      const double at = p[a];
      for (int64_t j = 0; j < n; ++j) squared[j] += (x[j] - at) * (x[j] - at);
    }
  }

  // Finds the nearest point, the first of equals, for the samples of point k. `squared` (num) and `near` (dimension,
  // num) are scratch, like `candidates`.
  void divide(int k, double* squared, double* near, int32_t* candidates) {
    const double* const p = points + int64_t(k) * args.dimension;
    double farthest = 0;
    for (int64_t i = begin[k]; i < begin[k + 1]; ++i) {
      double d;
      distances(&sample[ids[i] * int64_t(args.dimension)], 1, 1, p, &d);
      farthest = larger(farthest, d);
    }
    distances(axes.data(), args.num, args.num, p, squared);
    int64_t count = 0;
    for (int j = 0; j < args.num; ++j)
      if (squared[j] <= 4 * slack * farthest) candidates[count++] = j;
    for (int a = 0; a < args.dimension; ++a)
      for (int64_t c = 0; c < count; ++c) near[int64_t(a) * args.num + c] = axes[int64_t(a) * args.num + candidates[c]];
    for (int64_t i = begin[k]; i < begin[k + 1]; ++i) {
      distances(near, args.num, count, &sample[ids[i] * int64_t(args.dimension)], squared);
      int64_t best = 0;
      for (int64_t c = 1; c < count; ++c)
        if (squared[c] < squared[best]) best = c;
      next[ids[i]] = candidates[best];
    }
  }

  // To the mean of its samples; without any it stays. Held points keep to the center and to the last axis.
  void move(int k) {
    const int64_t n = begin[k + 1] - begin[k];
    double* const p = points + int64_t(k) * args.dimension;
    for (int a = 0; n && a < args.dimension; ++a) {
      if (k < args.fixed && (!k || a < args.dimension - 1)) continue;
      double sum = 0;
      for (int64_t i = begin[k]; i < begin[k + 1]; ++i) sum += sample[ids[i] * int64_t(args.dimension) + a];
      p[a] = sum / double(n);
    }
  }

  // False: no memory. `settled`: no sample changed hands.
  bool round(bool& settled) {
    for (int k = 0; k < args.num; ++k)
      for (int a = 0; a < args.dimension; ++a)
        axes[int64_t(a) * args.num + k] = points[int64_t(k) * args.dimension + a];
    bool enough = true;
#pragma omp parallel num_threads(args.threads) reduction(&& : enough)
    {
      Buffer<double> squared, near;
      Buffer<int32_t> candidates;
      enough =
          squared.resize(args.num) && near.resize(int64_t(args.num) * args.dimension) && candidates.resize(args.num);
#pragma omp for schedule(dynamic, 4)
      for (int k = 0; k < args.num; ++k)
        if (enough) divide(k, squared.data(), near.data(), candidates.data());
    }
    if (!enough) return false;
    settled = memcmp(owner.data(), next.data(), size_t(samples) * sizeof(int32_t)) == 0;
    owner.swap(next);
    group();
#pragma omp parallel for num_threads(args.threads) schedule(static)
    for (int k = 0; k < args.num; ++k) move(k);
    return true;
  }
};

}  // namespace

Status lloyd(const KernelPoints& args) {
  auto* const out = into<double>(args.out);
  Relaxation relaxation(args, out);
  if (!relaxation.allocate()) return Status::out_of_memory;
  relaxation.start();
  relaxation.group();
  bool settled = false;
  for (int i = 0; i < max_rounds && !settled; ++i)
    if (!relaxation.round(settled)) return Status::out_of_memory;
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
