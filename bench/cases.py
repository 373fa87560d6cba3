"""The cases of ``python bench/run.py cpu``: inputs, checks, peers and targets. Each task runs in a new process."""

from functools import partial
from pathlib import Path

import clients
import numpy as np
import peers
from clients import compat  # noqa: F401 - run.py looks for a case here
from run import timed

import kpcore as kp

# A power of two: dividing by it and multiplying by its inverse give the same, so all libraries have the same voxels.
VOXEL = np.float32(1 / 32)
RADIUS = float(np.float32(2.5) * VOXEL)
KERNEL = {"num": 15, "radius": float(1.65 * VOXEL)}
EXTENT = float(np.float32(1.2) * VOXEL)
RAW_PER_VOXEL = 6.4  # points of surface() in an occupied voxel, measured
SIZES = {
    "full": {
        "raw": 4_000_000,
        "cloud": 1_000_000,
        "patch": 20_000,
        "features": (10_000, 20_000, 100_000),
        "pyramid": 100_000,
        "sheet": 100_000,
        "growth": (10**4, 10**5, 10**6, 10**7),
        "rows": 200_000,
        "ball": 20_000,
        "voxels": 100_000,
        "images": (4, 56),
        "image_kernels": (32, 14, 64),
    },
    "quick": {
        "raw": 40_000,
        "cloud": 10_000,
        "patch": 2_000,
        "features": (500, 1_000, 2_000),
        "pyramid": 2_000,
        "sheet": 10_000,
        "growth": (10**3, 10**4),
        "rows": 2_000,
        "ball": 1_000,
        "voxels": 3_000,
        "images": (2, 12),
        "image_kernels": (3, 6, 16),
    },
}

FEATURE_DIMENSIONS = (17, 64, 128, 1024)

# {(case, what, order, against): target}. Without a peer a target is in the unit of the row, millions per second and
# core or MiB. With a baseline of run.BASELINES ("xyz alone", "FMA floor" and others) it is our time as a multiple of
# the baseline's. With any other peer it is how many times faster we are. Rows without a target are for information.
TARGETS = {
    ("radius_search", "by index", "random", None): (">=", 180),
    ("radius_search", "by index", "voxel", None): (">=", 250),
    ("radius_search", "unordered", "voxel", None): (">=", 300),
    ("radius_search", "by index", "random", "Open3D nns"): (">=", 25),
    ("radius_search", "by index", "random", "Open3D ml.torch"): (">=", 25),
    ("radius_search", "by index", "voxel", "Open3D nns"): (">=", 12),
    ("radius_search", "by index", "voxel", "Open3D ml.torch"): (">=", 12),
    ("radius_search", "by index", "random", "SciPy cKDTree"): (">=", 60),
    ("radius_search", "by index", "voxel", "SciPy cKDTree"): (">=", 60),
    ("kdtree", "build", "random", "SciPy cKDTree"): (">=", 1 / 0.55),
    ("kdtree", "build", "voxel", "SciPy cKDTree"): (">=", 1 / 0.55),
    ("kdtree", "radius search", "random", "Open3D nns"): (">=", 3),
    ("kdtree", "radius search", "voxel", "Open3D nns"): (">=", 3),
    ("kdtree", "radius search", "random", "SciPy cKDTree"): (">=", 15),
    ("kdtree", "radius search", "voxel", "SciPy cKDTree"): (">=", 15),
    ("knn_search", "k = 16", "random", "pykdtree"): (">=", 3),
    ("knn_search", "k = 16", "voxel", "pykdtree"): (">=", 3),
    ("knn_search", "k = 16", "random", "Open3D nns"): (">=", 4),
    ("knn_search", "k = 16", "voxel", "Open3D nns"): (">=", 4),
    ("knn_search", "k = 16", "random", "SciPy cKDTree"): (">=", 5),
    ("knn_search", "k = 16", "voxel", "SciPy cKDTree"): (">=", 5),
    ("knn_features", "k = 20", "D = 64", "scikit-learn brute"): (">=", 2),
    ("knn_features", "k = 20", "D = 64", "torch cdist + topk"): (">=", 4),
    **{("knn_features", "memory, k = 20", f"D = {dim}", None): ("<=", 64) for dim in FEATURE_DIMENSIONS},
    ("search_options", "radii", "random", "scalar L2"): ("<=", 1.3),
    ("search_options", "radii", "voxel", "scalar L2"): ("<=", 1.3),
    ("search_options", "l1", "random", "scalar L2"): ("<=", 1.3),
    ("search_options", "l1", "voxel", "scalar L2"): ("<=", 1.3),
    ("search_options", "linf", "random", "scalar L2"): ("<=", 1.3),
    ("search_options", "linf", "voxel", "scalar L2"): ("<=", 1.3),
    ("pyramid", "5 levels", "random", "published steps, Open3D ops"): (">=", 15),
    ("pyramid", "5 levels", "voxel", "published steps, Open3D ops"): (">=", 15),
    ("grid_subsample", "xyz float64", "random", "small_gicp"): (">=", 4),
    ("grid_subsample", "xyz float64", "voxel", "small_gicp"): (">=", 4),
    ("grid_subsample", "xyz", "random", "Open3D tensor"): (">=", 15),
    ("grid_subsample", "xyz", "voxel", "Open3D tensor"): (">=", 15),
    ("grid_subsample", "xyz, 3 features, labels", "random", "xyz alone"): ("<=", 2.5),
    ("grid_subsample", "xyz, 3 features, labels", "voxel", "xyz alone"): ("<=", 2.5),
    ("farthest_point_sampling", "1 of 24", "random", "fpsample"): (">=", 3),
    ("neighbor_reduce", "max, C = 128", "random", "torch gather + amax"): (">=", 4),
    ("neighbor_reduce", "max, C = 128", "voxel", "torch gather + amax"): (">=", 4),
    ("kpconv", "forward, C = 64", "voxel", "NumPy A @ W"): (">", 1),
    ("kpconv", "forward, C = 128", "voxel", "NumPy A @ W"): (">", 1),
    ("kpconv", "forward, C = 256", "voxel", "NumPy A @ W"): (">", 1),
    ("kpconv", "forward, C = 64", "voxel", "NumPy A @ W, SkylakeX"): (">", 1),
    ("kpconv", "forward, C = 128", "voxel", "NumPy A @ W, SkylakeX"): (">", 1),
    ("kpconv", "forward, C = 256", "voxel", "NumPy A @ W, SkylakeX"): (">", 1),
    ("kpconv", "forward, C = 64", "voxel", "FMA floor"): ("<=", 2.1),
    ("kpconv", "forward, C = 128", "voxel", "FMA floor"): ("<=", 1.45),
    ("kpconv", "forward, C = 256", "voxel", "FMA floor"): ("<=", 1.2),
    ("kpconv", "forward, C = 64", "voxel", "dense torch"): (">=", 40),
    ("kpconv", "forward, C = 128", "voxel", "dense torch"): (">=", 12),
    ("kpconv_vjp", "forward + vjp, C = 64", "voxel", "its forward"): ("<=", 3.3),
    ("kpconv_vjp", "forward + vjp, C = 64", "voxel", "dense torch"): (">=", 20),
    ("kpconv_vjp", "vjp with points and kernel points", "voxel", "vjp without"): ("<=", 1.6),
    ("deformable", "forward, C = 64", "voxel", "two rigid"): ("<=", 1.35),
    ("deformable", "forward, C = 64", "voxel", "dense torch"): (">=", 30),
    ("deformable", "forward + vjp, C = 64", "voxel", "two rigid"): ("<=", 1.35),
    ("deformable", "forward + vjp, C = 64", "voxel", "dense torch"): (">=", 25),
    ("deformable", "both losses, forward + vjp", "voxel", "the layer's step"): ("<=", 0.08),
    ("continuous_conv", "forward, C = 32", "random", "NumPy A @ W"): (">=", 1 / 1.4),
    ("continuous_conv", "forward, C = 64", "random", "NumPy A @ W"): (">=", 1 / 1.25),
    ("continuous_conv", "forward, C = 32", "random", "Open3D op"): (">=", 5),
    ("continuous_conv", "forward, C = 64", "random", "Open3D op"): (">=", 5),
    ("continuous_conv", "forward + vjp, C = 32", "random", "NumPy A @ W"): (">=", 1 / 3.6),
    ("continuous_conv", "forward + vjp, C = 64", "random", "NumPy A @ W"): (">=", 1 / 3.6),
    ("continuous_conv", "forward + vjp, C = 32", "random", "Open3D op"): (">=", 7),
    ("continuous_conv", "forward + vjp, C = 64", "random", "Open3D op"): (">=", 5),
    ("continuous_conv", "with all gradients, C = 32", "random", "features and filters"): ("<=", 1.3),
    ("continuous_conv", "with all gradients, C = 64", "random", "features and filters"): ("<=", 1.3),
    ("continuous_conv", "memory of forward, C = 64", "random", None): ("<=", 64),
    ("continuous_conv", "memory of forward + vjp, C = 64", "random", None): ("<=", 64),
    **{
        ("deform2d", what, "deformable kernel", against): (">=", factor)
        for what in ("forward", "forward + vjp")
        for against, factor in (("unfold + grid_sample", 10), ("unfold + hat weights", 4))
    },
    ("deform2d", "forward", "deformable", "grid_sample + product"): (">=", 4),
    ("deform2d", "forward + vjp", "deformable", "grid_sample + product"): (">=", 5),
    ("deform2d", "forward", "deformable", "NumPy A @ W"): (">=", 1 / 2),
    ("deform2d", "forward", "deformable, depthwise", "grid_sample + product"): (">=", 8),
    ("deform2d", "forward + vjp", "deformable, depthwise", "grid_sample + product"): (">=", 8),
    **{
        ("deform2d", f"memory of {what}", kind, None): ("<=", 64)
        for what in ("forward", "forward + vjp")
        for kind in ("deformable kernel", "deformable")
    },
    **{
        ("sparse_conv", what, f"{active} active cells", against): target
        for active in (9, 18)
        for (what, against), target in {
            ("submanifold, C = 64", "NumPy A @ W"): (">=", 1 / 1.3),
            ("submanifold, C = 64", "spconv"): (">=", 2),
            ("submanifold, C = 64", "Open3D op"): (">=", 3),
            ("submanifold and its map, C = 64", "Open3D op and search"): (">=", 4),
            ("kernel map", "the layer"): ("<=", 0.25),
            ("strided, per pair", "the layer"): ("<=", 1.3),
            ("inverse, per pair", "the layer"): ("<=", 1.3),
        }.items()
    },
    ("rows", "batch_norm + leaky_relu, forward + vjp", "", "torch"): (">=", 1),
    ("memory", "kpconv forward, C = 64", "voxel", None): ("<=", 8),
    ("memory", "deformable step, C = 64", "voxel", None): ("<=", 37),  # a thirtieth of dense torch's
    ("overhead", "tape, forward + vjp", "", "the calls alone"): ("<=", 15),
    ("overhead", "torch, forward", "", "the calls alone"): ("<=", 20),
    ("overhead", "torch, forward + backward", "", "the calls alone"): ("<=", 60),
    ("overhead", "JAX under jit, forward", "", "the calls alone"): ("<=", 25),
    **{
        ("compat", what, "", "the calls alone"): ("<=", 50)
        for what in ("batch_query", "subsample_batch", "KPConv, forward", "KPConv, forward + backward")
    },
    ("compat", "lists of a pair", "", "GeoTransformer's steps, SciPy cKDTree"): (">=", 10),
    ("compat", "lists of a pair", "", "GeoTransformer's steps, pykdtree"): (">=", 10),
    ("compat", "KPConv-PyTorch, training step", "", "dense torch"): (">=", 3),
}


