"""Runs of the real training program, one after the other; reports what an outsider could compare.

Each run: {"name", "argv" (of train.py), "json_micro_batch": what its JSON is pretended to have said}.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

from chatgot.cli import train_parser
from chatgot.distributed import find_place
from chatgot.errors import ChatGoTError
from chatgot.training import run


def one(item: dict[str, Any], place: Any) -> dict[str, Any]:
    arguments = train_parser().parse_args(item["argv"])
    loop = run.prepare_run(
        run.TrainArguments(
            deepspeed_config=arguments.deepspeed_config,
            out_dir=arguments.out_dir,
            config=arguments.config,
            data=arguments.data,
            resume_from=arguments.resume_from,
            overrides=tuple(arguments.overrides),
        ),
        place,
    )
    loop.json_micro_batch = item.get("json_micro_batch", loop.json_micro_batch)
    started_at, exit_code = loop.step, 0
    try:
        with loop.stop:
            exit_code = run.finish(loop)
    except ChatGoTError as error:
        exit_code = error.exit_code
    loop.ranks.barrier()
    gathered = loop.ranks.gather((exit_code, loop.engine.config.micro_batch_size))
    loop.engine.engine.destroy()
    return {
        "started_at": started_at,
        "exit_codes": [rank[0] for rank in gathered],
        "micro_batches": [rank[1] for rank in gathered],
    }


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    results = {}
    for item in plan:
        print(item["name"], flush=True)
        results[item["name"]] = one(item, place)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    run.leave()


if __name__ == "__main__":
    main()
