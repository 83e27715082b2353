"""Run configuration: frozen, equal after a round trip through JSON, one form for each architecture."""

import dataclasses
import json
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.config import schema
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError


def values(hint) -> st.SearchStrategy:
    """Any value of a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values, args))
    if origin is tuple:
        return st.lists(values(args[0])).map(tuple)
    known = {
        int: st.integers(),
        float: st.floats(allow_nan=False),
        str: st.text(),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return known[hint]


def any_of(cls: type) -> st.SearchStrategy:
    """Any instance of a configuration."""
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: values(hints[f.name]) for f in dataclasses.fields(cls)})


runs = st.builds(Run, *map(any_of, (ModelConfig, ParallelConfig, OptimConfig, DataConfig, TrainConfig)))
DEFAULT = Run(ModelConfig(), ParallelConfig(), OptimConfig(), DataConfig(), TrainConfig())


@settings(max_examples=5)
@given(runs)
def test_round_trip_through_json(run):
    again = schema.from_dict(json.loads(json.dumps(schema.to_dict(run))))
    assert again == run
    assert hash(again) == hash(run)  # tuples, not lists


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["optim"].update(learning_rate=1.0),
        lambda d: d.pop("train"),
        lambda d: d.update(data=None),
        lambda d: d.update(model=[1, 2]),
    ],
)
def test_what_it_does_not_know_is_refused(spoil):
    values = schema.to_dict(DEFAULT)
    spoil(values)
    with pytest.raises(UserError, match=r"run\.json") as error:
        schema.from_dict(values)
    assert "\n" not in str(error.value)


def test_frozen():
    for part in (DEFAULT, DEFAULT.model, DEFAULT.parallel, DEFAULT.optim, DEFAULT.data, DEFAULT.train):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, 1)


def test_defaults_are_internlm_7b():
    assert dataclasses.replace(PRESETS["internlm-7b"], rope_scaling_type="none") == ModelConfig()


def test_one_spelling_for_one_architecture():
    plain = ModelConfig(hidden_size=64, num_attention_heads=8)
    assert ModelConfig(hidden_size=64, num_attention_heads=8, num_query_groups=8, kv_channels=8) == plain
    assert (plain.kv_heads, plain.head_dim) == (8, 8)
    other = ModelConfig(hidden_size=64, num_attention_heads=8, num_query_groups=2, kv_channels=16)
    assert (other.kv_heads, other.head_dim) == (2, 16)
    assert other != plain
    assert (
        dataclasses.replace(plain, num_attention_heads=4).kv_heads == 4
    )  # a replaced value does not leave an old one behind


@given(st.integers(1, 200_000), st.integers(1, 16), st.sampled_from([1, 64, 128]))
def test_padded_vocabulary(vocab, tp, divisor):
    padded = schema.padded_vocab_size(
        ModelConfig(vocab_size=vocab), ParallelConfig(tp, make_vocab_size_divisible_by=divisor)
    )
    assert padded % (tp * divisor) == 0
    assert vocab <= padded < vocab + tp * divisor


@pytest.mark.parametrize(("tp", "rows"), [(1, 0), (2, 0), (4, 256), (8, 256), (16, 1280)])
def test_padding_of_the_real_vocabulary(tp, rows):
    assert schema.padded_vocab_size(ModelConfig(), ParallelConfig(tp)) - 103168 == rows


def test_dtype():
    assert [OptimConfig(**kind).dtype for kind in ({}, {"bf16": True}, {"fp16": True})] == [
        "fp32",
        "bf16",
        "fp16",
    ]
