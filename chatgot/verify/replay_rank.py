"""One rank of a replay: started by launch/run with the task's path, see chatgot.verify.replay."""

import json
import os
import sys
from pathlib import Path


def main(task_path: str) -> None:
    """Resume, train, compare, and let rank 0 write what came of it."""
    import torch

    from chatgot.distributed import find_place
    from chatgot.training.run import TrainArguments, leave, prepare_run

    task = json.loads(Path(task_path).read_text(encoding="utf-8"))
    if task["deterministic"] and torch.cuda.is_available():  # as the journal's steps were; a CPU needs no asking
        torch.use_deterministic_algorithms(True)
    arguments = TrainArguments(
        deepspeed_config=task["deepspeed_config"],
        out_dir=Path(task["out_dir"]),
        config=task["config"],
        data=task["data"],
        resume_from=task["resume_from"],
    )
    loop = prepare_run(arguments, find_place())
    for _ in range(task["steps"]):
        loop.advance()
    loop.proof.flush()
    overlap = loop.proof.overlap
    if overlap is not None:
        result = {
            "compared": overlap.compared,
            "difference": overlap.difference and "step {}: {}".format(*overlap.difference),
            "compares": overlap.compares,
            "compares_anything": overlap.compares_anything,
        }
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")
    leave()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # Python puts the script's own folder there

    from chatgot.errors import ChatGoTError

    try:
        main(sys.argv[1])
    except ChatGoTError as error:
        print(f"\nchatgot: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # see cli.train: the process group is still joined
