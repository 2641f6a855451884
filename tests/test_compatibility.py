"""The supported versions: one truth, checked at import, and a message that helps."""

import re
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from anomalib_cfa import compatibility
from anomalib_cfa.compatibility import check_versions, supported_versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(path.read_text())["project"]


def test_the_installed_metadata_has_the_ranges_of_the_project(project: dict[str, Any]) -> None:
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert {name: wanted.specifier for name, wanted in supported_versions().items()} == required


def constrained(name: str) -> dict[str, Version]:
    lines = (Path(__file__).parents[1] / "constraints" / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {package: Version(version) for package, version in pairs}


def test_the_constraints_are_the_lower_ends_of_the_ranges_and_versions_within(project: dict[str, Any]) -> None:
    oldest, tested = constrained("oldest.txt"), constrained("tested.txt")
    for requirement in map(Requirement, project["dependencies"]):
        (lowest,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        assert oldest[requirement.name].release[: len(lowest.release)] == lowest.release
        assert tested[requirement.name] in requirement.specifier


def test_others_find_the_types() -> None:
    assert (resources.files("anomalib_cfa") / "py.typed").is_file()


def test_the_extras_mirror_those_of_anomalib(project: dict[str, Any]) -> None:
    for_its_own_development = {"dev", "docs", "test"}
    theirs = set(metadata.metadata("anomalib").get_all("Provides-Extra")) - for_its_own_development
    ours = {
        extra: wanted for extra, wanted in project["optional-dependencies"].items() if extra not in {"demo", "test"}
    }
    assert {extra: wanted[0] for extra, wanted in ours.items()} == {extra: f"anomalib[{extra}]" for extra in theirs}
    assert {extra for extra, wanted in ours.items() if len(wanted) > 1} == {"openvino"}


def test_the_installed_versions_are_supported() -> None:
    check_versions()


def test_a_version_outside_its_range_is_named_with_range_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "version", lambda name: "0.1" if name == "timm" else metadata.version(name))
    message = f"timm{supported_versions()['timm'].specifier}, but found timm 0.1"
    with pytest.raises(ImportError, match=re.escape(message)):
        check_versions()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "requires", lambda name: ["not-there>=1"])
    with pytest.raises(ImportError, match="not-there>=1, but not-there is not installed"):
        check_versions()


@pytest.mark.parametrize(
    ("found", "supported"),
    [("2.10.0", True), ("2.12.0+cpu", True), ("2.15.0.dev20260101", True), ("2.9.1", False), ("3.0.0", False)],
)
def test_local_and_development_builds_count_by_their_number(
    monkeypatch: pytest.MonkeyPatch, found: str, *, supported: bool
) -> None:
    monkeypatch.setattr(compatibility, "version", lambda name: found if name == "torch" else metadata.version(name))
    if supported:
        check_versions()
    else:
        with pytest.raises(ImportError, match="torch"):
            check_versions()
