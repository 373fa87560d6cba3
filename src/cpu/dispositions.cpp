// Kernel point dispositions by the published potential method (Thomas et al. 2019, supplementary B, with the constants
// of the published code). Points repel each other with potential 1 / d and are attracted to the origin with 5 d²;
// gradient descent minimizes the potential with a decaying, clipped step. On shells (KPConvX, Thomas et al. 2024) there
// is no attraction: points move tangentially to their sphere and are projected back onto it. A hundred random
// candidates descend; the one with the smallest final gradient is kept.
//
// The result is the same bits on every machine: only + - * / sqrt in float64 without contraction, and an integer random
// generator. Each lane of a vector holds one candidate. Candidates interact only through the common stop, so neither
// the vector width nor the number of threads changes the result.

#include "formulas/dispositions.h"

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace kp {
namespace KP_ISA {
namespace {

constexpr int candidates = 100, group = lanes<double>, groups = (candidates + group - 1) / group;
constexpr int max_steps = 10000, round_steps = 250;
constexpr double first_rate = 1e-2, decay = 0.9995, longest_step = 0.05, softening = 1e-6, attraction = 10;
constexpr double at_rest = 1e-5;  // converged: no gradient norm changes by more from one step to the next

// A group of candidates: positions, gradients and gradient norms, each (num, dimension, lane).
struct Group {
  double *position, *gradient, *norm;
};

struct Descent {
  int num, dimension, fixed;
  const double* radii;  // of the points' shells; null without shells

  int64_t point_size() const { return int64_t(dimension) * group; }

  void gradient(const Group& g) const {
    const double pull = radii ? 0 : attraction;
    for (int64_t i = 0; i < num * point_size(); ++i) g.gradient[i] = pull * g.position[i];
    for (int i = 0; i < num; ++i)
      for (int j = i + 1; j < num; ++j) {
        const double *const p = g.position + i * point_size(), *const q = g.position + j * point_size();
        double *const gp = g.gradient + i * point_size(), *const gq = g.gradient + j * point_size();
        Vec<double> d2 = {};
        for (int a = 0; a < dimension; ++a) {
          const Vec<double> d = load(q + a * group) - load(p + a * group);
          d2 = d2 + d * d;
        }
        const Vec<double> inverse = 1 / (d2 * sqrt(d2) + softening);
        for (int a = 0; a < dimension; ++a) {
          const Vec<double> force = (load(q + a * group) - load(p + a * group)) * inverse;
          store(gp + a * group, load(gp + a * group) + force);
          store(gq + a * group, load(gq + a * group) - force);
        }
      }
    // Points held on the last axis move along it only.
    for (int i = 1; i < fixed; ++i)
      memset(g.gradient + i * point_size(), 0, size_t(point_size() - group) * sizeof(double));
    for (int i = 1; radii && i < num; ++i) project(g.position + i * point_size(), g.gradient + i * point_size());
  }

  Vec<double> dot(const double* p, const double* q) const {
    Vec<double> sum = {};
    for (int a = 0; a < dimension; ++a) sum = sum + load(p + a * group) * load(q + a * group);
    return sum;
  }

  // Keeps the part of the gradient f that is tangential to the sphere through p.
  void project(const double* p, double* f) const {
    const Vec<double> along = dot(p, f) / dot(p, p);
    for (int a = 0; a < dimension; ++a) store(f + a * group, load(f + a * group) - along * load(p + a * group));
  }

  // Projects the points back onto their shells.
  void project_to_shells(const Group& g) const {
    for (int i = 1; radii && i < num; ++i) {
      double* const p = g.position + i * point_size();
      const Vec<double> scale = broadcast(radii[i]) / sqrt(dot(p, p));
      for (int a = 0; a < dimension; ++a) store(p + a * group, load(p + a * group) * scale);
    }
  }

  // One step; returns the largest change of a gradient norm among the free points. Points held on the last axis are not
  // waited for, as in the published code.
  double step(const Group& g, double rate) const {
    gradient(g);
    Vec<double> change = {};
    for (int i = fixed ? 1 : 0; i < num; ++i) {
      double *const p = g.position + i * point_size(), *const f = g.gradient + i * point_size();
      const Vec<double> norm = sqrt(dot(f, f)), difference = norm - load(g.norm + i * group);
      if (i >= fixed) change = max(change, max(difference, -difference));
      store(g.norm + i * group, norm);
      const Vec<double> length = min(rate * norm, broadcast(longest_step)), scale = length / (norm + softening);
      for (int a = 0; a < dimension; ++a) store(p + a * group, load(p + a * group) - load(f + a * group) * scale);
    }
    project_to_shells(g);
    double largest = 0;
    for (int l = 0; l < group; ++l) largest = larger(largest, change[l]);
    return largest;
  }
};

}  // namespace

Status kernel_points(const KernelPoints& args) {
  auto* const out = into<double>(args.out);
  const Descent descent{args.num, args.dimension, args.fixed, as<double>(args.radii)};
  const int64_t size = args.num * descent.point_size(), norms = int64_t(args.num) * group, all = 2 * size + norms;
  Buffer<double> state, saved, changes;
  if (!state.resize(groups * all) || !saved.resize(groups * all) || !changes.resize(groups * round_steps))
    return Status::out_of_memory;
  memset(state.data(), 0, size_t(groups * all) * sizeof(double));
  const auto of_group = [&](int g) {
    double* const at = state.data() + g * all;
    return Group{at, at + size, at + 2 * size};
  };

  // Every candidate has its own random stream, so that the vector width does not matter.
  for (int c = 0; c < groups * group; ++c) {
    uint64_t stream = stream_of(args.seed, uint64_t(c % candidates));
    double* const position = of_group(c / group).position + c % group;
    for (int i = 0; i < args.num; ++i) {
      double* const p = position + i * descent.point_size();
      draw(stream, 0.5, args.dimension, p, group);
      if (i < args.fixed) place_held(i, args.dimension, p, group);
    }
  }
  for (int g = 0; g < groups; ++g) descent.project_to_shells(of_group(g));

  // All candidates stop at the first step at which none changes any more. Threads advance their groups by rounds of 250
  // steps, after which convergence is checked for every step. The last round is repeated up to the step that converged.
  double rate = first_rate;
  for (int done = 0; done < max_steps; done += round_steps) {
    memcpy(saved.data(), state.data(), size_t(groups * all) * sizeof(double));
    int steps = round_steps;
    const auto run_steps = [&](int count) {
#pragma omp parallel for num_threads(smaller(args.threads, groups)) schedule(static)
      for (int g = 0; g < groups; ++g) {
        double r = rate;
        for (int s = 0; s < count; ++s, r *= decay) changes[g * round_steps + s] = descent.step(of_group(g), r);
      }
    };
    run_steps(steps);
    bool converged = false;
    for (int s = 0; s < round_steps && !converged; ++s) {
      double largest = 0;
      for (int g = 0; g < groups; ++g) largest = larger(largest, changes[g * round_steps + s]);
      converged = largest < at_rest;
      if (converged) steps = s + 1;
    }
    if (converged) {
      memcpy(state.data(), saved.data(), size_t(groups * all) * sizeof(double));
      run_steps(steps);
      break;
    }
    for (int s = 0; s < steps; ++s) rate *= decay;
  }

  int best = 0;
  double smallest = INFINITY;
  for (int c = 0; c < candidates; ++c) {
    double largest = 0;
    const double* const norm = of_group(c / group).norm + c % group;
    for (int i = args.fixed ? 1 : 0; i < args.num; ++i) largest = larger(largest, norm[i * group]);
    if (largest < smallest) smallest = largest, best = c;
  }
  const double* const position = of_group(best / group).position + best % group;
  for (int64_t i = 0; i < int64_t(args.num) * args.dimension; ++i) out[i] = position[i * group];
  return Status::ok;
}

}  // namespace KP_ISA
}  // namespace kp
