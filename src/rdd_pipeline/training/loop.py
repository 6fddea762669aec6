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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rdd_pipeline.collectives import Collectives
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.index import Sample, of_split
from rdd_pipeline.data.loading import evaluation_batches, training_batches
from rdd_pipeline.data.packed import usable_pack
from rdd_pipeline.distillation.objective import Objective, check_auxiliary_heads
from rdd_pipeline.distillation.stages import stage_shares
from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.networks import (
    NetworkCheckpoint,
    Preprocessing,
    network_from_params,
)
from rdd_pipeline.training.coordinator import Coordinator
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
from rdd_pipeline.training.difficulty import Difficulty
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.notes import training_notes
from rdd_pipeline.training.preparation import (
    check_inputs,
    job_fingerprint,
    loss_context,
    network_of,
    title_of,
)
from rdd_pipeline.training.progress import TrainingProgress
from rdd_pipeline.training.running_means import RunningMeans
from rdd_pipeline.training.schedule import build_adversary_optimizer, build_optimizer, learning_rate
from rdd_pipeline.training.state import Best, TrainState, copy_to_cpu
from rdd_pipeline.training.step import TrainingStep
from rdd_pipeline.training.stopping import TrainingInterruptedError, stop_signals
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.synchronized import MicroBatches, convert_sync_layers

logger = logging.getLogger(__name__)

OnLog = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training hands on.

    Attributes:
        state: Whole training state after the last iteration (CPU tensors and plain values).
        network: The weights to use: of the best validation or of the last iteration.
        fingerprint: Of the work they came from.
        trained: Iterations done in this call; 0 when all was there already.
    """

    state: TrainState
    network: NetworkCheckpoint
    fingerprint: str
    trained: int

    @property
    def history(self) -> list[dict[str, float]]:
        """One row a logged or validated iteration, oldest first."""
        return self.state.history


def train(
    job: TrainingJob,
    samples: Sequence[Sample],
    *,
    trainer: TrainerParams,
    teacher: NetworkCheckpoint | None = None,
    initial_state: TrainState | None = None,
    store: RunStore | None = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    on_log: OnLog | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train one network, or load it when this very work is done, or go on where it stopped.

    Args:
        job: What to train.
        samples: The index; splits `train` and, if there, `val` are used.
        trainer: How to run here.
        teacher: Frozen network; required by methods that distill.
        initial_state: State of the stage before (stage `tse`).
        store: Where checkpoints live; None keeps nothing on disk. Of several ranks the first that
            has one writes and reads it for all; `initial_state` is that rank's, too.
        group: Ranks that train together; None: this process alone.
        device: Where to compute; None: what `trainer.device` says.
        on_log: Called with (iteration, values) for every point of the curves.
        stop: Set from outside to stop after the current iteration; None: SIGTERM and SIGINT do it.

    Raises:
        UserError: The pieces do not fit together (raised before anything is trained), or memory
            or disk space ran out.
        NonFiniteLossError: A loss became NaN or infinite; the step was not taken.
        TrainingInterruptedError: SIGTERM, SIGINT or `stop`; the state was saved.
    """
    device = resolve_device(trainer.device) if device is None else device
    set_up(trainer, device)
    run = Trainer(job, samples, trainer, teacher, initial_state, store, group, device, on_log, stop)
    return run.run()


