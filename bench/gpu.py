"""Measures operators on a GPU, with targets: ``python bench/run.py gpu``.

The bandwidth of a copy is measured first, as a bound. Each case checks that its result agrees with that of the CPU and
takes the median time of 20 calls between two events on CuPy's stream, after a warm-up call, including the time of
Python. A peer runs in the same process, right after; for kpconv one peer is cuBLAS with the same matrix product alone.
"""

import contextlib
import json
import statistics
import time
from datetime import datetime, timezone

import cases
import numpy as np
import peers

import kpcore as kp

# {(case, what, against): target}. Without a peer a target is in ms or MiB. With a peer it is how many times faster we
# are; with a bound, our time as a multiple of the bound's, or the fraction of the bandwidth that we reach.
TARGETS = {
    ("radius_search", "1M points", None): ("<=", 1.5),
    ("radius_search", "1M points", "cupyx KDTree"): (">=", 20),
    ("radius_search", "1M points", "torch brute force"): (">=", 20),
    ("grid_subsample", "xyz", None): ("<=", 2.0),
    ("grid_subsample", "its mean of features", "copy bandwidth"): (">=", 0.5),
    ("kpconv", "forward, C = 64", None): ("<=", 3.5),
    ("kpconv", "forward, C = 256", "bare cuBLAS"): ("<=", 1.2),
    ("kpconv", "forward, C = 64", "dense torch"): (">=", 15),
    ("kpconv", "forward, C = 64", "dense torch, compiled"): (">=", 15),
    ("kpconv", "forward, C = 256, TF32", "bare cuBLAS"): ("<=", 1.5),
    ("kpconv", "forward, C = 256, bfloat16", "bare cuBLAS"): ("<=", 1.5),
    ("kpconv_vjp", "forward + vjp, C = 64", "its forward"): ("<=", 3.3),
    ("pyramid", "5 levels of 100k points", None): ("<=", 5.0),
    ("memory", "kpconv forward, C = 64", None): ("<=", 512),
}
SIZES = {
    "full": {
        "cloud": 1_000_000,
        "raw": 10_000_000,
        "dense": 100_000,
        "pyramid": 100_000,
        "copy": 1 << 30,
        "repeats": 20,
    },
    "quick": {"cloud": 300, "raw": 500, "dense": 200, "pyramid": 300, "copy": 1 << 12, "repeats": 1},
}
HEADER = ["case", "what", "ms (min–max)", "against", "its ms", "measured", "target", "verdict"]


class Bench:
    def __init__(self, sizes, compare):
        import cupy

        self.cupy, self.sizes, self.compare_with, self.rows = cupy, sizes, compare, []

    def times(self, call, repeats=None):
        """{median, min, max} of the times of a call, in ms."""
        call()
        samples = []
        for _ in range(repeats or self.sizes["repeats"]):
            begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples.append(self.cupy.cuda.get_elapsed_time(begin, end))
        return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}

    def row(self, case, what, value, unit, against=None, ours=None, theirs=None, note=""):
        target = self.compare_with.get((case, what, against))
        verdict = "" if target is None or value is None else "MISSED"
        if verdict and {"<=": value <= target[1], ">=": value >= target[1]}[target[0]]:
            verdict = "met"
        row = {"case": case, "what": what, "ours": ours, "against": against, "theirs": theirs, "value": value}
        self.rows.append(row | {"unit": unit, "target": target, "verdict": note or verdict})
        print(" | ".join(filter(None, cells(self.rows[-1]))), flush=True)

    def peer(self, case, what, ours, against, make, unit="x faster"):
        """Compare with a peer if it is installed; `make` checks its result and returns the call to time."""
        try:
            call = make()
        except (ImportError, FileNotFoundError, AttributeError, RuntimeError) as error:
            self.row(case, what, None, "", against, ours, note=f"missing ({error})".replace("\n", " "))
            return
        theirs = self.times(call, 3)
        ratio = theirs["median"] / ours["median"]
        self.row(case, what, ratio if unit == "x faster" else 1 / ratio, unit, against, ours, theirs)


