# Sourced by the other scripts. It sets
#   ROOT     the project's folder
#   PYTHON   an interpreter with requirements.lock installed: that of .venv, which is made on the first start and used
#            again after, or KONTEXT_PYTHON, where nothing is installed
#   LAUNCH   the start of a training command: one process, or NUM_PROCESSES of them, one a GPU

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$ROOT/.venv"
stamp="$venv/installed.lock" # the requirements.lock that .venv holds; written last, so half an install has none
needed_gib=8

die() {
  echo "error: $*" >&2
  exit 2
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The first of the usual names that runs (a pyenv shim may not) and is new enough.
find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    is_new_enough "$name" && "$name" -c 'import sys; print(sys.executable)' && return
  done
  die "no Python 3.11 or newer found ($(python3 --version 2>&1 | head -n 1)); install one (Debian, Ubuntu:" \
    "apt install python3.11 python3.11-venv), or name an environment's with KONTEXT_PYTHON"
}

has_uv() { uv --version >/dev/null 2>&1; }

make_venv() {
  local python free_kib
  python="$(find_python)"
  free_kib="$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')"
  ((free_kib >= needed_gib * 1024 * 1024)) ||
    die "$((free_kib / 1024 / 1024)) GiB free at $ROOT, and the environment needs $needed_gib; free some space, or" \
      "name an environment's Python with KONTEXT_PYTHON"
  if has_uv; then
    uv venv --quiet --clear --python "$python" "$venv" || die "uv could not make $venv, see above"
    return
  fi
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module; install it (Debian, Ubuntu: apt install" \
      "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')), or install uv"
  "$python" -m venv --clear "$venv" || die "$python could not make $venv, see above"
}

install_requirements() {
  local log="$venv/install.log" installer=("$PYTHON" -m pip install --progress-bar off)
  if has_uv; then
    installer=(uv pip install --python "$PYTHON")
  fi
  echo "Installing requirements.lock into .venv: a minute with uv, four with pip (log: $log)"
  # torch and torchvision of two different builds install without complaint and fail at the import.
  {
    "${installer[@]}" -r "$ROOT/requirements.lock" && "$PYTHON" -c 'import torch, torchvision'
  } 2>&1 | tee "$log" | awk '
    /Downloading.*\(([0-9][0-9][0-9][0-9.]* ?M|[0-9.]+ ?G)/ { print "  " $0; fflush() }
    /^Installing collected|^Prepared/ { print "  Unpacking"; fflush() }' && return
  tail -n 5 "$log" >&2
  if grep -q 'No space left' "$log"; then
    die "the disk is full; the environment needs $needed_gib GiB free, at $ROOT and for the installer's cache"
  fi
  die "the installation stopped (see above, and $log); check the network or the package index, then start again:" \
    "what was loaded is kept"
}

if [[ -n "${KONTEXT_PYTHON:-}" ]]; then
  is_new_enough "$KONTEXT_PYTHON" ||
    die "KONTEXT_PYTHON=$KONTEXT_PYTHON is no Python 3.11 or newer; name one, or unset it"
  PYTHON="$("$KONTEXT_PYTHON" -c 'import sys; print(sys.executable)')"
  "$PYTHON" -c 'from importlib.metadata import version; [version(name) for name in ("torch", "torchvision", "diffusers",
"transformers", "peft", "accelerate", "ConfigArgParse")]' 2>/dev/null ||
    die "KONTEXT_PYTHON=$PYTHON lacks packages; $PYTHON -m pip install -r $ROOT/requirements.lock, or unset it"
else
  PYTHON="$venv/bin/python"
  if ! is_new_enough "$PYTHON" || ! cmp -s "$ROOT/requirements.lock" "$stamp"; then
    if ! is_new_enough "$PYTHON" || ! { has_uv || "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
      make_venv
    fi
    install_requirements
    cp "$ROOT/requirements.lock" "$stamp"
  fi
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" # a step and a save take their time
LAUNCH=("$PYTHON")
if ((${NUM_PROCESSES:-1} > 1)); then
  LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES")
fi
