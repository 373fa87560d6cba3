"""python docs/ablation.py: the paper's comparison of kernels in small, on the embedded flats; a figure and its table.

Thomas et al. 2019 (section 4.3) compare numbers of kernel points, rigid and deformable, on S3DIS. Here each network is
the demo's, trained as the demo trains it for half the steps, and tested on the flat that the demo tests on.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kpcore import demo, nn
from kpcore.scenes import voting
from kpcore.scenes.data import load
from kpcore.scenes.settings import from_dict
from kpcore.scenes.training import Training

KERNELS, SEEDS, STEPS = (15, 9, 5), (0, 1, 2), 550


def trained(kernel_size, deformable, seed):
    """(mIoU, seconds, parameters)"""
    network = demo.TRAINING["network"] | {"kernel_size": kernel_size, "deformable": 4 if deformable else 0}
    settings = from_dict(demo.TRAINING | {"network": network, "training": demo.TRAINING["training"] | {"steps": STEPS}})
    with tempfile.TemporaryDirectory() as folder:
        run = Training(settings, folder, folder, seed=seed)
        begin = time.perf_counter()
        run.run()
        seconds = time.perf_counter() - begin
    (scene,), _ = load(settings, [demo.UNSEEN], ".", run.model.columns)
    scores = voting.scores(voting.evaluate(run.model, [scene]), settings.names)
    return scores["miou"], seconds, nn.count(run.model.params)


def main():
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    print("| kernel points | | mIoU, median of three seeds (least–most) | s | parameters |\n|---|---|---|---|---|")
    for kind, deformable in (("rigid", False), ("deformable", True)):
        medians = []
        for kernel_size in KERNELS:
            found = [trained(kernel_size, deformable, seed) for seed in SEEDS]
            scores, seconds, sizes = zip(*found, strict=True)
            medians.append(np.median(scores))
            axes.plot([kernel_size] * len(scores), scores, ".", color="C1" if deformable else "C0", alpha=0.4)
            print(f"| {kernel_size} | {kind} | {medians[-1]:.3f} ({min(scores):.3f}–{max(scores):.3f}) | "
                  f"{np.median(seconds):.0f} | {sizes[0]:,} |", flush=True)  # fmt: skip
        axes.plot(KERNELS, medians, "o-", color="C1" if deformable else "C0", label=kind)
    axes.set(xlabel="kernel points", ylabel="mIoU on an unseen flat", xticks=KERNELS)
    axes.legend()
    figure.savefig(Path(__file__).with_name("ablation.png"), dpi=120)


if __name__ == "__main__":
    main()
