"""The search for an EVS rate: the choice, the items, and a sweep of a real vLLM."""

import json
import shutil

import pytest
from PIL import Image

from calibrate.evs import retained_tokens
from calibrate.samples import Sample
from checkpoint.faults import BadInput
from checkpoint.video import Video
from serve.bench_figures import rounded, summarize
from serve.bench_runs import Load, Target
from serve.demo import draw_video
from serve.environment import find_environment
from serve.process import ServerDied
from serve.settings import ServeSettings
from serve.sweep import command_options, rates_with_none, run
from serve.sweep_choice import Loss, choose
from serve.sweep_figure import draw
from serve.sweep_items import (
    ItemClip,
    check_media,
    count_frames,
    data_items,
    length_faults,
    short_clip_warning,
    still_warning,
    task_items,
)
from serve.sweep_points import Kept, measure_target, open_kept, point_name
from serve.sweep_result import result_of

pytestmark = pytest.mark.usefixtures("restored_logging")


def loss(rate, points, low, high, items=1000):
    return Loss(rate, items, points, low, high)


# The choice


def test_the_highest_rate_inside_the_tolerance_is_chosen():
    losses = [loss(0.5, 0.1, -0.5, 0.7), loss(0.75, 0.4, -0.4, 1.2), loss(0.9, 6.0, 4.8, 7.2)]
    choice = choose(losses, tolerance=2)
    assert choice.rate == 0.75
    first, higher = choice.sentences
    assert first.startswith("rate 0.75: loses 0.4 points (95 % interval -0.4 … +1.2, 1000 items)")
    assert higher.endswith("outside the tolerance")


def test_an_interval_that_reaches_beyond_the_tolerance_does_not_tell():
    choice = choose([loss(0.5, 1.0, -1.0, 3.0, items=200)], tolerance=2)
    assert choice.rate == 0
    # Twice as wide as it may be: four times the items.
    assert "200 items are too few to tell; about 800 would" in choice.sentences[1]


def test_few_items_that_all_agree_do_not_tell():
    for items, rate in ((149, 0), (150, 0.5)):
        assert choose([loss(0.5, 0.0, 0.0, 0.0, items)], tolerance=2).rate == rate


def test_a_loss_at_the_tolerance_promises_nothing():
    (_, sentence) = choose([loss(0.5, 2.5, 0.5, 4.5, items=90)], tolerance=2).sentences
    assert sentence.endswith("90 items are too few to tell")


# The items


def test_clips_of_which_one_frame_survives_are_those_that_evs_leaves_one_of():
    for frames in range(1, 25):
        for rate in (0.0, 0.5, 0.75, 0.8, 0.9):
            keeps_one = retained_tokens(frames, 64, rate) == 64 and frames > 1
            warning = short_clip_warning([ItemClip("a", frames), ItemClip("b", 99)], rate)
            assert (warning is not None) == keeps_one, (frames, rate)
    assert "of 1 of 2 clips only the first frame survives" in short_clip_warning(
        [ItemClip("a", 4), ItemClip("b", 99)], 0.75
    )


def test_clips_of_a_file_are_read_with_their_answers(tmp_path):
    draw_video(tmp_path / "clip.mp4", seconds=3)
    question = {"type": "text", "text": "Which digit appears?"}
    clip = {"type": "video_url", "video_url": {"url": "clip.mp4"}}
    asked = {"role": "user", "content": [clip, question]}
    rows = [
        {"id": "given", "messages": [asked], "answer": "7"},
        {"messages": [asked, {"role": "assistant", "content": "blue"}]},
    ]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    items = data_items(path)
    given, turn = items["clips"]
    assert (given.id, given.answer, turn.answer) == ("given", "7", "blue")
    assert [message["role"] for message in turn.messages] == ["user"]
    assert given.messages[0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert [clip.frames for clip in count_frames(items, Video())] == [6, 6]


def test_every_item_without_an_answer_is_named(tmp_path):
    asked = {"messages": [{"role": "user", "content": "What?"}]}
    rows = [asked, asked | {"answer": ["7"]}, asked | {"answer": " "}]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput) as caught:
        data_items(path)
    assert [fault.what for fault in caught.value.faults] == ["has no answer"] * 3


def test_rates_are_sorted_and_0_is_one_of_them():
    assert rates_with_none("0.9,0.5") == [0, 0.5, 0.9]
    for text in ("1", "-0.1", "nan", "a", "", "0.5,,0.9"):
        with pytest.raises(BadInput, match="--rates: is"):
            rates_with_none(text)
    with pytest.raises(BadInput, match="of more than six digits"):
        rates_with_none("0.5,0.50000001")


