"""Another reader of TensorBoard's event files: by protobuf's own library, with a bitwise CRC."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

KINDS = descriptor_pb2.FieldDescriptorProto


def _event_type() -> Any:
    """`Event` of tensorflow/core/util/event.proto, as far as scalars need it."""
    file = descriptor_pb2.FileDescriptorProto(name="events_of_tests.proto", package="events")
    for message, fields in {
        "Value": {"tag": (1, KINDS.TYPE_STRING), "simple_value": (2, KINDS.TYPE_FLOAT)},
        "Summary": {"value": (1, ".events.Value")},
        "Event": {
            "wall_time": (1, KINDS.TYPE_DOUBLE),
            "step": (2, KINDS.TYPE_INT64),
            "file_version": (3, KINDS.TYPE_STRING),
            "summary": (5, ".events.Summary"),
        },
    }.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = KINDS.LABEL_REPEATED if name == "value" else KINDS.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = KINDS.TYPE_MESSAGE, kind
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("events.Event"))


EVENT = _event_type()


def masked_crc32c(data: bytes) -> int:
    """By long division, the highest bit first, with the polynomial as published: 0x1EDC6F41."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= int(f"{byte:08b}"[::-1], 2) << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x1EDC6F41 if crc >> 31 else 0)) & 0xFFFFFFFF
    crc = int(f"{crc:032b}"[::-1], 2) ^ 0xFFFFFFFF
    return ((crc // 2**15) + (crc % 2**15) * 2**17 + 0xA282EAD8) % 2**32


def read_events(path: Path) -> list[Any]:
    """All events of a file, which has to be whole."""
    found = []
    with path.open("rb") as file:
        while head := file.read(12):
            size, crc = struct.unpack("<QI", head)
            assert crc == masked_crc32c(head[:8])
            data = file.read(size)
            assert struct.unpack("<I", file.read(4)) == (masked_crc32c(data),)
            found.append(EVENT.FromString(data))
    return found


def read_points(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, in the order of the file."""
    first, *events = read_events(path)
    assert first.file_version == "brain.Event:2"
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
