"""Loss functions of tensors: no state, no files, no configuration."""
