"""The generation command: flags, prompts, output files, streaming, conversations, and the benchmark."""

import contextlib
import importlib.util
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import launch, oracle, recipes
from helpers.chat import UNUSED, piecewise, vocabulary
from helpers.generate_command import MODEL, folder, hf_continuation, records, reference, run
from helpers.log_lines import log_lines
from safetensors.torch import save_file

from ascendspeed.inference import args, benchmark_report, prompts
from ascendspeed.inference import stdin as questions
from ascendspeed.inference.benchmark_report import (
    BatchOutOfMemory,
    GenerationTimer,
    GenerationTiming,
    find_largest_batch,
    parse_pairs,
)
from ascendspeed.inference.output import AnswerWriter
from ascendspeed.models import families
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, Message
from ascendspeed.tokenization.declared_tokens import adds_bos_token
from ascendspeed.utils.errors import UserError

WRONG = {
    "": "--load is needed",
    "--load nowhere": "--load: nowhere is not a directory",
    "--load {}/config.json": "/config.json is not a directory; give its folder, ",
    "--load {} --tp 3": "heads",
    "--load {} --tp 2": "1 processes were started, but TP 2 x PP 1 are 2; start NPROC=2",
    "--load {} --pp 3": "layers",
    "--load {} --tp 2 --no-pipeline-parallel --pp 2": "--no-pipeline-parallel contradicts",
    "--load {} --bf16 --fp16": "--bf16 and --fp16 contradict each other",
    "--load {} --num-layers 3": "the command line sets num_layers = 3, but --load",
    "--load {} --model internlm2-tiny": "--model internlm2-tiny sets",
    "--load {} --task fly": "--task fly does not exist; there are greedy (1), sample (2)",
    "--load {} --task 7": "--task 7 does not exist",
    "--load {} --task greedy --top-k 3": (
        "--top-k is for --task sample or beam-sample or chat, not for greedy"
    ),
    "--load {} --task sample --num-beams 3": "--num-beams is for --task beam or beam-sample, not for sample",
    "--load {} --task logprobs --stop x": "--stop is for --task",
    "--load {} --batch-size 0": "--batch-size 0 is too small: at least 1",
    "--load {} --max_input_length 0": "--max-input-length 0 is too small",
    "--load {} --history-turns -1": "--history-turns -1 is too small",
    "--load {} --stop=": "--stop is empty",
    "--load {} --temperature -1": "--temperature -1.0: must be 0",
    "--load {} --top-p 3": "--top-p 3.0: must be between",
    "--load {} --input-file {}": "is a directory: give a file of JSON lines",
    "--load {} --output-file {}/config.json": "exists; move it away",
    "--load {} --output-file {}/left": "/left.partial holds answers of a run that did not end; move it away",
    "--load {} --output-file /nowhere/x": "--output /nowhere/x: /nowhere is not a writable directory",
    "--load {} --task chat --output-file talk": "--output is for prompts",
    "--load {} --stream --task beam": "--stream shows one answer",
    "--load {} --promt x": "unknown flag --promt; did you mean --prompt?",
}


@pytest.mark.breadth
@pytest.mark.parametrize("typed", WRONG)
def test_wrong_flags_are_refused_before_loading(typed, folder):
    with pytest.raises(UserError) as error:
        args.resolve(typed.format(*[folder] * typed.count("{}")).split(), 1)
    assert WRONG[typed] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["generate", "serve"])
def test_folders_are_checked_before_torch_is_prepared(module, folder, tmp_path, monkeypatch):
    """All that is missing is named at once; with several processes the launcher does so."""
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    monkeypatch.setattr("sys.argv", [module, "--load", str(tmp_path)])
    main = importlib.import_module(f"ascendspeed.commands.{module}").main
    with pytest.raises(UserError, match=f"{tmp_path} holds no checkpoint: .*; {tmp_path}: no tokenizer here"):
        main()


PUBLISHED = """--row-col-parallel-linear-bias --no-contiguous-buffers-in-local-ddp --tokenizer-not-use-fast
    --micro-batch-size 1 --seq-length 2048 --max-new-tokens 64 --seed 42 --deepspeed
    --deepspeed_config ds.json --no-pipeline-parallel --num-layers 2 --swiglu
    --tokenizer-name-or-path {0} --load {0} --position-embedding-type rope --normalization RMSNorm
    --use-fused-rmsnorm --local_rank 0"""


