"""What runs a detector's forward pass: PyTorch, torch.compile, OpenVINO or TensorRT, behind one call.

Tiles go in as uint8 and are permuted and scaled on the device. Scores are decoded, and boxes scaled to pixels, in
float32 whatever the precision of the convolutions: a coordinate of a few hundred pixels, or a grid cell times its
stride, would lose whole pixels in bfloat16. The TensorRT part is written from TensorRT's documentation; it has not run
where this was tested.
"""

import copy
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softlabel.detectors.engine_choice import CPU_BATCH
from softlabel.detectors.pipeline import CudaQueue, Pipeline, Queue

T = TypeVar("T")
Pixels = NDArray[np.uint8]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CUDA_BATCH = 64  # the first size tried


class EngineOptions(TypedDict, total=False):
    """How a detector computes, the same for every family; Detector says what each option means."""

    engine: str
    precision: str
    threads: int | None
    batch_size: int | None


@dataclass(frozen=True)
class Outputs:
    """The outputs of one forward pass over the images from ``first`` on.

    ``decoded`` is (B, 4 + K, A) float32, or (B, 4 + K + 1, A) where the model has an objectness or an angle: box as
    centre and size in input pixels, class scores, objectness or angle. ``raw`` is what a loss needs from the head; None
    where the engine does not give it.
    """

    first: int
    decoded: torch.Tensor
    raw: Any


class Network(nn.Module):
    """A model as engines run it, from pixels to decoded boxes."""

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """``decoded`` and ``raw`` of Outputs, for uint8 tiles (B, H, W, 3) RGB."""
        raise NotImplementedError

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype`` from now on, but decode in float32."""
        raise NotImplementedError

    def fuse_activations(self) -> None:
        """On a CPU, compute each convolution and its activation in one step, where there are any. The same but for
        rounding: an untrained model's scores move by 6e-5."""

    def make_capturable(self) -> bool:
        """Never synchronise with a GPU within a forward pass, and keep nothing from one pass to the next, so that a
        pass may become a CUDA graph. Returns whether that is possible."""
        return False

    def make_traceable(self) -> None:
        """Let tracers and compilers follow the tiles' shape."""
        raise NotImplementedError


class Engine(Protocol):
    """Runs one network over tiles."""

    def start(self, images: Iterable[Pixels], use: Callable[[Outputs], list[T]]) -> Callable[[], list[T]]:
        """Forward passes over any number of images of one shape.

        One thread at a time may start passes. While it, or another, waits for the last of them, the next may be
        started: otherwise cores are idle at the end of every call.

        Args:
            images: uint8 (H, W, 3) RGB, sides multiples of the model's stride. Consumed as they are needed.
            use: Called with each pass's outputs, not always in order, perhaps by several threads at once; returns one
                result per image of the pass.

        Returns:
            Once every image is in a pass, a function that waits for the last passes and returns the results in the
            order of the images.
        """
        ...


def build(
    network: Network, engine: str, precision: str, device: torch.device, threads: int | None, batch_size: int | None
) -> Engine:
    """The engine of a network, which it changes: except for pytorch in float32, nothing else can use it afterwards.

    Args:
        network: In evaluation mode on ``device``, float32.
        engine: As ``resolve`` gives it.
        precision: As ``resolve`` gives it.
        device: Where it runs.
        threads: CPU threads; None: as many as the library thinks best. PyTorch runs that many forward passes at a
            time; a compiled model splits each pass between them, which sets PyTorch's number for the whole process.
        batch_size: Images per forward pass (OpenVINO takes each alone, and several at once). None: found by trying,
            on CUDA 64, halved as long as memory does not suffice; on a CPU 4.
    """
    if engine == "openvino":
        return _OpenVino(network, precision, threads)
    network.to(memory_format=torch.channels_last)
    if precision != "float32":
        network.lower_precision(_DTYPES[precision])
    if engine == "pytorch" and device.type == "cpu" and threads is not None:
        if torch.backends.mkldnn.is_available():
            network.fuse_activations()
        return _TorchThreads(network, batch_size or CPU_BATCH, threads)
    if engine == "pytorch":
        return _Torch(network, device, batch_size, whole_batches=False)
    if threads is not None:
        torch.set_num_threads(threads)
    backend: str = "inductor"
    options: Any = None
    if engine == "tensorrt":
        import torch_tensorrt  # noqa: F401 (registers the backend)

        # Explicit typing: the module's own types, float32 in the decoding, and not what TensorRT would choose.
        backend, options = "torch_tensorrt", {"use_explicit_typing": True}
    network.make_traceable()
    compiled = torch.compile(_DecodedOnly(network), dynamic=False, backend=backend, options=options)
    return _Torch(lambda tiles: (compiled(tiles), None), device, batch_size, whole_batches=True)


