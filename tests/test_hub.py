"""Models that a command line names by their hub, against a hub on the loopback interface."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import hf_folders, hub_server, tokenizers
from helpers.hub_server import COMMIT

from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.cli import launch, train_args
from ascendspeed.inference import args as inference_args
from ascendspeed.inference.serving import args as serving_args
from ascendspeed.training import input_record
from ascendspeed.utils import hub
from ascendspeed.utils.errors import UserError

MODEL = "tiny/model"
TEXTS = ["README.txt", "config.json", "tokenizer.model", "tokenizer_config.json"]


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A model as it is published: code, weights in two formats and those of another program."""
    folder = hf_folders.directory(
        tmp_path_factory.mktemp("published") / "model", tokenizers.trained(), tokenizer_config={}
    )
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    (folder / "README.txt").write_text("tiny")
    return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with hub_server.serving(published) as server:
        hub_server.use(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("value", [MODEL, f"hf://{MODEL}", f"{MODEL}@v1", f"{MODEL}@{COMMIT}"])
def test_weights_are_fetched_once_without_code(server, value):
    folder = hub.fetch("--load", value)
    assert folder.origin == f"{MODEL}@{COMMIT}"
    assert names(folder.path) == sorted([*TEXTS, "model.safetensors"]) == server.downloads()
    again = hub.fetch("--load", value)
    assert again == folder
    assert len(server.downloads()) == len(TEXTS) + 1


def test_a_tokenizer_comes_without_weights(server):
    assert names(hub.fetch("--tokenizer", MODEL, weights=False).path) == TEXTS


def test_pickles_are_fetched_if_there_is_nothing_else(server, published, tmp_path):
    server.folder = tmp_path / "old"
    server.folder.mkdir()
    for name in ("config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_internlm2.py"):
        (server.folder / name).write_bytes((published / name).read_bytes())
    folder = hub.fetch("--load", MODEL)
    assert names(folder.path) == ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


def test_a_folder_of_that_name_wins(server, tmp_path):
    (tmp_path / MODEL).mkdir(parents=True)
    assert hub.fetch("--load", MODEL) is None
    assert hub.fetch("--load", "tiny/other") is None, "a folder tiny: the name is a path with a mistake"
    for path in ("model", "./tiny/model", "/tiny/model", "a/b/c", "tiny/", "s3://tiny/model", "../model"):
        assert hub.fetch("--load", path) is None
    assert server.requests == []
    assert hub.fetch("--load", "hf://tiny/model") is not None


def test_what_cannot_be_fetched_is_one_line(server, tmp_path, monkeypatch):
    def refused(value: str, reason: str) -> None:
        with pytest.raises(UserError) as error:
            hub.fetch("--load", value)
        repo = value.partition("@")[0].rpartition("//")[2]
        command = f"hf download {repo}" + (" --revision v2" if "@" in value else "")
        assert str(error.value).startswith(f"--load {value} is no folder here, and "), str(error.value)
        assert reason in str(error.value), str(error.value)
        assert str(error.value).endswith(
            f"To fetch it elsewhere: {command} --local-dir {repo.partition('/')[2]}"
        )

    refused("tiny/none", f"{server.endpoint} has no such model")
    refused(f"hf://{MODEL}@v2", "has no revision v2")
    refused("tiny/a--b", "Cannot have -- or .. in repo_id")
    server.gated = True
    refused(MODEL, f"its licence has to be accepted at {server.endpoint}/{MODEL}")
    hub_server.use(monkeypatch, server.endpoint, tmp_path / "other", offline=True)
    refused(MODEL, "HF_HUB_OFFLINE forbids to fetch it and the cache does not have all of it")
    hub_server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    refused(MODEL, "http://127.0.0.1:9 fails (ConnectError)")


def test_the_cache_serves_without_the_hub(server, tmp_path, monkeypatch):
    """With HF_HUB_OFFLINE, and if the hub gives no answer; but not weights that were never fetched."""
    hub.fetch("--tokenizer-name-or-path", MODEL, weights=False)
    hub_server.use(monkeypatch, server.endpoint, tmp_path / "cache", offline=True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to fetch it and the cache does not have all"):
        hub.fetch("--load", MODEL)
    hub_server.use(monkeypatch, server.endpoint, tmp_path / "cache")
    folder = hub.fetch("--load", MODEL)
    for endpoint, offline in ((server.endpoint, True), ("http://127.0.0.1:9", False)):
        hub_server.use(monkeypatch, endpoint, tmp_path / "cache", offline=offline)
        assert hub.fetch("--load", MODEL) == folder
    hub_server.use(monkeypatch, server.endpoint, tmp_path / "elsewhere", offline=True)
    (tmp_path / "elsewhere").mkdir(mode=0o500)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub.fetch("--load", MODEL)


def test_one_rank_of_a_launch_asks_the_hub(server, tmp_path, monkeypatch):
    """Ranks of one launcher take its result, failures too; the next launch asks again."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    hub.fetch("--load", MODEL)
    asked = len(server.requests)
    assert hub.fetch("--load", MODEL).origin == f"{MODEL}@{COMMIT}"
    with pytest.raises(UserError, match="has no such model") as first:
        hub.fetch("--load", "tiny/none")
    asked_none = len(server.requests)
    with pytest.raises(UserError) as second:
        hub.fetch("--load", "tiny/none")
    assert str(second.value) == str(first.value)
    assert len(server.requests) == asked_none
    monkeypatch.setattr(hub, "_launch", lambda environment: "the next")
    hub.fetch("--load", MODEL)
    assert len(server.requests) > asked_none >= asked


def test_modelscope(tmp_path, monkeypatch):
    """Its package does the work; a stand-in records what it is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install modelscope.*modelscope download --model tiny/model"):
        hub.fetch("--load", "modelscope://tiny/model")
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        if repo == "tiny/none":
            raise ValueError("404\nmore")
        return str(tmp_path)

    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    folder = hub.fetch("--load", "modelscope://tiny/model@v1")
    assert (folder.path, folder.origin) == (str(tmp_path), "modelscope://tiny/model@v1")
    patterns = [options["allow_patterns"] for _, options in calls]
    assert [("*.safetensors" in names, "pytorch_model*.bin" in names) for names in patterns] == [
        (True, False),
        (False, True),
    ]
    assert all("*.py" in options["ignore_patterns"] for _, options in calls)
    with pytest.raises(UserError, match=r"ModelScope fails: 404\. To fetch"):
        hub.fetch("--load", "modelscope://tiny/none")


def test_commands_take_the_folder(server, monkeypatch):
    """Training records the commit, and asks no hub for --load of the run's own checkpoints."""
    flags = ["--mock-data", "--tokenizer-name-or-path", f"hf://{MODEL}"]
    run, _ = train_args.resolve([*flags, "--load", MODEL], 1)
    assert run.model.hidden_size == hf_folders.MODEL.hidden_size
    assert Path(run.train.load) == Path(run.data.tokenizer_name_or_path)
    assert run.inputs.hub == (f"{MODEL}@{COMMIT}",)
    assert train_args.schema.from_dict(json.loads(json.dumps(train_args.schema.to_dict(run)))) == run
    asked = len(server.requests)
    own, _ = train_args.resolve(["--mock-data", "--load", "ckpt/run", "--save", "ckpt/run"], 1)
    assert own.train.load == "ckpt/run"
    assert len(server.requests) == asked

    job, _ = inference_args.resolve(["--load", MODEL, "--prompt", "x"], 1)
    assert (job.spec.args.load, job.spec.tokenizer) == (run.train.load, run.train.load)
    served, _ = serving_args.resolve(["--load", MODEL], 1)
    assert served.model_name == "model"
    assert launch.INFERENCE_PROGRAMS  # the checks before ranks are started resolve in the same way
    launch._check_inference(
        "tasks/inference/generate.py", ["--load", MODEL], launch.LaunchPlan(("x",), world=1)
    )


def test_nodes_with_different_commits_are_refused(server):
    run, _ = train_args.resolve(["--mock-data", "--load", MODEL], 1)

    def grid(others: tuple[str, ...]) -> types.SimpleNamespace:
        return types.SimpleNamespace(world=2, all_gather_object=lambda value: [value, others])

    input_record._check_revisions(run, grid(run.inputs.hub))
    with pytest.raises(
        UserError, match=r"different commits, tiny/model@0123\S* and tiny/model@f00; name one"
    ):
        input_record._check_revisions(run, grid(("tiny/model@f00",)))


@pytest.mark.slow
def test_programs(server, tmp_path):
    """Training on two ranks and conversion, with the hub's own variables; run.json has the commit."""
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "programs"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def intern(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ascendspeed.commands.intern", *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    training = "--mock-data --seq-length 16 --train-iters 1 --save ckpt --save-interval 1 --device cpu"
    done = intern(
        "train", "--nproc", "2", "--load", MODEL, "--tokenizer-name-or-path", MODEL, *training.split()
    )
    assert done.returncode == 0, done.stderr
    assert len(server.downloads()) == len(TEXTS) + 1
    checkpoint = Checkpoint(tmp_path / "ckpt/step_0000001")
    assert checkpoint.run.inputs.hub == (f"{MODEL}@{COMMIT}",)
    done = intern("convert", "--from", f"hf://{MODEL}", "--output", "out", "--format", "hf-llama", "--verify")
    assert done.returncode == 0, done.stderr
    done = intern("convert", "--from", "tiny/none", "--output", "none", "--format", "hf-llama")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hf download tiny/none --local-dir none" in done.stderr
