"""A fit that is killed, interrupted or out of disk loses an epoch at most, and leaves no rubbish."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupted_fit import EPOCHS, checkpoint, start
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from soak import SOAK, count

from anomalib_cfa import Cfa
from anomalib_cfa.training.whole_files import WholeFileIO, write_whole_files

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")


def finish(process, timeout=120):
    process.join(timeout)
    assert process.exitcode is not None, "the fit hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def whole(rendered_mvtec, tmp_path_factory):
    """Folder of a fit that nothing interrupts, and how long it took in seconds."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert finish(start(rendered_mvtec, folder)) == 0, (folder / "log").read_text()[-3000:]
    return folder, time.monotonic() - begin


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_same(ours[name], value, **tolerance)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, equal_nan=True, msg=str(name), **tolerance)
        else:
            assert ours[name] == value, name


def assert_resumes_to_the_same_end(rendered_mvtec, folder, whole):
    """What a stopped fit left loads, is what the uninterrupted fit had then, and leads to where that ends."""
    resume = checkpoint(folder) if checkpoint(folder).exists() else None
    if resume is not None:
        Cfa.load_from_checkpoint(resume)
        left = load(resume)
        then = load(whole[0] / f"epoch{left['epoch']}.ckpt")
        assert_same(left["state_dict"], then["state_dict"], rtol=0, atol=0)
        assert_same(left["optimizer_states"][0], then["optimizer_states"][0], rtol=0, atol=0)
    resumed = folder / "resumed"
    assert finish(start(rendered_mvtec, resumed, resume=resume)) == 0, (resumed / "log").read_text()[-3000:]
    assert_same(load(resumed / "end.pt"), load(whole[0] / "end.pt"), rtol=1e-5, atol=1e-6)
    return resume


@pytest.mark.parametrize("place", ["bank", "step", "half a file", "whole file, not in place"])
def test_a_fit_killed_at_its_worst_moments_resumes_to_the_same_end(rendered_mvtec, whole, tmp_path, place):
    assert finish(start(rendered_mvtec, tmp_path, place=place)) == -signal.SIGKILL
    resume = assert_resumes_to_the_same_end(rendered_mvtec, tmp_path, whole)
    assert (resume is None) == (place == "bank")


def test_a_fit_killed_at_any_moment_resumes_to_the_same_end(rendered_mvtec, whole, tmp_path):
    moments = random.Random(0)
    for case in range(count(quick=1, soak=60)):
        folder = tmp_path / str(case)
        process = start(rendered_mvtec, folder)
        process.join(moments.uniform(0, whole[1]))
        process.kill()
        finish(process)
        assert_resumes_to_the_same_end(rendered_mvtec, folder, whole)
        shutil.rmtree(folder)


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays_whole(rendered_mvtec, whole, tmp_path):
    assert finish(start(rendered_mvtec, tmp_path, place="full disk")) == 1
    assert "File too large" in (tmp_path / "log").read_text()  # the error of the limit that stands in for a full disk
    assert not list(tmp_path.rglob("*.part"))
    assert load(assert_resumes_to_the_same_end(rendered_mvtec, tmp_path, whole))["epoch"] == 1


def test_an_interrupt_leaves_checkpoints_and_nothing_else(rendered_mvtec, whole, tmp_path):
    process = start(rendered_mvtec, tmp_path, place="ready", budget=1e-9)  # features are kept in a file
    while not (tmp_path / "ready").exists():
        assert process.exitcode is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    opened = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").glob("*")]
    mapped = Path(f"/proc/{process.pid}/maps")
    if mapped.exists():
        assert "(deleted)" in mapped.read_text() or any("(deleted)" in name for name in opened), "no file of features"
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) != 0
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"log", "ready", "last.ckpt"}
    assert load(checkpoint(tmp_path))["epoch"] == 1 < EPOCHS - 1


@pytest.mark.skipif(not SOAK, reason="four exports take long: make soak")
def test_a_really_full_disk_harms_no_file(tmp_path):
    """On a file system of 8 MiB, where the user may make one: a checkpoint and each export."""
    script = Path(__file__).parents[1] / "support/full_disk.py"
    mount = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        pytest.skip("a file system of one's own needs unprivileged user namespaces")
    command = ["unshare", "-rm", "sh", "-c", mount, tmp_path, sys.executable, "-W", "ignore", script, tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


class _Strategy:
    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        self.checkpoint_io = checkpoint_io


def test_only_lightnings_own_way_of_writing_is_replaced_and_only_once():
    strategy = _Strategy(TorchCheckpointIO())
    write_whole_files(strategy)
    write_whole_files(strategy)
    assert type(strategy.checkpoint_io) is WholeFileIO
    assert type(strategy.checkpoint_io.checkpoint_io) is TorchCheckpointIO
    own = _Strategy(AsyncCheckpointIO(TorchCheckpointIO()))
    write_whole_files(own)
    assert type(own.checkpoint_io) is AsyncCheckpointIO


def test_addresses_and_options_are_left_to_the_inner_plugin(tmp_path):
    class Inner(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            saved.append((path, storage_options))

    saved = []
    plugin = WholeFileIO(Inner())
    plugin.save_checkpoint({}, "memory://model.ckpt")
    plugin.save_checkpoint({}, tmp_path / "model.ckpt", {"some": "option"})
    assert saved == [("memory://model.ckpt", None), (tmp_path / "model.ckpt", {"some": "option"})]
