"""Trains deformable kernels on digits of any size and rotation: ``python docs/deformable_digits.py DATA [folder]``.

DATA is the folder of the test digits of MNIST, t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. One small
network in six variants (Gao et al. 2020), and a wider rigid one, are trained in PyTorch and on the tape, from the same
parameters and with the same batches. Prints what docs/deformable_kernels.md reports: accuracies; whether kernel
offsets, data offsets and the routing of experts tell the scale of a digit or its class (figure 3 of the paper); and how
the effective receptive field at the centre of a digit changes when the digit is rotated and enlarged, which
deformable_digits.png shows if Matplotlib is installed (figure 6). Takes some 20 minutes on two cores.
"""

import gzip
import sys
import time
from pathlib import Path

import numpy as np

import kpcore as kp
from kpcore import nn

CANVAS, SCALES = 32, (0.6, 1.5)  # pixels of a side; the digits of MNIST have 28
NUM_TRAIN, EPOCHS, WARM_UP, BATCH, RATE, SEEDS, DTYPE = 8000, 10, 1, 100, 0.1, (0, 1), np.float32
STAGES = (1, 16, 1, 2), (3, 24, 1, 1), (3, 32, 2, 2)  # (factor, width, depth, stride)
WIDE_STAGES = (1, 28, 1, 2), (3, 42, 1, 1), (3, 56, 2, 2)
VARIANTS = {
    "rigid": {},
    "wide": {"stages": WIDE_STAGES, "stem_width": 28, "head_width": 112},  # rigid, as large as those with offsets
    "SCC": {"experts": 8},
    "DCN": {"data_offsets": "plain", "data_offsets_from": 1},
    "DK": {"kernel": "local"},
    "DK + DCN": {"kernel": "local", "data_offsets": "plain", "data_offsets_from": 1},
    "DK + SCC": {"kernel": "local", "experts": 8},
}
POSES = {"upright": (1, 0), "rotated by −90°": (1, -np.pi / 2), "1.5 times as large": (1.5, 0)}  # (scale, angle)
SHOWN, DIGIT, NUM_FIELDS = ("rigid", "DCN", "DK", "DK + DCN"), 10, 50
STRIDE = 8  # of the network
CENTRE = CANVAS // 2 // STRIDE  # row and column of the output position that is centred on pixel CANVAS / 2
SLOW = 0.1  # factor of the learning rate of offset generators


def network(variant):
    options = {"stages": STAGES, "stem_width": 16, "head_width": 64} | VARIANTS[variant]
    return nn.ImageNetwork("inverted", num_classes=10, num_features=1, **options)


# ---- digits


