"""A run that diverges: what the journal says of the steps it skipped, and that it stops or goes on, the same after a
resume.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import examine, find
from chatgot.deepspeed_json.settings import GuardConfig
from chatgot.errors import EXIT_NUMERICS, NumericsError
from chatgot.proof import digest
from chatgot.training import divergence, run
from chatgot.training.divergence import SPIKE_WINDOW, Guard
from chatgot.verify.replay import replay
from chatgot.verify.verify import verify
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events, series, tags
from tests.training.poison import Poison

BATCH, SAVE, LIMIT = 8, 3, 2
BAD = (32, 40)
"""First samples of the batches of steps 5 and 6."""
TO, FROM, LEFT_OUT = 3, 6, 3 * BATCH
"""A run that meets BAD goes back from step 6 to the checkpoint of step 3, and leaves out the three batches since."""
WINDOW = 12
"""In place of SPIKE_WINDOW, for runs."""


def words(folder, text, stage=0, precision="fp32", steps=12, name="out", guard=None, asynchronous=False, **engine):
    guard = {"max_consecutive_skips": LIMIT, "on_diverge": "rollback", **(guard or {})}
    saving = {"every_steps": SAVE, "every_minutes": None, "keep_best": 0, "keep_last": 20, "async": asynchronous}
    tree = engine_json(stage, precision, chatgot={"checkpoint": saving, "guard": guard}, **engine)
    config = write_run_yaml(folder / "run.yaml", max_steps=steps, model={"dropout": 0.1})
    return argv(write_json(folder / "engine.json", tree), folder / name, config, text)


def poisoned_run(line, stop_after=None, **poison):
    """Train to the end, or leave as a kill would after `stop_after` optimizer steps of this start."""
    loop = in_process.prepare(line)
    found = Poison(loop, **{"samples": BAD, **poison})
    if stop_after is None:
        return run.finish(loop), found
    for done, _ in enumerate(loop.steps(), start=1):
        if done == stop_after:
            break
    return None, found


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_rollback_goes_back_to_the_checkpoint_leaves_the_data_out_and_completes_the_run(
    stage, precision, tmp_path, text_file, capsys
):
    steps = 14
    code, poison = poisoned_run(words(tmp_path, text_file, stage, precision, steps, asynchronous=stage == 3))
    assert code == 0
    out = tmp_path / "out"
    [event] = events(out, "rolled_back")
    assert {key: event[key] for key in ("from_step", "to_step", "first_sample", "samples", "number", "checkpoint")} == {
        "from_step": FROM,
        "to_step": TO,
        "first_sample": TO * BATCH,
        "samples": LEFT_OUT,
        "number": 1,
        "checkpoint": f"step-{TO:08d}",
    }
    assert "loss or gradients were not finite for 2 steps in a row" in event["why"]
    expected = [
        step * BATCH for step in (0, 1, 2, 3, 4, 4, 5, 5, *range(6, steps + 3))
    ]  # a skipped batch is looked at again
    assert poison.fed == expected
    assert sorted(series(out, "train/loss")) == list(range(1, steps + 1))
    assert series(out, "data/tokens")[steps] == (steps * BATCH + LEFT_OUT) * 16
    assert not events(out, "resume_differs")
    assert verify(out)
    assert (
        f"rolled back from step {FROM} to {TO}; {LEFT_OUT} samples from {TO * BATCH} on were left out"
        in capsys.readouterr().out
    )
    if stage == 0:  # the others are held against a clean run in tests/distributed/test_guard.py
        assert in_process.train(words(tmp_path, text_file, stage, precision, steps, name="clean")) == 0
        assert series(out, "val/loss")[steps] == pytest.approx(series(tmp_path / "clean", "val/loss")[steps], rel=1e-2)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory, text_file) -> Path:
    """A run that met BAD and was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    poisoned_run(words(folder, text_file))
    return folder / "out"


