import pytest

from .build import build
from .library import Core


@pytest.fixture(scope="session")
def core() -> Core:
    """The core as it is shipped, but without torch."""
    return Core(build("plain"))
