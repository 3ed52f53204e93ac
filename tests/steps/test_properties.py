"""Whatever the shapes, dtypes, options, groups and missing gradients: a step is for each parameter
what it would be in an optimizer of its own, and what torch.optim makes of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import HALF, bits, real_view
from support.optimizers import ROWS, Options, Row
from support.storing import BF16, CHOICES, F32, Choice, masters_of, rounded
from support.training import saved
from torch import Tensor
from torch.optim import Optimizer

import fusedopt
from fusedopt._extension import _C

DTYPES = [*dict.fromkeys(p for p, _, _ in _C.combinations()), torch.complex64, torch.complex128]


@dataclass
class Parameter:
    """One parameter: where it lies, and which of its steps have a gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    group: int
    present: list[bool]
    float32_grad: bool
    seed: int

    def values(self) -> tuple[Tensor, list[Tensor | None]]:
        """A new leaf with its initial values, and its gradients; the same ones each time."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(dtype: torch.dtype) -> Tensor:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            return torch.randn(self.shape, generator=random, dtype=wide).to(dtype)

        param = normal(self.dtype)
        grad_dtype = torch.float32 if self.float32_grad else self.dtype
        grads = [normal(grad_dtype) if present else None for present in self.present]
        if self.layout == "gaps":
            param = torch.stack([param, param], -1)[..., 0]
        elif self.layout == "transposed" and param.dim() > 1:
            param = param.mT.contiguous().mT  # the gradients stay contiguous
        param.requires_grad_()
        if grad_dtype != self.dtype:
            param.grad_dtype = grad_dtype
        return param, grads


@st.composite
def parameters(draw: st.DrawFn, groups: int, steps: int) -> list[Parameter]:
    shapes = st.one_of(
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.integers(0, 300).map(lambda n: (n,)),
    )
    made = []
    for group in range(groups):
        for _ in range(draw(st.integers(1, 4))):
            shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
            made.append(
                Parameter(
                    shape=shape,
                    dtype=dtype,
                    layout=draw(st.sampled_from(["contiguous", "transposed", "gaps"])),
                    group=group,
                    present=draw(st.lists(st.booleans(), min_size=steps, max_size=steps)),
                    float32_grad=not dtype.is_complex and draw(st.booleans()),
                    seed=draw(st.integers(0, 999)),
                )
            )
    return made


@dataclass
class Case:
    """An optimizer with one group for each set of options, by their names in the table."""

    row_name: str
    option_names: list[str]
    members: list[Parameter]

    @property
    def row(self) -> Row:
        return next(row for row in ROWS if row.name == self.row_name)

    @property
    def options(self) -> list[Options]:
        return [self.row.option_sets[name] for name in self.option_names]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    row = draw(st.sampled_from(ROWS))
    names = draw(st.lists(st.sampled_from([*row.option_sets]), min_size=1, max_size=4))
    return Case(row.name, names, draw(parameters(len(names), draw(st.integers(1, 6)))))


def train(
    constructor: Any, options: list[Options], members: list[Parameter], **common: Any
) -> tuple[Optimizer, list[Tensor]]:
    made = [member.values() for member in members]
    optimizer = constructor(
        [
            {"params": [p for (p, _), m in zip(made, members, strict=True) if m.group == i], **o}
            for i, o in enumerate(options)
        ],
        **common,
    )
    for t in range(len(members[0].present)):
        for param, grads in made:
            param.grad = grads[t]
        optimizer.step()
    return optimizer, [param for param, _ in made]


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(*(bits(real_view(x.detach().reshape(-1))) for x in (a, b)))


@settings(max_examples=150)
@given(case=cases(), flat=st.booleans(), half_states=st.booleans())
def test_as_if_each_parameter_were_alone(case: Case, flat: bool, half_states: bool) -> None:
    row, members = case.row, case.members
    options = [
        {**group, "state_dtype": half_states_of(members, i) if half_states else None}
        for i, group in enumerate(case.options)
    ]
    optimizer, params = train(row.ours, options, members, flat=flat)
    for param, member in zip(params, members, strict=True):
        group = options[member.group]
        other, (expected,) = train(row.ours, [group], [replace(member, group=0)])
        assert_same_bits(param, expected)
        stateful = any(member.present) and bool(row.keys(group))
        # Flat gradients always exist, and states are made before the first step.
        made_early = (flat or row.states_at_once) and bool(row.keys(group))
        assert (param in optimizer.state) == (stateful or made_early)
        if not stateful:
            continue
        state = optimizer.state[param]
        assert state.keys() == row.keys(group)
        for key in row.state_keys(group):
            assert_same_bits(state[key], other.state[expected][key])
            assert state[key].shape == param.shape
        if row.counts_steps:
            assert state["step"] == sum(member.present)


def half_states_of(members: list[Parameter], group: int) -> torch.dtype | None:
    """state_dtype for a group whose parameters all have the same half precision."""
    dtypes = {member.dtype for member in members if member.group == group}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALF) else None


IGNORED_IN_GROUPS = {"initial_accumulator_value"}  # by torch, which takes the constructor's


@settings(max_examples=100)
@given(case=cases())
def test_as_torch(case: Case) -> None:
    """In float64, where the results are as good as equal, however ill-conditioned the step. Where
    torch has no such class, as the formula."""
    row = case.row
    members = [
        replace(
            member,
            dtype=torch.complex128 if member.dtype.is_complex else torch.float64,
            float32_grad=False,  # torch does not take them
        )
        for member in case.members
    ]
    options = [
        {
            key: value
            for key, value in group.items()
            if key not in {*row.ours_only, *IGNORED_IN_GROUPS}
        }
        for group in case.options
    ]
    optimizer, params = train(row.ours, options, members)
    other, expected = train(row.counterpart, options, members, foreach=False)
    for param, like in zip(params, expected, strict=True):
        torch.testing.assert_close(param, like, rtol=1e-7, atol=1e-7)
        assert (param in optimizer.state) == (like in other.state)
        for key, value in other.state.get(like, {}).items():
            if value is not None:
                torch.testing.assert_close(optimizer.state[param][key], value, rtol=1e-7, atol=1e-7)


# -- choices of storage -----------------------------------------------------------------------


@st.composite
def stored_cases(draw: st.DrawFn) -> tuple[Case, list[Choice]]:
    """A case with a choice of storage for each group."""
    case = draw(cases())
    choices = draw(
        st.lists(
            st.sampled_from([choice for choice in CHOICES.values() if suits(case.row, choice)]),
            min_size=len(case.option_names),
            max_size=len(case.option_names),
        )
    )
    members = [
        replace(
            member,
            dtype=choices[member.group].param,
            float32_grad=member.float32_grad and choices[member.group].param != F32,
        )
        for member in case.members
    ]
    return replace(case, members=members), choices


def suits(row: Row, choice: Choice) -> bool:
    """Whether the states can be stored so with any options."""
    return any(choice.suits(row, options) for options in row.option_sets.values())


def with_choice(row: Row, options: Options, choice: Choice) -> Options:
    plain = {} if choice.suits(row, options) else {"centered": False}
    return {**options, **plain, **choice.options}


@settings(max_examples=100)
@given(drawn=stored_cases(), flat=st.booleans())
def test_stored_as_if_each_parameter_were_alone(
    drawn: tuple[Case, list[Choice]], flat: bool
) -> None:
    """Among others without gradients, that is: what is random goes by the position."""
    case, choices = drawn
    options = [
        with_choice(case.row, o, choice) for o, choice in zip(case.options, choices, strict=True)
    ]
    optimizer, params = train(case.row.ours, options, case.members, flat=flat)
    masters = masters_of(optimizer)
    for i, member in enumerate(case.members):
        nothing = [False] * len(member.present)
        alone = [m if m is member else replace(m, present=nothing) for m in case.members]
        other, expected = train(case.row.ours, options, alone)
        assert_same_bits(params[i], expected[i])
        if flat and not any(member.present):
            continue  # its gradient always exists, and its state was made before the first step
        mine, theirs = optimizer.state.get(params[i], {}), other.state.get(expected[i], {})
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same_bits(mine[key], theirs[key])
        if choices[member.group].masters:
            # The members of a group are in a row, as they are in the optimizer.
            assert_same_bits(params[i].detach(), rounded(masters[i], member.dtype))


float32_bits = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=200)
@given(
    numbers=st.lists(float32_bits, min_size=1, max_size=600),
    choice=st.sampled_from([choice for choice in CHOICES.values() if choice.masters]),
)
def test_any_master(numbers: list[int], choice: Choice) -> None:
    """It comes back as it was, or rounded to 24 bits; the parameter is it, rounded."""
    whole = torch.tensor(numbers)
    values = whole.int().view(F32)
    nan = values.isnan()
    param = torch.zeros(len(numbers), dtype=choice.param, requires_grad=True)
    optimizer = fusedopt.SGD([param], lr=0.0, **choice.options)
    optimizer.load_master_params([values])
    exact = values
    if choice.options["master_bits"] == 24:
        shorter = (whole & 0xFFFFFFFF) + 0x80 & 0xFFFFFF00
        exact = torch.where(shorter >= 2**31, shorter - 2**32, shorter).int().view(F32)
    for _ in range(2):
        (master,) = masters_of(optimizer)
        assert torch.equal(master.isnan(), nan)
        assert_same_bits(master[~nan], exact[~nan])
        assert_same_bits(param.detach()[~nan], rounded(exact, choice.param)[~nan])
        param.grad = torch.zeros_like(param)
        optimizer.step()


CHAIN = [choice for choice in CHOICES.values() if choice.param == BF16] + [Choice(BF16, {})]


@settings(max_examples=60)
@given(
    row=st.sampled_from(ROWS),
    member=parameters(1, 2).map(lambda members: members[0]),
    chain=st.lists(st.sampled_from(CHAIN), min_size=2, max_size=6),
    data=st.data(),
)
def test_any_choice_after_another(
    row: Row, member: Parameter, chain: list[Choice], data: st.DataObject
) -> None:
    """Loading changes no weight, and all goes on from there."""
    # They come from checkpoints, so that they have to suit all.
    chain = [choice for choice in chain if suits(row, choice)]
    suitable = [o for o in row.option_sets.values() if all(c.suits(row, o) for c in chain)]
    options = data.draw(st.sampled_from(suitable))
    member = replace(member, dtype=BF16, float32_grad=False, present=[True, True])
    param, grads = member.values()
    state_dict = None
    for number, choice in enumerate(chain):
        param = param.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        before = param.detach().clone()
        optimizer = row.ours([param], **options, **choice.options)
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
            assert_same_bits(param.detach(), before)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        if "step" in optimizer.state[param] and row.counts_steps:
            assert float(optimizer.state[param]["step"]) == 2 * (number + 1)
        (master,) = masters_of(optimizer)
        assert_same_bits(param.detach(), rounded(master, BF16))
        assert bool(master.isfinite().all())
        state_dict = saved(optimizer)
