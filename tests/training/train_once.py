"""One of several processes that train the same job into the same folder: see test_store.

Arguments: folder of the images, folder of the stores, number of processes that begin together.
"""

import sys
import time
from pathlib import Path

from rdd_pipeline.config import AugmentParams, RecipeParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import build_index
from rdd_pipeline.data.layouts import get_layout
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU, LABELS, STUDENT


def the_training(root: Path) -> Training:
    """The training; every iteration is saved."""
    recipe = RecipeParams(
        iterations=6,
        batch_size=2,
        augment=AugmentParams(crop=(32, 32), scale_min=0.8, scale_max=1.2),
        validate_every=3,
    )
    job = TrainingJob(method="baseline", network=STUDENT, recipe=recipe)
    layout = get_layout("camvid")._replace(labels=LABELS)
    return Training(job, Images(root, build_index(root, layout).samples, LABELS))


if __name__ == "__main__":
    images, stores, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    training = the_training(images).stored_in(stores)

    def together(iteration: int, values: object) -> None:
        """At the first point of the curves all wait for one another."""
        (stores / f"begun-{time.monotonic_ns()}").touch()
        until = time.monotonic() + 60
        while len(list(stores.glob("begun-*"))) < processes and time.monotonic() < until:
            time.sleep(0.005)

    trainer = CPU.model_copy(update={"threads": 1, "log_every": 1})
    result = train(training, trainer, on_log=together)
    print(result.network.digest(), result.trained)
