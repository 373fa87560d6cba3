"""Makes the figures and tables of docs/results.md that no other command makes.

    python docs/results.py [curves|ablation|variants|shapes]

curves: one network trained on the tape, in PyTorch and in JAX.
ablation: a small version of the comparison of kernels in Thomas et al. 2019, section 4.3 (number of kernel points,
rigid and deformable): the network of the demo, trained for half of its steps, tested on its unseen flat.
variants: in the same way, what sections 3.2 and 3.4 mention beside it: learned kernel points, and convolutions that
upsample, against the rigid network.
shapes: rigid and deformable networks that classify generated objects, and that find their parts.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import kpcore as kp
from kpcore import demo, nn
from kpcore.pipeline import labelling, voting
from kpcore.pipeline.data import load
from kpcore.pipeline.settings import from_dict, read_settings
from kpcore.pipeline.training import Training

KERNELS, SEEDS, STEPS = (15, 9, 5), (0, 1, 2), 550
HEADER = "mIoU, median of three seeds (least–most) | ms a step | parameters |"


def step_times(run):
    """The seconds of the steps of a training run, in order."""
    log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    return [entry["seconds"] for entry in log if "loss" in entry]


def train(seed, **changes):
    """(mIoU, seconds of each step, number of parameters) of the demo's network with some settings changed."""
    network = demo.TRAINING["network"] | changes
    settings = from_dict(demo.TRAINING | {"network": network, "training": demo.TRAINING["training"] | {"steps": STEPS}})
    with tempfile.TemporaryDirectory() as folder:
        run = Training(settings, folder, folder, seed=seed)
        run.run()
        seconds = step_times(run)
    (scene,), _ = load(settings, [demo.UNSEEN], ".", run.model.columns)
    scores = voting.scores(labelling.evaluate(run.model, [scene]), settings.names)
    return scores["miou"], seconds, nn.count(run.model.params)


def trained(name, **changes):
    """Train a network with each of the seeds, print its row of the table and return the mIoUs."""
    scores, seconds, sizes = zip(*(train(seed, **changes) for seed in SEEDS), strict=True)
    median, milliseconds = np.median(scores), 1e3 * np.median(seconds)
    print(
        f"| {name} | {median:.3f} ({min(scores):.3f}–{max(scores):.3f}) | {milliseconds:.0f} | {sizes[0]:,} |",
        flush=True,
    )
    return scores


