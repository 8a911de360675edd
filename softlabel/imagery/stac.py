"""Scenes of a STAC catalogue: what an API finds, or the items of a file (https://stacspec.org)."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from shapely.errors import ShapelyError
from shapely.geometry import box, shape

from softlabel.config import Stac
from softlabel.errors import RecipeError, SceneError
from softlabel.imagery.listing import absolute, has_scheme
from softlabel.storage import location

_TIMEOUT_S = 60
_BUSY = (408, 429, 500, 502, 503, 504)
_SECRETS = {
    *("sig", "signature", "x-amz-signature", "x-goog-signature", "x-amz-security-token"),
    *("token", "access_token", "api_key", "apikey", "key"),
}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, wanted: value == wanted,
    "neq": lambda value, wanted: value != wanted,
    "lt": lambda value, wanted: value < wanted,
    "lte": lambda value, wanted: value <= wanted,
    "gt": lambda value, wanted: value > wanted,
    "gte": lambda value, wanted: value >= wanted,
    "startsWith": lambda value, wanted: str(value).startswith(wanted),
    "endsWith": lambda value, wanted: str(value).endswith(wanted),
    "contains": lambda value, wanted: wanted in value,
    "in": lambda value, wanted: value in wanted,
}
"""The operators of STAC's query extension, to filter a file's items as an API would."""


def list_items(settings: Stac) -> list[tuple[str, str]]:
    """The items that pass the filters, each a scene.

    Returns:
        (scene_id, uri) pairs sorted by scene_id: an item's id and where its asset is. Where two collections share an
        id, every id has its collection in front.

    Raises:
        SceneError: The API or the file cannot be read, finds nothing, or items lack the asset.
        RecipeError: pystac-client is not installed, or refuses an argument.
    """
    items = list(_found_by_api(settings) if _is_api(settings.url) else _of_file(settings))
    if settings.max_items is not None:
        items = items[: settings.max_items]
    if not items:
        raise SceneError(f"no scene at {settings.url} passes the filters of tiles.stac: make them wider")
    without = [item for item in items if settings.asset not in item.assets]
    if without:
        raise SceneError(
            f"{len(without)} of {len(items)} items at {settings.url} have no asset {settings.asset}, the first: "
            f"{without[0].id}, which has {', '.join(without[0].assets) or 'none'}: set tiles.stac.asset, or filter"
        )
    ids = [item.id for item in items]
    if len({*ids}) < len(ids):
        ids = [f"{item.collection_id}/{item.id}" for item in items]
    if len({*ids}) < len(ids):
        raise SceneError(f"{settings.url} has an item twice: give each scene one")
    return sorted(zip(ids, (_uri(settings, item) for item in items), strict=True))


def _is_api(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _search(settings: Stac) -> Any:
    """pystac-client's ItemSearch, which checks the arguments and writes datetimes out in full."""
    try:
        import pystac_client
        from pystac_client.stac_api_io import StacApiIO
        from pystac_client.warnings import DoesNotConformTo
        from urllib3 import Retry
    except ImportError:
        raise RecipeError('tiles.stac needs pystac-client: pip install "softlabel[stac]"') from None
    asked: dict[str, Any] = {
        "collections": list(settings.collections) or None,
        "bbox": settings.bbox,
        "intersects": settings.intersects,
        "datetime": settings.datetime,
        "query": settings.query or None,
        "max_items": settings.max_items,
    }
    if not _is_api(settings.url):
        return pystac_client.ItemSearch(url="", **asked)
    retry = Retry(5, backoff_factor=0.5, status_forcelist=_BUSY, allowed_methods=None)  # a search is a POST
    io = StacApiIO(timeout=_TIMEOUT_S, max_retries=retry)
    client = pystac_client.Client.open(settings.url, stac_io=io)
    with warnings.catch_warnings():
        # Without the query extension an API returns unfiltered items, and pystac-client only warns.
        warnings.simplefilter("error", DoesNotConformTo)
        return client.search(**asked)


