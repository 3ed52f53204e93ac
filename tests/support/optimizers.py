"""The one table of optimizers that drives all tests: a row per optimizer.

To have a new optimizer tested: add its formula, as its paper or torch's documentation writes it,
and its row. All optimizers have the options lr and maximize, and all but one weight_decay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

import fusedopt

from .reference import Array, Begins, FormulaOptimizer, Options, State, Step, train


@dataclass(frozen=True)
class Row:
    """One optimizer: ours, torch's, the formula, and the options that all tests run through."""

    name: str
    ours: Callable[..., Optimizer]
    step: Step  # the formula
    defaults: Options  # all options of the formula
    option_sets: dict[str, Options]
    state_keys: Callable[[Options], tuple[str, ...]]  # without step
    theirs: Callable[..., Optimizer] | None = None  # torch's class, where it has one
    counts_steps: bool = True
    ours_only: frozenset[str] = frozenset()  # options that torch does not have
    begins: Begins = field(default_factory=dict)
    # Keys of a state under which a number stands besides the count, with one that it may be.
    numbers: dict[str, float] = field(default_factory=dict)
    states_at_once: bool = False  # whether the constructor makes states, torch's of any parameter
    never_negative: frozenset[str] = frozenset()  # states that are no less than zero
    takes_codes: Callable[[Options], bool] = lambda options: True  # whether states may be int8
    made_anew: frozenset[str] = frozenset()  # states that do not depend on what they have been
    measures: Callable[[Options], Any] = lambda options: False  # parameters as a whole
    turns: bool = False  # whether a step may turn round where an average is rounded

    @property
    def reference(self) -> Callable[..., dict[str, Array]]:
        return partial(train, self.step, self.defaults, self.begins)

    @property
    def counterpart(self) -> Callable[..., Optimizer]:
        """What ours is compared with: torch's class or, where there is none, the formula."""
        if self.theirs is not None:
            return self.theirs
        made = {"formula": self.step, "defaults": self.defaults, "begins": self.begins}
        return partial(FormulaOptimizer, **made, keys=self.ordered_keys)

    def known(self, options: Options) -> Options:
        """Those of the options that it has."""
        return {key: value for key, value in options.items() if key in self.defaults}

    def counterpart_has(self, options: Options) -> bool:
        return not self.ours_only & options.keys()

    def ordered_keys(self, options: Options) -> tuple[str, ...]:
        count = ("step",) if self.counts_steps else ()
        return (*count, *self.numbers, *self.state_keys(options))

    def keys(self, options: Options) -> set[str]:
        """All keys of a parameter's state."""
        return set(self.ordered_keys(options))


def with_decay(o: Options, p: Array, change: Array) -> Array:
    """The parameter with decoupled decay, before a change is taken off it."""
    decayed = p * (1 - o["lr"] * o["weight_decay"])
    return np.where(change * p < 0, p, decayed) if o["cautious_weight_decay"] else decayed


def cautious(o: Options, direction: Array, g: Array) -> Array:
    """By what the elements of a change are multiplied."""
    if not o["cautious"]:
        return np.ones_like(g)
    mask = (direction * g > 0).astype(g.dtype)
    if o.get("unmeasured") or mask.size == 0:
        return mask
    return mask / max(mask.mean(), type(o["lr"])(1e-3))


def norm_of(values: Array) -> Array:
    return np.sqrt(np.sum(values**2))


