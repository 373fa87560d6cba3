// Kernel point dispositions by Lloyd's relaxation (Lloyd 1982): every sample of a fixed uniform sample of the unit ball
// is assigned to its nearest kernel point, each point moves to the mean of its samples, and so on until no assignment
// changes.
//
// A sample's nearest point is searched only around its previous one: if that is point k at distance r, a nearer point
// is less than 2 r from k. A round costs K² distances between points and some tens for each sample instead of K.
//
// The result is the same bits on every machine and for any number of threads: only + - * / in float64, in a fixed order
// and without contraction; the samples of a point are handled by one thread.

#include "formulas/dispositions.h"
#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int max_rounds = 100;     // the published code takes 500 steps, each a tenth of the way and with a new sample
constexpr double slack = 1 + 1e-9;  // exceeds the rounding error of three distances
constexpr int64_t sample_size(int64_t num) {
  return 64 * num + (1 << 16);
}

struct Relaxation {
  const KernelPoints& args;
  double* const points;  // (num, dimension)
  int64_t samples;
  Buffer<double> sample;        // (samples, dimension)
  Buffer<double> axes;          // (dimension, num): the points again, by axis
  Buffer<int32_t> owner, next;  // nearest point of each sample, in the last round and in this one
  Buffer<int32_t> ids;          // samples ordered by owner
  Buffer<int64_t> begin;        // where each point's samples begin, and a sentinel

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
    // Arbitrary first owners, too far away to exclude any candidate: the first round compares all points.
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

  // Squared distances of n points, stored by axis, from point p.
  void distances(const double* from_axes, int64_t stride, int64_t n, const double* p, double* squared) const {
    for (int64_t j = 0; j < n; ++j) squared[j] = 0;
    for (int a = 0; a < args.dimension; ++a) {
      const double* const x = from_axes + a * stride;
      const double at = p[a];
      for (int64_t j = 0; j < n; ++j) squared[j] += (x[j] - at) * (x[j] - at);
    }
  }

  // Finds the nearest point, of equally near ones the first, for the samples of point k. squared (num), near
  // (dimension, num) and candidates (num) are scratch.
  void assign(int k, double* squared, double* near, int32_t* candidates) {
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

  // Moves point k to the mean of its samples, if it has any. Held points stay at the center or on the last axis.
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

  // Returns false if memory runs out. `settled` becomes true if no assignment changed.
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
        if (enough) assign(k, squared.data(), near.data(), candidates.data());
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
