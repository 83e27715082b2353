"""Sessions of the inference commands: checkpoint, tokenizer and chat format, checked before the weights are
read."""

import contextlib
import filecmp
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.registry import open_reader, refuse_adapters
from ascendspeed.distributed import fused_kernels, process_groups
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.inference import engine
from ascendspeed.inference.args import SPARE, EngineSpec
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import declared_tokens, tokenizer
from ascendspeed.tokenization.chat import ChatFormat, stop_token_ids
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.tokenization.vocab_check import check_vocab_size
from ascendspeed.utils import logging as logs
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = 30
"""Minutes."""
CHAT_TIMEOUT = 7 * 24 * 60
"""Minutes, while the other ranks wait for the user's input on rank 0: a week."""

NO_DATA, FAILED = -1, -2
"""Values of `broadcast_bytes` in place of a size."""


@dataclass
class ModelSession:
    """Process groups and a checkpoint whose weights are read on the first use of `model`."""

    spec: EngineSpec
    device: Device
    grid: ProcessGrid

    @classmethod
    def open(cls, spec: EngineSpec, device: Device) -> "ModelSession":
        """Initializes the process groups and checks the architecture. Collective. Raises `UserError`."""
        session = cls(spec, device, _initialize(spec, device, COLLECTIVE_TIMEOUT))
        _check_expected_model(spec, session.config)
        return session

    @property
    def readers(self) -> Readers:
        """All ranks, which open a checkpoint together."""
        return Readers.of(self.grid)

    @cached_property
    def source(self) -> CheckpointReader:
        """Reader of the checkpoint; verifies a training checkpoint on first use. Collective."""
        return open_reader(self.spec.args.load, readers=self.readers)

    @cached_property
    def config(self) -> ModelConfig:
        """Architecture of the model. Collective if only the weights record it."""
        return self.spec.model or self.source.config

    @cached_property
    def model(self) -> engine.LanguageModel:
        """The model; reads the weights on first use. Collective."""
        args = self.spec.args
        kernels = fused_kernels.select_kernels(
            self.device,
            rms_norm=args.use_fused_rmsnorm,
            rotary=args.use_fused_rotary_pos_emb,
            swiglu=args.mlp_layer_fusion,
            products=Products.of_inference(args.cpu_linear, args.dtype, self.config, args.layout),
        )
        kernels = fused_kernels.with_inference_kernels(kernels, self.device, args.dtype)
        model = engine.load(
            self.source,
            parallel=args.layout,
            dtype=args.dtype,
            device=self.device,
            kernels=kernels,
            quantize=args.quantize,
            kv_cache_dtype=args.kv_cache_dtype,
        )
        device = f"{self.device.kind} ({self.device.name})"
        precision = f"{model.config.family}, {args.precision}"
        logger.info(f"{args.load}: {precision}, on {device}; {self.grid}; kernels: {kernels}")
        return model


