"""What the loop reports, and that looking at a run does not change it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint import rng
from chatgot.checkpoint.save import Saver
from chatgot.data.loader import DataOrder
from chatgot.inference.sample import load_run
from chatgot.model.gpt import GPT
from chatgot.observe.meters import Throughput
from chatgot.training import evaluation, run
from chatgot.training.loop import Loop
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, series

QUIET = {"checkpoint": {"every_steps": None, "every_minutes": None, "keep_best": 0}}
BUSY = {"checkpoint": {"every_steps": 2, "every_minutes": None, "keep_best": 1}}


@pytest.mark.parametrize("stage", [0, 3])
def test_invariant_13_evaluation_sampling_and_saving_leave_the_random_state_and_the_mode_untouched(
    stage, tmp_path, text_file
):
    def drive(name: str, chatgot: dict, **train) -> tuple[list[torch.Tensor], dict[int, float]]:
        config = write_run_yaml(tmp_path / f"{name}.yaml", max_steps=7, model={"dropout": 0.2}, **train)
        engine = write_json(tmp_path / f"{name}.json", engine_json(stage, chatgot=chatgot))
        loop = in_process.prepare(argv(engine, tmp_path / name, config, text_file))
        states = []
        for _ in loop.steps():
            states.append(rng.capture()["torch"])
            assert all(module.training for module in loop.engine.engine.module.modules())
        return states, series(tmp_path / name, "train/loss")

    states, losses = drive("quiet", QUIET)
    busy_states, busy_losses = drive("busy", BUSY, eval_every=1, sample_every=1)
    assert busy_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(states, busy_states, strict=True))
    assert len(list((tmp_path / "busy" / "samples").iterdir())) == 7
    assert not torch.equal(states[0], states[1]), "dropout draws, so that the comparison can fail"


def test_loss_is_the_undivided_mean_over_micro_batches(tmp_path, text_file):
    found = {}
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    for micro in (8, 2):
        engine = write_json(tmp_path / f"{micro}.json", engine_json(1, micro=micro))
        assert in_process.train(argv(engine, tmp_path / f"micro{micro}", config, text_file)) == 0
        found[micro] = series(tmp_path / f"micro{micro}", "train/loss")
    assert found[2] == pytest.approx(found[8], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")  # the stage 0 guard has
@pytest.mark.parametrize(
    ("stage", "kind", "params"),
    [
        (1, "WarmupLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 3, "warmup_type": "linear"}),
        (2, "OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-3, "cycle_first_step_size": 3}),
        (0, "CosineAnnealingLR", {"T_max": 8}),
    ],
)
def test_the_journaled_rate_of_a_stock_scheduler_is_the_one_that_the_step_used(
    stage, kind, params, tmp_path, text_file
):
    import deepspeed

    tree = engine_json(stage, chatgot={"schedule": None}, scheduler={"type": kind, "params": params})
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=7)
    assert in_process.train(argv(write_json(tmp_path / "ds.json", tree), tmp_path / "out", config, text_file)) == 0
    del tree["chatgot"]
    used, net = [], torch.nn.Linear(4, 1)
    with in_process.cpu_environment():
        parameters: Any = list(net.parameters())
        engine: Any = deepspeed.initialize(model=net, model_parameters=parameters, config=tree)[0]
        for _ in range(7 * engine.gradient_accumulation_steps()):
            engine.backward(engine(torch.ones(1, 4)).sum())
            if engine.is_gradient_accumulation_boundary():
                used.append(engine.optimizer.param_groups[0]["lr"])
            engine.step()
        engine.destroy()
    assert len(set(used)) > 3, "the rate changes, so that the comparison can fail"
    assert list(series(tmp_path / "out", "optim/lr").values()) == pytest.approx(used, rel=1e-12)


def test_first_loss_is_that_of_the_initial_weights_on_the_first_global_batch(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=1)
    loop = in_process.prepare(
        argv(write_json(tmp_path / "e.json", engine_json(2, micro=2)), tmp_path / "out", config, text_file)
    )
    model = GPT(loop.config.model, loop.data.tokenizer.vocab_size)
    model.init_weights(loop.config.train.seed)
    run.finish(loop)
    starts = DataOrder(len(loop.data.train), 16, loop.config.train.seed).starts(np.arange(8))
    rows = torch.from_numpy(np.stack([loop.data.train[s : s + 17] for s in starts]).astype(np.int64))
    expected = model(rows[:, :-1], rows[:, 1:]).item()
    assert series(tmp_path / "out", "train/loss")[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_validation_is_token_weighted_over_the_whole_split_and_bits_are_per_character(tokenizer, tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=3)
    engine = write_json(tmp_path / "engine.json", engine_json(1))
    words = [
        *argv(engine, tmp_path / "out", config, text_file),
        f"data.tokenizer={tokenizer}",
        "data.bpe_vocab_size=300",
        "data.val_fraction=0.03",
    ]
    loop = in_process.prepare(words)
    run.finish(loop)
    tokens = torch.from_numpy(np.asarray(loop.data.val, dtype=np.int64))
    assert (len(tokens) - 1) % 16, "the last window is a short one, so that a mean of means would differ"
    model, loaded, *_ = load_run(tmp_path / "out", device="cpu")
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            span = tokens[start : start + 17]
            logits = model(span[None, :-1])[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, span[1:], reduction="sum"))
    reported = series(tmp_path / "out", "val/loss")[3]
    assert reported == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    characters = len(loaded.decode(tokens.numpy()))
    assert series(tmp_path / "out", "val/bits_per_char")[3] == pytest.approx(
        reported * len(tokens) / characters / math.log(2), rel=1e-6
    )
    if tokenizer == "bpe":
        assert len(tokens) < 0.8 * characters


def test_eval_tokens_bounds_an_evaluation_and_another_bound_forgets_the_best_loss(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2, eval_every=1)
    engine = write_json(tmp_path / "engine.json", engine_json(1))
    line = [*argv(engine, tmp_path / "out", config, text_file), "data.val_fraction=0.3"]
    loop = in_process.prepare([*line, "train.eval_tokens=100"])
    assert loop.eval_batches.target_tokens == 96, "six windows of 16"
    assert "96 (train.eval_tokens) of 6" in capsys.readouterr().out
    run.finish(loop)
    part = series(tmp_path / "out", "val/loss")
    loop = in_process.prepare([*line, "train.eval_tokens=100", "train.max_steps=3"])
    assert loop.position.best_val_loss == min(part.values())
    run_folder.release_lock(tmp_path / "out")
    loop = in_process.prepare([*line, "train.max_steps=3"])
    assert (loop.position.best_val_loss, loop.position.last_val) == (None, {})
    assert "it is not over the same validation tokens" in capsys.readouterr().out
    run.finish(loop)
    assert series(tmp_path / "out", "val/loss")[3] == pytest.approx(min(part.values()), rel=0.2)


def test_invariant_15_speed_and_memory_per_interval_without_evaluation_sampling_and_saving(
    tmp_path, text_file, monkeypatch
):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8, log_every=2, eval_every=3, sample_every=3)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=BUSY))
    loop = in_process.prepare(argv(engine, tmp_path / "out", config, text_file))
    now = [0.0]

    def takes(seconds: float, function):
        def timed(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    loop.meter = Throughput(clock=lambda: now[0])
    monkeypatch.setattr(Loop, "_train_step", takes(2.0, Loop._train_step))
    monkeypatch.setattr(evaluation, "evaluate", takes(100.0, evaluation.evaluate))
    monkeypatch.setattr(evaluation, "draw", takes(1000.0, evaluation.draw))
    monkeypatch.setattr(Saver, "begin", takes(10_000.0, Saver.begin))
    run.finish(loop)
    out = tmp_path / "out"
    assert series(out, "perf/step_ms") == dict.fromkeys([1, 2, 4, 6, 8], 2000.0)
    assert series(out, "perf/tokens_per_sec") == dict.fromkeys([1, 2, 4, 6, 8], 8 * 16 / 2.0)
    assert all(0.01 < gib < 64 for gib in series(out, "mem/peak_gib").values())
    assert sorted(series(out, "mem/peak_gib")) == [1, 2, 4, 6, 8]
    saves = len(in_process.events(out, "saved"))
    assert loop.meter.paused_seconds == {"eval": 300.0, "sample": 3000.0, "save": 10_000.0 * saves}


def test_first_and_last_step_are_always_logged_evaluated_and_sampled(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=7, log_every=4)
    loop = in_process.prepare(argv(write_json(tmp_path / "e.json", engine_json()), tmp_path / "out", config, text_file))
    run.finish(loop)
    assert sorted(series(tmp_path / "out", "train/loss")) == [1, 4, 7]
    assert sorted(series(tmp_path / "out", "val/loss")) == [7]
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000007.txt"]
    assert in_process.tags(tmp_path / "out") == [7]


def test_prompt_with_characters_the_text_never_had_is_replaced_aloud(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=1, sample_prompts=["The night", "Ω!", ""])
    assert (
        in_process.train(argv(write_json(tmp_path / "e.json", engine_json()), tmp_path / "out", config, text_file)) == 0
    )
    said = capsys.readouterr().out
    assert "train.sample_prompts: 'Ω!' is replaced by" in said
    assert "'Ω' (U+03A9)" in said
    written = (tmp_path / "out" / "samples" / "step-000001.txt").read_text(encoding="utf-8")
    assert written.count("=== ") == 2
