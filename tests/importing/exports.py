"""The same six pictures as each tool exports them, written from its documentation.

Objects are rectangles of whole pixels; the truth is painted by slices of an array, so nothing of
what is tested draws it.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 48, 64
NAMES = ("background", "apple", "box")
COLORS = {"background": (0, 0, 0), "apple": (250, 50, 83), "box": (36, 179, 83)}
COUNT = 6


class Scene(NamedTuple):
    """One picture."""

    name: str
    pixels: NDArray[np.uint8]
    objects: list[tuple[str, tuple[int, int, int, int]]]
    """Class and (left, top, right, bottom), the largest first; later ones lie above."""
    truth: NDArray[np.uint8]
    """Positions in NAMES."""


def scenes(count: int = COUNT) -> list[Scene]:
    """Noise with rectangles; boxes lie on apples."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        left, top = int(rng.integers(0, 20)), int(rng.integers(0, 15))
        objects = [
            ("apple", (left, top, left + 30, top + 25)),
            ("box", (left + 10, top + 5, left + 22, top + 14)),
        ]
        truth = np.zeros((HEIGHT, WIDTH), np.uint8)
        for name, (x1, y1, x2, y2) in objects:
            truth[y1:y2, x1:x2] = NAMES.index(name)
        found.append(Scene(f"photo {number:02d}", pixels, objects, truth))
    return found


def counts(of: list[Scene]) -> dict[str, int]:
    """Pixels of each class."""
    together = np.stack([scene.truth for scene in of])
    return {name: int((together == number).sum()) for number, name in enumerate(NAMES)}


