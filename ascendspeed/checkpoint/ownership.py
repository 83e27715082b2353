"""Ownership of a checkpoint folder: the most recent run owns it; an older run stops before publishing."""

import json
import os
import secrets
import socket
import time
from pathlib import Path

from ascendspeed.utils import atomic
from ascendspeed.utils.errors import UserError

OWNER_FILE = ".owner"


class OwnershipLost(UserError):
    """Another run owns the checkpoint folder now."""


def claim_folder(folder: str | Path) -> str:
    """Makes this run the owner and returns its token; called on one rank.

    Raises `UserError` if the folder is not writable.
    """
    folder = Path(folder)
    token = secrets.token_hex(4)
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.replace_file(folder / OWNER_FILE, json.dumps(owner) + "\n")
    except OSError as error:
        raise UserError(
            f"--save {folder}: cannot save there: {error.strerror}; choose another --save"
        ) from error
    return token


def check_ownership(folder: Path, token: str) -> None:
    """Raises `OwnershipLost` if another run has claimed the folder.

    A missing or unreadable file is ignored.
    """
    try:
        owner = json.loads((folder / OWNER_FILE).read_text())
        owner_token = owner["token"]
        process = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if owner_token != token:
        raise OwnershipLost(
            f"another run saves in {folder} ({process}), so this one stops; give every run a --save of its "
            "own"
        )
