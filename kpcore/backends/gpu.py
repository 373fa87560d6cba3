"""The GPU: the names and signatures of `cpu`, on CuPy arrays.

Kernels are the files in cuda/, plain CUDA C++ that shares its formulas with the CPU. A kernel is compiled by CuPy when
it is first launched, for the types at hand, and kept on disk. Everything here is launches on CuPy's current stream;
what waits for the device says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cupy
import numpy as np

_SOURCES = Path(__file__).with_name("sources")
if not _SOURCES.is_dir():  # of an editable install
    _SOURCES = Path(__file__).parents[2] / "src"
_BLOCK = 128
_BLOCK_OF_ROWS = 1024  # of launch.h
_MOST_BLOCKS = 1 << 15  # kernels go on to the next query themselves
_WARP = 32
_FLOAT = np.dtype(np.float32)
_CTYPES = {"float32": "float", "float64": "double", "float16": "kp::Half", "bfloat16": "kp::Bfloat"}


class NotFinite(Exception):
    """Coordinates that are NaN or infinite, or whose distances overflow or vanish."""


class OutOfRange(Exception):
    """More voxels along an axis than their keys can number, or a list with a number out of range."""


# ---- kernels


def source(name, seen=None):
    """A file with what it includes, once each: CuPy's cache looks at the text alone.

    Headers of the system, and those that only the CPU has, are left out.
    """
    seen, of_the_cpu = {name} if seen is None else seen, False
    folder = "" if "/" in name else "cuda/"
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((_SOURCES / (folder + name)).read_text().splitlines(), 1):
        of_the_cpu = line.startswith("#ifndef __CUDACC__") or (of_the_cpu and not line.startswith(("#endif", "#else")))
        if of_the_cpu and line.startswith("#include"):
            lines.append("")
        elif line.startswith('#include "'):
            included = line.split('"')[1]
            if "/" not in included and "/" in name:
                included = f"{name.split('/')[0]}/{included}"
            if included not in seen:
                seen.add(included)
                lines += [source(included, seen), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if line.startswith(("#include <", "#pragma once")) else line)
    return "\n".join(lines)


@functools.cache
def _module(name, defines):
    # Not contracted: what decides is to be the same bits as on the CPU.
    options = ("-std=c++17", "--fmad=false", *(f"-D{key}={value}" for key, value in defines))
    return cupy.RawModule(code=source(name), options=options)


@functools.cache
def _kernel(module, name):
    return module.get_function(name)


@functools.cache
def _ctype(dtype):
    return _CTYPES[dtype.name]


def _launch(module, name, threads, *arguments):
    """A kernel for so many threads, in whole blocks; none at all for no threads."""
    if threads:
        blocks = min(_MOST_BLOCKS, -(-threads // _BLOCK))
        _kernel(module, name)((blocks,), (_BLOCK,), arguments)


def _real(dtype):
    """What numbers of such arrays are computed with, as scalars are passed."""
    return dtype if dtype.itemsize > 2 else _FLOAT


# ---- search


class Index:
    """Points in the order of their cells, or along a curve with boxes: see neighbors.cu. Made when first searched."""

    crowding = 0.0  # of no interest here

    def __init__(self, points, row_splits, cell, threads):
        self.points, self.row_splits, self.cell = points, row_splits, cell
        self.num_points, self.dtype = len(points), points.dtype

    def kernels(self, metric):
        defines = {"KP_T": _ctype(self.dtype), "KP_DIM": self.points.shape[1], "KP_METRIC": metric}
        return _module("neighbors.cu", (*defines.items(), ("KP_TREE", int(self.cell is None))))

    @functools.cached_property
    def tree(self):
        """The same points along a curve."""
        return self if self.cell is None else Index(self.points, self.row_splits, None, None)

    def _located(self, order):
        words = (self.dtype.itemsize * self.points.shape[1] + 4) // 4
        words += words % (self.dtype.itemsize // 4)
        located = cupy.empty((self.num_points, words), np.uint32)
        _launch(self.kernels(0), "locate", self.num_points, self.points, order, np.int64(self.num_points), located)
        return located

    @functools.cached_property
    def _cells(self):
        """(what kernels get of the index, whether a coordinate is not finite)"""
        n, axes = self.num_points, min(3, self.points.shape[1])
        total = max(axes, min(27, int(2 * n - 1).bit_length()))  # bits of a table with a cell or two for each point
        bits = [(total + axes - 1 - a) // axes if a < axes else 0 for a in range(3)]
        settings = np.float64(1 / self.cell), *map(np.int32, bits)
        keys, problems = cupy.empty(n, np.int32), cupy.zeros(1, np.uint32)
        _launch(self.kernels(0), "cell_keys", n, self.points, np.int64(n), *settings, keys, problems)
        order = cupy.argsort(keys)
        num_cells = 1 << sum(bits)
        starts = cupy.empty(num_cells + 1, np.int32)
        _launch(self.kernels(0), "cell_starts", num_cells + 1, keys[order], np.int32(n), np.int32(num_cells), starts)
        return (self._located(order), starts, *settings), problems

    @functools.cached_property
    def _boxes(self):
        """(what kernels get of the index, whether a coordinate is not finite, where a query would lie on the curve)"""
        n, dimension = self.points.shape
        items = len(self.row_splits) - 1
        bits = np.int32(min(21, (63 - items.bit_length()) // min(3, dimension)))
        low, high = cupy.amin(self.points, 0), cupy.amax(self.points, 0)
        keys, problems = cupy.empty(n, np.int64), cupy.zeros(1, np.uint32)
        _launch(self.kernels(0), "curve_keys", n, self.points, np.int64(n), self.row_splits, np.int32(items), low, high,
                bits, keys, problems)  # fmt: skip
        order = cupy.argsort(keys)
        located = self._located(order)
        nodes = [-(-n // _WARP)]
        while nodes[-1] > _WARP:
            nodes.append(-(-nodes[-1] // _WARP))
        boxes = cupy.empty((sum(nodes), 2, dimension), self.dtype)
        _launch(self.kernels(0), "leaf_boxes", nodes[0] * _WARP, located, np.int32(n), boxes)
        first = 0
        for below, number in pairwise(nodes):
            _launch(self.kernels(0), "node_boxes", number * dimension, boxes[first : first + below], np.int32(below),
                    boxes[first + below : first + below + number])  # fmt: skip
            first += below
        return (located, boxes, np.int32(n)), problems, (keys[order], low, high, bits)

    def search(self, queries, queries_row_splits, radius, ignore):
        """(what all kernels of a search begin with, whether a coordinate of the points is not finite)"""
        of_index, problems = (self._boxes if self.cell is None else self._cells)[:2]
        if queries is None:
            queries, queries_row_splits = self.points, self.row_splits
        per_query = isinstance(radius, cupy.ndarray)
        radii = radius if per_query else cupy.full(1, radius, self.dtype)
        return (*of_index, queries, np.int64(len(queries)), radii, np.int64(per_query), self.row_splits,
                queries_row_splits, np.int32(len(queries_row_splits) - 1), np.int32(ignore)), problems  # fmt: skip

    def has_nothing(self, queries):
        """Whether there is nothing to search in; an error if it is searched from somewhere undefined."""
        if self.num_points or queries is None:
            return not self.num_points
        if len(queries) and not bool(cupy.isfinite(queries).all()):
            raise NotFinite
        return True


def _wait(*numbers):
    """Arrays of one number each, on the host: what waits for the device, and so once a call at most."""
    return cupy.concatenate([n.astype(np.int64) for n in numbers]).get().tolist()


def _free_memory():
    return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()


class Search(NamedTuple):
    """The arguments of `radius_search`, but for the threads."""

    index: Index
    queries: cupy.ndarray | None
    queries_row_splits: cupy.ndarray | None
    radius: float | cupy.ndarray
    max_neighbors: int | None
    sort: int
    metric: int
    ignore: int
    return_distances: bool
    count_only: bool
    check_room: Callable

    @property
    def num_queries(self):
        return self.index.num_points if self.queries is None else len(self.queries)

    @property
    def is_unbounded(self):
        return not isinstance(self.radius, cupy.ndarray) and self.radius == math.inf

    def launch(self, index, kernel, *arguments):
        """A warp for each query; returns where a coordinate of the points shows that is not finite."""
        of_all, problems = index.search(self.queries, self.queries_row_splits, self.radius, self.ignore)
        _launch(index.kernels(self.metric), kernel, self.num_queries * _WARP, *of_all, *arguments)
        return problems

    def nothing(self):
        """(row_splits, index, distance) without pairs"""
        return (cupy.zeros(self.num_queries + 1, np.int64), cupy.empty(0, np.int32),
                cupy.empty(0, self.index.dtype) if self.return_distances else None)  # fmt: skip


def radius_search(index, queries, queries_row_splits, radius, max_neighbors, sort, metric, ignore, return_distances,
                  count_only, check_room, threads):  # fmt: skip
    """(row_splits, index, distance); waits once, for the number of pairs; with `max_neighbors` not at all."""
    return radius_searches([Search(index, queries, queries_row_splits, radius, max_neighbors, sort, metric, ignore,
                                   return_distances, count_only, check_room)])[0]  # fmt: skip


def radius_searches(searches):
    """What `radius_search` gives for each of several, waiting once for all."""
    found, counted, of_bounded = [], [], []  # what is wrong with bounded ones is told where others wait
    for place, search in enumerate(searches):
        found.append(None)
        bounded = search.max_neighbors is not None and not search.count_only
        if search.index.has_nothing(search.queries) or (bounded and search.max_neighbors == 0):
            found[place] = search.nothing()
        elif bounded:
            found[place], problems = _nearest_within(search)
            of_bounded += problems
        else:
            counted.append((place, search, *_count(search)))
    if counted:
        numbers = iter(_wait(*of_bounded, *(n for *_, splits, problems in counted for n in (splits[-1:], *problems))))
        if any(next(numbers) for _ in of_bounded):
            raise NotFinite
        for place, search, splits, problems in counted:
            pairs, wrong = next(numbers), [next(numbers) for _ in problems]
            if any(wrong):
                raise NotFinite
            found[place] = (splits, None, None) if search.count_only else _fill(search, splits, pairs)
    return found


def _count(search):
    """(row_splits, whether a coordinate is not finite)"""
    splits, index = cupy.zeros(search.num_queries + 1, np.int64), search.index
    most = np.int64(index.num_points if search.max_neighbors is None else search.max_neighbors)
    of_queries = cupy.zeros(1, np.uint32)
    of_points = search.launch(index, "radius_count", most, splits[1:], of_queries)
    return cupy.cumsum(splits), (of_points, of_queries)


def _fill(search, splits, pairs):
    dtype, measured = search.index.dtype, search.return_distances or search.sort == 2
    search.check_room(pairs, pairs * (4 + search.return_distances * dtype.itemsize), free=_free_memory)
    found, distance = cupy.empty(pairs, np.int32), cupy.empty(pairs * measured, dtype)
    search.launch(search.index, "radius_fill", splits, np.int32(search.sort), found, distance, np.int32(measured))
    return splits, found, distance if search.return_distances else None


def _check_boxes(points, row_splits, metric, problems, queries=None, queries_row_splits=None):
    """Sets `problems` where distances between an item's points and queries overflow or vanish."""
    (n, dimension), items = points.shape, len(row_splits) - 1
    kernels = _module("boxes.cu", (("KP_T", _ctype(points.dtype)), ("KP_DIM", dimension), ("KP_METRIC", metric)))
    boxes = cupy.full((items, 2, dimension), 2**64 - 1, np.uint64)
    _launch(kernels, "grow_boxes", n, points, np.int64(n), row_splits, np.int32(items), boxes)
    if queries is not None:
        m = len(queries)
        _launch(kernels, "grow_boxes", m, queries, np.int64(m), queries_row_splits, np.int32(items), boxes)
    else:
        queries_row_splits = row_splits
    _launch(kernels, "check_boxes", items, boxes, row_splits, queries_row_splits, np.int32(items), problems)


