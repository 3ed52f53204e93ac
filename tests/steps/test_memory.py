"""What a step allocates, and what an optimizer keeps alive: nothing that it should not."""

import copy
import gc
import resource
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.storing import CHOICES, Choice, every_pair
from support.storing import SHAPES as BLOCKS
from support.training import RICHEST, Case, assert_equal, make_params, params_of, set_grads, train
from torch import nn

import fusedopt
from fusedopt._formats import NUMBERS

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def allocated(step: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator gives out meanwhile, whether or not it gets them back."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    # events() nets what an operator took against what it gave back.
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events()]
    return sum(size for size in sizes if size > 0)


def test_the_measurement() -> None:
    assert allocated(lambda: torch.empty(1000)) >= 4000
    theirs = torch.optim.AdamW(make_params())
    train(theirs, [0])
    assert allocated(theirs.step) > 0


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ["plain", "flat", "channels_last", "tensor lr"])
def test_a_step_allocates_nothing(case: Case, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {**case.options, "flat": kind == "flat"}
    if kind == "tensor lr":
        options["lr"] = torch.tensor(0.1)
    params = make_params(dtype, shapes=((33, 7), (), (3, 4, 5, 6)))
    if kind == "channels_last":
        params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:]}], **options)
    for step in range(2):
        if kind != "flat":
            set_grads(params, step)
        optimizer.step()
    # Another gradient at another address, as after every backward.
    if kind != "flat":
        set_grads(params, 2)
    assert allocated(optimizer.step) == 0
    if kind == "flat":
        assert allocated(optimizer.zero_grad) == 0


@every_pair
def test_a_step_with_any_storage_allocates_nothing(case: Case, choice: Choice) -> None:
    """Neither for codes and masters, nor where somebody has changed the weights."""
    optimizer = case.ours(choice.params(BLOCKS), **case.options, **choice.options)
    train(optimizer, range(2))
    set_grads(params_of(optimizer), 2)
    assert allocated(optimizer.step) == 0
    with torch.no_grad():
        params_of(optimizer)[0].mul_(2)
    assert allocated(optimizer.step) == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("float32-int8", 2 * (1 + 4 / 256)),
        ("float32-bfloat16", 2 * 2),
        ("bfloat16-32", 2 * 4 + 2),
        ("bfloat16-24", 2 * 4 + 1),
        ("bfloat16-24-int8", 2 * (1 + 4 / 256) + 1),
        ("bfloat16-random-int8", 2 * (1 + 4 / 256)),
        ("float16-32", 3 * 4),
    ],
)
def test_bytes_of_a_state(name: str, size: float) -> None:
    """As many per element as are promised; and the first step allocates little more."""
    choice, count = CHOICES[name], 1 << 18
    optimizer = fusedopt.AdamW(choice.params([(count,)]), **choice.options)
    set_grads(params_of(optimizer), 0)
    first = allocated(optimizer.step)
    values = optimizer.state[params_of(optimizer)[0]].values()
    assert sum(v.untyped_storage().nbytes() for v in values) - 256 <= size * count <= first
    assert first <= size * count + 20_000


