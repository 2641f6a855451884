"""Writes one page on which a person judges a model: scores, heat maps, and what thresholds would mean."""

import argparse
import sys
from pathlib import Path

from anomalib_cfa.inspect.inspection import inspect_folder, report


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status, 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_cfa.inspect", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint (.ckpt) or exported model (.xml, .onnx)")
    parser.add_argument("folder", type=Path, help="images, or a category in MVTec AD's layout")
    parser.add_argument("--output", type=Path, default=Path("inspection.html"), help="page to write [%(default)s]")
    parser.add_argument("--embed", action="store_true", help="one file without a folder of pictures beside it")
    parser.add_argument("--device", help="where to compute: torch's name for a checkpoint, OpenVINO's for an export")
    options = parser.parse_args(arguments)
    try:
        inspection = inspect_folder(options.model, options.folder, options.output, options.embed, options.device)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 1
    print("\n".join(report(inspection)).encode("utf-8", "backslashreplace").decode())  # a file's name need not be text
    return 0


if __name__ == "__main__":
    sys.exit(main())
