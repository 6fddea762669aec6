"""The siege finds what is wrong; and its short form finds nothing here."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kedro_project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from siege.commands import Operations, Running
from siege.damage import DAMAGES, REPLACED, damage, in_a_fork, kinds_of_files, restore
from siege.projects import differing, leftovers
from siege.strangers import listening
from siege.trials import Plan, Result, Trial, Yard, carry_out, exceptions, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_short_siege_finds_nothing(tmp_path):
    kinds = {"kills", "signals", "files", "inputs", "disks", "limits", "pairs", "strangers"}
    out = tmp_path / "siege.json"
    words = [str(ROOT / "benchmarks" / "siege.py"), "--short", "--json", str(out)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {one["kind"] for one in json.loads(out.read_text())} >= kinds


# ---- that it finds something is the point


def _faults(tmp_path: Path, code: str, limit: float = 20.0) -> list[str]:
    """Kinds of faults that a trial notes of a program."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "program.py").write_text(code)

    def attack(trial: Trial) -> None:
        trial.refused_or(Running(tmp_path, ["-m", "program"], real=True).wait(limit), "it")

    plan = Plan("kind", "name", attack)
    [result] = carry_out(Yard(tmp_path, 0), [plan], until=float("inf"))
    return [kind for kind, _ in result.faults]


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("raise ValueError('x')", ["traceback"]),
        ("raise SystemExit('Error: x is 1, expected 2.')", []),
        ("raise SystemExit('something')", ["other"]),
        ("import time; time.sleep(60)", ["hang"]),
        (
            "import subprocess\n"
            "subprocess.Popen(['sleep', '60'], start_new_session=True, close_fds=True)\n"
            "print('Error: none')\nraise SystemExit(1)",
            ["orphan"],
        ),
        ("print('well')", []),
    ],
)
def test_faults_of_a_command_are_noticed(tmp_path, monkeypatch, code, faults):
    monkeypatch.setattr("siege.trials.PATIENCE", 0.5)
    assert _faults(tmp_path, code, limit=4.0 if faults == ["hang"] else 30.0) == faults


def test_code_that_an_attack_brings_along_is_noticed(tmp_path):
    def attack(trial: Trial) -> None:
        trial.yard.marker.with_name(f"{trial.yard.marker.name}-1").write_text("pid 1")
        trial.check_marker("a pickle")

    [result] = carry_out(Yard(tmp_path, 0), [Plan("k", "n", attack)], until=float("inf"))
    assert result.faults == [("code executed", "a pickle: pid 1")]


def test_other_results_are_named():
    truth = {"weights": "a", "metrics": "b", "table": "c"}
    assert differing({"weights": "a", "metrics": "x"}, truth) == [
        "metrics is x, should be b",
        "table is missing, should be c",
    ]


def test_what_a_killed_writer_leaves_is_found(tmp_path):
    names = (".scores-12.json.4711.tmp", "launch-x1", ".teacher.0a1b2c3d", "teacher.safetensors")
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).touch()
    assert sorted(leftovers(tmp_path)) == sorted(f"data/{name}" for name in names[:3])


def test_a_command_is_stopped_at_an_operation_on_a_file(tmp_path):
    seen = []
    counted = Operations(tmp_path, 3, lambda: seen.append(sorted(p.name for p in here.iterdir())))
    here = tmp_path / "data"

    def write() -> list[object]:
        counted.watch()
        here.mkdir()  # 1
        (here / "a").write_text("a")  # 2
        (tmp_path.parent / "elsewhere").write_text("")
        (here / "a").read_text()
        (here / "a").rename(here / "b")  # 3: it is not done yet
        (here / "c").write_text("c")  # 4
        return seen

    assert in_a_fork(write) == [["a"]]
    assert counted.count == 4


@pytest.mark.parametrize("how", [*DAMAGES, *REPLACED])
def test_every_damage_changes_the_file_and_is_undone(tmp_path, how):
    path, other = tmp_path / "scores.json", tmp_path / "other.json"
    other.write_bytes(b"{}")
    data = json.dumps({"miou": [0.25, 0.5] * 40}).encode()
    path.write_bytes(data)
    linked = tmp_path / "linked.json"
    os.link(path, linked)
    damage(path, how, random.Random(0), other)
    assert not path.is_file() or path.read_bytes() != data
    restore(path, data)
    assert path.read_bytes() == linked.read_bytes() == data


def test_files_are_told_apart_by_what_they_are(tmp_path):
    version = "2026-11-27T09.09.04.934Z"
    for path in (f"teacher/{version}/teacher/0.bin", "work/0b09217757a082a7/state-000000003.ckpt"):
        (tmp_path / "data" / path).parent.mkdir(parents=True)
        (tmp_path / "data" / path).touch()
    assert set(kinds_of_files(tmp_path)) == {
        "data/teacher/VERSION/teacher/0.bin",
        "data/work/DIGEST/state-NUMBER.ckpt",
    }


@pytest.mark.parametrize(
    ("family", "host", "is_loopback"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
    ],
)
def test_a_listening_port_is_found_with_its_interface(family, host, is_loopback):
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        listener.listen()
        number = listener.getsockname()[1]
        [port] = [port for port in listening([os.getpid()]) if port.number == number]
    assert (port.host, port.is_loopback) == (host, is_loopback)


def test_the_table_counts_and_exceptions_say_how_to_repeat_them():
    results = [
        Result("kills", "tse 1", "", [], "", 1.0),
        Result("kills", "tse 2", "", [("lost", "again: status 1: Error")], "", 1.0),
        Result("references", "tse", "", [], "", 1.0),
    ]
    lines = table(results, {"kills": 3})
    assert lines[2].split(" | ")[:5] == ["| kills", "3", "2", "1", "1"]
    assert lines[3].split(" | ")[:5] == ["| together", "3", "2", "1", "1"]
    assert exceptions(results, "python benchmarks/siege.py --seed 0") == [
        "- kills, lost, 1 times: again: status 1: Error",
        "  - `python benchmarks/siege.py --seed 0 --only kills --trial 'tse 2'`",
    ]


def test_an_attempt_that_takes_too_long_is_ended(tmp_path):
    def attack(trial: Trial) -> None:
        subprocess.run(["sleep", "60"])

    [result] = carry_out(
        Yard(tmp_path, 0), [Plan("k", "n", attack)], until=float("inf"), patience=1.0
    )
    assert result.faults == [("hang", "the trial took more than 1 s")]
