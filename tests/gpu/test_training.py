"""Training on a CUDA device; skipped where there is none."""

import pytest
import torch
from lone_training import EPOCHS, LoneTraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_mixed_precision_with_live_workers_is_resumed_as_if_undisturbed(tiles, tmp_path, monkeypatch):
    lone = LoneTraining(tiles, tmp_path, torch.device("cuda:0"), monkeypatch)
    undisturbed, seen = lone.train("undisturbed", 2, "ram")
    assert all(epoch.pinned and epoch.workers and epoch.scale for epoch in seen)
    assert seen[0].workers == seen[1].workers == seen[2].workers
    assert lone.train("resumed", 2, "ram", until=2)[0] is None
    resumed, more = lone.train("resumed", 2, "ram")
    assert len(more) == EPOCHS - 2
    assert [epoch.scale for epoch in more] == [epoch.scale for epoch in seen[2:]]
    for one, other in zip(undisturbed[0], resumed[0], strict=True):
        assert other == pytest.approx(one, rel=2e-2)  # sums on a device have no fixed order
