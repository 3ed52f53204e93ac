"""Trains one parameter by a formula, in plain numpy.

Everything is computed in the type of the parameter: float64 or, where that is what is tested,
numpy's longdouble (80 bits on x86).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Array]
Options = dict[str, Any]
# From options, the number of the step, whether it is the parameter's first, the parameter, its
# gradient and its states: the new parameter and states.
Step = Callable[[Options, int, bool, Array, Array, State], tuple[Array, State]]
Store = Callable[[Array], Array]


def unrounded(p: Array) -> Array:
    return p


def train(
    step: Step,
    defaults: Options,
    p: Array,
    grads: Iterable[Array],
    store: Store = unrounded,
    **options: Any,
) -> dict[str, Array]:
    """The parameter ("param") and its states after a step for each gradient.

    store is what happens to the parameter when it is put back into memory after a step: nothing,
    or rounding to the storage type.
    """
    exact = p.dtype.type  # so that 1 - beta is not rounded to float64
    numbers = {
        key: tuple(map(exact, value)) if isinstance(value, tuple) else exact(value)
        for key, value in {**defaults, **options}.items()
    }
    state: State = defaultdict(partial(np.zeros_like, p))
    for number, g in enumerate(grads, start=1):
        signed = -g if numbers["maximize"] else g
        p, state = step(numbers, number, number == 1, p, signed, state)
        p = store(p)
    return {"param": p, **state}
