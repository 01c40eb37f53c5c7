"""What a resume may change only when it is told to, and what it may never change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chatgot.checkpoint import manifest
from chatgot.training import run
from chatgot.training.loop import Loop
from tests.support import engine_json, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv, contents, events, refused, series

STEPS, BATCH = 4, 8
SAVING = {"checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep_best": 1}}
MUON = {"type": "Muon", "params": {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}}


@pytest.fixture(scope="module")
def halves(tmp_path_factory, text_file) -> dict[int, Path]:
    """By stage, a folder with run.yaml, engine.json and a run in out/ that was left after step 4 of 8."""
    made = {}
    for stage in (0, 1):
        folder = made[stage] = tmp_path_factory.mktemp(f"stage{stage}")
        config = write_run_yaml(folder / "run.yaml", max_steps=2 * STEPS, eval_every=STEPS)
        engine = write_json(folder / "engine.json", engine_json(stage, batch=BATCH, chatgot=SAVING))
        in_process.abandon_after(STEPS, argv(engine, folder / "out", config, text_file))
    return made


@pytest.fixture
def half(halves, tmp_path) -> Path:
    """A copy of the one at stage 1."""
    return shutil.copytree(halves[1], tmp_path / "copy")


def words(folder: Path, text: Path, *more: str) -> list[str]:
    return argv(folder / "engine.json", folder / "out", folder / "run.yaml", text, "--resume_from", "must", *more)


def unlocked(folder: Path) -> dict[str, bytes]:
    """Every file but the lock of the run that was left."""
    return {name: data for name, data in contents(folder).items() if not name.endswith(".lock")}


def goes_on(folder: Path, command_line: list[str]) -> dict[int, float]:
    """Its losses after the resume, to the end; the position is the checkpoint's."""
    loop = in_process.prepare(command_line)
    assert (loop.step, loop.position.next_sample) == (STEPS, STEPS * BATCH)
    run.finish(loop)
    return {step: loss for step, loss in series(folder / "out", "train/loss").items() if step > STEPS}


def test_other_data_with_the_switch_only(half, text_file, tmp_path, capsys):
    other = write_text(tmp_path / "other.txt", seed=1)
    before = unlocked(half)
    assert refused(words(half, other, "--allow_batch_change")) == 4
    assert "allowed by --allow_data_change" in capsys.readouterr().err
    assert unlocked(half) == before
    same = goes_on(shutil.copytree(half, tmp_path / "same"), words(tmp_path / "same", text_file, "--allow_data_change"))
    assert "changed since" not in capsys.readouterr().out
    saved = manifest.read(half / "out" / "checkpoints" / f"step-{STEPS:08d}")["data"]
    loop = in_process.prepare(words(half, other, "--allow_data_change"))
    assert loop.position.next_sample == STEPS * BATCH
    assert (loop.position.best_val_loss, loop.position.last_val) == (None, {}), "they are of another validation split"
    change = f"data: {saved[:12]}… -> {loop.data.fingerprint[:12]}…"
    assert f"changed since the checkpoint: {change}" in capsys.readouterr().out
    assert events(half / "out", "resumed")[-1]["changes"] == [change]
    run.finish(loop)
    losses = {step: loss for step, loss in series(half / "out", "train/loss").items() if step > STEPS}
    assert losses.keys() == same.keys()
    assert all(losses[step] != same[step] for step in same)
    assert in_process.train(words(half, other)) == 0, "what it saved is of the new data"


def test_a_checkpoint_from_before_rollbacks_and_smaller_micro_batches_goes_on(text_file, tmp_path, monkeypatch):
    """Its client state lacks what later versions added; the same numbers follow."""
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2 * STEPS, eval_every=STEPS)
    engine = write_json(tmp_path / "engine.json", engine_json(1, batch=BATCH, chatgot=SAVING))
    assert in_process.train(argv(engine, tmp_path / "whole", config, text_file)) == 0
    whole = {step: loss for step, loss in series(tmp_path / "whole", "train/loss").items() if step > STEPS}
    current, later = Loop.client_state, ("skipped_samples", "guard", "micro_batch")
    with monkeypatch.context() as patch:
        patch.setattr(
            Loop,
            "client_state",
            lambda loop: {name: value for name, value in current(loop).items() if name not in later},
        )
        in_process.abandon_after(STEPS, argv(engine, tmp_path / "out", config, text_file))
    assert goes_on(tmp_path, words(tmp_path, text_file)) == whole


def test_another_seed_orders_the_data_anew_with_the_switch_only(half, text_file, tmp_path, capsys):
    assert refused(words(half, text_file, "train.seed=7")) == 4
    assert "allowed by --allow_data_change" in capsys.readouterr().err
    same = goes_on(shutil.copytree(half, tmp_path / "same"), words(tmp_path / "same", text_file))
    capsys.readouterr()
    losses = goes_on(half, words(half, text_file, "train.seed=7", "--allow_data_change"))
    assert "changed since the checkpoint: train.seed: 1337 -> 7" in capsys.readouterr().out
    assert events(half / "out", "resumed")[-1]["changes"] == ["train.seed: 1337 -> 7"]
    assert all(losses[step] != same[step] for step in same)


