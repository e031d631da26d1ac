"""A container without a container engine: namespaces of Linux, and a root folder with this machine's system files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

USER_ID = 65532
# The least that programs ask of /etc: as on this machine, and as in an image that has no account yet.
_SETTINGS = ("login.defs", "nsswitch.conf", "hosts", "ld.so.cache", "ld.so.conf", "ssl", "alternatives")
_ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "group": "root:x:0:\n",
    "shadow": "root:*:20000:0:99999:7:::\n",
    "gshadow": "root:*::\n",
}
_COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "nvcc")
# Arguments: root folder, folder of the interpreter, "ro" or "rw", number of writable folders, they, number of hidden
# programs, they, then the command. All mounts end with the process, whose first process the command is.
_SCRIPT = """
set -eu
root=$1 interpreter=$2 mode=$3 count=$4
shift 4
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind /usr "$root/usr"
mount -o remount,bind,ro "$root/usr"
mkdir -p "$root$interpreter"
mount --bind "$interpreter" "$root$interpreter"
mount -o remount,bind,ro "$root$interpreter"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
for _ in $(seq "$count"); do
  mount --bind "$root$1" "$root$1"
  shift
done
count=$1
shift
for _ in $(seq "$count"); do
  mount --bind /dev/null "$root$1"
  shift
done
mount -o "remount,bind,$mode" "$root"
exec chroot "$root" "$@"
"""


class Container:
    """A root folder with the interpreter that runs the tests, and commands in it.

    Args:
        root: an empty folder that any user may enter.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._interpreter = Path(sys.base_prefix)
        for name in ("usr", "proc", "dev", "sys", "etc", "tmp", "build", "opt/expertsteer", "var/lib", "var/cache"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        for name in _SETTINGS:
            source = Path("/etc") / name
            if source.is_dir():
                shutil.copytree(source, root / "etc" / name, symlinks=True)
            elif source.exists():
                shutil.copy2(source, root / "etc" / name)
        for name, text in _ACCOUNTS.items():
            (root / "etc" / name).write_text(text)

    @staticmethod
    def problem() -> str | None:
        """Why this machine cannot have one, or None."""
        if os.geteuid() != 0:
            return "only root can make namespaces with a root folder of their own"
        probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "mount", "--make-rprivate", "/"], timeout=60)
        return "this machine does not let root make namespaces" if probe.returncode else None

    @property
    def python(self) -> str:
        """Path of the interpreter, inside and outside."""
        return str(self._interpreter / "bin" / "python3")

    def build(self, *command: str, folder: str = "/build") -> str:
        """Run a command as root that may change everything but the system's own programs; it must succeed.

        Returns:
            What it printed.
        """
        environment = {"PATH": os.environ["PATH"], "PYTHON": self.python, "HOME": "/tmp"}
        result = subprocess.run(
            [*self._enter("rw"), "env", f"--chdir={folder}", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: str = "/",
        writable: Sequence[str] = (),
        log: IO[bytes] | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a command as an unprivileged user, without compilers, on a root file system that is read-only.

        Args:
            command: it becomes the first process of a process namespace.
            environment: all its variables.
            folder: its working folder.
            writable: folders that it may write.
            log: where its output goes.
        """
        user = ["--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups"]
        # The death signal of --kill-child does not survive the change of the user.
        user += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--pdeathsig", "KILL"]
        return subprocess.Popen(
            [*self._enter("ro", writable, _compilers()), "env", f"--chdir={folder}", "setpriv", *user, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def run(self, command: Sequence[str], environment: Mapping[str, str], writable: Sequence[str] = ()) -> int:
        """Run a command as `start` does and return its status."""
        return self.start(command, environment, writable=writable).wait(120)

    def _enter(self, mode: str, writable: Sequence[str] = (), hidden: Sequence[str] = ()) -> list[str]:
        return [
            *(shutil.which("unshare") or "unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("/bin/bash", "-c", _SCRIPT, "container", str(self.root), str(self._interpreter), mode),
            *(str(len(writable)), *writable, str(len(hidden)), *hidden),
        ]


def first_process(process: subprocess.Popen[bytes]) -> int:
    """Process id, outside, of the command that `Container.start` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = map(int, children)
    return child


def _compilers() -> list[str]:
    found = {os.path.realpath(path) for name in _COMPILERS if (path := shutil.which(name)) is not None}
    return sorted(path for path in found if path.startswith("/usr/"))
