"""How results are written to JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.report.case import Json


def write_json(path: Path, results: Json) -> None:
    """Write indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[([^][{}]*)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    path.write_text(text + "\n")


def write_rows(path: Path, results: Json) -> None:
    """Write JSON with one line for each row of a list and for each value of a dictionary."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            lines, brackets = [json.dumps(row) for row in value], "[]"
        else:
            lines, brackets = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()], "{}"
        rows = ",\n".join(f"  {line}" for line in lines)
        parts.append(f" {json.dumps(key)}: {brackets[0]}\n{rows}\n {brackets[1]}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
