"""The small jobs of tests/training, for several processes."""

from tests.training.conftest import (  # noqa: F401 - fixtures
    _shapes_are_computed_once,
    blocks,
    make_job,
    teacher,
)
