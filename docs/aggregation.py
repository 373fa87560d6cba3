"""Measures the three point convolutions of docs/aggregation.md, and writes the table: ``python docs/aggregation.py``.

An introductory article, "How can point convolutions be implemented in PyTorch?", computes them with SciPy's tree and
PyTorch: the mean of the k nearest points, the mean over a radius of the output of a perceptron, and a product with a
sparse matrix. Here they are written from its description, next to the same three with kpcore on NumPy arrays, torch
tensors and JAX arrays. Each runs in a new process on one core, and its result must be that of the article. Takes some
two minutes; runs on Linux only.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import kpcore as kp

SIZES, CHANNELS, HIDDEN, K = (100, 10_000), 64, 128, 8
PAGE, BEGIN, END = Path(__file__).with_suffix(".md"), "<!-- measured:begin -->\n", "<!-- measured:end -->\n"
FRAMEWORKS = ("NumPy", "torch", "JAX")


def inputs(num):
    """(points, features, parameters of the perceptron), and a radius within which a point has some 30 others."""
    rng = np.random.default_rng(0)
    shapes = (num, CHANNELS), (CHANNELS, HIDDEN), (HIDDEN,), (HIDDEN, CHANNELS), (CHANNELS,)
    arrays = rng.random((num, 3), np.float32), *(rng.standard_normal(shape, np.float32) / 8 for shape in shapes)
    return arrays, float((30 / (4 / 3 * np.pi * num)) ** (1 / 3))


# ---- as the article describes them


def nearest_by_scipy(points):
    """(N, K) the points nearest to each point, without the first, the point itself."""
    from scipy.spatial import cKDTree

    return cKDTree(points.numpy()).query(points.numpy(), K + 1)[1][:, 1:]


def article_mean(radius, points, features, *perceptron):
    return features[nearest_by_scipy(points)].mean(1)


def article_perceptron(radius, points, features, w1, b1, w2, b2):
    """A loop over the points. The article leaves out the mean, without which the rows have different lengths."""
    import torch

    rows = []
    for point in points:
        near = features[torch.where(torch.norm(points - point, dim=1) <= radius)[0]]
        rows.append((torch.relu(near @ w1 + b1) @ w2 + b2).mean(0))
    return torch.stack(rows)


def article_sparse(radius, points, features, *perceptron):
    import torch

    num, index = len(points), torch.from_numpy(nearest_by_scipy(points))
    pairs = torch.stack([torch.arange(num).repeat_interleave(K), index.flatten()])
    matrix = torch.sparse_coo_tensor(pairs, torch.ones(num * K), (num, num), check_invariants=False)
    return torch.sparse.mm(matrix, features) / K


# ---- with kpcore; F is kpcore, kpcore.torch or kpcore.jax


def mean(F, radius, points, features, *perceptron):
    neighbors = F.knn_search(points, None, K, ignore_query_point="index")
    return F.neighbor_reduce(features, neighbors)


def perceptron(F, radius, points, features, w1, b1, w2, b2):
    neighbors = F.radius_search(points, None, radius)
    return F.neighbor_reduce(F.linear(F.relu(F.linear(features, w1, b1)), w2, b2), neighbors)


def sparse(F, radius, points, features, *perceptron):
    neighbors = F.knn_search(points, None, K, ignore_query_point="index")
    return sparse_matrix(F, neighbors) @ features / K


def sparse_matrix(F, neighbors):
    if F is kp:
        return neighbors.to_sparse()
    return F.to_sparse(neighbors) if F is kp.torch else F.to_bcoo(neighbors)


EXAMPLES = {
    "mean of the 8 nearest": (article_mean, mean),
    "perceptron, mean over a radius": (article_perceptron, perceptron),
    "product with a sparse matrix": (article_sparse, sparse),
}

# ---- measuring


def call(example, framework, num):
    """A function without arguments that computes an example and waits for the result."""
    arrays, radius = inputs(num)
    of_article, ours = EXAMPLES[example]
    if framework == "NumPy":
        return lambda: ours(kp, radius, *arrays)
    if framework == "JAX":
        import jax

        arrays = [jax.numpy.asarray(array) for array in arrays]
        return lambda: ours(kp.jax, radius, *arrays).block_until_ready()
    import torch

    arrays = [torch.from_numpy(array) for array in arrays]
    if framework == "torch":
        return lambda: ours(kp.torch, radius, *arrays)
    return lambda: of_article(radius, *arrays)


def memory(field):
    """A field of /proc/self/status, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(example, framework, num, path):
    """Store the result, the median seconds of 5 calls or more, and the MiB that the first needs beyond its inputs."""
    call(example, framework, SIZES[0])()  # loads what the frameworks load when they are first used
    function = call(example, framework, num)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at the memory in use
    before = memory("VmRSS")
    out = np.asarray(function())
    needed, times, end = memory("VmHWM") - before, [], time.perf_counter() + 1
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    np.savez(path, out=out, seconds=np.median(times), memory=needed)


def measured(example, framework, num, folder):
    """What `measure` stores, from a new process."""
    path, core = folder / "measured.npz", str(max(os.sched_getaffinity(0)))
    arguments = [sys.executable, "-W", "ignore", __file__, example, framework, str(num), str(path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    subprocess.run(["taskset", "-c", core, *arguments], check=True, env=os.environ | threads)
    return np.load(path)


def table(folder):
    """The Markdown table, after a check that every result is that of the article."""
    columns = ("article", *FRAMEWORKS)
    lines = [f"| example | points | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for example in EXAMPLES:
        for num in SIZES:
            expected, cells = None, []
            for framework in columns:
                result = measured(example, framework, num, folder)
                expected = result["out"] if expected is None else expected
                np.testing.assert_allclose(result["out"], expected, rtol=1e-4, atol=1e-5, err_msg=framework)
                milliseconds = 1e3 * result["seconds"]
                digits = ",.0f" if milliseconds >= 100 else ".3g"
                cells.append(f"{milliseconds:{digits}} ms, {result['memory']:.0f} MiB")
            lines.append(f"| {example} | {num:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder))
    print(text)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
