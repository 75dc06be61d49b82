"""``python -m kvpage.entrypoints.openai.api_server``."""
