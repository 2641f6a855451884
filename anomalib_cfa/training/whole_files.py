"""Writes checkpoints so that the older one stays whole, whatever happens meanwhile."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy


class WholeFileIO(TorchCheckpointIO):
    """Puts a checkpoint in place in one step, once all of it is on the disk.

    Lightning's own writes to the system's folder for temporary files, and moves the file from there. Where that folder
    is on another file system the move is a copy onto the older checkpoint: a full disk, or a process killed at that
    moment, leaves neither. Here the new file is written beside the older one, under a hidden name that does not change,
    and then renamed.

    Args:
        inner: Reads and removes checkpoints, and writes those that are not to lie in a local folder.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        super().__init__()
        self.inner = inner

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401 - Lightning's signature
    ) -> None:
        """Write a checkpoint; an address with a protocol (``s3://``) is left to the inner plugin.

        Raises:
            OSError: If it cannot be written; what lay there before is as it was.
        """
        if storage_options is not None or "://" in str(path):
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch reports a full disk by file positions, Python by its name
        torch.save(checkpoint, buffer)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - Lightning's vary
        """Read a checkpoint."""
        return self.inner.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Release what the inner plugin holds."""
        self.inner.teardown()


def write_whole_files(strategy: Strategy) -> None:
    """Let a strategy write whole files, unless a plugin of the user's own writes its checkpoints."""
    inner = strategy.checkpoint_io
    # By what they do and not by name: anomalib's plugin inherits Lightning's way of writing.
    if not isinstance(inner, WholeFileIO) and type(inner).save_checkpoint is TorchCheckpointIO.save_checkpoint:
        strategy.checkpoint_io = WholeFileIO(inner)
