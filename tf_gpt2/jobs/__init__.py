"""Runs large offline jobs: millions of texts continued, scored or embedded, on one machine, on Spark or on Beam."""
