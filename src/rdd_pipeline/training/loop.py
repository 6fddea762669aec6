"""The training loop: iterations `first`..`last` of a job, resumable at any of them, bit for bit.

Every random number is a function of (seed, iteration, slot) and the learning rate one of the
iteration, so a state is the tensors of student, objective and optimizer plus the iteration they
stand at. Two stages of one run hand exactly that state over.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdd_pipeline.allocation import freed_memory_kept
from rdd_pipeline.collectives import Collectives
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.delivery import LoaderFailedError
from rdd_pipeline.data.loading import Batch, Loader
from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.networks import Preprocessing
from rdd_pipeline.training.build import Components, build
from rdd_pipeline.training.coordinator import Coordinator
from rdd_pipeline.training.curves import Curves, OnLog
from rdd_pipeline.training.device import (
    memory_format,
    peak_memory,
    ran_out_of_memory,
    reset_peak_memory,
    resolve_device,
    resolve_workers,
    set_up,
    unrepeatable_operation,
)
from rdd_pipeline.training.early_stopping import why_stopped
from rdd_pipeline.training.finite import changed_by_step, total_norm
from rdd_pipeline.training.profile import Profile, phase
from rdd_pipeline.training.progress import TrainingProgress
from rdd_pipeline.training.reading import Reading
from rdd_pipeline.training.schedule import LR_FACTOR, learning_rate
from rdd_pipeline.training.snapshots import moments, take_snapshot, with_snapshot
from rdd_pipeline.training.state import Best, TrainState, copy_to_cpu
from rdd_pipeline.training.step import Teacher
from rdd_pipeline.training.stopping import TrainingInterruptedError, stop_signals
from rdd_pipeline.training.synchronized import MicroBatches
from rdd_pipeline.training.training import Training, TrainingResult

logger = logging.getLogger(__name__)


def train(
    training: Training,
    trainer: TrainerParams,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    on_log: OnLog | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train one network, or load it when this very work is done, or go on where it stopped.

    Args:
        training: What to train, and where it is kept.
        trainer: How to run here.
        group: Ranks that train together; None: this process alone.
        device: Where to compute; None: what `trainer.device` says.
        on_log: Called with (iteration, values) for every point of the curves.
        stop: Set from outside to stop after the current iteration; None: SIGTERM and SIGINT do it.

    Raises:
        UserError: The pieces do not fit together (raised before anything is trained), or memory
            or disk space ran out.
        NonFiniteLossError: A loss, gradient or weight became NaN or infinite; nothing of the step
            was kept.
        TrainingInterruptedError: SIGTERM, SIGINT or `stop`; the state was saved.
    """
    device = resolve_device(trainer.device) if device is None else device
    set_up(trainer, device)
    member = Trainer(training, trainer, device, group, on_log)
    finished = member.finished()
    if finished is not None:
        return training.result(finished, trained=0)
    with errors_of_torch([member]):
        member.start()
        before = member.state.iteration
        Lockstep([member], training.job.title).run(stop)
    final = member.complete()
    return training.result(final, trained=final.iteration - before)


