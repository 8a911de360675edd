"""What a weights file says of its model, whatever wrote it."""

from pathlib import Path

from softlabel.detectors.header import Header, is_checkpoint, read_safetensors_header


def read_header(path: Path | str) -> Header:
    """What a weights file says of its model. Only a checkpoint needs torch to be read.

    Raises:
        WeightsError: Neither a safetensors file that this project wrote nor a checkpoint that it reads.
    """
    if is_checkpoint(path):
        from softlabel.detectors.weights import read_weights

        return read_weights(path)[0]
    return read_safetensors_header(path)