def load(folder):
    """(images (N, 28, 28) from 0 to 1, labels) of idx files."""
    images, labels = (gzip.decompress(Path(folder, f"t10k-{name}-ubyte.gz").read_bytes())
                      for name in ("images-idx3", "labels-idx1"))  # fmt: skip
    images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return images.astype(DTYPE) / 255, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def posed(images, scales, angles):
    """(B, CANVAS, CANVAS, 1): the digits, enlarged by `scales` and rotated anticlockwise by `angles`.

    The centre of mass of a digit of MNIST, its pixel (14, 14), becomes pixel CANVAS / 2. This is a deformable
    convolution of one tap; its data offsets lead from each pixel to the place in the digit.
    """
    rows, columns = np.indices((CANVAS, CANVAS)) - CANVAS // 2
    cos, sin = (function(angles)[:, None, None] / scales[:, None, None] for function in (np.cos, np.sin))
    offsets = np.stack([cos * rows + sin * columns - rows, cos * columns - sin * rows - columns], -1)
    return kp.deformable_conv2d(images[..., None], np.ones((1, 1, 1, 1), DTYPE), offsets.astype(DTYPE),
                                padding=(CANVAS - images.shape[1]) // 2, layout="NHWC")  # fmt: skip


def random_poses(rng, number):
    """(scales, angles), with the logarithm of the scale and the angle uniformly distributed."""
    return np.exp(rng.uniform(*np.log(SCALES), number)), rng.uniform(-np.pi, np.pi, number)


def steps(images, labels, seed):
    """(learning rate, images, labels) of each step; in every epoch the digits have other scales and angles."""
    rng, per_epoch = np.random.default_rng(seed), len(images) // BATCH
    rate = nn.warm_up(nn.cosine(RATE, (EPOCHS - WARM_UP) * per_epoch), WARM_UP * per_epoch)
    for step in range(EPOCHS * per_epoch):
        if step % per_epoch == 0:
            order = rng.permutation(len(images))
        batch = order[step % per_epoch * BATCH :][:BATCH]
        yield rate(step), posed(images[batch], *random_poses(rng, BATCH)), labels[batch]


# ---- training: each returns (losses, params, state)


def by_torch(net, seed, steps):
    import torch

    module = kp.torch.ImageNetwork(net, *net.init(seed, DTYPE))
    generators = [p for name, p in module.named_parameters() if "offset_generator" in name]
    others = [p for name, p in module.named_parameters() if "offset_generator" not in name]
    optimizer = torch.optim.SGD([{"params": others}, {"params": generators}], RATE, momentum=0.9, weight_decay=4e-5)
    losses = []
    for rate, images, labels in steps:
        for group, factor in zip(optimizer.param_groups, (1, SLOW), strict=True):
            group["lr"] = factor * rate
        logits = module(torch.from_numpy(images).permute(0, 3, 1, 2))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, *module.arrays()


def by_the_tape(net, seed, steps):
    params, state = net.init(seed, DTYPE)
    optimizer = nn.sgd(params, momentum=0.9, weight_decay=4e-5, lr_scales={"offset_generator": SLOW})
    losses = []
    for rate, images, labels in steps:
        tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
        result = net(kp, tensors, state, images, training=True)
        loss = kp.softmax_cross_entropy(result.logits, labels)
        loss.backward()
        state = result.state
        optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, rate)
        losses.append(float(loss.value))
    return losses, params, state


TRAININGS = {"PyTorch": by_torch, "the tape": by_the_tape}


def accuracy(net, params, state, images, labels):
    """In percent."""
    return 100 * (net(kp, params, state, images).logits.argmax(1) == labels).mean()


# ---- what offsets and experts tell


class Recorded:
    """The operators of `kpcore`, which keep by what the last convolution of each kind adapts to the image.

    `means` has kernel_offsets, data_offsets and routing, one row for each image; offsets are their mean over the image.
    """

    def __init__(self):
        self.means = {}

    def __getattr__(self, name):
        operator = getattr(kp, name)

        def function(x, weight, *more, **options):
            values = {key: options.get(key) for key in ("kernel_offsets", "data_offsets")}
            values["routing"] = more[0] if name == "conditional_conv2d" else None
            for key, value in values.items():
                if value is not None:
                    self.means[key] = value.reshape(len(x), -1, value.shape[-1]).mean(1)
            return operator(x, weight, *more, **options)

        return function if name.endswith("conv2d") else operator


def dynamics(net, params, state, images):
    """The means of `Recorded`, and those of the last features, which every variant has."""
    recorded = Recorded()
    run = net.new_run(recorded, params, state)
    features = nn.images.average(run, net.compute_features(run, images))
    return recorded.means | {"features": features}


def told(values, scales, labels):
    """(R² of the logarithm of the scale, accuracy of the class in percent) of least squares from `values`.

    Both are fitted to the first half of the digits and measured on the second.
    """
    half, log_scales = len(values) // 2, np.log(scales)
    rows, targets = np.insert(values, 0, 1, axis=1), np.column_stack([log_scales, np.eye(10)[labels]])
    fitted = rows[half:] @ np.linalg.lstsq(rows[:half], targets[:half], rcond=None)[0]
    r2 = 1 - ((fitted[:, 0] - log_scales[half:]) ** 2).mean() / log_scales[half:].var()
    return r2, 100 * (fitted[:, 1:].argmax(1) == labels[half:]).mean()


# ---- effective receptive fields


