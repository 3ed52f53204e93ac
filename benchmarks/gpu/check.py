"""All that needs an NVIDIA GPU, in one go: ``make gpu-check`` (``python -m benchmarks.gpu.check``).

Builds for the GPU that is there and takes first steps on it, which have to have the CPU's bits: if
these fail, nothing else is tried. Then it runs the tests that need a GPU (they compare it with the
CPU bit by bit), watches small steps with compute-sanitizer where that is installed, runs the
benchmark into benchmarks/results, writes its table into docs/performance.md, and times a step
beside kernels that take some of the device. Of these, one that fails does not keep the later
ones from running; the exit status is 1 then. All of it takes less than nine minutes: a step that
takes too long is interrupted, so that it can say where it was and time is left for the others.

If the environment variable OUT names a folder, the results, the table and the log are copied there
after each step. Where there is no git, FUSEDOPT_COMMIT can name the commit that is measured.
Arguments that are not known here go to pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks") / "results"
PERFORMANCE = Path("docs") / "performance.md"
LOG = Path("build") / "gpu-check.log"
TOTAL_SECONDS = 520.0
GRACE = 8.0  # seconds that an interrupted command has to say where it was
TOLD_SHARE = 0.85  # of its limit, which a command that keeps to a limit is told

NATIVE = {"FUSEDOPT_CUDA": "1", "FUSEDOPT_CUDA_ARCHS": "native"}
HAS_CUDA = (
    "import sys; from fusedopt._extension import _C; "
    "sys.exit(None if _C.has_cuda else 'fusedopt was built without CUDA')"
)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own


@dataclass(frozen=True)
class Step:
    """One step of the check.

    Attributes:
        name: in the summary.
        commands: run one after the other, until one fails.
        limit: seconds that it may take.
        reserved: seconds that earlier steps must leave to it.
        environment: what it gets besides the environment of this process.
        told: whether the last command takes ``--limit`` with the seconds that it has.
        unusable: text in the output that says that the tool does not work here.
        missing: why there is nothing to run; None where there is.
        vital: whether nothing else is run if it fails.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit: float
    reserved: float
    environment: Mapping[str, str] = field(default_factory=dict)
    told: bool = False
    unusable: str | None = None
    missing: str | None = None
    vital: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    name: str
    verdict: str
    seconds: float
    failed: bool


class Checker:
    """Runs steps and keeps their output and their results.

    Args:
        log: where all that is printed goes as well.
        deadline: when everything has to be done, on the clock of time.monotonic.
        keep: the files to copy into out, by their paths in the repository.
        out: the folder where results are kept, or None.
    """

    def __init__(
        self, log: TextIO, deadline: float, keep: Sequence[Path] = (), out: Path | None = None
    ) -> None:
        self._log = log
        self._deadline = deadline
        self._keep = keep
        self._out = out
        self._started = time.time()

    def say(self, text: str) -> None:
        """Print a line, and write it to the log."""
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run all steps; how each went."""
        outcomes = []
        for number, step in enumerate(steps):
            self.say(f"\n=== {step.name}")
            reserved = sum(later.reserved for later in steps[number + 1 :])
            left = self._deadline - time.monotonic() - reserved
            start = time.monotonic()
            verdict, failed = self._run_step(step, min(step.limit, left))
            outcomes.append(Outcome(step.name, verdict, time.monotonic() - start, failed))
            self.say(f"=== {step.name}: {verdict}")
            self.copy()
            if failed and step.vital:
                self.say(f"nothing else is tried, as {step.name} failed")
                break
        return outcomes

    def _run_step(self, step: Step, limit: float) -> tuple[str, bool]:
        """The verdict on a step, and whether it failed."""
        if step.missing is not None:
            return f"skipped: {step.missing}", False
        if limit <= 0:
            return "FAILED: no time was left", True
        end = time.monotonic() + limit
        for command in step.commands:
            last = command is step.commands[-1]
            told = ["--limit", f"{TOLD_SHARE * limit:.0f}"] if step.told and last else []
            seconds = end - time.monotonic()
            status, output = self._run_command([*command, *told], step.environment, seconds)
            if step.unusable is not None and step.unusable in output:
                return f"skipped: the tool does not work here ({step.unusable})", False
            if status is None:
                return f"FAILED: ended after {limit:.0f} s", True
            if status != 0:
                return f"FAILED: exit status {status}", True
        return "ok", False

    def _run_command(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> tuple[int | None, str]:
        """The exit status of a command, None if it took too long, and what it printed."""
        self.say(f"$ {' '.join(f'{k}={v}' for k, v in environment.items())} {shlex.join(command)}")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # its children end with it
            # Ignored in the background, it would be so in the command, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        too_long = threading.Event()

        def end() -> None:
            too_long.set()
            end_group(process, signal.SIGINT)
            # Python may be in a call that does not return.
            timers.append(threading.Timer(GRACE, end_group, [process]))
            timers[-1].start()

        timers = [threading.Timer(max(0.0, seconds), end)]
        timers[0].start()
        lines = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                lines.append(line)
            status = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.returncode is None:
                end_group(process)
        return None if too_long.is_set() else status, "".join(lines)

    def copy(self) -> None:
        """Copy the files that were written since the start into the folder of results."""
        if self._out is None:
            return
        for path in self._keep:
            source = ROOT / path
            if source.exists() and source.stat().st_mtime >= self._started:
                shutil.copy(source, self._out / path.name)


def end_group(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    """End a process and all its children that are still running."""
    try:
        os.killpg(process.pid, how)
    except ProcessLookupError:
        return


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home, "bin")) for home in homes if home]
    if nvcc is not None:
        folders.append(str(Path(nvcc).resolve().parent))
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))


def sanitizer_step(
    tool: str, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
) -> Step:
    """Small steps of everything under one tool of compute-sanitizer."""
    sanitizer = find_sanitizer()
    checked = (sys.executable, "-m", "benchmarks.gpu.sanitize")
    # torch probes for features and expects errors from some calls: these are not reported.
    watch = (sanitizer or "", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1")
    return Step(
        tool,
        [(*watch, *options, *checked)],
        limit=75,
        reserved=15,
        environment=environment or {},
        unusable="Device not supported",
        missing=None if sanitizer else "compute-sanitizer is not installed",
    )


def slug(name: str) -> str:
    """A GPU's name as a file's: nvidia-h200."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(words if words[:1] == ["nvidia"] else ["nvidia", *words])


