"""A run against a loop written out in plain PyTorch: what it trains, step by step.

Nothing of torchtrain computes what is expected here but the order of the samples, which
datasets/test_data_order.py tests: the model, its initial weights, the loss, the clipping, the
optimizer and the rates are written down again, in fp64. The corpus is a file of token ids with
short documents, so that sequences differ in their valid labels, and many labels are 0.
"""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.launching import metrics, options, write_corpus
from helpers.tokens import encode
from helpers.trained import validate
from torch.distributed.tensor import DTensor

import train
from torchtrain import ranks
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import NonFinite
from torchtrain.set_up import set_up

BOS, EOS, VOCABULARY = 1, 2, 2048
DIM, LAYERS, HEADS, KV_HEADS, WIDTH = 32, 2, 4, 2, 64
C = DIM // HEADS
SEQ_LEN, BATCH, STEPS = 32, 8, 3
LR, BETA1, BETA2, EPS, DECAY, MAX_NORM = 0.02, 0.8, 0.9, 1e-4, 0.5, 0.4
RATES = [LR, 0.55 * LR, 0.1 * LR]  # a warm-up of one step, then linearly to a tenth in two

GIVEN = {
    "model.rope_theta": 10_000,
    "model.rope_scaling_factor": 1,
    "model.norm_eps": 1e-5,
    "training.dataset": "tokens",
    "training.local_batch_size": 4,  # accumulates over two microbatches
    "training.global_batch_size": BATCH,
    "training.seq_len": SEQ_LEN,
    "training.steps": STEPS,
    "training.document_masking": True,
    "training.max_norm": MAX_NORM,
    "optimizer.lr": LR,
    "optimizer.beta1": BETA1,
    "optimizer.beta2": BETA2,
    "optimizer.eps": EPS,
    "optimizer.weight_decay": DECAY,
    "lr_scheduler.warmup_steps": 1,
    "metrics.log_freq": 1,
}


@pytest.fixture(scope="module")
def device():
    yield ranks.join_process_group(60)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def given(tmp_path_factory, data):
    """GIVEN, with a file of token ids: documents of 4 to 40 tokens, of which a quarter are 0."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    ids = []
    while len(ids) < 2000:
        words = rng.integers(3, VOCABULARY, rng.integers(2, 39))
        words[rng.random(len(words)) < 0.25] = 0
        ids += [BOS, *words.tolist(), EOS]
    np.array(ids, dtype=np.uint16).tofile(folder / "ids.bin")
    return {**data, **GIVEN, "training.dataset_path": folder / "ids.bin"}


def config_of(given):
    return JobConfig().parse_args(options(given), world_size=1)


# ---- by hand ----


def shapes_and_deviations(tied):
    """Each parameter's shape and the deviation of its initial values, None for ones."""
    table = {
        "tok_embeddings.weight": ((VOCABULARY, DIM), 0.02 if tied else 1.0),
        "norm.weight": ((DIM,), None),
    }
    if not tied:
        table["output.weight"] = ((VOCABULARY, DIM), 1 / math.sqrt(DIM))
    for layer in range(LAYERS):
        residual = 0.02 / math.sqrt(2 * (layer + 1))
        table |= {
            f"layers.{layer}.attention.wq.weight": ((DIM, DIM), 0.02),
            f"layers.{layer}.attention.wk.weight": ((KV_HEADS * C, DIM), 0.02),
            f"layers.{layer}.attention.wv.weight": ((KV_HEADS * C, DIM), 0.02),
            f"layers.{layer}.attention.wo.weight": ((DIM, DIM), residual),
            f"layers.{layer}.feed_forward.w1.weight": ((WIDTH, DIM), 0.02),
            f"layers.{layer}.feed_forward.w2.weight": ((DIM, WIDTH), residual),
            f"layers.{layer}.feed_forward.w3.weight": ((WIDTH, DIM), 0.02),
            f"layers.{layer}.attention_norm.weight": ((DIM,), None),
            f"layers.{layer}.ffn_norm.weight": ((DIM,), None),
        }
    return table


def initial_weights(seed, tied=False):
    """Each parameter drawn whole, in fp32, from a generator seeded by (seed, its name)."""
    weights = {}
    for name, (shape, deviation) in shapes_and_deviations(tied).items():
        weights[name] = torch.ones(shape)
        if deviation is not None:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
            limit = 3 * deviation
            torch.nn.init.trunc_normal_(
                weights[name], 0.0, deviation, -limit, limit, generator=generator
            )
    return weights


def normalize(h, weight):
    return h / (h.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x, positions):
    """x [B, S, heads, C] with each pair of neighbors turned by position · 10,000^(-2j/C)."""
    frequencies = 10_000.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(2)  # [B, S, 1, C/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (
        even * angles.cos() - odd * angles.sin(),
        even * angles.sin() + odd * angles.cos(),
    )
    return torch.stack(turned, dim=-1).flatten(-2)


