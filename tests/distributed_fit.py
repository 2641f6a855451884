"""Fits a tiny Cfa on several CPU processes; a script, which Lightning's launcher starts once for each process."""

import os
import sys
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback

from anomalib_cfa import Cfa


class Record(Callback):
    """Saves each process's bank, losses and weights; ends one process if asked to."""

    def __init__(self, folder: Path, dies: int | None) -> None:
        self.folder, self.dies, self.losses = folder, dies, []

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        if trainer.global_rank == self.dies:
            os._exit(7)
        self.losses.append(outputs["loss"].detach())

    def on_train_end(self, trainer, model):
        state = {"losses": torch.stack(self.losses), **model.model.state_dict()}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


def main(root: str, folder: str, processes: str, bank: str, dies: str) -> None:
    """Fit with a global batch of 6 images."""
    torch.set_num_threads(1)
    model = Cfa("test_resnet.r160_in1k", pre_trained=False, image_size=64, visualizer=False, bank=bank)
    datamodule = MVTecAD(root, category="tile", train_batch_size=6 // int(processes), eval_batch_size=4, num_workers=0)
    Engine(
        max_epochs=2,
        accelerator="cpu",
        devices=int(processes),
        strategy="ddp" if int(processes) > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[Record(Path(folder), int(dies) if dies != "none" else None)],
    ).fit(model, datamodule=datamodule)


if __name__ == "__main__":
    main(*sys.argv[1:])
