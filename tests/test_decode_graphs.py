"""Graphs of decode passes, with a capture that records operations: as a CUDA graph, it repeats them on the
same memory with the Python numbers of the capture."""

import contextlib
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import evaluating
from helpers.generation import language_model
from helpers.models import tensors_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ascendspeed.distributed import cuda_graphs, inference_kernels
from ascendspeed.distributed.inference_kernels import PagedAttention, attend
from ascendspeed.evaluation import args as evaluation_args
from ascendspeed.evaluation import runner
from ascendspeed.inference import continuous_batching
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.serving import args as serve_args
from ascendspeed.inference.serving import decode_graphs, paged_engine, server
from ascendspeed.inference.serving.decode_graphs import DecodeGraphs, padded_rows
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.models.families import FAMILIES, preset
from ascendspeed.models.gpt import decode_buffers
from ascendspeed.models.gpt.decode_buffers import DecodeBuffers
from ascendspeed.utils.errors import UserError

MODEL = replace(
    preset("internlm2-tiny"),
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,
    max_position_embeddings=32,
    rope_scaling_type="dynamic",
    rope_scaling_factor=2.0,
)
HEAD = list(range(2, 26))
"""Three blocks of 8: a prefix that prompts share."""
REQUESTS = [
    ([1, 5, 9, 33, 7], 34),
    ([1, 4], 29),
    ([*HEAD, 60, 61], 12),
    ([*HEAD, 7], 17),
    ([*HEAD, *HEAD, 9], 6),  # beyond the trained length of 32: other RoPE bases
    ([*HEAD, *HEAD, 9, 8], 11),
    ([8, 8, 3], 20),
]
"""Prompts, and numbers of tokens of their answers."""
ROUNDING = 2e-6
SIZES = EngineSettings(12, 8, token_budget=24, max_running=4, max_request_tokens=64)
"""Too few blocks for four requests: some are preempted."""


@pytest.fixture(scope="module")
def built(cpu):
    return language_model(cpu, MODEL, tensors_of(MODEL))


@pytest.fixture
def model(built, monkeypatch):
    monkeypatch.setattr(inference_kernels, "HALF_TYPES", (torch.float32,))
    paged = PagedAttention("stand-in", 8, static_attention)
    monkeypatch.setattr(built.gpt.config, "kernels", replace(built.gpt.config.kernels, paged=paged))
    return built


def static_attention(q, keys, values, batch, scale):
    """Attention whose shapes depend on those of the batch's tensors only, for single tokens."""
    if batch.longest > 1:
        return attend(q, keys, values, batch, scale)
    k, v = (cached[batch.table.long()].flatten(1, 2).transpose(1, 2) for cached in (keys, values))
    visible = torch.arange(k.size(2)) < batch.lengths[:, None]
    mask = visible[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, mask, scale=scale, enable_gqa=True)[:, :, 0]


