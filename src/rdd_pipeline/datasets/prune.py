"""Delete old versions of results, and the work of trainings that no version names any more.

    python -m rdd_pipeline.datasets.prune --keep 3              # lists what would go
    python -m rdd_pipeline.datasets.prune --keep 3 --delete     # deletes it

The newest versions of every dataset stay, and so does every version that an MLflow run still names
(its own, tag `version`, and those it has read, tags `input.NAME`). Delete a run in MLflow to let
its versions go, or give `--ignore-runs`.

Work (checkpoints, remembered scores) goes when it was finished more than a day ago and neither a
version that stays nor work that stays names its fingerprint: then only the same training, asked for
again, would have to be done again. What is unfinished stays, the same command goes on with it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rdd_pipeline.errors import UserError
from rdd_pipeline.files import VERSION
from rdd_pipeline.training.store import is_fingerprint

_FRESH = 86_400.0
"""Seconds in which the command that finished some work may not have written its version yet."""
_HEADER = 1 << 20
_FINGERPRINT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")


@dataclass(frozen=True)
class OldVersion:
    """One version of one dataset, or the work of one training, that nothing needs any more.

    Attributes:
        dataset: Folder of the dataset, as DATASET.ext; of a training, that of all work.
        version: Its time stamp; the fingerprint.
        frees: Bytes on the disk that go with it; a hard link to a version that stays frees none.
    """

    dataset: Path
    version: str
    frees: int

    @property
    def folder(self) -> Path:
        """What is deleted."""
        return self.dataset / self.version


def prune(
    project: Path, *, keep: int = 3, named: Collection[str] = (), delete: bool = False
) -> list[OldVersion]:
    """Find, and if asked delete, versions that are neither among the newest nor named, and work.

    Versions are recognized by the layout that Kedro makes, NAME/VERSION/NAME, below the project's
    `data` folder; anything else is left alone.

    Args:
        project: Folder of the Kedro project.
        keep: How many of the newest versions of each dataset stay; at least 1.
        named: Versions that stay in any case.
        delete: Whether to delete; otherwise nothing is changed.

    Returns:
        What was (or would be) deleted, by dataset, oldest first.

    Raises:
        UserError: `keep` is below 1.
    """
    if keep < 1:
        raise UserError(f"keep is {keep}; at least the newest version must stay. Give 1 or more.")
    by_dataset: dict[Path, list[str]] = defaultdict(list)
    for folder in _version_folders(project / "data"):
        by_dataset[folder.parent].append(folder.name)
    going = [
        dataset / version
        for dataset, versions in sorted(by_dataset.items())
        for version in sorted(versions)[:-keep]
        if version not in named
    ]
    staying = [
        dataset / version
        for dataset, versions in by_dataset.items()
        for version in versions
        if dataset / version not in set(going)
    ]
    going += _unused_work(project / "data", staying)
    frees = _freed(going)
    found = [OldVersion(folder.parent, folder.name, frees[folder]) for folder in going]
    if delete:
        for version in found:
            shutil.rmtree(version.folder)
    return found


def versions_named_by_runs(project: Path) -> set[str]:
    """Versions that MLflow runs which are not deleted have written or read.

    Raises:
        UserError: MLflow cannot be asked.
    """
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(project)
    named: set[str] = set()
    try:
        with KedroSession.create(project_path=project, save_on_close=False) as session:
            assert isinstance(session, KedroSession)
            context: Any = session.load_context()
        # Missing when MLflow could not be set up; the hook has said why.
        client = context.mlflow.server._mlflow_client
        for experiment in _pages(client.search_experiments):
            for run in _pages(partial(client.search_runs, [experiment.experiment_id])):
                named.update(
                    value
                    for key, value in run.data.tags.items()
                    if key == "version" or key.startswith("input.")
                )
    except Exception as error:
        raise UserError(
            f"MLflow cannot be asked which versions its runs name ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0][:200]}). Start the server, or give --ignore-runs."
        ) from error
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m rdd_pipeline.datasets.prune``."""
    parser = argparse.ArgumentParser(
        prog="python -m rdd_pipeline.datasets.prune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keep", type=int, default=3, help="newest versions to keep (default: 3)")
    parser.add_argument("--delete", action="store_true", help="delete; without it only list")
    parser.add_argument("--ignore-runs", action="store_true", help="also versions of MLflow runs")
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="default: this folder")
    options = parser.parse_args(arguments)
    project: Path = options.project.resolve()
    try:
        if not (project / "pyproject.toml").is_file():
            raise UserError(f"{project} is not a Kedro project. Give its folder as --project.")
        named = set() if options.ignore_runs else versions_named_by_runs(project)
        found = prune(project, keep=options.keep, named=named, delete=options.delete)
    except UserError as error:
        parser.exit(1, f"Error: {error}\n")
    for version in found:
        place = version.folder.relative_to(project)
        print(f"{version.frees / 1e6:10.2f} MB  {place}")
    total = sum(version.frees for version in found) / 1e6
    done = "deleted" if options.delete else "would be deleted (nothing was; add --delete)"
    print(f"{len(found)} old versions and finished trainings, {total:.2f} MB, {done}.")
    return 0


def _version_folders(root: Path) -> Iterator[Path]:
    """Folders NAME/VERSION that hold something called NAME."""
    for place, folders, _ in os.walk(root):
        versions = [name for name in folders if VERSION.fullmatch(name)]
        for version in versions:
            folder = Path(place, version)
            if (folder / folder.parent.name).exists() and not folder.is_symlink():
                yield folder
        folders[:] = [name for name in folders if name not in versions]


def _unused_work(data: Path, staying: Sequence[Path]) -> list[Path]:
    """Folders of finished work whose fingerprint stands in nothing that stays."""
    work = {
        path.name: path
        for path in data.glob("06_models/*/work/*")
        if is_fingerprint(path.name) and not path.is_symlink()
    }
    finished = {name for name, path in work.items() if _finished_long_ago(path)}
    if not finished:
        return []
    files = [path for folder in staying for path in folder.rglob("*") if path.is_file()]
    files += [path / "job.json" for name, path in work.items() if name not in finished]
    unused = set(finished)
    while files:
        named = _fingerprints_in(files.pop()) & unused
        unused -= named
        files += [work[name] / "job.json" for name in named]  # a stage names the one before it
    return [work[name] for name in sorted(unused)]


def _finished_long_ago(work: Path) -> bool:
    done = work / "done.json"
    return done.is_file() and time.time() - done.stat().st_mtime > _FRESH


def _fingerprints_in(path: Path) -> set[str]:
    """Those that the beginning of a file holds, where headers are."""
    try:
        with path.open("rb") as file:
            text = file.read(_HEADER)
    except OSError:
        return set()
    return {found.decode() for found in _FINGERPRINT.findall(text)}


def _freed(folders: Sequence[Path]) -> dict[Path, int]:
    """Bytes each folder frees: a file counts where the last of its links is deleted."""
    seen: dict[tuple[int, int], int] = defaultdict(int)
    freed = dict.fromkeys(folders, 0)
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            if path.is_symlink() or not path.is_file():
                continue
            identity = (status.st_dev, status.st_ino)
            seen[identity] += 1
            if seen[identity] == status.st_nlink:
                freed[folder] += status.st_size
    return freed


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of an MLflow search that answers in pages."""
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


if __name__ == "__main__":
    raise SystemExit(main())
