"""Outputs of small networks, for the tests of the task losses."""

from __future__ import annotations

import torch

from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss


class Case:
    """Small networks' outputs with gradient and labels with some ignored pixels."""

    def __init__(self, *, images=2, classes=4, small=(5, 6), size=(17, 21), dtype=torch.float32):
        g = torch.Generator().manual_seed(1)

        def logits():
            z = 2 * torch.randn(images, classes, *small, generator=g, dtype=torch.float64)
            return z.to(dtype)

        self.student, self.student_aux = logits().requires_grad_(), logits().requires_grad_()
        self.teacher, self.teacher_aux = logits(), logits()
        self.labels = torch.randint(0, classes, (images, *size), generator=g)
        self.labels[torch.rand(self.labels.shape, generator=g) < 0.15] = 255

    @property
    def leaves(self):
        return self.student, self.student_aux

    def tfe(self, labels=None, **options):
        return tfe_loss(
            self.student,
            self.labels if labels is None else labels,
            teacher_logits=self.teacher,
            teacher_aux_logits=self.teacher_aux,
            student_aux_logits=self.student_aux,
            **options,
        ).loss

    def tse(self, labels=None, **options):
        return tse_loss(
            self.student,
            self.labels if labels is None else labels,
            **{
                "teacher_logits": self.teacher,
                "student_aux_logits": self.student_aux,
                "teacher_aux_logits": self.teacher_aux,
                **options,
            },
        ).loss

    def cross_entropy(self, labels=None, **options):
        return cross_entropy_loss(
            self.student,
            self.labels if labels is None else labels,
            student_aux_logits=self.student_aux,
            **options,
        ).loss
