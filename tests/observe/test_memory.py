from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from chatgot.observe.memory import peak_memory_gib


def test_peak_memory_is_the_most_ever_held_not_what_is_held_now():
    script = (
        "from chatgot.observe.memory import peak_memory_gib\nimport sys\nbefore = peak_memory_gib('cpu')\n"
        "block = bytearray(b'x') * 2**27\ndel block\nprint(peak_memory_gib('cpu') - before, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    grown, torch_imported = done.stdout.split()
    assert 0.12 < float(grown) < 0.2  # 2**27 bytes are 0.125 GiB
    assert torch_imported == "False"
    assert peak_memory_gib("cpu") > 0
