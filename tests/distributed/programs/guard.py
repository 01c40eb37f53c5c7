"""A run on every rank that one rank's loss leads astray: it goes back and goes on, or stops. Started once by a test."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from chatgot.distributed import ControlGroup, find_place
from chatgot.errors import NumericsError
from chatgot.training import run
from tests.training import in_process
from tests.training.poison import Poison


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, line in plan["runs"].items():
        print(name, flush=True)
        loop = run.prepare_run(in_process.arguments(line), find_place())
        poison = None if name.startswith("clean") else Poison(loop, plan["samples"], rank=1)
        try:
            run.finish(loop)
            outcome = {"step": loop.step, "position": loop.position.next_sample, "rollbacks": loop.guard.rollbacks}
        except NumericsError as error:
            outcome = {"exit_code": error.exit_code, "text": str(error)}
        found[name] = [outcome, None if poison is None else poison.fed]
    ranks = ControlGroup()
    gathered = ranks.gather(found)
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(gathered))
    run.leave()


if __name__ == "__main__":
    main()
