"""Makes the checkpoint that later versions must load, and the scores that it must give: ``tests/checkpoints/``.

Run once for each release, from the repository's root: ``python tests/support/make_checkpoint.py``.
"""

import json
import tempfile
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from tiny import noise, tiny_cfa

import anomalib_cfa
from anomalib_cfa import Cfa
from anomalib_cfa.demo.render import render_mvtec

FOLDER = Path(__file__).parents[1] / "checkpoints"
IMAGES = (3, 80, 60, 7)  # how many, their height and width, and the seed of their noise


@torch.no_grad()
def predictions(model: Cfa) -> dict[str, list]:
    """What a model gives for fixed images: its scores and one map, thinned out, before and after normalization."""
    images = noise(*IMAGES)
    before = model.eval().model(model.pre_processor(images))
    after = model(images)
    return {
        "score": before.pred_score.tolist(),
        "map": before.anomaly_map[0, ::8, ::8].tolist(),
        "normalized_score": after.pred_score.tolist(),
        "normalized_map": after.anomaly_map[0, ::8, ::8].tolist(),
    }


def main() -> None:
    """Fit a model that is small in backbone, width and bank, and write checkpoint and scores."""
    torch.set_num_threads(1)
    model = tiny_cfa(backbone="test_efficientnet.r160_in1k", gamma_d=8, gamma_c=8)  # timm's smallest
    with tempfile.TemporaryDirectory() as name:
        root = render_mvtec(name, ["tile"], num_train=6, num_good=2, num_defective=2, image_size=64)
        datamodule = MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        engine = Engine(default_root_dir=root, max_epochs=2, **options)
        engine.fit(model, datamodule=datamodule)
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{anomalib_cfa.__version__}.ckpt"
        engine.trainer.save_checkpoint(path)
    kept = predictions(model)
    path.with_suffix(".json").write_text(json.dumps(kept) + "\n")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, scores {kept['score']}")


if __name__ == "__main__":
    main()
