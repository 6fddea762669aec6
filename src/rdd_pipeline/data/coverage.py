"""Whether the labels of a data set can be learned and scored: which classes occur where."""

from __future__ import annotations

from rdd_pipeline.data.index import ClassCounts, Index
from rdd_pipeline.data.layouts import Layout, Problem, some_of

_NOTICED = 0.001
"""Share of pixels of a value that is ignored by default from which on it is mentioned."""
_NAMED = 8


def with_coverage(index: Index, layout: Layout) -> Index:
    """The index with a problem or warning for each split whose labels are not as expected.

    Training images without labeled pixels, or of one class only, are problems: nothing could be
    learned. Other splits without labeled pixels (the test masks of many public sets) and a class
    that does not occur are a warning.

    Args:
        index: Of images that are to be used; counts of a few of them would be misleading.
        layout: Where it came from.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    names = layout.labels.names
    train = index.counts.get("train")
    for split, counts in index.counts.items():
        absent = [name for name, pixels in zip(names, counts.pixels, strict=False) if not pixels]
        if len(absent) == len(names):
            text = (
                f"split '{split}' has no labeled pixel: all {sum(counts.pixels)} pixels of its "
                f"masks are ignored. {_advice(counts, names, layout)}"
            )
            if split == "train":
                problems.append(Problem(split, text, blocks=True))
            else:
                kept = " Trainings hand on their last weights, not the best." * (split == "val")
                warnings.append(f"{text} Nothing can be scored on it.{kept}")
        elif split == "train" and len(absent) == len(names) - 1:
            (only,) = (name for name in names if name not in absent)
            text = (
                f"split 'train' holds one class only, '{only}'; {_named(absent)} never "
                f"occur{'s' * (len(absent) == 1)}, so there is nothing to learn. "
                f"{_advice(counts, absent, layout)}"
            )
            problems.append(Problem(split, text, blocks=True))
        elif split == "train" and absent:
            warnings.append(
                f"{_named(absent)} never occur{'s' * (len(absent) == 1)} in split 'train', so no "
                f"network can learn {'it' if len(absent) == 1 else 'them'}. "
                f"{_advice(counts, absent, layout)}"
            )
        elif train is not None:
            absent = [name for name in absent if train.pixels[names.index(name)]]
            if absent:
                warnings.append(
                    f"{_named(absent)} never occur{'s' * (len(absent) == 1)} in split '{split}': "
                    "its mean IoU is that of the other classes, unless a network predicts "
                    f"{'it' if len(absent) == 1 else 'them'}, which then counts as 0."
                )
    return index._replace(
        problems=(*index.problems, *problems), warnings=(*warnings, *index.warnings)
    )


def _advice(counts: ClassCounts, absent: tuple[str, ...] | list[str], layout: Layout) -> str:
    """What to do about classes that do not occur."""
    ignored = counts.pixels[-1] / sum(counts.pixels)
    if layout.default_ignored and ignored >= _NOTICED:
        (value,) = layout.default_ignored
        class_ = f"'{absent[0]}'" if len(absent) == 1 else "that class"
        return (
            f"{100 * ignored:.1f} % of its pixels hold {value}, which is ignored where the table "
            f"of labels does not say otherwise. If it is a class, as in masks of 0 and 255, write "
            f"`value: {value}` for {class_} and `ignore: []`."
        )
    share = f" {100 * ignored:.1f} % of its pixels are ignored." if ignored >= _NOTICED else ""
    return f"Check the masks and what the table of labels says their values mean.{share}"


def _named(names: list[str]) -> str:
    quoted = some_of([f"'{name}'" for name in names], shown=_NAMED)
    return f"class {quoted}" if len(names) == 1 else f"the {len(names)} classes {quoted}"
