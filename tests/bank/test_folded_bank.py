import copy
import pickle

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.bank.folded_bank import FoldedBank, SmallestSoFar
from anomalib_cfa.descriptor import PatchDescriptor
from anomalib_cfa.torch_model import CfaModel


@settings(max_examples=50)
@given(
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    width=st.integers(1, 30),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    halved=st.booleans(),
    count=st.integers(1, 700),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_finds_and_measures_as_the_plain_formula(channels, width, size, batch, halved, count, seed, data):
    generator = torch.Generator().manual_seed(seed)
    descriptor = PatchDescriptor(channels, width, seed)
    descriptor.feature_mean.copy_(torch.randn(sum(channels), generator=generator))
    descriptor.feature_scale.fill_(0.7)
    pyramid = [
        torch.randn(batch, number, *(max(side >> level * halved, 1) for side in size), generator=generator)
        for level, number in enumerate(channels)
    ]
    centers = 5 + torch.randn(count, width, generator=generator)
    k = data.draw(st.integers(1, min(count, 4)))

    squared, indices = FoldedBank(descriptor, centers).nearest(pyramid, k)

    weight, bias = (parameter.detach().double() for parameter in descriptor.parameters())
    means = descriptor.feature_mean.double().split(channels)
    features = [0.7 * (level.double() - mean[:, None, None]) for level, mean in zip(pyramid, means, strict=True)]
    described = plain.describe(features, weight, bias)
    expected = plain.squared_distances(described, centers.double(), k)
    torch.testing.assert_close(squared.double(), expected, rtol=1e-4, atol=1e-5)
    measured = (described[..., None, :] - centers[indices].double()).square().sum(dim=-1)
    torch.testing.assert_close(squared.double(), measured, rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == k for row in indices.flatten(0, 2).tolist())


def test_is_single_precision_under_autocast():
    descriptor = PatchDescriptor([4, 8], 12)
    pyramid = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
    centers = torch.rand(20, 12)
    expected = FoldedBank(descriptor, centers).nearest(pyramid, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = FoldedBank(descriptor, centers).nearest(pyramid, 2)
    assert torch.equal(found[0], expected[0])


def built() -> CfaModel:
    model = CfaModel("test_resnet", pre_trained=False, sigma=1.0, seed=0).eval()
    model.assign_bank(torch.rand(40, model.descriptor.width, generator=torch.Generator().manual_seed(0)))
    return model


def train(model: CfaModel) -> None:
    model.train()
    model.descriptor.weight.data.mul_(2)  # which leaves no other trace
    model.eval()


@torch.no_grad()
def step(model: CfaModel) -> None:
    model.descriptor.bias += 1


def load(model: CfaModel) -> None:
    state = model.state_dict()
    model.load_state_dict(state | {"memory_bank.centers": state["memory_bank.centers"] + 1})


def rebuild(model: CfaModel) -> None:
    model.assign_bank(torch.ones(40, model.descriptor.width))


@pytest.mark.parametrize("change", [train, step, load, rebuild])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_is_noticed(change, mode):
    model, images = built(), torch.rand(1, 3, 64, 64)
    with mode():
        before = model(images).anomaly_map
    change(model)
    with mode():
        after = model(images).anomaly_map
        afresh = copy.deepcopy(model)(images).anomaly_map
    assert not torch.equal(after, before)
    assert torch.equal(after, afresh)


def test_is_made_once_and_neither_pickled_nor_copied(monkeypatch):
    made = []
    monkeypatch.setattr("anomalib_cfa.torch_model.FoldedBank", lambda *parts: made.append(parts) or FoldedBank(*parts))
    model, images = built(), torch.rand(1, 3, 64, 64)
    for _ in range(3):
        model.eval()
        model(images)
    assert len(made) == 1
    assert model._folded_bank is not None
    assert pickle.loads(pickle.dumps(model))._folded_bank is None
    assert copy.deepcopy(model)._folded_bank is None


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_smallest_values_of_all_blocks(device):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 70, generator=generator)
    values[3] = torch.nan
    smallest = SmallestSoFar(50, 5, torch.device("cpu"))
    if device == "other":  # the way of accelerators
        smallest._heaps = None
        smallest._values, smallest._columns = torch.full((50, 5), torch.inf), torch.zeros(50, 5, dtype=torch.int64)
    for block in values.split([1, 3, 40, 26], dim=1):
        smallest.add(block.contiguous())
    columns = smallest.columns()
    assert (columns >= 0).all()
    finite = torch.arange(50) != 3
    found = values.gather(1, columns)[finite].sort().values
    assert torch.equal(found, values[finite].topk(5, largest=False).values.sort().values)
