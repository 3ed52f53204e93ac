"""Trains by a formula, in plain numpy: one parameter, or all of an optimizer of torch.

Everything is computed in the type of the parameter: float64 or, where that is what is tested,
numpy's longdouble (80 bits on x86).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._formats import NUMBERS

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Array]
Options = dict[str, Any]
# From options, the number of the step, whether it is the parameter's first, the parameter, its
# gradient and its states: the new parameter and states.
Step = Callable[[Options, int, bool, Array, Array, State], tuple[Array, State]]
# What those states begin with that do not begin with zero: "parameter", the key of an option, or a
# number.
Begins = Mapping[str, str | float]
Store = Callable[[Array], Array]


def unrounded(p: Array) -> Array:
    return p


def begun(begins: Begins, options: Options, p: Array) -> State:
    """The states of a parameter that has not been stepped yet."""
    state: State = defaultdict(partial(np.zeros_like, p))
    for key, beginning in begins.items():
        if beginning == "parameter":
            state[key] = p
        else:
            value = options[beginning] if isinstance(beginning, str) else beginning
            state[key] = np.full(() if key in NUMBERS else p.shape, value, p.dtype)
    return state


def train(
    step: Step,
    defaults: Options,
    begins: Begins,
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
    state = begun(begins, numbers, p)
    for number, g in enumerate(grads, start=1):
        signed = -g if numbers["maximize"] else g
        p, state = step(numbers, number, number == 1, p, signed, state)
        p = store(p)
    return {"param": p, **state}


class FormulaOptimizer(Optimizer):
    """What torch.optim would have if it had a class for a formula.

    Args:
        formula: one step of a parameter.
        keys: those of a parameter's state with these options, in their order.
        defaults: all options of the formula.
        foreach: accepted, as by torch's classes.
    """

    def __init__(
        self,
        params: Any,
        *,
        formula: Step,
        keys: Callable[[Options], tuple[str, ...]],
        begins: Begins,
        defaults: Options,
        foreach: bool | None = None,
        **options: Any,
    ) -> None:
        assert options.keys() <= defaults.keys()
        self._formula, self._keys, self._begins = formula, keys, begins
        super().__init__(params, {**defaults, **options})

    def __getstate__(self) -> dict[str, Any]:
        ours = {key: self.__dict__[key] for key in ("_formula", "_keys", "_begins")}
        return {**super().__getstate__(), **ours}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Numbers of Python leave the arrays' type as it is.
            options = {
                key: tuple(map(float, value))
                if isinstance(value, tuple | list)
                else float(value or 0)  # None is "off", as 0 is
                for key, value in group.items()
                if key in self.defaults
            }
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, options)
        return loss

    def _update(self, param: Tensor, options: Options) -> None:
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        keys = self._keys(options)
        state = self.state[param] if keys else {}
        first = not state.keys() & set(keys)
        p, g = array_of(param), array_of(param.grad)
        before = begun(self._begins, options, p)
        before.update({key: array_of(state[key]) for key in keys if key in state})
        before.update({k: v.astype(p.dtype) for k, v in before.items() if k in NUMBERS})
        number = int(np.reshape(before.pop("step", 0), ())) + 1
        with np.errstate(all="ignore"):
            signed = -g if options["maximize"] else g
            p, after = self._formula(options, number, first, p, signed, before)
        set_array(param, p)
        for key in keys:
            if key in NUMBERS:
                # float32, as torch's are, whatever it has made of what it loaded.
                value = number if key == "step" else float(np.float32(after[key]))
                state.setdefault(key, torch.tensor(0.0)).fill_(value)
            else:
                set_array(state.setdefault(key, torch.empty_like(param)), after[key])


def array_of(tensor: Tensor) -> Array:
    """A tensor's values, complex ones as pairs of reals."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu()
    array: Array = (torch.view_as_real(values) if values.is_complex() else values).numpy()
    return array


def set_array(tensor: Tensor, array: Array) -> None:
    reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    reals.copy_(torch.from_numpy(np.asarray(array)))
