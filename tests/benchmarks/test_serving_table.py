"""The table of stock vLLM against ours: what is started, what is asked, and what is missing."""

import json
import threading
from pathlib import Path

import pytest
from json_server import JsonHandler, serving

from benchmarks import serving_table
from benchmarks.decode import BASELINE, OURS
from benchmarks.gpu_shares import Load, cache_bytes, memory_flags, stages
from benchmarks.paired_servers import Asker
from benchmarks.table_lines import LINES, Sizes
from benchmarks.table_pairs import default_pairs, parse_pair, plan_of
from benchmarks.unweighted import BF16, write_unweighted
from checkpoint.faults import BadInput
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.memory import cache_of

MIB = 2**20
H100 = cuda_device([Gpu((9, 0), "H100", 81559 * MIB, 81079 * MIB)])
H200 = cuda_device([Gpu((9, 0), "H200", 143771 * MIB, 143100 * MIB)])


class Chat(JsonHandler):
    """Answers at once, as vLLM does; a prompt of 13 tokens is refused."""

    def do_GET(self):
        self.send(200, {"data": [{"id": "stub"}]})

    def do_POST(self):
        body = self.request_body()
        if "messages" in body:
            usage = {"choices": [], "usage": {"prompt_tokens": 77}}
            said = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
            lines = [f"data: {json.dumps(event)}\n" for event in (said, usage)]
            self.send(200, "".join(lines))
        elif len(body["prompt"]) == 13:
            self.send_error(400)
        else:
            threading.Event().wait(0.002 * body["max_tokens"])
            tokens = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self.send(200, {"usage": tokens})


