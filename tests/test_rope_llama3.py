"""Rope scaling of Llama 3.1 against transformers: frequencies, config.json, logits, gradients, caches."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.family_models import MODELS, TINY
from helpers.generation import hf_generate, language_model, token_lists
from helpers.gguf_models import export
from helpers.gguf_models import model as model_folder
from helpers.gguf_models import tokens as tokens  # a fixture
from helpers.models import ours
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ascendspeed.cli import validation
from ascendspeed.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    TrainConfig,
)
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.registry import format_named
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.utils.errors import UserError

LLAMA31 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
"""rope_scaling of the published config.json of Llama 3.1 8B; Llama 3.2 1B has the factor 32."""
MODEL = MODELS["llama3.1"]
PROMPTS = [[1, 5, 9, 33, 7, 2, 8], [1, *range(2, 40)], [1, *range(2, 40), 77]]


def published(**changes) -> dict:
    """config.json of Llama 3.1 8B, in part."""
    return {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA31 | changes,
    }


def read(config_json: dict) -> ModelConfig:
    return FAMILIES["llama"].read_config(config_json)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_are_those_of_transformers(factor):
    theirs = LlamaRotaryEmbedding(LlamaConfig(**published(factor=factor))).inv_freq
    config = read(published(factor=factor))
    assert torch.equal(Rope(config).inverse_frequencies(10), theirs)
    plain = Rope(replace(config, rope_scaling_type="none")).inverse_frequencies(10)
    kept, scaled = theirs == plain, theirs == plain / factor
    counts = [int(kind.sum()) for kind in (kept, scaled, ~kept & ~scaled)]
    assert counts == [29, 29, 6]  # control: all three kinds occur


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_config_json_is_read_and_written(key):
    entries = published()
    scaling = entries.pop("rope_scaling")
    config = read(entries | {key: scaling})
    assert (config.rope_scaling_type, config.rope_scaling_factor) == ("llama3", 8.0)
    assert (config.rope_low_freq_factor, config.rope_high_freq_factor) == (1.0, 4.0)
    assert config.rope_original_max_position_embeddings == 8192
    again = FAMILIES["llama"].write_config(config)
    assert (again["rope_theta"], again["rope_scaling"]) == (5e5, LLAMA31)
    assert AutoConfig.for_model(**again).rope_parameters == LLAMA31 | {"rope_theta": 5e5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": None}, "'llama3' lacks low_freq_factor"),
        ({"original_max_position_embeddings": None}, "'llama3' lacks original_max_position_embeddings"),
        ({"factor": None}, "'llama3' lacks its factor"),
        ({"high_freq_factor": 1.0}, "rope_low_freq_factor 1.0 is not below rope_high_freq_factor 1.0"),
        ({"high_freq_factor": "4"}, "rope_scaling.high_freq_factor = '4' is not a positive number"),
        ({"original_max_position_embeddings": 8192.0}, "is not a whole number"),
        ({"attention_factor": 2}, "attention_factor = 2 is supported for rope scaling 'yarn' only"),
        (
            {"rope_type": "linear"},
            "original_max_position_embeddings = 8192 and .*for rope scaling 'llama3' and 'yarn' only",
        ),
        ({"rope_type": "default", "factor": None}, "is supported for rope scaling 'llama3' and 'yarn' only"),
    ],
)
def test_incomplete_and_contradictory_entries(changes, message):
    read(published())  # control
    with pytest.raises(UserError, match=message):
        read(published(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling_type": "llama3"}, "llama3 needs rope_original_max_position_embeddings"),
        (
            {"rope_low_freq_factor": 2.0},
            "rope_low_freq_factor = 2.0 is for rope scaling llama3 only, not for none",
        ),
        ({"rope_original_max_position_embeddings": 0}, "must be at least 1"),
    ],
)
def test_flags_are_checked(changes, message):
    def check(model: ModelConfig) -> None:
        train, data = TrainConfig(global_batch_size=1), DataConfig(data_path=("x",))
        validation.check_run(Run(model, ParallelConfig(deepspeed=True), OptimConfig(), data, train), 1)

    check(MODEL)
    with pytest.raises(UserError, match=message):
        check(replace(TINY["llama"], **changes))


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's model and our tensors of it."""
    theirs, named = oracle.native(MODEL)
    tensors = {p.name: param_mapping.hf_to_megatron(MODEL, p, named) for p in param_mapping.parameters(MODEL)}
    return theirs, tensors


def test_logits_and_gradients_beyond_the_first_trained_length(cpu, reference):
    theirs, tensors = reference
    ids = torch.randint(0, 125, (1, 49), generator=torch.Generator().manual_seed(3))
    expected = theirs(ids[:, :-1]).logits
    expected.logsumexp(-1).sum().backward()
    gradient = theirs.model.layers[0].self_attn.o_proj.weight.grad
    for model, is_equal in (
        (MODEL, True),
        (replace(MODEL, rope_scaling_type="none"), False),  # control
        (replace(MODEL, rope_high_freq_factor=4.0), False),
        (replace(MODEL, rope_scaling_type="linear"), False),
    ):
        built = ours(cpu, model, tensors)
        logits = built(ids[:, :-1].contiguous(), None, None)[..., :125]
        logits.logsumexp(-1).sum().backward()
        parameter = built.get_parameter("decoder.layers.0.self_attention.linear_proj.weight")
        off = float((logits - expected).abs().max()), float((parameter.grad - gradient).abs().max())
        assert (off[0] < 1e-5, off[1] < 1e-4) == (is_equal, is_equal), (model.rope_scaling_type, off)
        assert is_equal or min(off) > 1e-3
    theirs.zero_grad()


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
    unscaled = language_model(cpu, replace(MODEL, rope_scaling_type="none"), tensors)
    assert [group[0] for group in token_lists(sample(unscaled, PROMPTS, params))] != expected  # control


def test_gguf_holds_the_factors_of_llama_cpp(tokens, tmp_path):
    """llama.cpp divides each frequency by the number in `rope_freqs.weight`."""
    folder = model_folder("llama", tmp_path / "hf", tokens)
    config = json.loads((folder / "config.json").read_text())
    scaling = LLAMA31 | {"original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": dict(scaling)}))
    reader = export(folder, tmp_path / "gguf", tokens, gguf_type="f16")
    [factors] = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config | {"rope_scaling": dict(scaling)})).inv_freq
    plain = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    assert torch.allclose(plain / torch.tensor(factors), theirs, rtol=1e-6)
    assert factors.min() == 1.0
    assert factors.max() == 8.0
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert embedding.data.any()  # the other tensors stay at their places
    qwen = model_folder("qwen2", tmp_path / "qwen", tokens)
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(UserError, match="rope scaling llama3 for the architecture llama only, not for qwen2"):
        export(qwen, tmp_path / "x", tokens)


def test_internevo_has_no_such_scaling(tmp_path, tokens):
    folder = model_folder("llama", tmp_path / "hf", tokens)
    config = json.loads((folder / "config.json").read_text())
    writer = format_named("internevo").writer(WriteOptions())
    writer.check(convert.open_reader(folder))  # control
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": LLAMA31}))
    with pytest.raises(UserError, match="or a rope scaling other than dynamic"):
        writer.check(convert.open_reader(folder))
