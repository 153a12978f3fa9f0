"""Collectives are found and weighed in the text of compiled programs, as CPUs, GPUs and TPUs print it."""

import pytest

from triqdef_jax import collectives
from triqdef_jax.collectives import Collective

# Every way in which XLA prints them: plain; combined, with comments inside the type; asynchronous; tiled layouts; types before operands.
TEXT = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0), metadata={op_name="weights"}
  %q = bf16[4,2]{1,0:T(8,128)(2,1)} convert(%p)
  %flag = pred[] constant(true)
  %all-reduce.1 = f32[8]{0:T(128)} all-reduce(%p), channel_id=1, to_apply=%add, metadata={op_name="jit(step)/norm/reduce_sum"}
  %all-reduce.2 = (f32[8]{0}, bf16[4,2]{1,0}, /*index=2*/pred[]) all-reduce(%p, %q, /*index=2*/%flag), to_apply=%add
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8]{0:T(128)} %p), dimensions={0}
  %done = f32[64]{0} all-gather-done((f32[8]{0}, f32[64]{0}) %start)
  %moved = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %moved-done = f32[8]{0} collective-permute-done(%moved)
  %element = bf16[4,2]{1,0} get-tuple-element(%all-reduce.2), index=1
  ROOT %scattered = f32[1]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
"""


def test_every_collective_is_counted_once_with_what_a_device_hands_in():
    weights, narrow = ("f32", (8,)), ("bf16", (4, 2))
    assert collectives.find(TEXT) == [
        Collective("all-reduce", (weights,), "jit(step)/norm/reduce_sum"),
        Collective("all-reduce", (weights, narrow, ("pred", ()))),
        Collective("all-gather", (weights,)),
        Collective("collective-permute", (weights,)),
        Collective("reduce-scatter", (weights,)),
    ]


def test_bytes_add_up_by_kind():
    summary = collectives.summarize(collectives.find(TEXT))
    assert list(summary) == ["all-reduce", "all-gather", "reduce-scatter", "collective-permute"]
    assert summary["all-reduce"] == {"count": 2, "bytes": 32 + (32 + 16 + 1), "largest_bytes": 49}
    assert summary["all-gather"] == {"count": 1, "bytes": 32, "largest_bytes": 32}


@pytest.mark.parametrize(
    ("array", "num_bytes"),
    [(("f32", ()), 4), (("bf16", (3, 5)), 30), (("s4", (3,)), 2), (("f8e4m3fn", (7,)), 7), (("c64", (2,)), 16)],
)
def test_bytes_of_an_array_follow_from_its_type_and_shape(array, num_bytes):
    assert collectives.array_bytes(array) == num_bytes


def test_a_program_of_one_device_sends_nothing():
    assert collectives.find("ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}") == []
