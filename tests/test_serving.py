"""The HTTP service through the unmodified `openai` client: answers, streams, limits, errors and shutdown."""

import http.client
import json
import os
import signal
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from helpers.generate_command import folder, hf_continuation, reference
from helpers.generation import hf_logprobs
from helpers.scripted_model import IM_END, scripted_model
from helpers.serving import running_server

from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, Message

__all__ = ["folder", "reference"]

LAYOUTS = {"one rank": {}, "TP 2": {"tp": 2}}
QUESTION = [{"role": "user", "content": "which words are there?"}]
KEY = "a secret"
CALL = '{"name": "add", "parameters": {"a": 1}}'
CONTROLS = (IM_END, "<|im_start|>", "<|action_start|>", "<|action_end|>", "<|plugin|>")


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def server(request, folder, tmp_path_factory):
    flags = ["--served-model-name", "tiny", "--cache-memory", "0.01", "--block-size", "16"]
    logs = tmp_path_factory.mktemp("server")
    with running_server(folder, logs, *flags, "--max-queue", "8", **LAYOUTS[request.param]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokens(folder):
    return tokenizer.load(folder)


def usable(tokens):
    """Settings of `generate` that leave out the rows of the model without a token."""
    return {"suppress_tokens": list(range(tokens.vocab_size, 512))}


def chat(client, **fields):
    fields = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12} | fields
    return client.chat.completions.create(**fields)


