"""Network architectures: specs, NNX modules, and models as pure functions."""
