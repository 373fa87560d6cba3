"""Brute-force references, written for readability from the formulas, and the comparisons that tests use.

The package does not import this. Values are float64. Decisions (within the radius, which voxel, nearest kernel point)
are made in the dtype of the geometry, with one rounding per operation, because the package promises them bit for bit.
"""

import itertools
import math
from fractions import Fraction

import numpy as np

TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-10}  # of the largest value


def tolerance(*dtypes):
    """The largest tolerance of these dtypes."""
    return max(TOLERANCE[np.dtype(dtype)] for dtype in dtypes)


# ---- comparisons


def assert_close(got, expected, tolerance, magnitude=None):
    """Equal shape, NaN in the same places, differences within `tolerance` of the largest magnitude."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    assert np.array_equal(np.isnan(got), np.isnan(expected)), "NaN in other places than expected"
    if expected.size:
        largest = np.nanmax(np.abs(expected if magnitude is None else magnitude), initial=0)
        error = np.nanmax(np.abs(got.astype(np.float64) - expected), initial=0)
        assert error <= tolerance * largest, f"largest error {error:.3g}, allowed {tolerance:.0e} of {largest:.3g}"


def assert_same_bits(got, expected):
    """The same dtype, shape and bytes (so that -0.0 differs from 0.0 and NaN equals itself)."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes(), f"{np.count_nonzero(got != expected)} of {got.size} values differ"


def assert_rows(neighbors, rows):
    """Assert that the neighbours of each query are exactly those in `rows`, in this order."""
    assert neighbors.index.dtype == np.int32 and neighbors.row_splits.dtype == np.int64
    assert np.array_equal(np.diff(neighbors.row_splits), [len(row) for row in rows]), "neighbours per query"
    assert np.array_equal(neighbors.index, np.concatenate([*rows, np.empty(0, int)])), "neighbours or their order"


def assert_same_pairs(got, expected, distance, radius, band):
    """Assert that two (E, 2) arrays of (query, point) are equal as sets.

    They may differ in pairs whose distance is within `band` of the radius; ``distance(pairs)`` computes it. A pair must
    not occur twice.
    """
    num = max(got.max(initial=0), expected.max(initial=0)) + 1
    got_keys, expected_keys = got @ [num, 1], expected @ [num, 1]
    assert len(np.unique(got_keys)) == len(got), "a pair came twice"
    differing = np.stack(np.divmod(np.setxor1d(got_keys, expected_keys), num), 1)
    off = np.abs(distance(differing) - radius)
    assert np.all(off <= band), (
        f"{np.count_nonzero(off > band)} pairs too many or too few, up to {off.max():.3g} from the radius"
    )


# ---- neighbours


def is_measurable(points, queries=None, metric="l2", points_row_splits=None, queries_row_splits=None, **_):
    """Whether distances neither overflow nor vanish in any batch item that has points and queries.

    That is: the length of the diagonal of the box around them, squared for "l2", is zero or a normal number of their
    dtype. Computed exactly.
    """
    limits = np.finfo(points.dtype)
    if queries is None:
        queries, queries_row_splits = points, points_row_splits
    for (a, b), (c, d) in zip(
        itertools.pairwise(splits_or_whole(points_row_splits, len(points))),
        itertools.pairwise(splits_or_whole(queries_row_splits, len(queries))),
        strict=True,
    ):
        if a == b or c == d:
            continue
        both = np.concatenate([points[a:b], queries[c:d]]).astype(np.float64).T
        sides = [Fraction(axis.max()) - Fraction(axis.min()) for axis in both]
        measured = {"l2": sum(side**2 for side in sides), "l1": sum(sides), "linf": max(sides)}[metric]
        if measured and not Fraction(float(limits.tiny)) <= measured <= Fraction(float(limits.max)):
            return False
    return True


def splits_or_whole(row_splits, num):
    return np.array([0, num]) if row_splits is None else row_splits


