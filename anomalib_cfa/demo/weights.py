"""ImageNet weights for the demo: from a file, the cache or the hub, and a quick answer where there are none."""

import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg

_PATIENCE = 4.0
"""Seconds that the hub has for its first answer."""


def find_imagenet_weights(backbone: str, weights_path: Path | None = None) -> Path | None:
    """File with the ImageNet weights of ``backbone``, or None where they cannot be had.

    Looked for in this order: ``weights_path``, the hub's cache, the hub itself, which is not asked where
    ``HF_HUB_OFFLINE`` is set, and which is given up after a few seconds where it does not answer.

    Args:
        backbone: Name of a timm model with its tag, such as ``resnet18.tv_in1k``.
        weights_path: A local file.

    Raises:
        FileNotFoundError: ``weights_path`` is given but there is no such file.
    """
    if weights_path is not None:
        if not weights_path.is_file():
            msg = f"weights_path must be a file, but got {weights_path}."
            raise FileNotFoundError(msg)
        return weights_path.resolve()

    pretrained = get_pretrained_cfg(backbone)
    if pretrained is None or not pretrained.hf_hub_id:
        return None
    repository, name = pretrained.hf_hub_id, constants.SAFETENSORS_SINGLE_FILE
    try:
        return Path(hf_hub_download(repository, name, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE or not _hub_answers():
        return None
    try:
        return Path(hf_hub_download(repository, name))
    except (HfHubHTTPError, OSError):
        return None


def _hub_answers() -> bool:
    """Whether the hub can be reached. The hub's own client would try for half a minute before it gives up."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the hub's own address
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE):  # noqa: S310
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:
            pass

    # In a thread, because looking up a host's name heeds no time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answered.is_set()
