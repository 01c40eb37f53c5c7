from __future__ import annotations

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What the data room has said so far in a test, from a level on."""
    caplog.set_level(logging.INFO, logger="chatgot")
    return lambda level=logging.INFO: [record.getMessage() for record in caplog.records if record.levelno >= level]