def curves(steps=100):
    """Plot the losses of the same training on the tape, in PyTorch and in JAX, and print their largest difference."""
    import jax
    import torch

    net = nn.kpfcnn(3, 15, 0.1, levels=4, convs=2, deformable=3, width=16)
    params, state = net.init()
    scene = kp.scenes.indoor(60_000)
    pyramid = net.pyramid(scene.points, features=scene.colors.astype(np.float32) / 255, labels=scene.labels)
    features, labels = pyramid[0].features, pyramid[0].labels

    def loss(F, params, state, pyramid, features, labels):
        result = net(F, params, state, pyramid, features, training=True)
        return F.softmax_cross_entropy(result.logits, labels) + result.regularization, result.state

    losses = {"tape": [], "torch": [], "JAX": []}
    tape_params, tape_state = {name: value.copy() for name, value in params.items()}, state
    optimizer = nn.sgd(tape_params, momentum=0.9, lr_scales={"offset": 0.1})
    for _ in range(steps):
        tensors = {name: kp.autodiff.Tensor(value) for name, value in tape_params.items()}
        value, tape_state = loss(kp, tensors, tape_state, pyramid, features, labels)
        value.backward()
        optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, 0.02)
        losses["tape"].append(float(value.value))

    module = kp.torch.Network(net, params, state)
    groups = [
        {"params": [p for name, p in module.named_parameters() if ("offset" in name) == slow], "lr": rate}
        for slow, rate in ((False, 0.02), (True, 0.002))
    ]
    torch_optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
    levels = net.pyramid(torch.from_numpy(scene.points), F=kp.torch)
    for _ in range(steps):
        torch_optimizer.zero_grad()
        logits, regularization = module(levels, torch.from_numpy(features))
        value = kp.torch.softmax_cross_entropy(logits, torch.from_numpy(labels)) + regularization
        value.backward()
        torch_optimizer.step()
        losses["torch"].append(value.item())

    F = kp.jax
    step = jax.jit(jax.value_and_grad(lambda *inputs: loss(F, *inputs), has_aux=True))
    moments = {name: np.zeros_like(value) for name, value in params.items()}
    for _ in range(steps):
        (value, state), grads = step(params, state, pyramid, features, labels)
        moments = {name: 0.9 * moments[name] + grads[name] + 1e-3 * params[name] for name in params}
        params = {name: p - (0.002 if "offset" in name else 0.02) * moments[name] for name, p in params.items()}
        losses["JAX"].append(float(value))

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), width, color in zip(losses.items(), (7, 3.5, 1), ("C0", "C1", "k"), strict=True):
        axes.plot(values, lw=width, color=color, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(Path(__file__).with_name("curves.png"), dpi=120)
    tape, *others = map(np.array, losses.values())
    for name, values in zip(("torch", "JAX"), others, strict=True):
        difference = np.abs(values / tape - 1).max()
        print(f"{name}: {tape[0]:.4f} -> {tape[-1]:.4f}, differs from the tape by at most {difference:.1e}")


def ablation():
    """Plot the mIoU by number of kernel points, rigid and deformable, and print the table."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    print(f"| kernel points | | {HEADER}\n|---|---|---|---|---|")
    for kind, deformable, color in (("rigid", 0, "C0"), ("deformable", 4, "C1")):
        medians = []
        for kernel_size in KERNELS:
            scores = trained(f"{kernel_size} | {kind}", kernel_size=kernel_size, deformable=deformable)
            medians.append(np.median(scores))
            axes.plot([kernel_size] * len(scores), scores, ".", color=color, alpha=0.4)
        axes.plot(KERNELS, medians, "o-", color=color, label=kind)
    axes.set(xlabel="kernel points", ylabel="mIoU on an unseen flat", xticks=KERNELS)
    axes.legend()
    figure.savefig(Path(__file__).with_name("ablation.png"), dpi=120)


def variants():
    """Print the table of the rigid network with learned kernel points, and with convolutions that upsample."""
    print(f"| | {HEADER}\n|---|---|---|---|")
    trained("rigid, nearest upsampling")
    trained("kernel points learned", learn_kernel_points=True)
    trained("upsampling by KPConv", upsample="kpconv")


def shapes():
    """Print the table of networks for generated objects and their parts."""
    print("| | | score of 1 vote, seeds 0 / 1 / 2 | of 5 votes | ms a step | parameters |\n|---|---|---|---|---|---|")
    for kind, score in (("objects", "accuracy"), ("parts", "miou")):
        settings = read_settings(Path(__file__).with_name(f"{kind}.toml"))
        for name, deformable in (("rigid", 0), ("deformable", 2)):
            changed = replace(settings, network=replace(settings.network, deformable=deformable))
            scores, seconds = [], []
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as folder:
                    run = Training(changed, folder, folder, seed=seed)
                    run.run()
                    seconds += step_times(run)
                scores.append(
                    [labelling.evaluate_scores(run.model, run.test_scenes, votes)[1][score] for votes in (1, 5)]
                )
            columns = [" / ".join(f"{value:.3f}" for value in column) for column in zip(*scores, strict=True)]
            print(f"| {kind} | {name} | {columns[0]} | {columns[1]} | {1e3 * np.median(seconds):.0f} | "
                  f"{nn.count(run.model.params):,} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    functions = {"curves": curves, "ablation": ablation, "variants": variants, "shapes": shapes}
    for name in sys.argv[1:] or functions:
        functions[name]()
