"""Measures whole networks, with targets: ``python bench/run.py networks``.

The network is KP-FCNN in the size of its published PyTorch code for S3DIS (24.4 million parameters), in training on
one batch of three pieces of the procedural flat (`kpcore.scenes.indoor`), about 15,000 points. The peer is the same
network over dense operators in PyTorch, with the same weights and the same neighbour lists, which are limited as the
published calibration limits them. Receptive fields are measured on four pieces, 20,000 points, against a training step
of the same network.

Objects and parts are the throughput of Thomas et al. (2019), section 4.1: the networks of the paper's size on batches
of 16 objects, surfaces in the unit sphere, subsampled at 0.02 from 10,000 points (some 6,800 remain, as of ModelNet40)
and from 2,600 points (some 2,300 remain, as of ShapeNetPart).
"""

import tempfile
import time
from functools import partial

import numpy as np
import peers

import kpcore as kp
from kpcore import nn

SIZES = {
    "full": {"scene": 1_000_000, "piece": 5_000, "steps": 12, "objects": 16},
    "quick": {"scene": 20_000, "piece": 60, "steps": 2, "objects": 2},
}
TASKS = {
    "step": [{"deformable": 0}, {"deformable": 5}],
    "convolutions": [{"deformable": 0}, {"deformable": 5}],
    "peak": [{"implementation": name} for name in ("tape", "kpcore.torch", "dense torch")],
    "preprocessing": [{}],
    "loading": [{}],
    "receptive_field": [{"deformable": 0}, {"deformable": 5}],
    "objects": [{}],
    "parts": [{}],
}
# {(case, what, order, against): target}
TARGETS = {
    ("step", "rigid, tape", "", "dense torch"): (">=", 5),
    ("step", "rigid, kpcore.torch", "", "dense torch"): (">=", 5),
    ("step", "deformable, tape", "", "dense torch"): (">=", 5),
    ("step", "deformable, kpcore.torch", "", "dense torch"): (">=", 5),
    ("convolutions", "rigid, forward + vjp", "", "dense torch"): (">=", 15),
    ("convolutions", "deformable, forward + vjp", "", "dense torch"): (">=", 15),
    ("preprocessing", "pyramid of the batch", "", "the step"): ("<=", 10),
    ("loading", "waiting, 2 workers", "", None): ("<=", 5),
    ("receptive_field", "rigid, a position", "", "a training step"): ("<=", 0.4),
    ("receptive_field", "deformable, a position", "", "a training step"): ("<=", 0.4),
    ("receptive_field", "rigid, peak memory", "", "a training step"): ("<=", 1),
    ("receptive_field", "deformable, peak memory", "", "a training step"): ("<=", 1),
}
CLASSES, FEATURES = 13, 5
# The categories of ShapeNetPart, with their numbers of parts.
PARTS = {"airplane": 4, "bag": 2, "cap": 2, "car": 4, "chair": 4, "earphone": 3, "guitar": 3, "knife": 2, "lamp": 4,
         "laptop": 2, "motorbike": 6, "mug": 2, "pistol": 3, "rocket": 3, "skateboard": 3, "table": 3}  # fmt: skip


def prepare(folder, size):
    """Part of the interface to run.py; the cases here make their inputs themselves."""


