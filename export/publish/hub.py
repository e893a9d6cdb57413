"""The Hub as the upload sees it: a repository opened and compared; its errors as sentences.

The token is the Hub client's business alone: it takes it from the environment or its own login, and
nothing here reads it but to keep it out of messages.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from checkpoint.faults import BadInput, Fault, shortened

MAIN = "main"
_PULL_REQUESTS = "refs/"
_WEIGHTS_OR_CODE = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".py")
"""Files that vLLM or transformers would load beside ours."""

_PATHS_AT_ONCE = 200

_REMEDIES = {
    HTTPStatus.UNAUTHORIZED: "the token is missing, wrong or expired: hf auth login, or HF_TOKEN",
    HTTPStatus.PAYMENT_REQUIRED: "the account's plan does not allow it",
    HTTPStatus.FORBIDDEN: "the token may not write there: choose another name or another token",
    HTTPStatus.NOT_FOUND: "check the name and --revision, and whether the token may see it",
    HTTPStatus.CONFLICT: "somebody else is changing it: run again",
    HTTPStatus.PRECONDITION_FAILED: "somebody else has changed it meanwhile: run again",
    HTTPStatus.TOO_MANY_REQUESTS: "wait some minutes and run again: what was sent stays",
}


@dataclass(frozen=True)
class Target:
    """Where an upload goes.

    Attributes:
        name: `ORG/NAME`.
        revision: Branch, or `refs/pr/N` of a pull request.
        is_private: Whether the repository must be private.
    """

    name: str
    revision: str = MAIN
    is_private: bool = False

    def url(self, endpoint: str) -> str:
        """The page of the upload."""
        address = f"{endpoint}/{self.name}"
        return address if self.revision == MAIN else f"{address}/tree/{self.revision}"


def check_target(target: Target) -> None:
    """Refuse a name that the Hub would not accept, before anything is read.

    Raises:
        BadInput: It is not `ORG/NAME`.
    """
    fault = Fault(shortened(target.name), "is not a name on the Hub", "give ORG/NAME")
    if target.name.count("/") != 1:
        raise BadInput(fault)
    try:
        validate_repo_id(target.name)
    except HFValidationError:
        raise BadInput(fault) from None


def check_login() -> None:
    """Refuse to begin without a token.

    Raises:
        BadInput: Neither the environment nor the Hub's login has one.
    """
    if get_token() is None:
        what = "there is no token in the environment and no login"
        raise BadInput(Fault("Hugging Face Hub", what, "hf auth login, or set HF_TOKEN"))


@contextlib.contextmanager
def hub_errors(target: Target) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one sentence without the token.

    Raises:
        BadInput: In the place of the client's errors.
    """
    resumes = "run the same command again: what was sent stays"
    try:
        yield
    except HfHubHTTPError as error:
        raise BadInput(_http_fault(target, error)) from None
    except httpx2.HTTPError as error:
        what = f"the connection failed: {_harmless(error) or type(error).__name__}"
        raise BadInput(Fault(target.name, what, resumes)) from None
    except (RuntimeError, ValueError, ConnectionError) as error:
        # hf_xet, which sends the weights, raises RuntimeError for everything; the client raises
        # ValueError for answers that it does not understand.
        raise BadInput(Fault(target.name, f"not sent: {_harmless(error)}", resumes)) from None


def open_repository(api: HfApi, target: Target, names: set[str]) -> None:
    """Create the repository and the branch, or check those that exist.

    Args:
        api: The client.
        target: Where the upload goes.
        names: Files that will be sent.

    Raises:
        BadInput: It exists and is public where private was asked for, or holds weights or code that
            are not ours, which a server would load.
        HfHubHTTPError: As the Hub answers.
    """
    api.create_repo(target.name, private=target.is_private or None, exist_ok=True)
    if target.is_private and not api.repo_info(target.name).private:
        what = "exists and is public, though --private was given"
        remedy = "make it private on the Hub, or choose another name"
        raise BadInput(Fault(target.name, what, remedy))
    if target.revision != MAIN and not target.revision.startswith(_PULL_REQUESTS):
        api.create_branch(target.name, branch=target.revision, exist_ok=True)
    foreign = []
    for path in api.list_repo_files(target.name, revision=target.revision):
        if path.endswith(_WEIGHTS_OR_CODE) and path not in names:
            foreign.append(path)
    if foreign:
        what = f"exists and holds {len(foreign)} files of another model, such as {foreign[0]}"
        remedy = "choose another name, or delete them there"
        raise BadInput(Fault(target.name, shortened(what), remedy))


def remote_faults(
    api: HfApi, target: Target, directory: Path, names: list[str], recorded: Mapping[str, str]
) -> Iterator[Fault]:
    """Yield one fault for each file that the Hub does not hold as it is here, by its hash.

    Args:
        api: The client.
        target: Where the files were sent.
        directory: Where they came from.
        names: The files.
        recorded: SHA-256 of files, where the manifest records it; others are computed.
    """
    found = {}
    for start in range(0, len(names), _PATHS_AT_ONCE):
        part = names[start : start + _PATHS_AT_ONCE]
        for item in api.get_paths_info(target.name, part, revision=target.revision):
            if isinstance(item, RepoFile):
                found[item.path] = item
    for name in names:
        where = f"{target.name}/{name}"
        if name not in found:
            yield Fault(where, "is not on the Hub", "run the same command again")
            continue
        remote = found[name]
        if remote.lfs is not None:
            ours = recorded.get(name) or _sha256(directory / name)
            is_same = remote.lfs.sha256 == ours
        else:
            is_same = remote.blob_id == git_blob_id((directory / name).read_bytes())
        if not is_same:
            yield Fault(
                where, "differs on the Hub from the file here", "run the same command again"
            )


def git_blob_id(data: bytes) -> str:
    """Return the name that git gives to a file's content."""
    header = f"blob {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _http_fault(target: Target, error: HfHubHTTPError) -> Fault:
    status = error.response.status_code
    try:
        phrase = f"{status} {HTTPStatus(status).phrase}"
        remedy = _REMEDIES.get(HTTPStatus(status))
    except ValueError:
        phrase, remedy = str(status), None
    if remedy is None:
        remedy = "the Hub's fault: run again later" if status >= 500 else "see the Hub's answer"
    what = f"the Hub answered {phrase}"
    if error.server_message:
        what = f"{what}: {_harmless(error.server_message)}"
    return Fault(target.name, what, remedy)


def _harmless(text: object) -> str:
    """A foreign text for a message, without the token."""
    shown = str(text)
    token = get_token()
    if token:
        shown = shown.replace(token, "…")
    return shortened(shown)
