"""``python -m moeq.cli``: the ``moeq`` command without an installation."""

import sys

from moeq.cli import main

sys.exit(main())
