"""Whether a bad input is told in one clear sentence, and changes nothing on disk."""

import hashlib
import os
import stat
from pathlib import Path

from conftest import exit_code

OWN = {"status.json", "lock"}  # what a refused run may write where a run was before
AT_MOST = 6  # lines of a message


def digest(folder):
    """{path: what is there} of a folder; links and pipes are not followed."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = os.readlink(path) if stat.S_ISLNK(mode) else stat.S_IFMT(mode)
    return found


def changed(before, after):
    """Paths that are new, gone or different."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def refused(main, argv, words, folder, capsys, count, kind, code=2, own=OWN):
    """One case: counted, and then asserted. words: what the message has to hold."""
    before = digest(folder)
    capsys.readouterr()
    found = exit_code(main, *argv)
    said = capsys.readouterr().err
    errors = said[said.find("error: ") :].strip() if "error: " in said else ""
    other = {p for p in changed(before, digest(folder)) if Path(p).name not in own}
    other -= {p for p in other - before.keys() if "/runs/" in f"{p}/"}  # a new run's own
    lines = errors.count("\n") + 1
    clear = found == code and said.count("error: ") == 1 and "Traceback" not in said
    clear = clear and all(str(word) in errors for word in words) and lines <= AT_MOST
    count(f"bad inputs: {kind}", tried=1, clear=clear, unchanged=not other)
    count("bad inputs: all", tried=1, clear=clear, unchanged=not other)
    assert clear, f"exit {found}, wanted {words}:\n{said[-3000:]}"
    assert not other
