"""Who saves in a folder: the run that began last. An older one finds that out before it publishes, and stops."""

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
    """Another run saves there now."""


def claim_folder(folder: str | Path) -> str:
    """Makes this run the owner, on one rank; what a killed run left is replaced. Returns the run's token. Raises `UserError`."""
    folder, token = Path(folder), secrets.token_hex(4)
    who = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.replace_file(folder / OWNER_FILE, json.dumps(who) + "\n")
    except OSError as error:
        raise UserError(
            f"--save {folder}: cannot save there: {error.strerror}; choose another --save"
        ) from error
    return token


def check_ownership(folder: Path, token: str) -> None:
    """Raises `Superseded` when another run has claimed the folder; a file that is gone or cannot be read says nothing."""
    try:
        now = json.loads((folder / OWNER_FILE).read_text())
        theirs, where = now["token"], f"process {now['pid']} on {now['host']}, since {now['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return
    if theirs != token:
        raise OwnershipLost(
            f"another run saves in {folder} ({where}), so this one stops; give every run a --save of its own"
        )
