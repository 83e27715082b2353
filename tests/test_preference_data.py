"""Preference data: the published row formats, bad rows, the pairs on disk, and rows of a batch."""

import json

import numpy as np
import pytest
import torch
from helpers.chat import KINDS
from helpers.log_lines import log_lines

from ascendspeed.config.schema import DataConfig
from ascendspeed.data import dataset
from ascendspeed.data.document import Fault
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.preference_pairs import PreferencePairs
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError

ALPACA, SHAREGPT, HUGGING_FACE = (
    f"{name}PairwiseHandler" for name in ("AlpacaStyle", "SharegptStyle", "HuggingFace")
)
QUESTION, GOOD, BAD = "what is a verb", "a word", "a bird"
ROW = {"instruction": QUESTION, "chosen": GOOD, "rejected": BAD}
TURN = [{"from": "human", "value": QUESTION}]
SHAREGPT_ROW = {
    "conversations": TURN,
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": BAD},
}
USER = {"role": "user", "content": QUESTION}
ANSWERS = {
    name: [{"role": "assistant", "content": text}] for name, text in (("chosen", GOOD), ("rejected", BAD))
}
WHOLE = {name: [USER, *messages] for name, messages in ANSWERS.items()}
EQUAL_ROWS = [
    (ALPACA, ROW),
    (SHAREGPT, SHAREGPT_ROW),
    (SHAREGPT, {**SHAREGPT_ROW, "chosen": GOOD, "rejected": json.dumps(SHAREGPT_ROW["rejected"])}),
    (HUGGING_FACE, {"prompt": [USER], **ANSWERS}),
    (HUGGING_FACE, WHOLE),
    (HUGGING_FACE, {"prompt": QUESTION, **WHOLE}),
    (HUGGING_FACE, {"prompt": QUESTION, **ANSWERS}),
    (HUGGING_FACE, {name: json.dumps(value) for name, value in WHOLE.items()}),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return KINDS["v2"](tmp_path_factory.mktemp("tokenizer") / "v2")


def encode(tokenizer, handler, *rows, **options):
    encoder = DocumentEncoder(EncoderConfig(str(tokenizer), handler, **options))
    columns = {name: [row.get(name) for row in rows] for name in encoder.handler.columns}
    return encoder, encoder.encode(columns)["preference"].documents


def instruction_document(tokenizer, answer, **options):
    """The document that the instruction handler makes of the question and one answer: the oracle."""
    encoder = DocumentEncoder(EncoderConfig(str(tokenizer), "AlpacaStyleInstructionHandler", **options))
    row = {"instruction": QUESTION, "output": answer}
    columns = {name: [row.get(name)] for name in encoder.handler.columns}
    return encoder.encode(columns)["packed"].documents[0]


@pytest.mark.parametrize(("handler", "row"), EQUAL_ROWS)
def test_both_conversations_are_those_of_instruction_data(tokenizer, handler, row):
    _, (pair,) = encode(tokenizer, handler, row, system="be kind")
    expected = [instruction_document(tokenizer, answer, system="be kind") for answer in (GOOD, BAD)]
    parts = [(part.tokens.tolist(), part.loss_mask.tolist()) for part in pair.parts()]
    assert parts == [(document.tokens.tolist(), document.loss_mask.tolist()) for document in expected]
    assert parts[0] != parts[1]  # control: the pair swapped


def test_earlier_answers_are_not_in_the_loss(tokenizer):
    _, (pair,) = encode(tokenizer, ALPACA, {**ROW, "history": [["one", "two"]]})
    chosen = pair.parts()[0]
    assert chosen.loss_mask.sum() == instruction_document(tokenizer, GOOD).loss_mask.sum()
    assert len(chosen.tokens) > len(instruction_document(tokenizer, GOOD).tokens)


def test_texts_are_used_without_a_template(tokenizer):
    encoder, (pair,) = encode(tokenizer, HUGGING_FACE, {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD})
    chosen, rejected = pair.parts()
    prompt = encoder.tokenizer.encode_batch([QUESTION])[0].tolist()
    for part, answer in ((chosen, GOOD), (rejected, BAD)):
        assert part.tokens.tolist()[: len(prompt) + 1] == [encoder.tokenizer.bos, *prompt]
        assert not part.loss_mask[: len(prompt) + 1].any()
        assert part.loss_mask[len(prompt) + 1 :].all()
        assert part.tokens[-1] == encoder.tokenizer.eos
        assert answer in encoder.tokenizer.decode(part.tokens)


FAULTS = [
    (ALPACA, {**ROW, "chosen": BAD}, "equal answers"),
    (ALPACA, {**ROW, "rejected": " "}, "empty answer"),
    (ALPACA, {**ROW, "rejected": None}, "no 'rejected'"),
    (ALPACA, {**ROW, "chosen": 7}, "not text"),
    (ALPACA, {**ROW, "instruction": ""}, "empty question"),
    (SHAREGPT, {**SHAREGPT_ROW, "conversations": None}, "no conversation"),
    (SHAREGPT, {**SHAREGPT_ROW, "chosen": {"from": "human", "value": GOOD}}, "wrong order"),
    (SHAREGPT, {**SHAREGPT_ROW, "chosen": [SHAREGPT_ROW["chosen"]] * 2}, "wrong order"),
    (SHAREGPT, {**SHAREGPT_ROW, "conversations": [*TURN, SHAREGPT_ROW["chosen"]]}, "wrong order"),
    (SHAREGPT, {**SHAREGPT_ROW, "chosen": {"from": "gpt", "value": GOOD, "loss": False}}, "wrong loss"),
    (HUGGING_FACE, {"prompt": [USER], **WHOLE}, "wrong order"),
    (HUGGING_FACE, {"prompt": "another question", **WHOLE}, "two prompts"),
    (HUGGING_FACE, {"chosen": GOOD, "rejected": BAD}, "no 'prompt'"),
    (HUGGING_FACE, {**ANSWERS}, "no 'prompt'"),
    (HUGGING_FACE, {"prompt": QUESTION, **ANSWERS, "rejected": None}, "no 'rejected'"),
]


@pytest.mark.parametrize(("handler", "row", "kind"), FAULTS)
def test_bad_rows_are_counted_by_kind(tokenizer, handler, row, kind):
    _, (result,) = encode(tokenizer, handler, row)
    assert isinstance(result, Fault), result
    assert result.kind == kind


def rows(count):
    return [
        {**ROW, "instruction": f"{QUESTION} {n}", "rejected": f"{BAD} {n}" * (1 + n % 3)}
        for n in range(count)
    ]


def written(folder, tokenizer, count=12, **options):
    (folder / "a.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in [*rows(count), {**ROW, "chosen": BAD}])
    )
    with log_lines() as lines:
        job = EncoderConfig(str(tokenizer), ALPACA, **options)
        facts = preprocess([folder / "a.jsonl"], str(folder / "p"), job, overwrite=True)
    return lines, facts["preference"]


def test_pairs_on_disk_lie_beside_each_other(tmp_path, tokenizer):
    lines, _ = written(tmp_path, tokenizer)
    assert any("12 preference pairs" in line and "equal answers" in line for line in lines)
    data = PreferencePairs.open(str(tmp_path / "p"), DataConfig(), 1 << 20)
    _, documents = encode(tokenizer, ALPACA, *rows(12))
    for number, document in enumerate(documents):
        read = data.document(number)
        assert read.tokens.tolist() == document.tokens.tolist()
        assert read.loss_mask.tolist() == document.loss_mask.tolist()
        assert read.rejected_start == document.rejected_start
    assert dataset.dataset_kind(f"{tmp_path}/p") is PreferencePairs


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path, tokenizer):
    lengths = [len(document.tokens) for document in encode(tokenizer, ALPACA, *rows(12))[1]]
    limit = sorted(lengths)[5]
    kept = sum(length <= limit for length in lengths)
    _, facts = written(tmp_path, tokenizer, seq_length=limit)
    assert facts["skipped"] == {"equal answers": 1, "pair longer than --seq-length": 12 - kept}
    written(tmp_path, tokenizer)
    data = PreferencePairs.open(str(tmp_path / "p"), DataConfig(), 1 << 20)
    samples = data.samples("train", DataConfig(split="1,0,0", seq_length=limit), 1)
    assert samples.samples_per_epoch == kept
    assert (
        f"{12 - kept} left out, as chosen and rejected together exceed --seq-length {limit}" in samples.note
    )


