"""Nodes that make a data set and an environment of what a labeling tool wrote."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import rich
import torch

from rdd_pipeline.commands import configuration_source, kedro_command
from rdd_pipeline.config import ImportParams
from rdd_pipeline.errors import UserError, printable
from rdd_pipeline.files import folder_aside, json_digest, move_whole, read_regular, write_atomically
from rdd_pipeline.importing.environment import (
    Machine,
    backbones,
    networks_for,
    parameters_text,
)
from rdd_pipeline.importing.export import Export
from rdd_pipeline.importing.folder import Folder
from rdd_pipeline.importing.splits import Shares
from rdd_pipeline.importing.tools import read_export
from rdd_pipeline.importing.write import Choices, Written, write_data, written_from
from rdd_pipeline.networks.backbones import are_weights_at_hand
from rdd_pipeline.pipelines.import_data.duration import distillation_minutes
from rdd_pipeline.pipelines.paths import from_project

logger = logging.getLogger(__name__)

RECORD = "import.json"
"""In the data set's folder: what it was made of."""
MARK = "# Made by import_data"
"""First words of an environment that may be replaced."""
_CLASSES_SHOWN = 12


class Found(NamedTuple):
    """An export, and where it goes."""

    name: str
    output: Path
    folder: Folder
    fingerprint: str
    export: Export | None
    """None: it has been imported already."""


class Imported(NamedTuple):
    """What is in the data set's folder now."""

    name: str
    output: Path
    source: str
    written: Written
    again: bool
    """It was there already."""


def recognize_export(raw_folder: Path, import_data: ImportParams) -> Found:
    """Find out which tool wrote a folder and read its labels; nothing is written yet.

    Args:
        raw_folder: Where data sets are.
        import_data: Source and name.

    Raises:
        UserError: No source was given.
        DataProblem: It is none that is understood, or something in it is wrong.
    """
    if import_data.source is None:
        raise UserError(
            "import_data.source is not set: give the folder with the export, "
            "--params=import_data.source=FOLDER."
        )
    source = from_project(import_data.source)
    folder = Folder(source)
    name = import_data.name or _name_of(source)
    output = from_project(import_data.output) if import_data.output else raw_folder / name
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"import_data.output={output} is in the source. Choose another folder.")
    fingerprint = _fingerprint(folder, import_data)
    record = _record(output)
    if record is not None and record["fingerprint"] == fingerprint and not import_data.overwrite:
        return Found(name, output, folder, fingerprint, None)
    _require_free(output, record, import_data)
    return Found(name, output, folder, fingerprint, read_export(folder))


def write_images(found: Found, environments_folder: Path, import_data: ImportParams) -> Imported:
    """Write the data set aside, and move it to its place when it is whole.

    Raises:
        DataProblem: Pictures cannot be used.
        UserError: An environment of this name is somebody else's.
    """
    environment = _environment(environments_folder, found.name)
    if environment.exists() and not _is_ours(environment):
        raise UserError(
            f"{environment} is an environment already. Choose another import_data.name."
        )
    source = str(found.folder.root)
    if found.export is None:
        record = _record(found.output)
        assert record is not None
        return Imported(found.name, found.output, source, written_from(record["written"]), True)
    choices = Choices(
        found.name,
        import_data.images == "link",
        import_data.unlabeled == "ignore",
        import_data.skip_bad,
        import_data.classes,
        Shares(import_data.val, import_data.test, import_data.seed, import_data.grouped),
    )
    logger.info("%s: %d labeled images.", found.export.tool, len(found.export.pictures))
    with folder_aside(found.output) as aside:
        new = aside / "new"
        new.mkdir()
        written = write_data(found.export, found.folder, new, choices)
        record = {
            "source": source,
            "fingerprint": found.fingerprint,
            "written": written._asdict(),
        }
        write_atomically(new / RECORD, json.dumps(record, indent=1).encode())
        if found.output.exists():
            found.output.rename(aside / "old")
        move_whole(new, found.output)
    return Imported(found.name, found.output, source, written, False)


def write_environment(
    imported: Imported, environments_folder: Path, import_data: ImportParams
) -> str:
    """Write `conf/NAME` unless it is there, and say what was found and what to run next."""
    environment = _environment(environments_folder, imported.name)
    known = environment.exists()
    kept = known and (imported.again or _was_edited(environment))
    machine = _machine(import_data)
    minutes = None
    if not kept:
        with folder_aside(environment) as aside:
            new = aside / "new"
            new.mkdir()
            parameters = parameters_text(imported.written, machine)
            if not machine.gpu:
                minutes = distillation_minutes(parameters, len(imported.written.classes))
            next_command = _next(imported.name)
            text = (
                f"{MARK} ({json_digest(parameters)}) of {printable(imported.source)}\n"
                f"#   {next_command}\n"
                f"dataset: {json.dumps(imported.name)}\n"
                f"raw_folder: {json.dumps(_from_project_or_whole(imported.output))}\n"
            )
            (new / "globals.yml").write_text(text, encoding="utf-8")
            (new / "parameters.yml").write_text(parameters, encoding="utf-8")
            if known:
                environment.rename(aside / "old")
            move_whole(new, environment)
    networks = (
        f"{_from_project_or_whole(environment)} is kept as it is."
        if kept
        else _networks_text(_from_project_or_whole(environment), machine, minutes)
    )
    lines = _lines(imported, networks)
    console = rich.get_console()
    for line in lines:
        # To be pasted and read: no line breaks inside, and brackets are no markup.
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return "\n".join(lines) + "\n"


