"""Several students under one teacher: each batch is loaded, and shown to the teacher, only once.

A student ends with the bits that it would have by itself. A step draws from torch's generator
after seeding it by (seed, iteration), the teacher draws nothing, and there is nothing else that
students could notice of one another.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.loading import Batch
from rdd_pipeline.errors import NonFiniteLossError
from rdd_pipeline.files import json_digest
from rdd_pipeline.networks import Preprocessing
from rdd_pipeline.training.curves import OnLog
from rdd_pipeline.training.device import resolve_device, set_up
from rdd_pipeline.training.loop import Lockstep, Trainer, errors_of_torch, on_device
from rdd_pipeline.training.progress import TrainingProgress, speed
from rdd_pipeline.training.state import TrainState
from rdd_pipeline.training.step import Teacher
from rdd_pipeline.training.training import Training

logger = logging.getLogger(__name__)

NAMED = 5
"""Students that a title names; of more it has the first and the last."""


@dataclass(frozen=True)
class Student:
    """A training beside others.

    Attributes:
        training: What to train; it has a store.
        on_log: As for `loop.train`.
        then: The one that goes on from its final state, such as the next stage of RDD.
    """

    training: Training
    on_log: OnLog | None = None
    then: Callable[[TrainState], Student] | None = None


def train_together(
    students: Sequence[Student],
    trainer: TrainerParams,
    *,
    device: torch.device | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Train all that are not done yet; `loop.train` finds them done then, in their stores.

    Those that see the same images in the same order (seed, batch, augmentation) share each batch,
    `trainer.share_teacher` of them at once. Whoever has nobody to share with is left alone. So is
    one whose loss, gradient or weight becomes NaN or infinite: the others go on, and `loop.train`
    meets the error again.

    Args:
        students: Of one teacher.
        trainer: How to run here.
        device: As for `loop.train`, and so is `stop`.
        stop: Set from outside to stop after the current iteration.

    Raises:
        UserError: The pieces do not fit together, or memory or disk space ran out.
        TrainingInterruptedError: SIGTERM, SIGINT or `stop`; the states were saved.
    """
    trainings = [student.training for student in students]
    assert all(training.store for training in trainings), "they meet in their stores"
    teachers = {id(t.teacher): t.teacher for t in trainings if t.teacher is not None}
    assert len({teacher.digest() for teacher in teachers.values()}) <= 1, "there is one teacher"
    device = resolve_device(trainer.device) if device is None else device
    set_up(trainer, device)
    orders: dict[str, list[Student]] = {}
    for student in filter(None, map(_unfinished, students)):
        orders.setdefault(_order(student.training), []).append(student)
    for group in orders.values():
        for part in _parts(group, trainer.share_teacher):
            if len(part) > 1:
                _Group(part, trainer, device).train(stop)


def _unfinished(student: Student) -> Student | None:
    """The student, or the one that goes on from it, that is not done; None: all are."""
    store = student.training.store
    state = store.finished_state() if store else None
    if state is None:
        return student
    return None if student.then is None else _unfinished(student.then(state))


def _order(training: Training) -> str:
    """Digest of what decides the pixels that a step sees, and how."""
    job, images = training.job, training.images
    recipe = job.recipe
    return json_digest(
        [
            *(images.index_digest, images.labels.meaning(), images.image_size),
            *(job.seed, recipe.batch_size, recipe.gradient_accumulation_steps),
            *(recipe.augment.model_dump(mode="json"), job.precision),
            Preprocessing.for_network(job.network).mean_rgb(),
        ]
    )


