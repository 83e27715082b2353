"""Chat templates in exports: transformers renders the ids of this project, and `generate` stops by itself."""

import json
import random
import string

import pytest
from helpers.chat import KINDS, UNUSED, vocabulary
from helpers.tokenizers import stock

from ascendspeed.conversion import chat_assets
from ascendspeed.conversion.tokenizer import export
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
