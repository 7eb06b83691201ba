"""What the tests of runs share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def connected() -> Iterator[None]:
    """As in a terminal: under nohup, which asks to ignore SIGHUP, these tests may run as well."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("this system has no SIGHUP")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
