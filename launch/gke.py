"""Render gke_jobset.yaml: a TPU pod slice on Google Kubernetes Engine that starts again after preemption.

    python launch/gke.py --name=imagenet --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 \
        --hosts=64 --chips_per_host=4 --claim=CLAIM -- \
        python -m triqdef_jax.train --config=configs/imagenet.py:pod --workdir=/shared/runs/imagenet | kubectl apply -f -

--distributed=on --expect_processes=HOSTS is added to the command. Standard library only: it runs where kubectl does. Bad values end in one
line and exit code 2.
"""

import json
import math
import pathlib
import re
import string
import sys
from typing import NamedTuple

TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")


class Value(NamedTuple):
    """What the template takes under one name: its form, that form in words, and the default, None where there is none."""

    pattern: str
    words: str
    default: str | None = None


_COUNT = r"[1-9][0-9]*"
_NUMBERS = ("hosts", "chips_per_host", "max_restarts")  # the rest is quoted
VALUES = {
    # Kubernetes appends '-slice-0-NNN-abcde' and allows 63 characters.
    "name": Value(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "at most 40 lower-case letters, digits and dashes"),
    "namespace": Value(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a namespace of the cluster", "default"),
    "image": Value(r"\S+", "a container image with this project and its requirements"),
    "accelerator": Value(r"tpu[a-z0-9-]*", "a GKE accelerator like tpu-v5-lite-podslice"),
    "topology": Value(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", "chips per direction like 16x16"),
    "hosts": Value(_COUNT, "the number of hosts of the slice"),
    "chips_per_host": Value(_COUNT, "the number of chips of a host"),
    "claim": Value(r"[a-z0-9][a-z0-9.-]*", "a ReadWriteMany volume claim; it is mounted at /shared, for data and runs"),
    "max_restarts": Value(r"[0-9]+", "how often failures other than preemption start everything again", "10"),
    "shm_size": Value(r"[1-9][0-9]*[MG]i", "shared memory of a host like 16Gi, taken from its memory", "16Gi"),
}


def parse(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return (values by name, command) of a command line ``--name=value ... -- command``.

    Raises:
        ValueError: what was expected, what came.
    """
    if "--" not in argv or argv[-1] == "--":
        raise ValueError("no command given: put it at the end, behind ' -- '")
    end = argv.index("--")
    given = {}
    for argument in argv[:end]:
        flag, is_value, value = argument.partition("=")
        if not flag.startswith("--") or not is_value or flag[2:] not in VALUES:
            raise ValueError(f"unexpected {argument!r}: known are --{'=, --'.join(VALUES)}=")
        given[flag[2:]] = value
    return given, argv[end + 1 :]


def render(given: dict[str, str], command: list[str]) -> str:
    """Return the manifest as YAML.

    Args:
        given: values by name, see `VALUES`.
        command: program and arguments of every host.

    Raises:
        ValueError: a value is missing or not of its form, or hosts and chips do not make the topology.
    """
    values = {name: value.default for name, value in VALUES.items() if value.default is not None} | given
    for name, value in VALUES.items():
        if name not in values:
            raise ValueError(f"--{name}= is missing: {value.words}")
        if not re.fullmatch(value.pattern, values[name]):
            raise ValueError(f"--{name} must be {value.words}, got {values[name]!r}")
    chips = math.prod(map(int, values["topology"].split("x")))
    if int(values["hosts"]) * int(values["chips_per_host"]) != chips:
        raise ValueError(
            f"--topology={values['topology']} has {chips} chips, --hosts={values['hosts']} with "
            f"--chips_per_host={values['chips_per_host']} have {int(values['hosts']) * int(values['chips_per_host'])}"
        )
    command = [*command, "--distributed=on", f"--expect_processes={values['hosts']}"]
    quoted = {name: value if name in _NUMBERS else json.dumps(value) for name, value in values.items()}
    # Kubernetes expands $(NAME) in commands and reads $$( as $(.
    quoted["command"] = json.dumps([word.replace("$(", "$$(") for word in command])
    return string.Template(TEMPLATE.read_text()).substitute(quoted)


def main() -> int:
    try:
        sys.stdout.write(render(*parse(sys.argv[1:])))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
