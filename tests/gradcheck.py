"""Gradients checked in one random direction by central differences."""

import numpy as np


def check_vjp(fn, pullback, primals, seed=0, step=1e-4, tolerance=1e-6):
    """Assert that <g, J d> by central differences of fn (float64) equals <pullback(g), d>, for random g and d.

    A relative error e of the gradient makes the two differ by about e, rounding in float64 by about 1e-9.
    """
    rng = np.random.default_rng(seed)
    directions = [rng.normal(size=p.shape) for p in primals]
    forward, backward = (fn(*(p + s * d for p, d in zip(primals, directions, strict=True))) for s in (step, -step))
    g = rng.normal(size=forward.shape)
    numeric = np.vdot(g, (forward - backward) / (2 * step))
    analytic = sum(np.vdot(grad, d) for grad, d in zip(pullback(g), directions, strict=True))
    error = abs(analytic - numeric) / abs(numeric) if analytic != numeric else 0.0  # both may be zero
    assert error <= tolerance, (
        f"directional derivative {analytic:.12g}, by differences {numeric:.12g}: relative error {error:.2g}"
    )
