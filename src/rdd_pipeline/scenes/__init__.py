"""Road scenes that are generated: a data set without a download."""
