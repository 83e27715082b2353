from collections import Counter

import pytest

from ascendspeed.data.handlers import HANDLERS, check_columns, handler, screen
from ascendspeed.data.shard import Bad
from ascendspeed.errors import UserError

HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions.USER: Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAdd.\n\n"
)


def test_alpaca_prompt_is_the_published_one_without_its_none():
    made = handler("AlpacaPretrainHandler", ()).texts(
        {
            "instruction": ["Add."] * 5,
            "input": ["1, {2}", "", None, "  ", 3],
            "output": ["3"] * 5,
        }
    )["text"]
    assert made[0] == HEAD + "### Input:\n1, {2}\n\n### Response: ASSISTANT: 3"
    assert made[1] == made[2] == made[3] == HEAD + "### Response: ASSISTANT: 3"
    assert made[4] == 3
    assert "None" not in "".join(made[:4])


def test_an_alpaca_row_without_instruction_or_output_is_none():
    alpaca = handler("AlpacaPretrainHandler", ())
    made = alpaca.texts({"instruction": [None, "a", "a", Bad.MALFORMED], "input": ["b"] * 4, "output": ["c", None, " ", "c"]})
    assert made["text"] == [None, None, " ", Bad.MALFORMED]


def test_general_takes_the_columns_of_json_keys():
    general = handler("GeneralPretrainHandler", ("text", "title", "text"))
    assert general.keys == general.columns == ("text", "title")
    assert general.texts({"text": ["a"], "title": [None]}) == {"text": ["a"], "title": [None]}


def test_errors_list_what_there_is():
    with pytest.raises(UserError, match="did you mean AlpacaPretrainHandler") as error:
        handler("AlpacaHandler", ())
    assert all(name in str(error.value) for name in HANDLERS)
    with pytest.raises(UserError, match=r"f\.csv: AlpacaPretrainHandler needs the column 'output'; there are: instruction, text"):
        check_columns(handler("AlpacaPretrainHandler", ()), "f.csv", ["instruction", "text"])
    check_columns(handler("AlpacaPretrainHandler", ()), "f.csv", ["output", "instruction"])  # input may be absent


def test_screen_counts_what_cannot_be_tokenized():
    skipped: Counter[str] = Counter()
    values = ["good", None, "", " \n\t\u3000", 7, Bad.MALFORMED, "caf\udce9", "\ud800", "x" * 11, "é" * 6, "10 bytes!!", ["a"]]
    kept, size = screen(values, 10, skipped)
    assert kept == ["good", "10 bytes!!"]
    assert size == 14
    expected = {"null": 1, "empty": 1, "whitespace": 1, "not text": 2, "malformed": 1, "invalid UTF-8": 2, "huge": 2}
    assert dict(skipped) == expected
