"""The user's own file adds names that the config then knows, checked like all others."""

import pytest
from helpers.configs import parse, report

from torchtrain.catalog.datasets import DATASETS
from torchtrain.catalog.models import FAMILIES, find_family
from torchtrain.catalog.optimizers import OPTIMIZERS, find_optimizer, register_optimizer
from torchtrain.config.plans import plan_run
from torchtrain.errors import UserError

MINE = """
from torchtrain.catalog.datasets import register_corpus
from torchtrain.catalog.models import ModelShape, register_model
from torchtrain.catalog.optimizers import register_optimizer

SHAPE = ModelShape(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden_dim=64, vocab_size=0
)
register_model("mine", {"tiny": SHAPE}, "my_models:Mine")
register_model("llama3", {"tiny": SHAPE}, "torchtrain.models.llama:Transformer")
register_optimizer("Lion", "my_optimizers:build_lion")


@register_corpus("numbers", "whole numbers in words")
def numbers(path):
    return ["one two three"]
"""


@pytest.fixture(autouse=True)
def _tables(monkeypatch, tmp_path):
    """A folder of its own for the test; the tables are put back after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tables = [FAMILIES, OPTIMIZERS, DATASETS]
    before = [dict(table) for table in tables]
    flavors = {name: dict(family.flavors) for name, family in FAMILIES.items()}
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name, family in FAMILIES.items():
        family.flavors.clear()
        family.flavors.update(flavors[name])


def config_text(file, **options):
    lines = [f'{key} = "{value}"' for key, value in options.items()]
    return f'[experimental]\ncustom_import = "{file}"\n[model]\n' + "\n".join(lines)


def test_a_users_model_optimizer_and_dataset_are_known(tmp_path):
    (tmp_path / "mine_all.py").write_text(MINE)
    text = config_text("mine_all.py", name="mine", flavor="tiny")
    config = parse(text, "--optimizer.name=Lion", "--training.dataset=numbers")
    plan = plan_run(config, 1)
    assert find_family(config.model.name).model == "my_models:Mine"
    assert (plan.shape.dim, plan.shape.n_kv_heads) == (32, 1)
    assert find_optimizer(config.optimizer.name) == "my_optimizers:build_lion"
    text = config_text("mine_all.py", name="llama3", flavor="tiny")
    assert plan_run(parse(text), 1).shape.dim == 32


def test_a_users_names_are_in_the_messages_and_checked_like_all(tmp_path):
    (tmp_path / "mine_messages.py").write_text(MINE)
    name = "mine_messages.py"
    said = report(config_text(name, name="mine", flavor="tini"), "--optimizer.name=Lino")
    assert "model.flavor = 'tini' is unknown; allowed: tiny. Did you mean 'tiny'?" in said
    assert "allowed: AdamW, Adam, Muon, Lion, and what" in said
    assert "did you mean Lion?" in said
    said = report(config_text(name, name="nime", flavor="tiny"))
    assert "model.name = 'nime' is unknown; allowed: llama2, llama3, mixtral, qwen3, mine" in said
    tensor_parallel = "--parallelism.tensor_parallel_degree=2"
    said = report(config_text(name, name="mine", flavor="tiny"), tensor_parallel, world_size=2)
    assert "tensor_parallel_degree = 2 must divide model.n_kv_heads = 1" in said


def test_without_the_file_no_name_is_judged(tmp_path):
    said = report(
        config_text("gone.py", name="mine", flavor="tiny"),
        "--optimizer.name=Lion",
        "--training.dataset=numbers",
    )
    assert said.count("\n") == 1
    assert "custom_import = 'gone.py': there is no such file (looked from " in said
    (tmp_path / "broken.py").write_text("import torchtrain\n\nundefined\n")
    said = report(config_text("broken.py", name="mine", flavor="tiny"))
    assert said.count("\n") == 1
    assert f"custom_import = 'broken.py': {tmp_path / 'broken.py'}:3: NameError" in said


def test_an_optimizers_name_is_taken_once():
    register_optimizer("Mine", "my_optimizers:build")
    register_optimizer("Mine", "my_optimizers:build")
    with pytest.raises(UserError, match="this optimizer exists already"):
        register_optimizer("Mine", "my_optimizers:build_another")
    with pytest.raises(UserError, match="this optimizer exists already"):
        register_optimizer("AdamW", "my_optimizers:build")
    assert OPTIMIZERS["AdamW"] == "torchtrain.optimizers.adam:build_adamw"
