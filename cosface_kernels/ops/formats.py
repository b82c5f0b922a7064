"""Storage formats of rows of the class table and of an optimiser's state. The dtype of the buffer is the format.

    float32, float64    as they are
    bfloat16            2 bytes, rounded stochastically
    int8                code · scale, a scale to each row; rounded stochastically
    uint8               (code · scale)², for numbers >= 0 that span many magnitudes: AdamW's squares

Rounding to nearest would lose every update of less than half a unit in the last place, which with bfloat16 is most of them.
Stochastic rounding is right on average: x becomes the neighbour above with the probability (x - below) / (above - below). The
random bits are a hash of (seed, step, row, column), so a run can be repeated and resumed; slabs of any size take the same.
"""

import torch

# The dtypes by the names that users give. uint8 takes int8's place for squares.
STATE_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
TABLE_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST_CODE = {torch.int8: 127, torch.uint8: 255}

_WORD = 2**32 - 1
_GOLDEN = 0x9E3779B9  # neighbouring columns start far apart
_OTHER = 0x85EBCA6B  # turns one word of random bits into another


def is_rounded(dtype):
    """True if storing float32 rows in this dtype rounds them."""
    return dtype.itemsize < 4


def read(buffer, scale, index):
    """Decode the rows at index (a slice or a tensor). For a slice of a float format that is a view of the buffer."""
    rows = buffer[index]
    if buffer.dtype in LARGEST_CODE:
        rows = rows.float() * scale[index][:, None]
        return rows.square() if buffer.dtype == torch.uint8 else rows
    return rows.float() if is_rounded(buffer.dtype) else rows


def write(buffer, scale, index, rows, bits, skip=None):
    """Encode rows into the places that `read` took them from. bits: 16 random bits, as `random_bits` returns; skip: 0-dim bool,
    True leaves the buffer as it is."""
    if buffer.dtype in LARGEST_CODE:
        codes, scales = _codes(rows, bits, buffer.dtype)
        _put(scale, index, scales, skip)
        rows = codes
    elif is_rounded(buffer.dtype):
        rows = round_bfloat16(rows, bits)
    elif isinstance(index, slice):  # `read` returned a view
        return
    _put(buffer, index, rows, skip)


def _put(buffer, index, rows, skip):
    buffer[index] = rows if skip is None else torch.where(skip, buffer[index], rows)


def round_bfloat16(rows, bits):
    """float32 rows rounded stochastically to bfloat16: up with the probability (x - below) / (above - below)."""
    word = rows.view(torch.int32).long() & _WORD
    word = torch.where(rows.isnan(), 0x7FC00000, word + bits)
    return ((word >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16)


def _codes(rows, bits, dtype):
    """(codes, scale (R,)), with each row's largest number at the largest code."""
    squares = dtype == torch.uint8
    rows = rows.sqrt() if squares else rows
    scale = rows.abs().amax(1) / LARGEST_CODE[dtype]
    scale = torch.where(scale.isfinite(), scale, torch.nan)  # decoded, such a row is NaN
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    scale, inverse = (torch.where(inverse.isinf(), 0.0, number) for number in (scale, inverse))
    # The random numbers keep more than a rounding of a code away from 0 and 1: a code that is read and written again stays.
    codes = (rows * inverse[:, None] + ((bits >> 1).float() + 0.5) / 2**15).floor()
    # A square that became 0 would make AdamW's step as large as 1 / eps.
    codes = torch.where(rows > 0, codes.clamp(min=1), codes) if squares else codes
    return codes.clamp(-LARGEST_CODE[dtype], LARGEST_CODE[dtype]).to(dtype), scale


def random_bits(key, rows, size, stream):
    """(R, size) int64 of 16 random bits each, for the rows' numbers (R,) int64 in the whole table. Streams are independent."""
    low, high = key & _WORD, key >> 32
    rows = _mixed(_mixed((rows & _WORD) ^ low) ^ (rows >> 32) ^ high)
    word = _mixed(rows[:, None] + torch.arange(size, dtype=torch.int64, device=rows.device) * _GOLDEN & _WORD)
    if stream >= 2:
        word = _mixed(word ^ _OTHER)
    return word & 0xFFFF if stream % 2 else word >> 16


def rounding_key(seed, step):
    """64 bits of (seed, step), for `random_bits` and the native kernel."""
    word = (seed * 0x9E3779B97F4A7C15 + step + 1) % 2**64
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        word = (word ^ word >> 30) * multiplier % 2**64
    return word ^ word >> 31


def _mixed(word):
    """A permutation of 32-bit words in which every bit of the result depends on every bit of the word (C. Wellons' lowbias32)."""
    word = (word ^ word >> 16) * 0x7FEB352D & _WORD
    word = (word ^ word >> 15) * 0x846CA68B & _WORD
    return word ^ word >> 16