def logits_of(weights, tokens):
    """tokens [B, S] to logits [B, S, V]: a Llama whose documents, each begun by BOS, are apart."""
    index = torch.arange(tokens.shape[1])
    starts = torch.where(tokens == BOS, index, 0).cummax(dim=1).values
    visible = (starts.unsqueeze(2) == starts.unsqueeze(1)) & (index.unsqueeze(1) >= index)
    h = weights["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = normalize(h, own["attention_norm"])
        q = rotate((x @ own["attention.wq"].T).unflatten(-1, (HEADS, C)), index - starts)
        k = rotate((x @ own["attention.wk"].T).unflatten(-1, (KV_HEADS, C)), index - starts)
        v = (x @ own["attention.wv"].T).unflatten(-1, (KV_HEADS, C))
        mixed = torch.empty_like(q)
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(C)
            shares = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
            mixed[:, :, head] = shares @ v[:, :, shared]
        h = h + mixed.flatten(2) @ own["attention.wo"].T
        x = normalize(h, own["ffn_norm"])
        gate = x @ own["feed_forward.w1"].T
        value = x @ own["feed_forward.w3"].T
        h = h + (gate * gate.sigmoid() * value) @ own["feed_forward.w2"].T
    output = weights.get("output.weight", weights["tok_embeddings.weight"])
    return normalize(h, weights["norm.weight"]) @ output.T


def token_losses(weights, tokens, labels):
    """The cross-entropy of each label, and which labels are valid: all but a document's BOS."""
    log_probabilities = logits_of(weights, tokens).log_softmax(dim=-1)
    losses = -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    valid = labels != BOS
    return losses * valid, valid


def train_by_hand(name, batches):
    """Three steps of Adam or AdamW in fp64: the weights after them, and what each step saw."""
    weights = {key: weight.double() for key, weight in initial_weights(seed=0).items()}
    mean = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    square = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    seen = []
    for step, ((tokens, labels), rate) in enumerate(zip(batches, RATES, strict=True), start=1):
        leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
        losses, valid = token_losses(leaves, tokens, labels)
        loss = losses.sum() / valid.sum()
        loss.backward()
        norm = math.sqrt(sum(leaf.grad.square().sum().item() for leaf in leaves.values()))
        by_sequence = losses.sum(dim=1) / valid.sum(dim=1)
        seen.append((loss.item(), by_sequence.max().item(), norm))
        for key, leaf in leaves.items():
            gradient = leaf.grad * min(1.0, MAX_NORM / (norm + 1e-6))
            decay = 0.0 if key.endswith("norm.weight") else DECAY
            if name == "Adam":
                gradient = gradient + decay * weights[key]
            else:
                weights[key] = weights[key] - rate * decay * weights[key]
            mean[key] = BETA1 * mean[key] + (1 - BETA1) * gradient
            square[key] = BETA2 * square[key] + (1 - BETA2) * gradient**2
            unbiased_mean = mean[key] / (1 - BETA1**step)
            unbiased_square = square[key] / (1 - BETA2**step)
            weights[key] = weights[key] - rate * unbiased_mean / (unbiased_square.sqrt() + EPS)
    return weights, seen


def batches_of(config):
    """Tokens and labels [B, S] of each step, whole."""
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    dataset = build_dataset(config.training, config.data, tokenizer, config.debug.seed)
    batches = []
    for step in range(STEPS):
        tokens, labels = dataset.read(np.arange(step * BATCH, (step + 1) * BATCH))
        batches.append((torch.from_numpy(tokens).long(), torch.from_numpy(labels).long()))
    return batches


# ---- the run ----


@pytest.fixture
def run(tmp_path, given, device, monkeypatch):
    """run(**overrides): a whole run; returns its trainer and its logged lines."""

    def run_once(**overrides):
        config = config_of({**given, "job.dump_folder": tmp_path, **overrides})
        trainer = set_up(config, device)
        monkeypatch.setattr(train, "set_up", lambda *_: trainer)
        outcome = SimpleNamespace(trainer=trainer, config=config, fault=None)
        try:
            train.run(config, device)
        except NonFinite as fault:
            outcome.fault = fault
        outcome.lines = metrics(tmp_path)
        return outcome

    return run_once


def whole(trainer):
    return {name: weight.detach().full_tensor() for name, weight in trainer.weights.items()}


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_three_steps_are_those_by_hand(run, name):
    outcome = run(**{"optimizer.name": name})
    batches = batches_of(outcome.config)
    weights, seen = train_by_hand(name, batches)
    counts = [(labels != BOS).sum(dim=1) for _, labels in batches]
    assert all(len(count.unique()) > 1 for count in counts), "all sequences have as many labels"
    assert all((labels == 0).any() for _, labels in batches)
    norms = [norm for _, _, norm in seen]
    assert min(norms) > 1.2 * MAX_NORM, "gradients are not clipped"
    for line, rate, (loss, max_loss, norm) in zip(outcome.lines, RATES, seen, strict=True):
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["max_loss"] == pytest.approx(max_loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert [line["tokens_seen"] for line in outcome.lines] == [256, 512, 768]
    start = initial_weights(seed=0)
    found = whole(outcome.trainer)
    assert found.keys() == weights.keys()
    for key, expected in weights.items():
        moved = (expected - start[key]).norm()
        assert (found[key] - expected).norm() <= 1e-3 * moved, key


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("seed", [0, 7])
def test_initial_weights_are_those_by_hand(given, device, seed, tied):
    overrides = {"debug.seed": seed, "model.tied_embeddings": tied}
    found = whole(set_up(config_of({**given, **overrides}), device))
    expected = initial_weights(seed, tied)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    # Cut off at three deviations, a normal distribution has 0.9866 of its deviation.
    for name, (_, deviation) in shapes_and_deviations(tied).items():
        if deviation is None:
            assert (found[name] == 1).all()
        else:
            spread = 1 / math.sqrt(found[name].numel())
            assert found[name].std().item() == pytest.approx(0.9866 * deviation, rel=4 * spread)
            assert abs(found[name].mean().item()) < 5 * deviation * spread
            assert found[name].abs().max() <= 3 * deviation
    first, second = (f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w3"))
    assert not torch.equal(found[first], found[second]), "parameters of one shape are equal"


def test_weights_are_drawn_in_fp32_and_then_cast(given, device):
    trainer = set_up(config_of({**given, "training.dtype": "bfloat16"}), device)
    for name, weight in initial_weights(seed=0).items():
        assert torch.equal(trainer.weights[name].detach().full_tensor(), weight.bfloat16()), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    run, monkeypatch, where, value
):
    forward_backward = train.forward_backward

    def faulty(trainer, microbatches):
        loss = forward_backward(trainer, microbatches)
        if trainer.step == 1:
            gradient = trainer.weights["layers.1.attention.wo.weight"].grad
            if where == "gradient":
                gradient.to_local()[3, 5] = value
            else:
                loss = loss._replace(own=loss.own * value)
        return loss

    reference = run(**{"training.steps": 1, "lr_scheduler.total_steps": STEPS})
    monkeypatch.setattr(train, "forward_backward", faulty)
    outcome = run()
    assert "step 2" in str(outcome.fault)
    assert "global samples 8 to 15" in str(outcome.fault)
    assert [line["step"] for line in outcome.lines] == [1]
    expected = whole(reference.trainer)
    for name, weight in whole(outcome.trainer).items():
        assert torch.equal(weight, expected[name]), name


# ---- validation ----


@pytest.mark.parametrize("masking", [True, False], ids=["documents apart", "documents joined"])
def test_what_validation_computes(given, data, device, tmp_path, masking):
    """Loss and bits per byte of three short texts, joined and cut into sequences."""
    folder = write_corpus(tmp_path / "texts", documents=3, seed=3)
    texts = []
    for file in sorted(folder.iterdir()):
        texts.append(file.read_text()[:90])
        file.write_text(texts[-1])
    overrides = {
        "training.document_masking": masking,
        "validation.enable": True,
        "validation.dataset": "text",
        "validation.dataset_path": folder,
        "validation.local_batch_size": 2,
    }
    trainer = set_up(config_of({**given, **overrides}), device)
    found = validate(trainer)
    parameters = [weight for part in trainer.parts.values() for weight in part.parameters()]
    assert all(isinstance(weight, DTensor) for weight in parameters), "weights stay gathered"

    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    ids = []
    for text in texts:
        ids += [BOS, *encode(tokenizer, text), EOS]
    weights = {name: weight.double() for name, weight in whole(trainer).items()}
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, SEQ_LEN):
        tokens = torch.tensor([ids[start : start + SEQ_LEN]])
        labels = torch.tensor([ids[start + 1 : start + SEQ_LEN + 1]])
        tokens = tokens[:, : labels.shape[1]]
        if masking:
            losses, valid = token_losses(weights, tokens, labels)
            total += losses.sum().item()
            count += int(valid.sum())
        else:
            logits = trainer.parts[0](tokens).detach().double()
            total += F.cross_entropy(logits[0], labels[0], reduction="sum").item()
            count += labels.numel()
    size = sum(len(text.encode()) for text in texts)
    assert count == len(ids) - 1 - (2 if masking else 0)
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)
