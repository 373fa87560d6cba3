"""Import of the backbone of checkpoints of GeoTransformer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kpcore.backends import checks
from kpcore.nn.networks import Network
from kpcore.nn.published_arrays import arrays_of, check_sizes, loaded, need, numbers, shape_of, speller

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from kpcore.nn.published_arrays import Arrays


def import_geotransformer(
    state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays]:
    """The backbone (KPConvFPN) of a checkpoint of qinzheng93/GeoTransformer as a network.

    The published backbone returns the features of several levels: of the last block on each, from the level on that the
    decoder ends on. They are what `observe` sees last on these levels, see `Network`. All that is not of the backbone
    is ignored.

    Parameters
    ----------
    state_dict : dict of arrays or torch tensors on the CPU
        ``torch.load(path, weights_only=True)["model"]``.
    config : dict
        Settings by the names in the section ``backbone`` of config.py: init_voxel_size; base_radius and base_sigma, in
        voxels, or init_radius and init_sigma; group_norm. Blocks and sizes are those of the arrays.

    Returns
    -------
    net : Network
        Group normalisation over both clouds of a pair together. Its logits are the features of the finest level that
        the decoder reaches, `output_level`.
    params, state : dict of float32 arrays by name

    Raises
    ------
    ValueError
        As `import_kpconv_pytorch`.
    """
    return geotransformer(state_dict, config)[:3]


def geotransformer(
    state_dict: Mapping[str, ArrayLike], config: Mapping[str, Any]
) -> tuple[Network, Arrays, Arrays, list[str]]:
    """What `import_geotransformer` returns, and the names of arrays that are not of the network."""
    whole = arrays_of("geotransformer", state_dict)
    need(config, "init_voxel_size", "group_norm")
    voxel = checks.length("init_voxel_size", config["init_voxel_size"], np.dtype(np.float32))
    in_voxels = {}
    for field, name in (("conv_radius", "radius"), ("extent", "sigma")):
        if f"base_{name}" not in config:
            need(config, f"init_{name}")
        setting, unit = (f"base_{name}", 1) if f"base_{name}" in config else (f"init_{name}", voxel)
        in_voxels[field] = checks.length(setting, config[setting], np.dtype(np.float64)) / unit
    prefix = "backbone." if any(name.startswith("backbone.") for name in whole) else ""
    state_dict = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    # encoder2_1 is the first block of stage 2; it leads there from stage 1
    encoder = sorted({match[0] for name in state_dict if (match := re.match(r"encoder\d+_\d+", name))}, key=numbers)
    decoder = sorted({match[0] for name in state_dict if (match := re.match(r"decoder\d+", name))}, key=numbers)
    if not encoder or not decoder:
        raise ValueError("state_dict: expected arrays of encoder1_1, encoder1_2, ... and of decoders, got none")
    architecture, paths = [], {}
    for number, block in enumerate(encoder):
        stage, place = numbers(block)
        kind = "resnetb" if f"{block}.unary2.mlp.weight" in state_dict else "simple"
        architecture.append(kind + "_strided" * (stage > 1 and place == 1))
        paths[f"encoder.{number}"] = block
    for number, block in enumerate(reversed(decoder)):
        last = f"{block}.norm.norm.weight" not in state_dict
        architecture += ["nearest_upsample", "last_unary" if last else "unary"]
        paths[f"decoder.{2 * number + 1}"] = block
    num, num_features, width = shape_of(state_dict, f"{encoder[0]}.KPConv.weights", 3)
    num_classes, _ = shape_of(state_dict, f"{decoder[0]}.mlp.weight", 2)
    check_sizes(config, {"kernel_size": num, "input_dim": num_features, "init_dim": width, "output_dim": num_classes})
    groups = checks.integer("group_norm", config["group_norm"], 1)
    for name, value in state_dict.items():
        if name.endswith(".norm.weight") and value.size % groups:
            raise ValueError(f"config: expected a group_norm that divides the channels of {name}, {value.size}, got "
                             f"{groups}")  # fmt: skip
    net = Network(
        architecture, num_features, num_classes, voxel, width=2 * width, kernel_size=num, **in_voxels,
        norm="group", norm_groups=groups, norm_together=True, normalization="positive", bias=True,
        pool_pad_value=0.0, origin="published"
    )  # fmt: skip
    spell = speller(net, paths, "norm.norm", "norm_conv.norm", "mlp.bias")
    params, state, unused = loaded("geotransformer", net, state_dict, spell)
    return net, params, state, unused + [name for name in whole if not name.startswith(prefix)]
