"""The kernels of attention that only a GPU has, against attention written out in fp64."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtrain.kernel_checks import find_device_facts
from torchtrain.models.attention import CausalAttention
from torchtrain.models.document_masking import attend_masked, build_document_mask
from torchtrain.parallelisms import ring_attention
from torchtrain.parallelisms.context_parallel import shard_sequence
from torchtrain.parallelisms.ring_attention import AttendAroundRing, Ring

# Relative to fp64, over whole tensors. fp32 keeps 24 bits: 5e-7 on a CPU. bf16 keeps 8, and scores,
# probabilities and results are each rounded to half a unit in the last place, 2^-9: up to 6e-3.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def draw(device, dtype, shape, seed=0):
    """Return q [B, H, S, C], k and v [B, K, S, C], and the gradient of the result.

    They are laid out as the model's are: positions before heads.
    """
    if dtype == torch.bfloat16 and not find_device_facts(device).has_bf16:
        pytest.skip("this device does not compute in bf16")
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, count, width, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def attend_exactly(q, k, v, sees):
    """Attention written out in fp64; `sees` is [S, S] or [B, 1, S, S]."""
    q, k, v = (x.double() for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v


def result_and_gradients(attend, q, k, v, grad):
    """Return the result of attend(q, k, v), and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def distances(found, expected):
    """Return ‖found − expected‖ / ‖expected‖ of the result and of each gradient."""
    names = ("result", "gradient of q", "gradient of k", "gradient of v")
    return {
        name: ((mine.double() - theirs).norm() / theirs.norm()).item()
        for name, mine, theirs in zip(names, found, expected, strict=True)
    }


def causal(length, device):
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def assert_close(found, expected, dtype):
    """Check the distances, and return the largest as text."""
    off = distances(found, expected)
    assert {name: error for name, error in off.items() if not error <= LIMITS[dtype]} == {}
    return f"{max(off.values()):.1e}"


# ---- cuDNN's attention against flash attention ----

BACKENDS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION},
}


def time_passes(action, device, count=10):
    """Return the milliseconds of a forward and backward, the mean of ten after three."""
    for number in range(3 + count):
        if number == 3:
            synchronize(device)
            started = time.perf_counter()
        action()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started) / count


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


@pytest.mark.parametrize(("kv_heads", "width"), [(16, 64), (4, 128)])
def test_flash_and_cudnn_attention_are_right(device, record_property, kv_heads, width):
    length = 128 if device.type == "cpu" else 2048
    *inputs, grad = draw(device, torch.bfloat16, (2, 16, kv_heads, length, width))
    is_grouped = kv_heads != 16

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)

    expected = result_and_gradients(
        lambda q, k, v: attend_exactly(q, k, v, causal(length, device)), *inputs, grad
    )
    by_default = result_and_gradients(attend, *inputs, grad)
    record_property("default", assert_close(by_default, expected, torch.bfloat16))
    found = 0
    for name, backend in BACKENDS[device.type].items():
        with sdpa_kernel(backend):
            try:
                results = result_and_gradients(attend, *inputs, grad)
            except RuntimeError as fault:  # this card, build or shape has none
                record_property(name, f"has none ({str(fault).splitlines()[0]})")
                continue
            error = assert_close(results, expected, torch.bfloat16)
            ms = time_passes(lambda: result_and_gradients(attend, *inputs, grad), device)
        is_default = torch.equal(results[0], by_default[0])
        record_property(name, f"{error}, {ms:.2f} ms{' (the default)' if is_default else ''}")
        found += 1
    assert found > 0, "attention would keep all S x S scores"


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_plain_attention_in_fp32_keeps_no_scores(device, record_property, kv_heads):
    *inputs, grad = draw(device, torch.float32, (2, 8, kv_heads, 160, 64))
    expected = result_and_gradients(
        lambda q, k, v: attend_exactly(q, k, v, causal(160, device)), *inputs, grad
    )
    fused = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}
    with sdpa_kernel(fused[device.type]):  # and no other: without a kernel it would be an error
        found = result_and_gradients(CausalAttention(), *inputs, grad)
    record_property("worst", assert_close(found, expected, torch.float32))


