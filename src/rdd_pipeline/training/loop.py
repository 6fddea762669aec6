"""The training loop: iterations `first`..`last` of a job, resumable at any of them, bit for bit.

Every random number is a function of (seed, iteration, slot) and the learning rate one of the
iteration, so a state is the tensors of student, objective and optimizer plus the iteration they
stand at. Two stages of one run hand exactly that state over.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdd_pipeline.config import RecipeParams, TrainerParams
from rdd_pipeline.distillation.objective import Objective, check_auxiliary_heads, tfe_share
from rdd_pipeline.distillation.terms import TermContext
from rdd_pipeline.errors import NonFiniteLossError, RunInterrupted, UserError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.losses.ranks import ALONE, Ranks
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    NetworkHeader,
    Preprocessing,
    SegmentationNetwork,
    network_from_params,
)
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.segmentation.cache import usable_pack
from rdd_pipeline.segmentation.index import Sample, index_digest, of_split
from rdd_pipeline.segmentation.labels import LabelSet
from rdd_pipeline.segmentation.loading import evaluation_batches, training_batches
from rdd_pipeline.training.checkpoints import (
    State,
    WorkFolder,
    copy_to_cpu,
    digest,
    dumps,
    loads,
)
from rdd_pipeline.training.device import (
    peak_memory,
    ran_out_of_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    resolve_workers,
    set_up,
    unrepeatable_operation,
)
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.progress import TrainingProgress
from rdd_pipeline.training.schedule import build_adversary_optimizer, build_optimizer, learning_rate
from rdd_pipeline.training.step import TrainingStep
from rdd_pipeline.training.synchronized import Parts, see_whole_batch

logger = logging.getLogger(__name__)

Observer = Callable[[int, Mapping[str, float]], None]


class TrainingInterruptedError(RunInterrupted):
    """A signal asked the training to stop; its state is on disk."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training hands on.

    Attributes:
        state: Whole training state after the last iteration (CPU tensors and plain values).
        network: The weights to use: of the best validation or of the last iteration.
        fingerprint: Of the work they came from.
        trained: Iterations done in this call; 0 when all was there already.
    """

    state: State
    network: NetworkCheckpoint
    fingerprint: str
    trained: int

    @property
    def history(self) -> list[dict[str, float]]:
        """One row a logged or validated iteration, oldest first."""
        rows: list[dict[str, float]] = self.state["history"]
        return rows


def state_digest(state: Mapping[str, Any]) -> str:
    """Digest of what decides how the training goes on; curves and clocks are left out."""
    deciding = ("iteration", "student", "objective", "optimizer", "adversary_optimizer", "best")
    return digest({key: state[key] for key in deciding})


def train(
    job: TrainingJob,
    samples: Sequence[Sample],
    *,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None = None,
    start: State | None = None,
    work: WorkFolder | None = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    observe: Observer | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train one network, or load it when this very work is done, or go on where it stopped.

    Args:
        job: What to train.
        samples: The index; splits `train` and, if there, `val` are used.
        trainer: How to run here.
        teacher: Frozen network; required by methods that distill.
        start: State of the stage before (stage `tse`).
        work: Where checkpoints live; None keeps nothing on disk. Of several ranks the first that
            has one writes and reads it for all; `start` is that rank's, too.
        group: Ranks that train together; None: this process alone.
        device: Where to compute; None: what `trainer.device` says.
        observe: Called with (iteration, values) for every point of the curves.
        stop: Set from outside to stop after the current iteration; None: SIGTERM and SIGINT do it.

    Raises:
        UserError: The pieces do not fit together (raised before anything is trained), or memory
            or disk space ran out.
        NonFiniteLossError: A loss became NaN or infinite; the step was not taken.
        TrainingInterruptedError: SIGTERM, SIGINT or `stop`; the state was saved.
    """
    device = resolve_device(trainer.device) if device is None else device
    set_up(trainer, device)
    run = _Run(job, samples, trainer, teacher, start, work, group, device, observe, stop)
    return run.result()


def prepare_job(job: TrainingJob, trainer: TrainerParams) -> TrainingJob:
    """Fix what `auto` means on this machine, so that the fingerprint says what was computed."""
    device = resolve_device(trainer.device)
    return job.model_copy(update={"precision": resolve_precision(trainer.precision, device)})


