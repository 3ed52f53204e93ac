"""Progress of a run: a bar on a terminal where tqdm is installed, else a line for each case."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


def make_bar(total: int) -> Any:
    """A bar, or None where there can be none."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="round")


class Progress:
    """Tells on standard error which case is being measured."""

    def __init__(self, total: int) -> None:
        self._bar = make_bar(total)
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def case(self, name: str) -> None:
        """The next case begins."""
        if self._bar is not None:
            self._bar.set_description(name)
        else:
            print(f"{time.perf_counter() - self._start:6.1f} s  {name}", file=sys.stderr)

    def preparing(self, name: str) -> None:
        """An implementation is being built, or, if the name is empty, none any more."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"preparing {name}" if name else "")

    def update(self, rounds: int = 1) -> None:
        """So many rounds are done."""
        if self._bar is not None:
            self._bar.update(rounds)
