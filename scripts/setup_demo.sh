#!/usr/bin/env bash
# Installs what the web demo needs into .venv, beside requirements.lock, none of whose packages changes.
#   bash scripts/setup_demo.sh             gradio: then .venv/bin/python -m scripts.web_demo
#   bash scripts/setup_demo.sh --browser   also Playwright and Debian's Chromium, for tests/test_web_demo.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

[[ $# == 0 || "$*" == --browser ]] || die "$0 takes --browser or nothing, not $*"
[[ -z "${KONTEXT_PYTHON:-}" ]] ||
  die "KONTEXT_PYTHON is set, and nothing is installed there; $PYTHON -m pip install -r $ROOT/requirements-demo.txt," \
    "or unset it"

installer=("$PYTHON" -m pip install --progress-bar off)
if has_uv; then
  installer=(uv pip install --python "$PYTHON")
fi
log="$venv/install-demo.log"

wanted() { sed -n "s/^\($1[^ ]*\).*/\1/p" "$ROOT/requirements-demo.txt"; }

install_packages() {
  # Without its dependencies first: it asks for an older Pillow than the one that is pinned.
  "${installer[@]}" --no-deps "$(wanted gradio)" || return
  local packages
  packages="$("$PYTHON" -c 'from importlib.metadata import requires
print(*(line for line in requires("gradio") if "extra ==" not in line and not line.startswith("pillow")), sep="\n")')"
  [[ "$*" != --browser ]] || packages+=$'\n'"$(wanted playwright)"
  mapfile -t packages <<<"$packages"
  "${installer[@]}" -c "$ROOT/requirements.lock" "${packages[@]}" && "$PYTHON" -c 'import gradio'
}

echo "Installing requirements-demo.txt into .venv (log: $log)"
install_packages "$@" >"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  die "the installation stopped (see above, and $log); check the network or the package index, then start again"
}

if [[ "$*" == --browser ]] && ! command -v chromium >/dev/null; then
  echo "Installing Debian's Chromium"
  [[ "$(id -u)" == 0 ]] || die "Chromium is missing, and only root can install it: sudo apt-get install chromium"
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    die "apt-get could not install chromium (see above, and $log)"
  }
fi