def job_fingerprint(
    job: TrainingJob,
    samples: Sequence[Sample],
    teacher: NetworkCheckpoint | None,
    start: State | None,
) -> str:
    """Fingerprint of the job with these inputs; names its work folder."""
    return job.fingerprint(
        index_digest=index_digest(samples),
        teacher_digest=None if teacher is None else teacher.digest(),
        start_digest=None if start is None else state_digest(start),
    )


@dataclass
class _Progression:
    """What changes from iteration to iteration beside the tensors."""

    iteration: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        job: TrainingJob,
        samples: Sequence[Sample],
        trainer: TrainerParams,
        teacher: NetworkCheckpoint | None,
        start: State | None,
        work: WorkFolder | None,
        group: dist.ProcessGroup | None,
        device: torch.device,
        observe: Observer | None,
        stop: threading.Event | None,
    ) -> None:
        self.job, self.trainer, self.teacher = job, trainer, teacher
        self.start, self.work, self.group, self.device = start, work, group, device
        self.observe = observe or (lambda iteration, values: None)
        self.stop = stop
        self.ranks = Ranks(group)
        self.rank, self.world = self.ranks.rank, self.ranks.size
        self.parts = Parts(self.ranks, job.recipe.accumulate)
        self.writer, self.one_machine = self._who_writes()
        self.writes = self.rank == self.writer
        self.train_samples = of_split(samples, "train")
        self.val_samples = of_split(samples, "val")
        self.fingerprint = work.fingerprint if work else ""
        if self.writes:
            check_inputs(job, samples, teacher, start, self.world)
            self.fingerprint = self.fingerprint or job_fingerprint(job, samples, teacher, start)

    def result(self) -> TrainingResult:
        work = self.work
        finished = self._from_writer(lambda: work.finished_state() if work else None)
        if finished is not None:
            self._log_line("already trained (%s), loaded.", self.fingerprint)
            return self._wrap(finished, trained=0)
        if work and self.writes:
            work.describe(self.job.model_dump(mode="json"))
        resumed = self._from_writer(lambda: work.latest() if work else None)
        state = resumed or self._from_writer(lambda: self.start)
        progression = _Progression()
        try:
            self._build()
            if state is None and not self.one_machine:
                # Pretrained weights are files of one machine.
                state = self._from_writer(lambda: self._state(progression))
            if state is not None:
                self._restore(state, progression)
            if resumed is not None:
                self._log_line("going on after iteration %d.", resumed["iteration"])
            first = progression.iteration + 1
            self._iterate(progression)
        except RuntimeError as error:
            operation = unrepeatable_operation(error)
            if operation is not None:
                raise UserError(self._unrepeatable_message(operation)) from error
            if not ran_out_of_memory(error):
                raise
            raise UserError(self._memory_message(progression.iteration + 1)) from error
        final = self._complete(progression)
        return self._wrap(final, trained=progression.iteration - first + 1)

    def _who_writes(self) -> tuple[int, bool]:
        """The first rank with a work folder, and whether all ranks are on its machine."""
        if self.group is None:
            return 0, True
        have = torch.zeros(self.world, device=self.device)
        have[self.rank] = self.work is not None
        dist.all_reduce(have, group=self.group)
        return int(have.argmax()), bool(have.all()) or not have.any()

    def _from_writer(self, find: Callable[[], State | None]) -> State | None:
        """What one rank finds, for all of them: they may be on other machines."""
        state = find() if self.writes else None
        if self.group is None:
            return state
        data = dumps(state) if state is not None else b""
        length = torch.tensor(len(data), device=self.device)
        source = dist.get_global_rank(self.group, self.writer)
        dist.broadcast(length, source, group=self.group)
        if not length:
            return None
        sent = torch.empty(int(length), dtype=torch.uint8)
        if self.writes:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        sent = sent.to(self.device)
        dist.broadcast(sent, source, group=self.group)
        return state if self.writes else loads(sent.cpu().numpy().tobytes())

    def _log_line(self, text: str, *values: object) -> None:
        """One line for all ranks."""
        if self.writes:
            logger.info("%s: " + text, title_of(self.job), *values)

    def _memory_message(self, iteration: int) -> str:
        recipe = self.job.recipe
        crop = list(recipe.augment.crop)
        share = f" ({recipe.batch_size // self.world} a device)" if self.world > 1 else ""
        return (
            f"{title_of(self.job)}: memory of {self.device} ran out in iteration {iteration} with "
            f"recipe.batch_size={recipe.batch_size}{share}, recipe.augment.crop={crop} "
            f"and precision {self.job.precision}. Lower the batch size or the crop, or set "
            "trainer.precision=bfloat16, which starts the training anew; or share the batch among "
            f"more GPUs (trainer.devices), which goes on with it. {self._kept()}"
        ).rstrip()

    def _unrepeatable_message(self, operation: str) -> str:
        return (
            f"{title_of(self.job)}: trainer.deterministic=true, but torch's {operation} has no "
            f"repeatable form on {self.device}, and {self.job.network.name} or the method needs "
            "it. Choose another network or set trainer.deterministic=false."
        )

    def _kept(self) -> str:
        """What there is to go on from, as a sentence."""
        return (
            "The last checkpoint is whole. " if self.work and self.work.latest() is not None else ""
        )

    def _complete(self, progression: _Progression) -> State:
        """Write the final state and mark the work as done."""
        final = self._state(progression)
        if self.work and self.writes:
            self.work.save(final)
            self.work.finish(final["iteration"])
        self._wait_for_all()
        return final

    def _build(self) -> None:
        job = self.job
        torch.manual_seed(job.seed)
        self.student = network_from_params(
            job.network,
            num_classes=job.labels.num_classes,
            pretrained=self.writes or self.one_machine,
        )
        self.preprocessing = Preprocessing.for_network(job.network)
        weights = job.labels.class_weights if job.recipe.class_weights else None
        teacher_network = None
        if self.teacher is not None and job.definition.needs_teacher:
            teacher_network = self.teacher.build().requires_grad_(False)
            if job.definition.task == "rdd":
                check_auxiliary_heads(
                    job.rdd_settings,
                    warmup=job.warmup,
                    iterations=job.recipe.iterations,
                    teacher=teacher_network.auxiliary is not None,
                    student=self.student.auxiliary is not None,
                )
        self.objective = Objective(
            job.definition,
            rdd=job.rdd_settings,
            warmup=job.warmup,
            iterations=job.recipe.iterations,
            aux_weight=job.recipe.aux_weight,
            class_weights=None if weights is None else torch.tensor(weights),
            ignore_index=job.labels.ignore_index,
            context=None
            if teacher_network is None
            else term_context(
                self.student,
                teacher_network,
                job.recipe,
                job.labels,
                ranks=self.ranks,
                relations=job.methods.relations,
            ),
            ranks=self.ranks,
        )
        if teacher_network is not None:
            _to_device(teacher_network, self.device, self.trainer)
        self.step = TrainingStep(
            self.student,
            self.objective,
            teacher=teacher_network,
            student_preprocessing=self.preprocessing,
            teacher_preprocessing=self.teacher.header.preprocessing if self.teacher else None,
            autocast=torch.bfloat16 if job.precision == "bfloat16" else None,
        )
        _to_device(self.step, self.device, self.trainer)
        against = [p for module in self.objective.adversaries() for p in module.parameters()]
        ids = {id(parameter) for parameter in against}
        self.parameters = [p for p in self.step.parameters() if id(p) not in ids]
        self.optimizer = build_optimizer(job.recipe.optimizer, self.parameters)
        self.adversary_optimizer = build_adversary_optimizer(against)
        if self.parts.in_all > 1:
            see_whole_batch(self.step, self.parts, self.device)
        self.wrapped: nn.Module = self.step
        if self.world > 1 and self.parts.parts == 1:
            with warnings.catch_warnings():
                # torch 2.15 has another name for it, which older ones do not know.
                warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
                self.wrapped = DistributedDataParallel(
                    self.step,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    process_group=self.group,
                    broadcast_buffers=False,
                )

    def _restore(self, state: State, progression: _Progression) -> None:
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        # A copy: the optimizer goes on in the very tensors it is given, here the caller's.
        self.optimizer.load_state_dict(copy_to_cpu(state["optimizer"]))
        if self.adversary_optimizer is not None:
            self.adversary_optimizer.load_state_dict(copy_to_cpu(state["adversary_optimizer"]))
        progression.iteration = state["iteration"]
        progression.best = state["best"]
        progression.history = list(state["history"])
        progression.images = state["cost"]["images"]
        progression.seconds = state["cost"]["seconds"]
        progression.peak_memory = state["cost"]["peak_memory"]

    def _state(self, progression: _Progression) -> State:
        return {
            "iteration": progression.iteration,
            "student": copy_to_cpu(self.student.state_dict()),
            "objective": copy_to_cpu(self.objective.state_dict()),
            "optimizer": copy_to_cpu(self.optimizer.state_dict()),
            "adversary_optimizer": None
            if self.adversary_optimizer is None
            else copy_to_cpu(self.adversary_optimizer.state_dict()),
            "best": progression.best,
            "history": list(progression.history),
            "cost": {
                "images": progression.images,
                "seconds": progression.seconds,
                "peak_memory": progression.peak_memory,
            },
            "fingerprint": self.fingerprint,
        }

    def _wrap(self, state: State, *, trained: int) -> TrainingResult:
        return TrainingResult(
            state=state,
            network=network_of(self.job, state),
            fingerprint=self.fingerprint,
            trained=trained,
        )

    def _iterate(self, progression: _Progression) -> None:
        job, recipe = self.job, self.job.recipe
        first, last = progression.iteration + 1, job.last_iteration
        if first > last:
            return
        batches = training_batches(
            self.train_samples,
            job.root,
            augment=recipe.augment,
            seed=job.seed,
            batch_size=recipe.batch_size,
            first_iteration=first,
            last_iteration=last,
            lookup=job.labels.lookup,
            ignore_index=job.labels.ignore_index,
            image_size=job.image_size,
            pad_color=self.preprocessing.mean_rgb(),
            workers=resolve_workers(self.trainer.workers, self.device),
            rank=self.rank,
            world_size=self.world,
            pack=usable_pack(
                job.packs, self.train_samples, lookup=job.labels.lookup, image_size=job.image_size
            ),
            pin_memory=self.device.type == "cuda",
        )
        reset_peak_memory(self.device)
        window = _Window()
        saved = time.monotonic()
        self.wrapped.train()
        with (
            _stop_signals(self.stop) as stop,
            TrainingProgress(title_of(job), first, last, silent=not self.writes) as progress,
        ):
            for batch in batches:
                iteration = batch.iteration
                lr = learning_rate(recipe.optimizer, iteration, recipe.iterations)
                values = self._one_step(batch.images, batch.labels, iteration, lr)
                progression.iteration = iteration
                progression.images += recipe.batch_size
                progression.seconds += window.add(values, recipe.batch_size)
                if iteration % self.trainer.log_every == 0 or iteration == last:
                    self._log(progression, window, lr, progress)
                validated = iteration % recipe.validate_every == 0 or iteration == recipe.iterations
                if validated and self.val_samples:
                    self._validate(progression)
                    window.resume_clock()
                due = time.monotonic() - saved > self.trainer.checkpoint_every
                stopping = self._any_rank(stop.is_set())
                if iteration < last and (validated or due or stopping):
                    self._checkpoint(progression)
                    saved = time.monotonic()
                    window.resume_clock()
                if stopping:
                    if iteration == last:
                        self._complete(progression)
                    self._wait_for_all()
                    kept = "Its state is saved; the same command goes on from there."
                    raise TrainingInterruptedError(
                        f"{title_of(job)} was asked to stop after iteration {iteration} of {last}. "
                        + (kept if self.work else "Nothing was saved.")
                    )

    def _one_step(
        self, images: Tensor, labels: Tensor, iteration: int, lr: float
    ) -> dict[str, float]:
        """Forward, check, backward, update; returns all scalars of the step."""
        # The same on all ranks, which draw what one process would draw and take their share of it.
        seed = _step_seed(self.job.seed, iteration)
        torch.manual_seed(seed)
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if self.trainer.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.parts.parts > 1:
            output = self.step.backward_in_parts(images, labels, iteration, self.parts, seed)
            self._average_gradients()
        else:
            output = self.wrapped(images, labels, iteration)
            output.total.backward()
        scalars = {"loss": output.total.detach(), **output.parts, **output.statistics}
        norm = self.job.recipe.clip_norm
        if norm is not None:
            scalars["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, norm)
        numbers = torch.stack([value.float() for value in scalars.values()])
        if self.group is not None:
            # All ranks log the mean of all, and all of them stop where one meets a NaN.
            dist.all_reduce(numbers, group=self.group)
            numbers /= self.world
        # One transfer, and the only wait for the device in a step.
        values = dict(zip(scalars, numbers.tolist(), strict=True))
        self._require_finite(values, iteration)
        for optimizer in (self.optimizer, self.adversary_optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return values

    def _average_gradients(self) -> None:
        """What DDP does; it wants one forward and one backward pass, parts are several."""
        if self.group is None:
            return
        gradients = [p.grad for p in self.step.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together, group=self.group)
        together /= self.world
        first = 0
        for gradient in gradients:
            mean = together[first : first + gradient.numel()]
            gradient.copy_(mean.view_as(gradient))
            first += gradient.numel()

    def _require_finite(self, values: Mapping[str, float], iteration: int) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return
        named = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteLossError(
            f"{title_of(self.job)}: non-finite at iteration {iteration}: {named}. The step was not "
            f"taken. {self._kept()}Lower recipe.optimizer.lr, set recipe.clip_norm, or use "
            "trainer.precision=float32."
        )

    def _log(
        self, progression: _Progression, window: _Window, lr: float, progress: TrainingProgress
    ) -> None:
        means, images, seconds = window.close()
        progression.peak_memory = max(progression.peak_memory, peak_memory(self.device))
        row = {"iteration": progression.iteration, "lr": lr, **means}
        if self.job.definition.task == "rdd":
            row["tfe_share"] = tfe_share(
                self.job.rdd_settings,
                progression.iteration,
                self.job.warmup,
                self.job.recipe.iterations,
            )
        progression.history.append(row)
        rate = images / seconds if seconds > 0 else 0.0
        if self.writes:
            self.observe(
                progression.iteration,
                {k: v for k, v in row.items() if k != "iteration"} | {"images_per_second": rate},
            )
        progress.show(
            progression.iteration,
            loss=means["loss"],
            lr=lr,
            rate=rate,
            miou=progression.best["miou"] if progression.best else None,
        )

    def _validate(self, progression: _Progression) -> None:
        scores = self._scores()
        row = {
            "iteration": progression.iteration,
            "val.miou": scores.miou,
            "val.pixel_accuracy": scores.pixel_accuracy,
        }
        progression.history.append(row)
        if self.writes:
            self.observe(progression.iteration, {k: v for k, v in row.items() if k != "iteration"})
        if progression.best is None or scores.miou > progression.best["miou"]:
            progression.best = {
                "miou": scores.miou,
                "iteration": progression.iteration,
                "tensors": copy_to_cpu(self.student.state_dict()),
            }

    def _scores(self) -> Scores:
        job = self.job
        batches = evaluation_batches(
            self.val_samples,
            job.root,
            batch_size=max(1, job.recipe.batch_size // self.world),
            lookup=job.labels.lookup,
            image_size=job.image_size,
            rank=self.rank,
            world_size=self.world,
            pack=usable_pack(job.packs, self.val_samples, lookup=job.labels.lookup),
        )
        matrix = evaluate(
            self.student,
            self.preprocessing,
            batches,
            num_classes=job.labels.num_classes,
            ignore_index=job.labels.ignore_index,
            device=self.device,
            group=self.group,
        )
        return Scores.from_matrix(matrix)

    def _any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: they stop at the same iteration or wait for ever."""
        if self.group is None:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, group=self.group)
        return votes.item() > 0

    def _wait_for_all(self) -> None:
        """No rank looks into the work folder before all is written."""
        if self.group is not None:
            dist.barrier(self.group)

    def _checkpoint(self, progression: _Progression) -> None:
        if self.work and self.writes:
            self.work.save(self._state(progression))


class _Window:
    """Sums between two points of the curves; its clock runs only while the network trains."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = self._images = 0
        self._seconds = 0.0
        self._mark = time.monotonic()

    def add(self, values: Mapping[str, float], images: int) -> float:
        """Count one step that ends now; returns the seconds it took."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._images += images
        now = time.monotonic()
        seconds = now - self._mark
        self._seconds += seconds
        self._mark = now
        return seconds

    def resume_clock(self) -> None:
        """Leave out what was done since the last step: validation, writing checkpoints."""
        self._mark = time.monotonic()

    def close(self) -> tuple[dict[str, float], int, float]:
        """Means, images and seconds since the last call."""
        means = {name: total / self._count for name, total in self._sums.items()}
        images, seconds = self._images, self._seconds
        self._sums, self._count, self._images, self._seconds = {}, 0, 0, 0.0
        return means, images, seconds


def check_inputs(
    job: TrainingJob,
    samples: Sequence[Sample],
    teacher: NetworkCheckpoint | None,
    start: State | None,
    world: int = 1,
) -> None:
    """Raise a UserError when the pieces of a job do not fit together."""
    if not of_split(samples, "train"):
        raise UserError("The index has no image in split `train`. Add some or fix the layout.")
    if job.recipe.batch_size % (world * job.recipe.accumulate):
        parts = f" in {job.recipe.accumulate} parts each" if job.recipe.accumulate > 1 else ""
        raise UserError(
            f"recipe.batch_size is {job.recipe.batch_size}, not a multiple of {world} devices"
            f"{parts}. Change recipe.batch_size, recipe.accumulate or trainer.devices."
        )
    if job.definition.needs_teacher:
        if teacher is None:
            raise UserError(f"Method {job.method!r} distills and needs a teacher; none was given.")
        check_teacher(teacher.header, job)
    if job.stage == "tse":
        if start is None:
            raise UserError("Stage `tse` goes on from the state of stage `tfe`; none was given.")
        if start["iteration"] != job.first_iteration - 1:
            raise UserError(
                f"Stage `tse` starts after iteration {job.first_iteration - 1}, but the state that "
                f"was given stands at {start['iteration']}. Run distill_tfe with the same "
                "rdd.warmup and recipe.iterations."
            )


def term_context(
    student: SegmentationNetwork,
    teacher: SegmentationNetwork,
    recipe: RecipeParams,
    labels: LabelSet,
    *,
    ranks: Ranks = ALONE,
    relations: Literal["gathered", "rank"] = "gathered",
) -> TermContext:
    """What distillation terms are built for: both networks' maps of a training sample."""
    crop = recipe.augment.crop
    return TermContext(
        student=output_shapes(student, crop),
        teacher=output_shapes(teacher, crop),
        ignore_index=labels.ignore_index,
        aux_weight=recipe.aux_weight,
        ranks=ranks,
        relations=relations,
    )


def check_teacher(header: NetworkHeader, job: TrainingJob) -> None:
    """Raise a UserError when a teacher does not fit a job's label set."""
    if len(header.label_names) != job.labels.num_classes:
        raise UserError(
            f"Teacher has {len(header.label_names)} classes, the label set {job.labels.name!r} "
            f"{job.labels.num_classes}. Choose a teacher trained on this label set "
            "(params:teacher.weights), or none to train one here."
        )


def network_of(job: TrainingJob, state: Mapping[str, Any]) -> NetworkCheckpoint:
    """The weights a state hands on, with all that is needed to use them elsewhere.

    Of the best validation if the job keeps the best and the run is over, else the last ones.
    """
    best = state["best"]
    over = state["iteration"] >= job.recipe.iterations
    use_best = job.recipe.keep == "best" and best is not None and over
    header = NetworkHeader(
        network=job.network.model_copy(update={"pretrained": False}),
        label_names=job.labels.names,
        preprocessing=Preprocessing.for_network(job.network),
        provenance={
            "method": job.method,
            "seed": str(job.seed),
            "fingerprint": state["fingerprint"],
            "iteration": str(best["iteration"] if use_best else state["iteration"]),
        },
    )
    return NetworkCheckpoint(
        tensors=best["tensors"] if use_best else state["student"], header=header
    )


def title_of(job: TrainingJob) -> str:
    """What people call a job."""
    stage = "" if job.stage == "whole" else f" ({job.stage} stage)"
    return job.method + stage + (f", seed {job.seed}" if job.seed else "")


def _step_seed(seed: int, iteration: int) -> int:
    """Decides dropout and other draws on the device in one step."""
    return (seed * 1_000_003 + iteration) * 1_009


def _to_device(module: nn.Module, device: torch.device, trainer: TrainerParams) -> None:
    module.to(device)
    if trainer.channels_last:
        module.to(memory_format=torch.channels_last)


@contextmanager
def _stop_signals(given: threading.Event | None) -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into a flag, so that a step is never cut in half.

    A second one acts as it did before. Elsewhere than in the main thread nothing is changed, nor
    where a flag is given.
    """
    stop = threading.Event() if given is None else given
    if given is not None or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
