"""Optimizers that torch.optim has no class for: the same results as those of packages that have."""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Not in .venv, which no other test needs them in. What they need themselves is there.
REQUIREMENTS = (
    "adan-pytorch==0.1.0",
    "lion-pytorch==0.2.5",
    "pytorch-optimizer==4.1.0",
    "schedulefree==1.4.1",
    "timm==1.0.31",
    "torch-optimi==0.3.3",
)
MODULES = ("adan_pytorch", "lion_pytorch", "optimi", "pytorch_optimizer", "schedulefree", "timm")
FOLDER = Path(__file__).parents[2] / "build" / "packages" / "_".join(REQUIREMENTS)

# No scalars: pytorch-optimizer cannot clip their gradients.
SHAPES = ((1,), (7,), (33, 5), (2, 3, 4), (1025,))
STEPS = 20

Options = dict[str, Any]


def install() -> None:
    """Fills the folder, all at once, so that one that is there is complete."""
    if FOLDER.exists():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:
        new = Path(temporary) / "new"
        result = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
            + ["--retries", "1", "--no-deps", "--target", str(new), *REQUIREMENTS],
            text=True,
            capture_output=True,
        )
        if result.returncode != 0:
            pytest.skip(f"pip: {result.stderr.strip().splitlines()[-1]}")
        new.rename(FOLDER)


def imported() -> list[str]:
    """The modules of these packages that Python has loaded."""
    return [name for name in sys.modules if name.partition(".")[0] in MODULES]


@pytest.fixture(scope="module")
def packages() -> Iterator[None]:
    """They can be imported. Later tests find what they would have found without."""
    install()
    with pytest.MonkeyPatch.context() as patch:
        for name in imported():  # maybe of another version
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(FOLDER)
        # All of timm needs torchvision, its optimizers do not.
        for name in ("timm", "timm.optim"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(FOLDER.joinpath(*name.split(".")))]
        yield
        for name in imported():
            del sys.modules[name]


def as_they_are(options: Options) -> Options:
    return options


@dataclass(frozen=True)
class Pair:
    """Ours, theirs, and what both are compared with."""

    ours: Callable[..., torch.optim.Optimizer]
    package: str
    settings: dict[str, Options]  # our options
    theirs: Callable[[Options], Options] = as_they_are  # the same for theirs
    first: Options = field(default_factory=dict)  # what their group has in the first step
    first_gradient: float = 1.0  # what the first gradient is multiplied by
    most: float = 1e-12  # the largest difference, as a part of the way that a parameter went
    their_name: str | None = None  # None: that of ours
    averages: bool = False  # train() before, and eval() and train() after half of the steps


LION_SETTINGS: dict[str, Options] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "short-memory-decay": {"betas": (0.4, 0.3), "weight_decay": 0.5},
}

ADEMAMIX_SETTINGS: dict[str, Options] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "short-memory-decay": {
        **{"betas": (0.4, 0.95, 0.8), "alpha": 8.0, "eps": 1e-3, "weight_decay": 0.1},
    },
    # Warm-ups that end within the steps, and that do not.
    "short-warmup": {"alpha_warmup": 8, "beta3_warmup": 8},
    "long-warmup": {"alpha_warmup": 90, "beta3_warmup": 90, "weight_decay": 0.1},
}

ADOPT_SETTINGS: dict[str, Options] = {
    "default": {},
    "no-clip": {"clip": False, "eps": 0.1},
    "coupled-decay": {"weight_decay": 0.1},
    "coupled-decay-no-clip": {"weight_decay": 0.1, "clip": False, "betas": (0.8, 0.95)},
    "decoupled-decay": {"weight_decay": 0.1, "decouple": True},
    "short-memory-decoupled-decay": {"betas": (0.4, 0.3), "weight_decay": 0.5, "decouple": True},
}

ADAN_SETTINGS: dict[str, Options] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "short-memory-decay": {"betas": (0.4, 0.3, 0.45), "eps": 1e-3, "weight_decay": 0.5},
}

ADAN_DECOUPLED: dict[str, Options] = {
    "decoupled-decay": {"weight_decay": 0.1, "no_prox": True},
    "short-memory-decoupled-decay": {
        **{"betas": (0.4, 0.3, 0.45), "eps": 1e-3, "weight_decay": 0.5, "no_prox": True},
    },
}

