"""NMS of a batch, done again until it was enough, as softlabel.detectors.pipeline does."""

from softlabel.detectors.batch_nms import START, Effort, suppressed_batch


def kept(decoded, classes, nms, effort=START, **options):
    """With as much effort as it takes, and how much that was."""
    while True:
        found = suppressed_batch(decoded, classes, nms, effort, **options)
        needed = Effort(*found.effort.amax(0).tolist())
        if effort.suffices(needed):
            return [rows[:count] for rows, count in zip(found.rows, found.count, strict=True)], effort
        effort = effort.raised_to(needed)