@dataclass
class Session(ModelSession):
    """A `ModelSession` with the tokenizer and the chat format of the model."""

    tokenizer: Tokenizer
    chat_template: str | None = None
    """Name given by --chat-template."""
    _warned_length: bool = False

    @classmethod
    def open(
        cls,
        spec: EngineSpec,
        device: Device,
        chat_template: str | None = None,
        waits_for_user: bool = False,
        parses_special_tokens: bool = False,
    ) -> "Session":
        """Loads the tokenizer, initializes the process groups and checks that tokenizer and model fit
        together.

        `waits_for_user`: ranks may have to wait for input at a terminal. `parses_special_tokens`: see
        `tokenizer.load`. Collective. Raises `UserError`.
        """
        loaded = _load_tokenizer(spec, parses_special_tokens)
        grid = _initialize(spec, device, CHAT_TIMEOUT if waits_for_user else COLLECTIVE_TIMEOUT)
        session = cls(spec, device, grid, loaded, chat_template)
        config = session.config
        too_large = (
            f"the tokenizer in {spec.tokenizer} has {loaded.vocab_size} tokens, "
            f"but the model in {spec.args.load} only {config.vocab_size}; "
            "give the model's own with --tokenizer-name-or-path"
        )
        notes = check_vocab_size(loaded, config.vocab_size, too_large)
        _check_expected_model(spec, config)
        for note in notes + _tokenizer_notes(spec, loaded, config):
            logger.info(f"note: {note}")
        return session

    @cached_property
    def chat_format(self) -> ChatFormat:
        """Chat format of the model. Raises `UserError` if none is known."""
        name = self.chat_template or self._recorded_template or FAMILIES[self.config.family].chat_template
        chat_format = ChatFormat(self.tokenizer, name, self.config.family)
        for note in chat_format.notes:
            logger.info(f"note: {note}")
        return chat_format

    @property
    def _recorded_template(self) -> str | None:
        """Chat template that the weights were trained with, if the checkpoint records it."""
        return None if self.spec.model else self.source.chat_template

    @cached_property
    def adds_bos(self) -> bool:
        """True if a text begins with BOS."""
        return declared_tokens.adds_bos_token(declared_tokens.declared_tokens(self.tokenizer.path)[0])

    @property
    def usable_vocab_size(self) -> int:
        """Number of ids that both the tokenizer and the model have."""
        return min(self.tokenizer.vocab_size, self.config.vocab_size)

    def stop_ids(self, in_chat: bool) -> tuple[int, ...]:
        """Returns the ids that end an answer; `in_chat`: those of the chat format too."""
        return stop_token_ids(self.tokenizer, self._folders, self.chat_format.stop_ids if in_chat else ())

    @cached_property
    def generation_stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer of an evaluation: those of the tokenizer, of generation_config.json
        (without it, of config.json) and of the chat templates of the model's family and of its tokenizer, if
        there are any."""
        family = self.config.family
        return generation_stop_ids(self.tokenizer, family, self._recorded_template, self._folders)

    @property
    def _folders(self) -> set[Path]:
        """Folders that may hold a generation_config.json or config.json."""
        return {Path(folder) for folder in (self.spec.args.load, self.spec.tokenizer) if folder}

    def warn_if_too_long(self, where: str, tokens: int) -> None:
        """Logs once that a prompt with its answer is longer than the training context, and the
        consequence."""
        trained, kind = self.config.max_position_embeddings, self.config.rope_scaling_type
        if tokens <= trained or self._warned_length or kind in ("linear", "llama3", "yarn"):
            return
        self._warned_length = True
        if kind == "dynamic":
            consequence = "dynamic rope scaling is in use"
        else:
            consequence = "it has no rope scaling: expect poor output beyond that length"
        logger.info(
            f"note: {where} and its answer may have {tokens} tokens; "
            f"the model was trained on {trained}, and {consequence}"
        )

    def broadcast_bytes(self, read: Callable[[], bytes | None]) -> bytes | None:
        """Calls `read` on rank 0 and returns its result on every rank. Collective.

        A `UserError` on rank 0 raises a `UserError` on every rank.
        """
        data, error = None, None
        if self.grid.rank == 0:
            try:
                data = read()
            except UserError as caught:
                error = caught
        size = NO_DATA if data is None else len(data)
        header = torch.tensor([FAILED if error else size], device=self.device.torch)
        if self.grid.world > 1:
            dist.broadcast(header, 0)
        if error:
            raise error
        size = int(header)
        if size == FAILED:
            raise UserError("rank 0 could not read the input; see its error")
        if size == NO_DATA:
            return None
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device.torch)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if self.grid.world > 1 and size:
            dist.broadcast(buffer, 0)
        return buffer.cpu().numpy().tobytes()


def generation_stop_ids(
    loaded: Tokenizer, family: str, recorded_template: str | None, folders: set[Path]
) -> tuple[int, ...]:
    """Ids that end a generated answer of an evaluation.

    `recorded_template`: chat template of the training data; `folders`: may hold a generation_config.json or
    config.json.
    """
    template_ids: set[int] = set()
    for name in (recorded_template, FAMILIES[family].chat_template, None):
        with contextlib.suppress(UserError):  # a base model: no template, or not its tokens
            template_ids.update(ChatFormat(loaded, name, family).stop_ids)
    return stop_token_ids(loaded, folders, template_ids)


def _initialize(spec: EngineSpec, device: Device, timeout_minutes: int) -> ProcessGrid:
    """Initializes the process groups, and sends log lines to stderr: stdout is for answers."""
    grid = process_groups.initialize(device, spec.args.layout, 1, timeout_minutes)
    logs.configure(grid.rank, logs.TO_STDERR)
    return grid


def _load_tokenizer(spec: EngineSpec, parses_special_tokens: bool) -> Tokenizer:
    if spec.args.load:
        refuse_adapters(Path(spec.args.load))
    try:
        return tokenizer.load(spec.tokenizer, parses_special_tokens)
    except UserError as error:
        hint = "; give --tokenizer-name-or-path" if spec.tokenizer == spec.args.load else ""
        raise UserError(f"{error}{hint}") from None


def _tokenizer_notes(spec: EngineSpec, loaded: Tokenizer, config: ModelConfig) -> list[str]:
    """Returns signs that the tokenizer belongs to another model."""
    notes = []
    for name in ("tokenizer.model", "tokenizer.json"):
        beside_weights, chosen = Path(spec.args.load or ".", name), Path(spec.tokenizer, name)
        if beside_weights.is_file() and chosen.is_file():
            if not filecmp.cmp(beside_weights, chosen, shallow=False):
                notes.append(
                    f"{chosen} differs from {beside_weights}, which is beside the weights; "
                    f"to use that one: --tokenizer-name-or-path {beside_weights.parent}"
                )
            break
    if config.vocab_size - loaded.vocab_size > SPARE:
        notes.append(
            f"the tokenizer in {spec.tokenizer} has {loaded.vocab_size} tokens, "
            f"the model {config.vocab_size}: check that it is the model's tokenizer"
        )
    return notes


def _check_expected_model(spec: EngineSpec, config: ModelConfig) -> None:
    """Compares the architecture flags with the checkpoint, for checkpoints without a config.json."""
    if config.reward_head:
        raise UserError(
            f"{spec.args.load} holds a reward model, which scores conversations and writes no text; --load a "
            "language model"
        )
    expected = spec.expected_model
    if expected is None:
        return
    if not expected.same_function(config):
        raise UserError(f"{spec.args.load} holds another model than the flags describe: {config}")
