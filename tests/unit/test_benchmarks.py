"""The arms that `make bench` compares do the same work in other ways."""

import pytest
import torch

from benchmarks.arms import ARMS, DenseOffset
from benchmarks.worlds import make_world


def test_the_naive_offset_is_the_factored_one():
    torch.manual_seed(0)
    offset = DenseOffset(5, 3).double()
    for weight in offset.parameters():
        torch.nn.init.normal_(weight)
    left, right = offset.factors()
    torch.testing.assert_close(offset.delta(), left @ right)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("small", torch.device("cpu"), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_runs_and_leaves_the_base_alone(world, name):
    before = {key: value.clone() for key, value in world.model.unet.state_dict().items()}
    ARMS[name](world, 1)
    after = world.model.unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
