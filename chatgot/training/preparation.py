"""What a run settles before its engine is built: data, micro-batch, checkpoint, disk. Nothing is written but the lock."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

import chatgot.run_folder as run_folder
from chatgot.checkpoint import load, manifest
from chatgot.checkpoint.load import Found, expected_bytes
from chatgot.checkpoint.manifest import Difference, RunFields
from chatgot.checkpoint.resume import layout, refuse_layouts
from chatgot.checkpoint.retention import preflight
from chatgot.checkpoint.save import Saver
from chatgot.checkpoint.writing import take_back
from chatgot.config.run import RunConfig
from chatgot.data.prepare import prepare_cached
from chatgot.data.prepared import PreparedData, check_block_size
from chatgot.deepspeed_json.batch import MICRO
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.distributed import ControlGroup, Place
from chatgot.engine.build import versions
from chatgot.engine.optimizer import state_kind
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ChatGoTError, DataError
from chatgot.model.gpt import GPT
from chatgot.tuning import micro_batch

logger = logging.getLogger(__name__)


def prepare_data(spec: str, config: RunConfig, place: Place, ranks: ControlGroup) -> PreparedData:
    """Rank 0 of every machine prepares, the others wait as long as it takes; all must end with the same tokens.

    Raises:
        DataError, ConfigError: on all ranks; see `prepare_cached`.
    """
    patient: Any = None
    if place.world_size > 1:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    data, error = None, None
    for turn in (True, False):
        if (place.local_rank == 0) == turn and error is None:
            try:
                data = prepare_cached(spec, config.data)
                check_block_size(data.meta, config.model.max_seq_length)
            except ChatGoTError as caught:
                error = caught
        if patient is not None:
            dist.barrier(group=patient)
    ranks.agree(error)
    assert data is not None
    fingerprints = set(ranks.gather(data.fingerprint))
    if len(fingerprints) > 1:
        raise DataError(
            f"--data {spec}: the ranks see different data (fingerprints {sorted(fingerprints)}); give every machine "
            "the same files"
        )
    return data


def identity(
    model: GPT, config: RunConfig, engine_config: EngineConfig, data: PreparedData, world_size: int
) -> RunFields:
    """What identifies a run, for the manifest of its checkpoints."""
    params = engine_config.optimizer.params if engine_config.optimizer is not None else {}
    return {
        "model": {**dataclasses.asdict(config.model), "vocab_size": data.tokenizer.vocab_size},
        "parameters": manifest.parameter_fingerprint((name, tuple(p.shape)) for name, p in model.named_parameters()),
        "tokenizer": data.tokenizer.fingerprint,
        "data": data.fingerprint,
        "train": {"seed": config.train.seed},
        "optimizer": state_kind(engine_config),
        "learning_rates": {key: value for key, value in params.items() if key.endswith("lr")},
        "gradient_clipping": engine_config.gradient_clipping,
        "world_size": world_size,
        "zero_stage": engine_config.zero_stage,
        "precision": engine_config.precision,
        "layout": layout(engine_config.deepspeed),
        "train_batch_size": engine_config.train_batch_size,
        "versions": versions(),
    }


def choose_checkpoint(
    out_dir: Path, resume_from: str, allowed: Collection[str], fields: RunFields, ranks: ControlGroup
) -> tuple[Found | None, list[Difference]]:
    """Rank 0 takes the run folder's lock and chooses the checkpoint to go on from, all ranks follow. Collective.

    Args:
        allowed: switches of the command line that let a resume differ.
        fields: of the manifest of this run.

    Returns:
        The checkpoint, None for a new run, and how it differs from this run as far as the switches allow.

    Raises:
        ConfigError, CheckpointError: on all ranks; the folder is in use, or no checkpoint fits the request.
    """

    def choose() -> tuple[Found | None, list[Difference]]:
        run_folder.check_writable(out_dir)
        if note := run_folder.acquire_lock(out_dir):
            logger.info(note)
        take_back(out_dir / run_folder.CHECKPOINTS)
        chosen = load.choose(resume_from, out_dir)
        if chosen is None:
            return None, []
        for note in chosen.notes:
            logger.warning(note)
        different = load.refuse_differences(chosen, fields, allowed)
        refuse_layouts(chosen, fields)
        return chosen, different

    return ranks.on_rank_0(choose)


def check_disk(saver: Saver, fields: RunFields, config: EngineConfig, max_steps: int) -> list[str]:
    """Whether the run's checkpoints fit, in lines for the log. Collective.

    Raises:
        ConfigError: on all ranks; chatgot.checkpoint.disk_budget_gb is too small.
        CheckpointError: on all ranks; not even one checkpoint fits.
    """

    def look() -> list[str]:
        expected = expected_bytes(saver.folder, fields, saver.estimated_bytes, saver.damaged)
        return preflight(saver.folder, saver.config, expected, max_steps, config.path, saver.damaged)

    return saver.ranks.on_rank_0(look)


def with_stored_micro_batch(
    config: EngineConfig, out_dir: Path, ranks: ControlGroup
) -> tuple[EngineConfig, str | None]:
    """The smaller micro-batch that an earlier start of this run stored, when memory was not enough. Collective."""
    per_rank = config.train_batch_size // ranks.world_size
    stored = ranks.on_rank_0(lambda: micro_batch.stored(out_dir, config.micro_batch_size, per_rank))
    if stored is None or stored[0] >= config.micro_batch_size:
        return config, None
    smaller, reason = stored
    note = (
        f"micro-batch {smaller}, accumulation {per_rank // smaller}: {reason}; another {MICRO} in the JSON overrules "
        f"this"
    )
    return micro_batch.with_micro_batch(config, smaller, ranks.world_size), note


def carry_on(
    engine: TrainingEngine, carried: dict[str, int] | None, json_micro_batch: int, world_size: int
) -> list[str]:
    """After a resume: use the micro-batch that memory was enough for, unless the JSON's own is another one now.

    Args:
        carried: the checkpoint's: `json`, what the JSON said, and `used`; None: it is from before there was one.

    Returns:
        A note, or none.
    """
    config = engine.config
    if carried is None or carried["json"] == carried["used"]:
        return []
    if carried["json"] != json_micro_batch:
        return [
            f"micro-batch {config.micro_batch_size}: the JSON's is another one than the checkpoint's run had "
            f"({carried['json']}, of which memory allowed {carried['used']})"
        ]
    micro = micro_batch.largest_divisor(config.train_batch_size // world_size, carried["used"])
    if micro >= config.micro_batch_size:
        return []
    engine.set_micro_batch(micro)
    return [
        f"micro-batch {micro}, accumulation {engine.config.accumulation}: memory ran out with the JSON's "
        f"{json_micro_batch} before the checkpoint; another {MICRO} in the JSON overrules this"
    ]
