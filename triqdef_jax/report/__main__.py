"""Show results: `python -m triqdef_jax.report --workdirs=runs/digits[,runs/OTHER] [--out=report.html]`.

Writes one HTML file that opens from disk without a network, on a desk, a phone or paper, and the same tables beside it as Markdown (.md) and
LaTeX (.tex). Reads `<workdir>/results/*.json`, the pictures there and `metrics.jsonl`, and measures nothing; what is missing is listed with the
command that makes it.
"""

import pathlib

from absl import flags

from triqdef_jax import entry, files
from triqdef_jax.report import page, plaintext, records


def main(argv):
    del argv
    options = flags.FLAGS
    if not options.workdirs:
        raise entry.UserError("--workdirs=DIR[,DIR] is needed: the directories of evaluated runs")
    out = pathlib.Path(options.out)
    if out.suffix != ".html":
        raise entry.UserError(f"--out: expected a name that ends in .html, got {options.out}")
    with entry.user_errors():
        runs = records.read_runs(options.workdirs)
        texts = {".html": page.render(runs), ".md": plaintext.markdown(runs), ".tex": plaintext.latex(runs)}
        for suffix, text in texts.items():
            with files.atomic_open(out.with_suffix(suffix)) as file:
                file.write(text.encode())
    print(f"written: {out}, {out.with_suffix('.md')}, {out.with_suffix('.tex')}")
    for what, command in records.missing(runs):
        print(f"not made yet: {what}: {command}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Directories of evaluated runs.")
    flags.DEFINE_string("out", "report.html", "The HTML file; .md and .tex are written beside it.")
    entry.run_program(main)
