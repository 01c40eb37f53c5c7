"""Write the tables of verdicts in README.md and ds_configs/README.md anew, from the rules.

python -m tests.deepspeed_json.generate_tables
"""

from __future__ import annotations

import re
from pathlib import Path

from chatgot.deepspeed_json.explain import verdict_table
from tests.support import ROOT

FILES = {ROOT / "README.md": False, ROOT / "ds_configs" / "README.md": True}
"""File -> whether its table has the reasons."""
TABLE = re.compile(r"^\| verdict \|.*\n(?:\|.*\n)+", re.MULTILINE)


def generate(file: Path) -> str:
    """The whole file, its table anew."""
    text, table = file.read_text(encoding="utf-8"), verdict_table(FILES[file]) + "\n"
    assert len(TABLE.findall(text)) == 1
    return TABLE.sub(lambda _: table, text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(generate(file), encoding="utf-8")
