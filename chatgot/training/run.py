"""The whole training program, from arguments to exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shlex
from pathlib import Path

import torch.distributed as dist

import chatgot.run_folder as run_folder
from chatgot.checkpoint import faults, rng
from chatgot.checkpoint.load import find
from chatgot.config.overrides import parse_overrides
from chatgot.data.corpus import check_run_folder
from chatgot.data.loader import DataOrder, EvalBatches, TrainBatches
from chatgot.deepspeed_json.read import default_json, read_document
from chatgot.deepspeed_json.resolve import EngineConfig, resolve
from chatgot.devices import device_facts, device_of_machine, is_out_of_memory, matmul_precision
from chatgot.distributed import ControlGroup, Place, find_place, tells_of_lost_rank
from chatgot.engine.build import build, join
from chatgot.engine.optimizer import describe_schedule
from chatgot.engine.precision_check import check_precision
from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED, ChatGoTError, CheckpointError
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_matmul_parameters, count_parameters, flops_per_token
from chatgot.observe.goodput import Ledger, describe, energy_counter
from chatgot.observe.meters import Mfu, Throughput
from chatgot.observe.progress import Progress, human_count, show_log
from chatgot.plan.estimate import estimate, slowness
from chatgot.training import initial, memory, preparation
from chatgot.training.divergence import Guard
from chatgot.training.evaluation import usable_prompts
from chatgot.training.loop import FIRST, Loop
from chatgot.training.memory import MemoryCheck
from chatgot.training.preparation import Resumed, TrainArguments
from chatgot.training.records import open_records
from chatgot.training.saving import Position, Saving, open_saver
from chatgot.training.stop import StopSignals
from chatgot.training.watchdog import PATIENCE, Watchdog
from chatgot.tuning import micro_batch

logger = logging.getLogger(__name__)
REPORT_SECONDS, STOPPED_REPORT_SECONDS = 300.0, 15.0
"""How long the end of a run waits for its report, and one that is stopped, to which a launcher grants 30 s."""


def train(arguments: TrainArguments, stop: StopSignals | None = None) -> int:
    """Train; returns the exit code. Several calls in one process share the process group.

    Args:
        stop: what the caller has entered, so that no signal comes before or after it; default: one for this call.

    Raises:
        ChatGoTError: every refusal, on all ranks.
    """
    place = find_place(arguments.local_rank)
    with contextlib.nullcontext(stop) if stop is not None else StopSignals(starting=True) as stop:
        loop = prepare_run(arguments, place, stop=stop)
        stop.started()
        return finish(loop)


def finish(loop: Loop) -> int:
    """Run a prepared loop to its end, closing the records whatever happens; returns the exit code."""
    records, exit_code = loop.records, 1
    try:
        with loop.watchdog:
            for _ in loop.steps():
                pass
        loop.proof.end()
        exit_code = EXIT_INTERRUPTED if loop.stopped_by else EXIT_DONE
        account = records.account(loop.step)
        if loop.stopped_by:
            records.event("preempted", step=loop.step, signal=loop.stopped_by)
            what = f"stopped by {loop.stopped_by} at step {loop.step}"
            logger.info(f"{what}; saved. Run the same command again to go on (exit {exit_code})")
        else:
            records.event("finished", **{**loop.position.last_val, "step": loop.step})
    except ChatGoTError as error:
        exit_code = error.exit_code
        if error.shared or loop.ranks.world_size == 1:  # else the others are elsewhere: no collective
            _finish_save(loop)
        records.event("failed", step=loop.step, error=str(error), exit_code=exit_code)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            if tells_of_lost_rank(error):
                records.event(
                    "failed", step=loop.step, error=f"another rank is gone: {error}", exit_code=EXIT_ENVIRONMENT
                )
            raise
        asked = "auto" if loop.micro_batch_is_auto else loop.json_micro_batch
        config, world_size = loop.engine.config, loop.ranks.world_size
        doing, folder = loop.watchdog.doing, loop.out_dir
        refusal = memory.ran_out(error, doing, folder, config, world_size, asked, records)
        exit_code = refusal.exit_code
        _finish_save(loop)
        raise refusal from error
    finally:
        loop.proof.end()
        records.progress.close()
        patience = REPORT_SECONDS if exit_code == EXIT_DONE else STOPPED_REPORT_SECONDS
        report = records.report.end(patience) if records.report is not None else None
        if records.wandb is not None:
            records.wandb.finish(exit_code, _artifacts(loop) if exit_code == EXIT_DONE else None)
        records.close()
        if loop.ranks.rank == 0:
            run_folder.release_lock(loop.out_dir)
    if exit_code == EXIT_DONE:
        val = loop.position.last_val
        result = f": val/loss {val['val/loss']:.4f} nats, {val['val/bits_per_char']:.3f} bits/char" if val else ""
        logger.info(f"done at step {loop.step}{result}")
    if account is not None:
        logger.info(f"time: {describe(account)}")
    logger.info(
        f"run folder: {loop.out_dir}" if report is None else f"run folder: {loop.out_dir}, and its {report.name}"
    )
    if exit_code == EXIT_DONE:
        logger.info(f"next: chatgot sample {shlex.quote(str(loop.out_dir))} --prompt {shlex.quote(loop.prompts[0])}")
    return exit_code


def _artifacts(loop: Loop) -> dict[str, Path]:
    """What chatgot.wandb.artifacts asks for, by kind."""
    wanted, paths = loop.engine.config.chatgot.wandb.artifacts, dict[str, Path]()
    if wanted in ("report", "both") and (report := loop.out_dir / run_folder.REPORT).is_file():
        paths["report"] = report
    if wanted in ("checkpoint", "both") and (found := find(loop.out_dir / run_folder.CHECKPOINTS)) is not None:
        paths["checkpoint"] = found.path
    return paths


def _finish_save(loop: Loop) -> None:
    """Leave the checkpoint that is being saved in the background."""
    try:
        loop.saving.finish()
    except CheckpointError as failed:
        logger.warning(str(failed))


def prepare_run(
    arguments: TrainArguments, place: Place, progress: Progress | None = None, stop: StopSignals | None = None
) -> Loop:
    """Everything before the first step: check, prepare data, build, resume or start, write the run folder.

    Args:
        progress: where rank 0 speaks; default: stdout.
        stop: what asks the loop to stop; default: whoever enters `Loop.stop`.
    """
    watchdog = Watchdog(arguments.out_dir, place.rank, place.world_size, arguments.hang_timeout)
    try:
        with watchdog.starting():
            return _prepared(arguments, place, progress, stop or StopSignals(), watchdog)
    except BaseException:  # whatever ends it, an interrupt too: the folder is free again
        if place.rank == 0:
            run_folder.release_lock(arguments.out_dir)
        raise


def _prepared(
    arguments: TrainArguments, place: Place, progress: Progress | None, stop: StopSignals, watchdog: Watchdog
) -> Loop:
    stop.limit(arguments.max_minutes)
    run_overrides, ds_overrides = parse_overrides(list(arguments.overrides))
    settled = initial.settle(arguments, run_overrides)
    config = settled.config
    check_run_folder(arguments.out_dir, arguments.data)
    facts, world_size = device_facts(), place.world_size
    named = arguments.deepspeed_config
    document = read_document(Path(named) if named else default_json(facts, world_size))
    resolved = resolve(document, ds_overrides, world_size=world_size, facts=facts, strict=arguments.strict)
    resolved.findings.refuse()  # before anything expensive
    watchdog.joins()
    device = join(place, facts.kind, watchdog.collectives)
    watchdog.beat(PATIENCE, "the start")
    ranks = ControlGroup(watchdog.collectives)
    progress = progress or Progress(config.train.max_steps, enabled=place.rank == 0, log_format=arguments.log_format)
    show_log(progress)
    if named is None:
        why = f"chosen for {facts.name or facts.kind} and {world_size} rank(s)"
        logger.info(f"--deepspeed_config is not given: {document.name}, {why}")
    for note in (*settled.notes, faults.arm(place.rank)):
        if note:
            logger.info(note)

    data = preparation.prepare_data(arguments.data, config, settled.tokenizer, place, ranks, watchdog)
    watchdog.beat(PATIENCE, "the start")
    preparation.refuse_unlike_ranks(config, resolved, data, ranks)
    vocab_size, block = data.tokenizer.vocab_size, config.model.max_seq_length
    n_params = count_parameters(config.model, vocab_size)
    answer = None
    if resolved.batch is not None and resolved.batch.is_open:
        tree, model_keys, name = resolved.tree, config.model.model_dump(), facts.name or facts.kind
        tried = functools.partial(watchdog.beat, PATIENCE, "the search for the micro-batch")
        answer = micro_batch.find(tree, model_keys, vocab_size, name, arguments.out_dir, place, ranks, tried)
    found = None if answer is None else (answer.micro_batch, answer.reason)
    engine_config = resolved.complete(n_params, found, config.train.max_steps).engine_config()
    json_micro_batch = engine_config.micro_batch_size
    engine_config, micro_notes = memory.with_stored_micro_batch(engine_config, arguments.out_dir, ranks)

    model = GPT(config.model, vocab_size)
    fields = preparation.identity(model, config, engine_config, data, world_size)
    checkpoint, different = preparation.choose_checkpoint(arguments, fields, ranks)
    rng.seed(config.train.seed, place.rank)
    starts_from = arguments.init_from if checkpoint is None else checkpoint.manifest.get("init_from")
    if starts_from is not None:
        fields["init_from"] = starts_from
    if checkpoint is None and starts_from is not None:
        watchdog.beat(PATIENCE, f"taking the weights of {starts_from}", works=True)
        initial.fill_from(Path(starts_from), model, data, ranks)
        watchdog.beat(PATIENCE, "the start")
    else:
        model.init_weights(config.train.seed)
    order = DataOrder(len(data.train), block, config.train.seed)

    def batches(engine_config: EngineConfig) -> TrainBatches:
        sizes = (engine_config.train_batch_size, engine_config.micro_batch_size)
        return TrainBatches(data.train, order, *sizes, place.rank, world_size)

    def needed_for(doing: str, micro_batch_helps: bool) -> contextlib.AbstractContextManager[None]:
        watchdog.beat(PATIENCE, doing)
        asked = "auto" if answer is not None else json_micro_batch
        return memory.needed_for(doing, arguments.out_dir, engine_config, world_size, asked, micro_batch_helps)

    checked = None
    precision_note = "precision check: skipped on a resume, whose weights are loaded after the engine is built"
    if checkpoint is None:
        first = next(batches(engine_config).micro_batches(0))
        with needed_for("the precision check", micro_batch_helps=True):
            checked, precision_note = check_precision(model, engine_config, *first, device, ranks)
    with needed_for("building the engine", micro_batch_helps=False):
        engine = build(model, engine_config, device)
    notes = [*engine_config.notes, precision_note, *engine.notes]
    prompts, prompt_notes = usable_prompts(config.train.sample_prompts, data)
    notes += prompt_notes
    guard, resumed = Guard(engine_config.chatgot.guard), None
    position = Position(owed=("evaluation",) if starts_from is not None else ())  # what it can before the first step
    if checkpoint is not None:
        with needed_for("loading the checkpoint", micro_batch_helps=False):
            resumed, load_notes = preparation.load_checkpoint(engine, checkpoint, different, fields, ranks)
        notes += load_notes
        notes += memory.use_micro_batch_of(resumed.client_state, engine, json_micro_batch, world_size)
        position = Position.of(resumed.client_state)
        engine.skips_in_a_row = guard.restore(resumed.client_state.get("guard"))
    eval_sizes = (engine.config.micro_batch_size, place.rank, world_size, config.train.eval_tokens)
    eval_batches = EvalBatches(data.val, block, *eval_sizes)
    if resumed is not None:
        targets = resumed.client_state.get("eval_targets", eval_batches.target_tokens)
        if targets != eval_batches.target_tokens or any(one.field == "data" for one in different):
            notes.append("the best val/loss so far is forgotten: it is not over the same validation tokens")
            position = dataclasses.replace(position, best_val_loss=None, last_val={})
    notes += micro_notes
    max_steps = config.train.max_steps
    watchdog.beat(PATIENCE, "opening the records")
    plan = estimate(config.model, vocab_size, engine.config, world_size, device_of_machine(facts, device))
    saver, disk_notes = open_saver(arguments.out_dir, engine, plan.checkpoint, fields, checkpoint, max_steps, ranks)
    meter = Throughput()
    ledger = Ledger(meter, stop.began, joules=energy_counter(device, world_size) if place.rank == 0 else None)
    records, proof = open_records(arguments, place, progress, config, engine, data, resumed, ranks, ledger)
    if answer is not None and place.rank == 0:
        answer.store(arguments.out_dir)
    if checked is not None:
        records.event("precision_check", **checked.to_json())
    matmul_params = count_matmul_parameters(config.model, vocab_size)
    flops = flops_per_token(matmul_params, config.model.n_layers, config.model.attention_width, block)
    loop = Loop(
        engine=engine,
        config=config,
        data=data,
        train_batches=batches(engine.config),
        eval_batches=eval_batches,
        ranks=ranks,
        records=records,
        out_dir=arguments.out_dir,
        fields=fields,
        mfu=Mfu(flops, facts.name, matmul_precision(engine.config.precision), world_size),
        prompts=prompts,
        stop=stop,
        saving=Saving(saver, records),
        proof=proof,
        memory=MemoryCheck(plan, engine.engine),
        guard=guard,
        json_micro_batch=json_micro_batch,
        micro_batch_is_auto=answer is not None,
        position=position,
        meter=meter,
        watchdog=watchdog,
    )
    watchdog.tell = lambda report: records.event("failed", step=loop.step, error=report, exit_code=EXIT_ENVIRONMENT)
    watchdog.beat(PATIENCE, FIRST)
    for note in notes:
        logger.info(note)
    _announce(loop, resumed, n_params, disk_notes)
    return loop


def _announce(loop: Loop, resumed: Resumed | None, n_params: int, disk_notes: list[str]) -> None:
    """Say on one screen what this run is. Everything else that was settled stands in the run folder."""
    engine, config, data, max_steps = loop.engine.config, loop.config, loop.data, loop.config.train.max_steps
    model, batch, context = config.model, engine.train_batch_size, config.model.max_seq_length
    train, val = (human_count(len(tokens)) for tokens in (data.train, data.val))
    if (seen := loop.eval_batches.target_tokens) < len(data.val) - 1:
        val = f"{human_count(seen)} (train.eval_tokens) of {val}, evenly spaced,"
    if resumed is None:
        weights = f", from the weights of {loop.fields['init_from']}" if "init_from" in loop.fields else ""
        logger.info(f"starting a new run in {loop.out_dir}{weights}")
    else:
        logger.info(f"resuming {resumed.checkpoint.path} at step {loop.step}, sample {loop.position.next_sample}")
        if loop.step >= max_steps and not loop.position.owed:
            logger.info(f"nothing to do: the run is complete at step {loop.step} (train.max_steps = {max_steps})")
    cadences = {"evaluated": config.train.eval_every, "sampled": config.train.sample_every}
    shown = [f"{what} every {n}" if n else f"{what} at the end" for what, n in cadences.items()]
    size = f"{model.d_model} wide, {model.n_layers} layers, {model.n_head} heads, {context} tokens of context"
    rows = {
        "model": f"{model.architecture}, {human_count(n_params)} parameters ({n_params:,}): {size}",
        "data": f"{data.meta.source}, {train} tokens to train on, {val} to validate; "
        f"{data.tokenizer.kind} vocabulary of {data.tokenizer.vocab_size}",
        "engine": f"{engine.precision}, ZeRO stage {engine.zero_stage}, {loop.ranks.world_size} rank(s) on "
        f"{loop.engine.device.type}",
        "batch": f"{batch} x {context} = {batch * context:,} tokens a step",
        "steps": f"{max_steps}, {', '.join(shown)}",
    }
    if engine.chatgot.schedule is not None:
        rows["learning rate"] = describe_schedule(max_steps, engine.chatgot.schedule, loop.engine.base_lrs[0])
    rows["settings"] = f"all of them in {loop.out_dir / run_folder.RUN} and {run_folder.DS_CONFIG}"
    for name, value in rows.items():
        logger.info(f"  {name:<14} {value}")
    for line in disk_notes:
        logger.info(line)
    for line in slowness(loop.memory.plan):
        logger.warning(line)


def leave() -> None:
    """Leave the process group together, after the last collective: a rank that goes early can make another abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
