#!/usr/bin/env bash
# One program on all workers of a TPU pod slice, by ssh; started again while it ends as preempted.
#
#   bash launch/tpu_vm.sh -t NAME -z ZONE -n WORKERS -C DIRECTORY -- .venv/bin/python -m triqdef_jax.train --config=...
#
#   -t NAME, -z ZONE  the slice; -p PROJECT where it is not gcloud's own
#   -n WORKERS        hosts of the slice; --distributed=on --expect_processes=WORKERS is added to the arguments
#   -C DIRECTORY      where the clone lies on the workers (triqdef_jax, in the home directory)
#   -r TIMES          starts at most that often again after exit code 42 (20)
#   --dry-run         print what would be run, and stop
#
# Runs as long as the training does: start it in tmux, best on a machine in the zone. Ctrl-C or SIGTERM stops all
# workers, which save first. The same command continues. Exit code: of the first worker that ended with another than 0.
set -euo pipefail

usage() {
  echo "error: $1; usage: bash launch/tpu_vm.sh -t NAME -z ZONE -n WORKERS [-p PROJECT] [-C DIRECTORY] [-r TIMES]" \
    "[--dry-run] -- PROGRAM [ARGUMENT...]" >&2
  exit 2
}

name="" zone="" project="" workers="" directory=triqdef_jax times=20 dry_run=false
while (($#)) && [[ "$1" == -* ]]; do
  case "$1" in
    --) shift && break ;;
    --dry-run) dry_run=true && shift && continue ;;
    -[tznpCr]) [[ $# -gt 1 ]] || usage "$1 needs a value" ;;
    *) usage "unknown option $1" ;;
  esac
  case "$1" in
    -t) name="$2" ;;
    -z) zone="$2" ;;
    -n) workers="$2" ;;
    -p) project="$2" ;;
    -C) directory="$2" ;;
    -r) times="$2" ;;
  esac
  shift 2
done
[[ -n "$name" && -n "$zone" ]] || usage "-t NAME and -z ZONE are needed"
[[ "$workers" =~ ^[1-9][0-9]*$ ]] || usage "-n must be the number of workers, got '$workers'"
[[ "$times" =~ ^[0-9]+$ ]] || usage "-r must be a number of times, got '$times'"
(($#)) || usage "no program given"

# gcloud hands --command to a shell on every worker, so each word is quoted. Where a connection breaks (exit code 255) it
# starts the command again, up to ten times: the file keeps a second process from joining the first.
# shellcheck disable=SC2016 # expanded on the workers
pid_file='"${TMPDIR:-/tmp}/triqdef_jax.pid"'
start="cd $(printf %q "$directory")"
start+=" && if kill -0 \$(cat $pid_file 2>/dev/null) 2>/dev/null; then echo 'error: a run is alive on this worker' >&2; exit 1; fi"
start+=" && echo \$\$ >$pid_file && exec$(printf ' %q' "$@" --distributed=on "--expect_processes=$workers")"
stop="kill -TERM \$(cat $pid_file)"
ssh_all=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"} --worker=all)

if "$dry_run"; then
  echo "${ssh_all[*]} --command=${start@Q}"
  exit
fi
if ! command -v gcloud >/dev/null; then
  echo "error: no gcloud here, see https://cloud.google.com/sdk/docs/install" >&2
  exit 2
fi

await() { # $1: process; its exit code, whatever signals end a wait early
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1"
}

is_stopped=false
# shellcheck disable=SC2317 # called by traps
stop_all() {
  is_stopped=true
  echo "tpu_vm.sh: stopping all workers; they save first" >&2
  "${ssh_all[@]}" --command="$stop" </dev/null >&2 || true
}
trap stop_all TERM INT HUP

for ((restarts = 0; ; restarts++)); do
  "${ssh_all[@]}" --command="$start" </dev/null & # behind &, so that Ctrl-C leaves it alone until its workers have saved
  code=0
  await "$!" || code=$?
  if ((code != 42)) || "$is_stopped"; then
    exit "$code"
  fi
  if ((restarts == times)); then
    echo "tpu_vm.sh: preempted $((times + 1)) times, giving up; the same command continues" >&2
    exit 42
  fi
  echo "tpu_vm.sh: preempted after saving, starting again ($((restarts + 1)) of at most $times)" >&2
done
