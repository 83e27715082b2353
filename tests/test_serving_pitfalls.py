"""Known mistakes of serving engines that the other tests do not show: each has a test here."""

import asyncio
import json
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from helpers.corpus import sentencepiece_dir
from helpers.generation import language_model
from helpers.internlm_versions import MODELS
from helpers.launch import ROOT
from helpers.models import tensors_of
from helpers.paged_engine import HEAD, run
from starlette.responses import Response
from uvicorn.server import ServerState

from ascendspeed.inference.engine import SamplingParams, sample, token_logprobs
from ascendspeed.inference.serving import access, app, args
from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.args import ServeArgs
from ascendspeed.inference.serving.choice_stream import ChoiceStream, parse_function_call
from ascendspeed.inference.serving.engine_loop import EngineLoop
from ascendspeed.inference.serving.generation_service import GenerationService, ServiceLimits
from ascendspeed.inference.serving.http_protocol import HttpProtocol
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.models.gpt.paged_kv_cache import SequenceSlice
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

GREEDY = SamplingParams(max_new_tokens=20)
LIMITS = ServiceLimits("tiny", 64, 8, 1 << 20, 60.0)


@pytest.fixture(scope="module")
def model(cpu):
    return language_model(cpu, MODELS["v1"], tensors_of(MODELS["v1"]))


def submit(engine, number, prompt, sampling=GREEDY, **params):
    """Runs one request to its end; returns it."""
    engine.apply(Events((Submission(number, prompt, RequestParams(sampling, **params)),)))
    request = engine.requests[number]
    while not engine.scheduler.is_idle:
        engine.step()
    return request


# ---------------------------------------------------------------- cache


def test_only_equal_salts_share_prefixes(model):
    engine = PagedEngine(model, EngineSettings(40, 16))
    hits = [submit(engine, i, [*HEAD, 60], salt=salt).shared_tokens for i, salt in enumerate("abaa")]
    assert hits == [0, 0, 32, 32]


def test_a_base_stays_when_a_text_grows_beyond_the_trained_length(model):
    """Two prompts of 60 and 61 of 64 trained tokens, one of which is preempted and read again at 70."""
    prompts = [[*HEAD, *range(60, 88)], [1, *HEAD, *range(60, 88)]]
    engine = PagedEngine(model, EngineSettings(9, 16, token_budget=64))
    submissions = tuple(Submission(i, prompt, RequestParams(GREEDY)) for i, prompt in enumerate(prompts))
    outputs = run(engine, Events(submissions))
    assert engine.scheduler.preemptions
    for i, prompt in enumerate(prompts):
        assert outputs[i] == sample(model, [prompt], GREEDY)[0][0].tokens


def test_a_prompt_that_is_in_the_cache_reads_its_last_block(model):
    """32 tokens are two blocks; the logits of the last token are needed, so one block is read again."""
    engine = PagedEngine(model, EngineSettings(40, 16))
    first, second = (submit(engine, i, HEAD) for i in range(2))
    assert (first.shared_tokens, second.shared_tokens) == (0, 16)
    assert first.output == second.output


def test_blocks_of_an_answer_are_found_again(model):
    """All but the last token of an answer are in the cache: 32 + 16 - 1 tokens are two full blocks."""
    engine = PagedEngine(model, EngineSettings(40, 16))
    answer = submit(engine, 0, HEAD, replace(GREEDY, max_new_tokens=16)).output
    again = submit(engine, 1, [*HEAD, *answer, 60])
    assert again.shared_tokens == 32
    answer = submit(engine, 2, HEAD, replace(GREEDY, max_new_tokens=17)).output
    again = submit(engine, 3, [*HEAD, *answer, 61])
    assert again.shared_tokens == 48
    assert again.output == sample(model, [again.prompt], GREEDY)[0][0].tokens


