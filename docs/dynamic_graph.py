"""Trains a dynamic graph network on digits as point clouds: ``python docs/dynamic_graph.py DATA``.

DATA is the folder of the test digits of MNIST, t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. The network has
the form of DGCNN (Wang et al. 2019): each layer, an EdgeConv, searches for the neighbours of a point again, among the
features of the layer before. It is trained in PyTorch and on the tape, and once more in PyTorch with the EdgeConv that
is usual there, on dense arrays. Prints the accuracies, the seconds of an epoch and those of one EdgeConv with its
gradient. Takes some minutes on one core, which is all that it uses.
"""

import functools
import sys
import time

import numpy as np
from deformable_digits import load

import kpcore as kp
from kpcore import nn
from kpcore.nn import blocks

NUM_TRAIN, NUM_TEST, EPOCHS, BATCH, RATE, DTYPE = 6000, 2000, 10, 32, 0.004, np.float32
NUM_POINTS, K = 64, 10  # of a digit; neighbours of a point, the first of which is the point itself
WIDTHS, EMBEDDING = (16, 16, 64), 128  # of the EdgeConvs; all but the last are dimensions of a search


def clouds(images, seed):
    """(B * NUM_POINTS, 2): points of each digit, drawn from its pixels above one half, from -1 to 1."""
    rng, points = np.random.default_rng(seed), []
    for image in images:
        pixels = np.argwhere(image > 0.5)
        chosen = rng.choice(len(pixels), NUM_POINTS, replace=len(pixels) < NUM_POINTS)
        points.append((pixels[chosen] + rng.random((NUM_POINTS, 2))) / (len(image) / 2) - 1)
    return np.concatenate(points).astype(DTYPE)


def bounds(num_clouds):
    """The row_splits of a batch."""
    return np.arange(0, (num_clouds + 1) * NUM_POINTS, NUM_POINTS)


# ---- the network


def edge_weights(run, name, channels, width):
    """The weights of x_i and of x_j - x_i, which together are the input of an edge."""
    bound = 1 / np.sqrt(2 * channels)
    return [run.parameter(f"{name}.{part}", (channels, width), lambda rng, shape: rng.uniform(-bound, bound, shape))
            for part in ("point", "difference")]  # fmt: skip


def edge_conv(run, name, features, width, row_splits):
    """``max_j (W1 x_i + W2 (x_j - x_i))`` over the K nearest j of i in the space of the features.

    Without an activation before it, the maximum moves inside: ``(W1 - W2) x_i + max_j W2 x_j``. So every product is one
    of points, and the features of edges, K times as many, are never made.
    """
    F, (of_point, of_difference) = run.F, edge_weights(run, name, features.shape[1], width)
    neighbors = F.knn_search(blocks.detached(features), None, K, points_row_splits=row_splits)
    largest = F.neighbor_reduce(F.linear(features, of_difference), neighbors, "max")
    return F.add(F.linear(features, F.add(of_point, -1 * of_difference)), largest)


def dense_edge_conv(run, name, features, width, row_splits):
    """`edge_conv` as usual in PyTorch: with arrays (B, N, N) of distances and (B, N, K, 2C) of edges."""
    import torch

    weights = torch.cat(edge_weights(run, name, features.shape[1], width))
    x = features.reshape(len(row_splits) - 1, NUM_POINTS, -1)
    with torch.no_grad():
        nearest = torch.cdist(x, x).topk(K, largest=False).indices
    neighbors = x[torch.arange(len(x))[:, None, None], nearest]
    points = x[:, :, None].expand_as(neighbors)
    return (torch.cat([points, neighbors - points], -1) @ weights).amax(2).flatten(0, 1)


def network(run, points, row_splits, edge_conv=edge_conv):
    """The logits of each cloud. The normalisation follows the maximum; in DGCNN it comes before, over all edges."""
    F, features, levels = run.F, points, []
    for number, width in enumerate(WIDTHS):
        features = edge_conv(run, f"edge.{number}", features, width, row_splits)
        levels.append(features := blocks.norm(run, f"norm.{number}", features, row_splits))
    embedded = blocks.unary(run, "embedding", functools.reduce(F.concatenate, levels), EMBEDDING, row_splits)
    return blocks.dense(run, "logits", F.segment_reduce(embedded, row_splits, "max"), 10, activate=False)


