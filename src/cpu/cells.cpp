// Finds the cells of a filter that the neighbors of a query act on, a vector of neighbors at a time: see cells.h.

#include "cells.h"

#include "parallel.h"

namespace kp {
namespace KP_ISA {
namespace {

// The neighbors of a query: their relative positions and the inverse of half their extents, by axis.
template <class G>
struct alignas(64) Relative {
  G position[3][cell_chunk], inverse[3][cell_chunk];

  Relative(const CellGeometry<G>& geometry, int64_t q, int64_t begin, int64_t n) {
    const G* const center = geometry.queries + q * 3;
    const int32_t* const index = geometry.index + begin;
    const G sign = geometry.reversed ? G(-1) : G(1);
    const bool each = geometry.reversed && geometry.extent_rows > 1;
    const G* const extents = geometry.extents + (geometry.extent_rows > 1 && !each ? q * geometry.extent_axes : 0);
    const int64_t padded = (n + lanes<G> - 1) / lanes<G> * lanes<G>;
    for (int64_t i = 0; i < n; ++i) {
      const G* const x = geometry.points + int64_t(index[i]) * 3;
      for (int a = 0; a < 3; ++a) position[a][i] = sign * (x[a] - center[a]);
    }
    for (int a = 0; a < 3; ++a) {
      const int axis = geometry.extent_axes > 1 ? a : 0;
      for (int64_t i = n; i < padded; ++i) position[a][i] = 0;
      for (int64_t i = 0; i < padded; ++i) inverse[a][i] = 2 / extents[axis];
      for (int64_t i = 0; each && i < n; ++i)
        inverse[a][i] = 2 / geometry.extents[int64_t(index[i]) * geometry.extent_axes + axis];
    }
  }
};

template <class G>
void find(const CellGeometry<G>& geometry, int64_t q, int64_t begin, int64_t n, int32_t* cells, G* weights) {
  const Relative<G> relative(geometry, q, begin, n);
  const Filter<G> filter(geometry.options, geometry.offset);
  const int corners = filter.corners();
  for (int64_t i = 0; i < n; i += lanes<G>) {
    Vec<G> p[3];
    for (int a = 0; a < 3; ++a) p[a] = load(&relative.position[a][i]) * load(&relative.inverse[a][i]);
    const Location<G, Vec<G>> at(filter, p);
    const auto cell = to_integers<G>(at.lowest(filter));
    memcpy(cells + i, &cell, sizeof(cell));
    for (int j = 0; j < corners; ++j) store(&weights[j * cell_chunk + i], at.corner(filter.bits(j)));
  }
}

template <class G>
void find_grads(const CellGeometry<G>& geometry, int64_t q, int64_t begin, int64_t n, const G* weight_grads,
                G* position_grads, G* extent_grads) {
  const Relative<G> relative(geometry, q, begin, n);
  const Filter<G> filter(geometry.options, geometry.offset);
  const int corners = filter.corners();
  for (int64_t i = 0; i < n; i += lanes<G>) {
    Vec<G> p[3], mapped[3], grad[3] = {};
    for (int a = 0; a < 3; ++a) mapped[a] = p[a] = load(&relative.position[a][i]) * load(&relative.inverse[a][i]);
    const Location<G, Vec<G>> at(filter, mapped);
    for (int j = 0; j < corners; ++j) at.add_slopes(filter.bits(j), load(&weight_grads[j * cell_chunk + i]), grad);
    Location<G, Vec<G>>::pull_back(filter, p, grad);
    for (int a = 0; a < 3; ++a) {
      const Vec<G> inverse = load(&relative.inverse[a][i]);
      store(&position_grads[a * cell_chunk + i], grad[a] * inverse);
      store(&extent_grads[a * cell_chunk + i], -grad[a] * p[a] * inverse * G(0.5));  // p = 2 x / extent
    }
  }
}

}  // namespace

void find_cells(const CellGeometry<float>& geometry, int64_t q, int64_t begin, int64_t n, int32_t* cells,
                float* weights) {
  find(geometry, q, begin, n, cells, weights);
}
void find_cells(const CellGeometry<double>& geometry, int64_t q, int64_t begin, int64_t n, int32_t* cells,
                double* weights) {
  find(geometry, q, begin, n, cells, weights);
}
void find_cell_grads(const CellGeometry<float>& geometry, int64_t q, int64_t begin, int64_t n,
                     const float* weight_grads, float* position_grads, float* extent_grads) {
  find_grads(geometry, q, begin, n, weight_grads, position_grads, extent_grads);
}
void find_cell_grads(const CellGeometry<double>& geometry, int64_t q, int64_t begin, int64_t n,
                     const double* weight_grads, double* position_grads, double* extent_grads) {
  find_grads(geometry, q, begin, n, weight_grads, position_grads, extent_grads);
}

}  // namespace KP_ISA
}  // namespace kp
