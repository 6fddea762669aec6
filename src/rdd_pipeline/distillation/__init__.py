"""Methods: which task loss, distillation losses and extra modules make up each named method."""
