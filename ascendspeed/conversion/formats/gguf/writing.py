"""Writes a GGUF file: tensors under llama.cpp's names and in its row order, cast or quantized row by row."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import chat_assets, model_card
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.base import CheckpointFormat
from ascendspeed.conversion.formats.gguf import vocabulary
from ascendspeed.conversion.formats.gguf.modelfile import modelfile
from ascendspeed.conversion.formats.huggingface import LlamaFormat
from ascendspeed.conversion.output_files import PreallocatedFile, Specs
from ascendspeed.conversion.write import PlannedFile, cast
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.models.param_mapping import StoredTensor
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, to_jinja
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

FILE = "model.gguf"
TYPES = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
TORCH_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
NUMPY_TYPES = {2: np.dtype(np.float16), 4: np.dtype(np.float32)}
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of llama.cpp for the scaling of Llama 3.1, which its metadata do not have."""
PROGRAMS = ("llama.cpp loads the .gguf file, Ollama the Modelfile (ollama create NAME -f Modelfile).",)


@dataclass(frozen=True)
class GgufWriter:
    """Writer of a folder with one GGUF file and a Modelfile."""

    form: CheckpointFormat
    gguf_type: str | None = None
    """One of `TYPES`; None: bf16 for weights in bfloat16, else f16."""

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if llama.cpp does not compute the model, or does not have its tokenizer."""
        self.form.check_family(reader.config.family, "write")
        vocabulary.read(reader.assets_dir, reader.config.vocab_size)
        if reader.config.rope_scaling_type == "llama3" and architecture(reader.config) != "llama":
            raise UserError(
                f"llama.cpp has the rope scaling llama3 for the architecture llama only, not for "
                f"{architecture(reader.config)}"
            )
        if reader.config.rope_scaling_type == "yarn":
            raise UserError("the rope scaling yarn is not written as gguf; use --format hf")
        if reader.config.rope_scaling_type == "dynamic":
            logger.info(
                f"note: llama.cpp has no dynamic rope scaling: use the GGUF file for up to "
                f"{reader.config.max_position_embeddings} tokens, where it changes nothing"
            )

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans the file. Raises `UserError` for a `dtype`."""
        if dtype is not None:
            raise UserError("--dtype is not for --format gguf: choose --gguf-type " + "|".join(TYPES))
        tensors = tuple(stored_tensors(reader.config))
        return [PlannedFile(FILE, tensors, partial(self._create, reader))]

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the Modelfile."""
        own = chat_assets.own_template(reader.assets_dir)
        text = modelfile(FILE, _chat_format(reader), reader.config.max_position_embeddings, bool(own))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        (folder / model_card.FILE).write_text(model_card.text(reader, PROGRAMS), encoding="utf-8")

    def _create(self, reader: CheckpointReader, path: Path, specs: Specs) -> "GgufFile":
        name = self.gguf_type
        if name is None:
            name = "bf16" if torch.bfloat16 in reader.dtypes.values() else "f16"
        writer = GGUFWriter(path, architecture(reader.config))
        writer.add_type("model")
        writer.add_name(reader.path.resolve().name)
        writer.add_file_type(FILE_TYPES[name])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_architecture(writer, reader.config)
        vocabulary.read(reader.assets_dir, reader.config.vocab_size).add_to(writer)
        _add_chat(writer, reader)
        types = {name_: _type_of(shape, TYPES[name]) for name_, (_, shape) in specs.items()}
        coarse = [n for n, (_, shape) in specs.items() if len(shape) > 1 and types[n] != TYPES[name]]
        if coarse:
            logger.info(f"note: {len(coarse)} matrices are written as f16: q8_0 needs rows of 32 x n numbers")
        return GgufFile(path, specs, writer, types, rope_factors(reader.config))


def architecture(config: ModelConfig) -> str:
    """Name of the architecture of llama.cpp that computes the model."""
    known = FAMILIES[config.family].gguf_architecture
    has_biases = config.add_qkv_bias or config.add_dense_bias
    return (known.name_with_biases if has_biases else None) or known.name


def rope_factors(config: ModelConfig) -> Tensor | None:
    """Numbers by which llama.cpp divides the frequencies of the rotary embedding, fp32 [d/2]; None: it scales
    none of them apart."""
    if config.rope_scaling_type != "llama3":
        return None
    plain = replace(config, rope_scaling_type="none")
    return Rope(plain).inverse_frequencies(1) / Rope(config).inverse_frequencies(1)


def stored_tensors(config: ModelConfig) -> list[StoredTensor]:
    """Tensors of the file, q, k and v apart."""
    arch = architecture(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_layers)
    interleaved = FAMILIES[config.family].gguf_architecture.interleaved
    is_llama = LlamaFormat().supports(config.family, "write")
    named = replace(config, family=REFERENCE.name) if is_llama else config
    tensors = []
    for parameter in param_mapping.parameters(named):
        for entry in param_mapping.stored_tensors(named, parameter):
            name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise AssertionError(f"llama.cpp has no name for {entry.name}")
            is_reordered = interleaved and (".attn_q." in name or ".attn_k." in name)
            reordered = _interleave(entry, config.head_dim) if is_reordered else entry
            tensors.append(reordered._replace(name=name))
    return tensors


def _interleave(entry: StoredTensor, head_dim: int) -> StoredTensor:
    """Reorders the rows of every head: those that are half a head apart become neighbours."""
    rows = [
        part._replace(row=part.row + i, local_row=part.local_row + i, rows=1)
        for part in entry.slices
        for i in range(part.rows)
    ]
    rows.sort(key=lambda row: row.local_row)
    order = np.arange(len(rows)).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()
    slices = [rows[source]._replace(local_row=target) for target, source in enumerate(order.tolist())]
    return entry._replace(slices=tuple(slices))


def _type_of(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type of a tensor in the file: vectors stay fp32, as llama.cpp computes with them."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block_size = gguf.GGML_QUANT_SIZES[wanted][0]
    return GGMLQuantizationType.F16 if shape[-1] % block_size else wanted


def _row_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = shape[-1] if len(shape) > 1 else 1
    return columns // block_size * block_bytes


class GgufFile(PreallocatedFile):
    """A GGUF file whose rows are converted when they are written."""

    def __init__(
        self,
        path: Path,
        specs: Specs,
        writer: GGUFWriter,
        types: dict[str, GGMLQuantizationType],
        rope_factors: Tensor | None = None,
    ) -> None:
        """Creates the file: metadata, descriptions of the tensors, `rope_factors`, and space for the rest."""
        sizes = {name: shape[0] * _row_bytes(types[name], shape) for name, (_, shape) in specs.items()}
        for name, (_, shape) in specs.items():
            kind = types[name]
            if kind in TORCH_TYPES:
                numpy_type = NUMPY_TYPES[TORCH_TYPES[kind].itemsize]
                writer.add_tensor_info(name, shape, numpy_type, sizes[name], raw_dtype=kind)
            else:
                stored_shape = (*shape[:-1], _row_bytes(kind, shape))
                writer.add_tensor_info(name, stored_shape, np.dtype(np.uint8), sizes[name], raw_dtype=kind)
        if rope_factors is not None:
            sizes[ROPE_FACTORS] = rope_factors.nbytes
            shape = tuple(rope_factors.shape)
            writer.add_tensor_info(ROPE_FACTORS, shape, np.dtype(np.float32), sizes[ROPE_FACTORS])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        offset = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
        offsets = {}
        for name, size in sizes.items():
            offsets[name] = offset
            offset += writer.ggml_pad(size, writer.data_alignment)
        with open(path, "r+b") as file:
            file.truncate(offset)
            if rope_factors is not None:
                file.seek(offsets[ROPE_FACTORS])
                file.write(rope_factors.numpy().tobytes())
        super().__init__(path, specs, offsets)
        self.types = types

    def write(self, name: str, row: int, block: Tensor) -> None:
        """Converts whole rows and writes them from row `row` on. Raises `UserError` for values too large."""
        kind, shape = self.types[name], self.specs[name][1]
        if kind in TORCH_TYPES:
            converted = cast(name, block, TORCH_TYPES[kind]).contiguous().flatten().view(torch.uint8).numpy()
        else:
            converted = gguf.quantize(block.float().numpy(), kind).ravel()
        self.write_bytes(self.offsets[name] + row * _row_bytes(kind, shape), memoryview(converted))


def _add_architecture(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rotary_base)
    if config.kv_channels:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.rope_scaling_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling_factor)


def _chat_format(reader: CheckpointReader) -> ChatFormat | None:
    if not reader.chat_template:
        return None
    return ChatFormat(tokenizer.load(reader.assets_dir), reader.chat_template)


def _add_chat(writer: GGUFWriter, reader: CheckpointReader) -> None:
    """Writes the chat template, that of the training before the folder's own, and the end of a turn."""
    chat_format = _chat_format(reader)
    if chat_format:
        writer.add_chat_template(to_jinja(chat_format))
        writer.add_eot_token_id(chat_format.stop_ids[0])
        return
    text = chat_assets.own_template_text(reader.assets_dir)
    if text:
        writer.add_chat_template(text)
    stops = chat_assets.stops_beside(reader.assets_dir)
    if stops:
        writer.add_eot_token_id(stops[0])