def _parts(students: Sequence[Student], at_once: bool | int) -> Iterator[Sequence[Student]]:
    """As few parts as possible, as even as possible; true: one, false: one for each."""
    most = len(students) if at_once is True else max(int(at_once), 1)
    count = math.ceil(len(students) / most)
    for part in range(count):
        yield students[part * len(students) // count : (part + 1) * len(students) // count]


class _Group(Lockstep):
    """Some students that share each batch."""

    def __init__(
        self, students: Sequence[Student], trainer: TrainerParams, device: torch.device
    ) -> None:
        self._trainer, self._device = trainer, device
        self._of: dict[Trainer, Student] = {}
        self._seen: dict[Trainer, _Quiet] = {}
        super().__init__([self._member(student) for student in students], _title(students))
        self._last = max(
            m.job.recipe.iterations if self._of[m].then else m.job.last_iteration
            for m in self.members
        )
        self._teacher: Teacher | None = None
        self._waited = 0.0

    def train(self, stop: threading.Event | None) -> None:
        """Start and train all, each to its end."""
        names = ", ".join(member.job.title for member in self.members)
        logger.info("Trained together, under one teacher: %s.", names)
        with errors_of_torch(self.members):
            for member in self.members:
                self._start(member)
            for member in [member for member in self.members if member.is_over]:
                self._end(member)
            if self.members:
                self.run(stop)

    @property
    def last(self) -> int:
        """Of those that go on from others, too."""
        return self._last

    def progress(self, first: int, last: int) -> TrainingProgress:
        """One line for all."""
        return TrainingProgress(self.title, first, last)

    def open(self, bar: TrainingProgress) -> None:
        """The first batch comes next."""
        self._bar = bar
        for member in self.members:
            self._open(member)

    def take(self, batch: Batch, active: Sequence[Trainer]) -> None:
        """Ask the teacher, then let one student after the other learn."""
        begin = time.monotonic()
        batch = on_device(batch, self._lead)
        if self._teacher is not None:
            self._teacher.remember()
            if any(member.components.step.teacher for member in active):
                for part in batch.images.chunk(self._lead.micro_batches.parts):
                    self._teacher(part)
        # The clocks of all together show what all together took.
        waited = self._waited / max(len(active), 1)
        asked = (time.monotonic() - begin) / max(len(active), 1)
        for member in active:
            with self._may_fail(member):
                member.curves.resume_clock(waited + asked)
                member.curves.waited(waited)
                member.step(batch)
        self._show(active)

    def keep(self, member: Trainer, stop: bool) -> bool:
        """Save what is due; who is done goes, and makes room for who goes on from it."""
        if member in self.members:
            with self._may_fail(member):
                member.keep(stop)
                if member.is_over:
                    self._end(member)
        return stop

    def waited(self, seconds: float) -> None:
        """A batch has come after so many seconds."""
        self._waited = seconds

    def _member(self, student: Student) -> Trainer:
        member = Trainer(student.training, self._trainer, self._device, None, student.on_log)
        self._of[member] = student
        member.finished()  # it is not; what is trained is written down
        return member

    def _start(self, member: Trainer) -> None:
        member.start(self._teacher)
        self._teacher = self._teacher or member.components.step.teacher

    def _open(self, member: Trainer) -> None:
        self._seen[member] = quiet = _Quiet(member.job.title, 1, self.last, silent=True)
        member.open(quiet)

    def _end(self, member: Trainer) -> None:
        final = member.complete()
        then = self._of[member].then
        self._leave(member)
        following = then and _unfinished(then(final))
        if following:
            member = self._member(following)
            self._start(member)
            self._open(member)
            self.members.append(member)

    def _leave(self, member: Trainer) -> None:
        self.members.remove(member)
        self._seen.pop(member, None)
        del self._of[member], member.components  # their memory

    @contextmanager
    def _may_fail(self, member: Trainer) -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            logger.warning("%s The other students go on.", error)
            self._leave(member)

    def _show(self, active: Sequence[Trainer]) -> None:
        """Images/s are those that every student sees; the best score says whose it is."""
        seen = [self._seen[member] for member in active if member in self._seen]
        if not seen or any(view.iteration < self.iteration or not view.rate for view in seen):
            return
        times = [1 / view.rate for view in seen]
        waiting = sum(v.waiting * t for v, t in zip(seen, times, strict=True)) / sum(times)
        facts = f"{len(seen)} x {speed(1 / sum(times), waiting)}"
        best = max(
            ((m.state.best.miou, m.job.method) for m in self.members if m.state.best), default=None
        )
        if best is not None:
            facts += f"  best mIoU {100 * best[0]:.1f} ({best[1]})"
        self._bar.tell(self.iteration, facts)


class _Quiet(TrainingProgress):
    """Remembers what it would show."""

    iteration, rate, waiting = 0, 0.0, 0.0

    def show(
        self, iteration: int, *, loss: float, lr: float, rate: float, waiting: float = 0.0
    ) -> None:
        self.iteration, self.rate, self.waiting = iteration, rate, waiting


def _title(students: Sequence[Student]) -> str:
    jobs = [student.training.job for student in students]
    names = [job.method for job in jobs]
    if len(names) > NAMED:
        names = [*names[: NAMED - 2], "...", names[-1]]
    seed = f", seed {jobs[0].seed}" if jobs[0].seed else ""
    return f"group of {len(jobs)} students ({', '.join(names)}{seed})"
