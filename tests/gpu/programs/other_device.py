"""A list of runs with the training program in this process: {"argv", "abandon_after": step or null}; the first weights
of each are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chatgot.training.run import leave
from tests.gpu import program
from tests.gpu.programs.digests import parameter_digests


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    found = [program.train(item["argv"], item["abandon_after"], parameter_digests) for item in plan]
    Path(sys.argv[2]).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
