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
from helpers.generate_command import MODEL, folder, reference, run
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
from ascendspeed.utils.errors import UserError


def hf_continuation(reference, ids, **params):
    """New tokens of Hugging Face's greedy or beam search."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        out = reference.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, pad_token_id=2, **params
        )
    return out[0, len(ids) :].tolist()


WRONG = {
    "": "--load is needed",
    "--load nowhere": "--load nowhere is not a directory",
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
    "--load {} --output-file {}/config.json": "exists; move it away",
    "--load {} --output-file {}/left": "/left.partial holds answers of a run that did not end; move it away",
    "--load {} --output-file /nowhere/x": "--output-file /nowhere/x: /nowhere is not a writable directory",
    "--load {} --task chat --output-file talk": "--output-file is for prompts",
    "--load {} --stream --task beam": "--stream shows one answer",
    "--load {} --promt x": "unknown flag --promt; did you mean --prompt?",
}


@pytest.mark.parametrize("typed", WRONG)
def test_wrong_flags_are_refused_before_loading(typed, folder):
    with pytest.raises(UserError) as error:
        args.resolve(typed.format(*[folder] * typed.count("{}")).split(), 1)
    assert WRONG[typed] in str(error.value)
    assert "\n" not in str(error.value)


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
    assert tokenizer.adds_bos_token({})
    assert tokenizer.adds_bos_token({"add_bos_token": True})
    assert not tokenizer.adds_bos_token({"add_bos_token": False})


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
    writer = AnswerWriter(str(path), True)  # the command line refuses this; nothing is lost anyway
    assert (tmp_path / "out.jsonl.partial").read_text() == earlier
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


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


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


def hf_reply(folder, reference, turns, count):
    """Hugging Face's answer to a conversation in the original chat format."""
    model_tokenizer = tokenizer.load(folder)
    ids = [
        1,
        *model_tokenizer._model.encode("".join(turns) + "<|Bot|>:"),
    ]  # sentencepiece itself makes <eoa> a token
    end = model_tokenizer.required_id("<eoa>")
    unused_ids = list(range(model_tokenizer.vocab_size, MODEL.vocab_size))
    out = hf_continuation(
        reference, ids, max_new_tokens=count, eos_token_id=[2, end], suppress_tokens=unused_ids
    )
    ends = [i for i, token in enumerate(out) if token in (2, end)]
    return model_tokenizer.decode(out[: ends[0]] if ends else out)


def test_a_conversation(run, folder, reference):
    """Through a pipe: stdout holds answers only; history, clear, several lines and quit work."""
    count = 5

    def reply(*turns):
        return hf_reply(folder, reference, turns, count)

    def bot(text):
        return f"<|Bot|>:{text}<eoa>\n"

    hi, two, again = "<|User|>:hi\n", "<|User|>:two\nlines\n", "<|User|>:again\n"
    first = reply(hi)
    second = reply(hi, bot(first), two)
    stdin = 'hi\n"""\ntwo\nlines\n"""\nclear\n\nagain\nq\nnever\n'
    chat = ("--task", "chat", "--max-new-tokens", count)
    assert run(*chat, stdin=stdin) == f"{first}\n{second}\n{reply(again)}\n"
    assert "<|Bot|>" not in run.stderr
    forgetful = run(*chat, "--history-turns", 0, stdin="hi\nagain\n")
    assert forgetful == f"{first}\n{reply(again)}\n"
    assert (
        run(*chat, "--history-turns", 0, stdin='\ufeffhi\n"""\nagain') == forgetful
    )  # a BOM, and a message without its end
    quoted = run(*chat, stdin='"""\nclear\n"""\n"""\nq\n"""\n')  # no commands between quotes
    clear = reply("<|User|>:clear\n")
    assert quoted == f"{clear}\n{reply('<|User|>:clear' + chr(10), bot(clear), '<|User|>:q' + chr(10))}\n"
    with_system = run(*chat, "--system", "Be brief", stdin="hi\nquit\n")
    assert with_system == f"{reply('<|System|>:Be brief' + chr(10), hi)}\n"
    assert (
        len({first, second, reply(again), with_system}) == 4
    )  # control: history, system and question all matter
    shown = run(*chat, "--task", "chat", "--stop", first[1:3], stdin="hi\n")
    assert shown == f"{first[: first.index(first[1:3])]}\n"
    both = run("--task", 1, 6, "--max-new-tokens", count, stdin="hi\n")
    assert both.count("== greedy ") == 4  # the demonstration: stdin is the conversation's
    assert both.endswith(f"\n{first}\n")
    assert run("--task", "chat", "--prompt", "hi", "--max-new-tokens", count).endswith(f"-> {first}\n")
    with pytest.raises(UserError, match="not UTF-8"):
        run(*chat, stdin=b"\xff\n")
    with pytest.raises(UserError, match="the question has"):
        run(*chat, "--max-input-length", 4, stdin="hi\n")


