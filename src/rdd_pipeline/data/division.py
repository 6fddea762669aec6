"""Splits made of the training images, for data sets that come without them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple


class Division(NamedTuple):
    """Which splits are made of the training images, and how large they are."""

    val: float = 0.0
    """Share of the images, [0, 1); 0: no such split is made."""
    test: float = 0.0
    seed: int = 0

    @property
    def made(self) -> tuple[str, ...]:
        """The splits that are made."""
        shares = {"val": self.val, "test": self.test}
        return tuple(split for split, share in shares.items() if share > 0)


def divide(digests: Sequence[str], division: Division) -> list[str]:
    """Split of each image.

    Images are ordered by a hash of seed and content; `val` is made of the first ones, `test` of the
    last. So neither names nor order decide, images of equal content stay together, and when an
    image is added to the data set, hardly any other changes its split, and none between `val` and
    `test`.

    Args:
        digests: Of the images' contents, in any order.
        division: What is wanted. A split gets its share of the images rounded to a whole number,
            at least one, or a little less where images of equal content do not fit in.

    Returns:
        `train`, `val` or `test` for each digest.
    """
    groups: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        groups.setdefault(digest, []).append(position)
    order = sorted(groups, key=lambda digest: _rank(digest, division.seed))
    splits = ["train"] * len(digests)
    for split, share, keys in (
        ("val", division.val, order),
        ("test", division.test, order[::-1]),
    ):
        room = max(1, round(share * len(digests))) if share > 0 else 0
        for key in keys:
            group = groups[key]
            if len(group) <= room and splits[group[0]] == "train":
                room -= len(group)
                for position in group:
                    splits[position] = split
    return splits


def _rank(digest: str, seed: int) -> bytes:
    return blake2b(f"{seed}\n{digest}".encode(), digest_size=16).digest()
