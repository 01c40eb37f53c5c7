"""The run YAML: what is refused, where it stands, and that all of it is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatgot.config.run import RunConfig, build_run_config, load_run_config
from chatgot.errors import ConfigError


def refused(folder: Path, text: str, overrides: dict[str, object] | None = None) -> list[str]:
    """The lines of the refusal of a YAML, its folder left out."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path), overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_everything_wrong_is_said_at_once_with_its_place(tmp_path: Path) -> None:
    text = "model:\n  n_layer: 4\n  d_model: 0\n  architecture: moder\ndata:\n  val_fraction: .nan\ntrain: 7\nx: 1\n"
    lines = refused(tmp_path, text, {"model.n_head": True, "data.split_by": "files"})
    assert sorted(line for line in lines if "unknown key" not in line) == [
        "override data.split_by = \"files\": expected one of auto, position, file; did you mean 'file'?",
        "override model.n_head = true: expected a whole number (>= 1)",
        "run.yaml:3: model.d_model = 0: expected a whole number (>= 1)",
        "run.yaml:4: model.architecture = \"moder\": expected one of gpt2, modern; did you mean 'modern'?",
        "run.yaml:6: data.val_fraction = NaN: expected a number (> 0.0 and <= 0.9)",
        "run.yaml:7: train = 7: expected a section {...}",
    ]
    layer, other = (line for line in lines if "unknown key" in line)
    assert layer.startswith("run.yaml:2: model.n_layer = 4: unknown key; expected one of architecture, d_model, ")
    assert layer.endswith("; did you mean 'n_layers'?")
    assert other == "run.yaml:8: x = 1: unknown key; expected one of model, data, train"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {d_model: 100}\n", "run.yaml:1: model: d_model = 100 is not a multiple of n_head = 6"),
        ("model: {head_dim: 7}", "run.yaml:1: model: head_dim = 7 must be even for rotary positions"),
        ("model: {architecture: gpt2, head_dim: 32}", "model: head_dim = 32: heads of another width need architecture"),
        ("model: {norm_eps: 0}", "model.norm_eps = 0: expected a number or null (> 0.0)"),
        ("[1]", "run.yaml: got [1]; expected a section {...}"),
        ("train: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("? [a]\n: 1", "unhashable key"),
        ("model: {", "not valid YAML"),
        ("train: {sample_prompts: text}", "expected a list of texts"),
        ("train: {sample_prompts: [3]}", "expected a list of texts"),
        ("model: {dropout: true}", "expected a number"),
        ("model: {n_layers: 2.5}", "expected a whole number"),
        ("model: {n_layers: '2'}", "expected a whole number"),
        ("model: {tie_embeddings: 1}", "expected true or false"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in "\n".join(refused(tmp_path, text))


BOMB = "model:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "model.i = [[["),
        ("model: &m\n  d_model: *m\n", "model.d_model = {"),
        ("train: " + "[" * 5000, "not valid YAML: maximum recursion depth"),
        ("train: " + "{a: " * 5000, "not valid YAML: maximum recursion depth"),
        ("model: text\ndata: [1]\n", 'model = "text": expected a section'),
        ("train: {max_steps: " + "9" * 5000 + "}", "not valid YAML: Exceeds the limit (4300"),
        (
            "train: {max_steps: " + "9" * 4000 + "}",
            'train.max_steps = "a number of 13288 bits": is beyond what 64 bits hold',
        ),
        (
            "train: {sample_seed: 18446744073709551616}",
            "train.sample_seed = 18446744073709551616: is beyond what 64 bits hold",
        ),
        ("model: {init_std: .inf}", "model.init_std = Infinity: expected a number (> 0.0)"),
        ("model: {init_std: " + "1" + "0" * 400 + "}", "model.init_std = "),
        ('"model\\ud800": 1', 'the key "model\\\\ud800" is no text'),
        ('data: {split_by: "\\ud800"}', 'data.split_by = "\\\\ud800": expected one of'),
        ("# " + "x" * (1 << 20), "more than 1048576 bytes"),
    ],
    ids=[
        "aliases",
        "itself",
        "lists",
        "sections",
        "text",
        "digits",
        "number",
        "seed",
        "inf",
        "float",
        "key",
        "value",
        "size",
    ],
)
def test_what_is_hostile_is_refused_in_few_words(tmp_path: Path, text: str, said: str) -> None:
    lines = refused(tmp_path, text)
    assert said in "\n".join(lines)
    assert all(len(line) < 800 for line in lines), "the list of what is allowed included"
    "\n".join(lines).encode()


def test_settings_that_do_not_go_together_name_the_override_and_not_the_file() -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run_config("tiny", {"model.n_head": 5, "train.seed": 1})
    said = "override model.n_head: d_model = 128 is not a multiple of n_head = 5"
    assert str(refusal.value) == said


def test_a_deepspeed_json_in_place_of_the_yaml_is_said() -> None:
    with pytest.raises(ConfigError, match="--deepspeed_config takes"):
        load_run_config("ds_configs/bf16_zero1.json")


def test_what_loses_nothing_is_accepted() -> None:
    tree = {"model": {"n_layers": 3.0, "dropout": "1e-1", "init_std": 1}, "train": None}
    config = build_run_config(tree, "run.yaml", {"train.max_steps": 1e3})
    assert repr((config.model.n_layers, config.model.dropout, config.model.init_std)) == "(3, 0.1, 1.0)"
    assert config.train.max_steps == 1000
    assert build_run_config(None, "run.yaml") == RunConfig()


def test_heads_of_their_own_width_need_no_multiple() -> None:
    model = RunConfig.model_validate({"model": {"d_model": 30, "n_head": 4, "head_dim": 8, "n_kv_head": 2}}).model
    assert (model.head_width, model.attention_width) == (8, 32)


def test_keys_that_came_later_are_written_only_where_they_are_given() -> None:
    """The settings of a run from before them are the same ones, and so are their hashes."""
    assert not {"head_dim", "norm_eps"} & RunConfig().to_dict()["model"].keys()
    given = RunConfig.model_validate({"model": {"head_dim": 32, "norm_eps": 1e-5}})
    assert RunConfig.model_validate(given.to_dict()) == given
