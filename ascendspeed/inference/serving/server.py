"""Runs the service: the HTTP server on rank 0, the engine on every rank."""

import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from types import FrameType

import uvicorn

from ascendspeed.distributed.device import Device
from ascendspeed.inference.serving import decode_graphs
from ascendspeed.inference.serving.access import guarded, is_loopback
from ascendspeed.inference.serving.app import create_app
from ascendspeed.inference.serving.args import ServeArgs, ServeJob
from ascendspeed.inference.serving.engine_loop import EngineLoop, follow
from ascendspeed.inference.serving.event_channel import EventChannel
from ascendspeed.inference.serving.generation_service import GenerationService, ServiceLimits
from ascendspeed.inference.serving.http_protocol import HttpProtocol
from ascendspeed.inference.serving.metrics import ServiceMetrics
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.session import Session
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = 30
"""Seconds in which the engine thread must end."""


class Server(uvicorn.Server):
    """uvicorn's server, which refuses new requests while it drains, and ends with code 0 after a signal."""

    def __init__(self, config: uvicorn.Config, service: GenerationService) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs; uvicorn's own version raises them again at the end."""
        previous = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second signal ends at once."""
        if not self._service.is_draining:
            logger.info(
                f"signal {sig}: finishing {self._service.active} sequences; a second one ends at once"
            )
        self.force_exit = self._service.is_draining
        self._service.is_draining = self.should_exit = True


def run(job: ServeJob, device: Device, notes: Sequence[str]) -> None:
    """Serves until a signal. Collective. Raises `UserError`."""
    serve = job.serve
    if serve.cuda_graphs:
        decode_graphs.check_device(device)
    session = Session.open(job.spec, device, serve.chat_template)
    for note in notes:
        logger.info(f"note: {note}")
    if serve.chat_template:
        session.chat_format  # noqa: B018 - a template that does not fit is an error now, not in every request
    listener = _listen(session, serve)
    settings = _settings(session, serve)  # before ranks part: an error ends all of them
    capture = decode_graphs.open_capture(session.model, settings.block_size) if serve.cuda_graphs else None
    engine = PagedEngine(session.model, settings, capture)
    limits = _limits(session, job, settings)
    channel = EventChannel(session.grid)
    if session.grid.rank:
        # Rank 0 ends the others after it has drained.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        follow(engine, channel)
        return
    assert listener is not None
    metrics = ServiceMetrics(engine, job.model_name)
    service = GenerationService(session, EngineLoop(engine, channel), limits, metrics)
    _serve(service, job, listener)


def _serve(service: GenerationService, job: ServeJob, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    limits, engine = service.limits, service.engine_loop.engine
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def announce() -> None:
        logger.info(
            f"serving {limits.model_name} on {url}/v1: at most {limits.max_model_len:,} tokens a request, "
            f"{engine.max_tokens:,} in the cache, {engine.settings.max_running} sequences at a time"
        )

    app = create_app(service, version("ascendspeed"), job.api_key is not None, announce)
    config = uvicorn.Config(
        guarded(app, job.api_key, job.serve.host, host),
        http=HttpProtocol,
        log_level="warning",
        timeout_graceful_shutdown=int(job.serve.drain_seconds),
        lifespan="on",
    )
    Server(config, service).run([listener])
    service.engine_loop.join(STOP_SECONDS)
    logger.info("the service has ended")


def _listen(session: Session, serve: ServeArgs) -> socket.socket | None:
    """Opens the port on rank 0, before the weights are read. Raises `UserError` on every rank."""
    sockets: list[socket.socket] = []

    def listen() -> bytes:
        family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
        try:
            sockets.append(socket.create_server((serve.host, serve.port), family=family, backlog=2048))
        except OSError as error:
            unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            wrong = "host" if unknown else "port"
            address = f"--host {serve.host} --port {serve.port}"
            raise UserError(f"{address}: {error.strerror or error}; choose another --{wrong}") from None
        if not is_loopback(sockets[0].getsockname()[0]):
            logger.info(f"note: --host {serve.host}: other machines can reach the service; set an API key")
        return b""

    session.broadcast_bytes(listen)
    return sockets[0] if sockets else None


def _settings(session: Session, serve: ServeArgs) -> EngineSettings:
    """Returns the sizes of the cache: as many blocks as fit into --cache-memory. Raises `UserError`."""
    model = session.model
    block_size = serve.block_size or model.paged_block_size
    kernel = model.paged_kernel
    if kernel and block_size % kernel.block_multiple:
        raise UserError(
            f"--block-size {block_size}: {kernel.source} takes multiples of {kernel.block_multiple}; "
            "leave it out"
        )
    block_bytes = model.cache_bytes_per_token * block_size
    num_blocks = int(serve.cache_memory * 2**30 // block_bytes)
    num_blocks -= serve.cuda_graphs  # the block of rows without a sequence
    if num_blocks < 1:
        raise UserError(
            f"--cache-memory {serve.cache_memory} GiB does not hold one block of {block_size} tokens "
            f"({block_bytes / 2**20:.1f} MiB)"
        )
    return EngineSettings(
        num_blocks,
        block_size,
        serve.max_num_batched_tokens,
        serve.max_num_seqs,
        serve.prefix_caching,
        serve.rope_length,
        serve.lookup,
        _max_request_tokens(session, serve, num_blocks * block_size),
    )


def _max_request_tokens(session: Session, serve: ServeArgs, capacity: int) -> int:
    """Returns the most tokens of a request, of `capacity` in the cache. Raises `UserError`."""
    longest = serve.max_model_len or min(session.config.max_position_embeddings, capacity)
    if longest > capacity:
        raise UserError(
            f"--max-model-len {longest}: the cache holds {capacity} tokens; increase --cache-memory"
        )
    return longest


def _limits(session: Session, job: ServeJob, settings: EngineSettings) -> ServiceLimits:
    serve, longest = job.serve, settings.max_request_tokens
    assert longest is not None
    session.warn_if_too_long("a prompt", longest)
    return ServiceLimits(
        job.model_name,
        longest,
        serve.max_num_seqs + serve.max_queue,
        int(serve.max_body_mib * 2**20),
        serve.request_seconds,
    )
