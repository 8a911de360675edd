"""Where the files of a transformers model are: a folder on this machine, or the hub's local cache.

Imports neither torch nor transformers, since drivers ask here.
"""

from collections.abc import Container
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from softlabel.detectors.families import FAMILIES
from softlabel.errors import WeightsError
from softlabel.store import digest, file_digest, read_json

_FILES = ("*.json", "*.txt", "*.safetensors")  # configuration, tokenizer, weights


def model_files(folder: Path) -> list[Path]:
    """All files that decide what a model answers."""
    return sorted(path for pattern in _FILES for path in folder.glob(pattern))


def content_digest(folder: Path) -> str:
    """10 hex digits: a digest of all that decides what a model answers."""
    return digest({path.name: file_digest(path) for path in model_files(folder)})


def is_file(weights: str) -> bool:
    """Whether weights are a file, judged by name, rather than a folder or a name on the hub."""
    return weights.endswith((".pt", ".safetensors", ".onnx"))


def model_type(folder: Path) -> str:
    """The family of a transformers model."""
    return read_json(folder / "config.json")["model_type"]


def class_names(folder: Path) -> tuple[str, ...]:
    """The classes of a model that has its own, in the order of its scores."""
    names = read_json(folder / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda pair: int(pair[0])))


def local_folder(model: str) -> Path:
    """The folder of a detector: one on this machine, or that of the hub's ``name`` or ``name@revision`` in the local
    cache, downloaded if it is not there.

    Raises:
        WeightsError: There is no such folder and no such name, the hub cannot be reached, or the model is of no known
            family or has no .safetensors.
    """
    known = ", ".join(name for name, family in FAMILIES.items() if "transformers" in family.libraries)
    return _checked(model, f"give one of {known}", FAMILIES)


def any_folder(model: str) -> Path:
    """As ``local_folder``, for a transformers model of any family.

    Raises:
        WeightsError: As ``local_folder``, except for the family.
    """
    return _checked(model, "give a folder as its save_pretrained makes it")


def _checked(model: str, remedy: str, known: Container[str] | None = None) -> Path:
    if Path(model).is_dir():
        folder = Path(model).resolve()
    else:
        name, _, revision = model.partition("@")
        folder = _from_hub(name, revision or None)
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if not kind or (known is not None and kind not in known):
        raise WeightsError(f"{model} is {kind or 'no model that transformers knows'}: {remedy}")
    if not list(folder.glob("*.safetensors")):
        raise WeightsError(f"{model} has no .safetensors, and no other weights are read: convert them, or give another")
    return folder


def lasting_name(model: str, folder: Path) -> Path | str:
    """What names the same model on another machine: the folder, or the hub's ``name@revision``.

    Args:
        model: As the user gave it.
        folder: As ``local_folder`` gives it.
    """
    return folder if Path(model).is_dir() else f"{model.partition('@')[0]}@{folder.name}"


def _from_hub(name: str, revision: str | None) -> Path:
    missing = f"no model at {name}: give an existing folder or file, or the name of a model on the hub"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HFValidationError, RepositoryNotFoundError):
        raise WeightsError(missing) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{name} is no folder here, and the hub gave no such model ({type(error).__name__}: {reason}): "
            "download it where there is a network, and give its folder"
        ) from None
