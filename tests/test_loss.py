import plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.loss import CfaLoss


@settings(max_examples=60)
@given(
    k=st.integers(1, 4),
    j=st.integers(1, 4),
    extra=st.integers(0, 3),
    radius=st.floats(0, 2),
    alpha=st.floats(0, 0.5),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(k, j, extra, radius, alpha, seed):
    found = k + j + extra  # the search may find more than there are targets
    squared = torch.rand(7, found, generator=torch.Generator().manual_seed(seed)).sort(dim=-1).values
    r = torch.tensor(radius, requires_grad=True)
    attraction, repulsion = CfaLoss(k, j, alpha)(squared, r)
    expected = plain.loss(squared.double(), torch.tensor(radius).double(), k, j, alpha, 1e-3)
    torch.testing.assert_close((attraction + repulsion).double(), expected, rtol=1e-4, atol=1e-2)


def test_repulsion_acts_once_the_squared_radius_exceeds_alpha():
    squared = torch.zeros(5, 6, requires_grad=True)
    loss = CfaLoss(3, 3, alpha=0.1)
    _, asleep = loss(squared, torch.tensor(0.31))
    assert asleep == 0
    _, awake = loss(squared, torch.tensor(0.4))
    awake.backward()
    assert awake > 0
    assert (squared.grad[:, :3] == 0).all()
    assert (squared.grad[:, 3:] < 0).all()


def test_attraction_pulls_on_the_nearest_only_and_grows_the_radius():
    squared = torch.tensor([[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]], requires_grad=True)
    radius = torch.tensor(0.1, requires_grad=True)
    attraction, repulsion = CfaLoss(3, 3)(squared, radius)
    (attraction + repulsion).backward()
    assert (squared.grad[0, :3] > 0).all()
    assert (squared.grad[0, 3:] == 0).all()
    assert radius.grad < 0


def test_no_hard_negatives_means_no_repulsion():
    _, repulsion = CfaLoss(3, 0)(torch.rand(4, 3), torch.tensor(5.0))
    assert repulsion == 0
