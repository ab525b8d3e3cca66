"""What DeepSpeed's ZeRO and FSDP1 leave of parameters, flat parts without matrices, is refused with a remedy."""

import pytest
import torch
from plain import model
from torch import nn

import steepest
from steepest.integrations import ByShape, TrainerFactory

REFUSED = r"cut into flat parts by {}, and muon needs matrices: shard with FSDP2 \(torch.distributed.fsdp.fully_shard\)"
MARKS = {"_fsdp_flattened": "FSDP1", "ds_id": "DeepSpeed's ZeRO", "_hp_mapping": "DeepSpeed's ZeRO"}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("shape", [(4096,), (0,), (16, 16)])
def test_marked_parts_are_refused_by_shape_and_by_name(mark, named, shape):
    part, bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(3))
    setattr(part, mark, True)
    params = [("layers.0.weight", part), ("layers.0.bias", bias)] if named else [part, bias]
    with pytest.raises(
        ValueError, match=("layers.0.weight" if named else "parameter 0") + ".*" + REFUSED.format(MARKS[mark])
    ):
        ByShape(params, lr=1e-3, name="muon")
    ByShape(params, lr=1e-3, name="lion")  # an elementwise rule may step parts


@pytest.mark.parametrize("make", [steepest.for_model, TrainerFactory()], ids=["for_model", "TrainerFactory"])
@pytest.mark.parametrize("mark", MARKS)
def test_marked_parts_are_refused_in_a_model(make, mark):
    net = model()
    net.head.weight = nn.Parameter(torch.zeros(1024))
    setattr(net.head.weight, mark, True)
    with pytest.raises(ValueError, match="head.weight.*" + REFUSED.format(MARKS[mark])):
        make(net, name="muon", lr=1e-3)


@pytest.mark.filterwarnings("ignore:ByShape. guessed by shape alone")
@pytest.mark.parametrize("by_shape", [True, False])
def test_parts_that_take_the_places_of_parameters_are_refused_at_the_next_step(by_shape):
    """As under ZeRO, which takes an optimizer of whole parameters and puts one flat part into each group."""
    net = model()
    optimizer = (
        ByShape(net.parameters(), lr=1e-3, name="muon") if by_shape else steepest.for_model(net, "muon", lr=1e-3)
    )
    for group in optimizer.param_groups:
        part = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        part.grad = torch.ones_like(part)
        group["params"] = [part]
    before = [group["params"][0].clone() for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=REFUSED.format("a library")):
        optimizer.step()
    assert all(torch.equal(group["params"][0], p) for group, p in zip(optimizer.param_groups, before, strict=True))


def test_vectors_alone_are_warned_of():
    flat = [nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.zeros(100))]
    with pytest.warns(UserWarning, match="no parameter goes to muon: there are vectors only; .* shard with FSDP2"):
        ByShape(flat, lr=1e-3, name="muon")
    ByShape(flat, lr=1e-3, name="adamw")  # which is meant for vectors, so it says nothing
