"""One process predicts for long, from several threads; models travel to other processes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from soak import count
from tiny import fit_to_noise, noise, tiny_cfa

from anomalib_cfa.bank.search import SEARCH_KINDS

THREADS = 4
PREDICTIONS = count(quick=400, soak=10_000)
SIZES = [(64, 64), (90, 70), (64, 64), (31, 200)]


@pytest.fixture(scope="module")
def model():
    return fit_to_noise(tiny_cfa())


@torch.no_grad()
def predict(model, image):
    """Score and map; here, where a spawned process finds it."""
    found = model(image)
    return found.pred_score, found.anomaly_map


def test_thousands_of_predictions_from_several_threads_give_the_same_answers_in_the_same_memory(model, resident_bytes):
    images = [noise(1, *size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = [predict(model, image) for image in images]

    def work(thread):
        wrong = 0
        for step in range(PREDICTIONS // THREADS):
            which = (thread + step) % len(images)
            wrong += not all(map(torch.equal, predict(model, images[which]), expected[which]))
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))  # allocators fill their pools
        before = resident_bytes()
        assert sum(pool.map(work, range(THREADS))) == 0
        grown = resident_bytes() - before
    assert grown < 16 * 2**20
    print(f"{PREDICTIONS} predictions from {THREADS} threads: {grown / 2**20:+.1f} MiB")


def test_threads_may_copy_and_pickle_a_model_that_predicts(model):
    image = noise(1, 64, 64)
    expected = predict(model, image)

    def work(thread):
        twin = copy.deepcopy(model) if thread % 2 else pickle.loads(pickle.dumps(model))
        return all(map(torch.equal, predict(twin, image), expected))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(count(quick=8, soak=200))))


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_the_first_searches_for_targets_may_come_from_several_threads(kind):
    bank = fit_to_noise(tiny_cfa(search=kind)).model.memory_bank
    queries = torch.rand(1, 8, 8, bank.centers.shape[1]).requires_grad_()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(count(quick=2, soak=50)):
            bank._index = None
            found = list(pool.map(lambda k: bank.nearest(queries, k), [6] * THREADS))
            for squared, indices in found[1:]:
                assert torch.equal(squared, found[0][0])
                assert torch.equal(indices, found[0][1])


def test_a_spawned_process_predicts_the_same(model):
    image = noise(2, 64, 64)
    with get_context("spawn").Pool(1) as pool:
        found = pool.apply(predict, (model, image))
    for ours, theirs in zip(found, predict(model, image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # another number of threads
