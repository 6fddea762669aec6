from __future__ import annotations

import subprocess
import sys

import pytest

import rdd_pipeline.datasets


@pytest.mark.parametrize("name", rdd_pipeline.datasets.__all__)
def test_every_promised_class_is_there(name: str) -> None:
    assert getattr(rdd_pipeline.datasets, name).__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="NoDataset"):
        _ = rdd_pipeline.datasets.NoDataset


def test_the_package_itself_imports_no_torch() -> None:
    code = "import sys, rdd_pipeline.datasets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
