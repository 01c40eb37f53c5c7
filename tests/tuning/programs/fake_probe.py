"""Ends as a rank of a probe can end, without training anything: memory allows rank 0 nine samples and rank 1 three.

What rank 1 does beyond that is its first argument: 'killed', 'told' or 'broken'; 'fits' and 'environment': memory
allows everything; 'environment' writes its environment into the folder SEEN, 'hangs' its pid, and never ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(how: str, path: str) -> int:
    rank, micro = int(os.environ["RANK"]), json.loads(Path(path).read_text())["tree"]["train_micro_batch_size_per_gpu"]
    if how == "environment":
        Path(os.environ["SEEN"], f"{rank}.json").write_text(json.dumps(dict(os.environ)))
    if how == "hangs":
        Path(os.environ["SEEN"], f"{rank}.pid").write_text(str(os.getpid()))
        time.sleep(1000)
    if micro > 3 and rank == 1 and how != "fits":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "broken":
            print("the driver is gone", flush=True)
            return 1
        time.sleep(0.3)
        print("chatgot-probe: out of memory: injected", flush=True)
        return 6
    if micro > 3 and how != "fits":
        print("connection closed by peer", flush=True)
        return 1
    result = {"peak_bytes": micro * 100, "limit_bytes": 1000, "tokens_per_sec": 10.0 + rank}
    Path(path).with_name(f"result.{rank}.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
