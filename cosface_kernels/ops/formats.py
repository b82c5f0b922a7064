"""Storage formats of rows of the class table and of an optimiser's state. The dtype of the buffer is the format.

    float32, float64    as they are
    bfloat16            2 bytes, rounded stochastically
    float8_e4m3fn       number · scale, a power of two to each row; rounded stochastically
    int8                code · scale, a scale to each row; rounded stochastically
    uint8               (code · scale)², for numbers >= 0 that span many magnitudes: AdamW's squares

Rounding to nearest would lose every update of less than half a unit in the last place, which with bfloat16 is most of them.
Stochastic rounding is right on average: x becomes the neighbour above with the probability (x - below) / (above - below). The
random bits are a hash of (seed, step, row, column), so a run can be repeated and resumed; slabs of any size take the same.

The scale of a float8 row is the least power of two with which the row's largest number is at most 448, e4m3's largest. When it
moves, all exponents move with it: numbers that do not change stay what they are, except the few that a larger scale makes
subnormal.
"""

import torch

# The dtypes by the names that users give. uint8 takes int8's place for squares.
FLOAT8 = torch.float8_e4m3fn
STATE_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
TABLE_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": FLOAT8}
LARGEST_CODE = {torch.int8: 127, torch.uint8: 255}

_WORD = 2**32 - 1
_OF_PAIR = 0x9E3779B9  # neighbouring pairs of columns start far apart
_OF_STREAM = 0xAC564B05  # turns one word of random bits into another (P. L'Ecuyer's table of multipliers, 1999)


def is_rounded(dtype):
    """True if storing float32 rows in this dtype rounds them."""
    return dtype.itemsize < 4


def read(buffer, scale, index):
    """Decode the rows at index (a slice or a tensor). For a slice of a float format that is a view of the buffer."""
    if buffer.dtype == FLOAT8:
        return _read_float8(buffer.view(torch.int8)[index], scale[index])
    rows = buffer[index]
    if buffer.dtype in LARGEST_CODE:
        rows = rows.float() * scale[index][:, None]
        return rows.square() if buffer.dtype == torch.uint8 else rows
    return rows.float() if is_rounded(buffer.dtype) else rows


def write(buffer, scale, index, rows, bits, skip=None):
    """Encode rows into the places that `read` took them from. bits: 16 random bits, as `random_bits` returns, for float8 None
    rounds to nearest; skip: 0-dim bool, True leaves the buffer as it is."""
    if buffer.dtype == FLOAT8:
        rows, scales = _float8(rows, bits)
        _put(scale, index, scales, skip)
        buffer = buffer.view(torch.int8)
    elif buffer.dtype in LARGEST_CODE:
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


def _read_float8(codes, scale):
    """Decode rows of e4m3, given as int8. Shifted by 7 its bits are those of a float16 that is 2^8 times smaller."""
    halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_((scale * 2.0**8).unsqueeze(-1))


def _float8(rows, bits):
    """(e4m3 as int8, scale (R,)) of float32 rows."""
    words = rows.contiguous().view(torch.int32)
    largest = (words & 0x7FFFFFFF).amax(1)  # magnitudes are ordered as their bits are, NaN last
    finite = largest < 0x7F800000
    # 448 is 1.75 · 2^8: a larger fraction needs the next power of two. Of the largest floats there is none.
    exponent = ((largest + 0x1FFFFF >> 23) - 8).clamp(1, 246)
    scale, inverse = (part.bitwise_left_shift(23).view(torch.float32) for part in (exponent, 254 - exponent))
    sizes = (rows.abs() * inverse[:, None]).clamp(max=448.0)
    # 3 of a fraction's 23 bits stay. In a subnormal's place 2^-6 more has its distance between neighbours.
    small = sizes < 2.0**-6
    kept = torch.where(small, sizes + 2.0**-6, sizes).view(torch.int32)
    # Half of what the 16 random bits leave out of 20: a number that float8 has stays.
    kept = kept + (2**19 if bits is None else (bits.to(torch.int32) << 4) + 8) >> 20
    codes = kept - torch.where(small, 121 << 3, 120 << 3) | words >> 24 & 0x80
    codes, scale = torch.where(finite[:, None], codes, 0), torch.where(finite, scale, torch.nan)
    return codes.to(torch.uint8).view(torch.int8), scale


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
    """(R, size) int64 of 16 random bits each, for the rows' numbers (R,) int64 in the whole table. Of rows,
    columns and streams any two are independent."""
    low, high = key & _WORD, key >> 32
    rows = _mixed(_mixed((rows & _WORD) ^ low) ^ (rows >> 32) ^ high)
    column = torch.arange(size, dtype=torch.int64, device=rows.device)
    word = _mixed(rows[:, None] + (column >> 1) * _OF_PAIR & _WORD)  # a half of it for each of two columns
    for _ in range(stream):
        # The lower half of a product has nothing from the upper half of a factor, so both halves go into that first.
        word = (word ^ word >> 16) * _OF_STREAM & _WORD
    return word >> (column & 1) * 16 & 0xFFFF


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
