"""Where MODEL lies: a local folder, the hub, or the package itself.

In: what a user typed. Out: what transformers is to be asked for, and the folder of its small files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankwise.checkpoints.stores import printable
from rankwise.errors import AccessError, RankwiseError, SourceNotFoundError, UnknownFormatError, UsageError
from rankwise.tuning.data_sources import hub_id, local_path

TINY: Final = "rankwise:tiny"


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where a model lies.

    Attributes:
        name: as it was given.
        source: what transformers is asked for, a folder or a hub id.
        revision: the commit on the hub, so that config and weights are of the same one; None for a folder.
        folder: where its small files lie.
    """

    name: str
    source: str
    revision: str | None
    folder: Path


def place_of(name: str) -> ModelPlace:
    """Return where a model or a tokenizer lies; of one on the hub the small files are fetched.

    Raises:
        SourceNotFoundError: there is nothing of that name.
        AccessError: it may not or cannot be looked at.
        UsageError: it is a file, a URL, or a name that ships no model.
        UnknownFormatError: the repository is no model of transformers.
    """
    if not name.strip():
        raise SourceNotFoundError("the name of the model is empty; wanted a folder or a hub id (org/name)")
    if name == TINY:
        from rankwise.tuning.tiny import folder

        path = Path(folder())
        return ModelPlace(name, str(path), None, path)
    if name.startswith("rankwise:"):
        raise UsageError(f"{printable(name)!r} is no model that ships with rankwise; there is {TINY}")
    scheme, _, rest = name.partition("://")
    if rest and scheme != "hf":
        raise UsageError(
            f"{printable(name.partition('?')[0])!r} is a URL, and models are loaded from a local folder or the hub. "
            "Copy it here first and give the folder."
        )
    there = None if rest else local_path(name)
    if there is not None:
        if not there.is_dir():
            raise UsageError(f"{printable(name)!r} is a file; a MODEL is the folder with config.json in it")
        return ModelPlace(name, str(there), None, there)
    found = hub_id(rest.strip("/") or name)
    if found is None:
        raise SourceNotFoundError(
            f"{printable(name)!r} is not there: no folder of that name. Models on the hub are spelled org/name."
        )
    folder_ = _hub_folder(name, found.repo, found.revision)
    return ModelPlace(name, found.repo, folder_.name, folder_)


def _hub_folder(name: str, repo: str, revision: str | None) -> Path:
    """Fetch the small files that tell what a repository is; return their folder, which is named after the commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder, missing = None, None
    for file in ("config.json", "adapter_config.json"):
        try:
            folder = Path(hf_hub_download(repo, file, revision=revision)).parent
        except LocalEntryNotFoundError as error:  # offline: it may lack one of the two
            missing = error
        except EntryNotFoundError:
            missing = None
        except Exception as error:
            raise _hub_error(error, name, repo) from error
    if folder is not None:
        return folder
    if missing is not None:
        raise _hub_error(missing, name, repo) from missing
    raise UnknownFormatError(
        f"{printable(name)} is on the hub, but has no config.json; it is no model of transformers."
    )


def _hub_error(error: Exception, name: str, repo: str) -> RankwiseError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    label = f"{printable(name)!r} is no local folder, and"
    words = printable(" ".join(str(error).split()))[:300]
    if constants.HF_HUB_OFFLINE:
        return SourceNotFoundError(
            f"{label} as a model on the hub it is not in the local cache, while HF_HUB_OFFLINE is set. Download it "
            f"where there is a network: hf download {repo}"
        )
    if isinstance(error, GatedRepoError):
        return AccessError(f"{label} on the hub it is gated: ask for access on its page, then run: hf auth login")
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return SourceNotFoundError(f"{label} the hub has no such model or revision (or it is private: hf auth login).")
    return AccessError(f"{label} as a model on the hub it cannot be read ({type(error).__name__}): {words}")