ORDERS = ("voxel", "random")
CHANNELS = (64, 128, 256)
CROWDS = ("99 % in one cell", "10 km at 2 cm", "all equal", "radius over everything")
GROWING = {  # operators of the case `growth`: {name: their peak memory, approximately, in bytes per point}
    "grid_subsample": 100,
    "radius_search": 400,
    "kdtree": 400,
    "knn_search": 400,
    "pyramid": 500,
    "farthest_point_sampling": 100,
    "kpconv": 1000,
}

# {case: the arguments of its tasks}. A task runs once per number of threads; "coretype" becomes OPENBLAS_CORETYPE.
TASKS = {
    "radius_search": [{"order": order} for order in ORDERS],
    "kdtree": [{"order": order} for order in ORDERS],
    "knn_search": [{"order": order} for order in ORDERS],
    "knn_features": [
        *({"dimension": dimension, "size": 1} for dimension in FEATURE_DIMENSIONS),
        {"dimension": 64, "size": 0},
        *({"dimension": dimension, "size": size, "memory": True} for dimension in (64, 1024) for size in (0, 1)),
        {"dimension": 64, "size": 2, "memory": True},
    ],
    "search_options": [{"order": order} for order in ORDERS],
    "pyramid": [{"order": order} for order in ORDERS],
    "crowds": [{"cloud": cloud} for cloud in CROWDS],
    "grid_subsample": [{"order": order} for order in ORDERS],
    "farthest_point_sampling": [{}],
    "features": [{"order": order} for order in ORDERS],
    "neighbor_reduce": [{"order": order} for order in ORDERS],
    "kpconv": [
        *({"order": order, "channels": channels} for channels in CHANNELS for order in ORDERS),
        *({"order": "voxel", "channels": channels, "coretype": "SkylakeX"} for channels in CHANNELS),
    ],
    "kpconv_vjp": [{"order": order} for order in ORDERS],
    "continuous_conv": [
        *({"order": order, "channels": channels} for channels in (32, 64) for order in ORDERS),
        {"order": "random", "channels": 64, "memory": "forward"},
        {"order": "random", "channels": 64, "memory": "forward + vjp"},
    ],
    "sparse_conv": [{"active": active} for active in (9, 18)],
    "deform2d": [
        *({"kind": kind} for kind in ("deformable kernel", "deformable", "deformable, depthwise")),
        *({"kind": kind, "memory": True} for kind in ("deformable kernel", "deformable")),
    ],
    "image_kernels": [{"kind": kind} for kind in ("conditional", "global deformable kernel")],
    "rows": [{}],
    "deformation": [{"order": order} for order in ORDERS],
    "deformable": [{"order": order} for order in ORDERS],
    "kpconv_kernel_offsets": [{"order": order} for order in ORDERS],
    "overhead": [{}],
    "compat": clients.TASKS,
    "memory": [
        {"implementation": name, "layer": layer}
        for layer in ("rigid", "deformable")
        for name in ("kpcore", "dense torch")
    ],
    "growth": [{"op": op} for op in GROWING],
}


# Inputs, which run.py makes once before the tasks and every task reads.


def surface(n, seed=0):
    """n points of a rough, wavy sheet, in random order.

    It has waves of 64, 23 and 9 voxels with slopes up to 0.8, noise of 0.35 voxel, and an area proportional to n. After
    subsampling, a point has 37 neighbours within 2.5 voxels (27 without the noise).
    """
    rng = np.random.default_rng(seed)
    x, y = rng.random((2, n)) * VOXEL * np.sqrt(n / 16)
    z = rng.normal(0, 0.35 * VOXEL, n)
    for wave in VOXEL * np.array((64, 23, 9)):
        px, py = rng.random(2) * 2 * np.pi
        z += wave / (2 * np.pi * 1.2) * np.sin(2 * np.pi * x / wave + px) * np.cos(2 * np.pi * y / (1.3 * wave) + py)
    return np.column_stack([x, y, z]).astype(np.float32)


def morton(points):
    """The Morton key of each point's voxel, relative to the lowest voxel."""
    voxel = np.floor(points / VOXEL).astype(np.int64)
    voxel = (voxel - voxel.min(0)).astype(np.uint64)
    spread = (0x1F00000000FFFF, 0x1F0000FF0000FF, 0x100F00F00F00F00F, 0x10C30C30C30C30C3, 0x1249249249249249)
    for shift, mask in zip((32, 16, 8, 4, 2), spread, strict=True):
        voxel = (voxel | voxel << np.uint64(shift)) & np.uint64(mask)
    return voxel[:, 0] | voxel[:, 1] << np.uint64(1) | voxel[:, 2] << np.uint64(2)


def subsample(points):
    """(barycentres of the voxels, float64 in Morton order; voxel of each point), computed with NumPy."""
    _, inverse, counts = np.unique(morton(points), return_inverse=True, return_counts=True)
    sums = [np.bincount(inverse, column) for column in points.T]
    return np.column_stack(sums) / counts[:, None], inverse


def prepare(folder, size):
    """Write raw.npy (random order), cloud.npy (subsampled, voxel order), and patches of it with their neighbours."""
    from scipy.spatial import cKDTree

    np.save(folder / "raw.npy", surface(size["raw"]))
    cloud = subsample(surface(int(1.05 * RAW_PER_VOXEL * size["cloud"]), seed=1))[0][: size["cloud"]].astype(np.float32)
    assert len(cloud) == size["cloud"], f"the surface gave {len(cloud)} voxels"
    np.save(folder / "cloud.npy", cloud)
    for order in ORDERS:
        points = arranged(cloud[: size["patch"]], order)
        pairs = cKDTree(points).query_pairs(RADIUS, output_type="ndarray")
        row, index = np.concatenate([pairs, pairs[:, ::-1], np.arange(len(points)).repeat(2).reshape(-1, 2)]).T
        by_index = np.lexsort([index, row])
        row_splits = np.searchsorted(row[by_index], np.arange(len(points) + 1))
        index = index[by_index].astype(np.int32)
        np.savez(folder / f"patch_{order}.npz", points=points, index=index, row_splits=row_splits)


def arranged(points, order):
    return np.ascontiguousarray(points if order == "voxel" else np.random.default_rng(2).permutation(points))


