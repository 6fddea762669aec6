"""Distillation losses as modules with one signature, so that an objective can add them up.

A term turns the outputs of both networks into named scalars. Most hold no state and only name the
tensors that a pure function of `rdd_pipeline.losses` wants; adapters, projection heads,
discriminators and queues are ordinary submodules and buffers, hence trained, moved and
checkpointed with the student. Every width and size is read from the networks' own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn
from torch.func import functional_call

from rdd_pipeline.collectives import ALONE, Ranks
from rdd_pipeline.config import Option
from rdd_pipeline.distillation.methods import Term
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import features, logits, relations
from rdd_pipeline.losses.adversarial import (
    HolisticDiscriminator,
    discriminator_loss,
    generator_loss,
)
from rdd_pipeline.networks import NetworkOutput


@dataclass(frozen=True)
class TermContext:
    """What the terms of a training are built for.

    Attributes:
        student: Outputs for one training sample; only the shapes count (meta device).
        teacher: The same of the teacher.
        ignore_index: Label that is not looked at.
        aux_weight: Weight of the auxiliary heads beside the main ones.
        ranks: Processes that share the batches.
        cross_image: Whether images are related to those of all ranks, or of their own only.
    """

    student: NetworkOutput
    teacher: NetworkOutput
    ignore_index: int = 255
    aux_weight: float = 0.4
    ranks: Ranks = ALONE
    cross_image: Literal["global", "local"] = "global"

    @property
    def related(self) -> Ranks:
        """Processes whose images are related to one another."""
        return self.ranks if self.cross_image == "global" else ALONE

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.student.logits.shape[1]

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Channels of both networks' features, the student's first."""
        return self.student.feature.shape[1], self.teacher.feature.shape[1]

    @property
    def stage_widths(self) -> tuple[int, int]:
        """Channels of both backbones' last stages, the student's first."""
        return self.student.stages[1].shape[1], self.teacher.stages[1].shape[1]


Losses = dict[str, Tensor]


class LossTerm(nn.Module):
    """Base of all terms: built from the `TermContext` and the term's options."""

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """Return the unweighted losses by name, float32 scalars.

        Args:
            student: Outputs of the trained network for the batch.
            teacher: Outputs of the frozen network for the same batch, without graph.
            labels: (B, H, W) train ids.
        """
        raise NotImplementedError

    def adversaries(self) -> Iterator[nn.Module]:
        """Submodules with an optimizer of their own, see `training.schedule`."""
        return iter(())


class Stateless(LossTerm):
    """A term that only names the maps a function wants; its options are in the function."""

    def __init__(self, losses: Callable[[NetworkOutput, NetworkOutput, Tensor], Losses]) -> None:
        super().__init__()
        self._losses = losses

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        return self._losses(student, teacher, labels)


def kd(context: TermContext, *, temperature: float = 1.0) -> LossTerm:
    """Pixel-wise KL between the class distributions of both networks (Hinton et al. 2015)."""
    return Stateless(
        lambda s, t, _: {"kd": logits.kd_loss(s.logits, t.logits, temperature=temperature)}
    )


def attention_transfer(context: TermContext) -> LossTerm:
    """Maps of attention."""
    return Stateless(lambda s, t, _: {"at": features.at_loss(s.feature, t.feature)})


def skd_pairwise(context: TermContext) -> LossTerm:
    """SKD's cosines between positions."""
    return Stateless(
        lambda s, t, _: {"skd_pairwise": relations.skd_pairwise_loss(s.feature, t.feature)}
    )


def ifvd(context: TermContext) -> LossTerm:
    """Cosines of pixels to the means of their classes."""
    return Stateless(
        lambda s, t, labels: {
            "ifvd": features.ifvd_loss(
                s.feature,
                t.feature,
                labels,
                num_classes=context.num_classes,
                ignore_index=context.ignore_index,
            )
        }
    )


def cwd_logits(context: TermContext, *, temperature: float = 4.0) -> LossTerm:
    """CWD on logits."""
    return Stateless(
        lambda s, t, _: {"cwd_logits": logits.cwd_loss(s.logits, t.logits, temperature=temperature)}
    )


