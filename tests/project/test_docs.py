"""The documentation does what it says: its code runs, and its tables agree with the code."""

import re
from pathlib import Path

import pytest
import torch

from fusedopt._extension import _C

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_dtype_table_lists_the_combinations() -> None:
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| (\w+) \|", (ROOT / "docs/dtypes.md").read_text(), re.M
    )
    listed = {tuple(getattr(torch, name) for name in row) for row in rows if row[0] != "parameter"}
    assert listed == {tuple(combination) for combination in _C.combinations()}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_class_documents_itself() -> None:
    import fusedopt

    for name in fusedopt.__all__:
        assert getattr(fusedopt, name).__doc__, name
