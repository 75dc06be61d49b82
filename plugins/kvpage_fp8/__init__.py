"""Checkpoints whose weights are 8-bit floats: a plugin like any other, built on public names."""
