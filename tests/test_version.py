"""Two checkouts of one version are told apart by their code."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import chatgot
from chatgot.version import code_hash


def test_an_edited_module_has_another_hash(tmp_path: Path):
    copy = shutil.copytree(Path(chatgot.__file__).parent, tmp_path / "chatgot")
    spec = importlib.util.spec_from_file_location("copied_version", copy / "version.py")
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.code_hash() == code_hash()
    (copy / "model" / "gpt.py").write_text((copy / "model" / "gpt.py").read_text() + "# edited\n")
    copied.code_hash.cache_clear()  # as in another process
    assert copied.code_hash() != code_hash()
