"""Weights by address: the Hugging Face hub and https, each file fetched once and then read as data.

Only an address that the user gives is followed, never one that stands in a file.
"""

import hashlib
import ipaddress
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from qsd.errors import QsdError
from qsd.files import cache_folder, replacing

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
_TIMEOUT = 30  # seconds without an answer


class HubFile(NamedTuple):
    """A file on the Hugging Face hub.

    Attributes:
        repository: Owner and name.
        name: Name of the file; empty if the address names none.
        revision: Branch, tag or commit; ``None`` for the newest.
    """

    repository: str
    name: str
    revision: str | None


def is_address(source: object) -> bool:
    """Whether a text is an address that `local_file` fetches.

    Args:
        source: Path or address.
    """
    return isinstance(source, str) and source.startswith((HUB, "https://", "http://"))


def local_file(source: str | Path) -> Path:
    """The path of a file, which is fetched if it has an address.

    Args:
        source: A path, ``hf-hub:OWNER/NAME/FILE``, perhaps with ``@REVISION`` behind it, or an https address.

    Raises:
        QsdError: If the address is of another form, or the file cannot be fetched.
    """
    if not isinstance(source, str) or not is_address(source):
        return Path(source)
    if not source.startswith(HUB):
        return fetch_url(source)
    file = parse_hub_address(source)
    if not file.name:
        raise QsdError(f"{source} names no file; write {HUB}OWNER/NAME/FILE.")
    return fetch_from_hub(file)


def parse_hub_address(address: str) -> HubFile:
    """The parts of an address on the hub.

    Args:
        address: ``hf-hub:OWNER/NAME``, with ``/FILE`` and ``@REVISION`` as you like; ``hf-hub:`` may be left out.

    Raises:
        QsdError: If it is of another form.
    """
    found = re.fullmatch(rf"(?:{HUB})?([\w.-]+/[\w.-]+)((?:/[\w .-]+)*)(?:@([\w./-]+))?", address)
    if found is None or ".." in address:
        raise QsdError(f"{address!r} is no address on the hub; write {HUB}OWNER/NAME/FILE.")
    return HubFile(found[1], found[2].removeprefix("/"), found[3])


def fetch_from_hub(file: HubFile, cache: str | Path | None = None) -> Path:
    """A file of the hub, from the hub's own cache or fetched into it.

    Args:
        file: The file.
        cache: Folder of the cache; ``None`` for the hub's own.

    Raises:
        QsdError: If the file does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"{HUB}{file.repository}/{file.name}"
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        return Path(
            hf_hub_download(file.repository, file.name, revision=file.revision, cache_dir=cache, endpoint=endpoint)
        )
    except LocalEntryNotFoundError as error:  # no network, or offline mode: the hub may have it
        raise _not_fetched(where, error) from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise HubFileMissing(f"{where} does not exist, or is not open to you.") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(where, error) from error


def _not_fetched(address: str, error: Exception) -> QsdError:
    return QsdError(
        f"{address} cannot be fetched: {' '.join(str(error).split())[:200]}; check the address and the network."
    )


class HubFileMissing(QsdError):
    """A file that the hub does not have."""


def fetch_url(address: str, cache: str | Path | None = None) -> Path:
    """A file of a web server, from the cache or fetched into it.

    Args:
        address: An https address; http is taken for this machine alone.
        cache: Folder of the cache; ``None`` for that of this package.

    Raises:
        QsdError: If the address is not safe, or the file cannot be fetched completely.
    """
    _check_scheme(address)
    name = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(address).path)).name) or "file"
    folder = Path(cache) if cache is not None else cache_folder() / "weights"
    target = folder / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if target.is_file():
        return target
    logger.info("fetching %s.", address)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(address, headers={"User-Agent": "qsd"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, replacing(target) as partial:
            _check_scheme(answer.geturl())  # after redirections
            with partial.open("wb") as file:
                shutil.copyfileobj(answer, file)
            _check_length(answer, partial.stat().st_size)
    except (OSError, ValueError, urllib.error.URLError) as error:  # OSError: no network, a full disk
        if isinstance(error, QsdError):
            raise
        raise _not_fetched(address, error) from error
    return target


def _check_length(answer: Any, size: int) -> None:
    expected = answer.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and int(expected) != size:
        raise ValueError(f"{size} of {expected} bytes arrived")


def _check_scheme(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_this_machine(parts.hostname or "")):
        return
    raise QsdError(f"{address} is no https address, so that anyone between could change the file.")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
