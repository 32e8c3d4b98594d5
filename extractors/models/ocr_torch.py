"""PP-OCRv6's networks in torch, on a GPU, in batches of what several readers of pictures ask for.

The networks are those of rapidocr's wheel: an ONNX graph is run operation by operation. Numbers of
shapes stay on the CPU in numpy, so that no pass waits for the GPU before its end.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import structlog

from common.errors import is_out_of_memory
from common.precision import Arithmetic, torch_dtype
from extractors.models.base import Rows, Uploads, download

if TYPE_CHECKING:
    import torch

# A tensor, or numbers of a shape: what one operation of a graph takes and gives.
Value: TypeAlias = Any
Attributes: TypeAlias = Mapping[str, Any]

# GPUs allocate for each new shape, and keep it: sides are padded to multiples of this. Double would
# pad a third of a usual picture; at half there are four times as many shapes, and smaller batches.
BUCKET = 160
_MOST_PIXELS = 8 * 960 * 960
"""Of pictures in one pass: eight of the largest, or 40 of their small copies. Activations take 54
bytes a pixel in half precision, 380 MiB in all. Double takes twice that; half fills a GPU less."""
_MOST_LINE_PIXELS = 64 * 48 * 480
"""Of lines in one pass: 64 usual ones, which take 280 MiB, since each step of 8 pixels has a score
for 18,710 characters. Double takes twice as much; half cuts the lines of eight pages in two."""

_log = structlog.get_logger()


class Networks:
    """Networks that find, turn and read lines, for any number of threads at once."""

    def __init__(
        self, models: tuple[Path, Path, Path], device: str, arithmetic: Arithmetic
    ) -> None:
        find, turn, read = (Network(path, device, arithmetic) for path in models)
        self._finder = Batches(find, _map, _MOST_PIXELS)
        self._turner = Batches(turn, _sides, _MOST_LINE_PIXELS)
        self._reader = Batches(read, _best, _MOST_LINE_PIXELS)

    def find(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return how likely each pixel of a BGR picture ``(h, w, 3)`` is text ``(1, 1, h, w)``."""
        height, width = pixels.shape[:2]
        below, right = -height % BUCKET, -width % BUCKET
        padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
        return self._finder(padded[None])[..., :height, :width]

    def turn(self, lines: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return how likely lines ``(n, 3, 48, 192)`` stand upright and upside down ``(n, 2)``."""
        return self._turner(lines)

    def read(self, lines: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return number and likelihood of the best character of each step of lines.

        Lines are ``(n, 3, 48, width)``, normalised; they end in the padding that shorter lines of
        a batch have. Gives ``(n, steps, 2)``.
        """
        return self._reader(np.pad(lines, ((0, 0), (0, 0), (0, 0), (0, -lines.shape[3] % BUCKET))))

    def close(self) -> None:
        """End the threads that run the passes."""
        for each in (self._finder, self._turner, self._reader):
            each.close()


def _map(network: Network, pixels: torch.Tensor) -> torch.Tensor:
    """Return maps float32 ``(n, 1, h, w)`` of pictures uint8 ``(n, h, w, 3)``."""
    # (n, h, w, 3) as (n, 3, h, w): a view, which torch takes as channels_last; [0, 255] -> [-1, 1]
    return network(pixels.permute(0, 3, 1, 2).to(network.dtype) / 127.5 - 1).float()


def _sides(network: Network, lines: torch.Tensor) -> torch.Tensor:
    return network(lines.to(network.dtype)).float()


def _best(network: Network, lines: torch.Tensor) -> torch.Tensor:
    """Return the best character's number and likelihood: 1/9,000 of what would be copied."""
    import torch

    likely, number = network(lines.to(network.dtype)).max(dim=2)  # (n, steps, characters)
    return torch.stack((number.float(), likely.float()), dim=2)  # up to 18,710: exact in float32


class Batches:
    """A network that threads share: what waits in one shape when a pass begins goes through it.

    Nobody waits for a batch to fill: a thread that is alone has a pass of its own.
    """

    def __init__(self, network: Network, call: Callable[..., Any], most_pixels: int) -> None:
        self._network, self._call, self._most_pixels = network, call, most_pixels
        self._waiting: deque[tuple[Rows, Future[Any]]] = deque()
        self._lock = threading.Lock()
        self._upload = Uploads(network.device)
        self._before: Callable[[], Any] | None = None
        self._thread = ThreadPoolExecutor(1, "ocr-pass", _one_thread)

    def __call__(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return what the network gives for these rows, as it would for them alone."""
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], npt.NDArray[np.float32]]:
        """Have rows ``(n, ...)`` wait for a pass, and return the function that waits for it."""
        answer: Future[Any] = Future()
        with self._lock:
            self._waiting.append((rows, answer))
        # A pass for each call, which finds nothing to do if an earlier one took its rows.
        self._thread.submit(self._pass)

        def result() -> npt.NDArray[np.float32]:
            passed, part = answer.result()
            rows: npt.NDArray[np.float32] = passed()[part]
            return rows

        return result

    def close(self) -> None:
        self._thread.shutdown()

    def _pass(self) -> None:
        calls = self._take()
        if not calls:
            return
        answers = [answer for _, answer in calls]
        try:
            wait = self._begin(np.concatenate([rows for rows, _ in calls]))
        except Exception as error:  # noqa: BLE001 - of whatever kind: it is each caller's
            for answer in answers:
                answer.set_exception(error)
            return
        start = 0
        for rows, answer in calls:
            answer.set_result((wait, slice(start, start + len(rows))))
            start += len(rows)
        before, self._before = self._before, wait
        if before is not None:
            before()  # two passes at once keep a GPU busy; meanwhile more rows come to wait

    def _take(self) -> list[tuple[Rows, Future[Any]]]:
        """Take the call that has waited longest, and those of its shape that fit into its pass."""
        with self._lock:
            if not self._waiting:
                return []
            shape, free = self._waiting[0][0].shape[1:], self._most_pixels
            taken: list[tuple[Rows, Future[Any]]] = []
            later: deque[tuple[Rows, Future[Any]]] = deque()
            for call in self._waiting:
                pixels = call[0].size // 3
                if call[0].shape[1:] == shape and (pixels <= free or not taken):
                    taken.append(call)
                    free -= pixels
                else:
                    later.append(call)
            self._waiting = later
        return taken

    def _begin(self, rows: Rows) -> Callable[[], Rows]:
        """Begin a pass, in halves where the device has too little memory for it."""
        import torch

        try:
            with torch.inference_mode():
                return download(self._call(self._network, *self._upload([torch.from_numpy(rows)])))
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        _log.warning("extractors.batch_halved", extractor="ocr", batch_size=half)
        # The first half ends before the second begins: they would not fit together either.
        first = self._begin(rows[:half])()
        second = self._begin(rows[half:])
        return lambda: np.concatenate((first, second()))


def _one_thread() -> None:
    """Have torch use one thread for this one; two would spin, for ten times the CPU."""
    import torch

    torch.set_num_threads(1)  # it counts for the thread that calls it


class _Node(NamedTuple):
    """An operation of a graph: names of its inputs and of its one output."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


class Network:
    """An ONNX graph in torch, with the operations of PP-OCR's networks.

    Raises:
        ValueError: The file is no ONNX graph, or has an operation that is not in the table.
    """

    def __init__(self, path: Path, device: str, arithmetic: Arithmetic) -> None:
        import onnx
        import torch

        self.device, self.dtype = device, torch_dtype(arithmetic)
        graph = onnx.load(path).graph
        arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        nodes: list[_Node] = []
        same: dict[str, str] = {}
        for each in graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in each.attribute}
            inputs = tuple(same.get(name, name) for name in each.input)
            if each.op_type == "Identity":  # so Paddle names its weights
                same[each.output[0]] = inputs[0]
            elif each.op_type == "Constant":
                arrays[each.output[0]] = onnx.numpy_helper.to_array(values["value"])
            else:
                nodes.append(_Node(each.op_type, inputs, each.output[0], values))
        nodes = list(_with_gelu(list(_with_bias(nodes, arrays))))
        self._input, self._output = graph.input[0].name, nodes[-1].output
        if unknown := {node.op for node in nodes} - _OPERATIONS.keys():
            raise ValueError(f"{path}: torch has no operation {min(unknown)} here")
        self._steps = list(zip(nodes, _last_uses(nodes, self._output), strict=True))
        sizes = {name for node in nodes if node.op == "Resize" for name in node.inputs[1:]}
        self._values = {
            name: self._placed(torch.from_numpy(array.copy()))
            if array.dtype == np.float32 and array.ndim and name not in sizes
            else array
            for name, array in arrays.items()
        }

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the output for a batch ``(n, ...)`` in the network's dtype."""
        values: dict[str, Value] = {**self._values, self._input: rows}
        for node, done in self._steps:
            inputs = [values[name] if name else None for name in node.inputs]
            values[node.output] = _OPERATIONS[node.op](node.attributes, *inputs)
            for name in done:
                del values[name]
        output: torch.Tensor = values[self._output]
        return output

    def _placed(self, weights: torch.Tensor) -> torch.Tensor:
        import torch

        layout = torch.channels_last if weights.ndim == 4 else torch.preserve_format
        return weights.to(self.device, self.dtype, memory_format=layout)


def _with_bias(nodes: Sequence[_Node], arrays: dict[str, Any]) -> Iterator[_Node]:
    """Yield the nodes; a convolution takes up the constant that is added to what it gives.

    One kernel in the place of two; so do the five of GELU become one (`_with_gelu`).
    """
    users = Counter(name for node in nodes for name in node.inputs)
    added = {node.inputs[0]: node for node in nodes if node.op == "Add"}
    taken = set()
    for node in nodes:
        add = added.get(node.output)
        shift = arrays.get(add.inputs[1]) if add else None
        if node.op.startswith("Conv") and add and shift is not None and users[node.output] == 1:
            arrays[add.inputs[1]] = shift.reshape(-1)  # (1, channels, 1, 1) -> (channels,)
            taken.add(add.output)
            yield node._replace(inputs=(*node.inputs, add.inputs[1]), output=add.output)
        elif node.output not in taken:
            yield node


def _with_gelu(nodes: Sequence[_Node]) -> Iterator[_Node]:
    """Yield the nodes with ``x * (erf(x / 2 ** 0.5) + 1) * 0.5`` as one."""
    maker = {node.output: node for node in nodes}
    user = {name: node for node in nodes for name in node.inputs}
    whole: dict[str, _Node] = {}
    parts: set[str] = set()
    for erf in nodes:
        if erf.op == "Erf":
            divided, plus = maker[erf.inputs[0]], user[erf.output]
            product = user[plus.output]
            half = user[product.output]
            whole[half.output] = _Node("Gelu", divided.inputs[:1], half.output, {})
            parts |= {divided.output, erf.output, plus.output, product.output}
    for node in nodes:
        if node.output not in parts:
            yield whole.get(node.output, node)


def _last_uses(nodes: Sequence[_Node], output: str) -> list[list[str]]:
    """Return for each node the values that nothing after it needs, weights left out."""
    made = {node.output for node in nodes} - {output}
    last = {name: i for i, node in enumerate(nodes) for name in node.inputs if name in made}
    done: list[list[str]] = [[] for _ in nodes]
    for name, i in last.items():
        done[i].append(name)
    return done


def _conv(at: Attributes, x: Value, weights: Value, bias: Value = None) -> Value:
    from torch.nn import functional

    x, pads = _padded(at, x, 0.0)
    return functional.conv2d(
        x, weights, bias, at["strides"], pads, at["dilations"], groups=at["group"]
    )


def _conv_transpose(at: Attributes, x: Value, weights: Value, bias: Value = None) -> Value:
    from torch.nn import functional

    pads = at["pads"][:2]
    return functional.conv_transpose2d(x, weights, bias, at["strides"], pads, groups=at["group"])


def _max_pool(at: Attributes, x: Value) -> Value:
    from torch.nn import functional

    x, pads = _padded(at, x, -np.inf)
    return functional.max_pool2d(x, at["kernel_shape"], at["strides"], list(pads))


def _average_pool(at: Attributes, x: Value) -> Value:
    from torch.nn import functional

    return functional.avg_pool2d(x, at["kernel_shape"], at["strides"], at["pads"][:2])


def _padded(at: Attributes, x: Value, value: float) -> tuple[Value, Sequence[int]]:
    """Return the input, and the padding that is left to the operation: the same on both sides."""
    from torch.nn import functional

    if at.get("auto_pad", b"NOTSET") == b"NOTSET":
        return x, at["pads"][:2]
    # SAME_UPPER with strides of 1: an output as large as the input, the odd row at its end
    high, wide = (size - 1 for size in at["kernel_shape"])
    sides = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    return functional.pad(x, sides, value=value), (0, 0)


def _resize(at: Attributes, x: Value, _region: Value, scales: Value) -> Value:
    from torch.nn import functional

    return functional.interpolate(x, scale_factor=[float(s) for s in scales[2:]], mode="nearest")


def _batch_norm(at: Attributes, x: Value, *weights: Value) -> Value:
    from torch.nn import functional

    scale, shift, mean, variance = weights
    return functional.batch_norm(x, mean, variance, scale, shift, eps=at["epsilon"])


def _concat(at: Attributes, *parts: Value) -> Value:
    import torch

    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, at["axis"])
    return torch.cat(parts, at["axis"])


