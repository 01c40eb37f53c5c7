"""What a run settles before its first step: which run it is, its data, and the checkpoint. Only the lock is written."""

from __future__ import annotations

import logging
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

import chatgot.run_folder as run_folder
from chatgot.checkpoint import load, manifest, rng
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.manifest import ClientState, Difference, RunFields
from chatgot.checkpoint.resume import CHANGED, layout, refuse_layouts, resume
from chatgot.checkpoint.writing import take_back
from chatgot.config.run import RunConfig
from chatgot.data.prepare import prepare_cached
from chatgot.data.prepared import PreparedData, check_block_size
from chatgot.data.tokenizer import Tokenizer
from chatgot.deepspeed_json.resolve import EngineConfig, Resolved
from chatgot.distributed import ControlGroup, Place
from chatgot.engine.build import versions
from chatgot.engine.optimizer import state_kind
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ChatGoTError, ConfigError, DataError, MachineError
from chatgot.model.gpt import GPT
from chatgot.run_folder import flattened
from chatgot.training.watchdog import PATIENCE, Watchdog, Work
from chatgot.version import code_hash

logger = logging.getLogger(__name__)
SHARED_SECONDS = 15.0
"""How long a network file system may take to show another machine a new file."""
SKEW_SECONDS = 60.0
TOGETHER_SECONDS = 0.5
"""How often ranks that wait for one that prepares the data hear of it."""


