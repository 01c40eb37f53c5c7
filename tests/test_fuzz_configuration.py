"""Whatever stands in a run YAML, a DeepSpeed JSON, an override or a hostfile: it is read, or it is refused by a
ChatGoTError of bounded length. CHATGOT_FUZZ=10000 tries as many cases of each; by default they are few.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatgot.config.overrides import parse_overrides
from chatgot.config.run import RunConfig, load_run_config, preset_names
from chatgot.data.reading import check_encoding
from chatgot.deepspeed_json import check, schema
from chatgot.deepspeed_json.read import parse_document, shipped_jsons
from chatgot.deepspeed_json.resolve import resolve
from chatgot.deepspeed_json.settings import ChatGoTSection, dotted_keys
from chatgot.devices import DeviceFacts
from chatgot.errors import ChatGoTError
from chatgot.launcher.hosts import read_hostfile
from tests.support import ROOT

CASES = int(os.environ.get("CHATGOT_FUZZ", "100"))
FUZZ = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize="CHATGOT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
)
LONGEST = 400
"""Characters of a line of a refusal, beside those of a list of what is allowed."""

PRESETS = [(ROOT / "chatgot" / "presets" / f"{name}.yaml").read_text() for name in preset_names()]
JSONS = [path.read_text() for path in shipped_jsons().values()]
RUN_KEYS = sorted(dotted_keys(RunConfig))
DS_KEYS = sorted({*schema.NODES, *dotted_keys(ChatGoTSection, "chatgot.")})
NASTY = [
    *("inf", "-inf", ".inf", ".nan", "NaN", "1e999", "-0", "0x7f", "1_000", "9" * 5000, "-" + "1" * 5000, "1e-400"),
    *("null", "~", "true", "yes", "''", '"\\ud800"', '"\\u0000"', "'\ud800'", "\x00", "\ufeff", "\x85", "\u2028", "\r"),
    *("[" * 50, "{" * 50, "[" * 5000, '{"a":' * 3000, "]", "}", ": ", "- ", "? ", "|\n ", ">", "%YAML 9.9\n", "---\n"),
    *("&a [*a]", "&a {b: *a}", "*a", "<<: *a", "!!python/object:os.system x", "!!binary =", "!!set {a}", "!!int x"),
    *("2001-99-99", "2001-12-14t21:59:43.10-05:00", "12:30:45", "0o17", "=", "<<", "auto", "#", "//", "/* ", "'''"),
    *(str(2**63), str(2**64), str(-(2**64)), "1" + "0" * 400, "0.1" + "0" * 400, "\\", '"', "é" * 300, "\t"),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**64, -(2**70), 10**4000, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["auto", "cpu", "nvme", "AdamW", "Muon", "cosine", "\ud800", "x" * 5000]),
)
keys = st.text(max_size=8) | st.sampled_from(["\ud800", "", "a.b", "model", "stage"])
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


def texts(originals: list[str]) -> st.SearchStrategy[str]:
    """An original with pieces cut out, doubled and put in; or any text."""

    @st.composite
    def mutated(draw: st.DrawFn) -> str:
        text = draw(st.sampled_from(originals))
        for _ in range(draw(st.integers(1, 6))):
            start = draw(st.integers(0, len(text)))
            end = min(len(text), start + draw(st.integers(0, 40)))
            piece = draw(st.sampled_from(NASTY) | st.text(string.printable, max_size=8) | st.just(text[start:end] * 2))
            text = text[:start] + piece + text[end:]
        return text

    return mutated() | st.text(max_size=200) | st.lists(st.sampled_from(NASTY), max_size=30).map("".join)


def nested(keys: list[str]) -> st.SearchStrategy[dict[Any, Any]]:
    """A tree with known keys and any values."""

    def build(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
        tree: dict[Any, Any] = {}
        for dotted, value in pairs:
            here, (*sections, last) = tree, dotted.split(".")
            for section in sections:
                if not isinstance(here.get(section), dict):
                    here[section] = {}
                here = here[section]
            here[last] = value
        return tree

    return st.lists(st.tuples(st.sampled_from(keys), trees | scalars), max_size=8).map(build)


def accepted_or_refused(read: Callable[[], object]) -> None:
    """Nothing but success or a bounded ChatGoTError."""
    try:
        read()
    except ChatGoTError as error:
        message = str(error)
        message.encode("utf-8")
        for line in message.splitlines():
            assert len(line.partition("expected one of")[0]) < LONGEST, line


@FUZZ
@given(
    source=texts(PRESETS) | (nested(RUN_KEYS) | trees).map(lambda tree: yaml.safe_dump(tree)) | st.binary(max_size=99)
)
def test_any_run_yaml(source: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass"))

    def read() -> None:
        config = load_run_config(str(path), {"model.n_layers": 2})
        check_encoding(config.data.encoding)
        yaml.safe_dump(config.to_dict(), allow_unicode=True).encode()

    accepted_or_refused(read)


@FUZZ
@given(source=texts(JSONS) | (nested(DS_KEYS) | trees).map(json.dumps), ranks=st.integers(1, 9), cuda=st.booleans())
def test_any_deepspeed_json(source: str, ranks: int, cuda: bool) -> None:
    facts = DeviceFacts("cuda" if cuda else "cpu", bf16=True, fp16=cuda)

    def read() -> None:
        resolved = resolve(
            parse_document(source, "fuzz.json"), {"gradient_clipping": 1.0}, world_size=ranks, facts=facts
        )
        complete = resolved.complete(1_000_000, max_steps=10)
        report = check.Report("fuzz.json", tuple(complete.findings.all), complete)
        list(check.as_text(report, True))
        check.as_json(report, True)
        complete.engine_config().to_dict()

    accepted_or_refused(read)


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*RUN_KEYS, *(f"ds.{key}" for key in DS_KEYS)]), st.sampled_from(NASTY) | st.text()
        ).map("=".join)
        | st.text(max_size=30),
        max_size=4,
    )
)
def test_any_overrides(items: list[str]) -> None:
    def read() -> None:
        run, ds = parse_overrides(items)
        load_run_config("tiny", run)
        document = parse_document(JSONS[0], "fuzz.json")
        resolve(document, ds, world_size=1, facts=DeviceFacts("cuda", True, True)).complete(
            10
        ).engine_config().to_dict()

    accepted_or_refused(read)


@FUZZ
@given(source=texts(["worker-1 slots=8\nworker-2 slots=8\n# a comment\n"]) | st.binary(max_size=99))
def test_any_hostfile(source: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "hosts"
    path.write_bytes(source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass"))
    accepted_or_refused(lambda: read_hostfile(path))