def cells(row):
    def digits(x):
        return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"

    ours, theirs = row["ours"], row["theirs"]
    return [
        row["case"],
        row["what"],
        "{} ({}–{})".format(*(digits(ours[name]) for name in ("median", "min", "max"))) if ours else "",
        row["against"] or "",
        digits(theirs["median"]) if theirs else "",
        f"{digits(row['value'])} {row['unit']}" if row["value"] is not None else "",
        f"{row['target'][0]} {digits(row['target'][1])}" if row["target"] else "",
        row["verdict"],
    ]


def close(got, expected, tolerance):
    error = np.abs(got.get().astype(np.float64) - expected).max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=0), f"differs from the CPU by {error}"


# ---- the machine


def ceilings(bench):
    """Measure the bandwidth of a copy; return it in bytes per ms."""
    cupy, n = bench.cupy, bench.sizes["copy"] // 4
    source, target = cupy.ones(n, np.float32), cupy.empty(n, np.float32)

    def copy():
        target[...] = source

    taken = bench.times(copy)
    bandwidth = 8 * n / taken["median"]
    bench.row("ceiling", "copy", bandwidth / 1e9, "TB/s", ours=taken)
    return bandwidth


# ---- cases


def radius_search(bench, cloud, bandwidth):
    cupy, points = bench.cupy, bench.cupy.asarray(cloud)
    expected = kp.radius_search(cloud, None, cases.RADIUS)
    got = kp.radius_search(points, None, cases.RADIUS)
    assert np.array_equal(got.index.get(), expected.index) and np.array_equal(got.row_splits.get(), expected.row_splits)
    ours = bench.times(lambda: kp.radius_search(points, None, cases.RADIUS))
    bench.row("radius_search", "1M points", ours["median"], "ms", ours=ours)
    least = points.nbytes + got.index.nbytes + got.row_splits.nbytes
    bench.row(
        "radius_search",
        "1M points",
        least / bandwidth / ours["median"],
        "of copying in and out",
        "copy bandwidth",
        ours,
    )

    def tree():
        from cupyx.scipy.spatial import KDTree

        made = KDTree(points)
        distance, _ = made.query(points[:100], k=64, distance_upper_bound=cases.RADIUS)
        assert (cupy.isfinite(distance).sum(1) == got.counts[:100]).all()
        return lambda: KDTree(points).query(points, k=int(got.counts.max()), distance_upper_bound=cases.RADIUS)

    bench.peer("radius_search", "1M points", ours, "cupyx KDTree", tree)

    def brute_force():
        import torch

        tensor = torch.from_dlpack(points)
        some = tensor[:: max(1, len(cloud) // 2000)]

        def call():  # the time for a part of the queries, which is scaled to all of them below
            start = time.perf_counter()
            near = torch.cat([torch.cdist(q[None], tensor[None])[0] <= cases.RADIUS for q in some.split(250)])
            near.nonzero()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        call()
        taken = 1000 * call() * len(cloud) / len(some)
        bench.row("radius_search", "1M points", taken / ours["median"], "x faster", "torch brute force", ours,
                  {"median": taken})  # fmt: skip

    with contextlib.suppress(ImportError, AttributeError, RuntimeError, AssertionError):
        brute_force()


def grid_subsample(bench, raw, bandwidth):
    cupy, points = bench.cupy, bench.cupy.asarray(raw)
    expected, got = kp.grid_subsample(raw, cases.VOXEL), kp.grid_subsample(points, float(cases.VOXEL))
    assert np.array_equal(got.points.get(), expected.points) and np.array_equal(got.inverse.get(), expected.inverse)
    ours = bench.times(lambda: kp.grid_subsample(points, float(cases.VOXEL)))
    bench.row("grid_subsample", "xyz", ours["median"], "ms", ours=ours)
    features = cupy.ones((len(raw), 64), np.float32)
    with_features = bench.times(lambda: kp.grid_subsample(points, float(cases.VOXEL), features=features))
    size = features.nbytes + 4 * 64 * len(got.points)
    share = size / max(with_features["median"] - ours["median"], 1e-6) / bandwidth
    bench.row(
        "grid_subsample", "its mean of features", share, "of the bandwidth", "copy bandwidth", with_features, ours
    )


def problem(cloud, channels, dtype, xp):
    rng, kernel_points = np.random.default_rng(3), kp.kernel_points(**cases.KERNEL)
    features = rng.normal(size=(len(cloud), channels)).astype(np.float32)
    weights = (rng.normal(size=(len(kernel_points), channels, channels)) / channels).astype(np.float32)
    return [xp.asarray(a) for a in (cloud, features.astype(dtype), weights.astype(dtype), kernel_points)]


def kpconv(bench, cloud, bandwidth):
    cupy = bench.cupy
    neighbors = kp.radius_search(cloud, None, cases.RADIUS)
    on_device = neighbors.to("cuda")
    for channels, name, tolerance in (
        (64, "float32", 2e-5),
        (256, "float32", 2e-5),
        (256, "TF32", 2e-3),
        (256, "bfloat16", 1e-2),
    ):
        label = f"forward, C = {channels}" + (f", {name}" if name != "float32" else "")
        dtype = np.float32
        try:
            setting = tensor_float() if name == "TF32" else contextlib.nullcontext()
            if name == "bfloat16":
                from ml_dtypes import bfloat16 as dtype
        except ImportError as error:
            bench.row("kpconv", label, None, "", note=f"missing ({error})")
            continue
        points, features, weights, kernel_points = problem(cloud, channels, dtype, cupy)
        with setting:

            def call(points=points, features=features, weights=weights, kernel_points=kernel_points):
                return kp.kpconv(points, None, on_device, features, weights, kernel_points, cases.EXTENT)

            # The result is compared for the first 20,000 queries, if all their neighbours are among the first 40,000
            # points, as they are in Morton order.
            some = slice(0, min(len(cloud), 20_000))
            part = cloud[: 2 * some.stop]
            host = [a.get().astype(np.float32) for a in (features[: len(part)], weights, kernel_points)]
            near = kp.radius_search(part, cloud[some], cases.RADIUS)
            if near.num_pairs == int(neighbors.row_splits[some.stop]):
                close(call()[some], kp.kpconv(part, cloud[some], near, *host, cases.EXTENT), tolerance)
            ours = bench.times(call)
            bench.row("kpconv", label, ours["median"], "ms", ours=ours)
            sums = cupy.zeros((len(cloud), len(kernel_points) * channels), dtype)
            flat = weights.reshape(-1, channels)
            bench.peer(
                "kpconv", label, ours, "bare cuBLAS", lambda sums=sums, flat=flat: lambda: sums @ flat, "x its time"
            )
            del sums
    dense(bench, cloud[: bench.sizes["dense"]])


def tensor_float():
    """A context in which CuPy multiplies float32 matrices in TF32, as with CUPY_TF32=1 in the environment."""
    from cupy._core import _routines_linalg as linalg

    @contextlib.contextmanager
    def compute_in_tf32():
        before = linalg.get_compute_type(np.float32)
        linalg.set_compute_type(np.float32, 7)  # COMPUTE_TYPE_TF32
        try:
            yield
        finally:
            linalg.set_compute_type(np.float32, before)

    return compute_in_tf32()


def dense(bench, cloud):
    """kpconv against the dense formulation in torch, eager and compiled."""
    neighbors = kp.radius_search(cloud, None, cases.RADIUS)
    points, features, weights, kernel_points = problem(cloud, 64, np.float32, bench.cupy)
    on_device = neighbors.to("cuda")
    out = kp.kpconv(points, None, on_device, features, weights, kernel_points, cases.EXTENT)
    ours = bench.times(lambda: kp.kpconv(points, None, on_device, features, weights, kernel_points, cases.EXTENT))
    bench.row("kpconv", f"forward, C = 64, {len(cloud)} points", ours["median"], "ms", ours=ours)

    def make(compiled):
        import torch

        module = peers.dense_module()
        if not torch.cuda.is_available():
            raise RuntimeError("torch has no GPU")
        tensors = [torch.from_dlpack(a) for a in (points, features, weights, kernel_points)]
        padded = module.padded(neighbors.index, neighbors.row_splits, len(cloud)).cuda()
        function = torch.compile(module.kpconv) if compiled else module.kpconv

        def call():
            with torch.no_grad():
                return function(tensors[0], tensors[0], padded, *tensors[1:], cases.EXTENT)

        close(bench.cupy.from_dlpack(call()), out.get(), 2e-4)
        return call

    for against, compiled in (("dense torch", False), ("dense torch, compiled", True)):
        bench.peer("kpconv", "forward, C = 64", ours, against, lambda compiled=compiled: make(compiled))


def kpconv_vjp(bench, cloud, bandwidth):
    points, features, weights, kernel_points = problem(cloud, 64, np.float32, bench.cupy)
    neighbors = kp.radius_search(points, None, cases.RADIUS)
    grad = bench.cupy.ones((len(cloud), 64), np.float32)

    def forward(f, w):
        return kp.kpconv(points, None, neighbors, f, w, kernel_points, cases.EXTENT)

    def both():
        out, pullback = kp.autodiff.vjp(forward, features, weights)
        return [out, *pullback(grad)]

    for a, b in zip(both(), both(), strict=True):
        assert (a == b).all(), "expected the same bits in both calls, got others"
    alone, ours = bench.times(lambda: forward(features, weights)), bench.times(both)
    bench.row(
        "kpconv_vjp",
        "forward + vjp, C = 64",
        ours["median"] / alone["median"],
        "x its time",
        "its forward",
        ours,
        alone,
    )


def pyramid(bench, raw, bandwidth):
    settings = {"voxel_size": float(cases.VOXEL), "num_levels": 5}
    cloud = raw[: bench.sizes["pyramid"]]
    expected, points = kp.build_pyramid(cloud, **settings), bench.cupy.asarray(cloud)
    for a, b in zip(kp.build_pyramid(points, **settings), expected, strict=True):
        assert np.array_equal(a.points.get(), b.points) and np.array_equal(a.neighbors.index.get(), b.neighbors.index)
    ours = bench.times(lambda: kp.build_pyramid(points, **settings))
    bench.row("pyramid", "5 levels of 100k points", ours["median"], "ms", ours=ours)


def memory(bench, cloud, bandwidth):
    points, features, weights, kernel_points = problem(cloud, 64, np.float32, bench.cupy)
    neighbors = kp.radius_search(points, None, cases.RADIUS)
    pool = bench.cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    out = kp.kpconv(points, None, neighbors, features, weights, kernel_points, cases.EXTENT)
    beyond = (pool.total_bytes() - before - out.nbytes) / 2**20
    bench.row("memory", "kpconv forward, C = 64", beyond, "MiB beyond inputs and outputs")


def measure(quick=False):
    """Run all cases and return their rows; a quick run has tiny sizes and judges none."""
    sizes = SIZES["quick" if quick else "full"]
    bench = Bench(sizes, {} if quick else TARGETS)
    bandwidth = ceilings(bench)
    raw = cases.surface(sizes["raw"])
    dense_surface = cases.surface(int(1.05 * cases.RAW_PER_VOXEL * sizes["cloud"]), seed=1)
    cloud = kp.grid_subsample(dense_surface, cases.VOXEL).points[: sizes["cloud"]].copy()
    for case in (radius_search, grid_subsample, kpconv, kpconv_vjp, pyramid, memory):
        case(bench, raw if case in (grid_subsample, pyramid) else cloud, bandwidth)
    return bench.rows


def write_up(rows, commit):
    """The result as Markdown."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    versions = {"kpcore": kp.__version__, "cupy": cupy.__version__, "numpy": np.__version__}
    judged = [row["verdict"] for row in rows if row["target"]]
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit}, on {properties['name'].decode()}, "
        f"{properties['totalGlobalMem'] / 2**30:.0f} GiB; {', '.join(f'{k} {v}' for k, v in versions.items())}.\n"
        f"{judged.count('met')} of {len(judged)} targets met.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n"
    )


def main(options, commit):
    rows = measure(options.quick)
    text = write_up(rows, commit)
    print(f"\n{text}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "gpu.md").write_text(text)