def pipeline_of(engine: Engine, network: Network, device: torch.device) -> Pipeline | None:
    """What keeps a GPU busy with an engine's network; None on a CPU, where tiles need no copying."""
    if device.type != "cuda" or not isinstance(engine, _Torch):
        return None
    return engine.pipeline(CudaQueue(device), network)


class _Torch:
    """PyTorch, or what it compiled a network to."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], tuple[torch.Tensor, Any]],
        device: torch.device,
        batch_size: int | None,
        whole_batches: bool,
    ) -> None:
        self._forward, self._device, self._whole_batches = forward, device, whole_batches
        self._trying = batch_size is None
        self._batch_size = batch_size or (_CUDA_BATCH if device.type == "cuda" else CPU_BATCH)

    def start(self, images: Iterable[Pixels], use: Callable[[Outputs], list[T]]) -> Callable[[], list[T]]:
        source, waiting = iter(images), list[Pixels]()
        results: list[T] = []
        while True:
            waiting += islice(source, max(0, self._batch_size - len(waiting)))
            if not waiting:
                return lambda: results
            batch = waiting[: self._batch_size]
            # Where a model is compiled for one shape, the last batch is filled up: boxes do not depend on the batch.
            size = self._batch_size if self._whole_batches else len(batch)
            found = self._attempt(np.stack([*batch, *batch[:1] * (size - len(batch))]), len(batch), len(results), use)
            if found is None:
                self._batch_size = size // 2
                continue
            results += found
            del waiting[: len(batch)]

    def pipeline(self, queue: Queue, network: Network) -> Pipeline:
        """The same for a device that is faster than its host."""
        return Pipeline(
            self._forward,
            queue,
            self._batch_size,
            may_shrink=self._trying,
            whole_batches=self._whole_batches,
            capturable=not self._whole_batches and network.make_capturable(),
        )

    def _attempt(self, tiles: Pixels, count: int, first: int, use: Callable[[Outputs], list[T]]) -> list[T] | None:
        """Results of the first ``count`` tiles; None where memory did not suffice and a smaller batch may be tried."""
        try:
            with torch.inference_mode():
                decoded, raw = self._forward(torch.from_numpy(tiles).to(self._device))
            return use(Outputs(first, decoded[:count], raw))
        except torch.cuda.OutOfMemoryError:
            if not self._trying or len(tiles) == 1:
                raise
            return None


class _TorchThreads:
    """PyTorch on several CPU threads, each with a forward pass of its own.

    Threads that share one pass wait for each other after every layer. Where something else runs alongside, as the
    readers of tiles do, losing a single core stalls them all: on two busy cores, one pass per thread was 3 to 5 times
    as fast. The threads share every tensor of the network, but not its modules: a head keeps the grid of the last shape
    it saw.
    """

    def __init__(self, network: Network, batch_size: int, threads: int) -> None:
        self._network, self._batch_size, self._threads = network, batch_size, threads
        self._of_thread = threading.local()
        self._pool = ThreadPoolExecutor(threads, "engine", initializer=self._set_up_thread)

    def start(self, images: Iterable[Pixels], use: Callable[[Outputs], list[T]]) -> Callable[[], list[T]]:
        source, running = iter(images), deque[Future[list[T]]]()
        results: list[T] = []
        first = 0
        while batch := list(islice(source, self._batch_size)):
            running.append(self._pool.submit(self._used, np.stack(batch), first, use))
            first += len(batch)
            if len(running) > 2 * self._threads:
                results += running.popleft().result()
        return lambda: results + [result for last in running for result in last.result()]

    def _set_up_thread(self) -> None:
        torch.get_num_threads()  # else the thread's first operation would replace the number set below by the process's
        torch.set_num_threads(1)
        shared = {id(tensor): tensor for tensor in (*self._network.parameters(), *self._network.buffers())}
        self._of_thread.network = copy.deepcopy(self._network, shared)

    def _used(self, tiles: Pixels, first: int, use: Callable[[Outputs], list[T]]) -> list[T]:
        with torch.inference_mode():
            outputs = Outputs(first, *self._of_thread.network(torch.from_numpy(tiles)))
        return use(outputs)  # in the thread that made them: they are many times as large as the results


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """For work on outputs, which runs alongside the forward passes: more threads would take the passes' cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _OpenVino:
    """OpenVINO on CPUs: one tile per request, and as many requests as keep every core busy."""

    def __init__(self, network: Network, precision: str, threads: int | None) -> None:
        ov = _import_openvino()
        network.make_traceable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about what it was told to do
            self._model = ov.convert_model(
                _DecodedOnly(network), example_input=torch.zeros(1, 64, 96, 3, dtype=torch.uint8), input=[-1, -1, -1, 3]
            )
        self._settings = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "ENABLE_CPU_PINNING": False,  # with pinning, all actors of a machine would share its first cores
            **({"INFERENCE_NUM_THREADS": threads} if threads is not None else {}),
        }
        self._core = ov.Core()
        self._queues: dict[tuple[int, ...] | None, Any] = {}

    def start(self, images: Iterable[Pixels], use: Callable[[Outputs], list[T]]) -> Callable[[], list[T]]:
        finished: SimpleQueue[Outputs] = SimpleQueue()
        found: dict[int, T] = {}

        def take_finished() -> None:
            while not finished.empty():
                outputs = finished.get()
                (found[outputs.first],) = use(outputs)

        queue = None
        with _one_torch_thread():
            for index, image in enumerate(images):
                queue = queue or self._queue(image.shape)
                queue.start_async({0: image[None]}, (finished, index))  # waits while every request is busy
                take_finished()

        def finish() -> list[T]:
            with _one_torch_thread():
                if queue is not None:
                    queue.wait_all()  # for every request's current pass, whoever started it: ours are among them
                take_finished()
            return [found[index] for index in range(len(found))]

        return finish

    def _queue(self, shape: tuple[int, ...]) -> Any:
        """Requests for tiles of one square shape, as most have, some 4 % faster; or for any other shape."""
        key = shape if shape[0] == shape[1] else None
        if key not in self._queues:
            self._queues[key] = self._compile(key)
        return self._queues[key]

    def _compile(self, shape: tuple[int, ...] | None) -> Any:
        ov = _import_openvino()
        model = self._model
        if shape is not None:
            model = model.clone()
            model.reshape([1, *shape])
        compiled = self._core.compile_model(model, "CPU", self._settings)
        # Twice as many requests as run at a time, so that no core waits for Python to supply the next image.
        queue = ov.AsyncInferQueue(compiled, 2 * compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        queue.set_callback(_put)
        return queue


def _put(request: Any, whose: "tuple[SimpleQueue[Outputs], int]") -> None:
    finished, index = whose
    decoded = torch.from_numpy(request.get_output_tensor().data.copy())  # the next image overwrites it
    finished.put(Outputs(index, decoded, None))


class _DecodedOnly(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.network(tiles)[0]


def _import_openvino() -> Any:
    # Importing it reports to its makers over the network, except where its telemetry package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
