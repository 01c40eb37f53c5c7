"""A file system of its own, of a given size, for a test: a tmpfs, which only root may mount, or who is root in a
namespace of his own.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, environment


@contextlib.contextmanager
def small_disk(place: Path, size: int, inodes: int = 10_000) -> Iterator[Path]:
    """A file system of `size` bytes at `place`, a folder that is made."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(place)],
        check=True,
        capture_output=True,
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def needs_small_disk(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test that mounts: here where that is allowed, else in a process that is root of its own user and mount
    namespace, else not.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        probe = kwargs["tmp_path"] / "probe"
        try:
            with small_disk(probe, 1 << 20):
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            _run_in_namespace(kwargs["request"].node.nodeid, str(getattr(error, "stderr", error)))
            return
        test(*args, **kwargs)

    return run


def _run_in_namespace(test: str, why: str) -> None:
    try:
        allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"nothing can be mounted ({why}), and there is no unshare: {error}")
    if allowed.returncode:
        pytest.skip(f"nothing can be mounted ({why}), and no namespace be made ({allowed.stderr})")
    program = ["unshare", "-rm", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", test]
    done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout, done.stdout
