"""Module names of vLLM's that start the server, for command lines written against it."""
