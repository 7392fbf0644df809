"""Whether a server answers at all, asked once within seconds: a machine without a network then says so instead of trying on and on.

huggingface_hub repeats a failed request for half a minute, and loading one scorer makes several requests. Whoever is about to look
something up there passes `local_files_only=is_cache_only(spec)`: while the hub is silent, only the local cache is asked. Standard library
only.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import lru_cache
from pathlib import Path

PATIENCE = 5.0  # seconds; HF_HUB_ETAG_TIMEOUT, which the hub's own library reads for the same wait, overrides it
MEMORY = 60.0  # seconds for which an answer holds, so that a server that outlives an outage finds the hub again


def is_cache_only(spec: str = "") -> bool:
    """Whether a look-up of `spec` must do with the local cache: the hub is silent. A path that exists needs no hub, so it is not asked."""
    return not _is_here(spec) and bool(hub_silence())


def hub_silence() -> str:
    """Why the hub is not asked, as a clause for a sentence; "" when it answers. Takes PATIENCE at most, and that once in MEMORY."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    return silence(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE))


def silence(address: str, patience: float = PATIENCE) -> str:
    """Why a server cannot be asked, as a clause for a sentence; "" when it gives any answer. One question in MEMORY for each server."""
    whole = urllib.parse.urlsplit(address)
    return _asked(f"{whole.scheme}://{whole.netloc}", patience, int(time.monotonic() // MEMORY))


def hub_fault(error: BaseException, spec: str = "") -> str:
    """What kept `spec` away, as the end of a sentence: the hub's silence, or the first line of the error."""
    silence = "" if _is_here(spec) else hub_silence()
    text = silence or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _is_here(spec: str) -> bool:
    return bool(spec) and Path(spec).expanduser().exists()


@lru_cache(maxsize=8)
def _asked(address: str, patience: float, period: int) -> str:
    """`_ask` in a thread, since no timeout of a socket covers the look-up of a name. `period` ages the answer."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_ask(address, patience)), daemon=True)
    thread.start()
    thread.join(patience)
    return found[0] if found else f"{address} does not answer within {patience:g} s (is there a network?)"


def _ask(address: str, patience: float) -> str:
    """ "" when the server, or the proxy that the environment names, gives any answer: an error of its own is the library's to report."""
    is_here = urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")  # no proxy is asked for this machine's own
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))
    try:
        with opener.open(urllib.request.Request(address, method="HEAD"), timeout=patience):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        # A certificate that Python refuses may be one that the library accepts: it has authorities of its own.
        return "" if isinstance(reason, ssl.SSLError) else f"{address} cannot be reached ({reason}; is there a network?)"
