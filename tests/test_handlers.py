import numpy as np
import pytest

from ascendspeed.data.document import Document, Fault
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.registry import HANDLERS, check_columns, create_handler
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.utils.errors import UserError


class Words:
    """A tokenizer whose ids are the number of words and of bytes."""

    def encode_batch(self, texts):
        return [np.array([len(text.split()), len(text.encode())]) for text in texts]


def create(name, keys=("text",), **options):
    return create_handler(EncoderConfig("", name, keys, **options), Words())


HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite "
    "answers to the user's questions.USER: Below is an instruction that describes a task. Write a response "
    "that appropriately "
    "completes the request.\n\n### Instruction:\nAdd.\n\n"
)


def test_alpaca_prompt_is_the_published_one_without_its_none():
    texts = create("AlpacaPretrainHandler").texts(
        {
            "instruction": ["Add."] * 5,
            "input": ["1, {2}", "", None, "  ", 3],
            "output": ["3"] * 5,
        }
    )["text"]
    assert texts[0] == HEAD + "### Input:\n1, {2}\n\n### Response: ASSISTANT: 3"
    assert texts[1] == texts[2] == texts[3] == HEAD + "### Response: ASSISTANT: 3"
    assert texts[4] == 3
    assert "None" not in "".join(texts[:4])


def test_alpaca_row_without_instruction_or_output_has_no_text():
    alpaca = create("AlpacaPretrainHandler")
    result = alpaca.texts(
        {
            "instruction": [None, "a", "a", InvalidValue("malformed", "not a JSON object")],
            "input": [" ", "b", "b", "b"],
            "output": ["c", None, " ", "c"],
        }
    )
    assert result["text"] == [None, None, " ", InvalidValue("malformed", "not a JSON object")]


def test_general_takes_the_columns_of_json_keys():
    general = create("GeneralPretrainHandler", ("text", "title", "text"))
    assert general.keys == general.columns == ("text", "title")
    assert general.texts({"text": ["a"], "title": [None]}) == {"text": ["a"], "title": [None]}


def test_errors_list_what_there_is():
    with pytest.raises(UserError, match="did you mean AlpacaPretrainHandler") as error:
        create("AlpacaHandler")
    assert all(name in str(error.value) for name in HANDLERS)
    for typed, meant in {
        "AlpacaStyle": "AlpacaStyleInstructionHandler or AlpacaStylePairwiseHandler",
        "sharegpt": "SharegptStyleInstructionHandler or SharegptStylePairwiseHandler",
        "Alpaca": "AlpacaPretrainHandler or AlpacaStyleInstructionHandler or AlpacaStylePairwiseHandler",
        "GeneralInstructHandler": "GeneralInstructionHandler",
    }.items():
        with pytest.raises(UserError, match=rf"did you mean {meant}\? There are"):
            create(typed)
    with pytest.raises(
        UserError,
        match=r"f\.csv: AlpacaPretrainHandler needs the column 'output'; there are: instruction, text",
    ):
        check_columns(create("AlpacaPretrainHandler"), "f.csv", ["instruction", "text"])
    check_columns(create("AlpacaPretrainHandler"), "f.csv", ["output", "instruction"])  # input may be absent


def test_untokenizable_values_are_faults_in_order():
    values = [
        "good",
        None,
        "",
        " \n\t\u3000",
        7,
        InvalidValue("malformed", "not a JSON object"),
        "caf\udce9",
        "\ud800",
        "x" * 11,
        "é" * 6,
        "10 bytes!!",
        ["a"],
    ]
    encoded = create("GeneralPretrainHandler", longest=10).encode_rows({"text": values})["text"]
    kinds = [
        "null",
        "empty",
        "whitespace",
        "not text",
        "malformed",
        "invalid UTF-8",
        "invalid UTF-8",
        "huge",
        "huge",
    ]
    details = {4: "not a JSON object", 7: "11 bytes", 8: "12 bytes"}
    assert encoded.documents[1:10] == [Fault(kind, details.get(i, "")) for i, kind in enumerate(kinds)]
    assert [str(encoded.documents[i]) for i in (2, 5)] == ["empty", "not a JSON object (malformed)"]
    assert encoded.documents[11] == Fault("not text")
    ids = [document.tokens.tolist() for document in encoded.documents if isinstance(document, Document)]
    assert ids == [[1, 4], [2, 10]]
    assert encoded.bytes == 14


def test_a_setting_that_means_nothing_to_a_handler_is_an_error():
    for option, value in {"chat_template": "v2", "system": "x", "loss_on": "all"}.items():
        with pytest.raises(
            UserError,
            match=f"--{option.replace('_', '-')} means nothing to GeneralInstructionHandler, only to ",
        ):
            create("GeneralInstructionHandler", **{option: value})
