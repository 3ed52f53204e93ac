"""torch's own samples of these losses, its error samples, and its references: with our classes."""

import re
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.losses import DTYPES, HALF, ROWS, Outcome, Row, short
from torch import Tensor

pytestmark = [
    pytest.mark.slow,  # torch.testing._internal takes long to import
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored"),
]


@pytest.fixture(scope="module")
def internal() -> Any:
    """torch.testing._internal, which wants a package for its own tests; and settings of torch's
    that it changes, as they were."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            stub: Any = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            patch.setitem(sys.modules, "expecttest", stub)
        flags = torch.backends.__allow_nonbracketed_mutation_flag
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.testing._internal import common_methods_invocations, common_modules
        except ImportError as error:
            pytest.skip(f"torch.testing._internal cannot be imported: {error}")
        finally:
            torch.backends.__allow_nonbracketed_mutation_flag = flags
    return types.SimpleNamespace(modules=common_modules, operators=common_methods_invocations)


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def info_of(internal: Any, row: Row) -> Any:
    for info in internal.modules.module_db:
        if info.module_cls is row.their_module:
            return info
    pytest.skip(f"this torch has no samples of {row.their_module.__name__}")


def outcome(module: Any, args: Any, kwargs: Any) -> Outcome:
    leaves = [
        arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    loss = module(*leaves, **kwargs)
    wanted = [arg for arg in leaves if isinstance(arg, Tensor) and arg.requires_grad]
    wanted += list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    grads = torch.autograd.grad(loss.sum(), wanted) if loss.requires_grad else ()
    return Outcome(loss.detach(), dict(enumerate(grads)))


def both(row: Row, sample: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    mine, theirs = row.our_module(*args, **kwargs), row.their_module(*args, **kwargs)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def assert_no_less_near(got: Outcome, theirs: Outcome, exact: Outcome) -> None:
    """The largest error of all elements is about torch's, or a few roundings."""
    for key, want in {None: exact.loss, **exact.grads}.items():
        mine, other = (each.loss if key is None else each.grads[key] for each in (got, theirs))
        assert torch.equal(mine.isfinite(), want.isfinite())
        there = want.isfinite()
        if there.any():
            error, their_error = ((x.double() - want)[there].abs().max() for x in (mine, other))
            unit = torch.finfo(mine.dtype).eps * want[there].abs().max()
            assert error <= 2.1 * their_error + 4 * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_samples_of_modules(row: Row, dtype: torch.dtype, internal: Any) -> None:
    info = info_of(internal, row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=True
        )
        count = 0
        for sample in samples:
            mine, theirs = both(row, sample)
            forward = sample.forward_input
            got = outcome(mine, forward.args, forward.kwargs)
            want = outcome(theirs, forward.args, forward.kwargs)
            assert got.loss.dtype == want.loss.dtype, sample.desc
            count += 1
            if dtype in HALF:  # torch rounds in between
                fixed = [arg.double() if arg.is_floating_point() else arg for arg in forward.args]
                exact = outcome(theirs.double(), fixed, forward.kwargs)
                assert_no_less_near(got, want, exact)
                continue
            torch.testing.assert_close(got.loss, want.loss, equal_nan=True)
            torch.testing.assert_close(got.grads, want.grads, equal_nan=True)
            if sample.reference_fn is not None:
                fixed = [arg.detach() for arg in forward.args]
                reference = sample.reference_fn(mine, *fixed)
                torch.testing.assert_close(got.loss, reference.detach(), equal_nan=True)
    assert count >= 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_errors_of_modules(row: Row, internal: Any) -> None:
    info = info_of(internal, row)
    if info.module_error_inputs_func is None:
        assert row.name == "mse_loss"
        return
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for error in samples:
        sample = error.module_error_input
        made, forward = sample.constructor_input, sample.forward_input
        with pytest.raises(error.error_type) as caught:
            row.our_module(*made.args, **made.kwargs)(*forward.args, **forward.kwargs)
        assert_text(error, caught.value)


def assert_text(error: Any, raised: BaseException) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch takes for a pattern
        assert re.search(error.error_regex, str(raised))


def operators(internal: Any, row: Row) -> list[Any]:
    name = f"nn.functional.{row.name}"
    found = [each for each in internal.operators.op_db if each.name == name]
    if not found:
        pytest.skip(f"this torch has no samples of {name}")
    return found


def called(function: Callable[..., Tensor], sample: Any) -> Outcome:
    arguments = [sample.input, *sample.args]
    return outcome(function, arguments, sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_samples_of_functions(row: Row, dtype: torch.dtype, internal: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in operators(internal, row):
            count = 0
            for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
                got, want = called(row.ours, sample), called(row.theirs, sample)
                torch.testing.assert_close(got.loss, want.loss, equal_nan=True)
                torch.testing.assert_close(got.grads, want.grads, equal_nan=True)
                count += 1
            assert count > 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_errors_of_functions(row: Row, internal: Any) -> None:
    for info in operators(internal, row):
        if info.error_inputs_func is None:
            continue
        for error in info.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type) as caught:
                row.ours(sample.input, *sample.args, **sample.kwargs)
            assert_text(error, caught.value)
