"""Code that users write around files, networks and training, which a type checker in strict mode must accept.

It is checked by basedpyright and never run; what `assert_type` states is checked too.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import kpcore as kp
import kpcore.torch as kpt
from kpcore import io, nn, scenes
from kpcore.compat import geotransformer, kpconv_pytorch, kpconvx
from kpcore.nn import checkpoints
from kpcore.pipeline import segmentation
from kpcore.pipeline.labelling import evaluate
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import Settings, SettingsError, read_settings
from kpcore.pipeline.training import Training
from kpcore.pipeline.voting import Scores, scores


def read_and_label(source: Path) -> tuple[float, float]:
    """Read a scan, label its points by height, and write it again."""
    try:
        cloud = io.read(source, fields=["intensity"], label="class", ignore=[7, "withheld"], drop_zeros=True)
    except io.ReadError as error:
        raise SystemExit(str(error)) from error
    assert_type(cloud, io.Cloud)
    assert_type(cloud.dropped, "dict[str, int]")
    assert_type(io.field_names(source, columns=["x", "y", "z"]), "tuple[str, ...]")
    assert_type(io.faults(cloud, share=0.05), "list[str]")
    if (reference := cloud.reference) is not None and reference.kind != "geographic":
        assert_type(reference.horizontal, "float | None")
    assert_type(cloud.points, np.ndarray)
    assert_type(cloud.colors, np.ndarray | None)
    assert_type(cloud.fields, dict[str, np.ndarray])
    assert_type(cloud.up, tuple[int, int, int])
    assert_type(cloud.left_out, int)
    heights = cloud.points[:, 2]
    labels = (heights > 1.0).astype(np.int32)
    io.write_labels(source, "labelled.ply", labels, kept=cloud.kept, into="above")
    segmentation.write_labels(source, source.with_suffix(".laz"), [1, 2, 3], extra={"confidence": [90, 80, 70]})
    if cloud.names is not None:
        print(", ".join(cloud.names))
    return float(heights.min()), cloud.rounding


def a_room() -> np.ndarray:
    """A labelled scan made on the spot."""
    cloud = scenes.indoor(10_000, seed=1)
    assert_type(cloud, scenes.Cloud)
    assert cloud.labels is not None
    return cloud.points[cloud.labels == 2]


def networks(points: np.ndarray, features: np.ndarray) -> nn.Result[np.ndarray, np.ndarray]:
    """Build networks, look at what they are, and apply one."""
    net = nn.kpfcnn(num_features=1, num_classes=13, voxel_size=0.04, width=64, norm="group")
    assert_type(net, nn.Network)
    custom = nn.Network(nn.architecture(3, 2, deformable=1), num_features=1, num_classes=4, voxel_size=0.04)
    classifier = nn.kpcnn(1, 40, 0.02, convs=2)
    attending = nn.kpnext(5, 13, 0.04, size="S", attention=False)
    assert_type(attending, nn.KPNeXt)
    for each in (net, custom, classifier, attending):
        params, state = each.init(seed=0, dtype=np.float64)
        assert_type(params, dict[str, np.ndarray])
        assert_type(each.num_levels, int)
        assert_type(each.segments, bool)
        print(nn.count(params), nn.count(state))
    assert_type(custom.deform_levels, tuple[int, ...])
    params, state = net.init()
    pyramid = net.pyramid(points)
    result = net(kp, params, state, pyramid, features)
    assert_type(result.logits, np.ndarray)
    assert_type(result.state, dict[str, np.ndarray])
    assert_type(result.regularization, np.ndarray | None)
    return result


def optimizers(params: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> float:
    """Steps of both rules, under a schedule, with clipped gradients."""
    descent = nn.sgd(params, momentum=0.9, lr_scales={"offset": 0.1})
    adam = nn.adamw(params, betas=(0.9, 0.99))
    assert_type(descent, nn.Optimizer[np.ndarray])
    warm = nn.warm_up(nn.cosine(0.1, 1000), 100)
    for schedule in (nn.exponential(0.01, 0.1, 100), nn.one_cycle(0.05, 1000, warm=0.2), warm):
        assert_type(schedule, Callable[[float], float])
        for optimizer in (descent, adam):
            nn.clip_by_value(grads, 100.0)
            optimizer.step(grads, schedule(0))
    descent.restore(descent.state())
    return nn.clip_by_norm(grads, 1.0)


def to_file_and_back(path: Path, net: nn.Network) -> nn.Network | nn.KPNeXt:
    """Save a network with its parameters, and load it again."""
    params, state = net.init()
    nn.save(path, net, params, state, classes=["floor", "wall"])
    loaded, params, state, about = nn.load(path)
    assert_type(params, dict[str, np.ndarray])
    print(about["classes"], nn.count(params))
    groups, _ = checkpoints.read(path)
    assert_type(groups, dict[str, dict[str, np.ndarray]])
    return loaded


def import_published(path: Path) -> nn.Network:
    """A checkpoint of the published PyTorch code."""
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    config = {"num_classes": 13, "in_features_dim": 5, "first_features_dim": 128, "first_subsampling_dl": 0.04}
    net, params, state = nn.import_kpconv_pytorch(weights, ["simple", "resnetb"], config)
    nn.save(path.with_suffix(".safetensors"), net, params, state)
    return net


def train(toml: Path, out: Path) -> Model:
    """What `kpcore train` does."""
    try:
        settings = read_settings(toml)
    except SettingsError as error:
        raise SystemExit(str(error)) from error
    assert_type(settings, Settings)
    assert_type(settings.names, tuple[str, ...])
    assert_type(settings.training.lr, float)
    assert_type(settings.data.classes, dict[str, list[int]] | list[str])
    assert_type(settings.net(), nn.Network | nn.KPNeXt)
    training = Training(settings, out, toml.parent, seed=1)
    assert_type(training.epoch, int)
    assert_type(training.loss, float | None)
    for result in training.run(lambda entry: print(entry["loss"])):
        print(result["epoch"])
    return training.model


def segment(path: Path, scan: Path, out: Path) -> Scores | None:
    """What `kpcore segment` does."""
    model = Model.load(path)
    segmented = segmentation.segment(model, scan, out, votes=3, watch=lambda done: print(f"{done:.0%}"))
    assert_type(segmented.classes, np.ndarray)
    assert_type(segmented.true, np.ndarray | None)
    if segmented.scores is not None:
        assert_type(segmented.scores["miou"], float | None)
        assert_type(segmented.scores["iou"], dict[str, float | None])
    return segmented.scores


def score(training: Training) -> Scores:
    """IoU on the test scenes of a run."""
    confusion = evaluate(training.model, training.test_scenes)
    assert_type(confusion, np.ndarray)
    return scores(confusion, training.settings.names)


def layers(points: torch.Tensor, neighbors: kp.Neighbors, features: torch.Tensor) -> torch.Tensor:
    """Layers of PyTorch."""
    rigid = kpt.KPConv(4, 8, radius=0.2, extent=0.15)
    grouped = kpt.KPConv(8, 8, 40, radius=0.2, extent=0.15, groups=2, bias=True, method="lloyd")
    deformable = kpt.DeformableKPConv(8, 8, radius=0.2, extent=0.15, modulated=True, dtype=torch.float32)
    attending = kpt.KPConvX(8, (1, 14), radius=0.3, extent=0.3, attention_groups=None)
    assert_type(rigid.kernel_points, torch.Tensor)
    assert_type(rigid.weights, torch.nn.Parameter)
    assert_type(grouped.bias, torch.nn.Parameter | None)
    features = rigid(points, None, neighbors, features)  # to a type checker a call of any module returns Any
    features = grouped(points, None, neighbors, features)
    assert_type(rigid.forward(points, None, neighbors, features), torch.Tensor)
    assert_type(deformable.forward(points, None, neighbors, features), torch.Tensor)
    both = deformable.forward(points, None, neighbors, features, return_offsets=True)
    assert_type(both, tuple[torch.Tensor, torch.Tensor])
    features, offsets = both
    loss = attending.forward(points, None, neighbors, features).square().mean()
    return loss + deformable.regularization(points, None, neighbors, offsets)


def layers_of_published_code(points: torch.Tensor, indices: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Layers of PyTorch with the arguments of the code bases around KPConv."""
    deformable = kpconv_pytorch.KPConv(15, 3, 4, 8, KP_extent=0.15, radius=0.3, deformable=True)
    assert_type(deformable.forward(points, points, indices, features), torch.Tensor)
    assert_type(deformable.min_d2, torch.Tensor | None)
    assert_type(deformable.kernel_points, torch.nn.Parameter)
    rigid = geotransformer.KPConv(8, 8, 15, radius=0.3, sigma=0.2, bias=True)
    attending = kpconvx.KPConvX(8, (1, 14), radius=0.3, sigma=0.3, attention_groups=4)
    features = rigid.forward(deformable(points, points, indices, features), points, points, indices)
    assert_type(attending.forward(points, points, features, indices), torch.Tensor)
    assert_type(kpconvx.local_maxpool(features, indices), torch.Tensor)
    regularization = kpconv_pytorch.p2p_fitting_regularizer(torch.nn.ModuleList([deformable]))
    assert_type(regularization, torch.Tensor | float)
    return features.square().mean() + regularization


