"""An OpenAI-compatible server around ``kvpage.AsyncEngine``: a plugin like any other, built on public names."""
