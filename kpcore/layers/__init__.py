"""Layers besides the point operators, on rows of features: products, normalization, activations, dropout, a loss.

Every function is differentiable in its arrays of features, weights, scales, shifts and logits (`kpcore.autodiff`) and
uses all threads; no result depends on how many.
"""

import sys

from kpcore.layers.activations import *  # noqa: F403
from kpcore.layers.linear import *  # noqa: F403
from kpcore.layers.losses import *  # noqa: F403
from kpcore.layers.normalization import *  # noqa: F403

__all__ = []
for _module in ("activations", "linear", "losses", "normalization"):
    __all__ += sys.modules[f"kpcore.layers.{_module}"].__all__
