"""The update rules as their papers and torch's documentation write them, in float64 numpy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Array]
Options = dict[str, Any]


def adam(o: Options, step: int, first: bool, p: Array, g: Array, s: State) -> tuple[Array, State]:
    beta1, beta2 = o["betas"]
    if not o["decoupled_weight_decay"]:
        g = g + o["weight_decay"] * p
    new = {
        "exp_avg": beta1 * s["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * s["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    second = new["exp_avg_sq"]
    if o["amsgrad"]:
        second = new["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], second)
    m_hat = new["exp_avg"] / (1 - beta1**step)
    v_hat = second / (1 - beta2**step)
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    return p - o["lr"] * m_hat / (np.sqrt(v_hat) + o["eps"]), new


def sgd(o: Options, step: int, first: bool, p: Array, g: Array, s: State) -> tuple[Array, State]:
    g = g + o["weight_decay"] * p
    if o["momentum"] == 0:
        return p - o["lr"] * g, {}
    buffer = o["momentum"] * s["momentum_buffer"] + (1 - o["dampening"]) * g
    if first:
        buffer = g
    change = g + o["momentum"] * buffer if o["nesterov"] else buffer
    return p - o["lr"] * change, {"momentum_buffer": buffer}


def rmsprop(
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


@dataclass(frozen=True)
class Rule:
    update: Callable[[Options, int, bool, Array, Array, State], tuple[Array, State]]
    defaults: Options
    options: list[Options]  # each is tried with the defaults for what it leaves open

    def all_options(self) -> Iterator[Options]:
        for changed in self.options:
            yield self.defaults | changed


# lr and eps are large, so that whatever goes wrong with them is far above rounding. Weights of an
# average on both sides of 0.5 take different forms in the core.
ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.05, "weight_decay": 0.0}
ADAM |= {"decoupled_weight_decay": False, "amsgrad": False, "maximize": False}
ADAM_OPTIONS: list[Options] = [
    {},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "decoupled_weight_decay": True},
    {"maximize": True, "betas": (0.0, 0.4)},
]
SGD = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
SGD |= {"nesterov": False, "maximize": False}
RMSPROP = {"lr": 0.1, "alpha": 0.9, "eps": 0.05, "weight_decay": 0.0, "momentum": 0.0}
RMSPROP |= {"centered": False, "maximize": False, "eps_inside_sqrt": False}

RULES = {
    "adam": Rule(adam, ADAM, [o | {"amsgrad": a} for o in ADAM_OPTIONS for a in (False, True)]),
    "sgd": Rule(
        sgd,
        SGD,
        [
            *({}, {"weight_decay": 0.3}, {"maximize": True}, {"momentum": 0.9}),
            {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.3},
            {"momentum": 0.4, "nesterov": True},
        ],
    ),
    "rmsprop": Rule(
        rmsprop,
        RMSPROP,
        [
            o | {"momentum": momentum, "centered": centered}
            for o in ({}, {"weight_decay": 0.3, "alpha": 0.4}, {"eps_inside_sqrt": True})
            for momentum in (0.0, 0.9)
            for centered in (False, True)
        ]
        + [{"maximize": True, "momentum": 0.4}],
    ),
}
