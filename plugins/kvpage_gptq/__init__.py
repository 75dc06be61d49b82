"""Checkpoints of auto-gptq, gptqmodel and optimum (GPTQ, arXiv:2210.17323), read without those packages."""