class Trainer:
    """One training, on one of the ranks: what `Lockstep` asks of it, step by step.

    Args:
        training: What to train, and where it is kept.
        trainer: How to run here.
        device: Where to compute.
        group: Ranks that train together; None: this process alone.
        on_log: Called with (iteration, values) for every point of the curves.
    """

    components: Components
    curves: Curves

    def __init__(
        self,
        training: Training,
        trainer: TrainerParams,
        device: torch.device,
        group: dist.ProcessGroup | None,
        on_log: OnLog | None,
    ) -> None:
        self.training, self.job, self.store = training, training.job, training.store
        self.trainer, self.device = trainer, device
        self.ranks = Collectives(group)
        self.micro_batches = MicroBatches(self.ranks, self.job.recipe.gradient_accumulation_steps)
        self.coordinator = Coordinator(self.ranks, device, has_store=self.store is not None)
        self.is_writer = self.coordinator.is_writer
        self.on_log = (on_log or (lambda iteration, values: None)) if self.is_writer else None
        self.state = TrainState()
        self._stopped: str | None = None
        """Why it is over early."""
        self._size: Tensor | None = None
        """Norm of what the last step has changed."""
        self._readings: deque[Reading] = deque()
        self._defers = reads_later(device)
        if self.is_writer:
            training.check(self.ranks.size)
            self.state.fingerprint = training.fingerprint

    def finished(self) -> TrainState | None:
        """The final state, if all is done already; else what is trained is written down."""
        store = self.store
        finished = self.coordinator.from_writer(lambda: store.finished_state() if store else None)
        if finished is not None:
            self._say("already trained (%s), loaded.", finished.fingerprint)
        elif store and self.is_writer:
            store.describe(self.training.description())
        return finished

    def start(self, teacher: Teacher | None = None) -> None:
        """Build everything and go on from what there is: a checkpoint, or the initial state.

        Args:
            teacher: Of another training, to be shared.
        """
        store, from_writer = self.store, self.coordinator.from_writer
        resumed = from_writer(lambda: store.latest() if store else None)
        state = resumed or from_writer(lambda: self.training.initial_state)
        together = self.coordinator.on_one_machine
        self.components = components = build(
            self.training,
            self.trainer,
            self.device,
            self.micro_batches,
            pretrained=self.is_writer or together,
            teacher=teacher,
        )
        if state is None and not together:
            # Pretrained weights are files of one machine.
            state = from_writer(lambda: components.snapshot(self.state))
        if state is not None:
            components.load(state)
            self.state = state.without_tensors(self.state.fingerprint)
            self._stopped = why_stopped(self.job, self.state.history)
        if resumed is not None:
            self._say("going on after iteration %d.", resumed.iteration)

    def open(self, progress: TrainingProgress) -> None:
        """The first step comes next; `progress` is told of all of them."""
        self.components.wrapped.train()
        labels = self.training.images.labels
        self.curves = Curves(self.job, labels, self.state, progress, self.on_log)
        self._saved = time.monotonic()

    def step(self, batch: Batch) -> None:
        """Learn from a batch on the device, and do what is due after it but the checkpoint."""
        lr = learning_rate(self.job.recipe.optimizer, batch.iteration, self.job.recipe.iterations)
        self._one_step(self.components, batch, lr)
        iteration = self.state.iteration = batch.iteration
        log = iteration % self.trainer.log_every == 0 or self.is_over
        validate = self._validation_is_due()
        # What a GPU says of a step is looked at while it computes the next.
        self._read(but=1 if self._defers and not (log or validate) else 0)
        if log:
            self._log(lr)
        if validate:
            self._validate()
            if self._stopped is not None:
                if not log:  # the steps since the last point
                    self._log(lr)
                self.curves.stopped_early(self._stopped)

    def keep(self, stop: bool) -> bool:
        """Write the checkpoint if it is due, or at a stop.

        Args:
            stop: This rank was asked to stop.

        Returns:
            Whether any rank was.
        """
        due = time.monotonic() - self._saved > self.trainer.checkpoint_every
        # All save at once, though their clocks differ: weights are looked at together.
        due, stopping = self.coordinator.any(due, stop)
        if not self.is_over and (self._validation_is_due() or due or stopping):
            self._read(but=0)
            self._save()
            self._saved = time.monotonic()
            self.curves.resume_clock()
        return stopping

    @property
    def is_over(self) -> bool:
        """Whether the last iteration is done, or further ones would not help."""
        return self.state.iteration >= self.job.last_iteration or self._stopped is not None

    def is_next(self, iteration: int) -> bool:
        """Whether this iteration is the one to be done next."""
        return self.state.iteration == iteration - 1 and not self.is_over

    def batches(self, first: int, last: int, stop: threading.Event) -> Iterator[Batch]:
        """Those of the iterations `first`..`last`; they end early once `stop` is set."""
        job = self.job
        return self.training.images.split("train").training_batches(
            job.recipe.augment,
            seed=job.seed,
            batch_size=job.recipe.batch_size,
            iterations=range(first, last + 1),
            pad_color=Preprocessing.for_network(job.network).mean_rgb(),
            loader=Loader(
                workers=resolve_workers(self.trainer.workers, self.device),
                rank=self.ranks.rank,
                world_size=self.ranks.size,
                pin_memory=self.device.type == "cuda",
                timeout=self.trainer.timeout,
                stop=stop,
            ),
        )

    def profile(self) -> AbstractContextManager[Profile | None]:
        """Measures the first steps, if that is asked for."""
        if not (self.trainer.profile and self.store and self.is_writer):
            return nullcontext()
        return Profile(self.device, self.store.profile, self.job.title)

    def _one_step(self, components: Components, batch: Batch, lr: float) -> None:
        """Forward, check, backward, update; leaves the step's numbers to be read.

        The batch is `on_device`.
        """
        # The same on all ranks, which draw what one process would draw and take their share of it.
        seed = step_seed(self.job.seed, batch.iteration)
        torch.manual_seed(seed)
        _, images, labels = batch
        for group in components.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        if self.micro_batches.parts > 1:
            with phase("forward and backward in parts"):
                output = components.step.backward_in_parts(
                    images, labels, batch.iteration, self.micro_batches, seed
                )
                self.coordinator.average_gradients(components.step.parameters())
        else:
            output = components.wrapped(images, labels, batch.iteration)
            with phase("backward"):
                output.total.backward()
        scalars = {"loss": output.total.detach(), **output.parts, **output.statistics}
        clip_norm = self.job.recipe.clip_norm
        norms: dict[str, Tensor] = {}
        if clip_norm is not None:
            scalars["gradient_norm"] = nn.utils.clip_grad_norm_(components.parameters, clip_norm)
        else:
            norms["norm of the gradients"] = total_norm(components.gradients)
        if self._size is not None:
            norms["weights"] = self._size
        # All ranks log the mean of all, and all of them stop where one meets a NaN.
        checked = [*scalars.values(), *norms.values()]
        numbers = self.ranks.mean(torch.stack([value.float() for value in checked]))
        counts = output.pixels_of_class
        if counts is not None:
            numbers = torch.cat([numbers, torch.stack(counts).flatten().float()])
        reading = Reading.of(numbers, batch.iteration, tuple(scalars), tuple(norms))
        self._readings.append(reading)
        if self._defers:
            # Fused optimizers leave weights as they are where this is 1.
            lost = (~numbers[: len(checked)].isfinite().all()).float()
            for optimizer in components.optimizers:
                optimizer.found_inf = lost  # type: ignore[attr-defined]
        else:
            self._check(reading)
        with phase("optimizer"):
            for optimizer in components.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            # Looked at with the numbers of the next step, or when something is made of the weights.
            self._size = total_norm(changed_by_step(components.step, components.optimizers))
        if components.ema is not None:
            with phase("moving average"):
                components.ema.update(batch.iteration)

    def _read(self, *, but: int) -> None:
        """Check and count the steps whose numbers were not read yet, but for the last `but`."""
        while len(self._readings) > but:
            reading = self._readings.popleft()
            self._check(reading)
            self.curves.add(reading.values, reading.counts)

    def _check(self, reading: Reading) -> None:
        """Stop where something is no number any more; gradients are named where they are why."""
        norms = dict(reading.norms)
        self._require_weights(norms.pop("weights", 0.0), reading.iteration - 1)
        self._require_finite(reading.values, reading.iteration)
        self._require_finite(norms, reading.iteration)

    def _validation_is_due(self) -> bool:
        """Every so often and at the end of the run."""
        recipe, iteration = self.job.recipe, self.state.iteration
        return iteration % recipe.validate_every == 0 or iteration == recipe.iterations

    def _validate(self) -> None:
        state = self.state
        if self.training.images.split("val").samples:
            self._require_sound()
            scores = self._scores()
            # NaN (no labeled pixel) is never the best; of older work it may stand there.
            best = math.nan if state.best is None else state.best.miou
            if scores.miou > best or (math.isnan(best) and not math.isnan(scores.miou)):
                weights = copy_to_cpu(self.components.network.state_dict())
                state.best = Best(scores.miou, state.iteration, weights)
            self.curves.validated(scores)
            self._stopped = why_stopped(self.job, state.history)
            self._take_snapshot()
            self.curves.resume_clock()

    def _log(self, lr: float) -> None:
        peak = peak_memory(self.device)
        self.state.cost.peak_memory = max(self.state.cost.peak_memory, peak)
        self.curves.log(lr)

    def _take_snapshot(self) -> None:
        """Keep what the network predicts for a few images, at some validations."""
        job, state = self.job, self.state
        due = self._stopped is not None or state.iteration in moments(job.recipe)
        if self.is_writer and due:
            taken = take_snapshot(
                self.components.network, job, self.training.images, state.iteration, self.device
            )
            state.snapshots = with_snapshot(state.snapshots, taken)

    def _scores(self) -> Scores:
        job, labels = self.job, self.training.images.labels
        batches = self.training.images.split("val").evaluation_batches(
            # Not the training's: whole images take many times the memory of crops.
            job.evaluation.batch_size,
            Loader(rank=self.ranks.rank, world_size=self.ranks.size),
        )
        matrix = evaluate(
            self.components.network,
            Preprocessing.for_network(job.network),
            batches,
            num_classes=labels.num_classes,
            ignore_index=labels.ignore_index,
            device=self.device,
            **job.evaluation.prediction(),
            group=self.ranks.group,
        )
        return Scores.from_matrix(matrix)

    def _save(self) -> None:
        self._require_sound()
        if self.store and self.is_writer:
            self.store.save(self.components.snapshot(self.state))

    def save_alone(self) -> None:
        """Save if there are no other ranks: they are in the middle of a step, and do not answer."""
        if self.ranks.group is None and self.state.iteration >= self.job.first_iteration:
            self._read(but=0)
            self._save()

    def complete(self) -> TrainState:
        """Write the final state and mark the work as done."""
        self._require_sound()
        final = self.components.snapshot(self.state)
        if self.store and self.is_writer:
            self.store.save(final)
            self.store.finish(final.iteration)
        self.coordinator.wait()
        return final

    def _say(self, text: str, *values: object) -> None:
        """One line for all ranks."""
        if self.is_writer:
            logger.info("%s: " + text, self.job.title, *values)

    def kept(self) -> str:
        """What there is to go on from, as a sentence."""
        return "The last checkpoint is whole. " if self.store and self.store.latest() else ""

    def _require_sound(self) -> None:
        """Before the weights are scored, stored or handed on: waits for the device."""
        if self._size is not None:
            self._require_weights(self.ranks.mean(self._size).item(), self.state.iteration)

    def _require_weights(self, size: float, iteration: int) -> None:
        """`size`: norm of what the last step has changed."""
        if not math.isfinite(size):
            self._refuse(
                iteration,
                f"norm of the weights, their statistics and the optimizer's = {size}. Nothing "
                "of the step was kept.",
            )

    def _require_finite(self, values: Mapping[str, float], iteration: int) -> None:
        bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._refuse(iteration, f"{', '.join(bad)}. The step was not taken.")

    def _refuse(self, iteration: int, what: str) -> NoReturn:
        raise NonFiniteLossError(
            f"{self.job.title}: non-finite at iteration {iteration}: {what} {self.kept()}Lower "
            "recipe.optimizer.lr, set recipe.clip_norm, or use trainer.precision=float32."
        )