def test_gathers_are_small_and_of_similar_lengths(model, monkeypatch):
    cache = model.allocate_paged_cache(200, 16)
    monkeypatch.setattr(cache, "_gather_tokens", 160)
    frequencies = cache.rope.inverse_frequencies(0)
    lengths = [5, 100, 20, 90, 17, 33, 150, 3]
    slices = [SequenceSlice(list(range(10)), length - 1, 1, frequencies) for length in lengths]
    cache.begin_pass(slices)
    sizes = [[lengths[i] for i in group.tokens.tolist()] for group in cache._groups]
    assert sizes == [[3, 5, 17, 20], [33], [90], [100], [150]]
    assert all(len(group.blocks) * 16 <= 160 for group in cache._groups)
    model.free_cache()


def test_no_python_object_per_token(model):
    """A slice of 100,000 tokens: a list of their positions alone would take 4 MB."""
    cache = model.allocate_paged_cache(1, 32)
    part = SequenceSlice([0] * 3125, 0, 100_000, cache.rope.inverse_frequencies(0))
    cache.begin_pass([SequenceSlice([0], 0, 2, part.frequencies)])
    tracemalloc.start()
    cache.begin_pass([part])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    model.free_cache()
    assert peak < 500_000


# ---------------------------------------------------------------- sampling


def test_logits_of_rows_that_need_a_token_only(model, monkeypatch):
    rows, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    engine = PagedEngine(model, EngineSettings(40, 16, token_budget=20))
    submit(engine, 0, [*HEAD, 60], replace(GREEDY, max_new_tokens=3))
    assert rows == [1, 1, 1]  # the first pass has 20 tokens and ends nothing


def test_draws_leave_torchs_random_state_alone(model):
    before = torch.get_rng_state()
    drawn = SamplingParams(max_new_tokens=8, do_sample=True, temperature=1.5, seed=3)
    submit(PagedEngine(model, EngineSettings(40, 16)), 0, HEAD, drawn)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.15)])
def test_scores_of_a_prompt_do_not_depend_on_its_parts(cpu, dtype, tolerance):
    """In fp32 to rounding; in bf16 within its precision, as the size of a product changes its bits."""
    built = language_model(cpu, MODELS["v1"], tensors_of(MODELS["v1"]), dtype=dtype)
    text = [*HEAD, *range(60, 80)]
    expected = token_logprobs(built, [text])[0]
    for budget in (7, 64):
        engine = PagedEngine(built, EngineSettings(40, 16, token_budget=budget))
        for number in range(2):  # the second one does not skip what is in the cache
            request = submit(engine, number, text, replace(GREEDY, max_new_tokens=1), scores_prompt=True)
            found = torch.tensor([choice.logprob for choice in request.prompt_choices])
            assert float((found - expected).abs().max()) < tolerance
    assert float((found.roll(1) - expected).abs().max()) > tolerance  # the control


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer.load(sentencepiece_dir(tmp_path_factory.mktemp("tokenizer") / "t"))


def test_a_stop_string_inside_a_tool_call_does_not_count(tokens):
    start, end = 10_000, 10_001
    controls = {start: "action_start", end: "action_end"}
    stream = ChoiceStream(tokens, ["add"], controls)
    call = '{"name": "add", "parameters": {}}'
    pushed = [stream.push(token) for token in [start, *tokens.encode(call).tolist(), end]]
    assert not stream.stopped
    assert pushed[-1][1].name == "add"
    for token in tokens.encode(" add").tolist():
        stream.push(token)
    assert stream.stopped


def test_characters_are_held_back_until_they_are_complete(tokens):
    stream = ChoiceStream(tokens, [])
    ids = tokens.encode("a 🦙 b").tolist()
    texts = [stream.push(token)[0] for token in ids]
    assert "".join([*texts, stream.finish()[0]]) == "a 🦙 b"
    assert all("\ufffd" not in text for text in texts)
    assert "" in texts


