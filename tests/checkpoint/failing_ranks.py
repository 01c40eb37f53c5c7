"""Two real ranks, one of which cannot write during some saves: the kernel refuses to let its files grow (RLIMIT_FSIZE).

Arguments: a JSON of runs {"name", "argv" (of train.py), "fail_at": steps at whose save rank 1 must not write, "nvme":
    a folder that DeepSpeed shall take for what a rank offloads, where aio is not built; or null}, and where to report.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from chatgot.distributed import find_place
from chatgot.errors import ChatGoTError
from chatgot.training import run, saving
from chatgot.training.loop import Loop
from tests.training.in_process import arguments

UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


def main() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    place = find_place()
    save, saving.RETRY_MINUTES = Loop.save, 0.0  # three failures in a row end a run, whenever they come
    fail_at, nvme = set[int](), None

    def save_with_a_full_disk(self: Loop, must: bool = False) -> None:
        full = place.rank == 1 and self.step in fail_at
        if nvme is not None:
            self.engine.engine.zero_nvme_offload_optimizer = lambda: True
            self.engine.engine.optimizer.optimizer_swapper = SimpleNamespace(swap_folder=nvme)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, UNLIMITED[1]) if full else UNLIMITED)
        try:
            save(self, must)
            self.saving.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)

    Loop.save = save_with_a_full_disk
    results = {}
    for item in json.loads(Path(sys.argv[1]).read_text()):
        fail_at, nvme = set(item["fail_at"]), item.get("nvme")
        try:
            code = run.train(arguments(item["argv"]))
        except ChatGoTError as error:
            code = error.exit_code
        results[item["name"]] = code
    Path(f"{sys.argv[2]}.{place.rank}").write_text(json.dumps(results))
    run.leave()


if __name__ == "__main__":
    main()