# What was measured


def test_figures_of_other_settings_are_dropped(tmp_path):
    path = tmp_path / "measured.json"
    point = {"load": [], "answers": {}, "prompt_tokens_mean": 5}
    Kept(path, {"items": "a"}).put("tiny at 0", point)
    assert Kept(path, {"items": "a"}).get("tiny at 0") == point
    assert Kept(path, {"items": "b"}).get("tiny at 0") is None
    for damaged in ("[]", '{"settings": {}, "points": {"tiny at 0": {"load": []}}}'):
        path.write_text(damaged)
        with pytest.raises(BadInput, match="is not a file of a sweep"):
            Kept(path, {})


def test_each_directory_is_compared_with_its_own_rate_0(tmp_path):
    items = task_items(["video_event", "video_static"], 3)
    right = {task: [sample.answer for sample in asked] for task, asked in items.items()}
    one_wrong = right | {"video_event": [*right["video_event"][:2], "none"]}
    points = {}
    for name, rate, answers in (
        ("bf16", 0.0, right),
        ("bf16", 0.9, one_wrong),
        ("fp8", 0.0, one_wrong),
        ("fp8", 0.9, one_wrong),
    ):
        speed = Load((100.0,), (), 1.0, 2.0, (50,), ("a",), ())
        row = rounded(summarize(name, 4, [speed], None))
        points[name, rate] = {"answers": answers, "load": [row], "prompt_tokens_mean": 50}
    result = result_of(points, {"bf16": "BF16", "fp8": "FP8"}, items, tolerance=60)
    losses = {(row["directory"], row["rate"]): row["loss"] for row in result["measured"]}
    expected = {("bf16", 0.0): 0, ("bf16", 0.9): 16.67, ("fp8", 0.0): 0, ("fp8", 0.9): 0}
    assert losses == expected
    event = result["tasks_measured"][2]
    assert (event["task"], event["rate"], event["loss"]) == ("video_event", 0.9, 33.33)
    assert event["loss_low"] <= event["loss"] <= event["loss_high"]
    assert [row["rate"] for row in result["recommended"]] == [0.9, 0.9]
    drawn = draw(result | {"concurrency": [4]}, tmp_path)
    assert [path.name for path in drawn] == ["sweep.svg", "sweep.png"]
    assert "fp8, 4 at a time" in drawn[0].read_text()
    again = draw(result | {"concurrency": [4]}, tmp_path)[0]
    assert again.read_bytes() == drawn[0].read_bytes()


@pytest.mark.server
def test_a_sweep_goes_on_where_it_stopped_and_recommends_a_rate(
    tiny, server, load_client, tmp_path, capsys
):
    """Rate 0.75 is asked of the server that all tests share; the command measures only rate 0."""
    out = tmp_path / "sweep"
    out.mkdir()
    arguments = [str(tiny), "--rates", "0,0.75", "--tasks", "video_static", "--items", "6"]
    arguments += ["--concurrency", "3", "--tolerance", "60", "--out", str(out)]
    items = task_items(["video_static"], 6)
    target = Target("tiny", server.url.removesuffix("/v1"), server.model)
    point = measure_target(target, items, [3], 24, load_client)
    kept = open_kept(command_options(arguments), [], items, find_environment())
    kept.put(point_name(tiny, 0.75), point)

    assert run(arguments) == 0
    logged = capsys.readouterr()
    assert "tiny at rate 0.75: measured before" in logged.err
    assert "tiny: recommended EVS rate 0.75" in logged.out
    result = json.loads((out / "sweep.json").read_text())
    off, on = result["measured"]
    assert (off["rate"], on["rate"]) == (0, 0.75)
    assert off["accuracy"] > 0.5  # the tiny checkpoint was trained on such items
    assert (off["loss"], off["loss_low"], off["loss_high"]) == (0, 0, 0)
    assert on["prompt_tokens_mean"] < 0.7 * off["prompt_tokens_mean"]
    assert on["loss"] == pytest.approx(100 * (off["accuracy"] - on["accuracy"]), abs=0.02)
    assert [row["requests"] for row in result["load"]] == [6, 6]
    assert any("only the first frame survives" in warning for warning in result["warnings"])
    svg = (out / "sweep.svg").read_text()
    assert "time to the first token" in svg
    assert "<svg" in svg
    with Image.open(out / "sweep.png") as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "0"], "--tolerance: is 0.0"),
        (["--items", "0"], "--items: is 0"),
        (["--tasks", "video_evnt"], "did you mean video_event?"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--concurrency", "0"], "--concurrency: is '0'"),
        (["--items", "99999999"], "--items: is 99999999"),
        (["--data", "x.jsonl", "--tasks", "text"], "--tasks: does nothing with --data"),
        (["--tasks", "text", "--items", "1"], "so a rate changes nothing"),
        (
            ["--tasks", "video_event", "--items", "1", "--max-videos", "0"],
            "has 1 videos of at most",
        ),
        (["--items", "1", "--max-tokens", "9999999"], "--max-tokens: is 9999999"),
    ],
)
def test_bad_options_of_a_sweep_are_named(arguments, message, tiny):
    with pytest.raises(BadInput) as caught:
        run([str(tiny), *arguments])
    assert message in str(caught.value)


