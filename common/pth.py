"""Files of weights: a state dict read safely, or a pickled model where that is allowed.

Here, and not with the weights of fusion or extractors, because both read them and neither may
import the other. torch is imported when a file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, one_line

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PARALLEL = "module."


def load_weights(
    path: Path, *, allow_pickle: bool = False, setting: str = "allow_pickle"
) -> dict[str, torch.Tensor]:
    """Return the state dict in a ``.pth`` or ``.safetensors`` file.

    Wrappers are taken off: ``{"state_dict": ...}``, ``{"model": ...}``, the ``module.`` that
    DataParallel puts before every name. Without ``allow_pickle`` nothing in the file is executed.
    Raises ConfigError, with the setting that allows it, when the file is missing, broken, holds a
    pickled model that is not allowed or whose code is not here, or something else than weights.
    """
    return unwrapped(_content(path, allow_pickle=allow_pickle, setting=setting), path)


def unwrapped(content: object, path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict inside the content of a ``.pth`` file."""
    import torch

    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    while (inner := _wrapped(content)) is not None:
        content = inner.state_dict() if isinstance(inner, torch.nn.Module) else inner
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{path}: holds no state dict")
    tensors = {str(key): _as_tensor(value) for key, value in content.items()}
    odd = next((key for key, tensor in tensors.items() if tensor is None), None)
    if odd is not None:
        raise ConfigError(f"{path}: is not a plain state dict: {odd!r} is not a tensor")
    if all(key.startswith(_PARALLEL) for key in tensors):
        tensors = {key.removeprefix(_PARALLEL): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _wrapped(content: object) -> Any:
    """Return the content of a wrapper; None without one."""
    import torch

    if not isinstance(content, Mapping):
        return None
    wrapped = (content.get(key) for key in _WRAPPERS)
    return next((each for each in wrapped if isinstance(each, (Mapping, torch.nn.Module))), None)


def _content(path: Path, *, allow_pickle: bool, setting: str) -> Any:
    import pickle

    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise ConfigError(
                f"{path} holds more than tensors, perhaps a whole pickled model, and loading it "
                f"would run the code in it: save model.state_dict() instead, or, if you trust "
                f"the file, set {setting}: true"
            ) from error
    except Exception as error:  # a damaged file stops the reader anywhere: IndexError, struct.error
        raise ConfigError(f"{path}: cannot be read as weights") from error
    return _unpickled(path)


def _unpickled(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path}: the code of its pickled model cannot be imported ({one_line(error, 200)}): "
            "put it on PYTHONPATH, or save model.state_dict() where it is"
        ) from error
    except Exception as error:  # unpickling runs whatever the file says
        raise ConfigError(f"{path}: cannot be unpickled: {one_line(error, 200)}") from error


def _as_tensor(value: object) -> torch.Tensor | None:
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):  # torchvggish's PCA file holds numpy arrays
        return torch.from_numpy(value)
    return value if isinstance(value, torch.Tensor) else None


def _numpy_globals() -> list[Any]:
    """Return the names that numpy 2 and numpy 1 pickle arrays with."""
    import numpy as np
    from numpy._core import multiarray

    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    build = multiarray._reconstruct
    return [build, (build, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, *dtypes]
