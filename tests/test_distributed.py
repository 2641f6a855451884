import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anomalib_cfa.demo.render import render_mvtec

SCRIPT = Path(__file__).with_name("distributed_fit.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve normal images, and one more than any number of processes divides: eleven in ``metal_nut``'s place."""
    return render_mvtec(
        tmp_path_factory.mktemp("images"), ["tile"], num_train=11, num_good=1, num_defective=1, image_size=64
    )


def fit(root, folder, processes, bank="mean", dies="none", timeout=300):
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", SCRIPT, root, folder, processes, bank, dies]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False)


def states(root, folder, processes, bank="mean"):
    done = fit(root, folder, processes, bank)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_bank_and_train_as_one_would(images, tmp_path, processes):
    (alone,) = states(images, tmp_path / "alone", 1)
    together = states(images, tmp_path / "together", processes)
    for state in together[1:]:
        for name in alone:
            if name != "losses":
                assert torch.equal(state[name], together[0][name]), name
    torch.testing.assert_close(together[0]["memory_bank.centers"], alone["memory_bank.centers"], rtol=1e-5, atol=1e-6)
    # The first global batch holds the same images; the last one is filled up, as torch's sampler does.
    losses = torch.stack([state["losses"] for state in together]).mean(dim=0)
    torch.testing.assert_close(losses[0], alone["losses"][0], rtol=1e-4, atol=0)


def test_the_paper_bank_is_one_and_the_same_on_all_processes(images, tmp_path):
    first, second = states(images, tmp_path / "ema", 2, bank="ema")
    assert torch.equal(first["memory_bank.centers"], second["memory_bank.centers"])
    assert first["memory_bank.centers"].isfinite().all()


def test_a_process_that_dies_ends_the_run_with_an_error(images, tmp_path):
    assert fit(images, tmp_path / "dies", 2, dies="1", timeout=200).returncode != 0
