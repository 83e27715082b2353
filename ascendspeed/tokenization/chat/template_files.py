"""Chat templates in a model's folder: one that this project wrote, or one of the model's own."""

from pathlib import Path

from ascendspeed.tokenization.chat.templates import TEMPLATES
from ascendspeed.tokenization.declared_tokens import read_optional_json
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
OTHER_FILES = ("chat_template.json", "additional_chat_templates")
"""Further places where transformers keep chat templates."""
MARK = "{#- Chat template "
"""Beginning of the templates that this project writes; the name follows."""


def template_name(text: str) -> str | None:
    """Returns the name of the template that `to_jinja` wrote; None for another text."""
    name = text.removeprefix(MARK).partition(" ")[0]
    return name if text.startswith(MARK) and name in TEMPLATES else None


def recorded_template(folder: Path) -> str | None:
    """Name of the chat template in a folder, if this project wrote it. Raises `UserError`."""
    path = folder / TEMPLATE_FILE
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        return template_name(checked_file(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def own_template(folder: Path | None) -> str | None:
    """Name of the file in a folder that has a chat template of the model's own; None: it has none."""
    if folder is None:
        return None
    if (folder / TEMPLATE_FILE).exists():
        return None if recorded_template(folder) else TEMPLATE_FILE
    if read_optional_json(folder / TOKENIZER_CONFIG).get("chat_template"):
        return TOKENIZER_CONFIG
    return next((name for name in OTHER_FILES if (folder / name).exists()), None)
