"""What `chatgot plan` predicts of a run's memory, against what the run takes: one process per configuration, three
optimizer steps.

On a GPU the figure is the peak of PyTorch's allocator. On a CPU, which has no such counter, the shapes are made tiny,
and only the model states are compared, by their live tensors.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.bench import measuring
from chatgot.deepspeed_json.read import shipped_jsons
from chatgot.devices import GIB
from chatgot.plan.request import read_request

STEPS = 3


@dataclass(frozen=True)
class Case:
    """One configuration of the grid, on one rank, with two micro batches to a step."""

    config: str
    deepspeed: str
    micro: int
    overrides: tuple[str, ...] = ()
    accumulation: int = 2
    vocab_size: int = 50257

    @property
    def name(self) -> str:
        """For tables and test ids."""
        words = (word.removeprefix("ds.") for word in self.overrides)
        return " ".join([self.config, self.deepspeed, f"micro {self.micro}", *words])

    def words(self) -> list[str]:
        """All overrides."""
        batch = {"train_micro_batch_size_per_gpu": self.micro, "train_batch_size": self.micro * self.accumulation}
        return [*(f"ds.{key}={value}" for key, value in batch.items()), *self.overrides]


GRID = (
    Case("gpt2_small", "fp32_zero0", 4),
    Case("modern_124M", "fp32_zero0", 4, accumulation=1),
    Case("gpt2_small", "fp32_zero1_act_ckpt", 8),
    Case("modern_124M", "fp32_zero0_muon", 4),
    Case("gpt2_small", "bf16_zero1", 8),
    Case("modern_124M", "bf16_zero1", 8, accumulation=1),
    Case("gpt2_small", "bf16_zero2", 16),
    Case("modern_124M", "bf16_zero2", 16, accumulation=1),
    Case("gpt2_small", "bf16_zero2_act_ckpt", 32),
    Case("modern_124M", "bf16_zero2_act_ckpt", 32),
    Case("modern_124M", "bf16_zero2_act_ckpt", 16, ("ds.chatgot.activation_checkpointing.every_n_layers=2",)),
    Case("gpt2_small", "fp16_zero2", 8),
    Case("gpt2_small", "bf16_zero3", 8),
    Case("modern_124M", "bf16_zero3_offload", 8),
    Case("gpt2_small", "bf16_zero2", 8, ("model.dropout=0.1",)),
    Case("modern_124M", "bf16_zero2", 8, ("model.n_kv_head=4",)),
    Case("chatgot_85M", "bf16_zero1", 16, vocab_size=100),
    Case("gpt2_medium", "bf16_zero1", 4),
    Case("modern_350M", "bf16_zero2_act_ckpt", 16),
    Case("gpt2_large", "bf16_zero2_act_ckpt", 8),
)
"""Twenty that a GPU of 40 GB holds."""


def main(argv: list[str] | None = None) -> int:
    """Print the table of BENCHMARKS.md."""
    parser, every = measuring.suite_parser("plan", __doc__), range(len(GRID))
    number: dict[str, Any] = {"type": int, "choices": every, "metavar": "I"}
    parser.add_argument("--cases", nargs="+", default=list(every), help="numbers in the grid", **number)
    parser.add_argument("--one", help="measure this one here, and print it as JSON", **number)
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        print(json.dumps(measure(GRID[arguments.one])))
        return 0
    print(measuring.describe_machine())
    measuring.print_head("configuration", "predicted", "measured", "error")
    errors, what = [], ""
    for index in arguments.cases:
        measured = in_own_process(index)
        errors.append(abs(measured["error"]))
        what, sizes = measured["what"], (f"{measured[side] / GIB:.3f} GiB" for side in ("predicted", "measured"))
        measuring.print_row(GRID[index].name, *sizes, f"{100 * measured['error']:+.1f} %")
    print(f"{what}: median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %")
    return 0


def in_own_process(index: int, timeout: float = 270.0) -> dict[str, Any]:
    """`measure` of one case of the grid in a fresh process, so that no earlier engine's memory is counted.

    Raises:
        subprocess.CalledProcessError: it failed; its output is on the streams.
    """
    root = Path(__file__).resolve().parent.parent.parent
    program = [sys.executable, str(root / "launch" / "bench.py"), "--suite", "plan", "--one", str(index)]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Bytes predicted and measured, and the relative error of the prediction."""
    import torch

    from chatgot.deepspeed_json.resolve import read_engine_config
    from chatgot.devices import device_facts
    from chatgot.distributed import find_place
    from chatgot.engine.build import build, join
    from chatgot.model.gpt import GPT
    from chatgot.model.shapes import count_parameters
    from chatgot.plan.states import STATES
    from chatgot.training.memory import check_memory
    from chatgot.training.run import leave

    path = shipped_jsons()[case.deepspeed]
    facts = device_facts()
    request = read_request(path, case.config, 1, "h200", case.words(), case.vocab_size)
    shape = request.config.model
    if facts.kind == "cpu":
        shape = dataclasses.replace(shape, d_model=48, n_head=4, n_layers=2, d_hid=96, max_seq_length=32)
    device = join(find_place(), facts.kind)
    config = read_engine_config(
        path, request.overrides, world_size=1, facts=facts, n_params=count_parameters(shape, case.vocab_size)
    )
    model = GPT(shape, case.vocab_size)
    model.init_weights(0)
    engine = build(model, config, device)
    check = check_memory(shape, case.vocab_size, engine, 1, facts, device)
    for _ in range(STEPS):
        ids = torch.randint(
            case.vocab_size, (config.accumulation, config.micro_batch_size, shape.max_seq_length), device=device
        )
        engine.train_step((row, row) for row in ids)
    if facts.kind == "cuda":
        what, predicted, measured = "peak in use", check.plan.peak, torch.cuda.max_memory_allocated()
    else:
        assert check.live is not None
        what = "model states"
        predicted = sum(check.plan.states.total(part) for part in STATES)
        measured = sum(check.live[part] for part in STATES)
    leave()
    return {
        "case": case.name,
        "what": what,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "peak_at": check.plan.peak_at,
        "parts": check.plan.parts,
    }
