"""The protocol of models: what a user's own one must state, and that the engine takes it."""

import pytest
import torch
import torch.distributed as dist
from helpers.launching import options

import train
from torchtrain import ranks
from torchtrain.catalog import models as catalog
from torchtrain.catalog.models import FAMILIES, ModelShape, register_model
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.models.decoder import Decoder, load_decoder
from torchtrain.models.llama import Transformer
from torchtrain.run_facts import find_facts
from torchtrain.set_up import set_up

SHAPE = ModelShape(32, 3, 4, 2, 64, 50)

# A model without attention: each token sees itself alone. It has all that the protocol asks for.
USERS_FILE = """
import torch
from torch import nn

from torchtrain.catalog.models import ModelShape, register_model
from torchtrain.models.decoder import Decoder
from torchtrain.models.rotary import RotaryPositions


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.dim)
        self.up = nn.Linear(shape.dim, shape.ffn_hidden_dim, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_dim, shape.dim, bias=False)

    def forward(self, h):
        return h + self.down(self.up(self.norm(h)).relu())


class TokenByToken(Decoder):
    tensor_parallel_plan = {}

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.rope = RotaryPositions(shape)
        self.layers = nn.ModuleDict({str(n): Block(shape) for n in range(shape.n_layers)})
        self.norm = nn.RMSNorm(shape.dim)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.tie()

    def forward(self, tokens, documents=None):
        h = self.tok_embeddings(tokens)
        for block in self.layers.values():
            h = block(h)
        return self.output(self.norm(h))

    def initial_std(self, name):
        return None if name.endswith("norm.weight") else 0.125

    def flops_per_token(self, seq_len):
        return 4321.0


SMALL = ModelShape(32, 3, 1, 1, 64, 0)
register_model("token-by-token", {"small": SMALL}, "users_model:TokenByToken")
"""


@pytest.fixture
def device():
    yield ranks.join_process_group(60)
    dist.destroy_process_group()


@pytest.fixture
def families(monkeypatch):
    """The catalog's families, put back at the end."""
    kept = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(kept)


def test_a_users_model_is_trained_without_a_line_of_the_engine(
    tmp_path, data, device, families, monkeypatch
):
    (tmp_path / "users_model.py").write_text(USERS_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    given = {
        **data,
        "experimental.custom_import": tmp_path / "users_model.py",
        "model.name": "token-by-token",
        "model.flavor": "small",
        **dict.fromkeys(("model.dim", "model.n_layers", "model.n_heads", "model.n_kv_heads"), None),
        "model.ffn_hidden_dim": 48,
    }
    trainer = set_up(JobConfig().parse_args(options(given), world_size=1), device)
    blocks = 3 * (2 * 32 * 48 + 32)
    assert find_facts(trainer).parameters == 2 * 2048 * 32 + blocks + 32
    spread = trainer.weights["layers.2.up.weight"].detach().full_tensor().std().item()
    assert spread == pytest.approx(0.9866 * 0.125, rel=0.1)
    losses = []
    for step in range(1, 6):
        loss = train.forward_backward(trainer, trainer.loader.step_batches(step)).own
        train.optimizer_step(trainer)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert trainer.parts[0].flops_per_token(32) == 4321.0


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("torchtrain.models.llama:Absent", "cannot be imported"),
        ("torchtrain.no_such_module:Absent", "cannot be imported"),
        ("torchtrain.models.rotary:RotaryPositions", "is not a class derived from"),
        ("torchtrain.models.rotary:rotate", "is not a class derived from"),
    ],
)
def test_a_family_whose_class_is_not_a_model_is_refused(families, path, text):
    register_model("mine", {"small": SHAPE}, path)
    with pytest.raises(UserError, match=rf"model.name = 'mine' is registered as '{path}'.*{text}"):
        load_decoder("mine")


def test_every_family_of_the_catalog_has_its_class():
    for name in catalog.FAMILIES:
        assert issubclass(load_decoder(name), Decoder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_part_keeps_names_and_passes_the_rest_through(tied):
    shape = ModelShape(32, 3, 4, 2, 64, 50, tied_embeddings=tied)
    first, middle, last = Transformer(shape), Transformer(shape), Transformer(shape)
    first.keep(["tok_embeddings", "layers.0"])
    middle.keep(["layers.1"])
    last.keep(["layers.2", "norm", "output"])
    assert [list(part.layers) for part in (first, middle, last)] == [["0"], ["1"], ["2"]]
    ends = [(part.keeps("tok_embeddings"), part.keeps("output")) for part in (first, middle, last)]
    assert ends == [(True, False), (False, False), (False, True)]
    assert not any(part.has_both_ends_tied for part in (first, middle, last))
    assert Transformer(shape).has_both_ends_tied == tied
    names = [set(dict(part.named_parameters())) for part in (first, middle, last)]
    assert "layers.1.attention.wq.weight" in names[1]
    assert "output.weight" in names[2], "a stage has a tied output's weight of its own"
    h = torch.randn(1, 8, 32)
    layer = middle.layers["1"]
    torch.testing.assert_close(middle(h), layer(h, middle.rope(h)), rtol=0, atol=0)


def test_kernels_are_replaced_in_every_layer_of_a_part():
    model = Transformer(SHAPE)
    model.keep(["layers.1", "layers.2"])
    seen = []

    def replacement(kernel):
        seen.append(kernel)
        return torch.nn.Identity()

    before = [block.attention.inner_attention for block in model.layers.values()]
    model.replace_attention_kernels(replacement)
    assert seen == before
    kernels = [block.attention.inner_attention for block in model.layers.values()]
    assert all(type(kernel) is torch.nn.Identity for kernel in kernels)
