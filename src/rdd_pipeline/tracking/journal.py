"""The file of a session: a record is a line of it first, and goes to MLflow from there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import from_checked_json, to_checked_json, write_atomically
from rdd_pipeline.tracking.addresses import without_secrets
from rdd_pipeline.tracking.records import Record, first_line, read_record


class JournalInUseError(UserError):
    """The process that writes a journal, or one that sends it, is alive."""


class Line(NamedTuple):
    """A record and the bytes of the file where it begins and ends.

    Attributes:
        record: None: the line is damaged, or this version does not know what it means.
        fault: What is wrong with it then.
    """

    record: Record | None
    start: int
    end: int
    fault: str = ""


@dataclass
class Sent:
    """What MLflow has of a journal, kept in ``FILE.sent``.

    Attributes:
        address: Which MLflow, without secrets.
        offset: It was offered everything up to this byte of the file.
        refused: Where the lines begin that it did not take.
        runs: Its ids of the runs that records have asked for, by the ids in the records.
    """

    address: str
    offset: int
    refused: list[int] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)


class Journal:
    """Records of one session in a file that only grows, one JSON object a line.

    Whoever goes on after a killed process loses nothing and repeats one request at most, which
    MLflow recognizes. A lock that ends with the process keeps others away until then.

    Args:
        path: The file.
        tracking_uri: MLflow's address, which the first line says without secrets; None: where the
            records of an existing file belong.
        new: Make the file; otherwise go on with one that another process has left.

    Raises:
        JournalInUseError: Another process has it open.
        UserError: There is no such file, or it is none of these.
    """

    def __init__(self, path: Path, tracking_uri: str | None = None, *, new: bool = False) -> None:
        self.path = path
        self.closed = False
        self._sent = path.with_name(f"{path.name}.sent")
        self._kept = path.with_name(f"{path.name}.files")
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise UserError(f"There is no file or folder {path}. Nothing may be left to send.")
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # there may be no locks here: what is new needs none at once
            if not new:
                raise JournalInUseError(f"{path}: its run goes on, or it is being sent.") from error
        if new and not self.size:
            self._write(_line({"tracking_uri": without_secrets(str(tracking_uri))}))
        self._file.seek(0)
        header = self._file.readline()
        self._checked = _CHECK.encode() in header  # then all lines are, else it is a former file
        self.tracking_uri: str = self._read_header(header, tracking_uri)
        self._begin = len(header)
        self.sent = Sent(without_secrets(tracking_uri or self.tracking_uri), self._begin)
        # Without a note, or with a damaged one, all of it is sent again.
        with contextlib.suppress(OSError, UserError, TypeError):
            sent = Sent(**from_checked_json(self._sent.read_bytes(), str(self._sent)))
            if sent.address == self.sent.address:
                self.sent = sent

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, records: Iterable[Record]) -> None:
        """Add records, all or none.

        Raises:
            OSError: The disk is full, for example.
        """
        self._write("".join(_line(record._asdict()) for record in records))

    def keep(self, file: Path) -> Path:
        """Copy a file beside the journal, to be removed with it; returns the copy's path."""
        place = self._kept / secrets.token_hex(4) / file.name
        place.parent.mkdir(parents=True)
        return Path(shutil.copy(file, place))

    def unsent(self, *, again: bool = False) -> Iterator[Line]:
        """Lines that MLflow was not offered yet, after those that it refused if `again`.

        A last line that a killed process has left half-written is left out.
        """
        with self.path.open("rb") as file:
            for start in [*self.sent.refused] if again else ():
                file.seek(start)
                yield _read_line(file.readline(), start, self._checked)
            start = file.seek(self.sent.offset)
            for text in file:
                if text.endswith(b"\n"):
                    yield _read_line(text, start, self._checked)
                start += len(text)

    def has_rest(self, *, again: bool = False) -> bool:
        """Whether `unsent` has anything."""
        return next(self.unsent(again=again), None) is not None

    def begin_again(self) -> None:
        """Forget what MLflow has: all of it is sent again."""
        self.sent = Sent(self.sent.address, self._begin)

    def settle(self, lines: Sequence[Line], taken: Sequence[bool]) -> None:
        """Note which of the lines MLflow took, all of which it was offered."""
        refused = {line.start for line, ok in zip(lines, taken, strict=True) if not ok}
        refused |= {*self.sent.refused} - {line.start for line in lines}
        self.sent.refused = sorted(refused)
        self.sent.offset = max(self.sent.offset, lines[-1].end)
        # Without it more is sent again, which MLflow recognizes.
        with contextlib.suppress(OSError, UserError):
            write_atomically(self._sent, to_checked_json(asdict(self.sent)), durable=False)

    def close(self, *, done: bool = True) -> int:
        """Let others have the file, or remove it if MLflow has all of it and that is `done`.

        Returns:
            How many records MLflow was not offered or did not take.
        """
        with self.path.open("rb") as file:
            file.seek(self.sent.offset)
            count = len(self.sent.refused) + file.read().count(b"\n")
        if done and not count:
            self._sent.unlink(missing_ok=True)
            shutil.rmtree(self._kept, ignore_errors=True)
            self.path.unlink()
        self._file.close()
        self.closed = True
        return count

    def number(self, line: Line) -> int:
        """Of a line in the file, counted from 1."""
        with self.path.open("rb") as file:
            return file.read(line.start).count(b"\n") + 1

    def _read_header(self, header: bytes, given: str | None) -> str:
        try:
            return str(_fields(header)["tracking_uri"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            with self.path.open("rb") as file:
                start = len(file.readline())
                known = any(_read_line(text, start).record for text in islice(file, 100))
            if not known:
                raise UserError(
                    f"{self.path} is no file of unsent MLflow records ({first_line(error)}). Give "
                    "a file of data/07_model_output/untracked."
                ) from error
            if given is None:
                raise UserError(
                    f"The first line of {self.path} is damaged ({first_line(error)}). Say with "
                    "--tracking-uri where its records belong."
                ) from error
            return given

    def _write(self, text: str) -> None:
        data = text.encode()
        size = self.size
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(size)  # no half of a line
            raise


_CHECK = ', "check": '


def _line(fields: Mapping[str, object]) -> str:
    """One JSON object, whose last field is a checksum of the others."""
    text = json.dumps(fields)
    return f"{text[:-1]}{_CHECK}{zlib.crc32(text.encode())}}}\n"


def _fields(line: bytes, checked: bool = False) -> dict[str, Any]:
    """Inverse of `_line`; without `checked` also of a former version's line without a checksum.

    Raises:
        ValueError, TypeError: It is damaged.
    """
    start, found, check = line.decode().rpartition(_CHECK)
    text = start + "}" if found else line.decode()
    if (found or checked) and check.strip() != f"{zlib.crc32(text.encode())}}}":
        raise ValueError("its checksum does not fit")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    return fields


def _read_line(text: bytes, start: int, checked: bool = False) -> Line:
    try:
        return Line(read_record(_fields(text, checked)), start, start + len(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return Line(None, start, start + len(text), first_line(error))
