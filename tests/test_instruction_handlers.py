"""Supervised tokens of instruction data, compared with tables written by hand, for every template and
handler."""

import io
import re

import numpy as np
import pytest
import sentencepiece
from helpers.chat import UNUSED
from helpers.corpus import sentencepiece_dir, words
from helpers.instruction_encoders import OPENAI, SHAREGPT, create_encoder, encode_documents
from helpers.instruction_encoders import folders as folders  # a fixture

from ascendspeed.data.document import Document
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.tokenization.chat import PromptSegment, SegmentEncoder

IM = ["<|im_start|>", "<|im_end|>"]


def expected_tokens(encoder, *runs):
    """Returns (ids, mask) of a table: text and control tokens in order; supervised text is in a tuple."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(encoder.tokenizer.path / "tokenizer.model"))
    ids, supervised = [], []
    for run in runs:
        text = run if isinstance(run, str) else run[0]
        parts = [
            part
            for part in re.split(r"(<s>|</s>|<eo[ah]>|<\|(?:im_\w+|action_\w+|plugin|interpreter)\|>)", text)
            if part
        ]
        for part in parts:
            control = re.fullmatch(r"<.*>", part)
            part_ids = [number(encoder, raw, part)] if control else raw.encode(part)
            ids += part_ids
            supervised += [run is not text] * len(part_ids)
    return ids, supervised


def number(encoder, raw, name):
    """Id of a control token by what the vocabulary calls it."""
    fixed = {"<s>": 1, "</s>": 2}.get(name)
    return fixed or encoder.tokenizer.token_to_id(name) or raw.piece_to_id(UNUSED[name])


def same(document, expected):
    return (document.tokens.tolist(), document.loss_mask.tolist()) == expected


def check(document, expected):
    assert isinstance(document, Document), document
    assert same(document, expected)
    ids, supervised = expected
    # Controls: the comparison detects likely mistakes.
    assert not same(Document(document.tokens, np.roll(document.loss_mask, -1)), expected)
    assert not same(Document(document.tokens, np.roll(document.loss_mask, 1)), expected)
    assert not same(Document(document.tokens, np.ones(len(ids), bool)), expected)
    assert document.tokens.dtype == np.int32
    assert supervised[-1]
    assert ids.count(1) == 1


V1 = (
    "<s><|System|>:Be kind.\n<|User|>:hello\n<|Bot|>:",
    ("Hi there<eoa>",),
    "\n<|User|>:2+2?\n<|Bot|>:",
    ("4<eoa>",),
)
V1_EOH = (
    "<s><|System|>:Be kind.\n<|User|>:hello<eoh>\n<|Bot|>:",
    ("Hi there<eoa>",),
    "\n<|User|>:2+2?<eoh>\n<|Bot|>:",
    ("4<eoa>",),
)
V2 = (
    "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    ("Hi there<|im_end|>",),
    "\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    ("4<|im_end|>",),
)
TABLES = {  # tokenizer, --chat-template -> table
    ("v1", None): V1,
    ("v1", "v1-eoh"): V1_EOH,
    ("v2", "v2"): V2,
    ("v2", None): V2,
    ("v2-old", None): V2,
    ("v3", "v3"): V2,
    ("v3", "v2.5"): V2,
    ("v1-real", None): V1,
    ("v1-real", "v1-eoh"): V1_EOH,
    ("v2-real", None): V2,
    ("v2-real", "v2"): V2,
}
ALPACA = {"instruction": "2+2?", "output": "4", "history": [["hello", "Hi there"]], "system": "Be kind."}
ROWS = [
    ("SharegptStyleInstructionHandler", {"conversations": SHAREGPT, "system": "Be kind."}),
    (
        "SharegptStyleInstructionHandler",
        {"conversations": [{"from": "system", "value": "Be kind."}, *SHAREGPT]},
    ),
    (
        "SharegptStyleInstructionHandler",
        {"messages": [{"role": "system", "content": "Be kind."}, *OPENAI], "system": "Be kind.\n"},
    ),
    ("AlpacaStyleInstructionHandler", ALPACA),
    ("AlpacaStyleInstructionHandler", ALPACA | {"input": ""}),
]


@pytest.mark.breadth
@pytest.mark.parametrize(("name", "template"), TABLES, ids=str)
@pytest.mark.parametrize(("handler", "row"), ROWS, ids=str)
def test_every_template_and_chat_handler(folders, name, template, handler, row):
    encoder = create_encoder(folders, name, handler, chat_template=template)
    expected = TABLES[name, template]
    check(encode_documents(encoder, row)[0], expected_tokens(encoder, *expected))
    last_only = create_encoder(folders, name, handler, chat_template=template, loss_on="last")
    check(
        encode_documents(last_only, row)[0],
        expected_tokens(encoder, "".join([expected[0], expected[1][0], expected[2]]), expected[3]),
    )


def test_tables_by_hand(folders):
    """Tokens of the published vocabularies, written by hand; supervised ones begin with *."""
    for name, template, expected in (
        ("v1-real", None, "<s> < | User | >: hello \n < | Bot | >: *Hi *! *<eoa>"),
        ("v1-real", "v1-eoh", "<s> < | User | >: hello <eoh> \n < | Bot | >: *Hi *! *<eoa>"),
        (
            "v2-real",
            "v2",
            "<s> [UNUSED_TOKEN_146] user \n hello [UNUSED_TOKEN_145] \n "
            "[UNUSED_TOKEN_146] ass istant \n *Hi *! *[UNUSED_TOKEN_145]",
        ),
    ):
        encoder = create_encoder(folders, name, "AlpacaStyleInstructionHandler", chat_template=template)
        raw = sentencepiece.SentencePieceProcessor(model_file=str(encoder.tokenizer.path / "tokenizer.model"))
        (document,) = encode_documents(encoder, {"instruction": "hello", "output": "Hi!"})
        pieces = [raw.id_to_piece(int(i)) for i in document.tokens]
        marked = [
            f"*{piece}" if supervised else piece
            for piece, supervised in zip(pieces, document.loss_mask, strict=True)
        ]
        assert marked == expected.split(" ")


def test_the_input_of_alpaca_stands_on_a_line_of_its_own(folders):
    encoder = create_encoder(folders, "v2", "AlpacaStyleInstructionHandler", system="Be brief.")
    (document,) = encode_documents(encoder, {"instruction": "Add.", "input": "1, 2", "output": " 3\n"})
    prompt = (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nAdd.\n1, 2<|im_end|>\n<|im_start|>assistant\n"
    )
    check(document, expected_tokens(encoder, prompt, (" 3\n<|im_end|>",)))


@pytest.mark.parametrize("name", ["v2", "v2-old", "v3", "v2-real"])
def test_tool_calls_are_supervised_and_tool_results_are_not(folders, name):
    calls = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"c": 1}}'},
    ]
    answers = [{"from": "observation", "value": "22"}, {"from": "gpt", "value": "Warm."}]
    openai = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "w", "parameters": {"c": 1}}]},
        {"role": "tool", "content": "22", "name": None},
        {"role": "assistant", "content": "Warm."},
    ]
    encoder = create_encoder(folders, name, "SharegptStyleInstructionHandler")
    expected = expected_tokens(
        encoder,
        '<s><|im_start|>system name=<|plugin|>\n[{"name": "w"}]<|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n",
        ('<|action_start|><|plugin|>\n{"name": "w", "parameters": {"c": 1}}<|action_end|><|im_end|>',),
        "\n<|im_start|>environment name=<|plugin|>\n22<|im_end|>\n<|im_start|>assistant\n",
        ("Warm.<|im_end|>",),
    )
    for row in (
        {"conversations": calls + answers, "tools": '[{"name": "w"}]'},
        {"messages": openai, "tools": [{"name": "w"}]},
    ):
        check(encode_documents(encoder, row)[0], expected)


def published(encoder, question, answer, eod=False):
    """The published tool's prompt and labels: the whole text encoded at once, as many labels ignored as its
    prompt has tokens."""
    head = (
        "\nBelow is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response "
        "that appropriately completes the request. Please note that you need to think through your response "
        "logically and step by "
        "step.\n"
    )
    raw = sentencepiece.SentencePieceProcessor(model_file=str(encoder.tokenizer.path / "tokenizer.model"))
    prompt = f"{head}### Instruction:\n{question}\n### Response:\n"
    ids = [1, *raw.encode(f"{prompt}{answer}\n"), *([2] if eod else [])]
    ignored = 1 + len(raw.encode(prompt))
    return ids, [False] * ignored + [True] * (len(ids) - ignored)


@pytest.mark.parametrize("name", ["v1", "v1-real", "v2-real"])
@pytest.mark.parametrize("eod", [False, True])
def test_the_published_prompt_and_its_labels(folders, name, eod):
    encoder = create_encoder(folders, name, "GeneralInstructionHandler", append_eod=eod)
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi. ### Response:", "input": "", "output": "Hi\n\nthere 中文🦙"},
        {"instruction": "x", "output": "None"},  # the published tool crashed on this row
    ]
    first, second, third = encode_documents(encoder, *rows)
    check(first, published(encoder, "Add.\n1, 2", "3", eod))
    check(second, published(encoder, "Say hi. ### Response:\n", "Hi\n\nthere 中文🦙", eod))
    check(third, published(encoder, "x\n", "None", eod))
    assert "###None" not in encoder.tokenizer.decode(third.tokens)


def test_a_token_that_would_reach_from_the_prompt_into_the_answer(folders):
    encoder = create_encoder(folders, "v1-real", "GeneralInstructionHandler")
    (document,) = encode_documents(encoder, {"instruction": "x", "output": "\n\ny"})
    ids, _ = published(encoder, "x\n", "\n\ny")
    assert document.tokens.tolist() != ids  # the newline before the answer and those in it make one token
    answer = document.tokens[document.loss_mask]
    assert (
        encoder.tokenizer.decode(answer) == "\n\ny\n"
    )  # the answer's tokens are those that follow the prompt encoded alone
    prompt = document.tokens[~document.loss_mask].tolist()
    assert prompt == published(encoder, "x\n", "z")[0][: len(prompt)]


def test_a_tokenizer_that_puts_a_space_before_every_text(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(300)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    encoder = DocumentEncoder(EncoderConfig(str(tmp_path), "GeneralInstructionHandler"))
    for answer in ("Document 3 says", "x", "\nsays"):
        (document,) = encode_documents(
            encoder, {"instruction": "It ends", "input": "here.", "output": answer}
        )
        check(document, published(encoder, "It ends\nhere.", answer))
    apart = SegmentEncoder(encoder.tokenizer.encode_batch)(
        [[PromptSegment("It ends\n")], [PromptSegment("x", True)]]
    )
    joined = SegmentEncoder(encoder.tokenizer.encode_batch)(
        [[PromptSegment("It ends\n"), PromptSegment("x", True)]]
    )[0][0].tolist()
    assert joined != [
        i for ids, _ in apart for i in ids
    ]  # control: encoded apart, the answer has a space before it


BELLE = "Human:你好\nAssistant:你好！\nHuman: 2+2?\nAssistant:"


@pytest.mark.parametrize("name", ["v1", "v1-real"])
@pytest.mark.parametrize("instruction", [BELLE, BELLE.removesuffix("\nAssistant:")])
def test_belle_supervises_the_last_answer_or_all(folders, name, instruction):
    encoder = create_encoder(folders, name, "BelleMultiTurnInstructionHandler", append_eod=True)
    row = {"instruction": instruction, "output": "4 "}
    before = "你好\n### Response:\n你好！\n### Instruction:\n2+2?"
    check(encode_documents(encoder, row)[0], published(encoder, before, "4", True))
    all_answers = create_encoder(
        folders, name, "BelleMultiTurnInstructionHandler", append_eod=True, loss_on="all"
    )
    ids, supervised = published(encoder, before, "4", True)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(encoder.tokenizer.path / "tokenizer.model"))
    start = published(encoder, "你好", "x")[1].count(False)
    supervised[start : start + len(raw.encode("你好！\n"))] = [True] * len(raw.encode("你好！\n"))
    check(encode_documents(all_answers, row)[0], (ids, supervised))


def test_literal_control_tokens_stay_text(folders):
    encoder = create_encoder(folders, "v2", "SharegptStyleInstructionHandler")
    conversation = [
        {"from": "human", "value": "a<|im_end|>b"},
        {"from": "gpt", "value": "<|im_start|>[UNUSED_TOKEN_145]<s>"},
    ]
    (document,) = encode_documents(encoder, {"conversations": conversation})
    start, end = (encoder.tokenizer.token_to_id(name) for name in IM)
    assert [int(i) for i in document.tokens if i in (start, end, 1, 2)] == [1, start, end, start, end]
    assert (
        encoder.tokenizer.decode(document.tokens[document.loss_mask][:-1])
        == "<|im_start|>[UNUSED_TOKEN_145]<s>"
    )


def test_the_last_turn_ends_once(folders, tmp_path):
    """--append-eod adds a supervised eos, unless the last turn ends with eos itself."""
    plain_folder = {"v1": sentencepiece_dir(tmp_path)}  # without <eoa>
    row = {"instruction": "hello", "output": "Hi"}
    encoder = create_encoder(
        plain_folder, "v1", "AlpacaStyleInstructionHandler", chat_template="v1", append_eod=True
    )
    check(
        encode_documents(encoder, row)[0],
        expected_tokens(encoder, "<s><|User|>:hello\n<|Bot|>:", ("Hi</s>",)),
    )
    assert any("no <eoa>" in note for note in encoder.handler.notes)
    encoder = create_encoder(folders, "v2", "AlpacaStyleInstructionHandler", append_eod=True)
    check(
        encode_documents(encoder, row)[0],
        expected_tokens(
            encoder, "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", ("Hi<|im_end|></s>",)
        ),
    )
    assert (
        create_encoder(folders, "v1", "GeneralInstructionHandler")
        .handler.notes[0]
        .endswith("add --append-eod")
    )
