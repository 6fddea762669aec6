"""What Kedro's own commands say."""

from __future__ import annotations

import sys

import pytest
from kedro.framework.cli import jupyter, utils

from rdd_pipeline.hooks.plugins import say_what_notebooks_need


@pytest.mark.parametrize("module", [jupyter, utils])
def test_a_missing_notebook_server_is_one_line_with_what_to_install(monkeypatch, module):
    for place in (jupyter, utils):
        kedros = place._check_module_importable
        monkeypatch.setattr(place, "_check_module_importable", kedros)  # put back at the end
    monkeypatch.setitem(sys.modules, "notebook", None)
    say_what_notebooks_need()
    module._check_module_importable("json")
    with pytest.raises(SystemExit) as caught:
        module._check_module_importable("notebook")
    assert str(caught.value) == (
        "Error: The package notebook is missing. In the project's folder: "
        "pip install -e '.[notebooks]'"
    )