# ---- where it goes


def _name_of(source: Path) -> str:
    name = re.sub("[^A-Za-z0-9]+", "_", source.resolve().name).strip("_").lower()[:60]
    if not name:
        raise UserError("The source's name makes no name of an environment: set import_data.name.")
    return name


def _fingerprint(folder: Folder, import_data: ImportParams) -> str:
    """Of the files' names, sizes and times, and of what decides what they become."""
    files = []
    for file in folder.files:
        state = (folder.root / file).stat()
        files.append((file, state.st_size, state.st_mtime_ns))
    return json_digest({"files": files, "params": import_data.deciding()})


def _record(output: Path) -> dict[str, Any] | None:
    """What a former import noted; None: there was none, or its data set is not whole."""
    try:
        record = json.loads(read_regular(output / RECORD))
        written_from(record["written"])
        whole = isinstance(record["fingerprint"], str) and (output / "labels.yaml").is_file()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if whole else None


def _require_free(output: Path, record: dict[str, Any] | None, params: ImportParams) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if record is None:
        raise UserError(
            f"{output} exists and was not made by import_data. Choose another import_data.name."
        )
    if not params.overwrite:
        raise UserError(
            f"{output} was imported from {record['source']}, and the source or import_data has "
            "changed since. import_data.overwrite=true replaces it; import_data.name=OTHER keeps "
            "it."
        )


def _environment(environments_folder: Path, name: str) -> Path:
    source = configuration_source()
    return (environments_folder if source is None else Path(source)) / name


def _is_ours(environment: Path) -> bool:
    try:
        return read_regular(environment / "globals.yml").startswith(MARK.encode())
    except OSError:
        return False


def _was_edited(environment: Path) -> bool:
    try:
        head = read_regular(environment / "globals.yml").decode(errors="replace")
        text = read_regular(environment / "parameters.yml").decode(errors="replace")
    except OSError:
        return True
    return f"({json_digest(text)})" not in head.partition("\n")[0]


def _from_project_or_whole(path: Path) -> str:
    """As a catalog entry says it: from the project if it is in there."""
    project = from_project(Path("."))
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


# ---- what is said


def _machine(import_data: ImportParams) -> Machine:
    gpu = torch.cuda.is_available()
    if import_data.pretrained != "auto":
        return Machine(gpu, import_data.pretrained)
    wanted = backbones(Machine(gpu, True))
    return Machine(gpu, all(are_weights_at_hand(name) for name in wanted))


def _next(name: str) -> str:
    session: dict[str, Any] = {"env": name, "params": {}, "conf_source": configuration_source()}
    return kedro_command("distill_tse", session=json.dumps(session))


def _networks_text(environment: str, machine: Machine, minutes: float | None) -> str:
    pair = networks_for(machine)
    place = "a GPU" if machine.gpu else "CPU"
    text = (
        f"{environment}: teacher {pair.teacher}, student {pair.student}, for {place} and "
        f"with{'' if machine.weights else 'out'} ImageNet weights"
    )
    if minutes is None:
        return f"{text}."
    cores = torch.get_num_threads()
    return (
        f"{text}; about {max(1, round(minutes))} min if nothing else runs on "
        f"{'this core' if cores == 1 else f'these {cores} cores'}."
    )


def _lines(imported: Imported, networks: str) -> list[str]:
    """Five lines: what it is, classes, splits, remarks, what to run next."""
    written = imported.written
    (height, width), most = written.sizes[0]
    total = sum(written.splits.values())
    other = f" and {len(written.sizes) - 1} other sizes" if most < total else ""
    shares = [f"{printable(n)} {share:.1%}" for n, share in written.classes.items()]
    more = len(shares) - _CLASSES_SHOWN
    shares = shares[:_CLASSES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    splits = ", ".join(f"{split} {count}" for split, count in written.splits.items())
    again = "Already imported, nothing changed: " if imported.again else "Found: "
    remarks = [*([f"{written.unlabeled}."] if written.unlabeled else []), *written.remarks]
    return [
        f"{again}{written.tool}, {total} images of {width} x {height}{other}, in "
        f"{printable(imported.source)}",
        f"Classes: {', '.join(shares)}; ignored {written.ignored:.1%}",
        f"Splits: {splits}, {written.how_split}",
        f"Remarks: {' '.join(printable(text) for text in [*remarks, networks])}",
        f"Next: {_next(imported.name)}",
    ]
