"""From the quantised coefficients of a baseline JPEG to its pixels, bit for bit those of libjpeg-turbo.

Three steps, each with libjpeg's own rounding: the inverse DCT in integers (`idct`; Loeffler, Ligtenberg and Moschytz
1989, with constants of 13 bits and 2 more bits between the passes), triangle upsampling of chroma and the conversion
to RGB (ITU-T T.871, 7) with fractions of 16 bits (`to_rgb`). All are compiled and hold no lock of the interpreter.

What takes time is written as vectors of LLVM, 16 blocks or 64 pixels each, because loops over arrays that may overlap
are not vectorised reliably. `_Vector` lets that read as arithmetic; any CPU runs it, in registers of its own width.
Bytes are packed as on a little-endian machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ssl.data.compiled import intrinsic, jit

# ---- vectors ---------------------------------------------------------------------------------------------------------

_BITS = {bits: ir.IntType(bits) for bits in (8, 16, 32, 64)}


def _offset(value: int) -> ir.Constant:
    return ir.Constant(_BITS[64], value)


class _Vector:
    """Integers of one width in lanes, wrapping; numbers of Python stand for the same in every lane."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def lanes(self) -> int:
        return self.value.type.count

    def _other(self, other: _Vector | int) -> Any:
        if isinstance(other, _Vector):
            return other.value
        return ir.Constant(self.value.type, [other] * self.lanes)

    def _new(self, value: Any) -> _Vector:
        return _Vector(self.builder, value)

    def __add__(self, other: _Vector | int) -> _Vector:
        return self._new(self.builder.add(self.value, self._other(other)))

    def __sub__(self, other: _Vector | int) -> _Vector:
        return self._new(self.builder.sub(self.value, self._other(other)))

    def __mul__(self, other: _Vector | int) -> _Vector:
        return self._new(self.builder.mul(self.value, self._other(other)))

    def __or__(self, other: _Vector | int) -> _Vector:
        return self._new(self.builder.or_(self.value, self._other(other)))

    def __and__(self, other: _Vector | int) -> _Vector:
        return self._new(self.builder.and_(self.value, self._other(other)))

    def __lshift__(self, other: int) -> _Vector:
        return self._new(self.builder.shl(self.value, self._other(other)))

    def __rshift__(self, other: int) -> _Vector:
        return self._new(self.builder.ashr(self.value, self._other(other)))

    def clamp(self) -> _Vector:
        """Between 0 and 255."""
        for sign, bound in (("<", 0), (">", 255)):
            beyond = self.builder.icmp_signed(sign, self.value, self._other(bound))
            self = self._new(self.builder.select(beyond, self._other(bound), self.value))
        return self

    def signed(self, bits: int) -> _Vector:
        return self._new(self.builder.sext(self.value, ir.VectorType(_BITS[bits], self.lanes)))

    def unsigned(self, bits: int) -> _Vector:
        return self._new(self.builder.zext(self.value, ir.VectorType(_BITS[bits], self.lanes)))

    def low(self, bits: int) -> _Vector:
        """The low bits of each lane."""
        return self._new(self.builder.trunc(self.value, ir.VectorType(_BITS[bits], self.lanes)))

    def seen_as(self, bits: int) -> _Vector:
        """The same bits in lanes of another width."""
        lanes = self.lanes * self.value.type.element.width // bits
        return self._new(self.builder.bitcast(self.value, ir.VectorType(_BITS[bits], lanes)))

    def shuffle(self, other: _Vector, lanes: Sequence[int]) -> _Vector:
        """These of the lanes, those of `other` counted after one's own."""
        mask = ir.Constant(ir.VectorType(_BITS[32], len(lanes)), list(lanes))
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))


class _Memory:
    """The elements of a C-contiguous array, in vectors from any element on."""

    def __init__(self, context: Any, builder: Any, array: Any, value: Any) -> None:
        self.builder, self.bytes = builder, array.dtype.bitwidth // 8
        self.data = context.make_array(array)(context, builder, value).data

    def _place(self, offset: Any, kind: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [offset]), kind.as_pointer())

    def load(self, offset: Any, lanes: int) -> _Vector:
        kind = ir.VectorType(_BITS[8 * self.bytes], lanes)
        return _Vector(self.builder, self.builder.load(self._place(offset, kind), align=self.bytes))

    def broadcast(self, offset: Any, lanes: int) -> _Vector:
        """One element in every lane."""
        one = self.load(offset, 1)
        return one.shuffle(one, [0] * lanes)

    def store(self, offset: Any, vector: _Vector) -> None:
        self.builder.store(vector.value, self._place(offset, vector.value.type), align=self.bytes)


