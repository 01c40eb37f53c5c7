"""Memory of the device runs out: for real, under a limit that torch's allocator keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chatgot.devices import device_facts, device_of_machine, is_out_of_memory
from chatgot.tuning import micro_batch
from chatgot.tuning.probe import Probes, Task
from tests.gpu.tiny import VOCABULARY, fp32_parameters, micro_batches, model_config, tiny_engine
from tests.support import engine_json

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_only")]

MODEL = {"d_model": 256, "n_head": 4, "d_hid": 768, "n_layers": 4, "max_seq_length": 512}
BATCH = 64


@pytest.fixture
def one_gib_more(device: torch.device) -> Iterator[None]:
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("one_gib_more")
@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_does_not_fit_says_so_and_leaves_the_weights(stage, device, tmp_path: Path):
    with tiny_engine(tmp_path, device, MODEL, stage=stage, batch=BATCH, micro=BATCH) as engine:
        before = fp32_parameters(engine)
        with pytest.raises(RuntimeError) as caught:
            engine.train_step(micro_batches(0, device, MODEL["max_seq_length"], BATCH, BATCH))
        assert is_out_of_memory(caught.value)
        assert all(torch.equal(before[name], weight) for name, weight in fp32_parameters(engine).items())


def test_the_finder_is_brute_force_on_a_limited_device(device, record):
    tree = {**engine_json(batch=27), "train_micro_batch_size_per_gpu": "auto"}
    model = model_config(**MODEL).model_dump()
    program = ("-m", "tests.tuning.programs.limited_probe", "fraction", str(700 * 2**20))
    probes = Probes(device_of_machine(device_facts(), device), (0,), 1, 0.0, program=program)
    sizes = micro_batch.candidates(27, 1)
    fitting = [
        size for size in sizes if probes.run(Task(micro_batch.probe_tree(tree, size, 1), model, VOCABULARY)).fits
    ]
    answer = micro_batch.search(tree, model, VOCABULARY, probes)
    record(found=answer.micro_batch)
    assert answer.micro_batch == max(fitting) < 27
    assert torch.ones(2**20, device=device).sum() == 2**20
