"""Every key of the config is read by what runs: a key that nobody reads is a promise not kept."""

import dataclasses
import importlib
import sys
import typing

import pytest
from small import METHODS, run

from common.running import config

pytestmark = pytest.mark.usefixtures("narrow")


def keys(section, prefix=""):
    """Dotted names of all keys that can have more than one value."""
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{kind.__name__}.")
        elif kind is not type(None) and len(typing.get_args(kind)) != 1:
            yield prefix + name


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_read(method, tmp_path, tiny_set, monkeypatch):
    script, read = importlib.import_module(method), set()

    def recording(self, name):
        caller = sys._getframe(1).f_globals["__name__"]
        if caller not in (
            "dataclasses",
            "common.running.config",
        ):  # copies and checks are no use of a key
            read.add(name if type(self) is script.Config else f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    sections = [config.Data, config.Augmentation, config.Optimization, config.Probe]
    sections += [config.RunOptions, script.Config]
    for section in [*sections, getattr(script, "SSLSettings", script.Config)]:
        monkeypatch.setattr(section, "__getattribute__", recording, raising=False)
    run(method, tmp_path, tiny_set, "keys")
    everything = set(keys(script.Config)) | {"method"}
    named_only = {"RunOptions.name", "method"}  # read where a run gets its names, in config.py
    assert everything - read <= named_only
    assert len(everything) > 32
