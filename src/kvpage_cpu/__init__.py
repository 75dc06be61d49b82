"""kvpage's native CPU backend: C++ kernels behind a C ABI, and the plugin that offers them."""