def squared_distances(points, queries):
    """(M, N) values ((d0*d0 + d1*d1) + d2*d2) + ... with d = point - query, each step rounded to the arrays' dtype."""
    with np.errstate(over="ignore"):  # coordinates of 1e30: infinitely far apart in float32
        d = points[None, :, :] - queries[:, None, :]
        total = d[..., 0] * d[..., 0]
        for axis in range(1, d.shape[2]):
            total = total + d[..., axis] * d[..., axis]
    return total


def measures(metric, points, queries):
    """(M, N) distances (squared for "l2") in the dtype of the points, summed in the order of the axes."""
    if metric == "l2":
        return squared_distances(points, queries)
    with np.errstate(over="ignore"):
        size = np.abs(points[None] - queries[:, None])
    if metric == "linf":
        return size.max(-1)
    total = size[..., 0]
    with np.errstate(over="ignore"):
        for axis in range(1, size.shape[-1]):
            total = total + size[..., axis]
    return total


def search(points, queries, limit, points_row_splits=None, queries_row_splits=None, metric="l2",
           ignore_query_point=False, most=None, sort="index", inclusive=True):  # fmt: skip
    """-> (rows, distances): for every query q, the points with `measures` of at most, or below, ``limit[q]``.

    Of these, the first `most` by (distance, index) are kept, and sorted by distance or by index.
    """
    if queries is None:
        queries, queries_row_splits = points, points_row_splits
    points_row_splits = splits_or_whole(points_row_splits, len(points))
    queries_row_splits = splits_or_whole(queries_row_splits, len(queries))
    rows, distances = [], []
    for item in range(len(points_row_splits) - 1):
        first, last = points_row_splits[item : item + 2]
        start, stop = queries_row_splits[item : item + 2]
        distance_rows = measures(metric, points[first:last], queries[start:stop])
        for q, measured in zip(range(start, stop), distance_rows, strict=True):
            near = measured <= limit[q] if inclusive else measured < limit[q]
            if ignore_query_point is True:
                near &= (points[first:last] != queries[q]).any(1)
            elif ignore_query_point == "index":
                near &= np.arange(first, last) != q
            row = np.flatnonzero(near)
            by_distance = row[np.lexsort((row, measured[row]))][:most]
            row = by_distance if sort == "distance" else np.sort(by_distance)
            rows.append(row + first)
            distances.append(np.sqrt(measured[row]) if metric == "l2" else measured[row])
    return rows, distances


def radius_search(points, queries, radius, *, metric="l2", max_neighbors=None, **options):
    with np.errstate(over="ignore"):
        limit = np.full(len(points if queries is None else queries), radius, points.dtype)
        limit = limit * limit if metric == "l2" else limit
    return search(points, queries, limit, metric=metric, most=max_neighbors, **options)


def knn_search(points, queries, k, **options):
    limit = np.full(len(points if queries is None else queries), np.inf, points.dtype)
    return search(points, queries, limit, most=k, sort="distance", **options)


# ---- subsampling


def morton_key(voxel):
    """The interleaved bits of the voxel index, x lowest: ... z1 y1 x1 z0 y0 x0, as a Python integer."""
    dims = len(voxel)
    return sum(((int(v) >> bit) & 1) << (bit * dims + axis) for axis, v in enumerate(voxel) for bit in range(21))


def majority(labels, ignore_label):
    """The most frequent label, of equally frequent ones the smallest; `ignore_label` if there are no other labels."""
    votes = [label for label in labels.tolist() if label != ignore_label]
    return max(sorted(set(votes)), key=votes.count) if votes else ignore_label


def exact_means(values, members):
    """(V, C) mean of the rows of `values` in each voxel; `members` are their numbers. Sums are exact."""
    rows = [[math.fsum(column) / len(m) for column in values[m].astype(np.float64).T] for m in members]
    return np.array(rows).reshape(len(members), values.shape[1])


def published_origins(points, voxel_size, row_splits):
    """(B, D) origins of the grids as in the published code, one rounding per operation; 0 for an empty item."""
    size, one = np.asarray(voxel_size, points.dtype), points.dtype.type(1)
    origins = np.zeros((len(row_splits) - 1, points.shape[1]), points.dtype)
    for item, (first, last) in enumerate(itertools.pairwise(row_splits)):
        if last > first:
            origins[item] = np.floor(points[first:last].min(0) * (one / size)) * size
    return origins


