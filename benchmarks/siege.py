"""Everything that may happen to this project, done to a copy of it; one table says what came of it.

    python benchmarks/siege.py                    # all of it, 20 minutes on two cores
    python benchmarks/siege.py --short            # a taste, two minutes
    python benchmarks/siege.py --only kills,disks --seed 7 --json siege.json

Commands are killed and stopped at any moment, stored files damaged, hostile files handed in, disks
filled, descriptors, memory and /dev/shm taken away, two commands run at once, and strangers connect
to every port that a training listens on. The project is a copy in a temporary folder, `--env=test`,
generated images. What is not as it should be is listed with the command that repeats it (moments
of a clock repeat as well as clocks do). Exit status 1 if there is anything of that kind.

Linux. Full disks and a small /dev/shm are real ones for root, and limits of the process otherwise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch and MLflow are imported: forks of this process are the commands.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", DO_NOT_TRACK="true")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", KEDRO_DISABLE_TELEMETRY="true")
for _name in ("MLFLOW_TRACKING_URI", "KEDRO_ENV", "RDD_TRACEBACK"):
    os.environ.pop(_name, None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout, no other

from siege.campaign import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
