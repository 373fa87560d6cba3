"""Layers on rows of features, which networks need besides point operators: linear, normalization, activations, losses.

Every function is differentiable in its features, weights, scales, shifts and logits (`kpcore.autodiff`) and uses all
threads; no result depends on the number of threads.
"""

import sys

from kpcore.layers.activations import *  # noqa: F403
from kpcore.layers.linear import *  # noqa: F403
from kpcore.layers.losses import *  # noqa: F403
from kpcore.layers.normalization import *  # noqa: F403

__all__ = []
for _module in ("activations", "linear", "losses", "normalization"):
    __all__ += sys.modules[f"kpcore.layers.{_module}"].__all__
