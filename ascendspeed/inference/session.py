"""A model that is ready to be asked, with its tokenizer and chat format; what is wrong is said before its weights are read."""

import filecmp
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.cli.command import check_device_precision
from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.distributed import fused_kernels, process_groups
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.inference import engine
from ascendspeed.inference.args import SPARE, EngineSpec
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, stop_token_ids
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils import logging as logs
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

WEEK = 7 * 24 * 60
"""Minutes that ranks wait for a person to type."""


@dataclass
class Session:
    """Everything but the weights, which `load` reads."""

    spec: EngineSpec
    device: Device
    grid: ProcessGrid
    tokenizer: Tokenizer
    template: str | None = None
    """--chat-template."""
    told: bool = False
    """Whether `measure` has said something."""

    @classmethod
    def open(
        cls, spec: EngineSpec, device: Device, template: str | None = None, patient: bool = False
    ) -> "Session":
        """Joins the ranks. `patient`: they may have to wait for a person. Raises `UserError`."""
        check_device_precision(spec.args.fp16, device)
        found = _tokenizer(spec)
        grid = process_groups.initialize(device, spec.args.layout, 1, WEEK if patient else 30)
        logs.configure(grid.rank, logs.TO_STDERR)  # stdout is for answers
        session = cls(spec, device, grid, found, template)
        config = session.config
        if found.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer in {spec.tokenizer} has {found.vocab_size} tokens, but the model in {spec.args.load} only "
                f"{config.vocab_size}; give the model's own with --tokenizer-name-or-path"
            )
        _check_typed(spec, config)
        for note in _doubts(spec, found, config):
            logger.info(f"note: {note}")
        return session

    @property
    def readers(self) -> Readers:
        """All ranks, to open a checkpoint together."""
        return Readers.of(self.grid)

    @cached_property
    def source(self) -> CheckpointReader:
        """The checkpoint, opened once: a training checkpoint is verified then. Collective."""
        return open_reader(self.spec.args.load, readers=self.readers)

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture; collective where the folder itself must be asked."""
        return self.spec.model or self.source.config

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The chat format. Raises `UserError` where there is none."""
        found = ChatFormat(self.tokenizer, self.template or FAMILIES[self.config.family].chat_template)
        for note in found.notes:
            logger.info(f"note: {note}")
        return found

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text begins with BOS."""
        return tokenizer.adds_bos_token(tokenizer.declared_tokens(self.tokenizer.path)[0])

    def stop_ids(self, talks: bool) -> tuple[int, ...]:
        """Ids that end an answer, in a conversation or not."""
        folders = {Path(self.spec.args.load or "."), Path(self.spec.tokenizer)}
        return stop_token_ids(self.tokenizer, folders, self.chat_format.stop_ids if talks else ())

    @cached_property
    def model(self) -> engine.LanguageModel:
        """The model; reads the weights when it is first asked for."""
        where = self.spec.args
        fused = fused_kernels.select_kernels(
            self.device,
            rms_norm=where.use_fused_rmsnorm,
            rotary=where.use_fused_rotary_pos_emb,
            swiglu=where.mlp_layer_fusion,
        )
        model = engine.load(
            self.source, parallel=where.layout, dtype=where.dtype, device=self.device, kernels=fused
        )
        logger.info(
            f"{where.load}: {model.config.family}, {where.dtype}, on {self.device.kind} ({self.device.name}); {self.grid}"
        )
        return model

    def warn_if_too_long(self, where: str, tokens: int) -> None:
        """Says once that a prompt with its answer is longer than what the model has been trained on, and what becomes of it."""
        trained, kind = self.config.max_position_embeddings, self.config.rope_scaling_type
        if tokens <= trained or self.told or kind == "linear":
            return
        self.told = True
        what = (
            "dynamic rope scaling is in use"
            if kind == "dynamic"
            else "it has no rope scaling: expect nonsense beyond"
        )
        logger.info(
            f"note: {where} and its answer may have {tokens} tokens; the model was trained on {trained}, and {what}"
        )

    def broadcast_bytes(self, get: Callable[[], bytes | None]) -> bytes | None:
        """What `get` gives on rank 0, on every rank; an error there is one everywhere. Collective."""
        value, error = None, None
        if self.grid.rank == 0:
            try:
                value = get()
            except UserError as caught:
                error = caught
        size = torch.tensor([-2 if error else -1 if value is None else len(value)], device=self.device.torch)
        if self.grid.world > 1:
            dist.broadcast(size, 0)
        if error:
            raise error
        if size < 0:
            if size == -2:
                raise UserError("rank 0 could not read what was to be answered; it says why")
            return None
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device.torch)
        if value:
            data.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        if self.grid.world > 1 and size:
            dist.broadcast(data, 0)
        return data.cpu().numpy().tobytes()


def _tokenizer(spec: EngineSpec) -> Tokenizer:
    try:
        return tokenizer.load(spec.tokenizer)
    except UserError as error:
        hint = "; give --tokenizer-name-or-path" if spec.tokenizer == spec.args.load else ""
        raise UserError(f"{error}{hint}") from None


def _doubts(spec: EngineSpec, found: Tokenizer, config: ModelConfig) -> list[str]:
    """Whether the tokenizer may be another model's."""
    doubts = []
    for name in ("tokenizer.model", "tokenizer.json"):
        own, chosen = Path(spec.args.load or ".", name), Path(spec.tokenizer, name)
        if own.is_file() and chosen.is_file():
            if not filecmp.cmp(own, chosen, shallow=False):
                doubts.append(
                    f"{chosen} is not the {name} beside the weights, {own}; theirs: --tokenizer-name-or-path {own.parent}"
                )
            break
    if config.vocab_size - found.vocab_size > SPARE:
        doubts.append(
            f"the tokenizer in {spec.tokenizer} has {found.vocab_size} tokens, the model {config.vocab_size}: is it its own?"
        )
    return doubts


def _check_typed(spec: EngineSpec, config: ModelConfig) -> None:
    """What flags say of the architecture, where no config.json could be asked before."""
    said = spec.expected_model
    if said is not None and replace(said, init_method_std=0.0) != replace(config, init_method_std=0.0):
        raise UserError(f"{spec.args.load} holds another model than the flags say: {config}")
