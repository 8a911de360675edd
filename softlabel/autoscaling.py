"""A cluster that grows on demand: ask its autoscaler for what a run needs at least, and wait until that is there."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ray.autoscaler.sdk import request_resources

from softlabel.errors import RecipeError
from softlabel.terminal import say

T = TypeVar("T")

_LOOK_S = 2.0


def wait_for(find: Callable[[], T], bundles: Sequence[dict[str, float]], minutes: float) -> T:
    """What ``find`` finds, as soon as it finds it. Until then the autoscaler is asked for ``bundles``.

    Args:
        find: Raises RecipeError as long as the cluster is too small.
        bundles: What has to be there, each of them on one node: ``{"CPU": 1, "GPU": 1}``.
        minutes: To wait; 0 is not to wait. A cluster without an autoscaler stays as it is.

    Raises:
        RecipeError: The cluster is still too small after that.
    """
    deadline, said = time.monotonic() + 60 * minutes, False
    try:
        while True:
            try:
                return find()
            except RecipeError as error:
                if time.monotonic() >= deadline:
                    raise
                if not said:
                    say(f"waiting for the autoscaler, {minutes:g} min at most: {str(error).split(': ')[0]}")
                    said = True
            # Again and again: the cluster knows the last request alone, and Ray Data makes some of its own.
            request_resources(bundles=[_without_zeros(bundle) for bundle in bundles])
            time.sleep(_LOOK_S)
    finally:
        if minutes:  # or nodes would stay for nobody; also what a run has left here that was killed while it waited
            request_resources(bundles=[])


def _without_zeros(bundle: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in bundle.items() if amount}
