"""Models go to Hugging Face's form and back: the same function, and the same bits."""

import json
import shutil

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from helpers.hf import SHAPES, build, edit_config, save_checkpoint
from safetensors.torch import load_file, save_file

from torchtrain.catalog.llama import LLAMA_2_7B
from torchtrain.checkpoint.hf_folder import HFFolder, open_hf_folder
from torchtrain.checkpoint.storage import list_entries, read_index, read_tensors
from torchtrain.errors import UserError
from torchtrain.models.hf_config import to_shape
from torchtrain.tools import convert
from torchtrain.tools.hf_export import to_config

PROMPT = [1, 5, 900, 33, 12, 2000, 7]


def read_weights(step):
    metadata = read_index(step, [path.name for path in step.iterdir()])
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in list_entries(metadata).items()
    }
    read_tensors(step, metadata, tensors, dist.group.WORLD)
    return tensors


@torch.no_grad()
def continue_greedily(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_from_the_export(name, tmp_path, alone):
    from transformers import AutoModelForCausalLM

    model = build(SHAPES[name])
    step = save_checkpoint(tmp_path, name, model)
    convert.to_hf(str(step), tmp_path / "hf", shard_bytes=100_000)
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 2048, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    prompt = torch.tensor([PROMPT])
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)
    assert written.tolist() == continue_greedily(model, prompt, 64).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_every_bit_is_the_same(name, dtype, tmp_path, alone, capsys):
    step = save_checkpoint(tmp_path, name, build(SHAPES[name], dtype))
    convert.to_hf(str(step), tmp_path / "hf", shard_bytes=10**5)
    convert.from_hf(tmp_path / "hf", tmp_path / "back")
    before, after = read_weights(step), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert torch.equal(weight, after[key]), key
        assert weight.dtype == after[key].dtype == dtype
    printed = capsys.readouterr().out
    assert f'initial_load_path = "{tmp_path / "back"}"' in printed
    assert "[model]\nname = " in printed


def test_one_file_is_taken_with_the_config_beside_it(tmp_path, alone):
    step = save_checkpoint(tmp_path, "llama", build(SHAPES["llama"]))
    convert.to_hf(str(step), tmp_path / "hf")
    (tmp_path / "hf" / "other.safetensors").write_bytes(b"not of this model")
    convert.from_hf(tmp_path / "hf" / "model.safetensors", tmp_path / "back")
    before, after = read_weights(step), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        convert.from_hf(tmp_path / "hf" / "model.safetensors", tmp_path / "again")


def test_a_known_size_is_named_whatever_says_its_head_width(tmp_path):
    family, shape = to_shape(to_config(LLAMA_2_7B, 4096, "bfloat16"))
    assert shape.head_width == 128  # as config.json has it; the flavor leaves it to the division
    folder = HFFolder(tmp_path, family, shape, 4096, {})
    assert convert.describe_model(folder) == {"name": "llama2", "flavor": "7B"}


def test_weights_are_converted_to_the_type_asked_for(tmp_path, alone):
    model = build(SHAPES["llama"])
    step = save_checkpoint(tmp_path, "llama", model)
    convert.to_hf(str(step), tmp_path / "hf", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(tensors["lm_head.weight"], model.output.weight.detach().bfloat16())


@pytest.mark.slow
def test_the_tokenizer_comes_along(tmp_path, alone):
    from transformers import AutoTokenizer

    from torchtrain.config.plans import DEBUG_TOKENIZER
    from torchtrain.datasets.tokenizer import load_tokenizer

    step = save_checkpoint(tmp_path, "llama", build(SHAPES["llama"]))
    convert.to_hf(str(step), tmp_path / "hf")
    ours, theirs = load_tokenizer(DEBUG_TOKENIZER), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ["def f(x):\n    return x", " a  b\t", "", "Ünïcödé 漢字 🙂", "\n\n  \r\n"]:
        ids = ours.encode_batch([text])[0].tolist()
        assert theirs(text).input_ids == [ours.bos_id, *ids], text


def test_an_export_says_that_its_tokenizer_has_no_bos(tmp_path, alone):
    step = save_checkpoint(tmp_path, "llama", build(SHAPES["llama"]))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a text of few words"] * 9),
        model_prefix=str(tmp_path / "own"),
        minloglevel=2,
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=1,
    )
    convert.to_hf(str(step), tmp_path / "hf", tokenizer=str(tmp_path / "own.model"))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "hf" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (None, 1)
    described = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (described["bos_token"], described["add_bos_token"]) == (None, False)


