"""Every snippet of the README and the docs runs, and every example in a docstring."""

import doctest
import importlib
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from anomalib.cli import AnomalibCLI

import anomalib_cfa
from anomalib_cfa.features import PatchFeatures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(anomalib_cfa.__path__, "anomalib_cfa.")
    if not module.name.endswith("__main__")
)


def snippets(language):
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return found


def commands():
    lines = "".join(code for snippet in snippets("bash") for code in snippet.values).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.partition("#")[0].strip() for line in lines if line.strip()))


@pytest.fixture
def production_line(rendered_mvtec, tmp_path, monkeypatch):
    """A folder with what the snippets name: the data set, an exported model, an image."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(rendered_mvtec / "tile", tmp_path / "datasets/MVTecAD/screw")
    (tmp_path / "MODEL.ckpt").touch()
    (tmp_path / "FOLDER").mkdir()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(PatchFeatures, "load_weights", lambda self: self.weights_loaded.fill_(True))  # not the hub's
    cv2.imwrite("part.png", np.full((80, 60, 3), 127, dtype=np.uint8))
    return tmp_path


def test_a_model_trains_exports_and_inspects_as_the_readme_says(production_line):
    names = {}
    codes = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert len(codes) == 2
    exec(codes[0].replace("image_size=256", "image_size=64"), names)
    names["engine"].export(names["engine"].model, "openvino", export_root="screw", ckpt_path=None)
    exec(codes[1], names)
    assert names["prediction"].anomaly_map.shape[-2:] == (64, 64)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("anomalib ")])
def test_a_command_of_anomalib_is_understood(command, production_line, monkeypatch):
    words = shlex.split(command)[1:]
    monkeypatch.setattr(Path, "is_file", Path.exists)
    if words[0] == "benchmark":
        config = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        assert config["accelerator"] == "cpu"  # which whoever reads it has
        return
    cli = AnomalibCLI(args=words, run=False)
    assert cli.config.subcommand == words[0]


def test_files_that_commands_name_are_there():
    named = {word for line in commands() for word in shlex.split(line) if word.startswith(("benchmarks/", "configs/"))}
    assert named
    assert all((ROOT / name).exists() for name in named), named
    targets = {word for line in commands() if line.startswith("make ") for word in line.split()[1:]}
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    setup = {"torch": importlib.import_module("torch"), "F": importlib.import_module("torch.nn.functional")}
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(module, name, globs={**vars(module), **setup}):
        assert runner.run(test).failed == 0, test.name


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    count = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert count > 40