def fields(net, params, state, images):
    """(B, CANVAS, CANVAS): the effective receptive field at the centre of each image, with offsets kept constant.

    The sum of the fields of all channels, since the gradient of their sum is mostly what does not cancel.
    """

    def features(x):
        return net.compute_features(net.new_run(kp, params, state, detach_offsets=True), x)

    where = [(image, CENTRE, CENTRE) for image in range(len(images))]
    return sum(kp.effective_receptive_field(features, images, where, layout="NHWC", channels=[channel], reach=np.inf)
               for channel in range(net.head_width))  # fmt: skip


def field_changes(net, params, state, images):
    """How the fields of digits change with their pose: (similarity, enlargement), means over the digits.

    The cosine similarity of the field of the rotated digit, rotated back, with that of the upright one; and by which
    factor the field of the enlarged digit is larger, in the root of its second moments.
    """
    upright, rotated, enlarged = (
        fields(net, params, state, posed(images, *np.tile(pose, (len(images), 1)).T)) for pose in POSES.values()
    )
    # Without the first row and column, pixel CANVAS / 2 is in the middle, about which digits are rotated.
    back, upright = np.rot90(rotated[:, 1:, 1:], 1, (1, 2)), upright[:, 1:, 1:]
    norms = np.sqrt((back**2).sum((1, 2)) * (upright**2).sum((1, 2)))
    before, after = (kp.receptive_field_moments(field).sum(1) for field in (upright, enlarged))
    return ((back * upright).sum((1, 2)) / norms).mean(), np.sqrt(after / before).mean()


def draw(path, networks, image):
    """The fields of one digit in each pose, a column for each network; the darker, the more a pixel counts."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    digits = posed(np.stack([image] * len(POSES)), *np.array([*POSES.values()]).T)
    fig = Figure((1.6 * len(networks), 1.7 * len(POSES)), dpi=144, layout="constrained")
    axes = fig.subplots(len(POSES), len(networks))
    for panel, name in zip(axes[:, 0], POSES, strict=True):
        panel.set_ylabel(name, fontsize=9)
    for column, (variant, values) in zip(axes.T, networks.items(), strict=True):
        column[0].set_title(variant, fontsize=10)
        for panel, digit, field in zip(column, digits, fields(*values, digits), strict=True):
            strength = (field / field.max())[..., None]
            panel.imshow((1 - 0.4 * digit) * (1 - strength) + strength * [0.7, 0.15, 0.05])
            panel.set(xticks=[], yticks=[])
    FigureCanvasAgg(fig).print_png(path, metadata={"Software": None}, pil_kwargs={"optimize": True})


# ---- the experiment


def train(seed, images, labels, unseen, unseen_labels):
    """Train all variants and print their accuracies: variant → (net, params, state), trained on the tape."""
    networks = {}
    print(f"\nseed {seed}: parameters; accuracy in %, seconds of an epoch")
    for variant in VARIANTS:
        net, texts = network(variant), []
        for name, training in TRAININGS.items():
            begin = time.perf_counter()
            _, *values = training(net, seed, steps(images, labels, seed))
            seconds = (time.perf_counter() - begin) / EPOCHS
            texts.append(f"{name} {accuracy(net, *values, unseen, unseen_labels):5.2f}, {seconds:4.1f} s")
        networks[variant] = net, *values
        print(f"{variant:10} {nn.count(values[0]):7,}  ", "   ".join(texts), flush=True)
    return networks


def main(data, folder):
    images, labels = load(data)
    test, test_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    scales, angles = random_poses(np.random.default_rng(0), len(test))
    unseen = posed(test, scales, angles)
    for seed in SEEDS:
        networks = train(seed, images[:NUM_TRAIN], labels[:NUM_TRAIN], unseen, test_labels)
        print("R² of log scale, accuracy of the class in %, from")
        for variant, values in networks.items():
            for name, mean in dynamics(*values, unseen).items():
                r2, right = told(mean, scales, test_labels)
                print(f"{variant:10} {name:15} ({mean.shape[1]:2}) {r2:5.2f} {right:5.1f}")
        print("field: similarity after rotation, enlargement with the digit")
        for variant, values in networks.items():
            print(f"{variant:10}", *(f"{number:5.2f}" for number in field_changes(*values, test[:NUM_FIELDS])))
        if seed == SEEDS[0]:
            draw(folder / "deformable_digits.png", {variant: networks[variant] for variant in SHOWN}, test[DIGIT])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent))
