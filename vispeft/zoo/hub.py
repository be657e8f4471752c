"""The Hugging Face Hub, by its own client: a commit, files of it, and the upload of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vispeft.errors import ConfigError, FileError, brief

__all__ = ["commit_of", "fetch_files", "files_of", "upload"]

SECONDS = 20.0
"""Time in seconds after which a hub that sends nothing counts as unreachable."""
Result = TypeVar("Result")


def commit_of(repository: str, revision: str | None) -> str:
    """Find the commit of a branch or tag.

    Args:
        repository: OWNER/NAME.
        revision: Branch, tag or commit; None for the newest commit.

    Returns:
        The commit.

    Raises:
        FileError: If the hub cannot be reached, or has none.
    """
    info = _asked(repository, lambda api: api.model_info(repository, revision=revision, timeout=SECONDS))
    if not info.sha:
        raise FileError(f"{repository} has no commit yet.")
    return str(info.sha)


def fetch_files(
    repository: str, commit: str, wanted: Mapping[str, int], cache: Path, offline: bool, *, anew: bool = False
) -> Path:
    """Download files of a commit into the client's cache, after their sizes were compared with what is allowed.

    Args:
        repository: OWNER/NAME.
        commit: The commit.
        wanted: Largest size in bytes of each file.
        cache: Folder of the cache.
        offline: Whether only the cache is looked at.
        anew: Whether files are downloaded although the cache has them.

    Returns:
        A folder with the files.

    Raises:
        FileError: If one is missing or too large, or the hub cannot be reached.
    """
    if not offline:
        info = _asked(
            repository, lambda api: api.model_info(repository, revision=commit, timeout=SECONDS, files_metadata=True)
        )
        sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
        for name, largest in wanted.items():
            if name not in sizes:
                raise FileError(f"{repository}@{commit} has no {name}. It is no zoo, or its index lists too much.")
            if (sizes[name] or 0) > largest:
                raise FileError(f"{name} of {repository} has {sizes[name]:,} bytes; at most {largest:,} are expected.")

    def download(api: HfApi) -> str:
        return snapshot_download(
            repository,
            revision=commit,
            allow_patterns=sorted(wanted),
            cache_dir=cache,
            local_files_only=offline,
            force_download=anew and not offline,
            endpoint=api.endpoint,
            etag_timeout=SECONDS,
            tqdm_class=None,
            max_workers=1,
        )

    place = Path(_asked(repository, download))
    lacking = [name for name in wanted if not (place / name).is_file()]
    if lacking:  # where the hub fails meanwhile, its client gives what the cache has
        why = "the network is forbidden" if offline else "the hub did not answer. Try again later"
        raise FileError(f"{lacking[0]} of {repository}@{commit} is not in the cache, and {why}.")
    return place


def files_of(repository: str) -> tuple[str, frozenset[str]] | None:
    """Find the newest commit of a repository, and the files it has.

    Args:
        repository: OWNER/NAME.

    Returns:
        The commit and the names; None if there is no such repository, or nothing in it.

    Raises:
        FileError: If the hub cannot be reached.
    """
    info = _asked(repository, lambda api: api.model_info(repository) if api.repo_exists(repository) else None)
    if info is None or not info.sha:
        return None
    return str(info.sha), frozenset(entry.rfilename for entry in info.siblings or ())


def upload(folder: Path, repository: str, message: str, private: bool, parent: str | None = None) -> str:
    """Upload a folder, into a repository that is made if it does not exist.

    Args:
        folder: The folder.
        repository: OWNER/NAME.
        message: Message of the commit.
        private: Whether a new repository is private.
        parent: The commit that the upload follows; it is refused if another one has come. None for any.

    Returns:
        The commit.

    Raises:
        FileError: If the hub cannot be reached, or refuses.
    """

    def send(api: HfApi) -> Any:
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, parent_commit=parent)

    return str(_asked(repository, send).oid)


def _asked(repository: str, ask: Callable[[HfApi], Result]) -> Result:
    """Ask the hub, and say of every error of its client what to do."""
    endpoint = os.environ.get("HF_ENDPOINT")  # the client reads it once, when it is imported
    try:
        return ask(HfApi(endpoint=endpoint, library_name="vispeft"))
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name of a repository: {brief(error)}") from error
    except GatedRepoError as error:
        raise FileError(
            f"{repository} asks for a login and an agreement: hf auth login, then ask on its page."
        ) from error
    except RevisionNotFoundError as error:
        raise FileError(f"{repository} has no such revision. {brief(error)}") from error
    except RepositoryNotFoundError as error:
        raise FileError(
            f"There is no repository {repository} at {endpoint or 'the hub'}, or it needs a login: hf auth login."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileError(
            f"{repository} cannot be reached, and its files are not in the cache. Try again later."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FileError(f"{repository} cannot be reached at {endpoint or 'the hub'} ({brief(error)[:-1]}).") from error
    except (ValueError, KeyError, TypeError) as error:  # of the client, from an answer of another form
        if str(error).startswith("Invalid metadata"):
            raise ConfigError(f"{endpoint or 'The hub'} refuses the model card. {brief(error)}") from error
        raise FileError(f"{endpoint or 'The hub'} answers nothing that a hub answers ({brief(error)[:-1]}).") from error
    except Exception as error:
        # Its HTTP library has errors of its own (no answer, no such host), and has changed before.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        raise FileError(f"{repository} cannot be reached at {endpoint or 'the hub'} ({brief(error)[:-1]}).") from error
