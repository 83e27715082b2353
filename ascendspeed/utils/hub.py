"""Folders of models from a hub: `internlm/internlm2-7b@REVISION`, `hf://...`, `modelscope://...`."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, TypeVar

from ascendspeed.utils.errors import UserError

HUB_ID = re.compile(
    r"(?:(?P<scheme>hf|modelscope):/{1,2})?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)
TEXTS = ("*.json", "*.model", "*.jinja", "*.txt")
"""Configuration, tokenizer, chat template and licence."""
SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weights that are fetched of a model without safetensors."""
IGNORED = ("*/*", "*.py", "consolidated*")
"""Files that are never fetched: folders beside the model, code, weights in another program's names."""
FLAGS = {"source": "--from"}
"""Flags that are named otherwise than their fields."""
T = TypeVar("T")
LOCKS = Path(".locks", "ascendspeed")
"""Folder of the cache of huggingface_hub in which the ranks of a node wait for one another."""


@dataclass(frozen=True)
class HubModel:
    """A model on a hub, as a command line names it."""

    scheme: str
    """hf or modelscope."""
    repo: str
    revision: str | None
    """Branch, tag or commit; None: the newest commit."""

    def command(self) -> str:
        """Command that fetches the model on another machine."""
        target = self.repo.partition("/")[2]
        tool = "hf download" if self.scheme == "hf" else "modelscope download --model"
        revision = f" --revision {self.revision}" if self.revision else ""
        flag = "local-dir" if self.scheme == "hf" else "local_dir"
        return f"{tool} {self.repo}{revision} --{flag} {target}"


@dataclass(frozen=True)
class HubFolder:
    """A folder that was fetched, and its origin."""

    path: str
    origin: str
    """Name and commit: `internlm/internlm2-7b@COMMIT`."""


def find_model(value: str) -> HubModel | None:
    """Returns the model on a hub that `value` names; None if it is the path of a folder.

    A path that exists here is that path, and so is a name without a scheme whose first part is a folder here.
    """
    match = HUB_ID.fullmatch(value)
    if match is None or os.path.lexists(value):
        return None
    if match["scheme"] is None and os.path.lexists(value.partition("/")[0]):
        return None
    return HubModel(match["scheme"] or "hf", match["repo"], match["revision"])


def fetch(flag: str, value: str, weights: bool = True) -> HubFolder | None:
    """Returns the folder of the model on a hub that the value of a flag names; None if it names none.

    One process of a node fetches it, into the cache of the hub's own library; the others wait. Without
    `weights` only configuration and tokenizer are fetched. Raises UserError if it cannot be fetched.
    """
    model = find_model(value)
    if model is None:
        return None
    launch = _launch(os.environ)
    with _lock(f"{value} {weights}") as file:
        record = _read_record(file) if file and launch else {}
        if launch and record.get("launch") == launch:
            if "error" in record:
                raise UserError(record["error"])
            return HubFolder(record["path"], record["origin"])
        try:
            folder = (_from_hugging_face if model.scheme == "hf" else _from_modelscope)(model, weights)
        except UserError as error:
            text = f"{flag} {value} is no folder here, and {error}. To fetch it elsewhere: {model.command()}"
            _write_record(file, {"launch": launch, "error": text})
            raise UserError(text) from None
        _write_record(file, {"launch": launch, **asdict(folder)})
    return folder


def model_name(folder: str) -> str:
    """Returns the name of the model in a folder, in a hub's cache that of the repository."""
    path = Path(folder).resolve()
    repository = path.parent.parent.name
    is_cached = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.split("--")[-1] if is_cached else path.name


def localize(options: T, weights: Mapping[str, bool]) -> tuple[T, tuple[str, ...]]:
    """Returns the dataclass `options` with folders in place of models on a hub, and their origins.

    `weights`: name of a field -> True if the weights are needed. Raises UserError.
    """
    folders = {}
    for name, needs_weights in weights.items():
        value = getattr(options, name)
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        if value is not None and (folder := fetch(flag, str(value), needs_weights)):
            folders[name] = folder
    paths = {name: type(getattr(options, name))(folder.path) for name, folder in folders.items()}
    origins = dict.fromkeys(folder.origin for folder in folders.values())
    return replace(options, **paths), tuple(origins)  # type: ignore[type-var]


