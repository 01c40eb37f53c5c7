from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import write_text

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of the tests stays out of the user's cache, also in the processes that tests start."""
    os.environ["CHATGOT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, the same in every test."""
    return write_text(tmp_path_factory.mktemp("text") / "night.txt")
