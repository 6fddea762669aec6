"""What is the teacher's own: its weights may be given."""

from __future__ import annotations

import dataclasses

from rdd_pipeline.config import TeacherParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.networks import NetworkCheckpoint, import_teacher
from rdd_pipeline.pipelines.paths import from_project, local_network


def import_weights(images: Images, teacher: TeacherParams) -> dict[str, NetworkCheckpoint]:
    """The checkpoint that `teacher.weights` names, or what `teacher.module` makes, as ``imported``.

    Nothing where neither is given.

    Raises:
        UserError: The file cannot be read, or is of other classes than the images, or the module
            cannot be made.
    """
    if teacher.weights is None and teacher.module is None:
        return {}
    weights = None if teacher.weights is None else from_project(teacher.weights)
    local = {"weights": weights, "network": local_network(teacher.network)}
    found = import_teacher(teacher.model_copy(update=local), images.labels.names)
    labels = images.labels
    data = {"colors": labels.colors, "mask_values": labels.mask_values}
    header = found.header.model_copy(update=data | {"image_size": images.image_size})
    return {"imported": dataclasses.replace(found, header=header)}
