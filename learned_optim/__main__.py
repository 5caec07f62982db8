"""``python -m learned_optim``: the same as ``learned-optim``."""

from __future__ import annotations

import sys

from learned_optim.cli import main

sys.exit(main())
