"""Document masking: packed documents train as each alone would; and packing by best fit."""

import numpy as np
import pytest
import torch
from helpers.launching import data_loader, options, write_corpus

from torchtrain.catalog.models import ModelShape
from torchtrain.config.schema import Data, Training
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import packing
from torchtrain.datasets.documents import split_documents
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.packing import best_fit, find_segments
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import ConfigError, UserError
from torchtrain.loss import sequence_losses
from torchtrain.models import document_masking
from torchtrain.models.llama import Transformer
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.emulated_bf16 import WidenedAttention

BOS, EOS, TEXT = 1, 2, 7
SCALED = {"rope_scaling_factor": 8.0, "rope_original_seq_len": 16}
LENGTHS = (9, 1, 14, 8)


def model_of(kv_heads=2, **shape):
    torch.manual_seed(0)
    model = Transformer(ModelShape(32, 2, 4, kv_heads, 64, 50, **shape))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def documents_of(lengths, rows=1):
    """[rows, sum of lengths]: where in its row each token's document begins."""
    places = np.cumsum([0, *lengths[:-1]])
    return torch.from_numpy(np.repeat(places, lengths)).repeat(rows, 1)


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss = sum(
        sequence_losses(model(tokens, documents), labels).sum()
        for tokens, labels, documents in batches
    )
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ({}, None),
        ({"kv_heads": 4}, None),
        ({"kv_heads": 1}, None),
        (SCALED, None),
        ({"tied_embeddings": True}, None),
        pytest.param(SCALED, "aot_eager", marks=pytest.mark.slow),
        pytest.param(SCALED, "inductor", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_have_the_loss_and_gradients_of_each_alone(shape, backend):
    tokens, labels = torch.randint(
        0, 50, (2, 2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)
    )
    labels[:, 3] = -100
    alone = [
        (t, ls, None)
        for t, ls in zip(tokens.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1), strict=True)
    ]
    expected, gradients = loss_and_gradients(model_of(**shape), alone)
    model = model_of(**shape)
    if backend:
        torch._dynamo.reset()
        apply_compile(model, backend)
    loss, packed = loss_and_gradients(model, [(tokens, labels, documents_of(LENGTHS, rows=2))])
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in packed.items():
        assert (gradient - gradients[name]).norm() <= 2e-6 * gradients[name].norm(), name
    if backend is None:  # it would be compiled once more
        unmasked, _ = loss_and_gradients(model, [(tokens, labels, None)])
        assert abs(unmasked - expected) > 1e-3 * expected, "the documents make no difference"


def test_logits_do_not_depend_on_what_stands_before():
    model, documents = model_of(), documents_of(LENGTHS)
    one, other = torch.randint(
        0, 50, (2, 1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)
    )
    other[:, 10:] = one[:, 10:]
    with torch.no_grad():
        assert torch.equal(model(one, documents)[:, 10:], model(other, documents)[:, 10:])
        assert not torch.equal(model(one)[:, 10:], model(other)[:, 10:])


def test_one_document_is_the_plain_model():
    model, tokens = model_of(), torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, documents_of((16,), 2)), model(tokens), rtol=1e-5, atol=1e-6
        )


def test_positions_restart_in_each_document():
    """No logit tells it, since only differences of positions count within a document."""
    rotary = RotaryPositions(ModelShape(32, 1, 4, 4, 64, 50))
    documents = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5], [0, 1, 1, 1, 1, 1, 6, 6]])
    restarted = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 0, 1]])
    assert torch.equal(rotary(torch.zeros_like(documents), documents), rotary.at(restarted))


