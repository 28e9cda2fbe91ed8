"""A folder of a model: a local one, or what the Hugging Face Hub has of an id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pairclip._files import read_json
from pairclip.towers.ranges import PART, WHOLE, fetch_part

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS, INDEX = "open_clip_model.safetensors", "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"(hf-hub:)?(\w[\w.-]*/)?\w[\w.-]*")
_WEIGHTS = {
    CONFIG: (WHOLE, INDEX, "model-*-of-*.safetensors"),
    OPEN_CLIP_CONFIG: (OPEN_CLIP_WEIGHTS, "*token*", "vocab*", "merges*", "special*"),
}
_IF_TRUSTED = (
    "If you trust them, load the model in its library, write safetensors with "
    "`save_pretrained(folder)`, and give that folder."
)
_CONVERTED = "adding `safetensors` variant"  # what the conversion bot calls its pull requests
# What requests, or httpx in later versions of huggingface_hub, raises where a connection breaks.
_FAILURES: Any = (OSError, *HfHubHTTPError.__bases__)


def folder_of(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    check: Callable[[Path], tuple[str, ...]],
) -> Path:
    """Folder with a model's files, downloaded where `source` is an id.

    Args:
        source: A folder, or an id of the hub.
        revision: Branch, tag or commit of the id.
        check: Given the file of the configuration, raises where the model can't be loaded, before
            a byte of weights is fetched. It returns what the names of those weights begin with
            that are needed, or nothing if all are.
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
        folder = _described(name, revision)
        order = list(_WEIGHTS if source == name else reversed(_WEIGHTS))
        kind = next((file for file in order if (folder / file).is_file()), None)
        prefixes = () if kind is None else check(folder / kind)
        weights = None if kind is None else _with_weights(name, revision, folder, kind, prefixes)
    except _FAILURES as error:
        raise OSError(f"`source` '{source}' {_reason(error)}") from error
    if kind is None:
        raise FileNotFoundError(
            f"`source` '{source}' has neither {' nor '.join(_WEIGHTS)} on the hub, so it is no "
            "model of transformers, open_clip or timm."
        )
    if weights is None:
        where = "neither on its main branch nor in a pull request of the conversion bot"
        where = where if revision is None else f"at the revision {revision!r}"
        raise FileNotFoundError(
            f"`source` '{source}' has no safetensors on the hub, {where}. Its pickled "
            f"weights can run code and are never loaded. {_IF_TRUSTED}"
        )
    return weights


def has_weights(folder: Path, kind: str = CONFIG) -> bool:
    """Whether all weights are in a folder, in safetensors."""
    if kind == OPEN_CLIP_CONFIG:
        return (folder / OPEN_CLIP_WEIGHTS).is_file()
    if any((folder / file).is_file() for file in (WHOLE, PART)):
        return True
    if not (folder / INDEX).is_file():
        return False
    # `transformers` would unpickle shards that are not safetensors.
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    shards = {str(name) for name in files.values()} if isinstance(files, dict) else set()
    return bool(shards) and all(
        name.endswith(".safetensors") and (folder / name).is_file() for name in shards
    )


def without_weights(folder: Path, file: str = WHOLE) -> FileNotFoundError:
    """The error for a folder that lacks its weights."""
    message = f"Folder '{folder}' has no weights: {file} is missing."
    if (folder / INDEX).is_file():
        message = f"Folder '{folder}' lacks weights that its {INDEX} names."
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        message += f" Its pickled weights can run code and are never loaded. {_IF_TRUSTED}"
    return FileNotFoundError(message)


def _described(name: str, revision: str | None) -> Path:
    """Snapshot with configuration and preprocessing, in one request where they are cached.

    Without a network it is what is cached, or fails at once.
    """
    files = [*_WEIGHTS, *PROCESSORS]
    return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def _with_weights(
    name: str, revision: str | None, folder: Path, kind: str, prefixes: tuple[str, ...]
) -> Path | None:
    if has_weights(folder, kind):
        return folder
    may_convert = kind == CONFIG and revision is None
    converted = _cached_conversion(name) if may_convert else None
    try:
        # Unlike other ways to list files, it doesn't wait for a network that isn't there.
        info = HfApi().model_info(name, revision=folder.name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = {file.rfilename for file in info.siblings or ()}
    except _FAILURES:
        if converted is None:
            raise
        return converted
    if files.isdisjoint(_WEIGHTS[kind]):
        ref = _conversion(name) if may_convert and converted is None else None
        if ref is None:
            return converted
        folder, files = _described(name, ref), {WHOLE}
    if prefixes and WHOLE in files and fetch_part(name, folder, prefixes):
        return folder
    files = {kind, *PROCESSORS, *_WEIGHTS[kind]}
    return Path(snapshot_download(name, revision=folder.name, allow_patterns=[*files]))


def _cached_conversion(name: str) -> Path | None:
    """The snapshot of a pull request that was fetched before: no request is needed for it."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    for ref in sorted((repository / "refs" / "refs" / "pr").glob("*")):
        folder = repository / "snapshots" / ref.read_text().strip()
        if (folder / CONFIG).is_file() and has_weights(folder):
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
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    statuses = [getattr(getattr(each, "response", None), "status_code", 0) for each in chain]
    status = max(statuses)
    if any(isinstance(each, GatedRepoError) for each in chain):
        return (
            "is gated on the Hugging Face Hub: accept its conditions on its page there, then log "
            "in with `hf auth login`."
        )
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return (
            "is no folder here, and the Hugging Face Hub has no such id, or it is private. Check "
            "the spelling, or log in with `hf auth login`."
        )
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return "has no such `revision` on the Hugging Face Hub."
    if status in (401, 403):
        return (
            f"is not open to you on the Hugging Face Hub ({status}). Log in with `hf auth login`, "
            "by a token that may read it."
        )
    if status == 429:
        return "was refused by the Hugging Face Hub: too many requests (429). Try again later."
    if status >= 500:
        return f"could not be loaded: the Hugging Face Hub answers {status}. Try again later."
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"is no folder here and could not be loaded from the Hugging Face Hub ({text}). Check the "
        "id and the network, or give a local folder."
    )
