"""Optimizers, gradient clipping and learning rate schedules for training on the tape (`kpcore.autodiff`).

Parameters and gradients are dicts of NumPy or CuPy arrays by name; parameters are changed in place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from kpcore.backends import checks, devices
from kpcore.nn.blocks import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kpcore.nn.blocks import AnyArray, Parameters


class Optimizer(Generic[Value]):
    """Parameters, the arrays (moments) stored for each, and the rule that updates them. Made by `sgd` and `adamw`.

    Parameters
    ----------
    params : dict of C-contiguous arrays by name
        Changed in place by `step`.
    moments : sequence of str
        Names of the arrays stored for each parameter, which are zero initially.
    update : callable
        Called with the learning rate, the number of the step (from 1 on), a parameter, its gradient and its moments;
        changes the parameter and the moments in place.
    lr_scales : dict of float by part of a name, optional
        Factors of the learning rate for parameters that have this part in their name.
    """

    params: Parameters[Value]
    moments: Sequence[str]
    update: Callable[..., None]
    num_steps: int

    def __init__(self, params: Parameters[Value], moments: Sequence[str], update: Callable[..., None],
                 lr_scales: Mapping[str, float] | None = None) -> None:  # fmt: skip
        for name, value in params.items():
            if not (devices.is_array(value) and devices.is_real(value)):
                got = f"{type(value).__name__} {getattr(value, 'dtype', '')}".rstrip()
                raise TypeError(f"params: expected float32 or float64 arrays, got {got} for {name}")
            if not value.flags.c_contiguous or (isinstance(value, np.ndarray) and not value.flags.writeable):
                raise ValueError(f"params: expected C-contiguous writable arrays, got one that is not for {name}")
        self.params, self.moments, self.update, self.num_steps = params, moments, update, 0
        self._scales = dict.fromkeys(params, 1.0)
        for part, factor in (lr_scales or {}).items():
            factor = checks.number(f"lr_scales[{part!r}]", factor, np.dtype(np.float64))
            for name in params:
                if part in name:
                    self._scales[name] *= factor
        self._moments: dict[str, Value] = {
            f"{moment}.{name}": devices.namespace(value).zeros_like(value)
            for moment in moments
            for name, value in params.items()
        }

    def state(self) -> dict[str, Value | np.ndarray]:
        """Copies of the moments by name and, under "num_steps", the number of steps; `restore` continues from them."""
        moments = {name: value.copy() for name, value in self._moments.items()}
        return {**moments, "num_steps": np.array(self.num_steps)}

    def restore(self, state: Mapping[str, Value | np.ndarray]) -> None:
        """Continue from what `state` returned for parameters of the same names, shapes and dtypes."""
        expected = {**self._moments, "num_steps": np.array(0)}
        if state.keys() != expected.keys():
            wrong = sorted(state.keys() ^ expected.keys())
            raise ValueError(f"state: expected what state() returns for these parameters, got other names: {wrong[:3]}")
        for name, value in self._moments.items():
            _check_like("state", name, state[name], value)
        for name, value in self._moments.items():
            value[...] = state[name]
        self.num_steps = int(state["num_steps"])

    def step(self, grads: Parameters[Value], lr: float) -> None:
        """Update the parameters with their gradients, a dict by name, and the learning rate of this step."""
        lr = checks.not_negative("lr", lr)
        if grads.keys() != self.params.keys():
            wrong = sorted(grads.keys() ^ self.params.keys())
            raise ValueError(f"grads: expected one for each parameter, got other names: {', '.join(wrong[:3])}")
        for name, value in self.params.items():
            _check_like("grads", name, grads[name], value)
        self.num_steps += 1
        for name, value in self.params.items():
            moments = (self._moments[f"{moment}.{name}"] for moment in self.moments)
            self.update(lr * self._scales[name], self.num_steps, value, devices.contiguous(grads[name]), *moments)


def _check_like(argument: str, name: str, value: Any, like: Any) -> None:
    """Check that `value` is an array of the same shape, dtype and device as the parameter `like`."""
    expected = f"{argument}: expected {name} {like.shape} {like.dtype}"
    if value is None:
        raise ValueError(f"{expected}, got None")
    if not devices.is_array(value) or isinstance(value, np.ndarray) != isinstance(like, np.ndarray):
        raise TypeError(f"{expected} {type(like).__module__} array, got {type(value).__name__}")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{expected}, got {value.shape} {value.dtype}")


def sgd(params: Parameters[Value], *, momentum: float = 0.98, weight_decay: float = 1e-3,
        lr_scales: Mapping[str, float] | None = None) -> Optimizer[Value]:  # fmt: skip
    """Stochastic gradient descent with momentum: ``m = momentum m + g + weight_decay p``, ``p -= lr m``.

    The same as torch.optim.SGD. The published networks are trained with a momentum of 0.98, a weight decay of 1e-3, and
    a tenth of the learning rate for parameters with "offset" in their name.

    Parameters
    ----------
    params, lr_scales
        As in `Optimizer`.
    momentum, weight_decay : float

    Returns
    -------
    Optimizer

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> params = {"weights": np.array([1.0, 2.0])}
    >>> optimizer = kp.nn.sgd(params, momentum=0.9, weight_decay=0.0)
    >>> optimizer.step({"weights": np.array([0.5, 0.0])}, lr=0.1)
    >>> params["weights"]
    array([0.95, 2.  ])
    """
    momentum = checks.not_negative("momentum", momentum)
    weight_decay = checks.not_negative("weight_decay", weight_decay)

    def update(lr: float, step: int, value: Value, grad: Value, moment: Value) -> None:
        devices.backend(value).run("sgd", value=value, grad=grad, moment=moment, lr=lr, momentum=momentum,
                                   weight_decay=weight_decay)  # fmt: skip

    return Optimizer(params, ("momentum",), update, lr_scales)


def adamw(params: Parameters[Value], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
          weight_decay: float = 1e-2, lr_scales: Mapping[str, float] | None = None) -> Optimizer[Value]:  # fmt: skip
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), the same as torch.optim.AdamW.

    Parameters
    ----------
    params, lr_scales
        As in `Optimizer`.
    betas : (float, float)
    eps, weight_decay : float

    Returns
    -------
    Optimizer
    """
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas}")
    first, second = (checks.not_negative("betas", beta) for beta in betas)
    if max(first, second) >= 1:
        raise ValueError(f"betas: expected numbers below 1, got {betas}")
    eps = checks.not_negative("eps", eps)
    weight_decay = checks.not_negative("weight_decay", weight_decay)

    def update(lr: float, step: int, value: Value, grad: Value, mean: Value, square: Value) -> None:
        rate, inverse_root = lr / (1 - first**step), 1 / math.sqrt(1 - second**step)
        devices.backend(value).run("adamw", value=value, grad=grad, mean=mean, square=square,
                                   keep=1 - lr * weight_decay, first=first, second=second, rate=rate,
                                   inverse_root=inverse_root, eps=eps)  # fmt: skip

    return Optimizer(params, ("mean", "square"), update, lr_scales)