def test_a_skipped_step_allocates_nothing() -> None:
    optimizer = fusedopt.AdamW(make_params())
    set_grads(params_of(optimizer), 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    assert allocated(optimizer.step) == 0


@every_class
def test_first_step_allocates_the_state_and_little_more(case: Case) -> None:
    """No second copy on the way."""
    optimizer = case.ours(make_params(shapes=((1000,),) * 30), **case.options)
    set_grads(params_of(optimizer), 0)
    size = allocated(optimizer.step)
    states = [
        s for p in params_of(optimizer) for k, s in optimizer.state[p].items() if k not in NUMBERS
    ]
    assert size < sum(-(-s.numel() // 64) * 256 for s in states) + 10_000


def test_thousands_of_steps_leave_nothing_behind() -> None:
    """Neither Python objects nor memory of the compiled module."""
    optimizer = fusedopt.AdamW(
        [{"params": [p]} for p in make_params(shapes=((20,),) * 50)], lr=torch.tensor(0.1)
    )
    params = params_of(optimizer)

    def steps(count: int) -> None:
        for _ in range(count):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()

    steps(50)
    gc.collect()
    tracemalloc.start()
    steps(20)
    before = tracemalloc.get_traced_memory()[0]
    steps(100)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(2000)
    # 100,000 parameters were stepped: a leak of 200 bytes each would be 20 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 12_000  # KiB


def test_new_plans_leave_nothing_behind() -> None:
    """A plan is made anew whenever something moves."""
    optimizer = fusedopt.AdamW(make_params(shapes=((2000,),) * 20))
    train(optimizer, [0])

    def steps(count: int) -> None:
        for _ in range(count):
            for p in params_of(optimizer):
                p.data = p.data.clone()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()

    steps(10)
    gc.collect()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(60)
    # The state is 320 KB: kept each time, it would be 19 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 8000


# -- what dies --------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
@pytest.mark.parametrize("steps", [0, 2])
def test_parameters_die(case: Case, flat: bool, steps: int) -> None:
    """With their optimizer and without waiting for the garbage collector."""
    params = make_params()
    optimizer = case.ours(params, **case.options, flat=flat)
    for step in range(steps):
        train(optimizer, [step])
        optimizer.zero_grad()
    refs = [weakref.ref(optimizer), *(weakref.ref(p) for p in params)]
    refs += [weakref.ref(s) for p in params for s in optimizer.state.get(p, {}).values()]
    gc.collect()
    gc.disable()
    try:
        del params, optimizer
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


@every_class
def test_optimizer_dies_before_its_parameters(case: Case) -> None:
    params = make_params()
    optimizer = case.ours(params, **case.options)
    train(optimizer, range(2))
    states = [weakref.ref(s) for p in params for s in optimizer.state[p].values()]
    del optimizer
    gc.collect()
    assert all(ref() is None for ref in states)


@every_class
def test_a_state_outlives_its_optimizer(case: Case) -> None:
    """It holds the buffer that it lies in."""
    params = make_params()
    optimizer = case.ours(params, **case.options)
    train(optimizer, range(2))
    state = next(s for k, s in optimizer.state[params[0]].items() if k not in NUMBERS)
    value = state.clone()
    del optimizer, params
    gc.collect()
    filler = [torch.randn(500) for _ in range(100)]
    assert torch.equal(state, value) and len(filler) == 100


def test_flat_parameters_outlive_their_object() -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    flat = fusedopt.FlatParameters(params, gradients=True)
    ref = weakref.ref(flat)
    del flat
    gc.collect()
    assert ref() is None
    filler = [torch.randn(500) for _ in range(100)]
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))
    assert not any(p.grad.any() for p in params) and len(filler) == 100


@every_class
@pytest.mark.parametrize("torchs", [True, False], ids=["torch", "fusedopt"])
def test_a_cycle_through_a_parameter_is_collected(case: Case, torchs: bool) -> None:
    """A parameter that holds its optimizer, as for stepping in the backward pass."""
    params = make_params()
    for p in params:
        p.optimizer = (case.counterpart if torchs else case.ours)([p], **case.options)
        train(p.optimizer, range(2))
    refs = [weakref.ref(p) for p in params]
    del params, p
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@every_class
def test_a_cycle_through_the_state_is_collected(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    optimizer.state[params_of(optimizer)[0]]["back"] = optimizer
    ref = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ref() is None


# -- tensors that are swapped -----------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
@pytest.mark.filterwarnings("ignore:.*flat buffer")
@pytest.mark.usefixtures("swapping")
def test_module_to_by_swapping(case: Case, flat: bool) -> None:
    """It needs that nobody else holds the tensors, and exchanges what is behind the parameters."""
    optimizers = []
    for each_flat in (False, flat):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2))
        optimizer = case.ours(model.parameters(), **case.options, flat=each_flat)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            x = torch.linspace(-1, 1, 20).view(4, 5).to(dtype)
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            for p in model.parameters():
                assert p.dtype == dtype
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                for key, value in optimizer.state[p].items():
                    assert value.dtype == (torch.float32 if key in NUMBERS else wide)
        optimizers.append(optimizer)
    assert_equal(*optimizers)


@every_class
def test_swapped_tensors(case: Case) -> None:
    """As FSDP2 and others do: a parameter and its state become other tensors behind the object."""
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(2))
        each.zero_grad()
    for p in params_of(optimizer):
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
        for value in optimizer.state[p].values():
            torch.utils.swap_tensors(value, value.clone())
    for each in (optimizer, twin):
        train(each, range(2, 4))
    assert_equal(optimizer, twin)
