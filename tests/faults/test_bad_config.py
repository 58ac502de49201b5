"""Configs and command lines as people get them wrong."""

import itertools

import pytest
import yaml
from conftest import ROOT
from refusal import refused
from small import arguments

import mae
import simclr

pytestmark = pytest.mark.usefixtures("narrow")

OVERRIDES = {  # what is wrong: the override, what the message has to name
    "unknown key": ("optimization.lrr=1", ["optimization.lrr", "'lr'"]),
    "unknown section": ("optimisation.lr=1", ["optimisation", "'optimization'"]),
    "unknown key at the top": ("sead=1", ["sead", "'seed'"]),
    "no section": ("lr=1", ["lr", "unknown"]),
    "too deep": ("optimization.lr.x=1", ["optimization.lr.x"]),
    "no value": ("optimization.lr", ["optimization.lr", "section.key=value"]),
    "empty value": ("optimization.lr=", ["optimization.lr", "a number", "null"]),
    "text for a number": ("optimization.lr=fast", ["optimization.lr", "a number", "fast"]),
    "a list for a number": ("optimization.lr=[1, 2]", ["optimization.lr", "a number"]),
    "a number for a section": ("optimization=3", ["optimization", "keys and values"]),
    "a fraction for a whole number": ("optimization.epochs=1.5", ["optimization.epochs", "1.5"]),
    "an octal number": ("optimization.epochs=010", ["optimization.epochs", "010"]),
    "a number with underscores": ("optimization.epochs=1_000", ["optimization.epochs"]),
    "true for a number": ("optimization.epochs=true", ["optimization.epochs", "true"]),
    "yes for true": ("run.compile=yes", ["run.compile", "yes"]),
    "a text for a truth": ("run.deterministic=1", ["run.deterministic", "1"]),
    "nan": ("optimization.lr=nan", ["optimization.lr", "a number"]),
    "infinity": ("optimization.lr=.inf", ["optimization.lr", "a number"]),
    "an overflow": ("optimization.lr=1e400", ["optimization.lr", "a number"]),
    "a negative rate": ("optimization.lr=-1", ["optimization.lr", "-1"]),
    "no epochs": ("optimization.epochs=0", ["optimization.epochs", "at least 1"]),
    "negative epochs": ("optimization.epochs=-3", ["optimization.epochs", "-3"]),
    "no batch": ("optimization.batch_size=0", ["optimization.batch_size", "at least 1"]),
    "a batch larger than the set": ("optimization.batch_size=500", ["batch_size", "500"]),
    "a warmup longer than the run": ("optimization.warmup_epochs=9", ["warmup_epochs", "9"]),
    "no temperature": ("ssl_settings.temperature=0", ["ssl_settings.temperature", "0"]),
    "a negative temperature": ("ssl_settings.temperature=-1", ["ssl_settings.temperature"]),
    "no width": ("ssl_settings.proj_output_dim=0", ["ssl_settings.proj_output_dim"]),
    "a width that no memory holds": (
        "ssl_settings.proj_hidden_dim=100000000000",
        ["no memory holds that", "ssl_settings"],
    ),
    "a precision that there is not": ("optimization.precision=fp8", ["precision", "fp16"]),
    "an optimizer that there is not": ("optimization.optimizer=adam", ["optimizer", "adam"]),
    "an optimizer's key missing": ("optimization.trust_coefficient=null", ["trust_coefficient"]),
    "a proportion in percent": ("data.train_defect_proportion=45", ["proportion", "45"]),
    "a proportion of all": ("data.train_defect_proportion=1", ["train_defect_proportion"]),
    "a negative fraction": ("data.fraction=-0.5", ["data.fraction", "-0.5"]),
    "an image of nothing": ("data.image_size=0", ["data.image_size", "0"]),
    "a scale above 1": ("augmentation.min_scale=1.5", ["augmentation.min_scale", "1.5"]),
    "a scale of nothing": ("augmentation.min_scale=0", ["augmentation.min_scale"]),
    "a probability above 1": ("augmentation.flip_prob=2", ["augmentation.flip_prob", "2"]),
    "negative workers": ("data.num_workers=-1", ["data.num_workers", "-1"]),
    "never a score": ("run.val_every_epochs=0", ["run.val_every_epochs"]),
    "never a checkpoint": ("run.checkpoint_every_steps=0", ["run.checkpoint_every_steps"]),
    "never a line": ("run.log_every=0", ["run.log_every", "at least 1"]),
    "a negative seed": ("seed=-1", ["seed", "-1"]),
    "a huge seed": ("seed=100000000000000000000", ["seed"]),
    "another backbone": ("backbone=resnet50", ["backbone", "resnet18"]),
    "another method": ("method=byol", ["method", "simclr"]),
    "a key of another backbone": ("patch_size=8", ["patch_size", "resnet18"]),
    "bad images without a store": ("data.max_bad_images=3", ["data.max_bad_images", "packed"]),
    "more labels than there are": ("data.labels=1000", ["data.labels", "1000"]),
    "a name that is a path": ("run.name=../x", ["run.name", "one folder"]),
    "a name that is above": ("run.name=..", ["run.name", "one folder"]),
    "a name longer than a disk has": ("run.name=" + "x" * 300, ["run.name"]),
    "a line break in a name": ('run.name="a\\nb"', ["run.name", "control character"]),
    "an escape in a path": ('run.output_dir="a\\e[2J"', ["run.output_dir", "control"]),
    "a null byte": ('data.train_csv="a\\0b"', ["data.train_csv", "control character"]),
    "an anchor": ("data.image_root=&a x", ["anchor"]),
    "a tag": ("data.image_root=!!python/name:os.system", ["tag"]),
    "broken YAML": ("data.image_root=[a #b", ["data.image_root=[a #b"]),
    "a word of no kind": ("--fast", ["--fast"]),
}
FILES = {  # what is wrong: (text of simclr_r18.yaml -> bytes), what the message has to name
    "an empty file": (lambda t: "", ["bad.yaml"]),
    "a list": (lambda t: "- a\n- b\n", ["bad.yaml"]),
    "a scalar": (lambda t: "simclr\n", ["bad.yaml"]),
    "a key twice": (lambda t: t + "seed: 3\n", ["bad.yaml", "'seed'", "twice", "line"]),
    "two documents": (lambda t: t + "---\nseed: 3\n", ["bad.yaml", "line"]),
    "a tab": (lambda t: t.replace("  lr: 0.3", "\tlr: 0.3"), ["bad.yaml", "line"]),
    "a missing key": (lambda t: t.replace("  lr: 0.3\n", ""), ["optimization.lr", "missing"]),
    "a missing section": (lambda t: t.partition("probe:")[0], ["probe", "missing", "problems"]),
    "a key that is no text": (lambda t: t + "3: 4\n", ["bad.yaml", "3"]),
    "a key that is a list": (lambda t: t + "[a]: 4\n", ["bad.yaml"]),
    "an alias of itself": (lambda t: t + "x: &x [*x]\n", ["bad.yaml", "anchor"]),
    "ten to the nine aliases": (
        lambda t: "a: &a [x]\n" + "".join(f"{c}: &{c} [*a, *a]\n" for c in "bcdefghij"),
        ["bad.yaml", "anchor"],
    ),
    "a hundred thousand brackets": (lambda t: "x: " + "[" * 50_000, ["bad.yaml"]),
    "a megabyte": (lambda t: t + "#" * 1_000_000, ["bad.yaml", "64 KB"]),
    "a call": (lambda t: t + "x: !!python/object/apply:os.system [ls]\n", ["bad.yaml", "tag"]),
    "binary": (lambda t: t + "x: !!binary aGVsbG8=\n", ["bad.yaml", "tag"]),
    "no UTF-8": (lambda t: t.encode() + b"# \xff\xfe\n", ["bad.yaml", "UTF-8"]),
    "UTF-16": (lambda t: t.encode("utf-16"), ["bad.yaml"]),
    "a null byte": (lambda t: t + "x: a\0b\n", ["bad.yaml"]),
    "an open quote": (lambda t: t + 'x: "a\n', ["bad.yaml", "line"]),
    "a merge conflict": (lambda t: "<<<<<<< HEAD\n" + t, ["bad.yaml"]),
    "JSON cut short": (lambda t: '{"method": "simclr", ', ["bad.yaml"]),
}
PLACES = {  # what stands where the config is asked for
    "no such file": (lambda p: None, ["bad.yaml"]),
    "a folder": (lambda p: p.mkdir(), ["bad.yaml"]),
    "a link to itself": (lambda p: p.symlink_to(p), ["bad.yaml"]),
}
MAE = {
    "nothing hidden": ("ssl_settings.mask_ratio=0", ["ssl_settings.mask_ratio"]),
    "all hidden": ("ssl_settings.mask_ratio=1", ["ssl_settings.mask_ratio"]),
    "more than all hidden": ("ssl_settings.mask_ratio=1.5", ["ssl_settings.mask_ratio", "1.5"]),
    "a size that patches do not fill": ("data.image_size=33", ["33", "patch_size"]),
    "heads that do not divide": (
        "ssl_settings.decoder_num_heads=5",
        ["decoder_embed_dim", "decoder_num_heads"],
    ),
    "a backbone without patches": ("backbone=resnet18", ["backbone", "vit_tiny"]),
}


