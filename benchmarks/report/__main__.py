"""Tables from benchmarks' JSON files: ``python -m benchmarks.report results.json``.

Without an option the full table is printed. A ratio is another implementation's time divided by
fusedopt's in the same round, and of these the median over all rounds: 2.0x says that fusedopt is
twice as fast. The floor is the time of a read-modify-write of the bytes that a step must move,
measured in the same rounds.

``--readme`` writes every table whose place a page marks by comments; ``--check`` tells whether the
page has the tables of these results.

With ``--gpu`` the summary is of runs on GPUs, for docs/performance.md: a table for each file. With
no file it says that no GPU has been measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.report.case import on_gpu
from benchmarks.report.compare import comparison
from benchmarks.report.pages import GPU_MARKER, gpu_block, with_block, with_blocks
from benchmarks.report.tables import markdown, target_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"


def main(argv: list[str] | None = None) -> int:
    """Print or write a table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of benchmarks.run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--targets", action="store_true", help="print the targets; exit status 1 if one is missed"
    )
    action.add_argument("--readme", action="store_true", help="write the summary into README.md")
    action.add_argument(
        "--check", action="store_true", help="exit status 1 if README.md has another summary"
    )
    action.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="tell where fusedopt is slower than in this earlier run; exit status 1 if it is",
    )
    action.add_argument("--plots", type=Path, metavar="FOLDER", help="draw them into this folder")
    parser.add_argument(
        "--gpu", action="store_true", help="with --readme and --check: the summary of GPUs"
    )
    parser.add_argument(
        "--readme-file", type=Path, help="instead of README.md (with --gpu: docs/performance.md)"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.results) != 1 and not arguments.gpu:
        parser.error(f"one file of results, got {len(arguments.results)}")
    if arguments.gpu and not (arguments.readme or arguments.check):
        parser.error("--gpu goes with --readme or --check")
    runs = []
    for path in [*arguments.results, *filter(None, [arguments.compare])]:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"{path}: {error}")
    if arguments.targets:
        text, met = target_table(runs[0])
        print(text)
        return 0 if met else 1
    if arguments.compare:
        text, slower = comparison(runs[1], runs[0])
        print(text)
        return 1 if slower else 0
    if arguments.plots:
        from benchmarks.report.plots import (
            draw_all,  # needs matplotlib, which nothing else here does
        )

        draw_all(runs[0], arguments.plots)
        return 0
    if not (arguments.readme or arguments.check):
        print(markdown(runs[0]))
        return 0
    for path, run in zip(arguments.results, runs, strict=True):
        if on_gpu(run) != arguments.gpu:
            parser.error(f"{path}: measured on {run['provenance']['device']}; see --gpu")
    readme = arguments.readme_file or (PERFORMANCE if arguments.gpu else README)
    try:
        old = readme.read_text()
        if arguments.gpu:
            wanted = with_block(old, GPU_MARKER, gpu_block(runs))
        else:
            wanted = with_blocks(old, runs[0])
    except (OSError, ValueError) as error:
        parser.error(f"{readme}: {error}")
    if arguments.readme:
        readme.write_text(wanted)
    elif old != wanted:
        names = " ".join(map(str, arguments.results)) or "that there are no results"
        print(
            f"{readme} does not show {names}; run python -m benchmarks.report --readme with the "
            "same arguments",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