# Theirs adds eps to the norm of the gradients, ours 1e-6, as torch.nn.utils.clip_grad_norm_ does.
ADAN_CLIPPED: dict[str, Options] = {
    "clipping": {"max_grad_norm": 3.0, "eps": 1e-6},
    "clipping-decay": {"max_grad_norm": 30.0, "eps": 1e-6, "weight_decay": 0.1},
}


def ademamix_of_pytorch_optimizer(options: Options) -> Options:
    theirs = {key: value for key, value in options.items() if not key.endswith("_warmup")}
    theirs.setdefault("alpha", 2.0)  # theirs by itself is 5
    return theirs | {"weight_decouple": True, "t_alpha_beta3": options.get("alpha_warmup")}


def adopt_of_pytorch_optimizer(options: Options) -> Options:
    theirs = {key: value for key, value in options.items() if key not in ("clip", "decouple")}
    # Theirs is given the number of this step; the authors' code, and ours, take that of the last.
    clip = (lambda step: (step - 1) ** 0.25) if options.get("clip", True) else None
    return theirs | {"weight_decouple": options.get("decouple", False), "clip_lambda": clip}


def adan_of_pytorch_optimizer(options: Options) -> Options:
    theirs = {key: value for key, value in options.items() if key != "no_prox"}
    return theirs | {"weight_decouple": options.get("no_prox", False)}


def adan_of_optimi(options: Options) -> Options:
    return {"eps": 1e-8, "weight_decay": 0.0} | options  # theirs by themselves are others


def adan_of_adan_pytorch(options: Options) -> Options:
    betas = options.get("betas", (0.98, 0.92, 0.99))
    return options | {"betas": tuple(1 - beta for beta in betas)}


LAMB_SETTINGS: dict[str, Options] = {
    "default": {},
    "no-decay": {"weight_decay": 0.0},
    "always-adapt": {"weight_decay": 0.0, "always_adapt": True},
    "short-memory-decay": {"betas": (0.4, 0.3), "eps": 1e-3, "weight_decay": 0.5},
}

LARS_SETTINGS: dict[str, Options] = {
    "no-decay": {},
    "decay": {"weight_decay": 0.1, "trust_coefficient": 0.01},
    "always-adapt-nesterov": {"always_adapt": True, "momentum": 0.5, "nesterov": True},
}

STABLE_ADAMW_SETTINGS: dict[str, Options] = {
    "default": {},
    "long-memory": {"betas": (0.9, 0.999), "weight_decay": 0.1},
    "short-memory": {"betas": (0.4, 0.3), "eps": 1e-3, "weight_decay": 0.0},
}

CAUTIOUS: dict[str, Options] = {
    "cautious": {"weight_decay": 0.1, "cautious": True},
    "cautious-short-memory": {"betas": (0.6, 0.9), "weight_decay": 0.0, "cautious": True},
}


def lars_of_timm(options: Options) -> Options:
    theirs = {"momentum": 0.9} | options
    if "trust_coefficient" in theirs:
        theirs["trust_coeff"] = theirs.pop("trust_coefficient")
    return theirs


def cautious_of_timm(options: Options) -> Options:
    theirs = {key: value for key, value in options.items() if key != "cautious"}
    return theirs | {"caution": options["cautious"]}


SCHEDULE_FREE: dict[str, Options] = {
    "default": {},
    "warmup": {"warmup_steps": 7, "weight_decay": 0.1},
    "weights": {"warmup_steps": 30, "weight_decay": 0.01, "r": 0.5, "weight_lr_power": 1.5},
}

