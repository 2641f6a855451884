"""Pre-trained weights of a backbone: from a local file, the hub's cache or the hub."""

from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub.constants import ENDPOINT
from timm.models import load_state_dict
from torch import Tensor, nn

_SUFFIXES = (".safetensors", ".pth", ".pt")
_HUB_TIMEOUT = 5.0  # seconds
_LISTED_KEYS = 5


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a local file, without running any code that the file may hold.

    The file is ``.safetensors``, ``.pth`` or ``.pt``, with the keys of timm's model, which are torchvision's too for
    ResNets and VGGs. Keys of layers that the network does not have are ignored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"weights_path must be a file of weights, but there is none at {str(path)!r}"
        raise FileNotFoundError(msg)
    if path.suffix not in _SUFFIXES:
        msg = f"weights_path must end in one of {', '.join(_SUFFIXES)}, but is {str(path)!r}"
        raise ValueError(msg)
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # the readers raise whatever a damaged file leads them to
        msg = f"weights_path must be a file of weights, but {str(path)!r} cannot be read as one: {error!r}"
        raise ValueError(msg) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        msg = f"weights_path must hold a state dict of tensors, but {str(path)!r} holds something else"
        raise ValueError(msg)
    return state


def hub_options(name: str) -> dict[str, object]:
    """Options with which ``timm.create_model`` builds a model, by its name and tag, with its pre-trained weights.

    A file in the hub's cache is used as it is, so that a machine that is cut off need not wait for the hub. Without
    one, a single short request tells whether the hub can be reached at all, which timm finds out in most of a minute.

    Raises:
        ConnectionError: If the weights are not in the cache and the hub does not answer.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {"pretrained": True}
    cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
    if isinstance(cached, str):
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    try:
        huggingface_hub.get_session().head(ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:  # which exceptions, depends on the hub's version and its HTTP library
        raise unreachable(name, error) from error
    return {"pretrained": True}


def unreachable(name: str, error: Exception) -> ConnectionError:
    """The error that the pre-trained weights of a model cannot be downloaded."""
    return ConnectionError(
        f"the pre-trained weights {name!r} are not in the local cache, and {ENDPOINT} cannot be reached ({error}); "
        "give a local file as weights_path, or connect once to fill the cache"
    )


def assign_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network of :func:`anomalib_cfa.features.network.build_network`.

    Args:
        network: The network. It is changed only if all goes well.
        state: Weights by the keys of timm's whole model; further keys are ignored.
        source: Where the weights come from, for the error's message.

    Raises:
        ValueError: If weights are missing, of another shape or kind (listing the first such keys), nan or infinite.
    """
    matched, wrong = {}, []
    for key, wanted in network.state_dict().items():
        name = key.removeprefix("model.")  # the wrapper's
        found = state.get(name)
        if found is None:
            if not name.endswith("num_batches_tracked"):  # not in older files, nor needed
                wrong.append(f"{name} is missing")
        elif found.shape != wanted.shape:
            wrong.append(f"{name} has shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        elif found.layout != torch.strided or found.is_complex():
            wrong.append(f"{name} is sparse or complex")
        elif not torch.isfinite(found).all():
            wrong.append(f"{name} holds nan or infinite values")
        else:
            matched[key] = found
    if wrong:
        more = f", and {len(wrong) - _LISTED_KEYS} more" if len(wrong) > _LISTED_KEYS else ""
        held = ", ".join(list(state)[:_LISTED_KEYS])
        msg = (
            f"the weights of {source} do not fit the backbone: {'; '.join(wrong[:_LISTED_KEYS])}{more}. "
            f"The first keys there: {held}"
        )
        raise ValueError(msg)
    network.load_state_dict(matched, strict=False)
