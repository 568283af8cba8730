"""The key/value part of a GGUF header: a bounds-checked cursor over the mapped file and the dictionary it fills.

Layout (little endian): string = u64 length, bytes; key/value = string key, u32 type, value; array = u32 element type,
u64 count, elements. Every length and count is compared with the bytes that are left before anything is allocated.
Arrays stay where they are: numbers become numpy views of the file, strings become a `StringArray` that decodes on
demand (49,152 tokens as Python strings would cost 5 MB that only the tokenizer's construction needs).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tests: tests/test_gguf*.py
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

# Beyond any real file by far; they bound the time and memory that a hostile header can ask for.
MAX_KEY_BYTES = 65535  # the format's own limit
MAX_STRING_BYTES = 1 << 26
MAX_STRINGS = 1 << 22  # strings in one array
MAX_NESTED = 1 << 14  # arrays inside arrays, in the whole file

STRING, ARRAY, BOOL = 8, 9, 7
# id: (name, numpy type, struct format)
SCALARS = {
    0: ("uint8", "<u1", "<B"),
    1: ("int8", "<i1", "<b"),
    2: ("uint16", "<u2", "<H"),
    3: ("int16", "<i2", "<h"),
    4: ("uint32", "<u4", "<I"),
    5: ("int32", "<i4", "<i"),
    6: ("float32", "<f4", "<f"),
    7: ("bool", "?", "<B"),
    10: ("uint64", "<u8", "<Q"),
    11: ("int64", "<i8", "<q"),
    12: ("float64", "<f8", "<d"),
}


class ModelFileError(ValueError):
    """A model file that cannot be used. The message names the file, the part, what was expected and what was found."""


class Cursor:
    """Reads little-endian values from `buffer`, never past `end`; errors name the file and `what` is being read."""

    def __init__(self, buffer: mmap.mmap, source: str):
        self.buffer, self.source = buffer, source
        self.pos, self.end = 0, len(buffer)
        self.what = "header"
        self.nested = 0

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {self.what}: {problem}")

    def need(self, count: int, thing: str) -> None:
        left = self.end - self.pos
        if count > left:
            raise self.error(f"{thing} needs {count} bytes at offset {self.pos}, the file has {left} left (truncated?)")

    def scalar(self, code: str, thing: str = "a value"):
        size = struct.calcsize(code)
        self.need(size, thing)
        (value,) = struct.unpack_from(code, self.buffer, self.pos)
        self.pos += size
        return value

    def text(self, thing: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.scalar("<Q", f"the length of {thing}")
        if length > limit:
            raise self.error(f"{thing} claims {length} bytes, expected at most {limit}")
        self.need(length, thing)
        raw = self.buffer[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{thing} is not UTF-8 (byte {error.start} of {length}): {raw[:40]!r}") from None

    def value(self, type_id: int):
        """One metadata value: str, int, float, bool, numpy array, StringArray, or a list of arrays."""
        if type_id == STRING:
            return self.text("the string")
        if type_id == ARRAY:
            return self._array(depth=0)
        if type_id not in SCALARS:
            raise self.error(f"value type {type_id}, expected 0..12")
        value = self.scalar(SCALARS[type_id][2], f"a {SCALARS[type_id][0]}")
        if type_id == BOOL:
            if value > 1:
                raise self.error(f"a bool must be 0 or 1, got {value}")
            return bool(value)
        return value

    def _array(self, depth: int):
        type_id = self.scalar("<I", "the array's element type")
        count = self.scalar("<Q", "the array's length")
        if type_id == STRING:
            return self._strings(count)
        if type_id == ARRAY:
            return self._arrays(count, depth)
        if type_id not in SCALARS:
            raise self.error(f"array of value type {type_id}, expected 0..12")
        name, dtype, _ = SCALARS[type_id]
        size = np.dtype(dtype).itemsize
        self.need(count * size, f"an array of {count} {name}")
        if type_id == BOOL and count and np.frombuffer(self.buffer, np.uint8, count, self.pos).max() > 1:
            raise self.error("a bool array holds values other than 0 and 1")
        values = np.frombuffer(self.buffer, dtype, count, self.pos) if count else np.empty(0, dtype)
        self.pos += count * size
        return values

    def _strings(self, count: int) -> StringArray:
        if count > MAX_STRINGS:
            raise self.error(f"an array of {count} strings, expected at most {MAX_STRINGS}")
        self.need(count * 8, f"an array of {count} strings")
        starts = array("Q", [0]) * (count + 1)
        unpack, buffer, pos, last = struct.Struct("<Q").unpack_from, self.buffer, self.pos, self.end - 8
        for index in range(count):
            if pos > last:
                self.pos = pos
                self.need(8, f"the length of string {index} of {count}")
            (length,) = unpack(buffer, pos)
            pos += 8
            starts[index] = pos
            if length > MAX_STRING_BYTES or length > self.end - pos:
                raise self.error(f"string {index} of {count} claims {length} bytes, {self.end - pos} are left")
            pos += length
        starts[count] = pos + 8
        self.pos = pos
        return StringArray(buffer, starts, f"{self.source}: {self.what}")

    def _arrays(self, count: int, depth: int) -> list:
        if depth >= 2:
            raise self.error("arrays are nested more than 3 deep")
        self.need(count * 12, f"an array of {count} arrays")
        self.nested += count
        if self.nested > MAX_NESTED:
            raise self.error(f"the file holds more than {MAX_NESTED} arrays inside arrays")
        return [self._array(depth + 1) for _ in range(count)]


class StringArray(Sequence):
    """An array of strings that stays in the mapped file; each access decodes. `tolist()` decodes all of them."""

    def __init__(self, buffer: mmap.mmap, starts: array, where: str):
        self._buffer, self._starts, self._where = buffer, starts, where

    def __len__(self) -> int:
        return len(self._starts) - 1

    def longest(self) -> int:
        """Bytes of the longest string."""
        return int(np.diff(np.frombuffer(self._starts, np.uint64)).max(initial=8)) - 8

    def raw(self, index: int) -> bytes:
        """The undecoded bytes of one string."""
        if not 0 <= index < len(self):
            raise IndexError(f"string index {index} is out of range for {len(self)} strings")
        return self._buffer[self._starts[index] : self._starts[index + 1] - 8]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._decode(i) for i in range(*index.indices(len(self)))]
        return self._decode(index + len(self) if index < 0 else index)

    def _decode(self, index: int) -> str:
        raw = self.raw(index)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{self._where}: string {index} is not UTF-8 (byte {error.start} of {len(raw)}): {raw[:40]!r}"
            raise ModelFileError(message) from None

    def __iter__(self) -> Iterator[str]:
        return map(self._decode, range(len(self)))

    def tolist(self) -> list[str]:
        buffer, starts = self._buffer, self._starts
        try:
            return [buffer[starts[i] : starts[i + 1] - 8].decode("utf-8") for i in range(len(self))]
        except UnicodeDecodeError:
            return list(self)  # raises, and names the string

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"


_REQUIRED = object()
_KINDS = {
    str: ("a string", lambda v: isinstance(v, str)),
    bool: ("a bool", lambda v: isinstance(v, bool)),
    int: ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    StringArray: ("an array of strings", lambda v: isinstance(v, StringArray)),
    np.ndarray: ("an array of numbers", lambda v: isinstance(v, np.ndarray)),
}


class Metadata(dict):
    """The metadata as a dict of Python values that knows its file, with a typed getter whose errors name both."""

    def __init__(self, source: str = "<metadata>", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.source = source

    def value(self, key: str, kind: type, default=_REQUIRED):
        """`self[key]` if it is of `kind` (str, bool, int, float, StringArray, np.ndarray), `default` if it is absent.

        Raises ModelFileError when the type is another, or when the key is absent and there is no default.
        """
        if key not in self:
            if default is _REQUIRED:
                raise ModelFileError(f"{self.source}: metadata key {key!r} is missing, expected {_KINDS[kind][0]}")
            return default
        value = self[key]
        name, matches = _KINDS[kind]
        if not matches(value):
            got = f"{type(value).__name__} {value!r}"
            raise ModelFileError(f"{self.source}: metadata key {key!r}: expected {name}, got {got[:120]}")
        return float(value) if kind is float else value
