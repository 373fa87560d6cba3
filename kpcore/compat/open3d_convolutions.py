"""Open3D's convolutions: continuous and sparse, and their transposes."""

from __future__ import annotations

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import arguments
from kpcore.neighbors import Neighbors

__all__ = ["continuous_conv", "continuous_conv_transpose", "sparse_conv", "sparse_conv_transpose"]

_CELLS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def continuous_conv(filters: torch.Tensor, out_positions: torch.Tensor, extents: torch.Tensor, offset: torch.Tensor,
                    inp_positions: torch.Tensor, inp_features: torch.Tensor, inp_importance: torch.Tensor,
                    neighbors_index: torch.Tensor, neighbors_importance: torch.Tensor,
                    neighbors_row_splits: torch.Tensor, align_corners: bool = False,
                    coordinate_mapping: str = "ball_to_cube_radial", normalize: bool = False,
                    interpolation: str = "linear", max_temp_mem_MB: int = 64,
                    allow_tf32: bool = False) -> torch.Tensor:  # fmt: skip
    """Continuous convolution: `kpcore.continuous_conv` with Open3D's arguments.

    Differentiable in all tensors of floats but `offset`.

    Parameters
    ----------
    filters : (depth, height, width, Cin, Cout) float32 or float64
        The dtype of all other tensors of floats.
    out_positions : (M, 3)
    extents : (1, 1), (M, 1), (1, 3) or (M, 3)
        Diameters: of all outputs or each, for all axes or each.
    offset : (3,)
        In cells; ignored with `align_corners`. It has no gradient.
    inp_positions, inp_features : (N, 3) and (N, Cin)
    inp_importance : (N,), or (0,) for none
        Factors of the inputs.
    neighbors_index : (E,) int32 or int64
        Open3D takes int32 only.
    neighbors_importance : (E,), or (0,) for none
        Factors of the pairs.
    neighbors_row_splits : (M + 1,) int64
        On any device.
    align_corners, coordinate_mapping, normalize, interpolation
        As in `kpcore.continuous_conv`, with other defaults than there and than those of the layer.
    max_temp_mem_MB : int
        Has no effect: `kpcore.continuous_conv` says how much memory it takes.
    allow_tf32 : bool
        Has no effect.

    Returns
    -------
    (M, Cout)
    """
    _check_resources(max_temp_mem_MB, allow_tf32)
    sizes = {}
    filters = arguments.tensor("filters", filters, "depth height width Cin Cout", arguments.REAL, sizes)
    inp, out, features = _checked_points(inp_positions, out_positions, inp_features, filters, sizes)
    extents, offset = _checked_shape_of_filter(extents, offset, filters, sizes)
    importances = _factors("inp_importance", inp_importance, "Nin", filters, sizes)
    neighbors = _neighbors(neighbors_index, neighbors_row_splits, len(inp), sizes)
    return kpt.continuous_conv(
        inp, out, neighbors, features, filters, extents, coordinate_mapping=coordinate_mapping,
        interpolation=interpolation, align_corners=align_corners, normalize=normalize, offset=offset,
        importances=importances,
        neighbor_importances=_factors("neighbors_importance", neighbors_importance, "E", filters, sizes),
    )  # fmt: skip


