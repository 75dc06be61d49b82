"""Plugins: finding them, keeping their records, choosing among these with reasons kept."""

from kvpage.plugins.discovery import PluginStatus, ResolvedPlugins
from kvpage.plugins.factories import load
from kvpage.plugins.registry import PluginRegistry
from kvpage.plugins.selection import BackendChoice, DecoderChoice

__all__ = ["BackendChoice", "DecoderChoice", "PluginRegistry", "PluginStatus", "ResolvedPlugins", "load"]
