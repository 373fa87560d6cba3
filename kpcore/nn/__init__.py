"""Networks of point convolutions and of images, written once for arrays, the tape, PyTorch and JAX.

    net = kpcore.nn.kpfcnn(num_features=1, num_classes=13, voxel_size=0.04)
    params, state = net.init(seed=0)
    logits = net(kpcore, params, state, net.pyramid(points), features).logits

A network is a pure function of a namespace of operators, dicts of parameters and state by name, and a pyramid, or
images.
"""

from kpcore.nn import blocks, images
from kpcore.nn.blocks import Run
from kpcore.nn.checkpoints import load, save
from kpcore.nn.image_networks import ImageNetwork, mobilenet_v2, multiply_adds, resnet50_dw
from kpcore.nn.kpnext import KPNeXt, kpnext
from kpcore.nn.networks import Network, Result, architecture, count, kpcnn, kpfcnn
from kpcore.nn.optimizers import (
    Optimizer,
    adamw,
    clip_by_norm,
    clip_by_value,
    cosine,
    exponential,
    one_cycle,
    sgd,
    warm_up,
)
from kpcore.nn.published import import_kpconv_pytorch, import_open3d_ml, import_predator
from kpcore.nn.published_geotransformer import import_geotransformer
from kpcore.nn.published_kpconvx import import_kpconvx
from kpcore.nn.summaries import summary

__all__ = [
    "ImageNetwork",
    "KPNeXt",
    "Network",
    "Optimizer",
    "Result",
    "Run",
    "adamw",
    "architecture",
    "blocks",
    "clip_by_norm",
    "clip_by_value",
    "cosine",
    "count",
    "exponential",
    "images",
    "import_geotransformer",
    "import_kpconv_pytorch",
    "import_kpconvx",
    "import_open3d_ml",
    "import_predator",
    "kpcnn",
    "kpfcnn",
    "kpnext",
    "load",
    "mobilenet_v2",
    "multiply_adds",
    "one_cycle",
    "resnet50_dw",
    "save",
    "sgd",
    "summary",
    "warm_up",
]
