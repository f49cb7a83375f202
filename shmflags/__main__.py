"""`python -m shmflags`, and the command `shmflags`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, and return its exit status."""
    try:
        # Here: a Ctrl-C while it is being imported is to end as quietly as a later one.
        from shmflags import cli
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
