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
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FEISTEL_ROUNDS = 8

Words = tuple[np.ndarray | int, ...]


def philox(counter: Words, key: Words) -> np.ndarray:
    """Four 32-bit words per counter and key: four and two words that broadcast, the result uint32 (..., 4)."""
    shape = np.broadcast_shapes(*(np.shape(word) for word in (*counter, *key)))
    words = np.empty((6, *shape), np.uint64)
    for place, word in enumerate((counter[0], counter[2], counter[1], counter[3], *key)):
        words[place] = word
    # The two halves of a round, side by side: words 0 and 2 are multiplied, 1 and 3 are mixed in.
    multiplied, mixed, keys = words[:2], words[2:4], words[4:]
    multipliers, weyl = (np.array(pair, np.uint64).reshape(2, *[1] * len(shape)) for pair in (_MULTIPLIERS, _WEYL))
    for number in range(10):
        product = multipliers * multiplied  # 32 x 32 bits fit in 64
        round_keys = keys + weyl * np.uint64(number) & _LOW
        multiplied, mixed = (product >> _HALF)[::-1] ^ mixed ^ round_keys, (product & _LOW)[::-1]
    return np.stack((multiplied[0], mixed[0], multiplied[1], mixed[1]), axis=-1).astype(np.uint32)


def uniforms(seed: int, epoch: int, index: np.ndarray, use: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each image, float32 (B, count), multiples of 2**-24.

    `use` names what they are for; numbers of different uses are independent. The first n of `count` numbers do not
    depend on `count`. Raises ValueError for a seed or an epoch outside 0..2**32-1 and for negative indices.
    """
    return uniforms_by_use(seed, epoch, index, {use: count})[use]


def uniforms_by_use(seed: int, epoch: int, index: np.ndarray, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """`uniforms` for each use and its count, in one pass: for few images ten uses cost little more than one."""
    check_word("seed", seed)
    check_word("epoch", epoch)
    index = np.asarray(index, np.int64)  # (B,)
    if index.ndim != 1 or (index.size and index.min() < 0):
        raise ValueError(f"image indices must be a vector of numbers >= 0, got shape {index.shape}: {index[:4]}")
    blocks = [(block, zlib.crc32(use.encode())) for use, count in counts.items() for block in range(-(-count // 4))]
    if not blocks:
        return {use: np.empty((index.size, 0), np.float32) for use in counts}
    block, hashed_use = np.array(blocks, np.uint64).reshape(-1, 2).T  # (blocks,) each
    place = index.astype(np.uint64)[:, None]  # (B, 1)
    words = philox((place & _LOW, place >> _HALF, block, epoch), (seed, hashed_use))  # (B, blocks, 4)
    numbers = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    numbers = numbers.reshape(index.size, 4 * len(blocks))
    result, start = {}, 0
    for use, count in counts.items():
        result[use] = numbers[:, start : start + count]  # (B, count)
        start += 4 * -(-count // 4)
    return result


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
