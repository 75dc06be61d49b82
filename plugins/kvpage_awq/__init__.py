"""Checkpoints of AutoAWQ, llm-awq and gptqmodel (AWQ, arXiv:2306.00978), read without those packages."""