def kpconv_problem(folder, order, channels):
    """A patch and arrays for a convolution on it, by the argument names that kpconv and dense_kpconv.py share."""
    rng = np.random.default_rng(3)
    with np.load(Path(folder) / f"patch_{order}.npz") as patch:
        problem = dict(patch)
    problem["features"] = rng.standard_normal((len(problem["points"]), channels), np.float32)
    problem["weights"] = rng.standard_normal((KERNEL["num"], channels, channels), np.float32) / np.float32(channels)
    return problem | {"kernel_points": kp.kernel_points(**KERNEL), "extent": EXTENT}


def neighbors_of(problem):
    return kp.Neighbors(problem["index"], problem["row_splits"], len(problem["points"]))


def convolve(problem, neighbors, features, weights):
    return kp.kpconv(problem["points"], None, neighbors, features, weights, problem["kernel_points"], problem["extent"])


# Checks of results against peers and NumPy.


def pair_keys(num_points, index, row_splits):
    return np.repeat(np.arange(len(row_splits) - 1), np.diff(row_splits)) * num_points + index[: row_splits[-1]]


def same_pairs(points, keys, peer_lists):
    """Check that a peer's (index, row_splits) has the same pairs, except pairs at the radius up to rounding."""
    peer_result = np.sort(pair_keys(len(points), *peer_lists))
    if np.array_equal(keys, peer_result):
        return
    assert (np.diff(peer_result) > 0).all(), "a pair comes twice"
    query, point = np.divmod(np.setxor1d(keys, peer_result, assume_unique=True), len(points))
    distance = np.linalg.norm(points[query].astype(np.float64) - points[point], axis=1)
    assert np.allclose(distance, RADIUS, rtol=1e-5, atol=0), f"{(abs(distance / RADIUS - 1) > 1e-5).sum()} pairs differ"


def same_barycentres(expected, barycentres):
    """Check that voxels and barycentres are equal.

    The threads of small_gicp split some voxels in two; its documentation says that there are up to 10 % more points.
    """
    together = morton(np.concatenate([expected, barycentres]))
    ours, peer_result = together[: len(expected)], together[len(expected) :]
    voxels, first, counts = np.unique(peer_result, return_index=True, return_counts=True)
    assert np.array_equal(voxels, ours), f"{len(voxels)} voxels for {len(expected)}"
    assert len(barycentres) <= 1.1 * len(expected), f"{len(barycentres)} points for {len(expected)} voxels"
    not_split = counts == 1
    differences = abs(barycentres[first[not_split]] - expected[not_split])
    assert differences.max(initial=0) <= 1e-3 * VOXEL, "barycentres differ"


def close(expected, results):
    """Check that arrays differ by less than 2e-5 of the largest value."""
    for want, got in zip(expected, results, strict=True):
        error = abs(want - got).max() / abs(want).max()
        assert error < 2e-5, f"error {error:.1e} of the largest value"


def influences(problem):
    """Yield the linear influences of each kernel point as a sparse (M, N) matrix in float64."""
    from scipy.sparse import csr_array

    points, index, row_splits = problem["points"].astype(np.float64), problem["index"], problem["row_splits"]
    relative = points[index] - np.repeat(points, np.diff(row_splits), axis=0)
    for kernel_point in problem["kernel_points"]:
        influence = np.maximum(0, 1 - np.linalg.norm(relative - kernel_point, axis=1) / problem["extent"])
        yield csr_array((influence, index, row_splits), shape=(len(points), len(points)))


def aggregate(problem):
    """A (M, K * C), the features summed by kernel point, from which `A @ W` is the output."""
    return np.hstack([influence @ problem["features"].astype(np.float64) for influence in influences(problem)])


# The cases.


def radius_search(bench, order):
    points = arranged(np.load(bench.folder / "cloud.npy"), order)
    by_index = partial(kp.radius_search, points, None, RADIUS)
    unordered = partial(by_index, sort=None)
    neighbors = bench.first(by_index)
    keys = pair_keys(len(points), neighbors.index, neighbors.row_splits)
    assert (np.diff(keys) > 0).all(), "rows are not sorted by index"
    check = partial(same_pairs, points, keys)
    bench.label(order=order, size=f"{len(points):,}, H = {neighbors.num_pairs / len(points):.1f}")
    in_any_order = bench.first(unordered)
    check((in_any_order.index, in_any_order.row_splits))
    del in_any_order
    for what, call in (("by index", by_index), ("unordered", unordered)):
        bench.rate(what, call, neighbors.num_pairs, "M neighbours/s per core")
    search_peers = [peers.OPEN3D_NNS, peers.OPEN3D_HASH]
    if bench.threads == bench.most_threads:  # SciPy is fastest with workers=-1; on one core a call takes 10 s
        search_peers.append(peers.SCIPY_BALL)
    for peer in search_peers:
        bench.against("by index", by_index, peer, {"points": points, "radius": RADIUS}, check)


def kdtree(bench, order):
    points = arranged(np.load(bench.folder / "cloud.npy"), order)
    bench.label(order=order, size=f"{len(points):,}")
    build = partial(kp.KDTree, points)
    tree = bench.first(build)
    bench.rate("build", build, len(points), "M points/s per core")
    bench.against("build", build, peers.SCIPY_BUILD, {"points": points}, lambda _: None)

    def search():
        return kp.KDTree(points).radius_search(None, RADIUS)

    neighbors = tree.radius_search(None, RADIUS)
    by_grid = kp.radius_search(points, None, RADIUS)
    assert np.array_equal(neighbors.index, by_grid.index), "expected the pairs of the grid"
    assert np.array_equal(neighbors.row_splits, by_grid.row_splits), "expected the pairs of the grid"
    check = partial(same_pairs, points, pair_keys(len(points), neighbors.index, neighbors.row_splits))
    bench.label(order=order, size=f"{len(points):,}, H = {neighbors.num_pairs / len(points):.1f}")
    bench.rate("radius search", search, neighbors.num_pairs, "M neighbours/s per core")
    search_peers = [peers.OPEN3D_NNS] + [peers.SCIPY_BALL] * (bench.threads == bench.most_threads)
    for peer in search_peers:
        bench.against("radius search", search, peer, {"points": points, "radius": RADIUS}, check)


def knn_search(bench, order):
    points, k = arranged(np.load(bench.folder / "cloud.npy"), order), 16
    bench.label(order=order, size=f"{len(points):,}")
    search = partial(kp.knn_search, points, None, k, return_distances=True)
    neighbors = bench.first(search)
    assert (neighbors.counts == k).all()
    distance = neighbors.distance.reshape(-1, k)

    def check(peer_result):
        assert np.allclose(peer_result, distance, rtol=1e-5, atol=1e-6 * VOXEL), "distances differ"

    bench.rate(f"k = {k}", search, len(points), "M queries/s per core")
    for peer in (peers.PYKDTREE, peers.OPEN3D_KNN, peers.SCIPY_KNN):
        bench.against(f"k = {k}", search, peer, {"points": points, "k": k}, check)


def knn_features(bench, dimension, size, memory=False):
    """Normally distributed features, of which no index excludes any."""
    num, k = bench.sizes["features"][size], 20
    points = np.random.default_rng(0).normal(size=(num, dimension)).astype(np.float32)
    bench.label(order=f"D = {dimension}", size=f"{num:,}")
    search = partial(kp.knn_search, points, None, k, return_distances=True)
    if memory:
        kp.knn_search(points[:300], None, k)  # starts threads and loads code before memory is measured
        bench.memory(f"memory, k = {k}", search, num * (8 * k + 8), "MiB beyond the result")
        return
    distance = bench.first(search).distance.reshape(-1, k)

    def check(peer_result):
        # A product of float32 rounds squared distances, of which that of a point to itself is 0.
        error = 1e-6 * dimension * (points**2).sum(1).max()
        assert peer_result is None or np.allclose(peer_result**2, distance**2, atol=error), "distances differ"

    bench.rate(f"k = {k}", search, num, "M queries/s per core")
    for peer in (peers.SKLEARN_KNN, peers.TORCH_KNN, peers.PRODUCT_ALONE):
        bench.against(f"k = {k}", search, peer, {"points": points, "k": k}, check)


def pyramid(bench, order):
    """Five levels from 100,000 subsampled points, with all lists of neighbours, pools and upsamples."""
    points, num_levels = arranged(np.load(bench.folder / "cloud.npy")[: bench.sizes["pyramid"]], order), 5
    build = partial(kp.build_pyramid, points, voxel_size=float(VOXEL), num_levels=num_levels, subsampled=True)
    levels = bench.first(build)
    bench.label(order=order, size=f"{len(points):,}")

    def check(sizes):
        for level, peer_result in zip(levels, sizes, strict=True):
            pairs = [level.neighbors.num_pairs] + ([level.pools.num_pairs] if level.pools else [])
            assert np.allclose(peer_result, [len(level.points), *pairs], rtol=1e-4), (
                f"{peer_result}, {len(level.points)}, {pairs}"
            )

    bench.rate(f"{num_levels} levels", build, len(points), "M points/s per core")
    inputs = {"points": points, "voxel": float(VOXEL), "num_levels": num_levels}
    for peer in (peers.PUBLISHED_PYRAMID, peers.OPEN3D_PYRAMID):
        bench.against(f"{num_levels} levels", build, peer, inputs, check)


