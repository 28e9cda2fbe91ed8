"""Ids of the hub, as it really answers: a server on the loopback stands for it."""

import json
import re
import shutil
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http, disable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from pairclip import load_tower
from pairclip.towers import random_tower

# Before version 1 of the library, a session knows whether it is offline when it begins.
reset_sessions = getattr(_http, "reset_sessions", lambda: None)
MAIN, PULL = "a" * 40, "b" * 40
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Hub:
    """Repositories as folders by id and commit, and what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refs: dict[str, dict[str, str]] = {}
        self.status: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        self.gives_ranges = True
        self.breaks = 0  # how many of the next answers with weights end in the middle
        self.pause = 0.0  # seconds between the pieces of an answer with weights
        self.bytes_of_weights = 0
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
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                if status == 200 and asked is not None and hub.gives_ranges:
                    first, total = int(asked[1]), len(content)
                    content = content[first : int(asked[2] or total) + 1]
                    status = 206
                    end = first + len(content) - 1
                    headers = {**headers, "Content-Range": f"bytes {first}-{end}/{total}"}
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not body:
                    return
                if not path.endswith(".safetensors"):
                    self.wfile.write(content)
                    return
                half = len(content) // 2
                hub.bytes_of_weights += len(content)
                self.wfile.write(content[:half])
                if hub.breaks:
                    hub.breaks -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if hub.pause:
                    threading.Event().wait(hub.pause)
                self.wfile.write(content[half:])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        serve = {"target": self.server.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(daemon=True, **serve).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

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
SHARDS = ("model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in the forms that repositories have, with a preprocessor of the old one."""
    folder = tmp_path_factory.mktemp("saved")
    tower = random_tower()
    texts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    texts |= {"num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 8}
    config = CLIPConfig(
        text_config=texts, vision_config=tower.model.config.to_dict(), projection_dim=12
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}
    old |= {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    old |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    weights = load_file(folder / "model.safetensors")
    parts = [sorted(weights)[::2], sorted(weights)[1::2]]
    for name, part in zip(SHARDS[1:], parts, strict=True):
        save_file({n: weights[n] for n in part}, folder / name, metadata={"format": "pt"})
    index = {n: name for name, part in zip(SHARDS[1:], parts, strict=True) for n in part}
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / SHARDS[0]).write_text(json.dumps(content))
    for other in ("model.fp16.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"):
        (folder / other).write_bytes(b"never read")
    (folder / "open_clip_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> torch.Tensor:
    return load_tower(saved)(IMAGES)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in ("constants", "file_download"):  # the second before version 1
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    disable_progress_bars()
    yield server
    server.stop()


REPOSITORIES: dict[str, Callable[[Hub, Path], None]] = {
    "safetensors on main": lambda hub, saved: hub.add(
        "some/model", saved, files=FILES, commit=MAIN, ref="main"
    ),
    "pull request only": lambda hub, saved: (
        hub.add("some/model", saved, files=(*FILES[:2], OLD), commit=MAIN, ref="main"),
        hub.add("some/model", saved, files=(*FILES, OLD), commit=PULL, ref="refs/pr/7"),
    )[0],
    "sharded": lambda hub, saved: hub.add(
        "some/model", saved, files=(*FILES[:2], *SHARDS), commit=MAIN, ref="main"
    ),
    "others beside": lambda hub, saved: hub.add(
        "some/model", saved, files=(*FILES, *OTHERS), commit=MAIN, ref="main"
    ),
}
OLD = "pytorch_model.bin"
OTHERS = ("model.fp16.safetensors", "open_clip_model.safetensors", "open_clip_config.json", OLD)


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_an_id_is_loaded_cold_warm_offline_and_with_a_dead_network(
    kind: str, hub: Hub, saved: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    REPOSITORIES[kind](hub, saved)
    assert torch.equal(load_tower("some/model")(IMAGES), expected)
    assert not any(other in path for path in hub.asked for other in (*OTHERS[:2], OLD))
    hub.asked.clear()
    assert torch.equal(load_tower("some/model")(IMAGES), expected)
    assert len(hub.asked) <= (2 if kind == "pull request only" else 1)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()
        hub.asked.clear()
        assert torch.equal(load_tower("some/model")(IMAGES), expected)
        assert not hub.asked
    reset_sessions()
    hub.stop()
    assert torch.equal(load_tower("some/model")(IMAGES), expected)


@pytest.mark.parametrize("kind", ["safetensors on main", "pull request only"])
def test_only_the_image_tower_is_fetched(
    kind: str, hub: Hub, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    REPOSITORIES[kind](hub, saved)
    weights = load_file(saved / "model.safetensors")
    images = {name for name in weights if name.startswith("vis")}
    load_tower("some/model")
    (part,) = Path(constants.HF_HUB_CACHE).rglob("*.safetensors")
    assert part.name == "model.image_tower.safetensors"
    content = load_file(part)
    assert content.keys() == images
    assert all(torch.equal(content[name], weights[name]) for name in images)
    whole = (saved / "model.safetensors").stat().st_size
    assert re.fullmatch(
        rf"'some/model': fetched its image tower, [\d.]+ MB of {whole / 1e6:.1f}\.\n",
        capsys.readouterr().err,
    )


def test_an_image_tower_that_lies_in_several_parts_of_a_file_is_fetched_by_ranges(
    hub: Hub, saved: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "mixed")
    weights = load_file(saved / "model.safetensors")
    # Wider elements come first in a file: so texts lie between the parts of the image tower.
    wide = {n: v.double() if "layer_norm1" in n else v for n, v in weights.items()}
    save_file(wide, tmp_path / "mixed" / FILES[2], metadata={"format": "pt"})
    hub.add("some/model", tmp_path / "mixed", files=FILES, commit=MAIN, ref="main")
    assert torch.equal(load_tower("some/model")(IMAGES), expected)
    assert hub.asked.count(f"GET /some/model/resolve/{MAIN}/model.safetensors") >= 4
    assert hub.bytes_of_weights < (tmp_path / "mixed" / FILES[2]).stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((1 << 60).to_bytes(8, "little"), "it has no header of a safetensors file"),
        ((100_000_001).to_bytes(8, "little"), "it has no header of a safetensors file"),
        ((5).to_bytes(8, "little") + b"[1,2]", "its header is not one of a safetensors file"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "the tensor 'a' has no place"),
    ],
)
def test_a_header_that_the_hub_makes_up_is_refused_before_it_is_fetched(
    content: bytes, message: str, hub: Hub, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "odd")
    (tmp_path / "odd" / FILES[2]).write_bytes(content)
    hub.add("some/model", tmp_path / "odd", files=FILES, commit=MAIN, ref="main")
    with pytest.raises(
        ValueError, match=f"model.safetensors of 'some/model' on the hub is damaged: {message}"
    ):
        load_tower("some/model")
    assert hub.bytes_of_weights <= len(content)


def test_the_whole_file_is_fetched_where_there_are_no_ranges(
    hub: Hub, saved: Path, expected: torch.Tensor
) -> None:
    hub.gives_ranges = False
    REPOSITORIES["safetensors on main"](hub, saved)
    assert torch.equal(load_tower("some/model")(IMAGES), expected)
    (file,) = Path(constants.HF_HUB_CACHE, "models--some--model", "snapshots").rglob(
        "*.safetensors"
    )
    assert file.name == "model.safetensors"


@pytest.mark.parametrize("breaks", [1, 100])
def test_a_download_that_breaks_goes_on_or_leaves_nothing(
    breaks: int, hub: Hub, saved: Path, expected: torch.Tensor
) -> None:
    REPOSITORIES["safetensors on main"](hub, saved)
    hub.breaks = breaks
    if breaks > 1 or huggingface_hub.__version__ < "1":  # which gives up at once
        with pytest.raises(OSError, match=r"some/model' .* Check the id and the network"):
            load_tower("some/model")
        assert not [*Path(constants.HF_HUB_CACHE).rglob("*image_tower*.safetensors*")]
        hub.breaks = 0
    assert torch.equal(load_tower("some/model")(IMAGES), expected)


def test_a_slow_hub_is_waited_for(hub: Hub, saved: Path, expected: torch.Tensor) -> None:
    hub.pause = 0.1
    REPOSITORIES["safetensors on main"](hub, saved)
    assert torch.equal(load_tower("some/model")(IMAGES), expected)


def test_a_file_of_open_clip_is_fetched_whole_with_its_texts(hub: Hub, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    texts = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": texts}
    model = open_clip.CLIP(**model_cfg).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    files = ("open_clip_config.json", "open_clip_model.safetensors")
    hub.add("some/clip", folder, files=files, commit=MAIN, ref="main")
    for source in ("some/clip", "hf-hub:some/clip"):
        tower = load_tower(source)
        with torch.no_grad():
            torch.testing.assert_close(tower(IMAGES), model.encode_image(IMAGES))
    tower.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / files[1]).keys() == weights.keys()


def test_a_revision_is_taken_as_it_is(hub: Hub, saved: Path, expected: torch.Tensor) -> None:
    hub.add("old/tower", saved, files=FILES[:2], commit=MAIN, ref="main")
    hub.add("old/tower", saved, files=FILES, commit=PULL, ref="v2")
    for revision in ("v2", PULL):
        assert torch.equal(load_tower("old/tower", revision=revision)(IMAGES), expected)
    with pytest.raises(OSError, match="has no such `revision` on the Hugging Face Hub"):
        load_tower("old/tower", revision="v3")
    with pytest.raises(OSError, match=f"no safetensors on the hub, at the revision '{MAIN}'"):
        load_tower("old/tower", revision=MAIN)


@pytest.mark.parametrize(
    ("config", "image_size", "message"),
    [
        ({"model_type": "bert"}, None, "is of model type 'bert'"),
        ({"model_type": "siglip2"}, None, "NaFlex"),
        (None, 20, r"`image_size` must be a multiple of the patch size 8, got 20\. Use 24"),
    ],
)
def test_no_weights_are_fetched_of_what_can_not_be_loaded(
    config: dict | None, image_size: int | None, message: str, hub: Hub, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    hub.add("some/texts", tmp_path / "model", files=FILES, commit=MAIN, ref="main")
    with pytest.raises(ValueError, match=message):
        load_tower("some/texts", image_size=image_size)
    assert not any("model.safetensors" in path for path in hub.asked)


def test_words_for_what_the_hub_does_not_have(hub: Hub, saved: Path) -> None:
    hub.add("old/tower", saved, files=FILES[:2], commit=MAIN, ref="main")
    with pytest.raises(OSError, match="no safetensors on the hub, neither on its main branch nor"):
        load_tower("old/tower")
    hub.add("some/notes", saved, files=FILES[1:2], commit=MAIN, ref="main")
    with pytest.raises(OSError, match=r"has neither config\.json nor open_clip_config\.json"):
        load_tower("some/notes")
    with pytest.raises(OSError, match="the Hugging Face Hub has no such id, or it is private"):
        load_tower("nobody/nothing")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"is gated .* `hf auth login`"),
        (401, "", r"is not open to you .*\(401\)\. Log in with `hf auth login`"),
        (403, "", r"is not open to you .*\(403\)\. Log in with `hf auth login`"),
        (429, "", r"too many requests \(429\)\. Try again later"),
        (503, "", r"answers 503\. Try again later"),
    ],
)
def test_words_for_what_the_hub_refuses(status: int, code: str, message: str, hub: Hub) -> None:
    hub.status["some/model"] = (status, code)
    with pytest.raises(OSError, match=message):
        load_tower("some/model")
