"""A folder of a model: a local one, or what the Hugging Face Hub has of an id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HUB_ID = re.compile(r"(hf-hub:)?(\w[\w.-]*/)?\w[\w.-]*")
_CONFIGS = ("config.json", "open_clip_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_OF_OPEN_CLIP = ("open_clip_model.safetensors", "*token*", "vocab*", "merges*", "special*")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_CONVERTED = "adding `safetensors` variant"  # what the conversion bot calls its pull requests


def folder_of(
    source: str | os.PathLike[str], *, revision: str | None, check: Callable[[Path], None]
) -> Path:
    """Folder with a model's files, downloaded where `source` is an id.

    Args:
        source: A folder, or an id of the hub.
        revision: Branch, tag or commit of the id.
        check: Given a folder with the configuration alone; raises before a byte of weights is
            fetched where the model is none that can be loaded.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` {revision!r} would be ignored: '{source}' is a folder.")
        return path
    if path.is_file():
        raise NotADirectoryError(f"`source` must be a folder, got the file '{source}'.")
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise FileNotFoundError(
            f"`source` '{source}' is neither a folder nor a Hugging Face id ('owner/name')."
        )
    name = source.removeprefix("hf-hub:")
    try:
        config = _config(name, revision, prefer_open_clip=source != name)
        check(config)
        return _with_weights(name, revision, config)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, _OF_HUB):
            raise
        raise OSError(f"`source` '{source}' {_reason(error)}") from error


_OF_HUB = (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError)


def _config(name: str, revision: str | None, *, prefer_open_clip: bool) -> Path:
    """The configuration alone, in a folder."""
    # In one request; without a network it fails at once and finds what is cached.
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_CONFIGS]))
    for file in _CONFIGS[::-1] if prefer_open_clip else _CONFIGS:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(
        f"'{name}' has neither {' nor '.join(_CONFIGS)} on the hub, so it is no model of "
        "transformers, open_clip or timm."
    )


def _with_weights(name: str, revision: str | None, config: Path) -> Path:
    own = (
        (config.name, *_OF_OPEN_CLIP) if config.name == _CONFIGS[1] else ("config.json", *_WEIGHTS)
    )
    wanted = [*own, *_PROCESSORS]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    if _has_weights(folder) or revision is not None:
        return folder
    converted = _cached_conversion(name) or _conversion(name)
    if converted is None:
        raise FileNotFoundError(
            f"'{name}' has no safetensors on the hub, neither on its main branch nor in a pull "
            "request of the conversion bot. Its pickled weights can run code and are never loaded. "
            "If you trust them, load the model in its library, write safetensors with "
            "`save_pretrained(folder)`, and give that folder."
        )
    if isinstance(converted, Path):
        weights = converted
    else:
        weights = Path(snapshot_download(name, revision=converted, allow_patterns=wanted))
    if not all((weights / file).exists() for file in (config.name,)):
        raise FileNotFoundError(f"'{name}' has no {config.name} beside its safetensors.")
    return weights


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _cached_conversion(name: str) -> Path | None:
    """The snapshot of a pull request that was fetched before: no request is needed for it."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    for ref in sorted((repository / "refs" / "refs" / "pr").glob("*")):
        folder = repository / "snapshots" / ref.read_text().strip()
        if folder.is_dir() and _has_weights(folder):
            return folder
    return None


def _conversion(name: str) -> str | None:
    """The ref of the pull request in which the conversion bot put safetensors."""
    for discussion in HfApi().get_repo_discussions(name, discussion_type="pull_request"):
        if _CONVERTED in discussion.title.lower() and discussion.git_reference:
            return str(discussion.git_reference)
    return None


def _reason(error: Any) -> str:
    """What went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return (
            "is gated on the Hugging Face Hub: accept its conditions on its page there, then log "
            "in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "is no folder here, and the Hugging Face Hub has no such id, or it is private. Check "
            "the spelling, or log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return "has no such `revision` on the Hugging Face Hub."
    if status == 429:
        return "was refused by the Hugging Face Hub: too many requests (429). Try again later."
    if status is not None and status >= 500:
        return f"could not be loaded: the Hugging Face Hub answers {status}. Try again later."
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"is no folder here and could not be loaded from the Hugging Face Hub ({text}). Check the "
        "id and the network, or give a local folder."
    )