def test_the_published_flags_are_understood(folder):
    job, notes = args.resolve(PUBLISHED.format(folder).split(), 1)
    assert (job.generation.batch_size, job.generation.seed, job.spec.args.use_fused_rmsnorm) == (
        1,
        42,
        True,
    )
    assert job.tasks == ()  # its --seed does not imply sampling
    assert args.resolve([*PUBLISHED.format(folder).split(), "--task", "1"], 1)[0].tasks == ("greedy",)
    flags = {note.split()[0] for note in notes}
    assert {
        "--deepspeed",
        "--deepspeed-config",
        "--seq-length",
        "--no-contiguous-buffers-in-local-ddp",
        "--local-rank",
    } <= flags


def test_task_implied_by_flags(folder):
    def tasks(typed):
        return args.resolve(["--load", str(folder), *typed.split()], 1)[0].tasks

    assert tasks("") == ()
    assert tasks("--task 1 2 3 4 5 6") == ("greedy", "sample", "beam", "beam-sample", "logprobs", "chat")
    assert tasks("--top-p 0.9") == ("sample",)
    assert tasks("--num-beams 2") == ("beam",)
    assert tasks("--num-beams 2 --temperature 2") == ("beam-sample",)
    assert tasks("--history-turns 2") == ("chat",)
    flags = ["--input_texts", "a", "b", "--max_output_length", "7", "--max_batch_size", "3"]
    mindie = args.resolve(["--load", str(folder), *flags], 1)[0]
    assert (
        mindie.generation.input_texts,
        mindie.generation.max_new_tokens,
        mindie.generation.batch_size,
    ) == (("a", "b"), 7, 3)


LINES = {
    b'"text"': "text",
    b'{"prompt": "text"}': "text",
    '"中文 \\u4e2d"'.encode(): "中文 中",
    b'[{"role": "user", "content": "hi"}]': (Message("user", "hi"),),
    b'{"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]}': (Message("user", "hi"),),
}


