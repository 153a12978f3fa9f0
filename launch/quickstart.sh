#!/usr/bin/env bash
# From a fresh clone to results: environment, three trainings on digits (full method, patches without penalties, clean
# multi-bit training), and their evaluation side by side, which also lies in runs/quickstart.txt.
#
#   bash launch/quickstart.sh                            # the same command again continues where it stopped
#   QUICKSTART_DIR=/scratch/me bash launch/quickstart.sh # where .venv and runs/ go; default: the current directory
#   PYTHON=python3.12 bash launch/quickstart.sh          # the interpreter of the environment
#
# Arguments go to every training (QUICKSTART_DIR=look bash launch/quickstart.sh --config.train.epochs=3).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

mkdir -p "${QUICKSTART_DIR:-.}"
directory="$(cd "${QUICKSTART_DIR:-.}" && pwd)"
make_environment "$directory" "$root/requirements.txt"
cd "$directory"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

workdirs=()
is_evaluated=true
for variant in "" patch_ce qat; do
  workdir="runs/digits${variant:+-$variant}"
  echo "== $workdir" >&2
  # Exit code 42 means preempted after saving; it ends this script, and the same command continues.
  config="$root/configs/digits.py${variant:+:$variant}"
  "$venv_python" -m triqdef_jax.train --config="$config" --workdir="$workdir" "$@"
  workdirs+=("$workdir")
  [[ runs/quickstart.txt -nt "$workdir/config.json" ]] || is_evaluated=false # -nt fails for a missing file, too
done

if ! "$is_evaluated"; then
  echo "== evaluation" >&2
  joined="$(IFS=, && echo "${workdirs[*]}")"
  "$venv_python" -m triqdef_jax.evaluate --workdirs="$joined" | tee runs/quickstart.txt.partial
  mv runs/quickstart.txt.partial runs/quickstart.txt # complete or not at all
else
  cat runs/quickstart.txt
fi
