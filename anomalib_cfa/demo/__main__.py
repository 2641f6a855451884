"""The whole workflow on rendered images: train, export, find defects, draw them."""

import argparse
import sys
import time
from pathlib import Path

from anomalib_cfa.demo.commands import export_openvino, read_metrics, shown, train
from anomalib_cfa.demo.heat_maps import draw_heat_maps
from anomalib_cfa.demo.render import CATEGORIES, render_mvtec
from anomalib_cfa.demo.weights import RESNET18, find_weights
from anomalib_cfa.inspect import inspect_folder

METRICS = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns its exit status, 1 after an error, which is printed."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m anomalib_cfa.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="folder to write to [%(default)s]")
    parser.add_argument("--weights-path", type=Path, help=f"file with the ImageNet weights of {RESNET18}")
    parser.add_argument(
        "--categories", nargs="+", choices=list(CATEGORIES), default=list(CATEGORIES), help="what to render"
    )
    parser.add_argument("--epochs", type=int, help="epochs of training [configs/demo.yaml's]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and of the training [%(default)s]")
    return parser


def _run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    output = options.output.resolve()
    weights = find_weights(output / "weights", options.weights_path)
    print(weights.note)
    datasets = render_mvtec(output / "datasets", options.categories, options.seed)
    print(f"Rendered {', '.join(options.categories)} in MVTec AD's layout to {shown(datasets)}", flush=True)

    pages = []
    summary = [f"{'':12}" + "".join(f"{name:>15}" for name in METRICS)]
    for category in options.categories:
        checkpoint = train(category, datasets, output, weights, options.epochs, options.seed)
        metrics = read_metrics(category, output)
        summary.append(f"{category:12}" + "".join(f"{metrics[name]:15.3f}" for name in METRICS))
        model = export_openvino(category, checkpoint, output)
        draw_heat_maps(model, datasets / category, output / "heat_maps")
        page = output / f"inspection_{category}.html"
        pages.append(inspect_folder(checkpoint, datasets / category, page).page)

    print(f"\nTest metrics of the last epoch, {'ImageNet' if weights.path else 'random'} features:")
    print("\n".join(summary))
    print(f"\nHeat maps (image, ground truth, heat map, predicted outline): {shown(output / 'heat_maps')}")
    print(f"To judge the models and set their thresholds, open {', '.join(map(shown, pages))}")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