def test_a_stop_string_belongs_to_no_history(run, folder, reference):
    """Nor do the tokens after it: the next question follows the answer as shown."""
    hi, again = "<|User|>:hi\n", "<|User|>:again\n"
    first = hf_reply(folder, reference, [hi], 9)
    stop = first[2:4]
    shown = first[: first.index(stop)]
    assert shown
    count = ("--task", "chat", "--max-new-tokens", 9)
    answers = run(*count, "--stop", stop, stdin="hi\nagain\n").removeprefix(f"{shown}\n")
    expected, from_uncut = (
        hf_reply(folder, reference, [hi, f"<|Bot|>:{text}<eoa>\n", again], 9) for text in (shown, first)
    )
    assert answers == f"{expected.split(stop)[0]}\n"
    assert expected.split(stop)[0] != from_uncut.split(stop)[0]  # control


def test_a_model_ends_where_its_files_say(run, folder, tmp_path):
    """generation_config.json sets stop tokens for all tasks; tokenizer_config.json decides about BOS."""
    model_tokenizer, other = tokenizer.load(folder), tmp_path / "other"
    shutil.copytree(folder, other)
    flags = ("--prompt", "Document 7", "--max-new-tokens", 12, "--output-file")
    run(*flags, tmp_path / "free")
    unrestricted = records(tmp_path / "free")[0]
    ids = [1, *model_tokenizer.encode("Document 7").tolist()]
    assert unrestricted["prompt_tokens"] == len(ids)
    with_end = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (other / "tokenizer_config.json").write_text(json.dumps(with_end))
    run("--load", other, *flags, tmp_path / "bare")
    assert records(tmp_path / "bare")[0]["prompt_tokens"] == len(ids) - 1
    shutil.copy(folder / "tokenizer_config.json", other)
    (other / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(3, model_tokenizer.vocab_size))})
    )
    run("--load", other, *flags, tmp_path / "ended")
    answer = records(tmp_path / "ended")[0]["answers"][0]
    assert (answer["reason"], answer["tokens"] <= 1) == ("stop", True)
    assert unrestricted["answers"][0]["tokens"] > 1  # control


def test_tools_in_files(cpu, tmp_path, monkeypatch):
    """Tools of a conversation are part of the prompt; tool calls of the answer are written to the file."""
    from ascendspeed.inference import batching, runner

    folder = vocabulary(tmp_path / "hf", UNUSED.values(), UNUSED)
    model = replace(families.preset("internlm2-tiny"), num_layers=1, vocab_size=512)
    (folder / "config.json").write_text(json.dumps(FAMILIES["internlm2"].write_config(model)))
    model_tokenizer = tokenizer.load(folder)
    call = piecewise(
        model_tokenizer,
        model_tokenizer._model,
        'I look.<|action_start|><|plugin|>\n{"name": "f"}<|action_end|>',
    )
    received = []

    def answer(session, prompts, numbers, *_):
        received.extend(prompts)
        return [
            [batching.Answer("", tokens, "stop", 0.0)]
            for tokens in (call, model_tokenizer.encode("No.").tolist())
        ]

    monkeypatch.setattr(runner, "generate_answers", answer)
    monkeypatch.setattr(runner.Session, "model", None)
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "in").write_text(
        "\n".join(json.dumps({"messages": messages, "tools": tools}) for tools in ([{"name": "f"}], []))
    )
    flags = [
        "--load",
        str(folder),
        "--device",
        "cpu",
        "--input-file",
        str(tmp_path / "in"),
        "--output-file",
        str(tmp_path / "out"),
    ]
    runner.run(args.resolve([*flags, "--task", "chat"], 1)[0], cpu, [])
    with_tools, without = records(tmp_path / "out")
    assert with_tools["answers"][0]["message"] == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"name": "f"}],
    }
    assert "message" not in without["answers"][0]
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tools_turn = '<|im_start|>system name=<|plugin|>\n[{"name": "f"}]<|im_end|>\n'
    assert received == [
        piecewise(model_tokenizer, model_tokenizer._model, f"<s>{tools_turn}{turn}"),
        piecewise(model_tokenizer, model_tokenizer._model, f"<s>{turn}"),
    ]


