"""Writes checkpoints so that the older one stays whole, whatever happens meanwhile."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy


def write_whole(content: object, path: Path) -> None:
    """Put a checkpoint in place in one step, once all of it is on the disk.

    Lightning's own writes to the system's folder for temporary files, and moves the file from there. Where that folder
    is on another file system the move is a copy onto the older checkpoint: a full disk, or a process killed at that
    moment, leaves neither. Here the new file is written beside the older one, under a hidden name that does not change,
    and then renamed.

    Raises:
        OSError: If it cannot be written; what lay there before is as it was.
    """
    buffer = io.BytesIO()  # torch reports a full disk by file positions, Python by its name
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class WholeFileIO(_WrappingCheckpointIO):
    """Writes whole files. What does not go to a local folder (``s3://``) it leaves to the plugin that it wraps."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(checkpoint, Path(path))


def write_whole_files(strategy: Strategy) -> None:
    """Let a strategy write whole files, unless a plugin of the user's own writes its checkpoints."""
    # By what they do and not by name: anomalib's plugin inherits Lightning's way of writing.
    if type(strategy.checkpoint_io).save_checkpoint is TorchCheckpointIO.save_checkpoint:
        strategy.checkpoint_io = WholeFileIO(strategy.checkpoint_io)
