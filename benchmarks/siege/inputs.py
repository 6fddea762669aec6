"""Files and values that somebody else made, to do harm or by mistake.

Each must end in one line, or be taken for what it is. What may never happen: code that came along
runs (it would write a marker), a file appears outside the project, the memory goes, nothing moves.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from siege.commands import Running
from siege.damage import in_a_fork
from siege.projects import run
from siege.trials import Plan, Trial, Yard

MEMORY = 3 << 30
"""Bytes that looking at a small file may take."""
LIMIT = 120.0


class Harm:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.command = f"echo pid $$ > {marker}-$$"

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)


# ---- weights


def weights(yard: Yard, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that claim to be a teacher."""
    import torch
    from safetensors.torch import load_file, save
    from torch import nn

    draw = Random(yard.seed)
    models = yard.places["finished"] / "data/06_models/test"
    good = sorted(models.glob("teacher/*/teacher/0.safetensors"))[-1]
    tensors, data = load_file(good), good.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    [(meta, inside)] = header["__metadata__"].items()
    harm = Harm(yard.marker)

    def file(name: str, content: bytes) -> tuple[str, Path]:
        path = folder / f"{name.replace(' ', '_')}"
        path.write_bytes(content)
        return name, path

    def saved(value: Any, **how: Any) -> bytes:
        torch.save(value, buffer := io.BytesIO(), **how)
        return buffer.getvalue()

    def rewritten(**changes: Any) -> bytes:
        own = {**json.loads(inside), **changes}
        return save(tensors, metadata={meta: json.dumps(own)})

    def with_header(text: bytes, rest: bytes = b"") -> bytes:
        return struct.pack("<Q", len(text)) + text + rest

    for suffix in ("pth", "pt", "bin", "safetensors", "ckpt"):
        yield file(f"pickle that runs.{suffix}", pickle.dumps(harm))
        yield file(f"torch zip that runs.{suffix}", saved({"state_dict": harm}))
    yield file("old torch that runs.pth", saved(harm, _use_new_zipfile_serialization=False))
    yield file("protocol 0 that runs.pth", pickle.dumps(harm, protocol=0))
    yield file("tensors and harm.pth", saved({**tensors, "epoch": harm}))
    yield file("module.pth", saved(nn.Sequential(nn.Conv2d(3, 8, 3))))
    scripted = torch.jit.script(nn.Conv2d(3, 8, 3))
    torch.jit.save(scripted, buffer := io.BytesIO())
    yield file("torchscript.pt", buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("../../../escaped.txt", "x")
        archive.writestr("archive/data.pkl", pickle.dumps(harm))
        archive.writestr("archive/version", "3")
    yield file("zip slip.pth", buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
        archive.writestr("archive/version", "3")
    yield file("zip bomb.pth", buffer.getvalue())
    for bad in ("nan", "inf", "-inf"):
        name = max(tensors, key=lambda key: tensors[key].numel())
        spoiled = {key: value.clone() for key, value in tensors.items()}
        spoiled[name].view(-1)[3] = float(bad)
        yield file(f"{bad}.safetensors", save(spoiled))
        yield file(f"{bad}.pth", saved(spoiled))
    up, absolute = "../" * 12 + str(yard.folder / "escaped"), str(yard.folder / "escaped")
    for name, word in (
        ("up", up),
        ("absolute", absolute),
        ("zero byte", "a\0b"),
        ("long", "x" * 999),
    ):
        provenance = {"fingerprint": word, "method": word, "source": word}
        yield file(f"header with path {name}.safetensors", rewritten(provenance=provenance))
    yield file("huge header.safetensors", struct.pack("<Q", 1 << 62) + b"{}")
    yield file("nested header.safetensors", with_header(b"[" * 5_000_000))
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    yield file("huge tensor.safetensors", with_header(json.dumps({"w": entry}).encode(), bytes(64)))
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [1 << 63, (1 << 63) + 16]}
    yield file("offsets.safetensors", with_header(json.dumps({"w": entry}).encode(), bytes(64)))
    network = json.loads(inside)["network"]
    wide = {**network, "width": 200_000}
    yield file("width of 200000.safetensors", rewritten(network=wide))
    wild = {**network, "name": "../../x_../../y"}
    yield file("network by path.safetensors", rewritten(network=wild))
    hub = {**network, "name": "fcn_hf-hub:nobody/nothing"}
    yield file("network from a hub.safetensors", rewritten(network=hub))
    for place in (8 + size // 2, 8 + size + 100, len(data) - 5):
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        yield file(f"flip at {place}.safetensors", bytes(changed))
    yield file("truncated.safetensors", data[: len(data) // 2])
    yield file("empty.pth", b"")
    yield file("page.pth", b"<!DOCTYPE html><html>log in</html>")
    yield file("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    yield "nothing there", folder / "nothing.pth"
    yield "a folder", folder
    os.mkfifo(folder / "fifo.pth")
    yield "a fifo", folder / "fifo.pth"
    yield "a device", Path("/dev/zero")
    yield "a random device", Path("/dev/random")
    (folder / "loop.pth").symlink_to("loop.pth")
    yield "a link to itself", folder / "loop.pth"


def _weights(trial: Trial) -> None:
    from rdd_pipeline.config import NetworkParams, TeacherParams
    from rdd_pipeline.hooks.messages import user_message
    from rdd_pipeline.networks import load_checkpoint
    from rdd_pipeline.networks.checkpoint import import_teacher

    trial.place.mkdir()
    good = trial.yard.places["finished"] / "data/06_models/test"
    truth = load_checkpoint(sorted(good.glob("teacher/*/teacher/0.safetensors"))[-1])
    network = NetworkParams(name="deeplabv3_test_efficientnet", output_stride=16, width=8)

    def attempt(path: Path) -> list[Any]:
        _limit_memory()
        try:
            params = TeacherParams(network=network, weights=path)
            found = import_teacher(params, truth.header.label_names)
            words = str(found.header.provenance)
            finite = all(value.isfinite().all() for value in found.tensors.values())
            same = found.digest() == truth.digest()
            return ["taken", words[:100], finite, same]
        except Exception as error:
            line = user_message(error)
            text = line if line is not None else f"{type(error).__name__}: {str(error)[:200]}"
            return ["traceback" if line is None else "refused", text]

    for name, path in weights(trial.yard, trial.place):
        with trial.case(name):
            kind, text, *taken = in_a_fork(partial(attempt, path), LIMIT)
            trial.note = f"{kind}: {text}"
            if kind in ("hang", "traceback"):
                trial.fault(kind, f"weights, {name}: {text}")
            elif kind == "taken" and not all(taken):
                what = "other weights" if taken[0] else "weights that are not finite"
                trial.fault("silently wrong", f"weights, {name}: {what} were taken")
            elif kind == "taken" and ("escaped" in text or "x" * 50 in text):
                trial.note += " (the pipeline is tried with it, too)"
            trial.check_marker(name)


def _whole_weights(word: str) -> Callable[[Trial], None]:
    """`teacher.weights` in a whole command."""

    def attack(trial: Trial) -> None:
        place = trial.project("empty")
        folder = trial.yard.folder / f"weights-{trial.name}".replace(" ", "_")
        folder.mkdir()
        path = next(path for name, path in weights(trial.yard, folder) if name == word)
        before = {one.name for one in trial.yard.folder.iterdir()}
        words = run("train_teacher", params=f"teacher.weights={path}")
        trial.refused_or(Running(place, words, before=_limit_memory).wait(LIMIT), word)
        for one in trial.yard.folder.iterdir():
            if one.name.startswith("escaped") and one.name not in before:
                trial.fault("code executed", f"{word}: {one} was written outside the project")
        trial.check_marker(word)

    return attack


# ---- images, masks, tables, lists


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def _png(
    width: int, height: int, *, color: int = 2, data: bytes = b"", extra: bytes = b""
) -> bytes:
    start = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def make_images(root: Path, table: str = "classes: [road, car]\n") -> None:
    """A small data set of the layout `folders`."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind, shape, top in (("images", (48, 64, 3), 255), ("masks", (48, 64), 2)):
            (root / kind / split).mkdir(parents=True)
            for number in range(3):
                pixels = random.integers(0, top, shape, np.uint8)
                Image.fromarray(pixels).save(root / kind / split / f"a{number}.png")
    (root / "labels.yaml").write_text(table)


def _text_bomb() -> bytes:
    text = _chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(1 << 28)))
    return _png(64, 48, data=zlib.compress(bytes(48 * (1 + 64 * 3))), extra=text)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _array(shape: tuple[int, ...], value: float, dtype: str, mode: str | None = None) -> Any:
    def write(path: Path) -> None:
        import numpy as np
        from PIL import Image

        picture = Image.fromarray(np.full(shape, value, dtype))
        (picture.convert(mode) if mode else picture).save(
            path, "TIFF" if dtype == "float32" else "PNG"
        )

    return write


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


FILES: dict[str, Callable[[Path], None]] = {
    "empty": _bytes(b""),
    "noise": _bytes(Random(0).randbytes(4000)),
    "text": _bytes(b"hello\n" * 30),
    "page": _bytes(b"<html><script>alert(1)</script></html>"),
    "pickle": lambda path: None,  # put in its place by the trial: it needs the marker
    "fifo": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "device": _link("/dev/zero"),
    "random device": _link("/dev/random"),
    "link to itself": _link("a0.png"),
    "link to nothing": _link("nothing.png"),
    "link to a secret": _link("/etc/passwd"),
    "bomb": _bytes(_png(60_000, 60_000, data=zlib.compress(bytes(1 << 20)))),
    "size zero": _bytes(_png(0, 0)),
    "size of 2**31": _bytes(_png((1 << 31) - 1, (1 << 31) - 1)),
    "text bomb": lambda path: path.write_bytes(_text_bomb()) and None,
    "cut": lambda path: path.write_bytes(_png(64, 48, data=zlib.compress(bytes(100)))) and None,
    "other size": _array((10, 10), 1, "uint8"),
    "floats": _array((48, 64), 0.5, "float32"),
    "class 200": _array((48, 64), 200, "uint8"),
    "svg": _bytes(b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
    "postscript": _bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) run\n"),
    "gif": _bytes(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(30)),
}
TABLES: dict[str, bytes] = {
    "tag that runs": b"!!python/object/apply:os.system ['touch MARKER']\n",
    "billion laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107)
    )
    + b"classes: *j\n",
    "nested": b"classes: " + b"[" * 20_000,
    "empty": b"",
    "noise": Random(1).randbytes(3000),
    "one class": b"classes: [road]\n",
    "2000 classes": b"classes: [" + b",".join(b"c%d" % n for n in range(2000)) + b"]\n",
    "same name": b"classes: [road, road]\n",
    "value 999": b"classes: [road, {name: car, value: 999}]\n",
    "value nan": b"classes: [road, {name: car, value: .nan}]\n",
    "weight inf": b"classes: [road, {name: car, weight: .inf}]\n",
    "path": b"classes: [road, car]\nimages: ../../../../etc\n",
    "absolute path": b"classes: [road, car]\nimages: /etc/SPLIT\n",
    "list by path": b"classes: [road, car]\nimages: .\nmasks: .\nlists: /etc/passwd\n",
    "math in a name": b"classes: ['$\\frac$', '<script>alert(1)</script>']\n",
    "zero byte": b'classes: ["a\\0b", car]\n',
    "escape": b'classes: ["\\e[31mred\\a", car]\n',
    "not a table": b"42\n",
}


def _ingested(
    change: Callable[[Path, Yard], None], params: str = "", pipeline: str = "data_ingestion"
) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        place = trial.project("empty")
        root = place / "pictures"
        make_images(root)
        change(root, trial.yard)
        given = ",".join(filter(None, (f"data.layout=folders,data.path={root}", params)))
        words = run(pipeline, params=given)
        ended = Running(place, words, before=_limit_memory).wait(LIMIT)
        trial.refused_or(ended, trial.name)
        if "MemoryError" in ended.text or ended.status == -9:
            trial.fault("other", f"{trial.name}: more than {MEMORY >> 30} GB: {ended.last}")
        if "root:x:" in ended.text:
            trial.fault("other", f"{trial.name}: the content of a foreign file is shown")
        trial.check_marker(trial.name)

    return attack


def _replace(kind: str, how: str, root: Path, yard: Yard) -> None:
    path = root / kind / "train" / "a0.png"
    path.unlink()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Harm(yard.marker)))
    else:
        FILES[how](path)


def _table(content: bytes, root: Path, yard: Yard) -> None:
    (root / "labels.yaml").write_bytes(content.replace(b"MARKER", str(yard.marker).encode()))


def _special_table(how: str, root: Path, yard: Yard) -> None:
    path = root / "labels.yaml"
    path.unlink()
    {"fifo": os.mkfifo, "device": _link("/dev/zero"), "folder": Path.mkdir}[how](path)


def _renamed(name: bytes, root: Path, yard: Yard) -> None:
    for kind in ("images", "masks"):
        folder = os.fsencode(root / kind / "train")
        os.rename(folder + b"/a0.png", folder + b"/" + name)


def _no_label(splits: tuple[str, ...], root: Path, yard: Yard) -> None:
    for split in splits:
        for path in (root / "masks" / split).iterdir():
            _array((48, 64), 255, "uint8")(path)


# ---- values: jobs, parameters, records

PARAMETERS = (
    "recipe.optimizer.lr=inf",
    "recipe.optimizer.lr=nan",
    "recipe.optimizer.lr=1e308",
    "recipe.optimizer.lr=-1",
    "recipe.iterations=1e400",
    "recipe.iterations=99999999999999999999",
    "recipe.batch_size=0",
    "seed=-1",
    "seed=99999999999999999999",
    "recipe.optimizer.weight_decay=inf",
    "data.scenes.height=-5",
    "recipe.iteration=5",
    "recipes.iterations=5",
    "trainer.device=nonsense",
    "trainer.device=cuda:99",
    "trainer.nodes=2,trainer.rendezvous=nonsense",
    "trainer.nodes=2,trainer.rendezvous=203.0.113.7:29500,trainer.timeout=5",
    "teacher.network.name=os.system",
    "student.name=fcn_../../etc/passwd",
    "methods.weights.kd=.nan",
    "evaluation.scales=[1000000.0]",
    "data.path=/dev/zero",
    "data.path=/proc",
)
JOB_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "seed of 2**63": lambda job: job["job"].update(seed=1 << 63),
    "betas of 5": lambda job: job["job"]["recipe"]["optimizer"].update(name="adamw", betas=[5, 5]),
    "device meta": lambda job: job["trainer"].update(device="meta"),
    "device xla": lambda job: job["trainer"].update(device="xla"),
    "output below a file": lambda job: job.update(output="/etc/passwd/x"),
    "output in proc": lambda job: job.update(output="/proc/x"),
    "index of noise": lambda job: job.update(index="job.json"),
    "index is a device": lambda job: job.update(index="/dev/zero"),
    "root is a file": lambda job: job.update(root="/etc/passwd"),
    "teacher is a pickle": lambda job: job.update(teacher="harm.safetensors"),
    "teacher is a device": lambda job: job.update(teacher="/dev/zero"),
    "scales of a million": lambda job: job.update(evaluation={"scales": [1e6]}),
    "lr is infinite": lambda job: job["job"]["recipe"]["optimizer"].update(lr=float("inf")),
    "timeout of 1e300": lambda job: job["trainer"].update(timeout=1e300, devices=2),
    "method by path": lambda job: job["job"].update(method="../../etc/passwd"),
    "nothing in it": lambda job: job.clear(),
}


def make_job(place: Path, folder: Path, **trainer: Any) -> dict[str, Any]:
    """A job file's content for the teacher of a project that has trained one."""
    for path in sorted((place / "data/06_models/test/work").glob("*/job.json")):
        words = json.loads(path.read_text())
        if words["method"] == "teacher":
            break
    from rdd_pipeline.training.job import TrainingJob

    known = TrainingJob.model_fields
    root = next((place / "data/01_raw/test").iterdir())
    return {
        "job": {name: value for name, value in words.items() if name in known},
        "root": str(root),
        "labels": words["labels"],
        "trainer": {"device": "cpu", "threads": 1, "precision": "float32", **trainer},
        "index": str(place / "data/02_intermediate/test/index.csv"),
        "output": str(folder / "out"),
    }


def _job(name: str) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        place = trial.project("teacher")
        (place / "harm.safetensors").write_bytes(pickle.dumps(Harm(trial.yard.marker)))
        job = make_job(place, place)
        JOB_CHANGES[name](job)
        (place / "job.json").write_text(json.dumps(job))
        words = ["-m", "rdd_pipeline.launching", "job.json"]
        ended = Running(place, words, before=_limit_memory).wait(LIMIT)
        trial.refused_or(ended, name)
        trial.check_marker(name)

    return attack


def _parameter(given: str) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        place = trial.project("empty")
        words = run("train_teacher", params=given.replace("recipe.", "teacher_recipe."))
        ended = Running(place, words, before=_limit_memory).wait(LIMIT)
        trial.refused_or(ended, given)
        if ended.status == 0:
            trial.fault("other", f"{given} was taken")

    return attack


RECORDS: dict[str, Any] = {
    "status of no kind": ["RUN", "status", "status", "BOGUS", 0, 1],
    "metric that is a word": ["RUN", "metric", "miou", "high", 0, 1],
    "metric nan": ["RUN", "metric", "miou", float("nan"), 0, 1],
    "unknown kind": ["RUN", "deletion", "x", "y", 0, 1],
    "foreign file": ["RUN", "artifact", "x", "/etc/hostname", 0, 0],
    "file above": ["RUN", "artifact", "x", "../../../../etc/hostname", 0, 0],
    "artifacts to anywhere": None,
    "field missing": {"run_id": "RUN"},
}


def _record(name: str) -> Callable[[Trial], None]:
    def attack(trial: Trial) -> None:
        place = trial.project("teacher")
        escaped = trial.yard.folder / "escaped-artifacts"
        experiment = {"name": "hostile", "artifact_location": None}
        if name == "artifacts to anywhere":
            experiment["artifact_location"] = str(escaped)
        names = ("run_id", "kind", "key", "value", "step", "timestamp")
        request = {"experiment": experiment, "tags": {}, "parent": None}
        records = [
            dict(zip(names, ["RUN", "run", "a run", json.dumps(request), 0, 1], strict=True)),
            dict(zip(names, ["RUN", "metric", "good", 1.0, 0, 1], strict=True)),
        ]
        bad = RECORDS[name] or ["RUN", "artifact", "x", str(place / "pyproject.toml"), 0, 0]
        bad = dict(zip(names, bad, strict=True)) if isinstance(bad, list) else bad
        last = dict(zip(names, ["RUN", "metric", "also good", 1.0, 0, 1], strict=True))
        uri = {"tracking_uri": f"sqlite:///{place / 'mlflow.db'}"}
        file = place / "data/07_model_output/untracked/hostile.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(one) + "\n" for one in (uri, *records, bad, last)))
        ended = Running(place, ["-m", "rdd_pipeline.tracking", str(file)]).wait(LIMIT)
        trial.look(ended, name)
        trial.note = ended.last
        if ended.status not in (0, 1, None):
            trial.fault("other", f"{name}: status {ended.status}: {ended.last}")
        import sqlite3

        with sqlite3.connect(place / "mlflow.db") as database:
            keys = {row[0] for row in database.execute("select key from metrics")}
        if not {"good", "also good"} <= keys:
            trial.fault(
                "lost", f"{name}: the good records beside it are not in MLflow: {ended.last}"
            )
        if escaped.exists():
            trial.fault("code executed", f"{name}: files were written to {escaped}")
        if list((place / "mlartifacts").rglob("hostname")):
            trial.fault("other", f"{name}: a file from outside the project was uploaded")

    return attack


def input_plans(*, short: bool = False) -> list[Plan]:
    """All of them; one of each kind in the short form."""
    plans = [Plan("inputs", "weights", _weights)]
    wholes = ("header with path up.safetensors", "torch zip that runs.pth", "nan.safetensors")
    plans += [Plan("inputs", f"command with {word}", _whole_weights(word)) for word in wholes]
    for how in FILES:
        plans.append(Plan("inputs", f"image {how}", _ingested(partial(_replace, "images", how))))
    for how in ("fifo", "floats", "class 200", "bomb", "device", "other size", "noise"):
        plans.append(Plan("inputs", f"mask {how}", _ingested(partial(_replace, "masks", how))))
    for how, content in TABLES.items():
        plans.append(Plan("inputs", f"table {how}", _ingested(partial(_table, content))))
    for how in ("fifo", "device", "folder"):
        plans.append(Plan("inputs", f"table is a {how}", _ingested(partial(_special_table, how))))
    for name in (b"a\xff0.png", b"a\n0.png", b"<svg onload=alert(1)>.png", b"\x1b[31m.png"):
        attack = _ingested(partial(_renamed, name))
        plans.append(Plan("inputs", f"file called {name!r}", attack))
    for splits in (("train",), ("val", "test")):
        attack = _ingested(partial(_no_label, splits))
        plans.append(Plan("inputs", f"no label in {' and '.join(splits)}", attack))
    plans += [Plan("inputs", f"job {name}", _job(name)) for name in JOB_CHANGES]
    plans += [Plan("inputs", f"parameter {given}", _parameter(given)) for given in PARAMETERS]
    plans += [Plan("inputs", f"record {name}", _record(name)) for name in RECORDS]
    if short:
        words = ("weights", "image fifo", "table tag", "record foreign", "parameter recipe.opt")
        return [next(plan for plan in plans if plan.name.startswith(word)) for word in words]
    return plans
