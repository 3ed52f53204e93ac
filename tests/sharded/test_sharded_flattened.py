"""Shards that are plain tensors: FSDP1's flat parameters and ZeroRedundancyOptimizer's parts."""

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Trial, check
from support.training import assert_same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.optim import ZeroRedundancyOptimizer

import fusedopt


def model_of(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 3))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return model


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
    dtype = next(model.parameters()).dtype
    model(x.to(dtype)).float().square().mean().backward()


def fsdp1(use_orig_params: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = model_of().to(dtype)
    return FSDP(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def refused_without_a_group() -> None:
    model = fsdp1(False)
    with pytest.raises(ValueError, match=r"AdamW: max_grad_norm with parameters that Fully"):
        fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)
    optimizer = fusedopt.AdamW(model.parameters())
    with pytest.raises(ValueError, match="norm_group"):
        optimizer.max_grad_norm = 1.0


def clipped_as_a_whole() -> None:
    """By the norm of all ranks' gradients."""
    model, plain = fsdp1(False), model_of()
    ours = fusedopt.AdamW(
        model.parameters(), lr=0.01, max_grad_norm=0.1, norm_group=dist.group.WORLD
    )
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        backward(model, step)
        backward(plain, step)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            whole = model.state_dict()
    assert whole.keys() == plain.state_dict().keys()
    for name, q in plain.state_dict().items():
        torch.testing.assert_close(whole[name], q, rtol=1e-5, atol=1e-6)
    other = copy.deepcopy(ours)
    assert other._norm_group is ours._norm_group
    with pytest.raises(TypeError, match="norm_group= cannot be pickled"):
        pickle.dumps(ours)


def measured_as_a_whole(cls: Any, options: dict[str, Any]) -> None:
    """By the norms of whole parameters, of which a rank may have none."""
    model, plain = fsdp1(True), model_of()
    ours = cls(model.parameters(), lr=0.01, norm_group=dist.group.WORLD, **options)
    theirs = cls(plain.parameters(), lr=0.01, **options)
    for step in range(3):
        for each, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            backward(each, step)
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            whole = model.state_dict()
    for name, q in plain.state_dict().items():
        torch.testing.assert_close(whole[name], q, rtol=1e-5, atol=1e-6)


def not_measured_in_part() -> None:
    joined, views = fsdp1(False), fsdp1(True)
    for model, group, match in (
        (joined, dist.group.WORLD, "use_orig_params=True"),
        (views, None, "norm_group="),
    ):
        optimizer = fusedopt.LAMB(model.parameters(), norm_group=group)
        backward(model, 0)
        with pytest.raises(ValueError, match=rf"LAMB measures each parameter .*{match}"):
            optimizer.step()


def trained(cls: Any, orig: bool, **options: Any) -> tuple[nn.Module, Any]:
    dtype = torch.bfloat16 if "master_bits" in options else torch.float32
    model = fsdp1(orig, dtype)
    optimizer = cls(model.parameters(), lr=0.01, **options)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return model, optimizer


def restored(cls: Any, orig: bool, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The states of each parameter, and what optim_state_dict and its loading make of them."""
    model, optimizer = trained(cls, orig, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FSDP.set_state_dict_type(
            model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )
        gathered = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
        resumed = cls(model.parameters(), lr=0.01, **options)
        resumed.load_state_dict(FSDP.optim_state_dict_to_load(model, resumed, gathered))
    both = []
    for p in model.parameters():
        both += [dict(sorted(each.state[p].items())) for each in (optimizer, resumed)]
    return both


def fsdp1_state(orig: bool) -> None:
    """With use_orig_params torch's own moments come back changed: ours do likewise."""
    ours = restored(fusedopt.AdamW, orig)
    if not orig:
        assert_same_bits(ours[0], ours[1])
    for mine, theirs in zip(ours, restored(torch.optim.AdamW, orig), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def fsdp1_stored(orig: bool, options: dict[str, Any]) -> None:
    """Whole flat parameters come back bit for bit; of views, torch changes moments."""
    states = restored(fusedopt.AdamW, orig, **options)
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
        if not orig:
            assert_same_bits(before, after)
            continue
        theirs = restored(torch.optim.AdamW, orig)
        for mine, reference in zip(states, theirs, strict=True):
            for key, value in reference.items():
                close = {"rtol": 0.05, "atol": 1e-4}  # of bfloat16 states, after two steps
                torch.testing.assert_close(mine[key].to(value.dtype), value, **close)


def assert_refused(model: nn.Module, optimizer: Any, option: str) -> None:
    """By each of torch's ways, and on each rank before it does anything."""
    message = rf"AdamW: parameter group 0: states with {option} cannot .* fully_shard"
    for kind in (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FSDP.state_dict_type(model, kind), pytest.raises(TypeError, match=message):
                FSDP.optim_state_dict(model, optimizer)
            with FSDP.state_dict_type(model, kind), pytest.raises(TypeError, match=message):
                get_optimizer_state_dict(model, optimizer)


def fsdp1_refused(orig: bool, option: str, options: dict[str, Any]) -> None:
    """But each rank may save its own."""
    model, optimizer = trained(fusedopt.AdamW, orig, **options)
    assert_refused(model, optimizer, option)
    resumed = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        assert_same_bits(dict(optimizer.state[p]), dict(resumed.state[p]))


def refused_where_only_one_rank_has_codes() -> None:
    """The others' parts of the parameters are too small for them."""
    layers = [nn.Linear(100, 100), *(nn.Linear(5, 5) for _ in range(400))]
    model = FSDP(nn.ModuleList(layers), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = fusedopt.AdamW(model.parameters(), state_dtype="int8")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    have = any("exp_avg_code" in values for values in optimizer.state.values())
    assert have == (dist.get_rank() == 0)
    assert_refused(model, optimizer, 'state_dtype="int8"')


def zero_redundancy(options: dict[str, Any], cls: Any = fusedopt.AdamW) -> None:
    """Each rank steps a part of the parameters and sends them to the others."""
    dtype = torch.bfloat16 if "master_bits" in options else torch.float32
    model, plain = model_of().to(dtype), model_of().to(dtype)
    ours = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=0.01, **options)
    alone = cls(plain.parameters(), lr=0.01, **options)
    for step in range(3):
        for each, optimizer in ((model, ours), (plain, alone)):
            optimizer.zero_grad()
            backward(each, step)
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    ours.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        states = ours.state_dict()["state"]
        for number, q in enumerate(plain.parameters()):
            assert_same_bits(dict(states[number]), dict(alone.state[q]))


MEASURED: list[tuple[Any, dict[str, Any]]] = [
    (fusedopt.LAMB, {"weight_decay": 0.1}),
    (fusedopt.StableAdamW, {}),
    (fusedopt.AdamW, {"cautious": True}),
]
STORED: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8", "min_8bit_size": 0},
    "masters32": {"master_bits": 32},
    "masters24": {"master_bits": 24},
}
# What FSDP1's functions cannot take, with use_orig_params or without.
REFUSED = {
    (False, "int8"): 'state_dtype="int8"',
    (False, "masters24"): "master_bits=24",
    (True, "int8"): 'state_dtype="int8"',
    (True, "masters24"): "master_bits=24",
    (True, "masters32"): "master_bits=32",
}


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {
        "refused": refused_without_a_group,
        "clipped": clipped_as_a_whole,
        "not-measured-in-part": not_measured_in_part,
        "codes-on-one-rank": refused_where_only_one_rank_has_codes,
    }
    for cls, options in MEASURED:
        each[f"measured-{cls.__name__}"] = functools.partial(measured_as_a_whole, cls, options)
        each[f"zero-{cls.__name__}"] = functools.partial(zero_redundancy, options, cls)
    for orig in (False, True):
        each[f"fsdp1-orig={orig}"] = functools.partial(fsdp1_state, orig)
        for name, options in STORED.items():
            option = REFUSED.get((orig, name))
            each[f"fsdp1-orig={orig}-{name}"] = (
                functools.partial(fsdp1_stored, orig, options)
                if option is None
                else functools.partial(fsdp1_refused, orig, option, options)
            )
    for name, options in STORED.items():
        each[f"zero-{name}"] = functools.partial(zero_redundancy, options)
    return each


def test_flattened() -> None:
    check(__file__, 2)
