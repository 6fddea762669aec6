from __future__ import annotations

import logging

import pytest
from rich.console import Console
from rich.logging import RichHandler

from rdd_pipeline.hooks.logs import log_whole_lines


@pytest.fixture
def root(monkeypatch):
    """The root logger, with a handler of rich alone."""
    logger = logging.getLogger()
    before = list(logger.handlers)

    def with_handler(**console):
        logger.handlers[:] = [RichHandler(console=Console(**console), level=logging.INFO)]
        return logger

    yield with_handler
    logger.handlers[:] = before


def test_a_line_of_a_file_is_whole_and_ends_where_it_ends(root, capsys):
    logger = root(force_terminal=False, width=40)
    log_whole_lines()
    log_whole_lines()
    logger.warning("word " * 40 + "end")
    logger.debug("below the level of the handler")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("WARNING  " + "word " * 40 + "end")


@pytest.mark.parametrize("console", [{"force_terminal": True}, {"force_jupyter": True}])
def test_a_terminal_and_a_notebook_keep_rich(root, console):
    logger = root(**console)
    log_whole_lines()
    assert [type(handler) for handler in logger.handlers] == [RichHandler]
