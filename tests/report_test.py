"""The report as a program and a page: numbers are those of the files, words from files are escaped, mistakes are one line; in a browser too."""

import base64
import html
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import report_example as example

from triqdef_jax.report import page, plaintext, records

ROOT = pathlib.Path(__file__).resolve().parent.parent
VOID = {"meta", "img", "br"}
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1300,900", "--dump-dom",
)  # fmt: skip
# Looks into three frames that hold the report and writes what it sees to its own document.
PROBE = """
addEventListener("load", () => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const visible = [...page.querySelectorAll("td, .flagged, h1")]
      .filter(e => e.getBoundingClientRect().top < frame.height).map(e => e.innerText);
    const folded = root.scrollWidth;
    page.querySelectorAll("details").forEach(e => e.open = true);
    const boxes = [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length;
    const heat = [...page.querySelectorAll("td.heat")].map(e => getComputedStyle(e).backgroundColor);
    const images = [...page.images].map(e => e.naturalWidth);
    seen[frame.id] = {folded, open: root.scrollWidth, visible, boxes, colours: new Set(heat).size, images};
  }
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
"""


def run_report(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "triqdef_jax.report", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


class Outline(html.parser.HTMLParser):
    """Reads a page strictly: the texts of table cells by section, attributes of all tags, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.attributes, self.words, self._section, self.tags = [], {}, [], [], "", set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = dict(attributes)["id"]
        if tag == "td":
            self.cells.setdefault(self._section, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if "style" not in self.open:
            self.words.append(words)
        if "td" in self.open:
            self.cells[self._section][-1] += words


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    other = {"name": "digits-qat", "seed": 1, "factor": 1.8}
    return records.read_runs([str(example.full_run(folder / "digits")), str(example.full_run(folder / "qat", **other))])


@pytest.fixture(scope="module")
def one(runs):
    return page.render(runs[:1])


def shown(rate):
    """Return how a rate must be printed, from its counts and ends alone."""
    return (
        f"{100 * rate['num'] / rate['den']:.1f} %",
        f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]",
        f"n {rate['den']:,}",
    )


def test_the_summary_shows_every_target_of_every_run_as_recorded(runs):
    cells = [
        cell for cell in Outline(page.render(runs)).cells[""] if cell
    ]  # without the empty corners above the row heads
    evaluations = [run.records["evaluation"] for run in runs]
    fields = ("clean_accuracy", "worst", "worst_transfer")
    rows_of = lambda targets: [record[field][t] for t in targets for record in evaluations for field in fields]
    trained, others = rows_of(example.TARGETS[:5]), rows_of(example.TARGETS[5:])
    robust = [record["robust_all"][target] for target in example.TARGETS for record in evaluations]
    for cell, rate in zip(cells, trained + robust + others, strict=True):
        assert all(words in cell for words in shown(rate)), (cell, rate)


def test_the_first_screen_says_what_was_checked(runs, one):
    assert "Checked: no attack beats patch_pgd (30 pairs)." in one
    other = runs[1]._replace(records={"evaluation": runs[1].records["evaluation"] | {"checks": ["another"]}})
    both = page.render((runs[0], other))
    assert "Checked for digits: no attack" in both and f"Checked for {other.label}: another." in both


def test_the_matrix_shows_every_attack_at_every_target_with_interval_and_n(runs, one):
    cells = iter(Outline(one).cells["matrix"])
    record = runs[0].records["evaluation"]
    order = ("white-box", "adaptive", "transfer", "query", "control")
    for cell in sorted(record["cells"], key=lambda cell: order.index(cell["access"])):
        for target in record["targets"]:
            text = next(cells)
            assert all(words in text for words in shown(cell["success"][target]["asr_correct"])), (cell["name"], target)
            is_own = cell["surrogate"] == f"self:{target}" or (
                cell["attack"] == "adaptive" and target in "32 8 5 4 2".split()
            )
            assert ("white-box" in text or "own bits" in text) == is_own
    assert next(cells, None) is None


def test_all_five_success_numbers_of_every_attack_are_there(runs, one):
    texts = " ".join(Outline(one).cells["numbers"])
    for cell in runs[0].records["evaluation"]["cells"]:
        for rates in cell["success"].values():
            for name in example.NAMES:
                assert " ".join(shown(rates[name])) in texts


def test_markdown_and_latex_hold_the_same_figures_as_the_page(runs):
    markdown, latex = plaintext.markdown(runs), plaintext.latex(runs)
    assert latex.isascii()
    assert "Of 12 rates 3 differ from the base by more than its 3 seeds do" in markdown
    for run in runs:
        for cell in run.records["evaluation"]["cells"]:
            for target in example.TARGETS:
                rate, ends, n = shown(cell["success"][target]["asr_correct"])
                assert f"{rate} {ends}, {n}".replace("[", r"\[").replace("]", r"\]") in markdown
                assert f"{rate} {ends}, {n}".replace("%", r"\%") in latex


def test_the_page_is_well_formed_and_words_of_files_stay_words(one):
    outline = Outline(one)
    assert outline.open == []
    assert (
        "b&" not in outline.tags and "".join(outline.words).count(example.NASTY) == 3
    )  # threat model, caption, not run
    assert "script" not in outline.tags and not [name for name, _ in outline.attributes if name.startswith("on")]


def test_the_page_loads_nothing_and_embeds_its_pictures(one):
    links = [value for name, value in Outline(one).attributes if name in ("src", "href", "srcset", "data")]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    embedded = [base64.b64decode(link.partition(",")[2]) for link in links if link.startswith("data:")]
    assert embedded == [example.png()]
    assert "gone.png is missing" in one
    assert "url(" not in one and "@import" not in one


def test_equal_files_give_equal_bytes(runs):
    assert page.render(runs) == page.render(records.read_runs([run.workdir for run in runs]))


def test_every_anchor_of_the_page_exists(one):
    attributes = Outline(one).attributes
    targets = {value for name, value in attributes if name == "id"}
    assert {value[1:] for name, value in attributes if name == "href"} <= targets


def test_missing_kinds_are_said_with_their_commands_and_nothing_else_is_shown(tmp_path):
    workdir = example.write_run(tmp_path / "bare", {"evaluation": example.evaluation("bare")})
    text = html.unescape(page.render(records.read_runs([str(workdir)])))
    for module in ("alignment", "pictures", "sensitivity", "train"):
        assert f"python -m triqdef_jax.{module} " in text
    assert f"evaluate --workdirs={workdir} --preset=curves" in text and "--compare=OTHER" in text
    assert 'id="curves"' not in text and 'id="training"' not in text


def test_the_program_writes_three_files_and_lists_what_is_missing(tmp_path):
    example.write_run(tmp_path / "bare", {"evaluation": example.evaluation("bare")})
    done = run_report("--workdirs=bare", "--out=out/r.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["r.html", "r.md", "r.tex"]
    assert "written: out/r.html" in done.stdout and "python -m triqdef_jax.pictures --workdirs=bare" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdirs=empty"], "empty has no results to report"),
        (["--workdirs=nowhere"], "no such directory: nowhere"),
        ([], "--workdirs=DIR"),
        (["--workdirs=empty", "--out=page.txt"], "ends in .html"),
    ],
)
def test_bad_input_is_told_in_one_line_with_exit_code_2(tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    done = run_report(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_the_style_sheet_is_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "style.css" in packaged["triqdef_jax.report"]


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no browser on a CI machine, where .ci/run installs chromium")
        pytest.skip("no chromium here: apt-get install chromium")
    return program


def probe(browser, folder, frames):
    """Return what the browser sees of pages in frames: id -> (page, width, height)."""
    shown = "".join(
        f'<iframe id="{name}" width="{width}" height="{height}" srcdoc="{html.escape(text, quote=True)}"></iframe>'
        for name, (text, width, height) in frames.items()
    )
    path = folder / "probe.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{shown}<pre id="seen"></pre><script>{PROBE}</script>')
    command = [browser, *CHROMIUM_FLAGS, f"--user-data-dir={folder}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_a_browser_shows_the_answers_first_and_never_scrolls_the_page_sideways(browser, runs, one, tmp_path):
    frames = {"phone": (one, 390, 844), "two": (page.render(runs), 390, 844), "desk": (page.render(runs), 1280, 900)}
    seen = probe(browser, tmp_path, frames)
    for name, (_, width, _) in frames.items():
        assert seen[name]["folded"] <= width and seen[name]["open"] <= width, name
        assert seen[name]["colours"] > 10  # the heat map has its shades
        assert all(seen[name]["images"])
    assert seen["phone"]["boxes"] > 0  # wide tables scroll inside their boxes
    record = runs[0].records["evaluation"]
    for name in ("phone", "desk"):
        visible = " ".join(" ".join(seen[name]["visible"]).split())
        assert "transfer beats white-box" in visible
        for target in ("32", "8", "5", "4", "2"):
            for rate in (record[field][target] for field in ("clean_accuracy", "worst", "worst_transfer")):
                assert all(words in visible for words in shown(rate)), (name, target)
