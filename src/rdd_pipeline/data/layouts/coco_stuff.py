"""COCO-Stuff 164k, 171 classes of the ids 0 to 181."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import (
    Layout,
    Listing,
    distinct_colors,
    list_split_folders,
)

UNUSED_IDS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Ids that no mask holds: COCO planned these classes and left them out."""

_NAMES = """
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant;
stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra;
giraffe; backpack; umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite;
baseball bat; baseball glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork;
knife; spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut;
cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; mouse; remote; keyboard;
cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear;
hair drier; toothbrush; banner; blanket; branch; bridge; building-other; bush; cabinet; cage;
cardboard; carpet; ceiling-other; ceiling-tile; cloth; clothes; clouds; counter; cupboard;
curtain; desk-stuff; dirt; door-stuff; fence; floor-marble; floor-other; floor-stone; floor-tile;
floor-wood; flower; fog; food-other; fruit; furniture-other; grass; gravel; ground-other; hill;
house; leaves; light; mat; metal; mirror-stuff; moss; mountain; mud; napkin; net; paper; pavement;
pillow; plant-other; plastic; platform; playingfield; railing; railroad; river; road; rock; roof;
rug; salad; sand; sea; shelf; sky-other; skyscraper; snow; solid-other; stairs; stone; straw;
structural-other; table; tent; textile-other; towel; tree; vegetable; wall-brick; wall-concrete;
wall-other; wall-panel; wall-stone; wall-tile; wall-wood; water-other; waterdrops; window-blind;
window-other; wood
"""
_USED_IDS = [value for value in range(182) if value not in UNUSED_IDS]

COCO_STUFF = LabelSet(
    name="coco_stuff",
    names=tuple(" ".join(_NAMES.split()).split("; ")),
    colors=distinct_colors(172)[1:],
    lookup=make_lookup({raw: number for number, raw in enumerate(_USED_IDS)}, ignored=(255,)),
)

_FOLDERS = (
    "images/train2017/NAME.jpg with its mask annotations/train2017/NAME.png, and likewise val2017."
)


def _list(root: Path) -> Listing:
    folders = {
        split: (f"images/{split}2017", f"annotations/{split}2017") for split in ("train", "val")
    }
    return list_split_folders(root, folders, _FOLDERS)


COCO_STUFF_LAYOUT = Layout(
    COCO_STUFF,
    _list,
    f"{_FOLDERS} These are COCO's train2017 and val2017 images and the masks of COCO-Stuff's "
    "stuffthingmaps_trainval2017, in the folders images and annotations.",
)