def _nearest(search, k, sort):
    """(counts (M,), index (M, k), distance (M, k), whether a coordinate is not finite)"""
    tree, dtype = search.index.tree, search.index.dtype
    search.check_room(search.num_queries * k, search.num_queries * k * (4 + dtype.itemsize), free=_free_memory)
    counts = cupy.zeros(search.num_queries, np.int64)
    found, distance = cupy.empty((len(counts), k), np.int32), cupy.empty((len(counts), k), dtype)
    settings, of_queries = (*tree._boxes[2], np.int64(k), np.int32(sort)), cupy.zeros(1, np.uint32)
    of_points = search.launch(tree, "nearest", *settings, found, distance, counts, of_queries)
    if search.is_unbounded:
        _check_boxes(tree.points, tree.row_splits, search.metric, of_queries, search.queries, search.queries_row_splits)
    return counts, found, distance, (of_points, of_queries)


def _packed(counts, found, distance, return_distances):
    """Rows of which not all is there one after the other, in arrays as long as if it were."""
    kernels, most = _module("lists.cu", (("KP_T", _ctype(distance.dtype)),)), np.int64(found.shape[1])
    splits = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(counts)])
    packed = cupy.zeros(found.size, np.int32)
    packed_distance = cupy.zeros(found.size * return_distances, distance.dtype)
    _launch(kernels, "pack_rows", found.size, found, distance, most, splits, np.int64(len(counts)), packed,
            packed_distance, np.int32(return_distances))  # fmt: skip
    return splits, packed, packed_distance if return_distances else None


