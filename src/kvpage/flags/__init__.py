"""Flags for commands, public for plugins that bring some: the parser, and the engine's and sampling options as flags."""
