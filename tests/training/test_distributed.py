"""Several processes on the loopback: one bank, the losses and metrics of a single process, and no hang."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image
from soak import SOAK

from anomalib_cfa import Cfa
from anomalib_cfa.demo.render import render_mvtec

IN_SOAK = pytest.mark.skipif(not SOAK, reason="several processes take long: make soak")
PROCESSES = [2, pytest.param(3, marks=IN_SOAK)]
SCRIPT = Path(__file__).parents[1] / "support/distributed_fit.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven normal images, which no number of processes divides, and twelve to test, which two, three and four do."""
    return render_mvtec(
        tmp_path_factory.mktemp("images"), ["tile"], num_train=11, num_good=6, num_defective=2, image_size=64
    )


@pytest.fixture(scope="module")
def images_with_noise(images, tmp_path_factory):
    """The same, but that one training image, which is given too, is noise."""
    root = shutil.copytree(images, tmp_path_factory.mktemp("images") / "noise")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    odd = root / "tile/train/good/006.png"
    Image.fromarray(noise).save(odd)
    return root, odd


def fit(folder, processes, fits, timeout=300):
    """Run fits, options by name, one after the other in the same processes."""
    for name, options in fits.items():
        (folder / name).mkdir(parents=True)
        options["root"] = str(options["root"])
    command = [sys.executable, "-W", "ignore", SCRIPT, folder, processes, json.dumps(fits)]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False)


def states(folder, processes):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def fitted_states(folder, processes, timeout=300, **options):
    done = fit(folder, processes, {"alone": options}, timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return states(folder / "alone", processes)


def assert_one_and_the_same(together):
    for state in together[1:]:
        for name in state:
            if name != "losses":
                assert torch.equal(state[name], together[0][name]), name


@pytest.fixture(scope="module")
def fits(images, images_with_noise, tmp_path_factory):
    """Folder and states of a fit by a number of processes, by its name: all are run at once, for all tests."""
    done = {}

    def get(processes, name):
        if processes not in done:
            plan = {"mean": {"root": images, "bank": "mean"}}
            if processes == 2:  # with features kept in files, one for each process
                kept = {"root": images_with_noise[0], "feature_budget": 1e-9}
                plan |= {bank: {"bank": bank, **kept} for bank in (("kmeans", "ema") if SOAK else ("kmeans",))}
            if processes > 1:
                plan["dies"] = {"root": images, "dies": (1, "step")}
            folder = tmp_path_factory.mktemp("fits")
            done[processes] = folder, fit(folder, processes, plan)
        folder, ended = done[processes]
        if name != "dies":
            assert (folder / name / "checkpoint").exists(), ended.stderr[-3000:]
            return folder / name, states(folder / name, processes)
        return folder / name, ended

    return get


@pytest.mark.parametrize("processes", PROCESSES)
def test_processes_share_one_bank_and_train_as_one_would(fits, processes):
    _, (alone,) = fits(1, "mean")
    _, together = fits(processes, "mean")
    assert_one_and_the_same(together)
    torch.testing.assert_close(together[0]["memory_bank.centers"], alone["memory_bank.centers"], rtol=1e-5, atol=1e-6)
    # The first global batch holds the same images; the last one is filled up, as torch's sampler does.
    losses = torch.stack([state["losses"] for state in together]).mean(dim=0)
    torch.testing.assert_close(losses[0], alone["losses"][0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("processes", PROCESSES)
def test_metrics_of_several_processes_are_those_of_one(images, fits, tmp_path, processes):
    folder, _ = fits(processes, "mean")
    model = Cfa.load_from_checkpoint((folder / "checkpoint").read_text())
    datamodule = MVTecAD(images, category="tile", eval_batch_size=2, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    (expected,) = engine.test(model, datamodule=datamodule)
    assert json.loads((folder / "metrics.json").read_text()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bank", ["kmeans", pytest.param("ema", marks=IN_SOAK)])
def test_all_processes_have_the_other_banks_and_name_the_image_that_fits_worst(fits, images_with_noise, bank):
    folder, together = fits(2, bank)
    assert_one_and_the_same(together)
    assert together[0]["memory_bank.centers"].isfinite().all()
    assert not list(folder.rglob("tmp*"))
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["worst"] for rank in range(2))
    assert first == second
    assert first[0][0] == str(images_with_noise[1])


@IN_SOAK
@pytest.mark.parametrize("processes", [2, 3])
def test_a_bank_as_large_as_the_default_is_one_and_the_same(images, tmp_path, processes):
    """Built by K-means in two levels, and searched in two."""
    together = fitted_states(tmp_path, processes, timeout=1800, root=images, image_size=512)
    assert_one_and_the_same(together)
    assert len(together[0]["memory_bank.centers"]) == 16384


@IN_SOAK
def test_kept_features_do_not_change_what_several_processes_learn(images, fits, tmp_path):
    _, kept = fits(2, "mean")
    fresh = fitted_states(tmp_path, 2, root=images, bank="mean", feature_budget=0)
    for ours, theirs in zip(kept, fresh, strict=True):
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=0.02, atol=0)


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_process_that_dies_ends_the_run_with_an_error(fits, processes):
    assert_ended(*fits(processes, "dies"), processes)


@IN_SOAK
def test_a_process_that_dies_while_the_bank_is_built_ends_the_run_with_an_error(images, tmp_path):
    done = fit(tmp_path, 2, {"dies": {"root": images, "dies": (0, "bank")}}, timeout=200)
    assert_ended(tmp_path / "dies", done, 2)


def assert_ended(folder, done, processes):
    """With an error, and all processes."""
    assert done.returncode != 0
    ids = [int(path.read_text()) for path in folder.glob("pid*")]
    assert len(ids) == processes
    deadline = time.monotonic() + 60
    while any(map(is_running, ids)):
        assert time.monotonic() < deadline, "a process outlives the run"
        time.sleep(0.2)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("processes", PROCESSES)
def test_what_the_bank_sums_over_processes_is_as_documented(fits, processes):
    """The sizes that docs/distributed.md states, and not more with more processes."""
    folder, (state, *_) = fits(processes, "mean")
    width, columns = state["descriptor.weight"].shape
    channels, patches = columns - 2, 8 * 8
    summed = sorted(json.loads((folder / "rank0.json").read_text())["summed"], reverse=True)
    statistics = [8 * channels**2, 8 * channels]  # the whitened start: products and sums
    assert summed[:3] == sorted([*statistics, 8 * patches * width], reverse=True)
    assert sum(summed[3:]) < 100  # counts
