"""What a session's networks are worth, for the MLflow runs of the session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rdd_pipeline.hooks.facts import score_names
from rdd_pipeline.hooks.run import OpenRun

Metrics = dict[str, Any]
"""Of one network, as `reporting.comparison` has them."""


class Scoreboard:
    """Collects scores while nodes run; the end of the session compares them."""

    def __init__(self) -> None:
        self._scored: dict[tuple[str, str], Metrics] = {}
        self._unscored: dict[tuple[str, str], str] = {}
        self._alone: set[str] = set()

    def trained(self, method: str, networks: Mapping[str, Any]) -> None:
        """Remember networks by seed (`NetworkCheckpoint`), which may have been scored before."""
        for seed, network in networks.items():
            fingerprint = network.header.provenance.get("fingerprint", "")
            named = fingerprint or f"imported-{network.digest()[:8]}"
            self._unscored[method, seed] = named
        self._note(method, networks)

    def scored(self, run: OpenRun, method: str, metrics: Mapping[str, Metrics]) -> None:
        """Write the scores of a method's networks, by seed."""
        self._note(method, metrics)
        for seed, found in metrics.items():
            self._write(run, method, seed, found)

    def write(self, run: OpenRun, known: Callable[[], Sequence[Metrics]]) -> None:
        """Write what can be said of all of them together.

        Networks that were not scored here get the scores that others have found for them on the
        same images. The session's run gets the numbers of every method, ``miou_test.METHOD``, and
        its gain over the student alone, those of the methods their means over the seeds.

        Args:
            run: Of the session.
            known: Gives all scores of this data set, oldest first.
        """
        if not self._scored:
            return
        from rdd_pipeline.reporting.comparison import compare, headline

        results, scored = known(), list(self._scored.values())
        images = {found["about"]["data_digest"] for found in scored}
        for found in reversed(results):
            about = found["about"]
            for (method, seed), fingerprint in self._unscored.items():
                same = about["fingerprint"] == fingerprint and about["data_digest"] in images
                if same and (method, seed) not in self._scored:
                    self._write(run, method, seed, found)
        alike = {(f["about"]["protocol_digest"], f["about"]["seed"]) for f in scored}
        alone = [
            found
            for found in results
            if found["about"]["method"] == "baseline"
            and (found["about"]["protocol_digest"], found["about"]["seed"]) in alike
        ]
        numbers = headline(compare([*alone, *self._scored.values()]))
        run.writer.metrics(run.id, _by_method(numbers))
        for method in {method for method, _ in self._scored} & set(numbers):
            own = numbers[method]
            if method in self._alone:  # its scores are there, bit for bit
                own = {name: value for name, value in own.items() if name.startswith("gain")}
            run.writer.metrics(run.of(method), own)

    def _note(self, method: str, by_seed: Mapping[str, Any]) -> None:
        if len(by_seed) == 1:
            self._alone.add(method)

    def _write(self, run: OpenRun, method: str, seed: str, found: Metrics) -> None:
        self._scored[method, seed] = found
        own = run.of(method, None if method in self._alone else seed)
        run.writer.metrics(own, score_names(found))


def numbers_of_table(table: Any) -> dict[str, float]:
    """Headline of a data frame with the rows of `compare`."""
    from rdd_pipeline.reporting.comparison import headline

    return _by_method(headline(table.to_dict("records")))


def _by_method(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Numbers of `headline` by name and method: ``miou_test.kd``."""
    return {
        f"{name}.{method}": value
        for method, found in numbers.items()
        for name, value in found.items()
    }
