"""Where adapters of others come from: a folder, a web server, or a repository of the Hugging Face Hub.

A source is a zoo: an ``index.json`` and a folder for each adapter. Nothing of it is trusted: the index is checked
before any other file is asked for, no more bytes are read than it states, and only files that an adapter has are
written, under names of our own.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from vispeft.errors import ConfigError, FileError, VispeftError, brief
from vispeft.storage.disk import read_regular
from vispeft.storage.form import shown
from vispeft.storage.places import cache_folder
from vispeft.zoo.index import INDEX, LARGEST_INDEX

__all__ = ["HUB_VARIABLE", "OFFLINE_VARIABLES", "FolderSource", "HubSource", "Source", "WebSource", "find_source"]

SECONDS = 20.0
"""Time in seconds after which a server that sends nothing counts as unreachable."""
HUB_VARIABLE = "HF_ENDPOINT"
"""Environment variable with the address of another hub, as the hub's own client reads it."""
OFFLINE_VARIABLES = ("VISPEFT_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables that forbid the network where one of them is 1."""
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_SHA = re.compile("[0-9a-f]{40}")
_BLOCK = 2**18
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Source(Protocol):
    """A zoo elsewhere."""

    name: str
    """Where it is, with which `find_source` finds the same content again."""

    def index(self) -> bytes:
        """Read its index.

        Raises:
            FileError: If it cannot be had.
        """
        ...

    def fetch(self, adapter: str, file: str, size: int, target: Path) -> None:
        """Write one file of an adapter, going on behind what `target` holds already.

        Args:
            adapter: The adapter.
            file: The file.
            size: Its size in bytes; no more are written.
            target: Where it is written.

        Raises:
            FileError: If it cannot be had.
        """
        ...

    def forget(self, adapter: str, file: str) -> bool:
        """Use no copy any more that a cache has of a file, since it is not the right one.

        Args:
            adapter: The adapter.
            file: The file.

        Returns:
            Whether `fetch` may give another one now.
        """
        ...


def offline() -> bool:
    """Return whether an environment variable forbids the network."""
    return any(os.environ.get(name, "") not in ("", "0") for name in OFFLINE_VARIABLES)


def find_source(given: str) -> Source:
    """Find out what a source is.

    Args:
        given: A folder, an address that begins with https://, or OWNER/NAME of a repository of the hub, with a
            revision behind @.

    Returns:
        The source; nothing is fetched yet.

    Raises:
        ConfigError: If it is none of these.
        FileError: If it needs the network, which is forbidden.
    """
    if "://" in given:
        return WebSource(given)
    if os.path.isdir(given):
        return FolderSource(Path(given))
    match = _REPOSITORY.fullmatch(given)
    if match is not None and not given.startswith((".", "/")):
        return HubSource(match["name"], match["revision"])
    raise ConfigError(
        f"{given!r} is no source of adapters: give a folder that holds {INDEX}, an address that begins with https://, "
        "OWNER/NAME of a repository of the Hugging Face Hub (OWNER/NAME@REVISION), or the name of an adapter that was "
        "pulled before."
    )


class FolderSource:
    """A zoo in a folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder.

        Args:
            folder: It holds the index.
        """
        self.folder, self.name = folder, str(folder.resolve())

    def index(self) -> bytes:
        """Read its index."""
        path = self.folder / INDEX
        try:
            return read_regular(path, LARGEST_INDEX)
        except OSError as error:
            hint = " A run is added by `vispeft zoo add`." if (self.folder / "config.yaml").exists() else ""
            raise FileError(
                f"{self.folder} is no zoo: its {INDEX} could not be read ({error.strerror}).{hint}"
            ) from error

    def fetch(self, adapter: str, file: str, size: int, target: Path) -> None:
        """Copy one file."""
        path = self.folder / adapter / file
        try:
            content = read_regular(path, size)
            target.write_bytes(content)
        except OSError as error:
            raise FileError(f"{path} is listed in {self.folder / INDEX}, and could not be read ({error}).") from error

    def forget(self, adapter: str, file: str) -> bool:
        """Say that there is no copy."""
        return False


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirections to other web servers, and never from https to less, or to files."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Check where a redirection leads; a server elsewhere may not lead to those of this machine without https."""
        check_address(newurl, local=_is_local(req.full_url))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_address(address: str, *, local: bool = True) -> None:
    """Refuse addresses that are not of https, but for servers of this machine.

    Args:
        address: The address.
        local: Whether http is allowed for servers of this machine.

    Raises:
        ConfigError: If it is another one, or no address.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        known = bool(parts.hostname) and parts.port != 0  # a port that is no number is an error here
    except ValueError as error:
        raise ConfigError(f"{shown(address)} is no address of a web server: {brief(error)}") from error
    if known and (parts.scheme == "https" or (local and _is_local(address))):
        return
    raise ConfigError(
        f"{shown(address)} was asked for; adapters are fetched from addresses that begin with https:// alone."
    )


def _is_local(address: str) -> bool:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme == "http" and parts.hostname in _LOCAL


class WebSource:
    """A zoo on a web server, which serves its files as they are."""

    def __init__(self, address: str) -> None:
        """Check the address.

        Args:
            address: That of the folder, or of its index.
        """
        check_address(address)
        self.name = address.removesuffix(INDEX).rstrip("/")
        if offline():
            raise FileError(f"{self.name} was asked for, and {' or '.join(OFFLINE_VARIABLES)} forbids the network.")
        self._opener = urllib.request.build_opener(_SafeRedirects())

    def index(self) -> bytes:
        """Read its index."""
        with self._opened(INDEX, {}) as (answer, _):
            content = answer.read(LARGEST_INDEX + 1)
        if len(content) > LARGEST_INDEX:
            raise FileError(f"{self.name}/{INDEX} has more than {LARGEST_INDEX:,} bytes, which no index has.")
        return bytes(content)

    def fetch(self, adapter: str, file: str, size: int, target: Path) -> None:
        """Download one file; what is there already is asked for no more."""
        have = target.stat().st_size if target.is_file() else 0
        if have >= size:
            have = 0  # whole but not the right one, or left by another file
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._opened(f"{adapter}/{file}", headers) as (answer, status):
            goes_on = status == http.HTTPStatus.PARTIAL_CONTENT and _starts_at(answer, have)
            with target.open("ab" if goes_on else "wb") as out:
                self._copy(answer, out, size - (have if goes_on else 0), file)

    def forget(self, adapter: str, file: str) -> bool:
        """Say that there is no copy."""
        return False

    def _copy(self, answer: IO[bytes], out: IO[bytes], left: int, file: str) -> None:
        while block := answer.read(min(_BLOCK, left + 1)):
            if len(block) > left:
                raise FileError(f"{self.name} sends more of {file} than its {INDEX} states. It is not to be trusted.")
            out.write(block)
            left -= len(block)
        if left:
            raise FileError(f"{self.name} stopped {left:,} bytes before the end of {file}. The same command goes on.")

    @contextmanager
    def _opened(self, place: str, headers: dict[str, str]) -> Iterator[tuple[IO[bytes], int]]:
        address = f"{self.name}/{urllib.parse.quote(place)}"
        request = urllib.request.Request(address, headers={"User-Agent": "vispeft", **headers})
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                yield answer, answer.status
        except urllib.error.HTTPError as error:
            raise FileError(f"{address} was asked for, and the server answers {error.code} {error.reason}.") from error
        except (OSError, http.client.HTTPException) as error:
            raise FileError(
                f"{address} cannot be reached ({brief(error)[:-1]}). Try again later: what was fetched is kept."
            ) from error
        except ValueError as error:
            if isinstance(error, VispeftError):
                raise
            raise FileError(f"{address} leads to what is no address ({brief(error)[:-1]}).") from error


def _starts_at(answer: Any, have: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-")


class HubSource:
    """A repository of the Hugging Face Hub, or of another hub with the same interface, at one fixed commit."""

    def __init__(self, repository: str, revision: str | None) -> None:
        """Name the repository.

        Args:
            repository: OWNER/NAME.
            revision: A branch, tag or commit; None for the newest commit.
        """
        self.repository, self.revision = repository, revision
        self.name = repository if revision is None else f"{repository}@{revision}"
        self._anew: set[str] = set()

    def index(self) -> bytes:
        """Find the commit, and read its index."""
        from vispeft.zoo.hub import commit_of, fetch_files

        if not offline():
            self.revision = commit_of(self.repository, self.revision)
        elif self.revision is None or not _SHA.fullmatch(self.revision):
            raise FileError(
                f"{self.name} was asked for, and {' or '.join(OFFLINE_VARIABLES)} forbids the network. Give the commit "
                "whose files are in the cache: OWNER/NAME@COMMIT."
            )
        self.name = f"{self.repository}@{self.revision}"
        # It is small, and a damaged copy in the cache would stay there.
        wanted, anew = {INDEX: LARGEST_INDEX}, not offline()
        place = fetch_files(self.repository, self.revision, wanted, _hub_cache(), offline(), anew=anew)
        return FolderSource(place).index()

    def fetch(self, adapter: str, file: str, size: int, target: Path) -> None:
        """Download one file through the hub's client, which goes on where it was stopped."""
        from vispeft.zoo.hub import fetch_files

        assert self.revision is not None
        name, where = f"{adapter}/{file}", (self.repository, self.revision)
        place = fetch_files(*where, {name: size}, _hub_cache(), offline(), anew=name in self._anew)
        if (place / name).stat().st_size != size and not offline():  # a damaged copy, or what the hub has
            place = fetch_files(*where, {name: size}, _hub_cache(), offline(), anew=True)
        FolderSource(place).fetch(adapter, file, size, target)

    def forget(self, adapter: str, file: str) -> bool:
        """Download the file anew, where the network is allowed: the client does not compare digests of its cache."""
        self._anew.add(f"{adapter}/{file}")
        return not offline()


def _hub_cache() -> Path:
    return cache_folder() / "hub"
