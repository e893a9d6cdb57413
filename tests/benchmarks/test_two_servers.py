"""Two servers compared: what each is started with, what is timed, and what the ratios are."""

import argparse
import contextlib
import time
from pathlib import Path

import pytest
from editing import edit_json
from json_server import JsonHandler, serving

from benchmarks import decode, plain_vllm
from benchmarks.decode import BASELINE, OURS, decode_rate, in_turn, numbers, pairs, sides_of
from benchmarks.paired_servers import Asker, Servers, Side, plain_command, random_prompts
from benchmarks.unweighted import write_unweighted
from checkpoint.config import read_config
from checkpoint.faults import BadInput
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.precision import precision_name
from serve.preflight import directory_faults
from serve.settings import ServeSettings
from serve.state_update import FOLDER_VARIABLE

H100 = cuda_device([Gpu((9, 0), "H100", 85e9, 84e9)])
TOKEN_SECONDS = 0.002


class Completions(JsonHandler):
    """Answers as vLLM does, after a time for the prompt and for each token."""

    def do_GET(self):
        self.send(200, {"data": [{"id": "stub"}]})

    def do_POST(self):
        body = self.request_body()
        tokens = body["max_tokens"] - self.server.missing
        time.sleep(tokens * TOKEN_SECONDS)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        self.send(200, {"usage": usage})


@pytest.fixture
def server():
    """Starts servers that take so long for a token; they end with the test."""
    with contextlib.ExitStack() as started:

        def start(missing=0):
            found = started.enter_context(serving(Completions, missing=missing))
            return Asker(found.url)

        yield start


class Fixed:
    """A server for which each token of all requests together takes so long."""

    def __init__(self, token_seconds):
        self.token_seconds = token_seconds

    def complete_all(self, prompts, tokens):
        return 2.0 + tokens * self.token_seconds


def test_the_rate_is_that_of_decoding_without_the_prompt():
    assert decode_rate(Fixed(0.1), 4, 101, 1) == pytest.approx(4 / 0.1)
    with pytest.raises(OSError, match="too busy"):
        decode_rate(Fixed(0.0), 4, 101, 1)


class Refusing(Completions):
    """Refuses every request, as vLLM does a clip with too many pixels."""

    def do_POST(self):
        self.request_body()
        self.send(400, {"error": {"message": "more than 715827880 bytes"}})


def test_the_reason_of_a_refusal_is_in_the_error():
    reason = "the server answered 400: .*more than 715827880 bytes"
    with serving(Refusing) as server, pytest.raises(OSError, match=reason):
        Asker(server.url).complete([1, 2], 3)


def test_another_number_of_tokens_than_asked_for_is_an_error(server):
    with pytest.raises(OSError, match="asked for 8 and 5 tokens"):
        server(missing=1).complete(range(20, 28), 5)


def test_ratios_are_above_one_where_ours_is_better():
    times = {BASELINE: iter([9.0, 3.0, 4.0, 6.0]), OURS: iter([9.0, 2.0, 2.0, 2.0])}
    end = time.monotonic() + 60
    found = in_turn(times, lambda runs, seed: next(runs), 3, False, end)
    assert found["runs"] == {BASELINE: [3.0, 4.0, 6.0], OURS: [2.0, 2.0, 2.0]}
    assert found["ratio"] == {"median": 2.0, "low": 1.5, "high": 3.0}
    rates = {BASELINE: iter([9.0, 10.0]), OURS: iter([9.0, 13.0])}
    found = in_turn(rates, lambda runs, seed: next(runs), 1, True, end)
    assert found["ratio"]["median"] == 1.3


def test_a_part_without_time_is_named_and_the_others_are_kept(server):
    options = argparse.Namespace(concurrency="1", prompts="8", tokens=3, repeats=1)
    kept = []
    found = decode.measure({OURS: server()}, options, time.monotonic() - 1, kept.append)
    assert set(found.values()) == {"not measured: no time left"}
    found = decode.measure({OURS: server()}, options, time.monotonic() + 60, kept.append)
    assert set(found) == {"decode at 1, tokens/s", "prefill of 8 tokens, s"}
    assert kept[-1] == found
    broken = decode.measure({OURS: server(missing=1)}, options, time.monotonic() + 60, kept.append)
    assert all("not measured: asked for" in text for text in broken.values())


def test_no_two_runs_share_a_prompt():
    prompts = [tuple(prompt) for seed in (1, 2) for prompt in random_prompts(8, 16, seed)]
    assert len(set(prompts)) == 16


def options(**changed):
    given = {
        "directory": Path("fp8"),
        "baseline": "stock",
        "baseline_dir": None,
        "concurrency": "64,1",
        "vllm": "--load-format dummy",
        "flags": "--block-size 64",
        "baseline_flags": "",
        "set": ["replayssm=true"],
        "baseline_set": [],
        "env": ["A=1=2"],
        "baseline_env": [],
        "variant": [],
    }
    return argparse.Namespace(**given | changed)


