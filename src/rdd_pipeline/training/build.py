"""Networks, losses and optimizers of a training, put together on a device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rdd_pipeline.collectives import ALONE, Collectives
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.distillation.objective import Objective, check_auxiliary_head, check_task_loss
from rdd_pipeline.losses.base import LossContext, at_size_of
from rdd_pipeline.networks import (
    Network,
    NetworkOutput,
    Preprocessing,
    SegmentationNetwork,
    network_from_params,
)
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.training.device import memory_format
from rdd_pipeline.training.ema import AveragedNetwork
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.schedule import build_adversary_optimizer, build_optimizer
from rdd_pipeline.training.state import TrainState, copy_to_cpu
from rdd_pipeline.training.step import Teacher, TrainingStep
from rdd_pipeline.training.synchronized import MicroBatches, convert_sync_layers
from rdd_pipeline.training.training import Training


@dataclass(frozen=True)
class Components:
    """What has tensors in a training.

    Attributes:
        step: Student, losses and teacher, as one module.
        wrapped: The step as it is called: for several ranks, in `DistributedDataParallel`.
        optimizer: Over all that learns but adversaries.
        adversary_optimizer: Over modules that learn against the student; None: there are none.
        ema: Average of the student; None: the recipe asks for none.
    """

    step: TrainingStep
    wrapped: nn.Module
    optimizer: Optimizer
    adversary_optimizer: Optimizer | None
    ema: AveragedNetwork | None = None

    @property
    def network(self) -> SegmentationNetwork:
        """What is validated and handed on: the student, or its average."""
        return self.step.student if self.ema is None else self.ema.network

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that there are."""
        return [self.optimizer, *([self.adversary_optimizer] if self.adversary_optimizer else [])]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What `optimizer` changes."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """Those of all that learns, as far as there are any."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def load(self, state: TrainState) -> None:
        """Go on from the tensors of a state, which stay as they are."""
        self.step.student.load_state_dict(state.student)
        if self.ema is not None:
            self.ema.network.load_state_dict(state.ema or state.student)
        self.step.objective.load_state_dict(state.objective)
        # A copy: an optimizer writes into the tensors it is given.
        _load_optimizer(self.optimizer, state.optimizer)
        if self.adversary_optimizer is not None:
            _load_optimizer(self.adversary_optimizer, state.adversary_optimizer)

    def snapshot(self, state: TrainState) -> TrainState:
        """A copy of the state with the tensors of now."""
        adversary = self.adversary_optimizer
        return replace(
            state,
            student=copy_to_cpu(self.step.student.state_dict()),
            ema=copy_to_cpu(self.ema.network.state_dict()) if self.ema else None,
            objective=copy_to_cpu(self.step.objective.state_dict()),
            optimizer=copy_to_cpu(self.optimizer.state_dict()),
            adversary_optimizer=copy_to_cpu(adversary.state_dict()) if adversary else None,
            history=list(state.history),
            cost=replace(state.cost),
        )


def build(
    training: Training,
    trainer: TrainerParams,
    device: torch.device,
    micro_batches: MicroBatches,
    *,
    pretrained: bool = True,
    teacher: Teacher | None = None,
) -> Components:
    """Build everything for the first iteration; weights depend on the seed alone.

    Args:
        training: What is trained.
        trainer: How to run here.
        device: Where.
        micro_batches: How each batch is divided.
        pretrained: Whether to read pretrained weights; False: they come with a state.
        teacher: The training's teacher as another training has built it, to share it.

    Raises:
        UserError: Networks or losses do not fit together.
    """
    job = training.job
    torch.manual_seed(job.seed)
    student = network_from_params(
        job.network, num_classes=training.images.labels.num_classes, pretrained=pretrained
    )
    if job.recipe.backbone == "frozen":
        student.freeze_backbone()
    autocast = torch.bfloat16 if job.precision == "bfloat16" else None
    network = None
    if training.teacher is not None and job.definition.needs_teacher:
        network = training.teacher.build()
    step = TrainingStep(
        student,
        _objective(training, student, network, micro_batches.ranks),
        teacher=network,
        student_preprocessing=Preprocessing.for_network(job.network),
        teacher_preprocessing=training.teacher.header.preprocessing if training.teacher else None,
        autocast=autocast,
    )
    if network is not None and teacher is not None:
        step.teacher = teacher  # its own was built for the shapes of its maps
    elif network is not None:
        if device.type == "cuda":
            from rdd_pipeline.networks.frozen import freeze  # imports timm

            # On CPUs, results are to be those of earlier versions bit for bit.
            network = freeze(network, autocast)  # the losses have seen its maps
        _to_device(network, device, trainer, None)  # it is not trained
    _to_device(step, device, trainer, autocast)
    against = [p for module in step.objective.adversaries() for p in module.parameters()]
    ids = {id(parameter) for parameter in against}
    optimizer = build_optimizer(
        job.recipe.optimizer,
        [p for p in step.parameters() if id(p) not in ids],
        backbone=student.backbone.parameters(),
    )
    adversary_optimizer = build_adversary_optimizer(against)
    # Before layers are converted to such as know of other processes: those are for training only.
    ema = None if job.recipe.ema is None else AveragedNetwork(student, job.recipe.ema)
    if micro_batches.in_all > 1:
        convert_sync_layers(step, micro_batches, device)
    if trainer.compile is True:
        # Layers that speak to other processes or count parts of a batch are no single graph.
        step.compile_networks(student=micro_batches.in_all == 1)
    wrapped = _distributed(step, device, micro_batches)
    return Components(step, wrapped, optimizer, adversary_optimizer, ema)