def _nearest_within(search):
    """As `radius_search`, the nearest only, and whether a coordinate is not finite; waits for nothing, so `index` is as
    long as it may have to be."""
    *found, problems = _nearest(search, search.max_neighbors, search.sort or 1)
    return _packed(*found, search.return_distances), problems


def knn_search(index, queries, queries_row_splits, radius, k, sort, metric, ignore, return_distances, check_room,
               threads):  # fmt: skip
    """(row_splits, index, distance); waits once, to see whether all rows are full and all coordinates finite."""
    search = Search(index, queries, queries_row_splits, radius, k, sort, metric, ignore, return_distances, False,
                    check_room)  # fmt: skip
    if index.has_nothing(queries):
        return search.nothing()
    counts, found, distance, problems = _nearest(search, k, sort)
    pairs, *wrong = _wait(counts.sum().reshape(1), *problems)
    if any(wrong):
        raise NotFinite
    if pairs == found.size:
        splits = cupy.arange(len(counts) + 1) * k
        return splits, found.reshape(-1), distance.reshape(-1) if return_distances else None
    splits, found, distance = _packed(counts, found, distance, return_distances)
    return splits, found[:pairs].copy(), distance[:pairs].copy() if return_distances else None


# ---- subsampling


def grid_subsample(points, features, labels, row_splits, voxel_size, origin, position, feature, return_nearest,
                   ignore_label, threads):  # fmt: skip
    """(points, features, labels, row_splits, inverse, counts, nearest); waits once, for the number of voxels."""
    n, dimension = points.shape
    items = len(row_splits) - 1
    kernels = _voxel_kernels(points.dtype, dimension)
    # What the host knows goes up in one copy: (D,) numbers; origins of items, (B, D), are there already.
    on_host = [voxel_size] if origin is None or origin.ndim == 2 else [voxel_size, origin]
    on_device = cupy.asarray(np.stack(on_host))
    origins = on_device[1:] if origin is None or origin.ndim == 1 else origin
    grid = origins, np.int32(len(origins)), on_device
    lowest = cupy.full((items, dimension), 2**64 - 1, np.uint64)
    keys, problems = cupy.empty(n, np.int64), cupy.zeros(1, np.uint32)
    of_points = points, np.int64(n), row_splits, np.int32(items)
    _launch(kernels, "lowest_coordinates", n, *of_points, lowest, problems)
    _launch(kernels, "voxel_keys", n, *of_points, *grid, lowest, keys, problems)
    order = cupy.argsort(keys)
    if items > 1:
        its_item = cupy.empty(n, np.int32)
        _launch(kernels, "items_of", n, order, np.int64(n), row_splits, np.int32(items), its_item)
        order = order[cupy.argsort(its_item)]
    heads = cupy.empty(n, np.int32)
    _launch(kernels, "voxel_heads", n, keys, order, np.int64(n), row_splits, np.int32(items), heads)
    numbers = cupy.cumsum(heads, dtype=np.int64)
    voxels, wrong = _wait(numbers[-1:], problems) if n else (0, 0)
    if wrong & 1:
        raise NotFinite
    if wrong & 2:
        raise OutOfRange
    inverse, begins = cupy.empty(n, np.int32), cupy.empty(voxels + 1, np.int64)
    out_splits = cupy.empty(items + 1, np.int64) if n else cupy.zeros(items + 1, np.int64)
    _launch(kernels, "number_voxels", max(n, items + 1) if n else 0, order, numbers, np.int64(n), row_splits,
            np.int32(items), inverse, begins, out_splits)  # fmt: skip
    counts = cupy.empty(voxels, np.int32)
    _launch(kernels, "count_points", voxels, begins, np.int64(voxels), counts)

    def reduced(kernel, rows):
        out = cupy.empty((voxels, rows.shape[1]), rows.dtype)
        _launch(_voxel_rows_kernels(rows.dtype), kernel, out.size, rows, np.int64(rows.shape[1]), order, begins,
                np.int64(voxels), out)  # fmt: skip
        return out

    centers, nearest = cupy.empty((voxels * (position == 1), dimension), points.dtype), None
    if position == 1 or return_nearest:
        nearest = cupy.empty(voxels * return_nearest, np.int32)
        _launch(kernels, "use_centers", voxels, points, row_splits, np.int32(items), order, begins, np.int64(voxels),
                *grid, lowest, np.int32(position == 1), centers, np.int32(return_nearest), nearest)  # fmt: skip
        nearest = nearest if return_nearest else None
    out_points = (lambda: reduced("average", points), lambda: centers, lambda: points[nearest])[position]()
    out_features = out_labels = None
    if features is not None:
        out_features = features[nearest] if feature == 2 else reduced(("average", "maximize")[feature], features)
    if labels is not None:
        by_label = cupy.argsort(labels)
        by_voxel = by_label[cupy.argsort(inverse[by_label])]
        out_labels = cupy.empty(voxels, labels.dtype)
        _launch(kernels, f"elect_{labels.dtype.name}_t", voxels, labels[by_voxel], begins, np.int64(voxels),
                np.int32(ignore_label is not None), np.int64(ignore_label or 0), out_labels)  # fmt: skip
    return out_points, out_features, out_labels, out_splits, inverse, counts, nearest


def grid_subsample_grad(features, inverse, counts, nearest, feature, grad_out, threads):
    """(N, C)"""
    (n, columns), grads = features.shape, cupy.empty_like(features)
    kernels = _voxel_rows_kernels(features.dtype)
    if feature == 1:
        begins = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(counts, dtype=np.int64)])
        _launch(kernels, "give_to_maxima", grad_out.size, features, np.int64(columns), cupy.argsort(inverse), begins,
                np.int64(len(counts)), grad_out, grads)  # fmt: skip
    else:
        _launch(kernels, "give_rows", grads.size, inverse, counts,
                cupy.empty(0, np.int32) if nearest is None else nearest, np.int32(feature == 2), grad_out, np.int64(n),
                np.int64(columns), grads)  # fmt: skip
    return grads


def _voxel_kernels(dtype, dimension):
    return _module("subsampling.cu", (("KP_T", _ctype(dtype)), ("KP_DIM", dimension), ("KP_S", "KP_T")))


def _voxel_rows_kernels(dtype):
    return _module("subsampling.cu", (("KP_T", "float"), ("KP_DIM", 3), ("KP_S", _ctype(dtype))))


# ---- sampling


