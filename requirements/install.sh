#!/usr/bin/env bash
# Installs the locked CPU environment and this package into the environment of the given Python.
# Usage: bash requirements/install.sh .venv/bin/python        README.md in this folder gives the reasons.
set -euo pipefail

python=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

"$python" -c 'import sys; assert sys.version_info[:2] == (3, 11), f"the lock is for Python 3.11, this is {sys.version}"'
pip install --quiet pip==26.3 setuptools==84.2.1 wheel==0.48.0

# The index may offer the CPU build of torch, or a CUDA build that cannot be imported without its CUDA packages. A dry run
# reports which one it would install.
torch=$(grep '^torch==' requirements/cpu.txt)
offered=$(pip install --quiet --dry-run --ignore-installed --no-deps --report - "$torch" |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
if [[ $offered == *+cpu ]]; then
    pip install --no-deps "$torch"
else
    pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
fi

pip install --no-deps -r requirements/cpu.txt
pip install --no-deps --no-build-isolation -e .