class Lockstep:
    """The loop: trainings that see the same images in the same order, each of them once.

    Every iteration's batch is loaded once and given to all that have it before them; who is
    ahead, or done, waits. Mostly there is one training.

    Args:
        members: Started trainings.
        title: What people call them.

    Attributes:
        members: Those that have not ended.
        iteration: The last one that was begun.
    """

    def __init__(self, members: Sequence[Trainer], title: str) -> None:
        self.members, self.title = list(members), title
        self.iteration = 0
        self._lead = self.members[0]

    def run(self, stop: threading.Event | None = None) -> None:
        """Train all until they are over; `Trainer.complete` is for the caller.

        Args:
            stop: As for `train`.
        """
        lead = self._lead
        first, last = min(m.state.iteration for m in self.members) + 1, self.last
        if all(member.is_over for member in self.members):
            return
        reset_peak_memory(lead.device)
        with (
            freed_memory_kept(lead.device.type),
            stop_signals(stop) as asked,
            self.progress(first, last) as bar,
        ):
            self.open(bar)
            for batch in self._delivered(lead.batches(first, last, asked)):
                active = [member for member in self.members if member.is_next(batch.iteration)]
                self.iteration = batch.iteration
                self.take(batch, active)
                stopping = asked.is_set()
                stopped = [self.keep(member, stopping) for member in active]
                if any(stopped):
                    self._stop()
                if all(member.is_over for member in self.members):  # or none is left
                    break
            if not all(member.is_over for member in self.members):
                # A signal came while this rank waited for its loader processes.
                self._save_alone()
                self._stop(together=False)

    @property
    def last(self) -> int:
        """The last iteration of all."""
        return max(member.job.last_iteration for member in self.members)

    def progress(self, first: int, last: int) -> TrainingProgress:
        """What people see of iterations `first`..`last`."""
        best = self._lead.state.best
        return TrainingProgress(
            *(self.title, first, last),
            best=None if best is None else best.miou,
            silent=not self._lead.is_writer,
        )

    def open(self, bar: TrainingProgress) -> None:
        """The first batch comes next."""
        for member in self.members:
            member.open(bar)

    def take(self, batch: Batch, active: Sequence[Trainer]) -> None:
        """Give the batch to those whose next one it is."""
        batch = on_device(batch, self._lead)
        for member in active:
            member.step(batch)

    def keep(self, member: Trainer, stop: bool) -> bool:
        """After its step, see `Trainer.keep`."""
        return member.keep(stop)

    def waited(self, seconds: float) -> None:
        """A batch has come after so many seconds."""
        self._lead.curves.waited(seconds)

    def _delivered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; where their loader processes fail, what was done so far is kept."""
        begin = time.monotonic()
        try:
            with self._lead.profile() as profile:
                for batch in batches:
                    waited = time.monotonic() - begin
                    self.waited(waited)
                    if profile is not None:
                        profile.begin_step(waited)
                    yield batch
                    begin = time.monotonic()
        except LoaderFailedError as error:
            self._save_alone()
            kept = self._lead.kept() and "The same command goes on from the last checkpoint."
            raise UserError(f"{self.title}: {error} {kept}".rstrip()) from error

    def _save_alone(self) -> None:
        for member in self.members:
            member.save_alone()

    def _stop(self, *, together: bool = True) -> NoReturn:
        lead = self._lead
        for member in self.members:
            if member.is_over:
                member.complete()
        if together:
            lead.coordinator.wait()
        # Not always that of a batch: while the first one is waited for there is none.
        iteration = max([self.iteration, *(member.state.iteration for member in self.members)])
        raise TrainingInterruptedError(
            f"{self.title} was asked to stop after iteration {iteration} of {self.last}. "
            + (
                "Its state is saved; the same command goes on from there."
                if lead.store
                else "Nothing was saved."
            )
        )


def on_device(batch: Batch, member: Trainer) -> Batch:
    """The batch where a training computes, laid out as its networks want it."""
    device = member.device
    pinned = device.type == "cuda"  # elsewhere the memory may be gone before it is read
    images = batch.images.to(device, non_blocking=pinned)
    labels = batch.labels.to(device, non_blocking=pinned)
    images = images.contiguous(memory_format=memory_format(member.trainer, device))
    return Batch(batch.iteration, images, labels)


@contextmanager
def errors_of_torch(members: Sequence[Trainer]) -> Iterator[None]:
    """Turn what a user can mend into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not members:  # all have ended
            raise
        lead = members[0]
        job = lead.job
        operation = unrepeatable_operation(error)
        if operation is not None:
            raise UserError(
                f"{job.title}: trainer.deterministic=true, but torch's {operation} has no "
                f"repeatable form on {lead.device}, and {job.network.name} or the method needs "
                "it. Choose another network or set trainer.deterministic=false."
            ) from error
        if not ran_out_of_memory(error):
            raise
        raise UserError(_out_of_memory(members)) from error


