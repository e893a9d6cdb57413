"""ReplaySSM and states of 16 bits: what is served, and how answers and texts are compared."""

import pytest

from benchmarks.state_accuracy import REFERENCE, WAYS, _ways, compared, equal_tokens, sides_of
from checkpoint.faults import BadInput
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.state_update import STATE_FLAG
from tiny.tasks import items

H100 = cuda_device([Gpu((9, 0), "H100", 85e9, 84e9)])


def test_every_way_names_the_type_of_its_state(tiny):
    sides = sides_of(tiny, list(WAYS), (), ServeEnvironment("python", (0, 33, 0), H100, "0.2.1"))
    states = {side.name: side.flags[side.flags.index(STATE_FLAG) + 1] for side in sides}
    assert states[REFERENCE] == "float32"
    assert all(state in name for name, state in states.items())
    assert {side.name for side in sides if side.settings} == {
        "ReplaySSM, float32 state",
        "ReplaySSM, float16 state",
    }


def test_a_server_on_a_cpu_gets_no_flags_of_a_gpu(tiny):
    environment = ServeEnvironment("python", (0, 32, 0), CPU, "0.2.1")
    (side,) = sides_of(tiny, [REFERENCE], ("--max-model-len", "4096"), environment)
    assert "--gpu-memory-utilization" not in side.flags


def test_the_reference_comes_first_and_unknown_ways_are_refused():
    assert _ways(None) == list(WAYS)
    assert _ways("float16 state") == [REFERENCE, "float16 state"]
    with pytest.raises(BadInput, match="has 'int8 state'"):
        _ways("float16 state; int8 state")


def test_answers_and_texts_are_compared_with_the_reference():
    samples = {"text": items("text", "test", 4)}
    right = [sample.answer for sample in samples["text"]]
    wrong = [*right[:3], "another"]
    texts = [["a", "b", "c"], ["a", "b", "c"]]
    found = {
        REFERENCE: {"answers": {"text": right}, "texts": texts},
        "float16 state": {"answers": {"text": wrong}, "texts": [texts[0], ["a", "x", "c"]]},
    }
    (row,) = compared(samples, found).values()
    assert row["differing"] == {"text": 1}
    assert row["tasks"][0]["difference"] == pytest.approx(-0.25)
    assert row["equal_tokens"] == {"median": 2.0, "least": 1}
    assert row["equal_texts"] == 1
    assert equal_tokens("ab", "abc") == 2
