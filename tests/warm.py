"""A script or command in a process of its own, which forks from the warm parent."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from conftest import PATIENCE, warm_parent
from small import is_narrow, make_narrow

from common.running.process import end_workers

SERVER = multiprocessing.get_context("forkserver")


def _main(module, words, out, err, env, group, method, narrow, first):
    multiprocessing.set_start_method(method, force=True)  # of its workers: not the fork server's
    make_narrow(narrow)
    if group:
        os.setsid()
    for path, number in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number), os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear(), os.environ.update(env)
    sys.argv = [module, *words]
    if first:
        first[0](*first[1:])
    try:
        importlib.import_module(module).main(words)
    finally:
        end_workers()  # at exit, which multiprocessing leaves out


class Command:
    """`python MODULE.py WORDS...` in the project's folder."""

    def __init__(self, folder, module, *words, env=(), group=False, first=None):
        """folder: for what it prints; env: more of it; group: a process group of its own.

        first: (function, arguments...) to be called in it beforehand; it must be importable.
        """
        self._out, self._err = (Path(folder) / f"{module}.{name}" for name in ("out", "err"))
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env)
        method = multiprocessing.get_start_method()
        args = (module, [*map(str, words)], self._out, self._err, env, group)
        args += (method, is_narrow(), first)
        warm_parent()
        self._process = SERVER.Process(target=_main, args=args)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, patience=PATIENCE):
        self._process.join(patience)
        assert self.poll() is not None, f"it still runs after {patience} s"
        return self.poll()

    def send(self, number, group=False):
        """A signal, to it or to its group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def out(self):
        return self._out.read_text()

    @property
    def err(self):
        return self._err.read_text()


def call(folder, module, *words, **how):
    """A command that has ended."""
    command = Command(folder, module, *words, **how)
    command.wait()
    return command