def farthest_points(points, row_splits, start, out_row_splits, total, method, threads):
    """(S,) of the stacked points; waits, to see whether all coordinates and distances are finite."""
    items, index, wrong = len(row_splits) - 1, cupy.empty(total, np.int32), cupy.zeros(1, np.uint32)
    if len(points):
        _check_boxes(points, row_splits, 0, wrong)
        module = _module("sampling.cu", (("KP_T", _ctype(points.dtype)), ("KP_DIM", points.shape[1])))
        of_points = points, row_splits, start, out_row_splits, np.int32(items), cupy.empty(len(points), points.dtype)
        _kernel(module, "farthest")((min(_MOST_BLOCKS, items),), (512,), (*of_points, index, wrong))
    if any(_wait(wrong)):
        raise NotFinite
    return index


# ---- lists


def checked_list(index, row_splits, num_points, copy, threads):
    """(index int32, row_splits int64) of a list from outside.

    Waits to look at the values; not for one that is `copy` false, used in this call alone, and of these dtypes.
    """
    if not copy and index.dtype == np.int32 and row_splits.dtype == np.int64:
        return index, row_splits
    bounds = row_splits.get()
    if not len(bounds) or bounds[0] != 0 or bounds[-1] > len(index) or np.any(bounds[1:] < bounds[:-1]):
        raise OutOfRange
    used = index[: int(bounds[-1])]
    if len(used):
        low, high = cupy.stack([used.min(), used.max()]).get()
        if low < 0 or high >= num_points:
            raise OutOfRange
    return index.astype(np.int32, copy=False), row_splits.astype(np.int64, copy=False)


def longest_row(row_splits, threads):
    """An int; waits."""
    return int(cupy.diff(row_splits).max()) if len(row_splits) > 1 else 0


def padded(index, row_splits, width, fill, dtype, threads):
    """(M, width) of that dtype; waits."""
    column = cupy.arange(width)
    there = column < cupy.diff(row_splits)[:, None]
    out = cupy.full(there.shape, fill, dtype)
    out[there] = index[(row_splits[:-1, None] + column)[there]]
    return out


def unpadded(matrix, num_points, threads):
    """(index, row_splits) of a matrix (M, width) in which -1 and num_points are none; waits."""
    there = (matrix >= 0) & (matrix < num_points)
    if not (there | (matrix == -1) | (matrix == num_points)).all():
        raise OutOfRange
    row_splits = cupy.zeros(len(matrix) + 1, np.int64)
    row_splits[1:] = cupy.cumsum(there.sum(1))
    return matrix[there].astype(np.int32), row_splits


def transpose(index, row_splits, distance, num_points, threads):
    """(index, row_splits, distance) of the points' queries; waits for nothing."""
    order, rows, splits = _by_point(index, row_splits, num_points)
    return rows[order], splits, None if distance is None else distance[order]


def _by_point(index, row_splits, num_points):
    """(pairs in the order of their points, their queries, where each point's begin)"""
    pairs, queries = len(index), len(row_splits) - 1
    kernels = _module("lists.cu", ())
    keys, rows = cupy.empty(pairs, np.int32), cupy.empty(pairs, np.int32)
    _launch(kernels, "rows_of_pairs", pairs, index, np.int64(pairs), row_splits, np.int32(queries),
            np.int32(num_points), keys, rows)  # fmt: skip
    order = cupy.argsort(keys)
    splits = cupy.empty(num_points + 1, np.int64)
    _launch(kernels, "begins_of_keys", num_points + 1, keys[order], np.int64(pairs), np.int64(num_points + 1), splits)
    return order, rows, splits


def _blocks(rows, row_splits):
    """(number of each item's first block, an upper bound of them all)"""
    items = len(row_splits) - 1
    counts = cupy.zeros(items + 1, np.int64)
    _launch(_module("lists.cu", ()), "count_blocks", items, row_splits, np.int64(items), counts[1:])
    return cupy.cumsum(counts), rows // _BLOCK_OF_ROWS + items


# ---- kpconv

_SUMS_BYTES = 32 << 20  # at a time: they stay in the second-level cache of an H100 or H200


def _queries_scale(problem):
    if not problem.normalization:
        return None
    kernels, queries = _kpconv_kernels(problem), len(problem.queries)
    positive = cupy.empty(len(problem.points) if problem.normalization == 2 else 0, np.int32)
    _launch(kernels, "find_positive", len(positive), problem.features, np.int64(len(problem.points)),
            np.int32(problem.features.shape[1]), positive)  # fmt: skip
    scale = cupy.empty(queries, _real(problem.features.dtype))
    _launch(kernels, "normalize", queries, problem.index, problem.row_splits, np.int64(queries), positive,
            np.int32(problem.normalization == 2), scale)  # fmt: skip
    return scale


def _kpconv_kernels(problem):
    geometry, features = _ctype(problem.points.dtype), _ctype(problem.features.dtype)
    return _module("kpconv.cu", (("KP_G", geometry), ("KP_F", features), ("KP_DIM", problem.points.shape[1])))


def _kernel_arguments(problem, whose):
    """What kernels get of the kernel points; offsets and modulations are of the queries (1) or what is gathered (2)."""
    offsets, modulations = problem.offsets, problem.modulations
    return (
        problem.kernel_points, np.int32(len(problem.kernel_points)),
        cupy.empty(0, problem.points.dtype) if offsets is None else offsets, np.int32(offsets is not None and whose),
        cupy.empty(0, problem.features.dtype) if modulations is None else modulations,
        np.int32(modulations is not None and whose),
    )  # fmt: skip