@dataclass(frozen=True)
class TrainArguments:
    """The command line of train.py: *which run* is this."""

    deepspeed_config: str | None
    """None: the device decides."""
    out_dir: Path
    config: str = "tiny"
    data: str = "wars_of_the_roses"
    resume_from: str = "auto"
    allow_data_change: bool = False
    allow_batch_change: bool = False
    overrides: tuple[str, ...] = ()
    run_name: str | None = None
    local_rank: int | None = None
    max_minutes: float | None = None
    """After which the run is saved and ended with exit code 75; None: no limit but that of Slurm's job."""
    hang_timeout: float = 300.0
    """Seconds without progress after which a rank has hung; 0: never."""
    log_format: str = "text"
    """Of what rank 0 prints: text, or json."""
    strict: bool = False
    """Whether a warning about the JSON refuses the run."""
    init_from: str | None = None
    """A folder in transformers' layout that a new run takes model, weights and tokenizer from."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    checkpoint: Found
    client_state: ClientState
    changes: list[str]
    """How it differs from this run, a line each."""


def prepare_data(
    spec: str,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    place: Place,
    ranks: ControlGroup,
    watchdog: Watchdog,
) -> PreparedData:
    """Rank 0 of every machine prepares, the others wait as long as it works; see `refuse_unlike_ranks`.

    Args:
        tokenizer: None: the config says which is made.

    Raises:
        DataError, ConfigError: on all ranks; see `prepare_cached`.
    """

    def working() -> None:
        watchdog.beat(PATIENCE, works=True)

    def prepare() -> PreparedData:
        prepared = prepare_cached(spec, config.data, waiting=working, tokenizer=tokenizer)
        check_block_size(prepared.meta, config.model.max_seq_length)
        return prepared

    watchdog.beat(PATIENCE, "preparing the data", works=True)
    if place.world_size == 1:
        return prepare()
    own: _Aside | None = None
    for turn in (True, False):
        if (place.local_rank == 0) == turn:
            own = _Aside(prepare)
        worked, pause, goes_on = Work(), TOGETHER_SECONDS / 32, True
        while goes_on:
            if own is not None:
                own.join(pause)
            pause = min(2 * pause, TOGETHER_SECONDS)
            goes_on, works = ranks.any(own is not None and own.is_alive(), worked())
            if works:
                watchdog.beat(PATIENCE)
        ranks.agree(own.error if own is not None and isinstance(own.error, ChatGoTError) else None)
    assert own is not None
    if own.error is not None:
        raise own.error
    return own.value


class _Aside(threading.Thread):
    """Calls a function in a thread, so that this one can listen to signals and to the other ranks meanwhile."""

    value: PreparedData
    error: BaseException | None = None

    def __init__(self, function: Callable[[], PreparedData]) -> None:
        super().__init__(name="aside", daemon=True)
        self._function = function
        self.start()

    def run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller raises it
            self.error = error


def refuse_unlike_ranks(config: RunConfig, resolved: Resolved, data: PreparedData, ranks: ControlGroup) -> None:
    """Compare what all ranks must have in common, once and before they depend on it. Collective.

    Raises:
        MachineError, ConfigError, DataError: on all ranks; code or packages, settings, or data are not the same.
    """
    ranks.barrier()
    clocks = ranks.gather((time.time(), socket.gethostname()))
    (first, slow), (last, fast) = min(clocks), max(clocks)
    if last - first > SKEW_SECONDS:
        logger.warning(
            f"the clocks of {slow} and {fast} differ by {last - first:.0f} s: times in the records will mislead"
        )
    used = {"python": platform.python_version(), "numpy": numpy.__version__, **versions(), "code": code_hash()}
    derived = {name: one.value for name, one in resolved.derived.items()}
    settings = flattened(config.to_dict()) | flattened(resolved.tree, "ds.") | flattened(derived, "ds.")
    facts = {f"version of {name}": value for name, value in used.items()}
    facts |= {name: value for name, value in settings.items() if not name.endswith(".nvme_path")}
    facts["data fingerprint"] = data.fingerprint
    if (difference := ranks.first_difference(facts)) is None:
        return
    name, values = difference
    unlike = f"the ranks would not train the same run: {name} is {values}"
    if name.startswith("version of "):
        raise MachineError(f"{unlike}; install the same on every machine")
    if name == "data fingerprint":
        raise DataError(f"{unlike}; give every machine the same files (--data)")
    raise ConfigError(f"{unlike}; start every rank with the same --config, --deepspeed_config and overrides")


def identity(
    model: GPT, config: RunConfig, engine_config: EngineConfig, data: PreparedData, world_size: int
) -> RunFields:
    """What identifies a run, for the manifest of its checkpoints."""
    params = engine_config.optimizer.params if engine_config.optimizer is not None else {}
    return {
        "model": {**config.model.model_dump(), "vocab_size": data.tokenizer.vocab_size},
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
    arguments: TrainArguments, fields: RunFields, ranks: ControlGroup
) -> tuple[Found | None, list[Difference]]:
    """Rank 0 takes the run folder's lock and chooses the checkpoint to go on from, all ranks follow. Collective.

    Returns:
        The checkpoint, None for a new run, and how it differs from this run as far as the command line allows.

    Raises:
        ConfigError, CheckpointError: on all ranks; the folder is in use, or no checkpoint fits the request.
    """
    switches = ("allow_data_change", "allow_batch_change")
    allowed = [f"--{switch}" for switch in switches if getattr(arguments, switch)]

    def choose() -> tuple[Found | None, list[Difference]]:
        run_folder.check_writable(arguments.out_dir)
        for note in run_folder.linked_folders(arguments.out_dir):
            logger.info(note)
        if note := run_folder.acquire_lock(arguments.out_dir):
            logger.info(note)
        take_back(arguments.out_dir / run_folder.CHECKPOINTS)
        chosen = load.choose(arguments.resume_from, arguments.out_dir)
        if chosen is None:
            return None, []
        for note in chosen.notes:
            logger.warning(note)
        different = load.refuse_differences(chosen, fields, allowed)
        refuse_layouts(chosen, fields)
        return chosen, different

    chosen = ranks.on_rank_0(choose)
    _refuse_unshared(arguments.out_dir, ranks)
    return chosen


def _refuse_unshared(out_dir: Path, ranks: ControlGroup) -> None:
    """See to it that every rank has the folder which rank 0 has locked. Collective.

    Raises:
        ConfigError: on all ranks; another machine has another folder under its name, or none.
    """

    def lock() -> bytes | None:
        try:
            return run_folder.read_bytes(out_dir / run_folder.LOCK)
        except OSError:
            return None

    def look() -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while lock() != wanted:
            if time.monotonic() > deadline:
                here = f"host {socket.gethostname()} (rank {ranks.rank}) does not see the folder that rank 0 writes to"
                raise ConfigError(f"--out_dir {out_dir}: {here}; give one that all machines share")
            time.sleep(0.5)

    wanted = ranks.from_rank_0(lock())
    ranks.on_every_rank(look)


def load_checkpoint(
    engine: TrainingEngine, checkpoint: Found, different: list[Difference], fields: RunFields, ranks: ControlGroup
) -> tuple[Resumed, list[str]]:
    """Fill the engine with what `choose_checkpoint` chose, and put back the random state. Returns notes too.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    client_state, load_notes = resume(engine.engine, checkpoint, fields, ranks)
    notes = [*(f"{CHANGED}{one}" for one in different), *load_notes]
    changes = [note.removeprefix(CHANGED) for note in notes]
    seed, step = fields["train"]["seed"], engine.engine.global_steps
    notes += rng.resume(client_state["rng"], seed, ranks.rank, ranks.world_size, step)
    return Resumed(checkpoint, client_state, changes), notes
