import dataclasses
import json

import pytest
from conftest import ROOT
from warm import call

import simclr
from common.running.config import differences, identity, load_config, read_config, run_name
from common.running.errors import ConfigError
from common.running.folder import note_refused_config
from common.running.schema import parse_override, parse_yaml

R18 = str(ROOT / "configs/simclr_r18.yaml")


def load(*overrides, path=R18):
    return load_config(simclr.Config, ["--config", path, *overrides])


def test_overrides_are_parsed_as_yaml_and_the_last_wins():
    cfg = load("optimization.lr=1e-3", "optimization.epochs=20", "optimization.epochs=30")
    assert cfg.optimization.lr == 0.001 and cfg.optimization.epochs == 30
    assert load("optimization.lr=1").optimization.lr == 1.0  # a whole number is a number
    assert load("data.train_defect_proportion=null").data.train_defect_proportion is None
    assert load("run.name=a b/c".replace("/", "_")).run.name == "a b_c"


@pytest.mark.parametrize(
    "text", ["site #4", "#4", "a #", "# ", "site#4", "#", "'a #b", "a # b # c", "\ue000 #", "ü #😀"]
)
def test_an_overrides_value_keeps_its_hash(text):
    assert load(f"data.image_root={json.dumps(text, ensure_ascii=False)}").data.image_root == text
    if text[0] != "'":
        assert load(f"data.image_root={text}").data.image_root == text.strip()
    assert load(f"run.name=x{text.replace(' ', '_')}").run.name == f"x{text.replace(' ', '_')}"


def test_hashes_are_kept_in_all_of_a_value():
    assert parse_override("a.b={c #: [d #e, 'f #', 1], g: 0.5}") == (
        "a.b",
        {"c #": ["d #e", "f #", 1], "g": 0.5},
    )
    assert parse_override("a=1 #2") == ("a", "1 #2") and parse_override("a=1e-3") == ("a", 0.001)
    assert parse_yaml("a: b #c", "a file") == {"a": "b"}


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (ROOT / "configs/simclr_r18.yaml").read_text()
    text = text.replace("output_dir: runs", "output_dir: ~/runs")
    (tmp_path / "c.yaml").write_text(text)
    cfg = load(*(f"data.{k}=~/x~" for k in ("image_root", "train_csv", "val_csv")), path="~/c.yaml")
    paths = cfg.data.image_root, cfg.data.train_csv, cfg.data.val_csv
    assert paths == (f"{tmp_path}/x~",) * 3 and cfg.run.output_dir == f"{tmp_path}/runs"
    assert load("run.name=~").run.name is None and load("run.name=~x").run.name == "~x"
    note_refused_config({"run": {"output_dir": "~/runs", "name": "bad"}}, "why")
    assert (tmp_path / "runs/bad/status.json").exists()


def test_control_characters_of_a_file_are_told_by_key(tmp_path):
    text = (ROOT / "configs/simclr_r18.yaml").read_text()
    text = text.replace("output_dir: runs", 'output_dir: "a\\nb"')
    (tmp_path / "c.yaml").write_text(text.replace("name: null", 'name: "two\\nlines"'))
    with pytest.raises(ConfigError) as error:
        load(path=str(tmp_path / "c.yaml"))
    for words in (r"run.output_dir: 'a\nb' holds a control", r"run.name: 'two\nlines' holds"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"--config: 'c\\n.yaml' holds a control character"):
        load(path="c\n.yaml")


