"""What a new run starts from: weights drawn from the seed, or those of a folder in transformers' layout (--init_from).

The folder is read once, at the start of the new run. A resume needs nothing of it: model and tokenizer are the run
folder's.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import place, tags_in
from chatgot.config.run import RunConfig, load_run_config
from chatgot.data.prepared import PreparedData
from chatgot.data.tokenizer import Tokenizer, load_tokenizer
from chatgot.distributed import ControlGroup
from chatgot.errors import ConfigError
from chatgot.exchange import parity
from chatgot.exchange.folder import open_folder, run_config
from chatgot.exchange.tokenizer import config_and_tokenizer
from chatgot.exchange.weights import fill
from chatgot.model.gpt import GPT
from chatgot.training.preparation import TrainArguments

logger = logging.getLogger(__name__)
WINDOWS, LENGTH = 4, 256
"""Of validation text, over which the filled model is compared."""


@dataclass(frozen=True)
class Settled:
    """What the command line and the folders that it names come to."""

    config: RunConfig
    tokenizer: Tokenizer | None = None
    """None: one that is made of the text."""
    notes: tuple[str, ...] = ()


def settle(arguments: TrainArguments, overrides: dict[str, Any]) -> Settled:
    """Read the run YAML, and where the model or its vocabulary is given, the folder that has it. Every rank alike.

    Args:
        overrides: of the run YAML.

    Raises:
        ConfigError: what the YAML or the overrides say is wrong, or does not go with the folder.
        CheckpointError: the folder of --init_from is not what our model computes, see `open_folder`.
        DataError: the run folder's tokenizer cannot be read.
    """
    checkpoints = place(arguments.resume_from, arguments.out_dir)[0]
    earlier = checkpoints.parent if arguments.resume_from != "never" and tags_in(checkpoints) else None
    if arguments.init_from is None:
        config = load_run_config(arguments.config, overrides)
        if config.data.tokenizer != "given" or earlier is None:
            return Settled(config)
        return Settled(config, load_tokenizer(earlier / run_folder.TOKENIZER))
    named = f"--init_from {arguments.init_from}"
    if earlier is not None:
        model = run_folder.read(earlier, run_folder.RUN).get("model")
        if not isinstance(model, dict):
            raise ConfigError(f"{earlier / run_folder.RUN}: model: expected a section")
        config = run_config(arguments.config, overrides, model, earlier)
        note = f"{named}: is not read, the run goes on from its checkpoint"
        return Settled(config, load_tokenizer(earlier / run_folder.TOKENIZER), (note,))
    config, tokenizer, folder = config_and_tokenizer(Path(arguments.init_from), arguments.config, overrides)
    what = "model and tokenizer are the folder's, and the model section of --config is left out"
    shorter = f"; model.max_seq_length = {config.model.max_seq_length}, of {folder.model.max_seq_length} at most"
    return Settled(config, tokenizer, (*folder.notes, f"{named}: {what}{shorter}"))


def fill_from(path: Path, model: GPT, data: PreparedData, ranks: ControlGroup) -> None:
    """Give a new run's model the weights of a folder, and say how close it comes to transformers' own. Collective.

    Raises:
        CheckpointError: on all ranks; a folder that changed meanwhile, or that computes something else.
    """
    ranks.on_every_rank(lambda: fill(model, open_folder(path)))
    for line in ranks.on_rank_0(lambda: _compared(path, model, data)):
        logger.info(line)
    gc.collect()  # of transformers' copy


def _compared(path: Path, model: GPT, data: PreparedData) -> list[str]:
    """Lines for the log, see `fill_from`."""
    windows = parity.evenly(data.val, min(model.config.max_seq_length, LENGTH), WINDOWS)
    was_training, what = model.training, f"{path} in our model and in transformers'"
    try:
        return parity.prove(path, model.eval(), data.tokenizer, windows, what, "the run is not started", back=False)
    finally:
        model.train(was_training)
