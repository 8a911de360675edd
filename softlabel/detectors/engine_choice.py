"""Which engine runs a teacher, and at what precision. The engines themselves are in engines.py.

Drivers ask here, so nothing may import torch, which costs a process seconds.
"""

import importlib.util

from softlabel.errors import RecipeError

CPU_BATCH = 4
"""Tiles per forward pass on a CPU, where the recipe says nothing: 4 and 8 are equally fast, 16 and 32 slower, since so
much memory is fetched anew for each pass."""
LIBRARIES = {"openvino": "openvino", "tensorrt": "tensorrt"}
"""The package that, besides PyTorch, decides an engine's answers; it is part of a teacher's fingerprint."""


def resolve(engine: str, precision: str, *, cuda: bool, with_losses: bool) -> tuple[str, str]:
    """The names behind ``auto``, and whether a combination can run here.

    Losses need the head's raw outputs and are compared between models, so they are always computed by PyTorch in
    float32, whatever is asked for.

    Args:
        engine: auto, pytorch, pytorch_compile, openvino or tensorrt.
        precision: That of the convolutions: auto, float32, float16 or bfloat16.
        cuda: Whether the model runs on CUDA devices, else on CPUs.
        with_losses: Whether losses against truth are wanted besides the boxes.

    Returns:
        Engine and precision, neither of them ``auto``.

    Raises:
        RecipeError: They do not go together, or the engine is not installed.
    """
    if with_losses:
        return "pytorch", "float32"
    if engine == "auto":
        # However few tiles there are: the engine is part of a store's identity, which more scenes must not change, and
        # OpenVINO's start is made up for after some 170 tiles (benchmarks/RESULTS.md, "Engines on a CPU").
        engine = "openvino" if not cuda and _is_installed("openvino") else "pytorch"
    if precision == "auto":
        precision = "float16" if cuda else "float32"
    if engine == "openvino" and cuda:
        raise RecipeError("label.engine: openvino runs on CPUs: set execution.gpus_per_actor to 0, or engine to auto")
    if engine == "openvino" and not _is_installed("openvino"):
        raise RecipeError("label.engine: openvino is not installed: pip install openvino, or set it to auto")
    if engine == "tensorrt" and not cuda:
        raise RecipeError("label.engine: tensorrt needs CUDA: set execution.gpus_per_actor, or engine to auto")
    if engine == "tensorrt" and not _is_installed("torch_tensorrt"):
        raise RecipeError("label.engine: tensorrt is not installed: pip install torch-tensorrt, or set it to auto")
    if precision == "float16" and not cuda:
        raise RecipeError("label.precision: float16 needs CUDA: on a CPU set it to float32 or bfloat16")
    return engine, precision


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
