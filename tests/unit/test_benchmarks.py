"""The variants that `make bench` compares run, and leave the base unchanged."""

import pytest
import torch

from benchmarks.variants import VARIANTS, DenseOffset
from benchmarks.workload import make_workload


def test_the_naive_offset_is_the_factored_one():
    torch.manual_seed(0)
    offset = DenseOffset(5, 3).double()
    for weight in offset.parameters():
        torch.nn.init.normal_(weight)
    left, right = offset.factors()
    torch.testing.assert_close(offset.delta(), left @ right)


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    return make_workload("small", torch.device("cpu"), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_and_leaves_the_base_alone(workload, name):
    before = {key: value.clone() for key, value in workload.model.unet.state_dict().items()}
    VARIANTS[name](workload, 1)
    after = workload.model.unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