@pytest.mark.parametrize("stop_after", [5, 6, 8], ids=["before the rollback", "right after it", "two steps after it"])
def test_a_run_that_is_killed_around_its_rollback_and_resumed_repeats_it(stop_after, rolled_back, tmp_path, text_file):
    whole = {step: found.to_json() | {"setup": ""} for step, found in digest.history(rolled_back).digests.items()}
    line = words(tmp_path, text_file, name="killed")
    poisoned_run(line, stop_after)
    code, poison = poisoned_run(line)
    assert code == 0
    killed = digest.history(tmp_path / "killed").digests
    assert {step: found.to_json() | {"setup": ""} for step, found in killed.items()} == whole
    assert killed[TO + 1].offset == LEFT_OUT
    assert not events(tmp_path / "killed", "resume_differs")
    assert [event["number"] for event in events(tmp_path / "killed", "rolled_back")] == [1]
    assert (BAD[0] in poison.fed) == (stop_after == 5), "what was left out stays left out"
    assert verify(tmp_path / "killed")


@pytest.mark.parametrize(
    ("stage", "precision", "offload_param"), [(1, "bf16", False), (2, "fp32", False), (3, "bf16", True)]
)
def test_an_offloaded_optimizer_goes_back_too(stage, precision, offload_param, tmp_path, text_file):
    code, _ = poisoned_run(words(tmp_path, text_file, stage, precision, offload=True, offload_param=offload_param))
    assert code == 0
    assert len(events(tmp_path / "out", "rolled_back")) == 1
    assert [event["layer_grad_norms"]["layers.1"] for event in events(tmp_path / "out", "skipped_step")] == [
        "nan",
        "nan",
    ]
    assert verify(tmp_path / "out")


def test_a_replay_stops_where_a_rollback_has_left_data_out(tmp_path, text_file, capsys, warm_starts):
    poisoned_run(words(tmp_path, text_file), samples=(56, 64))
    assert replay(tmp_path / "out", 5, "step-00000003")
    assert "replay verified 3/3: steps 4..6" in capsys.readouterr().out


def test_steps_after_a_rollback_can_be_replayed(rolled_back, capsys, warm_starts):
    assert replay(rolled_back, 2, f"step-{TO:08d}")
    assert "replay verified 2/2: steps 4..5" in capsys.readouterr().out


def test_a_stopped_run_names_the_checkpoint_and_exits_with_5(tmp_path, text_file):
    with pytest.raises(
        NumericsError, match=r"step 6: .* 2 steps in a row .* the last good checkpoint is .*step-00000003"
    ) as refusal:
        poisoned_run(words(tmp_path, text_file, guard={"on_diverge": "stop"}))
    assert refusal.value.exit_code == EXIT_NUMERICS == 5
    assert tags(tmp_path / "out") == [3]
    assert events(tmp_path / "out", "failed")[0]["exit_code"] == 5


def test_rollbacks_are_bounded_over_resumes_too(tmp_path, text_file):
    line = words(tmp_path, text_file, guard={"max_rollbacks": 2})
    poisoned_run(line, samples=range(64, 4000), stop_after=10)
    assert [event["to_step"] for event in events(tmp_path / "out", "rolled_back")] == [6]
    with pytest.raises(NumericsError, match=r"after 2 rollback\(s\); chatgot.guard.max_rollbacks = 2"):
        poisoned_run(line, samples=range(64, 4000))
    assert [event["number"] for event in events(tmp_path / "out", "rolled_back")] == [1, 2]


def test_a_loss_scale_stuck_at_its_minimum_names_the_checkpoint(tmp_path, text_file, monkeypatch):
    loop = in_process.prepare(words(tmp_path, text_file))
    step = loop.engine.engine.step

    def stuck():
        if loop.step == 4:
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
        step()

    monkeypatch.setattr(loop.engine.engine, "step", stuck)
    with pytest.raises(
        NumericsError, match=r"overflow at the smallest loss scale .* last good checkpoint is .*step-00000003"
    ):
        run.finish(loop)


def test_a_run_without_a_checkpoint_cannot_go_back(tmp_path, text_file):
    with pytest.raises(NumericsError, match="there is no checkpoint yet"):
        poisoned_run(words(tmp_path, text_file), samples=(0, 8))