def test_every_question_is_sampled_anew(run):
    """A repeated question is sampled anew, without history too."""
    drawn = run(
        "--task",
        "chat",
        "--temperature",
        1.5,
        "--history-turns",
        0,
        "--max-new-tokens",
        8,
        stdin="hi\nclear\nhi\nhi\n",
    )
    answers = drawn.removesuffix("\n").split("\n")
    assert len(set(answers)) == len(answers) == 3
    assert (
        run("--task", "chat", "--temperature", 1.5, "--max-new-tokens", 8, stdin="hi\n") == f"{answers[0]}\n"
    )


def test_a_terminal_gets_its_echo_back():
    """SIGTERM, which the launcher sends on Ctrl-C, restores the terminal's echo."""
    master, slave = pty.openpty()
    asks = "from ascendspeed.inference.stdin import read_stdin_message; read_stdin_message()"
    command, env = [sys.executable, "-c", asks], launch.environment(TERM="xterm")
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=launch.ROOT)
    try:
        shown = b""
        while b"> " not in shown:
            shown += os.read(master, 1000)
        assert not termios.tcgetattr(slave)[3] & termios.ECHO  # control: the line editor has switched it off
        for _ in range(60):
            # readline misses a signal between writing its prompt and waiting for input, and notices the next.
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(1) == -signal.SIGTERM
                break
        assert termios.tcgetattr(slave)[3] & termios.ECHO
    finally:
        process.kill()
        os.close(master)
        os.close(slave)


def test_quoted_message_without_its_end(monkeypatch):
    typed = iter(['"""', "new", "more", EOFError])

    def line(prompt):
        if (text := next(typed)) is EOFError:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", line)
    assert questions._read_from_terminal() == questions.UserMessage("new\nmore", quoted=True)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert questions._read_from_terminal() is None


def test_history_that_stays_in_the_prompt(cpu, folder):
    from ascendspeed.inference.chat import Conversation

    model_tokenizer = tokenizer.load(folder)

    def after(turns=None, longest=None):
        conversation = Conversation(ChatFormat(model_tokenizer, "v1"), "S", turns, longest)
        for n in range(4):
            conversation.add_question(f"question {n}")
            conversation.add_answer(model_tokenizer.encode(f"answer {n}").tolist())
        return model_tokenizer.decode(conversation.add_question("last"))

    full = after()
    assert [f"question {n}" in full and f"answer {n}" in full for n in range(4)] == [True] * 4
    assert full.startswith("<|System|>:S\n<|User|>:question 0")
    assert [f"question {n}" in after(turns=1) for n in range(4)] == [False, False, False, True]
    assert "question" not in after(turns=0)
    size = len(model_tokenizer.encode(full))
    cut = after(longest=size - 3)
    assert "question 0" not in cut
    assert "answer 3" in cut
    assert cut.startswith("<|System|>:S\n<|User|>:question 1")


CALLS = [
    '{"name": "f", "parameters": "Paris"}',
    '{"name":"f","function":3}',
    '{"name": "f", "parameters": {"a": 1}}',
    "[1]",
    '{"na',
    "",
]