def test_overrides_may_stand_anywhere():
    cfg = load_config(simclr.Config, ["seed=1", "--config", R18, "optimization.lr=0.2"])
    assert cfg.seed == 1 and cfg.optimization.lr == 0.2


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().optimization.lr = 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.lrr=1", ["optimization.lrr", "unknown", "'lr'"]),
        ("optimisation.lr=1", ["optimisation", "unknown", "'optimization'"]),
        ("optimization.lr=fast", ["optimization.lr", "a number", '"fast"']),
        ("optimization.lr=-1", ["optimization.lr", "at least 0", "-1"]),
        ("optimization.lr=.inf", ["optimization.lr", "a number"]),
        ("optimization.lr=nan", ["optimization.lr", "a number"]),
        ("optimization.lr=1e400", ["optimization.lr", "a number"]),
        ("optimization.epochs=1.5", ["optimization.epochs", "a whole number"]),
        ("optimization.epochs=010", ["optimization.epochs", "a whole number", '"010"']),
        ("optimization.epochs=1_000", ["optimization.epochs", "a whole number"]),
        ("optimization.epochs=true", ["optimization.epochs", "a whole number"]),
        ("optimization.epochs=", ["optimization.epochs", "a whole number", "null"]),
        ("optimization.batch_size=0", ["optimization.batch_size", "at least 1"]),
        ("optimization.precision=fp8", ["optimization.precision", '"fp16"', '"fp8"']),
        ("optimization.warmup_epochs=99", ["optimization.warmup_epochs", "99", "45"]),
        ("optimization.trust_coefficient=null", ["trust_coefficient", "lars"]),
        ("data.train_defect_proportion=45", ["train_defect_proportion", "0 to 1", "45"]),
        ("data.train_defect_proportion=1", ["train_defect_proportion", "inside"]),
        ("data.packed=3", ["data.packed", "a path"]),
        ("data.max_bad_images=3", ["data.max_bad_images", "0 without data.packed"]),
        ("run.compile=yes", ["run.compile", "true | false", '"yes"']),
        ("run.name=../x", ["run.name", "one folder"]),
        ("backbone=resnet50", ["backbone", '"resnet18"']),
        ("patch_size=8", ["patch_size", "resnet18"]),
        ("run.name=..", ["run.name", "one folder"]),
        ("method=byol", ["method", "simclr", "byol"]),
        ("optimization=3", ["optimization", "keys and values"]),
        ("optimization.lr.x=3", ["optimization.lr.x"]),
        ("epochs", ["epochs", "section.key=value"]),
        ("data.image_root=&a x", ["anchor"]),
        ("data.image_root=!!python/name:os.system", ["tag"]),
        ("data.image_root=", ["data.image_root", "a path", "null"]),
        ('run.output_dir="a\\nb"', ["run.output_dir", r"'a\nb'", "control character"]),
        ('run.name="a\\x1b[2Jb"', ["run.name", r"'a\x1b[2Jb'", "control character"]),
        ('data.train_csv="a\\u2028b"', ["data.train_csv", "control character"]),
        ('"run\\n".name=x', [r"unknown key"]),
        ("run.output_dir=a\nb", [r"'run.output_dir=a\nb'", "control character"]),
        ("run.name=a\tb", ["control character"]),
        ('data={image_root: ["x\\0"]}', ["image_root", "control character"]),
        ('data={"image\\nroot": 1}', [r"'image\nroot'", "control character"]),
        ("data.image_root=[a #b", ["override 'data.image_root=[a #b'"]),
        ('data.image_root="\\#"', ["unknown escape character '#'"]),
    ],
)
def test_a_mistake_is_named(override, words):
    with pytest.raises(ConfigError) as error:
        load(override)
    for word in words:
        assert word in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load("optimization.lr=x", "probe.lr=y", "data.imagesize=3")
    assert all(key in str(error.value) for key in ("optimization.lr", "probe.lr", "'image_size'"))


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    text = (ROOT / "configs/simclr_r18.yaml").read_text()
    path.write_text(text.replace("  temperature: 0.2\n", ""))
    with pytest.raises(ConfigError, match="ssl_settings.temperature: missing"):
        load(path=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "'a'", "twice", "line 1"]),
        ("a: [1, 2\n", ["line"]),
        ("a: &x 1\nb: *x\n", ["anchor"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["tag"]),
        ("a: 1\n---\nb: 2\n", ["line"]),
        ("[" * 5000, []),
        ("a: " + "x" * 70000, ["64 KB"]),
    ],
)
def test_bad_yaml_is_refused(text, words):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "file.yaml")
    assert all(word in str(error.value) for word in ["file.yaml", *words])