class Problem:
    """A network, its parameters and a batch; small ones with --quick."""

    def __init__(self, bench, deformable=0, pieces=3):
        sizes, quick = bench.sizes, bench.sizes["piece"] < 1000
        options = {"width": 16, "levels": 3} if quick else {}
        self.net = nn.kpfcnn(
            FEATURES, CLASSES, 0.2 if quick else 0.04, deformable=min(deformable, 3 if quick else 5), **options
        )
        scene = kp.scenes.indoor(sizes["scene"])
        sub = kp.grid_subsample(scene.points, self.net.voxel_size, features=scene.colors.astype(np.float32) / 255)
        rng = np.random.default_rng(0)
        tree = kp.KDTree(sub.points)
        rows = tree.knn_search(
            sub.points[rng.integers(len(sub.points), size=pieces)], min(sizes["piece"], len(sub.points))
        ).index
        self.points, self.row_splits = sub.points[rows], kp.row_splits([len(rows) // pieces] * pieces)
        radii = {"conv_radius": self.net.conv_radius, "deform_radius": self.net.deform_radius}
        self.limits = kp.calibrate_neighbor_limits(
            [sub.points], voxel_size=self.net.voxel_size, num_levels=self.net.num_levels,
            deform_levels=self.net.deform_levels, **radii
        )  # fmt: skip
        self.pyramid = self.prepared()
        z = self.points[:, 2:]
        self.features = np.concatenate([np.ones_like(z), sub.features[rows], z], axis=1)
        self.labels = rng.integers(0, CLASSES, len(z))
        self.params, self.state = self.net.init()
        bench.label(order="", size=f"{len(z):,}, H = {self.pyramid[0].neighbors.num_pairs / len(z):.1f}")

    @property
    def options(self):
        """Further arguments of the network."""
        return {}

    def prepared(self):
        return self.net.pyramid(self.points, row_splits=self.row_splits, subsampled=True, neighbor_limits=self.limits)

    def loss(self, F, params, state, pyramid, features, labels):
        result = self.net(F, params, state, pyramid, features, training=True, **self.options)
        loss = F.softmax_cross_entropy(result.logits, labels)
        return loss if result.regularization is None else loss + result.regularization

    def tape(self):
        """A training step on the tape, as a function: the loss, the gradients of all parameters and their update."""
        params = {name: value.copy() for name, value in self.params.items()}
        optimizer = nn.sgd(params, momentum=0.98, lr_scales={"offset": 0.1})

        def gradients():
            tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
            loss = self.loss(kp, tensors, self.state, self.pyramid, self.features, self.labels)
            loss.backward()
            return float(loss.value), {name: tensor.grad for name, tensor in tensors.items()}

        def step():
            loss, grads = gradients()  # frees the arrays of the tape before the optimizer allocates its moments
            optimizer.step(grads, 1e-9)
            return loss

        return step

    def torch(self, F, pyramid):
        """A training step with torch's autograd and optimizer over the operators of F, as a function."""
        import torch

        params = {name: torch.tensor(value, requires_grad=True) for name, value in self.params.items()}
        state = {name: torch.tensor(value) for name, value in self.state.items()}
        features, labels = torch.from_numpy(self.features), torch.from_numpy(self.labels)
        optimizer = torch.optim.SGD([*params.values()], lr=1e-9, momentum=0.98, weight_decay=1e-3, fused=True)

        def step():
            optimizer.zero_grad()
            loss = self.loss(F, params, state, pyramid, features, labels)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    def kpcore_torch(self):
        import torch

        levels = [
            level._replace(points=torch.from_numpy(level.points), row_splits=torch.from_numpy(level.row_splits))
            for level in self.pyramid
        ]
        return self.torch(kp.torch, levels)

    def dense(self):
        return self.torch(*peers.dense_network(self.pyramid))


class Objects(Problem):
    """KP-CNN, or with parts KP-FCNN with a head for each category, and a batch of objects as `surface` makes them."""

    def __init__(self, bench, parts, num_sampled):
        rng, num = np.random.default_rng(0), bench.sizes["objects"]
        options = {"convs": 2} if num == 16 else {"convs": 2, "width": 16, "levels": 3}
        if parts:
            self.net = nn.kpfcnn(4, sum(PARTS.values()), 0.02, heads=PARTS, **options)
        else:
            self.net = nn.kpcnn(1, 40, 0.02, **options)
        sub = kp.grid_subsample(
            np.concatenate([surface(rng, num_sampled) for _ in range(num)]), self.net.voxel_size,
            row_splits=kp.row_splits([num_sampled] * num)
        )  # fmt: skip
        self.points, self.row_splits = sub.points, sub.row_splits
        self.limits = kp.calibrate_neighbor_limits([sub.points[: self.row_splits[1]]], voxel_size=self.net.voxel_size,
                                                   num_levels=self.net.num_levels)  # fmt: skip
        self.pyramid, ones = self.prepared(), np.ones((len(self.points), 1), np.float32)
        self.features = np.concatenate([ones, self.points], axis=1) if parts else ones
        self.categories = np.arange(num)
        columns = [*self.net.head_columns.values()][:num]
        self.labels = np.repeat([c.start for c in columns], kp.lengths(self.row_splits)) if parts else self.categories
        self.params, self.state = self.net.init()
        bench.label(order="", size=f"{num} x {len(self.points) / num:,.0f}, "
                                   f"H = {self.pyramid[0].neighbors.num_pairs / len(self.points):.1f}")  # fmt: skip

    @property
    def options(self):
        return {"categories": self.categories} if self.net.segments else {}

    def inference(self):
        """A pass outside of training, as a function."""
        return lambda: self.net(kp, self.params, self.state, self.pyramid, self.features, **self.options).logits

    def dense_inference(self):
        import torch

        F, pyramid = peers.dense_network(self.pyramid)
        params, state = (
            {name: torch.from_numpy(value) for name, value in values.items()} for values in (self.params, self.state)
        )
        features = torch.from_numpy(self.features)

        def infer():
            with torch.inference_mode():
                return self.net(F, params, state, pyramid, features, **self.options).logits

        return infer


def surface(rng, num):
    """(num, 3) points drawn by area from a chair of boxes with random proportions, in the unit sphere."""
    width, depth, seat, back = rng.uniform((0.9, 0.9, 0.5, 0.5), (1.2, 1.2, 0.9, 0.9))
    legs = [((x, y, 0), (0.1, 0.1, seat)) for x in (0, width - 0.1) for y in (0, depth - 0.1)]
    boxes = [((0, 0, seat), (width, depth, 0.1)), ((0, 0, seat), (width, 0.1, back)), *legs]
    corners, sizes = (np.array(values, float) for values in zip(*boxes, strict=True))
    areas = np.stack([np.delete(sizes, axis, 1).prod(axis=1) for axis in range(3)], axis=1)  # of half of the faces
    choice = rng.choice(areas.size, num, p=areas.ravel() / areas.sum())
    box, axis = np.unravel_index(choice, areas.shape)
    within = rng.random((num, 3))
    within[np.arange(num), axis] = rng.integers(0, 2, num)
    points = corners[box] + within * sizes[box]
    points -= (points.min(axis=0) + points.max(axis=0)) / 2
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def step(bench, deformable):
    problem, kind = Problem(bench, deformable), "deformable" if deformable else "rigid"
    tape, kpcore_torch = problem.tape(), problem.kpcore_torch()
    expected = bench.first(tape)
    for what, call in ((f"{kind}, tape", tape), (f"{kind}, kpcore.torch", kpcore_torch)):
        if reason := peers.missing(peers.DENSE_NETWORK):
            bench.absent(what, peers.DENSE_NETWORK.name, reason)
            continue
        other = problem.dense()
        np.testing.assert_allclose([call(), other()], expected, rtol=1e-4)
        bench.compare(what, call, peers.DENSE_NETWORK.name, other)


class Recorder:
    """The operators of kpcore; `calls` holds the arguments of every call of `kpconv`."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        function = getattr(kp, name)
        if name != "kpconv":
            return function

        def record(*args, **kwargs):
            self.calls.append((args, kwargs))
            return function(*args, **kwargs)

        return record


def convolutions(bench, deformable):
    """All convolutions of the network, one after the other: forward pass and the gradients that training needs."""
    problem, kind, recorder = Problem(bench, deformable), "deformable" if deformable else "rigid", Recorder()
    problem.net(recorder, problem.params, problem.state, problem.pyramid, problem.features, training=True)
    rng, ours, dense = np.random.default_rng(0), [], []
    if reason := peers.missing(peers.DENSE_NETWORK):
        bench.absent(f"{kind}, forward + vjp", peers.DENSE_NETWORK.name, reason)
        return
    for args, kwargs in recorder.calls:
        features, weights, offsets = args[3], args[4], kwargs.get("offsets")
        grad = rng.standard_normal((args[2].num_queries, weights.shape[-1]), np.float32)
        # The input features of the network need no gradient in training.
        primals = {} if features is problem.features else {"features": features}
        primals |= {"weights": weights} | ({} if offsets is None else {"offsets": offsets})
        ours.append(partial(kpcore_convolution, args, kwargs, primals, grad))
        dense.append(peers.dense_convolution(args, primals, grad))
        for name, dense_gradient in dense[-1]().items():
            gradient = ours[-1]()[name]
            error, allowed = np.abs(gradient - dense_gradient.numpy()).max(), 1e-4 * max(np.abs(gradient).max(), 1e-30)
            assert error <= allowed, f"gradient of {name}: expected an error of at most {allowed}, got {error}"
    bench.compare(f"{kind}, forward + vjp", lambda: [call() for call in ours], peers.DENSE_NETWORK.name,
                  lambda: [call() for call in dense])  # fmt: skip


def kpcore_convolution(args, options, primals, grad):
    """{name: gradient} of the arguments of a convolution that are in `primals`."""

    def conv(primals):
        arguments = {"features": args[3], "weights": args[4], **options, **primals}
        return kp.kpconv(*args[:3], kernel_points=args[5], extent=args[6], **arguments)

    return kp.autodiff.vjp(conv, primals)[1](grad)[0]


def peak(bench, implementation):
    """Peak resident memory of the first step of a process, minus that before it (parameters, batch and lists)."""
    problem = Problem(bench)
    if implementation == "dense torch" and (reason := peers.missing(peers.DENSE_NETWORK)):
        bench.absent(implementation, None, reason)
        return
    if implementation != "tape":
        import torch

        torch.ones(2, requires_grad=True).sum().backward()  # starts the threads of autograd
    make = {"tape": problem.tape, "kpcore.torch": problem.kpcore_torch, "dense torch": problem.dense}[implementation]
    # Every step needs gradients and momentum; the rest of the peak is arrays saved for the gradient and scratch memory.
    gradients_and_momentum = 2 * sum(value.nbytes for value in problem.params.values())
    bench.memory(implementation, make(), gradients_and_momentum, "MiB beyond parameters, gradients, momentum and batch")


def preprocessing(bench):
    """The time of making the pyramid of a batch, in percent of a training step."""
    problem = Problem(bench)
    tape = problem.tape()
    times = []
    for call in (problem.prepared, tape):
        call()
        samples = []
        for _ in range(7):
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        times.append(
            {"median": float(np.median(samples)), "min": min(samples), "max": max(samples), "samples": samples}
        )
    pyramid, whole_step = times
    percent = 100 * pyramid["median"] / whole_step["median"]
    bench.row("pyramid of the batch", percent, "% of it", "the step", ours=pyramid, theirs=whole_step)


def loading(bench):
    """The time that training waits for batches, in percent of all its time."""
    from kpcore.pipeline.settings import from_dict
    from kpcore.pipeline.training import Training

    quick = bench.sizes["piece"] < 1000
    network = {"voxel_size": 0.2, "width": 16, "levels": 3} if quick else {"voxel_size": 0.04, "width": 128, "convs": 3}
    settings = from_dict({
        "data": {"train": [{"indoor": 0, "points": bench.sizes["scene"]}], "features": ["one", "color", "height"],
                 "classes": {f"class {i}": [i] for i in range(CLASSES)}},
        "network": network,
        "training": {"radius": 1.2, "batch_points": 15_000, "epochs": 1, "steps": bench.sizes["steps"], "workers": 2},
    })  # fmt: skip
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        Training(settings, folder, folder).run(entries.append)
    entries = entries[1:]  # nothing could prepare the first batch before it was needed
    seconds, waited = (sum(entry[name] for entry in entries) for name in ("seconds", "waited"))
    points = np.mean([entry["points"] for entry in entries])
    bench.label(order="", size=f"{points:,.0f}")
    bench.row("waiting, 2 workers", 100 * waited / seconds, "% of the time")


def receptive_field(bench, deformable):
    """Effective receptive fields: two positions in each of four clouds, one by one and in two passes."""
    problem, kind = Problem(bench, deformable, pieces=4), "deformable" if deformable else "rigid"
    where = np.concatenate([problem.row_splits[:-1] + 10, problem.row_splits[1:] - 10])
    geometry = {"points": problem.points, "points_row_splits": problem.row_splits}

    def logits(features):
        return problem.net(kp, problem.params, problem.state, problem.pyramid, features).logits

    def fields(positions, **options):
        return kp.effective_receptive_field(logits, problem.features, positions, **options)

    def per_position(positions, **options):
        start = time.perf_counter()
        fields(positions, **options)
        return bench.Seconds((time.perf_counter() - start) / len(positions))

    step = problem.tape()
    peaks = [bench.peak(partial(fields, where)), bench.peak(step)]
    bench.row(f"{kind}, peak memory", peaks[0] / peaks[1], "x its memory", "a training step")
    sharing = {"reach": problem.net.reach, **geometry}
    np.testing.assert_array_equal(fields(where, **sharing), fields(where))
    for what, positions, options in (("a position", where, {}), ("one position alone", where[:1], {}),
                                     ("a position, sharing passes", where, sharing)):  # fmt: skip
        bench.compare(f"{kind}, {what}", partial(per_position, positions, **options), "a training step", step)


def objects(bench):
    throughput(bench, Objects(bench, parts=False, num_sampled=10_000), 2.9)


def parts(bench):
    throughput(bench, Objects(bench, parts=True, num_sampled=2_600), 4.1)


def throughput(bench, problem, published):
    """A training step and a pass outside of training, and the batches that they do in a second."""
    if reason := peers.missing(peers.DENSE_NETWORK):
        bench.absent("training", peers.DENSE_NETWORK.name, reason)
        return
    sides = {
        "training": (problem.tape(), problem.dense(), f"; {published} on a Titan Xp in 2019"),
        "inference": (problem.inference(), problem.dense_inference(), ""),
    }
    for what, (call, other, also) in sides.items():
        expected = bench.first(call)
        np.testing.assert_allclose(other(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        bench.compare(what, call, peers.DENSE_NETWORK.name, other)
        rate, dense_rate = (1 / bench.rows[-1][side]["median"] for side in ("ours", "theirs"))
        bench.row(f"{what}, rate", rate, f"batches a second, dense torch {dense_rate:.2g}{also}")
