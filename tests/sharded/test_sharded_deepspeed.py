"""DeepSpeed's ZeRO with fusedopt as the client optimizer: the bits of an optimizer over the same
parts. `make test-all` installs DeepSpeed, which is a matter of minutes."""

import functools
import importlib.util
import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Trial, check
from torch import Tensor, nn

import fusedopt

PAGE = Path(__file__).parents[2] / "docs" / "offloading.md"
INT8 = {"state_dtype": "int8", "min_8bit_size": 0}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "int8": INT8,
    "bfloat16_states": {"state_dtype": torch.bfloat16},
}
# What counts where DeepSpeed leaves its own float32 weights out.
OF_BFLOAT16: dict[str, dict[str, Any]] = {
    "masters": {"master_bits": 32},
    "masters_int8": {"master_bits": 24, **INT8},
    "stochastic": {"rounding": "stochastic"},
}


def model_of(dtype: torch.dtype = torch.float32, width: int = 64) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 16))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model.to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(x.to(dtype)).float().square().mean()
    return loss


def config_of(stage: int, offload: bool, **more: Any) -> dict[str, Any]:
    """What the documentation says that it should be."""
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)
    config: dict[str, Any] = json.loads(text)
    config["zero_optimization"]["stage"] = stage
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return {**config, "gradient_clipping": 0, **more}


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step, dtype))
        engine.step()


def whole(engine: Any) -> list[Tensor]:
    """The weights, gathered where they are in parts."""
    import deepspeed

    params = [*engine.module.parameters()]
    if not hasattr(params[0], "ds_id"):
        return [p.detach().clone() for p in params]
    with deepspeed.zero.GatheredParameters(params):
        return [p.detach().clone() for p in params]


class Parts:
    """What each rank's optimizer steps, stepped here for all of them: parts of a flat model."""

    def __init__(self, stage: int, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
        self.model = model_of(dtype)
        self.stage, self.world = stage, dist.get_world_size()
        self.params = [*self.model.parameters()]
        self.parts = [nn.Parameter(part) for part in self._cut([p.detach() for p in self.params])]
        # Each rank counts steps, and draws, for itself.
        self.optimizers = [fusedopt.AdamW([part], lr=0.01, **options) for part in self.parts]

    def _cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """For each rank: all of one buffer's part, or of every tensor a part."""
        if self.stage == 3:
            chunks = [t.flatten().chunk(self.world) for t in tensors]
            return [torch.cat([c[rank] for c in chunks]) for rank in range(self.world)]
        return [
            part.clone() for part in torch.cat([t.flatten() for t in tensors]).chunk(self.world)
        ]

    def train(self, steps: range, dtype: torch.dtype) -> None:
        for step in steps:
            grads = torch.autograd.grad(loss_of(self.model, step, dtype), self.params)
            for part, grad in zip(self.parts, self._cut([*grads]), strict=True):
                part.grad = grad
            for optimizer in self.optimizers:
                optimizer.step()
            self._put_together()

    def _put_together(self) -> None:
        with torch.no_grad():
            if self.stage == 3:
                sizes = [p.numel() // self.world for p in self.params]
                split = [part.split(sizes) for part in self.parts]
                for i, p in enumerate(self.params):
                    p.copy_(torch.cat([of_rank[i] for of_rank in split]).view_as(p))
                return
            flat = torch.cat([*self.parts])
            for p, values in zip(
                self.params, flat.split([p.numel() for p in self.params]), strict=True
            ):
                p.copy_(values.view_as(p))


def same_bits(stage: int, offload: bool, options: Mapping[str, Any]) -> None:
    model = model_of()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
    engine = engine_of(model, optimizer, config_of(stage, offload))
    train(engine, range(5))
    if stage == 0:
        plain = model_of()
        alone = fusedopt.AdamW(plain.parameters(), lr=0.01, **options)
        for step in range(5):
            alone.zero_grad()
            loss_of(plain, step).backward()
            alone.step()
        expected = [*plain.parameters()]
    else:
        parts = Parts(stage, torch.float32, options)
        parts.train(range(5), torch.float32)
        expected = parts.params
    for p, q in zip(whole(engine), expected, strict=True):
        assert torch.equal(p, q)


# DeepSpeed's own float32 weights and states are left out.
ALL_BFLOAT16 = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}


def same_bits_of_bfloat16(stage: int, options: Mapping[str, Any]) -> None:
    """The weights that count are the masters here."""
    model = model_of(torch.bfloat16)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
    engine = engine_of(model, optimizer, config_of(stage, False, **ALL_BFLOAT16))
    train(engine, range(5), torch.bfloat16)
    parts = Parts(stage, torch.bfloat16, options)
    parts.train(range(5), torch.bfloat16)
    for p, q in zip(whole(engine), parts.params, strict=True):
        assert torch.equal(p, q)


def in_two_groups(stage: int, offload: bool) -> None:
    """As torch's, each with options of its own; parts do not end where parameters do."""
    weights = []
    for package in (fusedopt, torch.optim):
        model = model_of(width=61)
        first, second = [*model[0].parameters()], [*model[2].parameters()]
        groups = [{"params": first, "weight_decay": 0.1}, {"params": second, "lr": 0.001}]
        engine = engine_of(model, package.AdamW(groups, lr=0.01), config_of(stage, offload))
        train(engine, range(5))
        weights.append(whole(engine))
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def mixed_precision(stage: int, offload: bool) -> None:
    """DeepSpeed's float32 weights of a bfloat16 model."""
    weights = []
    for package in (fusedopt, torch.optim):
        model = model_of(torch.bfloat16)
        optimizer = package.AdamW(model.parameters(), lr=0.01)
        engine = engine_of(model, optimizer, config_of(stage, offload, bf16={"enabled": True}))
        train(engine, range(5), torch.bfloat16)
        assert {p.dtype for p in optimizer.state} == {torch.float32}
        weights.append(whole(engine))
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q, rtol=0.01, atol=1e-5)


