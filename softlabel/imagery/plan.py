"""What a run would work on, told without reading a pixel or writing a file (``--dry-run``)."""

from collections.abc import Iterator

from softlabel.config import Execution, Recipe
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.scenes import describe_scene
from softlabel.imagery.tiles import windows

_SAMPLE = 20


def plan(recipe: Recipe) -> Iterator[str]:
    """Lines about scenes, tiles and workers; the number of tiles is estimated from some scenes' sizes.

    Raises:
        SceneError: There are no scenes, or one of the sample cannot be read.
    """
    settings = recipe.tiles
    if settings.synthetic:
        count, side = settings.synthetic.num_scenes, settings.synthetic.scene_size_px
        yield f"scenes: {count} made up, {side} x {side} px"
        sizes = [(side, side)]
    else:
        scenes = list_scenes(str(settings.scenes))
        count = len(scenes)
        sample = scenes[:: max(1, count // _SAMPLE)][:_SAMPLE]
        infos = [describe_scene(uri, settings.bands, settings.stretch or (0, 1)) for _, uri in sample]
        sizes = [(info.width, info.height) for info in infos]
        yield f"scenes: {count} at {settings.scenes}"
    per_scene = [len(windows(width, height, settings.size_px, settings.overlap_px)) for width, height in sizes]
    tiles = round(count * sum(per_scene) / len(per_scene))
    yield f"tiles: about {tiles} of {settings.size_px} px, background not yet thinned out"
    # A soft label is 4 + K numbers; at a low floor a tile keeps some 50 of them, and zstd halves what is left.
    megabytes = tiles * 50 * 4 * (4 + len(recipe.classes)) / 2 / 1e6
    yield f"soft labels: some {max(megabytes, 0.1):.1f} MB per teacher over all tiles"
    yield from _workers(recipe.execution)


def _workers(execution: Execution) -> Iterator[str]:
    actors = execution.actors if isinstance(execution.actors, int) else "{}-{}".format(*execution.actors)
    yield (
        f"labelling: {actors} actors of {execution.cpus_per_actor:g} CPU and {execution.gpus_per_actor:g} GPU, "
        f"{execution.batch_size} tiles per forward pass"
    )
    yield (
        f"training: {execution.workers} workers of {execution.cpus_per_worker:g} CPU and "
        f"{execution.gpus_per_worker:g} GPU"
    )