def test_a_flag_of_vllm_that_fixes_the_rate_is_named(probed, tiny):
    probed({"read": [["--video-pruning-rate", 0.5]]})
    with pytest.raises(BadInput, match="--video-pruning-rate: would fix the rate"):
        run([str(tiny), "--", "--video-pruning", "0.5"])


def test_where_the_results_go_is_checked_before_a_server_is_started(tiny, tmp_path):
    (tmp_path / "sweep.svg").mkdir()
    for out, message in ((tmp_path, "sweep.svg: is a directory"), (tiny, "is a checkpoint")):
        with pytest.raises(BadInput, match=message):
            run([str(tiny), "--tasks", "video_event", "--items", "1", "--out", str(out)])


def test_a_server_that_dies_at_once_leaves_no_folder(tiny, tmp_path, monkeypatch):
    def died(*_, **__):
        raise ServerDied("not in this test")

    monkeypatch.setattr("serve.sweep_points.running_server", died)
    out = tmp_path / "sweep"
    assert run([str(tiny), "--tasks", "video_event", "--items", "1", "--out", str(out)]) == 1
    assert not out.exists()


def test_the_same_directory_twice_and_a_circle_of_links_are_named(tiny, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(BadInput) as caught:
        run([str(tiny), str(tiny), str(tmp_path / "circle")])
    assert "is given more than once" in str(caught.value)
    assert "circle: no such directory" in str(caught.value)


def test_directories_of_one_name_are_told_apart(tiny, tmp_path, monkeypatch):
    asked = []

    def died(name, directory, *_):
        asked.append(name)
        raise ServerDied("not in this test")

    monkeypatch.setattr("serve.sweep_points._serve_and_measure", died)
    copies = [str(tmp_path / folder / "export") for folder in ("a", "b")]
    for copy in copies:
        shutil.copytree(tiny, copy)
    out = str(tmp_path / "sweep")
    assert run([*copies, "--tasks", "video_event", "--items", "1", "--out", out]) == 1
    assert asked == ["a/export"]


def test_items_that_no_rate_changes_are_counted():
    items = {"clips": ["with a clip", "with one of a frame", "without"]}
    clips = [ItemClip("1", 8, 0), ItemClip("2", 1, 1)]
    assert still_warning(items, clips).startswith("2 of 3 items have no clip")
    assert still_warning({"clips": ["with a clip"]}, clips[:1]) is None
    with pytest.raises(BadInput, match="so a rate changes nothing"):
        still_warning(items, clips[1:])


def test_an_item_that_is_too_long_is_named(tiny):
    def of(text):
        return Sample("a", [{"role": "user", "content": text}], "7")

    items = {"clips": [of("word " * 300), of("word")]}
    settings = ServeSettings(max_model_len=256)
    (fault,) = length_faults(items, [], tiny, settings, 24)
    assert "tokens, with the answer's 24 more than 256" in fault.what
    clips = [ItemClip("a", 8, 1)]
    assert len(list(length_faults(items, clips, tiny, settings, 24))) == 2


def test_a_picture_that_a_server_would_refuse_is_named(tmp_path):
    (tmp_path / "page.png").write_text("no picture")
    picture = {"type": "image_url", "image_url": {"url": "page.png"}}
    row = {"messages": [{"role": "user", "content": [picture]}], "answer": "7"}
    path = tmp_path / "clips.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadInput, match="sample 1: image cannot be read"):
        check_media(data_items(path), ServeSettings())


def test_a_directory_that_cannot_be_served_is_named(tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        run([str(tmp_path / "nowhere")])
