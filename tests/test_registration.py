"""``Cfa`` in anomalib is this package's, whatever is imported first, and anomalib's own again on demand.

Every case needs a fresh Python. Most run against a miniature of anomalib and torch, with this package's real hook,
``__init__`` and version check, and take a tenth of a second; a few run against the real ones.
"""

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import anomalib_cfa
import anomalib_cfa_hook

PACKAGE = Path(anomalib_cfa.__file__).parent
SUBMODULES = ("lightning_model", "torch_model", "loss", "anomaly_map")

TORCH = """
import os
from importlib.metadata import entry_points
if os.getenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
    for entry in entry_points(group="torch.backends", name="anomalib_cfa"):
        entry.load()()
"""
MODELS = """
import torch
from anomalib.models.components import AnomalibModule
from .image import Cfa
"""
LIGHTNING_MODEL = """
from anomalib.models.components import AnomalibModule
from {package}.torch_model import CfaModel
class Cfa(AnomalibModule): pass
"""


def _run(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python, in which ``path`` comes before the installed packages."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path or Path(sys.executable).parent,  # `-c` puts the current folder first, which may hold the package
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def _write_model(folder: Path, package: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lightning_model.py").write_text(LIGHTNING_MODEL.format(package=package))
    for name, content in (("torch_model", "CfaModel"), ("loss", "CfaLoss"), ("anomaly_map", "AnomalyMapGenerator")):
        (folder / f"{name}.py").write_text(f"class {content}: pass\n")


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """A folder with the least of torch, anomalib and this package that registration has to do with."""
    for name, text in {
        "torch": TORCH,
        "anomalib": "",
        "anomalib/models": MODELS,
        "anomalib/models/components": "class AnomalibModule: pass\n",
        "anomalib/models/image": "from .cfa import Cfa\n",
        "anomalib/models/image/cfa": "from .lightning_model import Cfa\n",
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(text)
    _write_model(tmp_path / "anomalib/models/image/cfa", "anomalib.models.image.cfa")
    _write_model(tmp_path / "anomalib_cfa", "anomalib_cfa")
    for name in ("__init__.py", "compatibility.py"):
        shutil.copy(PACKAGE / name, tmp_path / "anomalib_cfa" / name)
    return tmp_path


@pytest.mark.parametrize(
    "imports",
    [
        "import anomalib_cfa",
        "import anomalib_cfa.lightning_model",
        "from anomalib_cfa import Cfa",
        "import anomalib_cfa.torch_model",
        "import torch, anomalib_cfa",
        "import anomalib, anomalib_cfa",
        "from anomalib.models import Cfa",
        "from anomalib.models.image import Cfa",
        "from anomalib.models.image.cfa import Cfa",
        "import anomalib.models.image.cfa.torch_model",
        "from anomalib.models.image.cfa.lightning_model import Cfa",
        "import anomalib.models.components",
    ],
)
def test_every_order_of_imports_ends_in_one_class(miniature: Path, imports: str) -> None:
    check = """
import anomalib.models.image.cfa as package, anomalib_cfa.lightning_model, anomalib_cfa.torch_model
from anomalib.models.components import AnomalibModule
from anomalib.models import Cfa
import anomalib.models.image.cfa.torch_model as torch_model
assert Cfa is anomalib_cfa.Cfa is package.Cfa is package.lightning_model.Cfa is anomalib_cfa.lightning_model.Cfa
assert Cfa.__module__ == "anomalib_cfa.lightning_model", Cfa
assert torch_model.CfaModel is anomalib_cfa.torch_model.CfaModel
assert AnomalibModule.__subclasses__() == [Cfa], AnomalibModule.__subclasses__()
"""
    assert _run(imports + check, miniature).stderr == ""


def test_the_stand_ins_are_modules_of_their_own(miniature: Path) -> None:
    _run(
        """
import sys, inspect
import anomalib_cfa.loss
import anomalib.models.image.cfa.loss as stand_in
assert stand_in is not anomalib_cfa.loss
assert stand_in.__spec__.name == stand_in.__name__ == "anomalib.models.image.cfa.loss"
assert anomalib_cfa.loss.__spec__.name == "anomalib_cfa.loss"
assert "CfaLoss" in dir(stand_in)
assert not hasattr(stand_in, "__file__") and not hasattr(stand_in, "nonsense")
try:
    stand_in.OnlyAnomalibs
except AttributeError as error:
    assert "ANOMALIB_CFA_REGISTER=0 gives anomalib's own" in str(error)
package = sys.modules["anomalib.models.image.cfa"]
assert {"Cfa", "torch_model"} <= set(dir(package)) and not hasattr(package, "nonsense")
namespace = {}
exec("from anomalib.models.image.cfa import *", namespace)
assert namespace["Cfa"] is anomalib_cfa.Cfa
try:
    import anomalib.models.image.cfa.nonsense
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
inspect.getmodule(anomalib_cfa.Cfa)
""",
        miniature,
    )


def test_the_variable_gives_anomalibs_own_model_back_whole(miniature: Path) -> None:
    code = """
import sys
import anomalib.models.image.cfa as package
for name in ("lightning_model", "torch_model", "loss", "anomaly_map"):
    __import__(f"anomalib.models.image.cfa.{name}")
    assert getattr(package, name).__file__.startswith(package.__path__[0])
assert package.Cfa.__module__ == package.lightning_model.CfaModel.__module__[:-11] + "lightning_model"
assert not any(name.startswith("anomalib_cfa.") for name in sys.modules)
import anomalib_cfa
assert anomalib_cfa.Cfa is not package.Cfa
"""
    assert _run(code, miniature, ANOMALIB_CFA_REGISTER="0").stderr == ""


def test_the_package_imported_first_does_what_automatic_loading_does(miniature: Path) -> None:
    code = "import anomalib_cfa; from anomalib.models import Cfa; assert Cfa is anomalib_cfa.Cfa"
    assert _run(code, miniature, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stderr == ""


def test_the_package_imported_too_late_says_so_once(miniature: Path) -> None:
    code = """
from anomalib.models import Cfa
import anomalib_cfa
assert anomalib_cfa.Cfa is not Cfa
import anomalib_cfa_hook
anomalib_cfa_hook.explain_if_not_registered()
"""
    stderr = _run(code, miniature, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stderr
    assert stderr.count("RuntimeWarning") == 1
    assert "import anomalib_cfa first" in stderr


OWN_MODEL = """
from anomalib.models import Cfa
import anomalib.models.image.cfa.torch_model as torch_model
assert Cfa.__module__ == "anomalib.models.image.cfa.lightning_model", Cfa
assert torch_model.__file__
"""


@pytest.mark.parametrize("fault", ["raise ImportError('broken')", "1 / 0", "import not_there", "class Syntax error"])
def test_a_broken_package_leaves_anomalib_its_own_model_and_warns_once(miniature: Path, fault: str) -> None:
    (miniature / "anomalib_cfa/torch_model.py").write_text(fault + "\n")
    stderr = _run(OWN_MODEL, miniature).stderr
    assert stderr.count("RuntimeWarning: anomalib-cfa leaves anomalib's own Cfa in place") == 1
    assert "anomalib_cfa cannot be imported" in stderr


def test_an_unsupported_version_leaves_anomalib_its_own_model_and_fails_in_the_package(miniature: Path) -> None:
    (miniature / "timm-0.1.dist-info").mkdir()
    (miniature / "timm-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.1\n")
    refused = """
try:
    import anomalib_cfa
except ImportError as error:
    assert "but found timm 0.1" in str(error)
else:
    raise AssertionError
"""
    assert _run(OWN_MODEL + refused, miniature).stderr.count("but found timm 0.1") == 1
    assert _run("import torch" + refused + OWN_MODEL, miniature).stderr.count("but found timm 0.1") == 1


@pytest.mark.parametrize("moved_to", ["anomalib/models/image/coupled", "anomalib/models/cfa", None])
def test_a_future_anomalib_that_moved_the_module_gets_one_warning_and_the_class_path_works(
    miniature: Path, moved_to: str | None
) -> None:
    old = miniature / "anomalib/models/image/cfa"
    if moved_to is None:
        shutil.rmtree(old)
        new = "anomalib_cfa"
    else:
        new = moved_to.replace("/", ".")
        shutil.move(old, miniature / moved_to)
        (miniature / moved_to / "lightning_model.py").write_text(LIGHTNING_MODEL.format(package=new))
    (miniature / "anomalib/models/image/__init__.py").write_text("" if moved_to is None else f"from {new} import Cfa\n")
    if moved_to is None:
        (miniature / "anomalib/models/__init__.py").write_text("import torch\nimport anomalib.models.image\n")
    code = (
        "import anomalib.models, sys; assert 'anomalib_cfa' not in sys.modules; import anomalib_cfa; anomalib_cfa.Cfa"
    )
    stderr = _run(code, miniature).stderr
    assert stderr.count("RuntimeWarning") == 1
    assert "has no module anomalib.models.image.cfa" in stderr


def test_warnings_made_errors_break_no_import(miniature: Path) -> None:
    (miniature / "anomalib_cfa/torch_model.py").write_text("1 / 0\n")
    assert _run("import warnings; warnings.simplefilter('error')\n" + OWN_MODEL, miniature).stderr == ""


def test_two_threads_may_import_crosswise(miniature: Path) -> None:
    # Slow modules, so that both threads are in the middle of their imports at the same time.
    for name in ("anomalib/models/components/__init__.py", "anomalib_cfa/compatibility.py"):
        file = miniature / name
        file.write_text("import time; time.sleep(0.1)\n" + file.read_text())
    code = """
import threading, torch
errors = []
def run(code):
    try:
        exec(code)
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=run, args=(code,)) for code in ("import anomalib.models", "import anomalib_cfa")]
[thread.start() for thread in threads]
[thread.join(20) for thread in threads]
assert not errors and not any(thread.is_alive() for thread in threads), errors
import anomalib.models, anomalib_cfa
assert anomalib.models.Cfa is anomalib_cfa.Cfa
"""
    _run(code, miniature)


def test_installing_twice_puts_one_finder_in_place() -> None:
    for _ in range(2):
        anomalib_cfa_hook.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, anomalib_cfa_hook.StandInFinder)]
    assert len(finders) == 1


def test_the_hook_imports_the_standard_library_only() -> None:
    code = """
import json, sys
before = set(sys.modules)
import anomalib_cfa_hook
anomalib_cfa_hook.install()
print(json.dumps(sorted(set(sys.modules) - before - {"anomalib_cfa_hook"})))
"""
    imported = json.loads(_run(code).stdout)
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_a_python_that_uses_neither_torch_nor_anomalib_loads_nothing_of_ours() -> None:
    _run("import sys; assert not any(name.startswith('anomalib') for name in sys.modules)")


def test_the_only_trace_in_the_environment_is_the_entry_point() -> None:
    entry_points = metadata.distribution("anomalib-cfa").entry_points
    assert [(entry.group, entry.value) for entry in entry_points] == [("torch.backends", "anomalib_cfa_hook:install")]


# Against the real torch and anomalib: one process a case, all started at once.
REAL = {
    "anomalib first": (
        {},
        """
from anomalib.models.image.cfa.torch_model import CfaModel
from anomalib.models import Cfa, get_model, list_models
from anomalib.models.components import AnomalibModule
import anomalib.models.image, anomalib_cfa, anomalib_cfa.torch_model
assert Cfa is anomalib.models.image.Cfa is anomalib_cfa.Cfa
assert CfaModel is anomalib_cfa.torch_model.CfaModel
assert [kind for kind in AnomalibModule.__subclasses__() if "cfa" in kind.__module__] == [Cfa]
assert "cfa" in list_models()
options = {"backbone": "test_resnet.r160_in1k", "pre_trained": False}
for wanted in ({"class_path": "Cfa"}, {"class_path": "anomalib.models.Cfa"}):
    assert type(get_model(wanted | {"init_args": options})) is Cfa
assert type(get_model("cfa", **options)) is Cfa
""",
    ),
    "package first, no automatic loading": (
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        """
import anomalib_cfa.lightning_model
from anomalib.models import Cfa
assert Cfa is anomalib_cfa.Cfa is anomalib_cfa.lightning_model.Cfa
""",
    ),
    "anomalib's own": (
        {"ANOMALIB_CFA_REGISTER": "0"},
        """
import sys
from anomalib.models import Cfa
import anomalib.models.image.cfa.torch_model
assert Cfa.__module__ == "anomalib.models.image.cfa.lightning_model"
assert anomalib.models.image.cfa.torch_model.__file__
assert "anomalib_cfa" not in sys.modules
""",
    ),
    "torch alone": (
        {},
        """
import sys, torch, anomalib_cfa_hook
assert any(isinstance(finder, anomalib_cfa_hook.StandInFinder) for finder in sys.meta_path)
assert not {"anomalib", "anomalib_cfa", "timm", "faiss", "lightning"} & set(sys.modules)
""",
    ),
}


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen[str]]:
    return {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore::FutureWarning", "-c", code],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (environment, code) in REAL.items()
    }


@pytest.mark.parametrize("name", REAL)
def test_with_the_real_anomalib(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    _, stderr = processes[name].communicate(timeout=300)
    assert processes[name].returncode == 0, stderr
    assert "RuntimeWarning" not in stderr


@pytest.mark.parametrize("name", ["Cfa", "anomalib_cfa.Cfa", "anomalib.models.Cfa"])
@pytest.mark.parametrize("subcommand", ["train", "predict", "export"])
def test_the_command_line_finds_the_model_by_each_of_its_names(
    capsys: pytest.CaptureFixture[str], name: str, subcommand: str
) -> None:
    from anomalib.cli.cli import AnomalibCLI

    data = ["--data", "somewhere"] if subcommand == "predict" else []
    with pytest.raises(SystemExit, match="0"):
        AnomalibCLI([subcommand, "--model", name, *data, "--print_config"], run=False)
    found = re.findall(r"^model:\n  class_path: (\S+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert [pkgutil.resolve_name(path) for path in found] == [anomalib_cfa.Cfa]
