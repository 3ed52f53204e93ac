"""What the tests of torch.distributed's checkpoints share: a model, optimizers over it, and ways
to get a checkpoint and to load it."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from .optimizers import Options
from .storing import BF16, F32, F64, INT8, RANDOM, Choice, richest_with
from .training import (
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    params_of,
    set_grads,
    snapshot,
)

# How states are stored: the dtype of the parameters, and what the constructor is told.
KINDS: dict[str, tuple[torch.dtype, Options]] = {
    "default": (F32, {}),
    "flat": (F32, {"flat": True}),
    "bfloat16": (F32, {"state_dtype": BF16}),
    "int8": (F32, INT8),
    "32": (BF16, {"master_bits": 32}),
    "24-int8": (BF16, {"master_bits": 24, **INT8}),
    "random": (BF16, RANDOM),
    "flat-32-int8": (BF16, {"flat": True, "master_bits": 32, **INT8}),
}

# Every class with what is the default, and one class with every kind.
CLASSES_AND_KINDS = [
    pytest.param(case, kind, id=f"{kind}-{case}")
    for case in RICHEST
    for kind in KINDS
    if kind == "default" or case.row.name == "adamw" or (case.row.name, kind) == ("sgd", "random")
]

# What StateDictOptions may be told of plain parameters, alone and together. torch.optim loads all
# of it; full_state_dict with flatten_optimizer_state_dict it does not, nor the state of a module
# that changes names.
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "full": {"full_state_dict": True},
    "offload": {"cpu_offload": True},
    "no-frozen": {"ignore_frozen_params": True, "strict": False},
    "not-strict": {"strict": False},
    "no-prefixes": {"keep_submodule_prefixes": False},
    "modifiers": {"dsd_fqn_modifiers": "_fqn_modifiers"},
    "flatten": {"flatten_optimizer_state_dict": True},
    "full-offload": {"full_state_dict": True, "cpu_offload": True},
    "full-no-frozen": {"full_state_dict": True, "ignore_frozen_params": True, "strict": False},
    "full-not-strict": {"full_state_dict": True, "strict": False},
    "flatten-offload": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "flatten-no-frozen": {
        "flatten_optimizer_state_dict": True,
        "ignore_frozen_params": True,
        "strict": False,
    },
}


# Those that change what a checkpoint is made of, or how it gets into an optimizer.
MAIN_OPTIONS = ("nothing", "full", "offload", "flatten-offload")


class Model(nn.Module):
    """Nested, with a buffer, a scalar and a frozen part; names are not in the order of groups."""

    def __init__(self, seed: int, width: int = 33) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(9, width), nn.LayerNorm(width))
        self.head = nn.ModuleDict({"out": nn.Linear(width, 3, bias=False)})
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(2))
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            # What no checkpoint need have is the same in all models.
            frozen = torch.Generator().manual_seed(5)
            drawn = torch.randn(p.shape, generator=frozen if "frozen" in name else generator)
            p.data.copy_(drawn)


@dataclass
class Run:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Optimizer

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            set_grads([p for p in params_of(self.optimizer) if p.requires_grad], step)
            self.optimizer.step()
        self.optimizer.zero_grad()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, with the frozen part in the second."""
    params = dict(model.named_parameters())
    decayed = [p for name, p in params.items() if p.dim() > 1 and "frozen" not in name]
    rest = [p for p in params.values() if not any(p is d for d in decayed)]
    return [{"params": decayed}, {"params": rest, "lr": 0.004, "weight_decay": 0.0}]


def no_scalars(model: nn.Module) -> list[nn.Parameter]:
    """What torch puts into the states that there are: scalars it puts anywhere."""
    return [p for p in model.parameters() if p.dim()]


def start(
    cls: Callable[..., Optimizer],
    options: Options,
    dtype: torch.dtype = F32,
    seed: int = 0,
    groups: Callable[[nn.Module], Any] = groups_of,
    width: int = 33,
) -> Run:
    """A model of this dtype, as it is for a seed, and an optimizer over it."""
    model = Model(seed, width).to(dtype)
    return Run(model, cls(groups(model), **options))


def of_kind(case: Case, *kinds: str, **given: Any) -> Callable[..., Run]:
    """Makes runs that store things in the last of these ways, with options of the class that go
    with all of them."""
    richest = [richest_with(case, Choice(*KINDS[kind])) for kind in kinds]
    if None in richest:
        pytest.skip("no options of this class go with such states")
    options = min(
        (each.options for each in richest if each is not None),
        key=lambda options: bool(options.get("centered")),
    )
    dtype, storage = KINDS[kinds[-1]]
    return lambda **more: start(case.ours, {**options, **storage}, dtype, **given, **more)


def two_of(case: Case, direction: str) -> tuple[Callable[..., Run], Callable[..., Run]]:
    """Makers of runs: those of which checkpoints come, and those that load them."""

    def make(cls: Callable[..., Any]) -> Callable[..., Run]:
        return lambda **more: start(cls, {**case.options, **more.pop("also", {})}, F64, **more)

    ours, theirs = make(case.ours), make(case.counterpart)
    return (ours, theirs) if direction == "to torch" else (theirs, ours)


@contextmanager
def world_of_one(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def got(run: Run, **options: Any) -> dict[str, Any]:
    """A checkpoint of a run, its tensors copied."""
    model, optim = get_state_dict(run.model, run.optimizer, options=StateDictOptions(**options))
    return copy.deepcopy({"model": model, "optim": optim})


def put(run: Run, checkpoint: dict[str, Any], **options: Any) -> None:
    """Load a checkpoint into a run."""
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optim"],
        options=StateDictOptions(**options),
    )


def save_folder(run: Run, folder: Path, no_dist: bool = False, **options: Any) -> None:
    """Save all of a run as torch's documentation does."""
    model, optim = get_state_dict(run.model, run.optimizer, options=StateDictOptions(**options))
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder, no_dist=no_dist)


def load_folder(
    run: Run,
    folder: Path,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
    **options: Any,
) -> None:
    """Load all of a run as torch's documentation does: into the tensors that it has."""
    model, optim = get_state_dict(run.model, run.optimizer, options=StateDictOptions(**options))
    checkpoint = {"model": model, "optim": optim}
    dcp.load(checkpoint, checkpoint_id=folder, no_dist=no_dist, planner=planner)
    put(run, checkpoint, **options)


def make_states(run: Run) -> None:
    """Let torch make the states of a fresh optimizer, as all of its helpers do first."""
    get_optimizer_state_dict(run.model, run.optimizer)


def everything(run: Run) -> Any:
    """All that a refused checkpoint must leave as it was, copied."""
    return snapshot(run.optimizer), copy.deepcopy(run.model.state_dict())


def assert_left_alone(run: Run, before: Any) -> None:
    assert_unchanged(run.optimizer, before[0])
    assert_same_bits(dict(run.model.state_dict()), dict(before[1]))


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups without their parameters; torch makes lists of tuples."""
    return [
        {k: [*v] if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def assert_goes_on(resumed: Run, control: Run, steps: Iterable[int], exact: bool = True) -> None:
    """A run that was resumed is the one that was not interrupted, now and after these steps."""
    compare = assert_equal if exact else assert_close
    for more in ((), steps):
        for run in (resumed, control):
            run.train(more)
        compare(resumed.optimizer, control.optimizer, frozen=False)
    for a, b in zip(options_of(resumed.optimizer), options_of(control.optimizer), strict=True):
        for key in b:
            if isinstance(b[key], Tensor):
                assert_same_bits(a[key], b[key])
            else:
                assert a[key] == b[key]
