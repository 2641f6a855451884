"""What several test modules share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from soak import SOAK

# No test is timed, and the quick form tries the same cases in each run: the long one looks for new ones.
settings.register_profile("untimed", deadline=None, derandomize=not SOAK)
settings.load_profile("untimed")

# Before anything imports the hub's client: no test may wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _given(variable: str, what: str) -> Path:
    if not (value := os.environ.get(variable)):
        pytest.skip(f"{variable} does not name {what}")
    path = Path(value)
    assert path.exists(), f"{variable} names {path}, which does not exist"
    return path


@pytest.fixture(autouse=True)
def no_handler_of_dead_children():
    """Take away the handler that torch's data loaders leave behind, which outlives them.

    Where oneDNN has computed with AMX, a handler does not fit on the alternate signal stack any more: the next process
    that ends would kill this one by SIGSEGV.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture(scope="session")
def imagenet_weights() -> Path:
    """File with the real ImageNet weights of ``resnet18.tv_in1k``."""
    return _given("ANOMALIB_CFA_TEST_WEIGHTS", "a file with the weights of resnet18.tv_in1k")


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """Folder with the magnetic-tile images, laid out as a category of MVTec AD."""
    return _given("ANOMALIB_CFA_TEST_DATA", "the folder with the magnetic-tile images")


@pytest.fixture(scope="session")
def rendered_mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a tiny rendered data set in MVTec AD's layout, with the categories ``tile`` and ``metal_nut``."""
    from anomalib_cfa.demo.render import render_mvtec

    root = tmp_path_factory.mktemp("rendered")
    return render_mvtec(root, num_train=6, num_good=2, num_defective=2, image_size=64)


@pytest.fixture(scope="session")
def resident_bytes() -> Callable[[], int]:
    """Measures the memory that this process holds."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("how much memory a process holds is read from /proc")
    return lambda: 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])
