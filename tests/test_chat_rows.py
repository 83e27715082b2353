"""Forms of instruction data: conversations as maps, structs and JSON, XTuner's turns, answers left out of the
loss, questions under `input`, and NaN for a missing value."""

import csv
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat import KINDS
from helpers.corpus import words

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Fault
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.masked_pair import MaskedPair
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.streaming.hf_dataset import StreamedDataset
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError

SHAREGPT = "SharegptStyleInstructionHandler"
OPENAI = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
FROM_VALUE = [{"from": NAMES[message["role"]], "value": message["content"]} for message in OPENAI]
XTUNER = [
    {"system": "Be kind.", "input": "hello", "output": "Hi there"},
    {"input": "2+2?", "output": "4"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return KINDS["v2"](tmp_path_factory.mktemp("tokenizer") / "v2")


def encode(tokenizer, rows, handler=SHAREGPT, **options):
    """The document or fault of every row."""
    encoder = DocumentEncoder(EncoderConfig(str(tokenizer), handler, **options))
    columns = {name: [row.get(name) for row in rows] for name in encoder.handler.columns}
    return next(iter(encoder.encode(columns).values())).documents


def as_lists(document):
    assert isinstance(document, Document), document
    mask = None if document.loss_mask is None else document.loss_mask.tolist()
    return document.tokens.tolist(), mask


FORMS = {
    "from and value": {"conversations": FROM_VALUE},
    "JSON": {"conversations": json.dumps(FROM_VALUE)},
    "JSON with blanks": {"messages": " " + json.dumps(OPENAI, indent=1)},
    "maps": {"conversations": [list(message.items()) for message in FROM_VALUE]},
    "struct of lists": {
        "messages": {key: [message[key] for message in OPENAI] for key in ("role", "content")} | {"x": None}
    },
    "map of lists": {
        "conversations": [(key, [message[key] for message in FROM_VALUE]) for key in ("from", "value")]
    },
    "XTuner": {"conversation": XTUNER},
    "XTuner's name, other keys": {"conversation": FROM_VALUE},
    "columnar XTuner": {
        "conversation": [{"system": None, "output_with_loss": None} | turn for turn in XTUNER]
    },
    "NaN in columns": {"messages": [message | {"name": float("nan")} for message in OPENAI]},
    "twice the same": {"messages": OPENAI, "conversations": FROM_VALUE},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_conversation_give_the_same_document(tokenizer, form):
    expected, other, document = encode(
        tokenizer, [{"messages": OPENAI}, {"messages": OPENAI[:3]}, FORMS[form]]
    )
    assert as_lists(document) == as_lists(expected)
    assert as_lists(other) != as_lists(expected)  # control


CALL_TWICE, CALL_DEEP = (
    {"type": "function", "function": {"name": "f", "arguments": arguments}}
    for arguments in ('{"x": 1, "x": 2}', "[" * 100_000)
)
WRONG_FORMS = {
    "no JSON": ("no conversation", "not a list of messages", {"conversations": "[{'from': 'human'}]"}),
    "JSON of something else": ("no conversation", "not a list of messages", {"conversations": '"hello"'}),
    "an object": ("no conversation", "not a list of messages", {"messages": OPENAI[1]}),
    "lists of different lengths": (
        "no conversation",
        "lists of different lengths: 2 role, 1 content",
        {"messages": {"role": ["user", "assistant"], "content": ["x"]}},
    ),
    "a key twice": (
        "wrong content",
        "has a key twice",
        {"messages": [[("role", "user"), ("role", "user"), ("content", "x")]]},
    ),
    "two conversations": (
        "two conversations",
        "conversations and messages hold different messages",
        {"messages": OPENAI, "conversations": FROM_VALUE[:3]},
    ),
    "an unknown key of a turn": (
        "unknown field",
        "unknown field 'sep'",
        {"conversation": [XTUNER[0] | {"sep": "x"}]},
    ),
    "a turn without an answer": ("wrong content", "content is missing", {"conversation": [{"input": "x"}]}),
    "JSON with a key twice": (
        "repeated key",
        "has the key 'value' twice",
        {"conversations": '[{"from": "human", "value": "a", "value": "b"}]'},
    ),
    "tools with a key twice": (
        "repeated key",
        "has the key 'name' twice",
        {"messages": OPENAI, "tools": '[{"name": "f", "name": "g"}]'},
    ),
    "a call with a key twice": (
        "repeated key",
        "has the key 'name' twice",
        {"conversations": [FROM_VALUE[0], {"from": "function_call", "value": '{"name": "f", "name": "g"}'}]},
    ),
    "arguments with a key twice": (
        "wrong tool call",
        "has the key 'x' twice",
        {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [CALL_TWICE]}]},
    ),
    "arguments that are deeply nested": (
        "wrong tool call",
        "nested too deeply",
        {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [CALL_DEEP]}]},
    ),
    "deeply nested": ("no conversation", "not a list of messages", {"conversations": "[" * 100_000}),
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_wrong_forms_are_counted_by_kind(tokenizer, form):
    kind, detail, row = WRONG_FORMS[form]
    (fault,) = encode(tokenizer, [row])
    assert isinstance(fault, Fault)
    assert fault.kind == kind
    assert detail in fault.detail


