"""`python -m shmflags`."""

from __future__ import annotations

import sys

from shmflags.cli import main

sys.exit(main())
