"""Flags of LoRA: names of matrices, the published flags, numbers of parameters, memory and work."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from helpers.lora_start import RUN

from ascendspeed.cli.train_args import resolve
from ascendspeed.config import schema
from ascendspeed.config.schema import LoraConfig, ParallelConfig
from ascendspeed.models import families
from ascendspeed.models.lora import targets
from ascendspeed.utils.errors import UserError

LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
OWN = "wqkv wo w1 w3 w2"


def lora_of(*words: str, model: str = "internlm-tiny") -> LoraConfig:
    return resolve(["--data-path", "x", "--model", model, *words], 1)[0].lora


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("model", "typed", "meant"),
    [
        ("internlm-tiny", "all-linear", LLAMA),
        ("internlm2-tiny", "all-linear", OWN),
        ("internlm-tiny", "query_key_value dense proj dense_4h_to_h", LLAMA),
        ("internlm-tiny", "linear_qkv", "q_proj k_proj v_proj"),
        ("internlm-tiny", "v_proj,q_proj", "q_proj v_proj"),
        ("internlm2-tiny", "linear_fc1 dense_4h_to_h", "w1 w3 w2"),
        ("internlm2-tiny", "v_proj q_proj", "q_proj v_proj"),
        ("internlm2-tiny", "q_proj dense_h_to_4h", "q_proj gate_proj up_proj"),
        ("internlm2-tiny", "w2 wqkv", "wqkv w2"),
        ("internlm3-tiny", "linear_proj", "o_proj"),
        ("baichuan2-tiny", "all-linear", "W_pack o_proj gate_proj up_proj down_proj"),
    ],
)
def test_names_of_matrices(model, typed, meant):
    assert lora_of(
        "--lora-r", "16", "--lora-target-modules", *typed.split(), model=model
    ).lora_target_modules == tuple(meant.split())


def test_the_published_flags():
    typed = (
        "--lora-r 16 --lora-alpha 32 --lora-load ./a "
        "--lora-register-forward-hook word_embeddings input_layernorm"
    )
    assert lora_of(*typed.split()) == LoraConfig(16, 32.0, 0.0, tuple(LLAMA.split()), lora_load="./a")
    assert lora_of() == LoraConfig()


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        (
            "--lora-rank 4 --lora-target-modules q_proj lm_head",
            f"lm_head: no such matrix; there are {LLAMA} \\(or all-linear",
        ),
        ("--lora-rank 4 --lora-target-modules wqkv", f"there are {LLAMA} \\(or"),
        (
            "--model internlm2-tiny --lora-rank 4 --lora-target-modules wqkv k_proj",
            f"mixes two ways .*; use one of {OWN} or {LLAMA}",
        ),
        ("--lora-rank 4 --lora-target-modules ,", "names nothing"),
        ("--lora-alpha 4", "--lora-alpha without --lora-rank has no effect"),
        ("--lora-rank -1", "--lora-rank -1: must be 0 or more"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha 0.0: must be above 0"),
        ("--lora-rank 4 --lora-dropout 1", "--lora-dropout 1.0: must be at least 0 and below 1"),
        ("--model mixtral-tiny --lora-rank 4", "models with experts \\(mixtral\\) cannot have adapters here"),
    ],
)
def test_what_means_nothing(typed, match):
    with pytest.raises(UserError, match=match):
        lora_of(*typed.split())


def test_checkpoints_of_before_know_no_adapters():
    values = schema.to_dict(RUN)
    assert schema.from_dict(json.loads(json.dumps(values))) == RUN
    del values["lora"]
    assert schema.from_dict(values) == replace(RUN, lora=LoraConfig())


def test_how_many_parameters():
    """By hand: InternLM2-7B, rank 16 on all: h 4096, kv 1024, ffn 14336."""
    lora = LoraConfig(16, lora_target_modules=tuple(LLAMA.split()))
    each = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert targets.parameter_count(families.preset("internlm2-7b"), lora) == 32 * 16 * each


def test_memory_and_work():
    """InternLM2-7B in bf16: 2 bytes a frozen weight, 18 an adapter's; 4 and 6 FLOPs a token."""
    from torch.utils.flop_counter import FlopCounterMode

    from ascendspeed.models import estimates

    model, lora = families.preset("internlm2-7b"), LoraConfig(16, lora_target_modules=tuple(LLAMA.split()))
    whole, more = estimates.parameter_count(model), targets.parameter_count(model, lora)
    states = estimates.model_states(
        model, ParallelConfig(zero_stage=0), 8, "bf16", fp32_gradients=True, lora=lora
    )
    assert (states.weights, states.gradients, states.optimizer) == (2 * (whole + more), 4 * more, 12 * more)
    per_rank = targets.parameter_count(
        model, lora, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    )
    # q, k and v, gate and up: A whole, B cut; o and down: A cut, B whole
    cut = (4096 + 2048) + 2 * (4096 + 512) + (2048 + 4096) + 2 * (4096 + 7168) + (7168 + 4096)
    assert per_rank == 8 * 16 * cut
    settings = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    linear = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)), settings)
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(1, 64, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 4 * 64 * 96 + 6 * 4 * (64 + 96)
    full, adapted = estimates.flops_per_token(model, 2048), estimates.flops_per_token(model, 2048, lora)
    multiply = whole - model.vocab_size * model.hidden_size - (2 * model.num_layers + 1) * model.hidden_size
    assert full - adapted == 2 * multiply - 6 * more
