from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.inference.frames import read_pages, read_video

FRAMES = [np.full((4, 6, 3), 40 * number, np.uint8) for number in range(5)]


def pages_file(kind: str, **options) -> bytes:
    first, *others = [Image.fromarray(frame) for frame in FRAMES]
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
def test_pages_and_frames_come_one_by_one(kind):
    found = dict(read_pages(pages_file(kind), Path("a"), every=1, bits=16))
    assert list(found) == [1, 2, 3, 4, 5]
    for number, image in found.items():
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(FRAMES[number - 1]))
    assert list(dict(read_pages(pages_file(kind), Path("a"), every=2, bits=16))) == [1, 3, 5]


def test_a_cut_file_is_named():
    with pytest.raises(DataProblem, match=r"cut\.tif cannot be decoded"):
        list(read_pages(pages_file("TIFF")[:150], Path("cut.tif"), every=1, bits=16))


def fake_ffmpeg(folder: Path, monkeypatch, code: str) -> None:
    """In the place of ffmpeg, which is not everywhere: says its arguments, then does `code`."""
    program = folder / "ffmpeg"
    head = f"#!{sys.executable}\nimport sys\nout = sys.stdout.buffer\n"
    head += f"open({str(folder / 'words')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    program.write_text(head + textwrap.dedent(code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


FIVE = """
for number in range(5):
    out.write(b"P6\\n6 4\\n255\\n" + bytes([40 * number]) * 72)
"""


def test_frames_of_a_video_come_through_a_pipe(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, FIVE)
    found = dict(read_video(tmp_path / "-a.mp4", every=1))
    assert list(found) == [1, 2, 3, 4, 5]
    assert torch.equal(found[3].permute(1, 2, 0), torch.from_numpy(FRAMES[2]))
    assert list(dict(read_video(tmp_path / "a.mp4", every=3))) == [1, 4]
    words = (tmp_path / "words").read_text()
    assert f"-i file:{tmp_path}/a.mp4 " in words
    assert "-protocol_whitelist file,pipe " in words


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_frames_of_a_video_are_those_that_it_was_made_of(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 39, 61, 3), dtype=np.uint8)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "61x39", "-i", "-"]
    words = ["-v", "error", *raw, "-c:v", "ffv1", "-pix_fmt", "bgr0"]
    subprocess.run(["ffmpeg", *words, tmp_path / "a.mkv"], input=noise.tobytes(), check=True)
    found = dict(read_video(tmp_path / "a.mkv", every=2))
    assert list(found) == [1, 3, 5]
    for number, image in found.items():
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(noise[number - 1]))
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(DataProblem, match=r"b\.mp4 cannot be decoded \(ffmpeg: (?!file)"):
        list(read_video(tmp_path / "b.mp4", every=1))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('moov atom not found')", r"cannot be decoded \(ffmpeg: moov atom not found\)"),
        ("sys.exit('[mov,mp4 @ 0x5] no atom.\\na: Invalid data')", r"\(ffmpeg: no atom\)\. Copy"),
        ("", "holds no frame"),
        (FIVE + "out.flush(); sys.exit('torn')", r"after frame 5 \(ffmpeg: torn\)"),
        ("out.write(b'P6\\n6 4\\n255\\nxx'); out.flush(); sys.exit('torn')", "ffmpeg: torn"),
        ("out.write(b'P6\\n99999 99999\\n255\\n')", "frames of 99999 x 99999 pixels"),
        ("out.write(b'P5\\n6 4\\n255\\n')", "no frames of 8-bit RGB"),
    ],
)
def test_a_bad_video_is_named(tmp_path, monkeypatch, code, message):
    fake_ffmpeg(tmp_path, monkeypatch, code)
    with pytest.raises(DataProblem, match=message):
        list(read_video(tmp_path / "a.mp4", every=1))


def test_ffmpeg_ends_when_nobody_reads_on(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, FIVE.replace("range(5)", "iter(lambda: 1, 0)"))
    frames = read_video(tmp_path / "a.mp4", every=1)
    next(frames)
    frames.close()  # type: ignore[attr-defined]


def test_without_ffmpeg_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"ffmpeg, which reads videos, is not there\. Install"):
        list(read_video(tmp_path / "a.mp4", every=1))
