"""The layers of KPFCNN in Open3D-ML (isl-org/Open3D-ML), with their names, arguments and state.

One line at the end of ``ml3d/torch/models/kpconv.py`` replaces what is above it::

    from kpcore.compat.open3d_ml import KPConv, max_pool, closest_pool, global_average, p2p_fitting_regularizer

For an installed Open3D the same from outside, before a network is made::

    from open3d._ml3d.torch.models import kpconv
    from kpcore.compat import open3d_ml
    vars(kpconv).update({name: getattr(open3d_ml, name) for name in open3d_ml.__all__})
"""

from __future__ import annotations

from typing import Any

from kpcore.compat import kpconv_pytorch
from kpcore.compat.kpconv_pytorch import closest_pool, global_average, max_pool, p2p_fitting_regularizer

__all__ = ["KPConv", "closest_pool", "global_average", "max_pool", "p2p_fitting_regularizer"]


class KPConv(kpconv_pytorch.KPConv):
    """As `kpcore.compat.kpconv_pytorch.KPConv`, but a deformable layer shares its kernel points with `offset_conv`.

    They are one parameter, so that `parameters` has it once.

    Examples
    --------
    >>> from kpcore.compat.open3d_ml import KPConv
    >>> layer = KPConv(15, 3, 4, 8, KP_extent=0.12, radius=0.25, deformable=True)
    >>> [name for name, _ in layer.named_parameters()]
    ['weights', 'offset_bias', 'kernel_points', 'offset_conv.weights']
    """

    @staticmethod
    def _rigid(*arguments: Any) -> KPConv:
        return KPConv(*arguments)

    def reset_parameters(self) -> None:
        """Draw new weights and a new rotation of the kernel points, and set the bias of the offsets to zero."""
        super().reset_parameters()
        if self.offset_conv is not None:
            self.kernel_points = self.offset_conv.kernel_points