PAIRS = [
    Pair(fusedopt.Lion, "lion_pytorch", LION_SETTINGS),
    Pair(fusedopt.Lion, "pytorch_optimizer", LION_SETTINGS),
    Pair(fusedopt.Lion, "optimi", LION_SETTINGS, lambda o: {"weight_decay": 0.0} | o),
    Pair(fusedopt.AdEMAMix, "pytorch_optimizer", ADEMAMIX_SETTINGS, ademamix_of_pytorch_optimizer),
    # Decoupled decay begins with their first step; with the authors' code, and ours, the second.
    Pair(
        fusedopt.ADOPT,
        "pytorch_optimizer",
        {key: value for key, value in ADOPT_SETTINGS.items() if not value.get("decouple")},
        adopt_of_pytorch_optimizer,
    ),
    Pair(
        fusedopt.ADOPT,
        "pytorch_optimizer",
        {key: value for key, value in ADOPT_SETTINGS.items() if value.get("decouple")},
        adopt_of_pytorch_optimizer,
        first={"weight_decay": 0.0},
    ),
    # Its first step leaves the averages alone: the same as ours only for gradients of zero.
    Pair(fusedopt.Adan, "adan_pytorch", ADAN_SETTINGS, adan_of_adan_pytorch, first_gradient=0.0),
    Pair(
        fusedopt.Adan,
        "pytorch_optimizer",
        ADAN_SETTINGS | ADAN_DECOUPLED,
        adan_of_pytorch_optimizer,
    ),
    # The norm of the gradients is float32 there, whatever they are.
    Pair(fusedopt.Adan, "pytorch_optimizer", ADAN_CLIPPED, adan_of_pytorch_optimizer, most=1e-6),
    # Their sums of weights are float64, ours float32.
    Pair(
        fusedopt.ScheduleFreeAdamW,
        "schedulefree",
        SCHEDULE_FREE | {"short-memory": {"betas": (0.6, 0.4), "eps": 1e-3}},
        most=1e-6,
        their_name="AdamWScheduleFree",
        averages=True,
    ),
    Pair(
        fusedopt.ScheduleFreeSGD,
        "schedulefree",
        SCHEDULE_FREE | {"short-memory": {"momentum": 0.3}},
        most=1e-6,
        their_name="SGDScheduleFree",
        averages=True,
    ),
    Pair(
        fusedopt.LAMB,
        "timm.optim.lamb",
        LAMB_SETTINGS,
        lambda o: o | {"max_grad_norm": None},
        their_name="Lamb",
    ),
    Pair(fusedopt.LARS, "timm.optim.lars", LARS_SETTINGS, lars_of_timm, their_name="Lars"),
    Pair(fusedopt.StableAdamW, "optimi", STABLE_ADAMW_SETTINGS),
    Pair(
        fusedopt.AdamW,
        "timm.optim.adamw",
        CAUTIOUS,
        cautious_of_timm,
        their_name="AdamWLegacy",
    ),
    Pair(fusedopt.Lion, "timm.optim.lion", CAUTIOUS, cautious_of_timm),
    # Not with no_prox: adam_wd should be the same, but their step does not hand it on.
    Pair(fusedopt.Adan, "optimi", ADAN_SETTINGS, adan_of_optimi),
]

CASES = [
    pytest.param(pair, options, id=f"{pair.ours.__name__}-{pair.package}-{name}")
    for pair in PAIRS
    for name, options in pair.settings.items()
]


def trained(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    start: list[Tensor],
    gradients: list[list[Tensor]],
    first: Options,
    averages: bool,
) -> list[Tensor]:
    """What parameters become, with options of their group that are for the first step only."""
    params = [value.clone().requires_grad_() for value in start]
    stepped = optimizer(params)
    (group,) = stepped.param_groups
    usual = {key: group[key] for key in first}
    group |= first
    found: list[Tensor] = []
    for number, now in enumerate(gradients):
        if averages and number == 0:
            stepped.train()
        if averages and number == STEPS // 2:
            stepped.eval()
            found = [param.detach().clone() for param in params]
            stepped.train()
        for param, gradient in zip(params, now, strict=True):
            param.grad = gradient.clone()  # some write into it
        stepped.step()
        group |= usual
    return found + [param.detach() for param in params]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("pair, options", CASES)
def test_agrees(pair: Pair, options: Options) -> None:
    options = {"lr": 1e-2} | options
    package = importlib.import_module(pair.package)
    assert FOLDER in Path(package.__file__ or "").parents  # not what else may be installed
    their_class = getattr(package, pair.their_name or pair.ours.__name__)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    # Of many lengths, so that some are clipped and some are not.
    gradients = [[torch.randn_like(p) * torch.randn(()).exp() for p in start] for _ in range(STEPS)]
    gradients[0] = [pair.first_gradient * gradient for gradient in gradients[0]]

    ours = trained(lambda params: pair.ours(params, **options), start, gradients, {}, pair.averages)
    their_options = pair.theirs(options)
    theirs = trained(
        lambda params: their_class(params, **their_options),
        start,
        gradients,
        pair.first,
        pair.averages,
    )
    differences = [
        float((a - b).abs().max() / (b - before).abs().max())
        for a, b, before in zip(ours, theirs, start * (1 + pair.averages), strict=True)
    ]
    assert max(differences) <= pair.most
