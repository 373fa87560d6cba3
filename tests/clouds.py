"""Nasty (adversarial) point clouds by name, hypothesis strategies for them, KPConv inputs, and readers of real scans.

The readers use NumPy only, so that tests do not depend on kpcore.io.
"""

import math
from dataclasses import dataclass

import numpy as np
import reference
from hypothesis import strategies as st

# Just below, at and above multiples of SIMD widths, tiles (about 60 points) and chunks.
SIZES = [15, 16, 17, 59, 60, 61, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4097]


def lattice(rng, dim, spacing, num):
    """Points of a lattice in random order; with a radius of a few spacings many distances are equal to the radius."""
    side = max(2, round(num ** (1 / dim)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * dim), -1).reshape(-1, dim)
    return rng.permutation(grid - side // 2) * spacing


def on_a_line(rng, dim, num):
    return rng.uniform(-1, 1, (num, 1)) * rng.uniform(0.2, 1, dim)


def mixed_density(rng, dim, num):
    return rng.normal(size=(num, dim)) * np.geomspace(1e-4, 1, max(num, 1))[:num, None]


def cluster_and_outliers(rng, dim, num, far):
    """Most points within 1e-3, the others up to `far` away."""
    return np.where(
        rng.uniform(size=(num, 1)) < 0.1, rng.uniform(-far, far, (num, dim)), rng.normal(size=(num, dim)) * 1e-3
    )


# name: (points in float64 from (rng, dim, num), radius)
NASTY = {
    "empty": (lambda rng, dim, num: np.empty((0, dim)), 0.1),
    "one_point": (lambda rng, dim, num: rng.normal(size=(1, dim)), 0.1),
    "all_equal": (lambda rng, dim, num: np.full((num, dim), 0.1) * (np.arange(dim) > 0), 0.1),  # 0 on the first axis
    "duplicates": (lambda rng, dim, num: rng.choice(rng.uniform(0, 1, (num // 5 + 1, dim)), num), 0.2),
    "lattice_ties": (lambda rng, dim, num: lattice(rng, dim, 0.1, num), 0.3),
    "lattice_far_away": (lambda rng, dim, num: lattice(rng, dim, 0.1, num) + 1000.3, 0.3),
    "dyadic_lattice": (lambda rng, dim, num: lattice(rng, dim, 0.25, num), 0.5),
    "collinear": (lambda rng, dim, num: on_a_line(rng, dim, num), 0.05),
    "along_axis": (lambda rng, dim, num: rng.uniform(-1, 1, (num, 1)) * (np.arange(dim) == dim - 1), 0.05),
    "planar": (lambda rng, dim, num: rng.uniform(-1, 1, (num, dim)) * (np.arange(dim) > 0) + 0.5, 0.2),
    "far_away": (lambda rng, dim, num: 5e6 + rng.uniform(0, 2, (num, dim)), 0.3),  # steps of 0.5 in float32
    "mixed_density": (lambda rng, dim, num: mixed_density(rng, dim, num), 0.05),
    "cluster_and_outliers": (lambda rng, dim, num: cluster_and_outliers(rng, dim, num, 1e3), 1e-3),
    "sparse_beyond_64_bits": (lambda rng, dim, num: cluster_and_outliers(rng, dim, num, 1e8), 1e-3),
    "astronomic": (lambda rng, dim, num: rng.normal(size=(num, dim)) * 1e19, 1e18),  # some squares overflow float32
    "everything_within": (lambda rng, dim, num: rng.normal(size=(num, dim)), 1e3),
    "nothing_within": (lambda rng, dim, num: rng.normal(size=(num, dim)), 1e-6),
}


WITHOUT_ZEROS = ("all_equal", "lattice_far_away", "far_away")  # with zeros they would not be equal, or far away


def nasty(name, dim=3, dtype=np.float32, num=300, seed=0):
    """-> (points, radius)

    Except in WITHOUT_ZEROS, a tenth of the points have 0 as first coordinate, and half of these are at the origin. Half
    of all zeros are -0.0, so that equal points may have different bits.
    """
    make, radius = NASTY[name]
    rng = np.random.default_rng(seed)
    points = make(rng, dim, num)
    if name not in WITHOUT_ZEROS:
        place = rng.uniform(size=(len(points), 1))
        points[(place < 0.1) & ((place < 0.05) | (np.arange(dim) == 0))] = 0
    return np.where((points == 0) & (rng.uniform(size=points.shape) < 0.5), -0.0, points).astype(dtype), radius


def uniform(num, dim=3, dtype=np.float32, seed=0, per_ball=20):
    """-> (points, radius): random points in the unit cube and the radius that holds about `per_ball` of them."""
    points = np.random.default_rng(seed).uniform(0, 1, (num, dim)).astype(dtype)
    unit_ball = math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    return points, (per_ball / max(num, 1) / unit_ball) ** (1 / dim)


def splits(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


# ---- hypothesis

dims, float_types, seeds = st.sampled_from([2, 3]), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1)


@st.composite
def clouds(draw, dim=None, dtype=None, max_num=200):
    """-> (points, radius) of a nasty cloud."""
    dim, dtype = dim or draw(dims), dtype or draw(float_types)
    return nasty(draw(st.sampled_from(list(NASTY))), dim, dtype, draw(st.integers(1, max_num)), draw(seeds))


@st.composite
def row_splits_of(draw, num, num_items=None):
    """row_splits of a batch of `num` rows; items may be empty."""
    num_items = num_items or draw(st.integers(1, 5))
    cuts = draw(st.lists(st.integers(0, num), min_size=num_items - 1, max_size=num_items - 1))
    return np.array([0, *sorted(cuts), num], np.int64)


# ---- KPConv inputs


@dataclass(frozen=True)
class Case:
    points: np.ndarray
    queries: np.ndarray
    rows: list  # neighbours of each query
    features: np.ndarray
    weights: np.ndarray
    kernel_points: np.ndarray
    extent: float
    grad: np.ndarray  # of the output

    def csr(self):
        """The arguments of a Neighbors: index, row_splits, num_points."""
        index = np.concatenate([*self.rows, np.empty(0, int)]).astype(np.int32)
        return index, splits([len(row) for row in self.rows]), len(self.points)

    def reference(self, **options):
        """-> {"out", "grad_features", "grad_weights": (values, magnitude, the same sums over absolute values)}"""
        rows = reference.kpconv_rows(
            self.points, self.queries, self.rows, self.features, self.kernel_points, self.extent, **options
        )
        arrays = self.features, self.weights, self.grad
        values, magnitudes = (
            (reference.kpconv(rows, f, w), *reference.kpconv_vjp(rows, f, w, g))
            for f, w, g in (arrays, map(np.abs, arrays))
        )
        names = "out", "grad_features", "grad_weights"
        return {name: pair for name, *pair in zip(names, values, magnitudes, strict=True)}


def kpconv_case(points, queries, rows, radius, num_kernel=15, cin=4, cout=6, feature_type=np.float32, seed=0):
    """A case with random features (a third negative), weights and kernel points; `rows` are the neighbours."""
    rng = np.random.default_rng(seed)
    dim, dtype = points.shape[1], points.dtype
    features = rng.uniform(0.1, 1, (len(points), cin)) * np.where(rng.uniform(size=(len(points), 1)) < 0.3, -1, 1)
    return Case(
        points=points,
        queries=queries,
        rows=rows,
        features=features.astype(feature_type),
        weights=rng.normal(size=(num_kernel, cin, cout)).astype(feature_type),
        kernel_points=(rng.normal(size=(num_kernel, dim)) * (radius / 2)).astype(dtype),
        extent=0.6 * radius,
        grad=rng.normal(size=(len(queries), cout)).astype(feature_type),
    )


def random_case(num_points=200, num_queries=61, dim=3, geometry_type=np.float32, seed=0, **sizes):
    """A case with uniform points; every tenth query has no neighbours."""
    points, radius = uniform(num_points, dim, geometry_type, seed)
    queries = np.random.default_rng(seed + 1).uniform(-0.1, 1.1, (num_queries, dim)).astype(geometry_type)
    queries[::10] += 5
    rows, _ = reference.radius_search(points, queries, radius)
    return kpconv_case(points, queries, rows, radius, seed=seed, **sizes)


# ---- real scans


def read_pcd(path):
    """Binary PCD whose fields are all float32 -> float32 points."""
    header, _, body = path.read_bytes().partition(b"DATA binary\n")
    return np.frombuffer(body, np.float32).reshape(-1, len(header.split(b"FIELDS")[1].split(b"\n")[0].split()))[:, :3]


def read_ply(path):
    """Binary little-endian PLY whose properties are all float -> float32 points."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    return np.frombuffer(body, np.float32).reshape(-1, header.count(b"property float"))[:, :3]


def read_las(path):
    """LAS 1.4 point format 8 -> (float64 points, uint8 labels)."""
    data = path.read_bytes()
    start, size = int(np.frombuffer(data, "<u4", 1, 96)[0]), int(np.frombuffer(data, "<u2", 1, 105)[0])
    records = np.frombuffer(
        data,
        np.dtype({"names": ["xyz", "label"], "formats": ["(3,)<i4", "u1"], "offsets": [0, 16], "itemsize": size}),
        offset=start,
    )
    scale, offset = np.frombuffer(data, "<f8", 6, 131).reshape(2, 3)
    return records["xyz"] * scale + offset, records["label"]


# name: (file, points from its path, voxel size); metres
SCANS = {
    "room": ("fragment.pcd", read_pcd, 0.04),
    "street": ("source.ply", read_ply, 0.3),
    "car": ("car_cloud400.csv", lambda path: np.loadtxt(path, delimiter=",", skiprows=1)[:, :3], 0.05),
    "airborne": ("ign_50x100m.las", lambda path: read_las(path)[0], 1.0),  # coordinates around 6.6e6, needs float64
}
