"""The versions of other packages that this one is tested with, checked at import.

The package's own metadata says them, as ``pyproject.toml`` told pip. Pip is not the only way by which a package comes
or changes, and an unsuitable version would otherwise show as an error from somewhere deep inside.
"""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def supported_versions() -> dict[str, Requirement]:
    """The packages that this one needs, without those of its extras, by their distributions' names."""
    wanted = map(Requirement, requires("anomalib-cfa") or ())
    return {each.name: each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}


def check_versions() -> None:
    """Raise an ImportError that names all needed packages that are missing, or out of their range.

    Pre-releases and local builds (``2.12.0+cpu``) count by their version number.
    """
    if problems := [problem for wanted in supported_versions().values() if (problem := _problem(wanted))]:
        msg = f"anomalib-cfa supports {'; '.join(problems)}. Install matching versions with `pip install anomalib-cfa`."
        raise ImportError(msg)


def _problem(wanted: Requirement) -> str | None:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name}{wanted.specifier}, but {wanted.name} is not installed"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name}{wanted.specifier}, but found {wanted.name} {found}"