def answers(tokenizer, messages, **options):
    """The supervised tokens of a conversation, and whether its ids are those without any `loss`."""
    plain = [{key: message[key] for key in ("role", "content")} for message in messages]
    document, reference = encode(tokenizer, [{"messages": messages}, {"messages": plain}], **options)
    same_ids = np.array_equal(document.tokens, reference.tokens[: len(document.tokens)])
    ids = document.tokens[document.loss_mask]
    return DocumentEncoder(EncoderConfig(str(tokenizer), SHAREGPT)).tokenizer.decode(ids), same_ids


LOSS = [  # fields of the first and the second answer -> supervised text by default, and with --loss-on last
    ({}, {}, "Hi there4", "4"),
    ({"loss": False}, {"loss": True}, "4", "4"),
    ({"weight": 0}, {"weight": 1}, "4", "4"),
    ({"weight": 0.0}, {"weight": 1.0}, "4", "4"),
    ({"weight": 0}, {}, "4", "4"),
    ({"loss": None, "weight": None}, {"loss": float("nan")}, "Hi there4", "4"),
    ({"loss": True}, {}, "Hi there4", "Hi there4"),
    ({"loss": 1, "weight": 1}, {"loss": 0}, "Hi there", "Hi there"),
]


@pytest.mark.parametrize(("first", "second", "supervised", "with_last"), LOSS, ids=str)
def test_a_message_leaves_its_answer_out_of_the_loss(tokenizer, first, second, supervised, with_last):
    messages = [*OPENAI[:2], OPENAI[2] | first, OPENAI[3] | {"loss": False}, OPENAI[4] | second]
    assert answers(tokenizer, messages) == (supervised, True)
    assert answers(tokenizer, messages, loss_on="last") == (with_last, True)


def test_xtuner_leaves_an_answer_out_of_the_loss(tokenizer):
    turns = [XTUNER[0] | {"output_with_loss": False}, XTUNER[1] | {"output_with_loss": True}]
    messages = [*OPENAI[:2], OPENAI[2] | {"loss": False}, *OPENAI[3:]]
    documents = encode(tokenizer, [{"conversation": turns}, {"messages": messages}, {"messages": OPENAI}])
    assert as_lists(documents[0]) == as_lists(documents[1]) != as_lists(documents[2])


WRONG_LOSS = {
    "a fraction": ("wrong loss", "weight is 0.5; it must be true or false, 1 or 0", {"weight": 0.5}),
    "a text": ("wrong loss", "loss is 'no'", {"loss": "no"}),
    "a contradiction": ("wrong loss", "loss and weight contradict each other", {"loss": True, "weight": 0}),
    "nothing left": ("no answer in the loss", "every answer is left out", {"loss": False}),
}


@pytest.mark.parametrize("name", WRONG_LOSS)
def test_wrong_losses_are_counted_by_kind(tokenizer, name):
    kind, detail, fields = WRONG_LOSS[name]
    (fault,) = encode(tokenizer, [{"messages": [OPENAI[1], OPENAI[2] | fields]}])
    assert isinstance(fault, Fault)
    assert (fault.kind, detail in fault.detail) == (kind, True)


def test_only_answers_can_be_in_the_loss(tokenizer):
    (fault,) = encode(tokenizer, [{"messages": [OPENAI[1] | {"loss": True}, OPENAI[2]]}])
    assert isinstance(fault, Fault)
    assert fault.detail == (
        "conversation, message 1: loss is set, but only the assistant's messages can be in the loss"
    )