def make_steps(results: Path, pytest_arguments: Sequence[str]) -> list[Step]:
    """All steps, in order; the benchmark writes into results."""
    python = sys.executable
    others = (path.relative_to(ROOT) for path in (ROOT / RESULTS).glob("nvidia-*.json"))
    every = sorted({results, *others})
    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    smoke = (python, "-m", "benchmarks.gpu.smoke")

    def tests(*files: str) -> tuple[str, ...]:
        short = ("--maxfail=10", "--tb=short")
        paths = (f"tests/{file}" for file in files)
        return (python, "-m", "pytest", "-m", "cuda", *short, *paths, *pytest_arguments)

    # One of the documentation's examples captures a graph.
    examples = (python, "-m", "pytest", "--tb=short", "tests/project/test_docs.py")
    benchmark = (python, "-m", "benchmarks.run", "--device", "cuda", "--output", str(results))
    table = (python, "-m", "benchmarks.report", "--gpu", *map(str, every), "--readme")
    return [
        Step("build", [build, (python, "-c", HAS_CUDA)], 240, 0, NATIVE, vital=True),
        Step("smoke", [smoke], 60, 10, vital=True),
        Step("bits", [tests("device/test_device.py", "storage")], 120, 30),
        Step("graphs", [tests("device/test_graphs.py"), examples], 60, 15),
        Step("clipping", [tests("device/test_scaled_steps.py", "steps")], 60, 10),
        Step("sharded", [tests("sharded")], 60, 5),
        sanitizer_step("memcheck", UNCACHED),
        sanitizer_step("initcheck", UNCACHED),
        sanitizer_step("synccheck"),
        # torch's own kernels are left out.
        sanitizer_step("racecheck", options=("--kernel-name", "kernel_substring=fusedopt")),
        Step("benchmark", [benchmark], 240, 130, told=True),
        Step("table", [table], 20, 5),
        Step("busy", [(python, "-m", "benchmarks.gpu.busy")], 30, 5),
    ]


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """A table of all steps and their times."""
    width = max(len(outcome.name) for outcome in outcomes)
    rows = [f"{one.name:{width}}  {one.seconds:6.1f} s  {one.verdict}" for one in outcomes]
    return "\n".join([*rows, f"{'all':{width}}  {seconds:6.1f} s"])


def main(argv: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", nargs="+", metavar="NAME", help="only these, of those that the summary lists"
    )
    arguments, pytest_arguments = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        where = f"torch {torch.__version__} of {sys.executable}"
        print(f"gpu-check needs an NVIDIA GPU, and {where} finds none", file=sys.stderr)
        return 1
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the step that is running, too
    name = torch.cuda.get_device_name()
    results = RESULTS / f"{slug(name)}.json"
    steps = make_steps(results, pytest_arguments)
    names = [step.name for step in steps]
    for wanted in arguments.steps or ():
        if wanted not in names:
            parser.error(f"--steps {wanted}: one of {', '.join(names)}")
    if arguments.steps:
        steps = [step for step in steps if step.name in arguments.steps]
    out = Path(os.environ["OUT"]).absolute() if os.environ.get("OUT") else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    (ROOT / LOG).parent.mkdir(exist_ok=True)
    with (ROOT / LOG).open("w") as log:
        keep = [results, results.with_suffix(".md"), PERFORMANCE, LOG]
        checker = Checker(log, start + TOTAL_SECONDS, keep, out)
        checker.say(f"gpu-check on {name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        outcomes = checker.run(steps)
        checker.say(f"\n{summary(outcomes, time.monotonic() - start)}")
        checker.copy()
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
