"""Trains a network of continuous convolutions in PyTorch, in JAX and on the tape: ``python docs/fluid.py [folder]``.

The network has the form of that of Ummenhofer et al. (2020): from the velocities of fluid particles and the normals of
boundary particles it predicts by how much to correct the position of each fluid particle. What it learns is computed on
the spot, a repulsion between particles. The particles move in every step, so their neighbours are searched in every
step. Prints the losses and, if Matplotlib is installed, draws them in fluid.png.
"""

import functools
import sys
from pathlib import Path

import numpy as np

import kpcore as kp
from kpcore.nn import blocks

STEPS, RATE, RADIUS, DTYPE = 60, 0.01, 0.22, np.float32
NUM_FLUID, NUM_PAIRS = 300, (8_000, 8_000)  # room for the pairs of fluid and fluid, and of boundary and fluid


def window(squared):
    return (1 - squared) ** 3


def padded(neighbors, num_pairs):
    """The list with room for `num_pairs`: with arrays of one size in every step, JAX compiles once."""
    index = np.zeros(num_pairs, np.int32)
    index[: neighbors.num_pairs] = neighbors.index
    return kp.Neighbors(index, neighbors.row_splits, neighbors.num_points)


def repulsion(points, queries, neighbors):
    """``Σ (1 - d² / r²)² (query - point)`` over the neighbours of each query, with d the distance and r the radius."""
    offsets = np.repeat(queries, neighbors.counts, axis=0) - points[neighbors.index]
    weighted = offsets * (1 - (offsets**2).sum(1, keepdims=True) / RADIUS**2) ** 2
    return kp.segment_reduce(weighted, neighbors.row_splits, "sum")


def scenes():
    """For each step (arrays, lists): fluid, its features, boundary, its features, target; neighbours in both."""
    rng = np.random.default_rng(0)
    plane = np.stack(np.meshgrid(*[np.linspace(0, 1, 12)] * 2), -1).reshape(-1, 2)
    boundary = np.insert(plane, 2, 0, axis=1).astype(DTYPE)
    normals = np.tile(DTYPE([1, 0, 0, 1]), (len(boundary), 1))
    fluid = rng.uniform((0, 0, 0.05), (1, 1, 0.6), (NUM_FLUID, 3)).astype(DTYPE)
    velocities = (0.1 * rng.standard_normal((NUM_FLUID, 3))).astype(DTYPE)
    for _ in range(STEPS):
        among = kp.radius_search(fluid, None, RADIUS, ignore_query_point=True)
        around = kp.radius_search(boundary, fluid, RADIUS)
        target = repulsion(fluid, fluid, among) + 2 * repulsion(boundary, fluid, around)
        features = np.insert(velocities, 0, 1, axis=1)
        yield (fluid, features, boundary, normals, target), tuple(map(padded, (among, around), NUM_PAIRS))
        fluid = fluid + DTYPE(0.02) * velocities


def network(run, arrays, lists):
    """The correction of each fluid particle, (N, 3)."""
    F, (fluid, features, boundary, normals, _), (among, around) = run.F, arrays, lists

    def conv(name, where, features, width, center=True):
        return blocks.continuous_conv(
            run, name, where, features, width, (4, 4, 4), 2 * RADIUS, window_function=window, normalize=False,
            coordinate_mapping="ball_to_cube_volume_preserving", use_dense_layer_for_center=center
        )  # fmt: skip

    hidden = conv("first", (fluid, None, among), features, 16)
    hidden = F.concatenate(hidden, conv("boundary", (boundary, fluid, around), normals, 16, center=False))
    hidden = conv("second", (fluid, None, among), F.relu(hidden), 16)
    return conv("third", (fluid, None, among), F.relu(hidden), 3)


def loss(F, params, arrays, lists):
    """The mean squared error; as a product of a row and a column, which the tape can differentiate as well."""
    errors = network(blocks.Run(F, params, {}), arrays, lists) + -1 * arrays[-1]
    errors = errors.reshape(1, -1)
    return (1 / NUM_FLUID) * F.linear(errors, errors.reshape(-1, 1)).reshape(())


def initial():
    """The parameters of the network by name."""
    run = blocks.Run(kp, {}, {}, new={"seed": 0, "dtype": DTYPE})
    network(run, *next(scenes()))
    return run.params


def by_torch():
    import torch

    params = {name: torch.tensor(value, requires_grad=True) for name, value in initial().items()}
    optimizer = torch.optim.Adam(params.values(), RATE)
    for arrays, lists in scenes():
        value = loss(kp.torch, params, tuple(map(torch.from_numpy, arrays)), lists)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()


def by_jax():
    import jax

    return trained(jax.jit(jax.value_and_grad(functools.partial(loss, kp.jax))))


def by_the_tape():
    return trained(kp.autodiff.value_and_grad(functools.partial(loss, kp)))


def trained(loss_and_grads):
    params = initial()
    optimizer = kp.nn.adamw(params, weight_decay=0)
    for arrays, lists in scenes():
        value, grads = loss_and_grads(params, arrays, lists)
        optimizer.step({name: np.asarray(grad) for name, grad in grads.items()}, RATE)
        yield float(value)


TRAININGS = {"PyTorch": by_torch, "JAX": by_jax, "the tape": by_the_tape}


def main(folder):
    curves = {name: list(training()) for name, training in TRAININGS.items()}
    print(f"{'step':>4}", *(f"{name:>14}" for name in curves))
    for step in [*range(0, STEPS, 5), STEPS - 1]:
        print(f"{step:4}", *(f"{curve[step]:14.9f}" for curve in curves.values()))
    values = np.array([*curves.values()])
    print(f"largest relative difference in a step: {(np.ptp(values, axis=0) / values.min(0)).max():.1e}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    fig = Figure((6, 3), dpi=144, layout="constrained")
    axes = fig.add_subplot(xlabel="step", ylabel="mean squared error", yscale="log")
    for (name, curve), (width, style) in zip(curves.items(), [(6, "-"), (3, "-"), (1.5, "--")], strict=True):
        axes.plot(curve, style, linewidth=width, label=name)
    axes.legend()
    FigureCanvasAgg(fig).print_png(folder / "fluid.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
