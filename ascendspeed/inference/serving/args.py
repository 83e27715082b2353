"""Command line of the service: flags -> a checked `ServeJob`. No torch, so that errors come at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command
from ascendspeed.cli.compat import INFERENCE
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset
from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference.args import EngineArgs, EngineSpec, resolve_engine
from ascendspeed.inference.graph_checks import check_graph_flags
from ascendspeed.inference.input_checks import check_chat_template
from ascendspeed.models import families
from ascendspeed.utils import hub
from ascendspeed.utils.errors import UserError

API_KEY_VARIABLE = "INTERNLM_API_KEY"
"""Environment variable with the key: other users of the machine can read a command line."""


@dataclass(frozen=True)
class ServeArgs:
    """Address, limits and cache of the service."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every interface, which other machines reach."""
    port: int = 8000
    """Port to listen on; 0: a free one, which the log names."""
    api_key: str | None = None
    """Key that clients must send on every path but /health; None: INTERNLM_API_KEY of the environment, or
    no key."""
    served_model_name: str | None = None
    """Name of the model in the API; None: the last part of --load, or the model's name
    on its hub."""
    chat_template: str | None = None
    """Chat template: v1, v1-eoh, v2, v2.5 or v3; None: that of the model's family and its tokenizer."""
    max_model_len: int | None = None
    """Most tokens of a prompt with its answer; None: the trained context, or what the cache holds."""
    cache_memory: float = 2.0
    """GiB of keys and values on each rank."""
    block_size: int | None = None
    """Tokens of a block of the cache; None: the size of the device's kernel, else 32."""
    max_num_seqs: int = 32
    """Most sequences that are generated at a time."""
    max_num_batched_tokens: int = 256
    """Most tokens of a forward pass: parts of long prompts are read beside the answers that are being
    generated."""
    max_queue: int = 256
    """Most sequences that wait; further requests get 429."""
    max_body_mib: float = 16.0
    """Largest body of a request in MiB."""
    request_seconds: float = 600.0
    """Deadline of a request in seconds."""
    drain_seconds: float = 30.0
    """Seconds that running requests have after SIGTERM; new ones are refused."""
    prefix_caching: bool = True
    """Reuse the cache of prompts that begin with the same blocks."""
    rope_length: int | None = None
    """Fix the base of dynamic NTK by this length for all requests, so that long prompts of different lengths
    share prefixes; None: by each prompt's own length."""
    lookup: int = 0
    """Prompt lookup for requests without sampling and penalties: at most so many tokens are proposed that
    followed the last ones earlier in the text, and checked in one pass; 0: none."""
    cuda_graphs: bool = False
    """Launch the kernels of a pass of single tokens together, by a CUDA graph for each of a few numbers of
    sequences. On one GPU, in bf16 or fp16, with a kernel that reads the paged cache. Not run on a GPU yet."""


@dataclass(frozen=True)
class ServeCommand:
    """Serves a model over HTTP with OpenAI's API.

    python tasks/inference/serve.py --load DIR --bf16 --port 8000
    """

    serve: ServeArgs = field(default_factory=ServeArgs)
    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class ServeJob:
    """A checked command line of the service."""

    spec: EngineSpec
    serve: ServeArgs
    model_name: str
    api_key: str | None


def resolve(args: Sequence[str], world: int) -> tuple[ServeJob, list[str]]:
    """Returns the job of `args` for `world` processes, and notes for the user. Raises UserError."""
    line = command.parse(ServeCommand, args, INFERENCE, ServeCommand.__doc__ or "")
    spec = resolve_engine(line, world)
    serve = line.options.serve
    _check(serve)
    if serve.cuda_graphs:
        check_graph_flags(spec)
    check_chat_template(serve.chat_template)
    name = serve.served_model_name or hub.model_name(spec.args.load or ".")
    api_key = serve.api_key if serve.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    check_api_key(api_key)
    return ServeJob(spec, serve, name, api_key), line.notes


def check_api_key(api_key: str | None) -> None:
    """Raises `UserError` for a key that no client can send."""
    if api_key == "":
        raise UserError(f"the API key is empty (--api-key or {API_KEY_VARIABLE}); leave it out for no key")
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise UserError(
            f"the API key (--api-key or {API_KEY_VARIABLE}) begins or ends with a blank, or has a control "
            "character or one outside ASCII, and clients cannot send it in a header: choose another key"
        )


def _check(serve: ServeArgs) -> None:
    command.check_minimum(
        serve,
        {
            "max_model_len": 2,
            "block_size": 1,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "max_queue": 0,
            "rope_length": 1,
            "lookup": 0,
        },
    )
    for name in ("cache_memory", "max_body_mib", "request_seconds"):
        if not getattr(serve, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(serve, name)}: must be above 0")
    if not serve.drain_seconds >= 0:
        raise UserError(f"--drain-seconds {serve.drain_seconds}: must be at least 0")
    if not 0 <= serve.port < 65536:
        raise UserError(f"--port {serve.port}: must be between 0 and 65535")
    if serve.max_num_batched_tokens < serve.max_num_seqs:
        raise UserError(
            f"--max-num-batched-tokens {serve.max_num_batched_tokens} is less than --max-num-seqs "
            f"{serve.max_num_seqs}: a pass needs one token of every sequence"
        )
