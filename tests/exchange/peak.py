"""Export runs after small ones, and print for each how far anonymous memory rose above where that left it, in bytes."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from chatgot.exchange.export import ExportArguments, export


def anonymous() -> int:
    """Memory of this process that no file holds."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def main(small: str, large: str, to: str, *formats: str) -> None:
    """`formats`: gguf-bf16 and the like."""
    for name in formats:
        format, dtype = name.split("-")
        export(ExportArguments(Path(small), Path(to) / f"small-{name}", format, dtype))
        before = highest = anonymous()
        done = threading.Event()

        def watch(done: threading.Event = done) -> None:
            nonlocal highest
            while not done.wait(0.001):
                highest = max(highest, anonymous())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            export(ExportArguments(Path(large), Path(to) / name, format, dtype))
        finally:
            done.set()
            watching.join()
        print(name, highest - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
