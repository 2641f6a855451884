"""Fills a small file system and writes on it; a script, started with the mount point by ``test_interruption.py``."""

import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from tiny import fit_to_noise, tiny_cfa

from anomalib_cfa.training.whole_files import write_whole_files

SMALL = 150 * 2**10  # bytes, less than any of the files


def files(folder: Path) -> dict[str, bytes]:
    """Everything there is, hidden or not."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes free."""
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            filler.truncate(filler.tell() - left)


def main(folder: Path) -> None:
    """Each format is written once, and once more when the disk is full."""
    model = fit_to_noise(tiny_cfa())
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=folder, enable_checkpointing=False)
    trainer.strategy.connect(model)
    write_whole_files(trainer.strategy)
    cases = {
        "checkpoint": lambda: trainer.save_checkpoint(folder / "weights" / "model.ckpt"),
        "torch": lambda: model.to_torch(folder),
        "onnx": lambda: model.to_onnx(folder),
        "openvino": lambda: model.to_openvino(folder),
    }
    for name, write in cases.items():
        write()
        before = files(folder)
        room = (folder / "weights" / "onnx" / "model.onnx").stat().st_size if name == "openvino" else 0
        fill(folder, SMALL + room)  # OpenVINO's export is made from an ONNX file, which fits
        error = None
        try:
            write()
        except (OSError, RuntimeError) as raised:
            error = raised
        (folder / "filler").unlink()
        assert error is not None, f"{name}: a full disk went unnoticed"
        assert files(folder) == before, f"{name}: {[*files(folder)]} were {[*before]}"
        print(name, "->", type(error).__name__, str(error).splitlines()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    tempfile.tempdir = "/var/tmp"
    main(Path(sys.argv[1]))
