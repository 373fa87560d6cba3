"""The blocks of a network as a table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import kpcore
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network, check_values, count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kpcore.nn.blocks import AnyArray, Parameters

_TITLES = ("block", "kind", "level", "in", "out", "neighbours", "extent", "parameters")
_NUM_TEXTS = 3  # columns to the left of the numbers
_HEAD = re.compile(r"head\.\d+|heads\.(\d+)\.\d+")  # the layers before the logits, or those of each category


class _Row(NamedTuple):
    """A block: its levels, channels in and out, radius or number of the neighbours, and extent of the influence."""

    name: str
    kind: str
    level: str
    channels: tuple[int, int]
    neighbors: str = ""
    extent: str = ""


def summary(net: Network | KPNeXt, params: Parameters[AnyArray] | None = None) -> str:
    """A table of the blocks of a network, a line for each, with the number of its parameters.

    The columns are the name of the block, with which the names of its parameters begin; its kind; the level, or those
    that it leads from and to; channels in and out; the radius within which neighbours are searched or, in a `KPNeXt`,
    the number of nearest ones; and the extent of the influence of kernel points. Lengths are in the unit of the points.
    Features that come from the encoder are among the channels out of an upsampling or, in a `KPNeXt`, in of the linear
    layer after it.

    Parameters
    ----------
    net : Network or KPNeXt
    params : dict of arrays or tensors by name, optional
        A ValueError if they are not those of the network; their dtype is then in the first line.

    Returns
    -------
    str
        Lines, the last one without a line end.

    Examples
    --------
    >>> from kpcore import nn
    >>> print(nn.summary(nn.kpfcnn(1, 4, voxel_size=0.1, levels=2, convs=2, width=16)))
    Network: 1 feature, 4 classes, 2 levels, voxels of 0.1, norm 'batch'
    block      kind              level  in  out  neighbours  extent  parameters
    encoder.0  simple            0       1    8        0.25    0.12         136
    encoder.1  resnetb           0       8   16        0.25    0.12         544
    encoder.2  resnetb_strided   0->1   16   16        0.25    0.12         416
    encoder.3  resnetb           1      16   32         0.5    0.24       2,016
    decoder.0  nearest_upsample  1->0   32   48                               0
    decoder.1  unary             0      48    8                             400
    head.0     linear            0       8    8                              80
    head.1     linear            0       8    4                              36
    total                                                                 3,628
    """
    if not isinstance(net, (Network, KPNeXt)):
        raise TypeError(f"net: expected a kpcore.nn.Network or KPNeXt, got {type(net).__name__}")
    expected: dict[str, np.ndarray] = {}
    outputs: dict[str, tuple[int, int]] = {}  # level and channels

    def observe(name: str, level: int | None, out: AnyArray) -> None:
        if level is not None:
            outputs[name] = level, out.shape[1]

    run = net.new_run(kpcore, expected, {}, new={"seed": None, "dtype": np.float32}, observe=observe)
    net.compute_logits(run, *net.no_data(np.float32))
    if params is not None:
        check_values((params,), (expected,), ("params",))
    if isinstance(net, Network):
        rows = [*_blocks_of_network(net, outputs), *_head(net, expected)]
    else:
        rows = [*_blocks_of_kpnext(net, outputs, expected), *_head(net, expected)]
    counts = (net.num_features, "feature"), (net.num_classes, "class"), (net.num_levels, "level")
    facts = [*(_counted(*each) for each in counts), f"voxels of {_short(net.voxel_size)}", f"norm {net.norm!r}"]
    if params is not None:
        facts += sorted({str(value.dtype).removeprefix("torch.") for value in params.values()})
    cells = [_TITLES]
    for row in rows:
        inside = {name: value for name, value in expected.items() if name.startswith(f"{row.name}.")}
        cells.append((*row[:_NUM_TEXTS], *map(str, row.channels), row.neighbors, row.extent, f"{count(inside):,}"))
    cells.append(("total", *[""] * (len(_TITLES) - 2), f"{count(expected):,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) if i < _NUM_TEXTS else text.rjust(width)
                  for i, (text, width) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]  # fmt: skip
    return "\n".join([f"{type(net).__name__}: {', '.join(facts)}", *lines])


def _short(length: float) -> str:
    return f"{length:.4g}"


def _counted(num: int, name: str) -> str:
    return f"{num} {name}" if num == 1 else f"{num} {name}{'es' if name.endswith('s') else 's'}"


def _blocks_of_network(net: Network, outputs: Mapping[str, tuple[int, int]]) -> Iterator[_Row]:
    level, channels = 0, net.num_features
    for number, block in enumerate(net.architecture):
        if number == net.num_downs:
            channels = net.bottleneck_width or channels
        name = f"encoder.{number}" if number < net.num_downs else f"decoder.{number - net.num_downs}"
        after, out = outputs.get(name, (level, channels))  # a global average is not observed and keeps the channels
        radius, extent = "", ""
        if block not in ("global_average", "nearest_upsample", "unary", "last_unary"):
            voxel = net.voxel_size * 2**level
            radius = _short(voxel * (net.deform_radius if level in net.deform_levels else net.conv_radius))
            extent = "" if block == "max_pool" else _short(voxel * net.extent)
        levels = str(level) if after == level else f"{level}->{after}"
        yield _Row(name, block, levels, (channels, out), radius, extent)
        level, channels = after, out


def _blocks_of_kpnext(net: KPNeXt, outputs: Mapping[str, tuple[int, int]],
                      params: Parameters[np.ndarray]) -> Iterator[_Row]:  # fmt: skip
    def convolution(name: str, kind: str, level: int, channels: tuple[int, int]) -> _Row:
        extent = (net.radius if net.extent is None else net.extent) * net.voxel_size * net.grid_factor**level
        return _Row(name, kind, str(level), channels, f"{net.num_neighbors[level]} nearest", _short(extent))

    channels = net.widths[0]
    yield convolution("stem", "simple", 0, (net.num_features, channels))
    for name, (level, out) in outputs.items():
        if name.startswith("decoder"):
            weights = params[f"{name}.unary.weights"]
            yield _Row(f"{name}.unary", "unary", str(level), weights.shape)
            name, channels = f"{name}.block", out
        yield convolution(name, "inverted", level, (channels, out))
        channels = out


def _head(net: Network | KPNeXt, params: Parameters[np.ndarray]) -> Iterator[_Row]:
    level = str(getattr(net, "output_level", 0)) if net.segments else ""
    for name in params:
        match = _HEAD.match(name)
        if match and name == f"{match[0]}.weights":
            kind = "linear" if match[1] is None else f"linear, {[*net.heads][int(match[1])]}"
            yield _Row(match[0], kind, level, params[name].shape)
