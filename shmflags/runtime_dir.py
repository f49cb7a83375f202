"""Where the files live, and who may touch them.

    <base>/shmflags-<uid>/v1/<slug>-<hash of service_key>/
        page        the control page (page.py)
        snapshot    the definitions (snapshot.py)

`v1` is the format version: two releases with different formats on one host never meet. The three
directories below the base are ours: mode 0700, owned by the effective user, no symlinks. Inside
them nobody else can plant, lock or read anything, so what remains to be checked is that the chain
down to them is sound (here, at each opening) and that a file found there is a regular file of ours.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from shmflags.errors import UnsafePathError

FORMAT_VERSION = "v1"
DIRECTORY_VARIABLE = "SHMFLAGS_DIR"
_TEMPORARY_SUFFIX = ".tmp"
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")

# flock and shared mappings are not dependable across the clients of these.
_NETWORK_FILE_SYSTEMS = frozenset(
    "9p afs beegfs ceph cifs coda gfs2 glusterfs gpfs lustre ncpfs nfs nfs3 nfs4 ocfs2 orangefs "
    "pvfs2 smb3 smbfs virtiofs fuse.ceph fuse.gcsfuse fuse.glusterfs fuse.juicefs fuse.s3fs "
    "fuse.sshfs".split()
)


class RuntimeDir:
    """The directory of one service key of one user.

    `base` was named by somebody if `explicit`; then a doubtful one is warned about, not refused.
    `name` is the directory's, where the key is not known of which that holds a hash.
    """

    def __init__(
        self, base: Path, uid: int, service_key: str, *, explicit: bool, name: str | None = None
    ) -> None:
        self.base = base
        self.uid = uid
        self.service_key = service_key
        self.explicit = explicit
        self._name = directory_name(service_key) if name is None else name

    @property
    def user_path(self) -> Path:
        return self.base / f"shmflags-{self.uid}"

    @property
    def version_path(self) -> Path:
        return self.user_path / FORMAT_VERSION

    @cached_property
    def path(self) -> Path:
        return self.version_path / self._name

    @cached_property
    def page_path(self) -> Path:
        return self.path / "page"

    @cached_property
    def snapshot_path(self) -> Path:
        return self.path / "snapshot"

    def temporary_path(self, name: str, owner: str) -> Path:
        """Where a file that will become `name` is written first; `owner` says by whom."""
        return self.path / f"{name}.{owner}{_TEMPORARY_SUFFIX}"

    def temporary_files(self) -> list[tuple[Path, str]]:
        """The temporary files lying about, each with the `owner` that its writer gave."""
        try:
            names = os.listdir(self.path)
        except OSError:
            return []
        return [
            (self.path / name, name[: -len(_TEMPORARY_SUFFIX)].partition(".")[2])
            for name in names
            if name.endswith(_TEMPORARY_SUFFIX)
        ]

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Create what is missing and check the chain from the base down to `path`.

        Raises `UnsafePathError` if another user could tamper with it, `OSError` if it cannot be
        made. `warn` takes one sentence about an explicit base that is not as it should be.
        """
        self._check_base(warn)
        for directory in (self.user_path, self.version_path, self.path):
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                pass
            check_directory(directory, self.uid)

    def check(self, warn: Callable[[str], None]) -> None:
        """As `prepare`, but create nothing: raises `FileNotFoundError` if there is nothing yet."""
        self._check_base(warn)
        for directory in (self.user_path, self.version_path, self.path):
            check_directory(directory, self.uid)

    def _check_base(self, warn: Callable[[str], None]) -> None:
        objection = base_objection(self.base, self.uid)
        if objection is not None:
            if not self.explicit:
                raise objection
            warn(str(objection))


def locate(directory: str | os.PathLike[str] | None, service_key: str, uid: int) -> RuntimeDir:
    """The runtime directory for `service_key`; touches no file below the base.

    The base is `directory`, else $SHMFLAGS_DIR, else /dev/shm, else the temporary directory.
    """
    named = directory if directory is not None else os.environ.get(DIRECTORY_VARIABLE) or None
    if named is not None:
        return RuntimeDir(Path(os.path.abspath(named)), uid, service_key, explicit=True)
    shm = Path("/dev/shm")
    if os.access(shm, os.W_OK | os.X_OK):
        return RuntimeDir(shm, uid, service_key, explicit=False)
    import tempfile

    base = Path(tempfile.gettempdir())
    return RuntimeDir(base, uid, service_key, explicit=False)


def found(directory: str | os.PathLike[str] | None, uid: int) -> list[RuntimeDir]:
    """The runtime directories of all service keys of `uid`, by name; touches nothing in them."""
    at = locate(directory, "", uid)
    try:
        names = sorted(os.listdir(at.version_path))
    except OSError:
        return []
    return [RuntimeDir(at.base, uid, "", explicit=at.explicit, name=name) for name in names]


