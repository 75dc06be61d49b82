pytest_plugins = ["kvpage.testing.plugin"]
