"""A fit in a process of its own that can be stopped in many ways, for ``test_interruption.py``."""

import os
import resource
import shutil
import signal
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from tiny import tiny_cfa

from anomalib_cfa.bank import memory_bank

EPOCHS = 4

# Children of a server that has imported what takes long, and has computed nothing: they start at once.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["anomalib_cfa", "anomalib.data", "anomalib.engine"])


class Interrupt(Callback):
    """Stops the process, or breaks something, at a place that is named."""

    def __init__(self, folder: Path, place: str) -> None:
        self.folder, self.place = folder, place

    def on_train_epoch_start(self, trainer, model):
        self.keep(trainer.current_epoch - 1)

    def on_fit_end(self, trainer, model):
        self.keep(EPOCHS - 1)

    def keep(self, epoch):
        """Keep what was the last checkpoint after an epoch of a fit that is not interrupted."""
        if not self.place and checkpoint(self.folder).exists():
            shutil.copy(checkpoint(self.folder), self.folder / f"epoch{epoch}.ckpt")

    def on_train_batch_start(self, trainer, model, batch, index):
        if (trainer.current_epoch, index) != (2, 1):
            return
        if self.place == "step":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.place == "ready":
            (self.folder / "ready").touch()
            signal.pause()
        if self.place == "full disk":
            size = checkpoint(self.folder).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    def on_save_checkpoint(self, trainer, model, saved):
        if trainer.current_epoch != 2:
            return
        if self.place == "half a file":
            os.fsync = lambda descriptor: (
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2),
                os.kill(os.getpid(), signal.SIGKILL),
            )
        if self.place == "whole file, not in place":
            Path.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)


def fit(root: Path, folder: Path, place: str = "", resume: Path | None = None, budget: float = 1.0) -> None:
    """Fit, and save what the model and the optimizer end with as ``end.pt``."""
    torch.set_num_threads(1)
    sys.stderr = (folder / "log").open("w")
    if place == "bank":
        memory_bank.MemoryBank.assign = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    engine = Engine(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Interrupt(folder, place),
            ModelCheckpoint(folder, "last", auto_insert_metric_name=False, enable_version_counter=False),
        ],
    )
    model = tiny_cfa(feature_budget=budget)
    datamodule = MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)
    engine.fit(model, datamodule=datamodule, ckpt_path=resume)
    (optimizer,) = engine.trainer.optimizers
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "end.pt")


def start(root: Path, folder: Path, **options) -> BaseProcess:
    """Start :func:`fit` in a process of its own, whose temporary files go to ``folder/tmp``."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(target=_child, args=(root, folder, options), daemon=True)
    process.start()
    return process


def _child(root: Path, folder: Path, options: dict) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    tempfile.tempdir = str(folder / "tmp")  # to see that nothing stays in it
    fit(root, folder, **options)


def checkpoint(folder: Path) -> Path:
    """The checkpoint that is written anew after each epoch."""
    return folder / "last.ckpt"