def _found_by_api(settings: Stac) -> Iterator[Any]:
    try:
        yield from _search(settings).items()
    except RecipeError:
        raise
    except Exception as error:  # noqa: BLE001  pystac's own, requests', and ValueErrors of either
        reason = " ".join(str(error).split())[:500]
        raise SceneError(
            f"cannot search {settings.url} ({reason}): check tiles.stac and the API", retryable=True
        ) from None


def _of_file(settings: Stac) -> Iterator[Any]:
    try:
        asked = _search(settings).get_parameters()
        if "intersects" in asked:
            shape(asked["intersects"]).bounds  # noqa: B018  or each item would be blamed
    except RecipeError:
        raise
    except Exception as error:  # noqa: BLE001  which is what pystac-client raises for a bad datetime
        raise RecipeError(f"tiles.stac: {error}") from None
    for item in _read_items(settings.url):
        try:
            if _passes(item, asked):
                yield item
        except (TypeError, ValueError, KeyError, AttributeError, ShapelyError) as error:
            raise SceneError(f"item {item.id} of {settings.url} cannot be filtered ({error}): mend it") from None


def _read_items(url: str) -> list[Any]:
    import pystac

    try:
        found = json.loads(location(url).read_text())
        if not pystac.ItemCollection.is_item_collection(found) or "features" not in found:
            raise ValueError("no item collection")
        return list(pystac.ItemCollection.from_dict(found))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pystac.STACError) as error:
        reason = " ".join(str(error).split())[:500]
        raise SceneError(
            f"cannot read STAC items at {url} ({reason}): give tiles.stac.url an API (https://...) or a file with an "
            "item collection"
        ) from None


def _passes(item: Any, asked: dict[str, Any]) -> bool:
    """Whether an API would have found it."""
    return (
        item.collection_id in asked.get("collections", (item.collection_id,))
        and _is_within(item, asked.get("bbox"), asked.get("intersects"))
        and _is_in_time(item, asked.get("datetime"))
        and all(
            _compare(item, name, operator, wanted)
            for name, tests in asked.get("query", {}).items()
            for operator, wanted in tests.items()
        )
    )


def _is_within(item: Any, bbox: tuple[float, ...] | None, intersects: dict | None) -> bool:
    if bbox is None and intersects is None:
        return True
    if item.geometry is None:
        return False
    asked = [shape(intersects)] if bbox is None else _boxes(*bbox)
    footprint = shape(item.geometry)
    return any(footprint.intersects(one) for one in asked)


def _boxes(west: float, south: float, east: float, north: float) -> list[Any]:
    """One box, or, where it crosses the antimeridian (west > east, RFC 7946), the two on either side."""
    if west <= east:
        return [box(west, south, east, north)]
    return [box(west, south, 180, north), box(-180, south, east, north)]


def _is_in_time(item: Any, interval: str | None) -> bool:
    if interval is None:
        return True
    start, _, end = interval.partition("/")
    earliest, latest = _time(start), _time(end or start)
    meta = item.common_metadata
    began, ended = item.datetime or meta.start_datetime, item.datetime or meta.end_datetime
    return (latest is None or _aware(began) <= latest) and (earliest is None or _aware(ended) >= earliest)


def _time(text: str) -> datetime | None:
    return None if text == ".." else datetime.fromisoformat(text)


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _compare(item: Any, name: str, operator: str, wanted: Any) -> bool:
    if operator not in _OPERATORS:
        raise RecipeError(f"tiles.stac.query: unknown operator {operator}: use one of {', '.join(_OPERATORS)}")
    value = item.properties.get(name)
    return value is not None and _OPERATORS[operator](value, wanted)


def _uri(settings: Stac, item: Any) -> str:
    """Where the asset is; a relative href counts from the item, or else from the file that lists it."""
    asset = item.assets[settings.asset]
    href = asset.get_absolute_href() or absolute(asset.href, settings.url.rpartition("/")[0])
    if not has_scheme(href):
        href = os.path.abspath(href)
    parts = urlsplit(href)
    if parts.username or {name.lower() for name in parse_qs(parts.query)} & _SECRETS:
        raise SceneError(
            f"item {item.id} of {settings.url} has an address with a secret in it, which would be kept in the table "
            "of tiles: give addresses without, and credentials in the environment"
        )
    return href
