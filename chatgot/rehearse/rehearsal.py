"""`chatgot rehearse`: a small model through everything that a run will go through, before the run is queued.

The JSON stays as it is and the model keeps its structure; what is made smaller, or different for a CPU, is printed.
Every row of the table is the real program: the ranks are started by launch/run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.config.overrides import parse_overrides
from chatgot.config.run import ModelConfig, RunConfig, load_run_config
from chatgot.deepspeed_json import check
from chatgot.deepspeed_json.read import find_json
from chatgot.deepspeed_json.resolve import EngineConfig, Resolved
from chatgot.devices import assumed_device
from chatgot.errors import EXIT_DONE, ChatGoTError, CheckpointError, ConfigError, MachineError, NumericsError
from chatgot.launcher.ranks import refusal
from chatgot.model.shapes import count_parameters
from chatgot.observe.journal import read_journal
from chatgot.proof import digest
from chatgot.rehearse.ranks import failed, start, trained
from chatgot.verify.replay import OUTSIDE

SAVED, KILLED, END = 20, 30, 40
"""Steps: of the checkpoint, of the kill, of the last one."""
BYTES = {"fp32": 12, "bf16": 14, "fp16": 14}
"""Of a checkpoint for each parameter, with Adam: weights and two moments in fp32, weights in 16 bit."""


@dataclass(frozen=True)
class RehearseArguments:
    """The command line of `chatgot rehearse`."""

    deepspeed_config: Path
    config: str = "tiny"
    data: str = "wars_of_the_roses"
    nproc: int = 2
    out_dir: Path | None = None
    """Of the run itself; the rehearsal's own folder is made beside it. None: where temporary files are."""
    full: bool = False
    """Whether the real model is then trained for two steps."""
    overrides: tuple[str, ...] = ()


def shrunk(model: ModelConfig) -> ModelConfig:
    """The same structure, small: at most 4 blocks and 4 heads of width 16, 64 tokens, and no dropout."""
    ratio, heads = model.n_head // model.kv_heads, min(model.n_head, 4)
    grouped = ratio if heads % ratio == 0 else heads
    width = 16 * heads
    small = {
        "n_layers": min(model.n_layers, 4),
        "n_head": heads,
        "n_kv_head": None if model.n_kv_head is None else heads // grouped,
        "d_model": width,
        "head_dim": None if model.head_dim is None else 32,
        "d_hid": max(16, round(width * model.d_hid / model.d_model)),
        "max_seq_length": min(model.max_seq_length, 64),
        "dropout": 0.0,
    }
    return model.model_copy(update=small)


def rehearse(arguments: RehearseArguments) -> int:
    """Go through all rows, up to the first that fails, and print the table; returns that row's exit code, or 0."""
    table, exit_code = list[str](), EXIT_DONE
    with contextlib.ExitStack() as cleanup:
        rehearsal = Rehearsal(arguments, cleanup)
        rows: dict[str, Callable[[], str]] = {
            "check": rehearsal.check,
            "data": rehearsal.read_data,
            "compiler": rehearsal.compiler,
            "folder": rehearsal.folder,
            "train, save, kill": rehearsal.train,
            "plain loop": rehearsal.plain_loop,
            "resume": rehearsal.resume,
            "other rank count": rehearsal.other_ranks,
            "evaluate": rehearsal.evaluate,
            "sample": rehearsal.sample,
            "verify": rehearsal.verify,
        }
        if arguments.full:
            rows["full model"] = rehearsal.full_model
        for name, work in rows.items():
            began, verdict, said = time.monotonic(), "-", "not reached"
            if not exit_code:
                print(f"rehearsing: {name}", file=sys.stderr, flush=True)
                try:
                    said = work()
                    verdict = "skip" if said.startswith("skipped") else "pass"
                except ChatGoTError as error:
                    exit_code, verdict, said = error.exit_code, "FAIL", str(error)
            said = "; ".join(line.strip() for line in said.splitlines() if line.strip())
            table.append(f"{name:<18} {verdict:<5} {time.monotonic() - began:6.1f} s  {said}")
    print("\n".join(table))
    passed = "passes" if not exit_code else f"fails (exit {exit_code})"
    print(f"rehearsal of {arguments.deepspeed_config} with {arguments.nproc} rank(s): {passed}")
    return exit_code