def test_an_error_after_the_first_byte_is_an_event():
    class Broken:
        async def chunks(self):
            yield '{"text": "a"}'
            raise ApiError(504, "too late")

    async def collect():
        return [part async for part in app._server_sent_events(Broken())]

    parts = asyncio.run(collect())
    assert all(part.startswith("data: ") and part.endswith("\n\n") for part in parts)
    assert json.loads(parts[1].removeprefix("data: "))["error"]["message"] == "too late"
    assert parts[2] == "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON: .*surrogates"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' twice"),
        (b'{"messages": [{}], "tools": [{"limit": NaN}]}', "NaN is not a JSON number"),
        (b'{"seed": ' + b"9" * 6000 + b"}", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b'{"messages": [{}], "repetition_penalty": 5e-324}', "repetition_penalty"),  # logits become infinite
    ],
)
def test_hostile_bodies_are_400(body, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_body(ChatCompletionRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1": 5, "01": -5}}, "logit_bias"),  # two biases of one token
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"min_tokens": 9}, "min_tokens"),
    ],
)
def test_parameters_without_a_meaning_are_400(fields, param):
    body = parse_body(CompletionRequest, json.dumps({"prompt": "a"} | fields).encode())
    numbers = {"max_new_tokens": 8, "vocab_size": 10, "top_logprobs": 0, "default_seed": 0, "number": 0}
    with pytest.raises(ApiError) as caught:
        body.request_params(stop_ids=(), **numbers)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_call_nested_too_deeply_is_text():
    text = '{"name": "f", "parameters": ' + "[" * 100_000
    assert parse_function_call(text) is None
    assert parse_function_call('{"name": "f", "parameters": {"x": NaN}}') is None  # no JSON to send on


# ---------------------------------------------------------------- connections