@pytest.mark.slow
def test_the_mask_of_accelerators_is_the_cpus(monkeypatch):
    """FlexAttention has no backward on a CPU, but its forward and blocks are the same there."""
    monkeypatch.setattr(document_masking, "compiled", lambda function: function)
    cuts = (100, 30, 126)
    documents = torch.cat((documents_of(cuts), documents_of((256,))))
    q, k, v = torch.randn(2, 4, 256, 16), *torch.randn(2, 2, 2, 256, 16)
    expected = document_masking.attend_masked(
        q, k, v, document_masking.build_document_mask(documents)
    )

    class Elsewhere:
        """The documents as if on another kind of device."""

        shape, device = documents.shape, torch.device("meta")

        def __getitem__(self, index):
            return documents[index]

    def on_cpu(*args, device):
        return created(*args, device="cpu")

    created = document_masking.create_block_mask
    monkeypatch.setattr(document_masking, "create_block_mask", on_cpu)
    mask = document_masking.build_document_mask(Elsewhere())
    assert mask.shape == (2, 1, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(
            document_masking.attend_masked(q, k, v, mask), expected, rtol=1e-5, atol=1e-6
        )


def test_widened_bf16_attention_is_masked():
    q, k, v = (torch.randn(1, heads, 32, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = document_masking.build_document_mask(documents_of(LENGTHS))
    widened = WidenedAttention(
        Transformer(ModelShape(32, 1, 4, 2, 64, 50)).layers["0"].attention.inner_attention
    )
    exact = document_masking.attend_masked(q.float(), k.float(), v.float(), mask)
    assert torch.equal(widened(q, k, v, mask), exact.bfloat16())
    assert not torch.equal(widened(q, k, v), exact.bfloat16())


# ---- where documents begin ----


def split(row, bos=BOS, eos=EOS):
    sequence = np.array([row])
    tokens, labels = sequence[:, :-1].copy(), sequence[:, 1:].copy()
    return split_documents(tokens, labels, bos, eos)[0].tolist(), labels[0].tolist()


@pytest.mark.parametrize(
    ("row", "bos", "begins", "labels"),
    [
        ([7, 8, 2, 1, 7, 2, 1, 8], BOS, [0, 0, 0, 3, 3, 3, 6], [8, 2, -100, 7, 2, -100, 8]),
        ([1, 7, 2, 1], BOS, [0, 0, 0], [7, 2, -100]),  # the label alone is of the next document
        ([7, 8, 7], BOS, [0, 0], [8, 7]),
        (
            [1, 1, 7, 1],
            BOS,
            [0, 1, 1],
            [-100, 7, -100],
        ),  # nothing in the first, no end in the second
        (
            [7, 2, 2, 8, 9],
            EOS,
            [0, 1, 2, 2],
            [2, -100, 8, 9],
        ),  # one token for both, an end and a beginning
        ([7, 2, 8, 9], EOS, [0, 1, 1], [2, 8, 9]),  # one alone is both
        ([2, 8, 2, 2], EOS, [0, 0, 2], [8, 2, -100]),
        ([7, 8, 2, 7, 2, 8], None, [0, 0, 0, 3, 3], [8, 2, -100, 2, -100]),
        ([2, 7, 2, 2, 8], None, [0, 1, 1, 3], [-100, 2, -100, -100]),  # the rest of one, and a void
        ([7, 8, 1], None, [0, 0], [8, 1]),
    ],
)
def test_labels_and_beginnings_at_borders(row, bos, begins, labels):
    assert split(row, bos) == (begins, labels)


# ---- the loader ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """[training] and [data] of documents that are shorter than a sequence, but for two."""
    folder = tmp_path_factory.mktemp("documents")
    for number, path in enumerate(sorted(write_corpus(folder / "corpus", documents=60).iterdir())):
        path.write_text(path.read_text()[: 10 + 3 * number if number % 30 else 900])
    training = {"dataset": "text", "dataset_path": str(folder / "corpus"), "seq_len": 96}
    return training, {"cache_folder": str(folder / "cache")}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("torchtrain/datasets/debug_tokenizer.model")


def without_bos():
    """The same tokenizer, whose documents have no BOS."""
    tokenizer = load_tokenizer("torchtrain/datasets/debug_tokenizer.model")
    tokenizer.bos_id = None
    tokenizer.fingerprint = "without BOS"
    return tokenizer


def dataset_of(corpus, tokenizer, training=(), data=()):
    return build_dataset(
        Training(**corpus[0], **dict(training)),
        Data(**corpus[1], **dict(data)),
        tokenizer,
        0,
    )


def test_the_loader_says_where_documents_begin_and_else_changes_nothing(corpus, tokenizer):
    dataset = dataset_of(corpus, tokenizer)
    plain = data_loader(dataset, 8, 0, 1, 4).step_batches(1)
    masked = data_loader(dataset, 8, 0, 1, 4, (tokenizer.bos_id, tokenizer.eos_id)).step_batches(1)
    tokens, labels = dataset.read(np.arange(8))
    several = 0
    for number, (before, after) in enumerate(zip(plain, masked, strict=True)):
        rows = slice(4 * number, 4 * number + 4)
        assert before.documents is None
        assert np.array_equal(before.tokens, tokens[rows])
        assert np.array_equal(before.labels, labels[rows])
        assert torch.equal(before.tokens, after.tokens)
        assert before.sample_ids == after.sample_ids == list(range(rows.start, rows.stop))
        borders = before.labels == tokenizer.bos_id
        assert torch.equal(after.labels, before.labels.masked_fill(borders, -100))
        assert (after.documents[:, 1:] - after.documents[:, :-1] > 0).equal(borders[:, :-1])
        several += int(borders.sum())
    assert several > 8


def test_tokens_without_a_beginning_are_refused(tmp_path, tokenizer):
    np.full(1000, TEXT, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    source = (
        {"dataset": "tokens", "dataset_path": str(tmp_path / "ids.bin"), "seq_len": 8},
        {"cache_folder": str(tmp_path)},
    )
    assert dataset_of(source, tokenizer).n_samples == 124
    with pytest.raises(
        UserError, match=r"ids\.bin does not say where documents begin: it holds no BOS \(token 1 "
    ):
        dataset_of(source, tokenizer, {"document_masking": True})
    with pytest.raises(UserError, match="holds no BOS"):
        dataset_of(source, tokenizer, data={"packing": "best_fit"})
    with pytest.raises(
        UserError, match=r"say where documents end: .* no EOS \(token 2 .*EOS after each document"
    ):
        dataset_of(source, without_bos(), {"document_masking": True})


def test_the_ring_is_refused_and_ulysses_is_not():
    args = ["--training.document_masking", "--parallelism.context_parallel_degree=2"]
    with pytest.raises(
        ConfigError,
        match=r'document_masking = true with .* = 2: .*context_parallel_method = "ulysses"',
    ):
        JobConfig().parse_args([*options({}), *args], world_size=2)
    JobConfig().parse_args(
        [*options({}), *args, "--parallelism.context_parallel_method=ulysses"], world_size=2
    )


# ---- packing ----


def test_best_fit_takes_the_row_with_the_least_space_that_is_enough():
    # The longest first: 7 and 6 open rows with 3 and 4 left; 4 goes into the 4, 3 into the 3, 2
    # opens another.
    assert best_fit(np.array([2, 3, 7, 4, 6]), 10).tolist() == [2, 0, 0, 1, 1]
    # 3 is enough for the 3, though the second row has 4.
    assert best_fit(np.array([7, 6, 3]), 10).tolist() == [0, 1, 0]
    assert best_fit(np.array([10, 10]), 10).tolist() == [0, 1]
    assert best_fit(np.array([], dtype=np.int64), 10).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_no_row_overflows_and_few_are_needed(seed):
    lengths = np.random.default_rng(seed).integers(2, 65, 500)
    filled = np.bincount(best_fit(lengths, 64), weights=lengths)
    assert filled.max() <= 64
    assert (
        len(filled) <= 11 / 9 * -(-lengths.sum() // 64) + 1
    )  # best fit decreasing's bound, of the best there may be


@pytest.mark.parametrize("window", [1, 3, 10, 1000])
def test_pieces_are_documents_and_long_ones_are_cut_with_an_overlap(monkeypatch, window):
    monkeypatch.setattr(packing, "WINDOW", window)
    #                  0  1  2  3  4  5  6  7  8  9 10 11
    tokens = np.array([9, 2, 1, 7, 7, 7, 7, 7, 2, 1, 8, 2], dtype=np.uint16)
    pieces = np.concatenate(list(find_segments(tokens, 4, BOS, EOS)))
    assert pieces.tolist() == [[0, 2], [2, 5], [6, 3], [9, 3]]
    # A document of a BOS alone predicts nothing, at the end neither.
    empty = np.array([1, 1, 7, 2, 1], dtype=np.uint16)
    assert np.concatenate(list(find_segments(empty, 4, BOS, EOS))).tolist() == [[1, 3]]
    shared = np.array([2, 7, 2, 2, 8, 8, 2], dtype=np.uint16)
    assert np.concatenate(list(find_segments(shared, 8, EOS, EOS))).tolist() == [[0, 3], [3, 4]]
    ended = np.array([7, 8, 2, 2, 8, 2, 9], dtype=np.uint16)
    assert np.concatenate(list(find_segments(ended, 8, None, EOS))).tolist() == [[0, 3], [4, 2]]
    cut = np.array([7, 8, 8, 8, 2, 8, 2], dtype=np.uint16)
    assert np.concatenate(list(find_segments(cut, 2, None, EOS))).tolist() == [
        [0, 3],
        [2, 3],
        [5, 2],
    ]
    alone = np.array([2, 7, 2, 8, 8, 2, 9], dtype=np.uint16)
    assert np.concatenate(list(find_segments(alone, 8, EOS, EOS))).tolist() == [
        [0, 3],
        [2, 4],
        [5, 2],
    ]


def predictions(tokens, labels):
    """How often each pair of a token and its valid label comes."""
    valid = labels != -100
    pairs, counts = np.unique(np.stack((tokens[valid], labels[valid])), axis=1, return_counts=True)
    return pairs.tolist(), counts.tolist()


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("window", [200, 1 << 24])
def test_an_epoch_of_best_fit_predicts_every_token_of_every_document_once(
    corpus, tokenizer, monkeypatch, tmp_path, window, has_bos
):
    tokenizer = tokenizer if has_bos else without_bos()
    monkeypatch.setattr(packing, "WINDOW", window)
    corpus = (corpus[0], {"cache_folder": str(tmp_path)})
    dataset, cut = (
        dataset_of(corpus, tokenizer, data={"packing": "best_fit"}),
        dataset_of(corpus, tokenizer),
    )
    tokens, labels = dataset.read(np.arange(dataset.n_samples))
    assert tokens.shape == labels.shape == (dataset.n_samples, 96)
    whole = np.array(cut._tokens[:], dtype=np.int64)
    is_border = whole[1:] == tokenizer.bos_id if has_bos else whole[:-1] == tokenizer.eos_id
    expected = np.where(is_border, -100, whole[1:])
    assert predictions(tokens, labels) == predictions(whole[:-1], expected)
    # A sequence ends in the middle of a document only where that is longer than a sequence.
    ends_inside = (labels[:, -1] != -100) & (labels[:, -1] != tokenizer.eos_id)
    assert ends_inside.sum() <= sum(
        len(d) // 96 for d in np.split(whole, 1 + np.flatnonzero(is_border))
    )
    documents = split_documents(tokens, labels.copy(), tokenizer.bos_id, tokenizer.eos_id)
    padding = (labels[:, 1:] == -100) & (labels[:, :-1] == -100)
    assert padding.any()
    assert (documents[:, 1:] == np.arange(1, 96))[padding].all(), "padding sees a document"


def test_best_fit_is_another_order_and_is_remembered(corpus, tokenizer):
    best, again = (dataset_of(corpus, tokenizer, data={"packing": "best_fit"}) for _ in range(2))
    assert best.identity() != dataset_of(corpus, tokenizer).identity()
    assert best.identity() == again.identity()
    assert all(map(np.array_equal, best.read(np.arange(99)), again.read(np.arange(99))))
    assert "documents whole by best fit" in best.describe(10)
    changed = best.identity() | {"seq_len": 64}
    assert (
        changed
        != dataset_of(
            (corpus[0] | {"seq_len": 64}, corpus[1]), tokenizer, data={"packing": "best_fit"}
        ).identity()
    )


def test_masked_documents_without_bos_are_learned_as_those_with_it(corpus, tokenizer, tmp_path):
    """Each token in the context of its own document alone; only the first has none without BOS."""
    corpus = (corpus[0], {"cache_folder": str(tmp_path)})

    def contexts(of):
        dataset = dataset_of((corpus[0] | {"seq_len": 4096}, corpus[1]), of)
        tokens, labels = dataset.read(np.arange(dataset.n_samples))
        documents = split_documents(tokens, labels, of.bos_id, of.eos_id)
        found = []
        for row, column in zip(*np.nonzero(labels != -100), strict=True):
            context = tokens[row, documents[row, column] : column + 1].tolist()
            context = context[1:] if context[0] == BOS else context
            if context:
                found.append((context, int(labels[row, column])))
        return found

    # The last sequence, of another length, is dropped.
    both = [contexts(of) for of in (tokenizer, without_bos())]
    shorter = min(map(len, both))
    assert shorter > 1000
    assert both[0][:shorter] == both[1][:shorter]
