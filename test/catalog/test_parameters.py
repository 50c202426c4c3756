"""The names of parameters that the config check knows are those of the models."""

from dataclasses import replace

import pytest
import torch

from torchtrain.catalog.models import FAMILIES, Family
from torchtrain.catalog.parameters import list_parameters
from torchtrain.models.llama import Transformer

FLAVORS = [(name, flavor) for name, family in FAMILIES.items() for flavor in family.flavors]


@pytest.mark.parametrize(("name", "flavor"), FLAVORS)
@pytest.mark.parametrize("changes", [{}, {"n_dense_layers": 1, "n_shared_experts": 1}])
def test_every_flavor_has_the_names_of_its_model(name, flavor, changes):
    shape = FAMILIES[name].flavors[flavor]
    shape = replace(shape, n_layers=4, vocab_size=99, n_experts=min(shape.n_experts, 2), **changes)
    with torch.device("meta"):
        model = Transformer(shape)
    assert list_parameters(name, shape) == [name for name, _ in model.named_parameters()]


def test_the_names_of_a_users_model_are_not_known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", Family("somewhere:Model", {}))
    assert list_parameters("mine", FAMILIES["llama2"].flavors["7B"]) is None
