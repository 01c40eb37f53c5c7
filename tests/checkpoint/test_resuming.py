"""A resumed run uses what the JSON says now, says what changed, and does nothing where nothing is left to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from chatgot.deepspeed_json.machine import has_command
from chatgot.training import run
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, contents, events, series, tags

STEPS = 4
CHANGES = {
    "ds.optimizer.params.lr": 1e-3,
    "ds.optimizer.params.weight_decay": 0.3,
    "ds.optimizer.params.betas": [0.8, 0.99],
    "ds.gradient_clipping": 0.25,
}
STAGES = [(stage, "fp32") for stage in range(4)] + [(1, "bf16"), (2, "bf16")]


@pytest.fixture(scope="module")
def half(tmp_path_factory, text_file):
    """Given stage and precision: a folder with run.yaml, engine.json and a run in out/ that was left after step 4 of
    8.
    """
    made: dict[tuple[int, str], Path] = {}

    def get(stage: int, precision: str, into: Path) -> Path:
        if (stage, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{precision}{stage}")
            config = write_run_yaml(folder / "run.yaml", max_steps=2 * STEPS)
            saving = {"checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep_best": 0}}
            engine = write_json(folder / "engine.json", engine_json(stage, precision, chatgot=saving))
            in_process.abandon_after(STEPS, argv(engine, folder / "out", config, text_file))
            made[stage, precision] = folder
        shutil.copytree(made[stage, precision], into, dirs_exist_ok=True)
        return into

    return get


def words(folder: Path, text: Path, *more: str) -> list[str]:
    return argv(folder / "engine.json", folder / "out", folder / "run.yaml", text, *more)


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_changed_hyper_parameters_are_in_force_and_announced(stage, precision, half, tmp_path, text_file, capsys):
    folder = half(stage, precision, tmp_path)
    capsys.readouterr()
    overrides = [f"{key}={value}" for key, value in CHANGES.items()]
    loop = in_process.prepare(words(folder, text_file, "--resume_from", "must", *overrides))
    said = capsys.readouterr().out
    assert "ds.optimizer.params.lr: 0.003 -> 0.001" in said
    assert "ds.optimizer.params.weight_decay: 0.1 -> 0.3" in said
    assert "ds.optimizer.params.betas: [0.9, 0.95] -> [0.8, 0.99]" in said
    assert "ds.gradient_clipping: 1" in said
    assert "changed since the checkpoint: learning_rates.lr: 0.003 -> 0.001" in said
    assert "changed since the checkpoint: gradient_clipping: 1.0 -> 0.25" in said
    steps = loop.steps()
    assert next(steps) == STEPS + 1
    decay, plain = loop.engine.engine.optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [list(group["betas"]) for group in (decay, plain)] == [[0.8, 0.99]] * 2
    unchanged = in_process.prepare(words(half(stage, precision, tmp_path / "same"), text_file, "--resume_from", "must"))
    assert "changed since" not in capsys.readouterr().out
    assert next(unchanged.steps()) == STEPS + 1
    assert decay["lr"] == pytest.approx(unchanged.engine.learning_rate / 3)
    assert series(folder / "out", "optim/lr")[STEPS + 1] == pytest.approx(decay["lr"])
    assert events(folder / "out", "resumed")[0]["changes"]


@pytest.mark.parametrize("stage", range(4))
def test_changed_hyper_parameters_are_in_force_and_announced_at_another_stage(stage, half, tmp_path, text_file, capsys):
    """The same where the resume goes parameter by parameter; nothing of it may depend on the run folder's own files."""
    folder, now = half(stage, "fp32", tmp_path), (stage + 1) % 4
    saving = {"checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep_best": 0}}
    write_json(folder / "engine.json", engine_json(now, chatgot=saving))
    (folder / "out" / "ds_config.json").unlink()
    capsys.readouterr()
    overrides = [f"{key}={value}" for key, value in CHANGES.items()]
    loop = in_process.prepare(words(folder, text_file, "--resume_from", "must", *overrides))
    said = capsys.readouterr().out
    for line in (
        "learning_rates.lr: 0.003 -> 0.001",
        "gradient_clipping: 1.0 -> 0.25",
        "weight_decay was 0.1, is now 0.3",
        "betas was [0.9, 0.95], is now [0.8, 0.99]",
    ):
        assert line in said
        assert any(line in change for change in events(folder / "out", "resumed")[-1]["changes"])
    assert next(loop.steps()) == STEPS + 1
    decay, plain = loop.engine.engine.optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [list(group["betas"]) for group in (decay, plain)] == [[0.8, 0.99]] * 2
    assert loop.engine.engine.gradient_clipping() == 0.25
    assert getattr(loop.engine.engine.optimizer, "clip_grad", 0.25) == 0.25
    whole = in_process.prepare(words(half(now, "fp32", tmp_path / "same"), text_file, "--resume_from", "must"))
    assert next(whole.steps()) == STEPS + 1
    assert [group["lr"] * 3 for group in (decay, plain)] == pytest.approx([whole.engine.learning_rate] * 2)


