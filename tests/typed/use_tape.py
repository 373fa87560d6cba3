"""A step of training on the tape, as users write it, which a type checker in strict mode must accept.

It is checked by basedpyright and never run; what `assert_type` states is checked too.
"""

import numpy as np
from typing_extensions import assert_type

import kpcore as kp
from kpcore import nn
from kpcore.pyramid import Pyramid


def training_step(
    net: nn.Network | nn.KPNeXt,
    params: dict[str, np.ndarray],
    state: dict[str, np.ndarray],
    pyramid: Pyramid,
    features: np.ndarray,
    labels: np.ndarray,
    optimizer: nn.Optimizer[np.ndarray],
) -> dict[str, np.ndarray]:
    """One step of training on the tape; returns the state after it."""
    tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
    result = net(kp, tensors, state, pyramid, features, training=True, seed=1)
    assert_type(result.logits, kp.autodiff.Tensor)
    assert_type(result.state, dict[str, np.ndarray])
    assert_type(result.regularization, kp.autodiff.Tensor | None)
    loss = kp.softmax_cross_entropy(result.logits, labels, ignore_index=-1)
    assert_type(loss, kp.autodiff.Tensor)
    if result.regularization is not None:
        loss = loss + result.regularization
    loss.backward()
    grads: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        grads[name] = np.zeros_like(tensor.value) if tensor.grad is None else tensor.grad
    optimizer.step(grads, lr=0.01)
    return result.state