def test_stock_has_nothing_of_ours():
    baseline, (ours,) = sides_of(options(), H100)
    assert baseline.is_plain
    assert baseline.variables == {"VLLM_PLUGINS": "", FOLDER_VARIABLE: ""}
    assert baseline.flags[0] == "--trust-remote-code"
    assert "--load-format" in baseline.flags
    assert "--kv-cache-memory-bytes" in baseline.flags
    assert ours.flags[-1] == "64"
    assert not ours.is_plain
    assert (ours.settings, ours.variables) == ({"replayssm": "true"}, {"A": "1=2"})


def test_a_baseline_of_ours_has_no_flags_of_stock():
    other = options(baseline="ours", baseline_dir=Path("nvfp4"))
    baseline, _ = sides_of(other, CPU)
    flags = ("--max-num-seqs", "64", "--load-format", "dummy")
    assert baseline == Side(BASELINE, Path("nvfp4"), flags)


def test_each_variant_has_options_of_its_own():
    words = ["replay: --set replayssm=true", "half: --flags='--mamba-ssm-cache-dtype float16'"]
    _, ours = sides_of(options(variant=words, set=[], flags=""), H100)
    assert [side.name for side in ours] == ["replay", "half"]
    assert [dict(side.settings) for side in ours] == [{"replayssm": "true"}, {}]
    assert ours[1].flags[-2:] == ("--mamba-ssm-cache-dtype", "float16")
    assert "--mamba-ssm-cache-dtype" not in ours[0].flags


@pytest.mark.parametrize("word", ["replay", ": --set a=b", "baseline: ", "x: --sets a=b", "x: 'y"])
def test_a_variant_that_is_written_otherwise_is_refused(word):
    with pytest.raises(BadInput, match="--variant"):
        sides_of(options(variant=["first: --env A=1", word]), CPU)


def test_words_that_are_no_numbers_or_pairs_are_refused():
    assert numbers("64,1", "--concurrency") == [64, 1]
    assert numbers("", "--prompts") == []
    for text in ("0", "x", "1,-2"):
        with pytest.raises(BadInput, match="--concurrency"):
            numbers(text, "--concurrency")
    for word in ("NAME", "=1"):
        with pytest.raises(BadInput, match="NAME=VALUE"):
            pairs([word], "--env")


@pytest.mark.parametrize(
    ("algo", "flags"),
    [
        (None, "--trust-remote-code --video-pruning-rate 0"),
        ("FP8", "--trust-remote-code --quantization modelopt --video-pruning-rate 0"),
        ("NVFP4", "--trust-remote-code --quantization modelopt_fp4 --video-pruning-rate 0"),
    ],
)
def test_the_plain_line_is_the_posts(tiny_copy, algo, flags):
    if algo is not None:
        section = {"quant_method": "modelopt", "quant_algo": algo}
        edit_json(tiny_copy / "config.json", lambda raw: raw.update(quantization_config=section))
    found = plain_vllm.command_flags(tiny_copy)
    assert " ".join(found) == flags
    environment = ServeEnvironment(Path("python"), (0, 33, 0), H100, None)
    line = plain_command(Side("plain", tiny_copy, tuple(found)), 81, environment)
    assert line[3:] == ["serve", str(tiny_copy), "--host", "127.0.0.1", "--port", "81", *found]


@pytest.mark.parametrize(
    ("device", "variables", "threads"),
    [(H100, {}, ""), (H100, {"OMP_NUM_THREADS": "4"}, "4"), (CPU, {}, "16")],
)
def test_stock_on_a_gpu_inherits_no_number_of_threads(
    tiny, tmp_path, monkeypatch, device, variables, threads
):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "threads=<$OMP_NUM_THREADS>"\nexit 1\n')
    python.chmod(0o755)
    side = Side("plain", tiny, ("--trust-remote-code",), variables=variables, is_plain=True)
    environment = ServeEnvironment(python, (0, 33, 0), device, "0.2.1")
    with Servers(ServeSettings(), environment) as servers:
        servers.start([side])
        assert f"threads=<{threads}>" in servers.failed["plain"]


def answers(**changed):
    texts = {**plain_vllm.EXPECTED, **dict.fromkeys(plain_vllm.LONG, "the same")}
    found = {title: {"text": text, "server_lives": True} for title, text in texts.items()}
    for title, text in changed.items():
        found[title.replace("_", " ")]["text"] = text
    return found


def test_wrong_answers_count_where_they_must_be_right():
    assert plain_vllm.faults_of(answers(), True) == []
    assert plain_vllm.faults_of(answers(page="?", long_prompt_again="other"), False) == []
    faults = plain_vllm.faults_of(answers(page="?", long_prompt_again="other"), True)
    assert len(faults) == 2


def test_missing_answers_and_an_ended_server_always_count():
    found = answers()
    found["video"] = {"error": "connection lost", "server_lives": False}
    found["list"]["server_lives"] = False
    faults = plain_vllm.faults_of(found, False)
    assert faults == ["list: the server ended", "video: connection lost"]


def test_a_directory_without_weights_is_one_that_vllm_loads(tmp_path):
    out = tmp_path / "nvfp4"
    write_unweighted(out, "nvfp4")
    assert precision_name(read_config(out)) == "NVFP4"
    environment = ServeEnvironment(Path("python"), (0, 33, 0), H100, "0.2.1")
    assert directory_faults(out, environment) == []
    with pytest.raises(BadInput, match="exists already"):
        write_unweighted(out, "nvfp4")
