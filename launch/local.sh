#!/usr/bin/env bash
# N processes of one program on this machine, connected through JAX; the program is any of triqdef_jax.
#
#   bash launch/local.sh -n 2 -d 4 -- python -m triqdef_jax.train --config=configs/digits.py
#
#   -n N  processes. --distributed=on --expect_processes=N is added to the arguments of each
#   -d D  compute on the CPU, D devices per process; without it process i takes the machine's i-th GPU
#   -k S  seconds after which the others are killed when one has died (5)
#
# Lines are prefixed by the number of the process. SIGTERM and SIGINT go to all of them. Exit code: that of the first
# process that ended with another one than 0; so 42 says that the run was preempted and saved.
set -euo pipefail

usage() {
  echo "error: $1; usage: bash launch/local.sh -n N [-d DEVICES_PER_PROCESS] [-k SECONDS] -- PROGRAM [ARGUMENT...]" >&2
  exit 2
}

processes="" devices="" patience_s=5
while getopts ":n:d:k:" option; do
  case "$option" in
    n) processes="$OPTARG" ;;
    d) devices="$OPTARG" ;;
    k) patience_s="$OPTARG" ;;
    :) usage "-$OPTARG needs a value" ;;
    *) usage "unknown option -$OPTARG" ;;
  esac
done
shift $((OPTIND - 1))
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || usage "-n must be a number of processes, got '$processes'"
[[ "$devices" =~ ^([1-9][0-9]*)?$ ]] || usage "-d must be a number of devices, got '$devices'"
[[ "$patience_s" =~ ^[0-9]+$ ]] || usage "-k must be a number of seconds, got '$patience_s'"
(($#)) || usage "no program given"
command -v -- "$1" >/dev/null || usage "no such program: $1"

free_port() { # below 32768, where outgoing connections get none
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null || { echo "$port" && return; }
  done
  echo "error: found no free port on this machine" >&2
  return 1
}

port="$(free_port)"
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY grpc_proxy # processes would not meet behind one
export JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes"
if [[ -n "$devices" ]]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices"
fi

scratch="$(mktemp -d)"
mkfifo "$scratch/events"
exec 3<>"$scratch/events"
pids=() # of the running processes, by rank; each leads a group that holds its data workers too
prefixers=()
asked="" # the signal that was passed on last, also to processes that start later

# shellcheck disable=SC2317 # called by traps
pass_on() { # not to their workers, which a process needs until it has saved
  asked="$1"
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2>/dev/null || true
  done
}
kill_groups() {
  local pid
  for pid in "$@"; do
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}
trap 'kill_groups "${pids[@]}"; rm -rf "$scratch"' EXIT
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

prefix() { # lines of process $1; it outlives signals, because what processes say last matters most
  trap '' TERM HUP INT
  exec sed -u "s/^/[$1] /"
}

run_rank() { # waits for one process and tells how it ended; in a subshell of its own
  trap : TERM HUP INT # sent to the whole job, as timeout does; processes get theirs from pass_on
  if [[ -z "$devices" ]]; then export JAX_LOCAL_DEVICE_IDS="$rank"; fi
  # bash lets what runs behind & ignore SIGINT; env undoes that
  JAX_PROCESS_ID="$rank" setsid env --default-signal=INT,QUIT "$@" --distributed=on --expect_processes="$processes" \
    </dev/null >"$scratch/$rank.out" 2>"$scratch/$rank.err" 3>&- &
  echo "started $rank $!" >&3
  local code=0
  while kill -0 "$!"; do wait "$!" || true; done # a signal ends a wait early
  wait "$!" || code=$?
  echo "ended $rank $code" >&3
}

for ((rank = 0; rank < processes; rank++)); do
  mkfifo "$scratch/$rank.out" "$scratch/$rank.err"
  prefix "$rank" <"$scratch/$rank.out" &
  prefixers+=("$!")
  prefix "$rank" <"$scratch/$rank.err" >&2 &
  prefixers+=("$!")
  run_rank "$@" 2>/dev/null & # bash's own remarks about killed children
done

describe() { # $1: exit code
  if (($1 > 128)) && kill -l "$1" >/dev/null 2>&1; then
    echo "was killed by SIG$(kill -l "$1")"
  else
    echo "ended with exit code $1"
  fi
}

first=0 running="$processes" waited_s=0
next_event() { # wakes up every second: a signal that comes just before read blocks is else handled when read ends
  until read -r -t 1 event rank value <&3; do
    if ((first != 0 && first != 42 && ++waited_s > patience_s)); then
      kill_groups "${pids[@]}" # they wait for a process that is no more, or have not yet noticed
    fi
  done
}

while ((running)); do
  next_event
  if [[ "$event" == started ]]; then
    pids[rank]="$value"
    [[ -z "$asked" ]] || kill "-$asked" "$value" 2>/dev/null || true
    continue
  fi
  kill_groups "${pids[rank]}" # workers that outlive their process hold its output open
  unset "pids[rank]"
  running=$((running - 1))
  if ((first == 0 && value != 0)); then
    first="$value"
    if ((first != 42)); then
      echo "local.sh: process $rank of $processes $(describe "$value"); ending the others" >&2
    fi
  fi
done
wait "${prefixers[@]}"
exit "$first"
