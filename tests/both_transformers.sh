#!/usr/bin/env bash
# The towers under the oldest and the newest `transformers` that pairclip allows.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for wanted in "transformers>=4.56,<4.57" "transformers>=5,<6"; do
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check ".[examples]" "pytest>=8.2" "$wanted"
    "$work/venv/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
    "$work/venv/bin/python" -m pytest tests/test_towers.py
done
