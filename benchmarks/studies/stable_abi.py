"""What a step would cost for each parameter through torch's stable ABI, beside the direct way.

python -m benchmarks.studies.stable_abi              measures and writes everything
python -m benchmarks.studies.stable_abi --tables     only writes the table again

Both only look at what AdamW has to look at of each parameter: its gradient and two states, their
addresses and sizes. The stable ABI knows no Python objects, no .grad and no version counters:
Python makes the lists, and an operator gets them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import load_inline

from benchmarks.measure.progress import Progress
from benchmarks.measure.provenance import provenance
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.report.case import WALL, Json, where
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.report.tables import table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "stable_abi.json"
PAGE = ROOT / "docs" / "building.md"
COUNTS = (100, 1000, 10_000)
ROUNDS, SECONDS = 41, 10.0

DIRECT = r"""
#include <torch/extension.h>

// Looks at parameters and their gradients as bindings/plan.h does, and at states that are known.
int64_t direct(const py::list& params, const std::vector<at::Tensor>& states) {
  int64_t total = 0;
  const auto look = [&](const at::Tensor& tensor) {
    total += int64_t(reinterpret_cast<uintptr_t>(tensor.unsafeGetTensorImpl()->data()) % 64);
    total += tensor.numel();
  };
  for (py::handle param : params) {
    const at::Tensor& tensor = THPVariable_Unpack(param.ptr());
    look(tensor);
    look(tensor.unsafeGetTensorImpl()->grad());
    torch::autograd::impl::bump_version(tensor);
  }
  for (const at::Tensor& state : states) look(state);
  return total;
}

// The states are looked up once, as a plan does.
struct Plan {
  std::vector<at::Tensor> states;
  int64_t step(const py::list& params) { return direct(params, states); }
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init([](std::vector<at::Tensor> states) { return Plan{std::move(states)}; }))
      .def("step", &Plan::step);
}
"""

STABLE = r"""
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

using torch::stable::Tensor;

int64_t look(std::vector<Tensor> tensors) {
  int64_t total = 0;
  for (const Tensor& tensor : tensors) {
    total += int64_t(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64);
    total += tensor.numel();
  }
  return total;
}

int64_t step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states) {
  return look(std::move(params)) + look(std::move(grads)) + look(std::move(states));
}

STABLE_TORCH_LIBRARY(fusedopt_study, m) {
  m.def("step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fusedopt_study, CompositeExplicitAutograd, m) {
  m.impl("step", TORCH_BOX(&step));
}
"""


def tensors_of(count: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    params = [nn.Parameter(torch.ones(16)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(16)
    return params, [torch.ones(16) for _ in range(2 * count)]


def case(direct: Any, count: int) -> Json:
    """The times of both, which take turns."""
    params, states = tensors_of(count)
    step: Callable[..., int] = torch.ops.fusedopt_study.step.default
    plan = direct.Plan(states)

    @torch.no_grad()
    def stable() -> int:
        return step(params, [param.grad for param in params], states)

    if plan.step(params) <= 0 or stable() <= 0:
        raise AssertionError("nothing was looked at")
    works = {"direct": Work(lambda: plan.step(params)), "stable": Work(stable)}
    samples = measure(works, "cpu", ROUNDS, SECONDS, Progress(ROUNDS))[WALL]
    return {"parameters": count, "seconds": samples}


def text(results: Json) -> str:
    """The table, and where it comes from."""
    rows = []
    for one in results["cases"]:
        direct, stable = (
            1e9 * median(one["seconds"][way]) / one["parameters"] for way in ("direct", "stable")
        )
        ratio = f"{stable / direct:.1f}x"
        rows.append([f"{one['parameters']:,}", f"{direct:.0f}", f"{stable:.0f}", ratio])
    head = ["parameters", "direct, ns each", "stable ABI, ns each", "ratio"]
    return f"{table(head, rows, left=0)}\n{where(results)}.\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, or only write or check the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.stable_abi",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tables", action="store_true", help="only write the table again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if it is old")
    options = parser.parse_args(arguments)
    if not (options.tables or options.check):
        flags = {"extra_cflags": ["-O2"], "verbose": False}
        direct = load_inline("fusedopt_direct", [DIRECT], **flags)
        load_inline("fusedopt_stable", [STABLE], is_python_module=False, **flags)
        found = provenance(torch.device("cpu"), [])
        cases = [case(direct, count) for count in COUNTS]
        write_json(RESULTS, {"provenance": found, "cases": cases})
    shown = show(PAGE, "stable-abi", text(json.loads(RESULTS.read_text())), check=options.check)
    return int(options.check and not shown)


if __name__ == "__main__":
    sys.exit(main())
