"""The tree of files: all are in CONTRIBUTING's map, say what they are for, and go in no circle."""

import ast
import re
import subprocess
from collections.abc import Iterable
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[2]
MAP = ROOT / "CONTRIBUTING.md"
ROOMS = ("csrc", "fusedopt", "tests", "benchmarks", "docs")
CPP = (".h", ".cuh", ".cpp", ".cu")
SOURCES = (*CPP, ".py", ".pyi")
BUILT = ("*.pyc", "*.so", "_build_info.json", "latest*")  # where git cannot say what is ignored

needs_map = pytest.mark.skipif(not MAP.exists(), reason="an sdist has no CONTRIBUTING.md")


def all_files() -> list[PurePath]:
    """All of the tree but what is built, as paths from its root."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *ROOMS]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [PurePath(name) for name in output.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*")]
        names = [name for name in names if not any(name.match(pattern) for pattern in BUILT)]
    return sorted(n for n in names if (ROOT / n).is_file() and not n.name.startswith("."))


FILES = all_files()


def entries() -> list[str]:
    """What the map names, as paths from the root; a folder's ends in a slash.

    A line indented deeper is of something within the folder above it. All names stand before the
    column in which the first description begins; a line without any goes on with a description.
    """
    text = MAP.read_text()
    found = re.search(r"^## A map\n+```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found, "CONTRIBUTING.md has no map"
    lines = found[1].splitlines()
    first = re.match(r"\S+ +", lines[0])
    assert first, f"the map's first line has no description: {lines[0]}"
    column = first.end()
    result: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in lines:
        names = line[:column].split()
        assert line[column - 1 : column] in ("", " "), f"no space before column {column}: {line}"
        if not names:
            continue
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        within = folders[-1][1] if folders else ""
        result += [within + name for name in names]
        if names[-1].endswith("/"):
            folders.append((indent, within + names[-1]))
    return result


@needs_map
def test_the_map_names_every_file() -> None:
    """A folder's name stands for its __init__.py, too, and a pattern for what is no source."""
    named = set(entries())
    patterns = [entry for entry in named if "*" in entry]

    def is_named(file: PurePath) -> bool:
        if file.name == "__init__.py" and f"{file.parent}/" in named:
            return True
        matched = any(fnmatch(str(file), pattern) for pattern in patterns)
        return str(file) in named or (matched and file.suffix not in SOURCES)

    assert [str(file) for file in FILES if not is_named(file)] == []


@needs_map
def test_all_that_the_map_names_is_there() -> None:
    found = entries()
    assert sorted(found) == sorted(set(found))
    for entry in found:
        there = (ROOT / entry).is_dir() if entry.endswith("/") else (ROOT / entry).is_file()
        assert there or ("*" in entry and any(ROOT.glob(entry))), f"there is no {entry}"


# -- circles ------------------------------------------------------------------------------------


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: Iterable[str] = reversed(error.args[1])  # each includes the next
        pytest.fail(f"a circle: {' -> '.join(circle)}")


def module_name(file: PurePath) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: PurePath) -> set[str]:
    """All that a module imports, anywhere in it: modules, or names in them."""
    found = set()
    package = module_name(file) if file.stem == "__init__" else module_name(file.parent)
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = [*outer, *filter(None, [node.module])] if node.level else [node.module or ""]
            found |= {".".join([*start, alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("room", ["fusedopt", "benchmarks"])
def test_no_import_goes_in_a_circle(room: str) -> None:
    files = [f for f in FILES if f.parts[0] == room and f.suffix in (".py", ".pyi")]
    modules = {module_name(file) for file in files}

    def module_of(name: str) -> str | None:
        """The module itself, or the one that a name is taken from."""
        return next((n for n in (name, name.rpartition(".")[0]) if n in modules), None)

    graph = {module_name(f): {m for m in map(module_of, imported(f)) if m} for f in files}
    assert_no_circle(graph)


def included(file: PurePath) -> set[str]:
    """The files of csrc that one of them includes."""
    text = (ROOT / file).read_text()
    found = set()
    for name in re.findall(r'^\s*#\s*include "(.+)"', text, flags=re.MULTILINE):
        places = [(ROOT / start / name).resolve() for start in (file.parent, "csrc")]
        place = next((p for p in places if p.exists()), None)
        assert place, f"{file} includes {name}, which is not there"
        found.add(str(place.relative_to(ROOT.resolve())))
    return found


def test_no_include_goes_in_a_circle() -> None:
    """Neither of files nor of the rooms that they are in."""
    graph = {str(f): included(f) for f in FILES if f.parts[0] == "csrc" and f.suffix in CPP}
    assert_no_circle(graph)
    rooms: dict[str, set[str]] = {}
    for file, others in graph.items():
        room = PurePath(file).parts[1]
        rooms.setdefault(room, set()).update({PurePath(o).parts[1] for o in others} - {room})
    assert_no_circle(rooms)


# -- files by themselves ------------------------------------------------------------------------

PRODUCT = [f for f in FILES if f.parts[0] in ("csrc", "fusedopt") and f.suffix in SOURCES]


def test_no_file_is_too_long() -> None:
    lengths = {str(file): len((ROOT / file).read_text().splitlines()) for file in PRODUCT}
    assert {file: length for file, length in lengths.items() if length > 450} == {}


def test_no_two_tests_have_the_same_name() -> None:
    """pytest takes them for the same module."""
    tests = [file.name for file in FILES if file.name.startswith("test_") and file.suffix == ".py"]
    assert sorted(set(tests)) == sorted(tests)


def first_line(file: PurePath) -> str:
    """The first line but those that all files have: of the licence, and against inclusion twice."""
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    common = re.compile(r"// (SPDX|Copyright).*|//|#pragma once|")
    return next((line for line in lines if not common.fullmatch(line)), "")


def test_every_file_begins_with_what_it_is_for() -> None:
    sources = [f for f in FILES if f.suffix in (*CPP, ".py") and (ROOT / f).stat().st_size]
    begins = {file: "// " if file.suffix in CPP else '"""' for file in sources}
    assert [str(f) for f in sources if not first_line(f).startswith(begins[f])] == []


def test_only_bindings_include_torch() -> None:
    for file in PRODUCT:
        torch = re.search(r"#\s*include <(torch|ATen|c10)/", (ROOT / file).read_text())
        assert not torch or file.parts[1].startswith("bindings"), f"{file} includes torch"
