"""config.json <-> ModelConfig: every spelling is read, one is written, and the rest is refused."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from ascendspeed.cli import validation
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.families import FAMILIES, PRESETS, family_of, preset
from ascendspeed.models.families.base import check_heads
from ascendspeed.utils.errors import UserError

INTERNLM_20B = {  # as published
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "internlm",
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "rotary": {"base": 10000, "type": "dynamic"},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 103168,
}
INTERNLM25_7B = {  # as published, InternLM2.5-7B-chat
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 92544,
}
INTERNLM3_8B = {  # as published
    "architectures": ["InternLM3ForCausalLM"],
    "bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "max_position_embeddings": 32768,
    "model_type": "internlm3",
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
    "tie_word_embeddings": False,
    "vocab_size": 128512,
}
BAICHUAN2_7B = {  # as published
    "_from_model_config": True,
    "architectures": ["BaichuanForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 125696,
    "z_loss_weight": 0,
}
QWEN2_7B = {  # as published, the instruct model's
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "vocab_size": 99,
}


def llama(**more) -> ModelConfig:
    return FAMILIES["llama"].read_config(LLAMA | more)


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (INTERNLM_20B, "internlm-20b"),
        (INTERNLM25_7B, "internlm2.5-7b"),
        (INTERNLM3_8B, "internlm3-8b"),
        (BAICHUAN2_7B, "baichuan2-7b"),
        (QWEN2_7B | {"max_position_embeddings": 131072}, "qwen2-7b"),  # the base model's
        (AutoConfig.for_model("gemma").to_dict(), "gemma-7b"),  # whose values are the class's own
        (AutoConfig.for_model("llama").to_dict(), "llama-7b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_config_is_the_preset(published, name):
    assert family_of(published).read_config(published) == preset(name)


def test_internlm3_has_two_switches_for_its_biases():
    def biases(**settings) -> tuple[bool, bool, bool]:
        config = FAMILIES["internlm3"].read_config(
            {k: v for k, v in INTERNLM3_8B.items() if "bias" not in k} | settings
        )
        return config.add_qkv_bias, config.add_dense_bias, config.add_mlp_bias

    assert biases() == (False, False, False)
    assert biases(qkv_bias=True) == (True, False, False)
    assert biases(bias=True) == (False, True, True)
    assert biases(attention_bias=True, mlp_bias=True) == (True, True, True)  # as transformers 5 writes it
    with pytest.raises(UserError, match="qkv_bias = False and attention_bias = True contradict each other"):
        biases(qkv_bias=False, attention_bias=True)


def test_gemma_says_gelu_and_means_the_approximation_by_tanh():
    config = FAMILIES["gemma"].write_config(PRESETS["gemma-7b"])
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert FAMILIES["gemma"].read_config(config | {"hidden_act": "gelu"}) == PRESETS["gemma-7b"]
    with pytest.raises(UserError, match="activation = 'silu'"):
        FAMILIES["gemma"].write_config(replace(PRESETS["gemma-7b"], activation="silu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (BAICHUAN2_7B | {"vocab_size": 64000}, "Baichuan 1"),
        (BAICHUAN2_7B | {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40}, "ALiBi"),
        (QWEN2_7B | {"use_sliding_window": True}, "use_sliding_window = True"),
        (
            QWEN2_7B
            | {"rope_scaling": {"type": "su", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "'su'",
        ),
        (
            INTERNLM3_8B
            | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "'longrope'",
        ),
        (INTERNLM25_7B | {"hidden_act": "gelu"}, "hidden_act"),
        (FAMILIES["gemma"].write_config(PRESETS["gemma-7b"]) | {"hidden_act": "relu"}, "hidden_act"),
        (
            FAMILIES["gemma"].write_config(PRESETS["gemma-7b"]) | {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_family_cannot_express_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        family_of(changes).read_config(changes)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("internlm2-tiny", "add_mlp_bias"),
        ("baichuan2-tiny", "add_qkv_bias"),
        ("baichuan2-tiny", "add_dense_bias"),
    ],
)
def test_a_bias_that_the_checkpoints_have_no_name_for_is_refused(name, flag):
    run = Run(
        replace(PRESETS[name], **{flag: True}),
        ParallelConfig(deepspeed=True),
        OptimConfig(),
        DataConfig(data_path=("x",)),
        TrainConfig(global_batch_size=1),
    )
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}: the models of the family"):
        validation.check_run(run, 1)
    validation.check_run(replace(run, model=PRESETS[name]), 1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name):
    config = PRESETS[name]
    hf_config = FAMILIES[config.family].write_config(config)
    assert family_of(hf_config).read_config(hf_config) == config
    check_heads(config)


def test_v1_has_no_words_for_grouped_queries():
    config = FAMILIES["internlm"].write_config(PRESETS["internlm-tiny"])
    assert "num_key_value_heads" not in config
    assert "head_dim" not in config
    with pytest.raises(UserError, match="num_query_groups = 2"):
        FAMILIES["internlm"].write_config(replace(PRESETS["internlm-tiny"], num_query_groups=2))


def test_llama_spells_its_heads_out():
    config = FAMILIES["llama"].write_config(llama())
    assert (config["num_key_value_heads"], config["head_dim"]) == (8, 8)


def test_null_is_the_same_as_not_there():
    assert (
        llama(head_dim=None, num_key_value_heads=None, rope_scaling=None, max_position_embeddings=None)
        == llama()
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "dynamic", "factor": 2.0}},
        {"rotary": {"base": 500000, "type": "dynamic", "scaling_factor": 2.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2},
            "partial_rotary_factor": 1.0,
        },
        {
            "rope_theta": 5e5,
            "rope_parameters": {"rope_theta": 500000, "rope_type": "dynamic", "factor": 2},
            "rope_scaling": None,
        },
    ],
)
def test_every_spelling_of_rope(spelling):
    config = llama(**spelling)
    assert (config.rotary_base, config.rope_scaling_type, config.rope_scaling_factor) == (5e5, "dynamic", 2.0)


def test_rope_of_v1():
    def rope(**more) -> tuple[float, str, float]:
        config = FAMILIES["internlm"].read_config(INTERNLM_20B | more)
        return config.rotary_base, config.rope_scaling_type, config.rope_scaling_factor

    assert rope(rotary=None) == (1e4, "dynamic", 1.0)  # the family's default
    assert rope(rotary={"base": 10000, "type": "origin"}) == (1e4, "none", 1.0)
    assert rope(rotary={"base": 10000, "type": "dynamic"}, scaling_factor=3) == (1e4, "dynamic", 3.0)
    assert rope(rotary=None, rope_theta=1e6, rope_parameters={"rope_type": "default"}) == (1e6, "none", 1.0)
    with pytest.raises(
        UserError, match=r"rope_theta = 500000 and rotary\.base = 10000 contradict each other"
    ):
        rope(rope_theta=500000)
    with pytest.raises(
        UserError, match=r"rotary\.type = 'origin' and rope_scaling\.type = 'linear' contradict each other"
    ):
        rope(rotary={"base": 10000, "type": "origin"}, rope_scaling={"type": "linear", "factor": 2})
    with pytest.raises(UserError, match="'linear' lacks its factor"):  # only its own dynamic scaling may
        rope(rotary={"base": 10000, "type": "linear"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}},
            "rope_scaling.type = 'linear' and ",
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta = 1000000.0 and rope_parameters.rope_theta = 500",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "scaling_factor": 4}},
            "factor = 2 and rope_scaling.scaling_factor = 4",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "contradict",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks its factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": None}}, "'dynamic' lacks its factor"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor = 2.0, but no rope scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5 is less than 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": True}},
            "rope_scaling.factor = True is not a positive number",
        ),
        ({"rope_theta": 10**400}, "is not a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6' is not a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2}}, "rope scaling ['linear'] is not supported"),
        ({"rope_scaling": []}, "rope_scaling = [] is not a table"),
        ({"rms_norm_eps": 10**400}, "is not a positive float"),
    ],
)
@pytest.mark.parametrize("name", ["llama-tiny", "internlm2-tiny", "mixtral-tiny"])
def test_rope_that_contradicts_itself_or_is_incomplete(name, more, message):
    config = FAMILIES[PRESETS[name].family].write_config(PRESETS[name]) | {
        "rope_theta": None,
        "rope_scaling": None,
    }
    family_of(config).read_config(config)  # control: without it nothing is wrong
    with pytest.raises(UserError) as error:
        family_of(config).read_config(config | more)
    assert message in str(error.value)


def test_rope_scaling_is_written_with_two_entries():
    """transformers before 4.43 and InternLM2's own code refuse more; the newest reads these two alike."""
    config = FAMILIES["llama"].write_config(
        llama(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 4})
    )
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, {"type": "linear", "factor": 4.0})
    read = AutoConfig.for_model(**config).rope_parameters
    assert (read["rope_theta"], read["rope_type"], read["factor"]) == (5e5, "linear", 4.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": 1}, "mlp_bias = 1 is not a bool"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "-1"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": "dynamic"}, "not a table"),
        ({"num_hidden_layers": "2"}, "positive int"),
        ({"num_hidden_layers": 0}, "positive int"),
        ({"hidden_size": True}, "positive int"),
        ({"tie_word_embeddings": 1}, "not a bool"),
        ({"rms_norm_eps": "1e-6"}, "positive float"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"num_attention_heads": 7}, "does not split over 7"),
        ({"num_key_value_heads": 3}, "do not split over 3"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_what_cannot_be_expressed_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        llama(**more)


def test_unknown_families_and_presets():
    with pytest.raises(UserError, match=r"'falcon'.*internlm.*llama"):
        family_of({"model_type": "falcon"})
    with pytest.raises(UserError, match="did you mean internlm-7b"):
        preset("internlm7b")
