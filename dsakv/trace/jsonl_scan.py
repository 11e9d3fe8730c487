"""Read plain JSONL records out of bytes, in machine code: the lines about which there can be no doubt.

A line is taken only if it is valid JSON for sure and says the same to any parser. Whatever else stands in a file
(escapes, other bytes than ASCII, long numbers, a key twice, a value out of range, bad JSON) is left to the caller,
line by line: so speed never changes meaning. A newline ends every loop here, and ``text`` ends with one: hence no
function looks for the end of ``text``. One that finds what it does not like returns ``ODD``, which is negative.

All of it stands in one file, since compiled code is kept until the file changes in which the function stands.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsakv.compiled import compiled_in_place

INTEGERS = ("request_id", "layer_id", "step_idx", "seq_len_current", "engine_step", "block_size_tokens")
"""Keys with integers, in the order of ``Columns.integers``; the first four must be there."""
ENGINE_STEP, BLOCK_SIZE = 4, 5
DONE, ODD, FULL = 0, -1, -2
"""How a scan ends: at the end of the text, before a line that is not for it, before one that has no room."""

_LAYER, _SEQ_LEN, _EVENT, _POSITIONS = 1, 3, 6, 7
_OTHER = -1
_REQUIRED = 0b1111
_ALWAYS = _REQUIRED | 1 << _EVENT | 1 << _POSITIONS
_KEYS = (*INTEGERS, "event", "selected_token_pos")
_KEY_LENGTHS = np.array([len(key) for key in _KEYS])
_KEY_BYTES = np.array([list(key.encode().ljust(24)) for key in _KEYS], dtype=np.uint8)
_DSA_TOPK = np.frombuffer(b"dsa_topk", dtype=np.uint8)
_TRUE, _FALSE, _NULL = (np.frombuffer(word, dtype=np.uint8) for word in (b"true", b"false", b"null"))
# As many digits as are within the bounds that the checks of a record set: 31 bits for layers, lengths and block sizes,
# 53 for the rest.
_DIGITS = np.array([15, 9, 15, 9, 15, 9])
_POSITION_DIGITS = 9
_ONE = np.uint64(1)
_EIGHT_ZEROS = np.uint64(0x3030303030303030)
_TO_BIT_7 = np.uint64(0x7676767676767676)  # 10 and more reach it, 9 does not
_EIGHT_BITS_7 = np.uint64(0x8080808080808080)
_BIT_63 = np.uint64(1 << 63)
_MAX_DEPTH = 32
_BITMAP_WORDS = 1 << 15  # positions below 2 M

_TAB, _NEWLINE, _RETURN, _SPACE, _QUOTE, _PLUS, _COMMA, _MINUS, _POINT = b'\t\n\r "+,-.'
_ZERO, _COLON, _BACKSLASH, _DELETE = b"0:\\\x7f"
_OPEN_LIST, _CLOSE_LIST, _OPEN_OBJECT, _CLOSE_OBJECT = b"[]{}"
_E, _F, _N, _T = b"efnt"
_LOWER_CASE = 0x20  # the bit that makes E an e


class Columns(NamedTuple):
    """Room for ``R`` records with ``P`` positions."""

    integers: NDArray[np.int64]
    """[6, R] by key. A ``block_size_tokens`` that is not there is 0; what is not asked for is left as it was."""
    offsets: NDArray[np.int64]
    """[R + 1], ``offsets[0]`` is 0."""
    positions: NDArray[np.int32]
    """[P] ascending within a record."""
    bitmap: NDArray[np.uint64]
    """[W] to sort in, a bit a position."""


def make_columns(records: int, positions: int) -> Columns:
    """Empty columns for that many records and positions."""
    return Columns(
        integers=np.zeros((len(INTEGERS), records), dtype=np.int64),
        offsets=np.zeros(records + 1, dtype=np.int64),
        positions=np.empty(positions, dtype=np.int32),
        bitmap=np.empty(_BITMAP_WORDS, dtype=np.uint64),
    )


@compiled_in_place
def scan(text: NDArray[np.uint8], begin: int, columns: Columns, row: int, wanted: int) -> tuple[int, int, int]:
    """Read the lines of ``text`` from ``begin`` on, one after the other, into ``columns`` from ``row`` on.

    Args:
        text: [N] whole lines, the last newline included.
        begin: where a line begins.
        columns: what was read; the rows before ``row`` are left alone.
        row: the first free row.
        wanted: bit ``k`` asks for ``INTEGERS[k]``; the first four always are. A wanted ``engine_step`` must be there.

    Returns:
        Where it stopped, the first free row, and why: ``DONE``; ``ODD``: the line there is to be read with all care;
        ``FULL``: it does not fit behind what is there already. A line too long for empty columns is odd.
    """
    wanted |= _ALWAYS
    at = begin
    while at < len(text):
        if row == columns.integers.shape[1]:
            return at, row, FULL
        after = _record(text, at, columns, row, wanted)
        if after == FULL and row == 0:
            return at, row, ODD
        if after < 0:
            return at, row, after
        at = after
        row += 1
    return at, row, DONE


@compiled_in_place
def _record(text: NDArray[np.uint8], begin: int, columns: Columns, row: int, wanted: int) -> int:
    """Where the next line begins, ``ODD`` or ``FULL``."""
    at = _skip_space(text, begin)
    if text[at] != _OPEN_OBJECT:
        return ODD
    columns.integers[BLOCK_SIZE, row] = 0  # it may be missing
    first = columns.offsets[row]
    last = first
    seen = 0
    while True:
        key = _skip_space(text, at + 1)
        colon = _string(text, key)
        if colon < 0:
            return ODD
        field = _field(text, key + 1, colon - key - 2)
        at = _value_after_colon(text, colon)
        if at < 0:
            return ODD
        if field >= 0 and wanted >> field & 1:
            if seen >> field & 1:
                return ODD
            seen |= 1 << field
        else:
            field = _OTHER
        if field == _OTHER:
            at = _any_value(text, at)
        elif field == _POSITIONS:
            at, last = _list_of_positions(text, at, columns.positions, first)
        elif field == _EVENT:
            at = _literal(text, at + 1, _DSA_TOPK) if text[at] == _QUOTE else ODD
            if at >= 0:
                at = at + 1 if text[at] == _QUOTE else ODD
        else:
            at, columns.integers[field, row] = _integer(text, at, _DIGITS[field])
        if at < 0:
            return at
        at = _skip_space(text, at)
        if text[at] != _COMMA:
            break
    if text[at] != _CLOSE_OBJECT:
        return ODD
    at = _skip_space(text, at + 1)
    if text[at] != _NEWLINE:
        return ODD
    required = _REQUIRED | (wanted & 1 << ENGINE_STEP)
    if seen & required != required or (seen >> BLOCK_SIZE & 1 and columns.integers[BLOCK_SIZE, row] < 1):
        return ODD
    if columns.integers[_LAYER, row] < 0 or columns.integers[_SEQ_LEN, row] < 0:
        return ODD
    if last > first:
        if not _sort(columns.positions, first, last, columns.bitmap):
            return ODD
        if columns.positions[last - 1] >= columns.integers[_SEQ_LEN, row]:
            return ODD
    columns.offsets[row + 1] = last
    return at + 1


@compiled_in_place
def _byte(text: NDArray[np.uint8], at: int) -> np.uint8:
    """``text[at]`` where it counts: nobody asks whether an unsigned index is negative."""
    byte: np.uint8 = text[np.uint64(at)]
    return byte


@compiled_in_place
def _skip_space(text: NDArray[np.uint8], at: int) -> int:
    while _byte(text, at) <= _SPACE and (text[at] == _SPACE or text[at] == _TAB or text[at] == _RETURN):
        at += 1
    return at


@compiled_in_place
def _string(text: NDArray[np.uint8], at: int) -> int:
    """Behind a string of printable ASCII without escapes."""
    if _byte(text, at) != _QUOTE:
        return ODD
    at += 1
    while _byte(text, at) != _QUOTE:
        if _byte(text, at) < _SPACE or _byte(text, at) >= _DELETE or _byte(text, at) == _BACKSLASH:
            return ODD
        at += 1
    return at + 1


@compiled_in_place
def _literal(text: NDArray[np.uint8], at: int, word: NDArray[np.uint8]) -> int:
    """Behind ``word``, which holds no newline."""
    for i in range(len(word)):
        if text[at + i] != word[i]:
            return ODD
    return at + len(word)


@compiled_in_place
def _field(text: NDArray[np.uint8], at: int, length: int) -> int:
    """The number of a key among ``_KEYS``, or ``_OTHER``."""
    for field in range(len(_KEY_LENGTHS)):
        if _KEY_LENGTHS[field] == length and _literal(text, at, _KEY_BYTES[field, :length]) >= 0:
            return field
    return _OTHER


@compiled_in_place
def _value_after_colon(text: NDArray[np.uint8], at: int) -> int:
    """Where the value of a key begins that ends before ``at``."""
    at = _skip_space(text, at)
    return _skip_space(text, at + 1) if text[at] == _COLON else ODD


@compiled_in_place
def _digits(text: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """Behind the digits at ``at``, and their value unless it is beyond 64 bits."""
    value = 0
    digit = _digit(text, at)
    while 0 <= digit <= 9:
        value = value * 10 + digit
        at += 1
        digit = _digit(text, at)
    return at, value


@compiled_in_place
def _digit(text: NDArray[np.uint8], at: int) -> int:
    """From 0 to 9 if it is one."""
    digit: int = text[np.uint64(at)] - _ZERO
    return digit


@compiled_in_place
def _integer(text: NDArray[np.uint8], at: int, most_digits: int) -> tuple[int, int]:
    """Behind an integer, and its value. -0 is odd, since not every parser makes an integer of it."""
    negative = text[at] == _MINUS
    begin = at + 1 if negative else at
    at, value = _digits(text, begin)
    length = at - begin
    if length == 0 or length > most_digits or (text[begin] == _ZERO and (length > 1 or negative)):
        return ODD, 0
    return at, -value if negative else value


@compiled_in_place
def _number(text: NDArray[np.uint8], at: int) -> int:
    """Behind a number of which a parser makes no infinity: 18 digits before the point, 2 in the exponent."""
    begin = at + 1 if text[at] == _MINUS else at
    at, _ = _digits(text, begin)
    length = at - begin
    if length == 0 or length > 18 or (text[begin] == _ZERO and length > 1):
        return ODD
    if text[at] == _POINT:
        begin = at + 1
        at, _ = _digits(text, begin)
        if at == begin:
            return ODD
    if text[at] | _LOWER_CASE == _E:
        at += 1
        begin = at + 1 if text[at] == _PLUS or text[at] == _MINUS else at
        at, _ = _digits(text, begin)
        if not 1 <= at - begin <= 2:
            return ODD
    return at


@compiled_in_place
def _scalar(text: NDArray[np.uint8], at: int) -> int:
    """Behind a value that is neither list nor object."""
    if text[at] == _QUOTE:
        return _string(text, at)
    if text[at] == _T:
        return _literal(text, at, _TRUE)
    if text[at] == _F:
        return _literal(text, at, _FALSE)
    if text[at] == _N:
        return _literal(text, at, _NULL)
    return _number(text, at)


@compiled_in_place
def _any_value(text: NDArray[np.uint8], at: int) -> int:
    """Behind the value at ``at``, which may hold others up to ``_MAX_DEPTH`` deep."""
    depth = 0
    objects = 0  # bit 0: what is open at this depth is an object, bit 1: at the depth above it, and so on
    while True:
        is_object = text[at] == _OPEN_OBJECT
        if is_object or text[at] == _OPEN_LIST:
            at = _skip_space(text, at + 1)
            if text[at] == (_CLOSE_OBJECT if is_object else _CLOSE_LIST):
                at += 1
            else:
                if depth == _MAX_DEPTH:
                    return ODD
                depth += 1
                objects = objects << 1 | is_object
                at = _member(text, at, is_object)
                if at < 0:
                    return ODD
                continue
        else:
            at = _scalar(text, at)
            if at < 0:
                return ODD
        while depth > 0:
            at = _skip_space(text, at)
            is_object = objects & 1 == 1
            if text[at] == _COMMA:
                at = _member(text, _skip_space(text, at + 1), is_object)
                if at < 0:
                    return ODD
                break
            if text[at] != (_CLOSE_OBJECT if is_object else _CLOSE_LIST):
                return ODD
            at += 1
            depth -= 1
            objects >>= 1
        else:
            return at


@compiled_in_place
def _member(text: NDArray[np.uint8], at: int, is_object: bool) -> int:
    """Where the value begins of the element of a list, or the member of an object, at ``at``."""
    if not is_object:
        return at
    colon = _string(text, at)
    return _value_after_colon(text, colon) if colon >= 0 else ODD


@compiled_in_place
def _list_of_positions(text: NDArray[np.uint8], at: int, positions: NDArray[np.int32], filled: int) -> tuple[int, int]:
    """Behind a list of positions, or ``ODD`` or ``FULL``; and the end of what it filled of ``positions``."""
    if text[at] != _OPEN_LIST:
        return ODD, filled
    at = _skip_space(text, at + 1)
    if text[at] == _CLOSE_LIST:
        return at + 1, filled
    length = 1
    while True:
        if filled == len(positions):
            return FULL, filled
        begin = at
        if _as_many_digits(text, begin, length):
            at += length
            positions[np.uint64(filled)] = _value_of_digits(text, begin, length)
        else:
            at, positions[filled] = _digits(text, begin)
            length = at - begin
            if length == 0 or length > _POSITION_DIGITS:
                return ODD, filled
        if _byte(text, begin) == _ZERO and length > 1:
            return ODD, filled
        filled += 1
        at = _skip_space(text, at)
        if _byte(text, at) != _COMMA:
            return (at + 1 if _byte(text, at) == _CLOSE_LIST else ODD), filled
        at = _skip_space(text, at + 1)


@compiled_in_place
def _as_many_digits(text: NDArray[np.uint8], at: int, length: int) -> bool:
    """Whether there are exactly ``length`` digits, 1 or more; may be False for those that end near the text's end.

    Neighbours in a list mostly have as many. To guess so is to know where the next number begins before this one
    is read, and no byte has to wait for the one before it.
    """
    if length > 7 or at + 8 > len(text):
        return False
    word = _eight_bytes(text, at) ^ _EIGHT_ZEROS  # a digit becomes its value
    no_digit = (word + _TO_BIT_7 | word) & _EIGHT_BITS_7  # right up to the first; its carry may spoil the rest
    return bool(no_digit << np.uint64(56 - 8 * length) == _BIT_63)


@compiled_in_place
def _value_of_digits(text: NDArray[np.uint8], at: int, length: int) -> np.int64:
    """The number that the 1 to 7 digits at ``at`` are; eight bytes must be there."""
    word = _eight_bytes(text, at) ^ _EIGHT_ZEROS
    word <<= np.uint64(64 - 8 * length)  # zeros in front, and away with what follows
    word = word * np.uint64(10) + (word >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    word = word * np.uint64(100) + (word >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    word = word * np.uint64(10000) + (word >> np.uint64(32)) & np.uint64(0xFFFFFFFF)
    return np.int64(word)


@compiled_in_place
def _eight_bytes(text: NDArray[np.uint8], at: int) -> np.uint64:
    """The eight bytes at ``at``, the first one lowest: this becomes a single load."""
    word = np.uint64(0)
    for i in range(8):
        word |= np.uint64(_byte(text, at + i)) << np.uint64(8 * i)
    return word


@compiled_in_place
def _sort(values: NDArray[np.int32], begin: int, end: int, bitmap: NDArray[np.uint64]) -> bool:
    """Sort ``values[begin:end]``, at least one and none negative; False if one is there twice or beyond the bitmap."""
    highest = values[begin]
    ascending = True
    for i in range(begin + 1, end):
        ascending &= values[i] > values[i - 1]
        highest = max(highest, values[i])
    if ascending:
        return True
    words = (highest >> 6) + 1
    if words > len(bitmap):
        return False
    for word in range(words):
        bitmap[word] = 0
    twice = np.uint64(0)
    for i in range(begin, end):
        word = values[i] >> 6
        bit = _ONE << np.uint64(values[i] & 63)
        twice |= bitmap[word] & bit
        bitmap[word] |= bit
    for word in range(words):
        bits = bitmap[word]
        while bits != 0:
            values[begin] = word << 6 | _ones(~bits & bits - _ONE)  # ones below the lowest: its number
            bits &= bits - _ONE
            begin += 1
    return bool(twice == 0)


@compiled_in_place
def _ones(bits: np.uint64) -> np.int64:
    """How many bits are set: summed in pairs, fours and eights; then the product's top byte is the sum of all bytes."""
    bits -= bits >> _ONE & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + (bits >> np.uint64(2) & np.uint64(0x3333333333333333))
    bits = bits + (bits >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64(bits * np.uint64(0x0101010101010101) >> np.uint64(56))
