"""Send what MLflow did not take: ``python -m rdd_pipeline.tracking FILE_OR_FOLDER...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rdd_pipeline.errors import UserError
from rdd_pipeline.tracking.addresses import (
    hide_secrets_in_logs,
    remember_secrets,
    remember_secrets_of_environment,
)
from rdd_pipeline.tracking.delivery import send_file
from rdd_pipeline.tracking.journal import JournalInUseError
from rdd_pipeline.tracking.sender import calm_mlflow


def main(arguments: Sequence[str] | None = None) -> int:
    """Send every file named on the command line.

    Returns:
        Exit code: 1 if anything was refused or MLflow cannot be reached.
    """
    parser = argparse.ArgumentParser(prog="python -m rdd_pipeline.tracking", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files, or their folder")
    parser.add_argument("--tracking-uri", help="MLflow server or sqlite:///PATH, if it has moved")
    parser.add_argument(
        "--artifacts",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="files outside of the project are uploaded only from below this folder",
    )
    options = parser.parse_args(arguments)
    refused, files = 0, list[Path]()
    for given in options.files:
        files += sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    if not files:
        print(f"Nothing to send in {', '.join(map(str, options.files))}.")
    calm_mlflow()
    remember_secrets_of_environment()
    remember_secrets(options.tracking_uri or "")
    hide_secrets_in_logs()
    for path in files:
        try:
            count = send_file(path, options.tracking_uri, artifacts=options.artifacts)
        except JournalInUseError as error:
            print(error)
            continue
        except UserError as error:
            parser.exit(1, f"Error: {error}\n")
        refused += count
        print(f"{path}: {f'{count} records refused' if count else 'sent'}")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
