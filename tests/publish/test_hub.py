"""Pushing to the hub: a stand-in for its API, and a server on this machine that speaks its protocol. The real
hub is never asked."""

import base64
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from rich.console import Console

from fastdpo.api import train
from fastdpo.cli import main
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.publish import hub
from fastdpo.publish.hub import check_hub, push
from tests.training.test_trainer import QUIET, Run


class Api:
    """What huggingface_hub.HfApi is asked for."""

    def __init__(self):
        self.calls, self.fails = [], {}

    def _call(self, call, **keys):
        self.calls.append((call, keys))
        if call in self.fails:
            raise self.fails[call]

    def whoami(self):
        self._call("whoami")

    def create_repo(self, name, **keys):
        self._call("create_repo", name=name, **keys)
        return SimpleNamespace(repo_id=f"me/{name.rpartition('/')[2]}")

    def upload_folder(self, **keys):
        files = {p.name: p.read_bytes() for p in keys["folder_path"].iterdir()}
        self._call("upload_folder", files=files, **keys)

    @property
    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def api(monkeypatch):
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    return api


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
        return Run(tmp_path_factory.mktemp("lora"), lora_rank=2, max_steps=1)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is uploaded


def test_the_model_goes_up_in_one_commit_of_a_private_repository(api, run):
    model, console = run.folder / "model", Console(file=io.StringIO(), width=10**4)
    before = files(model)
    push(model, "mine", console)
    (_, made), (_, sent) = api.calls
    assert made == {"name": "mine", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/mine" and sent["files"] == before == files(model)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < sent["files"].keys()
    assert f"names its base by a path of this machine, {run.start}" in console.file.getvalue()


def test_what_an_earlier_model_left_does_not_stay_beside_it(api, run):
    from huggingface_hub.utils import filter_repo_objects

    push(run.folder / "model", "mine", QUIET)
    there = (
        "model-00001-of-00002.safetensors model.safetensors model.safetensors.index.json adapter_config.json"
    )
    kept = ["notes.md", "runs/model.txt", "tokenizer.json", "step-1/adapter_model.safetensors"]
    patterns = api.calls[-1][1]["delete_patterns"]
    gone = list(filter_repo_objects([*there.split(), *kept], allow_patterns=patterns))
    assert gone == there.split()


def test_the_command(api, run, capsys):
    for source in (run.folder, run.folder / "model"):
        assert main(["push", str(source), "--to", "me/mine"]) == 0
        assert api.names[-3:] == ["whoami", "create_repo", "upload_folder"]
        assert api.calls[-1][1]["folder_path"] == run.folder / "model"
    assert main(["push", str(run.folder)]) == 2 and "--to requires an argument" in capsys.readouterr().err
    assert main(["push", str(run.folder.parent / "nowhere"), "--to", "x"]) == 2
    assert main(["push", str(run.folder), "--to", "a/b/c"]) == 2
    api.fails["whoami"] = ConnectionError("unreachable")
    assert main(["push", str(run.folder), "--to", "me/mine"]) == 2
    assert re.findall("(?m)^error: (--to: .{13})", capsys.readouterr().err) == [
        "--to: 'a/b/c' is no",
        "--to: the hub canno",
    ]


# ---- before the training


@pytest.mark.parametrize("name", ["a/b/c", "has space", "", "-x", "true.git"])
def test_a_wrong_name(api, name):
    with pytest.raises(ConfigError, match=r"push_to_hub: .* is not a repository's name"):
        check_hub(name)
    assert api.calls == []


def test_nobody_logged_in(api):
    api.fails["whoami"] = LocalTokenNotFoundError("no token")
    with pytest.raises(ConfigError, match=r"push_to_hub: not logged in .* `hf auth login`.* HF_TOKEN"):
        check_hub("me/mine")


def test_no_network(api):
    api.fails["whoami"] = ConnectionError("unreachable")
    with pytest.raises(ConfigError, match="the hub cannot be reached: ConnectionError: unreachable"):
        check_hub("me/mine")


def test_nothing_is_asked_where_nothing_is_to_be_pushed(api):
    check_hub(None)
    assert api.calls == []


# ---- in a run


def asking(run, folder, name="me/mine") -> Config:
    values = {key: value for key, value in vars(run.config).items() if key != "push_to_hub"}
    config = Config(**values | {"output_dir": str(folder)})
    object.__setattr__(config, "push_to_hub", name)
    return config


def test_a_run_pushes_its_model(api, run, tmp_path):
    train(asking(run, tmp_path / "run"), QUIET)
    assert api.names[-2:] == ["create_repo", "upload_folder"]
    assert api.calls[-1][1]["files"] == files(tmp_path / "run/model")


def test_a_run_pushes_nothing_unasked(api, run, tmp_path):
    train(asking(run, tmp_path / "run", None), QUIET)
    assert api.calls == []


@pytest.mark.parametrize("where", ["create_repo", "upload_folder"])
def test_a_push_that_fails_loses_nothing(api, run, tmp_path, where):
    api.fails[where] = ConnectionError("cut off")
    with pytest.raises(FastDPOError) as caught:
        train(asking(run, tmp_path / "run"), QUIET)
    said = str(caught.value)
    assert "me/mine was not pushed: ConnectionError: cut off" in said
    command = f"fastdpo push {shlex.quote(f'{tmp_path}/run/model')} --to me/mine"
    assert said.endswith(command)
    assert (tmp_path / "run/model/adapter_model.safetensors").exists()
    assert '"event": "done"' in (tmp_path / "run/events.jsonl").read_text()
    api.fails.clear()
    assert main(shlex.split(command)[1:]) == 0  # as it says


def test_an_interrupted_push_says_the_same(api, run):
    console = Console(file=io.StringIO(), width=10**4)
    api.fails["upload_folder"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        push(run.folder / "model", "me/mine", console)
    folder = shlex.quote(f"{run.folder}/model")
    assert f"fastdpo push {folder} --to me/mine" in console.file.getvalue()


def test_a_run_does_not_start_without_a_log_in(api, run, tmp_path):
    api.fails["whoami"] = LocalTokenNotFoundError("no token")
    with pytest.raises(ConfigError, match="push_to_hub: not logged in"):
        train(asking(run, tmp_path / "run"), QUIET)
    assert not (tmp_path / "run").exists()


# ---- the protocol, as huggingface_hub itself speaks it


class Server(BaseHTTPRequestHandler):
    """A hub of one repository: who one is, making it, what a commit holds."""

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        size, at, seen = self.headers.get("Content-Length"), self.path, self.server.seen
        if size is None and self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while chunk := int(self.rfile.readline(), 16):
                body += self.rfile.read(chunk)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(size or 0))
        seen.append((self.command, at))
        url = f"http://127.0.0.1:{self.server.server_port}/me/mine"
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer({"error": "Invalid username or password."}, 401)
        elif at == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        elif at == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer({"url": url, "name": "me/mine"})
        elif at.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif at.startswith("/api/models/me/mine/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": plain})
        elif at.startswith("/api/models/me/mine/commit/"):
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            self.answer({"commitUrl": f"{url}/commit/1", "commitOid": "1", "pullRequestUrl": None})
        elif at.startswith("/api/models/me/mine/tree/"):
            old = [{"type": "file", "path": "model.safetensors", "size": 1, "oid": "1"}]
            self.answer(old)
        else:
            self.answer({"id": "me/mine", "sha": "1", "siblings": [{"rfilename": "model.safetensors"}]})

    do_GET = do_POST = handle_any

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.seen, server.commit = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(server, folder, tmp_path, token):
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    here |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-m", "fastdpo.cli", "push", str(folder), "--to", "me/mine"]
    return subprocess.run(argv, env=os.environ | here, capture_output=True, text=True, timeout=300)


def test_a_server_gets_every_file(server, run, tmp_path):
    done = command(server, run.folder, tmp_path, "hf_good")
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout and "Traceback" not in done.stderr
    assert server.made == {"name": "mine", "organization": "me", "visibility": "private"}
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in server.commit
        if line["key"] == "file"
    }
    assert sent == files(run.folder / "model")
    deleted = [line["value"]["path"] for line in server.commit if line["key"] == "deletedFile"]
    assert deleted == ["model.safetensors"]


def test_a_server_that_refuses_the_token(server, run, tmp_path):
    done = command(server, run.folder, tmp_path, "hf_bad")
    assert done.returncode == 2 and done.stderr.startswith("error: --to: the hub does not accept the token")
    assert "/api/whoami-v2" in [at for _, at in server.seen]
    assert not any(method == "POST" for method, _ in server.seen) and not server.commit
