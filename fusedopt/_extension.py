"""The compiled module `_C`, or an ImportError that says why it does not load.

Everything else in the package takes it from here: `from fusedopt._extension import _C`.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

_HERE = Path(__file__).parent


def _load() -> ModuleType:
    found = str(torch.__version__)
    record: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        record = json.loads((_HERE / "_build_info.json").read_text())
    built = record.get("torch_version", "unknown")

    # torch's C++ interface changes with every minor version, and a module built against another
    # one may load and then crash, so this is checked before loading.
    if built != "unknown" and built.split(".")[:2] != found.split(".")[:2]:
        text = _explain("it was built against another torch", built, found)
        raise ImportError(f"{text}\n  to install it: {_wheel_for(found, record)}")
    try:
        return importlib.import_module("fusedopt._C")
    except ImportError as error:
        raise ImportError(_explain(str(error), built, found)) from error


def _wheel_for(torch_version: str, record: Mapping[str, str]) -> str:
    """What to install for a torch, by the version that wheels have."""
    major, minor = torch_version.split(".")[:2]
    cuda = record.get("cuda_version", "").replace(".", "")
    label = f"+torch{major}.{minor}.{f'cu{cuda}' if cuda else 'cpu'}"
    return f"the wheel fusedopt=={record.get('version', '')}{label}"


def _explain(cause: str, built: str, found: str) -> str:
    files = sorted(path.name for path in _HERE.glob("_C.*") if path.suffix in {".so", ".pyd"})
    if not files:
        cause = "it was not built"
    elif not any(f"_C{suffix}" in files for suffix in EXTENSION_SUFFIXES):
        cause = f"it was built for another Python than this one ({sys.version.split()[0]})"
    return (
        f"fusedopt's compiled module cannot be loaded: {cause}\n"
        f"  file: {', '.join(files) or 'none'} in {_HERE}\n"
        f"  torch: built against {built}, found {found}\n"
        "  to build it: `make build` in a checkout, "
        "`pip install --no-build-isolation .` for an installation"
    )


if TYPE_CHECKING:
    from fusedopt import _C as _C
else:
    _C = _load()
