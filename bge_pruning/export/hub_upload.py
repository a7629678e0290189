"""Upload a model folder to the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.hub import is_hub_name
from bge_pruning.utils.run_log import log_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

LOG_IN = (
    "run 'hf auth login' with a token that may write (https://huggingface.co/settings/tokens), or "
    "set HF_TOKEN to it"
)
LATER = (
    "check the network, then push the finished folder with 'python scripts/evaluate_model.py "
    "FOLDER --card --push-to-hub NAME'"
)


def check_hub_access(name: str) -> str:
    """Check that an upload can succeed, before the long work whose result is to be uploaded.

    Returns the user whose token is used.

    Raises:
        ValueError: If the name is invalid.
        OSError: If there is no token, the hub does not accept it or gives it no right to write, or
            the hub cannot be reached.
    """
    check_name(name)
    api = _client()
    log_hub(name)
    with _clear_errors(f"'{name}' cannot be prepared on the hub", api.token):
        user = api.whoami()
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise PermissionError(f"the token of {user['name']} may only read. To fix, {LOG_IN}.")
    return user["name"]


def push_to_hub(folder: Path, name: str, private: bool = False) -> str:
    """Upload a model folder in one commit, and create the model if the hub does not have it.

    Files that only the hub has are kept. Returns the address of the model's page.

    Raises:
        FileNotFoundError: If the folder holds no extracted model.
        ValueError: If the name is invalid.
        OSError: If the upload fails; the folder is as it was.
    """
    check_name(name)
    if not (folder / MARKER).is_file():
        raise FileNotFoundError(
            f"{folder}: holds no {MARKER}, so it is not an extracted model. To fix, give the "
            f"folder that scripts/extract_pruned_model.py wrote."
        )
    api = _client()
    failed = f"{folder} was not uploaded to '{name}'"
    with _clear_errors(failed, api.token):
        page = str(api.create_repo(name, private=private, exist_ok=True))
        public = private and not api.repo_info(name).private
    if public:  # creating a model that exists changes nothing
        raise PermissionError(
            f"'{name}' already exists and is public: nothing was uploaded. To fix, "
            f"choose another name, make it private on its page, or leave out --private."
        )
    with _clear_errors(failed, api.token):
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a pruned model")
    log.info("uploaded %s to %s", folder, page)
    return page


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = is_hub_name(name)
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"'{name}' cannot be the name of a model on the hub. To fix, choose owner/name of "
            f"letters, digits, '-', '_' and '.', such as me/my-small-model."
        )


def _client() -> HfApi:
    """A client with the user's token, which none of our messages contains."""
    from huggingface_hub import HfApi, get_token

    with _clear_errors("the token for the Hugging Face hub cannot be read"):
        token = get_token()
    if not token:
        raise PermissionError(f"there is no token for the Hugging Face hub. To fix, {LOG_IN}.")
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would refuse the header, and show it
        raise PermissionError(
            f"the token for the Hugging Face hub contains white space or invalid characters. "
            f"To fix, {LOG_IN}."
        )
    return HfApi(token=token, library_name="bge_pruning")


@contextmanager
def _clear_errors(what: str, token: str | None = None) -> Iterator[None]:
    """Turn any failure of the hub or the network into one line that says what to do.

    A traceback would show an error that holds the token, so that error is not named as the cause.
    """
    try:
        yield
    except Exception as error:  # the client also lets its HTTP library's errors through
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = LOG_IN if status in (401, 403) else LATER
        said = str(error).strip()
        secret = bool(token) and token in said + repr(error)
        reason = (said.replace(token, "***") if secret else said).partition("\n")[0]
        message = f"{what} ({reason.rstrip('.') or type(error).__name__}). To fix, {fix}."
        raise OSError(message) from None if secret else error
