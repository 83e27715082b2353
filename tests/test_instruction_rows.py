"""Rows of instruction data: faults, absent keys, lengths, templates, and any row at all."""

import json
import re

import numpy as np
import pytest
from helpers.chat import KINDS
from helpers.corpus import sentencepiece_dir
from helpers.instruction_encoders import SHAREGPT, create_encoder, encode_documents
from helpers.instruction_encoders import folders as folders  # a fixture
from helpers.supervised_tokens import lost_by_hand
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.data.document import Fault
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.models.families import chat_template_beside
from ascendspeed.tokenization.chat import Message
from ascendspeed.utils.errors import UserError

H, A = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
WRONG = {  # handler -> kind -> what the row says
    "SharegptStyleInstructionHandler": [
        ("no conversation", "None, not a list", {}),
        ("no conversation", "'text', not a list", {"conversations": "text"}),
        ("no conversation", r"\[\], not a list", {"conversations": []}),
        (
            "no conversation",
            "message 1: a message is an object with role and content",
            {"conversations": ["text", A]},
        ),
        (
            "wrong role",
            "message 1: the role 'boss' does not exist",
            {"conversations": [H | {"from": "boss"}, A]},
        ),
        ("wrong order", "message 1: an assistant message at the beginning", {"conversations": [A, H, A]}),
        ("wrong order", "message 2: a second user message without an answer", {"conversations": [H, H, A]}),
        (
            "wrong order",
            "message 3: an assistant message after the assistant's",
            {"conversations": [H, A, A]},
        ),
        (
            "wrong order",
            "the last message is the user's; it must be the assistant's",
            {"conversations": [H, A, H]},
        ),
        (
            "wrong order",
            "message 3: the system message must come first",
            {"conversations": [H, A, H | {"from": "system"}]},
        ),
        (
            "empty answer",
            "message 2: the assistant message is empty",
            {"conversations": [H, A | {"value": " \n"}]},
        ),
        ("empty question", "message 1: the user message is empty", {"conversations": [H | {"value": ""}, A]}),
        ("wrong content", "message 2: the content is missing", {"conversations": [H, {"from": "gpt"}]}),
        (
            "wrong content",
            "message 2: the content is 4, not a string",
            {"conversations": [H, A | {"value": 4}]},
        ),
        ("unknown field", "message 1: unknown field 'colour'", {"conversations": [H | {"colour": 1}, A]}),
        (
            "wrong tool call",
            "'f\\(' is not JSON",
            {"conversations": [H, {"from": "function_call", "value": "f("}, A]},
        ),
        ("wrong tools", "'f\\(' is not JSON", {"conversations": [H, A], "tools": "f("}),
        ("wrong tools", "tools are a list", {"conversations": [H, A], "tools": {"name": "f"}}),
        ("not text", "'system' is 3", {"conversations": [H, A], "system": 3}),
        (
            "two system messages",
            "'system': the column is 'x', the conversation begins with 'y'",
            {"conversations": [{"from": "system", "value": "y"}, H, A], "system": "x"},
        ),
        ("invalid UTF-8", "", {"conversations": [H, A | {"value": "caf\udce9"}]}),
        ("huge", "bytes", {"conversations": [H, A | {"value": "x" * 600}]}),
    ],
    "AlpacaStyleInstructionHandler": [
        ("no 'output'", "'output' is missing or null", {"instruction": "q"}),
        ("empty answer", "'output' says nothing", {"instruction": "q", "output": ""}),
        ("empty question", "'instruction' says nothing", {"instruction": " ", "output": "a"}),
        ("not text", "'output' is 3, not a text", {"instruction": "q", "output": 3}),
        ("not text", r"'input' is \['x'\], not a text", {"instruction": "q", "input": ["x"], "output": "a"}),
        (
            "wrong history",
            "'history' is 'x', not a list",
            {"instruction": "q", "output": "a", "history": "x"},
        ),
        ("wrong history", "not a list", {"instruction": "q", "output": "a", "history": [["x"]]}),
        (
            "empty answer",
            "message 2: the assistant message is empty",
            {"instruction": "q", "output": "a", "history": [["x", ""]]},
        ),
    ],
    "GeneralInstructionHandler": [
        ("no 'instruction'", "missing", {"output": "q"}),
        ("not text", "'input' is 3", {"instruction": "q", "input": 3, "output": "a"}),
    ],
    "BelleMultiTurnInstructionHandler": [
        (
            "wrong order",
            "Human, Human, Assistant",
            {"instruction": "Human:a\nHuman:b\nAssistant:", "output": "c"},
        ),
        ("wrong order", "Assistant", {"instruction": "Assistant:a\nHuman:b\nAssistant:", "output": "c"}),
        (
            "wrong order",
            "a text before the first Human:",
            {"instruction": "So.\nHuman:b\nAssistant:", "output": "c"},
        ),
        ("wrong order", "a text before", {"instruction": "What is it?", "output": "c"}),
        (
            "empty answer",
            "the Assistant says nothing",
            {"instruction": "Human:a\nAssistant: \nHuman:b\nAssistant:", "output": "c"},
        ),
        ("empty question", "the Human says nothing", {"instruction": "Human:\nAssistant:", "output": "c"}),
    ],
}


