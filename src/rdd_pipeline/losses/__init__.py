"""Losses, one file for each method: task losses (`cross_entropy`, `rdd`) and distillation losses.

Functions of tensors first; `base.DistillationLoss` where layers or a memory bank belong to a loss.
Distillation of logits: `kd`, `cwd`, `dist`, `bpkd`, `dsd`. Feature distillation: `fitnet`, `at`,
`ifvd`, `cwd`, `mgd`, `af_dcd`. Relations between pixels or images: `skd`, `cirkd`, `cirkdv2`.

Student and teacher may differ in stride: the student's maps are resized (bilinear) to the teacher's
size. All positions count, ignored ones too (as published), where a loss does not say otherwise.
Computing is done in float32 (float64 stays), whatever comes in and whatever autocast and the TF32
switches say. No gradient reaches the teacher.
"""
