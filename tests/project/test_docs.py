"""The documentation does what it says: its code runs, and its tables agree with the code."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from test_new_optimizer import PLACES

import fusedopt
from fusedopt._extension import _C
from fusedopt._formats import NUMBERS

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
        for target in re.findall(r"\]\((?!https:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_class_documents_itself() -> None:
    for name in fusedopt.__all__:
        assert getattr(fusedopt, name).__doc__, name


def listed_optimizers() -> dict[str, type[fusedopt.Adam]]:
    """All optimizers, in the order of the page."""
    page = (ROOT / "docs/optimizers.md").read_text().split("## Formulas")[0]
    names = re.findall(r"^\| `(\w+)` \|", page, re.M)
    return {name: getattr(fusedopt, name) for name in names}


def row_of(name: str, part: int) -> list[str]:
    """The cells of an optimizer's row in a table of the page."""
    text = (ROOT / "docs/optimizers.md").read_text().split("## Formulas")[part]
    (line,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, re.M)
    return [cell.strip() for cell in line.split("|")]


def test_every_optimizer_is_on_its_page() -> None:
    made = {
        name
        for name in fusedopt.__all__
        if isinstance(getattr(fusedopt, name), type)
        and issubclass(getattr(fusedopt, name), torch.optim.Optimizer)
    }
    assert set(listed_optimizers()) == made


@pytest.mark.parametrize("name", listed_optimizers())
def test_states_of_optimizers_are_as_listed(name: str) -> None:
    """Their keys, their bytes, and whether they may be codes."""
    keys, size, codes, _ = row_of(name, 0)
    options = {"momentum": 0.9} if name == "SGD" else {}
    make = listed_optimizers()[name]
    param = torch.nn.Parameter(torch.ones(2**8, 2**8))
    param.grad = torch.ones_like(param)
    optimizer = make([param], **options)
    optimizer.step()
    assert [f"`{key}`" for key in optimizer.state[param] if key != "step"] == keys.split(", ")
    states = {key: value for key, value in optimizer.state[param].items() if key not in NUMBERS}
    assert int(size) == sum(value.itemsize for value in states.values())
    try:
        optimizer = make([param], state_dtype="int8", **options)
    except ValueError:
        assert codes == "-"
    else:
        optimizer.step()
        states = {key: value for key, value in optimizer.state[param].items() if key not in NUMBERS}
        assert codes == f"{sum(value.nbytes for value in states.values()) / param.numel():.2f}"


@pytest.mark.parametrize("name", listed_optimizers())
def test_defaults_of_optimizers_are_as_listed(name: str) -> None:
    defaults = row_of(name, 1)[0].strip("`")
    parameters = inspect.signature(listed_optimizers()[name]).parameters
    found = eval(f"dict({defaults})")
    assert found == {key: parameters[key].default for key in found}
    # Nothing that an optimizer has by itself is left out but switches, and what is off.
    numbers = [
        key
        for key, one in parameters.items()
        if isinstance(one.default, float | tuple) and one.default != 0
    ]
    assert set(numbers) <= set(found)


def test_the_places_of_a_new_optimizer_are_those_of_the_test() -> None:
    page = (ROOT / "docs/optimizers.md").read_text()
    assert re.findall(r"^\d\. `([^`]+)`", page, re.M) == list(PLACES)
