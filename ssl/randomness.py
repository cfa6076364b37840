"""Every random number of a view, a mask or an order, as a pure function of (seed, epoch, image index, use).

Nothing is drawn in sequence and nothing is stored, so workers, threads, ranks, batch composition and resumed runs
cannot change a view. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3").
"""

from __future__ import annotations

import zlib

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FEISTEL_ROUNDS = 8


def philox(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> np.ndarray:
    """Four 32-bit words per counter; `counter` is four words that broadcast, the result uint32 (..., 4)."""
    shape = np.broadcast_shapes(*(np.shape(word) for word in counter))
    c0, c1, c2, c3 = (np.broadcast_to(np.asarray(word, np.uint64), shape) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0 = _MULTIPLIERS[0] * c0  # 32 x 32 bits fit in 64
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniforms(seed: int, epoch: int, index: np.ndarray, use: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each image, float32 (B, count), multiples of 2**-24.

    `use` names what they are for; numbers of different uses are independent. The first n of `count` numbers do not
    depend on `count`. Raises ValueError for a seed or an epoch outside 0..2**32-1 and for negative indices.
    """
    check_word("seed", seed)
    check_word("epoch", epoch)
    index = np.asarray(index, np.int64)  # (B,)
    if index.ndim != 1 or (index.size and index.min() < 0):
        raise ValueError(f"image indices must be a vector of numbers >= 0, got shape {index.shape}: {index[:4]}")
    place = index.astype(np.uint64)[:, None]  # (B, 1)
    block = np.arange(-(-count // 4), dtype=np.uint64)[None]  # (1, ceil(count / 4))
    words = philox((place & _LOW, place >> _HALF, block, epoch), (seed, zlib.crc32(use.encode())))
    words = words.reshape(index.size, 4 * block.size)[:, :count]  # (B, count)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def shuffle(seed: int, epoch: int, size: int, position: np.ndarray) -> np.ndarray:
    """The image index at each `position` of the epoch's random order of range(size), int64 like `position`.

    A keyed bijection, so no list of `size` numbers is built: an unbalanced Feistel network on a grid just large enough,
    walked again where it leaves range(size) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    Raises ValueError for positions outside range(size).
    """
    check_word("seed", seed)
    check_word("epoch", epoch)
    position = np.asarray(position, np.int64)
    if position.size and not (position.min() >= 0 and position.max() < size):
        raise ValueError(
            f"positions in the order of {size} images must lie in 0..{size - 1}, got {position.min()}..{position.max()}"
        )
    rounds = np.arange(_FEISTEL_ROUNDS, dtype=np.uint64)
    words = philox((rounds, size & 0xFFFFFFFF, size >> 32, epoch), (seed, zlib.crc32(b"shuffle"))).astype(np.uint64)
    round_keys = words[:, 0] << _HALF | words[:, 1]  # (rounds,)
    rows = np.uint64(max(1, int(np.ceil(np.sqrt(size)))))
    columns = np.uint64(-(-size // int(rows)))
    result = position.astype(np.uint64).reshape(-1)
    outside = np.arange(result.size)
    while outside.size:  # fewer than `rows` cells of the grid lie outside, so this is soon over
        row, column = np.divmod(result[outside], columns)
        for number, round_key in enumerate(round_keys):
            if number % 2:
                column = (column + _mix(row, round_key) % columns) % columns
            else:
                row = (row + _mix(column, round_key) % rows) % rows
        result[outside] = row * columns + column
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64).reshape(position.shape)


def step_seed(seed: int, *key: int) -> int:
    """A 63-bit seed for `torch.manual_seed` from the run's seed and a key such as (step, rank, part)."""
    check_word("seed", seed)
    state = (seed, zlib.crc32(b"step") ^ len(key))
    first = second = 0
    for place, number in enumerate(key or (0,)):
        words = philox((number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF, place, second), state)
        state, first, second = (int(words[0]), int(words[1])), int(words[2]), int(words[3])
    return (first << 32 | second) & (2**63 - 1)


def check_word(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer that fits one 32-bit word of Philox."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in 0..{2**32 - 1}, got {value}")


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): 64 bits in which every input bit counts. Wraps modulo 2**64."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
