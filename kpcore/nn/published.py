"""Import of checkpoints of KPConv-PyTorch, and of Open3D-ML and Predator, which have the same blocks.

An import makes a network from the settings and the sizes of the arrays, and looks up each of its arrays under the name
that it has in the published code. Other projects' are in `published_geotransformer` and `published_kpconvx`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kpcore.backends import checks
from kpcore.nn.networks import Network
from kpcore.nn.published_arrays import arrays_of, flag, loaded, need, numbers, shape_of, speller

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from kpcore.nn.published_arrays import Arrays

# {published name of a setting: field of `Network`}
_SETTINGS = {
    "in_features_dim": "num_features", "in_feats_dim": "num_features", "first_features_dim": "width",
    "first_feats_dim": "width", "first_subsampling_dl": "voxel_size", "conv_radius": "conv_radius",
    "deform_radius": "deform_radius", "KP_extent": "extent", "KP_influence": "influence",
    "aggregation_mode": "aggregation", "batch_norm_momentum": "momentum", "num_kernel_points": "kernel_size",
    "in_points_dim": "dimension", "deform_fitting_power": "fitting_power", "repulse_extent": "repulse_extent",
    "l_relu": "slope",
}  # fmt: skip
_HEADS = {"head.0": "head_mlp", "head.1": "head_softmax"}


def import_kpconv_pytorch(
    state_dict: Mapping[str, ArrayLike], architecture: Sequence[str], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays]:
    """A network and its parameters from a checkpoint of HuguesTHOMAS/KPConv-PyTorch.

    Nothing is unpickled here: load the file with ``torch.load(path, weights_only=True)["model_state_dict"]``.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
        The weights of classes in the loss, ``criterion.weight``, are ignored.
    architecture : sequence of str
        As in the checkpoint's ``parameters.txt``.
    config : dict
        Settings by the names in that file; at least first_subsampling_dl. Radii and extents that are not in it are
        those of `Network`, which are those of most published settings. Sizes that are in it must be those of the
        arrays, except num_classes, which may count ignored labels: the number of classes is that of the last layer.
        Settings that do not describe the network are ignored.

    Returns
    -------
    net : Network
        Its maxima over neighbours include the zeros with which the published code pads (``pool_pad_value=0.0``), and
        the grids of its pyramids begin where those of the published code do (``origin="published"``). The published
        code also subsamples whole scenes in this way, before it cuts spheres out of them.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        For settings that are missing, and with the list of all arrays that are missing, have other shapes or are left
        over.

    Examples
    --------
    >>> import kpcore as kp
    >>> kp.nn.import_kpconv_pytorch({}, ["simple", "resnetb"], {"KP_extent": 1.2})
    Traceback (most recent call last):
    ValueError: config: expected first_subsampling_dl, got none
    """
    return kpconv_pytorch(state_dict, architecture, config)[:3]


def kpconv_pytorch(
    state_dict: Mapping[str, ArrayLike], architecture: Sequence[str], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays, list[str]]:
    """What `import_kpconv_pytorch` returns, and the names of arrays that are not of the network."""
    state_dict = arrays_of("kpconv-pytorch", state_dict)
    need(config, "first_subsampling_dl")
    return _kpfcnn("kpconv-pytorch", state_dict, architecture, config, {})


def import_open3d_ml(state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> tuple[Network, Arrays, Arrays]:
    """A network and its parameters from a checkpoint of the KPFCNN of isl-org/Open3D-ML.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
        ``torch.load(path, weights_only=True)["model_state_dict"]``.
    config : dict
        The section ``model`` of the yml file; at least architecture, first_subsampling_dl, conv_radius, KP_extent, and
        deform_radius if a block is deformable. As there, the momentum of the running statistics is 1 minus
        batch_norm_momentum, which is 0.98 in all yml files but 0.02 if a file does not have it.

    Returns
    -------
    net : Network
        As by `import_kpconv_pytorch`; its logits pass through a leaky ReLU, unless the setting reduce_fc is on.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        As `import_kpconv_pytorch`.
    """
    return open3d_ml(state_dict, config)[:3]


def open3d_ml(
    state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays, list[str]]:
    """What `import_open3d_ml` returns, and the names of arrays that are not of the network."""
    state_dict = arrays_of("open3d-ml", state_dict)
    need(config, "architecture", *needed_lengths(config.get("architecture")))
    options = {"momentum": 1 - checks.between("batch_norm_momentum", config.get("batch_norm_momentum", 0.02), 0, 1)}
    if flag(config, "reduce_fc", False):
        half = _first_width(state_dict, config) // 2
        options |= {"decoder_width": half, "head_width": half, "head_norm": True}
    else:
        options["logits_slope"] = config.get("l_relu", 0.1)
    return _kpfcnn("open3d-ml", state_dict, config["architecture"], config, options)


def import_predator(state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> tuple[Network, Arrays, Arrays]:
    """Encoder and decoder of a checkpoint of prs-eth/OverlapPredator as a network.

    The graph network between them is not imported: bottle, gnn, proj_gnn, proj_score and epsilon. The network is called
    with a function `between` that computes it, from the features of the encoder to the input of the decoder: two scores
    and ``gnn_feats_dim`` features. Of the columns of its result, the last two are the logits of the scores of overlap
    and of saliency, those before are the descriptor before it is scaled to length 1.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
        ``torch.load(path, weights_only=True)["state_dict"]``.
    config : dict
        The section ``model`` of the yaml file; at least first_subsampling_dl, conv_radius and KP_extent, and
        deform_radius if a block is deformable. Blocks and sizes are those of the arrays.

    Returns
    -------
    net : Network
        Instance normalisation without scale and shift, over both clouds of a pair together.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        As `import_kpconv_pytorch`.
    """
    return predator(state_dict, config)[:3]


def predator(
    state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays, list[str]]:
    """What `import_predator` returns, and the names of arrays that are not of the network."""
    state_dict = arrays_of("predator", state_dict)
    architecture = _architecture_of(state_dict)
    need(config, *needed_lengths(architecture))
    last = f"decoder_blocks.{_last_block('decoder_blocks', state_dict)}.mlp.weight"
    bottleneck = shape_of(state_dict, "bottle.weight", 3)[0] + 2  # two scores besides the features
    coarsest = sum("strided" in block for block in architecture)
    widths = [max(1, bottleneck // 2 ** (coarsest - level)) for level in range(coarsest)]
    options = {"num_classes": shape_of(state_dict, last, 2)[0], "norm": "instance", "norm_affine": False,
               "norm_together": True, "normalization": "positive", "bottleneck_width": bottleneck,
               "decoder_width": widths}  # fmt: skip
    return _kpfcnn("predator", state_dict, architecture, config, options)


# ---- blocks that KPConv-PyTorch, Open3D-ML and Predator share


def _kpfcnn(client, state_dict, architecture, config, options):
    """(network, params, state, names of unused arrays)."""
    if not isinstance(architecture, (list, tuple)) or not all(isinstance(block, str) for block in architecture):
        raise TypeError(f"architecture: expected a list or tuple of str, got {architecture!r}")
    sizes = _sizes(state_dict, config)
    from_config = {field: config[name] for name, field in _SETTINGS.items() if name in config}
    if "modulated" in config:  # parameters.txt has 0 or 1
        from_config["modulated"] = flag(config, "modulated", False)
    if not flag(config, "use_batch_norm", True):
        options = options | {"norm": None, "norm_affine": True}
    names = {field: name for name, field in _SETTINGS.items() if name in config and field not in options}
    with checks.argument_names(names):
        net = Network(tuple(architecture), **sizes | from_config | options, pool_pad_value=0.0, origin="published")
    downs = net.num_downs
    parts = {"encoder": "encoder_blocks" if downs < len(architecture) else "block_ops", "decoder": "decoder_blocks"}
    paths = {}
    for number in range(len(architecture)):
        part, at = ("encoder", number) if number < downs else ("decoder", number - downs)
        paths[f"{part}.{at}"] = f"{parts[part]}.{at}"
    normed = ".batch_norm" if net.norm else ""
    spell = speller(net, paths | _HEADS, "batch_norm" + normed, "batch_norm_conv" + normed, "batch_norm.bias")
    return net, *loaded(client, net, state_dict, spell, constant=() if net.norm_affine else ("scale", "shift"))


def needed_lengths(architecture: object) -> list[str]:
    """The names of the settings that say how large voxels, neighbourhoods and kernels are."""
    deformable = "deformable" in str(architecture)
    return ["first_subsampling_dl", "conv_radius", "KP_extent", *["deform_radius"] * deformable]


def _sizes(state_dict: Arrays, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a network that its arrays show; of those that are missing, any, since the list of them says so."""
    num, num_features, _ = shape_of(state_dict, f"{_first_block(state_dict)}.KPConv.weights", 3, (15, 1, 1))
    num_classes, _ = shape_of(state_dict, "head_softmax.mlp.weight", 2, (1, 1))
    return {"num_features": num_features, "num_classes": num_classes, "kernel_size": num,
            "width": _first_width(state_dict, config)}  # fmt: skip


