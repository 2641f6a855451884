"""The deployment benchmark's figures as Markdown."""

from typing import Any

from report import table


def markdown(content: dict[str, Any]) -> str:
    """The whole report.

    Args:
        content: That of ``deploy.json``.
    """
    rows = content["rows"]
    sections = [
        "# Exported models",
        _environment(content),
        _exports([row for row in rows if row["part"] == "exports" and "error" not in row]),
        _against_anomalib([row for row in rows if row["part"] == "anomalib"]),
        "\n".join(f"- failed: {row['label']}: {row['error'].splitlines()[-1]}" for row in rows if "error" in row),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _environment(content: dict[str, Any]) -> str:
    environment = content.get("environment", {})
    lines = [f"- {key}: {value}" for key, value in environment.get("machine", {}).items() if key != "threads"]
    lines.append("- versions: " + ", ".join(f"{key} {value}" for key, value in environment.get("versions", {}).items()))
    lines.append(f"- threads: {content['settings']['threads']}")
    return "\n".join(lines)


def _exports(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        whole, backbone = row["whole_ms"], row.get("backbone_ms")
        lines.append(
            [
                row["label"],
                f"{row['score_difference']:.1e}",
                f"{row['map_difference']:.1e}",
                f"{100 * row['pixels_beyond_1e-4']:.2f} %",
                f"{row['flipped']} of {row['images']}",
                f"{row['image_auroc']:.4f}",
                f"{row['pixel_auroc']:.4f}",
                f"{row['bytes'] / 2**20:.1f} MiB" if "bytes" in row else "",
                f"{whole:.1f} ms",
                f"{backbone:.1f} ms" if backbone else "",
                f"{(whole - backbone) / backbone:.2f}" if backbone else "",
            ]
        )
    head = [
        "",
        "score",
        "map",
        "pixels beyond 1e-4",
        "labels flipped",
        "image AUROC",
        "pixel AUROC",
        "on disk",
        "one image",
        "backbone alone",
        "rest / backbone",
    ]
    note = (
        "Score and map: the largest difference from PyTorch on any test image, before normalization, relative to the "
        "image's score and to the largest value of its map. Times are medians."
    )
    return f"## Agreement, accuracy and speed\n\n{note}\n\n{table(head, lines)}"


def _against_anomalib(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["label"],
            f"{row['ours_ms']:.1f} ms",
            f"{row['anomalib_ms']:.1f} ms",
            f"{row['anomalib_ms'] / row['ours_ms']:.1f}",
        ]
        for row in rows
    ]
    note = "Both exported to OpenVINO, with random weights and the same number of random centres, timed in turn."
    head = ["one image", "this package", "anomalib", "times faster"]
    return f"## Against anomalib's own Cfa\n\n{note}\n\n{table(head, lines)}"
