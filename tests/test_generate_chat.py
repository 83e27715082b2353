"""Conversations of the generation command: history, templates, tools, terminals."""

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
from ascendspeed.utils.errors import UserError


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

    def answer(session, prompts, numbers, *_, **options):
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
