"""gpu_results.json: the device, the versions, and every test with its outcome and its figures.

The file is rewritten after every test, so that a session that is cut off still tells what it found, and in which test
it was. `python -m tests.gpu.report` writes it where not even pytest can run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import machine

FORMAT = 1


class Report:
    """The results of one session."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(os.environ.get("CHATGOT_GPU_RESULTS") or "gpu_results.json").absolute()
        self.warnings: dict[str, int] = {}
        self._tests: dict[str, dict[str, Any]] = {}
        self._started = time.time()
        self._facts: dict[str, Any] | None = None

    def begin(self, name: str) -> None:
        """A test starts: until it ends it stands in the file as running."""
        self._tests[name] = {"outcome": "running"}
        self.write()

    def end(self, name: str, outcome: str, seconds: float, figures: dict[str, Any], message: str | None) -> None:
        """A test has ended. outcome: passed, failed or skipped; message: the reason of the latter two."""
        self._tests[name] = {"outcome": outcome, "seconds": round(seconds, 2), "figures": plain(figures)}
        if message:
            self._tests[name]["message"] = message
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self._facts is None:
            self._facts = {"device": machine.device_facts(), "versions": machine.versions()}
        outcomes = [test["outcome"] for test in self._tests.values()]
        tree = {
            "format": FORMAT,
            "note": machine.missing(),
            "dry_run_on_cpu": machine.DRY_RUN,
            **self._facts,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
            "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
            "tests": self._tests,
            "warnings": self.warnings,
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(tree, indent=2) + "\n")
        os.replace(temporary, self.path)


def plain(value: Any) -> Any:
    """The same as JSON has it: floats with six significant digits, nan and inf as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        return rounded if abs(rounded) < float("inf") else str(value)
    return value


def line(figures: dict[str, Any]) -> str:
    """One line: 'worst = 1.2e-06, step_ms = 8.31'."""
    return ", ".join(f"{key} = {value}" for key, value in plain(figures).items())


if __name__ == "__main__":
    Report(Path(sys.argv[1]) if len(sys.argv) > 1 else None).write()