def grid_subsample(
    points,
    voxel_size,
    features=None,
    labels=None,
    row_splits=None,
    origin=0,
    position="barycenter",
    feature="mean",
    ignore_label=None,
):
    """-> dict with points and features (means in float64), labels, row_splits, inverse, counts

    For the gradient also `nearest` (V,), the point nearest to the centre of each voxel, and `largest` (V, C), the point
    with the maximum of each channel, the first of equals; NaN counts as larger than any number.
    """
    size, row_splits = np.asarray(voxel_size, points.dtype), splits_or_whole(row_splits, len(points))
    if isinstance(origin, str):
        origin = published_origins(points, voxel_size, row_splits)
    origin = np.asarray(origin, points.dtype)
    origin = np.repeat(origin, np.diff(row_splits), 0) if origin.ndim == 2 else np.broadcast_to(origin, points.shape)
    cells, inverse, out_splits = np.floor((points - origin) / size), np.empty(len(points), int), [0]
    for first, last in itertools.pairwise(row_splits):
        item = cells[first:last]
        voxels, voxel_of_point = np.unique(item - item.min(0, initial=np.inf), axis=0, return_inverse=True)
        order = sorted(range(len(voxels)), key=lambda i, voxels=voxels: morton_key(voxels[i]))
        inverse[first:last] = out_splits[-1] + np.argsort(order)[voxel_of_point]
        out_splits.append(out_splits[-1] + len(voxels))
    counts = np.bincount(inverse, minlength=out_splits[-1])
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts))[:-1]
    firsts = np.array([m[0] for m in members], int)
    centers = (cells[firsts].astype(np.float64) + 0.5) * size.astype(np.float64) + origin[firsts].astype(np.float64)
    squared = [
        squared_distances(points[m].astype(np.float64), center[None])[0]
        for m, center in zip(members, centers, strict=True)
    ]
    nearest = np.array([m[d2.argmin()] for m, d2 in zip(members, squared, strict=True)], int)
    largest = None
    if features is not None:
        largest = np.array([m[features[m].argmax(0)] for m in members], int).reshape(-1, features.shape[1])
        features = {
            "mean": lambda: exact_means(features, members),
            "max": lambda: np.take_along_axis(features, largest, 0),
            "nearest": lambda: features[nearest],
        }[feature]()
    if labels is not None:
        columns = labels.reshape(len(points), math.prod(labels.shape[1:])).T
        elected = [[majority(column[m], ignore_label) for m in members] for column in columns]
        labels = np.array(elected, labels.dtype).T.reshape(len(members), *labels.shape[1:])
    return {
        "points": {
            "barycenter": lambda: exact_means(points, members),
            "center": lambda: centers.astype(points.dtype),
            "nearest": lambda: points[nearest],
        }[position](),
        "features": features,
        "labels": labels,
        "row_splits": np.array(out_splits),
        "inverse": inverse,
        "counts": counts,
        "nearest": nearest,
        "largest": largest,
    }


def grid_subsample_vjp(expected, grad, feature):
    """(N, C) gradient of the features; `expected` is the result of the reference `grid_subsample`."""
    out = np.zeros((len(expected["inverse"]), grad.shape[1]), grad.dtype)
    if feature == "mean":
        out[:] = (grad / expected["counts"][:, None].astype(grad.dtype))[expected["inverse"]]
    elif feature == "nearest":
        out[expected["nearest"]] = grad
    else:
        np.put_along_axis(out, expected["largest"], grad, 0)
    return out


# ---- sampling


def farthest_points(points, num, row_splits=None, start=0, min_distance=0):
    """-> (index, row_splits) of greedily chosen points, each the farthest from those before; ties to the smallest index

    An item ends before a point nearer than min_distance. Distances are in the dtype of the points, since the choice
    must be the same to the bit.
    """
    least = points.dtype.type(min_distance) * points.dtype.type(min_distance)
    row_splits = splits_or_whole(row_splits, len(points))
    starts = np.broadcast_to(start, len(row_splits) - 1)
    index, out_splits = [], [0]
    for (first, last), chosen in zip(itertools.pairwise(row_splits), starts, strict=True):
        item = points[first:last]
        distance = np.full(len(item), np.inf, points.dtype)
        for _ in range(min(num or len(item), len(item))):
            if distance[chosen] < least:
                break
            index.append(first + chosen)
            distance = np.minimum(distance, squared_distances(item, item[chosen : chosen + 1])[0])
            distance[chosen] = -1  # below every distance, so that it is not chosen again
            chosen = distance.argmax()
        out_splits.append(len(index))
    return np.array(index, int), np.array(out_splits)


