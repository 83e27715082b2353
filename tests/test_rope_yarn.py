"""YaRN rope scaling against transformers: frequencies, attention factor, config.json, logits, caches."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.family_models import MODELS
from helpers.generation import hf_generate, language_model, token_lists
from helpers.models import ours
from helpers.published_configs import QWEN3_8B
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ascendspeed.cli import validation
from ascendspeed.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    TrainConfig,
)
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.utils.errors import UserError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""rope_scaling that Qwen3's model card names for texts of 131,072 tokens."""
MODEL = MODELS["qwen3-yarn"]
PROMPTS = [[1, 5, 9, 33, 7, 2, 8], [1, *range(2, 40)], [1, *range(2, 40), 77]]
SETTINGS = [
    {},
    {"factor": 2.5, "beta_fast": 16, "beta_slow": 2},
    {"attention_factor": 1.5},
    {"mscale": 0.707, "mscale_all_dim": 1.0},
    {"mscale": 1.0, "mscale_all_dim": 1.0, "factor": 40.0},
    {"original_max_position_embeddings": None},
    {"factor": 1.0},
]


def published(**changes) -> dict:
    """config.json of Qwen3 8B with this scaling."""
    scaling = {name: value for name, value in (YARN | changes).items() if value is not None}
    return QWEN3_8B | {"rope_scaling": scaling}


def read(config_json: dict) -> ModelConfig:
    return FAMILIES["qwen3"].read_config(config_json)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_frequencies_and_attention_factor_are_those_of_transformers(changes):
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**published(**changes)))
    config = read(published(**changes))
    rope = Rope(config)
    assert torch.equal(rope.inverse_frequencies(10), theirs.inv_freq)
    assert rope.attention_factor == theirs.attention_scaling
    positions = torch.arange(50000, 50040)[None]
    expected = theirs(torch.zeros(1), positions)
    actual = rope.cos_sin(positions.t().float(), rope.inverse_frequencies(10)[None], torch.float32)
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine[:, 0, 0], other[0])
    plain = Rope(replace(config, rope_scaling_type="none"))
    is_scaled = config.rope_scaling_factor > 1
    assert torch.equal(plain.inverse_frequencies(10), theirs.inv_freq) != is_scaled  # control


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_config_json_is_read_and_written(key):
    entries = published(beta_fast=16.0, attention_factor=1.5)
    scaling = entries.pop("rope_scaling")
    config = read(entries | {key: scaling})
    assert (config.rope_scaling_type, config.rope_scaling_factor) == ("yarn", 4.0)
    assert config.rope_original_max_position_embeddings == 32768
    again = FAMILIES["qwen3"].write_config(config)
    assert (again["rope_theta"], again["rope_scaling"]) == (1e6, scaling)
    assert AutoConfig.for_model(**again).rope_parameters == scaling | {"rope_theta": 1e6}
    assert FAMILIES["qwen3"].write_config(read(published()))["rope_scaling"] == YARN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": None}, "'yarn' lacks its factor"),
        ({"truncate": False}, "rope setting rope_scaling.truncate = False is not supported"),
        ({"beta_slow": 64}, "rope_beta_slow 64.0 is above rope_beta_fast 32.0"),
        ({"original_max_position_embeddings": 0.5}, "is not a whole number"),
        (
            {"rope_type": "dynamic", "beta_fast": 3},
            "beta_fast = 3 is supported .*'yarn' only",
        ),
        ({"low_freq_factor": 2.0}, "low_freq_factor = 2.0 is supported for rope scaling 'llama3' only"),
        ({"rope_type": "llama3"}, "'llama3' lacks low_freq_factor and high_freq_factor"),
    ],
)
def test_incomplete_and_contradictory_entries(changes, message):
    read(published())  # control
    with pytest.raises(UserError, match=message):
        read(published(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_original_max_position_embeddings": None}, "yarn needs rope_original_max_position_embeddings"),
        (
            {"rope_low_freq_factor": 2.0},
            "= 2.0 is for rope scaling llama3 only, not for yarn",
        ),
        ({"rope_scaling_type": "none"}, "is for rope scaling .* only, not for none"),
        ({"rope_attention_factor": 0.0}, "must be above 0"),
    ],
)
def test_flags_are_checked(changes, message):
    def check(model: ModelConfig) -> None:
        train, data = TrainConfig(global_batch_size=1), DataConfig(data_path=("x",))
        validation.check_run(Run(model, ParallelConfig(deepspeed=True), OptimConfig(), data, train), 1)

    check(MODEL)
    with pytest.raises(UserError, match=message):
        check(replace(MODEL, **changes))


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's model and our tensors of it."""
    theirs, named = oracle.native(MODEL)
    tensors = {p.name: param_mapping.hf_to_megatron(MODEL, p, named) for p in param_mapping.parameters(MODEL)}
    return theirs, tensors


def test_logits_beyond_the_first_trained_length(cpu, reference):
    theirs, tensors = reference
    ids = torch.randint(0, 125, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(ids).logits
        for model, is_equal in (
            (MODEL, True),
            (replace(MODEL, rope_attention_factor=1.0), False),  # control
            (replace(MODEL, rope_scaling_type="linear"), False),
            (replace(MODEL, rope_scaling_type="none"), False),
        ):
            off = float((ours(cpu, model, tensors)(ids, None, None)[..., :125] - expected).abs().max())
            assert off < 1e-5 if is_equal else off > 1e-3, (model.rope_scaling_type, off)


def test_generation_with_caches(cpu, reference):
    """By the cache of `generate` and by the paged cache of the service, also with shared prefixes."""
    from helpers.paged_engine import run

    from ascendspeed.inference.engine import SamplingParams, sample
    from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
    from ascendspeed.inference.serving.request import Events, RequestParams, Submission

    theirs, tensors = reference
    lm = language_model(cpu, MODEL, tensors)
    params = SamplingParams(max_new_tokens=16)
    expected = [hf_generate(theirs, prompt, max_new_tokens=16)[0] for prompt in PROMPTS]
    assert [group[0] for group in token_lists(sample(lm, PROMPTS, params))] == expected
    submissions = tuple(
        Submission(i, prompt, RequestParams(params, number=i)) for i, prompt in enumerate(PROMPTS)
    )
    engine = PagedEngine(lm, EngineSettings(80, 4, token_budget=8))
    assert run(engine, Events(submissions)) == dict(enumerate(expected))
    assert engine.scheduler.prefix_hits > 0
    unscaled = language_model(cpu, replace(MODEL, rope_attention_factor=1.0), tensors)
    assert [group[0] for group in token_lists(sample(unscaled, PROMPTS, params))] != expected  # control


def test_an_export_keeps_the_scaling(reference, tmp_path):
    from ascendspeed.conversion import convert

    theirs, _ = reference
    theirs.save_pretrained(tmp_path / "hf")
    reader = convert.open_reader(tmp_path / "hf")
    assert replace(reader.config, init_method_std=0.1) == MODEL
    convert.write_hf(reader, tmp_path / "again", verify=True)
    own, again = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "again"))
    assert again["rope_parameters"] == own["rope_parameters"]
    assert again["rope_parameters"]["rope_type"] == "yarn"