SCHEDULERS = {
    "WarmupLR": {"warmup_max_lr": 3e-3, "warmup_num_steps": 6, "warmup_type": "linear"},
    "WarmupCosineLR": {"total_num_steps": 12, "warmup_num_steps": 2},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-3, "cycle_first_step_size": 6},
    "CosineAnnealingLR": {"T_max": 12},
}


def scheduled(folder: Path, kind: str, stage: int, lr: float = 3e-3) -> Path:
    tree = engine_json(stage, scheduler={"type": kind, "params": SCHEDULERS[kind]})
    tree["optimizer"]["params"]["lr"] = lr
    tree["chatgot"] = {"checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep_best": 0}}
    return write_json(folder / "engine.json", tree)


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")  # the stage 0 guard has
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [(kind, 0, 0) for kind in SCHEDULERS]
    + [("WarmupLR", 1, 1), ("OneCycle", 3, 3), ("WarmupLR", 0, 1), ("WarmupCosineLR", 3, 0)],
)
def test_stock_scheduler_goes_on_where_it_was(kind, before, after, tmp_path, text_file, capsys):
    write_run_yaml(tmp_path / "run.yaml", max_steps=2 * STEPS)
    scheduled(tmp_path, kind, after)
    assert in_process.train(argv(tmp_path / "engine.json", tmp_path / "whole", tmp_path / "run.yaml", text_file)) == 0
    scheduled(tmp_path, kind, before)
    in_process.abandon_after(STEPS, words(tmp_path, text_file))
    scheduled(tmp_path, kind, after)
    capsys.readouterr()
    assert in_process.train(words(tmp_path, text_file)) == 0
    assert "betas was" not in capsys.readouterr().out
    for metric in ("optim/lr", "train/loss"):
        whole, parts = (series(tmp_path / name, metric) for name in ("whole", "out"))
        assert parts == (whole if before == after else pytest.approx(whole, rel=1e-5)), metric


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")  # the stage 0 guard has
def test_stock_scheduler_follows_a_changed_rate(tmp_path, text_file):
    write_run_yaml(tmp_path / "run.yaml", max_steps=2 * STEPS)
    scheduled(tmp_path, "CosineAnnealingLR", 0)
    in_process.abandon_after(STEPS, words(tmp_path, text_file))
    scheduled(tmp_path, "CosineAnnealingLR", 0, lr=1e-3)
    assert in_process.train(words(tmp_path, text_file)) == 0
    assert in_process.train(argv(tmp_path / "engine.json", tmp_path / "lower", tmp_path / "run.yaml", text_file)) == 0
    lower, rates = series(tmp_path / "lower", "optim/lr"), series(tmp_path / "out", "optim/lr")
    assert all(rates[step] == pytest.approx((3 if step <= STEPS else 1) * lower[step]) for step in lower)


OFFLOAD = {"device": "cpu", "pin_memory": False}
MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}