# ---- KPConv


def nearest_kernel_point(relative, kernel_points):
    """(H,) the kernel point nearest to each position (H, D), computed in their dtype; ties to the smallest index."""
    return squared_distances(kernel_points, relative).argmin(1)


def influences(relative, kernel_points, extent, influence, aggregation):
    """relative (H, D), kernel_points (K, D) -> (H, K)"""
    d2 = squared_distances(kernel_points.astype(np.float64), relative.astype(np.float64))
    if influence == "linear":
        h = np.maximum(0, 1 - np.sqrt(d2) / extent)
    elif influence == "gaussian":
        h = np.exp(-d2 / (2 * (0.3 * extent) ** 2))
    else:
        h = np.ones_like(d2)
    if aggregation == "closest":
        h *= np.arange(len(kernel_points)) == nearest_kernel_point(relative, kernel_points)[:, None]
    return h


def kpconv_rows(
    points, queries, rows, features, kernel_points, extent, influence="linear", aggregation="sum", normalization=None
):
    """For each query: (neighbours (H,), influences (H, K) divided by the normalization)."""
    counted = {
        None: lambda row: 1,
        "count": lambda row: len(row),
        "positive": lambda row: np.count_nonzero(features[row].astype(np.float64).sum(1) > 0),
    }[normalization]
    return [
        (row, influences(points[row] - query, kernel_points, extent, influence, aggregation) / max(1, counted(row)))
        for query, row in zip(queries, rows, strict=True)
    ]


def kpconv(influence_rows, features, weights):
    """out_q = sum_k (sum_i h_qik f_i) W_k"""
    features, weights = features.astype(np.float64), weights.astype(np.float64)
    out = np.zeros((len(influence_rows), weights.shape[2]))
    for q, (row, h) in enumerate(influence_rows):
        out[q] = np.tensordot(h.T @ features[row], weights, 2)
    return out


