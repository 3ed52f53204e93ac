"""The races of two threads, with bindings that tell of each access to memory that was freed.

The loops over elements are those that ship; tests/core has sanitizers for these."""

import json
from pathlib import Path

import pytest
from core.build import CXX, ROOT, run
from core.build_module import build_module
from support.forks import output_of_program

pytestmark = pytest.mark.slow

FLAGS = ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"]
# Its module has to be found before fusedopt is imported.
PROGRAM = """
from support import accelerator
accelerator.load_host_run()
import test_threads
"""
# A state is dropped and nobody told.
PLANTED = """
def planted(package, size):
    _, optimizer = test_threads.with_states(package, size)
    optimizer.step()
    dict.clear(optimizer.state)
    optimizer.step()

test_threads.RACES = {"planted": planted}
"""


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """What a process needs to run with it."""
    # The other one has the exceptions that the first one looks into.
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [run([*CXX, f"-print-file-name={name}"]).strip() for name in names]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler has no AddressSanitizer")
    module = build_module("bindings-sanitized", ROOT / "csrc/cuda/none.cpp", FLAGS)
    # Python frees nothing when it ends, and torch has some symbols twice.
    options = "detect_leaks=0:detect_odr_violation=0"
    return {
        "FUSEDOPT_HOST_RUN": str(module),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",  # Python's own allocator would hide what is freed
    }


def outcomes(program: str, size: str, env: dict[str, str]) -> dict[str, str]:
    program = f"{PROGRAM}{program}\ntest_threads.run_races('{size}')"
    found: dict[str, str] = json.loads(output_of_program(program, Path(__file__).parent, env))
    return {name: wrong for name, wrong in found.items() if name.endswith("-fusedopt")}


@pytest.mark.parametrize("size", ["short", "long", "many"])
def test_races(sanitized: dict[str, str], size: str) -> None:
    found = outcomes("", size, sanitized)
    assert len(found) == 12 and not any(found.values()), found


def test_a_fault_is_found(sanitized: dict[str, str]) -> None:
    (said,) = outcomes(PLANTED, "short", sanitized).values()
    assert "SUMMARY: AddressSanitizer: heap-use-after-free" in said, said