def test_the_journal_names_text_samples_and_layers_of_a_skipped_step(tmp_path, text_file):
    line = words(tmp_path, text_file, stage=1)
    loop = in_process.prepare(line)
    Poison(loop, BAD[:1])
    assert run.finish(loop) == 0
    [event] = events(tmp_path / "out", "skipped_step")
    assert (event["step"], event["ranks"], event["repeated"], event["first_sample"]) == (5, [0], True, BAD[0])
    assert event["losses"] == {str(sample): "nan" for sample in range(32, 40)}
    assert len(event["texts"]) == 4
    for sample, text in event["texts"].items():
        assert text == loop.data.tokenizer.decode(loop.train_batches.tokens(int(sample)).tolist())
    assert event["layer_grad_norms"] == dict.fromkeys(["embed_tokens", "layers.0", "layers.1", "norm"], "nan")
    assert series(tmp_path / "out", "optim/skipped_steps")[12] == 1
    assert [e["event"] for e in events(tmp_path / "out")].count("rolled_back") == 0


@pytest.mark.parametrize(
    ("zscore", "late", "at", "expected"),
    [(8.0, False, 16, (16, 15)), (8.0, True, 16, (17, 15)), (8.0, True, 15, (15, 12)), (None, False, 16, None)],
    ids=["spike", "loss known a step late", "loss known when it is saved", "off"],
)
def test_a_spike_rolls_back_where_that_is_asked_for(zscore, late, at, expected, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(divergence, "SPIKE_WINDOW", WINDOW)
    spike = (at - 1) * BATCH
    line = [*words(tmp_path, text_file, steps=WINDOW + 6, guard={"spike_zscore": zscore}), "train.log_every=20"]
    loop = in_process.prepare(line)
    loop.proof.lags = late  # as on a GPU
    poison = Poison(loop, [spike], 5.0)
    assert run.finish(loop) == 0
    found = events(tmp_path / "out", "rolled_back")
    if zscore is None:
        assert not found
        return
    [event] = found
    assert (event["from_step"], event["to_step"]) == expected
    assert "8 standard deviations" in event["why"]
    assert poison.fed.count(spike) == 2, "trained on once, looked at once"
    assert not events(tmp_path / "out", "skipped_step")


def test_a_spike_is_told_from_the_steps_before_it_also_after_a_resume():
    guard = Guard(GuardConfig(spike_zscore=4.0, spike_min_rise=0.0))
    losses = [(step, 2.0 + 0.1 * (step % 2)) for step in range(1, SPIKE_WINDOW + 1)]
    assert [guard.divergence(step, 0, (step, loss)) for step, loss in losses] == [None] * SPIKE_WINDOW
    resumed = Guard(GuardConfig(spike_zscore=4.0, spike_min_rise=0.0))
    assert resumed.restore(json.loads(json.dumps(guard.state(1)))) == 1
    for each in (guard, resumed):
        assert each.divergence(51, 0, (51, 2.24)) is None, "3.8 deviations"
        assert each.divergence(52, 0, (52, math.nan)) is None
        assert "step 53: train/loss 2.3" in str(each.divergence(53, 0, (53, 2.3)))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_never_published(stage, where, tmp_path, text_file):
    loop = in_process.prepare(words(tmp_path, text_file, stage, guard={"on_diverge": "stop"}))
    steps = loop.steps()
    while next(steps) < 4:
        pass
    with torch.no_grad():
        optimizer = loop.engine.engine.optimizer
        if where == "weight":
            next(iter(loop.engine.engine.module.parameters())).view(-1)[3] = math.inf
        else:
            next(iter(getattr(optimizer, "optimizer", optimizer).state.values()))["exp_avg_sq"].view(-1)[3] = math.nan
    name = "parameter embed_tokens.weight" if where == "weight" else "the optimizer's exp_avg_sq"
    with pytest.raises(
        NumericsError, match=f"step 4: {name} has values that are not finite.*last good checkpoint is .*step-00000003"
    ):
        loop.save()
    assert tags(tmp_path / "out") == [3]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir() if path.is_dir()] == ["step-00000003"]
    assert events(tmp_path / "out", "save_refused")
    loop.guard.config = GuardConfig(on_diverge="rollback")
    loop.roll_back(divergence.Divergence("the test says so", 5))  # and a rollback repairs it
    loop.save()
    steps.close()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")  # the stage 0 guard has