def crowds(bench, cloud):
    """Clouds on which searches can be very slow: the 16 nearest within a radius, and the 16 nearest."""
    n, rng = bench.sizes["cloud"], np.random.default_rng(7)
    if cloud == "99 % in one cell":
        points, radius = rng.normal(0, 1e-3, (n, 3)), 0.1
        points[::100] = rng.uniform(-50, 50, points[::100].shape)
    elif cloud == "10 km at 2 cm":
        points, radius = rng.uniform(0, [1e4, 1e4, 50], (n, 3)), 0.02
    elif cloud == "all equal":
        points, radius = np.zeros((n, 3)), 1.0
    else:
        points, radius = rng.uniform(0, 1, (n, 3)), 10.0
    points = points.astype(np.float32)
    bench.label(order=cloud, size=f"{n:,}")
    for what, call in (
        ("radius_search, 16 at most", partial(kp.radius_search, points, None, radius, max_neighbors=16)),
        ("knn_search, k = 16", partial(kp.knn_search, points, None, 16)),
    ):
        bench.memory(what, call, 4 * 16 * n, "MiB beyond the result")
        bench.per_point(what, call, n)


def search_options(bench, order):
    """Other metrics, and a radius for each query, against the plain search with the same number of neighbours."""
    points = arranged(np.load(bench.folder / "cloud.npy"), order)
    plain = partial(kp.radius_search, points, None, RADIUS)
    num_pairs = bench.first(plain).num_pairs
    bench.label(order=order, size=f"{len(points):,}, H = {num_pairs / len(points):.1f}")
    radii = np.full(len(points), RADIUS, np.float32)
    bench.compare("radii", partial(kp.radius_search, points, None, radii), "scalar L2", plain)
    for metric in ("l1", "linf"):
        low, high = 0.5 * RADIUS, 2 * RADIUS  # bisection for the radius with the same number of neighbours
        for _ in range(14):
            middle = (low + high) / 2
            sample = kp.radius_search(points, points[::97].copy(), middle, metric=metric, count_only=True)
            low, high = (middle, high) if sample.mean() < num_pairs / len(points) else (low, middle)
        bench.compare(metric, partial(kp.radius_search, points, None, low, metric=metric), "scalar L2", plain)


def grid_subsample(bench, order):
    raw = np.load(bench.folder / "raw.npy")
    raw = np.ascontiguousarray(raw if order == "random" else raw[np.argsort(morton(raw))])
    rng = np.random.default_rng(4)
    features, labels = rng.random(raw.shape, np.float32), rng.integers(0, 8, len(raw), np.uint8)
    raw64 = raw.astype(np.float64)
    xyz, xyz64 = partial(kp.grid_subsample, raw, float(VOXEL)), partial(kp.grid_subsample, raw64, float(VOXEL))
    full = partial(xyz, features=features, labels=labels)
    nearest, largest = partial(xyz, position="nearest"), partial(xyz, features=features, feature="max")

    barycentres, inverse = subsample(raw)
    votes = np.bincount(inverse * 8 + labels, minlength=8 * len(barycentres)).reshape(-1, 8)
    means = np.column_stack([np.bincount(inverse, column) for column in features.T]) / votes.sum(1)[:, None]
    for call in (xyz, xyz64, full):
        sub = bench.first(call)
        assert np.array_equal(sub.inverse, inverse) and np.array_equal(sub.counts, votes.sum(1)), "voxels differ"
        assert np.allclose(sub.points, barycentres, rtol=0, atol=1e-3 * VOXEL), "barycentres differ"
    close([means], [sub.features])
    assert np.array_equal(sub.labels, votes.argmax(1)), "majority labels differ"
    from_center = raw64 - (np.floor(raw64 / VOXEL) + 0.5) * VOXEL
    by_voxel = np.lexsort((np.arange(len(raw)), (from_center**2).sum(1), inverse))
    starts = np.cumsum(votes.sum(1)) - votes.sum(1)
    assert np.array_equal(bench.first(nearest).points, raw[by_voxel[starts]]), "nearest points differ"
    maxima = np.maximum.reduceat(features[by_voxel], starts)
    assert np.array_equal(bench.first(largest).features, maxima), "maxima differ"

    bench.label(order=order, size=f"{len(raw):,}, {len(barycentres):,} voxels")
    check = partial(same_barycentres, barycentres)
    for what, call in (("xyz", xyz), ("xyz, 3 features, labels", full)):
        bench.rate(what, call, len(raw), "M points/s per core")
    bench.compare("xyz, 3 features, labels", full, "xyz alone", xyz)
    bench.compare("xyz nearest", nearest, "xyz alone", xyz)
    bench.compare("xyz, max of 3 features", largest, "xyz alone", xyz)
    gicp = {"points": raw64, "voxel": float(VOXEL), "threads": bench.threads}
    bench.against("xyz float64", xyz64, peers.SMALL_GICP, gicp, check, judged=bench.threads == 2)
    bench.against("xyz", xyz, peers.OPEN3D_VOXEL, {"points": raw, "voxel": float(VOXEL)}, check)


def farthest_point_sampling(bench):
    points = surface(bench.sizes["sheet"], seed=5)
    num = len(points) * 4096 // 100_000
    sample = partial(kp.farthest_point_sampling, points, num)
    index = bench.first(sample).index
    assert np.array_equal(index, sample(method="exact").index), "the two methods differ"

    def check(peer_result):
        # fpsample counts start_idx in its internal order, so it starts at another point. Equally far points may swap.
        ours = sample(start=int(peer_result[0])).index
        if np.array_equal(ours, peer_result):
            return
        at = int(np.argmax(ours != peer_result))
        both = points[[ours[at], peer_result[at]], None].astype(np.float64) - points[ours[:at]]
        assert np.isclose(*(both**2).sum(2).min(1), rtol=1e-6, atol=0), f"choice {at} of {num} is not the farthest"

    bench.label(order="random", size=f"{len(points):,}, {num:,} chosen")
    bench.rate("1 of 24", sample, len(points), "M points/s per core")
    bench.against("1 of 24", sample, peers.FPSAMPLE, {"points": points, "num": num}, check)


def features(bench, order):
    """Normals and covariance features of the 20 nearest points, and statistical outliers."""
    points, k = arranged(np.load(bench.folder / "cloud.npy")[: bench.sizes["pyramid"]], order), 20
    normals, shapes = partial(kp.normals, points, k=k), partial(kp.covariance_features, points, k=k)
    outliers = partial(kp.outlier_mask, points, mean_k=k - 1, std_mul=1.0)
    near = points[kp.knn_search(points, None, k).index.reshape(-1, k)].astype(np.float64)
    near -= near.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(np.einsum("nka,nkb->nab", near, near))
    flat = values[:, 1] - values[:, 0] > 0.05 * values[:, 2]
    expected = vectors[flat, :, 0]

    def check(peer_result):
        for result in (peer_result, bench.first(normals)):
            assert (abs((result[flat] * expected).sum(1)) > 1 - 1e-4).mean() > 0.999, "normals differ"

    check(bench.first(normals))
    assert np.array_equal(bench.first(shapes).normals, bench.first(normals)), "normals differ"
    bench.label(order=order, size=f"{len(points):,}, k = {k}")
    bench.rate("normals", normals, len(points), "M points/s per core")
    search = partial(kp.knn_search, points, None, k)
    bench.compare("normals", normals, "their search", search)
    bench.compare("covariance_features", shapes, "their search", search)
    bench.compare("outlier_mask", outliers, "their search", search)
    bench.against("normals", normals, peers.OPEN3D_NORMALS, {"points": points, "k": k}, check)


def neighbor_reduce(bench, order):
    """100,000 queries with 30 neighbours each, so that the padded matrix of the peers has no padding."""
    points, h = arranged(np.load(bench.folder / "cloud.npy")[: bench.sizes["pyramid"]], order), 30
    rng = np.random.default_rng(8)
    features, grad_out = rng.standard_normal((2, len(points), 128), np.float32)
    neighbors = kp.knn_search(points, None, h)
    index = neighbors.index.reshape(-1, h)
    bench.label(order=order, size=f"{len(points):,}, H = {h}")
    for reduce, join in (("max", np.maximum), ("mean", np.add)):
        what = f"{reduce}, C = {features.shape[1]}"
        forward = partial(kp.neighbor_reduce, features, neighbors, reduce)

        def step(forward=forward):
            out, pullback = kp.autodiff.vjp(lambda f: forward.func(f, *forward.args[1:]), features)
            return [out, *pullback(grad_out)]

        out = bench.first(forward)
        expected = features[index[:, 0]]
        for column in index.T[1:]:
            join(expected, features[column], out=expected)
        close([expected if reduce == "max" else expected / h], [out])
        bench.rate(what, forward, neighbors.num_pairs, "M pairs/s per core")
        inputs = {"features": features, "index": index}
        for peer in peers.POOLING[reduce]:
            bench.against(what, forward, peer, inputs, lambda peer_result, out=out: close([out], [peer_result]))
        out_and_gradient = step()
        bench.compare(f"{what}, forward + vjp", step, "its forward", forward)
        inputs |= {"grad_out": grad_out}
        check = partial(close, out_and_gradient)
        bench.against(f"{what}, forward + vjp", step, peers.POOLING_STEP[reduce], inputs, check)


