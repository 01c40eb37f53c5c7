"""Activation checkpointing changes memory and nothing else: every stage, both backends, 1 and 2 ranks, with dropout."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.halves import HALVES
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


def cases(world_size: int, rest: bool) -> dict[str, dict[str, Any]]:
    """Half of all, in which there is every pair of ranks, stage, backend and number of blocks; or the rest."""
    found, odd = {}, world_size + rest
    for stage in range(4):
        found[f"stage {stage} off"] = settings(world_size, stage, None)
        for number, backend in enumerate(BACKENDS):
            for every in (1, 2) if stage in (0, 3) else (1,):
                if (stage + number + every + odd) % 2:
                    found[f"stage {stage} {backend} every {every}"] = settings(world_size, stage, {}, backend, every)
        partition = {"partition_activations": True}
        contiguous = {**partition, "contiguous_memory_optimization": True, "number_checkpoints": LAYERS}
        if stage == 3 * (odd % 2):
            found[f"stage {stage} partition_activations"] = settings(world_size, stage, partition)
        elif stage in (0, 3):
            found[f"stage {stage} contiguous_memory_optimization"] = settings(world_size, stage, contiguous)
    found["stage 0 synchronize and profile"] = settings(
        world_size, 0, {"synchronize_checkpoint_boundary": True, "profile": True}
    )
    gpt2, backend = {"architecture": "gpt2"}, BACKENDS[odd % 2]
    found["gpt2 off"] = settings(world_size, 1, None, model=gpt2)
    found[f"gpt2 {backend}"] = settings(world_size, 1, {}, backend, model=gpt2)
    found["control"] = settings(world_size, 0, {}, forget_rng=True)
    return found


def explosions(world_size: int, rest: bool) -> dict[str, tuple[dict[str, Any], int]]:
    """The same half, or the rest."""
    return {
        f"{backend} {where} stage {stage}": (settings(world_size, stage, {}, backend), EXPLOSIONS[where])
        for stage in EXPLODING_STAGES
        for number, backend in enumerate(BACKENDS)
        for turn, where in enumerate(EXPLOSIONS)
        if (stage + number + turn + world_size + rest) % 2
    }


@pytest.fixture(scope="module", params=HALVES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, world_size = tmp_path_factory.mktemp("act_ckpt"), request.param[0]
    plan, out = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"cases": cases(*request.param), "explosions": explosions(*request.param)}))
    run_ranks(["-m", "tests.distributed.programs.act_ckpt", str(plan), str(out)], world_size)
    return json.loads(out.read_text())


def pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(with, without) recomputation."""
    names = [name for name in results["cases"] if not name.endswith("off") and name != "control"]
    assert len(names) == 6 + 3 + 1
    return [(name, "gpt2 off" if name.startswith("gpt2") else f"{name[:7]} off") for name in names]


def test_invariant_06_recomputation_changes_no_bit_of_loss_gradients_or_weights(results):
    for with_it, without in pairs(results):
        for on, off in zip(results["cases"][with_it], results["cases"][without], strict=True):
            assert off["note"].startswith("activation checkpointing: off")
            assert not on["note"].startswith("activation checkpointing: off"), with_it
            assert on["losses"] == off["losses"], with_it
            assert len(off["gradients"]) == 2
            for ours, theirs in zip(on["gradients"], off["gradients"], strict=True):
                assert [name for name in theirs if ours[name] != theirs[name]] == [], with_it
            assert on["weights"] == off["weights"], with_it
            assert on["keys"] == off["keys"], with_it


def test_control_recomputation_with_other_dropout_is_noticed(results):
    [control, *_], [off, *_] = results["cases"]["control"], results["cases"]["stage 0 off"]
    assert control["losses"][0] == off["losses"][0]
    assert control["gradients"][0] != off["gradients"][0]


def test_invariant_07_the_json_decides_which_blocks_are_recomputed_and_that_saves_memory(results):
    for name, ranks in results["cases"].items():
        for found in ranks:
            recomputed = 0 if name.endswith("off") else LAYERS // 2 if name.endswith("every 2") else LAYERS
            assert found["blocks"] == [LAYERS + recomputed] * 2, name
    for with_it, without in pairs(results):
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


def test_exception_in_a_recomputed_block_arrives_once_and_unchanged_on_every_rank(results):
    assert len(results["explosions"]) == 4
    for name, ranks in results["explosions"].items():
        where = name.split()[1]
        block = 2 if where == "forward" else LAYERS - 3  # the third one, from the front or from the back
        for seen in ranks:
            assert seen == {
                "raised": 1,
                "same object": True,
                "type": "Boom",
                "args": ["block on fire", block],
                "chained": False,
                "blocks run": EXPLOSIONS[where],
            }, name
