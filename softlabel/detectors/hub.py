"""Where the files of a model of transformers are: a folder of this machine, or the local cache of a hub.

Imports neither torch nor transformers, since drivers ask here.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from softlabel.detectors.families import FAMILIES
from softlabel.errors import WeightsError
from softlabel.store import read_json

_FILES = ("*.json", "*.txt", "*.safetensors")  # configuration, tokenizer, weights


def model_files(folder: Path) -> list[Path]:
    """All that decides what a model answers."""
    return sorted(path for pattern in _FILES for path in folder.glob(pattern))


def is_file(weights: str) -> bool:
    """Whether weights are a file, by their name, and not a folder or a name on the hub."""
    return Path(weights).suffix in (".pt", ".safetensors", ".onnx")


def model_type(folder: Path) -> str:
    """The family of a model of transformers."""
    return read_json(folder / "config.json")["model_type"]


def class_names(folder: Path) -> tuple[str, ...]:
    """Of a model with classes of its own, in the order of its scores."""
    names = read_json(folder / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda pair: int(pair[0])))


def local_folder(model: str) -> Path:
    """The folder of a model: one of this machine, or a hub's ``name`` or ``name@revision`` in the local cache, where it
    is put if it is not there.

    Raises:
        WeightsError: There is no such folder and no such name, the hub cannot be reached, or it is of no known family.
    """
    if Path(model).is_dir():
        folder = Path(model).resolve()
    else:
        name, _, revision = model.partition("@")
        folder = _from_hub(name, revision or None)
    _check(folder, model)
    return folder


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


def _check(folder: Path, model: str) -> None:
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind not in FAMILIES:
        known = ", ".join(name for name, family in FAMILIES.items() if "transformers" in family.libraries)
        raise WeightsError(f"{model} is {kind or 'no model that transformers knows'}: give one of {known}")
    if not list(folder.glob("*.safetensors")):
        raise WeightsError(f"{model} has no .safetensors, and no other weights are read: convert them, or give another")