def png(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def colored(truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([COLORS[name] for name in NAMES], np.uint8)[truth]


def box_points(box: tuple[int, int, int, int]) -> list[list[float]]:
    """Corners on the edges of pixels."""
    x1, y1, x2, y2 = box
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def box_pixels(box: tuple[int, int, int, int]) -> list[list[int]]:
    """Corners that are pixels of the box."""
    x1, y1, x2, y2 = box
    return [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]


# ---- the tools


def cvat_masks(root: Path) -> None:
    lines = ["# label:color_rgb:parts:actions"]
    lines += [f"{name}:{','.join(map(str, COLORS[name]))}::" for name in NAMES]
    root.mkdir(parents=True)
    (root / "labelmap.txt").write_text("\n".join(lines) + "\n")
    for scene in scenes():
        save(root / "JPEGImages" / f"{scene.name}.png", scene.pixels)
        save(root / "SegmentationClass" / f"{scene.name}.png", colored(scene.truth))
        save(root / "SegmentationObject" / f"{scene.name}.png", colored(scene.truth) // 2)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("".join(f"{scene.name}\n" for scene in scenes()))


def cvat_camvid(root: Path) -> None:
    root.mkdir(parents=True)
    lines = [" ".join(map(str, (*COLORS[name], name))) for name in NAMES]
    (root / "label_colors.txt").write_text("\n".join(lines) + "\n")
    for scene in scenes():
        save(root / "default" / f"{scene.name}.png", scene.pixels)
        save(root / "defaultannot" / f"{scene.name}.png", colored(scene.truth))
    lines = [f"/default/{s.name}.png /defaultannot/{s.name}.png" for s in scenes()]
    (root / "default.txt").write_text("\n".join(lines))


def roboflow(root: Path) -> None:
    for number, scene in enumerate(scenes()):
        split = ("train", "train", "train", "valid", "valid", "test")[number]
        name = f"photo-{number:02d}_png.rf.0a1b2c3d4e5f60718293a4b5c6d7e8f9"
        save(root / split / f"{name}.jpg", scene.pixels)
        save(root / split / f"{name}_mask.png", scene.truth)
        rows = [f"{value}, {name}" for value, name in enumerate(NAMES)]
        table = "\n".join(["Pixel Value, Class", *rows])
        (root / split / "_classes.csv").write_text(table + "\n")
    (root / "README.roboflow.txt").write_text("hello")


def labelme(root: Path) -> None:
    for scene in scenes():
        save(root / "images" / f"{scene.name}.png", scene.pixels)
        shapes = [
            {
                "label": name, "points": box_pixels(box), "group_id": None, "description": "",
                "shape_type": "polygon", "flags": {}, "mask": None,
            }
            for name, box in scene.objects
        ]  # fmt: skip
        content = {
            "version": "5.5.0", "flags": {}, "shapes": shapes,
            "imagePath": f"..\\images\\{scene.name}.png",
            "imageData": base64.b64encode(b"not looked at").decode(),
            "imageHeight": HEIGHT, "imageWidth": WIDTH,
        }  # fmt: skip
        write_json(root / "json" / f"{scene.name}.json", content)


def _coco(of: list[Scene], first: int) -> dict[str, Any]:
    images, annotations = [], []
    for number, scene in enumerate(of, start=first):
        images.append(
            {"id": number, "file_name": f"{scene.name}.png", "height": HEIGHT, "width": WIDTH}
        )
        for name, box in reversed(scene.objects):  # the smaller one first
            mask = np.zeros((HEIGHT, WIDTH), bool)
            x1, y1, x2, y2 = box
            mask[y1:y2, x1:x2] = True
            forms: list[Any] = [
                [[value for point in box_points(box) for value in point]],
                {"counts": runs(mask), "size": [HEIGHT, WIDTH]},
                {"counts": packed_runs(runs(mask)), "size": [HEIGHT, WIDTH]},
            ]
            annotations.append(
                {
                    "id": len(annotations) + 1000 * first, "image_id": number,
                    "category_id": {"apple": 7, "box": 3}[name], "iscrowd": int(number % 3 > 0),
                    "segmentation": forms[number % 3], "area": 1, "bbox": [x1, y1, 5, 5],
                }
            )  # fmt: skip
    categories = [{"id": 3, "name": "box"}, {"id": 7, "name": "apple"}, {"id": 9, "name": "none"}]
    categories[2]["name"] = "pear"
    return {"images": images, "annotations": annotations, "categories": categories}


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs, column by column, beginning with those outside."""
    found, value, length = [], False, 0
    for pixel in mask.T.ravel().tolist():
        if pixel is not value:
            found.append(length)
            value, length = pixel, 0
        length += 1
    return [*found, length]


def packed_runs(lengths: list[int]) -> str:
    """As the tools of COCO pack them."""
    text = ""
    for place, length in enumerate(lengths):
        value = length - lengths[place - 2] if place > 2 else length
        while True:
            bits = value & 0x1F
            value >>= 5
            done = value == (-1 if bits & 0x10 else 0)
            text += chr(48 + (bits if done else bits | 0x20))
            if done:
                break
    return text


def coco(root: Path) -> None:
    for scene in scenes():
        save(root / "images" / f"{scene.name}.png", scene.pixels)
    first, second = scenes()[:4], scenes()[4:]
    write_json(root / "annotations" / "instances_train2017.json", _coco(first, 1))
    write_json(root / "annotations" / "instances_val2017.json", _coco(second, 5))
    write_json(root / "annotations" / "captions_val2017.json", {"images": [], "annotations": []})


def brush(mask: NDArray[np.bool_]) -> list[int]:
    """rle-pack of RGBA pixels, runs and single values mixed."""
    values = np.repeat(mask.ravel(), 4).astype(np.uint8) * 255
    bits = f"{values.size:032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    place = 0
    while place < values.size:
        end = place + 1
        while end < values.size and values[end] == values[place] and end - place < 65536:
            end += 1
        length = end - place - 1
        if length == 0:  # one value as it is
            bits += "0" + "00" + "000" + f"{values[place]:08b}"
        else:
            which = next(n for n, size in enumerate((3, 4, 8, 16)) if length < 1 << size)
            bits += "1" + f"{which:02b}" + f"{length:0{(3, 4, 8, 16)[which]}b}"
            bits += f"{values[place]:08b}"
        place = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def label_studio(root: Path) -> None:
    tasks = []
    for number, scene in enumerate(scenes()):
        save(root / "images" / f"{scene.name}.png", scene.pixels)
        results = []
        for name, box in scene.objects:
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[box[1] : box[3], box[0] : box[2]] = True
            if number % 2:
                kind, value = "brushlabels", {"format": "rle", "rle": brush(mask)}
            else:
                points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in box_points(box)]
                kind, value = "polygonlabels", {"points": points, "closed": True}
            results.append(
                {
                    "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0,
                    "value": {**value, kind: [name]}, "id": "x", "from_name": "tag",
                    "to_name": "image", "type": kind, "origin": "manual",
                }
            )  # fmt: skip
        upload = f"1f2e3d4c-{scene.name}.png"
        tasks.append(
            {
                "id": 10 + number,
                "annotations": [{"id": 1, "completed_by": 1, "result": results,
                                 "was_cancelled": False}],
                "file_upload": upload,
                "data": {"image": f"/data/upload/1/{upload.replace(' ', '%20')}"},
                "predictions": [], "project": 1,
            }
        )  # fmt: skip
    write_json(root / "project-1-at-2024-05-01-10-00-1a2b3c4d.json", tasks)


def label_studio_png(root: Path) -> None:
    for number, scene in enumerate(scenes()):
        save(root / "images" / f"{10 + number}.png", scene.pixels)
        for name, box in scene.objects:
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[box[1] : box[3], box[0] : box[2]] = 255
            file = f"task-{10 + number}-annotation-{number}-by-1-tag-{name}-0.png"
            save(root / file, mask)


def supervisely(root: Path) -> None:
    classes = [
        {"title": name, "shape": "any", "color": "#{:02X}{:02X}{:02X}".format(*COLORS[name]),
         "geometry_config": {}, "id": number, "hotkey": ""}
        for number, name in enumerate(NAMES[1:])
    ]  # fmt: skip
    write_json(root / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    for number, scene in enumerate(scenes()):
        file = f"{scene.name}.png"
        dataset = root / ("train", "val")[number > 3]
        save(dataset / "img" / file, scene.pixels)
        objects = []
        for name, box in scene.objects:
            common = {"id": 1, "classId": 1, "description": "", "tags": [], "classTitle": name}
            if number % 2:
                x1, y1, x2, y2 = box
                alpha = np.full((y2 - y1, x2 - x1, 4), 255, np.uint8)
                data = base64.b64encode(zlib.compress(png(alpha))).decode()
                shape = {"geometryType": "bitmap", "bitmap": {"data": data, "origin": [x1, y1]}}
            else:
                points = {"exterior": box_pixels(box), "interior": []}
                shape = {"geometryType": "polygon", "points": points}
            objects.append({**common, **shape})
        size = {"height": HEIGHT, "width": WIDTH}
        content = {"description": "", "tags": [], "size": size, "objects": objects}
        write_json(dataset / "ann" / f"{file}.json", content)


def hugging_face(root: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"_type": "Image"}}
    schema = pa.schema([("image", image), ("label", image)]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (root / "data").mkdir(parents=True)
    for split, part in (("train", scenes()[:4]), ("validation", scenes()[4:])):
        rows = {
            "image": [{"bytes": png(s.pixels), "path": f"{s.name}.png"} for s in part],
            "label": [{"bytes": png(s.truth), "path": f"{s.name}.png"} for s in part],
        }
        table = pa.table(rows, schema=schema)
        place = root / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(table, place, row_group_size=3)
    write_json(root / "id2label.json", {str(n): name for n, name in enumerate(NAMES)})


def hugging_face_arrow(root: Path) -> None:
    """`save_to_disk` of the package datasets."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("annotation", image), ("scene", pa.string())])
    for split, part in (("train", scenes()[:4]), ("validation", scenes()[4:])):
        rows = {
            "image": [{"bytes": png(s.pixels), "path": None} for s in part],
            "annotation": [{"bytes": png(s.truth), "path": None} for s in part],
            "scene": ["kitchen" for _ in part],
        }
        place = root / split
        place.mkdir(parents=True)
        table = pa.table(rows, schema=schema)
        with (
            pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, schema) as stream,
        ):
            stream.write_table(table, max_chunksize=3)
        write_json(place / "state.json", {"_data_files": []})
        write_json(place / "dataset_info.json", {"features": {}})
    (root / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))


def hugging_face_folder(root: Path) -> None:
    for number, scene in enumerate(scenes()):
        place = root / ("train" if number < 4 else "validation")
        save(place / f"{number:04d}.png", scene.pixels)
        save(place / "maps" / f"{number:04d}_map.png", scene.truth)
        row = {"file_name": f"{number:04d}.png", "mask_file_name": f"maps/{number:04d}_map.png"}
        with (place / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({**row, "text": "a photo"}) + "\n")
    (root / "classes.txt").write_text("\n".join(NAMES))


def plain(root: Path) -> None:
    for number, scene in enumerate(scenes()):
        save(root / "pics from phone" / "day 1" / f"IMG_{number:04d}.png", scene.pixels)
        save(root / "painted" / "day 1" / f"IMG_{number:04d}_labels.png", colored(scene.truth))
    for litter in ("__MACOSX/._IMG_0000.png", "@eaDir/IMG_0000.png", ".DS_Store", "Thumbs.db"):
        (root / litter).parent.mkdir(parents=True, exist_ok=True)
        (root / litter).write_bytes(b"litter")
    rows = [",".join((name, *map(str, COLORS[name]))) for name in NAMES]
    (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *rows]))


EXPORTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cvat_masks": (cvat_masks, "CVAT (Segmentation mask 1.1)"),
    "cvat_camvid": (cvat_camvid, "CVAT (CamVid 1.0)"),
    "roboflow": (roboflow, "Roboflow"),
    "labelme": (labelme, "labelme"),
    "coco": (coco, "COCO"),
    "label_studio": (label_studio, "Label Studio (JSON)"),
    "label_studio_png": (label_studio_png, "Label Studio (PNG)"),
    "supervisely": (supervisely, "Supervisely"),
    "hugging_face": (hugging_face, "Hugging Face"),
    "hugging_face_arrow": (hugging_face_arrow, "Hugging Face"),
    "hugging_face_folder": (hugging_face_folder, "Hugging Face"),
    "plain": (plain, "images and masks"),
}