@pytest.mark.parametrize(
    ("handler", "wrong"), [(name, case) for name, cases in WRONG.items() for case in cases], ids=str
)
def test_faults_of_rows(folders, handler, wrong):
    kind, says, row = wrong
    encoder = create_encoder(folders, "v2", handler, longest=500)
    good = {"conversations": [H, A], "instruction": "Human:q\nAssistant:", "output": "a"}
    before, fault, after = encode_documents(encoder, good, row, good)
    assert isinstance(fault, Fault), fault
    assert fault.kind == kind
    assert re.search(says, fault.detail)
    assert "\n" not in fault.detail
    assert len(fault.detail) < 250
    assert before.tokens.tolist() == after.tokens.tolist()  # and no other row is touched


def test_a_template_without_tools_says_so(folders):
    encoder = create_encoder(folders, "v1", "SharegptStyleInstructionHandler")
    (result,) = encode_documents(encoder, {"conversations": [H, A, H | {"from": "observation"}, A]})
    assert result == Fault(
        "no place in the template",
        "conversation, message 3: the chat template v1 has no role environment, only system, user, assistant",
    )


def test_columnar_rows_have_null_for_absent_keys(folders):
    encoder = create_encoder(folders, "v2", "SharegptStyleInstructionHandler")
    minimal, columnar = encode_documents(
        encoder,
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "q", "from": None, "tool_calls": None},
                {"role": "assistant", "content": "a"},
            ]
        },
    )
    assert minimal.tokens.tolist() == columnar.tokens.tolist()
    for other in ([], None):
        (result,) = encode_documents(encoder, {"conversations": other, "messages": [H, A]})
        assert result.tokens.tolist() == minimal.tokens.tolist()


def test_cut_to_a_length(folders):
    """Truncated documents are kept and counted, and skipped if no answer remains; the first token is never a
    label."""
    row = {"conversations": SHAREGPT}
    untruncated = encode_documents(create_encoder(folders, "v2", "SharegptStyleInstructionHandler"), row)[0]
    first = int(np.flatnonzero(untruncated.loss_mask)[0])
    for length in (first, first + 1, len(untruncated.tokens) - 1, len(untruncated.tokens), 1000):
        encoder = create_encoder(folders, "v2", "SharegptStyleInstructionHandler", seq_length=length)
        encoded = encoder.encode({name: [row.get(name)] for name in encoder.handler.columns})["packed"]
        (document,) = encoded.documents
        assert encoded.truncated == lost_by_hand([untruncated], length)
        if length == first:
            assert document.kind == "answers beyond --seq-length"
            assert str(len(untruncated.tokens)) in document.detail
        else:
            assert document.tokens.tolist() == untruncated.tokens[:length].tolist()
            assert document.loss_mask.tolist() == untruncated.loss_mask[:length].tolist()


def test_which_template_a_folder_takes(folders, tmp_path):
    for model_type, template in (("internlm2", "v2"), ("internlm3", "v3"), (None, "v2.5")):
        folder = tmp_path / str(model_type)
        KINDS["v2"](folder)
        if model_type:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        job = EncoderConfig(
            str(folder), "AlpacaStyleInstructionHandler", chat_template=chat_template_beside(folder)
        )
        assert DocumentEncoder(job).handler.facts == {"chat_template": template}
    plain = sentencepiece_dir(tmp_path / "plain")
    for family in ("unknown", "qwen2"):
        if family != "unknown":
            (plain / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(UserError, match=f"no chat template is known for a model of family {family} "):
            DocumentEncoder(EncoderConfig(str(plain), "AlpacaStyleInstructionHandler"))
    with pytest.raises(UserError, match="--chat-template v9 does not exist"):
        create_encoder(folders, "v2", "AlpacaStyleInstructionHandler", chat_template="v9")


def test_segments_mark_the_assistants_text(folders):
    """No token of the prompt is supervised; all segments together are the conversation."""
    chat = create_encoder(folders, "v2", "AlpacaStyleInstructionHandler").handler.chat
    conversation = [Message("user", "a"), Message("assistant", "b")]
    segments = chat.training_segments(conversation)
    assert [segment.content for segment in segments if segment.supervised] == ["b", chat.stop_ids[0]]
    ((ids, _),) = chat.encode_segments([[segment for segment in segments if not segment.supervised]])
    assert ids.tolist() == chat.prompt_ids(conversation[:1])


WORDS = st.sampled_from(
    [
        "",
        " ",
        "q",
        "human",
        "gpt",
        "user",
        "assistant",
        "system",
        "tool",
        "function_call",
        "Human:",
        '{"name": "f"}',
        "\ud800",
    ]
)
KEYS = st.sampled_from(
    ["from", "value", "role", "content", "name", "tool_calls", "code", "weight", "arguments"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | WORDS
    | st.sampled_from([InvalidValue("malformed"), InvalidValue.NOT_UTF8]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.breadth
@given(data=st.data())
@pytest.mark.parametrize("handler", list(WRONG))
def test_any_row_gives_a_document_or_a_fault(folders, handler, data):
    encoder = create_encoder(folders, "v2", handler, append_eod=True, seq_length=60)
    (result,) = encode_documents(encoder, {name: data.draw(JSON) for name in encoder.handler.columns})
    assert isinstance(result, Fault) or result.loss_mask[1:].any()
