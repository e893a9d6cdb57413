"""Load on a real vLLM: its clients, the media of the requests, the figures."""

import base64
import contextlib
import json
import os
import subprocess
import time

import numpy
import pytest
from commands import ROOMS
from PIL import Image

from checkpoint.faults import BadInput
from hybridquant_vllm.frames import read_clip
from serve.bench import concurrencies, run
from serve.bench_figures import percentile, ratios, summarize
from serve.bench_runs import BenchFailed, Load, Target, client_variables, write_requests
from serve.bench_servers import server_names
from serve.demo import draw_square, draw_video
from serve.environment import find_python
from serve.gpu_memory import GpuMemory, parse_rows
from serve.process import ServerDied
from serve.recorded_command import shown_command
from serve.workloads import Workload

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with two pictures, a film and something else."""
    folder = tmp_path_factory.mktemp("media")
    for colour in ("red", "blue"):
        draw_square(folder / f"{colour}.png", colour)
    draw_video(folder / "film.mp4", seconds=6)
    (folder / "notes.txt").write_text("no picture")
    return folder


def content(messages):
    """The medium of a request, as bytes."""
    part = messages[-1]["content"][0]
    url = part[part["type"]]["url"]
    return base64.b64decode(url.partition(",")[2])


def load(ttft, rate=2.0, errors=()):
    return Load(tuple(ttft), (10.0, 30.0), rate, 5 * rate, (7, 0, 9), ("a", None, "b"), errors)


# The servers


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["/runs/a/export"], ["export"]),
        (["/runs/fp8", "/runs/nvfp4"], ["fp8", "nvfp4"]),
        (["/runs/a/export", "/runs/b/export"], ["a/export", "b/export"]),
        (["/a/out/export", "/b/out/export/"], ["a/out/export", "b/out/export"]),
        (["/export", "/runs/export"], ["/export", "runs/export"]),
        (["/runs/export", "/runs/export"], ["export", "export (2)"]),
        (["/runs/export", "http://host:8000/v1"], ["export", "host:8000"]),
        (["http://host:8000", "http://host:9000"], ["host:8000", "host:9000"]),
        (["http://host/a/v1", "http://host/b/"], ["host/a", "host/b"]),
        (["http://host", "https://host"], ["http://host", "https://host"]),
    ],
)
def test_servers_have_the_shortest_names_that_tell_them_apart(targets, names):
    assert server_names(targets) == names


def test_a_relative_directory_is_named_by_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path / "export")
    assert server_names([".", "/runs/export"]) == [f"{tmp_path.name}/export", "runs/export"]


# The media


def test_no_two_requests_have_the_same_picture(media, tmp_path):
    workload = Workload("image", 4, media, tmp_path)
    found = [content(request) for request in workload.requests(0, 8)]
    assert len(set(found)) == 8
    assert workload.media == ["blue.png", "red.png"]
    for data in found:
        (tmp_path / "picture.jpg").write_bytes(data)
        with Image.open(tmp_path / "picture.jpg") as picture:
            assert 0.85 * 256 - 1 <= picture.width <= 256


def test_no_two_clips_have_the_same_frames(media, tmp_path):
    workload = Workload("video", 4, media, tmp_path)
    clips = []
    for request in workload.requests(0, 4):
        clips.append(read_clip(content(request), fps=2, max_frames=128))
    assert all(4 <= clip.total / clip.fps < 5 for clip in clips)
    assert len({clip.frames.tobytes() for clip in clips}) == 4


def test_a_mixture_has_each_kind_in_turn(media, tmp_path):
    workload = Workload("mixed", 2, media, tmp_path)
    kinds = []
    for messages in workload.requests(4, 4):
        last = messages[-1]["content"]
        kinds.append(last[0]["type"] if isinstance(last, list) else "text")
    assert kinds == ["image_url", "image_url", "video_url", "text"]


def test_a_request_depends_on_its_number_alone(media, tmp_path):
    workload = Workload("document", 2, None, tmp_path)
    assert workload.requests(3, 2)[1] == workload.request(4)


def test_a_folder_without_the_kind_is_named(media, tmp_path):
    (tmp_path / "photo.png").write_bytes((media / "red.png").read_bytes())
    with pytest.raises(BadInput, match="has no file for the workload video"):
        Workload("video", 4, tmp_path, tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(BadInput, match=r"film\.mp4: is not a film"):
        Workload("video", 4, tmp_path, tmp_path)


# The figures


def test_percentiles_are_numpys():
    values = [3.0, 1.0, 8.0, 2.0, 2.5]
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, 100 * share))


def test_times_are_over_all_repeats_and_rates_their_median():
    row = summarize("a", 4, [load([100.0, 300.0], 2), load([200.0], 6), load([900.0], 3)], None)
    assert (row.requests, row.failed) == (4, 0)
    assert row.ttft_ms_median == 250
    assert row.ttft_ms_p99 == pytest.approx(882)
    assert (row.requests_per_s, row.output_tokens_per_s) == (3, 15)
    assert row.prompt_tokens_mean == 8  # of those that were answered


def test_ratios_are_of_repeats_in_pairs():
    first = [load([100.0], 1), load([200.0], 1), load([100.0], 1)]
    second = [load([50.0], 2), load([300.0], 2), load([100.0], 3)]
    by_measure = {row.measure: row for row in ratios(8, first, second)}
    times = by_measure["ttft_ms_median"]
    assert (times.ratio, times.low, times.high) == (1, 0.5, 1.5)
    assert by_measure["requests_per_s"].ratio == 2


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a program in the place of nvidia-smi; it answers with given rows."""

    def answering(by_process, by_gpu):
        script = tmp_path / "nvidia-smi"
        choices = f"*compute-apps*) echo '{by_process}';; *) echo '{by_gpu}';;"
        script.write_text(f"#!/bin/sh\ncase $1 in {choices} esac\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return answering


@pytest.fixture
def session():
    """A process that leads a session of its own, as the guard of a server does."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def test_gpu_memory_is_that_of_a_servers_own_processes(nvidia_smi, session):
    nvidia_smi(f"{session}, 700\n{os.getpid()}, 900", "0, 1600")
    with GpuMemory({"ours": session, "running before": None}) as memory:
        time.sleep(0.2)
    assert memory.peak_mib("ours") == 700
    assert memory.peak_mib("running before") is None


def test_gpu_memory_of_one_server_is_the_gpus_where_processes_are_not_listed(nvidia_smi, session):
    nvidia_smi("", "0, 1600\n1, 30")
    with GpuMemory({"ours": session}) as memory:
        time.sleep(0.2)
    assert memory.peak_mib("ours") == 1630
    with GpuMemory({"ours": session, "other": session}) as memory:
        time.sleep(0.2)
    assert memory.peak_mib("ours") is None


def test_rows_of_nvidia_smi():
    assert parse_rows("1234, 5678\n99, [N/A]\n\nNo devices were found\n") == [(1234, 5678)]


def test_a_result_file_does_not_hold_the_key():
    for key in (["--api-key", "s3cret"], ["--api-key=s3cret"], ["--api_k", "s3cret"]):
        arguments = ["DIR", *key, "--", "--api-server-count", "2"]
        assert "--api-server-count 2" in shown_command("serve.bench", arguments)
        assert "s3cret" not in shown_command("serve.bench", arguments)
        assert "DIR" in shown_command("serve.bench", arguments)


def test_upstream_trap_vllms_client_sends_the_users_own_key_to_any_server():
    variables = client_variables({"OPENAI_API_KEY": "sk-users-own", "NO_PROXY": "intranet"})
    assert variables["OPENAI_API_KEY"] == ""
    assert variables["no_proxy"] == "intranet,localhost,127.0.0.1,::1"


# The servers


def test_flags_of_the_second_server_are_read_with_its_own(probed, tiny):
    refused = {"refused": "argument --max-num-seqs: invalid int value: 'x'"}
    probed({"read": [["--seed", 7]]}, refused)
    arguments = [str(tiny), "--against", str(tiny), "--against-flags=--max-num-seqs x"]
    with pytest.raises(BadInput, match="invalid int value") as caught:
        run([*arguments, "--", "--seed", "7"])
    assert len(caught.value.faults) == 1


@pytest.fixture
def target(server):
    return Target("tiny", server.url.removesuffix("/v1"), server.model)


@pytest.mark.server
def test_a_request_that_fails_is_counted_and_the_others_are_measured(target, load_client, tmp_path):
    broken = base64.b64encode(b"\x89PNG\r\n no picture").decode()
    url = {"url": f"data:image/png;base64,{broken}"}
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    good = [{"role": "user", "content": "What is the value of kx?"}]
    write_requests(tmp_path / "requests.jsonl", [good, bad, good])
    found = load_client.run(target, tmp_path / "requests.jsonl", 3, 2, 5, ignore_eos=True)
    assert len(found.errors) == 1
    assert [text is None for text in found.texts] == [False, True, False]
    assert found.prompt_tokens[0] == found.prompt_tokens[2] > found.prompt_tokens[1] == 0
    assert len(found.ttft_ms) == len(found.tpot_ms) == 2
    write_requests(tmp_path / "requests.jsonl", [bad])
    with pytest.raises(BenchFailed, match="tiny answered no request: "):
        load_client.run(target, tmp_path / "requests.jsonl", 1, 1, 5, ignore_eos=True)


@pytest.mark.server
def test_the_command_measures_a_running_server(
    target, load_client, media, tmp_path, capsys, monkeypatch
):
    """By the clients that all tests share; a sweep starts its own."""
    shared = contextlib.nullcontext(load_client)
    monkeypatch.setattr("serve.bench.bench_client", lambda environment: shared)
    out = tmp_path / "results" / "bench.json"
    arguments = [target.url, "--workload", "mixed", "--concurrency", "2", "--requests", "4"]
    arguments += ["--repeats", "2", "--clip-seconds", "4", "--output-tokens", "3"]
    assert run([*arguments, "--media", str(media), "--json", str(out)]) == 0
    assert "2 at a time: first token " in capsys.readouterr().err
    result = json.loads(out.read_text())
    (row,) = result["measured"]
    assert (row["requests"], row["failed"], row["concurrency"]) == (8, 0, 2)
    assert 0 < row["ttft_ms_median"] <= row["ttft_ms_p99"]
    assert 0 < row["tpot_ms_median"] <= row["tpot_ms_p99"]
    assert row["output_tokens_per_s"] == pytest.approx(3 * row["requests_per_s"], rel=0.01)
    assert result["media"] == ["blue.png", "red.png", "drawn pages", "film.mp4"]
    assert result["ratios"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR", "--concurrency", "1,none"], "--concurrency: is '1,none'"),
        (["DIR", "--repeats", "0", "--requests", "0"], "--requests: is 0 "),
        (["DIR", "--media", "nowhere"], "nowhere: is not a folder"),
        (["DIR", "--against-flags=--enforce-eager"], "--against-flags: has no server to start"),
        (["http://a:1", "--against", "http://a:1/v1"], "--against: is the same server"),
        (["DIR", "--concurrency", "99999999"], "--concurrency: is '99999999'"),
        (["DIR", "--requests", "99999999"], "--requests: is 99999999"),
        (["DIR", "--clip-seconds", "1e9"], "--clip-seconds: is 1000000000.0"),
        (["DIR", "--against", ""], "--against: is empty"),
        (["DIR", "--against", "DIR", '--against-flags="'], "--against-flags: cannot be split"),
        (["http://[::1"], "is not a URL"),
        (["HTTP://127.0.0.1:9"], "no server answers"),
        (["http://127.0.0.1:9", "--workload", "chat"], "no server answers"),
        (["nowhere", "--workload", "chat"], "nowhere"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(BadInput) as caught:
        run(arguments)
    assert message in str(caught.value)


def test_both_servers_are_checked_before_the_first_is_started(tiny, monkeypatch, probed):
    monkeypatch.setattr("serve.bench_servers.running_server", _no_server)
    for second, message in (
        ("http://127.0.0.1:9", "no server answers"),
        ("nowhere", "no such directory"),
    ):
        with pytest.raises(BadInput, match=message):
            run([str(tiny), "--against", second])
    with pytest.raises(BadInput, match="--output-tokens: is 1000000"):
        run([str(tiny), "--output-tokens", "1000000"])
    with pytest.raises(BadInput, match="max_images: is 0, and requests of the workload document"):
        run([str(tiny), "--max-images", "0", "--workload", "document"])
    # How vLLM reads flags is in test_vllm_flags.py.
    probed({"read": []}, {"read": [["--max-model-len", 99999999]]})
    with pytest.raises(BadInput, match="max_model_len: is 99999999"):
        run([str(tiny), "--against", str(tiny), "--against-flags=--max-model-len 99999999"])


def test_the_file_of_the_figures_is_checked_before_a_server_is_started(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.bench_servers.running_server", _no_server)
    with pytest.raises(BadInput, match="is a directory"):
        run([str(tiny), "--workload", "chat", "--json", str(tmp_path)])


def _no_server(*_, **__):
    raise AssertionError("a server was started")


def test_the_same_server_twice_is_said(tiny, monkeypatch, capsys):
    def died(*_, **__):
        raise ServerDied("not in this test")

    monkeypatch.setattr("serve.bench_servers.running_server", died)
    assert run([str(tiny), "--workload", "chat", "--against", str(tiny)]) == 1
    assert "is the same directory with the same flags" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text.png", "cut.png", "picture.mp4", "link.mp4"])
def test_media_that_a_server_would_refuse_are_named(media, tmp_path, name):
    picture = (media / "red.png").read_bytes()
    if name == "link.mp4":
        (tmp_path / name).symlink_to("nowhere.mp4")
    elif name == "text.png":
        (tmp_path / name).write_text("no picture")
    else:
        (tmp_path / name).write_bytes(picture if name == "picture.mp4" else picture[:60])
    kind = "image" if name.endswith(".png") else "video"
    with pytest.raises(BadInput, match=name):
        Workload(kind, 1, tmp_path, tmp_path)


def test_a_number_at_a_time_is_measured_once():
    assert concurrencies("8, 1,8") == [8, 1]


def test_the_environment_of_vllm_lacks_what_media_are_drawn_with():
    command = [find_python(), "-m", "serve.bench", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOMS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: font_roboto: is not installed here")
    assert "Traceback" not in done.stderr
