"""The text that a run folder was trained on, found again."""

from __future__ import annotations

from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.config.run import load_run_config
from chatgot.data.prepare import prepare_cached
from chatgot.data.prepared import PreparedData
from chatgot.data.tokenizer import load_tokenizer
from chatgot.errors import DataError


def recorded_data(run: Path, fingerprint: str, spec: str | None = None) -> tuple[str, PreparedData]:
    """Open a run's text, from its cache or prepared again; returns what --data would call it, and the data.

    Args:
        fingerprint: of the data, as a checkpoint's manifest has it.
        spec: the text, as for --data; None: what environment.json says, here or where the run was started.

    Raises:
        DataError: it is not there any more, or gives other tokens.
        ConfigError: not a run folder.
    """
    if spec is None:
        environment = run_folder.read(run, run_folder.ENVIRONMENT)
        recorded = environment.get("data")
        spec = str(recorded.get("spec") if isinstance(recorded, dict) else None)
        elsewhere = Path(str(environment.get("cwd", ""))) / spec
        if not Path(spec).exists() and elsewhere.exists():
            spec = str(elsewhere)
    config = load_run_config(str(run / run_folder.RUN)).data
    given = load_tokenizer(run / run_folder.TOKENIZER) if config.tokenizer == "given" else None
    data = prepare_cached(spec, config, tokenizer=given)
    if data.fingerprint != fingerprint:
        prints = f"fingerprint {data.fingerprint[:12]}…, the checkpoint has {fingerprint[:12]}…"
        raise DataError(f"--data {spec}: is not the data that {run} was trained on ({prints})")
    return spec, data