def loss_context(
    job: TrainingJob,
    labels: LabelSet,
    student: NetworkOutput,
    teacher: NetworkOutput,
    ranks: Collectives = ALONE,
) -> LossContext:
    """What the distillation losses of a job are built for: both networks' `output_shapes`.

    Raises:
        UserError: The task loss would compare heads that are not there.
    """
    if job.definition.uses_rdd:
        check_task_loss(job.recipe.task_loss, job.rdd_settings, warmup=job.warmup)
        check_auxiliary_head(
            job.rdd_settings,
            warmup=job.warmup,
            iterations=job.recipe.iterations,
            teacher=teacher.aux_logits is not None,
        )
    compare_at = job.methods.compare_at
    return LossContext(
        student=student,
        teacher=at_size_of(teacher, student) if compare_at == "student" else teacher,
        ignore_index=labels.ignore_index,
        aux_weight=job.recipe.aux_weight,
        ranks=ranks,
        cross_image=job.methods.cross_image,
        compare_at=compare_at,
    )


def _objective(
    training: Training,
    student: Network,
    teacher: Network | None,
    ranks: Collectives,
) -> Objective:
    job, labels = training.job, training.images.labels
    weights = labels.class_weights if job.recipe.class_weights else None
    context = None
    if teacher is not None:
        crop = job.recipe.augment.crop
        assert training.teacher is not None
        theirs = training.teacher.header.preprocessing.size(crop)
        ours = Preprocessing.for_network(job.network).size(crop)
        shapes = output_shapes(student, ours), output_shapes(teacher, theirs)
        context = loss_context(job, labels, *shapes, ranks)
    return Objective(
        job.definition,
        rdd=job.rdd_settings,
        iterations=job.recipe.iterations,
        aux_weight=job.recipe.aux_weight,
        class_weights=None if weights is None else torch.tensor(weights),
        ignore_index=labels.ignore_index,
        context=context,
        scale_by_positions=job.methods.scale_by_positions,
        task_loss=job.recipe.task_loss,
        ranks=ranks,
    )


def _distributed(
    step: TrainingStep, device: torch.device, micro_batches: MicroBatches
) -> nn.Module:
    """The step for all ranks; with micro-batches it averages its gradients by itself."""
    if micro_batches.ranks.size == 1 or micro_batches.parts > 1:
        return step
    with warnings.catch_warnings():
        # torch 2.15 has another name for it, which older ones do not know.
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
        return DistributedDataParallel(
            step,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=micro_batches.ranks.group,
            broadcast_buffers=False,
        )


def _load_optimizer(optimizer: Optimizer, state: Any) -> None:
    """Load with the strides of the parameters: fused kernels take both for one row of numbers."""
    optimizer.load_state_dict(copy_to_cpu(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _to_device(
    module: nn.Module,
    device: torch.device,
    trainer: TrainerParams,
    autocast: torch.dtype | None,
) -> None:
    module.to(device)
    layout = memory_format(trainer, device)
    if layout == torch.channels_last and not (autocast and _spoils_gradients(module, device)):
        module.to(memory_format=layout)


def _spoils_gradients(module: nn.Module, device: torch.device) -> bool:
    """Whether half precision with channels last would train something wrong here.

    On CPUs torch 2.15 then computes garbage as the gradient of the weights of a dilated
    depthwise convolution, as in MobileNets at stride 8; every other gradient is right.
    tests/training/test_memory_format.py says when that is over.
    """
    return device.type == "cpu" and any(
        isinstance(part, nn.Conv2d) and part.groups > 1 and max(part.dilation) > 1
        for part in module.modules()
    )