def _first_block(state_dict: Arrays) -> str:
    is_classifier = any(name.startswith("block_ops.") for name in state_dict)
    return "block_ops.0" if is_classifier else "encoder_blocks.0"


def _first_width(state_dict: Arrays, config: Mapping[str, Any]) -> int:
    first = _first_block(state_dict)
    if f"{first}.KPConv.weights" not in state_dict:
        return config.get("first_features_dim", config.get("first_feats_dim", 4))
    is_simple = f"{first}.unary2.mlp.weight" not in state_dict
    return shape_of(state_dict, f"{first}.KPConv.weights", 3)[2] * (2 if is_simple else 4)


def _architecture_of(state_dict: Arrays) -> list[str]:
    """The blocks of a network by their arrays: the last block before the width doubles is the strided one."""
    kinds, widths = [], []
    for number in range(_last_block("encoder_blocks", state_dict) + 1):
        block = f"encoder_blocks.{number}"
        is_simple = f"{block}.unary2.mlp.weight" not in state_dict
        deformable = f"{block}.KPConv.offset_bias" in state_dict
        kinds.append(("simple" if is_simple else "resnetb") + "_deformable" * deformable)
        if is_simple:
            widths.append(2 * shape_of(state_dict, f"{block}.KPConv.weights", 3, (0, 0, 0))[2])
        else:
            widths.append(shape_of(state_dict, f"{block}.unary2.mlp.weight", 2)[0])
    for number in range(len(kinds) - 1):
        if widths[number + 1] == 2 * widths[number]:
            kinds[number] += "_strided"
    if not kinds:
        raise ValueError("state_dict: expected arrays of encoder_blocks.0, encoder_blocks.1, ..., got none")
    last = _last_block("decoder_blocks", state_dict)
    for number in range(last + 1):
        has_weights = f"decoder_blocks.{number}.mlp.weight" in state_dict
        kinds.append("last_unary" if number == last else "unary" if has_weights else "nearest_upsample")
    return kinds


def _last_block(part: str, state_dict: Iterable[str]) -> int:
    """The number of the last block of a list of blocks that has arrays; -1 if none has."""
    return max((numbers(name)[0] for name in state_dict if re.match(rf"{part}\.\d+\.", name)), default=-1)
