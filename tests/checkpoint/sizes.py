"""Checkpoints of many engines, as large as estimated or not. Ranks are real; arguments: a folder, and where rank 0
writes its results.

The folder holds plan.json, {name: DeepSpeed JSON}, run.yaml and text.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chatgot.checkpoint import manifest
from chatgot.distributed import find_place
from chatgot.training import run
from tests.support import write_json
from tests.training import in_process


def measure(folder: Path, place) -> dict[str, tuple[int, int]]:
    """{name: (estimated, written)} bytes; estimated before the first step."""
    found = {}
    for name, tree in json.loads((folder / "plan.json").read_text()).items():
        engine = write_json(folder / f"{name}.{place.world_size}.{place.rank}.json", tree)
        out = folder / f"{name}@{place.world_size}"
        words = in_process.argv(engine, out, folder / "run.yaml", folder / "text.txt")
        loop = run.prepare_run(in_process.arguments(words), place)
        assert loop.saving.saver.estimated_bytes == loop.memory.plan.checkpoint
        with loop.stop:
            run.finish(loop)
        [checkpoint] = (out / "checkpoints").glob("step-*")
        found[name] = (loop.saving.saver.estimated_bytes, manifest.bytes_of(checkpoint, manifest.read(checkpoint)))
    return found


def main() -> None:
    place = find_place()
    found = measure(Path(sys.argv[1]), place)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    run.leave()


if __name__ == "__main__":
    main()
