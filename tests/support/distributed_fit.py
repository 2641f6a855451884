"""Fits and tests tiny Cfas on several CPU processes; a script, which Lightning's launcher starts for each process."""

import json
import os
import sys
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback

from anomalib_cfa import Cfa

DEATH = 7  # exit status


class Record(Callback):
    """Saves each process's losses, weights and metrics, and how much the bank's parts sum over processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[torch.Tensor] = []
        self.summed: list[int] = []

    def setup(self, trainer, model, stage):
        if stage != "fit":
            return
        (self.folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))
        reduce = trainer.strategy.reduce

        def count(tensor, *args, **kwargs):
            self.summed.append(tensor.nbytes if isinstance(tensor, torch.Tensor) else 0)
            return reduce(tensor, *args, **kwargs)

        trainer.strategy.reduce = count

    def on_train_start(self, trainer, model):
        del trainer.strategy.reduce

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        self.losses.append(outputs["loss"].detach())

    def on_train_end(self, trainer, model):
        state = {"losses": torch.stack(self.losses), **model.model.state_dict()}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")
        record = {"summed": self.summed, "worst": model.worst_fitting}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


class Die(Callback):
    """Ends one process, while the others go on: at the first step, or in the middle of building the bank."""

    def __init__(self, rank: int, at: str) -> None:
        self.rank, self.at = rank, at

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        if self.at == "step" and trainer.global_rank == self.rank:
            os._exit(DEATH)

    def setup(self, trainer, model, stage):
        if self.at == "bank" and trainer.global_rank == self.rank:
            model.model.build = lambda *args: os._exit(DEATH)


def fit(folder: Path, root: str, processes: int, dies: tuple[int, str] | None = None, **arguments) -> None:
    """Fit with a global batch of 6 images, then test with the checkpoint that it wrote."""
    model = Cfa("test_resnet.r160_in1k", pre_trained=False, visualizer=False, **{"image_size": 64, **arguments})
    datamodule = MVTecAD(root, category="tile", train_batch_size=6 // processes, eval_batch_size=2, num_workers=0)
    engine = Engine(
        max_epochs=2,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        # Of each process's own: anomalib numbers runs without regard to other processes that do so at the moment.
        default_root_dir=folder / os.environ.get("LOCAL_RANK", "0"),
        callbacks=[Record(folder), *([Die(*dies)] if dies else [])],
    )
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    if engine.trainer.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(metrics))
        checkpoint = engine.trainer.checkpoint_callback.best_model_path
        (folder / "checkpoint").write_text(str(checkpoint))


def main(folder: str, processes: str, fits: str) -> None:
    """Run fits one after the other: the same processes, which take longer to start than to fit."""
    torch.set_num_threads(1)
    for name, options in json.loads(fits).items():
        fit(Path(folder, name), processes=int(processes), **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
