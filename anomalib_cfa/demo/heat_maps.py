"""Predictions of the exported OpenVINO model, drawn beside the ground truth."""

import time
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from anomalib.data import NumpyImageItem
from anomalib.visualization.image.item_visualizer import visualize_image_item

from anomalib_cfa.demo.commands import shown
from anomalib_cfa.inspect.pictures import read_rgb
from anomalib_cfa.inspect.predictors import OpenVINOPredictor
from anomalib_cfa.inspect.samples import find_samples

_PER_KIND = 2


def draw_heat_maps(model: Path, category: Path, folder: Path) -> None:
    """Predict the first test images of each kind in a category of MVTec AD's layout, print their scores, draw them."""
    folder.mkdir(parents=True, exist_ok=True)
    predictor = OpenVINOPredictor(model)
    for kind, samples in groupby(find_samples(category), key=lambda sample: sample.kind):
        for sample in islice(samples, _PER_KIND):
            start = time.perf_counter()
            image = read_rgb(sample.path)
            prediction = predictor.predict(image)
            seconds = time.perf_counter() - start
            drawn = visualize_image_item(
                NumpyImageItem(
                    image=np.asarray(image),
                    gt_mask=sample.read_mask(prediction.anomaly_map.shape, predictor.view),
                    anomaly_map=prediction.anomaly_map,
                    pred_mask=prediction.mask,
                ),
                fields=["image", "gt_mask"],
                overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])],
            )
            assert drawn is not None  # there are fields to draw
            picture = folder / f"{category.name}_{kind}_{sample.path.stem}.png"
            drawn.save(picture)
            verdict = "defective" if prediction.score > 0.5 else "normal"  # the threshold of normalized scores
            timing = f"{1000 * seconds:6.0f} ms"
            print(f"OpenVINO: {kind:12} score {prediction.score:.2f} {verdict:10}{timing}  {shown(picture)}")
