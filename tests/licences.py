"""Prints the licences of the packages that this one needs, by their own metadata: ``python tests/licences.py``."""

import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

OURS, EXTRAS = "anomalib-cfa", ("cpu", "openvino")


def needed(name: str, extras: tuple[str, ...] = ()) -> dict[str, int]:
    """Each package that another needs, installed here, and how far from it: 1 for a direct one."""
    found, queue = {}, [(name, extras, 0)]
    seen = set()
    while queue:
        name, extras, depth = queue.pop(0)
        name = re.sub(r"[-_.]+", "-", name).lower()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform
        found.setdefault(name, depth)
        for extra in ("", *extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            wanted = [r for r in map(Requirement, requires) if r.marker is None or r.marker.evaluate({"extra": extra})]
            queue.extend((requirement.name, tuple(requirement.extras), depth + 1) for requirement in wanted)
    return found


def licence(name: str) -> str:
    """A package's licence: the SPDX expression, the classifiers or the first line of the text, whichever is first."""
    metadata = distribution(name).metadata
    classifiers = [value for value in metadata.get_all("Classifier") or [] if value.startswith("License")]
    texts = (
        metadata.get("License-Expression"),
        ", ".join(value.rsplit(" :: ", 1)[-1] for value in classifiers),
        (metadata.get("License") or "").strip().split("\n")[0],
    )
    return next(filter(None, texts), "not stated")


def main() -> None:
    """A table of the direct ones, and what licences the others have."""
    depths = needed(OURS, EXTRAS)
    own = [name for name, depth in depths.items() if depth == 1]
    print("| package | version | licence |\n|---|---|---|")
    for name in sorted(own):
        print(f"| {name} | {distribution(name).version} | {licence(name)} |")
    others: dict[str, list[str]] = {}
    for name, depth in depths.items():
        if depth > 1:
            others.setdefault(licence(name), []).append(name)
    print(f"\nTheirs, {sum(map(len, others.values()))} packages:\n")
    for text, names in sorted(others.items(), key=lambda item: -len(item[1])):
        print(f"- {text} ({len(names)}): {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