def continuous_conv_transpose(filters: torch.Tensor, out_positions: torch.Tensor, out_importance: torch.Tensor,
                              extents: torch.Tensor, offset: torch.Tensor, inp_positions: torch.Tensor,
                              inp_features: torch.Tensor, inp_neighbors_index: torch.Tensor,
                              inp_neighbors_importance_sum: torch.Tensor, inp_neighbors_row_splits: torch.Tensor,
                              neighbors_index: torch.Tensor, neighbors_importance: torch.Tensor,
                              neighbors_row_splits: torch.Tensor, align_corners: bool = False,
                              coordinate_mapping: str = "ball_to_cube_radial", normalize: bool = False,
                              interpolation: str = "linear", max_temp_mem_MB: int = 64,
                              allow_tf32: bool = False) -> torch.Tensor:  # fmt: skip
    """Transposed continuous convolution: `kpcore.continuous_conv_transpose` with Open3D's arguments.

    Differentiable in all tensors of floats but `offset`.

    Parameters
    ----------
    filters : (depth, height, width, Cin, Cout) float32 or float64
        The dtype of all other tensors of floats.
    out_positions : (M, 3)
    out_importance : (M,), or (0,) for none
        Factors of the outputs.
    extents : (1, 1), (N, 1), (1, 3) or (N, 3)
        Of the inputs.
    offset : (3,)
    inp_positions, inp_features : (N, 3) and (N, Cin)
    inp_neighbors_index : (E,) int32 or int64
        The outputs of each input; of no effect, as in Open3D.
    inp_neighbors_importance_sum : (N,), or (0,) for none
        With `normalize`, the features of an input are divided by this sum, where it is not zero.
    inp_neighbors_row_splits : (N + 1,) int64
        On any device. With `normalize` and without a sum, the features of an input are divided by the length of its
        row, where it is not zero.
    neighbors_index : (E,) int32 or int64
        The inputs of each output.
    neighbors_importance : (E,), or (0,) for none
        Factors of the pairs.
    neighbors_row_splits : (M + 1,) int64
        On any device.
    align_corners, coordinate_mapping, normalize, interpolation, max_temp_mem_MB, allow_tf32
        As in `continuous_conv`.

    Returns
    -------
    (M, Cout)
    """
    _check_resources(max_temp_mem_MB, allow_tf32)
    sizes = {}
    filters = arguments.tensor("filters", filters, "depth height width Cin Cout", arguments.REAL, sizes)
    inp, out, features = _checked_points(inp_positions, out_positions, inp_features, filters, sizes)
    extents, offset = _checked_shape_of_filter(extents, offset, filters, sizes)
    importances = _factors("out_importance", out_importance, "M", filters, sizes)
    neighbors = _neighbors(neighbors_index, neighbors_row_splits, len(inp), sizes)
    features = _divided_features(features, inp_neighbors_index, inp_neighbors_importance_sum, inp_neighbors_row_splits,
                                 normalize, sizes)  # fmt: skip
    return kpt.continuous_conv_transpose(
        inp, out, neighbors, features, filters, extents, coordinate_mapping=coordinate_mapping,
        interpolation=interpolation, align_corners=align_corners, offset=offset, importances=importances,
        neighbor_importances=_factors("neighbors_importance", neighbors_importance, "E", filters, sizes),
    )  # fmt: skip


def sparse_conv(filters: torch.Tensor, inp_features: torch.Tensor, inp_importance: torch.Tensor,
                neighbors_index: torch.Tensor, neighbors_kernel_index: torch.Tensor,
                neighbors_importance: torch.Tensor, neighbors_row_splits: torch.Tensor, normalize: bool = False,
                max_temp_mem_MB: int = 64, allow_tf32: bool = False) -> torch.Tensor:  # fmt: skip
    """Sparse convolution: `kpcore.sparse_conv` with Open3D's arguments.

    Differentiable in `filters`, `inp_features`, `inp_importance` and `neighbors_importance`.

    Parameters
    ----------
    filters : (..., Cin, Cout) float32 or float64
        Cells are numbered in C order of the leading axes. The dtype of all other tensors of floats.
    inp_features : (N, Cin)
    inp_importance : (N,), or (0,) for none
    neighbors_index : (E,) int32 or int64
    neighbors_kernel_index : (E,) uint8, int16, int32 or int64
        The cell of each pair. Open3D takes uint8 only.
    neighbors_importance : (E,), or (0,) for none
    neighbors_row_splits : (M + 1,) int64
        On any device.
    normalize : bool
        As in `kpcore.sparse_conv`.
    max_temp_mem_MB, allow_tf32
        Have no effect, as in `continuous_conv`.

    Returns
    -------
    (M, Cout)
    """
    _check_resources(max_temp_mem_MB, allow_tf32)
    sizes = {}
    filters, features = _checked_cells(filters, inp_features, sizes)
    importances = _factors("inp_importance", inp_importance, "Nin", filters, sizes)
    neighbors = _neighbors(neighbors_index, neighbors_row_splits, len(features), sizes)
    return kpt.sparse_conv(
        neighbors, _kernel_index(neighbors_kernel_index, sizes), features, filters, normalize=normalize,
        importances=importances,
        neighbor_importances=_factors("neighbors_importance", neighbors_importance, "E", filters, sizes),
    )  # fmt: skip