class Recorder(TorchDispatchMode):
    """Records operations with their arguments and results; a replay writes the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(function):
    """Capture that repeats the operations of a function."""
    with Recorder() as recorder:
        out = function()
    assert len(recorder.calls) > 50
    return lambda: recorder.replay() or out


@dataclass(frozen=True)
class Answers:
    """Output of an engine."""

    choices: dict[int, list[tuple[int, float]]]
    """Tokens and their log-probabilities of every request."""
    engine: PagedEngine
    eager: list[int]
    """Most tokens of a sequence in every pass without a graph."""
    rows: list[int]
    """Sequences of every pass with a graph or its capture."""


def generate(model, capture, requests=REQUESTS, sizes: EngineSettings = SIZES) -> Answers:
    """Answers to requests of which one is added before every second pass."""
    engine = PagedEngine(model, sizes, capture)
    eager, rows, begin_pass = [], [], engine.cache.begin_pass
    engine.cache.begin_pass = lambda slices: (
        eager.append(max(part.count for part in slices)) or begin_pass(slices)
    )
    if engine.graphs:
        run = engine.graphs.run
        engine.graphs.run = lambda tokens, slices: rows.append(len(slices)) or run(tokens, slices)
    waiting = [
        Submission(i, prompt, RequestParams(SamplingParams(max_new_tokens=tokens)))
        for i, (prompt, tokens) in enumerate(requests)
    ]
    choices: dict[int, list[tuple[int, float]]] = {}
    while waiting or not engine.scheduler.is_idle:
        if waiting and engine.steps % 2 == 0:
            engine.apply(Events((waiting.pop(0),)))
        for result in engine.step():
            choices.setdefault(result.request.id, []).append((result.choice.token, result.choice.logprob))
    return Answers(choices, engine, eager, rows)


def differences(actual: Answers, expected: Answers) -> list[int]:
    """Requests with another token, or a log-probability that differs by more than the rounding of products of
    other numbers of rows."""
    assert actual.choices.keys() == expected.choices.keys()
    return [
        i
        for i, choices in expected.choices.items()
        if [token for token, _ in actual.choices[i]] != [token for token, _ in choices]
        or [logprob for _, logprob in actual.choices[i]]
        != pytest.approx([logprob for _, logprob in choices], abs=ROUNDING)
    ]


def test_replays_give_the_tokens_of_the_engine_without_graphs(model):
    expected, actual = generate(model, None), generate(model, recorded)
    graphs, scheduler = actual.engine.graphs, actual.engine.scheduler
    assert differences(actual, expected) == []
    assert graphs.problem == ""
    assert sorted(graphs._graphs) == [1, 2, 4]
    assert graphs.replays == expected.eager.count(1) - 3 == len(actual.rows) - 3 > 20
    assert set(actual.rows) == {1, 2, 3, 4}
    assert min(actual.eager) > 1
    assert scheduler.preemptions
    assert scheduler.prefix_hits
    assert actual.engine.pool.available == SIZES.num_blocks


FEW = [([1, 5, 9, 33, 7, 2], 12), ([1, 4], 12), ([3] * 9, 12)]
"""Three rows of a graph of four."""
NUMBERS = ["TOKEN", "BLOCK", "OFFSET", "LENGTH", "TABLE"]


@pytest.mark.parametrize("stale", ["nothing", *NUMBERS, "cos", "sin"])
def test_every_tensor_must_be_written_before_a_replay(model, monkeypatch, stale):
    """The control: a tensor that keeps what the capture saw."""
    fill = DecodeBuffers.fill

    def damaged(buffers, *arguments):
        before = {name: getattr(buffers, name).clone() for name in ("numbers", "cos", "sin")}
        fill(buffers, *arguments)
        if stale in ("cos", "sin"):
            getattr(buffers, stale).copy_(before[stale])
        elif stale in NUMBERS:
            column = getattr(decode_buffers, stale)
            columns = slice(column, None if stale == "TABLE" else column + 1)
            buffers.numbers[:, columns] = before["numbers"][:, columns]

    def capture(function):
        monkeypatch.setattr(DecodeBuffers, "fill", damaged)
        return function

    expected = generate(model, None, FEW)
    monkeypatch.setattr(decode_graphs, "_problem", lambda *_: "")
    monkeypatch.setattr(decode_graphs, "padded_rows", lambda count, most: 4)
    actual = generate(model, capture, FEW)
    assert actual.engine.graphs.replays > 10
    assert bool(differences(actual, expected)) == (stale != "nothing")


def test_rows_without_a_sequence_need_a_block_of_their_own(model, monkeypatch):
    """The control: block 0, which belongs to the first request."""
    expected = generate(model, None, FEW)
    monkeypatch.setattr(
        paged_engine,
        "DecodeGraphs",
        lambda model, running, blocks, scratch, capture: DecodeGraphs(model, running, blocks, 0, capture),
    )
    actual = generate(model, lambda function: function, FEW)
    assert actual.engine.graphs.replays
    assert differences(actual, expected)


def begin_from_python(buffers) -> torch.Tensor:
    """`DecodeBuffers.begin_pass` with a key length from Python, which a graph never reads again."""
    tokens = BEGIN_PASS(buffers)
    lengths = torch.tensor(buffers.numbers[:, decode_buffers.LENGTH].tolist(), dtype=torch.int32)
    buffers.cache._batch = buffers.cache._batch._replace(lengths=lengths)
    return tokens


BEGIN_PASS = DecodeBuffers.begin_pass


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_pass_that_reads_python_numbers_is_noticed(model, monkeypatch, is_checked):
    """The comparison at the capture; and the control, without it: replays with the numbers of the capture."""
    expected = generate(model, None, FEW)
    monkeypatch.setattr(DecodeBuffers, "begin_pass", begin_from_python)
    if not is_checked:
        monkeypatch.setattr(decode_graphs, "_problem", lambda *_: "")
    actual = generate(model, recorded, FEW)
    problem = "a replay with other inputs is wrong" if is_checked else ""
    assert actual.engine.graphs.problem == problem
    assert bool(actual.engine.graphs.replays) != is_checked
    assert bool(differences(actual, expected)) != is_checked


def fails(function):
    raise RuntimeError("no capture\nhere")


@pytest.mark.parametrize(
    ("capture", "problem"),
    [
        (fails, "RuntimeError: no capture"),
        (lambda function: lambda: function() * 1.1, "its first replay differs from the same operations"),
        (lambda function: lambda: function() * float("nan"), "its first replay differs from the same"),
    ],
    ids=["fails", "wrong", "NaN"],
)
def test_decoding_goes_on_without_graphs(model, capture, problem, caplog):
    expected = generate(model, None, FEW)
    actual = generate(model, capture, FEW)
    assert actual.engine.graphs.problem.startswith(problem)
    assert actual.engine.graphs.replays == 0
    assert differences(actual, expected) == []
    (line,) = [record.message for record in caplog.records if "graphs" in record.message]
    assert line.startswith(f"--cuda-graphs: {problem}")
    assert line.endswith("; decoding goes on without graphs")


def test_generated_answers_of_an_evaluation(model):
    prompts, captures = [prompt for prompt, _ in REQUESTS], []

    def capture(function):
        replay = recorded(function)
        captures.append([])
        return lambda: captures[-1].append(1) or replay()

    tokens = []
    for way in (None, capture):
        completions = {}
        params = SamplingParams(max_new_tokens=9)
        continuous_batching.generate(
            model, prompts, params, 2, lambda *_: False, completions.__setitem__, way
        )
        tokens.append([completions[i].tokens for i in range(len(prompts))])
    assert tokens[0] == tokens[1]
    assert sum(map(len, captures)) > 20


def test_rows_of_graphs():
    assert [padded_rows(count, 12) for count in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]
    assert [padded_rows(count, 3) for count in (1, 2, 3)] == [1, 2, 3]


def test_calls_of_cuda_graphs(monkeypatch):
    """torch's functions, by stand-ins: graphs share a pool, and a replay returns the same tensor."""
    calls, out = [], torch.ones(2)

    @contextlib.contextmanager
    def graph(graph, **settings):
        calls.append(("begin", settings))
        yield
        calls.append(("end", {}))

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            calls.append(("replay", {}))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = cuda_graphs.open_capture()
    replays = [capture(lambda: calls.append(("function", {})) or out) for _ in range(2)]
    assert replays[0]() is out
    del replays
    capture(lambda: out)
    names, pools = zip(*((name, settings.get("pool")) for name, settings in calls), strict=True)
    assert names == ("begin", "function", "end", "begin", "function", "end", "replay", "begin", "end")
    assert pools == (None, None, None, "pool", *[None] * 5)  # the last one found no other graph
    assert calls[0][1]["capture_error_mode"] == "thread_local"


