"""How much memory an export takes beside the files that it maps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT, engine_json, environment, warm_python, write_json, write_run_yaml, write_text
from tests.training import in_process

pytestmark = pytest.mark.launches
LARGE = {"architecture": "gpt2", "d_model": 768, "d_hid": 6144, "n_layers": 2, "n_head": 12, "max_seq_length": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A small run, and one whose tensors are large beside everything else in the process."""
    folder = tmp_path_factory.mktemp("memory")
    text = write_text(folder / "text.txt")
    engine = write_json(folder / "engine.json", engine_json(1, micro=1, batch=1))
    for name, model in (("small", {}), ("large", LARGE)):
        config = write_run_yaml(folder / f"{name}.yaml", model=model, max_steps=1)
        assert in_process.train(in_process.argv(engine, folder / name, config, text)) == 0
    return folder / "small", folder / "large"


def test_an_export_takes_less_than_twice_the_largest_tensor(runs, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    formats = ("transformers-bf16", "transformers-fp32", "gguf-bf16")
    program = [warm_python(), "-m", "tests.exchange.peak", *map(str, runs), str(tmp_path), *formats]
    done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    largest = 4 * LARGE["d_model"] * LARGE["d_hid"]
    peaks = dict(line.split() for line in done.stdout.splitlines() if line.startswith(formats))
    assert peaks.keys() == set(formats)
    assert all(0 < int(peak) < 2 * largest for peak in peaks.values()), (largest, peaks)
