"""Controllers on the Hugging Face Hub."""

from __future__ import annotations

import importlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerlens.core import Controller
from steerlens.core.part import Part
from steerlens.core.tables import VIEWS
from steerlens.sharing.card import model_card

#: Largest controller that is downloaded, in bytes.
LARGEST = 8 * 2**30


def push_to_hub(
    controller: Controller,
    repo: str,
    *,
    file: str,
    private: bool | None,
    license: str | None,
    data_license: str | None,
    evaluation: Any,
    message: str | None,
    token: str | None,
) -> str:
    """See `Controller.push_to_hub`."""
    hub = _hub()
    _check_names(repo, file)
    card = model_card(controller, repo, file=file, license=license, data_license=data_license, evaluation=evaluation)
    with tempfile.TemporaryDirectory(prefix="steerlens-") as folder:
        # before anything is sent: a controller that no file can hold is an error of its own
        controller.save(Path(folder) / "controller")
        data = (Path(folder) / "controller").read_bytes()
    operations = [
        hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=io.BytesIO(data)),
        hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=io.BytesIO(card.encode())),
    ]
    api = hub.HfApi(token=token, library_name="steerlens")
    with _one_sentence(hub, repo, file, None, verb="written to"):
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.create_commit(repo, operations, commit_message=message or f"Add {controller!r}")
    return str(found.commit_url)


def from_hub(
    repo: str, *, revision: str | None, file: str, laws: Iterable[type[Part]], token: str | None
) -> Controller:
    """See `Controller.from_hub`."""
    hub = _hub()
    _check_names(repo, file)
    with _one_sentence(hub, repo, file, revision, verb="read from"):
        path = hub.hf_hub_download(repo, file, revision=revision, token=token, library_name="steerlens")
    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"{file} of {repo} has {Path(path).stat().st_size} bytes, which no controller needs")
    try:
        return Controller.load(path, laws=laws)
    except ValueError as error:
        # not the path in the cache, which says nothing
        raise ValueError(str(error).replace(str(path), f"{file} of {repo}", 1)) from error


def _hub() -> Any:
    try:
        # its older versions have these two as attributes only once they are imported
        for part in ("errors", "constants"):
            importlib.import_module(f"huggingface_hub.{part}")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError("sharing on the Hub needs huggingface_hub; pip install 'steerlens[hub]'") from error


def _check_names(repo: Any, file: Any) -> None:
    parts = repo.split("/") if isinstance(repo, str) else []
    if not 1 <= len(parts) <= 2 or not all(parts):
        raise ValueError(f"repo={repo!r} is no repository of the Hub; write user/name")
    if not isinstance(file, str) or not file.endswith(".safetensors") or ".." in file or file.startswith("/"):
        raise ValueError(f"file={file!r}; a controller's file in a repository is a name in .safetensors")


@contextmanager
def _one_sentence(hub: Any, repo: str, file: str, revision: str | None, *, verb: str) -> Iterator[None]:
    """What the Hub's library raises as built-in exceptions with one sentence."""
    errors = hub.errors
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"repo={repo!r} is no repository of the Hub; write user/name") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} asks for its conditions to be accepted at {hub.constants.ENDPOINT}/{repo}, and for a token: "
            "hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision or 'main'!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub has no repository {repo}, or it is private and your token cannot read it: hf auth login"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo}{at} has no file {file}; name the controller's file: file=...") from error
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"{repo} cannot be {verb} without a token of the Hub: hf auth login") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(f"{repo} cannot be {verb} with this token of the Hub: hf auth login") from error
        raise OSError(f"{repo} was not {verb} the Hub, which answered {status}: {_first(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        response = getattr(error.__cause__, "response", None)
        if hub.constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        else:
            found = "does not answer" if response is None else f"answered {response.status_code}"
            why = f"{hub.constants.ENDPOINT} {found}"
        raise ConnectionError(f"{repo}{at} is not in the cache, and {why}") from error
    except OSError as error:
        if isinstance(error, (ConnectionError, PermissionError)) or error.filename is not None:
            raise ConnectionError(f"{repo} was not {verb} the Hub: {_first(error)}") from error
        raise OSError(f"{repo} was not {verb} the Hub: {_first(error)}") from error
    except Exception as error:  # its HTTP library has no exceptions of its own that could be named here
        if "connect" in type(error).__name__.lower() or "timeout" in type(error).__name__.lower():
            raise ConnectionError(f"{hub.constants.ENDPOINT} does not answer: {_first(error)}") from error
        raise


def _first(error: BaseException) -> str:
    """An error's first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


VIEWS.update(push=push_to_hub, pull=from_hub)
