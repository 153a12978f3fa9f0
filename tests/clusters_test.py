"""Launchers of several processes: what they start, when they start it again, how they end. Where there is no cloud and no
cluster, gcloud and srun are stand-ins that start two real processes here; JAX connects them as it would there."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLLECTIVE = [sys.executable, str(ROOT / "tests" / "collective_example.py")]
NOTE = """it's "a  note" & $more"""
SUM = f"21 from 2 processes, 2 devices; note {NOTE!r}"  # 10 + 11, from one device each

# A process: notes its words, says that it runs, and then, by its first word, ends with the next of the codes in $CODES (the
# last for ever), waits for a signal, or, as number 1, kills itself. It ends after a minute at the latest.
PROCESS = """#!/usr/bin/env bash
rank="${JAX_PROCESS_ID:-${SLURM_PROCID:-}}"
trap 'exit 42' TERM
trap 'exit 130' INT
printf '%s\\n' "${http_proxy:-}" "$@" >"$NOTES/words.$rank"
echo start >>"$NOTES/starts.$rank"
echo "process $$ runs"
if [[ "$1" == codes ]]; then
  read -ra codes <<<"$CODES"
  start="$(wc -l <"$NOTES/starts.$rank")"
  exit "${codes[start <= ${#codes[@]} ? start - 1 : -1]}"
fi
[[ "$1 $rank" == "die 1" ]] && kill -KILL $$
for _ in {1..60}; do read -r -t 1 <> <(:); done # a signal just before a read waits for its end
"""

# Stands for gcloud and srun: notes its words, starts the command twice, ends with the higher exit code. On SIGTERM it does
# what Slurm does: passes it to the processes.
STARTER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$NOTES/$(basename "$0")"
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
case "$0" in
  *gcloud) for word; do [[ "$word" == --command=* ]] && command="${word#--command=}"; done; set -- bash -c "$command" ;;
  *srun) while [[ "$1" == --* ]]; do shift; done ;;
esac
for rank in 0 1; do
  mkdir -p "$NOTES/tmp.$rank"
  export TMPDIR="$NOTES/tmp.$rank" SLURM_PROCID="$rank" SLURM_LOCALID="$rank"
  ${JAX_NUM_PROCESSES:+env JAX_PROCESS_ID=$rank} "$@" &
  pids+=("$!")
done
highest=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  code=0; wait "$pid" || code=$?
  ((code > highest)) && highest="$code"
done
exit "$highest"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$*" >>"$NOTES/scontrol"\n'


def free_port(low, high):
    for _ in range(100):
        port = random.randrange(low, high)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise AssertionError(f"no free port in {low}..{high}")