def adam_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    if not o["decoupled_weight_decay"]:
        g = g + o["weight_decay"] * p
    new = {"exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2}
    m_hat = g
    if o["first_moment"]:
        new["exp_avg"] = beta1 * s["exp_avg"] + (1 - beta1) * g
        m_hat = new["exp_avg"] / (1 - beta1**step)
    second = new["exp_avg_sq"]
    if o["amsgrad"]:
        second = new["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], second)
    v_hat = second / (1 - beta2**step)
    change = cautious(o, m_hat, g) * m_hat
    if o["decoupled_weight_decay"]:
        p = with_decay(o, p, change)
    return p - o["lr"] * change / (np.sqrt(v_hat) + o["eps"]), new


def sgd_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    if o["momentum"] == 0:
        return p - o["lr"] * g, {}
    buffer = o["momentum"] * s["momentum_buffer"] + (1 - o["dampening"]) * g
    if first:
        buffer = g
    change = g + o["momentum"] * buffer if o["nesterov"] else buffer
    return p - o["lr"] * change, {"momentum_buffer": buffer}


def rmsprop_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    new = {"square_avg": o["alpha"] * s["square_avg"] + (1 - o["alpha"]) * g**2}
    variance = new["square_avg"]
    if o["centered"]:
        new["grad_avg"] = o["alpha"] * s["grad_avg"] + (1 - o["alpha"]) * g
        variance = variance - new["grad_avg"] ** 2
    if o["eps_inside_sqrt"]:
        change = g / np.sqrt(variance + o["eps"])
    else:
        change = g / (np.sqrt(variance) + o["eps"])
    if o["momentum"] > 0:
        change = new["momentum_buffer"] = o["momentum"] * s["momentum_buffer"] + change
    return p - o["lr"] * change, new


def adamax_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    g = g + o["weight_decay"] * p
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_inf": np.maximum(beta2 * s["exp_inf"], np.abs(g) + o["eps"]),
    }
    return p - o["lr"] / (1 - beta1**step) * new["exp_avg"] / new["exp_inf"], new


def adadelta_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    square_avg = o["rho"] * s["square_avg"] + (1 - o["rho"]) * g**2
    delta = np.sqrt(s["acc_delta"] + o["eps"]) / np.sqrt(square_avg + o["eps"]) * g
    acc_delta = o["rho"] * s["acc_delta"] + (1 - o["rho"]) * delta**2
    return p - o["lr"] * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


def radam_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    if not o["decoupled_weight_decay"]:
        g = g + o["weight_decay"] * p
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    change = new["exp_avg"] / (1 - beta1**step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length > 5:
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        change = change * (rectified * (1 - beta2**step)) ** 0.5
        change = change / (np.sqrt(new["exp_avg_sq"]) + o["eps"])
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    return p - o["lr"] * change, new


def adagrad_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    new = {"sum": s["sum"] + g**2}
    lr = o["lr"] / (1 + o["lr_decay"] * (step - 1))
    return p - lr * g / (np.sqrt(new["sum"]) + o["eps"]), new


def rprop_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    (shorter, longer), (shortest, longest) = o["etas"], o["step_sizes"]
    turned = g * s["prev"] < 0
    factor = np.where(g * s["prev"] > 0, longer, np.where(turned, shorter, 1))
    step_size = np.clip(s["step_size"] * factor.astype(p.dtype), shortest, longest)
    g = np.where(turned, 0, g).astype(p.dtype)
    return p - np.sign(g) * step_size, {"prev": g, "step_size": step_size}


def _adam_keys(options: Options) -> tuple[str, ...]:
    keys = ("exp_avg", "exp_avg_sq") if options.get("first_moment", True) else ("exp_avg_sq",)
    return (*keys, "max_exp_avg_sq") if options.get("amsgrad") else keys


def _sgd_keys(options: Options) -> tuple[str, ...]:
    return ("momentum_buffer",) if options.get("momentum") else ()


def _rmsprop_keys(options: Options) -> tuple[str, ...]:
    keys = ("square_avg",)
    keys += ("momentum_buffer",) if options.get("momentum") else ()
    return (*keys, "grad_avg") if options.get("centered") else keys


ADAM_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
ADAM_DEFAULTS |= {"decoupled_weight_decay": False, "amsgrad": False, "maximize": False}
ADAM_DEFAULTS |= {"cautious": False, "cautious_weight_decay": False, "first_moment": True}
ADAM_OWN = frozenset({"cautious", "cautious_weight_decay", "first_moment"})
ADAM_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq"})

ADAMW = Row(
    name="adamw",
    ours=fusedopt.AdamW,
    theirs=torch.optim.AdamW,
    step=adam_step,
    defaults=ADAM_DEFAULTS | {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    option_sets={
        "default": {},
        "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
        "maximize": {"lr": 1e-2, "maximize": True, "eps": 1e-3},
        "no-decay-short-memory": {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.99)},
        # A large eps, or all steps would be as long as lr, and rounding a bfloat16 parameter would
        # err by the same amount in each of them: an accident of lr, not of the implementation.
        "no-memory": {"lr": 1e-2, "betas": (0.0, 0.0), "eps": 1.0},
        "beta1-below-half": {"lr": 1e-2, "betas": (0.3, 0.95), "eps": 1e-15, "weight_decay": 0.1},
        "cautious-decay": {"lr": 1e-2, "weight_decay": 0.5, "cautious_weight_decay": True},
        "cautious": {"lr": 1e-2, "weight_decay": 0.1, "cautious": True},
        "cautious-all": {
            **{"lr": 1e-2, "betas": (0.3, 0.95), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},
            **{"maximize": True, "cautious": True, "cautious_weight_decay": True},
        },
        "no-first-moment": {"lr": 1e-2, "first_moment": False, "eps": 1e-3},
        "no-first-moment-amsgrad": {"lr": 1e-2, "first_moment": False, "amsgrad": True, "eps": 0.1},
    },
    state_keys=_adam_keys,
    measures=lambda options: options.get("cautious"),
    ours_only=ADAM_OWN,
    never_negative=ADAM_SQUARES,
)

ADAM = Row(
    name="adam",
    ours=fusedopt.Adam,
    theirs=torch.optim.Adam,
    step=adam_step,
    defaults=ADAM_DEFAULTS,
    option_sets={
        "default": {},
        "coupled-decay": {"lr": 1e-2, "weight_decay": 0.1},
        "decoupled-decay": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
        "all": {
            "lr": 1e-2,
            "betas": (0.8, 0.99),
            "eps": 1e-3,
            "weight_decay": 0.05,
            "amsgrad": True,
            "maximize": True,
        },
    },
    state_keys=_adam_keys,
    measures=lambda options: options.get("cautious"),
    ours_only=ADAM_OWN,
    never_negative=ADAM_SQUARES,
)

SGD = Row(
    name="sgd",
    ours=fusedopt.SGD,
    theirs=torch.optim.SGD,
    step=sgd_step,
    defaults={
        **{"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
        **{"nesterov": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "decay": {"lr": 1e-2, "weight_decay": 0.1},
        "maximize": {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        "momentum": {"lr": 1e-2, "momentum": 0.9},
        "small-momentum": {"lr": 1e-2, "momentum": 0.3, "maximize": True},
        "dampening": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        "nesterov": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
        "nesterov-decay": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    },
    state_keys=_sgd_keys,
    counts_steps=False,
)

RMSPROP = Row(
    name="rmsprop",
    ours=fusedopt.RMSprop,
    theirs=torch.optim.RMSprop,
    step=rmsprop_step,
    defaults={
        **{"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
        **{"centered": False, "maximize": False, "eps_inside_sqrt": False},
    },
    option_sets={
        "default": {},
        "decay": {"weight_decay": 0.1, "eps": 1e-4},
        "short-memory-maximize": {"lr": 1e-3, "alpha": 0.4, "maximize": True},
        "momentum": {"lr": 1e-3, "momentum": 0.9},
        "centered": {"lr": 1e-3, "centered": True, "weight_decay": 0.1},
        "all": {
            "lr": 1e-3,
            "eps": 1e-5,
            "weight_decay": 0.05,
            "momentum": 0.4,
            "centered": True,
            "maximize": True,
        },
        "inside": {"eps_inside_sqrt": True, "eps": 1e-6},
        "inside-all": {
            "lr": 1e-3,
            "eps": 1e-6,
            "momentum": 0.9,
            "centered": True,
            "weight_decay": 0.1,
            "eps_inside_sqrt": True,
        },
    },
    state_keys=_rmsprop_keys,
    ours_only=frozenset({"eps_inside_sqrt"}),
    never_negative=frozenset({"square_avg"}),
    takes_codes=lambda options: not options.get("centered"),
)


def lion_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    direction = beta1 * s["exp_avg"] + (1 - beta1) * g
    change = cautious(o, direction, g) * np.sign(direction)
    p = with_decay(o, p, change) - o["lr"] * change
    return p, {"exp_avg": beta2 * s["exp_avg"] + (1 - beta2) * g}


LION = Row(
    name="lion",
    ours=fusedopt.Lion,
    step=lion_step,
    defaults={
        **{"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False},
        **{"cautious": False, "cautious_weight_decay": False},
    },
    option_sets={
        "default": {},
        "decay-maximize": {"lr": 1e-3, "weight_decay": 0.1, "maximize": True},
        "short-memory": {"betas": (0.4, 0.3), "weight_decay": 0.5},
        "cautious-decay": {"lr": 1e-3, "weight_decay": 0.5, "cautious_weight_decay": True},
        "cautious": {"lr": 1e-3, "weight_decay": 0.1, "cautious": True},
        "cautious-all": {
            **{"lr": 1e-3, "betas": (0.4, 0.3), "weight_decay": 0.5, "maximize": True},
            **{"cautious": True, "cautious_weight_decay": True},
        },
    },
    state_keys=lambda options: ("exp_avg",),
    counts_steps=False,
    measures=lambda options: options.get("cautious"),
    turns=True,
)


def lamb_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    m_hat = new["exp_avg"] / (1 - beta1**step)
    v_hat = new["exp_avg_sq"] / (1 - beta2**step)
    r = m_hat / (np.sqrt(v_hat) + o["eps"]) + o["weight_decay"] * p
    trust = type(o["lr"])(1)
    adapts = o["weight_decay"] or o["always_adapt"]
    if adapts and not o.get("unmeasured") and norm_of(p) > 0 and norm_of(r) > 0:
        trust = norm_of(p) / norm_of(r)
    return p - o["lr"] * trust * r, new


LAMB = Row(
    name="lamb",
    ours=fusedopt.LAMB,
    step=lamb_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
        **{"always_adapt": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "no-decay": {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-3},
        "always-adapt": {"lr": 1e-2, "weight_decay": 0.0, "always_adapt": True, "eps": 1e-3},
        "short-memory-maximize": {
            **{"lr": 1e-2, "betas": (0.4, 0.3), "eps": 1e-2, "weight_decay": 0.1},
            **{"maximize": True},
        },
    },
    state_keys=_adam_keys,
    measures=lambda options: options.get("weight_decay", 0.01) or options.get("always_adapt"),
    never_negative=ADAM_SQUARES,
)


def lars_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    trust = type(o["lr"])(1)
    adapts = o["weight_decay"] or o["always_adapt"]
    if adapts and not o.get("unmeasured") and norm_of(p) > 0 and norm_of(g) > 0:
        length = norm_of(g) + o["weight_decay"] * norm_of(p) + o["eps"]
        trust = o["trust_coefficient"] * norm_of(p) / length
    g = trust * (g + o["weight_decay"] * p)
    buffer = o["momentum"] * s["momentum_buffer"] + g
    change = g + o["momentum"] * buffer if o["nesterov"] else buffer
    return p - o["lr"] * change, {"momentum_buffer": buffer}


LARS = Row(
    name="lars",
    ours=fusedopt.LARS,
    step=lars_step,
    defaults={
        **{"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3},
        **{"eps": 1e-8, "nesterov": False, "always_adapt": False, "maximize": False},
    },
    option_sets={
        "no-decay": {"lr": 1e-3},
        "decay": {"weight_decay": 0.1, "trust_coefficient": 1e-2},
        "always-adapt": {"always_adapt": True, "momentum": 0.0, "eps": 1e-3},
        "all": {
            **{"lr": 0.5, "momentum": 0.5, "weight_decay": 0.05, "trust_coefficient": 1e-2},
            **{"nesterov": True, "maximize": True},
        },
    },
    state_keys=lambda options: ("momentum_buffer",),
    counts_steps=False,
    measures=lambda options: options.get("weight_decay") or options.get("always_adapt"),
)


def stable_adamw_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    # 1 - beta * (1 - beta^(step - 1)) / (1 - beta^step), without a difference that loses digits.
    own1, own2 = (
        type(beta)((beta - 1) / np.expm1(step * np.log1p(beta - 1))) for beta in o["betas"]
    )
    new = {
        "exp_avg": (1 - own1) * s["exp_avg"] + own1 * g,
        "exp_avg_sq": (1 - own2) * s["exp_avg_sq"] + own2 * g**2,
    }
    lr = o["lr"]
    if g.size and not o.get("unmeasured"):
        rms = np.sqrt(np.mean(g**2 / np.maximum(new["exp_avg_sq"], o["eps"] ** 2)))
        lr = lr / max(1, rms)
    change = new["exp_avg"] / (np.sqrt(new["exp_avg_sq"]) + o["eps"])
    return p - lr * (change + o["weight_decay"] * p), new


STABLE_ADAMW = Row(
    name="stable_adamw",
    ours=fusedopt.StableAdamW,
    step=stable_adamw_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 1e-2},
        "maximize": False,
    },
    option_sets={
        "default": {},
        "long-memory": {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-3},
        "short-memory-maximize": {
            **{"lr": 1e-2, "betas": (0.4, 0.3), "eps": 1e-2, "weight_decay": 0.0},
            **{"maximize": True},
        },
    },
    state_keys=_adam_keys,
    measures=lambda options: True,
    never_negative=ADAM_SQUARES,
)


def ademamix_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2, beta3 = o["betas"]
    alpha, slow = o["alpha"], beta3
    if step < o["alpha_warmup"]:
        alpha = alpha * step / o["alpha_warmup"]
    if step < o["beta3_warmup"]:
        t, log1, log3 = step / o["beta3_warmup"], np.log(beta1), np.log(beta3)
        slow = min(beta3, np.exp(log1 * log3 / ((1 - t) * log3 + t * log1)))
        slow = type(beta3)(slow)  # an array stays in its own type beside a number of Python
    new = {
        "exp_avg_fast": beta1 * s["exp_avg_fast"] + (1 - beta1) * g,
        "exp_avg_slow": slow * s["exp_avg_slow"] + (1 - slow) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    m_hat = new["exp_avg_fast"] / (1 - beta1**step)
    v_hat = new["exp_avg_sq"] / (1 - beta2**step)
    change = (m_hat + alpha * new["exp_avg_slow"]) / (np.sqrt(v_hat) + o["eps"])
    return p - o["lr"] * (change + o["weight_decay"] * p), new


ADEMAMIX = Row(
    name="ademamix",
    ours=fusedopt.AdEMAMix,
    step=ademamix_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 2.0, "eps": 1e-8},
        **{"beta3_warmup": 0, "alpha_warmup": 0, "weight_decay": 0.0, "maximize": False},
    },
    option_sets={
        "default": {},
        # Warm-ups that end after the steps of most tests, and within those of some.
        "warmup": {"lr": 1e-2, "beta3_warmup": 60, "alpha_warmup": 90, "weight_decay": 0.1},
        "no-share": {"alpha": 0.0, "betas": (0.8, 0.99, 0.7), "beta3_warmup": 9, "eps": 1e-3},
        "short-memory-maximize": {
            **{"betas": (0.4, 0.95, 0.45), "alpha": 8.0, "alpha_warmup": 3, "eps": 1e-3},
            **{"weight_decay": 0.1, "maximize": True},
        },
    },
    state_keys=lambda options: ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    never_negative=frozenset({"exp_avg_sq"}),
    takes_codes=lambda options: False,
)


def adopt_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    if not o["decouple"]:
        g = g + o["weight_decay"] * p
    if step == 1:
        return p, {"exp_avg": s["exp_avg"], "exp_avg_sq": g**2}
    change = g / np.maximum(np.sqrt(s["exp_avg_sq"]), o["eps"])
    if o["clip"]:
        most = type(beta1)(step - 1) ** 0.25
        change = np.clip(change, -most, most)
    if o["decouple"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * change,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    return p - o["lr"] * new["exp_avg"], new


ADOPT = Row(
    name="adopt",
    ours=fusedopt.ADOPT,
    step=adopt_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, "clip": True},
        **{"weight_decay": 0.0, "decouple": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "decoupled-decay": {"lr": 1e-2, "weight_decay": 0.1, "decouple": True, "eps": 1e-3},
        "short-memory-maximize": {
            **{"betas": (0.4, 0.3), "weight_decay": 0.05, "decouple": True, "maximize": True},
        },
        "coupled-decay-no-clip": {"weight_decay": 0.1, "clip": False, "eps": 0.1},
    },
    state_keys=lambda options: ("exp_avg", "exp_avg_sq"),
    never_negative=frozenset({"exp_avg_sq"}),
)


def adan_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2, beta3 = o["betas"]
    diff = g + s["neg_pre_grad"] if step > 1 else np.zeros_like(g)
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta3 * s["exp_avg_sq"] + (1 - beta3) * (g + beta2 * diff) ** 2,
        "exp_avg_diff": beta2 * s["exp_avg_diff"] + (1 - beta2) * diff,
        "neg_pre_grad": -g,
    }
    m_hat = new["exp_avg"] / (1 - beta1**step)
    d_hat = new["exp_avg_diff"] / (1 - beta2**step)
    v_hat = new["exp_avg_sq"] / (1 - beta3**step)
    change = o["lr"] * (m_hat + beta2 * d_hat) / (np.sqrt(v_hat) + o["eps"])
    if o["no_prox"]:
        return (1 - o["lr"] * o["weight_decay"]) * p - change, new
    return (p - change) / (1 + o["lr"] * o["weight_decay"]), new


ADAN = Row(
    name="adan",
    ours=fusedopt.Adan,
    step=adan_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        **{"no_prox": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "decay": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
        "short-memory-maximize": {
            **{"lr": 1e-2, "betas": (0.4, 0.3, 0.45), "weight_decay": 0.1, "eps": 1e-3},
            **{"no_prox": True, "maximize": True},
        },
    },
    state_keys=lambda options: ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"),
    never_negative=frozenset({"exp_avg_sq"}),
    made_anew=frozenset({"neg_pre_grad"}),
)


ADAMAX = Row(
    name="adamax",
    ours=fusedopt.Adamax,
    theirs=torch.optim.Adamax,
    step=adamax_step,
    defaults={
        **{"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    },
    option_sets={
        "default": {},
        # A large eps, or a weight with decay but no gradients would take steps as long as lr around
        # zero for ever, of which rounding decides the signs.
        "short-memory": {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1},
        "all": {
            "lr": 1e-2,
            "betas": (0.3, 0.99),
            "eps": 1e-3,
            "weight_decay": 0.05,
            "maximize": True,
        },
    },
    state_keys=lambda options: ("exp_avg", "exp_inf"),
    never_negative=frozenset({"exp_inf"}),
)

ADADELTA = Row(
    name="adadelta",
    ours=fusedopt.Adadelta,
    theirs=torch.optim.Adadelta,
    step=adadelta_step,
    defaults={"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False},
    option_sets={
        "default": {},
        "long-memory": {"rho": 0.99, "weight_decay": 0.1},
        "all": {"lr": 0.1, "rho": 0.4, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
    },
    state_keys=lambda options: ("square_avg", "acc_delta"),
    never_negative=frozenset({"square_avg", "acc_delta"}),
)

RADAM = Row(
    name="radam",
    ours=fusedopt.RAdam,
    theirs=torch.optim.RAdam,
    step=radam_step,
    defaults={
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        **{"decoupled_weight_decay": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "coupled-decay": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1},
        "decoupled-decay": {
            "lr": 1e-2,
            "betas": (0.3, 0.99),
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
        "never-rectified": {"lr": 1e-2, "betas": (0.9, 0.4), "weight_decay": 0.05},
    },
    state_keys=_adam_keys,
    never_negative=ADAM_SQUARES,
)


def mend_adagrad(cls: Any) -> None:
    """Before torch 2.13 its Adagrad made states in the constructor alone, so that a parameter that
    was added later had none, and did not tell GradScaler that its fused step skips and unscales."""
    construct, init_group = cls.__init__, cls._init_group

    @wraps(construct)
    def construct_mended(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True

    def init_group_mended(self: Any, group: Any, *lists: Any) -> Any:
        keys = ("initial_accumulator_value", "fused")
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                made = cls([p], **{key: group[key] for key in keys})
                self.state[p].update(made.state[p])
        return init_group(self, group, *lists)

    cls.__init__, cls._init_group = construct_mended, init_group_mended


if TorchVersion(torch.__version__) < "2.13":
    mend_adagrad(torch.optim.Adagrad)

ADAGRAD = Row(
    name="adagrad",
    ours=fusedopt.Adagrad,
    theirs=torch.optim.Adagrad,
    step=adagrad_step,
    defaults={
        **{"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0},
        **{"eps": 1e-10, "maximize": False},
    },
    option_sets={
        "default": {},
        "decay": {"lr_decay": 0.1, "weight_decay": 0.1},
        "all": {
            "lr": 1e-1,
            "lr_decay": 0.01,
            "weight_decay": 0.05,
            "initial_accumulator_value": 0.3,
            "eps": 1e-3,
            "maximize": True,
        },
    },
    state_keys=lambda options: ("sum",),
    begins={"sum": "initial_accumulator_value"},
    states_at_once=True,
    never_negative=frozenset({"sum"}),
    takes_codes=lambda options: False,
)

RPROP = Row(
    name="rprop",
    ours=fusedopt.Rprop,
    theirs=torch.optim.Rprop,
    step=rprop_step,
    defaults={"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0), "maximize": False},
    option_sets={
        "default": {},
        "short": {"lr": 0.1, "etas": (0.75, 1.0625), "step_sizes": (1e-3, 0.05)},
        "all": {"lr": 1e-3, "etas": (0.25, 1.5), "step_sizes": (1e-4, 0.02), "maximize": True},
    },
    state_keys=lambda options: ("prev", "step_size"),
    begins={"step_size": "lr"},
    takes_codes=lambda options: False,
)


def nadam_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    if not o["decoupled_weight_decay"]:
        g = g + o["weight_decay"] * p
    decay = type(beta1)(0.96)
    mu, next_mu = (beta1 * (1 - decay ** (t * o["momentum_decay"]) / 2) for t in (step, step + 1))
    new = {
        "mu_product": s["mu_product"] * mu,
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    m_hat = next_mu / (1 - new["mu_product"] * next_mu) * new["exp_avg"]
    m_hat = m_hat + (1 - mu) / (1 - new["mu_product"]) * g
    v_hat = new["exp_avg_sq"] / (1 - beta2**step)
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    return p - o["lr"] * m_hat / (np.sqrt(v_hat) + o["eps"]), new


NADAM = Row(
    name="nadam",
    ours=fusedopt.NAdam,
    theirs=torch.optim.NAdam,
    step=nadam_step,
    defaults={
        **{"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        **{"momentum_decay": 4e-3, "decoupled_weight_decay": False, "maximize": False},
    },
    option_sets={
        "default": {},
        "coupled-decay": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.1},
        "decoupled-decay": {
            **{"lr": 1e-2, "betas": (0.3, 0.99), "eps": 1e-3, "weight_decay": 0.1},
            **{"decoupled_weight_decay": True, "maximize": True, "momentum_decay": 0.5},
        },
    },
    state_keys=_adam_keys,
    begins={"mu_product": 1.0},
    numbers={"mu_product": 0.3},
    never_negative=ADAM_SQUARES,
)


def asgd_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    p = p * (1 - o["lambd"] * s["eta"]) - s["eta"] * g
    return p, {
        "ax": s["ax"] + s["mu"] * (p - s["ax"]),
        "eta": np.asarray(o["lr"] / (1 + o["lambd"] * o["lr"] * step) ** o["alpha"], p.dtype),
        "mu": np.asarray(1 / max(1, step - o["t0"]), p.dtype),
    }


ASGD = Row(
    name="asgd",
    ours=fusedopt.ASGD,
    theirs=torch.optim.ASGD,
    step=asgd_step,
    defaults={
        **{"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0.0},
        "maximize": False,
    },
    option_sets={
        "default": {},
        "averaging": {"lambd": 1e-2, "t0": 3.0},
        "all": {
            **{"lr": 1e-1, "lambd": 1e-1, "alpha": 0.5, "t0": 0.0, "weight_decay": 0.1},
            "maximize": True,
        },
    },
    state_keys=lambda options: ("ax",),
    begins={"eta": "lr", "mu": 1.0},
    numbers={"eta": 0.05, "mu": 0.25},
    takes_codes=lambda options: False,
)


def schedule_free(o: Options, momentum: float, step: int, s: State) -> tuple[Array, Array, State]:
    """What an average takes of z in a step, how far z goes, and the numbers of the next state."""
    lr = o["lr"] * min(1, step / o["warmup_steps"]) if o["warmup_steps"] else o["lr"]
    most = np.maximum(s["lr_max"], lr)
    weight = type(o["lr"])(step) ** o["r"] * most ** o["weight_lr_power"]
    weight_sum = s["weight_sum"] + weight
    return weight / weight_sum, lr, {"lr_max": most, "weight_sum": weight_sum}


def schedule_free_adamw_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    share, lr, new = schedule_free(o, beta1, step, s)
    new["exp_avg_sq"] = beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2
    change = g / (np.sqrt(new["exp_avg_sq"] / (1 - beta2**step)) + o["eps"])
    change = change + o["weight_decay"] * p
    p = (1 - share) * p + share * s["z"] - lr * (1 - beta1 * (1 - share)) * change
    return p, {**new, "z": s["z"] - lr * change}


def schedule_free_sgd_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    share, lr, new = schedule_free(o, o["momentum"], step, s)
    change = g + o["weight_decay"] * p
    p = (1 - share) * p + share * s["z"] - lr * (1 - o["momentum"] * (1 - share)) * change
    return p, {**new, "z": s["z"] - lr * change}


SCHEDULE_FREE = {
    **{"weight_decay": 0.0, "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0},
    "maximize": False,
}

SCHEDULE_FREE_ADAMW = Row(
    name="schedule_free_adamw",
    ours=fusedopt.ScheduleFreeAdamW,
    step=schedule_free_adamw_step,
    defaults={"lr": 2.5e-3, "betas": (0.9, 0.999), "eps": 1e-8, **SCHEDULE_FREE},
    option_sets={
        "default": {},
        "warmup": {"lr": 1e-2, "warmup_steps": 7, "weight_decay": 0.1, "eps": 1e-3},
        "all": {
            **{"lr": 1e-2, "betas": (0.5, 0.4), "eps": 1e-2, "weight_decay": 0.1, "r": 0.5},
            **{"warmup_steps": 20, "weight_lr_power": 1.5, "maximize": True},
        },
    },
    state_keys=lambda options: ("z", "exp_avg_sq"),
    begins={"z": "parameter", "lr_max": 0.0, "weight_sum": 0.0},
    numbers={"lr_max": 0.3, "weight_sum": 0.7},
    never_negative=frozenset({"exp_avg_sq"}),
    takes_codes=lambda options: False,
)

SCHEDULE_FREE_SGD = Row(
    name="schedule_free_sgd",
    ours=fusedopt.ScheduleFreeSGD,
    step=schedule_free_sgd_step,
    defaults={"lr": 1.0, "momentum": 0.9, **SCHEDULE_FREE},
    option_sets={
        "default": {"lr": 0.1},
        "warmup": {"lr": 0.1, "warmup_steps": 7, "weight_decay": 0.1},
        "all": {
            **{"lr": 0.1, "momentum": 0.4, "weight_decay": 0.1, "r": 0.5, "warmup_steps": 20},
            **{"weight_lr_power": 1.5, "maximize": True},
        },
    },
    state_keys=lambda options: ("z",),
    begins={"z": "parameter", "lr_max": 0.0, "weight_sum": 0.0},
    numbers={"lr_max": 0.3, "weight_sum": 0.7},
    takes_codes=lambda options: False,
)


def muon_step(
    o: Options, step: int, first: bool, p: Array, g: Array, s: State
) -> tuple[Array, State]:
    buffer = o["momentum"] * s["momentum_buffer"] + (1 - o["momentum"]) * g
    direction = o["momentum"] * buffer + (1 - o["momentum"]) * g if o["nesterov"] else buffer
    return direction, {"momentum_buffer": buffer}


MUON = Row(
    name="muon",
    ours=fusedopt.Muon,
    step=muon_step,
    defaults={"momentum": 0.95, "nesterov": True, "maximize": False},
    option_sets={
        "default": {},
        "plain": {"nesterov": False},
        "short": {"momentum": 0.3},
        "all": {"momentum": 0.6, "nesterov": False, "maximize": True},
    },
    state_keys=lambda options: ("momentum_buffer",),
    counts_steps=False,
)
"""What is elementwise of Muon: the momentum, for which a parameter stands. Its steps have tests of
their own."""

ROWS = [
    ADAMW,
    ADAM,
    SGD,
    RMSPROP,
    LION,
    ADEMAMIX,
    ADOPT,
    ADAN,
    ADAMAX,
    ADADELTA,
    RADAM,
    ADAGRAD,
    RPROP,
    NADAM,
    ASGD,
    SCHEDULE_FREE_ADAMW,
    SCHEDULE_FREE_SGD,
    LAMB,
    LARS,
    STABLE_ADAMW,
]