def answered_status(application, headers, method="POST"):
    """Status that an ASGI application answers."""
    messages = []

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "method": method, "path": "/v1/completions"}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(application(scope, None, send))
    return messages[0]["status"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "a:80", "origin": "http://a:80"}, 200),
        ({"host": "a:80", "origin": "http://other:80"}, 403),
        ({"host": "a:80", "origin": "null"}, 403),  # a page in a sandbox
        ({"host": "upstream", "origin": "https://a", "sec-fetch-site": "same-origin"}, 200),  # behind a proxy
        ({"host": "a:80", "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(headers, status):
    assert answered_status(access.BrowserMiddleware(Response()), headers) == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("127.9.9.9", 200),
        ("[::1]:80", 200),
        ("LocalHost:80", 200),
        ("localhost.", 200),
        ("chat.localhost", 200),
        ("own-name:80", 200),  # the --host
        ("rebound.example", 403),
        ("localhost.example", 403),
        ("127.0.0.1.example:80", 403),
        ("192.0.2.1", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_names_that_a_service_without_a_key_answers_to(host, status):
    guarded = access.guarded(Response(), None, "own-name", "127.0.0.1")
    assert answered_status(guarded, {"host": host}, "GET") == status
    anywhere = access.guarded(Response(), None, "0.0.0.0", "0.0.0.0")  # every name may be its own
    assert answered_status(anywhere, {"host": host}, "GET") == 200
    with_key = access.guarded(Response(), "key", "own-name", "127.0.0.1")
    assert answered_status(with_key, {"host": host, "authorization": "Bearer key"}, "GET") == 200


@pytest.mark.parametrize(
    ("value", "status"),
    [("Bearer key", 200), ("bearer key", 200), ("Bearer keys", 401), ("key", 401), ("Basic key", 401)],
)
def test_forms_of_the_key(value, status):
    assert answered_status(access.ApiKeyMiddleware(Response(), "key"), {"authorization": value}) == status


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"], ids=["nothing", "half a head"]
)
def test_a_connection_without_a_complete_head_is_closed(sent, monkeypatch):
    """The control, an answer, shows that the connection was served before."""
    monkeypatch.setattr(HttpProtocol, "head_seconds", 0.05)

    async def exchange():
        config = uvicorn.Config(Response(b"answer"), http=HttpProtocol, lifespan="off")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: HttpProtocol(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        received = await reader.read()  # until the server closes
        writer.close()
        server.close()
        return received

    assert asyncio.run(asyncio.wait_for(exchange(), 30)).count(b"answer") == bool(sent)


def test_a_body_that_never_ends_is_408():
    class Endless:
        async def stream(self):
            yield b"{"
            await asyncio.Event().wait()

    limits = replace(LIMITS, request_seconds=0.01)
    routes = app.Routes(GenerationService(None, None, limits, None), "1", False)
    with pytest.raises(ApiError) as caught:
        asyncio.run(routes._read(Endless(), CompletionRequest))
    assert caught.value.status == 408


# ---------------------------------------------------------------- threads and failures


class FailingEngine:
    """An engine whose second step fails."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.scheduler = SimpleNamespace(is_idle=False)
        self.steps = 0

    def apply(self, events) -> None:
        self.log.append(("apply", threading.current_thread().name))

    def step(self):
        self.log.append(("step", threading.current_thread().name))
        self.steps += 1
        if self.steps == 2:
            raise MemoryError("no memory")
        return []


def test_a_failed_engine_answers_503_at_once():
    """Events are sent by the engine's own thread, between its passes; /health and new requests see the
    failure."""
    engine = FailingEngine()

    def send(events):
        engine.log.append(("send", threading.current_thread().name))

    loop = EngineLoop(engine, SimpleNamespace(has_peers=False, send=send))
    causes = []
    loop.report_failure = causes.append
    loop.start()
    loop.join(60)
    assert not loop.is_alive()
    assert engine.log == [(name, "engine") for name in ("send", "apply", "step") * 2]
    assert causes == [loop.error] == ["MemoryError: no memory"]
    service = GenerationService(None, loop, LIMITS, None)
    with pytest.raises(ApiError) as caught:
        service.check_available(1)
    assert caught.value.status == 503
    with pytest.raises(ApiError) as caught:
        asyncio.run(app.Routes(service, "1", False).health(None))
    assert caught.value.status == 503


def test_a_request_of_a_failed_engine_ends():
    """A request that runs when the engine fails gets an error, and leaves no entry behind."""
    loop = SimpleNamespace(error=None, submit=lambda submissions: None)
    service = GenerationService(None, loop, LIMITS, None)

    async def wait():
        arrivals = asyncio.Queue()
        spec = SimpleNamespace(prompt=[1], params=RequestParams(), shares_previous=False)
        choices = service.submit([spec], lambda: None, arrivals)
        service._fail("no memory")
        cause = await arrivals.get()
        service.forget(choices)
        return cause

    assert asyncio.run(wait()) == "no memory"
    assert service.active == 0


def test_tokenising_does_not_block_the_event_loop():
    """The work waits for what the event loop does after it has been started."""
    service = GenerationService(None, None, LIMITS, None)
    event = threading.Event()

    async def both():
        work = asyncio.ensure_future(service.in_tokenizer_thread(lambda: event.wait(60)))
        await asyncio.sleep(0)
        event.set()
        return await work

    assert asyncio.run(both())


# ---------------------------------------------------------------- defaults


def test_the_service_listens_on_this_machine_only():
    assert ServeArgs().host == "127.0.0.1"


@pytest.mark.parametrize("key", ["", "key\r", " key", "schlüssel"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(UserError, match="API key"):
        args.check_api_key(key)
    args.check_api_key("a key")
    args.check_api_key(None)


def test_no_further_web_framework():
    """starlette is enough; fastapi needs opentelemetry."""
    requirements = Path(ROOT, "requirements.txt").read_text()
    assert "starlette==" in requirements
    assert "fastapi" not in requirements
