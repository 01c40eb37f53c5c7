"""The README.md of an exported model: what the run folder knows about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import Found
from chatgot.config.run import ModelConfig
from chatgot.data.tokenizer import Tokenizer
from chatgot.errors import ConfigError
from chatgot.model.shapes import count_parameters
from chatgot.observe.journal import read_journal
from chatgot.version import __version__

logger = logging.getLogger(__name__)
LOADING = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=200, do_sample=True, pad_token_id=0)[0]))
```""",
    "gguf": "    llama-cli -no-cnv -m model.gguf -p PROMPT",
}


def model_card(run: Path, found: Found, config: ModelConfig, tokenizer: Tokenizer, dtype: str, format: str) -> str:
    """Write what is known; what an old or damaged run folder does not say is left out."""
    step = found.manifest["step"]
    facts: dict[str, Any] = {}
    try:
        facts = run_folder.read(run, run_folder.ENVIRONMENT)
    except ConfigError as error:
        logger.warning(f"the model card says less: {error}")
    data = facts.get("data") or {}
    latest: dict[str, Any] = {}
    if (run / run_folder.METRICS).is_file():
        for record in read_journal(run / run_folder.METRICS)[0]:
            if record.get("step", 0) <= step:
                latest |= {key: value for key, value in record.items() if value is not None}
    shape = f"{config.d_model} x {config.n_layers} x {config.n_head}, context {config.max_seq_length}"
    size = count_parameters(config, tokenizer.vocab_size)
    rows = {
        "started from": found.manifest.get("init_from"),
        "text": Path(str(data["spec"])).name if data.get("spec") else None,
        "architecture": f"{config.architecture}, {size:,} parameters (width x layers x heads {shape})",
        "tokenizer": f"{tokenizer.kind}, vocabulary of {tokenizer.vocab_size}",
        "weights": dtype,
        "optimizer steps": step,
        "tokens": latest.get("data/tokens"),
        "val/loss": latest.get("val/loss"),
        "bits per character": latest.get("val/bits_per_char"),
        "checkpoint": found.tag,
        "chatgot": __version__,
        **{name: facts.get(name) for name in ("torch", "deepspeed")},
    }
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None)
    settings = "\n".join(f"    {key}: {value}" for key, value in config.model_dump().items())
    prompt = repr(tokenizer.decode([0]))
    load = LOADING[format].replace("PROMPT", prompt if format == "transformers" else '"..."')
    library = "library_name: transformers\n" if format == "transformers" else ""
    front = f"---\npipeline_tag: text-generation\n{library}tags: [chatgot]\n---\n\n"
    what = "A model trained from scratch with ChatGoT. It continues text; it was not taught to follow instructions."
    if origin := found.manifest.get("init_from"):
        what = f"The model of `{Path(origin).name}`, trained further with ChatGoT; that model's terms hold for it too."
    body = f"{what}\n\n| | |\n|---|---|\n{table}\n\n## Loading it\n\n{load}\n\n## Settings\n\n{settings}\n"
    return f"{front}# {run.resolve().name}\n\n{body}"


def _shown(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)
