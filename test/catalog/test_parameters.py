"""The parameters that the config check knows are those of the models."""

from dataclasses import replace

import pytest
import torch

from torchtrain.catalog.models import FAMILIES, Family
from torchtrain.catalog.parameters import count_parameters, list_parameters, list_shapes
from torchtrain.models.llama import Transformer
from torchtrain.models.moe import SparseFeedForward

FLAVORS = [(name, flavor) for name, family in FAMILIES.items() for flavor in family.flavors]


@pytest.mark.parametrize(("name", "flavor"), FLAVORS)
@pytest.mark.parametrize("changes", [{}, {"n_dense_layers": 1, "n_shared_experts": 1}])
def test_every_flavor_has_the_names_of_its_model(name, flavor, changes):
    shape = FAMILIES[name].flavors[flavor]
    shape = replace(shape, n_layers=4, vocab_size=99, n_experts=min(shape.n_experts, 2), **changes)
    with torch.device("meta"):
        model = Transformer(shape)
    assert list_parameters(name, shape) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(("name", "flavor"), FLAVORS)
@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 2, "sparse_every": 2}])
def test_every_flavor_has_as_many_parameters_as_its_model(name, flavor, changes):
    """At full size; the changes make a difference where there are experts."""
    shape = replace(FAMILIES[name].flavors[flavor], **changes)
    if changes and not shape.n_experts:
        return
    shape = replace(shape, vocab_size=shape.vocab_size or 2000)
    with torch.device("meta"):
        model = Transformer(shape)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert list_shapes(shape) == shapes
    count = count_parameters(name, shape)
    assert count.total == sum(parameter.numel() for parameter in parameters.values())
    sparse = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    assert count.active == count.total - sum(module.idle_parameters for module in sparse)
    blocks = sum(parameter.numel() for parameter in model.layers.parameters())
    assert count.inner == blocks + shape.dim


def test_the_parameters_of_a_users_model_are_not_known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", Family("somewhere:Model", {}))
    shape = FAMILIES["llama2"].flavors["7B"]
    assert list_parameters("mine", shape) is None
    assert count_parameters("mine", shape) is None
