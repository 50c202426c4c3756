"""The order of samples: pure functions of (seed, global sample index), in O(1) memory.

Sample i of N belongs to epoch i div N; each epoch is a permutation of range(N) keyed by (seed,
epoch). The permutation is a Feistel network (Luby & Rackoff 1988) on the smallest even number of
bits that holds N; a value of N or more goes through again until it is less ("cycle walking", Black
& Rogaway 2002), which keeps it a permutation.

Shapes: B samples.
"""

import hashlib

import numpy as np

ROUNDS = 8
"""Four make a Feistel network of good round functions look random; on few bits, more mix better."""


def permuted(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return where the permutation of range(n) of (seed, epoch) sends `indices`, int64 `[B]`."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    text = f"torchtrain data order {seed} {epoch}"
    key = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    round_keys = np.frombuffer(key, dtype="<u8")
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # the domain is less than 4n, so under 4 turns are expected
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= n
    return values.astype(np.int64)


def locate(sample_ids: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
    """Return the sequence, in range(n_samples), of global samples `[B]` of any epochs."""
    epochs, indices = np.divmod(sample_ids.astype(np.int64), n_samples)
    sequences = np.empty_like(indices)
    for epoch in set(epochs.tolist()):
        chosen = epochs == epoch
        sequences[chosen] = permuted(indices[chosen], n_samples, seed, epoch)
    return sequences


def _feistel(values: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left = values >> half_bits
    right = values & mask
    for key in round_keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half_bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix bits as SplitMix64 does last (Steele, Lea & Flood 2014): each input bit moves all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