def kpconv(bench, order, channels, coretype=None):
    problem = kpconv_problem(bench.folder, order, channels)
    features, weights, neighbors = problem["features"], problem["weights"], neighbors_of(problem)
    what, size = f"forward, C = {channels}", len(features)
    forward = partial(convolve, problem, neighbors, features, weights)
    out = bench.first(forward)
    aggregated = aggregate(problem)

    def check(peer_result):
        close([out], [peer_result])

    check(aggregated @ weights.reshape(-1, channels))
    bench.label(order=order, size=f"{size:,}, H = {len(problem['index']) / size:.1f}")
    product = {"aggregated": aggregated.astype(np.float32), "weights": weights}
    blas = f"OpenBLAS kernels: {peers.openblas_core()}"
    if coretype:
        forced = peers.NUMPY_MATMUL._replace(name=f"{peers.NUMPY_MATMUL.name}, {coretype}")
        bench.against(what, forward, forced, product, check, note=blas)
        return

    def floor():
        flops = 2 * KERNEL["num"] * channels * channels * size
        return bench.Seconds(flops / (kp.backends.cpu.fma_rate("float32") * bench.threads))

    bench.rate(what, forward, size, "M points/s per core")
    bench.compare(what, forward, "FMA floor", floor)
    if order == "voxel":
        bench.against(what, forward, peers.NUMPY_MATMUL, product, check, note=blas)
        if channels < 256:  # from 256 on, the peer's time is that of its matrix product, measured above
            bench.against(what, forward, peers.DENSE_FORWARD, problem, check)


def kpconv_vjp(bench, order):
    problem = kpconv_problem(bench.folder, order, 64)
    features, weights = problem["features"], problem["weights"]
    grad_out = np.random.default_rng(5).standard_normal(features.shape, np.float32)

    def step(neighbors):
        _, pullback = kp.autodiff.vjp(lambda f, w: convolve(problem, neighbors, f, w), features, weights)
        return pullback(grad_out)

    warm = neighbors_of(problem)
    both, forward = partial(step, warm), partial(convolve, problem, warm, features, weights)
    gradients = bench.first(both)
    grad = grad_out.astype(np.float64)
    expected_weights = (aggregate(problem).T @ grad).reshape(weights.shape)
    expected_features = sum(map(lambda influence, w: influence.T @ (grad @ w.T), influences(problem), weights))
    close([expected_features, expected_weights], gradients)
    what, size = "forward + vjp, C = 64", len(features)
    bench.label(order=order, size=f"{size:,}, H = {len(problem['index']) / size:.1f}")
    bench.compare(what, both, "its forward", forward)
    bench.compare(f"{what}, new Neighbors", lambda: step(neighbors_of(problem)), "its forward", forward)

    def convolve_positions(points, kernel_points, f, w):
        return kp.kpconv(points, None, warm, f, w, kernel_points, problem["extent"])

    _, without = kp.autodiff.vjp(lambda f, w: convolve(problem, warm, f, w), features, weights)
    positions = problem["points"], problem["kernel_points"]
    _, with_positions = kp.autodiff.vjp(convolve_positions, *positions, features, weights)
    bench.compare(
        "vjp with points and kernel points", lambda: with_positions(grad_out), "vjp without", lambda: without(grad_out)
    )
    if order == "voxel":
        bench.against(what, both, peers.DENSE_STEP, problem | {"grad_out": grad_out}, partial(close, gradients))


def ball_problem(size, order, channels, active=61):
    """Random points in the unit cube with some 61 neighbours each, and arrays for a continuous convolution."""
    rng = np.random.default_rng(4)
    points = arranged(rng.random((size, 3), np.float32), order)
    radius = (3 * active / (4 * np.pi * size)) ** (1 / 3)
    for _ in range(3):  # fewer at the faces of the cube
        mean = len(kp.radius_search(points, None, radius).index) / size
        radius *= (active / mean) ** (1 / 3)
    return {
        "points": points,
        "neighbors": kp.radius_search(points, None, radius),
        "features": rng.standard_normal((size, channels), np.float32),
        "filters": rng.standard_normal((4, 4, 4, channels, channels), np.float32) / np.float32(channels),
        "extent": np.float32(2 * radius),
    }


def continuous(problem, features, filters, **options):
    return kp.continuous_conv(problem["points"], None, problem["neighbors"], features, filters,
                              float(problem["extent"]), **options)  # fmt: skip


def sums_by_cell(problem):
    """A (M, cells * C): the features summed by filter cell in float64, from the formulas of the radial mapping."""
    from scipy.sparse import csr_array

    points, neighbors, sizes = problem["points"].astype(np.float64), problem["neighbors"], problem["filters"].shape[:3]
    relative = points[neighbors.index] - np.repeat(points, neighbors.counts, axis=0)
    relative *= 2 / float(problem["extent"])
    largest = np.abs(relative).max(1, keepdims=True)
    mapped = relative * np.linalg.norm(relative, axis=1, keepdims=True) / np.where(largest > 0, largest, 1)
    x, y, z = ((mapped[:, axis] + 1) / 2 * (size - 1) for axis, size in enumerate(sizes[::-1]))
    columns, features = [], problem["features"].astype(np.float64)
    for cell_z, cell_y, cell_x in np.ndindex(sizes):
        apart = np.abs(np.stack([np.clip(x, 0, sizes[2] - 1) - cell_x, np.clip(y, 0, sizes[1] - 1) - cell_y,
                                 np.clip(z, 0, sizes[0] - 1) - cell_z]))  # fmt: skip
        weights = np.maximum(0, 1 - apart).prod(0)
        matrix = csr_array((weights, neighbors.index, neighbors.row_splits), shape=(len(points), len(points)))
        columns.append(matrix @ features)
    return np.hstack(columns)


def continuous_conv(bench, order, channels, memory=None):
    size = bench.sizes["ball"]
    problem = ball_problem(size, order, channels)
    features, filters, neighbors = problem["features"], problem["filters"], problem["neighbors"]
    grad_out = np.random.default_rng(5).standard_normal(features.shape, np.float32)
    bench.label(order=order, size=f"{size:,}, H = {len(neighbors.index) / size:.1f}")

    def step(p=problem):
        out, pullback = kp.autodiff.vjp(lambda f, w: continuous(p, f, w), p["features"], p["filters"])
        return out, *pullback(grad_out[: len(p["points"])])

    forward = partial(continuous, problem, features, filters)
    if memory:
        step(ball_problem(100, order, channels))  # starts threads and loads code before memory is measured
        transpose = 0 if memory == "forward" else neighbors.index.nbytes + neighbors.row_splits.nbytes
        gradients = 0 if memory == "forward" else features.nbytes + 2 * filters.nbytes
        call = forward if memory == "forward" else step
        bench.memory(
            f"memory of {memory}, C = {channels}", call, features.nbytes + filters.nbytes + transpose + gradients
        )
        return
    out, sums = bench.first(forward), sums_by_cell(problem)

    def check(peer_result):
        close([out], [peer_result])

    check(sums @ filters.reshape(-1, channels).astype(np.float64))
    what, both = f"forward, C = {channels}", f"forward + vjp, C = {channels}"
    product = {"aggregated": sums.astype(np.float32), "weights": filters}
    blas = f"OpenBLAS kernels: {peers.openblas_core()}"
    _, *gradients = step()
    close([(sums.T @ grad_out).reshape(filters.shape)], gradients[1:])
    bench.rate(what, forward, size, "M points/s per core")
    bench.against(what, forward, peers.NUMPY_MATMUL, product, check, note=blas)
    bench.against(both, step, peers.NUMPY_MATMUL, product, check, note=blas)
    if order != "random":
        return
    inputs = {name: problem[name] for name in ("points", "features", "filters", "extent")}
    inputs |= {"index": neighbors.index, "row_splits": neighbors.row_splits}
    bench.against(what, forward, peers.OPEN3D_CCONV, inputs, check)
    bench.against(both, step, peers.OPEN3D_CCONV_STEP, inputs | {"grad_out": grad_out}, partial(close, gradients))
    rng = np.random.default_rng(6)
    importances, by_pair = rng.random(size, np.float32), rng.random(len(neighbors.index), np.float32)

    def all_gradients():
        primals = features, filters, problem["points"], np.full(1, problem["extent"]), importances, by_pair
        _, pullback = kp.autodiff.vjp(
            lambda f, w, p, e, m, a: kp.continuous_conv(
                p, None, neighbors, f, w, e, importances=m, neighbor_importances=a
            ),
            *primals,
        )  # fmt: skip
        return pullback(grad_out)

    all_gradients()
    bench.compare(f"with all gradients, C = {channels}", all_gradients, "features and filters", step)


