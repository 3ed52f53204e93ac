"""The update rules written plainly from their formulas, in numpy.

Each takes one parameter's values and its gradients, one per step, and returns the final values of
the parameter ("param") and of its states. It computes in the type of `p`: float64, or for float64
parameters numpy's longdouble (80 bits on x86). `store` is what happens to a parameter when it is
put back into memory after a step: nothing, or rounding to the storage type.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Store = Callable[[Array], Array]


def unrounded(p: Array) -> Array:
    return p


def adam(
    p: Array,
    grads: Iterable[Array],
    store: Store = unrounded,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> dict[str, Array]:
    exact = p.dtype.type  # so that 1 - beta is not rounded to float64
    beta1, beta2 = exact(betas[0]), exact(betas[1])
    decay = exact(weight_decay)
    m, v, v_max = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        g = -g if maximize else g
        if not decoupled_weight_decay:
            g = g + decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = np.maximum(v_max, v)
        m_hat = m / (1 - beta1**t)
        v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
        change = m_hat / (np.sqrt(v_hat) + exact(eps))
        if decoupled_weight_decay:
            change = change + decay * p
        p = store(p - exact(lr) * change)
    states = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    return {**states, "max_exp_avg_sq": v_max} if amsgrad else states


adamw = partial(adam, weight_decay=1e-2, decoupled_weight_decay=True)


def sgd(
    p: Array,
    grads: Iterable[Array],
    store: Store = unrounded,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> dict[str, Array]:
    exact = p.dtype.type
    mu, tau = exact(momentum), exact(dampening)
    buffer = None
    for g in grads:
        g = -g if maximize else g
        g = g + exact(weight_decay) * p
        if momentum != 0:
            buffer = g if buffer is None else mu * buffer + (1 - tau) * g
            g = g + mu * buffer if nesterov else buffer
        p = store(p - exact(lr) * g)
    return {"param": p} if buffer is None else {"param": p, "momentum_buffer": buffer}


def rmsprop(
    p: Array,
    grads: Iterable[Array],
    store: Store = unrounded,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    eps_inside_sqrt: bool = False,
) -> dict[str, Array]:
    exact = p.dtype.type
    a = exact(alpha)
    v, average, buffer = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for g in grads:
        g = -g if maximize else g
        g = g + exact(weight_decay) * p
        v = a * v + (1 - a) * g * g
        variance = v
        if centered:
            average = a * average + (1 - a) * g
            variance = v - average * average
        if eps_inside_sqrt:
            change = g / np.sqrt(variance + exact(eps))
        else:
            change = g / (np.sqrt(variance) + exact(eps))
        buffer = exact(momentum) * buffer + change
        p = store(p - exact(lr) * buffer)
    states = {"param": p, "square_avg": v}
    if momentum != 0:
        states["momentum_buffer"] = buffer
    if centered:
        states["grad_avg"] = average
    return states
