"""Model card (README.md) of an export: base weights, data, recipe, loss and licence."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.models import param_mapping
from ascendspeed.models.families import Family
from ascendspeed.models.lora.adapter import LoraAdapter
from ascendspeed.utils.errors import UserError

FILE = "README.md"
SIGNATURE = "Written by the InternLM training recipes (ascendspeed)."
HEADING = "## Training"
MAX_BYTES = 1 << 20
"""A longer README.md is no model card."""


def training_section(checkpoint: Checkpoint) -> str:
    """Markdown about the training of a checkpoint: base, data, recipe and loss."""
    run, state = checkpoint.run, checkpoint.state
    optim, train, lora = run.optim, run.train, run.lora
    template = run.data.chat_template
    loss = "not recorded" if state.loss is None else f"{state.loss:.4f}"
    lines = [
        f"- Base weights: {lora.lora_base or train.load or f'random, seed {train.seed}'}",
        *(f"- Data: {line}" for line in _data(run.data.data_path)),
        *([f"- Chat template: {template}"] if template else []),
        f"- Length: {state.step} of {train.train_iters} iterations of {train.global_batch_size} x "
        f"{run.data.seq_length} tokens ({state.tokens} tokens)",
        f"- Recipe: {optim.dtype}, learning rate {optim.lr:g} ({optim.lr_decay_style} to {optim.min_lr:g}), "
        f"weight decay {optim.weight_decay:g}, gradient clipping {optim.clip_grad:g}, seed {train.seed}",
        *([f"- LoRA: rank {lora.lora_rank}, alpha {lora.lora_alpha:g}"] if lora.lora_rank else []),
        f"- Training loss of the last iteration: {loss}",
    ]
    return "\n".join(lines)


def _data(data_path: tuple[str, ...]) -> list[str]:
    """Every data set with its weight and the digest that preprocessing recorded."""
    from ascendspeed.distributed import device  # few conversions need it, and Megatron-core

    device.suppress_megatron_warnings()
    from ascendspeed.data.dataset import dataset_facts, parse_blend

    lines = []
    for weight, path in parse_blend(data_path) if data_path else ():
        try:
            digest = dataset_facts(path).get("digest")
        except (UserError, OSError):
            digest = None
        share = "" if len(data_path) == 1 else f"weight {weight:g}, "
        lines.append(f"{path} ({share}{f'digest {digest}' if digest else 'no digest recorded'})")
    return lines


def recorded_section(folder: Path) -> str | None:
    """Section on training of a card that this project wrote; None: there is none."""
    text = _read(folder)
    if text is None or SIGNATURE not in text or HEADING not in text:
        return None
    return text.partition(HEADING)[2].partition("\n## ")[0].strip()


def _read(folder: Path | None) -> str | None:
    path = folder / FILE if folder else None
    if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _licence(folder: Path | None) -> str | None:
    """Licence in the metadata of the card in a folder."""
    match = re.match(r"---\n(?:.*\n)*?license:[ \t]*([\w.+-]+)[ \t]*\n", _read(folder) or "")
    return match[1] if match else None


def what_loads(family: Family, is_reward_model: bool = False) -> list[str]:
    """Lines that say which programs load a Hugging Face directory with the names of a family."""
    if is_reward_model:
        return [
            f"A reward model ({family.reward_architecture}): the score of a conversation is the output of "
            f"{family.reward_param} at its last token."
        ]
    if family.llama_names is None:
        return ["Loads in stock transformers, vLLM and others (AutoModelForCausalLM), and in this project."]
    return [
        f"transformers has no class for {family.name}: trust_remote_code=True needs InternLM's model code "
        f"(configuration_{family.name}.py, modeling_{family.name}.py), which is not written here; copy it "
        f"from the published model.",
        "For stock transformers, vLLM and others: --format hf-llama. This project loads both.",
    ]


def text(reader: CheckpointReader, loads: Iterable[str]) -> str:
    """The card of an export. `loads`: sentences on what loads it."""
    config = reader.config
    count = sum(math.prod(p.shape) for p in param_mapping.parameters(config))
    licence = _licence(reader.assets_dir)
    stated = f"{licence}, as beside the source" if licence else "that of the base weights (none is stated)"
    task = "text-classification" if config.reward_head else "text-generation"
    metadata = [*([f"license: {licence}"] if licence else []), f"pipeline_tag: {task}"]
    parts = [
        "\n".join(["---", *metadata, "---"]),
        f"# {reader.path.resolve().name}",
        " ".join([SIGNATURE, *loads]),
        "## Model",
        f"- Architecture: {config.family}, {config.num_layers} layers, width {config.hidden_size}, {count:,} "
        f"parameters, up to {config.max_position_embeddings} positions\n"
        f"- Converted from: {reader.description} ({reader.path})\n- Licence: {stated}",
    ]
    if reader.training_notes:
        parts += [HEADING, reader.training_notes]
    return "\n\n".join(parts) + "\n"


def adapter_text(adapter: LoraAdapter) -> str:
    """The card of a directory of peft."""
    metadata = ["---", "library_name: peft", "---"]
    how = "tools/lora/merge_lora.py merges them into their base weights, bit for bit as peft."
    parts = [
        "\n".join(metadata),
        "# LoRA adapters",
        f"{SIGNATURE} {how}",
        HEADING,
        adapter.training_notes or "",
    ]
    return "\n\n".join(parts) + "\n"