def clip_by_value(grads: Parameters[AnyArray], limit: float) -> None:
    """Clip every value of the gradients to ±`limit`, in place; the published code uses 100."""
    limit = checks.length("limit", limit, np.dtype(np.float64))
    _check_grads(grads)
    for grad in grads.values():
        np.minimum(grad, limit, out=grad)
        np.maximum(grad, -limit, out=grad)


def clip_by_norm(grads: Parameters[AnyArray], limit: float) -> float:
    """Scale the gradients, in place, so that their joint norm is at most `limit`; return the norm before scaling.

    The norm is computed in float64 and has the same bits with any number of threads and any instruction set.
    """
    limit = checks.length("limit", limit, np.dtype(np.float64))
    _check_grads(grads)
    squares = 0.0
    for grad in grads.values():  # not sum(), which rounds differently from Python 3.12 on
        total = devices.namespace(grad).empty(1, np.float64)
        devices.backend(grad).run("sum_squares", values=devices.contiguous(grad), sum=total)
        squares += float(total[0])
    norm = math.sqrt(squares)
    if not norm <= limit:  # also for NaN: then all gradients become NaN, as in torch
        for grad in grads.values():
            grad *= limit / norm
    return norm


def _check_grads(grads: Parameters[AnyArray]) -> None:
    for name, grad in grads.items():
        if not (devices.is_array(grad) and devices.is_real(grad)):
            got = f"{type(grad).__name__} {getattr(grad, 'dtype', '')}".rstrip()
            raise TypeError(f"grads: expected float32 or float64 arrays, got {got} for {name}")


