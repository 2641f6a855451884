"""Set the thresholds of a checkpoint: ``python -m anomalib_cfa.inspect.thresholds MODEL.ckpt --image 0.47``.

Anomalib's exports read them from the checkpoint only; `anomalib export` ignores other options of the model.
"""

import argparse
import pickle
import sys
from pathlib import Path

import torch

from anomalib_cfa.training.whole_files import write_whole

_CONFIG = "anomalib_post_processor_config"


def set_thresholds(checkpoint: Path, image: float | None = None, pixel: float | None = None) -> None:
    """Set the thresholds with which a checkpoint predicts and is exported, in the file itself, in one step.

    They are of normalized scores; None leaves one as it is. They are kept as anomalib's ``image_sensitivity`` and
    ``pixel_sensitivity``, which are 1 minus the threshold.

    Raises:
        ValueError: If a threshold is not from 0 to 1, or the checkpoint is not one of anomalib's with a post-processor.
    """
    for name, value in (("image", image), ("pixel", pixel)):
        if value is not None and not 0 <= value <= 1:
            msg = f"{name} must be a threshold of normalized scores, from 0 to 1, but is {value}"
            raise ValueError(msg)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get(_CONFIG), dict):
        msg = f"checkpoint must be one of anomalib 2.7 with a post-processor, but {str(checkpoint)!r} is not"
        raise ValueError(msg)  # noqa: TRY004 - of the file's content, not of an argument
    config = content[_CONFIG]
    for name, value in (("image_sensitivity", image), ("pixel_sensitivity", pixel)):
        if value is not None:
            config[name] = 1 - value
    checkpoint = checkpoint.resolve()  # a link stays one
    mode = checkpoint.stat().st_mode
    write_whole(content, checkpoint)
    checkpoint.chmod(mode)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status, 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_cfa.inspect.thresholds", description="Set the thresholds of a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint to change")
    parser.add_argument("--image", type=float, help="normalized score above which an image is called defective")
    parser.add_argument("--pixel", type=float, help="normalized score above which a pixel is called defective")
    options = parser.parse_args(arguments)
    if options.image is None and options.pixel is None:
        parser.error("--image or --pixel must be given")
    try:
        set_thresholds(options.checkpoint, options.image, options.pixel)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"thresholds: {error}", file=sys.stderr)
        return 1
    print(f"Thresholds set in {options.checkpoint}; export it again to apply them to the exported model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