def layers_of_open3d(features: torch.Tensor, points: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    """Layers of PyTorch with Open3D's arguments, and those over a kernel map."""
    conv = kpt.ContinuousConv(filters=8, kernel_size=[3, 3, 3], activation="relu", kernel_regularizer=torch.sum)
    neighbors = conv.search(points, points, 0.4)
    assert_type(neighbors, kp.Neighbors)
    assert_type(conv.kernel, torch.nn.Parameter)
    features = conv(features, points, points, extents=0.4, neighbors=neighbors)
    sparse = kpt.SparseConv(8, 8, [2, 2, 2], normalize=True)
    submanifold, strided = kpt.SubmanifoldConv(8, 8, 3), kpt.StridedConv(8, 8, (2, 2, 2), stride=2, rule="minkowski")
    assert_type(submanifold.kernel_map(coords), kp.KernelMap[torch.Tensor])
    down = strided.kernel_map(coords)
    features = strided.forward(submanifold.forward(features, submanifold.kernel_map(coords)), down)
    assert_type(kpt.InverseConv(8, 8, 2).forward(features, down), torch.Tensor)
    index, row_splits, _ = kpt.FixedRadiusSearch(metric="Linf").forward(points, points, 0.5)
    assert_type(index, torch.Tensor)
    assert_type(row_splits, torch.Tensor)
    return conv.regularization() + sparse.regularization()


def module(net: nn.Network, points: torch.Tensor, features: torch.Tensor) -> dict[str, np.ndarray]:
    """A network as a module of PyTorch, and its parameters as arrays."""
    network = kpt.Network(net, *net.init(seed=1))
    pyramid = net.pyramid(points, F=kpt)
    logits, regularization = network.forward(pyramid, features)
    assert_type(logits, torch.Tensor)
    assert_type(regularization, torch.Tensor | None)
    params, state = network.arrays()
    assert_type(state, dict[str, np.ndarray])
    return params


def networks_of_images(pictures: np.ndarray, batch: torch.Tensor) -> torch.Tensor:
    """Networks and layers of images, with the options that make their convolutions adapt."""
    net = nn.resnet50_dw(10, kernel="local", data_offsets="modulated", data_offsets_from=1)
    assert_type(net, nn.ImageNetwork)
    other = nn.mobilenet_v2(kernel="local", pointwise_experts=8)
    assert_type(nn.multiply_adds(other, 192, 192), int)
    params, state = net.init(seed=0)
    assert_type(net(kp, params, state, pictures, training=True).logits, np.ndarray)
    run = nn.Run[np.ndarray, np.ndarray](kp, {}, {}, new={"seed": 0, "dtype": np.float32})
    x = nn.images.local_deformable_kernel(run, "first", pictures, 3, padding=1, scope_size=(5, 5))
    assert_type(nn.images.conditional_conv(run, "second", x, 16, 1, experts=4), np.ndarray)
    module = kpt.ImageNetwork(net, params, state)
    assert_type(module.arrays()[0], dict[str, np.ndarray])
    local = kpt.LocalDeformableKernel2d(3, 3, 3, padding=1, grid="uniform", clip=None)
    both = kpt.DeformableKernelConv2d(3, 3, (3, 3), padding=1, modulated=True)
    mixed = kpt.ConditionalConv2d(3, 3, 3, padding=1, groups=3, kernel_offsets="local", num_experts=4)
    moved = kpt.DeformableConv2d(3, 3, 3, padding=1, detach_offsets=True)
    for layer in (local, both, mixed, moved, kpt.GlobalDeformableKernel2d(3, 3, 1)):
        batch = layer.forward(batch)
        assert_type(layer.bias, torch.nn.Parameter | None)
    logits = module.forward(batch)
    assert_type(logits, torch.Tensor)
    return logits
