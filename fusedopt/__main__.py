"""What is installed, and whether it works: ``python -m fusedopt``.

The first thing to send with a report of a bug. It prints versions, the instruction set and what was
built for CUDA; then steps each optimizer and works out losses beside torch's, on the CPU and on the
GPU if there is one, and says how long a step of AdamW takes beside torch's. The exit status is 1 if
a result is wrong.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt._extension import _C
from fusedopt._optimizer import FusedOptimizer

SHAPES = ((5,), (40, 33), (), (3000,), (0, 4))
STEPS = 10
TENSORS, ELEMENTS = 50, 5000  # of the step that is timed
SECONDS = 0.25  # of timing, for each of those that are timed


def about() -> Iterator[str]:
    """Versions, and what there is."""
    yield f"fusedopt {fusedopt.__version__}, built for torch {_C.torch_version}"
    yield f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"CPU: {fusedopt.isa()}, {torch.get_num_threads()} threads"
    built = f"built with {_C.cuda_version}" if _C.has_cuda else "not built"
    if not torch.cuda.is_available():
        yield f"CUDA: {built}, torch finds no GPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"CUDA: {built}, {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )


def twins() -> Iterator[tuple[type[FusedOptimizer], Any]]:
    """Each optimizer that torch.optim has, too."""
    for name in fusedopt.__all__:
        ours = getattr(fusedopt, name)
        if isinstance(ours, type) and issubclass(ours, FusedOptimizer) and ours._twin():
            yield ours, ours._twin()


def trained(make: Any, device: str) -> list[Tensor]:
    """Parameters after some steps, the same ones for each optimizer."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    params = [Parameter(draw(shape)) for shape in SHAPES]
    optimizer = make(params, lr=1e-2)
    for _ in range(STEPS):
        for param in params:
            param.grad = draw(tuple(param.shape))
        optimizer.step()
    return [param.detach() for param in params]


def losses(module: Any, device: str) -> list[Tensor]:
    """Losses and their gradients."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 300, generator=generator).to(device).requires_grad_()
    targets = torch.randint(300, (20,), generator=generator).to(device)
    loss = module.cross_entropy(logits, targets)
    error = module.mse_loss(logits, torch.zeros_like(logits))
    return [loss.detach(), error.detach(), *torch.autograd.grad(loss + error, logits)]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """What is wrong with results, in a line; nothing if they agree up to rounding."""
    try:
        torch.testing.assert_close(ours, theirs)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def check(device: str) -> list[str]:
    """What is wrong on a device."""
    wrong, right = [], []
    results: list[tuple[str, Callable[[Any], list[Tensor]], Any, Any]] = [
        (ours.__name__, lambda make: trained(make, device), ours, theirs)
        for ours, theirs in twins()
    ]
    functions = fusedopt.nn.functional, torch.nn.functional
    results.append(("losses", lambda module: losses(module, device), *functions))
    for name, result, ours, theirs in results:
        if problem := apart(result(ours), result(theirs)):
            wrong.append(f"{name} on {device} is not as torch's: {problem}")
        else:
            right.append(name)
    print(f"{device}: as torch's: {', '.join(right) or 'nothing'}")
    return wrong


def timed(device: str) -> str:
    """How long a step takes, beside those of torch, which take turns."""
    steps: dict[str, Callable[[], object]] = {}
    makers: dict[str, Callable[..., Any]] = {
        "fusedopt": fusedopt.AdamW,
        "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch": torch.optim.AdamW,
    }
    for name, make in makers.items():
        params = [Parameter(torch.ones(ELEMENTS, device=device)) for _ in range(TENSORS)]
        for param in params:
            param.grad = torch.ones_like(param)
        steps[name] = make(params).step
    found: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + SECONDS * len(steps)
    while time.perf_counter() < end or len(found["torch"]) < 3:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begin)
    medians = {name: median(times[1:]) for name, times in found.items()}
    times = (
        f"{name} {1e3 * each:.3g} ms"
        + ("" if name == "fusedopt" else f" ({each / medians['fusedopt']:.3g}x)")
        for name, each in medians.items()
    )
    return f"{device}: a step of AdamW, {TENSORS} tensors of {ELEMENTS}: {', '.join(times)}"


def main(arguments: list[str] | None = None) -> int:
    """Print all; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    for line in about():
        print(line)
    wrong: list[str] = []
    devices = ["cpu", *(["cuda"] if _C.has_cuda and torch.cuda.is_available() else [])]
    for device in devices:
        wrong += check(device)
        print(timed(device))
    for problem in wrong:
        print(problem, file=sys.stderr)
    print("Something is wrong; please report it with all of this." if wrong else "All is well.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
