"""prepare: the same bytes every time, no validation text in training, and a refusal with numbers for what is not a
usable text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatgot.config.run import DataConfig
from chatgot.data import prepare as prepare_module
from chatgot.data import reading
from chatgot.data.corpus import FILE_END
from chatgot.data.prepare import prepare, prepare_cached
from chatgot.data.prepared import check_block_size, open_prepared
from chatgot.data.tokenizer import CharTokenizer
from chatgot.errors import ConfigError, DataError
from tests import hostile

KINDS = ["char", "byte", "bpe"]


def prose(words: int, seed: int = 0) -> str:
    """Text without repeats: random words, with the original corpus' non-ASCII characters."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnoprstuvwyéāē’…"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(500)]
    return "".join(rng.choice(vocabulary) + rng.choice([" ", " ", " ", ", ", "\n", "\n\n"]) for _ in range(words))


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def config(kind: str = "char", **changes) -> DataConfig:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    return DataConfig(tokenizer=kind, bpe_vocab_size=300, **changes)  # type: ignore[arg-type]


def whole(data) -> str:
    return "".join(data.tokenizer.decode(split) for split in (data.train, data.val, data.test) if split is not None)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_invariant_01_same_text_gives_same_bytes(kind, tmp_path):
    text = prose(3000)
    write(tmp_path / "a" / "book.txt", text)
    write(tmp_path / "b" / "book.txt", text)
    first = prepare(tmp_path / "a" / "book.txt", tmp_path / "out1", config(kind))
    code = f"""
        from chatgot.data.prepare import prepare
        from chatgot.config.run import DataConfig
        config = DataConfig(tokenizer={kind!r}, bpe_vocab_size=300)
        prepare({str(tmp_path / "b" / "book.txt")!r}, {str(tmp_path / "out2")!r}, config)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert first.fingerprint == open_prepared(tmp_path / "out2").fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_invariant_02_prepared_tokens_decode_to_the_text(kind, tmp_path):
    text = prose(3000) + "Né “à” – ē … ’ 🐉\r and a lone CR\n"
    data = prepare(write(tmp_path / "t.txt", text), tmp_path / "out", config(kind, test_fraction=0.2))
    assert whole(data) == text
    for split, tokens in (("train", data.train), ("val", data.val), ("test", data.test)):
        meta = data.meta.splits[split]
        assert tokens is not None
        part = data.tokenizer.decode(tokens)
        assert (meta.tokens, meta.characters, meta.bytes) == (len(tokens), len(part), len(part.encode()))
    assert isinstance(data.train, np.memmap)
    assert data.meta.vocab_size == data.tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_invariant_01_validation_text_is_not_in_training(kind, tmp_path, notes):
    """Every line is unique, so a line that two splits share could only come from a split after windowing or
    shuffling.
    """
    text = "".join(f"line {i} of the book\n" for i in range(4000))
    data = prepare(write(tmp_path / "t.txt", text), tmp_path / "out", config(kind, test_fraction=0.1))
    assert data.test is not None
    train, val, test = (set(data.tokenizer.decode(s).split("\n")[1:-1]) for s in (data.train, data.val, data.test))
    assert len(train) + len(val) + len(test) >= 3994
    assert not train & val
    assert not train & test
    assert not val & test
    assert data.meta.val_in_train_share == 0.0
    assert not notes(logging.WARNING)


def test_position_split_cuts_at_the_wished_character(tmp_path):
    text = prose(2000)
    data = prepare(write(tmp_path / "t.txt", text), tmp_path / "out", config(val_fraction=0.25))
    assert data.tokenizer.decode(data.train) == text[: int(len(text) * 0.75)]
    assert data.test is None


def test_bpe_is_trained_on_the_training_split_only(tmp_path):
    head = prose(4000)
    tokenizers = [
        prepare(write(tmp_path / f"{i}.txt", head[:9000] + tail[:1000]), tmp_path / str(i), config("bpe")).tokenizer
        for i, tail in enumerate((head[9000:], "zzzz qqqq " * 200))
    ]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_several_files_are_split_at_a_file_boundary(tmp_path):
    texts = {f"{i}.txt": prose(300, seed=i) for i in range(10)}
    for name, text in texts.items():
        write(tmp_path / "in" / name, text)
    data = prepare(tmp_path / "in", tmp_path / "out", config(test_fraction=0.1))
    assert data.meta.split_by == "file"
    assert data.tokenizer.decode(data.val) == texts["8.txt"] + FILE_END
    assert data.test is not None
    assert data.tokenizer.decode(data.test) == texts["9.txt"] + FILE_END
    assert data.tokenizer.decode(data.train) == "".join(texts[f"{i}.txt"] + FILE_END for i in range(8))
    assert [f.name for f in data.meta.files] == sorted(texts)


def test_files_too_large_for_a_file_boundary_are_split_by_position(tmp_path):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.txt", prose(300, seed=i))
    assert prepare(tmp_path / "in", tmp_path / "out", config()).meta.split_by == "position"
    assert prepare(tmp_path / "in", tmp_path / "out", config(split_by="file")).meta.split_by == "file"
    with pytest.raises(ConfigError, match="at least 2 text files, got 1"):
        prepare(tmp_path / "in" / "0.txt", tmp_path / "out1", config(split_by="file"))


def test_bom_and_windows_line_ends_are_removed_with_a_note(tmp_path, monkeypatch, notes):
    text = prose(500)
    plain = prepare(write(tmp_path / "a" / "t.txt", text), tmp_path / "plain", config())
    for chunk in (1 << 20, 7):  # 7: line ends and characters fall across chunk borders
        monkeypatch.setattr(reading.TextReader.__init__, "__defaults__", ("utf-8", chunk))
        windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
        data = prepare(write(tmp_path / "b" / "t.txt", windows), tmp_path / "windows", config())
        assert data.fingerprint == plain.fingerprint
        assert any("byte order mark removed" in n for n in notes())
        assert any(f"{text.count(chr(10)):,} Windows line ends" in n for n in notes())


def test_other_encodings_give_the_same_tokens(tmp_path):
    text = "né à la carte – “quoted” …\n" * 20 + prose(50).replace("ā", "").replace("ē", "")
    utf8 = prepare(write(tmp_path / "a.txt", text), tmp_path / "o1", config())
    for encoding in ("cp1252", "utf-16", "utf-16-be"):
        path = write(tmp_path / f"{encoding}.txt", text.encode(encoding))
        assert prepare(path, tmp_path / encoding, config(encoding=encoding)).fingerprint == utf8.fingerprint
    with pytest.raises(ConfigError, match=r"data\.encoding = 'utf-9'"):
        prepare(tmp_path / "a.txt", tmp_path / "o2", config(encoding="utf-9"))
    with pytest.raises(ConfigError, match="not an encoding of text"):
        prepare(tmp_path / "a.txt", tmp_path / "o2", config(encoding="base64"))


def test_existing_vocabulary_refuses_or_skips_characters_it_lacks(tmp_path, notes):
    text = prose(300)
    path = write(tmp_path / "t.txt", text[:2000] + "Ж" + text[2000:] + "ЖЩ")
    vocabulary = CharTokenizer(sorted(set(text)))
    with pytest.raises(DataError, match=r"2 characters .*'Ж' \(U\+0416\), 'Щ' \(U\+0429\); they stand 3 times"):
        prepare(path, tmp_path / "out", config(), tokenizer=vocabulary)
    data = prepare(path, tmp_path / "out", config(unknown_characters="skip"), tokenizer=vocabulary)
    assert whole(data) == text
    assert data.meta.train.characters + data.meta.val.characters == len(text)
    assert data.meta.skipped_characters == 3
    assert any("left out 3 characters" in n for n in notes())
    assert data.tokenizer.fingerprint == vocabulary.fingerprint


# --- duplicated text ------------------------------------------------------------------------------------------------


def test_text_that_stands_there_twice_is_reported(tmp_path, notes):
    text = prose(3000)
    data = prepare(write(tmp_path / "t.txt", text + "x\n" + text), tmp_path / "out", config())
    assert any(n.startswith("about") and "repeats an earlier passage" in n for n in notes())
    assert any("of the validation text also stands in the training text" in n for n in notes())
    assert data.meta.repeated_share == pytest.approx(0.5, abs=0.03)
    assert data.meta.val_in_train_share > 0.9


def test_same_file_twice_in_a_folder_is_reported_by_name(tmp_path, notes):
    for i, seed in enumerate([0, 1, 0, 2]):
        write(tmp_path / "in" / f"{i}.txt", prose(400, seed))
    data = prepare(tmp_path / "in", tmp_path / "out", config(split_by="file"))
    assert "2.txt has the same content as 0.txt" in notes()
    assert data.meta.repeated_share == pytest.approx(0.25, abs=0.03)
    assert data.meta.val_in_train_share == 0.0


# --- refusals -------------------------------------------------------------------------------------------------------


def test_invariant_01_prepare_refuses_to_eat_its_own_output(tmp_path):
    folder = tmp_path / "texts"
    write(folder / "book.txt", prose(300))
    with pytest.raises(DataError, match="inside the folder of texts"):
        prepare(folder, folder / "prepared", config())
    with pytest.raises(DataError, match="lies in it"):
        prepare(folder / "book.txt", folder, config())
    assert [p.name for p in folder.iterdir()] == ["book.txt"]
    out = folder / "prepared"
    prepare(folder / "book.txt", out, config())
    with pytest.raises(DataError, match="holds what `chatgot prepare` wrote"):
        prepare(folder, tmp_path / "out", config())
    with pytest.raises(DataError, match="already prepared"):
        prepare(out, tmp_path / "out", config())
    for name in ("train.bin", "meta.json", "tokenizer.json"):
        with pytest.raises(DataError, match="part of a prepared folder"):
            prepare(out / name, tmp_path / "out", config())
    with pytest.raises(DataError, match="inside the prepared folder"):
        prepare(folder / "book.txt", out / "again", config())
    assert not (tmp_path / "out").exists()


def test_run_folders_are_not_read_as_text(tmp_path):
    write(tmp_path / "runs" / "a" / "run.yaml", "")
    write(tmp_path / "runs" / "a" / "ds_config.json", "{}")
    write(tmp_path / "runs" / "a" / "samples" / "step-000001.txt", prose(300))
    with pytest.raises(DataError, match="run folder"):
        prepare(tmp_path / "runs", tmp_path / "out", config())


@pytest.mark.parametrize("text", ["", "\ufeff"])
def test_empty_text_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="the text is empty") as refusal:
        prepare(write(tmp_path / "t.txt", text), tmp_path / "out", config())
    assert refusal.value.exit_code == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "t.txt"]


def test_text_shorter_than_a_block_is_refused_with_both_numbers(tmp_path):
    path = write(tmp_path / "t.txt", prose(200)[:1000])
    with pytest.raises(DataError, match=r"train split has 900 tokens, .* = 901"):
        prepare(path, tmp_path / "out", config(), block_size=900)
    with pytest.raises(DataError, match=r"val split has 100 tokens, .* = 101"):
        prepare(path, tmp_path / "out", config(), block_size=100)
    data = prepare(path, tmp_path / "out", config(), block_size=99)
    with pytest.raises(DataError, match=r"val split has 100 tokens, .* = 101; .*data.val_fraction"):
        check_block_size(data.meta, 100)
    with pytest.raises(DataError, match="3 characters are too few"):
        prepare(write(tmp_path / "three.txt", "abc"), tmp_path / "out3", config())


@pytest.mark.parametrize("chunk", [1 << 20, 64, 5])
@pytest.mark.parametrize(
    ("bad", "reason"), [(b"\xff", "0xff"), (b"\xe2\x80", "0xe2"), (b"\xed\xa0\x80", "0xed"), (b"\xc3(", "0xc3")]
)
def test_invalid_utf8_is_refused_with_file_and_byte_offset(bad, reason, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(reading.TextReader.__init__, "__defaults__", ("utf-8", chunk))
    for before in ("é…" * 13, "é…" * 12 + "a", ""):
        start = len(before.encode())
        for after in (b"", b"hello\n"):
            path = write(tmp_path / "bad.txt", before.encode() + bad + after)
            with pytest.raises(DataError, match=rf"bad\.txt: not valid utf-8 at byte offset {start} \({reason}"):
                prepare(path, tmp_path / "out", config())


def test_utf16_file_gets_a_hint(tmp_path):
    with pytest.raises(DataError, match=r"byte offset 0 .*set data\.encoding: utf-16"):
        prepare(write(tmp_path / "t.txt", "hello".encode("utf-16")), tmp_path / "out", config())


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("kind", ["gzip", "zip", "parquet", "PDF", "xz"])
def test_files_that_are_no_text_are_known_by_their_first_bytes(kind, encoding, tmp_path):
    import gzip
    import io
    import lzma
    import zipfile

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("word/document.xml", "text")
    starts = {
        "gzip": gzip.compress(b"text"),
        "zip": packed.getvalue(),
        "parquet": b"PAR1\x15\x04",
        "PDF": b"%PDF-1.7",
        "xz": lzma.compress(b"text"),
    }
    with pytest.raises(DataError, match=f"book: .*{kind}.* by its first bytes, not text; unpack it"):
        prepare(write(tmp_path / "book", starts[kind]), tmp_path / "out", config(encoding=encoding))


def test_records_and_a_single_character_are_warned_of(tmp_path, notes):
    prepare(write(tmp_path / "book.jsonl", '{"text": "night"}\n' * 50), tmp_path / "out", config())
    assert any("book.jsonl: read as it stands, with its keys" in note for note in notes())
    prepare(write(tmp_path / "a.txt", "a" * 500), tmp_path / "a", config())
    assert any("one character, over and over" in note for note in notes())


def test_bpe_says_how_far_it_is(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("chatgot.data.prepare._SAY_SECONDS", 0.0)
    prepare(write(tmp_path / "book.txt", prose(3000)), tmp_path / "out", config("bpe"))
    said = [note for note in notes() if note.startswith("bpe: ")]
    assert said[0] == "bpe: learning 300 tokens from the training text"
    assert "characters read" in said[1]
    assert said[-2:][0].endswith("their pairs are merged")
    assert said[-1].startswith("bpe: 300 tokens are learned")


def test_special_files_are_refused_without_waiting_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="a FIFO, not a regular file"):
        prepare(tmp_path / "pipe.txt", tmp_path / "out", config())
    with pytest.raises(DataError, match="a character device, not a regular file"):
        prepare("/dev/zero", tmp_path / "out", config())
    write(tmp_path / "in" / "a.txt", prose(50))
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"b\.txt: a FIFO, not a regular file"):
        prepare(tmp_path / "in", tmp_path / "out", config())
    (tmp_path / "pipe.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        prepare(tmp_path / "in", tmp_path / "out", config())
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        prepare_cached(tmp_path / "in", config(), tmp_path / "cache")


@pytest.mark.parametrize("later", [prose(301), prose(299), prose(300, seed=1), prose(300) + "Ж"])
def test_file_that_changes_meanwhile_is_refused(later, tmp_path, monkeypatch):
    path = Path(write(tmp_path / "t.txt", prose(300)))
    from chatgot.data import prepare as module

    plan = module.plan_split

    def and_somebody_writes(*arguments):
        path.write_text(later, encoding="utf-8")
        return plan(*arguments)

    monkeypatch.setattr(module, "plan_split", and_somebody_writes)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(path, tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def test_folder_with_other_files_is_not_overwritten(tmp_path):
    path = write(tmp_path / "t.txt", prose(300))
    write(tmp_path / "out" / "thesis.doc", "precious")
    with pytest.raises(DataError, match="holds other files"):
        prepare(path, tmp_path / "out", config())
    with pytest.raises(DataError, match="not a folder"):
        prepare(path, tmp_path / "t.txt", config())
    first = prepare(path, tmp_path / "new", config()).fingerprint
    write(tmp_path / "t.txt", prose(400, seed=1))
    assert prepare(path, tmp_path / "new", config()).fingerprint != first  # an own, older output is replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out", "t.txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_say_where_each_file_begins_in_each_split(kind, tmp_path):
    texts = [prose(300, seed) + "\n" + prose(100 + 50 * seed, seed + 9) for seed in range(3)]
    for number, text in enumerate(texts):
        write(tmp_path / "texts" / f"{number}.txt", "\ufeff" + text.replace("\n", "\r\n"))
    data = prepare(str(tmp_path / "texts"), tmp_path / "out", config(kind, split_by="position", val_fraction=0.5))
    assert data.meta.parts is not None
    seen: dict[int, str] = {}
    for name, tokens in (("train", data.train), ("val", data.val)):
        raw, parts = data.tokenizer.decode(tokens).encode(), data.meta.parts[name]
        assert parts[0].begin == 0
        for part, end in zip(parts, [*(later.begin for later in parts[1:]), len(raw)]):
            before = seen.get(part.file, "")
            assert part.line == 1 + before.count("\n"), "a split may begin in the middle of a file"
            seen[part.file] = before + raw[part.begin : end].decode()
    assert list(seen.values()) == [text + FILE_END for text in texts]


def test_prepared_folder_of_the_first_format_opens_as_it_did(prepared):
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    fingerprint = open_prepared(prepared).fingerprint
    del meta["parts"]
    (prepared / "meta.json").write_text(json.dumps({**meta, "format_version": 1}), encoding="utf-8")
    data = open_prepared(prepared)
    assert data.fingerprint == fingerprint
    assert data.meta.parts is None


# --- prepared folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path) -> Path:
    return prepare(write(tmp_path / "t.txt", prose(1000)), tmp_path / "out", config()).path


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def change_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: os.truncate(d / "train.bin", 100), r"train\.bin: 100 bytes, meta\.json says \d+"),
        (lambda d: flip(d / "val.bin"), r"val\.bin: sha256 is"),
        (lambda d: (d / "val.bin").unlink(), r"val\.bin: missing"),
        (lambda d: (d / "meta.json").unlink(), r"meta\.json is missing"),
        (lambda d: os.truncate(d / "meta.json", 300), r"meta\.json: cannot be read"),
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json: no such"),
        (lambda d: CharTokenizer("abc").save(d / "tokenizer.json"), r"tokenizer\.json: sha256 of the vocabulary"),
        (lambda d: change_meta(d, format_version=99), r"format_version 99, this program reads 1 and 2"),
        (lambda d: change_meta(d, dtype="uint16"), r"dtype uint16"),
        (lambda d: change_meta(d, train=None), r"meta\.json.*train"),
        (lambda d: change_meta(d, parts={"train": [{"file": 1, "begin": 0, "line": 1}]}), r"parts\.train"),
        (lambda d: change_meta(d, surprise=1), r"surprise: (Extra inputs|Unexpected keyword)"),
    ],
)
def test_damaged_prepared_folder_is_a_data_error(damage, message, prepared):
    damage(prepared)
    with pytest.raises(DataError, match=message) as refusal:
        open_prepared(prepared)
    assert refusal.value.exit_code == 3
    with pytest.raises(DataError, match=message):
        prepare_cached(prepared, config(), prepared.parent / "cache")  # and it is not mistaken for a folder of texts


def test_verify_false_leaves_hashes_alone_but_not_sizes(prepared):
    flip(prepared / "val.bin")
    open_prepared(prepared, verify=False)
    os.truncate(prepared / "val.bin", 10)
    with pytest.raises(DataError, match="10 bytes"):
        open_prepared(prepared, verify=False)


def test_prepared_folder_is_opened_as_it_is(prepared, notes):
    data = prepare_cached(str(prepared), config("byte"), prepared.parent / "cache")
    assert data.path == prepared
    assert data.tokenizer.kind == "char"
    assert not (prepared.parent / "cache").exists()
    assert "opened prepared folder" in notes()[0]


# --- cache ----------------------------------------------------------------------------------------------------------


def test_cache_is_used_until_text_or_settings_change(tmp_path, monkeypatch, notes, caplog):
    monkeypatch.setenv("CHATGOT_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "t.txt", prose(500))

    def hit(**changes) -> bool:
        caplog.clear()
        prepare_cached(path, config(**changes))
        return "taken from" in notes()[-1]

    assert [hit(), hit(), hit(val_fraction=0.2), hit(kind="byte"), hit(kind="byte")] == [
        False,
        True,
        False,
        False,
        True,
    ]
    write(tmp_path / "t.txt", prose(500, seed=1))
    assert [hit(), hit()] == [False, True]
    assert len(list((tmp_path / "cache" / "prepared").glob("*/meta.json"))) == 4


def test_damaged_cache_entry_is_made_anew(tmp_path, notes):
    path = write(tmp_path / "t.txt", prose(500))
    first = prepare_cached(path, config(), tmp_path / "cache")
    flip(first.path / "train.bin")
    second = prepare_cached(path, config(), tmp_path / "cache")
    assert "damaged" in notes()[0]
    assert second.fingerprint == first.fingerprint == open_prepared(second.path).fingerprint


def test_text_that_changes_before_it_is_read_is_not_cached_under_its_old_date(tmp_path, monkeypatch):
    path = write(tmp_path / "t.txt", prose(500))
    key = prepare_module._cache_key

    def and_somebody_writes(*arguments):
        made = key(*arguments)
        write(tmp_path / "t.txt", prose(600, seed=2))
        return made

    monkeypatch.setattr(prepare_module, "_cache_key", and_somebody_writes)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare_cached(path, config(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]


def test_kill_between_the_renames_does_not_lose_the_earlier_folder(tmp_path, monkeypatch):
    path, out = write(tmp_path / "t.txt", prose(500)), tmp_path / "out"
    first = prepare(path, out, config()).fingerprint
    write(tmp_path / "t.txt", prose(500, seed=1))
    rename = os.rename

    def killed(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, out, config())
    monkeypatch.undo()
    assert not out.exists()
    os.truncate(path, 0)
    with pytest.raises(DataError, match="the text is empty"):
        prepare(path, out, config())
    assert open_prepared(out).fingerprint == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t.txt"]


def test_fingerprint_is_that_of_the_tokens_whatever_the_format(prepared):
    data = open_prepared(prepared)
    later = dataclasses.replace(data, meta=dataclasses.replace(data.meta, format_version=1, parts=None))
    assert later.fingerprint == data.fingerprint
    assert (
        data.fingerprint
        == hashlib.sha256(
            json.dumps(
                {
                    "format_version": 1,
                    "tokenizer": data.tokenizer.fingerprint,
                    "dtype": "uint8",
                    "splits": {
                        name: [len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest()]
                        for name, tokens in (("train", data.train), ("val", data.val))
                    },
                },
                sort_keys=True,
            ).encode()
        ).hexdigest()
    ), "run folders of before go on"


def test_two_processes_share_one_preparation_and_a_kill_leaves_nothing(tmp_path):
    path = write(tmp_path / "t.txt", prose(20000))
    code = f"""
        import logging, sys
        from chatgot.data.prepare import prepare_cached
        from chatgot.config.run import DataConfig
        logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
        print(prepare_cached({path!r}, DataConfig(), {str(tmp_path / "cache")!r}).fingerprint)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate()[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    taken = ["taken from" in " ".join(lines) for lines in outputs]  # after a line that says that it waits
    assert sorted(taken) == [False, True]
    [entry] = [path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]
    orphan = entry.with_name(
        f".{entry.name}.tmp-killed"
    )  # what a process leaves behind that was killed while it prepared
    write(orphan / "train.bin", b"half")
    assert prepare_cached(path, config(), tmp_path / "cache").fingerprint == outputs[0][-1]
    assert not orphan.exists()


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_memory_does_not_grow_with_the_text(kind, tmp_path):
    block = prose(20000).encode()
    with open(tmp_path / "big.txt", "wb") as file:
        for i in range(150):
            file.write(b"%d\n" % i + block)
    prepare(write(tmp_path / "small.txt", block), tmp_path / "warm-up", config(kind))
    tracemalloc.start()
    try:
        prepare(tmp_path / "big.txt", tmp_path / "out", config(kind))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "big.txt").stat().st_size > 24e6
    assert peak < 20e6  # the text alone is larger


