"""What the tests of the core share: the core itself, and a start on what they build."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from .build import JOBS, build
from .library import Core

POOL = pytest.StashKey[ThreadPoolExecutor]()


@pytest.fixture(scope="session")
def core() -> Core:
    """The core as it is shipped, but without torch."""
    return Core(build("plain"))


def is_of_the_core(item: pytest.Item) -> bool:
    return Path(__file__).parent in item.path.parents


def needs_the_core(item: pytest.Item) -> bool:
    return is_of_the_core(item) or item.path.parent.name == "machine_code"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that need the core come last: it is built while the others run."""
    items.sort(key=needs_the_core)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts on the builds, in the order of the tests, and so that these get their turn first."""
    items = [item for item in session.items if is_of_the_core(item)]
    # Of several processes one is enough.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    if not items or session.config.option.collectonly or worker != "gw0":
        return
    pool = ThreadPoolExecutor(max(1, JOBS - 1), initializer=os.nice, initargs=(5,))
    session.config.stash[POOL] = pool
    pool.submit(build, "plain")
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item.module, "build_ahead"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            pool.submit(partial(item.module.build_ahead, **params))


def pytest_unconfigure(config: pytest.Config) -> None:
    if POOL in config.stash:
        config.stash[POOL].shutdown(cancel_futures=True)