def _from_hugging_face(model: HubModel, weights: bool) -> HubFolder:
    """Fetches with huggingface_hub. Raises UserError with the reason if that fails."""
    from huggingface_hub import errors

    try:
        path = _snapshot(model.repo, model.revision, TEXTS, PICKLES)
        if weights:
            names = _file_names(model.repo, path)
            is_safe = any(name.endswith(".safetensors") for name in names)
            _snapshot(model.repo, path.name, SAFETENSORS if is_safe else PICKLES)
    except (errors.HTTPError, OSError, errors.HFValidationError) as error:
        if getattr(error, "errno", None):
            raise  # of the disk
        raise UserError(_reason(error, model)) from None
    return HubFolder(str(path), f"{model.repo}@{path.name}")


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], without: tuple[str, ...] = ()
) -> Path:
    """Fetches the files of `patterns`; the name of the folder is the commit."""
    from huggingface_hub import snapshot_download

    ignored = [*IGNORED, *without]
    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=[*patterns], ignore_patterns=ignored)
    )


def _file_names(repo: str, folder: Path) -> list[str]:
    """Names of the model's files on the hub; if the cache has no record of them, those in the cache."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        files = get_cached_repo_tree(repo, revision=folder.name)
        return [file.path for file in files if not any(fnmatch(file.path, name) for name in IGNORED)]
    except errors.CachedRepoTreeNotFoundError:
        return [path.name for path in folder.iterdir()]


def _reason(error: Exception, model: HubModel) -> str:
    """Describes why a model could not be fetched."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"its licence has to be accepted at {endpoint}/{model.repo} (then set HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{endpoint} has no revision {model.revision} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no such model, or it is private (set HF_TOKEN)"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.IncompleteSnapshotError):
        cause = type(error.__cause__).__name__
        is_offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE forbids to fetch it" if is_offline else f"{endpoint} fails ({cause})"
        return f"{reason} and the cache does not have all of it"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{endpoint} fails: {lines[0]}"


def _from_modelscope(model: HubModel, weights: bool) -> HubFolder:
    """Fetches with modelscope. Raises UserError with the reason if that fails."""
    if importlib.util.find_spec("modelscope") is None:
        raise UserError("modelscope:// needs a package: pip install modelscope")
    from modelscope import snapshot_download

    def snapshot(*patterns: str, without: tuple[str, ...] = ()) -> Path:
        ignored = [*IGNORED, *without]
        return Path(
            snapshot_download(
                model.repo, revision=model.revision, allow_patterns=[*patterns], ignore_patterns=ignored
            )
        )

    try:
        path = snapshot(*TEXTS, *(SAFETENSORS if weights else ()), without=PICKLES)
        if weights and not any(path.glob(*SAFETENSORS)):
            path = snapshot(*TEXTS, *PICKLES)
    except Exception as error:  # its exceptions have no class in common
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"ModelScope fails: {lines[0]}") from None
    return HubFolder(str(path), f"modelscope://{model.repo}@{model.revision or 'master'}")


def _launch(environment: Mapping[str, str]) -> str | None:
    """Identifies the launcher of this rank on this node; None if this process was not launched as a rank."""
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return None
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {parent.pid} {parent.create_time()}"


@contextlib.contextmanager
def _lock(name: str) -> Iterator[IO[str] | None]:
    """Holds the lock of `name` in the cache; gives its file, or None if the cache cannot be written."""
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE) / LOCKS / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError:
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read_record(file: IO[str]) -> dict[str, str]:
    """Result that another rank has left in the lock's file; empty if there is none."""
    file.seek(0)
    try:
        record = json.loads(file.read())
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(file: IO[str] | None, record: dict[str, str | None]) -> None:
    if file:
        file.truncate(0)
        file.write(json.dumps(record))
        file.flush()
