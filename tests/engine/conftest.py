from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chatgot.distributed import find_place
from chatgot.engine.build import join


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """One rank, joined as a training run does it; nothing of it is left for other tests."""
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    join(find_place(environ=os.environ), "cpu")
    yield
    import deepspeed

    deepspeed.comm.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
