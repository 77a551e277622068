"""The order of the samples, and the loaders."""
