"""The same seed gives the same bank, weights and scores: run to run, and for any number of FAISS threads."""

import faiss
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from tiny import tiny_cfa

from anomalib_cfa.bank.builders import k_means
from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.bank.search import SEARCH_KINDS


@pytest.fixture
def set_threads():
    """Sets OpenMP's number of threads, which FAISS and torch share where they share the library."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()

    def set_both(number):
        torch.set_num_threads(number)
        faiss.omp_set_num_threads(number)

    yield set_both
    torch.set_num_threads(before[1])
    faiss.omp_set_num_threads(before[0])


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_any_number_of_faiss_threads_finds_the_same_neighbours(set_threads, kind):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1500, 40, generator=generator)
    queries = torch.randn(1, 32, 32, 40, generator=generator)
    found = []
    for number in (1, 2, 5):
        set_threads(number)
        bank = MemoryBank(kind)
        bank.assign(centers)
        found.append(bank.nearest(queries, 6))
    for squared, indices in found[1:]:
        assert torch.equal(squared, found[0][0])
        assert torch.equal(indices, found[0][1])


def test_any_number_of_faiss_threads_gives_the_same_k_means(set_threads):
    points = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0))
    centers = []
    for number in (1, 2, 5):
        set_threads(number)
        centers.append(k_means(points, 100, seed=0)[0])
    assert torch.equal(centers[0], centers[1])
    assert torch.equal(centers[0], centers[2])


def outcome(root, folder, **arguments):
    """All that a fit leaves in the network, and its scores before normalization."""
    model = tiny_cfa(**arguments)
    datamodule = MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    Engine(default_root_dir=folder, max_epochs=2, **options).fit(model, datamodule=datamodule)
    network = model.model.eval()
    with torch.no_grad():
        paths = sorted((root / "tile" / "train").rglob("*.png"))
        predicted = network(model.pre_processor(torch.stack([read_image(path, as_tensor=True) for path in paths])))
    return {**network.state_dict(), "pred_score": predicted.pred_score, "anomaly_map": predicted.anomaly_map}


KINDS = [{}, {"bank": "mean", "search": "exact"}, {"bank": "ema"}]


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_the_same_seed_gives_the_same_model_and_scores(rendered_mvtec, tmp_path, arguments):
    expected, found = (outcome(rendered_mvtec, tmp_path, **arguments) for _ in range(2))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_another_number_of_threads_rounds_otherwise_and_no_more(rendered_mvtec, tmp_path, set_threads, arguments):
    set_threads(1)
    expected = outcome(rendered_mvtec, tmp_path, **arguments)
    set_threads(3)
    found = outcome(rendered_mvtec, tmp_path, **arguments)
    # In directions in which no training image varies, a tiny backbone's many, the weights are what rounding makes of
    # them: only images like those of the training are scored alike.
    del expected["descriptor.weight"], expected["descriptor.bias"]
    del expected["memory_bank.sources"]  # of two patches that are as near either may be named
    largest = {}
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max()
        largest[name] = float(difference / value.double().abs().max().clamp(min=1e-9))
    print({name: f"{value:.0e}" for name, value in largest.items() if value})
    assert max(largest.values()) < 1e-3, largest