def exponential(lr: float, factor: float, steps: int) -> Callable[[float], float]:
    """A schedule that decays exponentially: `lr` times `factor` after each `steps` steps, with no jumps.

    Returns a function of the number of the step.

    >>> [round(exponential(0.01, 0.1, 100)(step), 6) for step in (0, 100, 200)]
    [0.01, 0.001, 0.0001]
    """
    lr, factor = checks.length("lr", lr, np.dtype(np.float64)), checks.length("factor", factor, np.dtype(np.float64))
    steps = checks.integer("steps", steps, 1)

    def at(step: float) -> float:
        step = checks.number("step", step, np.dtype(np.float64))
        try:
            rate = lr * factor ** (step / steps)
        except OverflowError:
            rate = math.inf
        if rate == math.inf:
            raise ValueError(f"step: expected one with a learning rate that float64 can hold, got {step:.17g}")
        return rate

    return at


def one_cycle(lr: float, steps: int, *, warm: float = 0.3, start: float = 1 / 25,
              end: float = 1e-4) -> Callable[[float], float]:  # fmt: skip
    """A schedule of one cycle, the same as torch.optim.lr_scheduler.OneCycleLR.

    The learning rate rises from ``start * lr`` to `lr` in the fraction `warm` of all `steps` and falls to
    ``start * end * lr`` in the rest, both along a cosine. Returns a function of the number of the step.
    """
    lr, warm = checks.length("lr", lr, np.dtype(np.float64)), checks.between("warm", warm, 0, 1)
    steps = checks.integer("steps", steps, 2)
    start, end = checks.not_negative("start", start), checks.not_negative("end", end)
    top = warm * steps - 1

    def interpolate(first: float, last: float, part: float) -> float:
        return last + (first - last) * (1 + math.cos(math.pi * min(1.0, max(0.0, part)))) / 2

    def at(step: float) -> float:
        step = checks.number("step", step, np.dtype(np.float64))
        if step < top:
            return interpolate(start * lr, lr, step / top)
        return interpolate(lr, start * end * lr, (step - top) / (steps - 1 - top) if step > top else 0.0)

    return at


def cosine(lr: float, steps: int) -> Callable[[float], float]:
    """A schedule that falls from `lr` to zero in `steps` steps along a cosine (Loshchilov and Hutter 2017).

    The same as torch.optim.lr_scheduler.CosineAnnealingLR with ``T_max=steps``; after `steps` it stays zero. Returns a
    function of the number of the step.

    >>> [round(cosine(0.1, 100)(step), 6) for step in (0, 50, 100)]
    [0.1, 0.05, 0.0]
    """
    lr, steps = checks.length("lr", lr, np.dtype(np.float64)), checks.integer("steps", steps, 1)

    def at(step: float) -> float:
        step = checks.number("step", step, np.dtype(np.float64))
        return lr * (1 + math.cos(math.pi * min(1.0, max(0.0, step / steps)))) / 2

    return at


def warm_up(schedule: Callable[[float], float], steps: int) -> Callable[[float], float]:
    """A schedule that rises linearly from zero to the start of another one in `steps` steps, and then follows that.

    With `cosine` it is the schedule of Goyal et al. (2017) and Gao et al. (2020): of 90 epochs of n steps each, 5 warm
    up, ``warm_up(cosine(0.1, 85 * n), 5 * n)``. Returns a function of the number of the step.

    >>> schedule = warm_up(cosine(0.1, 100), 10)
    >>> [round(schedule(step), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    steps = checks.integer("steps", steps, 0)
    if not callable(schedule):
        raise TypeError(
            f"schedule: expected a function of the step, such as cosine(...), got {type(schedule).__name__}"
        )

    def at(step: float) -> float:
        step = checks.number("step", step, np.dtype(np.float64))
        return schedule(step - steps) if step >= steps else schedule(0) * max(0.0, step / steps)

    return at
