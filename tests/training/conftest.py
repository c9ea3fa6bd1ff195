"""Programs that tests start are no test modules: they read arguments."""

collect_ignore = ["devices.py", "interrupted.py"]