def as_documented() -> None:
    """The lines of the page, and a step."""
    import deepspeed

    (lines,) = re.findall(r"```python needs deepspeed\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {"fusedopt": fusedopt, "deepspeed": deepspeed, "model": model_of()}
    names["config"] = config_of(2, True)
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(lines, names)
    train(names["engine"], range(1))
    assert not any(map(torch.equal, before, whole(names["engine"])))


def resumed(stage: int, offload: bool, options: Mapping[str, Any], dtype: torch.dtype) -> None:
    """As one that went on; parts do not end where parameters do."""
    more = {} if dtype == torch.float32 else ALL_BFLOAT16

    def make() -> Any:
        model = model_of(dtype, width=61)
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
        return engine_of(model, optimizer, config_of(stage, offload, **more))

    with tempfile.TemporaryDirectory() as mine:
        folders = [mine]
        dist.broadcast_object_list(folders)
        first, second = make(), make()
        train(first, range(2), dtype)
        first.save_checkpoint(folders[0], tag="two")
        train(first, range(2, 5), dtype)
        second.load_checkpoint(folders[0], tag="two")
        dist.barrier()
    train(second, range(2, 5), dtype)
    for p, q in zip(whole(first), whole(second), strict=True):
        assert torch.equal(p, q)


def clipped_by_deepspeed(stage: int, offload: bool) -> None:
    model, plain = model_of(), model_of()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    engine = engine_of(model, optimizer, config_of(stage, offload, gradient_clipping=0.01))
    train(engine, range(4))
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(4):
        theirs.zero_grad()
        loss_of(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        theirs.step()
    for p, q in zip(whole(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


def clipped_by_norm_group(stage: int) -> None:
    """One group of parameters is stepped at once."""
    model, plain = model_of(), model_of()
    optimizer = fusedopt.AdamW(
        model.parameters(), lr=0.01, max_grad_norm=0.01, norm_group=dist.group.WORLD
    )
    engine = engine_of(model, optimizer, config_of(stage, False))
    theirs = fusedopt.AdamW(plain.parameters(), lr=0.01, max_grad_norm=0.01)
    for step in range(4):
        train(engine, range(step, step + 1))
        theirs.zero_grad()
        loss_of(plain, step).backward()
        theirs.step()
        torch.testing.assert_close(optimizer.grad_norm, theirs.grad_norm)
    for p, q in zip(whole(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


def clipping_of_stage_3_is_refused() -> None:
    """It steps parts of the parameters, one after the other."""
    model = model_of()
    optimizer = fusedopt.AdamW(
        model.parameters(), lr=0.01, max_grad_norm=1.0, norm_group=dist.group.WORLD
    )
    engine = engine_of(model, optimizer, config_of(3, False))
    before = whole(engine)
    engine.backward(loss_of(engine, 0))
    with pytest.raises(ValueError, match="gradient_clipping"):
        engine.step()
    for p, q in zip(before, whole(engine), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="gradient_clipping"):
        fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)


def trials(world: int) -> dict[str, Trial]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    # Once for all ranks, and by the tests' processes only.
    import deepspeed

    # Its own operations on shared memory are compiled for minutes; gloo's do, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Trial] = {}
    stages = [(0, False), *itertools.product((1, 2, 3), (False, True))]
    for (stage, offload), (choice, options) in itertools.product(stages, CHOICES.items()):
        name = f"{stage}-{'offloaded' if offload else 'there'}-{choice}"
        found[f"bits-{name}"] = functools.partial(same_bits, stage, offload, options)
        found[f"resumed-{name}"] = functools.partial(
            resumed, stage, offload, options, torch.float32
        )
    for stage, (choice, options) in itertools.product((1, 2, 3), OF_BFLOAT16.items()):
        name = f"{stage}-bfloat16-{choice}"
        found[f"bits-{name}"] = functools.partial(same_bits_of_bfloat16, stage, options)
        found[f"resumed-{name}"] = functools.partial(resumed, stage, False, options, torch.bfloat16)
    for stage, offload in stages:
        name = f"clipped-{stage}-{'offloaded' if offload else 'there'}"
        found[name] = functools.partial(clipped_by_deepspeed, stage, offload)
    for stage in (1, 2):
        found[f"clipped-{stage}-norm_group"] = functools.partial(clipped_by_norm_group, stage)
    for stage, offload in stages[1:]:
        name = f"{stage}-{'offloaded' if offload else 'there'}"
        found[f"mixed-{name}"] = functools.partial(mixed_precision, stage, offload)
        found[f"groups-{name}"] = functools.partial(in_two_groups, stage, offload)
    found["other-refused"] = clipping_of_stage_3_is_refused
    found["other-as_documented"] = as_documented
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
@pytest.mark.parametrize("among", ["bits", "resumed", "mixed", "groups", "clipped", "other"])
def test_zero(among: str) -> None:
    check(__file__, 2, among)
