"""Checkpoint formats, a module each: how to read one as a stream of (name, tensor), and how to write one."""

from pathlib import Path

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats import huggingface, internevo, megatron, mindformers, training_checkpoint
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils.errors import UserError

__all__ = ["MODULES", "open_reader"]

MODULES = {
    "a training checkpoint": training_checkpoint,
    "rank files": megatron,
    "an InternEvo training folder": internevo,
    "Hugging Face weights": huggingface,
    "a .ckpt of MindFormers": mindformers,
}


def open_reader(
    path: str | Path,
    config: str | Path | None = None,
    asked: InternEvoOptions | None = None,
    readers: Readers | None = None,
) -> CheckpointReader:
    """Recognises the checkpoint in a folder and opens it. Raises `UserError` when it is none, or is damaged.

    `config`: the folder that has its config.json and its tokenizer; None: the same one. `asked`: what an InternEvo
    training folder may not say itself. `readers`: the ranks that call this together and share the verification of a training
    checkpoint; None: this process does all of it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory")
    home = folder if config is None else Path(config)
    found = [name for name, module in MODULES.items() if module.is_one(folder)]
    if training_checkpoint.is_one(folder):
        found = ["a training checkpoint"]  # its `latest` has the name of DeepSpeed's
    elif len(found) > 1 and (folder / "trainer_state.json").exists():
        found = ["Hugging Face weights"]  # its Trainer leaves DeepSpeed's own files beside them
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(found)}: move one of them to a folder of its own")
    if found:
        more = {internevo: {"asked": asked}, training_checkpoint: {"readers": readers}}
        module = MODULES[found[0]]
        return module.open_folder(folder, home, **more.get(module, {}))
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder} holds no checkpoint: looked for Hugging Face weights (model.safetensors, pytorch_model.bin or their index), "
        "rank files (latest_checkpointed_iteration.txt or latest), an InternEvo training folder (model_tp0_pp0.pt), "
        f"a .ckpt of MindFormers and a training checkpoint; found {there}"
    )
