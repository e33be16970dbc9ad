#!/usr/bin/env bash
# Checks the code's style and runs the tests; arguments go to pytest: bash run_tests.sh tests/test_images.py -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
cd "$ROOT"

"$PYTHON" -m ruff check .
# Two processes; the tests of one file stay together, since some of them open network ports.
HF_HUB_OFFLINE=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