@pytest.mark.parametrize(
    ("kind", "before", "after", "zero", "keys"),
    [
        ("Adagrad", 1, 1, {}, {}),
        ("Adagrad", 3, 3, {}, {}),
        ("Adagrad", 3, 2, {}, {}),
        ("Adagrad", 0, 3, {}, {}),
        ("AdamW", 3, 3, {"offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, {}),
        ("AdamW", 2, 2, {"offload_optimizer": OFFLOAD}, MASTERS),
        ("AdamW", 1, 3, {"offload_optimizer": OFFLOAD}, {"zero_force_ds_cpu_optimizer": True}),
    ],
)
def test_an_optimizer_that_deepspeed_builds_goes_on_where_it_was(
    kind, before, after, zero, keys, tmp_path, text_file, capsys
):
    if kind == "AdamW" and not has_command("g++", "c++"):
        pytest.skip("DeepSpeed compiles its CPUAdam")

    def written(stage: int) -> None:
        saving = {"checkpoint": {"every_steps": STEPS, "every_minutes": None, "keep_best": 0}}
        optimizer = {"type": kind, "params": {"lr": 3e-3, "weight_decay": 0.1 * (kind == "AdamW")}}
        tree = engine_json(stage, optimizer=optimizer, chatgot=saving, **keys)
        tree["zero_optimization"].update(zero)
        write_json(tmp_path / "engine.json", tree)

    write_run_yaml(tmp_path / "run.yaml", max_steps=2 * STEPS)
    written(after)
    assert in_process.train(argv(tmp_path / "engine.json", tmp_path / "whole", tmp_path / "run.yaml", text_file)) == 0
    written(before)
    in_process.abandon_after(STEPS, words(tmp_path, text_file))
    written(after)
    capsys.readouterr()
    assert in_process.train(words(tmp_path, text_file)) == 0
    whole, parts = (series(tmp_path / name, "train/loss") for name in ("whole", "out"))
    assert parts == (whole if before == after else pytest.approx(whole, rel=1e-5))
    assert not events(tmp_path / "out", "resume_differs")


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_changed_clipping_decides_the_size_of_the_next_step(stage, precision, half, tmp_path, text_file):
    """AdamW hardly notices clipping, so the step is compared with the one of another clipping that must differ."""
    found = {}
    for name, clipping in (("same", 1.0), ("tight", 1e-6)):
        folder = half(stage, precision, tmp_path / name)
        loop = in_process.prepare(words(folder, text_file, "--resume_from", "must", f"ds.gradient_clipping={clipping}"))
        for step in loop.steps():
            if step == STEPS + 2:
                break
        found[name] = series(folder / "out", "train/loss")
    assert found["same"][STEPS + 1] == found["tight"][STEPS + 1]
    assert found["same"][STEPS + 2] != found["tight"][STEPS + 2]


def test_extended_max_steps_goes_on_and_the_schedule_stretches(half, tmp_path, text_file, capsys):
    folder = half(1, "fp32", tmp_path)
    assert in_process.train(words(folder, text_file)) == 0
    end = series(folder / "out", "optim/lr")[8]
    capsys.readouterr()
    assert in_process.train(words(folder, text_file, "train.max_steps=12")) == 0
    assert "train.max_steps: 8 -> 12" in capsys.readouterr().out
    rates = series(folder / "out", "optim/lr")
    assert sorted(series(folder / "out", "train/loss")) == list(range(1, 13))
    assert rates[9] > end == pytest.approx(rates[12])
    assert [event["step"] for event in events(folder / "out", "resumed")] == [4, 8]


def test_resume_at_the_final_step_has_nothing_to_do(half, tmp_path, text_file, capsys):
    folder = half(2, "fp32", tmp_path)
    assert in_process.train(words(folder, text_file)) == 0
    out = folder / "out"
    before = contents(out)
    capsys.readouterr()
    for mode in ("auto", "must"):
        assert in_process.train(words(folder, text_file, "--resume_from", mode)) == 0
    said = capsys.readouterr().out
    assert said.count("nothing to do: the run is complete at step 8 (train.max_steps = 8)") == 2
    after = contents(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"events.jsonl", "environment.json"}
    assert after.keys() == before.keys()


def test_another_run_folder_can_be_gone_on_from_and_stays_as_it_is(half, tmp_path, text_file):
    folder = half(3, "fp32", tmp_path)
    before = contents(folder / "out")
    engine, config = folder / "engine.json", folder / "run.yaml"
    fork = tmp_path / "fork"
    assert in_process.train([*argv(engine, fork, config, text_file), "--resume_from", str(folder / "out")]) == 0
    assert contents(folder / "out") == before
    assert sorted(series(fork, "train/loss")) == [5, 6, 7, 8]
    assert tags(fork) == [8]
    assert in_process.train(words(folder, text_file)) == 0
    assert {step: series(folder / "out", "train/loss")[step] for step in range(5, 9)} == series(fork, "train/loss")


def test_run_left_before_its_first_checkpoint_starts_again(tmp_path, text_file, capsys):
    write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    write_json(tmp_path / "engine.json", engine_json(1))
    in_process.abandon_after(3, words(tmp_path, text_file))
    first = series(tmp_path / "out", "train/loss")
    assert sorted(first) == [1, 2, 3]
    capsys.readouterr()
    loop = in_process.prepare(words(tmp_path, text_file))
    assert "starting a new run" in capsys.readouterr().out
    run.finish(loop)
    again = series(tmp_path / "out", "train/loss")
    assert sorted(again) == [1, 2, 3, 4]
    assert {step: again[step] for step in first} == first


def test_loss_scale_of_float16_autocast_is_the_checkpoints(tmp_path, text_file, capsys, monkeypatch):
    """DeepSpeed's checkpoints leave out torch's GradScaler: the scale, and the good steps since it changed."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)  # slow on this CPU, but it does
    saving = {"checkpoint": {"every_steps": 3, "every_minutes": None, "keep_best": 0}}
    autocast = {"enabled": True, "dtype": "float16"}
    engine = write_json(tmp_path / "engine.json", engine_json(chatgot=saving, torch_autocast=autocast))
    line = argv(engine, tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=6), text_file)
    loop = in_process.prepare(line)
    scaler = loop.engine.engine.torch_autocast_z0_gradscaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0, "_growth_tracker": 1994})
    for step in loop.steps():
        if step == 5:
            break
    assert in_process.train(line) == 0
    assert series(tmp_path / "out", "optim/loss_scale") == dict.fromkeys(range(1, 6), 512.0) | {6: 1024.0}
    assert "resume verified 2/2: steps 4..5 repeat the journal bit for bit" in capsys.readouterr().out
