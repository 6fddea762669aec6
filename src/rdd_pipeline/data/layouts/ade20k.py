"""ADE20K of the scene-parsing challenge 2016, 150 classes."""

from __future__ import annotations

from pathlib import Path

from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.layouts.base import (
    Layout,
    Listing,
    distinct_colors,
    list_split_folders,
)

# The first name of each entry of the challenge's list.
_NAMES = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk;
person; earth; door; table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf;
house; sea; mirror; rug; field; armchair; seat; fence; desk; rock; wardrobe; lamp; bathtub;
railing; cushion; base; box; column; signboard; chest of drawers; counter; sand; sink;
skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow;
screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill;
bench; countertop; stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade
machine; hovel; bus; towel; light; truck; tower; chandelier; awning; streetlight; booth;
television; airplane; dirt track; apparel; pole; land; bannister; escalator; ottoman; bottle;
buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything; swimming
pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step;
tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture;
hood; sconce; vase; traffic light; tray; ashcan; fan; pier; crt screen; plate; monitor; bulletin
board; shower; radiator; glass; clock; flag
"""

ADE20K = LabelSet(
    name="ade20k",
    names=tuple(" ".join(_NAMES.split()).split("; ")),
    colors=distinct_colors(151)[1:],
    lookup=make_lookup({raw: raw - 1 for raw in range(1, 151)}, ignored=(0,)),
)

_FOLDERS = (
    "images/training/NAME.jpg with its mask annotations/training/NAME.png, and likewise "
    "images/validation, annotations/validation."
)


def _list(root: Path) -> Listing:
    folders = {
        split: (f"images/{folder}", f"annotations/{folder}")
        for split, folder in (("train", "training"), ("val", "validation"))
    }
    return list_split_folders(root, folders, _FOLDERS)


ADE20K_LAYOUT = Layout(
    ADE20K,
    _list,
    f"{_FOLDERS} This is the archive ADEChallengeData2016 of the MIT scene parsing benchmark.",
)
