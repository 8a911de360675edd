"""Errors that a user can do something about. The CLI prints them as one line and exits with 2; all else is a bug."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Codes of an OSError: no space left, or none left for this user."""
NO_LABELS = "nothing to train on"
"""How a TrainingError begins where a training set has no box, so that a search can tell it from other failures."""


class SoftlabelError(Exception):
    """A user's mistake: the message says what is wrong, where, and what to do, in one line."""


class RecipeError(SoftlabelError):
    """The recipe, or a ``--set`` on top of it, does not say something that can be run."""


class TruthError(SoftlabelError):
    """A truth file cannot be read at all (single bad boxes are rejected by row instead)."""


class SceneError(SoftlabelError):
    """A scene cannot be read. ``retryable`` says whether trying again later may help."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class NoValidPixelError(SceneError):
    """A tile, or a whole scene, is nodata, transparent or NaN throughout: nothing to see there, and nothing wrong."""


class StoreError(SoftlabelError):
    """A store is missing, was made by something else, or its counts do not add up."""


class StorageError(StoreError):
    """A bucket cannot be reached, or refuses a request."""


class WeightsError(SoftlabelError):
    """Weights cannot be loaded safely, or do not fit the model."""


class SessionError(SoftlabelError):
    """Ray does not start, or a folder cannot be written to."""


class TrainingError(SoftlabelError):
    """A training set or a training run cannot go on."""
