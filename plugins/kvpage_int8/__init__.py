"""Plain weights become int8 or int4 while they load; bitsandbytes' and torchao's weights are read. Public names only."""