def _kernel(body: Callable[..., None], *kinds: Any) -> tuple:
    """What `intrinsic` wants: `body(*memories, *offsets)` as a function of arrays and integers for compiled code."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = []
        for kind, value in zip(signature.args, values):
            if isinstance(kind, types.Array):
                given.append(_Memory(context, builder, kind, value))
            else:
                given.append(context.cast(builder, value, kind, types.int64))
        body(*given)
        return context.get_dummy_value()

    assert all(kind.layout == "C" for kind in kinds if isinstance(kind, types.Array)), kinds
    return types.void(*kinds), codegen


# ---- inverse DCT -----------------------------------------------------------------------------------------------------

_LANES = 16  # blocks at a time
_LIMIT = 1 << 14  # within +-_LIMIT libjpeg's C and its vectors of 16 bits agree


def _constant(value: float) -> int:
    return round(value * 8192)


def _transform(x: list[_Vector], bias: int) -> list[_Vector]:
    """One pass of 8 points, times 8192 * sqrt(8), with `bias` * 8192 added to every result."""
    first = x[0] + bias
    z = (x[2] + x[6]) * _constant(0.541196100)
    a, b = (first + x[4]) << 13, (first - x[4]) << 13
    c, d = z - x[6] * _constant(1.847759065), z + x[2] * _constant(0.765366865)
    even = [a + d, b + c, b - c, a - d]

    z1, z2 = (x[7] + x[1]) * -_constant(0.899976223), (x[5] + x[3]) * -_constant(2.562915447)
    z3, z4 = x[7] + x[3], x[5] + x[1]
    z5 = (z3 + z4) * _constant(1.175875602)
    z3, z4 = z5 - z3 * _constant(1.961570560), z5 - z4 * _constant(0.390180644)
    odd = [
        x[1] * _constant(1.501321110) + (z1 + z4),
        x[3] * _constant(3.072711026) + (z2 + z3),
        x[5] * _constant(2.053119869) + (z2 + z4),
        x[7] * _constant(0.298631336) + (z1 + z3),
    ]
    return [e + o for e, o in zip(even, odd)] + [e - o for e, o in zip(even[::-1], odd[::-1])]


def _columns_body(coefficients: Any, quantization: Any, work: Any, start: Any, stride: Any, column: Any) -> None:
    """The column `column` of 16 blocks into `work`; bits above 2 * _LIMIT in its row 64 tell of values beyond."""
    builder = work.builder
    x = []
    seen = work.load(_offset(64 * _LANES), _LANES)
    for row in range(8):
        place = builder.add(_offset(8 * row), column)
        quantised = coefficients.load(builder.add(builder.mul(place, stride), start), _LANES)
        x.append(quantised.signed(32) * quantization.broadcast(place, _LANES))
        seen = seen | (x[-1] + _LIMIT)
    results = _transform(x, 0)
    for row, result in enumerate(results):
        value = (result + (1 << 10)) >> 11
        seen = seen | (value + _LIMIT)
        place = builder.add(_offset(8 * row), column)
        work.store(builder.mul(place, _offset(_LANES)), value)
    work.store(_offset(64 * _LANES), seen)


def _rows_body(work: Any, plane: Any, row: Any, to: Any) -> None:
    """The row `row` of 16 blocks from `work` into `plane`, 128 pixels from `to` on."""
    builder = work.builder
    x = []
    for column in range(8):
        place = builder.add(builder.mul(row, _offset(8)), _offset(column))
        x.append(work.load(builder.mul(place, _offset(_LANES)), _LANES))
    results = _transform(x, (128 << 5) + (1 << 4))  # 18 bits are dropped: 13 of the constants, 2 of the pass before, 3
    pairs = [
        (((results[k] >> 18) & 0xFFFF) | ((results[k + 2] >> 2) & -0x10000)).seen_as(16).clamp().seen_as(32)
        for k in (0, 1, 4, 5)
    ]
    low, high = pairs[0] | pairs[1] << 8, pairs[2] | pairs[3] << 8
    plane.store(to, low.shuffle(high, [k // 2 + _LANES * (k % 2) for k in range(2 * _LANES)]))


@intrinsic
def _columns(_typing, coefficients, quantization, work, start, stride, column):
    return _kernel(_columns_body, coefficients, quantization, work, start, stride, column)


@intrinsic
def _rows(_typing, work, plane, row, to):
    return _kernel(_rows_body, work, plane, row, to)


@jit
def idct(coefficients, quantization, plane, row, num_blocks):
    """Pixels of one row of blocks; False where a file is too odd for libjpeg's own ways to agree on it.

    That is, where a coefficient or a result of the first pass is outside [-16384, 16383]; then `plane` is unspecified.

    coefficients: (65, stride) int16, those of block b in its column b in natural order, 8 * vertical + horizontal
        frequency; row 64 is not read. Columns up to a multiple of 16 are read, and should be 0 from num_blocks on.
    quantization: (64,) int32 in natural order, 1 to 255.
    plane: (rows, P) uint8; plane[row : row + 8, : 8 * num_blocks] is written, and what follows up to a multiple of 128.
    """
    stride, width = coefficients.shape[1], plane.shape[1]
    work = np.zeros((65, 16), np.int32)
    for start in range(0, num_blocks, 16):
        for column in range(8):
            _columns(coefficients, quantization, work, start, stride, column)
        for line in range(8):
            _rows(work, plane, line, (row + line) * width + 8 * start)
    seen = 0
    for lane in range(16):
        seen |= work[64, lane]
    return seen & -2 * _LIMIT == 0


# ---- colour ----------------------------------------------------------------------------------------------------------

_PIXELS = 64  # at a time


def _high(x: _Vector, factor: int) -> _Vector:
    """The upper 16 bits of a product of 16 by 16."""
    return ((x.signed(32) * factor) >> 16).low(16)


def _color_body(y: Any, cb: Any, cr: Any, out: Any, y_at: Any, cb_at: Any, cr_at: Any, out_at: Any) -> None:
    """64 pixels from three planes of bytes to RGB.

    Red is Y + round(1.402 Cr), blue Y + round(1.772 Cb), green Y + round(-0.34414 Cb - 0.71414 Cr), with factors of 16
    bits behind the point. Their whole parts, 1, 2 and -1, stand apart, so that 16 bits hold what is left.
    """
    light = y.load(y_at, _PIXELS).unsigned(16)
    blue, red = (memory.load(at, _PIXELS).unsigned(16) - 128 for memory, at in ((cb, cb_at), (cr, cr_at)))
    r = light + red + ((_high(red + red, 26345) + 1) >> 1)
    b = light + blue + blue + ((_high(blue + blue, -14942) + 1) >> 1)
    mixed = blue.signed(32) * -22554 + red.signed(32) * 18734 + (1 << 15)
    g = light - red + (mixed >> 16).low(16)
    r, g, b = (channel.clamp().low(8) for channel in (r, g, b))
    for part in range(3):
        places = [divmod(64 * part + k, 3) for k in range(64)]  # pixel and channel of each byte
        rg = r.shuffle(g, [pixel + 64 * (channel % 2) for pixel, channel in places])
        rgb = rg.shuffle(b, [64 + pixel if channel == 2 else k for k, (pixel, channel) in enumerate(places)])
        out.store(out.builder.add(out_at, _offset(64 * part)), rgb)


def _triangle_body(chroma: Any, biases: Any, samples: Any, near: Any, far: Any, to: Any) -> None:
    """64 samples from 32 of chroma and one on either side: s = 3 * near + far, (3 * s + s beside it + bias) // 16."""
    sums = []
    for k in (-1, 0, 1):
        n, f = (chroma.load(chroma.builder.add(at, _offset(k)), 32).unsigned(16) for at in (near, far))
        sums.append(n * 3 + f)
    thrice = sums[1] * 3
    even, odd = (
        ((thrice + other + biases.broadcast(_offset(k), 32)) >> 4).low(8).unsigned(16)
        for k, other in ((0, sums[0]), (1, sums[2]))
    )
    samples.store(to, (even | odd << 8).seen_as(8))