# ---- FlexAttention against the CPU's mask ----


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 320), (torch.bfloat16, 512)], ids=str
)
def test_document_masking_is_the_cpus_in_both_directions(device, record_property, dtype, length):
    *inputs, grad = draw(device, dtype, (2, 8, 4, length, 64))
    cuts = (100, 30, 1, length - 131)
    begins = torch.tensor([0, 100, 130, 131]).repeat_interleave(torch.tensor(cuts))
    documents = torch.stack((begins, torch.zeros_like(begins)))  # [B, S]
    sees = build_document_mask(documents).to(device)
    mask = build_document_mask(documents.to(device))
    assert isinstance(mask, torch.Tensor) == (device.type == "cpu")
    expected = result_and_gradients(lambda q, k, v: attend_exactly(q, k, v, sees), *inputs, grad)
    found = result_and_gradients(lambda q, k, v: attend_masked(q, k, v, mask), *inputs, grad)
    record_property("worst", assert_close(found, expected, dtype))


# ---- the ring's kernels ----

RANKS = 4


class Emulated:
    """Collectives of ranks that take turns in one process.

    Each gathers what all have; what it would have reduced is kept.
    """

    def __init__(self, kv_by_rank):
        self.kv_by_rank = kv_by_rank
        self.gradients = []

    def all_gather_into_tensor(self, kv, size, group):
        """Return the keys and values of all ranks, [2R, B, K, L, C]."""
        return torch.cat(self.kv_by_rank)

    def reduce_scatter_tensor(self, gradient, operation, size, group):
        """Keep this rank's share of the gradients, [2R, B, K, L, C]; the sum is for later."""
        self.gradients.append(gradient)
        return gradient.chunk(size)[0]

    def wait_tensor(self, x):
        return x


def unshard(shards, ring):
    """Join the ranks' [B, H, L, C] to [B, H, S, C], the reverse of `shard_sequence`."""
    if not ring.headtail:
        return torch.cat(shards, dim=2)
    heads = [shard.chunk(2, dim=2)[0] for shard in shards]
    tails = [shard.chunk(2, dim=2)[1] for shard in shards]
    return torch.cat([*heads, *reversed(tails)], dim=2)


def run_ring(q, k, v, grad, monkeypatch, *, headtail):
    """Return the whole result and gradients of a ring whose ranks take turns on one device."""
    rings = [
        Ring(group="emulated", rank=rank, size=RANKS, headtail=headtail, gathers=True)
        for rank in range(RANKS)
    ]
    shards = [
        # Positions come second for `shard_sequence`, third here.
        [shard_sequence(x.transpose(1, 2), ring).transpose(1, 2) for x in (q, k, v, grad)]
        for ring in rings
    ]
    emulated = Emulated([torch.stack((k, v)) for _, k, v, _ in shards])
    monkeypatch.setattr(ring_attention, "collectives", emulated)
    results, grads_q = [], []
    for ring, (q, k, v, grad) in zip(rings, shards, strict=True):
        q = q.detach().requires_grad_()
        kv = torch.stack((k, v)).requires_grad_()
        result = AttendAroundRing.apply(q, kv, ring)
        result.backward(grad)
        results.append(result.detach())
        grads_q.append(q.grad)
    of_all_keys = sum(emulated.gradients).unflatten(0, (RANKS, 2))  # [R, 2, B, K, L, C]
    grads_k, grads_v = ([of_rank[i] for of_rank in of_all_keys] for i in (0, 1))
    return [unshard(each, rings[0]) for each in (results, grads_q, grads_k, grads_v)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("balancer", ["headtail", "none"])
@pytest.mark.parametrize(("kv_heads", "width"), [(8, 64), (2, 128)])
def test_four_ranks_of_a_ring_are_one_attention(
    device, record_property, monkeypatch, dtype, balancer, kv_heads, width
):
    length = RANKS * 40  # of a rank: no multiple of the 32 that a kernel pads to
    *inputs, grad = draw(device, dtype, (2, 8, kv_heads, length, width))
    expected = result_and_gradients(
        lambda q, k, v: attend_exactly(q, k, v, causal(length, device)), *inputs, grad
    )
    found = run_ring(*inputs, grad, monkeypatch, headtail=balancer == "headtail")
    record_property("worst", assert_close(found, expected, dtype))