@pytest.mark.parametrize(
    "handler", ["AlpacaStyleInstructionHandler", "GeneralInstructionHandler", "AlpacaPretrainHandler"]
)
def test_an_input_without_an_instruction_is_the_question(tokenizer, handler):
    rows = [
        {"instruction": "How many legs has a cat?", "output": "4"},
        *(
            {"instruction": blank, "input": "How many legs has a cat?", "output": "4"}
            for blank in ("", "  ", None, float("nan"))
        ),
        {"instruction": "Count.", "input": "How many legs has a cat?", "output": "4"},
        {"instruction": "", "input": " ", "output": "4"},
    ]
    *same, other, fault = encode(tokenizer, rows, handler)
    assert all(as_lists(document) == as_lists(same[0]) for document in same)
    assert as_lists(other) != as_lists(same[0])
    assert isinstance(fault, Fault)


def test_nan_is_a_missing_value(tokenizer):
    nan = float("nan")
    rows = [{"instruction": "Say hi", "input": value, "output": "hi"} for value in (nan, None, "")]
    for handler in ("AlpacaStyleInstructionHandler", "GeneralInstructionHandler", "AlpacaPretrainHandler"):
        documents = encode(tokenizer, rows, handler)
        assert all(as_lists(document) == as_lists(documents[2]) for document in documents)
    text = encode(tokenizer, [{"text": nan}, {"text": 1.5}], "GeneralPretrainHandler")
    assert [fault.kind for fault in text] == ["null", "not text"]


def test_a_history_may_be_json_or_blank(tokenizer):
    history = [["hello", "Hi there"]]
    rows = [
        {"instruction": "2+2?", "output": "4", "history": value}
        for value in (history, json.dumps(history), [], "", None, "[1")
    ]
    *documents, fault = encode(tokenizer, rows, "AlpacaStyleInstructionHandler")
    assert as_lists(documents[0]) == as_lists(documents[1]) != as_lists(documents[2])
    assert all(as_lists(document) == as_lists(documents[2]) for document in documents[2:])
    assert fault.kind == "wrong history"


def conversations(count):
    texts = iter(words(2 * count))
    return [
        [{"from": "human", "value": next(texts)}, {"from": "gpt", "value": next(texts)}] for _ in range(count)
    ]


def arrow_columns(rows):
    """Column of conversations in every type that a parquet file may have for it."""
    message = pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())])
    lists = pyarrow.struct(
        [("from", pyarrow.list_(pyarrow.string())), ("value", pyarrow.list_(pyarrow.string()))]
    )
    texts = [json.dumps(row) for row in rows]
    transposed = [{key: [item[key] for item in row] for key in ("from", "value")} for row in rows]
    maps = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    return {
        "list of structs": pyarrow.array(rows, pyarrow.list_(message)),
        "list of maps": pyarrow.array([[list(item.items()) for item in row] for row in rows], maps),
        "struct of lists": pyarrow.array(transposed, lists),
        "text": pyarrow.array(texts, pyarrow.string()),
        "arrow.json": pyarrow.ExtensionArray.from_storage(
            pyarrow.json_(), pyarrow.array(texts, pyarrow.string())
        ),
    }


@pytest.mark.parametrize("kind", [*arrow_columns([]), "csv"])
def test_every_type_of_a_conversation_preprocessed_and_streamed(tokenizer, tmp_path, kind):
    rows = conversations(8)
    path = tmp_path / f"a.{'csv' if kind == 'csv' else 'parquet'}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["conversations"], *([json.dumps(row)] for row in rows)])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"conversations": arrow_columns(rows)[kind]}), path)
    expected = [
        as_lists(document) for document in encode(tokenizer, [{"conversations": row} for row in rows])
    ]
    preprocess([path], str(tmp_path / "p"), EncoderConfig(str(tokenizer), SHAREGPT))
    pair = MaskedPair.open(str(tmp_path / "p"), DataConfig(), 1 << 20)
    assert [as_lists(pair.document(number)) for number in range(len(pair))] == expected
    datasets.disable_progress_bars()
    data = DataConfig(
        data_path=(str(path),),
        handler_name=SHAREGPT,
        tokenizer_name_or_path=str(tokenizer),
        data_cache_path=str(tmp_path / "cache"),
    )
    if kind == "list of maps":  # the library that streaming uses has no maps
        with pytest.raises(UserError, match=r"map.*does not have a datasets dtype"):
            StreamedDataset(str(path), [path], data)
        return
    streamed = StreamedDataset(str(path), [path], data).documents(np.arange(len(rows)))[0]
    assert [as_lists(streamed[number]) for number in range(len(rows))] == expected