def test_disk_that_fills_up_is_a_data_error_and_leaves_nothing(tmp_path):
    path = write(tmp_path / "t.txt", prose(20000))
    code = f"""
        import resource
        from chatgot.errors import DataError
        from chatgot.config.run import DataConfig
        from chatgot.data.prepare import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            prepare({path!r}, {str(tmp_path / "out")!r}, DataConfig())
        except DataError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert "out: cannot be written: File too large" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "t.txt"]
    with pytest.raises(DataError, match="cannot be written"):
        prepare(path, tmp_path / "t.txt" / "out", config())


def test_odd_contents_are_reported(tmp_path, notes):
    write(tmp_path / "in" / "a.txt", prose(300))
    write(tmp_path / "in" / "b.txt", "")
    write(tmp_path / "in" / "c.txt", "nul \0\0 here")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    prepare(tmp_path / "in", tmp_path / "out", config())
    assert any("linked/ (a link)" in n for n in notes())
    assert any("1 empty file left out: b.txt" in n for n in notes())
    assert any("c.txt: 2 NUL characters" in n for n in notes())


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("opened")
    path = prepare(write(folder / "t.txt", prose(1000)), folder / "out", config()).path
    return path, json.loads((path / "meta.json").read_text(encoding="utf-8"))


@hostile.few
@given(data=st.data())
def test_any_meta_json_is_read_or_refused(opened, data):
    path, said = opened
    (path / "meta.json").write_bytes(data.draw(hostile.files(said)))
    hostile.succeeds_or_refuses(lambda: open_prepared(path).fingerprint)