def users_with_files(base: Path) -> list[int]:
    """The uids for which there is a user directory below `base`."""
    try:
        names = os.listdir(base)
    except OSError:
        return []
    uids = (name.removeprefix("shmflags-") for name in names if name.startswith("shmflags-"))
    return sorted(int(uid) for uid in uids if uid.isascii() and uid.isdecimal())


def directory_name(service_key: str) -> str:
    """`<slug>-<hash>`: safe as a file name whatever the key holds, and distinct per key."""
    digest = hashlib.blake2b(service_key.encode("utf-8", "surrogatepass"), digest_size=10)
    # No regular expression: compiling it would take as long as all else in a worker's first poll.
    words = "".join(letter if letter in _PLAIN else " " for letter in service_key).split()
    slug = "-".join(words)[:40].strip("-") or "key"
    return f"{slug}-{digest.hexdigest()}"


def base_objection(base: Path, uid: int) -> UnsafePathError | None:
    """What is wrong with `base` as a home for our directory, or None."""
    info = os.stat(base)
    if not stat.S_ISDIR(info.st_mode):
        return UnsafePathError("is not a directory", path=base, remedy="name a directory by directory=")
    others_write = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write and not info.st_mode & stat.S_ISVTX:
        return UnsafePathError(
            f"others can write to it and it has no sticky bit (mode {stat.S_IMODE(info.st_mode):o})"
            ", so they could replace our directory",
            path=base,
            remedy="chmod +t it, or name a directory of your own by directory=",
        )
    if info.st_uid not in (0, uid):
        return UnsafePathError(
            f"it belongs to user {info.st_uid}, who could replace our directory",
            path=base,
            remedy="name a directory of your own or of root by directory=",
        )
    kind = file_system(base)
    if kind in _NETWORK_FILE_SYSTEMS:
        return UnsafePathError(
            f"it is on a network file system ({kind}), where locks and shared mappings of "
            "different hosts are not dependable",
            path=base,
            remedy="name a local directory, best on tmpfs, by directory=",
        )
    return None


def check_directory(directory: Path, uid: int) -> None:
    """Raise `UnsafePathError` unless `directory` is a real directory of `uid`, for it alone."""
    info = os.lstat(directory)
    if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
        raise UnsafePathError("is not a directory", path=directory, remedy="remove it; it is made anew")
    if info.st_uid != uid:
        raise UnsafePathError(
            f"belongs to user {info.st_uid}, not to user {uid}",
            path=directory,
            remedy="have its owner remove it, or name another base by directory=",
        )
    if info.st_mode & 0o077:
        raise UnsafePathError(
            f"is open to others (mode {stat.S_IMODE(info.st_mode):o})",
            path=directory,
            remedy="stop the workers and remove it; it is made anew with mode 700",
        )


def file_objection(path: Path, info: os.stat_result, uid: int) -> UnsafePathError | None:
    """What is wrong with a file found at `path`, or None if it is a private file of `uid`."""
    if not stat.S_ISREG(info.st_mode):
        reason = "is not a regular file"
    elif info.st_uid != uid:
        reason = f"belongs to user {info.st_uid}, not to user {uid}"
    elif info.st_mode & 0o077:
        reason = f"is open to others (mode {stat.S_IMODE(info.st_mode):o})"
    else:
        return None
    return UnsafePathError(reason, path=path, remedy="remove it; it is made anew")


def open_private(path: Path, flags: int, uid: int) -> int:
    """Open an existing file of ours; the descriptor is the caller's to close.

    Raises `UnsafePathError` for a symlink, a FIFO, a directory, another user's file or one open to
    others; `FileNotFoundError` if there is none; other `OSError` as `os.open` does.
    """
    try:
        # O_NOFOLLOW: a planted symlink must not redirect us. O_NONBLOCK: a FIFO must not hang us.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        info = os.lstat(path)  # Raises FileNotFoundError, which is then the plain truth.
        objection = file_objection(path, info, uid)
        if objection is not None:
            raise objection from None
        raise
    objection = file_objection(path, os.fstat(descriptor), uid)
    if objection is not None:
        os.close(descriptor)
        raise objection
    return descriptor


def may_replace(path: Path, uid: int) -> None:
    """Raise `UnsafePathError` if what stands at `path` is not ours to replace."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if info.st_uid != uid:
        raise UnsafePathError(
            f"belongs to user {info.st_uid}, not to user {uid}",
            path=path,
            remedy="have its owner remove it",
        )
    if stat.S_ISDIR(info.st_mode):
        raise UnsafePathError("is a directory", path=path, remedy="remove it")


def file_system(path: Path) -> str:
    """The type of the file system that holds `path` ("tmpfs", "ext4", …), "" if unknown."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split()[2:3] == [wanted]:
            return source.split(" ", 1)[0]
    return ""
