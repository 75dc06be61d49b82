"""Plain weights become int8 or int4 while they load: a plugin like any other, built on public names."""
