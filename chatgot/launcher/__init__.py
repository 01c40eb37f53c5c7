"""launch/run: start the ranks of one machine, pass signals on to all of them at once, and end with the first failing
rank's exit code.

It exists because of what DeepSpeed's single-node runner does (deepspeed 0.19.8, launcher/runner.py and launch.py):
SIGTERM to the runner leaves the ranks behind as orphans, ranks get a signal one after the other, and a failing
launch.py can end as exit code 0. Imports the standard library and config.errors only, so that --help answers at once
and devices are counted without a CUDA context.
"""

from chatgot.launcher.command import main

__all__ = ["main"]