@pytest.mark.parametrize("stage", [0, 1])
def test_another_batch_with_the_switch_only(stage, halves, text_file, tmp_path, capsys):
    folder = shutil.copytree(halves[stage], tmp_path / "copy")
    assert refused(words(folder, text_file, "ds.train_batch_size=16", "--allow_data_change")) == 4
    assert "allowed by --allow_batch_change" in capsys.readouterr().err
    loop = in_process.prepare(words(folder, text_file, "ds.train_batch_size=16", "--allow_batch_change"))
    assert "changed since the checkpoint: train_batch_size: 8 -> 16" in capsys.readouterr().out
    assert "train_batch_size: 8 -> 16" in events(folder / "out", "resumed")[-1]["changes"]
    run.finish(loop)
    assert loop.position.next_sample == STEPS * BATCH + STEPS * 16
    assert series(folder / "out", "data/tokens")[STEPS + 1] == (STEPS * BATCH + 16) * 16


@pytest.mark.parametrize(
    ("was", "now", "optimizer"), [(0, 0, MUON), (0, 0, SGD), (1, 1, MUON), (1, 0, SGD), (0, 1, MUON)]
)
def test_optimizer_of_another_kind_is_refused(was, now, optimizer, halves, text_file, tmp_path, capsys):
    """At the same stage DeepSpeed itself would load it, and at stage 0 say nothing."""
    folder = shutil.copytree(halves[was], tmp_path / "copy")
    write_json(folder / "engine.json", engine_json(now, optimizer=optimizer, chatgot=SAVING))
    before = unlocked(folder)
    assert refused(words(folder, text_file, "--allow_data_change", "--allow_batch_change")) == 4
    [row] = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith("  optimizer")]
    assert row == ["optimizer", "adam", "|", optimizer["type"].lower()]
    assert unlocked(folder) == before
    pretend(folder / "out", optimizer=optimizer["type"].lower())
    if was != now:  # the files themselves say so too
        assert refused(words(folder, text_file)) == 4
        assert (
            "the checkpoint's optimizer keeps exp_avg, exp_avg_sq, this run's momentum_buffer"
            in capsys.readouterr().err
        )


def pretend(out: Path, **fields: object) -> None:
    """Let the checkpoint's manifest say something else."""
    [path] = (out / "checkpoints").glob("step-*")
    manifest.write(path, {**manifest.read(path), **fields})


def test_optimizers_of_one_kind_go_on_from_each_other(halves, text_file, tmp_path):
    folder = shutil.copytree(halves[0], tmp_path / "copy")
    adam = {"type": "Adam", "params": {"lr": 3e-3, "adam_w_mode": False}}
    write_json(folder / "engine.json", engine_json(0, optimizer=adam, chatgot=SAVING))
    assert in_process.train(words(folder, text_file)) == 0
    amsgrad = {"type": "AdamW", "params": {"lr": 3e-3, "amsgrad": True, "torch_adam": True}}
    write_json(folder / "engine.json", engine_json(0, optimizer=amsgrad, chatgot=SAVING))
    assert refused(words(folder, text_file)) == 4


@pytest.mark.parametrize(
    ("offload", "stated"),
    [
        ({"device": "nvme", "nvme_path": "swap"}, "zero_optimization.offload_optimizer.device = nvme"),
        ({"device": "cpu", "ratio": 0.5}, "zero_optimization.offload_optimizer.ratio = 0.5"),
    ],
)
def test_offloading_that_cannot_move_is_refused_in_both_directions(
    offload, stated, halves, text_file, tmp_path, capsys
):
    folder = shutil.copytree(halves[0], tmp_path / "copy")
    adam = {"type": "AdamW", "params": {"lr": 3e-3}}  # for a ratio below 1 DeepSpeed takes its CPUAdam only
    tree = engine_json(3, optimizer=adam, chatgot=SAVING)
    tree["zero_optimization"]["offload_optimizer"] = offload
    write_json(folder / "engine.json", tree)
    assert refused(words(folder, text_file)) == 4
    said = capsys.readouterr().err
    assert (
        f"this run has {stated}, and such a run can be resumed with the same settings only, but different are "
        f"zero_stage: 0 -> 3" in said
    )
    write_json(folder / "engine.json", engine_json(0, chatgot=SAVING))
    layout = (
        {"offload_optimizer": "nvme"}
        if offload["device"] == "nvme"
        else {"offload_optimizer": "cpu", "offload_optimizer.ratio": 0.5}
    )
    pretend(folder / "out", zero_stage=3, layout=layout)
    assert refused(words(folder, text_file)) == 4
    assert f"the checkpoint's run has {stated}" in capsys.readouterr().err


def test_help_names_the_switches(capsys):
    with pytest.raises(SystemExit):
        in_process.arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--allow_data_change resume with other data, or with another train.seed" in said
    assert "--allow_batch_change resume with another train_batch_size" in said
    assert {s for s in manifest.MUST_MATCH.values() if s} == {"--allow_data_change", "--allow_batch_change"}
