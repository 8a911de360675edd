"""Clusters that grow on demand: ask the autoscaler for the least that a run needs, and wait until it is there."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ray.autoscaler.sdk import request_resources

from softlabel.errors import RecipeError
from softlabel.terminal import say

T = TypeVar("T")

_LOOK_S = 2.0


def wait_for(find: Callable[[], T], bundles: Sequence[dict[str, float]], minutes: float) -> T:
    """Return what ``find`` returns, as soon as it succeeds; until then, ask the autoscaler for ``bundles``.

    Args:
        find: Raises RecipeError as long as the cluster is too small.
        bundles: The resources needed, each bundle on one node: ``{"CPU": 1, "GPU": 1}``.
        minutes: How long to wait; 0: do not wait. A cluster without an autoscaler stays as it is.

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
            # Repeated, because the cluster keeps only the last request, and Ray Data makes some of its own.
            request_resources(bundles=[_without_zeros(bundle) for bundle in bundles])
            time.sleep(_LOOK_S)
    finally:
        if minutes:  # else nodes would stay for nobody; also clears the request of a run killed while it waited
            request_resources(bundles=[])


def _without_zeros(bundle: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in bundle.items() if amount}