def _copy_body(plane: Any, out: Any, at: Any, to: Any) -> None:
    out.store(to, plane.load(at, _PIXELS))


@intrinsic
def _copy(_typing, plane, out, at, to):
    return _kernel(_copy_body, plane, out, at, to)


@intrinsic
def _color(_typing, y, cb, cr, out, y_at, cb_at, cr_at, out_at):
    return _kernel(_color_body, y, cb, cr, out, y_at, cb_at, cr_at, out_at)


@intrinsic
def _triangle(_typing, chroma, biases, samples, near, far, to):
    return _kernel(_triangle_body, chroma, biases, samples, near, far, to)


@jit
def _color_row(y, cb, cr, out, y_at, cb_at, cr_at, out_at, width):
    """`width` pixels from flat places of planes (rows, columns) to a flat place of `out` (1, bytes)."""
    if width >= 64:
        for start in range(0, width, 64):
            k = min(start, width - 64)  # the last 64 overlap those before
            _color(y, cb, cr, out, y_at + k, cb_at + k, cr_at + k, out_at + 3 * k)
        return
    planes, pixels = np.zeros((3, 64), np.uint8), np.empty((1, 192), np.uint8)
    for k in range(width):
        planes[0, k], planes[1, k], planes[2, k] = y.flat[y_at + k], cb.flat[cb_at + k], cr.flat[cr_at + k]
    _color(planes, planes, planes, pixels, 0, 64, 128, 0)
    for k in range(3 * width):
        out[0, out_at + k] = pixels[0, k]


