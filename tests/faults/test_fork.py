"""A method of one's own, mine.py with its config, runs in a grid and appears in the report."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, TINY
from small import HEAD
from test_report import read_csv

from common.running.folder import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project as a fork has it, with mine.py and configs/mine.yaml."""
    folder = tmp_path_factory.mktemp("fork")
    for name in ("common", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "run_grid.sh", folder)
    script = (ROOT / "simclr.py").read_text()
    changed = (('Literal["simclr"]', 'Literal["mine"]'), ("class SimCLR(", "class Mine("))
    changed += (("= SimCLR(", "= Mine("), ("    temperature: Positive\n", ""))
    changed += (('Literal["resnet18", "vit_tiny"]', 'Literal["my_net"]'),)
    changed += (("cfg.backbone, data.image_size", '"resnet18", data.image_size'),)
    changed += (("*z.float(), ssl.temperature", "*z.float(), 0.5"),)
    for old, new in changed:
        assert old in script
        script = script.replace(old, new)
    (folder / "mine.py").write_text(script)
    config = (ROOT / "configs/simclr_r18.yaml").read_text()
    config = config.replace("method: simclr", "method: mine").replace("  temperature: 0.2\n", "")
    config = config.replace("backbone: resnet18", "backbone: my_net")
    (folder / "configs/mine.yaml").write_text(config)
    return folder


def test_a_fork_runs_in_a_grid_and_appears_in_the_report(project, tiny_set):
    settings = dict(o.split("=", 1) for o in [*tiny_set, *TINY, *HEAD, "optimization.epochs=1"])
    settings = {key: yaml.safe_load(value) for key, value in settings.items()}
    group = {"configs": ["configs/mine.yaml"], "axes": {"seed": [1]}, "overrides": settings}
    (project / "g.yaml").write_text(yaml.safe_dump({"groups": {"ours": group}}))

    def door(*words):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        command = ["./run_grid.sh", *words, "--grid", "g.yaml"]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    door("run")
    assert door("status").startswith("1 finished\n")
    (folder,) = (project / "runs").glob("mine_my_net_p25_s1_*")
    assert (folder / "script.py").read_bytes() == (project / "mine.py").read_bytes()
    assert read_json(folder / "result.json")["method"] == "mine"
    door("report")
    rows = read_csv(project / "report/performance_val.csv")
    assert [row["method"] for row in rows] == ["mine", "everything a defect"]
    page = (project / "report/index.html").read_text()
    assert page.count("<td>mine</td>") > 2 and "Missing runs" not in page
