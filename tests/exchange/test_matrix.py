"""Every architecture, tokenizer, ZeRO stage and number of ranks, exported in fp32 and bf16: parity as one table."""

from __future__ import annotations

import re

import pytest

from chatgot.exchange.export import ExportArguments, export
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml, write_text
from tests.training import in_process

pytestmark = [pytest.mark.launches, pytest.mark.slow]


def test_every_kind_of_run_is_exported_with_parity(tmp_path, caplog):
    pytest.importorskip("transformers")
    caplog.set_level("INFO")
    text, table = write_text(tmp_path / "text.txt"), []
    for architecture in ("gpt2", "modern"):
        config = write_run_yaml(tmp_path / "run.yaml", model={"architecture": architecture})
        for tokenizer in ("char", "byte", "bpe"):
            for stage in range(4):
                engine = write_json(tmp_path / "engine.json", engine_json(stage))
                for ranks in (1, 2):
                    out = tmp_path / f"{architecture}-{tokenizer}-{stage}-{ranks}"
                    more = (f"data.tokenizer={tokenizer}", "data.bpe_vocab_size=300", "data.val_fraction=0.3")
                    argv = in_process.argv(engine, out, config, text, *more)
                    if ranks == 1:
                        assert in_process.train(argv) == 0
                    else:
                        run_ranks([str(ROOT / "launch" / "train.py"), *argv], ranks)
                    for dtype in ("fp32", "bf16"):
                        caplog.clear()
                        export(ExportArguments(out, tmp_path / f"{out.name}-{dtype}", dtype=dtype))
                        figures = re.findall(r"transformers: max \|Δlogits\| (\S+)", caplog.text)
                        assert len(figures) == 1
                        assert "the same text back" in caplog.text
                        table.append(f"{architecture:7} {tokenizer:5} {stage} {ranks} {dtype} {figures[0]}")
                        print(table[-1], flush=True)
    assert len(table) == 96