def test_graphs_are_refused_where_they_cannot_work(model, monkeypatch):
    with pytest.raises(UserError, match=r"is for GPUs of NVIDIA, .* runs on cpu: leave it out"):
        decode_graphs.open_capture(model, 8)
    monkeypatch.setattr(model, "device", replace(model.device, kind="cuda"))
    monkeypatch.setattr(cuda_graphs, "open_capture", lambda: recorded)
    assert decode_graphs.open_capture(model, 8) is recorded
    with pytest.raises(UserError, match=r"does not take torch\.float32, heads of 8 and blocks of 12"):
        decode_graphs.open_capture(model, 12)
    others = {
        "on one process only": ("grid", replace(model.grid, tp=2, world=2)),
        "does not work with experts": ("config", preset("mixtral-tiny")),
    }
    for message, (name, value) in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(model, name, value)
            with pytest.raises(UserError, match=message):
                decode_graphs.open_capture(model, 8)
    model.gpt.config.kernels = replace(model.gpt.config.kernels, paged=None)
    with pytest.raises(UserError, match="needs a kernel that reads the paged cache"):
        decode_graphs.open_capture(model, 8)


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ([], 1, "--cuda-graphs needs --bf16 or --fp16"),
        (["--bf16", "--kv-cache-dtype", "int8"], 1, "--cuda-graphs does not work with --kv-cache-dtype int8"),
        (["--bf16", "--tp", "2"], 2, "--cuda-graphs works on one process only"),
    ],
)
def test_flags_that_do_not_go_with_graphs(tmp_path, flags, world, message):
    words = ["--load", str(tmp_path), "--model", "internlm2-tiny", "--cuda-graphs", *flags]
    with pytest.raises(UserError, match=message):
        serve_args.resolve(words, world)


def test_graphs_are_for_generated_answers(tmp_path):
    words = ["--load", str(tmp_path), "--model", "internlm2-tiny", "--cuda-graphs", "--task"]
    flags = ["--task-data-path", str(evaluating.boolq(tmp_path / "boolq"))]
    with pytest.raises(UserError, match="--cuda-graphs needs --bf16 or --fp16"):
        evaluation_args.resolve([*words, "boolq", *flags], 1)
    with pytest.raises(UserError, match="is for answers that are generated, but those of --task boolq are"):
        evaluation_args.resolve([*words, "boolq", *flags, "--bf16"], 1)
    flags = ["--task-data-path", str(evaluating.gsm8k(tmp_path / "gsm8k"))]
    assert evaluation_args.resolve([*words, "gsm8k", *flags, "--bf16"], 1)[0].evaluation.cuda_graphs


def test_a_device_without_graphs_is_refused_before_anything_is_read(cpu):
    jobs = {
        server: SimpleNamespace(serve=serve_args.ServeArgs(cuda_graphs=True)),
        runner: SimpleNamespace(evaluation=evaluation_args.EvaluationArgs(cuda_graphs=True)),
    }
    for module, job in jobs.items():
        with pytest.raises(UserError, match="this process runs on cpu"):
            module.run(job, cpu, [])


def test_experts_do_not_go_with_graphs(tmp_path):
    config = FAMILIES["mixtral"].write_config(preset("mixtral-tiny"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--cuda-graphs does not work with experts"):
        serve_args.resolve(["--load", str(tmp_path), "--bf16", "--cuda-graphs"], 1)