def initial(seed=0):
    """(params, state) by name."""
    run = blocks.Run(kp, {}, {}, new={"seed": seed, "dtype": DTYPE})
    network(run, np.zeros((K, 2), DTYPE), np.array([0, K]))
    return run.params, run.state


# ---- training: each returns (losses, params, state)


def steps(images, labels):
    """(learning rate, points, labels) of each step; in every epoch a digit has other points."""
    per_epoch = len(images) // BATCH
    rate = nn.cosine(RATE, EPOCHS * per_epoch)
    for step in range(EPOCHS * per_epoch):
        order = np.random.default_rng(step // per_epoch).permutation(len(images))
        batch = order[step % per_epoch * BATCH :][:BATCH]
        yield rate(step), clouds(images[batch], step), labels[batch]


def by_torch(steps, edge_conv=edge_conv):
    import torch

    params, state = ({name: torch.from_numpy(value) for name, value in values.items()} for values in initial())
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params.values()])
    losses, row_splits = [], torch.from_numpy(bounds(BATCH))
    for rate, points, labels in steps:
        optimizer.param_groups[0]["lr"] = rate
        run = blocks.Run(kp.torch, params, state, training=True)
        logits = network(run, torch.from_numpy(points), row_splits, edge_conv)
        loss = kp.torch.softmax_cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = run.new_state
        losses.append(loss.item())
    return losses, *({name: value.detach().numpy() for name, value in values.items()} for values in (params, state))


def by_the_tape(steps):
    params, state = initial()
    optimizer, losses, row_splits = nn.adamw(params, weight_decay=0), [], bounds(BATCH)
    for rate, points, labels in steps:
        tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
        run = blocks.Run(kp, tensors, state, training=True)
        loss = kp.softmax_cross_entropy(network(run, points, row_splits), labels)
        loss.backward()
        optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, rate)
        state = run.new_state
        losses.append(float(loss.value))
    return losses, params, state


TRAININGS = {
    "the tape": by_the_tape,
    "PyTorch": by_torch,
    "PyTorch, dense": functools.partial(by_torch, edge_conv=dense_edge_conv),
}


def accuracy(params, state, images, labels):
    """In percent."""
    logits = network(blocks.Run(kp, params, state), clouds(images, 0), bounds(len(images)))
    return 100 * (logits.argmax(1) == labels).mean()


# ---- the experiment


def seconds(edge_conv, num_clouds, channels, width):
    """The least time of 5 calls of an EdgeConv with its gradient in PyTorch."""
    import torch

    run = blocks.Run(kp.torch, {}, {}, new={"seed": 0, "dtype": DTYPE})
    edge_weights(run, "edge", channels, width)
    run.params.update({name: torch.tensor(value, requires_grad=True) for name, value in run.params.items()})
    features = torch.randn(num_clouds * NUM_POINTS, channels, requires_grad=True)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        edge_conv(run, "edge", features, width, torch.from_numpy(bounds(num_clouds))).sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times)


def main(data):
    import torch

    kp.set_num_threads(1)
    torch.set_num_threads(1)
    images, labels = load(data)
    parts = slice(NUM_TRAIN), slice(NUM_TRAIN, NUM_TRAIN + NUM_TEST)
    print(f"{nn.count(initial()[0]):,} parameters; accuracy in %, seconds of an epoch")
    for name, training in TRAININGS.items():
        begin = time.perf_counter()
        _, *values = training(steps(images[parts[0]], labels[parts[0]]))
        elapsed = (time.perf_counter() - begin) / EPOCHS
        print(f"{name:14} {accuracy(*values, images[parts[1]], labels[parts[1]]):5.2f} {elapsed:6.1f}", flush=True)
    print("\nmilliseconds of an EdgeConv with its gradient")
    for channels, width in zip((2, *WIDTHS), WIDTHS, strict=False):
        ours, dense = (1e3 * seconds(function, BATCH, channels, width) for function in (edge_conv, dense_edge_conv))
        print(f"{channels:3} to {width:3} channels {ours:6.1f}, dense {dense:6.1f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1])