def _out_of_memory(members: Sequence[Trainer]) -> str:
    lead, several = members[0], len(members) > 1
    job, ranks = lead.job, lead.ranks.size
    size = job.recipe.batch_size
    share = f" ({size // ranks} a device)" if ranks > 1 else ""
    iteration = min(member.state.iteration for member in members) + 1
    return (
        f"{job.title}: memory of {lead.device} ran out in iteration {iteration} with "
        + (f"{len(members)} students at once under one teacher, " if several else "")
        + f"recipe.batch_size={size}{share}, recipe.augment.crop={list(job.recipe.augment.crop)} "
        f"and precision {job.precision}. "
        + (
            f"Train fewer at once (trainer.share_teacher={len(members) // 2}), or l"
            if several
            else "L"
        )
        + "ower the batch size or the crop, or set "
        "trainer.precision=bfloat16, which starts the training anew; or share the batch "
        "among more GPUs (trainer.devices), which goes on with it. "
        f"{lead.kept()}".rstrip()
    )


def reads_later(device: torch.device) -> bool:
    """Whether what a step says is read while the next one runs: waiting would leave a GPU idle."""
    return device.type == "cuda"


def step_seed(seed: int, iteration: int) -> int:
    """Decides dropout and other draws on the device in one step; below 2**64."""
    return (seed * 1_000_003 + iteration) * 1_009