@pytest.mark.parametrize("packing", ["none", "first-fit"])
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_hold_whole_pairs(tmp_path, tokenizer, packing, streamed):
    written(tmp_path, tokenizer)
    path = str(tmp_path / ("a.jsonl" if streamed else "p"))
    config = DataConfig(
        data_path=(path,),
        split="1,0,0",
        seq_length=256,
        packing=packing,
        tokenizer_name_or_path=str(tokenizer),
        handler_name=ALPACA if streamed else None,
    )
    samples = dataset.build_splits(config, 1, 1 << 20, ["train"], pairs=True)["train"]
    (batch,) = dataset.micro_batches(samples, 0, 2, 2)
    expected = {tuple(document.tokens.tolist()) for document in encode(tokenizer, ALPACA, *rows(12))[1]}
    assert batch.pairs == 2 if packing == "none" else batch.pairs > 2
    for pair in range(batch.pairs):
        inside = (batch.conversations // 2 == pair).nonzero()
        row = int(inside[-1, 0])
        columns = inside[inside[:, 0] == row, 1]
        tokens = batch.tokens[row, columns].tolist()
        assert any(tuple(tokens[: len(document)]) == document for document in expected)
    # Every answer has its own number, and the labels of a conversation are its tokens, shifted.
    supervised = batch.loss_mask.bool()
    assert batch.conversations[supervised].unique().tolist() == list(range(2 * batch.pairs))
    rows_, columns = supervised.nonzero(as_tuple=True)
    assert torch.equal(batch.labels[rows_, columns], batch.tokens[rows_, (columns + 1).clamp(max=255)])
    # A pair and the answers of a pair do not attend to each other: positions restart at each conversation.
    assert int((batch.position_ids == 0).sum()) >= 2 * batch.pairs


def test_pairs_and_other_data_are_not_confused(tmp_path, tokenizer):
    written(tmp_path, tokenizer)
    config = DataConfig(data_path=(str(tmp_path / "p"),), split="1,0,0", seq_length=256)
    with pytest.raises(UserError, match="holds preference pairs"):
        dataset.build_splits(config, 1, 1 << 20, ["train"])
    (tmp_path / "i.jsonl").write_text(json.dumps({"instruction": QUESTION, "output": GOOD}) + "\n")
    job = EncoderConfig(str(tokenizer), "AlpacaStyleInstructionHandler")
    preprocess([tmp_path / "i.jsonl"], str(tmp_path / "q"), job)
    other = DataConfig(data_path=(str(tmp_path / "q"),), split="1,0,0", seq_length=256)
    with pytest.raises(UserError, match="holds no preference pairs"):
        dataset.build_splits(other, 1, 1 << 20, ["train"], pairs=True)
    preprocess([tmp_path / "i.jsonl"], str(tmp_path / "p"), job)
    with pytest.raises(UserError, match="p_packed or"):
        dataset.build_splits(config, 1, 1 << 20, ["train"], pairs=True)
    cut = DataConfig(data_path=(f"{tmp_path}/p_preference",), split="1,0,0", packing="internevo-cut")
    with pytest.raises(UserError, match="none or first-fit"):
        dataset.build_splits(cut, 1, 1 << 20, ["train"], pairs=True)


def test_half_a_pair_is_refused(tmp_path, tokenizer):
    from ascendspeed.data.indexed.masked_pair import PREFERENCE, MaskedPairWriter

    with MaskedPairWriter(tmp_path / "p", PREFERENCE) as writer:
        writer.add(np.arange(9), np.array([3, 3, 3], np.int32), np.ones(9, bool))
        writer.commit({})
    with pytest.raises(UserError, match="3 conversations are not pairs"):
        PreferencePairs.open(str(tmp_path / "p"), DataConfig(), 100)
