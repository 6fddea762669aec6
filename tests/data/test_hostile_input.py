"""Files that somebody made to hurt: each works, or ends in one line, soon and in little memory.

`test_broken_input` has what goes wrong by accident. Each case changes a small good data set of the
layout `folders` and is looked at as ingestion does it: the folder is listed, every file is read,
the report is made, and the figures where names are hostile.
"""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Index, check_images
from rdd_pipeline.data.layouts import get_layout, raise_problems
from rdd_pipeline.data.statistics import label_statistics
from rdd_pipeline.errors import UserError, printable
from rdd_pipeline.pipelines.data_ingestion.report import ingestion_report
from rdd_pipeline.reporting.comparison_figures import as_svg
from rdd_pipeline.reporting.figures import confusion_figure
from rdd_pipeline.reporting.preview import dataset_preview

from .files import encoded, noise, save

SIZE = (24, 32)
IMAGE, MASK = noise(1, *SIZE, 3), noise(2, *SIZE, high=3)
TABLE = "classes: [road, sky, {name: car, color: [1, 2, 3]}]\nignore: [255]\n"
LONGEST = 20.0
"""Seconds, on a machine that is busy with other things."""
MOST_MEMORY = 2**30

Case = Callable[[Path], object]


def make(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "x"):
            save(root / "images" / split / f"{name}.png", IMAGE)
            save(root / "masks" / split / f"{name}.png", MASK)
    (root / "labels.yaml").write_text(TABLE)
    return root


def x(root: Path, side: str = "images") -> Path:
    """The file that a case is about, gone."""
    path = root / side / "train" / "x.png"
    path.unlink()
    return path


def holds(data: bytes, side: str = "images", name: str = "x.png") -> Case:
    return lambda root: x(root, side).with_name(name).write_bytes(data)


def linked(target: str, side: str = "images") -> Case:
    return lambda root: x(root, side).symlink_to(target)


def listens(root: Path) -> None:
    folder = os.getcwd()
    os.chdir(x(root).parent)  # paths of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind("x.png")
    finally:
        os.chdir(folder)


def named(name: str | bytes) -> Case:
    """Image and mask have this name; others stay."""

    def change(root: Path) -> None:
        for side in ("images", "masks"):
            path = root / side / "train"
            os.rename(path / "x.png", os.fsencode(path) + b"/" + os.fsencode(name) + b".png")

    return change


def both(image: bytes, mask: bytes, name: str = "x.png") -> Case:
    return lambda root: (holds(image, name=name)(root), holds(mask, "masks")(root))


def table(text: str | bytes, name: str = "labels.yaml") -> Case:
    def change(root: Path) -> None:
        (root / "labels.yaml").unlink()
        data = text if isinstance(text, bytes) else text.encode()
        (root / name).write_bytes(data)

    return change


def classes(*names: str) -> Case:
    return table("classes: [" + ", ".join(f"'{name}'" for name in names) + "]\nignore: [255]\n")


def listed(data: bytes | Callable[[Path], object]) -> Case:
    """Splits by lists; `train` is this."""

    def change(root: Path) -> None:
        (root / "labels.yaml").write_text(
            TABLE + "images: images/val\nmasks: masks/val\nlists: sets/SPLIT.txt\n"
        )
        (root / "sets").mkdir()
        (root / "sets" / "val.txt").write_text("a\n")
        path = root / "sets" / "train.txt"
        path.write_bytes(data) if isinstance(data, bytes) else data(path)

    return change


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    first, second = Image.fromarray(IMAGE), Image.fromarray(IMAGE[::-1].copy())
    return encoded(first, kind, save_all=True, append_images=[second])


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(IMAGE, exif=exif)


def palette_with_alpha(values: np.ndarray) -> bytes:
    picture = Image.fromarray(values)
    picture.putpalette(list(range(30)))
    return encoded(picture, transparency=bytes([0, 128, 255]))


def sparse(size: int) -> Case:
    return lambda root: os.truncate(root / "images" / "train" / "x.png", size)


NAN = np.full(SIZE, np.nan, np.float32)
ZLIB_BOMB = zlib.compress(bytes(200_000_000), 9)
SIXTEEN = IMAGE[..., 0].astype(np.uint16) * 257
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SCRIPT = "<script>window.hacked=1</script><img src=x onerror=alert(1)>"

