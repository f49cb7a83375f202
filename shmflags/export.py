"""`shmflags export`: the definitions that are served."""

from __future__ import annotations

from shmflags import page_file
from shmflags.contract import Definitions
from shmflags.holding import Holding
from shmflags.processes import Host
from shmflags.runtime_dir import RuntimeDir


def export(directory: RuntimeDir, host: Host, max_bytes: int) -> Definitions | None:
    """What workers are served, or None if they are served nothing. Takes no lock, creates no file.

    Raises a `ShmFlagsError` or `OSError` if it cannot be read.
    """
    holding = Holding()
    try:
        directory.check(lambda _: None)
        page = page_file.open_existing(directory, host)
        if page.is_serving() and holding.load(page, max_bytes):
            return holding.definitions()
    except FileNotFoundError:
        pass
    return None