class Rehearsal:
    """What the rows hand on to each other."""

    config: RunConfig
    small: RunConfig
    engine: EngineConfig
    real: EngineConfig
    work: Path

    def __init__(self, arguments: RehearseArguments, cleanup: contextlib.ExitStack) -> None:
        self.arguments = arguments
        self.cleanup = cleanup
        self.lowered: list[str] = []
        """Overrides that make the JSON run on a CPU."""

    def check(self) -> str:
        """Hold the JSON and the YAML against all rules, and settle what is made smaller."""
        given = self.arguments
        run_overrides, ds_overrides = parse_overrides(list(given.overrides))
        self.config = load_run_config(given.config, run_overrides)
        self.json = find_json(given.deepspeed_config)
        cpu = assumed_device("cpu")
        section = self._resolved(ds_overrides, "cuda")
        if section.v["fp16.enabled"] is True and not assumed_device("auto").fp16 and not cpu.fp16:
            self.lowered = ["ds.fp16.enabled=false", "ds.bf16.enabled=true"]
            print("adapted: fp16 -> bf16: this CPU does not train in fp16")
        self.real = section.engine_config()
        _, all_ds = parse_overrides([*given.overrides, *self.lowered])
        self.engine = self._resolved(all_ds, "cpu").engine_config()
        train = {"max_steps": END, "log_every": 1, "eval_tokens": 8192, "sample_max_new_tokens": 16}
        train |= dict.fromkeys(("eval_every", "sample_every"))
        kind = self.config.data.tokenizer
        data = {"bpe_vocab_size": min(self.config.data.bpe_vocab_size, 512), "tokenizer": kind.replace("given", "bpe")}
        self.small = self.config.model_copy(
            update={
                "model": shrunk(self.config.model),
                "data": self.config.data.model_copy(update=data),
                "train": self.config.train.model_copy(update=train),
            }
        )
        before, after = run_folder.flattened(self.config.to_dict()), run_folder.flattened(self.small.to_dict())
        changed = [f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
        print(f"made smaller: {', '.join(changed)}")
        notes = len(self.real.findings)
        return f"{notes} thing(s) to know: chatgot check {self.json} says them" if notes else "nothing to say"

    def _resolved(self, overrides: dict[str, Any], kind: str) -> Resolved:
        vocab_size = self.config.data.bpe_vocab_size if self.config.data.tokenizer == "bpe" else 256
        self.n_params = count_parameters(self.config.model, vocab_size)
        report = check.check(
            str(self.json),
            overrides,
            world_size=self.arguments.nproc,
            facts=assumed_device(kind),
            n_params=self.n_params,
            max_steps=self.config.train.max_steps,
        )
        if report.resolved is None or report.exit_code:
            raise ConfigError("\n".join(check.as_text(report, with_effective=False)))
        return report.resolved

    def read_data(self) -> str:
        """Prepare the text, with the run's own sizes and with the small ones."""
        from chatgot.data.prepare import prepare_cached
        from chatgot.data.prepared import check_block_size

        self.data = prepare_cached(self.arguments.data, self.small.data)
        check_block_size(self.data.meta, self.config.model.max_seq_length)
        return f"{len(self.data.train):,} tokens to train on"

    def compiler(self) -> str:
        """Look for what DeepSpeed and torch.compile compile with, where this JSON lets them."""
        optimizer, why = self.engine.optimizer, self.engine.cpu_adam_key
        if not why and optimizer is not None and optimizer.params.get("torch_adam") is False:
            why = "optimizer.params.torch_adam = false"
        if not why and self.engine.chatgot.compile.enabled:
            why = "chatgot.compile"
        if not why:
            return "skipped: this JSON compiles nothing"
        name = os.environ.get("CXX", "g++")
        if (found := shutil.which(name)) is None:
            remedy = "install a C++ compiler, name one with CXX, or leave the key out"
            raise MachineError(f"{why} needs a C++ compiler, and there is no {name} on PATH; {remedy}")
        return f"{found}, for {why}"

    def folder(self) -> str:
        """Make the rehearsal's folder where the run's will lie, and compare the room there with a checkpoint's size."""
        out = self.arguments.out_dir
        base = Path(tempfile.gettempdir()) if out is None else out.absolute().parent
        while not base.exists() and base != base.parent:
            base = base.parent
        if out is not None and out.exists() and not os.access(out, os.W_OK | os.X_OK):
            raise ConfigError(f"--out_dir {out}: is not writable; make it so, or name another folder")
        try:
            folder = tempfile.mkdtemp(prefix=".chatgot-rehearsal-", dir=base)
        except OSError as error:
            what = f"no folder can be made in {base}: {error.strerror}"
            raise ConfigError(f"--out_dir {out or base}: {what}; make it writable, or name another") from error
        self.work = Path(folder)
        self.cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        needed, free = 2 * BYTES[self.real.precision] * self.n_params, shutil.disk_usage(base).free
        sizes = f"{free / 1e9:.1f} GB free in {base}, two checkpoints of the real model take {needed / 1e9:.1f} GB"
        if free < needed:
            raise CheckpointError(f"{sizes}: make room, or name another --out_dir")
        return sizes

    def train(self) -> str:
        """Train, save, and kill rank 0 some steps later."""
        import yaml

        (self.work / "run.yaml").write_text(yaml.safe_dump(self.small.to_dict()), encoding="utf-8")
        task = {"steps": KILLED, "arguments": {**self._named("run"), "overrides": self._overrides()}}
        (self.work / "task.json").write_text(json.dumps(task), encoding="utf-8")
        script = str(Path(__file__).with_name("ranks.py"))
        words = ["--script", script, "--", str(self.work / "task.json")]
        code, said = start(self.arguments.nproc, words, self.work / "log.txt")
        self.digests = digest.history(self.work / "run").digests if (self.work / "run").exists() else {}
        if KILLED not in self.digests or code in (EXIT_DONE, None):
            raise failed("the training", code, said)
        saved = list((self.work / "run" / run_folder.CHECKPOINTS).glob(f"*{SAVED}/manifest.json"))
        if not saved:
            raise CheckpointError(f"no checkpoint of step {SAVED} was saved: {refusal(said)}")
        self.tag = saved[0].parent.name
        for step in (1, KILLED):
            loss = self.digests[step].loss
            if loss != loss or loss == float("inf"):
                raise NumericsError(f"the loss of step {step} is {loss}")
        fall = f"loss {self.digests[1].loss:.3f} -> {self.digests[KILLED].loss:.3f}"
        return f"{KILLED} steps, {fall}; {self.tag} saved, rank 0 killed after step {KILLED}"

    def plain_loop(self) -> str:
        """Compare the losses so far with those of a plain PyTorch loop."""
        from chatgot.rehearse.plain import BOUNDS, deviation, no_plain_loop, plain_losses

        if why := no_plain_loop(self.engine):
            return f"skipped: {why}"
        losses = [self.digests[step].loss for step in range(1, KILLED + 1)]
        largest, step = deviation(plain_losses(self.small, self.engine, self.data, KILLED), losses)
        bound = BOUNDS[self.engine.precision]
        found = f"{KILLED} steps, losses differ by {largest:.1e} at most (relative, step {step}; bound {bound:.0e})"
        if largest > bound:
            raise NumericsError(f"{found}: what is trained is not what the JSON says")
        return found

    def resume(self) -> str:
        """Start the same command again, to the end."""
        return self._resumed(self.arguments.nproc, "run", "must")

    def other_ranks(self) -> str:
        """Go on from the same checkpoint with another number of ranks, in another folder."""
        here, micro = self.arguments.nproc, self.engine.micro_batch_size
        fits = [n for n in range(1, here + 2) if n != here and self.engine.train_batch_size % (n * micro) == 0]
        if not fits:
            return f"skipped: no other number up to {here + 1} divides the global batch"
        ranks = max((n for n in fits if n < here), default=fits[0])
        source = f"{self.work / 'run'}@{self.tag}"
        return f"{ranks} rank(s): " + self._resumed(ranks, "other", source)

    def _resumed(self, ranks: int, folder: str, resume_from: str) -> str:
        words = [word for name, value in self._named(folder).items() for word in (f"--{name}", str(value))]
        words = ["--", *words, "--resume_from", resume_from, *self._overrides(ranks)]
        said = trained("the resume", ranks, words, self.work / "log.txt")
        read, _ = read_journal(self.work / folder / run_folder.EVENTS)
        kinds = {event.get("event"): event for event in read}
        if "resume_verified" not in kinds:
            told = next((kinds[k] for k in ("resume_differs", "resume_not_compared") if k in kinds), {})
            raise CheckpointError(f"the resumed run is not proven to be the same: {json.dumps(told, default=str)}")
        return next(line[line.index("resume verified") :] for line in said.splitlines() if "resume verified" in line)

    def evaluate(self) -> str:
        """Look for a finite validation loss at the end of the resumed run."""
        lines, _ = read_journal(self.work / "run" / run_folder.METRICS)
        losses = [line["val/loss"] for line in lines if isinstance(line.get("val/loss"), float)]
        if not losses or losses[-1] != losses[-1]:
            raise NumericsError("the run has no finite val/loss at its end")
        return f"val/loss {losses[-1]:.3f}"

    def sample(self) -> str:
        """Look for the run's own samples, and draw one from its checkpoint as `chatgot sample` does."""
        from chatgot.inference.sample import load_run

        files = list((self.work / "run" / "samples").glob("*.txt"))
        if not files:
            raise CheckpointError("the run left no sample at its end")
        run = load_run(self.work / "run", device="cpu")
        text = run.continuations(self.small.train.sample_prompts[0] or "\n", max_new_tokens=16)[0]
        return f"{len(text)} characters from the newest checkpoint"

    def verify(self) -> str:
        """Check both run folders as `chatgot verify` does."""
        from chatgot.verify.verify import verify

        for folder in ("run", "other"):
            if not (self.work / folder).exists():
                continue
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                whole = verify(self.work / folder)
            if not whole:
                problems = [line for line in said.getvalue().splitlines() if "PROBLEM" in line]
                raise CheckpointError("; ".join(problems))
        return "checkpoints and journals are whole"

    def full_model(self) -> str:
        """Train the real model for two steps, on the devices that launch/run finds."""
        given = self.arguments
        short = ["train.max_steps=2", "train.eval_tokens=8192", "train.sample_max_new_tokens=8"]
        words = ["--deepspeed_config", str(self.json), "--config", given.config, "--data", given.data]
        words = ["--", *words, "--out_dir", str(self.work / "full"), *given.overrides, *short]
        trained("the real model", given.nproc, words, self.work / "log.txt", on_cpu=False)
        return f"{self.n_params:,} parameters, two steps, saved"

    def _named(self, folder: str) -> dict[str, str]:
        return {
            "deepspeed_config": str(self.json),
            "config": str(self.work / "run.yaml"),
            "data": self.arguments.data,
            "out_dir": str(self.work / folder),
        }

    def _overrides(self, ranks: int | None = None) -> list[str]:
        ours = [word for word in self.arguments.overrides if word.startswith("ds.")]
        saving = ("every_steps=20", "every_minutes=null", "keep_last=3", "keep_best=0", "keep_every_steps=null")
        ours += [*self.lowered, *self._kept_inside(), *(f"ds.chatgot.checkpoint.{word}" for word in saving)]
        if ranks not in (None, self.arguments.nproc) and "gradient_accumulation_steps" in self.engine.source:
            ours.append(f"ds.train_batch_size={self.engine.train_batch_size}")
        return ours

    def _kept_inside(self) -> list[str]:
        """Overrides for what the JSON would write outside the rehearsal's folder, where the run's own may lie."""
        tree = self.engine.deepspeed
        boards = [name for name in OUTSIDE if name != "wandb" and (tree.get(name) or {}).get("enabled")]
        zero = tree.get("zero_optimization") or {}
        offloads = [name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("nvme_path")]
        nvme = [f"ds.zero_optimization.{name}.nvme_path={self.work / 'nvme'}" for name in offloads]
        return [*(f"ds.{name}.enabled=false" for name in boards), *nvme]
