"""Models by hub name, and sending an output: the real client against a hub of a few lines."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tailor_fast._core.errors import InputError
from tailor_fast.batch import read_manifest
from tailor_fast.checkpoint import is_hub_name, local_path
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair

REVISION = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """The calls of an upload. Keeps the files of each commit; ``refuses`` names a call to fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.calls: list[str] = []
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses: str | None = None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer("")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def answer(self, body: str) -> None:
        hub, call = self.server, self.path.split("/api/")[1].split("?")[0]
        hub.calls.append(call)
        if hub.refuses is not None and hub.refuses in call:
            self.reply(403, {"error": "not yours"})
        elif call == "whoami-v2":
            self.reply(200, {"type": "user", "name": "me", "auth": {}})
        elif call == "repos/create":
            hub.made.append(json.loads(body))
            self.reply(200, {"url": f"{hub.address}/me/patched", "name": "me/patched", "id": "1"})
        elif "/preupload/" in call:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
            ]
            self.reply(200, {"files": modes})
        elif "/commit/" in call:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            self.reply(
                200, {"commitUrl": f"{hub.address}/me/patched/commit/1", "commitOid": REVISION}
            )
        else:
            self.reply(200, {})

    def reply(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def tailor_fast(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub at which one is logged in."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return llama_pair(tmp_path_factory.mktemp("pair"), blocks=1)


@pytest.fixture
def cache(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pair as ``hf download`` leaves it: links into blobs, a revision under a name."""
    root = tmp_path / "cache"
    for model, name in zip(pair, ("before", "after"), strict=True):
        folder = root / f"models--lab--{name}"
        snapshot = folder / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
        for file in model.iterdir():
            shutil.copy(file, folder / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_hub_name_is_found_in_the_cache(cache: Path) -> None:
    snapshot = cache / "models--lab--before" / "snapshots" / REVISION
    assert local_path("lab/before") == snapshot
    assert local_path(f"lab/before@{REVISION}") == snapshot
    assert local_path(snapshot) == snapshot


@pytest.mark.parametrize("name", ["lab/nothing", "lab/before@v2", "lab/a--b"])
def test_what_is_not_in_the_cache_is_not_fetched(cache: Path, name: str) -> None:
    repository = name.split("@")[0]
    with pytest.raises(InputError, match=f"no path, and no model .* hf download {repository}"):
        local_path(name)


@pytest.mark.parametrize(
    "name", ["model", "/lab/model", "./lab/model", "a/b/c", "lab/model.safetensors", "lab/i.json"]
)
def test_other_paths_are_left_alone(name: str) -> None:
    assert not is_hub_name(name)
    assert local_path(name) == Path(name)


def test_a_directory_that_exists_comes_first(cache: Path) -> None:
    Path("lab/before").mkdir(parents=True)
    assert not is_hub_name("lab/before")
    assert local_path("lab/before") == Path("lab/before")


def test_patch_by_hub_names(
    cache: Path, pair: tuple[Path, Path], tmp_path: Path, tailor_fast: CommandLine
) -> None:
    assert tailor_fast("patch", "lab/before", "lab/after", "-o", "by-name", "-q").code == 0
    assert tailor_fast("patch", *pair, "-o", "by-path", "-q").code == 0
    ours, theirs = (tmp_path / out / "model.safetensors" for out in ("by-name", "by-path"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert '- "lab/before"\n- "lab/after"' in (tmp_path / "by-name" / "README.md").read_text()
    assert tailor_fast("verify", "by-name").code == 0
    assert tailor_fast("inspect", "lab/after").code == 0
    assert tailor_fast("diff", "lab/before", "by-name", "-o", "p.tailor.safetensors").code == 0
    assert tailor_fast("apply", "lab/before", "p.tailor.safetensors", "-o", "again").code == 0


def test_a_manifest_may_use_hub_names(
    cache: Path, pair: tuple[Path, Path], tmp_path: Path, tailor_fast: CommandLine
) -> None:
    manifest = tmp_path / "jobs.yaml"
    manifest.write_text(f"jobs: [{{base: lab/before, tuned: {pair[1]}, out: o}}]")
    (job,) = read_manifest(manifest)
    assert (job.base, job.out) == (Path("lab/before"), tmp_path / "o")
    assert tailor_fast("batch", manifest, "-q").code == 0


def test_push(hub: Hub, pair: tuple[Path, Path], tmp_path: Path, tailor_fast: CommandLine) -> None:
    out = tmp_path / "out"
    options = ("--push-to-hub", "patched", "--private")
    ran = tailor_fast("patch", *pair, "-o", out, *options)
    assert ran.code == 0, ran.err
    assert f"sent to {hub.address}/me/patched/commit/1" in ran.out
    assert hub.made[0]["name"] == "patched"
    assert hub.made[0]["organization"] == "me"
    # The key changed between releases of the client.
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}


def test_who_is_not_logged_in_learns_it_before_the_work(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path, tailor_fast: CommandLine
) -> None:
    hub.refuses = "whoami"
    out = tmp_path / "out"
    ran = tailor_fast("patch", *pair, "-o", out, "--push-to-hub", "me/patched")
    assert ran.code == 2
    assert "log in with `hf auth login`" in ran.err
    assert not out.exists()


def test_a_failed_upload_leaves_the_output(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path, tailor_fast: CommandLine
) -> None:
    hub.refuses = "commit"
    out = tmp_path / "out"
    ran = tailor_fast("patch", *pair, "-o", out, "--push-to-hub", "me/patched")
    assert ran.code == 74
    assert "is complete, but was not sent to me/patched: " in ran.err
    assert f"`hf upload me/patched {out}`" in ran.err
    assert tailor_fast("verify", out).code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--push-to-hub", "no//name"), "no//name: Repo id must"),
        (("--private",), "with --push-to-hub only"),
        (
            ("--push-to-hub", "a/b", "--no-checkpoint", "--save-patch", "p.tailor.safetensors"),
            "leaves no model for --push-to-hub",
        ),
    ],
)
def test_refusals(
    pair: tuple[Path, Path],
    tmp_path: Path,
    tailor_fast: CommandLine,
    options: tuple[str, ...],
    told: str,
) -> None:
    ran = tailor_fast("patch", *pair, "-o", tmp_path / "out", *options)
    assert ran.code == 2
    assert told in ran.err
