"""GGUF files: every tensor as gguf's own reader gives it, the model as transformers loads it, and what
llama.cpp and Ollama need to chat.
"""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers.conversion import command, training_checkpoint, written
from helpers.gguf_models import export, model
from helpers.gguf_models import tokens as tokens  # a fixture
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.registry import format_named
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.gguf_names import PRE_TOKENIZERS
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError


def neighbours(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order: each row of the first half of a head before its partner."""
    halves = matrix.view(heads, 2, len(matrix) // heads // 2, -1)
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(matrix.shape)


def expected(folder, target, tokens) -> dict[str, torch.Tensor]:
    """Tensors under llama.cpp's names, from the export as a plain Llama."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    plain = None if family == "qwen2" else "llama"
    convert.write_hf(convert.with_tokenizer(convert.open_reader(folder), str(tokens)), target, family=plain)
    renamed = {}
    for name, tensor in written(target).items():
        for old, new in (
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("model.layers", "blk"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
        ):
            name = name.replace(old, new)
        if plain and ("attn_q" in name or "attn_k" in name):
            heads = 4 if "attn_q" in name or family == "internlm" else 2
            tensor = neighbours(tensor, heads)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(
    ("family", "gguf_type"),
    [
        *((family, "f16") for family in ("internlm", "internlm2", "internlm3")),
        *(pytest.param(family, "f16", marks=pytest.mark.slow) for family in ("llama", "qwen2")),
        ("internlm2", "bf16"),
        ("internlm2", "q8_0"),
    ],
)
def test_every_tensor_is_read_back(family, gguf_type, tokens, tmp_path):
    folder = model(family, tmp_path / "hf", tokens)
    reader = export(folder, tmp_path / "gguf", tokens, gguf_type=gguf_type)
    assert reader.get_field("general.architecture").contents() == FAMILIES[family].gguf_architecture.name
    oracle = expected(folder, tmp_path / "plain", tokens)
    assert {tensor.name for tensor in reader.tensors} == oracle.keys()
    for tensor in reader.tensors:
        full = oracle[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(full.shape)
        kind = gguf.GGMLQuantizationType[gguf_type.upper() if full.dim() > 1 else "F32"]
        assert tensor.tensor_type == kind
        assert tensor.data.tobytes() == gguf.quantize(full.numpy(), kind).tobytes(), tensor.name


def test_control_rows_in_the_order_of_hugging_face_are_others(tokens, tmp_path):
    folder = model("llama", tmp_path / "hf", tokens)
    reader = export(folder, tmp_path / "gguf", tokens, gguf_type="f16")
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    plain = written(folder)["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(stored.data, plain.half().numpy())
    assert np.array_equal(np.sort(stored.data, axis=0), np.sort(plain.half().numpy(), axis=0))


def test_transformers_computes_the_same_from_it(tokens, tmp_path):
    """The reader of GGUF in transformers undoes the order of the rows and maps names and settings itself."""
    from transformers import AutoModelForCausalLM

    folder = model("llama", tmp_path / "hf", tokens, torch.float16)
    export(folder, tmp_path / "gguf", tokens, gguf_type="f16")
    ids = torch.tensor([[1, 7, 300, 12, 5]])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, own(ids).logits, atol=1e-4)
    assert loaded.config.rope_parameters["rope_theta"] == own.config.rope_parameters["rope_theta"]


def test_a_chat_model_carries_its_template_and_stops(tokens, tmp_path):
    folder = model("internlm2", tmp_path / "hf", tokens)
    source = convert.open_reader(folder)
    training_checkpoint(tmp_path / "ckpt", source.config, dict(source.tensors()), tokens, "v2")
    command(
        "convert.py", *f"--from {tmp_path}/ckpt --to {tmp_path}/gguf --format gguf --gguf-type q8_0".split()
    )
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")

    def field(name: str):
        return reader.get_field(f"tokenizer.{name}").contents()

    loaded = tokenizer.load(tokens)
    end = loaded.required_id("<|im_end|>")
    assert (field("ggml.bos_token_id"), field("ggml.eos_token_id"), field("ggml.eot_token_id")) == (1, 2, end)
    assert field("ggml.add_bos_token") is True
    assert field("chat_template").startswith("{#- Chat template v2 ")
    assert "\\ufdd0" not in field("chat_template")  # llama.cpp's tokenizer does not know the mark
    names, types = field("ggml.tokens"), field("ggml.token_type")
    assert (names[end], types[end]) == ("<|im_end|>", gguf.TokenType.CONTROL)
    assert (names[0], types[0]) == ("<unk>", gguf.TokenType.UNKNOWN)
    assert (names[-1], types[-1]) == (f"[PAD{len(names) - 1}]", gguf.TokenType.UNUSED)
    assert len(names) == len(field("ggml.scores")) == source.config.vocab_size
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "FROM ./model.gguf\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in modelfile
    assert '{{ end }}<|im_start|>assistant\n"""' in modelfile


def test_a_base_model_completes_text(tokens, tmp_path):
    reader = export(model("llama", tmp_path / "hf", tokens), tmp_path / "gguf", tokens)
    assert reader.get_field("tokenizer.chat_template") is None
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "gguf" / "Modelfile").read_text()
    bf16 = export(model("llama", tmp_path / "bf16", tokens, torch.bfloat16), tmp_path / "gguf-bf16", tokens)
    assert bf16.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_BF16


def test_what_llama_cpp_does_not_have_is_refused(tokens, tmp_path):
    folder = model("llama", tmp_path / "hf", tokens)
    base = f"--from {folder} --to {tmp_path}/gguf --format gguf --tokenizer {tokens}"
    for more, reason in (
        ("--verify", "--verify reads the result back, and gguf is written only"),
        ("--dtype bf16", "--dtype is not for --format gguf: choose --gguf-type f16|bf16|q8_0"),
    ):
        with pytest.raises(UserError, match=reason.replace("|", r"\|")):
            command("convert.py", *base.split(), *more.split())
    with pytest.raises(UserError, match="a GGUF file holds the tokenizer, and none is known"):
        convert.convert(
            replace(convert.open_reader(folder), assets_dir=None),
            tmp_path / "x",
            format_named("gguf").writer(WriteOptions()),
        )
    with pytest.raises(UserError, match="family gemma cannot be written as gguf, only internlm, internlm2"):
        format_named("gguf").check_family("gemma", "write")
    (tmp_path / "bytes").mkdir()
    foreign = Tokenizer(BPE({"a": 0}, []))
    foreign.pre_tokenizer = Split(Regex(r"\w+"), "isolated")
    foreign.save(str(tmp_path / "bytes" / "tokenizer.json"))
    with pytest.raises(UserError, match="is not the tokenizer of a model that is written as GGUF"):
        export(folder, tmp_path / "y", tmp_path / "bytes")
    assert not (tmp_path / "gguf").exists()


BYTE_LEVEL_TEXTS = ("Hello, world! It's 2024.", "上海人工智能实验室 InternLM3", "a\n\n  b\tc — ½ 🙂")


def byte_level(folder):
    """A byte-level tokenizer.json that splits text as Qwen2's, with one control token."""
    (regex,) = (regex for regex, name in PRE_TOKENIZERS.items() if name == "qwen2")
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Sequence([Split(Regex(regex), "isolated"), ByteLevel(False, use_regex=False)])
    trained.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(BYTE_LEVEL_TEXTS * 3, trainer)
    trained.add_special_tokens(["<|im_end|>"])
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return trained


@pytest.mark.parametrize("family", ["qwen2", "internlm3"])
def test_a_byte_level_tokenizer_is_read_back_with_equal_ids(family, tmp_path):
    """The tokenizer is built anew from the lists in the file, as llama.cpp builds it."""
    trained = byte_level(tmp_path / "bytes")
    folder = model(family, tmp_path / "hf", tmp_path / "bytes")
    reader = export(folder, tmp_path / "gguf", tmp_path / "bytes")

    def field(name: str):
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    assert (field("model"), field("pre")) == ("gpt2", "qwen2")
    names, types, merges = field("tokens"), field("token_type"), field("merges")
    end = trained.token_to_id("<|im_end|>")
    assert (field("eos_token_id"), types[end]) == (end, gguf.TokenType.CONTROL)
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3  # rows that no text has
    assert len(names) == len(types) == tokenizer.load(tmp_path / "bytes").vocab_size + 3
    normal = {name: i for i, name in enumerate(names) if types[i] == gguf.TokenType.NORMAL}
    again = Tokenizer(BPE(normal, [tuple(merge.split(" ")) for merge in merges]))
    again.pre_tokenizer, again.decoder = trained.pre_tokenizer, trained.decoder
    unmerged = Tokenizer(BPE(normal, []))
    unmerged.pre_tokenizer = trained.pre_tokenizer
    ours = tokenizer.load(tmp_path / "bytes")
    for text in BYTE_LEVEL_TEXTS:
        ids = trained.encode(text, add_special_tokens=False).ids
        assert again.encode(text).ids == ids == list(ours.encode(text))
        assert again.decode(ids) == text
    assert all(unmerged.encode(text).ids != trained.encode(text).ids for text in BYTE_LEVEL_TEXTS)  # control
