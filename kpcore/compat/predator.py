"""The layers of OverlapPredator (prs-eth/OverlapPredator), with its names, arguments and state.

One line at the end of its ``models/blocks.py`` replaces the class and the functions above it::

    from kpcore.compat.predator import KPConv, max_pool, closest_pool, global_average
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import kpcore.torch as kpt
from kpcore.compat import kpconv_pytorch, padded
from kpcore.compat.kpconv_pytorch import closest_pool, global_average, max_pool, p2p_fitting_regularizer

if TYPE_CHECKING:
    from kpcore.compat.published import Matrix

__all__ = ["KPConv", "closest_pool", "global_average", "max_pool", "p2p_fitting_regularizer"]


class KPConv(kpconv_pytorch.KPConv):
    """As `kpcore.compat.kpconv_pytorch.KPConv`, divided by the number of neighbours with features.

    The output of a query is divided by the number of its neighbours with features that sum to more than zero, of a
    deformable layer among those in range of a deformed kernel point; never by less than 1.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.predator import KPConv
    >>> points, features = torch.rand(200, 3), torch.ones(200, 4)
    >>> inds = torch.from_numpy(kpt.radius_search(points, None, 0.25, sort="distance").to_padded(20))
    >>> KPConv(15, 3, 4, 8, KP_extent=0.2, radius=0.25)(points, points, inds, features).shape
    torch.Size([200, 8])
    """

    _normalization = "positive"

    @staticmethod
    def _rigid(*arguments: Any) -> KPConv:
        return KPConv(*arguments)

    def forward(self, q_pts: torch.Tensor, s_pts: torch.Tensor, neighb_inds: Matrix, x: torch.Tensor) -> torch.Tensor:
        """(M, out_channels), see `kpcore.compat.kpconv_pytorch.KPConv.forward`."""
        neighbors = padded.neighbors("neighb_inds", neighb_inds, s_pts.shape[0])
        out = super().forward(q_pts, s_pts, neighbors, x)
        if not self.deformable:
            return out
        # Each neighbour in range contributes 1 through its nearest kernel point, if it has features.
        with torch.no_grad():
            has_features, rigid = (x.sum(1, keepdim=True) > 0).to(out.dtype), torch.zeros_like(self.kernel_points)
            counts = kpt.kpconv(
                s_pts, q_pts, neighbors, has_features, out.new_ones(self.K, 1), rigid, float(self.KP_extent),
                influence="constant", aggregation="closest", offsets=self.deformed_KP
            )  # fmt: skip
        return out / counts.clamp(min=1)
