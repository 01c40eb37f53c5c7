"""Activation checkpointing changes memory and nothing else: every stage, both backends, 1 and 2 ranks, with dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_ranks

LAYERS, BATCH = 6, 4
BACKENDS = ("torch", "deepspeed")
EXPLOSIONS = {"forward": 3, "recomputation": LAYERS + 3}
"""Which forward of a block raises, counted over the whole step."""
EXPLODING_STAGES = (0, 3)


def settings(
    world_size: int, stage: int, section: dict[str, Any] | None, backend: str = "auto", every: int = 1, **extra: Any
) -> dict:
    """A case of the program; with deepspeed's backend, `inputs_beside_the_graph` blocks keep their input where the
    measurement is blind.
    """
    chatgot = (
        {}
        if section is None
        else {"chatgot": {"activation_checkpointing": {"backend": backend, "every_n_layers": every}}}
    )
    common = {"stage": stage, "batch": BATCH, "micro": BATCH // world_size, "gradient_clipping": 0.0}
    beside = LAYERS // every if backend == "deepspeed" or section else 0
    return {
        "json": {**common, "activation_checkpointing": section, **chatgot},
        "inputs_beside_the_graph": beside,
        **extra,
    }


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    found = {}
    for stage in range(4):
        found[f"stage {stage} off"] = settings(world_size, stage, None)
        for backend in BACKENDS:
            for every in (1, 2) if stage in (0, 3) else (1,):
                found[f"stage {stage} {backend} every {every}"] = settings(world_size, stage, {}, backend, every)
        if stage in (1, 2):
            continue
        partition = {"partition_activations": True}
        found[f"stage {stage} partition_activations"] = settings(world_size, stage, partition)
        contiguous = {**partition, "contiguous_memory_optimization": True, "number_checkpoints": LAYERS}
        found[f"stage {stage} contiguous_memory_optimization"] = settings(world_size, stage, contiguous)
    found["stage 0 synchronize and profile"] = settings(
        world_size, 0, {"synchronize_checkpoint_boundary": True, "profile": True}
    )
    gpt2 = {"architecture": "gpt2"}
    found["gpt2 off"] = settings(world_size, 1, None, model=gpt2)
    for backend in BACKENDS:
        found[f"gpt2 {backend}"] = settings(world_size, 1, {}, backend, model=gpt2)
    found["control"] = settings(world_size, 0, {}, forget_rng=True)
    return found


def pairs() -> list[tuple[str, str]]:
    """(with, without) recomputation."""
    found = [(name, f"{name[:7]} off") for name in cases(1) if name.startswith("stage") and not name.endswith("off")]
    return [*found, *((f"gpt2 {backend}", "gpt2 off") for backend in BACKENDS)]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp(f"act_ckpt{request.param}")
    plan, out = folder / "plan.json", folder / "results.json"
    explosions = {
        f"{backend} {where} stage {stage}": (settings(request.param, stage, {}, backend), at)
        for stage in EXPLODING_STAGES
        for backend in BACKENDS
        for where, at in EXPLOSIONS.items()
    }
    plan.write_text(json.dumps({"cases": cases(request.param), "explosions": explosions}))
    run_ranks(["-m", "tests.distributed.programs.act_ckpt", str(plan), str(out)], request.param)
    return json.loads(out.read_text())


@pytest.mark.parametrize(("with_it", "without"), pairs(), ids=[name for name, _ in pairs()])
def test_invariant_06_recomputation_changes_no_bit_of_loss_gradients_or_weights(results, with_it, without):
    for on, off in zip(results["cases"][with_it], results["cases"][without], strict=True):
        assert off["note"].startswith("activation checkpointing: off")
        assert not on["note"].startswith("activation checkpointing: off")
        assert on["losses"] == off["losses"]
        assert len(off["gradients"]) == 2
        for ours, theirs in zip(on["gradients"], off["gradients"], strict=True):
            assert [name for name in theirs if ours[name] != theirs[name]] == []
        assert on["weights"] == off["weights"]
        assert on["keys"] == off["keys"]


def test_control_recomputation_with_other_dropout_is_noticed(results):
    [control, *_], [off, *_] = results["cases"]["control"], results["cases"]["stage 0 off"]
    assert control["losses"][0] == off["losses"][0]
    assert control["gradients"][0] != off["gradients"][0]


def test_invariant_07_the_json_decides_which_blocks_are_recomputed_and_that_saves_memory(results):
    for name, ranks in results["cases"].items():
        for found in ranks:
            recomputed = 0 if name.endswith("off") else LAYERS // 2 if name.endswith("every 2") else LAYERS
            assert found["blocks"] == [LAYERS + recomputed] * 2, name
    for with_it, without in pairs():
        for on, off in zip(results["cases"][with_it], results["cases"][without], strict=True):
            saved = 1 - on["saved_bytes"] / off["saved_bytes"]
            print(f"{with_it}: {off['saved_bytes']} -> {on['saved_bytes']} bytes ({saved:.0%} less)")
            assert saved >= (0.3 if with_it.endswith("every 2") else 0.6), with_it


def test_evaluation_and_sampling_never_checkpoint(results):
    for name, ranks in results["cases"].items():
        for found in ranks:
            asked = 0 if name.endswith("off") else LAYERS // 2 if name.endswith("every 2") else LAYERS
            if name != "control":  # goes past the engine
                assert found["checkpoint_calls"] == asked, name
            assert found["checkpoint_calls_outside_training"] == 0, name
            assert found["evaluation_blocks"] == LAYERS, name
            assert found["sampling_blocks"] == LAYERS, name


@pytest.mark.parametrize("stage", EXPLODING_STAGES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", EXPLOSIONS)
def test_exception_in_a_recomputed_block_arrives_once_and_unchanged_on_every_rank(results, where, backend, stage):
    block = 2 if where == "forward" else LAYERS - 3  # the third one, from the front or from the back
    for seen in results["explosions"][f"{backend} {where} stage {stage}"]:
        assert seen == {
            "raised": 1,
            "same object": True,
            "type": "Boom",
            "args": ["block on fire", block],
            "chained": False,
            "blocks run": EXPLOSIONS[where],
        }
