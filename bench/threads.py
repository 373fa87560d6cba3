"""Measures what threads cost on an idle and on a busy machine: ``python bench/run.py threads``.

It times calls on one and on two threads, alone and beside two processes that keep two cores busy, and a training
process with a DataLoader of four forked or spawned workers that make pyramids. With ``--python PATH`` given once for
each interpreter, installed versions of kpcore are measured in turns. Every number comes from a new process; a cell
shows the median, minimum and maximum of the rounds. No environment variable is set except what a row says, so threads
wait as they do for a user.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

SIZES = {
    "full": {"points": 60_000, "patch": 20_000, "batches": 40, "seconds": 2, "rounds": 3},
    "quick": {"points": 2_000, "patch": 2_000, "batches": 4, "seconds": 0, "rounds": 1},
}
CALLS = ("build_pyramid", "kpconv forward + vjp", "radius_search", "radius_search of 10 points")
SITUATIONS = ("idle", "beside 2 busy processes")
LOADERS = ("none", "fork", "spawn")
BUSY = "while True: pass"
SETTINGS = ("KPCORE_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def cloud(num, seed=0):
    """A wavy sheet over the unit square; each point has about 20 neighbours within 2.5 / sqrt(num)."""
    xy = np.random.default_rng(seed).random((num, 2), np.float32)
    return np.column_stack([xy, np.sin(7 * xy.sum(1)) / 20]).astype(np.float32)


def pyramid(num, seed=0):
    import kpcore as kp

    return kp.build_pyramid(cloud(num, seed), voxel_size=1 / num**0.5, num_levels=5)


def step(level, radius):
    """Forward and backward pass of a rigid convolution with 64 channels."""
    import kpcore as kp

    rng = np.random.default_rng(0)
    features = rng.standard_normal((len(level.points), 64), np.float32)
    weights = rng.standard_normal((15, 64, 64), np.float32)
    kernel_points = kp.kernel_points(15, radius=0.66 * radius)

    def convolve(features, weights):
        return kp.kpconv(level.points, None, level.neighbors, features, weights, kernel_points, extent=0.5 * radius)

    out, pullback = kp.autodiff.vjp(convolve, features, weights)
    return pullback(out)


class Pyramids:
    """A dataset for torch's DataLoader; each item is one pyramid."""

    def __init__(self, num, patch):
        self.num, self.patch = num, patch

    def __len__(self):
        return self.num

    def __getitem__(self, item):
        return pyramid(self.patch, item)


def unchanged(item):
    """The collate function of the loader, whose items are whole batches."""
    return item


# What runs in the process of one measurement


def time_call(task, sizes):
    """The median time of a call in milliseconds, without the first call."""
    if task["first"] == "torch":
        import torch  # noqa: F401
    import kpcore as kp

    kp.set_num_threads(task["threads"])
    num, patch = sizes["points"], sizes["patch"]
    points, radius = cloud(num), 2.5 / patch**0.5
    if task["what"] == "kpconv forward + vjp":
        level = kp.build_pyramid(cloud(patch), voxel_size=1 / patch**0.5, num_levels=1)[0]
    call = {
        "build_pyramid": lambda: pyramid(num),
        "kpconv forward + vjp": lambda: step(level, radius),
        "radius_search": lambda: kp.radius_search(points, None, 2.5 / num**0.5),
        "radius_search of 10 points": lambda: kp.radius_search(points[:10], None, 0.5),
    }[task["what"]]
    call()
    taken, end = [], time.perf_counter() + sizes["seconds"]
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def steps_per_second(task, sizes):
    """Training steps per second, each on a pyramid from the loader, or without a loader all on the same pyramid."""
    import kpcore  # noqa: F401 (before torch, so that kpcore sets how long waiting threads spin)

    import torch  # isort: skip

    if task["loader"] == "none":
        batches = [pyramid(sizes["patch"])] * sizes["batches"]
    else:
        data = Pyramids(sizes["batches"] + 4, sizes["patch"])
        context = {"num_workers": 4, "multiprocessing_context": task["loader"]}
        batches = iter(torch.utils.data.DataLoader(data, batch_size=None, collate_fn=unchanged, **context))
        for _ in range(4):  # after these, all workers have started
            next(batches)
    start = time.perf_counter()
    for levels in batches:
        for level in levels[:2]:
            step(level, 2.5 / sizes["patch"] ** 0.5)
    return sizes["batches"] / (time.perf_counter() - start)


def work(task):
    sizes = SIZES["quick" if task["quick"] else "full"]
    print((steps_per_second if "loader" in task else time_call)(task, sizes))


# The table


def measure(python, task):
    """Measure a task with the kpcore of an interpreter; None if the process fails."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    num_busy = 2 * (task["situation"] != "idle")
    busy_processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num_busy)]
    try:
        command = [python, "-W", "ignore", __file__, json.dumps(task)]
        process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        for busy_process in busy_processes:
            busy_process.kill()
            busy_process.wait()
    return float(process.stdout) if process.returncode == 0 else None


def tasks():
    for what in CALLS:
        for first in ("kpcore", "torch") if what == "build_pyramid" else ("kpcore",):
            for situation in SITUATIONS:
                for threads in (1, 2):
                    yield {"what": what, "first": first, "situation": situation, "threads": threads}
    for loader in LOADERS:
        for situation in SITUATIONS:
            yield {"loader": loader, "situation": situation}


def label(task):
    if "loader" in task:
        workers = "no loader" if task["loader"] == "none" else f"4 loader workers ({task['loader']})"
        return [f"training, {workers}", task["situation"], "default", "steps/s"]
    what = task["what"] + ", torch imported first" * (task["first"] == "torch")
    return [what, task["situation"], str(task["threads"]), "ms"]


def cell(numbers):
    if None in numbers:
        return "FAILED"
    return f"{statistics.median(numbers):.4g} ({min(numbers):.4g}–{max(numbers):.4g})"


def main(options):
    pythons, rounds = options.python or [sys.executable], SIZES["quick" if options.quick else "full"]["rounds"]
    lines = [["what", "machine", "threads", "unit", *pythons]]
    lines.append(["---"] * len(lines[0]))
    rows = []
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)
    for task in tasks():
        task = task | {"quick": options.quick}
        numbers = {python: [] for python in pythons}
        for _ in range(rounds):
            for python in pythons:
                numbers[python].append(measure(python, task))
        rows.append({"task": task, "numbers": numbers})
        lines.append(label(task) + [cell(numbers[python]) for python in pythons])
        print(f"| {' | '.join(lines[-1])} |", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "threads.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "threads.md").write_text("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return any(None in numbers for row in rows for numbers in row["numbers"].values())


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