@pytest.fixture
def stub(monkeypatch):
    """Stub servers in the place of vLLM's; returns the names that were started together."""
    starts = []

    class Stubs:
        def __init__(self, settings, environment):
            self.askers, self.failed = {}, {}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def start(self, sides, seconds):
            starts.append([side.name for side in sides])
            for side in sides:
                if "broken" in side.flags:
                    self.failed[side.name] = "vLLM ended"
                else:
                    self.askers[side.name] = Asker(server.url)

        def stop(self, names):
            for name in names:
                self.askers.pop(name)

    environment = ServeEnvironment(Path("python"), (0, 33, 0), CPU, "0.2.0")
    monkeypatch.setattr(serving_table, "Servers", Stubs)
    monkeypatch.setattr(serving_table, "find_environment", lambda: environment)
    with serving(Chat) as server:
        yield starts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The 12B without weights, in two formats."""
    folder = tmp_path_factory.mktemp("models")
    for format in (BF16, "fp8"):
        write_unweighted(folder / format, format)
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of a second that can be looped."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            picture = np.full((64, 64, 3), 20 * number, np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        target.mux(stream.encode())
    return path


SMALL = (
    "--clip-seconds 1 --clips-seconds 1 --clips 2 --pages 1 --pages-at-once 1 --at-once 2 "
    "--decode-tokens 8 --repeats 1"
).split()


def command(models, film, out, *more):
    return serving_table.run([str(models), str(film), "--json", str(out), *SMALL, *more])


def written(out):
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_line_is_measured_and_a_server_that_is_needed_goes_on_running(
    stub, models, film, tmp_path
):
    out = tmp_path / "table.json"
    pairs = ["--pairs", "fp8:0.75", "fp8:0.75/bf16:0"]
    assert command(models, film, out, *pairs, "--long-tokens", "12") == 0
    table = written(out)["table"]
    assert list(table) == ["fp8, EVS 0.75", "fp8, EVS 0.75, against bf16, EVS 0"]
    assert set(table["fp8, EVS 0.75"]) == {line.title for line in LINES.values()}
    clip = table["fp8, EVS 0.75, against bf16, EVS 0"]["first token of a clip, s"]
    assert clip["prompt_tokens"] == {BASELINE: 77, OURS: 77}
    assert clip["ratio"]["median"] > 0
    assert stub == [["stock fp8, EVS 0.75", "ours fp8, EVS 0.75"], ["stock bf16, EVS 0"]]


def test_what_fails_is_named_and_the_same_command_measures_only_that(stub, models, film, tmp_path):
    out = tmp_path / "table.json"
    asked = ["--pairs", "fp8:0", "--lines", "clip,long", "--long-tokens", "13"]
    assert command(models, film, out, *asked) == 1
    cells = written(out)["table"]["fp8, EVS 0"]
    assert cells["first token of a long prompt, s"].startswith(
        "not measured: the server answered 400"
    )
    assert "ratio" in cells["first token of a clip, s"]
    first = cells["first token of a clip, s"]
    assert command(models, film, out, *asked, "--seconds", "1") == 1
    cells = written(out)["table"]["fp8, EVS 0"]
    assert cells["first token of a clip, s"] == first
    assert cells["first token of a long prompt, s"] == "not measured: no time left"
    assert len(stub) == 1


def test_a_server_that_does_not_start_is_named(stub, models, film, tmp_path):
    out = tmp_path / "table.json"
    asked = ["--pairs", "bf16:0", "--lines", "clip", "--vllm", "broken"]
    assert command(models, film, out, *asked) == 1
    (cell,) = written(out)["table"]["bf16, EVS 0"].values()
    assert cell == "not measured: stock bf16, EVS 0 did not start: vLLM ended"


def plan(models, device, pairs, lines=LINES):
    environment = ServeEnvironment(Path("python"), (0, 33, 0), device, "0.2.0")
    wanted = [parse_pair(word) for word in pairs]
    keys = [LINES[key] for key in lines]
    return plan_of(wanted, keys, Sizes(), models, Path("/media"), [], {}, environment)


def flag(side, name):
    return side.flags[side.flags.index(name) + 1]


def test_the_servers_of_a_stage_fit_the_gpu(models):
    found = plan(models, H100, ["fp8:0.75", "fp8:0.75/bf16:0", "bf16:0"])
    for stage in found.stages:
        names = {name for pair in stage for name in pair.servers.values()}
        shares = [float(flag(found.sides[name], "--gpu-memory-utilization")) for name in names]
        assert sum(shares) < 0.98
    assert list(found.too_large) == ["bf16, EVS 0: decode of many, tokens/s"]
    larger = plan(models, H200, ["fp8:0.75", "fp8:0"])
    assert [len(stage) for stage in larger.stages] == [2]
    assert not larger.too_large


def test_stock_has_the_posts_flags_and_sees_what_ours_sees(models):
    found = plan(models, H100, ["fp8:0.5"])
    stock, ours = found.sides["stock fp8, EVS 0.5"], found.sides["ours fp8, EVS 0.5"]
    assert stock.is_plain
    assert flag(stock, "--quantization") == "modelopt"
    assert flag(stock, "--video-pruning-rate") == "0.5"
    assert json.loads(flag(stock, "--media-io-kwargs"))["video"]["num_frames"] == 128
    assert ours.settings == {"video.pruning_rate": "0.5"}
    pools = {flag(side, "--kv-cache-memory-bytes") for side in (stock, ours)}
    assert len(pools) == 1


def test_lines_without_a_rate_are_asked_once_a_format(models):
    found = plan(models, H200, ["fp8:0.75", "fp8:0"])
    assert len(found.lines["fp8, EVS 0.75"]) == len(LINES)
    assert [line.key for line in found.lines["fp8, EVS 0"]] == ["clip", "clips"]


def test_one_sequence_of_full_length_always_fits(full12b):
    cache = cache_of(full12b)
    assert cache.longest(cache_bytes(full12b, [])) > full12b.max_length
    many = cache_bytes(full12b, [Load(64, 288)])
    assert cache.sequences(many, 288) > 64


def test_groups_share_a_stage_while_they_fit():
    sizes = {"a": 3, "b": 3, "c": 2, "d": 5}
    assert stages([["a", "b"], ["b", "c"], ["c", "d"]], sizes, 8) == [[0, 1], [2]]
    assert stages([["a", "b"], ["b", "c"]], sizes, 0) == [[0], [1]]
    assert memory_flags(CPU, 1e9, 5) == []


def test_words_that_are_no_pairs_or_lines_are_refused(models, film, tmp_path):
    assert len(default_pairs()) == 13
    for word in ("fp8", "int4:0", "fp8:1", "fp8:0/bf16", "fp8:x"):
        with pytest.raises(BadInput, match="--pairs"):
            parse_pair(word)
    with pytest.raises(BadInput, match="--lines: has 'audio'"):
        command(models, film, tmp_path / "x.json", "--lines", "audio")
