"""deepspeed launch/train.py --deepspeed_config ds_configs/bf16_zero2.json --config tiny --data my.txt --out_dir
runs/a
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from chatgot.cli import train

if __name__ == "__main__":
    train()
