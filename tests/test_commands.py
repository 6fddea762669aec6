"""Commands to be pasted carry what the session was started with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import click
import pytest
from kedro.framework.cli.utils import _split_params
from omegaconf import OmegaConf

from rdd_pipeline.commands import (
    Session,
    kedro_command,
    params_option,
    remember_session,
    session_text,
)


@pytest.fixture(autouse=True)
def no_session() -> Iterator[None]:
    remember_session(Session())
    yield
    remember_session(Session())


def parsed(command: str) -> tuple[list[str], dict[str, Any]]:
    """Words and parameters of a command, by the shell's and Kedro's own reading."""
    words = shlex.split(command)
    texts = [word.removeprefix("--params=") for word in words if word.startswith("--params=")]
    context = click.Context(click.Command("run"))
    params = _split_params(context, click.Option(["--params"]), texts[0]) if texts else {}
    return [word for word in words if not word.startswith("--params=")], params


def test_without_a_session_it_is_the_bare_command():
    assert kedro_command() == "kedro run"
    assert kedro_command("evaluation") == "kedro run --pipeline=evaluation"


def test_environment_and_parameters_of_the_session_are_kept():
    remember_session(Session("fruit", {"recipe": {"iterations": 5}, "seeds": 2, "run_name": "a"}))
    words, params = parsed(kedro_command("distill_baselines", to_outputs=["metrics_baseline"]))
    assert words == [
        "kedro",
        "run",
        "--pipeline=distill_baselines",
        "--env=fruit",
        "--to-outputs=metrics_baseline",
    ]
    # The name of one run is not the name of another.
    assert params == {"recipe": {"iterations": 5}, "seeds": 2}


def test_further_parameters_win_over_the_sessions():
    remember_session(Session(None, {"seed": 1, "data": {"path": "/a b/c"}}))
    _, params = parsed(kedro_command("evaluation", params={"seed": 3, "recipe.batch_size": 4}))
    assert params == {"seed": 3, "data": {"path": "/a b/c"}, "recipe": {"batch_size": 4}}


@pytest.mark.parametrize(
    "value",
    [
        *(True, None, 3, -2.5, 1e-07, float("inf"), "resnet18", "/data/my images/ü (1)", "$HOME"),
        *("a,b", "1", "1e-3", "1_000", "yes", "null", "", " x ", "it's", 'a "b"', "a: b", "a\nb"),
        *("#1", "[x]", "50%", "~", "a\\b", "- a", "!x", "*", "12:30", "2001-01-01", "01", ".5"),
        *([64, 96], [], ["a,b", "1"], [[1, 2], [3]], {}, [{"a": 1, "b": [2, 3]}]),
    ],
    ids=repr,
)
def test_every_value_is_read_back_as_it_was(value):
    _, params = parsed(kedro_command(params={"a": {"b": value}, "c": 1}))
    assert params == {"a": {"b": value}, "c": 1}
    assert type(params["a"]["b"]) is type(value)


def test_no_parameters_take_no_option():
    assert params_option({}) == []
    assert params_option({"run_name": "a"}, frozenset({"run_name"})) == []


def test_omegaconf_is_what_reads_the_option():
    """The reading above is Kedro's; should it change, the encoding has to."""
    assert OmegaConf.to_container(OmegaConf.from_dotlist(["a=- 1\n- 2"])) == {"a": [1, 2]}


def test_a_session_is_kept_as_text_without_seeds_and_name():
    remember_session(Session("a", {"seed": 1, "seeds": 2, "run_name": "x", "r": {"c": [1, 2]}}))
    text = session_text()
    remember_session(Session("b"))
    words, params = parsed(kedro_command("p", params={"seed": 7}, session=text))
    assert words == ["kedro", "run", "--pipeline=p", "--env=a"]
    assert params == {"r": {"c": [1, 2]}, "seed": 7}