def _aggregated(problem, transposed=None):
    """(first query, end, sums (groups, rows, K * channels of a group)) for some queries after the other.

    The sums are in one buffer: what is done with a portion is asked for before the next is.
    """
    points, queries, features = problem.points, problem.queries, problem.features
    index, row_splits, whose, sign = problem.index, problem.row_splits, 1, 1
    if transposed is not None:
        index, row_splits, features = transposed
        points, queries, whose, sign = queries, points, 2, -1
    geometry, dtype, groups, channels = points.dtype.type, features.dtype, problem.groups, features.shape[1]
    scale, scaled = _queries_scale(problem), whose
    if scale is None:
        scale, scaled = cupy.empty(0, _real(dtype)), 0
    # Launching takes the host as long as the GPU takes for a portion: whatever is always the same is made once.
    kernel = _kernel(_kpconv_kernels(problem), "aggregate")
    given = (
        points, queries, index, row_splits, features, np.int32(channels), *_kernel_arguments(problem, whose),
        np.int32(problem.factors), scale, np.int32(scaled), geometry(sign), geometry(problem.extent),
        np.int32(problem.influence), np.int32(problem.aggregation), np.int32(groups),
    )  # fmt: skip
    columns, rows = len(problem.kernel_points) * channels, _rows_at_once(problem, channels)
    buffer = cupy.empty((min(rows, len(queries)), columns), dtype)
    for first in range(0, len(queries), rows):
        count = min(rows, len(queries) - first)
        sums = buffer[:count].reshape(groups, count, columns // groups)
        blocks = min(_MOST_BLOCKS, -(-count * _WARP // _BLOCK))
        kernel((blocks,), (_BLOCK,), (*given, np.int64(first), np.int64(count), sums))
        yield first, first + count, sums


def _rows_at_once(problem, channels):
    """Queries whose sums, K * channels each, are to be there at a time."""
    return max(1, _SUMS_BYTES // (len(problem.kernel_points) * channels * problem.features.dtype.itemsize))


def _of_group(array, g, groups):
    """The g-th part of the last axis."""
    width = array.shape[-1] // groups
    return array[..., g * width : (g + 1) * width]


def _product(a, b, out, g, groups):
    """a @ b to the g-th part of the last axis, in place where that is all of it."""
    if groups == 1:
        cupy.matmul(a, b, out=out)
    else:
        _of_group(out, g, groups)[...] = a @ b


def _channelwise(problem, kernel, first, rows, *arguments, threads):
    """A kernel of where every channel is its own group."""
    kernels, channels = problem.weights.shape
    settings = np.int64(first), np.int64(rows), np.int32(kernels), np.int32(channels)
    _launch(_kpconv_kernels(problem), kernel, threads, *arguments[:1], *settings, *arguments[1:])


def _convolved(problem, flat, queries, channels, transposed=None):
    out = cupy.empty((queries, channels), problem.features.dtype)
    factors = problem.factors if transposed is None else 1
    modulations = problem.modulations if factors > 1 else cupy.empty(0, out.dtype)
    for first, end, sums in _aggregated(problem, transposed):
        if flat is None:
            _channelwise(problem, "scale_sums", first, end - first, sums, problem.weights, modulations,
                         np.int32(factors), out, threads=(end - first) * channels)  # fmt: skip
            continue
        for g, weights in enumerate(flat):
            _product(sums[g], weights, out[first:end], g, len(flat))
    return out


def kpconv(problem):
    """(M, Cout)"""
    weights, groups, flat = problem.weights, problem.groups, None
    if weights.ndim == 3:
        flat = [cupy.ascontiguousarray(_of_group(weights, g, groups)).reshape(-1, weights.shape[-1] // groups)
                for g in range(groups)]  # fmt: skip
    return _convolved(problem, flat, len(problem.queries), weights.shape[-1])


def kpconv_grad_features(problem, transposed_index, transposed_row_splits, grad_out):
    """(N, Cin)"""
    weights, groups, flat = problem.weights, problem.groups, None
    if weights.ndim == 3:
        flat = [cupy.ascontiguousarray(_of_group(weights, g, groups).transpose(0, 2, 1)).reshape(-1, weights.shape[1])
                for g in range(groups)]  # fmt: skip
    transposed = transposed_index, transposed_row_splits, grad_out
    return _convolved(problem, flat, *problem.features.shape, transposed)


def kpconv_grads(problem, grad_out, needs):
    """{name: gradient} of those of all but the features that are in `needs`"""
    grads, needs, factors = {}, set(needs), problem.factors
    if "weights" in needs or (factors > 1 and "modulations" in needs):
        grads |= _kpconv_grads_of_sums(problem, grad_out, needs)
    if needs - {"weights"} - ({"modulations"} if factors > 1 else set()):
        grads |= _kpconv_grads_of_places(problem, grad_out, needs - set(grads))
    return grads


def _kpconv_grads_of_sums(problem, grad_out, needs):
    weights, groups, dtype = problem.weights, problem.groups, problem.features.dtype
    channelwise, factors, grads = weights.ndim == 2, problem.factors, {}
    columns = weights.shape[-1] // groups
    parts = [cupy.zeros((weights.size // weights.shape[-1], columns), _real(dtype)) for _ in range(groups)]
    if channelwise:
        parts = [cupy.zeros(weights.size, _real(dtype))]
    if factors > 1 and "modulations" in needs:
        grads["modulations"] = cupy.empty_like(problem.modulations)
    for first, end, sums in _aggregated(problem):
        rows = end - first
        if "modulations" in grads:
            _channelwise(problem, "factors_grad", first, rows, sums, weights, grad_out, np.int32(factors),
                         grads["modulations"], threads=rows * len(weights) * factors)  # fmt: skip
        if "weights" not in needs:
            continue
        if channelwise:
            products = cupy.empty((rows, weights.size), dtype)
            _channelwise(problem, "weights_products", first, rows, sums, grad_out,
                         problem.modulations if factors > 1 else cupy.empty(0, dtype), np.int32(factors), products,
                         threads=products.size)  # fmt: skip
            parts[0] += sum_rows(products, problem.threads)
            continue
        for g in range(groups):
            parts[g] += sums[g].T @ _of_group(grad_out[first:end], g, groups)
    if "weights" in needs:
        whole = parts[0] if channelwise else cupy.concatenate(parts, axis=1)
        grads["weights"] = whole.reshape(*weights.shape).astype(dtype, copy=False)
    return grads


def _kpconv_grads_of_places(problem, grad_out, needs):
    points, queries, features, weights = problem.points, problem.queries, problem.features, problem.weights
    (n, dimension), kernels, groups = points.shape, len(problem.kernel_points), problem.groups
    geometry, number, channels = points.dtype.type, features.dtype, features.shape[1]
    of_pairs, of_queries = cupy.empty((len(problem.index), dimension), points.dtype), cupy.empty_like(queries)
    of_offsets = cupy.empty((len(queries), kernels, dimension), points.dtype)
    of_modulations = cupy.empty((len(queries), kernels), _real(number))
    scale, scaled = _queries_scale(problem), np.int32(bool(problem.normalization))
    module, flats, at_once = _kpconv_kernels(problem), [], _rows_at_once(problem, channels)
    if weights.ndim == 3:
        flats = [cupy.ascontiguousarray(_of_group(weights, g, groups).transpose(2, 0, 1)) for g in range(groups)]
        flats = [flat.reshape(len(flat), -1) for flat in flats]
    given = (
        points, queries, problem.index, problem.row_splits, features, np.int32(channels),
        *_kernel_arguments(problem, 1),
        cupy.empty(0, _real(number)) if scale is None else scale, scaled, geometry(problem.extent),
        np.int32(problem.influence), np.int32(problem.aggregation), np.int32(groups),
    )  # fmt: skip
    buffer = cupy.empty((min(at_once, len(queries)), kernels * channels), number)
    for first in range(0, len(queries), at_once):
        rows = min(at_once, len(queries) - first)
        products = buffer[:rows].reshape(groups, rows, kernels * channels // groups)
        for g, flat in enumerate(flats):
            cupy.matmul(_of_group(grad_out[first : first + rows], g, groups), flat, out=products[g])
        if not flats:
            _launch(module, "grad_products", products.size, np.int64(first), np.int64(rows), np.int32(kernels),
                    np.int32(channels), weights, grad_out, products)  # fmt: skip
        _launch(module, "place_grads", rows * _WARP, *given, np.int64(first), np.int64(rows), products, of_pairs,
                of_queries, of_offsets, of_modulations)  # fmt: skip
    of_modulations = of_modulations.astype(number, copy=False)
    grads = {"queries": of_queries, "offsets": of_offsets, "modulations": of_modulations}
    if "kernel_points" in needs:
        of_kernel = sum_rows(of_offsets.reshape(len(queries), kernels * dimension), problem.threads)
        grads["kernel_points"] = of_kernel.reshape(kernels, dimension)
    if "points" in needs:
        order, _, begins = _by_point(problem.index, problem.row_splits, n)
        grads["points"] = cupy.empty_like(points)
        _launch(_kpconv_kernels(problem), "sum_pairs", n * dimension, of_pairs, order, begins, np.int64(n),
                grads["points"])  # fmt: skip
    return {name: grad for name, grad in grads.items() if name in needs}


# ---- pooling


def _pooling_kernels(features, geometry=_FLOAT):
    return _module("pooling.cu", (("KP_F", _ctype(features)), ("KP_G", _ctype(geometry))))


def neighbor_reduce(features, index, row_splits, weights, shared, reduction, empty, pad_value, width, return_choice,
                    threads):  # fmt: skip
    """(out (M, C), choice (M, C) or None)"""
    queries, channels, dtype = len(row_splits) - 1, features.shape[1], features.dtype
    kernels, out, number = _pooling_kernels(dtype), cupy.empty((queries, channels), dtype), _real(dtype).type
    of_rows = features, np.int64(channels), index, row_splits, np.int64(queries)
    if reduction < 2:
        _launch(kernels, "sum_neighbors", queries * _WARP, *of_rows,
                cupy.empty(0, dtype) if weights is None else weights, np.int32(weights is not None),
                cupy.empty(0, np.int64) if shared is None else shared, np.int32(shared is not None),
                np.int32(reduction), number(empty), out)  # fmt: skip
        return out, None
    choice = cupy.empty((queries, channels), np.int32)
    _launch(kernels, "choose_neighbors", queries * _WARP, *of_rows, np.int32(reduction), number(empty),
            number(pad_value), np.int64(width), out, choice)  # fmt: skip
    return out, choice if return_choice else None


def neighbor_reduce_grad_weights(features, index, row_splits, reduction, grad_out, threads):
    """(E,)"""
    queries, grads = len(row_splits) - 1, cupy.zeros(len(index), features.dtype)
    _launch(_pooling_kernels(features.dtype), "grad_weights", queries * _WARP, features, np.int64(features.shape[1]),
            index, row_splits, np.int64(queries), np.int32(reduction), grad_out, grads)  # fmt: skip
    return grads


def unpool(choice, grad_out, num_rows, threads):
    """(num_rows, C)"""
    channels, kernels = grad_out.shape[1], _pooling_kernels(grad_out.dtype)
    keys, grads = cupy.empty(choice.size, np.int64), cupy.empty((num_rows, channels), grad_out.dtype)
    _launch(kernels, "chosen_values", choice.size, choice, np.int64(choice.size), np.int64(channels),
            np.int64(num_rows), keys)  # fmt: skip
    order = cupy.argsort(keys)
    _launch(kernels, "sum_chosen", grads.size, keys[order], order, np.int64(choice.size), grad_out,
            np.int64(grads.size), grads)  # fmt: skip
    return grads


def gather_rows(features, index, row_splits, threads):
    """(M, C): the rows of an index, which waits, to see whether there are such rows; or of the first of each list."""
    if row_splits is None:
        low, high = _wait(index.min().reshape(1), index.max().reshape(1)) if len(index) else (0, -1)
        if low < 0 or high >= len(features):
            raise OutOfRange
        return features[index]
    queries, channels = len(row_splits) - 1, features.shape[1]
    out = cupy.empty((queries, channels), features.dtype)
    _launch(_pooling_kernels(features.dtype), "gather_first", out.size, features, np.int64(channels), index, row_splits,
            np.int64(queries), out)  # fmt: skip
    return out


def inverse_distance_weights(distance, row_splits, power, dtype, threads):
    """(E,)"""
    weights, queries = cupy.empty(len(distance), dtype), len(row_splits) - 1
    _launch(_pooling_kernels(np.dtype(dtype), distance.dtype), "weigh_distances", queries, distance, row_splits,
            np.int64(queries), np.float64(power), weights)  # fmt: skip
    return weights


def segment_reduce(features, row_splits, reduction, empty, return_choice, threads):
    """(out (B, C), choice (B, C) or None)"""
    (rows, channels), items, dtype = features.shape, len(row_splits) - 1, features.dtype
    kernels, chooses = _pooling_kernels(dtype), reduction >= 2
    firsts, most = _blocks(rows, row_splits)
    sums = cupy.empty(most * channels * (not chooses), np.float64)
    bests, choices = (cupy.empty(most * channels * chooses, d) for d in (_real(dtype), np.int32))
    _launch(kernels, "reduce_blocks", most * channels, features, np.int64(channels), row_splits, np.int32(items),
            firsts, np.int64(most), np.int32(reduction), sums, bests, choices)  # fmt: skip
    out, choice = cupy.empty((items, channels), dtype), cupy.empty((items * chooses, channels), np.int32)
    _launch(kernels, "join_blocks", items * channels, row_splits, np.int64(items), np.int64(channels), firsts,
            np.int32(reduction), _real(dtype).type(empty), sums, bests, choices, out, choice)  # fmt: skip
    return out, choice if return_choice and chooses else None


def segment_reduce_grad(grad_out, row_splits, reduction, num_rows, threads):
    """(N, C)"""
    items, channels = grad_out.shape
    grads = cupy.empty((num_rows, channels), grad_out.dtype)
    _launch(_pooling_kernels(grad_out.dtype), "spread_items", grads.size, grad_out, np.int64(channels), row_splits,
            np.int32(items), np.int64(num_rows), np.int32(reduction), grads)  # fmt: skip
    return grads


# ---- rows


def _rows_of(array):
    return _module("rows.cu", (("KP_F", _ctype(array.dtype)),))


def linear(features, weights, bias, threads):
    """(N, Cout)"""
    out = features @ weights
    if bias is not None:
        out += bias
    return out


def linear_grad_features(weights, grad_out, threads):
    """(N, Cin)"""
    return grad_out @ weights.T


def linear_grad_weights(features, grad_out, threads):
    """(Cin, Cout)"""
    return features.T @ grad_out


def sum_rows(rows, threads):
    """(C,)"""
    (n, columns), kernels = rows.shape, _rows_of(rows)
    blocks = -(-n // _BLOCK_OF_ROWS)
    partial, sums = cupy.empty((blocks, columns), np.float64), cupy.empty(columns, rows.dtype)
    _launch(kernels, "sum_blocks", partial.size, rows, np.int64(n), np.int64(columns), partial)
    _launch(kernels, "join_sums", columns, partial, np.int64(blocks), np.int64(columns), sums)
    return sums


def activate(features, activation, negative_slope, threads):
    """an array like the features"""
    out = cupy.empty_like(features)
    _launch(_rows_of(features), "activate", out.size, features, np.int64(out.size), np.int32(activation),
            _real(features.dtype).type(negative_slope), out)  # fmt: skip
    return out


def activate_grad(features, activation, negative_slope, grad_out, threads):
    """an array like the features"""
    out = cupy.empty_like(features)
    _launch(_rows_of(features), "activate_grad", out.size, features, grad_out, np.int64(out.size), np.int32(activation),
            _real(features.dtype).type(negative_slope), out)  # fmt: skip
    return out


def add(first, second, threads):
    """an array like both"""
    return first + second


def sum_squares(values, threads):
    """A float, of an array of any shape; waits for it."""
    wide = values.reshape(-1).astype(np.float64)
    return float(_total(wide * wide, 1.0, threads).get())


def sgd(value, grad, moment, lr, momentum, weight_decay, threads):
    """None: changes value and moment"""
    numbers = (value.dtype.type(number) for number in (lr, momentum, weight_decay))
    _launch(_rows_of(value), "sgd", value.size, value, grad, moment, np.int64(value.size), *numbers)


def adamw(value, grad, mean, square, keep, first, second, rate, inverse_root, eps, threads):
    """None: changes value, mean and square"""
    numbers = (value.dtype.type(number) for number in (keep, first, second, rate, inverse_root, eps))
    _launch(_rows_of(value), "adamw", value.size, value, grad, mean, square, np.int64(value.size), *numbers)


def dropout(features, rate, seed, threads):
    """an array like the features"""
    if rate >= 1:
        return cupy.zeros(features.shape, features.dtype)
    out = cupy.empty_like(features)
    _launch(_rows_of(features), "dropout", -(-out.size // 64) * 16, features, np.int64(out.size), np.uint64(seed),
            np.uint32(rate * 2**32), _real(features.dtype).type(1 / (1 - rate)), out)  # fmt: skip
    return out


def softmax(features, threads):
    """(N, C)"""
    (rows, columns), out = features.shape, cupy.empty_like(features)
    _launch(_rows_of(features), "softmax", rows * _WARP * (columns > 0), features, np.int64(rows), np.int64(columns),
            out)  # fmt: skip
    return out


def softmax_grad(features, grad_out, threads):
    """(N, C)"""
    (rows, columns), out = features.shape, cupy.empty_like(features)
    _launch(_rows_of(features), "softmax_grad", rows * _WARP * (columns > 0), features, grad_out, np.int64(rows),
            np.int64(columns), out)  # fmt: skip
    return out


def concatenate(features, threads):
    """(N, channels of all)"""
    return cupy.concatenate(features, axis=1)


def split(whole, channels, needed, threads):
    """a list of (N, channels[i]), None where it is not needed"""
    begins = np.cumsum([0, *channels[:-1]])
    return [cupy.ascontiguousarray(whole[:, begin : begin + c]) if need else None
            for begin, c, need in zip(begins, channels, needed, strict=True)]  # fmt: skip


# ---- losses of deformed kernel points


def _deformation_kernels(kernel_points):
    return _module("deformation.cu", (("KP_T", _ctype(kernel_points.dtype)), ("KP_DIM", kernel_points.shape[1])))


def _total(values, weight, threads):
    """() of the dtype of the values, summed in float64"""
    partial = values.reshape(-1, 1)
    kernels, n = _rows_of(values), values.size
    blocks = -(-n // _BLOCK_OF_ROWS)
    sums, total = cupy.zeros((blocks, 1), np.float64), cupy.zeros(1, np.float64)
    _launch(kernels, "sum_blocks", blocks, partial, np.int64(n), np.int64(1), sums)
    _launch(_module("rows.cu", (("KP_F", "double"),)), "join_sums", 1, sums, np.int64(blocks), np.int64(1), total)
    return (total * weight).astype(values.dtype).reshape(())


def _sizes(offsets):
    return np.int64(offsets.shape[0]), np.int64(offsets.shape[1])


def _of_both(of_offsets, return_offsets, return_kernel_points, threads):
    """(gradient of the offsets, gradient of the kernel points): the latter is the sum of the former"""
    queries, kernels, dimension = of_offsets.shape
    of_kernel = None
    if return_kernel_points:
        of_kernel = sum_rows(of_offsets.reshape(queries, kernels * dimension), threads).reshape(kernels, dimension)
    return of_offsets if return_offsets else None, of_kernel


def fitting_loss(points, queries, index, row_splits, kernel_points, offsets, extent, weight, threads):
    """(loss (), nearest (M, K))"""
    nearest, least = cupy.empty(offsets.shape[:2], np.int32), cupy.empty(offsets.shape[:2], points.dtype)
    _launch(_deformation_kernels(kernel_points), "fit", nearest.size, points, queries, index, row_splits, kernel_points,
            offsets, *_sizes(offsets), nearest, least)  # fmt: skip
    return _total(least, weight / (extent * extent), threads), nearest


def fitting_loss_grad(points, queries, index, row_splits, kernel_points, offsets, extent, weight, nearest, grad_out,
                      return_offsets, return_kernel_points, threads):  # fmt: skip
    """(grad_offsets (M, K, D), grad_kernel_points (K, D)), None for those that are not needed"""
    grads = cupy.empty(offsets.shape, offsets.dtype)
    scale = offsets.dtype.type(2 * weight / (extent * extent))
    _launch(_deformation_kernels(kernel_points), "fit_gradient", nearest.size, points, queries, kernel_points, offsets,
            nearest, *_sizes(offsets), scale, grad_out.reshape(1), grads)  # fmt: skip
    return _of_both(grads, return_offsets, return_kernel_points, threads)


def _repulsion(kernel_points, offsets, extent, repulse_extent):
    number = offsets.dtype.type
    return kernel_points, offsets, *_sizes(offsets), number(1) / number(extent), number(repulse_extent)


def repulsion_loss(kernel_points, offsets, extent, repulse_extent, weight, threads):
    """()"""
    losses = cupy.empty(offsets.shape[:2], offsets.dtype)
    _launch(_deformation_kernels(kernel_points), "repel", losses.size,
            *_repulsion(kernel_points, offsets, extent, repulse_extent), losses)  # fmt: skip
    return _total(losses, 2 * weight, threads)  # of each pair both


def repulsion_loss_grad(kernel_points, offsets, extent, repulse_extent, weight, grad_out, return_offsets,
                        return_kernel_points, threads):  # fmt: skip
    """(grad_offsets (M, K, D), grad_kernel_points (K, D)), None for those that are not needed"""
    grads = cupy.empty(offsets.shape, offsets.dtype)
    _launch(_deformation_kernels(kernel_points), "repel_gradient", offsets.shape[0] * offsets.shape[1],
            *_repulsion(kernel_points, offsets, extent, repulse_extent), offsets.dtype.type(weight),
            grad_out.reshape(1), grads)  # fmt: skip
    return _of_both(grads, return_offsets, return_kernel_points, threads)


# ---- normalisation


def moments(features, row_splits, groups, threads):
    """(mean, variance) (B, groups) float64, of all values of an item and group; 0 of none"""
    columns, items, kernels = features.shape[1], len(row_splits) - 1, _rows_of(features)
    firsts, most = _blocks(len(features), row_splits)
    sums, squares = cupy.empty((most, columns), np.float64), cupy.empty((most, columns), np.float64)
    _launch(kernels, "moment_blocks", sums.size, features, np.int64(columns), row_splits, np.int32(items), firsts,
            np.int64(most), sums, squares)  # fmt: skip
    mean, variance = cupy.empty((items, groups), np.float64), cupy.empty((items, groups), np.float64)
    _launch(kernels, "join_moments", mean.size, features, np.int64(columns), np.int64(groups), row_splits,
            np.int64(items), firsts, sums, squares, mean, variance)  # fmt: skip
    return mean, variance


def normalize(features, row_splits, scale, shift, mean, inverse_std, negative_slope, threads):
    """(N, C)"""
    out = cupy.empty_like(features)
    _launch(_rows_of(features), "normalize", out.size, features, *map(np.int64, out.shape), row_splits,
            np.int32(len(row_splits) - 1), scale, shift, mean, inverse_std, np.int64(mean.shape[1]),
            _real(features.dtype).type(negative_slope), out)  # fmt: skip
    return out


def normalize_grad(features, row_splits, scale, shift, mean, inverse_std, is_given, negative_slope, grad_out,
                   features_needed, scale_needed, shift_needed, threads):  # fmt: skip
    """(grad_features (N, C), grad_scale (C,), grad_shift (C,)), None for those that are not needed"""
    (rows, columns), kernels, dtype = features.shape, _rows_of(features), features.dtype
    items, groups = len(row_splits) - 1, mean.shape[1]
    slope = _real(dtype).type(negative_slope)
    of_items = row_splits, np.int32(items), scale, shift, mean, inverse_std, np.int64(groups), slope
    slant, level = cupy.zeros((2, items, groups), _real(dtype))
    grads = [None, None, None]
    if scale_needed or shift_needed or not is_given:
        firsts, most = _blocks(len(features), row_splits)
        shifts, scales = cupy.empty((most, columns), np.float64), cupy.empty((most, columns), np.float64)
        _launch(kernels, "grad_blocks", shifts.size, features, grad_out, np.int64(columns), *of_items, firsts,
                np.int64(most), shifts, scales)  # fmt: skip
        of_shift, of_scale = cupy.empty((items, columns), np.float64), cupy.empty((items, columns), np.float64)
        _launch(kernels, "join_grads", of_shift.size, np.int64(columns), np.int64(items), firsts, mean, inverse_std,
                np.int64(groups), shifts, scales, of_shift, of_scale)  # fmt: skip
        if not is_given:
            _launch(kernels, "statistics_grads", slant.size, np.int64(columns), np.int64(groups), row_splits,
                    np.int64(items), scale, mean, inverse_std, of_shift, of_scale, slant, level)  # fmt: skip
        for i, needed, sums in ((1, scale_needed, of_scale), (2, shift_needed, of_shift)):
            if needed:
                grads[i] = cupy.empty(columns, dtype)
                _launch(kernels, "sum_items", columns, sums, np.int64(items), np.int64(columns), grads[i])
    if features_needed:
        grads[0] = cupy.empty_like(features)
        _launch(kernels, "normalize_grad", rows * columns, features, grad_out, np.int64(rows), np.int64(columns),
                *of_items, slant, level, grads[0])  # fmt: skip
    return tuple(grads)


# ---- cross entropy


def _entropies(logits, labels, ignore_index, class_weights):
    """(labels as int64, losses, weights, whether a label is no class), of each row"""
    (rows, classes), wide = logits.shape, labels.astype(np.int64)
    losses, weights, wrong = cupy.empty(rows, np.float64), cupy.empty(rows, np.float64), cupy.zeros(1, np.uint32)
    _launch(_rows_of(logits), "entropies", rows * _WARP, logits, np.int64(rows), np.int64(classes), wide,
            cupy.empty(0, logits.dtype) if class_weights is None else class_weights,
            np.int32(class_weights is not None), np.int64(ignore_index or 0), np.int32(ignore_index is not None),
            losses, weights, wrong)  # fmt: skip
    return wide, losses, weights, wrong


def cross_entropy(logits, labels, ignore_index, class_weights, reduction, each, threads):
    """(N,) of `each` row, or 0-d; waits, to see whether all labels are classes."""
    _, losses, weights, wrong = _entropies(logits, labels, ignore_index, class_weights)
    if any(_wait(wrong)):
        raise OutOfRange
    if each:
        return losses.astype(logits.dtype)
    loss, weight = _total(losses, 1.0, threads), _total(weights, 1.0, threads)
    if reduction == 0:
        loss = cupy.where(weight != 0, loss / cupy.where(weight != 0, weight, 1.0), 0.0)
    return loss.astype(logits.dtype)


def cross_entropy_grad(logits, labels, ignore_index, class_weights, reduction, grad_out, threads):
    """(N, C), zeros in a row whose label is no class: `cross_entropy` has found none, and this waits for nothing."""
    (rows, classes), out = logits.shape, cupy.empty_like(logits)
    wide, _, weights, _ = _entropies(logits, labels, ignore_index, class_weights)
    total = _total(weights, 1.0, threads).reshape(1)
    _launch(_rows_of(logits), "entropies_grad", rows * _WARP, logits, np.int64(rows), np.int64(classes), wide, weights,
            np.int64(ignore_index or 0), np.int32(ignore_index is not None), grad_out.reshape(-1),
            np.int32(reduction == 2), total, np.int32(reduction == 0), out)  # fmt: skip
    return out
