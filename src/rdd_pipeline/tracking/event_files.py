"""TensorBoard's event files, written and continued without TensorBoard.

A file is a row of records (tensorflow/core/lib/io/record_writer.h), all little-endian: length as
uint64, masked CRC-32C of these eight bytes, an `Event` as protobuf message, masked CRC-32C of that.
The numbers of the fields are those of tensorflow/core/util/event.proto and framework/summary.proto.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # protobuf's wire types
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY = 1, 2, 3, 5  # of Event
_VALUE = 1  # of Summary
_TAG, _SIMPLE_VALUE = 1, 2  # of Summary.Value


class EventFile:
    """Scalars of one training. Nothing is written before `flush` but a new file's first record.

    A tag has one point at a step: what is told again by a training that goes on is left out. A last
    record that a killed writer has left half-written is cut off.

    Args:
        path: Made, with its folders, if it is not there; its name has to contain ``tfevents``.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: dict[str, tuple[int, bytes]] = {}
        self._waiting = bytearray()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            end = 0
            for event, end in _records(file.read()):  # noqa: B007
                self._remember(event)
            file.truncate(end)
            if end == 0:
                file.write(_record(_event(0, _field(_FILE_VERSION, _BYTES, b"brain.Event:2"))))

    def add(self, step: int, values: Mapping[str, float], *, revised: bool = False) -> None:
        """Note the points of one step, except those that the file has.

        Args:
            step: Not negative.
            values: By tag; stored as float32.
            revised: Where the file ends at this very step, write a value that differs once more.
        """
        new = {}
        for tag, value in values.items():
            point = step, struct.pack("<f", ctypes.c_float(value).value)  # too large: infinite
            last = self._last.get(tag, (-1, b""))
            if step > last[0] or (revised and step == last[0] and point != last):
                new[tag] = self._last[tag] = point
        if new:
            summary = b"".join(
                _field(
                    _VALUE,
                    _BYTES,
                    _field(_TAG, _BYTES, tag.encode()) + _field(_SIMPLE_VALUE, _FLOAT, value),
                )
                for tag, (_, value) in new.items()
            )
            self._waiting += _record(_event(step, _field(_SUMMARY, _BYTES, summary)))

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            OSError: It cannot be written; or the file was deleted, and would have no beginning.
        """
        # Forgotten first: a signal that comes meanwhile may not have it written twice.
        waiting, self._waiting = self._waiting, bytearray()
        if waiting:
            with self._path.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(waiting)

    def _remember(self, event: bytes) -> None:
        found = dict(_fields(event))
        for _, value in _fields(found.get(_SUMMARY, b"")):
            point = dict(_fields(value))
            self._last[point[_TAG].decode()] = (found.get(_STEP, 0), point[_SIMPLE_VALUE])


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4), a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_OF_BYTE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_OF_BYTE = tuple(map(_crc_of_byte, range(256)))


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """What whole records hold and where they end, up to the first that is not whole."""
    end = 0
    while len(data) >= (start := end) + 16:
        end = start + 16 + int.from_bytes(data[start : start + 8], "little")
        content = data[start + 12 : end - 4]
        if data[start:end] != _record(content):
            return
        yield content, end


def _event(step: int, field: bytes) -> bytes:
    now = struct.pack("<d", time.time())
    return _field(_WALL_TIME, _DOUBLE, now) + _field(_STEP, _VARINT, _varint(step)) + field


def _field(number: int, wire: int, value: bytes) -> bytes:
    length = _varint(len(value)) if wire == _BYTES else b""
    return bytes([number << 3 | wire]) + length + value


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields; those of fixed width as bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        byte = message[place]
        place += 1
        return byte & 0x7F | (varint() << 7 if byte & 0x80 else 0)

    while place < len(message):
        number, wire = divmod(varint(), 8)
        if wire == _VARINT:
            yield number, varint()
        else:
            size = {_DOUBLE: 8, _FLOAT: 4}.get(wire) or varint()
            place += size
            yield number, message[place - size : place]
