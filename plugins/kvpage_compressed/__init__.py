"""Checkpoints in the compressed-tensors format (llm-compressor): a plugin like any other, built on public names."""