def of_layer_one(folder, change):
    """Change the tensors of the only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
FAULTS = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config.json cut off": (lambda f: (f / "config.json").write_text('{"a'), "is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors file"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ".bin files, which hold code",
    ),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-64]
        ),
        "damaged, cut off",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("text"), "damaged, cut off"),
    "a file of the index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "is incomplete: model.safetensors.index.json names b",
    ),
    "a tensor missing": (lambda f: of_layer_one(f, lambda t: t.pop(Q_PROJ)), f"lacks {Q_PROJ}"),
    "a bias": (
        lambda f: of_layer_one(f, lambda t: t.update({"model.layers.0.b": torch.ones(2)})),
        "has, unknown here, model.layers.0.b",
    ),
    "another shape": (
        lambda f: of_layer_one(f, lambda t: t.update({Q_PROJ: torch.ones(2, 2)})),
        r"another shape or type .*q_proj.weight \[2, 2\] F32, not \[64, 64\]",
    ),
    "quantized": (
        lambda f: of_layer_one(f, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        "another shape or type .*I8",
    ),
    "window": (lambda f: edit_config(f, sliding_window=4096), "sliding_window = 4096"),
    "attention bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias = true"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), 'hidden_act = "gelu"'),
    "quantization": (lambda f: edit_config(f, quantization_config={}), "quantization_config"),
    "rope type": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "yarn", "factor": 2}),
        'rope type "yarn"',
    ),
    "architecture": (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHead"),
    "no norm's epsilon": (lambda f: edit_config(f, rms_norm_eps=None), "rms_norm_eps is missing"),
    "a text": (lambda f: edit_config(f, hidden_size="64"), 'hidden_size = "64" is not a'),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step = save_checkpoint(folder, "llama", build(SHAPES["llama"]))
        convert.to_hf(str(step), folder / "hf")
    finally:
        dist.destroy_process_group()
    return folder / "hf"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_folder_is_refused(fault, export, tmp_path, capsys):
    shutil.copytree(export, tmp_path / "hf")
    damage, message = FAULTS[fault]
    damage(tmp_path / "hf")
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    with pytest.raises(UserError, match=message):
        open_hf_folder(tmp_path / "hf").check()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_faults_of_the_command(export, tmp_path, capsys):
    for arguments, message in (
        (["to-hf", str(tmp_path / "no"), str(tmp_path / "out")], "there is no folder"),
        (["from-hf", str(tmp_path / "no"), str(tmp_path / "out")], "there is no "),
        (["from-hf", str(export), str(export.parent)], "not empty"),
        (["to-hf", str(export.parent / "step-7"), str(export)], "not empty"),
    ):
        assert convert.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_removed_by_the_next_to_the_same_folder(tmp_path):
    dead = "0123456789abcdef" * 2
    for name in (f".tmp-out-{dead}", f".tmp-out-2-{dead}", ".tmp-out-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with convert.new_folder(tmp_path / "out") as temporary:
        temporary.rename(tmp_path / "out")
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [f".tmp-out-2-{dead}", ".tmp-out-of-mine", "out"]


def test_a_model_that_hugging_face_lacks_is_refused(tmp_path, alone):
    from dataclasses import replace

    shape = replace(SHAPES["mixtral"], router_scores="sigmoid", n_shared_experts=1)
    step = save_checkpoint(tmp_path, "mixtral", build(shape))
    with pytest.raises(UserError, match=r"router_scores = 'sigmoid'.*n_shared_experts = 1"):
        convert.to_hf(str(step), tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-7"]


@pytest.mark.slow
def test_any_slice_is_that_of_the_whole_weight(tmp_path, alone):
    """Also where it begins or ends within a head, or among the experts."""
    for name in ("llama", "qwen3 moe"):
        model = build(SHAPES[name])
        step = save_checkpoint(tmp_path / name, name, model)
        convert.to_hf(str(step), tmp_path / name / "hf", shard_bytes=100_000)
        folder = open_hf_folder(tmp_path / name / "hf")
        for key, weight in model.named_parameters():
            for first in (0, 1, 3):
                box = [(min(first, size - 1), max(1, size // 2 - 1)) for size in weight.shape]
                part = weight.detach()
                for dim, (start, length) in enumerate(box):
                    part = part.narrow(dim, start, length)
                assert torch.equal(folder.read(key, box), part), (key, box)
