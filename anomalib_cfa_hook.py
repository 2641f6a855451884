"""Makes ``Cfa`` of this package the one that anomalib finds under that name.

Anomalib has no plug-in entry point, but it imports its models by module name. PyTorch calls :func:`install` at the end
of ``import torch`` (entry point group ``torch.backends``), which anomalib always reaches before its models. From then
on a finder on ``sys.meta_path`` answers for ``anomalib.models.image.cfa`` with a stand-in that forwards to
``anomalib_cfa``, so that every way by which anomalib resolves ``Cfa`` ends in one class and no name is ambiguous.

PyTorch turns any error of an entry point into a failed ``import torch``. Hence this is a module of its own, outside
the package, it needs the standard library only, and nothing in it raises.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType

ENVIRONMENT_VARIABLE = "ANOMALIB_CFA_REGISTER"
PACKAGE = "anomalib_cfa"
MODELS = "anomalib.models"
STAND_IN = "anomalib.models.image.cfa"
SUBMODULES = ("lightning_model", "torch_model", "loss", "anomaly_map")


def install() -> None:
    """Put the finder in place, once however often it is called. Imports nothing and never raises."""
    try:
        if _installed() is None:
            sys.meta_path.insert(0, StandInFinder())
    except Exception as error:  # noqa: BLE001 - whatever happened, `import torch` must go on
        _warn(f"its import hook could not be installed ({error!r})")


def explain_if_not_registered() -> None:
    """Warn, once, if ``Cfa`` among anomalib's loaded models is not this package's.

    ``anomalib_cfa`` calls this after it has imported ``anomalib.models``. Nothing is said where the environment
    variable asked for anomalib's own model, or where the finder has already said why it stepped aside.
    """
    finder = _installed()
    if finder is not None and enabled() and not finder.asked and not finder.stepped_aside:
        finder.step_aside(
            f"{MODELS} was imported before {PACKAGE}; import {PACKAGE} first, or do not set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )


def enabled() -> bool:
    """Whether registration is wanted: yes, unless ``ANOMALIB_CFA_REGISTER=0``."""
    return os.environ.get(ENVIRONMENT_VARIABLE) != "0"


class StandInFinder:
    """Finder on ``sys.meta_path`` that answers for anomalib's ``Cfa`` and for nothing else.

    Attributes:
        asked: The import system has asked for anomalib's ``Cfa`` while registration was wanted.
        stepped_aside: Anomalib's own model stays in place for this process, and a warning has said why.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stepped_aside = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of the stand-in for ``name``, or None, which leaves ``name`` to the other finders."""
        del target
        if not name.startswith("anomalib.models."):  # asked for every module that Python imports: leave quickly
            return None
        parent, _, child = name.rpartition(".")
        if parent == STAND_IN:
            answers = child in SUBMODULES and _is_stand_in(parent)
            return _stand_in(name) if answers else None
        if self.stepped_aside or not enabled():
            return None
        try:
            if parent == MODELS and not self.asked and not _has_cfa(path):
                self.step_aside(f"this anomalib has no module {STAND_IN}")
            elif name == STAND_IN:
                self.asked = True
                return _stand_in(name)
        except Exception as error:  # noqa: BLE001 - anomalib must go on
            self.step_aside(f"its import hook failed ({error!r})")
        return None

    def step_aside(self, reason: str) -> None:
        """Leave anomalib's own model in place for the rest of the process, and say why."""
        self.stepped_aside = True
        _warn(reason)


class StandInLoader:
    """Fills a stand-in module. Names are looked up at each use, so that partly imported modules do no harm."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give ``module`` a ``__getattr__`` that forwards to this package, or load anomalib's own if that is broken."""
        if module.__name__ != STAND_IN:
            self._fill_submodule(module)
            return
        self._fill_package(module)
        try:
            # Now and not at the first use, when it would be too late for anomalib's own model. Not in the finder
            # either: Python holds its global import lock while it asks finders, and two threads could block each other.
            import_module(f"{PACKAGE}.lightning_model")
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this package, anomalib must go on
            if (finder := _installed()) is not None:
                finder.step_aside(f"{PACKAGE} cannot be imported ({type(error).__name__}: {error})")
            _load_own_instead(module)

    @staticmethod
    def _fill_package(module: ModuleType) -> None:
        def forward(name: str) -> object:
            if name == "Cfa":
                return import_module(f"{PACKAGE}.lightning_model").Cfa
            if name in SUBMODULES:
                return import_module(f"{STAND_IN}.{name}")
            raise _no_attribute(module, name)

        module.__doc__ = f"Stand-in for anomalib's package: forwards to ``{PACKAGE}``."
        vars(module).update(__getattr__=forward, __all__=["Cfa"], __dir__=lambda: ["Cfa", *SUBMODULES])

    @staticmethod
    def _fill_submodule(module: ModuleType) -> None:
        source = module.__name__.replace(STAND_IN, PACKAGE)

        def forward(name: str) -> object:
            if name.startswith("__"):  # tools that walk `sys.modules` ask for names such as `__file__`
                raise _no_attribute(module, name)
            forwarded = vars(import_module(source))
            if name not in forwarded:
                raise _no_attribute(module, name, f": it is {PACKAGE}'s; {ENVIRONMENT_VARIABLE}=0 gives anomalib's own")
            return forwarded[name]

        module.__doc__ = f"Stand-in for anomalib's module: forwards to ``{source}``."
        vars(module).update(__getattr__=forward, __dir__=lambda: dir(import_module(source)))


def _installed() -> StandInFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, StandInFinder)), None)


def _stand_in(name: str) -> ModuleSpec:
    # A loader by its methods: its base class would cost `import torch` a dozen modules of the standard library.
    return ModuleSpec(name, StandInLoader(), is_package=name == STAND_IN)  # type: ignore[arg-type]


def _is_stand_in(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return isinstance(getattr(spec, "loader", None), StandInLoader)


def _has_cfa(models_path: Sequence[str] | None) -> bool:
    """Whether ``image/cfa`` lies below ``anomalib.models``, found without importing either."""
    image = PathFinder.find_spec(f"{MODELS}.image", models_path)
    return image is not None and PathFinder.find_spec(STAND_IN, image.submodule_search_locations) is not None


def _load_own_instead(stand_in: ModuleType) -> None:
    """Replace the stand-in, of which nobody has seen anything yet, by anomalib's own package."""
    own = PathFinder.find_spec(STAND_IN, sys.modules[f"{MODELS}.image"].__path__)
    if own is None or own.loader is None:
        msg = f"anomalib's own {STAND_IN} is gone"
        raise ImportError(msg)
    module = sys.modules[stand_in.__name__] = module_from_spec(own)
    own.loader.exec_module(module)


def _no_attribute(module: ModuleType, name: str, reason: str = "") -> AttributeError:
    return AttributeError(f"module {module.__name__!r} has no attribute {name!r}{reason}")


def _warn(reason: str) -> None:
    with contextlib.suppress(Exception):  # a filter may turn warnings into errors, and an import is no place for one
        warnings.warn(f"anomalib-cfa leaves anomalib's own Cfa in place: {reason}.", RuntimeWarning, stacklevel=2)
