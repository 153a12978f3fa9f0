# shellcheck shell=bash
# Sourced by the launch scripts: make_environment DIR REQUIREMENTS makes DIR/.venv with a requirements file of this
# project installed, or leaves it alone where that is done. $PYTHON names the interpreter it is made from (python3).
# Sets $venv_python.

make_environment() {
  local venv="$1/.venv" requirements="$2" python="${PYTHON:-python3}" wanted stamp
  stamp="$venv/installed-$(basename "$requirements")"
  wanted="$(cat "$(dirname "$requirements")"/requirements*.txt)" # all, because one file includes another
  venv_python="$venv/bin/python"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  if ! command -v "$python" >/dev/null; then
    echo "error: no $python here; install Python 3.11 or newer, or name it: PYTHON=/path/to/python bash $0" >&2
    return 2
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); name another one:" \
      "PYTHON=/path/to/python bash $0" >&2
    return 2
  fi
  echo "making $venv from $requirements" >&2
  "$python" -m venv "$venv"
  "$venv_python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
  echo "$wanted" >"$stamp"
}
