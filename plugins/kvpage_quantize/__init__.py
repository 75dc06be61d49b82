"""``kvpage quantize``: writes quantized checkpoints that other engines load too."""
