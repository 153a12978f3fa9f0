"""Every example of docs/attacks.md runs on a plain function and 8-px images, and every attack has one."""

import pathlib
import re

import jax
import numpy as np
import pytest

from triqdef_jax import attacks

PAGE = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "attacks.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WEIGHTS = np.random.default_rng(0).normal(size=(8 * 8 * 3, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(size=(96, 8, 8, 3)).astype(np.float32)
LABELS = (IMAGES.reshape(96, -1) @ WEIGHTS).argmax(axis=1).astype(np.int32)  # right before the attack, all of them


def linear_logits(images):
    return images.reshape(images.shape[0], -1) @ WEIGHTS


@pytest.fixture(autouse=True)
def careless_compilation():
    """What the numbers are is tested elsewhere, so programs are compiled in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.sub(r"\W+", " ", code)[:30])
def test_an_example_runs_as_it_stands_and_its_patches_succeed(code, capsys):
    assert len(code.splitlines()) <= 5
    names = dict(jax=jax, attacks=attacks, key=jax.random.key(0), logits_fn=linear_logits, images=IMAGES, labels=LABELS)
    exec(compile(code, "docs/attacks.md", "exec"), names)
    patch, info = names["patch"], names["info"]
    assert np.all((np.asarray(patch.values) >= 0) & (np.asarray(patch.values) <= 1))
    success = info["success"]["asr_correct"].rate.max() if isinstance(info["success"], dict) else info["success"].mean()
    assert 0.0 < success <= 1.0
    assert capsys.readouterr().out or "logits" in names


def test_the_page_shows_every_attack():
    shown = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^## .*$", PAGE, re.MULTILINE))))
    assert set(attacks.ATTACKS) <= shown
    for name in attacks.ATTACKS.keys() - {"grey", "noise"}:  # two controls like the third
        assert f'get("{name}")' in PAGE
