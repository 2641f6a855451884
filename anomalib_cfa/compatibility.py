"""The versions of other packages that this one is tested with.

``pyproject.toml`` states the same ranges to pip. They are checked again at import, since pip is not the only way by
which a package comes or changes, and an unsuitable version would otherwise show as an error from somewhere deep inside.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED = {
    "anomalib": ">=2.7,<2.8",
    "torch": ">=2.10,<3",
    "lightning": ">=2.6,!=2.6.2,!=2.6.3,<2.7",
    "timm": ">=1.0.31,<2",
    "faiss-cpu": ">=1.12,<2",
}
"""Distribution name to the range that is supported, as pip writes it."""


def check_versions() -> None:
    """Check that every package in :data:`SUPPORTED` is installed in a version within its range.

    Pre-releases and local builds (``2.12.0+cpu``) count by their version number.

    Raises:
        ImportError: A package is missing or outside its range. The message names all that are.
    """
    if problems := [problem for name, range_ in SUPPORTED.items() if (problem := _problem(name, range_))]:
        msg = f"anomalib-cfa supports {'; '.join(problems)}. Install matching versions with `pip install anomalib-cfa`."
        raise ImportError(msg)


def _problem(name: str, range_: str) -> str | None:
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name}{range_}, but {name} is not installed"
    if SpecifierSet(range_).contains(found, prereleases=True):
        return None
    return f"{name}{range_}, but found {name} {found}"
