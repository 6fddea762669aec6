"""The same few images by every method, for the page that compares them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What one network makes of one image.

    Attributes:
        title: Of its method.
        text: How well it does.
        prediction: Classes, as a data URI.
        mistakes: Wrong pixels, to lie over the image, as a data URI.
    """

    title: str
    text: str
    prediction: str
    mistakes: str


@dataclass(frozen=True)
class Shown:
    """An image, its label and what the networks make of it; pictures are data URIs."""

    name: str
    image: str
    label: str
    cards: list[Card]


@dataclass(frozen=True)
class Gallery:
    """The images of one comparison.

    Attributes:
        rule: Which images these are, in words.
        colors: Name and color (``#rrggbb``) of each class.
        shown: One for each image.
        lacking: Titles of methods whose network is no longer there.
    """

    rule: str
    colors: list[tuple[str, str]]
    shown: list[Shown]
    lacking: list[str]