def _slice(_: Attributes, x: Value, first: Value, last: Value, axes: Value, *steps: Value) -> Value:
    cuts = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        cuts[axis] = slice(int(first[i]), int(last[i]), int(steps[0][i]) if steps else None)
    return x[tuple(cuts)]


def _reshape(_: Attributes, x: Value, shape: Value) -> Value:
    # 0: as it was
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def _unsqueeze(at: Attributes, x: Value) -> Value:
    return np.expand_dims(x, tuple(at["axes"])) if isinstance(x, np.ndarray | np.generic) else x


def _mean(at: Attributes, x: Value) -> Value:
    return x.mean(at["axes"], keepdim=bool(at.get("keepdims", 1)))


def _gelu(_: Attributes, x: Value) -> Value:
    from torch.nn import functional

    return functional.gelu(x)


def _number(value: Value) -> Value:
    """Return a constant of one number as Python's: it does not change the dtype of the other."""
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value


_OPERATIONS: Mapping[str, Callable[..., Value]] = {
    "Add": lambda _, x, y: x + _number(y),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda _, x: x,  # of numbers of shapes alone
    "Clip": lambda _, x, least, most: x.clamp(_number(least), _number(most)),
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": lambda _, x, y: x / _number(y),
    "Gelu": _gelu,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda at, x: (x * at["alpha"] + at["beta"]).clamp(0, 1),
    "MatMul": lambda _, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda _, x, y: x * _number(y),
    "Pow": lambda _, x, y: x ** _number(y),
    "ReduceMean": _mean,
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda _, x: np.array(x.shape),
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda at, x: x.softmax(at["axis"]),
    "Sqrt": lambda _, x: x.sqrt(),
    "Squeeze": lambda at, x: x.squeeze(tuple(at["axes"])),
    "Sub": lambda _, x, y: x - _number(y),
    "Transpose": lambda at, x: x.permute(at["perm"]),
    "Unsqueeze": _unsqueeze,
}
