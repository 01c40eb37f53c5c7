"""The precision preflight: a sound model passes and is not touched, one that its precision cannot compute is refused
with the numbers.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import device_facts
from chatgot.distributed import ControlGroup, find_place
from chatgot.engine.build import join
from chatgot.engine.precision_check import BOUNDS, SAMPLES, activation_bytes, check_precision
from chatgot.errors import NumericsError
from chatgot.model.gpt import GPT
from tests.support import TINY_MODEL, engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events

PRECISIONS = ["bf16", "fp16", "autocast_bf16", "autocast_fp16"]


@pytest.fixture(scope="module")
def ranks() -> ControlGroup:
    with in_process.cpu_environment():
        join(find_place(), "cpu")
    return ControlGroup()


def config(precision: str, **fp16: object) -> EngineConfig:
    found = build_engine_config(engine_json(1), "case.json", world_size=1, facts=device_facts(), n_params=30_000)
    return dataclasses.replace(
        found, precision=precision, deepspeed={**found.deepspeed, "fp16": {"enabled": True, **fp16}}
    )


def model(architecture: str = "modern") -> GPT:
    found = GPT(ModelConfig(**{**TINY_MODEL, "architecture": architecture, "dropout": 0.2}), 64)
    found.init_weights(1)
    return found


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (5, 17), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_a_sound_model_stays_far_within_the_bounds_and_is_left_as_it_was(architecture, precision, ranks):
    gpt = model(architecture)
    before, random = {name: value.clone() for name, value in gpt.state_dict().items()}, torch.get_rng_state()
    found, line = check_precision(gpt, config(precision), *batch(), torch.device("cpu"), ranks)
    assert found is not None
    assert 0 < found.excess < 0.5
    assert found.samples == SAMPLES
    assert all(0 < difference < bound for difference, bound in zip(found.differences, BOUNDS[precision[-4:]]))
    assert f"in {precision} and fp32" in line
    assert torch.equal(random, torch.get_rng_state())
    assert gpt.training
    assert all(
        torch.equal(before[name], value) and value.dtype == torch.float32 for name, value in gpt.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_fp32_has_nothing_to_compare(ranks):
    assert check_precision(model(), config("fp32"), *batch(), torch.device("cpu"), ranks) == (
        None,
        "precision check: not needed in fp32",
    )


def test_values_that_fp16_cannot_hold_are_refused(ranks):
    gpt = model()
    with torch.no_grad():
        gpt.norm.get_parameter("weight").mul_(1e6)
    with pytest.raises(
        NumericsError, match=r"fp16 and fp32: loss nan and .* \(differ by inf, bound 0.005\).*train in fp32, or in bf16"
    ):
        check_precision(gpt, config("fp16"), *batch(), torch.device("cpu"), ranks)


def test_a_kernel_that_is_wrong_in_bf16_is_found_by_the_gradients(ranks):
    gpt = model()

    def wrong(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        if output.dtype == torch.bfloat16:
            output.register_hook(lambda gradient: gradient * 0.5)
        return output

    gpt.norm.register_forward_hook(wrong)
    with pytest.raises(NumericsError, match=r"gradient norm .* \(differ by [2-9]\.\de-01, bound 0.2\)"):
        check_precision(gpt, config("bf16"), *batch(), torch.device("cpu"), ranks)


def test_fp16_searches_its_scale_as_deepspeed_would(ranks):
    found, _ = check_precision(model(), config("fp16", initial_scale_power=24), *batch(), torch.device("cpu"), ranks)
    assert found is not None
    assert found.excess < 0.5
    with pytest.raises(NumericsError, match=r"gradient norm (inf|nan) and"):
        check_precision(model(), config("fp16", loss_scale=2**24), *batch(), torch.device("cpu"), ranks)


def test_the_run_says_and_journals_it_once(tmp_path, text_file, capsys):
    line = argv(
        write_json(tmp_path / "engine.json", engine_json(1, "bf16")),
        tmp_path / "out",
        write_run_yaml(tmp_path / "run.yaml", max_steps=2),
        text_file,
    )
    assert in_process.train(line) == 0
    [event] = events(tmp_path / "out", "precision_check")
    assert 0 < event["loss_difference"] < event["loss_bound"]
    assert 0 < event["grad_norm_difference"] < event["grad_norm_bound"]
    assert "precision check, 2 sample(s) per rank in bf16 and fp32: loss" in capsys.readouterr().out
    assert in_process.train([*line, "train.max_steps=3"]) == 0
    assert "precision check: skipped on a resume" in capsys.readouterr().out
    assert len(events(tmp_path / "out", "precision_check")) == 1


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_activations_are_counted_before_they_are_computed(architecture):
    gpt, kept, seen = model(architecture).eval(), 0, set()
    weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen | weights:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    input_ids, targets = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = gpt(input_ids, targets)
    assert loss.requires_grad
    assert kept <= activation_bytes(gpt, input_ids.numel()) <= 3 * kept


def test_no_memory_for_the_check_skips_it(ranks):
    gpt = model()
    gpt.norm.register_forward_hook(out_of_memory)
    found, line = check_precision(gpt, config("bf16"), *batch(), torch.device("cpu"), ranks)
    assert found is None
    assert "precision check: skipped, no room for an fp32 copy with its gradients and activations" in line


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
