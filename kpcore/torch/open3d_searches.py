"""Open3D's layers without weights: searches and voxel pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kpcore.backends import checks

# Modules, not names from them: they import kpcore.torch, and may be the ones that are being imported.
from kpcore.compat import open3d_ragged, open3d_search, open3d_voxels

if TYPE_CHECKING:
    from kpcore.compat.open3d_ragged import RaggedTensor
    from kpcore.compat.open3d_search import SearchResult, SpatialHashTable
    from kpcore.compat.open3d_voxels import PooledVoxels


class _Search(torch.nn.Module):
    """The options that the search layers share."""

    def __init__(self, metric: str, ignore_query_point: bool, return_distances: bool, index_dtype: torch.dtype) -> None:
        super().__init__()
        checks.choice("metric", metric, open3d_search.METRICS)
        self.metric = metric
        self.ignore_query_point = checks.boolean("ignore_query_point", ignore_query_point)
        self.return_distances = checks.boolean("return_distances", return_distances)
        self.index_dtype = open3d_search.checked_index_dtype(index_dtype)

    def extra_repr(self) -> str:
        text = f"metric={self.metric!r}, ignore_query_point={self.ignore_query_point}"
        return f"{text}, return_distances={self.return_distances}"

    def _inputs(self, points, queries, points_row_splits, queries_row_splits):
        """(points, queries, points_row_splits, queries_row_splits) as tensors, from RaggedTensors and defaults."""
        values, splits = [], []
        for rows, bounds in ((points, points_row_splits), (queries, queries_row_splits)):
            if isinstance(rows, open3d_ragged.RaggedTensor):
                rows, bounds = rows.values, rows.row_splits
            if bounds is None:
                bounds = torch.tensor([0, len(rows)], device="cpu")
            values.append(rows)
            splits.append(bounds)
        return *values, *splits


class FixedRadiusSearch(_Search):
    """All points within a radius of each query, as a layer; see `kpcore.compat.open3d.fixed_radius_search`.

    Parameters
    ----------
    metric : {"L1", "L2", "Linf"}
    ignore_query_point : bool
        Leave out points with exactly the coordinates of the query.
    return_distances : bool
        Whether the result has distances, squared for "L2".
    max_hash_table_size : int
        Has no effect: the search has a grid of its own.
    index_dtype : torch.int32 or torch.int64

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> search = kpt.FixedRadiusSearch(return_distances=True)
    >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    >>> result = search(points, points, radius=2.0)
    >>> result.neighbors_index, result.neighbors_row_splits
    (tensor([0, 1, 0, 1, 2, 1, 2], dtype=torch.int32), tensor([0, 2, 5, 7]))
    """

    def __init__(self, metric: str = "L2", ignore_query_point: bool = False, return_distances: bool = False,
                 max_hash_table_size: int = 33554432, index_dtype: torch.dtype = torch.int32) -> None:  # fmt: skip
        super().__init__(metric, ignore_query_point, return_distances, index_dtype)
        self.max_hash_table_size = checks.integer("max_hash_table_size", max_hash_table_size, 1)

    @torch.no_grad()
    def forward(self, points: torch.Tensor | RaggedTensor, queries: torch.Tensor | RaggedTensor,
                radius: float | torch.Tensor, points_row_splits: torch.Tensor | None = None,
                queries_row_splits: torch.Tensor | None = None, hash_table_size_factor: float = 1 / 64,
                hash_table: SpatialHashTable | None = None) -> SearchResult:  # fmt: skip
        """(neighbors_index, neighbors_row_splits, neighbors_distance).

        Parameters
        ----------
        points, queries : (N, 3) and (M, 3) tensors or RaggedTensors
        radius : float
            Inclusive.
        points_row_splits, queries_row_splits : (B + 1,) int64 tensors, optional
            Bounds of batch items; those of a RaggedTensor are used in their place.
        hash_table_size_factor : float
            Has no effect.
        hash_table : SpatialHashTable, optional
            Checked, and not read: no search needs one.
        """
        points, queries, *bounds = self._inputs(points, queries, points_row_splits, queries_row_splits)
        bounds = open3d_search.checked_bounds(points, queries, *bounds)
        if hash_table is not None:
            open3d_search.check_hash_table(*hash_table_fields(hash_table), points, bounds[0])
        return open3d_search.within_fixed_radius(points, queries, radius, bounds, self.index_dtype, self.metric,
                                                 self.ignore_query_point, self.return_distances)  # fmt: skip


def hash_table_fields(table: Any) -> tuple[Any, Any, Any]:
    """(splits, index, cell_splits) of a hash table of `build_spatial_hash_table`, Open3D's or kpcore's."""
    return table.hash_table_splits, table.hash_table_index, table.hash_table_cell_splits


class RadiusSearch(_Search):
    """All points within a radius of each query, one for each; see `kpcore.compat.open3d.radius_search`.

    Parameters
    ----------
    metric, ignore_query_point, return_distances, index_dtype
        As in `FixedRadiusSearch`.
    normalize_distances : bool
        Divide the distances by the radius, squared ones by its square.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    >>> kpt.RadiusSearch()(points, points, torch.tensor([1.0, 1.5, 9.0])).neighbors_index
    tensor([0, 0, 1, 0, 1, 2], dtype=torch.int32)
    """

    def __init__(self, metric: str = "L2", ignore_query_point: bool = False, return_distances: bool = False,
                 normalize_distances: bool = False, index_dtype: torch.dtype = torch.int32) -> None:  # fmt: skip
        super().__init__(metric, ignore_query_point, return_distances, index_dtype)
        self.normalize_distances = checks.boolean("normalize_distances", normalize_distances)

    def forward(self, points: torch.Tensor | RaggedTensor, queries: torch.Tensor | RaggedTensor, radii: torch.Tensor,
                points_row_splits: torch.Tensor | None = None,
                queries_row_splits: torch.Tensor | None = None) -> SearchResult:  # fmt: skip
        """(neighbors_index, neighbors_row_splits, neighbors_distance).

        Parameters
        ----------
        points, queries, points_row_splits, queries_row_splits
            As in `FixedRadiusSearch.forward`. Open3D takes no RaggedTensor here.
        radii : (M,) tensor
            Exclusive, as in Open3D.
        """
        points, queries, *bounds = self._inputs(points, queries, points_row_splits, queries_row_splits)
        return open3d_search.radius_search(
            points, queries, radii, *bounds, self.index_dtype, self.metric, self.ignore_query_point,
            self.return_distances, self.normalize_distances
        )  # fmt: skip


class KNNSearch(_Search):
    """The k nearest points of each query, as a layer; see `kpcore.compat.open3d.knn_search`.

    Parameters
    ----------
    metric, return_distances, index_dtype
        As in `FixedRadiusSearch`.
    ignore_query_point : bool
        Leave out, of the k nearest points, those with exactly the coordinates of the query.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    >>> kpt.KNNSearch()(points, points, 2).neighbors_index.reshape(3, 2).tolist()
    [[0, 1], [1, 0], [2, 1]]
    """

    def __init__(self, metric: str = "L2", ignore_query_point: bool = False, return_distances: bool = False,
                 index_dtype: torch.dtype = torch.int32) -> None:  # fmt: skip
        super().__init__(metric, ignore_query_point, return_distances, index_dtype)

    def forward(self, points: torch.Tensor | RaggedTensor, queries: torch.Tensor | RaggedTensor, k: int,
                points_row_splits: torch.Tensor | None = None,
                queries_row_splits: torch.Tensor | None = None) -> SearchResult:  # fmt: skip
        """(neighbors_index, neighbors_row_splits, neighbors_distance).

        Parameters
        ----------
        points, queries, points_row_splits, queries_row_splits
            As in `FixedRadiusSearch.forward`. Open3D takes no RaggedTensor here.
        k : int
        """
        points, queries, *bounds = self._inputs(points, queries, points_row_splits, queries_row_splits)
        return open3d_search.knn_search(points, queries, k, *bounds, self.index_dtype, self.metric,
                                        self.ignore_query_point, self.return_distances)  # fmt: skip


class VoxelPooling(torch.nn.Module):
    """One position and one row of features for each voxel; see `kpcore.compat.open3d.voxel_pooling`.

    Parameters
    ----------
    position_fn : {"average", "nearest_neighbor", "center"}
    feature_fn : {"average", "nearest_neighbor", "max"}

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> positions = torch.tensor([[0.25, 0.25, 0.25], [0.5, 0.5, 0.5], [1.75, 1.75, 1.75]])
    >>> pooled = kpt.VoxelPooling(position_fn="average")(positions, torch.eye(3), 1.0)
    >>> pooled.pooled_positions[:, 0], pooled.pooled_features.tolist()
    (tensor([0.3750, 1.7500]), [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """

    def __init__(self, position_fn: str = "center", feature_fn: str = "max") -> None:
        super().__init__()
        checks.choice("position_fn", position_fn, open3d_voxels.POSITIONS)
        checks.choice("feature_fn", feature_fn, open3d_voxels.FEATURES)
        self.position_fn, self.feature_fn = position_fn, feature_fn

    def extra_repr(self) -> str:
        return f"position_fn={self.position_fn!r}, feature_fn={self.feature_fn!r}"

    def forward(
        self, positions: torch.Tensor, features: torch.Tensor, voxel_size: float | torch.Tensor
    ) -> PooledVoxels:
        """(pooled_positions, pooled_features).

        Parameters
        ----------
        positions, features : (N, 3) and (N, C) tensors
        voxel_size : float
        """
        return open3d_voxels.voxel_pooling(positions, features, voxel_size, self.position_fn, self.feature_fn)
