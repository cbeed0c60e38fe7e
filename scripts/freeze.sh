#!/usr/bin/env bash
# Write constraints.txt anew: the newest releases that fit pyproject.toml, as pip resolves them in an empty venv.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet 'torch==2.13.0' --editable '.[sample,dev,bench]'
{
    echo "# Tried together on $(date +%F) with Python $("$venv/bin/python" -c 'import platform; print(platform.python_version())'); made by scripts/freeze.sh."
    "$venv/bin/pip" freeze --exclude-editable | sed 's/+cpu$//' | grep -v '^nvidia-\|^triton=='
} > constraints.txt
