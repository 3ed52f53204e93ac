"""Adding an optimizer touches five files, shown on a copy of the tree by one that nobody has
published: Quartet has four states, one of each kind, and no twin in torch.optim."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "tests" / "data" / "quartet"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells what is to be copied"),
]


def replace(old: str, new: str) -> Callable[[str], str]:
    """An edit of text that matches a pattern exactly once."""

    def edit(text: str) -> str:
        edited, count = re.subn(old, new, text, flags=re.MULTILINE)
        assert count == 1, f"there is {count} times, not once: {old}"
        return edited

    return edit


# Of each file the edits, or the file that is new.
PLACES: dict[str, list[Callable[[str], str]] | Path] = {
    "csrc/core/rules/quartet.h": TEXTS / "quartet.h",
    "csrc/core/rules/list.h": [
        replace('(#include "adam.h"\n)', r'\1#include "quartet.h"\n'),
        replace(r"(using Rules =\s+TypeList<[^>]*)>", r"\1, Quartet>"),
    ],
    "fusedopt/optimizers/quartet.py": TEXTS / "quartet.py",
    "fusedopt/__init__.py": [
        replace(
            r"(from fusedopt\.optimizers\.adam import .*\n)",
            r"\1from fusedopt.optimizers.quartet import Quartet\n",
        ),
        replace('(    "MemoryReport",\n)', r'\1    "Quartet",\n'),
    ],
    "tests/support/optimizers.py": [
        lambda text: replace(r"^(?=ROWS = )", (TEXTS / "row.txt").read_text())(text),
        replace(r"^(ROWS = \[)", r"\1QUARTET, "),
    ],
}


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def copy_tree(to: Path) -> None:
    """All files that git knows, and those that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, output.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def add_quartet(tree: Path) -> None:
    for name, change in PLACES.items():
        if isinstance(change, Path):
            assert not (tree / name).exists()
            shutil.copy(change, tree / name)
        else:
            text = (tree / name).read_text()
            for edit in change:
                text = edit(text)
            (tree / name).write_text(text)


def run(tree: Path, *command: str, **environment: str) -> str:
    """What a command in the tree prints. It finds the tree's package and no other."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("FUSEDOPT_")}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**own, "PYTHONPATH": f"{tree}:{tree / 'tests'}", **environment},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-10000:]
    return result.stdout


def passed(tree: Path, *arguments: str, **environment: str) -> int:
    """How many tests pass in the tree; none may fail."""
    report = tree / "build" / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    run(tree, "-m", "pytest", *options, *arguments, **environment)
    (suite,) = ElementTree.parse(report).getroot()
    count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    assert count["failures"] == count["errors"] == 0
    return count["tests"] - count["skipped"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy, with Quartet and built for the CPU."""
    tree = tmp_path_factory.mktemp("quartet") / "fusedopt"
    copy_tree(tree)
    before = contents(tree)
    add_quartet(tree)
    after = contents(tree)
    touched = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and touched == PLACES.keys() and len(touched) == 5
    run(tree, "setup.py", "--quiet", "build_ext", "--inplace", FUSEDOPT_CUDA="0")
    return tree


# By far the most of those that there are; some instruction sets this processor may not have.
@pytest.mark.parametrize(("tests", "least"), [("steps", 180), ("storage", 220), ("dropin", 320)])
def test_the_tests_of_the_table(tree: Path, tests: str, least: int) -> None:
    """Those for every optimizer, and those that draw one at random."""
    chosen = ["-k", "quartet or test_properties", "-m", "not cuda and not slow"]
    assert passed(tree, f"tests/{tests}", *chosen) >= least


def test_every_kernel(tree: Path) -> None:
    """On each instruction set, and as CUDA would run it; those of Quartet, and among all others."""
    assert passed(tree, "tests/core/test_host_tile.py", "-k", "quartet or prepare or mixed") == 14


def test_all_that_a_gpu_does(tree: Path) -> None:
    """With the host in its place."""
    build = "from core.test_host_run import TESTS, build_ahead; print(build_ahead(), *TESTS)"
    module, *tests = run(tree, "-c", build).split()
    chosen = [*(f"tests/{name}" for name in tests), "-k", "quartet", "-m", "cuda"]
    assert passed(tree, *chosen, FUSEDOPT_HOST_RUN=module) >= 100


def test_states_that_must_not_be_codes(tree: Path) -> None:
    """The kinds that its header declares are what Python goes by."""
    code = """if True:
        import torch, fusedopt
        try:
            fusedopt.Quartet([torch.ones(5000, requires_grad=True)], state_dtype="int8")
        except ValueError as error:
            print(error)
    """
    expected = "Quartet: parameter 0 of group 0: state_dtype=\"int8\": its state 'anchor' is like a"
    assert run(tree, "-c", code).startswith(expected)