@pytest.mark.parametrize("kind", ["WarmupDecayLR", "OneCycle", "CosineAnnealingLR"])
def test_a_stock_scheduler_is_back_at_the_checkpoints_step_after_a_rollback(kind, tmp_path, text_file):
    params = {
        "WarmupDecayLR": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 12, "warmup_type": "linear"},
        "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-3, "cycle_first_step_size": 6},
        "CosineAnnealingLR": {"T_max": 12},
    }
    for name in ("out", "clean"):
        line = words(
            tmp_path,
            text_file,
            int(kind != "CosineAnnealingLR"),
            name=name,
            scheduler={"type": kind, "params": params[kind]},
        )
        tree = json.loads((tmp_path / "engine.json").read_text())
        del tree["chatgot"]["schedule"]
        write_json(tmp_path / "engine.json", tree)
        assert (poisoned_run(line)[0] if name == "out" else in_process.train(line)) == 0
    assert len(events(tmp_path / "out", "rolled_back")) == 1
    rates = series(tmp_path / "out", "optim/lr")
    assert len(set(rates.values())) > 8, "the rate changes, so that the comparison can fail"
    assert rates == series(tmp_path / "clean", "optim/lr")


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_a_skipped_step_is_looked_at_with_recomputation_if_the_run_has_it(backend, tmp_path, text_file, monkeypatch):
    kept: dict[str, int] = {}

    def measured(engine, micro_batches):
        total = 0

        def packed(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            found = original(engine, micro_batches)
        kept[name] = total
        return found

    original = divergence.diagnose
    monkeypatch.setattr(divergence, "diagnose", measured)
    sections: dict[str, dict[str, Any]] = {
        "off": {},
        "on": {"activation_checkpointing": {"partition_activations": False}},
    }
    for name, section in sections.items():
        line = words(tmp_path, text_file, name=name, steps=5, **section)
        tree = json.loads((tmp_path / "engine.json").read_text())
        if section:
            tree["chatgot"]["activation_checkpointing"] = {"backend": backend}
        write_json(tmp_path / "engine.json", tree)
        poisoned_run(line)
    off, on = (events(tmp_path / name, "skipped_step")[0] for name in ("off", "on"))
    assert on["losses"].keys() == off["losses"].keys()
    assert kept["on"] < 0.5 * kept["off"]


def test_memory_that_runs_out_in_the_look_at_a_skipped_step_costs_only_that(tmp_path, text_file, monkeypatch, capsys):
    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(divergence, "diagnose", runs_out)
    assert poisoned_run(words(tmp_path, text_file, 2), samples=BAD[:1])[0] == 0
    [event] = events(tmp_path / "out", "skipped_step")
    assert (event["out_of_memory"], event["losses"], event["ranks"]) == ([0], {}, [0])
    assert "memory ran out in a second look at the skipped batch" in capsys.readouterr().out


def test_at_stage_3_a_skipped_step_is_computed_again_only_where_the_plan_says_that_it_fits(tmp_path, text_file):
    loop = in_process.prepare(words(tmp_path, text_file, 3))
    poison = Poison(loop, samples=BAD[:1])
    plan = loop.memory.plan
    loop.memory.plan = replace(plan, device=replace(plan.device, memory=plan.needed - 1))
    assert run.finish(loop) == 0
    assert poison.fed.count(BAD[0]) == 1
    [event] = events(tmp_path / "out", "skipped_step")
    assert "chatgot plan says" in event["not_computed_again"]
    assert event["layer_grad_norms"]


def test_a_checkpoint_that_the_guard_takes_for_wrecked_is_used_by_name_only(tmp_path, text_file, capsys):
    line = words(tmp_path, text_file, guard={"on_diverge": "stop"})
    out, weights = tmp_path / "out", tmp_path / "out" / "checkpoints"
    with pytest.raises(NumericsError, match=r"the last good checkpoint is .*step-00000003"):
        poisoned_run(line, samples=(48, 56))  # steps 7 and 8; the weights after step 6 gave those losses
    assert tags(out) == [3, 6]
    found = find(weights)
    assert found is not None
    assert (found.tag, found.damaged) == ("step-00000003", ("step-00000006",))
    assert "is suspect: step 8: loss or gradients were not finite for 2 steps in a row" in found.notes[0]
    assert "going back to step-00000003, 3 steps are lost" in found.notes[0]
    assert verify(out), "it is suspect, not damaged"
    [(tag, why)] = examine(weights).damaged
    assert (tag, "is suspect: step 8" in why) == ("step-00000006", True)
    capsys.readouterr()
    loop = in_process.prepare([*line, "--resume_from", f"{out}@step-00000006"])
    assert loop.step == 6
    assert f"checkpoint {weights / 'step-00000006'} is suspect" in capsys.readouterr().out
    run_folder.release_lock(out)
    assert in_process.train(line) == 0, "from step 3, without the poison"
    assert [event["from"] for event in events(out, "resumed")][-1].endswith("step-00000003")
    found = find(weights)
    assert found is not None
    assert (found.tag, found.notes) == ("step-00000012", ())
    assert "suspect" not in manifest.read(weights / "step-00000006"), "it was saved anew"


def test_checkpoints_that_cannot_be_looked_at_do_not_hide_the_divergence(tmp_path, text_file, monkeypatch, capsys):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(divergence, "examine", fails)
    with pytest.raises(NumericsError, match="the last good checkpoint is"):
        poisoned_run(words(tmp_path, text_file, guard={"on_diverge": "stop"}))
    assert "cannot be marked as suspect: [Errno 5]" in capsys.readouterr().out


def test_a_second_bad_batch_after_a_rollback_speaks_against_the_checkpoint(tmp_path, text_file):
    """Steps 7 and 7 again, with other samples: the weights after step 6 are to blame, and step 3 is next."""
    line = words(tmp_path, text_file, guard={"max_consecutive_skips": 1})
    code, _ = poisoned_run(line, samples=(48, 56))
    assert code == 0
    assert [(one["from_step"], one["to_step"]) for one in events(tmp_path / "out", "rolled_back")] == [(7, 6), (7, 3)]


def test_a_spike_is_some_nats_high_at_least_and_tells_the_samples_that_are_to_blame(tmp_path, text_file, monkeypatch):
    guard = Guard(GuardConfig(spike_zscore=4.0))
    for step in range(1, SPIKE_WINDOW + 1):
        assert guard.divergence(step, 0, (step, 1.4 + 0.02 * (step % 2))) is None
    assert guard.divergence(51, 0, (51, 1.7)) is None, "29 deviations, and a third of a nat"
    assert guard.divergence(52, 0, (52, 2.1)) is not None
    monkeypatch.setattr(divergence, "SPIKE_WINDOW", WINDOW)
    line = words(tmp_path, text_file, steps=WINDOW + 6, guard={"spike_zscore": 8.0}, micro=8)
    loop = in_process.prepare([*line, "train.log_every=20"])
    spike = WINDOW * BATCH
    tokens, bad = loop.train_batches.tokens, {spike + 1, spike + 4}

    def garbage(module, arguments, keywords, loss):
        if arguments[0].shape[0] == BATCH and poison.fed[-1] == spike and not module.training:
            return torch.where(torch.isin(torch.arange(BATCH), torch.tensor([1, 4]))[:, None], 9.0, loss)
        return loss

    poison = Poison(loop, [spike], 5.0)
    loop.engine.engine.module.register_forward_hook(garbage, with_kwargs=True)
    assert run.finish(loop) == 0
    [event] = events(tmp_path / "out", "spike")
    assert (event["step"], event["outliers"]) == (WINDOW + 1, "2 of 8 samples")
    assert {int(sample) for sample in event["texts"]} == bad
    for sample in bad:
        assert event["texts"][str(sample)] == loop.data.tokenizer.decode(tokens(sample).tolist())
    [rolled_back] = events(tmp_path / "out", "rolled_back")
    assert "2 of 8 samples of that batch are as bad by themselves" in rolled_back["why"]
