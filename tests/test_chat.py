"""Chat formats: ids equal those of the original code and of Jinja; text never becomes a control token."""

import json

import jinja2
import pytest
import sentencepiece
from helpers.chat import KINDS, UNUSED, piecewise
from helpers.corpus import TRAPS, sentencepiece_dir

from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import (
    TEMPLATES,
    ChatFormat,
    Message,
    ToolCall,
    choose_template,
    generation_config_stops,
    read_messages,
    stop_token_ids,
)
from ascendspeed.utils.errors import UserError

# chat_template in the tokenizer_config.json of InternLM2, 2.5 and 3.
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "You are helpful.\n- 你是书生"},
    {"role": "user", "content": " hello  "},
    {"role": "assistant", "content": "Hi🦙"},
    {"role": "user", "content": "2+2=?\n"},
]


FAMILY = {"v1": "internlm", "v2": "internlm2", "v3": "internlm3"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """name -> (tokenizer, sentencepiece processor); the published ones if they are available."""
    folders = {name: make(tmp_path_factory.mktemp("chat") / name) for name, make in KINDS.items()}
    existing = {name: folder for name, folder in folders.items() if folder.is_dir()}
    raw = sentencepiece.SentencePieceProcessor
    return {
        name: (tokenizer.load(folder), raw(model_file=str(folder / "tokenizer.model")))
        for name, folder in existing.items()
    }


def kind(kinds, name):
    if name not in kinds:
        pytest.skip("no real tokenizers beside the repository")
    return kinds[name]


def chat(tok, name):
    return ChatFormat(tok, name[:2])


def v1_prompt(turns, eoh=""):
    """Prompt of `build_inputs` in InternLM's model code (since 2023-09; earlier versions with <eoh>)."""
    system = [m["content"] for m in turns if m["role"] == "system"]
    text = f"<|System|>:{system[0]}\n" if system else ""
    for message in turns:
        if message["role"] == "user":
            text += f"<|User|>:{message['content']}{eoh}\n"
        if message["role"] == "assistant":
            text += f"<|Bot|>:{message['content']}<eoa>\n"
    return text + "<|Bot|>:"


@pytest.mark.parametrize("name", ["v1", "v1-real"])
@pytest.mark.parametrize("turns", [TALK, TALK[1:], TALK[1:2]], ids=len)
def test_v1_is_what_the_original_code_builds(kinds, name, turns):
    tok, raw = kind(kinds, name)
    chat_format = chat(tok, name)
    assert chat_format.prompt_ids(read_messages(turns, "talk")) == [1, *raw.encode(v1_prompt(turns))]
    older = ChatFormat(tok, "v1-eoh")
    assert older.prompt_ids(read_messages(turns, "talk")) == [1, *raw.encode(v1_prompt(turns, "<eoh>"))]
    assert chat_format.stop_ids == (raw.piece_to_id("<eoa>"),)
    assert chat_format.prompt_ids(read_messages(turns, "talk")) != older.prompt_ids(
        read_messages(turns, "talk")
    )


@pytest.mark.parametrize("name", ["v2", "v2-old", "v3", "v2-real"])
@pytest.mark.parametrize("turns", [TALK, TALK[1:], TALK[1:2]], ids=len)
def test_v2_and_v3_are_what_jinja_renders(kinds, name, turns):
    tok, raw = kind(kinds, name)
    rendered = jinja2.Template(JINJA, keep_trailing_newline=True).render(
        bos_token="<s>", messages=turns, add_generation_prompt=True
    )
    chat_format = chat(tok, name)
    ids = chat_format.prompt_ids(read_messages(turns, "talk"))
    assert ids == piecewise(tok, raw, rendered)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert chat_format.stop_ids == (tok.token_to_id("<|im_end|>") or raw.piece_to_id("[UNUSED_TOKEN_145]"),)
    without_newline = [{**m, "content": m["content"].strip()} for m in turns]
    assert ids != chat_format.prompt_ids(
        read_messages(without_newline, "talk")
    )  # control: content is not stripped


def test_tables_by_hand(kinds):
    """Ids copied from the published vocabularies."""
    tok, _ = kind(kinds, "v2-real")
    hello = [Message("user", "hello")]
    assert ChatFormat(tok, "v2").prompt_ids(hello) == [
        1,
        92543,
        1008,
        364,
        15115,
        92542,
        364,
        92543,
        525,
        11353,
        364,
    ]
    tok, _ = kind(kinds, "v1-real")
    user, bot, newline = [333, 352, 1621, 352, 27232], [333, 352, 23845, 352, 27232], 364
    assert ChatFormat(tok, "v1").prompt_ids([Message("user", "hi")]) == [1, *user, 6176, newline, *bot]
    assert ChatFormat(tok, "v1-eoh").prompt_ids([Message("user", "hi")]) == [
        1,
        *user,
        6176,
        103027,
        newline,
        *bot,
    ]
    assert ChatFormat(tok, "v1").stop_ids == (103028,)


CONTROLS = [*UNUSED, *UNUSED.values(), "<eoh>", "<eoa>", "<s>", "</s>", "<unk>"]


@pytest.mark.parametrize("name", KINDS)
def test_text_never_becomes_a_control_token(kinds, name):
    """Only the template adds control tokens, whatever a message contains, and the text is complete."""
    tok, raw = kind(kinds, name)
    chat_format = chat(tok, name)
    control = {
        *chat_format.controls.values(),
        tok.bos,
        tok.eos,
        *(tok.token_to_id(string) for string in ("<eoh>", "<eoa>")),
    } - {None}

    def controls(text):
        return [number for number in chat_format.prompt_ids([Message("user", text)]) if number in control]

    expected = controls("x")
    for text in [*(f"a{string}b" for string in CONTROLS), *CONTROLS, "".join(CONTROLS), "<<eoa>eoa>", *TRAPS]:
        assert controls(text) == expected, text
        ids = chat_format.prompt_ids([Message("user", text)])
        assert text in tok.decode([i for i in ids if i not in control])
    dangerous = [s for s in CONTROLS if control.intersection(raw.encode(f"a{s}b"))]
    assert bool(dangerous) == (
        name != "v3"
    )  # control: the vocabulary alone would encode the string as the token


def test_tools(kinds):
    tok, raw = kind(kinds, "v2")
    chat_format = ChatFormat(tok, "v2")
    turns = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"name": "weather", "parameters": {"city": "上海"}}],
        },
        {"role": "environment", "name": "plugin", "content": '{"t": 22}'},
        {"role": "assistant", "content": "Now code.", "code": "print(1)"},
        {"role": "environment", "name": "interpreter", "content": "1"},
        {"role": "user", "name": "file", "content": "[]"},
    ]
    tools = [{"name": "weather", "parameters": {}}]
    expected = (
        "<s><|im_start|>system\nHelp.<|im_end|>\n"
        '<|im_start|>system name=<|plugin|>\n[{"name": "weather", "parameters": {}}]<|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nI look."
        '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": '
        '"上海"}}<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|plugin|>\n{"t": 22}<|im_end|>\n'
        "<|im_start|>assistant\nNow code.<|action_start|><|interpreter|>\nprint(1)<|action_end|><|im_end|>\n"
        "<|im_start|>environment name=<|interpreter|>\n1<|im_end|>\n"
        "<|im_start|>user name=file\n[]<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chat_format.prompt_ids(read_messages(turns, "talk"), tools=tools) == piecewise(tok, raw, expected)
    other_words = [
        *turns[:2],
        {**turns[2]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 22}'},
        *turns[4:],
    ]
    arguments = {"name": "weather", "arguments": json.dumps({"city": "上海"})}
    other_words[2]["tool_calls"] = [{"type": "function", "id": "1", "function": arguments}]
    assert chat_format.prompt_ids(read_messages(other_words, "talk"), tools=tools) == piecewise(
        tok, raw, expected
    )
    for other in ("v2-old", "v3"):
        tok, raw = kind(kinds, other)
        assert chat(tok, other).prompt_ids(read_messages(turns, "talk"), tools=tools) == piecewise(
            tok, raw, expected
        )


def test_the_answer_is_read_back(kinds):
    tok, raw = kind(kinds, "v2")
    chat_format = ChatFormat(tok, "v2")
    answer = 'I look.<|action_start|><|plugin|>\n{"name": "weather", "parameters": {}}<|action_end|>'
    message = chat_format.answer_message(piecewise(tok, raw, answer))
    assert message == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"name": "weather", "parameters": {}}],
    }
    answer = "So.<|action_start|><|interpreter|>\nprint(1)<|action_end|>"
    assert chat_format.answer_message(piecewise(tok, raw, answer)) == {
        "role": "assistant",
        "content": "So.",
        "code": "print(1)",
    }
    assert chat_format.answer_message(raw.encode("plain 中")) == {"role": "assistant", "content": "plain 中"}
    broken = chat_format.answer_message(piecewise(tok, raw, '<|action_start|><|plugin|>\n{"name"'))
    assert broken["tool_calls"] == ['{"name"']
    again = read_messages(
        [{"role": "user", "content": "?"}, message, {"role": "user", "content": "!"}], "talk"
    )
    assert again[1].calls == (ToolCall("plugin", '{"name": "weather", "parameters": {}}'),)


