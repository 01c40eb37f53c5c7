"""Real ranks on a disk that fills up and is emptied again.

Arguments: a JSON of runs {"name", "argv" (of train.py), "filler", "fill", "empty"}, and where each rank reports its
    exit codes.
After step `fill` rank 0 fills the disk with the file `filler`, after step `empty` it deletes that file.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

from chatgot.distributed import find_place
from chatgot.errors import ChatGoTError
from chatgot.training import run, saving
from tests.training.in_process import arguments


def fill(path: Path) -> None:
    """Write until nothing more fits on the disk."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def main() -> None:
    place, saving.RETRY_MINUTES = find_place(), 0.0  # three failures in a row end a run, whenever they come
    codes = {}
    for item in json.loads(Path(sys.argv[1]).read_text()):
        try:
            loop = run.prepare_run(arguments(item["argv"]), place)
            steps = loop.steps

            def disturbed(steps=steps, item=item):
                for step in steps():
                    if place.rank == 0 and step == item["fill"]:
                        fill(Path(item["filler"]))
                    if place.rank == 0 and step == item["empty"]:
                        Path(item["filler"]).unlink()
                    yield step

            loop.steps = disturbed
            with loop.stop:
                codes[item["name"]] = run.finish(loop)
        except ChatGoTError as error:
            codes[item["name"]] = error.exit_code
    Path(f"{sys.argv[2]}.{place.rank}").write_text(json.dumps(codes))
    run.leave()


if __name__ == "__main__":
    main()
