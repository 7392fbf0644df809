"""Where a number comes from: the command, the code, the machine and the time; without secrets."""

from __future__ import annotations

import hashlib
import platform
import re
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mmalign
from mmalign import config


def collect(command: str, started: str) -> dict[str, Any]:
    """The record of a run that ends now. `lock` is the digest of the checkout's constraints.txt; None where there is no checkout."""
    root = Path(__file__).resolve().parent.parent
    constraints = root / "constraints.txt"
    return {
        "command": command,
        "version": mmalign.__version__,
        "git": _git(root, "rev-parse", "HEAD"),
        "is_dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "lock": hashlib.sha256(constraints.read_bytes()).hexdigest()[:12] if constraints.is_file() else None,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "started": started,
        "ended": now(),
    }


def without_secrets(command: str) -> str:
    """The command without the values of known secrets and of options named like one; a secret given by its variable's name stays."""
    named = r"((?i:[\w.-]*(?:key|token|secret|password)=|--[\w.-]*(?:key|token|secret|password) ))(?![A-Z][A-Z0-9_]*(?:\s|$))\S+"
    return re.sub(named, r"\1***", config.redact(command))


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(root: Path, *arguments: str) -> str | None:
    """What git says about the checkout that this code runs from; None outside of one."""
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