def full_kpconv(points, queries, rows, features, weights, kernel_points, extent, offsets=None, modulations=None,
                groups=1, influence="linear", aggregation="sum", normalization=None, kernel_offsets=None,
                kernel_extent=None):  # fmt: skip
    """(M, Cout): KPConv with offsets (M, K, D), modulations (M, K) or (M, K, A), groups; depthwise weights (K, C).

    With kernel_offsets (M, K, D) the weights of each query are resampled around the kernel points.
    """
    normal = kpconv_rows(points, queries, rows, features, kernel_points, extent, influence, aggregation, normalization)
    features, weights = features.astype(np.float64), weights.astype(np.float64)
    num_kernels, channels = len(kernel_points), features.shape[1]
    out = np.zeros((len(queries), weights.shape[-1]))
    for q, (row, h) in enumerate(normal):
        if offsets is not None:
            norm = 1 if normalization is None else kpconv_rows(
                points, queries[q : q + 1], [row], features, kernel_points, extent, "constant", "sum", normalization
            )[0][1].max(initial=0)  # fmt: skip
            relative, deformed = points[row] - queries[q], kernel_points + offsets[q]
            h = norm * influences(relative, deformed, extent, influence, aggregation)
            squared_extent = points.dtype.type(extent) * points.dtype.type(extent)
            h = h * (squared_distances(deformed, relative) < squared_extent).any(1, keepdims=True)
        sums = h.T @ features[row]  # (K, C)
        if modulations is not None:
            per_kernel = modulations[q].astype(np.float64).reshape(num_kernels, -1)
            sums = sums * np.repeat(per_kernel, channels // per_kernel.shape[1], axis=1)
        resampled = weights
        if kernel_offsets is not None:
            places = kernel_points.astype(np.float64) + kernel_offsets[q]
            shares = influences(places, kernel_points, kernel_extent, "linear", "sum")  # (k, j)
            resampled = np.tensordot(shares, weights, 1)
        if weights.ndim == 2:
            out[q] = (sums * resampled).sum(0)
        else:
            parts = zip(np.split(sums, groups, 1), np.split(resampled, groups, 2), strict=True)
            out[q] = np.concatenate([np.tensordot(a, w, 2) for a, w in parts])
    return out


def kpconv_vjp(influence_rows, features, weights, grad):
    """-> (grad_features, grad_weights): df_i += h_qik W_k g_q and dW_k += (sum_i h_qik f_i) g_q^T"""
    features, weights, grad = (a.astype(np.float64) for a in (features, weights, grad))
    grad_features, aggregated = np.zeros_like(features), np.zeros((len(influence_rows), *weights.shape[:2]))
    for q, (row, h) in enumerate(influence_rows):
        np.add.at(grad_features, row, h @ (weights @ grad[q]))
        aggregated[q] = h.T @ features[row]
    return grad_features, np.tensordot(aggregated, grad, (0, 0))


# ---- receptive fields


def receptive_field_recursion(layers, shape):
    """R(i; j) = d y_j / d x_i of a stack of convolutions, (*grid, C_out, *shape, C_in): the recursion over its layers.

    ``R^0(i; j) = [i = j]`` and ``R^l(i; j) = sum_k w^l_jk sum_m b(q^l_jk, m) R^(l-1)(i; m)``, where b is the linear
    interpolation, which is 1 at the place q itself if that is a place of the grid, and 0 beyond the grid.

    Parameters
    ----------
    layers : list of tuples, the first layer first
        (q, w) or (q, w, gates). q (*grid, K, D): where in the grid of the layer before each output of the layer takes
        its K values, possibly between places. w (*grid, K, C_in, C_out), or (*grid, K) for a single channel. gates
        (*grid, C_out): what the outputs are multiplied by, such as 1 where a ReLU is active and 0 elsewhere.
    shape : tuple
        The grid of the input, of D axes.
    """
    channels = 1 if layers[0][1].ndim == layers[0][0].ndim - 1 else layers[0][1].shape[-2]
    num = math.prod(shape) * channels
    fields = np.eye(num).reshape(*shape, channels, num)
    for q, w, *gates in layers:
        grid = q.shape[:-2]
        w = w[..., None, None] if w.ndim == len(grid) + 1 else w
        before, fields = fields, np.zeros((*grid, w.shape[-1], num))
        for j in np.ndindex(grid):
            for k in range(q.shape[-2]):
                fields[j] += w[(*j, k)].T @ interpolated(before, q[(*j, k)])
            if gates:
                fields[j] *= gates[0][j][:, None]
    return fields.reshape(*fields.shape[:-1], *shape, channels)


def interpolated(values, q):
    """sum_m b(q, m) values[m] over the places m of a grid, with b(q, m) = prod over the axes of max(0, 1 - |q - m|)."""
    total = np.zeros(values.shape[len(q) :])
    low = [math.floor(axis) for axis in q]
    for m in itertools.product(*[(first, first + 1) for first in low]):
        if all(0 <= axis < size for axis, size in zip(m, values.shape, strict=False)):
            total += math.prod(1 - abs(a - b) for a, b in zip(q, m, strict=True)) * values[m]
    return total


def receptive_field_over_paths(kernels, i, j):
    """R(i; j) of a stack of rigid kernels of stride 1 on an endless grid, summed over all paths (Gao et al. 2020, 3).

    ``sum over (k_1 .. k_n) of [j + k_1 + .. + k_n = i] W^1_(k_1) .. W^n_(k_n)``. Each kernel is {k: weight}, where k is
    a tuple.
    """
    total = 0.0
    for path in itertools.product(*(kernel.items() for kernel in kernels)):
        end = tuple(np.sum([j, *(k for k, _ in path)], axis=0).tolist())
        if end == tuple(i):
            total += math.prod(weight for _, weight in path)
    return total
