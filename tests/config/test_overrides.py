"""Overrides on the command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatgot.config.overrides import parse_overrides, parse_value
from chatgot.config.run import build_run_config
from chatgot.errors import ConfigError


def refusal(*items: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(items)
    return str(caught.value)


def test_keys_go_to_their_home() -> None:
    run, ds = parse_overrides(
        [
            "model.n_layers=4",
            "ds.optimizer.params.lr=3e-4",
            'train.sample_prompts=["a","b"]',
            "ds.chatgot.schedule.type=wsd",
        ]
    )
    assert run == {"model.n_layers": 4, "train.sample_prompts": ["a", "b"]}
    assert ds == {"optimizer.params.lr": 3e-4, "chatgot.schedule.type": "wsd"}
    assert isinstance(ds["optimizer.params.lr"], float)
    config = build_run_config(None, "x.yaml", run)
    assert config.model.n_layers == 4
    assert config.train.sample_prompts == ("a", "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("4", 4),
        ("-1", -1),
        ("1_000", 1000),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("none", "none"),
        ("yes", "yes"),
        ("nan", "nan"),
        ("2026-01-02", "2026-01-02"),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("[a, 'b']", ["a", "b"]),
        ('{"device": "cpu"}', {"device": "cpu"}),
        ('"4"', "4"),
        ("", ""),
        ("a=b", "a=b"),
        ("The night", "The night"),
    ],
)
def test_values(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives(number: float) -> None:
    assert parse_value(repr(number)) == number


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("model.n_layers", "expected key=value"),
        ("model.n_layer=4", "did you mean 'model.n_layers'?"),
        ("n_layers=4", "did you mean 'model.n_layers'?"),
        ("gradient_clipping=1", "did you mean 'ds.gradient_clipping'?"),
        ("ds.gradient_cliping=1", "did you mean 'ds.gradient_clipping'?"),
        ("ds.zero_optimization.stagee=1", "did you mean 'ds.zero_optimization.stage'?"),
        ("ds.chatgot.checkpoint.every_step=1", "did you mean 'ds.chatgot.checkpoint.every_steps'?"),
        ("optimizer.params.lr=1", "no such key"),
        ("ds.optimizer.params.=1", "no such key"),
        ("model=1", "no such key"),
        ("train.sample_prompts=[a", "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(item: str, said: str) -> None:
    message = refusal(item)
    assert message.startswith(f"override {item}: ")
    assert said in message


def test_all_mistakes_come_together_and_twice_is_one() -> None:
    lines = refusal("model.n_layers=4", "model.n_layers=5", "ds.stage=1", "x").splitlines()
    assert len(lines) == 3
    assert "given twice" in lines[0]


def test_override_is_put_in_before_the_check(read, refused) -> None:
    config = read(
        {},
        {
            "optimizer.params.lr": 3e-4,
            "zero_optimization.stage": 2,
            "chatgot.schedule.type": "wsd",
            "wandb.enabled": True,
        },
    )
    assert config.optimizer is not None
    assert config.optimizer.params["lr"] == 3e-4
    assert config.deepspeed["zero_optimization"]["stage"] == config.zero_stage == 2
    assert config.chatgot.schedule is not None
    assert config.chatgot.schedule.type == "wsd"
    assert config.wandb.enabled
    assert config.source["optimizer"]["params"]["lr"] == 1e-3
    lines = refused(
        {}, {"zero_optimization.stage": 7, "chatgot.checkpoint.keep_last": 1, "optimizer.params.momentum": 0.9}
    )
    assert sorted(line.split(" = ")[0] for line in lines) == [
        "override ds.chatgot.checkpoint.keep_last",
        "override ds.optimizer.params.momentum",
        "override ds.zero_optimization.stage",
    ]


def test_override_takes_the_spelling_of_the_file(read) -> None:
    config = read({"bfloat16": {"enabled": True}}, {"bf16.enabled": False, "zero_optimization.prefetch_bucket_size": 4})
    assert config.precision == "fp32"
    assert config.deepspeed["bfloat16"]["enabled"] is False
    config = read({"zero_optimization.stage3_prefetch_bucket_size": 2}, {"zero_optimization.prefetch_bucket_size": 4})
    assert config.deepspeed["zero_optimization"] == {"stage": 1, "stage3_prefetch_bucket_size": 4}


def test_section_can_be_taken_out_or_put_in(read) -> None:
    on = {"activation_checkpointing": {"profile": False}}
    assert read(on, {"activation_checkpointing": None}).activation_checkpointing is None
    assert read({}, {"activation_checkpointing": {}}).activation_checkpointing == {}
    stock = {"scheduler": {"type": "WarmupLR", "params": {}}, "chatgot.schedule.type": "cosine"}
    assert read(stock, {"chatgot.schedule": None}).scheduler is not None
    assert read(stock, {"scheduler": None}).scheduler is None