def voxel_sheet(size, layers):
    """int32 voxels of a wavy sheet, in random order: with one layer 9 of 27 cells are active, with two layers 18."""
    side = int(np.sqrt(size / layers))
    x, y = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    z = (12 * np.sin(x / 25) + 9 * np.cos(y / 17)).astype(np.int32)
    coords = np.concatenate([np.stack([x, y, z + layer], -1).reshape(-1, 3) for layer in range(layers)])
    return np.random.default_rng(3).permutation(coords).astype(np.int32)


def sparse_conv(bench, active, channels=64):
    coords = voxel_sheet(bench.sizes["voxels"], active // 9)
    size, rng = len(coords), np.random.default_rng(4)
    features = rng.standard_normal((size, channels), np.float32)
    filters = rng.standard_normal((27, channels, channels), np.float32) / np.float32(channels)
    make_map = partial(kp.kernel_map, coords, kernel_size=3)
    kernel_map = bench.first(make_map)
    pairs = len(kernel_map.kernel_index)
    bench.label(order=f"{active} active cells", size=f"{size:,}, {pairs / size:.1f} cells")

    def layer(m=kernel_map, f=features):
        return kp.sparse_conv(m.neighbors, m.kernel_index, f, filters)

    out, what = bench.first(layer), f"submanifold, C = {channels}"
    expected = np.zeros(out.shape)
    query = np.repeat(np.arange(size), kernel_map.neighbors.counts)
    for cell, matrix in enumerate(filters.astype(np.float64)):
        chosen = kernel_map.kernel_index == cell
        np.add.at(expected, query[chosen], features[kernel_map.neighbors.index[chosen]] @ matrix)
    close([expected], [out])

    def check(peer_result):
        close([out], [peer_result])

    # The products of the active cells, with as many multiply-adds, as one product.
    product = {"aggregated": rng.standard_normal((pairs // 27, 27 * channels), np.float32), "weights": filters}
    blas = f"OpenBLAS kernels: {peers.openblas_core()}"
    bench.rate(what, layer, size, "M voxels/s per core")
    bench.against(what, layer, peers.NUMPY_MATMUL, product, lambda _: None, note=blas)
    inputs = {"coords": coords, "features": features, "filters": filters}
    if bench.threads == 1:
        bench.against(what, layer, peers.SPCONV, inputs, check)
    else:
        bench.absent(what, peers.SPCONV.name, "spconv 2.3.8 gives wrong sums with more than one thread on the CPU")
    bench.against(what, layer, peers.OPEN3D_SPARSE, inputs | {
        "index": kernel_map.neighbors.index, "row_splits": kernel_map.neighbors.row_splits,
        "kernel_index": kernel_map.kernel_index,
    }, check)  # fmt: skip
    both = f"submanifold and its map, C = {channels}"
    bench.against(both, lambda: layer(make_map()), peers.OPEN3D_SPARSE_LAYER, inputs, check)
    bench.compare("kernel map", make_map, "the layer", layer)
    strided = kp.kernel_map(coords, kernel_size=3, stride=2, padding=1, rule="spconv")
    coarse = rng.standard_normal((len(strided.out_coords), channels), np.float32)
    for name, other, inputs_of_map in (("strided", strided, features), ("inverse", strided.transpose(), coarse)):
        share = pairs / len(other.kernel_index)

        def per_pair(other=other, inputs_of_map=inputs_of_map, share=share):
            return bench.Seconds(share * timed(partial(layer, other, inputs_of_map))[1])

        bench.compare(f"{name}, per pair", per_pair, "the layer", layer)


def deform2d(bench, kind, memory=False):
    """Deformable kernels and deformable convolutions of images, 3 x 3 taps, C = 64."""
    rng, (batch, size) = np.random.default_rng(9), bench.sizes["images"]
    x, grad_out = rng.standard_normal((2, batch, 64, size, size), np.float32)
    depthwise = kind != "deformable"
    scope = 4 if kind == "deformable kernel" else 3
    weight = rng.standard_normal((64, 1 if depthwise else 64, scope, scope), np.float32)
    offsets = 0.5 * rng.standard_normal((batch, 18, size, size), np.float32)
    if kind == "deformable kernel":
        layer = partial(kp.deformable_kernel_conv2d, kernel_size=3, padding=1)
    else:
        # Within the image: grid_sample interpolates between its last pixel and zero in another way at other places.
        offsets = within_image(offsets, size)
        layer = partial(kp.deformable_conv2d, padding=1, groups=64 if depthwise else 1)
    bench.label(order=kind, size=f"{batch} x 64 x {size} x {size}")

    forward, step = image_calls(layer, (x, weight, offsets), grad_out)
    if memory:
        layer(x[:1, :, :8, :8].copy(), weight, offsets[:1, :, :8, :8].copy())  # starts threads and loads code
        bench.memory("memory of forward", forward, x.nbytes)
        bench.memory("memory of forward + vjp", step, 2 * x.nbytes + weight.nbytes + offsets.nbytes)
        return
    results = {"forward": bench.first(forward), "forward + vjp": bench.first(step)}
    inputs = {"x": x, "weight": weight, "offsets": offsets, "grad_out": grad_out, "depthwise": depthwise}
    for what, call, is_step in (("forward", forward, 0), ("forward + vjp", step, 1)):
        bench.rate(what, call, batch * size**2, "M positions/s per core")
        for pair in peers.IMAGE_PEERS["kernel" if kind == "deformable kernel" else "data"]:
            bench.against(what, call, pair[is_step], inputs, partial(close, results[what]))
    if kind == "deformable kernel":
        return
    plain = partial(layer, x, weight, None)
    bench.against("plain, forward", plain, peers.TORCH_CONV2D, inputs, lambda other: close([plain()], other))
    if not depthwise:
        product = {"aggregated": rng.standard_normal((batch * size**2, 9 * 64), np.float32), "weights": weight}
        blas = f"OpenBLAS kernels: {peers.openblas_core()}"
        bench.against("forward", forward, peers.NUMPY_MATMUL, product, lambda _: None, note=blas)


def image_calls(layer, arguments, grad_out):
    """(a layer's forward pass, its forward pass and gradients)."""

    def forward():
        return [layer(*arguments)]

    def step():
        out, pullback = kp.autodiff.vjp(layer, *arguments)
        return [out, *pullback(grad_out)]

    return forward, step


def image_kernels(bench, kind):
    """Convolutions of images with a kernel for each image: a mixture of 8 experts, or resampled by its offsets."""
    rng, (batch, size, channels) = np.random.default_rng(9), bench.sizes["image_kernels"]
    x, grad_out = rng.standard_normal((2, batch, channels, size, size), np.float32)
    if kind == "conditional":
        layer, weight = partial(kp.conditional_conv2d, padding=1), (8, channels, channels, 3, 3)
        of_images = rng.random((batch, 8), np.float32)
    else:
        layer = partial(kp.deformable_kernel_conv2d, kernel_size=3, padding=1)
        weight, of_images = (channels, channels, 4, 4), 0.5 * rng.standard_normal((batch, 18), np.float32)
    weight = rng.standard_normal(weight, np.float32)
    bench.label(order=kind, size=f"{batch} x {channels} x {size} x {size}")

    forward, step = image_calls(layer, (x, weight, of_images), grad_out)
    inputs = {"x": x, "weight": weight, "offsets": of_images, "grad_out": grad_out, "depthwise": False}
    for what, call, is_step in (("forward", forward, 0), ("forward + vjp", step, 1)):
        result = bench.first(call)
        bench.rate(what, call, batch * size**2, "M positions/s per core")
        bench.against(what, call, peers.IMAGE_PEERS["image"][0][is_step], inputs, partial(close, result))


def within_image(offsets, size):
    """Data offsets of 3 x 3 taps, changed so that all samples lie within the image."""
    axis, taps = np.arange(size, dtype=np.float32), np.arange(-1, 2, dtype=np.float32)
    offsets = offsets.reshape(-1, 3, 3, 2, size, size)
    rows = axis[:, None] + taps[:, None, None, None]
    columns = axis + taps[:, None, None]
    moved = [np.clip(at + offsets[:, :, :, i], 0.01, size - 1.01) - at for i, at in enumerate((rows, columns))]
    return np.stack(moved, 3).reshape(-1, 18, size, size)


def normalized(features, scale, shift, grad):
    """Batch normalisation followed by a leaky ReLU, and the gradients, by the formulas in float64."""
    relative = features - features.mean(0, dtype=np.float64)
    inverse = 1 / np.sqrt(np.square(relative).mean(0) + 1e-5)
    relative *= inverse
    out = relative * scale + shift
    slope = np.where(out > 0, 1, 0.1)
    grad = grad * slope
    grad_shift, grad_scale, n = grad.sum(0), (grad * relative).sum(0), len(features)
    grad_features = inverse * scale * (grad - grad_shift / n - relative * grad_scale / n)
    return [out * slope, grad_features, grad_scale, grad_shift]


def rows(bench):
    """Layers on rows of features. All except `linear` are limited by the memory bandwidth, hence the rows in GB/s."""
    rng, (n, c) = np.random.default_rng(8), (bench.sizes["rows"], 128)
    features, grad = rng.standard_normal((2, n, c), np.float32)
    scale, shift, mean, var = rng.random((4, c), np.float32)
    bench.label(order="", size=f"{n:,} x {c}")

    def normalize():
        layer = partial(kp.batch_norm, running_mean=mean, running_var=var, negative_slope=0.1)
        out, pullback = kp.autodiff.vjp(lambda *primals: layer(*primals).features, features, scale, shift)
        return [out, *pullback(grad)]

    what = "batch_norm + leaky_relu, forward + vjp"
    results = bench.first(normalize)
    close(normalized(features, scale, shift, grad), results)

    def check(peer_result):
        # torch sums in float32: its gradient of the scale is wrong by 0.5 %, and the slope of the leaky ReLU differs
        # for values that it rounds to the other side of zero.
        for ours, other in zip(results, peer_result, strict=True):
            assert abs(ours - other).mean() < 1e-2 * abs(ours).max(), "results differ"

    traffic = 8 * features.nbytes  # reads: 2 forward, 4 backward; writes: 1 and 1
    bench.rate(f"{what}, traffic", normalize, traffic / 1e3, "GB/s per core")
    inputs = {"features": features, "scale": scale, "shift": shift, "mean": mean, "var": var, "grad": grad}
    bench.against(what, normalize, peers.TORCH_BATCH_NORM, inputs, check)

    weights = rng.standard_normal((c, c), np.float32)
    product = partial(kp.linear, features, weights)
    out = bench.first(product)
    bench.against("linear, C = 128", product, peers.NUMPY_LINEAR, {"features": features, "weights": weights},
                  lambda peer_result: close([peer_result], [out]))  # fmt: skip

    def floor():
        return bench.Seconds(2 * n * c * c / (kp.backends.cpu.fma_rate("float32") * bench.threads))

    bench.compare("linear, C = 128", product, "FMA floor", floor)

    logits, labels = features[:, :13].copy(), rng.integers(0, 13, n)

    def loss():
        value, pullback = kp.autodiff.vjp(lambda x: kp.softmax_cross_entropy(x, labels), logits)
        return [value, *pullback(np.ones_like(value))]

    expected = bench.first(loss)
    bench.label(order="", size=f"{n:,} x 13")
    bench.against("softmax_cross_entropy, forward + vjp", loss, peers.TORCH_CROSS_ENTROPY,
                  {"logits": logits, "labels": labels}, partial(close, expected))  # fmt: skip


def fitting_step(points, neighbors, kernel_points, offsets):
    """[loss, gradient of the offsets] of the fitting loss."""
    loss, pullback = kp.autodiff.vjp(
        lambda o: kp.fitting_loss(points, None, neighbors, kernel_points, o, EXTENT), offsets
    )
    return [loss, *pullback(np.ones_like(loss))]


def repulsion_step(kernel_points, offsets):
    """[loss, gradient of the offsets] of the repulsion loss."""
    loss, pullback = kp.autodiff.vjp(lambda o: kp.repulsion_loss(kernel_points, o, EXTENT), offsets)
    return [loss, *pullback(np.ones_like(loss))]


def deformation(bench, order):
    """The two losses of a deformable layer and their gradients, for offsets of about a third of the extent."""
    problem = {
        name: a for name, a in kpconv_problem(bench.folder, order, 1).items() if name not in ("features", "weights")
    }
    points, kernel_points, neighbors = problem["points"], problem["kernel_points"], neighbors_of(problem)
    shape = len(points), *kernel_points.shape
    offsets = np.random.default_rng(8).standard_normal(shape, np.float32) * np.float32(EXTENT / 3)
    fit = partial(fitting_step, points, neighbors, kernel_points, offsets)
    repel = partial(repulsion_step, kernel_points, offsets)

    def both():
        return fit() + repel()

    out = bench.first(both)
    deformed = kernel_points.astype(np.float64) + offsets
    relative = points[problem["index"]].astype(np.float64) - np.repeat(points, neighbors.counts, axis=0)
    rows, nearest = np.repeat(np.arange(len(points)), neighbors.counts), np.empty(shape[:2])
    for k in range(KERNEL["num"]):
        squared = ((relative - deformed[rows, k]) ** 2).sum(1)
        nearest[:, k] = np.minimum.reduceat(squared, problem["row_splits"][:-1])
    apart = [np.linalg.norm(deformed - np.roll(deformed, k, 1), axis=2) / EXTENT for k in range(1, KERNEL["num"])]
    close([nearest.mean() / EXTENT**2, (np.minimum(0, np.array(apart) - 1.2) ** 2).sum(0).mean()], out[::2])

    bench.label(order=order, size=f"{len(points):,}, H = {len(problem['index']) / len(points):.1f}")
    bench.rate("fitting, forward + vjp", fit, len(points), "M points/s per core")
    bench.rate("repulsion, forward + vjp", repel, len(points), "M points/s per core")
    bench.rate("both losses, forward + vjp", both, len(points), "M points/s per core")
    if order == "voxel":
        inputs = problem | {"offsets": offsets}
        bench.against("both losses, forward + vjp", both, peers.DENSE_LOSSES, inputs, partial(close, out))


def deformable_problem(folder, order):
    """A patch as of `kpconv_problem`, and weights of a convolution for the offsets, which are up to the extent."""
    problem = kpconv_problem(folder, order, 64)
    rng, num = np.random.default_rng(8), KERNEL["num"]
    problem["offset_weights"] = rng.standard_normal((num, 64, 3 * num), np.float32) / np.float32(40)
    return problem | {"grad_out": rng.standard_normal(problem["features"].shape, np.float32)}


def deformable_layer(problem, neighbors):
    """(output, function from its gradient to those of features, weights and weights of the offsets)."""
    points, kernel_points, extent = problem["points"], problem["kernel_points"], problem["extent"]

    def to_offsets(features, weights):
        return kp.kpconv(points, None, neighbors, features, weights, kernel_points, extent)

    def deformed(features, weights, offsets):
        return kp.kpconv(points, None, neighbors, features, weights, kernel_points, extent, offsets=offsets)

    features, scale = problem["features"], np.float32(extent)
    raw, offsets_pullback = kp.autodiff.vjp(to_offsets, features, problem["offset_weights"])
    offsets = (scale * raw).reshape(len(points), -1, 3)
    out, pullback = kp.autodiff.vjp(deformed, features, problem["weights"], offsets)

    def whole_pullback(grad):
        grad_features, grad_weights, grad_offsets = pullback(grad)
        grad_through_offsets, grad_offset_weights = offsets_pullback(scale * grad_offsets.reshape(raw.shape))
        return grad_features + grad_through_offsets, grad_weights, grad_offset_weights

    return out, whole_pullback


def deformable(bench, order):
    """A deformable layer with the convolution that computes its offsets, on the neighbours of a rigid layer."""
    problem = deformable_problem(bench.folder, order)
    neighbors, features, weights = neighbors_of(problem), problem["features"], problem["weights"]

    def forward():
        return deformable_layer(problem, neighbors)[0]

    def step():
        return deformable_layer(problem, neighbors)[1](problem["grad_out"])

    def rigid():
        for _ in range(2):
            convolve(problem, neighbors, features, weights)

    def rigid_step():
        for _ in range(2):
            _, pullback = kp.autodiff.vjp(lambda f, w: convolve(problem, neighbors, f, w), features, weights)
            pullback(problem["grad_out"])

    out, gradients = bench.first(forward), bench.first(step)
    bench.label(order=order, size=f"{len(features):,}, H = {len(problem['index']) / len(features):.1f}")
    bench.compare("forward, C = 64", forward, "two rigid", rigid)
    bench.compare("forward + vjp, C = 64", step, "two rigid", rigid_step)
    points, kernel_points = problem["points"], problem["kernel_points"]
    raw = kp.kpconv(points, None, neighbors, features, problem["offset_weights"], kernel_points, EXTENT)
    offsets = np.float32(EXTENT) * raw.reshape(len(points), -1, 3)

    def losses():
        return fitting_step(points, neighbors, kernel_points, offsets) + repulsion_step(kernel_points, offsets)

    bench.compare("both losses, forward + vjp", losses, "the layer's step", step)
    if order == "voxel":
        bench.against("forward, C = 64", forward, peers.DENSE_DEFORMABLE, problem, lambda other: close([out], [other]))
        bench.against("forward + vjp, C = 64", step, peers.DENSE_DEFORMABLE_STEP, problem, partial(close, gradients))


def kpconv_kernel_offsets(bench, order):
    """A convolution with kernel offsets of about a third of the least distance between its kernel points."""
    problem = kpconv_problem(bench.folder, order, 64)
    rng, neighbors, kernel_points = np.random.default_rng(8), neighbors_of(problem), problem["kernel_points"]
    apart = np.linalg.norm(kernel_points[:, None] - kernel_points, axis=2)
    extent = float(apart[apart > 0].min())
    offsets = rng.standard_normal((len(problem["points"]), *kernel_points.shape), np.float32) * np.float32(extent / 5)
    inputs = problem["features"], problem["weights"]
    grad_out = rng.standard_normal(inputs[0].shape, np.float32)

    def convolved(features, weights, kernel_offsets):
        return kp.kpconv(problem["points"], None, neighbors, features, weights, kernel_points, EXTENT,
                         kernel_offsets=kernel_offsets, kernel_extent=extent)  # fmt: skip

    def forward():
        return convolved(*inputs, offsets)

    def step():
        return kp.autodiff.vjp(convolved, *inputs, offsets)[1](grad_out)

    def rigid():
        return convolve(problem, neighbors, *inputs)

    def rigid_step():
        return kp.autodiff.vjp(partial(convolve, problem, neighbors), *inputs)[1](grad_out)

    out, gradients = bench.first(forward), bench.first(step)
    places = kernel_points.astype(np.float64) + offsets
    shares = np.maximum(0, 1 - np.linalg.norm(places[:, :, None] - kernel_points, axis=3) / extent)
    mixed = shares.transpose(0, 2, 1) @ aggregate(problem).reshape(len(out), KERNEL["num"], -1)
    close([mixed.reshape(len(out), -1) @ inputs[1].reshape(-1, 64)], [out])
    bench.label(order=order, size=f"{len(out):,}, H = {len(problem['index']) / len(out):.1f}")
    bench.compare("forward, C = 64", forward, "rigid", rigid)
    bench.compare("forward + vjp, C = 64", step, "rigid", rigid_step)
    if order == "voxel":
        problem |= {"kernel_offsets": offsets, "kernel_extent": extent}
        bench.against("forward, C = 64", forward, peers.DENSE_RESAMPLED, problem, lambda other: close([out], [other]))
        problem |= {"grad_out": grad_out}
        bench.against("forward + vjp, C = 64", step, peers.DENSE_RESAMPLED_STEP, problem, partial(close, gradients))


def memory(bench, implementation, layer):
    """Peak resident memory of the first call of a process minus the output and, for kpcore, the packed weights."""
    deforms = layer == "deformable"
    problem = deformable_problem(bench.folder, "voxel") if deforms else kpconv_problem(bench.folder, "voxel", 64)
    size, output, end = len(problem["points"]), problem["features"].nbytes, problem["row_splits"][100]
    small = problem | {"index": np.minimum(problem["index"][:end], 99), "row_splits": problem["row_splits"][:101]}
    small |= {"points": problem["points"][:100], "features": problem["features"][:100, :1].copy()}
    small["weights"] = problem["weights"][:, :1, :1].copy()  # one channel, so that scratch memory stays small
    if deforms:
        output += sum(problem[name].nbytes for name in ("features", "weights", "offset_weights"))  # gradients
        small |= {"offset_weights": problem["offset_weights"][:, :1].copy(), "grad_out": problem["grad_out"][:100, :1]}
    what = "deformable step, C = 64" if deforms else "kpconv forward, C = 64"
    bench.label(order="voxel", size=f"{size:,}, H = {len(problem['index']) / size:.1f}")
    if implementation == "kpcore":

        def call(p, n):
            if deforms:
                return deformable_layer(p, n)[1](p["grad_out"])
            return convolve(p, n, p["features"], p["weights"])

        big = neighbors_of(problem)
        call(small, neighbors_of(small))  # starts threads and loads code before memory is measured
        bench.memory(what, lambda: call(problem, big), output + problem["weights"].nbytes)
        return
    peer = peers.DENSE_DEFORMABLE_STEP if deforms else peers.DENSE_FORWARD
    if reason := peers.missing(peer):
        bench.absent(f"dense torch {what.removeprefix('kpconv ')}", None, reason)
    else:
        peer.setup(**small)()
        bench.memory(f"dense torch {what.removeprefix('kpconv ')}", peer.setup(**problem), output)


def overhead(bench):
    """What a framework adds to the time of a call, measured on ten points, which the operator computes at once."""
    op = kp.ops.OPS["kpconv"]
    rng = np.random.default_rng(8)
    points, features = rng.random((2, 10, 3), np.float32)
    weights, grad = rng.random((4, 3, 2), np.float32), rng.random((10, 2), np.float32)
    arguments = {"points": points, "queries": None, "neighbors": kp.radius_search(points, None, 0.3)}
    arguments |= {"kernel_points": rng.random((4, 3), np.float32) / 4, "extent": 0.5}
    arguments["neighbors"].transpose()
    settings = {"influence": "linear", "aggregation": "sum", "normalization": None}
    settings |= {"groups": 1, "offsets": None, "modulations": None}
    call = partial(kp.kpconv, **arguments)
    differentiated = {"features": features, "weights": weights}

    def forward():
        return call(**differentiated)

    def forward_and_vjp():
        everything = {**arguments, **differentiated, **settings}
        out, saved = op.compute(op.check(**everything))  # checked in both passes, as frameworks do
        return out, tuple(op.gradients(op.check(**everything), saved, grad, {"features", "weights"}).values())

    def tape():
        out, pullback = kp.autodiff.vjp(lambda f, w: call(features=f, weights=w), features, weights)
        return out, pullback(grad)

    bench.label(order="", size="10")
    expected, gradients = forward_and_vjp()
    close(gradients, tape()[1])
    bench.beyond("tape, forward + vjp", tape, "the calls alone", forward_and_vjp)
    if reason := peers.missing(peers.TORCH):
        bench.absent("torch", None, reason)
    else:
        import torch

        tensors = {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        torch_call, torch_grad = partial(kp.torch.kpconv, **tensors), torch.from_numpy(grad)
        plain = {name: torch.from_numpy(a) for name, a in differentiated.items()}
        leaves = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in differentiated.items()}

        def backward():
            return torch.autograd.grad(torch_call(**leaves), tuple(leaves.values()), torch_grad)

        close([expected], [torch_call(**plain).numpy()])
        close(gradients, [g.numpy() for g in backward()])
        bench.beyond("torch, forward", lambda: torch_call(**plain), "the calls alone", forward)
        bench.beyond("torch, forward + backward", backward, "the calls alone", forward_and_vjp)
    if reason := peers.missing(peers.JAX):
        bench.absent("JAX", None, reason)
    else:
        import jax

        arrays = {name: a for name, a in arguments.items() if name not in ("queries", "extent")}
        arrays = jax.device_put(arrays | differentiated)
        under_jit = jax.jit(partial(kp.jax.kpconv, queries=None, extent=0.5))
        close([expected], [np.asarray(under_jit(**arrays))])
        bench.beyond(
            "JAX under jit, forward", lambda: under_jit(**arrays).block_until_ready(), "the calls alone", forward
        )


def growth(bench, op):
    """Time and memory against the number of points; larger clouds are copies of the cloud side by side."""
    cloud = np.load(bench.folder / "cloud.npy")
    period = np.float32(np.ceil(np.ptp(cloud[:, 0]) / VOXEL) + 8) * VOXEL
    what = {"kdtree": "KDTree, radius_search", "pyramid": "build_pyramid", "kpconv": "kpconv, C = 64"}.get(op, op)
    if op == "farthest_point_sampling":
        what += " of 4,096"
    for n in bench.sizes["growth"]:
        bench.label(order="random" if op == "grid_subsample" else "voxel", size=f"{n:,}")
        if n * GROWING[op] > bench.free_memory():
            bench.absent(what, None, f"needs about {n * GROWING[op] / 2**30:.0f} GiB of free memory")
            continue
        if op == "grid_subsample":
            points = surface(n)
        else:
            points = np.concatenate([cloud + np.float32([i, 0, 0]) * period for i in range(-(-n // len(cloud)))])[:n]
        search = partial(kp.radius_search, points, None, RADIUS)
        if op == "kpconv":
            rng, neighbors = np.random.default_rng(6), search()
            problem = {"points": points, "kernel_points": kp.kernel_points(**KERNEL), "extent": EXTENT}
            features, weights = rng.random((n, 64), np.float32), rng.random((KERNEL["num"], 64, 64), np.float32)
            call = partial(convolve, problem, neighbors, features, weights)
        else:
            call = {
                "grid_subsample": partial(kp.grid_subsample, points, float(VOXEL)),
                "radius_search": search,
                "kdtree": lambda points=points: kp.KDTree(points).radius_search(None, RADIUS),
                "knn_search": partial(kp.knn_search, points, None, 16),
                "pyramid": partial(kp.build_pyramid, points, voxel_size=float(VOXEL), num_levels=5, subsampled=True),
                "farthest_point_sampling": partial(kp.farthest_point_sampling, points, min(n, 4096)),
            }[op]
        bench.per_point(what, call, n, bytes_per_point=bench.peak(call) / n)
