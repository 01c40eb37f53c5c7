"""The whole training program, from arguments to exit code."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from chatgot import run_folder
from chatgot.checkpoint import faults, load, manifest, rng, room
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.manifest import Difference
from chatgot.checkpoint.publish import take_back
from chatgot.checkpoint.resume import CHANGED, layout, refuse_layouts, resume
from chatgot.checkpoint.room import expected_bytes, preflight
from chatgot.checkpoint.save import Saver
from chatgot.config.overrides import apply_overrides, parse_overrides
from chatgot.config.run import RunConfig, load_run_config
from chatgot.data.cache import prepare_cached
from chatgot.data.loader import DataOrder, EvalBatches, TrainBatches
from chatgot.data.prepared import PreparedData, check_block_size
from chatgot.deepspeed_json.batch import TO_BE_FOUND
from chatgot.deepspeed_json.engine_config import EngineConfig, read_engine_config
from chatgot.deepspeed_json.file import plain_copy, read_document
from chatgot.devices import DeviceFacts, deterministic, device_facts, device_name, matmul_precision
from chatgot.distributed import ControlGroup, Place, find_place
from chatgot.engine.build import build, join, versions
from chatgot.engine.optimizer import state_kind
from chatgot.engine.precision_check import check_precision
from chatgot.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ChatGoTError,
    CheckpointError,
    DataError,
)
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_matmul_parameters, count_parameters, flops_per_token
from chatgot.observe.journal import Events, Journal
from chatgot.observe.meters import Mfu
from chatgot.observe.progress import Progress, human_count, show_log
from chatgot.observe.wandb_run import WandbRun
from chatgot.proof import digest
from chatgot.proof.compare import Overlap, Proof, setup
from chatgot.training import (
    micro_batch,
    samples,
    schedule,
)
from chatgot.training.guard import Guard
from chatgot.training.loop import Loop, Records
from chatgot.training.memory import check_memory
from chatgot.training.stop import StopSignals
from chatgot.tuning import finder


@dataclass(frozen=True)
class TrainArguments:
    """The command line of train.py: *which run* is this."""

    deepspeed_config: str
    out_dir: Path
    config: str = "tiny"
    data: str = "wars_of_the_roses"
    resume_from: str = "auto"
    allow_data_change: bool = False
    allow_batch_change: bool = False
    overrides: tuple[str, ...] = ()
    run_name: str | None = None
    local_rank: int | None = None


def train(arguments: TrainArguments) -> int:
    """Train; returns the exit code. Several calls in one process share the process group.

    Raises:
        ChatGoTError: every refusal, on all ranks.
    """
    place = find_place(arguments.local_rank)
    loop = prepare_run(arguments, place)
    with loop.stop:
        return finish(loop)


def finish(loop: Loop) -> int:
    """Run a prepared loop to its end, closing the records whatever happens."""
    records, exit_code = loop.records, 1
    try:
        for _ in loop.steps():
            pass
        loop.proof.end()
        exit_code = EXIT_INTERRUPTED if loop.stopped_by else EXIT_DONE
        if loop.stopped_by:
            records.event("preempted", step=loop.step, signal=loop.stopped_by)
            records.progress.say(
                f"stopped by {loop.stopped_by} at step {loop.step}; saved. Run the same command again to go on (exit "
                f"75)"
            )
        else:
            records.event("finished", **{**loop.position.last_val, "step": loop.step})
    except ChatGoTError as error:  # of all ranks together
        exit_code = error.exit_code
        _finish_saving(loop)
        records.event("failed", step=loop.step, error=str(error), exit_code=exit_code)
        raise
    finally:
        loop.proof.end()
        records.progress.close()
        if records.wandb is not None:
            records.wandb.finish(exit_code)
        if records.events is not None and records.journal is not None:
            records.events.close()
            records.journal.close()
        if loop.ranks.rank == 0:
            run_folder.release_lock(loop.out_dir)
    if exit_code == EXIT_DONE and loop.ranks.rank == 0:
        _say_what_next(loop)
    return exit_code


def _finish_saving(loop: Loop) -> None:
    """A run that ends with an error leaves the checkpoint that it was saving in the background."""
    try:
        loop.finish_saving()
    except CheckpointError as error:
        loop.records.progress.say(f"WARNING: {error}")


def prepare_run(arguments: TrainArguments, place: Place, progress: Progress | None = None) -> Loop:
    """Everything before the first step: check, prepare data, build, resume or start, write the run folder.

    Args:
        progress: where rank 0 speaks; default: stdout.
    """
    try:
        return _prepared(arguments, place, progress)
    except BaseException:
        if place.rank == 0:
            run_folder.release_lock(arguments.out_dir)
        raise


def _prepared(arguments: TrainArguments, place: Place, progress: Progress | None) -> Loop:
    run_overrides, ds_overrides = parse_overrides(list(arguments.overrides))
    config = load_run_config(arguments.config, run_overrides)
    facts = device_facts()

    def read(n_params: int | None, found_micro_batch: tuple[int, str]) -> EngineConfig:
        return read_engine_config(
            arguments.deepspeed_config,
            ds_overrides,
            world_size=place.world_size,
            facts=facts,
            n_params=n_params,
            found_micro_batch=found_micro_batch,
        )

    read(
        None, TO_BE_FOUND
    )  # refuses a wrong JSON before anything expensive; read again below, when the model's size is known
    device = join(place, facts.kind)
    ranks = ControlGroup()
    progress = progress or Progress(config.train.max_steps, enabled=place.rank == 0)
    show_log(progress)
    if rehearsal := faults.arm(place.rank):
        progress.say(rehearsal)

    data = _prepare_data(arguments.data, config, place, ranks, progress)
    n_params = count_parameters(config.model, data.tokenizer.vocab_size)
    answer = _find_micro_batch(arguments, ds_overrides, config, data, facts, place, ranks, progress)
    engine_config = read(n_params, (answer.micro_batch, answer.reason) if answer is not None else TO_BE_FOUND)
    model = GPT(config.model, data.tokenizer.vocab_size)
    fields = manifest_fields(model, config, engine_config, data, place.world_size)
    found, allowed = _choose_checkpoint(arguments, fields, ranks, progress)

    rng.seed(config.train.seed, place.rank)
    model.init_weights(config.train.seed)
    block = config.model.max_seq_length
    order = DataOrder(len(data.train), block, config.train.seed)

    def batches(config: EngineConfig) -> TrainBatches:
        return TrainBatches(
            data.train, order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
        )

    checked, precision_note = (
        None,
        "precision check: skipped on a resume, whose weights are loaded after the engine is built",
    )
    if found is None:
        first = next(batches(engine_config).micro_batches(0))
        checked, precision_note = check_precision(model, engine_config, *first, device, ranks)
    engine = build(model, engine_config, device)
    client_state, load_notes = resume(engine.engine, found, fields, ranks) if found is not None else (None, [])
    load_notes = [f"{CHANGED}{one}" for one in allowed] + load_notes
    if client_state is not None and any(one.field == "data" for one in allowed):
        client_state = {**client_state, "best_val_loss": None, "last_val": {}}  # of another validation split
    json_micro_batch = engine_config.micro_batch_size
    micro_notes = micro_batch.carry_on(engine, client_state, place.world_size)
    engine_config = engine.config

    records = Records(progress)
    prompts, prompt_notes = samples.usable_prompts(config.train.sample_prompts, data.tokenizer, _fallback_prompt(data))
    matmul_params = count_matmul_parameters(config.model, data.tokenizer.vocab_size)
    own = arguments.out_dir / run_folder.CHECKPOINTS
    loop = Loop(
        engine=engine,
        config=config,
        data=data,
        train_batches=batches(engine_config),
        eval_batches=EvalBatches(data.val, block, engine_config.micro_batch_size, place.rank, place.world_size),
        json_micro_batch=json_micro_batch,
        ranks=ranks,
        records=records,
        out_dir=arguments.out_dir,
        device=device,
        fields=fields,
        mfu=Mfu(
            flops_per_token(matmul_params, config.model.n_layers, config.model.d_model, block),
            facts.name,
            matmul_precision(engine_config.precision),
            place.world_size,
        ),
        prompts=prompts,
        stop=StopSignals(),
        saver=Saver(
            own,
            engine_config.chatgot.checkpoint,
            ranks,
            estimated_bytes=room.estimate(engine.engine, ranks),
            damaged=set(found.damaged) if found is not None and own.is_dir() and found.folder.samefile(own) else set(),
        ),
        proof=Proof(ranks, device),
        memory=check_memory(config.model, data.tokenizer.vocab_size, engine, place.world_size, facts, device),
        guard=Guard(engine_config.chatgot.guard),
    )
    resume_notes = loop.restore(client_state) if client_state is not None else []
    disk_notes = _check_disk(loop)
    _open_records(loop, arguments, found, place, [note.removeprefix(CHANGED) for note in load_notes])
    if answer is not None and place.rank == 0:
        answer.store(arguments.out_dir)
    if checked is not None:
        records.event("precision_check", **checked.to_json())
    for note in (
        *engine_config.notes,
        precision_note,
        *engine.notes,
        *prompt_notes,
        *load_notes,
        *micro_notes,
        *resume_notes,
    ):
        progress.say(note)
    _announce(loop, arguments, found, n_params, disk_notes)
    return loop


def manifest_fields(
    model: GPT, config: RunConfig, engine_config: EngineConfig, data: PreparedData, world_size: int
) -> dict[str, Any]:
    """What identifies a run, for the manifest of its checkpoints."""
    optimizer = engine_config.optimizer
    return {
        "model": {**dataclasses.asdict(config.model), "vocab_size": data.tokenizer.vocab_size},
        "parameters": manifest.parameter_fingerprint((name, tuple(p.shape)) for name, p in model.named_parameters()),
        "tokenizer": data.tokenizer.fingerprint,
        "data": data.fingerprint,
        "train": {"seed": config.train.seed},
        "optimizer": state_kind(engine_config),
        "learning_rates": {key: value for key, value in optimizer.params.items() if key.endswith("lr")}
        if optimizer is not None
        else {},
        "gradient_clipping": engine_config.gradient_clipping,
        "world_size": world_size,
        "zero_stage": engine_config.zero_stage,
        "precision": engine_config.precision,
        "layout": layout(engine_config.deepspeed),
        "train_batch_size": engine_config.train_batch_size,
        "versions": versions(),
    }


def _prepare_data(spec: str, config: RunConfig, place: Place, ranks: ControlGroup, progress: Progress) -> PreparedData:
    """Rank 0 of every machine prepares, the others wait for it as long as it takes; all must end with the same
    tokens.
    """
    patient: Any = None
    if place.world_size > 1:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    data, error = None, None
    for turn in (True, False):
        if (place.local_rank == 0) == turn and error is None:
            try:
                data = prepare_cached(spec, config.data)
                check_block_size(data, config.model.max_seq_length)
            except ChatGoTError as caught:
                error = caught
        if patient is not None:
            dist.barrier(group=patient)
    ranks.agree(error)
    assert data is not None
    fingerprints = ranks.gather(data.fingerprint)
    if len(set(fingerprints)) > 1:
        raise DataError(
            f"--data {spec}: the ranks see different data (fingerprints {sorted(set(fingerprints))}); give every "
            f"machine the same files"
        )
    return data


def _find_micro_batch(
    arguments: TrainArguments,
    overrides: dict[str, Any],
    config: RunConfig,
    data: PreparedData,
    facts: DeviceFacts,
    place: Place,
    ranks: ControlGroup,
    progress: Progress,
) -> finder.Stored | None:
    """Where the JSON leaves it to memory. Collective."""
    tree = read_document(Path(arguments.deepspeed_config)).tree
    if not finder.wants_probe(apply_overrides(plain_copy(tree), overrides)):
        return None
    model = dataclasses.asdict(config.model)
    name = facts.name or facts.kind
    return finder.find(tree, overrides, model, data.tokenizer.vocab_size, name, arguments.out_dir, place, ranks)


def _choose_checkpoint(
    arguments: TrainArguments, fields: dict[str, Any], ranks: ControlGroup, progress: Progress
) -> tuple[Found | None, list[Difference]]:
    """Rank 0 takes the run folder's lock and decides, all ranks follow; nothing else has been written yet.

    Returns:
        The checkpoint to go on from, and how it differs from this run as far as the command line allows.
    """
    found, allowed, error = None, [], None
    switches = {
        "--allow_data_change": arguments.allow_data_change,
        "--allow_batch_change": arguments.allow_batch_change,
    }
    if ranks.rank == 0:
        try:
            run_folder.check_writable(arguments.out_dir)
            if note := run_folder.acquire_lock(arguments.out_dir):
                progress.say(note)
            take_back(arguments.out_dir / run_folder.CHECKPOINTS)
            found = load.choose(arguments.resume_from, arguments.out_dir)
            if found is not None:
                for note in found.notes:
                    progress.say(f"WARNING: {note}")
                allowed = load.refuse_differences(
                    found, fields, [switch for switch, given in switches.items() if given]
                )
                refuse_layouts(found, fields)
        except ChatGoTError as caught:
            error = caught
    ranks.agree(error)
    return ranks.from_rank_0((found, allowed))


def _fallback_prompt(data: PreparedData) -> str:
    start = data.tokenizer.decode(data.val[:64].tolist()).strip()
    return (start.split("\n")[0] or data.tokenizer.decode(data.val[:1].tolist()))[:24]


def _open_records(
    loop: Loop, arguments: TrainArguments, found: Found | None, place: Place, since_checkpoint: list[str]
) -> None:
    """Rank 0 opens journal, events and wandb, and writes the resolved settings.

    Args:
        since_checkpoint: what differs from the checkpoint, a line each; what differs from the settings in its run
            folder is found here.
    """
    if place.rank != 0:
        return
    out, config, engine_config = arguments.out_dir, loop.config, loop.engine.config
    run = config.to_dict()
    changes = run_folder.changed_settings(found.folder.parent, run, engine_config.to_dict()) if found else []

    now = setup(
        config,
        engine_config,
        loop.data.fingerprint,
        place.world_size,
        device_name(loop.device),
        deterministic(loop.device),
        versions(),
        [*(line for line in since_checkpoint if line.startswith("data:")), *changes],
    )
    extra = {
        "data": {"spec": arguments.data, "fingerprint": loop.data.fingerprint},
        "launcher": place.launcher,
        "world_size": place.world_size,
    }
    known = digest.history(found.folder.parent, after=loop.step) if found else None
    run_folder.write_settings(
        out, run, engine_config.to_dict(), run_folder.environment({**versions(), **extra}), loop.data.tokenizer
    )
    loop.records.journal = Journal(out / run_folder.METRICS)
    loop.records.events = Events(out / run_folder.EVENTS)
    for change in changes:
        loop.records.progress.say(f"changed since the checkpoint's run: {change}")
    loop.records.wandb = WandbRun.start(
        engine_config.wandb,
        run_dir=out,
        run_name=arguments.run_name or out.resolve().name,
        run_config={"run": run, "deepspeed": engine_config.to_dict()},
        resumed_from_step=loop.step if found else None,
    )
    for note in found.notes if found else ():
        loop.records.event("resume_warning", message=note)
    loop.records.event(
        "resumed" if found else "started",
        step=loop.step,
        **({"from": str(found.path)} if found else {}),
        changes=list(dict.fromkeys([*since_checkpoint, *changes])),
        world_size=place.world_size,
        zero_stage=engine_config.zero_stage,
        precision=engine_config.precision,
        setup=now.to_json(),
    )
    overlap = Overlap(loop.step, now, known, loop.records.event, loop.position.skipped_samples) if known else None
    loop.proof = Proof(loop.ranks, loop.device, loop.records.journal, now.id, overlap)


def _announce(loop: Loop, arguments: TrainArguments, found: Found | None, n_params: int, disk_notes: list[str]) -> None:
    say, engine_config, config = loop.records.progress.say, loop.engine.config, loop.config
    meta = loop.data.meta
    for line in run_folder.describe(config.to_dict(), engine_config.to_dict()):
        say(line)
    say(
        f"model: {config.model.architecture}, {human_count(n_params)} parameters ({n_params:,}), "
        f"vocabulary {loop.data.tokenizer.vocab_size}"
    )
    say(
        f"data: {meta.source}, {human_count(len(loop.data.train))} tokens to train on, "
        f"{human_count(len(loop.data.val))} to validate"
    )
    say(
        f"engine: {engine_config.precision}, ZeRO stage {engine_config.zero_stage}, {loop.ranks.world_size} rank(s) "
        f"on {loop.device.type}; "
        f"batch {engine_config.train_batch_size} x {config.model.max_seq_length} tokens"
    )
    if engine_config.chatgot.schedule is not None:
        say(schedule.describe(config.train.max_steps, engine_config.chatgot.schedule, loop.engine.base_lrs[0]))
    for note in disk_notes:
        say(note)
    if found is None:
        say(f"starting a new run in {arguments.out_dir}")
    else:
        say(f"resuming {found.path} at step {loop.step}, sample {loop.position.next_sample}")
        if loop.step >= config.train.max_steps:
            say(f"nothing to do: the run is complete at step {loop.step} (train.max_steps = {config.train.max_steps})")


def _check_disk(loop: Loop) -> list[str]:
    """Rank 0 looks whether checkpoints fit, before anything is written; all ranks follow. Collective.

    Raises:
        ConfigError: on all ranks; chatgot.checkpoint.disk_budget_gb is too small.
        CheckpointError: on all ranks; not even one checkpoint fits.
    """
    notes, error = [], None
    if loop.ranks.rank == 0 and loop.step < loop.config.train.max_steps:
        saver, config = loop.saver, loop.engine.config
        try:
            expected = expected_bytes(saver.folder, loop.fields, saver.estimated_bytes, saver.damaged)
            notes = preflight(
                saver.folder, saver.config, expected, loop.config.train.max_steps, config.path, saver.damaged
            )
        except ChatGoTError as caught:
            error = caught
    loop.ranks.agree(error)
    return notes


def _say_what_next(loop: Loop) -> None:
    val, say = loop.position.last_val, loop.records.progress.say
    result = f": val/loss {val['val/loss']:.4f} nats, {val['val/bits_per_char']:.3f} bits/char" if val else ""
    say(f"done at step {loop.step}{result}")
    say(f"run folder: {loop.out_dir}")
    say(f'next: chatgot sample {loop.out_dir} --prompt "{loop.prompts[0]}"')


def leave() -> None:
    """Leave the process group together, after the last collective: a rank that goes early can make another abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