def sparse_conv_transpose(filters: torch.Tensor, out_importance: torch.Tensor, inp_features: torch.Tensor,
                          inp_neighbors_index: torch.Tensor, inp_neighbors_importance_sum: torch.Tensor,
                          inp_neighbors_row_splits: torch.Tensor, neighbors_index: torch.Tensor,
                          neighbors_kernel_index: torch.Tensor, neighbors_importance: torch.Tensor,
                          neighbors_row_splits: torch.Tensor, normalize: bool = False, max_temp_mem_MB: int = 64,
                          allow_tf32: bool = False) -> torch.Tensor:  # fmt: skip
    """Transposed sparse convolution: `kpcore.sparse_conv_transpose` with Open3D's arguments.

    Differentiable in `filters`, `out_importance`, `inp_features`, `inp_neighbors_importance_sum` and
    `neighbors_importance`.

    Parameters
    ----------
    filters, inp_features, neighbors_index, neighbors_kernel_index, neighbors_importance, neighbors_row_splits
        As in `sparse_conv`.
    out_importance : (M,), or (0,) for none
        Factors of the outputs.
    inp_neighbors_index, inp_neighbors_importance_sum, inp_neighbors_row_splits, normalize
        As in `continuous_conv_transpose`.
    max_temp_mem_MB, allow_tf32
        Have no effect, as in `continuous_conv`.

    Returns
    -------
    (M, Cout)
    """
    _check_resources(max_temp_mem_MB, allow_tf32)
    sizes = {}
    filters, features = _checked_cells(filters, inp_features, sizes)
    neighbors = _neighbors(neighbors_index, neighbors_row_splits, len(features), sizes)
    sizes["M"] = neighbors.num_queries, "neighbors_row_splits"
    importances = _factors("out_importance", out_importance, "M", filters, sizes)
    features = _divided_features(features, inp_neighbors_index, inp_neighbors_importance_sum, inp_neighbors_row_splits,
                                 normalize, sizes)  # fmt: skip
    return kpt.sparse_conv_transpose(
        neighbors, _kernel_index(neighbors_kernel_index, sizes), features, filters, importances=importances,
        neighbor_importances=_factors("neighbors_importance", neighbors_importance, "E", filters, sizes),
    )  # fmt: skip


def _check_resources(max_temp_mem_MB, allow_tf32):
    checks.integer("max_temp_mem_MB", max_temp_mem_MB, 0)
    checks.boolean("allow_tf32", allow_tf32)


def _checked_points(inp_positions, out_positions, inp_features, filters, sizes):
    dtypes = (filters.dtype,)
    inp = arguments.tensor("inp_positions", inp_positions, "Nin 3", dtypes, sizes)
    out = arguments.tensor("out_positions", out_positions, "M 3", dtypes, sizes)
    sizes["M+1"] = len(out) + 1, "out_positions"
    return inp, out, arguments.tensor("inp_features", inp_features, "Nin Cin", dtypes, sizes)


def _checked_shape_of_filter(extents, offset, filters, sizes):
    extents = arguments.tensor("extents", extents, "rows axes", (filters.dtype,), sizes)
    # Open3D's has no gradient either, and takes one that requires it.
    return extents, arguments.tensor("offset", offset, "3", (filters.dtype,), sizes).detach()


def _checked_cells(filters, inp_features, sizes):
    axes = max(getattr(filters, "ndim", 3) - 2, 1)
    shape = " ".join(f"K{axis}" for axis in range(axes))
    filters = arguments.tensor("filters", filters, f"{shape} Cin Cout", arguments.REAL, sizes)
    return filters, arguments.tensor("inp_features", inp_features, "Nin Cin", (filters.dtype,), sizes)


def _neighbors(neighbors_index, neighbors_row_splits, num_points, sizes) -> Neighbors:
    return arguments.neighbors("neighbors_", neighbors_index, neighbors_row_splits, num_points, sizes)


def _kernel_index(neighbors_kernel_index, sizes):
    index = arguments.tensor("neighbors_kernel_index", neighbors_kernel_index, "E", _CELLS, sizes)
    return index if index.dtype == torch.int64 else index.to(torch.int32)


def _factors(name, value, rows, filters, sizes):
    """Factors (rows,), or None for an empty tensor, which stands for ones."""
    if isinstance(value, torch.Tensor) and value.shape == (0,):
        return None
    return arguments.tensor(name, value, rows, (filters.dtype,), sizes)


def _divided_features(features, inp_neighbors_index, inp_neighbors_importance_sum, inp_neighbors_row_splits, normalize,
                      sizes):  # fmt: skip
    """The features, with `normalize` divided by the sum or the number of the neighbours of each input.

    Not left to the operator, which takes both from the list of the outputs: here they are arguments, which need not
    agree with that list.
    """
    arguments.tensor("inp_neighbors_index", inp_neighbors_index, "E", arguments.INTEGERS, sizes)
    lengths = {"Nin+1": (len(features) + 1, "inp_features")}
    splits = arguments.tensor("inp_neighbors_row_splits", inp_neighbors_row_splits, "Nin+1", arguments.SPLITS, lengths)
    sums = _factors("inp_neighbors_importance_sum", inp_neighbors_importance_sum, "Nin", features, sizes)
    if not checks.boolean("normalize", normalize):
        return features
    if sums is None:
        sums = torch.diff(splits).to(features.device, features.dtype)
    return features / torch.where(sums == 0, 1, sums)[:, None]