def test_scalars_follow_yaml_1_2():
    text = "[1e-3, 1e3, -2, 0.5, 5., .5, +1, 010, yes, on, 1:30, 2001-01-01, true, null, ~, '1']"
    assert parse_yaml(text, "") == [
        *(0.001, 1000.0, -2, 0.5, 5.0, 0.5, 1),
        *("010", "yes", "on", "1:30", "2001-01-01", True, None, None, "1"),
    ]


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            read_config(simclr.Config, path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_config(simclr.Config, tmp_path / "latin.yaml")


def test_names_tell_runs_apart():
    name = run_name(load())
    assert name.startswith("simclr_resnet18_p45_s42_")
    assert run_name(load("run.log_every=7", "data.num_workers=1", "run.output_dir=x")) == name
    others = ["optimization.lr=0.31", "data.train_csv=other.csv", "probe.lr=0.01"]
    assert len({name, *(run_name(load(o)) for o in others)}) == 4
    assert run_name(load("run.frozen_encoder=true")).startswith("random_resnet18_p45_s42_")
    assert run_name(load("data.train_defect_proportion=0.01")).startswith("simclr_resnet18_p1_")
    assert run_name(load("run.name=mine")) == "mine"


def test_a_typo_ends_with_one_sentence_and_a_status(tmp_path):
    place = f"run.output_dir={tmp_path}", "run.name=typo"
    done = call(tmp_path, "simclr", "--config", R18, "optimization.lrr=1", *place)
    assert done.poll() == 2 and "Traceback" not in done.err
    assert "simclr_r18.yaml" in done.err and "optimization.lrr" in done.err
    assert '"failed"' in (tmp_path / "typo" / "status.json").read_text()


def test_a_key_that_is_null_changes_no_name_and_makes_no_difference():
    cfg = load("data.image_root=i", "data.train_csv=t", "data.val_csv=v")
    name = "simclr_resnet18_p45_s42_12df36f3"  # of this release and later ones
    assert run_name(cfg) == name

    later = dataclasses.make_dataclass(
        "Later", [("more", dict, None), ("null", object, None)], bases=(simclr.Config,), frozen=True
    )
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    assert run_name(later(**values, more={"a": None, "b": {"c": None}}, null=None)) == name
    assert run_name(later(**values, more={"a": 0}, null=None)) != name
    assert run_name(later(**values, more={}, null=False)) != name


def test_where_a_packed_store_lies_is_no_identity_but_that_it_is_one():
    files, one, other = (load(f"data.packed={path}") for path in ("null", "a", "b/c"))
    assert run_name(one) == run_name(other) != run_name(files)
    for with_paths in (True, False):
        assert identity(one, with_paths) == identity(other, with_paths)
        assert differences(identity(files, with_paths), identity(one, with_paths))
    assert one.data.packed == "a"
    assert run_name(load("data.packed=a", "data.max_bad_images=3")) == run_name(one)


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({}, {"a": None}, []),
        ({"a": {"b": None}}, {"c": None}, []),
        ({"a": None}, {"a": {"b": {"c": None}}}, []),
        ({"a": None}, {"a": {"b": 1}}, ["a.b: null -> 1"]),
        ({"a": {"b": 1}}, {}, ["a.b: 1 -> null"]),
        ({"a": 0}, {}, ["a: 0 -> null"]),
        ({"a": {"b": 1}}, {"a": 3}, ['a: {"b": 1} -> 3']),
        ({"a": 3}, {"a": {}}, ["a: 3 -> {}"]),
    ],
)
def test_what_differs_between_two_configs(old, new, lines):
    assert differences(old, new) == lines