def psd(context: TermContext) -> LossTerm:
    """DSD's pixel-wise similarity; without two auxiliary heads over feature and logits only."""

    def losses(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        ours, theirs = [student.feature, student.logits], [teacher.feature, teacher.logits]
        if student.aux_logits is not None and teacher.aux_logits is not None:
            ours.insert(0, student.aux_logits)
            theirs.insert(0, teacher.aux_logits)
        return {"psd": features.psd_loss(ours, theirs)}

    return Stateless(losses)


def csd(context: TermContext, *, temperature: float = 4.0) -> LossTerm:
    """DSD's category-wise similarity."""
    return Stateless(
        lambda s, t, _: {"csd": features.csd_loss(s.logits, t.logits, temperature=temperature)}
    )


def cirkd_minibatch(context: TermContext, *, temperature: float = 0.1) -> LossTerm:
    """CIRKD's relations across the images of the batch."""
    return Stateless(
        lambda s, t, _: {
            "cirkd_minibatch": relations.cirkd_minibatch_loss(
                s.feature, t.feature, temperature=temperature, ranks=context.related
            )
        }
    )


def dist(context: TermContext, *, inter_weight: float = 1.0, intra_weight: float = 1.0) -> LossTerm:
    """DIST on the logits, and with the auxiliary weight on the auxiliary ones."""

    def of(student: Tensor, teacher: Tensor) -> Tensor:
        return logits.dist_loss(
            student,
            teacher,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            ranks=context.related,
        )

    def losses(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        loss = of(student.logits, teacher.logits)
        if student.aux_logits is not None and teacher.aux_logits is not None:
            loss = loss + context.aux_weight * of(student.aux_logits, teacher.aux_logits)
        return {"dist": loss}

    return Stateless(losses)


def bpkd(context: TermContext, *, temperature: float = 4.0, kernel: int = 7) -> LossTerm:
    """Edges and bodies of the classes apart."""

    def losses(student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        terms = logits.bpkd_terms(
            student.logits,
            teacher.logits,
            labels,
            temperature=temperature,
            kernel=kernel,
            ignore_index=context.ignore_index,
        )
        return {"bpkd_edge": terms.edge, "bpkd_body": terms.body}

    return Stateless(losses)


class FitNet(LossTerm):
    """The student's adapted feature close to the teacher's."""

    def __init__(self, context: TermContext) -> None:
        super().__init__()
        self.adapter = features.ChannelAdapter(*context.feature_widths)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        return {"fitnet": features.fitnet_loss(self.adapter(student.feature), teacher.feature)}


class HolisticAdversary(LossTerm):
    """SKD's holistic term: student and discriminator learn in one backward pass.

    The student's loss goes through a discriminator whose parameters count as constants, the
    discriminator's through detached logits, so each gradient reaches one of them only. The
    published code alternates two passes; with plain gradient steps of both it is the same.
    """

    def __init__(self, context: TermContext) -> None:
        super().__init__()
        height, width = (
            min(context.student.logits.shape[axis], context.teacher.logits.shape[axis])
            for axis in (2, 3)
        )
        self.discriminator = HolisticDiscriminator(context.num_classes, (height, width))

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        constant = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, constant, (student.logits,))
        return {
            "skd_generator": generator_loss(fooled),
            "skd_discriminator": discriminator_loss(
                self.discriminator(teacher.logits.detach()),
                self.discriminator(student.logits.detach()),
            ),
        }

    def adversaries(self) -> Iterator[nn.Module]:
        """The discriminator."""
        yield self.discriminator


Adapter = Literal["always", "unless_equal"]
"""Whether a student of the teacher's width gets an adapter, too."""


class ChannelWiseFeature(LossTerm):
    """CWD on features, the student's adapted to the teacher's width."""

    def __init__(
        self,
        context: TermContext,
        *,
        temperature: float = 4.0,
        divisor: Literal["teacher", "student"] = "teacher",
        adapter: Adapter = "always",
    ) -> None:
        super().__init__()
        if divisor not in ("teacher", "student"):
            raise UserError(f"divisor of cwd_feature is {divisor!r}; expected teacher or student.")
        narrow, wide = context.feature_widths
        self.temperature = temperature
        self.channels = narrow if divisor == "student" else wide
        self.adapter = (
            features.ChannelAdapter(narrow, wide)
            if _adapts(adapter, narrow, wide)
            else nn.Identity()
        )

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        loss = features.cwd_feature_loss(
            self.adapter(student.feature),
            teacher.feature,
            temperature=self.temperature,
            student_channels=self.channels,
        )
        return {"cwd_feature": loss}


class CirkdMemory(LossTerm):
    """CIRKD's relations with earlier batches; options are those of `relations.CirkdMemory`."""

    def __init__(self, context: TermContext, **options: Option) -> None:
        super().__init__()
        self.memory = _memory(context, options)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        terms = self.memory(student.feature, teacher.feature, labels)
        return {"cirkd_pixel": terms.pixel, "cirkd_region": terms.region}


class MaskedGeneration(LossTerm):
    """MGD: the backbone's last stage completed from a quarter of its positions."""

    def __init__(
        self, context: TermContext, *, mask_ratio: float = 0.75, adapter: Adapter = "always"
    ) -> None:
        super().__init__()
        self.generator = _generator(context, mask_ratio, adapter)

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        target = teacher.stages[1]
        return {"mgd": features.mgd_loss(_complete(self.generator, student, teacher), target)}


class AfDcd(LossTerm):
    """Af-DCD: MGD's completion, and a contrast between the parts of the completed stage.

    The published 16 groups of channels become as many as divide the teacher's width.
    """

    def __init__(
        self,
        context: TermContext,
        *,
        mask_ratio: float = 0.75,
        temperature: float = 0.07,
        groups: int = 16,
        pool: int = 4,
        patch: int = 4,
    ) -> None:
        super().__init__()
        width = context.stage_widths[1]
        self.generator = _generator(context, mask_ratio)
        self.groups = max(g for g in range(1, groups + 1) if width % g == 0)
        self.temperature, self.pool, self.patch = temperature, pool, patch
        height, wide = context.teacher.stages[1].shape[2:]
        if min(height, wide) < patch:
            raise UserError(
                f"Af-DCD needs maps of at least {patch} x {patch} positions, the teacher's last "
                f"stage has {height} x {wide} for a training sample. Use a larger "
                "recipe.augment.crop or methods.options={af_dcd: {af_dcd: {patch: 2}}}."
            )

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        completed, target = _complete(self.generator, student, teacher), teacher.stages[1]
        contrast = features.af_dcd_contrast_loss(
            completed,
            target,
            temperature=self.temperature,
            groups=self.groups,
            pool=self.pool,
            patch=self.patch,
        )
        return {
            "af_dcd_feature": features.mgd_loss(completed, target),
            "af_dcd_contrast": contrast,
        }


class CirkdV2(LossTerm):
    """CIRKDv2: CIRKD, FitNet and channel relations, all on a refined feature of the student.

    Options are those of `relations.CirkdMemory`; those of `relations.ChannelRelations` begin with
    ``channel_``.
    """

    def __init__(
        self, context: TermContext, *, attention_bias: bool = True, **options: Option
    ) -> None:
        super().__init__()
        narrow, wide = context.feature_widths
        height, width = context.teacher.feature.shape[2:]
        of_channels = {
            name.removeprefix("channel_"): options.pop(name)
            for name in list(options)
            if name.startswith("channel_")
        }
        self.refine = relations.SelfAttentionBlock(narrow, bias=attention_bias)
        self.memory = _memory(context, options)
        self.adapter = features.ChannelAdapter(narrow, wide)
        pool = int(of_channels.get("pool", 4))
        self.channels = relations.ChannelRelations(
            narrow,
            wide,
            relations.pooled_positions(height, width, pool=pool),
            ranks=context.ranks,
            pairs=context.related,
            **of_channels,  # type: ignore[arg-type]
        )
        self.related = context.related

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, labels: Tensor) -> Losses:
        """See `LossTerm.forward`."""
        refined, target = self.refine(student.feature), teacher.feature
        memory = self.memory(refined, target, labels)
        channels = self.channels(refined, target)
        return {
            "cirkd_minibatch": relations.cirkd_minibatch_loss(refined, target, ranks=self.related),
            "cirkd_pixel": memory.pixel,
            "cirkd_region": memory.region,
            "fitnet": features.fitnet_loss(self.adapter(refined), target),
            "channel_minibatch": channels.minibatch,
            "channel_memory": channels.memory,
            "channel_mse": channels.mse,
        }


Scale = Callable[[TermContext], float]


class Module(NamedTuple):
    """An entry of `TERMS`: how a term is built and which losses it returns.

    `scales` has those losses whose size depends on the number of positions: by what they are to be
    multiplied to weigh what they weigh on the published maps of 64 x 128 (crops of 512 x 1024).
    """

    build: Callable[..., LossTerm]
    losses: tuple[str, ...]
    scales: Mapping[str, Scale] = MappingProxyType({})


_PUBLISHED_POSITIONS = 64 * 128


def _positions(maps: Tensor, pool: int = 1) -> int:
    """Positions of a map, of one that is pooled rounded up."""
    return math.ceil(maps.shape[2] / pool) * math.ceil(maps.shape[3] / pool)


def _as_mean_of_unit_maps(context: TermContext) -> float:
    """A mean of squares of maps of unit length falls with the number of positions."""
    return _positions(context.teacher.feature) / _PUBLISHED_POSITIONS


def _as_product_of_distributions(context: TermContext) -> float:
    """CSD: products of two distributions over positions (pooled), squared."""
    return (_positions(context.teacher.logits, 2) / (_PUBLISHED_POSITIONS / 4)) ** 2


def _as_sum(context: TermContext) -> float:
    """A sum over the positions of the last stage."""
    return _PUBLISHED_POSITIONS / _positions(context.teacher.stages[1])


def _as_mean_of_unit_channels(context: TermContext) -> float:
    """CIRKDv2's channels: of unit length over pooled positions."""
    return _positions(context.teacher.feature, 4) / (_PUBLISHED_POSITIONS / 16)


TERMS: dict[str, Module] = {
    "kd": Module(kd, ("kd",)),
    "fitnet": Module(FitNet, ("fitnet",)),
    "at": Module(attention_transfer, ("at",), {"at": _as_mean_of_unit_maps}),
    "skd_pairwise": Module(skd_pairwise, ("skd_pairwise",)),
    "skd_holistic": Module(HolisticAdversary, ("skd_generator", "skd_discriminator")),
    "ifvd": Module(ifvd, ("ifvd",)),
    "cwd_logits": Module(cwd_logits, ("cwd_logits",)),
    "cwd_feature": Module(ChannelWiseFeature, ("cwd_feature",)),
    "psd": Module(psd, ("psd",), {"psd": _as_mean_of_unit_maps}),
    "csd": Module(csd, ("csd",), {"csd": _as_product_of_distributions}),
    "cirkd_minibatch": Module(cirkd_minibatch, ("cirkd_minibatch",)),
    "cirkd_memory": Module(CirkdMemory, ("cirkd_pixel", "cirkd_region")),
    "dist": Module(dist, ("dist",)),
    "mgd": Module(MaskedGeneration, ("mgd",), {"mgd": _as_sum}),
    "af_dcd": Module(AfDcd, ("af_dcd_feature", "af_dcd_contrast"), {"af_dcd_feature": _as_sum}),
    "cirkdv2": Module(
        CirkdV2,
        (
            "cirkd_minibatch",
            "cirkd_pixel",
            "cirkd_region",
            "fitnet",
            "channel_minibatch",
            "channel_memory",
            "channel_mse",
        ),
        {"channel_mse": _as_mean_of_unit_channels},
    ),
    "bpkd": Module(bpkd, ("bpkd_edge", "bpkd_body")),
}


def build_term(term: Term, context: TermContext) -> LossTerm:
    """Build a term's module for the networks of a training.

    Raises:
        UserError: There is no such module or option, or the networks' maps do not suit it.
    """
    if term.module not in TERMS:
        raise UserError(
            f"There is no loss term {term.module!r}. The terms are: {', '.join(sorted(TERMS))}."
        )
    try:
        return TERMS[term.module].build(context, **term.options)
    except TypeError as error:
        raise UserError(
            f"params:methods.options does not suit the term {term.module!r} ({error}). Its options "
            "are its arguments in distillation/terms.py."
        ) from error


def loss_scales(term: Term, context: TermContext) -> dict[str, float]:
    """Factors of a term's losses beside their weights, see `Module`; 1 where missing."""
    return {name: scale(context) for name, scale in TERMS[term.module].scales.items()}


def _adapts(adapter: Adapter, narrow: int, wide: int) -> bool:
    if adapter not in get_args(Adapter):
        raise UserError(f"adapter is {adapter!r}; expected one of {', '.join(get_args(Adapter))}.")
    return adapter == "always" or narrow != wide


def _memory(context: TermContext, options: Mapping[str, Option]) -> relations.CirkdMemory:
    return relations.CirkdMemory(
        *context.feature_widths,
        context.num_classes,
        ignore_index=context.ignore_index,
        ranks=context.ranks,
        **options,  # type: ignore[arg-type]
    )


def _generator(
    context: TermContext, mask_ratio: float, adapter: Adapter = "always"
) -> features.MaskedGeneration:
    return features.MaskedGeneration(
        *context.stage_widths,
        mask_ratio=mask_ratio,
        align=_adapts(adapter, *context.stage_widths),
        ranks=context.ranks,
    )


def _complete(
    generator: features.MaskedGeneration, student: NetworkOutput, teacher: NetworkOutput
) -> Tensor:
    """The student's last stage, completed at the teacher's size."""
    height, width = teacher.stages[1].shape[2:]
    completed: Tensor = generator(student.stages[1], (height, width))
    return completed