class Trainer:
    """One call of `train`."""

    def __init__(
        self,
        job: TrainingJob,
        samples: Sequence[Sample],
        trainer: TrainerParams,
        teacher: NetworkCheckpoint | None,
        initial_state: TrainState | None,
        store: RunStore | None,
        group: dist.ProcessGroup | None,
        device: torch.device,
        on_log: OnLog | None,
        stop: threading.Event | None,
    ) -> None:
        self.job, self.trainer, self.teacher = job, trainer, teacher
        self.initial_state, self.store, self.device = initial_state, store, device
        self.on_log = on_log or (lambda iteration, values: None)
        self.stop = stop
        self.judged_from = 0.0
        self.ranks = Collectives(group)
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.coordinator = Coordinator(self.ranks, device, has_store=store is not None)
        self.parts = MicroBatches(self.ranks, job.recipe.gradient_accumulation_steps)
        self.is_writer = self.coordinator.is_writer
        self.train_samples = of_split(samples, "train")
        self.val_samples = of_split(samples, "val")
        self.fingerprint = store.fingerprint if store else ""
        if self.is_writer:
            check_inputs(job, samples, teacher, initial_state, self.world_size)
            self.fingerprint = self.fingerprint or job_fingerprint(
                job, samples, teacher, initial_state
            )
        self.state = TrainState(fingerprint=self.fingerprint)

    def run(self) -> TrainingResult:
        """Train to the end of the job, or load it."""
        store = self.store
        finished = self.coordinator.from_writer(lambda: store.finished_state() if store else None)
        if finished is not None:
            self._log_line("already trained (%s), loaded.", self.fingerprint)
            return self._wrap(finished, trained=0)
        if store and self.is_writer:
            store.describe(self.job.model_dump(mode="json"))
        resumed = self.coordinator.from_writer(lambda: store.latest() if store else None)
        state = resumed or self.coordinator.from_writer(lambda: self.initial_state)
        try:
            self._build()
            if state is None and not self.coordinator.on_one_machine:
                # Pretrained weights are files of one machine.
                state = self.coordinator.from_writer(lambda: self._snapshot())
            if state is not None:
                self._restore(state)
            if resumed is not None:
                self._log_line("going on after iteration %d.", resumed.iteration)
            first = self.state.iteration + 1
            self._iterate()
        except RuntimeError as error:
            operation = unrepeatable_operation(error)
            if operation is not None:
                raise UserError(self._unrepeatable_message(operation)) from error
            if not ran_out_of_memory(error):
                raise
            raise UserError(self._memory_message(self.state.iteration + 1)) from error
        final = self._complete()
        return self._wrap(final, trained=self.state.iteration - first + 1)

    def _log_line(self, text: str, *values: object) -> None:
        """One line for all ranks."""
        if self.is_writer:
            logger.info("%s: " + text, title_of(self.job), *values)

    def _memory_message(self, iteration: int) -> str:
        recipe = self.job.recipe
        crop = list(recipe.augment.crop)
        share = f" ({recipe.batch_size // self.world_size} a device)" if self.world_size > 1 else ""
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
            "The last checkpoint is whole. "
            if self.store and self.store.latest() is not None
            else ""
        )

    def _complete(self) -> TrainState:
        """Write the final state and mark the work as done."""
        final = self._snapshot()
        if self.store and self.is_writer:
            self.store.save(final)
            self.store.finish(final.iteration)
        self.coordinator.wait()
        return final

    def _build(self) -> None:
        job = self.job
        torch.manual_seed(job.seed)
        self.student = network_from_params(
            job.network,
            num_classes=job.labels.num_classes,
            pretrained=self.is_writer or self.coordinator.on_one_machine,
        )
        self.preprocessing = Preprocessing.for_network(job.network)
        weights = job.labels.class_weights if job.recipe.class_weights else None
        teacher_network = None
        if self.teacher is not None and job.definition.needs_teacher:
            teacher_network = self.teacher.build().requires_grad_(False)
            if job.definition.uses_rdd:
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
            iterations=job.recipe.iterations,
            aux_weight=job.recipe.aux_weight,
            class_weights=None if weights is None else torch.tensor(weights),
            ignore_index=job.labels.ignore_index,
            context=None
            if teacher_network is None
            else loss_context(
                self.student,
                teacher_network,
                job.recipe,
                job.labels,
                ranks=self.ranks,
                cross_image=job.methods.cross_image,
            ),
            scale_by_positions=job.methods.scale_by_positions,
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
            convert_sync_layers(self.step, self.parts, self.device)
        self.wrapped: nn.Module = self.step
        if self.world_size > 1 and self.parts.parts == 1:
            with warnings.catch_warnings():
                # torch 2.15 has another name for it, which older ones do not know.
                warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
                self.wrapped = DistributedDataParallel(
                    self.step,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    process_group=self.ranks.group,
                    broadcast_buffers=False,
                )

    def _restore(self, state: TrainState) -> None:
        self.student.load_state_dict(state.student)
        self.objective.load_state_dict(state.objective)
        # A copy: the optimizer goes on in the very tensors it is given, here the caller's.
        self.optimizer.load_state_dict(copy_to_cpu(state.optimizer))
        if self.adversary_optimizer is not None:
            self.adversary_optimizer.load_state_dict(copy_to_cpu(state.adversary_optimizer))
        self.state = TrainState(
            state.iteration,
            best=state.best,
            history=list(state.history),
            cost=replace(state.cost),
            fingerprint=self.fingerprint,
        )

    def _snapshot(self) -> TrainState:
        """The state with its tensors, which later steps leave as they are."""
        adversary = self.adversary_optimizer
        return replace(
            self.state,
            student=copy_to_cpu(self.student.state_dict()),
            objective=copy_to_cpu(self.objective.state_dict()),
            optimizer=copy_to_cpu(self.optimizer.state_dict()),
            adversary_optimizer=copy_to_cpu(adversary.state_dict()) if adversary else None,
            history=list(self.state.history),
            cost=replace(self.state.cost),
        )

    def _wrap(self, state: TrainState, *, trained: int) -> TrainingResult:
        return TrainingResult(
            state=state,
            network=network_of(self.job, state),
            fingerprint=self.fingerprint,
            trained=trained,
        )

    def _iterate(self) -> None:
        job, recipe = self.job, self.job.recipe
        first, last = self.state.iteration + 1, job.last_iteration
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
            world_size=self.world_size,
            pack=usable_pack(
                job.packs, self.train_samples, lookup=job.labels.lookup, image_size=job.image_size
            ),
            pin_memory=self.device.type == "cuda",
            patience=self.trainer.timeout,
        )
        reset_peak_memory(self.device)
        means, difficulty = RunningMeans(), Difficulty(job.labels.names)
        saved = time.monotonic()
        self.wrapped.train()
        with (
            stop_signals(self.stop) as stop,
            TrainingProgress(
                title_of(job),
                first,
                last,
                best=self.state.best.miou if self.state.best else None,
                silent=not self.is_writer,
            ) as progress,
        ):
            for batch in batches:
                iteration = batch.iteration
                lr = learning_rate(recipe.optimizer, iteration, recipe.iterations)
                values = self._one_step(batch.images, batch.labels, iteration, lr, difficulty)
                self.state.iteration = iteration
                self.state.cost.images += recipe.batch_size
                self.state.cost.seconds += means.add(values, recipe.batch_size)
                if iteration % self.trainer.log_every == 0 or iteration == last:
                    self._log(means, difficulty, lr, progress)
                    self._warn_of_difficulty()
                validated = iteration % recipe.validate_every == 0 or iteration == recipe.iterations
                if validated and self.val_samples:
                    self._validate(progress)
                    if iteration == recipe.iterations:
                        self._warn_without_best()
                    means.resume_clock()
                due = time.monotonic() - saved > self.trainer.checkpoint_every
                stopping = self.coordinator.any(stop.is_set())
                if iteration < last and (validated or due or stopping):
                    self._checkpoint()
                    saved = time.monotonic()
                    means.resume_clock()
                if stopping:
                    if iteration == last:
                        self._complete()
                    self.coordinator.wait()
                    kept = "Its state is saved; the same command goes on from there."
                    raise TrainingInterruptedError(
                        f"{title_of(job)} was asked to stop after iteration {iteration} of {last}. "
                        + (kept if self.store else "Nothing was saved.")
                    )

    def _one_step(
        self, images: Tensor, labels: Tensor, iteration: int, lr: float, difficulty: Difficulty
    ) -> dict[str, float]:
        """Forward, check, backward, update; returns all scalars of the step."""
        # The same on all ranks, which draw what one process would draw and take their share of it.
        seed = _step_seed(self.job.seed, iteration)
        torch.manual_seed(seed)
        pinned = self.device.type == "cuda"  # elsewhere the memory may be gone before it is read
        images = images.to(self.device, non_blocking=pinned)
        labels = labels.to(self.device, non_blocking=pinned)
        images = images.contiguous(memory_format=memory_format(self.trainer, self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.parts.parts > 1:
            output = self.step.backward_in_parts(images, labels, iteration, self.parts, seed)
            self.coordinator.average_gradients(self.step.parameters())
        else:
            output = self.wrapped(images, labels, iteration)
            output.total.backward()
        scalars = {"loss": output.total.detach(), **output.parts, **output.statistics}
        norm = self.job.recipe.clip_norm
        if norm is not None:
            scalars["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, norm)
        # All ranks log the mean of all, and all of them stop where one meets a NaN.
        numbers = self.ranks.mean(torch.stack([value.float() for value in scalars.values()]))
        if output.pixels_of_class is not None:
            numbers = torch.cat([numbers, torch.stack(output.pixels_of_class).flatten().float()])
        # One transfer, and the only wait for the device in a step.
        numbers = numbers.cpu()
        values = dict(zip(scalars, numbers[: len(scalars)].tolist(), strict=True))
        if output.pixels_of_class is not None:
            difficulty.add(numbers[len(scalars) :].view(len(output.pixels_of_class), -1))
        self._require_finite(values, iteration)
        for optimizer in (self.optimizer, self.adversary_optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return values

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
        self,
        means: RunningMeans,
        difficulty: Difficulty,
        lr: float,
        progress: TrainingProgress,
    ) -> None:
        values, images, seconds = means.close()
        self.state.cost.peak_memory = max(self.state.cost.peak_memory, peak_memory(self.device))
        row = {"iteration": self.state.iteration, "lr": lr, **values}
        stages = self.job.definition.stages
        shares = stage_shares(
            stages, self.job.rdd_settings, self.state.iteration, self.job.recipe.iterations
        )
        row |= {f"{stage.name}_share": shares[stage.name] for stage in stages[:-1]}
        # The classes' shares stay out of what is observed: 450 curves of ADE20K.
        self.state.history.append(row | difficulty.close())
        rate = images / seconds if seconds > 0 else 0.0
        if self.is_writer:
            self.on_log(
                self.state.iteration,
                {k: v for k, v in row.items() if k != "iteration"} | {"images_per_second": rate},
            )
        progress.show(
            self.state.iteration,
            loss=values["loss"],
            lr=lr,
            rate=rate,
        )

    def _validate(self, progress: TrainingProgress) -> None:
        scores = self._scores()
        row = {
            "iteration": self.state.iteration,
            "val.miou": scores.miou,
            "val.pixel_accuracy": scores.pixel_accuracy,
        }
        self.state.history.append(row)
        if self.is_writer:
            self.on_log(self.state.iteration, {k: v for k, v in row.items() if k != "iteration"})
        # NaN (no labeled pixel) is never the best; of older work it may stand there.
        best = math.nan if self.state.best is None else self.state.best.miou
        if scores.miou > best or (math.isnan(best) and not math.isnan(scores.miou)):
            weights = copy_to_cpu(self.student.state_dict())
            self.state.best = Best(scores.miou, self.state.iteration, weights)
        best = math.nan if self.state.best is None else self.state.best.miou
        progress.validated(scores.miou, best=best)

    def _warn_of_difficulty(self) -> None:
        """Say once, early in TSE, what would else be found out at the end of the run.

        Looked at in tenths of TSE: reading the whole history at each point of the curves would
        take longer the longer the run is.
        """
        job = self.job
        tse = job.recipe.iterations - job.warmup
        here = self.state.iteration - job.warmup
        if not max(self.judged_from, min(tse / 5, 500)) <= here <= tse / 2 or not self.is_writer:
            return
        notes = training_notes(self.state.history, method=job.definition, labels=job.labels)
        for note in notes:
            logger.warning("%s: %s", title_of(job), note)
        self.judged_from = math.inf if notes else here + tse / 10

    def _warn_without_best(self) -> None:
        if self.job.recipe.keep == "best" and self.state.best is None and self.is_writer:
            logger.warning(
                "%s: every validation score is NaN, as no pixel of split 'val' is labeled. The "
                "last weights are kept, whether good or not.",
                title_of(self.job),
            )

    def _scores(self) -> Scores:
        job = self.job
        batches = evaluation_batches(
            self.val_samples,
            job.root,
            # Not the training's: whole images take many times the memory of crops.
            batch_size=job.evaluation.batch_size,
            lookup=job.labels.lookup,
            image_size=job.image_size,
            rank=self.rank,
            world_size=self.world_size,
            pack=usable_pack(job.packs, self.val_samples, lookup=job.labels.lookup),
        )
        matrix = evaluate(
            self.student,
            self.preprocessing,
            batches,
            num_classes=job.labels.num_classes,
            ignore_index=job.labels.ignore_index,
            device=self.device,
            scales=job.evaluation.scales,
            flip=job.evaluation.flip,
            average=job.evaluation.average,
            group=self.ranks.group,
        )
        return Scores.from_matrix(matrix)

    def _checkpoint(self) -> None:
        if self.store and self.is_writer:
            self.store.save(self._snapshot())


def _step_seed(seed: int, iteration: int) -> int:
    """Decides dropout and other draws on the device in one step."""
    return (seed * 1_000_003 + iteration) * 1_009


def _to_device(module: nn.Module, device: torch.device, trainer: TrainerParams) -> None:
    module.to(device)
    if memory_format(trainer, device) == torch.channels_last:
        module.to(memory_format=torch.channels_last)