def test_a_call_of_the_model_is_remembered_as_it_wrote_it(cpu, tmp_path):
    """A tool call stays in the history as written, malformed or not."""
    from ascendspeed.inference.chat import Conversation

    model_tokenizer = tokenizer.load(vocabulary(tmp_path / "v2", UNUSED.values(), UNUSED))
    for call in CALLS:
        conversation = Conversation(ChatFormat(model_tokenizer, "v2"))
        answer = f"I look.<|action_start|><|plugin|>\n{call}<|action_end|>"
        conversation.add_question("x")
        conversation.add_answer(piecewise(model_tokenizer, model_tokenizer._model, answer))
        first_turns = f"<s><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        turns = f"{first_turns}<|im_start|>user\ny<|im_end|>\n"
        assert conversation.add_question("y") == piecewise(
            model_tokenizer, model_tokenizer._model, f"{turns}<|im_start|>assistant\n"
        )


def test_clock_and_table(tmp_path):
    ticks = iter([0.0, 0.5, 2.5])
    clock = GenerationTimer(lambda: next(ticks))
    assert not any(clock.on_token(row, 1) for _ in range(3) for row in range(4))
    timing = clock.timing(4, 100, 5)
    assert timing.row == (4, 100, 5, 2.5, 500.0, 500.0, 8.0, 8.0)
    assert GenerationTiming(1, 8, 1, 0.5, 0.5).row[5:] == (0.0, 0.0, 2.0)
    text = benchmark_report.write_report(
        [timing, GenerationTiming(2, 8, 2, 0.25, 0.125)], tmp_path / "new", "tiny, fp32"
    )
    assert text.splitlines()[0] == "tiny, fp32"
    assert text.splitlines()[2].split() == ["4", "100", "5", "2.50", "500.00", "500.00", "8.00", "8.00"]
    assert (tmp_path / "new/performance.csv").read_text().splitlines()[
        2
    ] == "2,8,2,0.25,125.0,125.0,16.0,16.0"
    assert (tmp_path / "new/performance.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.parametrize(("low", "high"), [(1, 64), (1, 1), (5, 64), (3, 7), (1, 2048)])
def test_largest_batch(low, high):
    """Compared with trying all sizes, for every limit and memory size."""
    for fits in (0, 1, 2, 5, 6, 7, 31, 64, 100):
        for memory in (4, 50, 5000):
            tried = []

            def measure(batch, memory=memory, tried=tried):
                tried.append(batch)
                if batch > memory:
                    raise BatchOutOfMemory
                return GenerationTiming(batch, 8, 3, 0.0 + 2 * batch, 0.0)

            with log_lines() as lines:
                best = find_largest_batch(low, high, fits, measure)
            expected = min(fits, memory, high)
            assert (best.batch if best else None) == (expected if expected >= low else None)
            assert len(tried) == len(set(tried)) <= 2 * max(1, high.bit_length())
            assert any("out of memory" in line for line in lines) == any(batch > memory for batch in tried)


def test_pairs():
    assert parse_pairs("[[2048,2048],[256, 1]]", "x") == [(2048, 2048), (256, 1)]
    for wrong in (
        "",
        "[]",
        "[[1]]",
        "[[1,2,3]]",
        "[1,2]",
        "[[0,1]]",
        "[[1,true]]",
        "[[1.5,2]]",
        "{}",
        "[[1,2]",
        "5",
    ):
        with pytest.raises(UserError, match=r"--performance .* is not a list of pairs of integers"):
            parse_pairs(wrong, "--performance")


def test_benchmark_command(cpu, folder, tmp_path, capsys):
    """The command needs no tokenizer, and writes only the table to stdout."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, weights)
    spec = importlib.util.spec_from_file_location("benchmark", launch.ROOT / "tasks/inference/benchmark.py")
    benchmark = sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    flags = ["--load", str(weights), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    for typed, rows in (
        (["--performance", "[[4,3],[8,2]]", "--batch-size", "2"], [("2", "4", "3"), ("2", "8", "2")]),
        (["--performance-maxbs", "[[4,2]]", "--ranges", "[[1,3]]", "--limit-ms", "1e6"], [("3", "4", "2")]),
    ):
        job, notes = benchmark.resolve([*flags, *typed], 1)
        benchmark.work(job, cpu, notes)
        out, err = capsys.readouterr()
        assert out == (tmp_path / "out/performance.txt").read_text()
        assert [tuple(line.split()[:3]) for line in out.splitlines()[2:]] == rows
        assert f"{weights}: internlm, fp32, on cpu" in err
    with pytest.raises(UserError, match="--fp16 is 100 times slower"):
        benchmark.work(benchmark.resolve([*flags, "--performance", "[[4,2]]", "--fp16"], 1)[0], cpu, [])


def started(folder, world, flags, stdin, tp=1, pp=1):
    """Runs the script on `world` ranks; returns (exit codes, stdout of rank 0, stderr of rank 0)."""
    command = [
        sys.executable,
        str(launch.ROOT / "tasks/inference/generate.py"),
        "--load",
        str(folder),
        "--device",
        "cpu",
        *flags,
    ]
    port, pipe = str(launch.free_port()), subprocess.PIPE
    processes = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        env = launch.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables)
        pipes = {"stdin": subprocess.DEVNULL if rank else pipe, "stdout": pipe, "stderr": pipe}
        processes.append(
            subprocess.Popen([*command, "--tp", str(tp), "--pp", str(pp)], env=env, cwd=launch.ROOT, **pipes)
        )
    outs = [
        process.communicate(stdin if rank == 0 else None, timeout=300)
        for rank, process in enumerate(processes)
    ]
    assert not any(out for out, _ in outs[1:]), "only rank 0 writes to stdout"
    return [process.returncode for process in processes], outs[0][0].decode(), outs[0][1].decode()


CHAT = (
    ["--task", "chat", "--max-new-tokens", "5"],
    'hi\n"""\n中文\nlines\n"""\nclear\nagain\nexit\n'.encode(),
)


def test_a_conversation_on_two_ranks(run, folder):
    codes, out, err = started(folder, 2, *CHAT, tp=2)
    assert codes == [0, 0], err
    assert out == run(*CHAT[0], stdin=CHAT[1])


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)])
def test_on_stages(run, folder, tmp_path, tp, pp):
    codes, out, err = started(folder, tp * pp, *CHAT, tp=tp, pp=pp)
    assert not any(codes), err
    assert out == run(*CHAT[0], stdin=CHAT[1])
    flags = ["--task", "1", "2", "3", "5", "--max-new-tokens", "5"]
    codes, out, err = started(folder, tp * pp, flags, b"one\ntwo words\n", tp=tp, pp=pp)
    assert not any(codes), err
    alone = run(*flags, stdin="one\ntwo words\n")
    assert out.split("== logprobs")[0] == alone.split("== logprobs")[0]


@pytest.mark.slow
def test_a_killed_run_leaves_no_file(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    lines = "\n".join(f'"Document {i} says"' for i in range(4000))
    (tmp_path / "in.jsonl").write_text(lines)
    flags = [
        "--input-file",
        str(tmp_path / "in.jsonl"),
        "--output-file",
        str(out),
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    command = [
        sys.executable,
        str(launch.ROOT / "tasks/inference/generate.py"),
        "--load",
        str(folder),
        *flags,
    ]
    process = subprocess.Popen(
        command, env=launch.environment(), cwd=launch.ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    partial = tmp_path / "out.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert partial.stat().st_size


@pytest.fixture
def shell(tmp_path):
    """Runs a shell script in which `python` and `deepspeed` print their arguments; returns (exit code,
    output)."""
    recipes.program(tmp_path, "deepspeed", '#!/bin/sh\necho deepspeed "$@"\n')
    recipes.program_python(tmp_path, 'echo python "$@"')
    settings = (
        "NPROC",
        "HOSTFILE",
        "NNODES",
        "MODEL",
        "CHECKPOINT",
        "TOKENIZER_PATH",
        "TP",
        "PP",
        "DTYPE",
        "OUT",
        "QUIET",
    )
    environment = {k: v for k, v in launch.environment().items() if k not in settings}

    def shell(script, *arguments, **env):
        extra = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **env}
        done = subprocess.run(
            ["bash", script, *arguments],
            env=environment | extra,
            cwd=launch.ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return shell


def test_fronts(shell):
    recipe = "examples/intern/generate_internlm_7b_deepspeed.sh"
    code, output = shell(recipe, "--prompt", "hi", MODEL="internlm-7b")
    assert code == 0
    assert output.startswith(
        "python tasks/inference/generate.py --load ./model_weights --tokenizer-name-or-path "
        "./dataset/internlm --model"
    )
    assert output.endswith("--mlp-layer-fusion --bf16 --prompt hi\n")
    _, output = shell(recipe, TP="4", PP="2", DTYPE="fp32", TOKENIZER_PATH="")
    assert output.startswith(
        "deepspeed --no_local_rank --master_port 29500 --log_level critical --num_accelerators 8 "
    )
    assert "8 tasks/inference/generate.py" in output
    assert "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2" in output
    assert "--bf16" not in output
    assert "--tokenizer-name-or-path" not in output
    assert "--hostfile hosts tasks/inference/generate.py" in shell(recipe, TP="16", HOSTFILE="hosts")[1]
    assert shell(recipe, DTYPE="fp8")[0] == 2
    for script in ("run_pa.sh", "run_fa.sh"):
        _, output = shell(
            f"tasks/inference/{script}", "W", "chat", "--input_texts", "a b", "--max_output_length", "3"
        )
        assert "generate.py --load W --tensor" in output
        assert output.endswith("--bf16 --task chat --input_texts a b --max_output_length 3\n")
    assert "--task" not in shell("tasks/inference/run_pa.sh", "W")[1]
    code, output = shell("tasks/inference/run_pa.sh")
    assert code == 2
    assert output.startswith("error: usage: ")
    evaluation = "tasks/evaluation/eval_internlm.sh"
    assert shell(evaluation)[1].startswith("python tasks/evaluation/evaluation.py --task mmlu ")
    assert "--num_accelerators 8 tasks/evaluation/evaluation.py" in shell(evaluation, TP="8")[1]
    assert (
        "--hostfile hosts tasks/evaluation/evaluation.py" in shell(evaluation, TP="16", HOSTFILE="hosts")[1]
    )
    assert (
        "--num_nodes 2 --num_accelerators 8 tasks"
        in shell(evaluation, TP="16", HOSTFILE="hosts", NNODES="2", NPROC="8")[1]
    )
    assert "NNODES=2 needs NODE_RANK" in shell(evaluation, TP="16", NNODES="2")[1]


def test_front_of_the_table(shell):
    script = "tasks/inference/benchmark.sh"
    code, output = shell(script, "performance", "[[256,256]]", "4", CHECKPOINT="W")
    assert code == 0
    assert output.startswith("python tasks/inference/benchmark.py --load W")
    assert output.endswith("--performance [[256,256]] --batch-size 4 --bf16\n")
    _, output = shell(script, "performance_maxbs", "[[256,256]]", "[[1,8]]", "50", "internlm", "W", "4")
    assert output.startswith("deepspeed")
    assert (
        "--num_accelerators 4 tasks/inference/benchmark.py --load W --tensor-model-parallel-size 4" in output
    )
    assert "--performance-maxbs [[256,256]] --ranges [[1,8]] --limit-ms 50 --bf16" in output
    for arguments in (
        (),
        ("performance",),
        ("performance", "[[1,1]]"),
        ("fly", "x", "y"),
        ("performance", "[[1,1]]", "1", "internlm"),
    ):
        code, output = shell(script, *arguments, CHECKPOINT="W")
        assert (code, output.count("\n")) == (2, 1)
        assert output.startswith("error: usage")


@pytest.mark.parametrize("flags", [("--batch-size", "1"), ("--task", "chat")], ids=["prompts", "chat"])
def test_closed_stdout(folder, flags):
    """`| head -1`: no traceback, and the exit code of a closed pipe."""
    command = [
        sys.executable,
        str(launch.ROOT / "tasks/inference/generate.py"),
        "--load",
        str(folder),
        "--device",
        "cpu",
        *flags,
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "1"], env=launch.environment(), stdin=pipe, stdout=pipe, stderr=pipe
    )
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(b"one\ntwo\n", timeout=300)
    assert process.returncode == 128 + signal.SIGPIPE, errors
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_a_mistake_is_one_line_and_code_2(folder):
    command = [
        sys.executable,
        str(launch.ROOT / "tasks/inference/generate.py"),
        "--load",
        str(folder),
        "--tp",
        "2",
    ]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, cwd=launch.ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "1 processes were started, but TP 2 x PP 1 are 2"
    assert done.stderr == f"error: {reason}; start NPROC=2, or choose other --tp and --pp\n"
