"""The public contract. Third parties import this package, ``kvpage.hookimpl`` and ``kvpage.testing``, no more."""

API_VERSION = "1.0"
