# make demo [SEED=N]: a trained, scored model from a fresh machine. make test: the tests. Both
# install first. make bench: speed beside peers, to benchmarks/RESULTS.md. make test-gpu: on one
# CUDA device, by whatever pytest and packages are there, without installing.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
PYTEST = $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
SEED ?= 0
DEMO ?= $(if $(filter 0,$(SEED)),demo,demo/seed$(SEED))
SET = data.image_root=$(DEMO)/set/images data.train_csv=$(DEMO)/set/SewerML_Train.csv \
      data.val_csv=$(DEMO)/set/SewerML_Val.csv run.output_dir=$(DEMO)/runs

.PHONY: demo test test-faults test-faults-long test-slurm test-gpu bench lint clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(PY) -m common.synthetic --out $(DEMO)/set --train 1600 --val 800 --size 80 --seed $(SEED)
	$(PY) simclr.py --config configs/demo.yaml $(SET) run.name=random \
		run.frozen_encoder=true optimization.epochs=1
	$(PY) simclr.py --config configs/demo.yaml $(SET) run.name=simclr
	$(PY) -m common.compare $(DEMO)/runs/random $(DEMO)/runs/simclr --out $(DEMO)/compare.png

test: $(VENV)/ready
	$(PYTEST) --ignore=tests/faults

test-faults: $(VENV)/ready
	$(PYTEST) tests/faults

test-faults-long: $(VENV)/ready
	$(PYTEST) tests/faults -m "long or not long"

test-slurm: $(VENV)/ready
	PYTHON=$(PY) tests/slurm_node.sh

test-gpu:
	$(PYTHON) -m pytest tests/gpu

bench: $(VENV)/ready
	$(PY) -m pip install -q -e ".[bench]"
	$(PY) -m benchmarks

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf demo
