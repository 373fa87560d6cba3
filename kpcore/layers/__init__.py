"""Layers besides the point operators, on rows of features: products, normalization, activations, dropout, a loss.

Every function is differentiable in its arrays of features, weights, scales, shifts and logits (`kpcore.autodiff`) and
uses all threads; no result depends on how many.
"""

from kpcore.layers.activations import dropout, leaky_relu, relu, sigmoid, softmax
from kpcore.layers.linear import add, concatenate, linear
from kpcore.layers.losses import softmax_cross_entropy
from kpcore.layers.normalization import BatchNormed, batch_norm, group_norm

__all__ = [
    "BatchNormed",
    "add",
    "batch_norm",
    "concatenate",
    "dropout",
    "group_norm",
    "leaky_relu",
    "linear",
    "relu",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy",
]
