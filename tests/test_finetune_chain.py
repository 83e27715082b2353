"""Instruction data, from rows to training: packed or padded, the loss of the same documents is the same."""

import json
from pathlib import Path

import pytest
from helpers import launch
from helpers.chat import KINDS
from helpers.instruction_rows import ROWS

from ascendspeed.config.schema import DataConfig
from ascendspeed.conversion import convert
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.preprocess import preprocess
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import template_name
from ascendspeed.training.metric_lines import TrainLine, read_lines

DOCUMENTS, SEQ, MODEL = (
    16,
    384,
    "--model internlm2-tiny --num-layers 2 --vocab-size 512 --max-position-embeddings 512",
)
TRAIN = "--device cpu --train-iters 2 --lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --split 1,0,0"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Conversations as the published names hold them."""
    work = tmp_path_factory.mktemp("finetune")
    KINDS["v2"](work / "tokenizer")
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:DOCUMENTS]))
    job = EncoderConfig(
        str(work / "tokenizer"), "SharegptStyleInstructionHandler", seq_length=SEQ, chat_template="v2"
    )
    preprocess([work / "rows.jsonl"], str(work / "chat"), job)
    return work


def losses(work: Path, name: str, samples: int, *flags: str) -> tuple[list[float], str]:
    """Losses of two iterations, each over `samples` samples, and what was said."""
    words = (
        *(
            "pretrain_intern.py",
            *MODEL.split(),
            *TRAIN.split(),
            "--seq-length",
            SEQ,
            "--global-batch-size",
            samples,
        ),
        *(
            "--data-path",
            work / "chat",
            "--tokenizer-name-or-path",
            work / "tokenizer",
            "--log-dir",
            work / name,
            *flags,
        ),
    )
    output = launch.must(*words)
    curve = [line.loss for line in read_lines(work / name / "train.log") if isinstance(line, TrainLine)]
    assert len(curve) == 2
    return curve, output


@pytest.fixture(scope="module")
def padded(work) -> list[float]:
    """Losses of all documents, each in a sample of its own."""
    flags = ("--no-pack", "--is-instruction-dataset", "--micro-batch-size", "4", "--save", work / "ckpt")
    padded, output = losses(work, "padded", DOCUMENTS, *flags)
    assert f"{DOCUMENTS} documents in {DOCUMENTS} rows of {SEQ} tokens" in output
    return padded


def test_the_chat_template_of_the_data_reaches_the_export(work, padded, tmp_path):
    """From the .meta of the data to run.json, and from there to the files of an export."""
    reader = convert.open_reader(work / "ckpt")
    assert reader.chat_template == "v2"
    convert.write_hf(convert.with_tokenizer(reader, None), tmp_path / "hf", family="llama")
    assert template_name((tmp_path / "hf" / "chat_template.jinja").read_text()) == "v2"
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    loaded = tokenizer.load(work / "tokenizer")
    assert stops == sorted([loaded.eos, loaded.required_id("<|im_end|>")])
    assert convert.open_reader(tmp_path / "hf").chat_template == "v2"  # an export knows it too


@pytest.mark.parametrize("engine", ["megatron", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_packed_and_padded_train_alike(work, padded, engine):
    from ascendspeed.data.dataset import build_splits

    data = DataConfig(data_path=(str(work / "chat"),), seq_length=SEQ, split="1,0,0")
    rows = len(build_splits(data, 1234, 512, ("train",))["train"])
    assert rows < DOCUMENTS / 1.5  # several documents share a row
    flags = ("--deepspeed", "--zero-stage", "1") if engine == "deepspeed" else ()
    packed, output = losses(work, f"packed-{engine}", rows, *flags)
    assert f"{DOCUMENTS} documents in {rows} rows of {SEQ} tokens, " in output
    assert packed == pytest.approx(padded, abs=1e-5)
    assert abs(packed[0] - packed[1]) > 1e-2  # it learns, so that the second would show another first step
