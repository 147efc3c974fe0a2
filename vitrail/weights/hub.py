"""Models on the Hugging Face hub: downloaded once, pinned to a commit, and used from the cache without a network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from vitrail.lookup import first_line
from vitrail.weights.file_kinds import WEIGHTS, weights_file

_SETTINGS = ("config.json", "preprocessor_config.json")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


class Snapshot(NamedTuple):
    """A model's files on this machine.

    Attributes:
        commit: the revision as a commit's hash: with it the same files can be fetched again.
        notes: what the user should know, one line each.
    """

    folder: Path
    name: str
    commit: str
    notes: tuple[str, ...] = ()


def reads_as_path(text: str) -> bool:
    """Whether a text is meant as a path on this machine and not as the name of a model on the hub."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def snapshot(reference: str, hub: str = "hf:") -> Snapshot:
    """Return the files of a model, `NAME` or `NAME@revision`, from the cache or downloaded now.

    A commit that is in the cache needs no network; for a branch or tag the hub is asked, and where that fails the copy in
    the cache is used, with a note.

    Args:
        hub: what the user typed before the reference, for messages.

    Raises:
        ValueError: there is no such model or revision, it is not open to this user, or there is neither network nor copy.
    """
    name, _, revision = reference.partition("@")
    if not _NAME.fullmatch(name) or reference.endswith("@"):
        raise ValueError(f"{hub}{reference}: expected OWNER/NAME, OWNER/NAME@revision, or a folder")
    if re.fullmatch(r"[0-9a-f]{40}", revision) and (folder := cached(name, revision)):
        return Snapshot(folder, name, revision)
    return _fetch(name, revision or None, hub)


def cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the cache, or None unless a whole model is in it."""
    from huggingface_hub import snapshot_download

    for weights in WEIGHTS:
        wanted = [*_SETTINGS, *_patterns(weights)]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        except Exception:  # not there; huggingface_hub's classes for that have changed between versions
            continue
        if (folder / "config.json").is_file() and (folder / weights).is_file():
            return folder
    return None


def _fetch(name: str, revision: str | None, hub: str) -> Snapshot:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    shown = f"{hub}{name}" + (f"@{revision}" if revision else "")
    try:
        info = HfApi().model_info(name, revision=revision, timeout=20)
        files = {file.rfilename for file in info.siblings or ()}
        wanted = [*_SETTINGS, *_patterns(weights_file(files))]
        folder = snapshot_download(name, revision=info.sha, allow_patterns=wanted)
        return Snapshot(Path(folder), name, str(info.sha))
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    except GatedRepoError:
        raise ValueError(
            f"{shown}: is gated; accept its terms at https://huggingface.co/{name}, then sign in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{shown}: has no such revision; expected a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{shown}: no such model on the hub, or it is private (then sign in with `hf auth login`)"
        ) from None
    except Exception as error:
        if not _is_offline(error):
            raise
        return _without_network(name, revision, shown, error)


def _patterns(weights: str) -> list[str]:
    """Return the names of a model's weights files as patterns: an index and its shards, or one file."""
    start, ending = weights.removesuffix(".index.json").rsplit(".", 1)
    return [weights, f"{start}-*-of-*.{ending}"] if weights.endswith(".index.json") else [weights]


def _without_network(name: str, revision: str | None, shown: str, error: Exception) -> Snapshot:
    """Return the copy in the cache, or raise an error that says what the cache has."""
    if folder := cached(name, revision):
        return Snapshot(folder, name, folder.name, (f"no network: the cached copy of commit {folder.name} is used",))
    from huggingface_hub.constants import HF_HUB_CACHE

    models = Path(HF_HUB_CACHE).glob("models--*")
    others = sorted(path.name.removeprefix("models--").replace("--", "/") for path in models)
    why = (
        "HF_HUB_OFFLINE is set"
        if os.environ.get("HF_HUB_OFFLINE")
        else f"the hub is not reached ({first_line(error)[:120]})"
    )
    raise ValueError(
        f"{shown}: {why}, and the cache at {HF_HUB_CACHE} has no such model; it has "
        f"{', '.join(others[:10]) or 'none'}. Load it once with a network, or name a folder: {shown.partition(':')[0]}:FOLDER"
    ) from None


def _is_offline(error: Exception) -> bool:
    """Whether an error means that the hub could not be reached; by name, as huggingface_hub has changed its client."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError", "Timeout"}
    )