@pytest.fixture
def started(tmp_path):
    """Return a function that starts a launcher among stand-ins, which leave their notes in `tmp_path`."""
    for name, text in {"process": PROCESS, "gcloud": STARTER, "srun": STARTER, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    running = []
    # A program started in the background may have been told to ignore these, and its children would be too.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}

    def start(script, *words, **env):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "XLA_"))}
        paths = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NOTES": str(tmp_path)}
        process = subprocess.Popen(
            ["bash", ROOT / "launch" / script, *words],
            cwd=tmp_path,
            env={**inherited, **paths, "JAX_PLATFORMS": "cpu", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(process):
    """Return (exit code, stdout, stderr) of a launcher."""
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def wait_until_both_run(process):
    """Return the ids of its two processes; what they print first has then been read."""
    return [int(process.stdout.readline().split()[-2]) for _ in range(2)]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_local_connects_two_processes_of_two_devices_and_numbers_what_they_print(started):
    code, stdout, stderr = ended(started("local.sh", "-n", "2", "-d", "2", "--", *COLLECTIVE, f"--note={NOTE}"))
    assert code == 0, stderr
    assert f"[0] 42 from 2 processes, 4 devices; note {NOTE!r}\n" in stdout


@pytest.mark.parametrize("sent, code", [("TERM", 42), ("HUP", 42), ("INT", 130)])
def test_local_passes_signals_on_and_ends_with_the_code_of_its_processes(started, sent, code):
    process = started("local.sh", "-n", "2", "--", "process", "wait")
    pids = wait_until_both_run(process)
    process.send_signal(getattr(signal, f"SIG{sent}"))
    found, _, stderr = ended(process)
    assert found == code and not any(map(is_alive, pids))
    assert stderr.count("\n") == (code != 42), stderr  # preemption is nothing to report


def test_local_kills_the_others_when_a_process_dies_and_says_which_did(started):
    process = started("local.sh", "-n", "2", "-k", "0", "--", "process", "die")
    pids = wait_until_both_run(process)
    code, _, stderr = ended(process)
    assert code == 128 + signal.SIGKILL and not any(map(is_alive, pids))
    assert stderr == "local.sh: process 1 of 2 was killed by SIGKILL; ending the others\n"


def test_local_starts_processes_with_their_words_and_without_proxies(started, tmp_path):
    process = started("local.sh", "-n", "2", "--", "process", "codes", NOTE, CODES="3", http_proxy="http://proxy")
    code, _, stderr = ended(process)
    assert code == 3 and "ended with exit code 3" in stderr and stderr.count("\n") == 1
    for rank in range(2):
        words = (tmp_path / f"words.{rank}").read_text().splitlines()
        assert words == ["", "codes", NOTE, "--distributed=on", "--expect_processes=2"]


@pytest.mark.parametrize(
    "script, words, said",
    [
        ("local.sh", ["--", "true"], "-n must be a number of processes, got ''"),
        ("local.sh", ["-n", "2", "-d", "x", "--", "true"], "-d must be a number of devices, got 'x'"),
        ("local.sh", ["-n", "2"], "no program given"),
        ("local.sh", ["-n", "2", "--", "no-such-program"], "no such program: no-such-program"),
        ("local.sh", ["-m"], "unknown option -m"),
        ("tpu_vm.sh", ["-n", "4", "--", "true"], "-t NAME and -z ZONE are needed"),
        ("tpu_vm.sh", ["-t", "pod", "-z", "here", "--", "true"], "-n must be the number of workers, got ''"),
        ("tpu_vm.sh", ["-t", "pod", "-z", "here", "-n", "4"], "no program given"),
        ("tpu_vm.sh", ["-t", "pod", "--dryrun"], "unknown option --dryrun"),
        ("slurm.sbatch", [], "no program given"),
        ("slurm.sbatch", ["true"], "this is no Slurm job: submit it with sbatch"),
    ],
)
def test_launchers_refuse_bad_usage_in_one_line(started, script, words, said):
    code, stdout, stderr = ended(started(script, *words))
    assert code == 2 and stdout == ""
    assert stderr.startswith("error: ") and said in stderr and stderr.count("\n") == 1


TPU = ["-t", "pod", "-z", "us-east5-a", "-n", "2", "-C", "."]
DRY_RUN = r"""gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --project=mine --worker=all --command='cd triqdef_jax && if kill -0 $(cat "${TMPDIR:-/tmp}/triqdef_jax.pid" 2>/dev/null) 2>/dev/null; then echo '\''error: a run is alive on this worker'\'' >&2; exit 1; fi && echo $$ >"${TMPDIR:-/tmp}/triqdef_jax.pid" && exec python -m triqdef_jax.train --config=configs/imagenet.py:pod --workdir=/mnt/two\ words --distributed=on --expect_processes=64'
"""  # noqa: E501


def test_tpu_vm_prints_what_it_would_run_and_runs_nothing(started, tmp_path):
    words = ["-t", "pod", "-z", "us-east5-a", "-p", "mine", "-n", "64", "--dry-run", "--"]
    program = ["python", "-m", "triqdef_jax.train", "--config=configs/imagenet.py:pod", "--workdir=/mnt/two words"]
    code, stdout, stderr = ended(started("tpu_vm.sh", *words, *program))
    assert (code, stdout, stderr) == (0, DRY_RUN, "")
    assert not (tmp_path / "gcloud").exists()


def test_tpu_vm_connects_all_workers_and_words_survive_two_shells(started):
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port(20000, 32000)}", "JAX_NUM_PROCESSES": "2"}
    code, stdout, stderr = ended(started("tpu_vm.sh", *TPU, "--", *COLLECTIVE, f"--note={NOTE}", **address))
    assert code == 0, stderr
    assert f"{SUM}\n" in stdout


@pytest.mark.parametrize(
    "codes, times, code, starts",
    [("42 42 0", "20", 0, 3), ("42 1", "20", 1, 2), ("2", "20", 2, 1), ("42", "1", 42, 2)],
)
def test_tpu_vm_starts_preempted_workers_again_and_no_others(started, tmp_path, codes, times, code, starts):
    process = started("tpu_vm.sh", *TPU, "-r", times, "--", "process", "codes", CODES=codes)
    found, _, stderr = ended(process)
    assert found == code
    for rank in range(2):
        assert (tmp_path / f"starts.{rank}").read_text().count("start") == starts
    assert stderr.count("starting again") == starts - 1
    assert ("giving up" in stderr) == (code == 42)


def test_tpu_vm_stops_its_workers_when_it_is_stopped_and_starts_none_again(started, tmp_path):
    process = started("tpu_vm.sh", *TPU, "--", "process", "wait")
    pids = wait_until_both_run(process)
    process.send_signal(signal.SIGTERM)
    code, _, stderr = ended(process)
    assert code == 42 and not any(map(is_alive, pids))
    assert stderr == "tpu_vm.sh: stopping all workers; they save first\n"
    assert (tmp_path / "starts.0").read_text().count("start") == 1


def test_tpu_vm_starts_nothing_beside_a_run_that_is_alive(started, tmp_path):
    for rank in range(2):
        (tmp_path / f"tmp.{rank}").mkdir()
        (tmp_path / f"tmp.{rank}" / "triqdef_jax.pid").write_text(f"{os.getpid()}\n")
    code, _, stderr = ended(started("tpu_vm.sh", *TPU, "--", "process", "wait"))
    assert code == 1 and not (tmp_path / "starts.0").exists()
    assert stderr == "error: a run is alive on this worker\n" * 2


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost"}


def test_slurm_tasks_find_each_other_by_what_slurm_tells_them(started):
    # JAX takes the coordinator's port from the number of the job.
    job = {**SLURM, "SLURM_JOB_ID": str(free_port(61440, 65536) - 61440)}
    code, stdout, stderr = ended(started("slurm.sbatch", *COLLECTIVE, f"--note={NOTE}", **job))
    assert code == 0, stderr
    assert f"{SUM}\n" in stdout


def test_a_slurm_job_whose_tasks_got_sigterm_goes_back_to_the_queue(started, tmp_path):
    job = {**SLURM, "SLURM_CPUS_PER_TASK": "8", "http_proxy": "http://proxy"}
    process = started("slurm.sbatch", "process", "wait", NOTE, **job)
    pids = wait_until_both_run(process)
    for pid in pids:  # Slurm signals the tasks and leaves the batch script alone
        os.kill(pid, signal.SIGTERM)
    code, _, stderr = ended(process)
    assert code == 42 and "job 7 goes back to the queue" in stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    asked = ["--ntasks=2", "--cpus-per-task=8", "--kill-on-bad-exit=0", "--label", "process", "wait", NOTE]
    added = ["--distributed=on", "--expect_processes=2"]
    assert (tmp_path / "srun").read_text().splitlines() == [*asked, *added]
    assert (tmp_path / "words.0").read_text().splitlines()[0] == ""  # no proxy


@pytest.mark.parametrize("codes, restarts, said", [("1", "0", ""), ("0", "0", ""), ("42", "100", "giving up")])
def test_other_slurm_jobs_do_not_go_back_to_the_queue(started, tmp_path, codes, restarts, said):
    process = started("slurm.sbatch", "process", "codes", CODES=codes, SLURM_RESTART_COUNT=restarts, **SLURM)
    code, _, stderr = ended(process)
    assert code == int(codes) and said in stderr and bool(stderr) == bool(said)
    assert not (tmp_path / "scontrol").exists()


def test_slurm_refuses_another_number_of_processes_than_of_gpus(started, tmp_path):
    code, _, stderr = ended(started("slurm.sbatch", "process", "wait", **SLURM, SLURM_GPUS_ON_NODE="8"))
    assert code == 2 and "pass --ntasks-per-node=8" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "srun").exists()


def test_slurm_is_asked_to_signal_the_tasks_in_time_and_to_survive_nodes():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = lines.index("set -euo pipefail")
    assert {"#SBATCH --signal=TERM@180", "#SBATCH --requeue"} <= set(options)
    assert all(lines.index(option) < first_command for option in options)  # Slurm reads no further
