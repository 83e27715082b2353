"""Chat templates in exports: transformers renders the ids of this project, and `generate` stops by itself."""

import json
import random
import string
from dataclasses import replace

import pytest
import torch
from helpers.chat import KINDS, UNUSED, vocabulary
from helpers.conversion import training_checkpoint
from helpers.tokenizers import stock

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import chat_assets, convert
from ascendspeed.conversion.formats import peft
from ascendspeed.conversion.tokenizer import export
from ascendspeed.models import param_mapping
from ascendspeed.models.families import PRESETS
from ascendspeed.models.lora.adapter import LoraAdapter, LoraPair
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import TEMPLATES, ChatFormat, read_messages, template_name, to_jinja
from ascendspeed.tokenization.chat.jinja_template import ESCAPE

NAMES = {"v1": "v1", "v2": "v2", "v2-old": "v2", "v3": "v3"}
HOSTILE = [*UNUSED, *UNUSED.values(), "<eoh>", "<eoa>", "<s>", "</s>", "<unk>", "<|User|>:", "[", "<", "]"]
WORDS = [*string.printable, "hello ", " 你好", "世界", "🦙", "\n\n", "  ", "{{ x }}", "{% if %}", "'\\n", "▁"]


def text(dice: random.Random) -> str:
    return "".join(dice.choices(dice.choice((HOSTILE, WORDS, HOSTILE + WORDS)), k=dice.randint(1, 9)))


def call(dice: random.Random) -> dict:
    parameters = {text(dice): dice.choice((1, True, None, [2.5, text(dice)], {"é": text(dice)}))}
    function = {"name": dice.choice(("search", "<|im_end|>")), "arguments": parameters}
    if dice.random() < 0.3:
        function["arguments"] = json.dumps(parameters, ensure_ascii=False)
    return dice.choice(({"type": "function", "function": function}, function))


def conversation(dice: random.Random, with_tools: bool) -> tuple[list[dict], list[dict] | None]:
    """System or not, several turns, tool calls and their results, files with a name."""
    messages = [{"role": "system", "content": text(dice)}] if dice.random() < 0.5 else []
    for _ in range(dice.randint(0, 3)):
        messages.append({"role": "user", "content": text(dice)})
        answer = {"role": "assistant", "content": text(dice)}
        if with_tools and dice.random() < 0.6:
            answer |= {"tool_calls": [call(dice) for _ in range(dice.randint(1, 2))]}
            answer |= {"code": text(dice)} if dice.random() < 0.3 else {}
            role = dice.choice(("tool", "environment", "function"))
            name = dice.choice(({}, {"name": "plugin"}, {"name": "interpreter"}, {"name": "other"}))
            messages += [answer, {"role": role, "content": text(dice), **name}]
            answer = {"role": "assistant", "content": text(dice)}
        messages.append(answer)
    named = {"name": dice.choice(("file", "<|im_end|>"))} if with_tools and dice.random() < 0.2 else {}
    messages.append({"role": "user", "content": text(dice), **named})
    tools = [{"type": "function", "function": {"name": "f", "description": text(dice)}} for _ in range(2)]
    return messages, tools if with_tools and dice.random() < 0.5 else None


def exported(kind: str, folder):
    """A chat model's folder as an export writes it -> (chat format, transformers' tokenizer)."""
    KINDS[kind](folder)
    assert export.write(folder) is None
    chat_assets.write(folder, NAMES[kind], folder)
    return ChatFormat(tokenizer.load(folder), NAMES[kind]), stock(folder)


def rendered(hf_tokenizer, messages, tools) -> list[int]:
    return hf_tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.breadth
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", NAMES)
def test_transformers_renders_the_ids_of_the_chat_format(kind, count, tmp_path):
    chat_format, hf_tokenizer = exported(kind, tmp_path / "model")
    dice = random.Random(13)
    escapes = 0
    for _ in range(count):
        messages, tools = conversation(dice, with_tools=bool(chat_format.template.calls))
        expected = chat_format.prompt_ids(read_messages(messages, "talk"), tools=tools)
        assert rendered(hf_tokenizer, messages, tools) == expected, (messages, tools)
        whole = hf_tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        escapes += ESCAPE in whole
    assert escapes > count / 4  # the conversations do hold control strings


