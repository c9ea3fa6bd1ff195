"""Runs the command line: ``python -m tf_gpt2``."""

import sys

from tf_gpt2.cli import main

sys.exit(main())
