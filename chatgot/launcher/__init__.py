"""launch/run: start the ranks of one machine, pass signals on to all of them at once, and end with the first failing
rank's exit code.

DeepSpeed's single-node runner (0.19.8, launcher/runner.py and launch.py) does neither: SIGTERM to it leaves the ranks
behind as orphans, ranks get a signal one after the other, and a failing launch.py can end as exit code 0.
"""

from chatgot.launcher.command import main

__all__ = ["main"]