# Kind -> (change, what its line says; None: it works).
IMAGES: dict[str, tuple[Case, str | None]] = {
    "pipe": (lambda r: os.mkfifo(x(r)), "is a named pipe, expected a file"),
    "pipe as mask": (lambda r: os.mkfifo(x(r, "masks")), "is a named pipe, expected a file"),
    "link to a pipe": (
        lambda r: (os.mkfifo(r / "pipe"), x(r).symlink_to(r / "pipe")), "pipe, a named pipe",
    ),
    "socket": (listens, "is a socket, expected a file"),
    "link to zeros without end": (linked("/dev/zero"), "is a link to /dev/zero, a device"),
    "link to zeros as mask": (linked("/dev/zero", "masks"), "a link to /dev/zero, a device"),
    "link to random numbers": (linked("/dev/random"), "is a link to /dev/random, a device"),
    "link to nothing at all": (linked("/dev/null"), "is a link to /dev/null, a device"),
    "link to the terminal": (linked("/dev/tty"), "is a link to /dev/tty"),
    "link to itself": (linked("x.png"), "Too many levels of symbolic links"),
    "two links to each other": (
        lambda r: (x(r).symlink_to("y.png"), (r / "images/train/y.png").symlink_to("x.png")),
        "has no mask",
    ),
    "broken link": (linked("nowhere"), "is a link to nowhere, which does not exist"),
    "link to a folder": (linked("/"), "has no image"),
    "link with control characters": (linked("a\x1b[31m\nb"), r"is a link to a\x1b[31m\nb, which"),
    "folder with the name of an image": (lambda r: x(r).mkdir(), "has no image"),
    "folder with the name of a mask": (lambda r: x(r, "masks").mkdir(), "has no mask"),
    "sparse file of a terabyte": (sparse(10**12), "has 1,000,000 MB, expected at most 1,074 MB"),
    "memory of the process": (linked("/proc/self/mem"), "/proc/self/mem|cannot be read"),
    "nothing": (holds(b""), "is empty (0 bytes)"),
    "zeros": (holds(bytes(5000)), "not a PNG"),
    "truncated": (holds(encoded(IMAGE)[:300]), "cannot be decoded"),
    "truncated mask": (holds(encoded(MASK)[:60], "masks"), "cannot be decoded"),
    "only the signature": (holds(b"\x89PNG\r\n\x1a\n"), "cannot be decoded"),
    "header of 60000 x 60000": (holds(png(60000, 60000)), "60000 x 60000 pixels are 3600 million"),
    "mask of 60000 x 60000": (holds(png(60000, 60000), "masks"), "are 3600 million"),
    "header of 0 x 0": (holds(png(0, 0)), "cannot be decoded"),
    "negative size": (holds(png(2**31 - 1, 2**31 - 1)), "cannot be decoded"),
    "BMP of -1 rows": (
        holds(b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 8, -1, 1, 24, *[0] * 6)),
        "cannot be decoded",
    ),
    "compressed zeros of 200 MB behind 8 x 8": (
        holds(png(8, 8, chunk(b"IDAT", ZLIB_BOMB))), "is 32 x 24 pixels",
    ),
    "text of 200 MB, compressed": (
        holds(png(*SIZE[::-1], chunk(b"zTXt", b"a\0\0" + ZLIB_BOMB))), "cannot be decoded",
    ),
    "color profile of 200 MB, compressed": (
        holds(png(*SIZE[::-1], chunk(b"iCCP", b"a\0\0" + ZLIB_BOMB))), "cannot be decoded",
    ),
    "chunk of 4 GB": (holds(png(8, 8, b"\xff\xff\xff\xffIDAT")), "cannot be decoded"),
    "TIFF whose pages go in a circle": (
        holds(b"II*\0" + struct.pack("<IHI", 8, 0, 8)), "cannot be decoded",
    ),
    "one pixel": (both(encoded(IMAGE[:1, :1]), encoded(MASK[:1, :1])), None),
    "one row": (both(encoded(IMAGE[:1]), encoded(MASK[:1])), None),
    "animated PNG": (holds(frames("PNG")), "holds 2 pages or frames"),
    "animated WebP": (holds(frames("WEBP"), name="x.webp"), "holds 2 pages or frames"),
    "TIFF of two pages": (holds(frames("TIFF"), name="x.tif"), "holds 2 pages or frames"),
    "GIF": (holds(frames("GIF")), "not a PNG"),
    "CMYK": (holds(encoded(Image.fromarray(IMAGE).convert("CMYK"), "JPEG"), name="x.jpg"), None),
    "16 bits": (holds(encoded(SIXTEEN)), None),
    "palette with alpha": (holds(palette_with_alpha(MASK)), None),
    "palette mask with alpha": (holds(palette_with_alpha(MASK), "masks"), None),
    "turned by EXIF": (holds(turned(3)), None),
    "turned to the side by EXIF": (holds(turned(6)), "save it upright"),
    "mask turned by EXIF": (
        holds(encoded(MASK, exif=Image.open(io.BytesIO(turned(3))).getexif()), "masks"),
        "EXIF rotation",
    ),
    "NaN in a TIFF": (holds(encoded(NAN, "TIFF"), name="x.tif"), "floating-point gray"),
    "NaN in a mask": (holds(encoded(NAN, "TIFF"), "masks"), "floating-point values"),
    "wrong suffix": (holds(encoded(IMAGE, "JPEG"), name="x.bmp"), None),
    "two suffixes": (named("x.tar"), None),
    "two images of one name": (
        lambda r: save(r / "images/train/x.jpg", IMAGE), "have the same name",
    ),
    "names that differ in case": (
        lambda r: (save(r / "images/train/X.png", IMAGE), save(r / "masks/train/X.png", MASK)),
        None,
    ),
    "script in a page": (holds(SCRIPT.encode()), "not a PNG"),
    "SVG": (holds(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a PNG"),
    "PostScript": (holds(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a PNG"),
    "pickle": (holds(b"\x80\x04cos\nsystem\n"), "not a PNG"),
}  # fmt: skip
NAMES: dict[str, tuple[Case, str | None]] = {
    "newline": (named("a\nb"), r"the name of images/train/a\nb.png holds control characters"),
    "colors of a terminal": (named("a\x1b[31mred"), r"a\x1b[31mred.png holds control characters"),
    "title of a terminal": (named("\x1b]0;x\x07"), r"\x1b]0;x\x07.png holds control characters"),
    "text that runs backwards": (named("a\u202egnp"), r"a\u202egnp.png holds control characters"),
    "not UTF-8": (named(b"a\xff"), r"a\xff.png is not UTF-8 text"),
    "formula": (named(r"$\frac$"), None),
    "underscore": (named("_x"), None),
    "script": (named("<script>alert(1)<script>"), None),
    "template": (named("{{7*7}}{% raw %}"), None),
    "quotes and a shell": (named("';rm -rf $(x) `y` \"z\""), None),
    "formula of a table": (named("=1+1|'x'!A0"), None),
    "format": (named("%s%n{0}"), None),
    "as long as it can be": (named("n" * 251), None),
    "markup of a terminal": (named("[red]x[link=file:y]"), None),
    "backslashes": (named(r"..\..\x"), None),
    "folder with a control character": (
        lambda r: (r / "images/train/s\x1b").mkdir(), r"s\x1b holds control characters",
    ),
    "folders in a circle": (lambda r: (r / "images/train/loop").symlink_to(r), None),
}  # fmt: skip
TABLES: dict[str, tuple[Case, str | None]] = {
    "pipe": (lambda r: ((r / "labels.yaml").unlink(), os.mkfifo(r / "labels.yaml")), "named pipe"),
    "link to zeros": (
        lambda r: ((r / "labels.yaml").unlink(), (r / "labels.yaml").symlink_to("/dev/zero")),
        "is a device",
    ),
    "nested 20,000 deep": (table("classes: " + "[" * 20_000), "cannot be used"),
    "JSON nested 100,000 deep": (table("[" * 100_000, "labels.json"), "cannot be used"),
    "mappings nested 20,000 deep": (table("{a: " * 20_000), "cannot be used"),
    "aliases that grow": (table(ALIASES + "classes: *i\n"), "labels.yaml"),
    "alias of itself": (table("classes: &a [*a, *a]\n"), "labels.yaml"),
    "tag that calls": (table("classes: !!python/object/apply:os.system [id]\n"), "cannot be used"),
    "tag that imports": (table("!!python/module:os {}\n"), "cannot be used"),
    "not UTF-8": (table(b"\xff\xfe\x00"), "cannot be used"),
    "zero byte": (table(TABLE + "\0"), "cannot be used"),
    "comment of 50 MB": (table("#" + "x" * 50_000_000 + "\n" + TABLE), "has 50.0 MB, at most 1.0"),
    "2000 classes": (classes(*map(str, range(2000))), "at most 255 items"),
    "one class twice": (classes("a", "a"), "names a class twice"),
    "colors out of range": (
        table("classes: [{name: a, color: [1, 2, 256]}, b]\n"), r"is no color|color",
    ),
    "value out of range": (table("classes: [{name: a, value: 1e9}, b]\n"), "labels.yaml"),
    "infinite weight": (
        table("classes: [{name: a, weight: .inf}, {name: b, weight: 1}]\n"), "weight",
    ),
    "digits without end": (table("classes: [{name: a, value: " + "9" * 9000 + "}, b]\n"), "labels"),
    "name with an escape": (
        table('classes: ["a\\e[31m", b, c]\n'), r"name 'a\x1b[31m' of a class",
    ),
    "name with a new line": (table('classes: ["a\\nb", b, c]\n'), r"name 'a\nb' of a class"),
    "name of 100,000 characters": (classes("n" * 100_000, "b", "c"), "has 100000 characters"),
    "empty name": (classes("", "b", "c"), "has 0 characters"),
    "formula as name": (classes(r"$\frac$", "a$b", "_c"), None),
    "script as name": (classes(SCRIPT, "</svg>", "-->"), None),
    "template as name": (classes("{{7*7}}", "{% for %}", "c"), None),
    "path as split": (table(TABLE + "images: ../SPLIT\n"), "expected a path below"),
    "folders from the root": (table(TABLE + "masks: /etc/SPLIT\n"), "expected a path below"),
}  # fmt: skip
LISTS: dict[str, tuple[Case, str | None]] = {
    "pipe": (listed(lambda path: os.mkfifo(path)), "named pipe"),
    "device": (listed(lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "link to itself": (listed(lambda path: path.symlink_to(path)), "train"),
    "terabyte": (listed(lambda path: (path.touch(), os.truncate(path, 10**12))), "1,000,000.0 MB"),
    "control characters": (listed(b"a\n\x1b[31mx\n"), r"\x1b[31mx of sets/train.txt has neither"),
    "path to elsewhere": (listed(b"../../../etc/passwd\n"), "has neither"),
    "path from the root": (listed(b"/etc/passwd\n"), "has neither"),
    "line of 10 MB": (listed(b"a" * 10_000_000 + b"\n"), "has a line of 10000000"),
    "zero bytes": (listed(b"a\0b\n"), r"a\x00b of sets/train.txt has neither"),
}  # fmt: skip
CASES = {
    f"{what}: {kind}": case
    for what, cases in (("image", IMAGES), ("name", NAMES), ("table", TABLES), ("list", LISTS))
    for kind, case in cases.items()
}


def ingest(root: Path, *, draws: bool) -> tuple[Index, str]:
    """What ingestion does with a folder; the index and the report."""
    layout = get_layout("folders", root)
    index = check_images(root, layout, workers=1)
    labels = layout.labels
    report = ingestion_report(
        index, labels, label_statistics(index, labels), layout="folders", root=str(root),
        quarantine=False,
    )  # fmt: skip
    if draws and not index.problems:
        images = Images(root, index.samples, labels)
        pairs = [(sample.name, *images.read(sample)) for sample in index.samples]
        as_svg(dataset_preview(pairs, labels))
        as_svg(confusion_figure(torch.eye(labels.num_classes), labels.names))
    return index, report


@pytest.mark.parametrize("kind", CASES)
def test_hostile_files_work_or_end_in_one_line(tmp_path: Path, kind: str):
    change, message = CASES[kind]
    change(make(tmp_path))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        index, report = ingest(tmp_path, draws=not kind.startswith("image"))
        texts = [problem.text for problem in index.problems]
        with_all = "\n".join([*texts, *index.warnings, *(p.file for p in index.problems)])
        assert printable(with_all, lines=True) == with_all
        assert "<script>window" not in report
        raise_problems(tmp_path, index.problems[:1])
    except UserError as error:
        lines = str(error).splitlines()
        # One problem is a line below the heading of the list.
        said = lines[-1].removeprefix("  - ")
        assert len(lines) <= 2
        assert printable(said) == said
        assert message is not None, said
        assert any(part in said for part in message.split("|")), said
        assert len(said) < 2500
    else:
        assert message is None
    assert time.monotonic() - start < LONGEST
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown * 1024 < MOST_MEMORY


def test_there_are_at_least_a_hundred_kinds():
    assert len(CASES) >= 100