def test_lines_of_an_input_file(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n\n".join(LINES) + b"\n")
    parsed = prompts.prompts_from_file(str(file))
    assert [prompt.text if prompt.text is not None else prompt.messages for prompt in parsed] == list(
        LINES.values()
    )
    assert [prompt.where for prompt in parsed] == [f"{file}, line {n}" for n in (1, 3, 5, 7, 9)]
    assert parsed[-1].tools == [{"name": "f"}]
    for line, says in {
        b"plain": "line 2 is not JSON",
        b"3": "line 2 is not one of: a text",
        b'{"text": "x"}': "line 2 is not one of",
        b'{"prompt": 3}': "line 2 is not one of",
        b"[]": "line 2: a conversation is a list",
        b'[{"role": "user"}]': "line 2, message 1: the content is missing",
        b'"\xff"': "line 2 is not JSON",
        b'{"prompt": "a", "prompt": "b"}': "line 2 is not JSON: it has the key 'prompt' twice",
    }.items():
        with pytest.raises(UserError) as error:
            prompts.prompts_from_json_lines(b'"fine"\n' + line, "in")
        assert says in str(error.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        prompts.prompts_from_file(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="contains no prompts"):
        prompts.prompts_from_json_lines(b"\n \n", "in")
    assert [
        prompt.text
        for prompt in prompts.prompts_from_json_lines(b'\xef\xbb\xbf"x"', "in")
        + prompts.prompts_from_text(b"\xef\xbb\xbfx", "in")
    ] == ["x"] * 2
    assert [prompt.text for prompt in prompts.prompts_from_text("one\r\n\n 中 \n".encode(), "stdin")] == [
        "one",
        " 中 ",
    ]
    with pytest.raises(UserError, match="--prompt 2 is not UTF-8"):
        prompts.prompts_from_flags(args.GenerationArgs(prompt=("fine", "\udcff")))
    with pytest.raises(UserError, match="stdin is not UTF-8"):
        prompts.prompts_from_text(b"\xff", "stdin")


def test_one_bos(folder):
    model_tokenizer = tokenizer.load(folder)
    text = prompts.InputPrompt("here", "<s>hello")
    assert prompts.encode_prompt(text, model_tokenizer, None).count(1) == 1
    assert prompts.encode_prompt(text, model_tokenizer, None, add_bos=False).count(1) == 0
    assert prompts.encode_prompt(prompts.InputPrompt("here", ""), model_tokenizer, None) == [1]
    with pytest.raises(UserError, match="here is empty"):
        prompts.encode_prompt(prompts.InputPrompt("here", ""), model_tokenizer, None, add_bos=False)
    assert adds_bos_token({})
    assert adds_bos_token({"add_bos_token": True})
    assert not adds_bos_token({"add_bos_token": False})


def test_the_file_appears_whole(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.jsonl"
    writer = AnswerWriter(str(path), True)
    for key in ((0, 2), (0, 0), (1, 0), (0, 1)):
        writer.add(key, {"place": key, "text": "中"}, "shown")
        assert not path.exists()
    partial = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert [json.loads(line)["place"] for line in partial] == [
        [0, 2],
        [0, 0],
        [1, 0],
        [0, 1],
    ]  # a killed run leaves these lines
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl.partial"]
    earlier = (tmp_path / "out.jsonl.partial").read_text()
    with pytest.raises(UserError, match="holds answers of a run that did not end"):
        AnswerWriter(str(path), True)
    assert (tmp_path / "out.jsonl.partial").read_text() == earlier
    (tmp_path / "out.jsonl.partial").unlink()
    writer = AnswerWriter(str(path), True)
    for key in ((0, 1), (0, 0)):
        writer.add(key, {"place": key}, None)
    writer.finish()
    assert [json.loads(line)["place"] for line in path.read_text().splitlines()] == [[0, 0], [0, 1]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]
    assert capsys.readouterr().out == ""


def test_shown_in_the_order_of_the_prompts(capsys):
    writer = AnswerWriter(None, True)
    for key in ((0, 1), (0, 0), (0, 2)):
        writer.add(key, {}, f"{key[1]}")
    assert capsys.readouterr().out == "0\n1\n2\n"
    silent = AnswerWriter(None, False)
    silent.add((0, 0), {}, "x")
    assert capsys.readouterr().out == ""


PROMPTS = ["Document 7 says", "It ends here. Document 3 says that", "x"]


def test_answers_equal_hugging_faces(run, folder, reference, tmp_path):
    """Greedy, beams and log-probabilities in the output file do not depend on the batch size."""
    model_tokenizer = tokenizer.load(folder)
    unused_ids = list(range(model_tokenizer.vocab_size, MODEL.vocab_size))
    ids = [[1, *model_tokenizer.encode(text).tolist()] for text in PROMPTS]
    typed = [word for text in PROMPTS for word in ("--prompt", text)]
    common = ("--max-new-tokens", 12, *typed)
    outputs = {}
    for size in (1, 16):
        file = tmp_path / f"{size}.jsonl"
        assert (
            run(*common, "--task", 1, 3, 5, "--num-beams", 3, "--batch-size", size, "--output-file", file)
            == ""
        )
        outputs[size] = records(file)
    for a, b in zip(outputs[1], outputs[16], strict=True):
        assert [x["text"] for x in a.get("answers", [])] == [x["text"] for x in b.get("answers", [])]
        assert a.get("logprob", 0) == pytest.approx(b.get("logprob", 0), abs=1e-4)
    answers = outputs[16]
    assert [(r["task"], r["number"], r["prompt"]) for r in answers] == [
        (task, n + 1, PROMPTS[n]) for task in ("greedy", "beam", "logprobs") for n in range(3)
    ]
    differs = False
    for n, prompt in enumerate(ids):
        unrestricted = hf_continuation(reference, prompt, max_new_tokens=12, eos_token_id=2)
        for at, settings in ((0, {}), (3, {"num_beams": 3})):
            expected = hf_continuation(
                reference, prompt, max_new_tokens=12, eos_token_id=2, suppress_tokens=unused_ids, **settings
            )
            expected = expected[: expected.index(2)] if 2 in expected else expected
            assert answers[at + n]["answers"][0]["text"] == model_tokenizer.decode(expected)
            differs |= at == 0 and unrestricted != expected
        with torch.no_grad():
            logs = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(logs[i, token]) for i, token in enumerate(prompt[1:])]
        assert answers[6 + n]["logprobs"] == pytest.approx(expected, abs=2e-4)
    assert differs  # control: ids without a token would have been chosen


def test_samples_do_not_depend_on_batches(run, tmp_path):
    typed = [word for text in PROMPTS for word in ("--prompt", text)]
    drawn = {}
    for name, extra in {"one": (), "two": ("--batch-size", 2), "other": ("--seed", 7)}.items():
        file = tmp_path / name
        run(
            "--task",
            "sample",
            "--num-return-sequences",
            2,
            "--max-new-tokens",
            6,
            *typed,
            *extra,
            "--output-file",
            file,
        )
        drawn[name] = [[a["text"] for a in r["answers"]] for r in records(file)]
    assert drawn["one"] == drawn["two"]
    assert drawn["one"] != drawn["other"]  # control
    assert all(a != b for a, b in drawn["one"])


def test_stop_strings_and_streams(run):
    output = run("--prompt", "Document 7", "--max-new-tokens", 20)
    text = output.split("\n-> ", 1)[1].removesuffix("\n")
    stop = text[7:10]
    assert text.count(stop)
    shown = run("--prompt", "Document 7", "--max-new-tokens", 20, "--stop", stop, "--stop", "never there")
    assert shown.startswith("== greedy 1/1: stop after ")
    assert shown.endswith(f"\n-> {text[: text.index(stop)]}\n")
    for extra in ((), ("--stop", stop)):
        at_once = run("--prompt", "Document 7", "--prompt", "x", "--max-new-tokens", 20, *extra).split("== ")[
            1:
        ]
        streamed = run(
            "--prompt", "Document 7", "--prompt", "x", "--max-new-tokens", 20, "--stream", *extra
        ).split("== ")[1:]
        assert [s.split("\n", 1)[1] for s in streamed] == [s.split("\n", 1)[1] for s in at_once]


def test_input_from_everywhere(run, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('"x"\n[{"role": "user", "content": "hi"}]\n')
    quick = ("--max-new-tokens", 1)
    from_file = run("--input-file", file, "--prompt", "y", "--input_texts", "z", *quick)
    assert [line for line in from_file.splitlines() if line.startswith("== ")][-1].startswith("== greedy 4/4")
    assert run("--input-file", "-", *quick, stdin=file.read_bytes()) == run("--input-file", file, *quick)
    assert run(*quick, stdin="x\ny\n") == run("--prompt", "x", "--prompt", "y", *quick)
    demonstration = run(*quick)
    assert [
        demonstration.count(f"== {task} ") for task in ("greedy", "sample", "beam", "beam-sample", "logprobs")
    ] == [4] * 5
    with pytest.raises(UserError, match=r"--prompt 2 has \d+ tokens; --max-input-length is 3"):
        run("--prompt", "x", "--prompt", "hello there", "--max-input-length", 3)
    with pytest.raises(UserError, match="--prompt 1 has 1 token; log-probabilities need at least 2"):
        run("--task", "logprobs", "--prompt", "")


NOTES = {
    "none": "it has no rope scaling: expect poor output beyond that length",
    "dynamic": "dynamic rope scaling is in use",
}


@pytest.mark.parametrize("kind", NOTES)
def test_longer_than_what_it_was_trained_on(run, folder, tmp_path, kind):
    """The note appears once, and not for prompts that fit."""
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    model = replace(
        MODEL,
        max_position_embeddings=8,
        rope_scaling_type=kind,
        rope_scaling_factor=2.0 if kind == "dynamic" else 1.0,
    )
    (short / "config.json").write_text(json.dumps(FAMILIES["internlm"].write_config(model)))
    flags = ("--load", short, "--prompt", "x", "--prompt", "1234567", "--max-new-tokens")
    assert len(tokenizer.load(folder).encode("1234567")) == 7
    run(*flags, 1, "--task", 1, 5)
    note = "note: --prompt 2 and its answer may have 9 tokens; the model was trained on 8, and"
    assert run.stderr.count(f"{note} {NOTES[kind]}\n") == 1
    run(*flags[:4], "--max-new-tokens", 6)
    assert "trained on" not in run.stderr
    run(*flags[:2], "--task", "chat", "--max-new-tokens", 1, stdin="1\n2\n")
    assert run.stderr.count("note: the conversation and its answer may have") == 1


def test_the_tokenizer_of_another_model(run, folder, tmp_path):
    """Notes and errors for a tokenizer that differs from the one beside the weights, or has too few or too
    many tokens."""
    other = vocabulary(tmp_path / "other", ["<eoh>", "<eoa>", "another"])
    flags = ("--max-new-tokens", 1, "--prompt", "x")
    run(*flags)
    assert "note: " not in run.stderr
    shutil.copytree(folder, tmp_path / "same")
    run(*flags, "--tokenizer-name-or-path", tmp_path / "same")
    assert "note: " not in run.stderr
    run(*flags, "--tokenizer-name-or-path", other)
    note = (
        f"note: {other}/tokenizer.model differs from {folder}/tokenizer.model, which is beside the weights; "
    )
    assert note in run.stderr
    ids = tokenizer.load(folder).vocab_size

    def sized(rows):
        path, model = tmp_path / str(rows), replace(MODEL, vocab_size=rows)
        shutil.copytree(folder, path)
        (path / "config.json").write_text(json.dumps(FAMILIES["internlm"].write_config(model)))
        save_file(oracle.native(model)[1], path / "model.safetensors")
        return path

    run("--load", sized(ids + 1024), *flags)
    assert "note: " not in run.stderr
    run("--load", sized(ids + 1025), *flags)
    assert f"has {ids} tokens, the model {ids + 1025}: check that it is the model's tokenizer" in run.stderr
    with pytest.raises(
        UserError,
        match=rf"has {ids} tokens, but the model in .* only {ids - 1}; give the model's own with --tok",
    ):
        run("--load", sized(ids - 1), *flags)