@jit
def _widen(chroma, near, far, first, last, low, high, biases, samples, part):
    """Two samples for each of a row of chroma from column `first` to `last`, into the row `part` of `samples`.

    chroma: a plane of which `near` and `far` are rows; `low` and `high` are the columns first - 1 and last + 1, or
    first and last themselves where the image ends. biases: (2,) int16, of the left and the right one of two samples.
    """
    inner = high - low - 1  # columns with one on either side
    if inner >= 32:
        near_at, far_at = near * chroma.shape[1] + low + 1, far * chroma.shape[1] + low + 1
        to = part * samples.shape[1] + 2 * (low + 1 - first)
        for start in range(0, inner, 32):
            k = min(start, inner - 32)  # the last 32 overlap those before
            _triangle(chroma, biases, samples, near_at + k, far_at + k, to + 2 * k)
    for nth in range(2 if inner >= 32 else last - first + 1):  # the outer two only, or all
        column = last if nth == 1 and inner >= 32 else first + nth
        left, right = max(column - 1, low), min(column + 1, high)
        own = 3 * (3 * int(chroma[near, column]) + chroma[far, column])
        k = 2 * (column - first)
        samples[part, k] = (own + 3 * int(chroma[near, left]) + chroma[far, left] + biases[0]) >> 4
        samples[part, k + 1] = (own + 3 * int(chroma[near, right]) + chroma[far, right] + biases[1]) >> 4


@jit
def to_gray(y, top, left, out):
    """The rows and columns of the plane `y` from `top` and `left` on into `out`, (h, w, 1) uint8, C-contiguous."""
    width = out.shape[1]
    for row in range(out.shape[0]):
        if width >= 64:
            for start in range(0, width, 64):
                k = min(start, width - 64)  # the last 64 overlap those before
                _copy(y, out, (top + row) * y.shape[1] + left + k, row * width + k)
        else:
            for k in range(width):
                out[row, k, 0] = y[top + row, left + k]


@jit
def to_rgb(
    y, cb, cr, y_top, y_left, chroma_top, chroma_left, horizontal, vertical, chroma_height, chroma_width, top, left, out
):
    """The pixels [top, top + h) x [left, left + w) of an image into `out`, (h, w, 3) uint8, C-contiguous.

    y, cb, cr: (rows, columns) uint8, C-contiguous planes, of which the first sample is that at (y_top, y_left) of the
        image's luma and at (chroma_top, chroma_left) of its chroma. Chroma reaches one sample further than these pixels
        need on each side on which the image does.
    horizontal, vertical: luma samples per sample of chroma, (1, 1), (2, 1) or (2, 2).
    chroma_height, chroma_width: of the whole image, without what fills its last blocks: those samples are never used.
    """
    height, width = out.shape[0], out.shape[1]
    flat = out.reshape(1, -1)
    y_at = (top - y_top) * y.shape[1] + left - y_left
    if horizontal == 1:
        at = (top - chroma_top) * cb.shape[1] + left - chroma_left
        for row in range(height):
            chroma_at = at + row * cb.shape[1]
            _color_row(y, cb, cr, flat, y_at + row * y.shape[1], chroma_at, chroma_at, 3 * row * width, width)
        return

    first, last = left // 2 - chroma_left, (left + width - 1) // 2 - chroma_left
    low, high = max(first - 1, -chroma_left), min(last + 1, chroma_width - 1 - chroma_left)
    biases = np.empty(2, np.int16)
    biases[0], biases[1] = (4, 8) if vertical == 1 else (8, 7)
    samples = np.empty((2, 2 * (last - first + 1)), np.uint8)
    red_at = samples.shape[1] + left % 2
    for row in range(height):
        near = far = (top + row) // vertical
        if vertical == 2:
            far = max(near - 1, 0) if (top + row) % 2 == 0 else min(near + 1, chroma_height - 1)
        near, far = near - chroma_top, far - chroma_top
        if chroma_width > 2:
            _widen(cb, near, far, first, last, low, high, biases, samples, 0)
            _widen(cr, near, far, first, last, low, high, biases, samples, 1)
        else:  # so narrow that libjpeg repeats samples
            for k in range(samples.shape[1]):
                samples[0, k], samples[1, k] = cb[near, first + k // 2], cr[near, first + k // 2]
        _color_row(y, samples, samples, flat, y_at + row * y.shape[1], left % 2, red_at, 3 * row * width, width)