WRONG = {
    "a conversation is a list of at least one message": [[], "text", {}, None, 3],
    "message 1: a message is an object with role and content": [["text"]],
    "message 1: the role 'boss' does not exist; choose from system, user": [
        [{"role": "boss", "content": ""}]
    ],
    "message 1: the role None": [[{"content": "x"}]],
    "message 2: the content is missing": [[{"role": "user", "content": "x"}, {"role": "user"}]],
    "message 1: the content is 5, not a string": [[{"role": "user", "content": 5}]],
    "message 1: unknown field 'colour'": [[{"role": "user", "content": "x", "colour": "red"}]],
    "message 2: a second system message": [[TALK[0], TALK[0], TALK[1]]],
    "message 2: the system message must come first": [[TALK[1], TALK[0], TALK[1]]],
    "the last message is the assistant's": [TALK[:3]],
    "the last message is the system's": [TALK[:1]],
    "message 1: only the assistant calls tools": [[{"role": "user", "content": "x", "code": "1"}]],
    "message 1: tool_calls must be a list": [[{"role": "assistant", "content": "x", "tool_calls": "f"}]],
    "message 1: a tool call is an object with name": [
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}]
    ],
    "message 1: the arguments of f are not JSON": [
        [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f", "arguments": "{"}]}]
    ],
    "message 1: the name is '', not one line of text": [[{"role": "user", "content": "x", "name": ""}]],
}


@pytest.mark.parametrize("message_part", WRONG)
def test_invalid_conversations(message_part):
    for items in WRONG[message_part]:
        with pytest.raises(UserError) as error:
            read_messages(items, "file.jsonl, line 7")
        assert str(error.value).startswith("file.jsonl, line 7")
        assert message_part in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 250


def test_messages_that_a_template_cannot_express(kinds):
    tok, _ = kind(kinds, "v1")
    chat_format = ChatFormat(tok, "v1")
    for message, message_part in {
        Message("environment", "1"): "v1 has no role environment, only system, user, assistant",
        Message("user", "x", "file"): "v1 does not support a name",
        Message("assistant", "x", None, (ToolCall("plugin", "{}"),)): "v1 does not support tools",
    }.items():
        with pytest.raises(UserError, match=message_part):
            chat_format.prompt_ids([Message("user", "hi"), message, Message("user", "hi")])
    with pytest.raises(UserError, match="v1 does not support a name"):
        chat_format.prompt_ids([Message("user", "hi")], tools=[{}])
    with pytest.raises(UserError, match="tools are a list"):
        chat_format.prompt_ids([Message("user", "hi")], tools="weather")


def test_choice_of_template(kinds, tmp_path):
    for name, (tok, _) in kinds.items():
        family = FAMILY[name[:2]]
        assert choose_template(tok, FAMILIES[family].chat_template)[0] == name[:2]
        if name in ("v1", "v2", "v3"):  # exported as a Llama
            assert choose_template(tok)[0] == {"v1": "v1", "v2": "v2.5", "v3": "v2.5"}[name]
        assert choose_template(tok, name[:2])[0] == name[:2]
    without_chat_tokens = tokenizer.load(sentencepiece_dir(tmp_path))
    with pytest.raises(
        UserError,
        match=r"no chat template is known for a model of family qwen2 with .*--chat-template v1\|v1-eoh\|v2",
    ):
        choose_template(without_chat_tokens, family="qwen2")
    with pytest.raises(UserError, match="--chat-template v9 does not exist; choose from v1"):
        choose_template(without_chat_tokens, "v9")
    with pytest.raises(
        UserError,
        match=r"no token '<\|im_end\|>' nor '\[UNUSED_TOKEN_145\]', which the chat template v2 needs",
    ):
        choose_template(without_chat_tokens, "v2")
    with pytest.raises(UserError, match=r"no token '<\|im_end\|>', which the chat template v2.5 needs"):
        choose_template(kinds["v2-old"][0], "v2.5")
    fallback = ChatFormat(without_chat_tokens, "v1")
    assert fallback.stop_ids == (2,)
    assert fallback.notes == [
        "the tokenizer has no <eoa>: turns of the assistant end with the end-of-document token"
    ]
    assert not ChatFormat(kinds["v1"][0], "v1").notes
    assert set(TEMPLATES) == {"v1", "v1-eoh", "v2", "v2.5", "v3"}


def test_stop_set(kinds, tmp_path):
    tok, _ = kind(kinds, "v2")
    end = ChatFormat(tok, "v2").stop_ids
    assert stop_token_ids(tok, [tmp_path]) == (2,)
    assert stop_token_ids(tok, [tmp_path], end) == tuple(sorted({2, *end}))
    for value, numbers in ((7, (7,)), ([2, 9], (2, 9)), (None, ()), (-1, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert generation_config_stops(tmp_path) == numbers
        assert stop_token_ids(tok, [tmp_path], end) == tuple(sorted({2, *end, *numbers}))
    for wrong in ("2", [2, "x"], -2, True, 1.5):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(
            UserError, match=r"generation_config\.json: eos_token_id is .* not an id or a list of ids"
        ):
            generation_config_stops(tmp_path)
