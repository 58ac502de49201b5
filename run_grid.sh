#!/usr/bin/env bash
# The front door of the study: ./run_grid.sh plan|run|status|report [--grid configs/grid/NAME.yaml] ...
set -euo pipefail
cd "$(dirname "$0")"
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "${PYTHON:-$python}" -m common.study "$@"
