"""`python -m shmflags.demo`."""

from __future__ import annotations

import sys

from shmflags.demo import main

sys.exit(main())
