"""The tools whose exports are read, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing import (
    coco,
    cvat,
    hugging_face,
    label_studio,
    labelme,
    plain,
    roboflow,
    supervisely,
)
from rdd_pipeline.importing.export import MALFORMED, Export
from rdd_pipeline.importing.folder import Folder


class Tool(NamedTuple):
    """One form of export."""

    recognises: Callable[[Folder], bool]
    read: Callable[[Folder], Export]


TOOLS = {
    # What is told by file names first, then by the keys of JSON, then by pictures alone.
    "roboflow": Tool(roboflow.recognises, roboflow.read),
    "cvat": Tool(cvat.recognises, cvat.read),
    "supervisely": Tool(supervisely.recognises, supervisely.read),
    "label_studio": Tool(label_studio.recognises, label_studio.read),
    "coco": Tool(coco.recognises, coco.read),
    "labelme": Tool(labelme.recognises, labelme.read),
    "hugging_face": Tool(hugging_face.recognises, hugging_face.read),
    "plain": Tool(plain.recognises, plain.read),
}


def read_export(folder: Folder) -> Export:
    """Recognize a folder and read it.

    Raises:
        DataProblem: It is none of these, or something in it is wrong.
    """
    for name, tool in TOOLS.items():
        try:
            if tool.recognises(folder):
                return tool.read(folder)
        except MALFORMED as error:
            raise DataProblem(
                f"import_data.source looks like an export of {name}, but an entry has another form "
                f"than that format's ({type(error).__name__}: {str(error)[:100]})."
            ) from error
    archives = folder.ending(".zip", ".tar", ".gz", ".7z", ".rar")
    hint = f" Unpack {archives[0]} first." if archives else ""
    raise DataProblem(
        f"import_data.source={folder.root} holds no images ({len(folder.files)} other files).{hint}"
    )
