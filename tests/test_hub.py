"""Ids of the hub, as it really answers: a server on the loopback stands for it."""

import json
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pairclip import load_tower
from pairclip.towers import random_tower

MAIN, PULL = "a" * 40, "b" * 40
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Hub:
    """Repositories as folders by id and commit, and what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refs: dict[str, dict[str, str]] = {}
        self.status: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                status, content, headers = hub.respond(path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(
        self, name: str, source: Path, *, files: tuple[str, ...], commit: str, ref: str
    ) -> None:
        """Put some files of a folder into a repository, as a commit that a branch points to."""
        folder = self.root / name / commit
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(source / file, folder / file)
        self.refs.setdefault(name, {})[ref] = commit

    def respond(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for name, (status, code) in self.status.items():
            if name in path:
                return status, b"{}", {"X-Error-Code": code}
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            if name not in self.refs:
                return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
            if rest[:1] == ["discussions"]:
                return 200, json.dumps(self.discussions(name)).encode(), {}
            revision = "/".join(rest[1:]) or "main"
            commit = self.refs[name].get(revision, revision)
            if not (self.root / name / commit).is_dir():
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": commit}
                    for file in (self.root / name / commit).iterdir()
                ]
                return 200, json.dumps(tree).encode(), {}
            files = [{"rfilename": file.name} for file in (self.root / name / commit).iterdir()]
            info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": files}
            return 200, json.dumps(info | {"private": False, "tags": []}).encode(), {}
        name, commit = "/".join(parts[:2]), "/".join(parts[3:-1])
        file = self.root / name / self.refs.get(name, {}).get(commit, commit) / parts[-1]
        if not file.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        headers = {"ETag": f'"{commit[:8]}-{file.name}"', "X-Repo-Commit": file.parent.name}
        return 200, file.read_bytes(), headers

    def discussions(self, name: str) -> dict[str, object]:
        pulls = [ref for ref in self.refs[name] if ref.startswith("refs/pr/")]
        return {
            "count": len(pulls),
            "start": 0,
            "discussions": [
                {
                    "num": int(ref.rpartition("/")[2]),
                    "author": {"name": "SFconvertbot"},
                    "title": "Adding `safetensors` variant of this model",
                    "status": "open",
                    "createdAt": "2023-01-01T00:00:00.000Z",
                    "isPullRequest": True,
                    "repo": {"name": name, "type": "model"},
                }
                for ref in pulls
            ],
        }


FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_tower().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_an_id_is_fetched_once_and_then_needs_no_network(hub: Hub, saved: Path) -> None:
    hub.add("some/tower", saved, files=FILES, commit=MAIN, ref="main")
    expected = load_tower(saved)(IMAGES)
    assert torch.equal(load_tower("some/tower")(IMAGES), expected)
    assert not any("sentence" in path or ".bin" in path for path in hub.asked)
    hub.asked.clear()
    assert torch.equal(load_tower("some/tower")(IMAGES), expected)
    assert len(hub.asked) <= 2
    hub.server.shutdown()
    hub.server.server_close()
    assert torch.equal(load_tower("some/tower")(IMAGES), expected)


def test_safetensors_of_a_pull_request_are_found_and_kept(hub: Hub, saved: Path) -> None:
    hub.add("old/tower", saved, files=FILES[:2], commit=MAIN, ref="main")
    hub.add("old/tower", saved, files=FILES, commit=PULL, ref="refs/pr/7")
    expected = load_tower(saved)(IMAGES)
    assert torch.equal(load_tower("old/tower")(IMAGES), expected)
    hub.asked.clear()
    assert torch.equal(load_tower("old/tower")(IMAGES), expected)
    assert len(hub.asked) <= 2
    hub.server.shutdown()
    hub.server.server_close()
    assert torch.equal(load_tower("old/tower")(IMAGES), expected)


def test_a_revision_is_taken_as_it_is(hub: Hub, saved: Path) -> None:
    hub.add("old/tower", saved, files=FILES[:2], commit=MAIN, ref="main")
    hub.add("old/tower", saved, files=FILES, commit=PULL, ref="v2")
    for revision in ("v2", PULL):
        assert torch.equal(
            load_tower("old/tower", revision=revision)(IMAGES), load_tower(saved)(IMAGES)
        )
    with pytest.raises(OSError, match="has no such `revision` on the Hugging Face Hub"):
        load_tower("old/tower", revision="v3")


def test_no_weights_are_fetched_of_what_is_no_image_tower(
    hub: Hub, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    shutil.copy(saved / "model.safetensors", tmp_path / "texts")
    (tmp_path / "texts" / "config.json").write_text('{"model_type": "bert"}')
    hub.add(
        "some/texts",
        tmp_path / "texts",
        files=("config.json", "model.safetensors"),
        commit=MAIN,
        ref="main",
    )
    with pytest.raises(ValueError, match="is of model type 'bert'"):
        load_tower("some/texts")
    assert not any("safetensors" in path for path in hub.asked)


def test_words_for_what_the_hub_refuses(hub: Hub, saved: Path) -> None:
    hub.add("old/tower", saved, files=FILES[:2], commit=MAIN, ref="main")
    with pytest.raises(OSError, match="no safetensors on the hub, neither on its main branch nor"):
        load_tower("old/tower")
    with pytest.raises(OSError, match="the Hugging Face Hub has no such id, or it is private"):
        load_tower("nobody/nothing")
    hub.status["gated/tower"] = (403, "GatedRepo")
    with pytest.raises(OSError, match=r"is gated .* `hf auth login`"):
        load_tower("gated/tower")
