"""Uploads to a hub on this machine, and what is said when there is none or it refuses."""

import base64
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from bge_pruning.export.hub_upload import check_hub_access, check_name, push_to_hub
from tests.common.files import contents

TOKEN = "hf_secretsecretsecret"
NAME = "me/small"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs; ``refused`` are statuses by the start of a path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}
        self.tokens: set[str | None] = set()
        self.user = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
        self.messages: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.refuse():
            return
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if self.path == "/api/whoami-v2":
            self.answer(self.server.user)
        elif name in self.server.private:
            self.answer({"id": name, "private": self.server.private[name], "siblings": []})
        else:
            self.answer({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse():
            return
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "header":
                    self.server.messages.append(row["value"]["summary"])
                else:
                    content = base64.b64decode(row["value"]["content"])
                    self.server.files.setdefault(name, {})[row["value"]["path"]] = content
            self.answer({"commitUrl": f"{name}/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self.answer({"errors": [], "warnings": []})

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.server.private
        host, port = self.server.server_address
        if not there:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.server.private[name] = private
        self.answer({"url": f"http://{host}:{port}/{name}"}, 409 if there else 200)

    def refuse(self) -> bool:
        self.server.tokens.add(self.headers["Authorization"])
        status = next((s for p, s in self.server.refused.items() if self.path.startswith(p)), None)
        if status is not None:
            self.answer({"error": "no"}, status)
        return status is not None

    def answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A hub that the client talks to, with a token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """As an extracted one, with an empty and a hidden file."""
    folder = tmp_path / "my model"
    (folder / "1_Pooling").mkdir(parents=True)
    files = {
        "pruning.json": b"{}",
        "README.md": "---\nlicense: mit\n---\n# é\n".encode(),
        "model.safetensors": bytes(range(256)) * 40,
        "1_Pooling/config.json": b"{}",
        ".hidden": b"x",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("rights", [{"accessToken": {"role": "write"}}, None, {"type": "oauth"}])
def test_access(rights, hub):
    hub.user = {"name": "me", "auth": rights}
    assert check_hub_access(NAME) == "me"
    assert f"Bearer {TOKEN}" in hub.tokens
    assert not hub.private and not hub.files  # nothing is made before there is a model


def test_all_of_a_folder_is_uploaded(hub, folder, messages):
    with messages.at_level(logging.INFO):
        page = push_to_hub(folder, NAME)
    assert page == f"{constants.ENDPOINT}/{NAME}"
    assert f"uploaded {folder} to {page}" in messages.text
    assert hub.files == {NAME: contents(folder)}
    assert hub.private == {NAME: False}
    assert hub.messages == ["Upload a pruned model"]
    assert TOKEN not in messages.text


def test_a_private_model_and_a_second_upload(hub, folder):
    push_to_hub(folder, NAME, private=True)
    (folder / "README.md").write_text("# new\n")
    push_to_hub(folder, NAME, private=True)
    assert hub.private == {NAME: True}
    assert hub.files == {NAME: contents(folder)}


@pytest.mark.parametrize(
    "name", ["", "small", "a/b/c", "/x/y", "me/a b", "me/x--y", "me/x.git", "me/", "é/x", "./x"]
)
def test_what_is_no_name(name, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # nobody is asked
    message = r"^'.*' cannot be the name of a model on the hub\. To fix, choose owner/name of"
    for action in (check_name, check_hub_access, lambda n: push_to_hub(folder, n)):
        with pytest.raises(ValueError, match=message):
            action(name)


def test_other_folders_and_public_models_are_refused(hub, tmp_path, folder):
    message = r": holds no pruning\.json, so it is not an extracted model\. To fix, give the folder"
    with pytest.raises(FileNotFoundError, match=message):
        push_to_hub(tmp_path, NAME)
    assert not hub.tokens
    hub.private[NAME] = False
    message = r"^'me/small' already exists and is public: nothing was uploaded\. To f"
    with pytest.raises(PermissionError, match=message):
        push_to_hub(folder, NAME, private=True)
    assert not hub.files


def test_a_token_that_is_missing_or_cannot_be_read(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    message = r"^there is no token for the Hugging Face hub\. To fix, run 'hf auth login' with a"
    for action in (lambda: check_hub_access(NAME), lambda: push_to_hub(folder, NAME)):
        with pytest.raises(PermissionError, match=message):
            action()

    def fail() -> str:
        raise RuntimeError("no exchange.\nmore")

    monkeypatch.setattr(huggingface_hub, "get_token", fail)
    message = r"^the token for the Hugging Face hub cannot be read \(no exchange\)\. To fix, check"
    with pytest.raises(OSError, match=message):
        check_hub_access(NAME)


def test_a_token_that_may_do_too_little_no_network_and_an_offline_client(hub, monkeypatch):
    hub.refused["/api/whoami-v2"] = 401
    message = r"^'me/small' cannot be prepared on the hub \(.+\)\. To fix, run 'hf auth login' with"
    with pytest.raises(OSError, match=message) as caught:
        check_hub_access(NAME)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    hub.refused.clear()
    hub.user["auth"]["accessToken"]["role"] = "read"
    message = r"^the token of me may only read\. To fix, run 'hf auth login' with a token that may"
    with pytest.raises(PermissionError, match=message):
        check_hub_access(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    message = r"^'me/small' cannot be prepared on the hub \({}\)\. To fix, check the network, then"
    with pytest.raises(OSError, match=message.format(".+")):
        check_hub_access(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=message.format(".*HF_HUB_OFFLINE.*")):
        check_hub_access(NAME)


@pytest.mark.parametrize(
    ("path", "status", "fix"),
    [
        ("/api/repos/create", 403, "run 'hf auth login' with"),
        ("/api/models/me/small/commit", 403, "run 'hf auth login' with"),
        ("/api/models/me/small/commit", 413, "check the network, then pu"),
    ],
)
def test_a_hub_that_refuses(path, status, fix, hub, folder):
    hub.refused[path] = status
    before = contents(folder)
    message = rf"my model was not uploaded to 'me/small' \(.+\)\. To fix, {fix}"
    with pytest.raises(OSError, match=message) as caught:
        push_to_hub(folder, NAME)
    assert "\n" not in str(caught.value)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert not hub.files and contents(folder) == before


@pytest.mark.parametrize("token", [f"{TOKEN}\nsecond", f"{TOKEN} second", f"{TOKEN}é"])
def test_a_token_that_is_no_header_stays_secret(token, hub, folder, monkeypatch):
    """The HTTP library would quote it, as an error that holds a valid one does."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    message = r"^the token for the Hugging Face hub contains white space or invalid characters"
    for action in (lambda: check_hub_access(NAME), lambda: push_to_hub(folder, NAME)):
        with pytest.raises(PermissionError, match=message) as caught:
            action()
        assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert not hub.tokens

    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"Illegal header value: Bearer {TOKEN}\nmore")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    for name in ("whoami", "create_repo"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, fail)
    for action in (lambda: check_hub_access(NAME), lambda: push_to_hub(folder, NAME)):
        with pytest.raises(OSError, match=r"\(Illegal header value: Bearer \*\*\*\)\.") as caught:
            action()
        assert TOKEN not in "".join(traceback.format_exception(caught.value))
