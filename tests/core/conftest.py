"""What the tests of the core share: the core itself, and builds of it with faults."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .build import JOBS, build
from .faults import Builds, make, make_faultless
from .library import Core


@pytest.fixture(scope="session")
def core() -> Core:
    """The core as it is shipped, but without torch."""
    return Core(build("plain"))


@pytest.fixture(scope="session", autouse=True)
def builds(request: pytest.FixtureRequest) -> Iterator[Builds]:
    """The builds with the faults that the tests to come ask for, and the one without, which has no
    name. They are made while other tests run, most of which keep one core busy."""
    items = [item for item in request.session.items if item.path.name == "test_mutation.py"]
    wanted = [item.callspec.params for item in items if isinstance(item, pytest.Function)]
    pool = ThreadPoolExecutor(max(1, JOBS - 1))
    made: Builds = {}
    if wanted:
        made["", ""] = pool.submit(make_faultless)

    def make_after(check: str, name: str) -> Path:
        made["", ""].result()  # of which the others take parts
        return make(check, name)

    for params in wanted:
        if "name" in params:
            fault = str(params["check"]), str(params["name"])
            made[fault] = pool.submit(make_after, *fault)
    yield made
    pool.shutdown(cancel_futures=True)
