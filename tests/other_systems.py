"""Imports everything, packs a data set and trains on it as if this were Windows or macOS: run by test_portability.py
in a process of its own, since what is hidden here cannot be brought back."""

import builtins
import os
import pkgutil
import signal
import sys
from importlib import import_module

HIDDEN_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
HIDDEN_NAMES = {
    os: ("sched_getaffinity", "pread", "killpg", "posix_fadvise", "getuid", "sysconf"),
    signal: ("SIGUSR1", "SIGHUP", "SIGCHLD"),
}
plain_import = builtins.__import__


def ours(name: str, namespace=None, *rest, **more):
    """Libraries know by themselves what Windows has not; they are left with what this system has."""
    package = (namespace or {}).get("__name__", "").partition(".")[0]
    if name in HIDDEN_MODULES and package in ("mlc", "shards"):
        raise ImportError(f"{name} is for POSIX alone")
    return plain_import(name, namespace, *rest, **more)


def hide() -> None:
    # Libraries that look for these names while they are imported.
    import psutil  # noqa: F401
    import sklearn.ensemble  # noqa: F401

    import mlc.train  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] in ("mlc", "shards")]:
        del sys.modules[name]
    builtins.__import__ = ours
    for module, names in HIDDEN_NAMES.items():
        for name in names:
            delattr(module, name)


def import_all() -> None:
    for package in map(import_module, ("shards", "mlc")):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                import_module(found.name)


def main(raw: str, out: str, *model: str) -> None:
    hide()
    import_all()
    from mlc import predict, train
    from shards import pack

    assert pack.main(["--csv", f"{raw}/train.csv", "--images", f"{raw}/images", "--out", f"{out}/data", "-j", "1"]) == 0
    short = ["--max-steps", "1", "-b", "2", "-j", "0", "--val-split", ""]
    argv = ["--data", f"{out}/data", "--output", out, "--experiment", "run", *short]
    assert train.main([*model, *argv]) == 0
    predict.main(["--run", f"{out}/run", "--weights", "last", "--images", f"{raw}/images", "-j", "0"])


if __name__ == "__main__":
    main(*sys.argv[1:])
