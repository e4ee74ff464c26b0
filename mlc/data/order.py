"""The data order: a pure function from a position in the endless training stream to an epoch and a row.

A run's whole data state is one integer, `samples_seen`, because nothing here has a state: no buffer to refill, no
generator to save, no library's random stream (those change between versions). Epoch `e` visits row
`permute(i, n, key(seed, e))` at its i-th place; `permute` is a keyed bijection of [0, n), computed in O(1) memory.
Every random choice about a sample is drawn from a counter-based generator keyed by (seed, position), so it does not
matter which rank, worker or micro-batch asks for it, or when.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
MASK = (1 << 64) - 1
ROUNDS = 8  # four make a Feistel network pseudo-random (Luby and Rackoff 1988); small domains want more
MIN_BITS = 8  # halves of fewer than four bits mix badly: tiny n walk a domain of 256 instead

# Streams keep the draws of different purposes independent of each other.
ORDER, AUGMENT, ERASE, MIX, DROPOUT, CUTOUT, CAPTION = range(1, 8)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words, each bit flips with p = 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*words) -> np.ndarray:
    """uint64 hash of integers or integer arrays that broadcast against each other; at least one-dimensional."""
    state = np.zeros(1, np.uint64)
    for word in words:
        word = np.atleast_1d(np.asarray(word if not isinstance(word, int) else np.uint64(word & MASK)))
        state = _mix((state ^ word.astype(np.uint64)) + np.uint64(GOLDEN))
    return state


def _mix_one(x: int) -> int:
    """`_mix` of one word, a tenth of numpy's time."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hash_one(*words: int) -> int:
    """`hash64` of single integers."""
    state = 0
    for word in words:
        state = _mix_one(((state ^ (word & MASK)) + GOLDEN) & MASK)
    return state


def uniform(*words) -> np.ndarray:
    """Uniform float64 in [0, 1), a pure function of the integer words, e.g. (seed, stream, position)."""
    return (hash64(*words) >> np.uint64(11)) * 2.0**-53


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, 2^bits): halves of bits // 2 and the rest, exchanged every round."""
    right_bits = bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    left_bits = bits - right_bits
    for r in range(ROUNDS):
        scrambled = _mix(right ^ _mix(key + np.uint64((r + 1) * GOLDEN & MASK)))
        left, right = right, left ^ (scrambled & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def permute(i, n: int, key) -> np.ndarray:
    """Where the keyed bijection of [0, n) sends `i`.

    Args:
        i: integers in [0, n), any shape.
        n: size of the domain, 1 <= n < 2^63.
        key: integer, or integers shaped like `i`; each key is another permutation.
    Returns:
        int64, shaped like `i`.

    A Feistel network permutes the smallest power of two that holds n; results outside [0, n) walk on along their cycle
    until they fall inside (Black and Rogaway 2002), which keeps it a bijection and takes under two rounds on average.
    """
    if not 1 <= n < 1 << 63:
        raise ValueError(f"permute: n must be in [1, 2^63), got {n}")
    i = np.asarray(i)
    if i.size and not (i.min() >= 0 and i.max() < n):
        raise ValueError(f"permute: i must be in [0, {n})")
    x = i.astype(np.uint64).reshape(-1)
    key = np.broadcast_to(hash64(key).reshape(np.shape(key)), i.shape).reshape(-1)
    bits = max(MIN_BITS, (n - 1).bit_length())
    x = _feistel(x, bits, key)
    while (outside := np.flatnonzero(x >= np.uint64(n))).size:
        x[outside] = _feistel(x[outside], bits, key[outside])
    return x.astype(np.int64).reshape(i.shape)


def locate(position, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, row), both int64 and shaped like `position`, of positions in the endless stream over n rows."""
    position = np.asarray(position, np.int64)
    epoch, place = np.divmod(position, n)
    key = hash64(seed, ORDER, epoch).reshape(position.shape)
    return epoch, permute(place, n, key)


class Draws:
    """The random choices about one sample, in the order they are asked for: a counter keyed by the arguments."""

    def __init__(self, seed: int, stream: int, position: int):
        self._key = hash_one(seed, stream, position)
        self._count = 0

    def bits(self) -> int:
        """64 random bits: SplitMix64's own stream, started at the key."""
        self._count += 1
        return _mix_one((self._key + self._count * GOLDEN) & MASK)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def integer(self, n: int) -> int:
        """Uniform in [0, n)."""
        return (self.bits() * n) >> 64