def test_control_without_escapes_a_text_ends_the_turn(tmp_path):
    chat_format, hf_tokenizer = exported("v2", tmp_path / "model")
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    expected = chat_format.prompt_ids(read_messages(messages, "talk"))
    assert rendered(hf_tokenizer, messages, None) == expected
    hf_tokenizer.chat_template = to_jinja(chat_format)
    assert rendered(hf_tokenizer, messages, None).count(chat_format.stop_ids[0]) == 2
    assert expected.count(chat_format.stop_ids[0]) == 1


def test_what_a_template_has_no_place_for_is_refused_by_name(tmp_path):
    _, hf_tokenizer = exported("v1", tmp_path / "v1")
    hello = {"role": "user", "content": "hi"}
    for messages, tools, reason in (
        ([{"role": "tool", "content": "x"}], None, "v1 has no such role, only system, user, assistant"),
        ([{**hello, "name": "Ann"}], None, "does not support a name"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, hello], None, "support tools"),
        ([hello], [{"type": "function"}], "support tools"),
    ):
        with pytest.raises(Exception, match=reason):
            rendered(hf_tokenizer, messages, tools)


def says_nothing_but(token: int, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights of a model whose likeliest next token is always the same one."""
    full = {p.name: torch.zeros(p.shape) for p in param_mapping.parameters(config)}
    full["embedding.word_embeddings.weight"] += 1
    full["decoder.final_layernorm.weight"] += 1
    full["output_layer.weight"][token] += 1
    return full


def test_generate_of_transformers_stops_at_the_end_of_the_turn(tmp_path, caplog):
    """A checkpoint whose run.json names the template; the tokenizer's own end is another token, and the
    template in its folder another one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = vocabulary(tmp_path / "tokenizer", UNUSED.values(), UNUSED)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ 'own' }}"}))
    loaded = tokenizer.load(folder)
    end = loaded.required_id("<|im_end|>")
    config = replace(PRESETS["internlm2-tiny"], num_layers=1, vocab_size=loaded.vocab_size)
    training_checkpoint(tmp_path / "ckpt", config, says_nothing_but(end, config), folder, "v2")
    reader = convert.with_tokenizer(convert.open_reader(tmp_path / "ckpt"), None)
    with caplog.at_level("INFO"):
        convert.write_hf(reader, tmp_path / "hf", family="llama")
    assert "the chat template in " in caplog.text
    assert "is left out: the weights were trained with v2" in caplog.text
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = hf_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.tolist() == [end]
    control = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=loaded.eos)
    assert control.shape[1] == prompt["input_ids"].shape[1] + 5  # the tokenizer's own end is never said


def test_a_directory_of_peft_knows_the_template(tmp_path):
    folder = vocabulary(tmp_path / "tokenizer", UNUSED.values(), UNUSED)
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["wo"]}
    pairs = {"model.layers.0.attention.wo": LoraPair(torch.ones(2, 4), torch.ones(4, 2), 1.0)}
    adapter = LoraAdapter(tmp_path, pairs, settings, chat_template="v2", tokenizer=str(folder))
    peft.write(adapter, tmp_path / "adapter")
    assert peft.read(tmp_path / "adapter").chat_template == "v2"
    peft.write(replace(adapter, tokenizer=str(tmp_path / "gone")), tmp_path / "without")
    assert peft.read(tmp_path / "without").chat_template is None


def test_the_name_of_a_template_is_read_back(tmp_path):
    folders = {kind: KINDS[kind](tmp_path / kind) for kind in NAMES}
    for name in TEMPLATES:
        kind = "v1" if name.startswith("v1") else "v3"
        chat_format = ChatFormat(tokenizer.load(folders[kind]), name)
        assert template_name(to_jinja(chat_format)) == template_name(to_jinja(chat_format, ["<s>"])) == name
    for foreign in ("", "{{ bos_token }}", "{#- Chat template v9 of somebody -#}", "{#- Chat template"):
        assert template_name(foreign) is None


def test_text_without_escapes_is_what_it_was(tmp_path):
    """The tokenizer drops the mark only inside the strings of control tokens and behind `<` and `[`."""
    folder = vocabulary(tmp_path / "model", UNUSED.values(), UNUSED)
    assert export.write(folder) is None
    hf_tokenizer, ours = stock(folder), tokenizer.load(folder)
    for sample in (f"a{ESCAPE}b", ESCAPE, f"{ESCAPE}<x", "<|im", "[UNUSED_TOKEN"):
        assert hf_tokenizer(sample, add_special_tokens=False).input_ids == ours.encode(sample).tolist()
