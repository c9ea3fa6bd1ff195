"""What runs in a peer's environment is no test module: it imports what is not installed here."""

collect_ignore = ["beam_worker.py", "processors_worker.py", "training_worker.py"]
collect_ignore_glob = ["features_*.py", "formats_*.py"]
