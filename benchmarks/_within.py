"""For step.py and gpu.py: a script's own `main`, whose batches a benchmark hands out itself."""

import contextlib
import importlib

from common.running.process import Finished
from common.running.run import Run


@contextlib.contextmanager
def replaced(things):
    """{(owner, name): what} stands there meanwhile."""
    before = {place: getattr(*place) for place in things}
    try:
        for place, what in things.items():
            setattr(*place, what)
        yield
    finally:
        for place, what in before.items():
            setattr(*place, what)


def run_main(method, argv, batches, things=None):
    """A script's main with its own model, optimiser, probe and log, but not its batches.

    batches(loader): yields what the loop is to train on; the run ends with it. things: what else is
    replaced. Returns the run, or None where main exited: it then said why.
    """
    runs = []

    def steps(self, loader):
        runs.append(self)
        self._watch.start_step()
        for batch in batches(loader):
            self._guard.before_step()
            yield self.step, batch
        self.log.close()
        raise Finished

    with replaced({(Run, "steps"): steps, **(things or {})}), contextlib.suppress(SystemExit):
        importlib.import_module(method).main(argv)
        return runs[0]