def command(tiny_set, folder, *overrides, method="simclr"):
    return arguments(method, tiny_set, folder / "runs", "run", *overrides)


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override(case, tiny_set, tmp_path, capsys, count):
    override, words = OVERRIDES[case]
    refused(
        simclr.main, command(tiny_set, tmp_path, override), words, tmp_path, capsys, count, "config"
    )


@pytest.mark.parametrize("case", MAE)
def test_an_override_of_mae(case, tiny_set, tmp_path, capsys, count):
    override, words = MAE[case]
    argv = command(tiny_set, tmp_path, override, method="mae")
    refused(mae.main, argv, words, tmp_path, capsys, count, "config")


@pytest.mark.parametrize("case", [*FILES, *PLACES])
def test_a_file(case, tiny_set, tmp_path, capsys, count):
    text, path = (ROOT / "configs/simclr_r18.yaml").read_text(), tmp_path / "bad.yaml"
    make, words = (FILES | PLACES)[case]
    content = make(text if case in FILES else path)
    if case in FILES:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = command(tiny_set, tmp_path)
    argv[1] = str(path)
    refused(simclr.main, argv, words, tmp_path, capsys, count, "config")


@pytest.mark.parametrize("argv", [[], ["--config"], ["seed=3"], ["--config", "a", "--config", "b"]])
def test_a_command_line(argv, tmp_path, capsys, count):
    refused(simclr.main, argv, ["--config"], tmp_path, capsys, count, "config")


def test_all_that_is_wrong_is_told_at_once(tiny_set, tmp_path, capsys, count):
    keys = ("optimization.lr", "probe.lr", "data.image_size")
    argv = command(tiny_set, tmp_path, *(f"{key}=x" for key in keys))
    refused(simclr.main, argv, keys, tmp_path, capsys, count, "config")


def test_every_key_of_a_wrong_kind(tiny_set, tmp_path, capsys, count):
    """A mapping stands where any key's own value belongs: each is named."""
    config = yaml.safe_load((ROOT / "configs/simclr_r18.yaml").read_text())
    keys = [(s, k) for s, content in config.items() if isinstance(content, dict) for k in content]
    argv = command(tiny_set, tmp_path / "more")
    for section, key in itertools.chain(keys, [("", "seed"), ("", "method"), ("", "backbone")]):
        name = ".".join(filter(None, (section, key)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            simclr.main([*argv, f"{name}={{a: {{b: 1}}}}"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and name in said and "Traceback" not in said, said
