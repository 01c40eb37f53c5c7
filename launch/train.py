"""deepspeed launch/train.py --deepspeed_config ds_configs/bf16_zero2.json --config tiny --data my.txt --out_dir
runs/a
"""

import signal
import sys
from pathlib import Path

# nobody listens yet: they wait until chatgot.training.stop does
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from chatgot.cli import train  # noqa: E402 - see above

if __name__ == "__main__":
    train()
