"""Clouds and pyramids in torch.utils.data: built in worker processes, stacked to batches, moved to a device, saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kpcore.torch
from kpcore.backends import checks, devices
from kpcore.neighbors import Neighbors, checked, new_list, splits_from_counts
from kpcore.pyramid import Level, Pyramid
from kpcore.torch import internals, ops

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized

    from kpcore import nn


class PyramidDataset(torch.utils.data.Dataset):
    """The pyramid of each cloud of another dataset, built when it is read: in a worker process of a DataLoader.

    ``torch.utils.data.DataLoader(PyramidDataset(clouds, net), batch_size=4)`` needs no `collate_fn`: torch's default
    one stacks pyramids to the pyramid of the batch, to the bit the one that `PyramidCollate` builds from the clouds.

    Parameters
    ----------
    clouds : sequence or torch.utils.data.Dataset
        ``clouds[i]`` is a cloud: points, or ``(points, features)``, ``(points, features, labels)``, or a dict with
        these keys; tensors on the CPU or NumPy arrays.

        points : (N, D) float32 or float64
        features : (N, C) float32 or float64, or None
        labels : (N,) of any integer dtype, or an integer, the class of the whole cloud, or None
    net : kpcore.nn.Network, kpcore.nn.KPNeXt or kpcore.torch.Network, or dict
        The network that the pyramids are for, or the settings of `build_pyramid`.
    **options
        Further arguments of ``net.pyramid``, such as ``neighbor_limits`` and ``subsampled``.

    Notes
    -----
    An item is a `Pyramid` of tensors, with means of the features and majorities of the labels in its levels. If labels
    are classes of clouds it is (pyramid, class).

    Examples
    --------
    >>> import torch, kpcore as kp, kpcore.torch as kpt
    >>> net = kp.nn.kpfcnn(1, 4, 0.1, levels=2, convs=2, width=16)
    >>> clouds = [(torch.rand(500, 3), torch.ones(500, 1), torch.randint(0, 4, (500,))) for _ in range(6)]
    >>> loader = torch.utils.data.DataLoader(kpt.PyramidDataset(clouds, net), batch_size=3)
    >>> module = kpt.Network(net)
    >>> for pyramid in loader:
    ...     logits, _ = module(pyramid, pyramid[0].features)
    ...     loss = kpt.softmax_cross_entropy(logits, pyramid[0].labels)
    >>> len(pyramid[0].row_splits), len(logits) == len(pyramid[0].points)
    (4, True)
    """

    clouds: Sized

    def __init__(self, clouds: Sequence[Any] | torch.utils.data.Dataset, net: nn.Network | nn.KPNeXt | dict[str, Any],
                 **options: Any) -> None:  # fmt: skip
        self.clouds, self._collate = clouds, PyramidCollate(net, **options)

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, number: int) -> Pyramid | tuple[Pyramid, int]:
        batch = self._collate([self.clouds[number]])
        return batch if isinstance(batch, Pyramid) else (batch[0], int(batch[1]))


class PyramidCollate:
    """A `collate_fn` for a DataLoader of clouds: stacks them and builds their pyramid, in the worker process.

    Parameters
    ----------
    net, **options
        As in `PyramidDataset`, which also says what a cloud is.

    Examples
    --------
    >>> import torch, kpcore as kp, kpcore.torch as kpt
    >>> settings = {"voxel_size": 0.1, "num_levels": 2}
    >>> clouds = [{"points": torch.rand(500, 3), "labels": number} for number in range(6)]
    >>> loader = torch.utils.data.DataLoader(clouds, batch_size=3, collate_fn=kpt.PyramidCollate(settings))
    >>> for pyramid, classes in loader:
    ...     print(len(pyramid), classes)
    2 tensor([0, 1, 2])
    2 tensor([3, 4, 5])
    """

    def __init__(self, net: nn.Network | nn.KPNeXt | dict[str, Any], **options: Any) -> None:
        net = net.net if isinstance(net, torch.nn.Module) else net
        if not isinstance(net, dict) and not hasattr(net, "pyramid"):
            raise TypeError(f"net: expected a network of kpcore.nn or a dict, got {type(net).__name__}")
        self.net, self.options = net, options

    def __call__(self, clouds: Sequence[Any]) -> Pyramid | tuple[Pyramid, torch.Tensor]:
        """The pyramid of the clouds, and the classes (B,) int64 if labels are integers."""
        points, features, labels = zip(*map(_parts, clouds), strict=True)
        lengths = torch.tensor([len(each) for each in points])
        stacked = {"row_splits": kpcore.torch.row_splits(lengths), "features": _stacked_rows("features", features)}
        classes = None
        if labels[0] is not None and not labels[0].ndim:
            if any(each is None or each.ndim or each.is_floating_point() for each in labels):
                raise ValueError("labels: expected one class for each cloud, an integer, because the first one has it")
            classes = torch.stack(labels).to(torch.int64)
        else:
            stacked["labels"] = _stacked_rows("labels", labels)
        points = _stacked_rows("points", points)
        if isinstance(self.net, dict):
            pyramid = kpcore.torch.build_pyramid(points, **stacked, **self.net, **self.options)
        else:
            pyramid = self.net.pyramid(points, **stacked, **self.options, F=kpcore.torch)
        return pyramid if classes is None else (pyramid, classes)


def to_device(value: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """Pyramids, lists and tensors on another device, also in tuples, lists and dicts.

    Parameters
    ----------
    value : Pyramid, Level, Neighbors, tensor, or a nest of them
        Everything else is returned as it is.
    device : torch.device or str
        The CPU or a CUDA GPU, where neighbour lists have CuPy arrays.
    non_blocking : bool
        As in `torch.Tensor.to`, for the tensors.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> pyramid = kpt.build_pyramid(torch.rand(500, 3), voxel_size=0.1, num_levels=2)
    >>> kpt.to_device(pyramid, "cpu")[0].points.device
    device(type='cpu')
    """
    device = torch.device(device)
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Neighbors):
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected the CPU or a CUDA GPU, got {device}")
        if device.type == "cpu":
            return value.to("cpu")
        with ops.torch_stream(device):
            return value.to("cuda")

    def moved(part: Any) -> Any:
        return to_device(part, device, non_blocking=non_blocking)

    if isinstance(value, dict):
        return {name: moved(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = map(moved, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def dynamic_shapes(inputs: Any) -> Any:
    """The `dynamic_shapes` of `torch.export.export` for a program that takes clouds of any size.

    The first size of each tensor, and the numbers of points and widths of lists, may then be others than in `inputs`.
    Last sizes, the numbers in levels, such as radii, and whether there is a tensor, a list or its distances stay as
    they are there. torch also keeps a first size of 0 or 1, so use a cloud with two points or more on each level. If a
    network has somewhere one row for each batch item (a global average, group or instance normalisation), a program of
    one cloud takes single clouds, and a program of a batch takes batches of two or more.

    Parameters
    ----------
    inputs : tuple, or dict by name
        The positional arguments that the module is exported with, or a dict of all arguments: pyramids, levels, lists,
        tensors, and nests of them.

    Returns
    -------
    tuple or dict
        The shapes in the form that torch expects.

    Examples
    --------
    >>> import torch, kpcore as kp, kpcore.torch as kpt
    >>> layer = kpt.KPConv(1, 2, 5, radius=0.2, extent=0.2)
    >>> def inputs(num):
    ...     points = torch.rand(num, 3)
    ...     return points, None, kpt.radius_search(points, None, 0.3), torch.ones(num, 1)
    >>> example = inputs(50)
    >>> program = torch.export.export(layer, example, dynamic_shapes=kpt.dynamic_shapes(example))
    >>> program.module()(*inputs(80)).shape
    torch.Size([80, 2])
    """
    any_size = torch.export.Dim.AUTO
    if isinstance(inputs, torch.Tensor):
        return {0: any_size} if inputs.ndim else None
    if isinstance(inputs, Neighbors):  # torch expects the leaves of a node of any class but its own as a list
        return [{0: any_size} if isinstance(leaf, torch.Tensor) else any_size for leaf in internals.tree_leaves(inputs)]
    if isinstance(inputs, dict):
        return {name: dynamic_shapes(part) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = map(dynamic_shapes, inputs)
        if hasattr(inputs, "_fields"):
            return type(inputs)(*parts)
        return tuple(parts) if type(inputs) is tuple else list(parts)
    return None


def _parts(cloud):
    """(points, features or None, labels or None) of a cloud, as tensors."""
    if isinstance(cloud, dict):
        unknown = set(cloud) - {"points", "features", "labels"}
        if unknown or "points" not in cloud:
            raise ValueError(f"clouds: expected the keys points, features and labels, got {', '.join(map(str, cloud))}")
        parts = [cloud.get(name) for name in ("points", "features", "labels")]
    else:
        parts = list(cloud) if isinstance(cloud, (tuple, list)) else [cloud]
        if not 1 <= len(parts) <= 3:
            raise ValueError(f"clouds: expected points, features and labels, got {len(parts)} parts")
        parts += [None] * (3 - len(parts))
    return [None if part is None else torch.as_tensor(part) for part in parts]


def _stacked_rows(name, rows):
    """The rows of all items in one tensor, or None if there are none; all items must have them or none."""
    missing = [number for number, each in enumerate(rows) if each is None]
    if len(missing) == len(rows):
        return None
    if missing:
        raise ValueError(f"{name}: expected those of every cloud of a batch, got none of number {missing[0]} in it")
    if name != "labels" and any(not each.ndim for each in rows):
        raise ValueError(
            f"{name}: expected one row for each point, got a number; a cloud of points with a class is "
            "(points, None, class)"
        )
    kinds = {(each.dtype, each.ndim, each.shape[1:]) for each in rows}
    if len(kinds) > 1 or not rows[0].ndim:
        shapes = " and ".join(sorted(f"{str(each.dtype)[6:]} {tuple(each.shape)}" for each in rows))
        raise ValueError(f"{name}: expected rows of one dtype and width in all clouds of a batch, got {shapes}")
    return rows[0] if len(rows) == 1 else torch.cat(rows)


# ---- torch's default collate function


def _stacked_lists(lists, *, collate_fn_map=None):
    """The list of clouds that are stacked, from a list for each."""
    lists = [checked(each) for each in lists]
    xp = devices.namespace(lists[0].stored_index)
    begins = np.cumsum([0, *(each.num_points for each in lists)])
    num_points = checks.integer("num_points", int(begins[-1]), 0, checks.MAX_POINTS)
    pairs = [each.num_pairs for each in lists]
    index = [each.stored_index[:end] + np.int32(begin) for each, end, begin in zip(lists, pairs, begins, strict=False)]
    distances = [each.stored_distance for each in lists]
    distance = None
    if all(each is not None for each in distances):
        distance = xp.concatenate([each[:end] for each, end in zip(distances, pairs, strict=True)])
    widths = [each.width for each in lists]
    width = None if None in widths else max(widths)
    counts = xp.concatenate([each.counts for each in lists])
    return new_list(xp.concatenate(index), splits_from_counts(counts), num_points, distance, width)


def _stacked_levels(levels, *, collate_fn_map=None):
    """The level of clouds that are stacked, from a level for each."""
    for name in ("voxel_size", "radius"):
        sizes = {getattr(level, name) for level in levels}
        if len(sizes) > 1:
            raise ValueError(f"{name}: expected the same in all pyramids of a batch, got {sorted(sizes)}")
    fields = {name: [getattr(level, name) for level in levels] for name in Level._fields}
    stacked = {
        name: _stacked_rows(name, [None if rows is None else torch.as_tensor(rows) for rows in fields[name]])
        for name in ("points", "features", "labels")
    }
    lengths = torch.cat([torch.diff(torch.as_tensor(splits)) for splits in fields["row_splits"]])
    for name in ("neighbors", "pools", "upsamples"):
        stacked[name] = None if fields[name][0] is None else ops.on_arrays(_stacked_lists, fields[name])
    return levels[0]._replace(row_splits=kpcore.torch.row_splits(lengths), **stacked)


def _stacked_pyramids(pyramids, *, collate_fn_map=None):
    """The pyramid of clouds that are stacked, from a pyramid for each."""
    if len(sizes := {len(pyramid) for pyramid in pyramids}) > 1:
        raise ValueError(f"pyramids: expected as many levels in all of a batch, got {sorted(sizes)}")
    return Pyramid(map(_stacked_levels, zip(*pyramids, strict=True)))


internals.default_collate_fn_map.update({Neighbors: _stacked_lists, Level: _stacked_levels, Pyramid: _stacked_pyramids})


# ---- torch.load(weights_only=True)


def _safe_globals():
    """What the pickles of lists and pyramids name: their classes, the function that makes a list, which is checked
    before it is used, and NumPy arrays of numbers."""
    array = np.zeros(0, np.int32)
    reconstruct, make_list = array.__reduce__()[0], Neighbors(array, np.zeros(1, np.int64), 0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in (*checks.REAL, *checks.ANY_INTEGERS)}
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]  # NumPy 1 and 2
    return [Level, Pyramid, make_list, np.ndarray, np.dtype, *dtypes, *names]


torch.serialization.add_safe_globals(_safe_globals())