def test_chat_is_what_transformers_continues(client, tokens, reference):
    prompt = ChatFormat(tokens, None, "internlm").prompt_ids([Message("user", QUESTION[0]["content"])])
    answer = chat(client)
    expected = hf_continuation(reference, prompt, max_new_tokens=12, eos_token_id=[2], **usable(tokens))
    assert answer.choices[0].message.content == tokens.decode(expected)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    again = chat(client)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_a_stream_is_the_answer_in_parts(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_choices_have_their_own_draws_and_a_seed_repeats_them(client):
    def texts(seed):
        answer = chat(client, temperature=1.5, n=4, seed=seed)
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert len(set(first)) == 4
    assert texts(7) == first
    assert texts(8) != first


def test_logprobs_are_those_of_the_model(client, tokens, reference):
    prompt = [1, *tokens.encode("some words").tolist()]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    new = hf_continuation(reference, prompt, max_new_tokens=6, eos_token_id=[2], **usable(tokens))
    expected = hf_logprobs(reference, [*prompt, *new])[len(prompt) - 1 : -1]
    chosen = expected.gather(1, torch.tensor(new)[:, None])[:, 0].tolist()
    assert logprobs.token_logprobs == pytest.approx(chosen, abs=1e-5)
    best = expected[:, : tokens.vocab_size].topk(2)
    assert [max(given.values()) for given in logprobs.top_logprobs] == pytest.approx(
        best.values[:, 0].tolist(), abs=1e-5
    )
    assert "".join(logprobs.tokens) == answer.choices[0].text


def test_logprobs_of_a_chat(client, tokens, reference):
    prompt = ChatFormat(tokens, None, "internlm").prompt_ids([Message("user", QUESTION[0]["content"])])
    answer = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    new = hf_continuation(reference, prompt, max_new_tokens=12, eos_token_id=[2], **usable(tokens))
    expected = hf_logprobs(reference, [*prompt, *new])[len(prompt) - 1 : -1, : tokens.vocab_size].topk(3)
    for item, values, ids in zip(answer, *expected, strict=True):
        assert item.logprob == pytest.approx(float(values[0]), abs=1e-5)
        assert [top.logprob for top in item.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
        data = [tokens.token_bytes(token) for token in ids.tolist()]
        assert [bytes(top.bytes) for top in item.top_logprobs] == [text or b"" for text in data]


def test_prompts_of_every_form(client, tokens):
    ids = [1, *tokens.encode("some words").tolist()]
    texts = {
        client.completions.create(model="tiny", prompt=prompt, temperature=0).choices[0].text
        for prompt in ("some words", ["some words"], ids, [ids])
    }
    assert len(texts) == 1
    answer = client.completions.create(model="tiny", prompt=["some words", "other"], n=2, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == texts.pop()
    echo = client.completions.create(model="tiny", prompt="some words", echo=True, temperature=0)
    assert echo.choices[0].text == "some words" + answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_has_the_logprobs_of_the_prompt(client, tokens, reference, stream):
    """Twice, as the second request must not skip what is in the prefix cache."""
    prompt = [1, *tokens.encode("some words and more of these words, and words again").tolist()]
    expected = hf_logprobs(reference, prompt)[:-1]
    chosen = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    best = expected[:, : tokens.vocab_size].max(1).values.tolist()
    fields = {"prompt": [prompt, [1, 5]], "max_tokens": 3, "logprobs": 1, "echo": True, "n": 2}
    for _ in range(2):
        answer = client.completions.create(model="tiny", temperature=0, stream=stream, **fields)
        choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
        for index in (0, 1):
            parts = [choice for choice in choices if choice.index == index]
            found = [value for part in parts for value in part.logprobs.token_logprobs]
            top = [value for part in parts for value in part.logprobs.top_logprobs]
            assert found[0] is top[0] is None
            assert found[1 : len(prompt)] == pytest.approx(chosen, abs=1e-5)
            assert [max(item.values()) for item in top[1 : len(prompt)]] == pytest.approx(best, abs=1e-5)
            assert len(found) == len(prompt) + 3
            texts = [text for part in parts for text in part.logprobs.tokens]
            offsets = [offset for part in parts for offset in part.logprobs.text_offset]
            assert offsets == [sum(map(len, texts[:i])) for i in range(len(texts))]


def test_a_stop_string_spans_tokens(client):
    whole = client.completions.create(model="tiny", prompt="some words", temperature=0).choices[0].text
    stop = whole[5:9]
    answer = client.completions.create(model="tiny", prompt="some words", temperature=0, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_biases_and_penalties(client, tokens):
    word = tokens.encode("w").tolist()[-1]
    answer = client.completions.create(
        model="tiny", prompt="some", temperature=0, max_tokens=3, logit_bias={str(word): 100}
    )
    assert answer.choices[0].text == tokens.decode([word] * 3)
    answer = client.completions.create(
        model="tiny",
        prompt="some",
        temperature=0,
        max_tokens=3,
        logit_bias={str(word): 100},
        extra_body={"ignore_eos": True},
        frequency_penalty=2.0,
        presence_penalty=2.0,
    )
    assert answer.choices[0].text == tokens.decode([word] * 3)  # 100 is more than all penalties


@pytest.mark.parametrize(
    ("status", "param", "fields"),
    [
        (400, "best_of", {"extra_body": {"best_of": 2}}),
        (400, "temperature", {"temperature": -1}),
        (400, "temperature", {"extra_body": {"temperature": "1"}}),
        (400, "n", {"n": 0}),
        (400, "messages", {"messages": [{"role": "wizard", "content": "a"}]}),
        (400, "messages", {"messages": []}),
        (400, "prompt", {"max_tokens": 100_000}),
        (400, "top_logprobs", {"top_logprobs": 2}),
        (400, "logit_bias", {"logit_bias": {"1000000": 1}}),
        (400, "stop_token_ids", {"extra_body": {"stop_token_ids": [1_000_000], "min_tokens": 2}}),
        (400, "tool_choice", {"tool_choice": "required"}),
        (400, "response_format", {"response_format": {"type": "json_object"}}),
        (404, "model", {"model": "gpt-4"}),
        (400, "n", {"n": 100}),  # never fits: a client would repeat it in vain after 429
    ],
)
def test_a_wrong_field_is_named(client, status, param, fields):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **fields)
    assert caught.value.status_code == status
    assert caught.value.body["param"] == param
    assert caught.value.body["message"]


def test_other_paths(server, client, tokens):
    def post(path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(server.url + path, data, timeout=60) as answer:
            return json.loads(answer.read())

    assert [model.id for model in client.models.list()] == ["tiny"]
    ids = post("/tokenize", {"prompt": "some words"})["tokens"]
    assert ids == [1, *tokens.encode("some words").tolist()]
    assert post("/detokenize", {"tokens": ids})["prompt"] == "some words"
    conversation = post("/tokenize", {"messages": QUESTION})
    assert conversation["count"] == chat(client).usage.prompt_tokens
    assert json.loads(server.get("/ready")) == {"status": "ready"}
    assert "version" in json.loads(server.get("/version"))
    for path, body, status in [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b'{"prompt": "' + b"a" * (17 << 20) + b'"}', 413),
        ("/v1/nothing", b"{}", 404),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(path, body)
        assert caught.value.code == status
        assert json.loads(caught.value.read())["error"]["message"]


def test_a_rebound_name_is_403(server):
    """A request as a browser sends it for a page whose name points to 127.0.0.1."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get("/v1/models", {"Host": "rebound.example", "Sec-Fetch-Site": "same-origin"})
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["type"]) == (403, "permission_error")
    assert "rebound.example" in error["message"]
    assert server.get("/v1/models", {"Host": "localhost", "Sec-Fetch-Site": "same-origin"})


def test_a_client_that_leaves_frees_its_blocks(server, client):
    aborted = 0
    for stream in (True, False):
        body = {"prompt": "some", "max_tokens": 230, "n": 30, "stream": stream, "ignore_eos": True}
        aborted += 30
        counted = f'finished_reason="abort",model_name="tiny"}} {aborted}.0'
        with server.held():
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
            connection.request("POST", "/v1/completions", json.dumps(body))
            _wait_for(lambda: server.metric("num_requests_running") > 0)
            connection.close()
            _wait_for(lambda counted=counted: counted in server.get("/metrics"))
        _wait_for(lambda: server.metric("num_requests_running") == 0)
        assert server.metric("kv_cache_usage_perc") == 0


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_key_and_drain(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNLM_API_KEY", KEY)
    with running_server(folder, tmp_path, "--cache-memory", "0.01", "--served-model-name", "tiny") as server:
        for path in ("/v1/models", "/metrics", "/ready", "/version"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.get(path)
            assert caught.value.code == 401
        assert json.loads(server.get("/health")) == {"status": "ok"}
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        with server.held():
            stream = iter(chat(client, stream=True, n=8, max_tokens=20, extra_body={"ignore_eos": True}))
            next(stream)
            os.kill(server.processes[0].pid, signal.SIGTERM)
            _wait_for(lambda: "signal 15: finishing 8 sequences" in server.errors.read_text())
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        server.processes[0].join(60)
        assert server.processes[0].exitcode == 0


def test_a_full_queue_is_429(server, client):
    """The openai client knows it by its class, and would repeat the request."""
    body = {"prompt": "some", "max_tokens": 230, "n": 40, "stream": True, "ignore_eos": True}
    with server.held():
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps(body))
        _wait_for(lambda: server.metric("num_requests_running") > 0)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["Retry-After"] == "1"
        connection.close()
    _wait_for(lambda: server.metric("num_requests_running") == 0)


@pytest.mark.slow
def test_pipeline_stages_over_http(folder, tmp_path, tokens, reference):
    with running_server(
        folder, tmp_path, "--cache-memory", "0.01", "--served-model-name", "tiny", pp=2
    ) as two:
        client = openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0)
        prompt = ChatFormat(tokens, None, "internlm").prompt_ids([Message("user", QUESTION[0]["content"])])
        expected = hf_continuation(reference, prompt, max_new_tokens=12, eos_token_id=[2], **usable(tokens))
        assert chat(client).choices[0].message.content == tokens.decode(expected)
        chunks = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
        assert "".join(chunks) == tokens.decode(expected)
        os.kill(two.processes[0].pid, signal.SIGTERM)
        for process in two.processes:
            process.join(60)
            assert process.exitcode == 0


def test_a_template_that_does_not_fit_is_an_error_at_the_start(folder, tmp_path):
    with (
        pytest.raises(AssertionError, match=r"error: --chat-template v9 does not exist; choose from v1"),
        running_server(folder, tmp_path, "--chat-template", "v9"),
    ):
        pass


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory):
    home = tmp_path_factory.mktemp("tools")
    words = ["7", "<|action_start|>", "<|plugin|>", CALL, "<|action_end|>", IM_END]
    path = scripted_model(home / "model", words, "9", special=CONTROLS, ordinary=(CALL,))
    flags = ["--chat-template", "v2.5", "--cache-memory", "0.01", "--served-model-name", "tiny"]
    with running_server(path, home, *flags) as running:
        yield running


def test_tool_calls(tool_server):
    client = openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    answer = chat(client, tools=tools)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content == "7"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    history = [*QUESTION, answer.choices[0].message.model_dump()]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
    assert chat(client, messages=history, tools=tools).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in chat(client, tools=tools, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert chunks[-1].finish_reason == "tool_calls"
    cut = chat(client, max_tokens=4)  # the call is not complete, but its JSON is
    assert cut.choices[0].finish_reason == "length"
