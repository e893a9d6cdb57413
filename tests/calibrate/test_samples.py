"""Samples from JSON Lines, the Hub and mixes of both: every bad row is named with its reason."""

import base64
import itertools
import json

import pytest
from calibrate_media import data_url, image_bytes, image_part, picture, text, user

from calibrate.media_urls import media_bytes
from calibrate.samples import Sample, Skipped
from calibrate.sources.hub import read_hub
from calibrate.sources.jsonl import read_jsonl
from calibrate.sources.mixing import mixed, shuffled
from checkpoint.faults import BadInput

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def jsonl(directory, *rows):
    path = directory / "samples.jsonl"
    lines = []
    for row in rows:
        lines.append(row if isinstance(row, str) else json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reason(call):
    with pytest.raises(BadInput) as caught:
        call()
    return str(caught.value)


def test_jsonl_yields_messages_id_answer_and_source(tmp_path):
    path = jsonl(tmp_path, HELLO | {"id": "a", "answer": "Hi"}, "", HELLO)
    samples = list(read_jsonl(path))
    assert samples[0] == Sample("a", HELLO["messages"], str(path), "Hi")
    assert (samples[1].id, samples[1].answer) == ("3", None)  # the line's number


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a picture.png"},
        {"type": "image_url", "image_url": {"url": "a picture.png"}},
        {"type": "image_url", "image_url": "a picture.png"},
        {"type": "image", "image": "ABSOLUTE"},
        {"type": "image_url", "image_url": {"url": "FILE"}},
    ],
)
def test_every_spelling_of_a_local_image_becomes_one_file_url(part, tmp_path):
    picture(4, 4).save(tmp_path / "a picture.png")
    spelled = json.dumps(part).replace("ABSOLUTE", str(tmp_path / "a picture.png"))
    spelled = spelled.replace("FILE", (tmp_path / "a picture.png").as_uri())
    (sample,) = read_jsonl(
        jsonl(tmp_path, {"messages": [{"role": "user", "content": [json.loads(spelled)]}]})
    )
    url = (tmp_path / "a picture.png").as_uri()
    assert sample.messages[0]["content"] == [{"type": "image_url", "image_url": {"url": url}}]
    assert media_bytes(url, "x") == (tmp_path / "a picture.png").read_bytes()


def test_video_part_becomes_a_video_url(tmp_path):
    (sample,) = read_jsonl(
        jsonl(tmp_path, {"messages": [user({"type": "video", "video": "clip.mp4"})]})
    )
    assert sample.messages[0]["content"][0]["video_url"]["url"] == (tmp_path / "clip.mp4").as_uri()


def test_data_url_is_kept_and_decoded(tmp_path):
    (sample,) = read_jsonl(jsonl(tmp_path, {"messages": [user(image_part(picture(3, 3)))]}))
    assert media_bytes(sample.messages[0]["content"][0]["image_url"]["url"], "x") == image_bytes(
        picture(3, 3)
    )


BAD_ROWS = {
    "not JSON": ('{"messages": ', "is not JSON"),
    "nested too deeply": ("[" * 100_000, "is not JSON"),
    "not an object": ("[1]", "is a JSON list, not an object"),
    "null": ("null", "is a JSON null, not an object"),
    "a number": ("5", "is a JSON number, not an object"),
    "no messages": ({"text": "x"}, "messages is None"),
    "empty messages": ({"messages": []}, "messages is []"),
    "no role": ({"messages": [{"content": "x"}]}, "role None"),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "choose from system, user, assistant, tool",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "content None"),
    "unknown part": ({"messages": [user({"type": "audio"})]}, "unknown content part"),
    "part is a number": ({"messages": [user(7)]}, "unknown content part 7"),
    "text part without text": ({"messages": [user({"type": "text"})]}, "a text part contains None"),
    "image part without image": ({"messages": [user({"type": "image"})]}, "names no file"),
    "url is a number": ({"messages": [user({"type": "image", "image": 3})]}, "media URL is '3'"),
    "http": (
        {"messages": [user({"type": "image", "image": "https://example.com/a.png"})]},
        "nothing is downloaded",
    ),
    "other scheme": (
        {"messages": [user({"type": "image", "image": "s3://a/b.png"})]},
        "nothing is downloaded",
    ),
    "unknown field of a message": (
        {"messages": [{"role": "user", "content": "x", "weight": 0.5}]},
        "field weight of a message of the user would be lost",
    ),
    "unknown field of a part": (
        {"messages": [user({"type": "video", "video": "a.mp4", "fps": 4})]},
        "field fps of a part of type video would be lost",
    ),
    "half a surrogate pair": (
        '{"messages": [{"role": "user", "content": "broken \\ud83d"}]}',
        "half of a surrogate pair",
    ),
    "base64 without a prefix": (
        {"messages": [user({"type": "image", "image": "iVBORw0K" * 100_000})]},
        "base64 without a `data:` prefix",
    ),
    "LLaVA": ({"conversations": [{"from": "human", "value": "x"}]}, "the type llava"),
    "data URL without base64": (
        {"messages": [user({"type": "image", "image": "data:,abc"})]},
        "not base64",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_line_is_a_fault_that_names_line_and_reason(name, tmp_path):
    row, what = BAD_ROWS[name]
    message = reason(lambda: list(read_jsonl(jsonl(tmp_path, HELLO, row))))
    assert what in message
    assert "line 2" in message or "sample 2" in message
    assert len(message) < 1000


def test_a_byte_order_mark_and_a_json_array_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(HELLO).encode())
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([HELLO, HELLO]).encode())
    assert len(list(read_jsonl(tmp_path / "a.jsonl"))) == 1
    assert len(list(read_jsonl(tmp_path / "a.json"))) == 2


def test_a_line_that_is_not_utf8_is_skipped_alone(tmp_path):
    good = json.dumps(HELLO).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + b'{"messages": "\xe9"}\n' + good)
    skipped = Skipped(limit=1)
    assert len(list(read_jsonl(tmp_path / "a.jsonl", skipped))) == 2
    assert "line 2: is not UTF-8" in str(skipped.faults[0])


@pytest.mark.parametrize("key", ["url", "path", "base64"])
def test_other_spellings_of_an_image(key, tmp_path):
    picture(4, 4).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    value = base64.b64encode(data).decode() if key == "base64" else "a.png"
    row = {"messages": [user({"type": "image", key: value})]}
    (sample,) = read_jsonl(jsonl(tmp_path, row))
    assert media_bytes(sample.messages[0]["content"][0]["image_url"]["url"], "x") == data


def test_bad_lines_up_to_the_limit_are_skipped_and_counted(tmp_path):
    skipped = Skipped(limit=2)
    path = jsonl(tmp_path, "{", HELLO, {"messages": []}, HELLO)
    assert len(list(read_jsonl(path, skipped))) == 2
    assert skipped.samples == 2
    first, second = skipped.faults
    assert "line 1: is not JSON" in str(first)
    assert "sample 3: messages is []" in str(second)


def test_one_bad_line_over_the_limit_raises_with_every_reason(tmp_path):
    path = jsonl(tmp_path, "{", HELLO, {"messages": []}, HELLO)
    message = reason(lambda: list(read_jsonl(path, Skipped(limit=1))))
    assert "2 samples cannot be used, at most 1 may be" in message
    assert "line 1" in message
    assert "sample 3" in message


def test_missing_file_is_a_fault():
    assert "No such file" in reason(lambda: list(read_jsonl("nowhere.jsonl")))


def test_directory_in_place_of_a_file_is_a_fault(tmp_path):
    assert "cannot be read" in reason(lambda: list(read_jsonl(tmp_path)))


def test_empty_file_is_a_fault(tmp_path):
    assert "contains no usable sample" in reason(
        lambda: list(read_jsonl(jsonl(tmp_path), Skipped(limit=9)))
    )


def test_file_of_bad_lines_only_is_a_fault_that_tells_why(tmp_path):
    message = reason(lambda: list(read_jsonl(jsonl(tmp_path, "{", "["), Skipped(limit=9))))
    assert "contains no usable sample" in message
    assert "line 2: is not JSON" in message


def test_file_that_is_not_utf8_is_a_fault(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in reason(lambda: list(read_jsonl(tmp_path / "x.jsonl")))


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("file:///nowhere/a.png", "cannot be read"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png;base64,", "is empty"),
        ("http://example.com/a.png", "nothing is downloaded"),
        ("", "media URL is ''"),
    ],
)
def test_unreadable_media_url_is_a_fault(url, what):
    assert what in reason(lambda: media_bytes(url, "sample 1"))


def hub_rows():
    # As Parquet keeps them: every part has every key, and those it does not use are None.
    parts = [
        {"type": "text", "text": "Same?", "image": None},
        {"type": "image", "text": None, "image": None},
        {"type": "image", "text": None, "image": None},
    ]
    return {
        "id": ["r"],
        "messages": [[{"role": "user", "content": parts}]],
        "images": [[picture(5, 4), picture(6, 4)]],
    }


@pytest.fixture
def hub_directory(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [
                        {key: datasets.Value("string") for key in ("type", "text", "image")}
                    ],
                }
            ],
            "images": datasets.List(datasets.Image()),
        }
    )
    data = datasets.Dataset.from_dict(hub_rows(), features=features)
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    data.save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "streaming"), [("parquet", True), ("parquet", False), ("saved", True)]
)
def test_hub_images_column_fills_the_image_parts_in_order(kind, streaming, hub_directory):
    (sample,) = read_hub(str(hub_directory / kind), streaming=streaming)
    _, first, second = sample.messages[0]["content"]
    assert media_bytes(first["image_url"]["url"], "x") == image_bytes(picture(5, 4))
    assert media_bytes(second["image_url"]["url"], "x") == image_bytes(picture(6, 4))


def test_hub_row_with_more_images_than_parts_is_a_fault(tmp_path):
    row = {"messages": [user(text("x"), {"type": "image"})], "images": ["a.png", "b.png"]}
    jsonl(tmp_path, row)
    assert "2 images in its columns, 1 without a part in messages" in reason(
        lambda: list(read_hub(str(tmp_path)))
    )


def test_hub_messages_of_mixed_content_keep_their_text(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": content}]}
        for content in ("Hello", [text("Hello")])
    ]
    jsonl(tmp_path, *rows)
    assert [s.messages[0]["content"] for s in read_hub(str(tmp_path))] == ["Hello", [text("Hello")]]


def test_hub_dataset_that_does_not_exist_is_a_fault(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "no-such-org/no-such-set" in reason(lambda: list(read_hub("no-such-org/no-such-set")))


def test_hub_split_that_does_not_exist_is_a_fault(hub_directory):
    message = reason(lambda: list(read_hub(str(hub_directory / "parquet"), split="nonsense")))
    assert "split nonsense cannot be read" in message


def numbered(source, count=None):
    for number in itertools.islice(itertools.count(), count):
        yield Sample(str(number), HELLO["messages"], source)


def test_mix_keeps_the_weights_at_every_length():
    seen = dict.fromkeys("abc", 0)
    weights = {"a": 5, "b": 3, "c": 2}
    sources = [(numbered(source), weight) for source, weight in weights.items()]
    for number, sample in enumerate(mixed(sources, 500, seed=3), start=1):
        seen[sample.source] += 1
        for source, weight in weights.items():
            assert abs(seen[source] - number * weight / 10) <= 1, (number, seen)
    assert sum(seen.values()) == 500


def test_mix_is_the_same_for_the_same_seed():
    runs = []
    for seed in (1, 1, 7):
        mix = mixed([(numbered("a"), 1), (numbered("b"), 1.5)], 20, seed)
        runs.append([sample.source for sample in mix])
    assert runs[0] == runs[1] != runs[2]


def test_source_that_runs_out_is_not_repeated_and_the_others_go_on():
    mix = list(mixed([(numbered("a", 2), 1), (numbered("b", 9), 1), (numbered("c", 9), 1)]))
    assert [sum(s.source == name for s in mix) for name in "abc"] == [2, 9, 9]
    assert abs(sum(s.source == "b" for s in mix[:12]) - 5) <= 1


def test_mix_takes_no_more_from_a_source_than_it_yields():
    a = numbered("a")
    list(mixed([(a, 1)], 3))
    assert next(a).id == "3"


@pytest.mark.parametrize(
    "sources", [[], [(iter([]), 1)], [(numbered("a"), 0)], [(numbered("a"), float("nan"))]]
)
def test_mix_of_nothing_is_a_fault(sources):
    assert "distill.sources: " in reason(lambda: list(mixed(sources, 5, name="distill.sources")))


def test_shuffle_keeps_every_sample_and_its_order_depends_on_the_seed_only():
    runs = []
    for seed in (1, 1, 2):
        runs.append([int(sample.id) for sample in shuffled(numbered("a", 50), seed, buffer=10)])
    assert runs[0] == runs[1] != runs[2]
    assert sorted(runs[0]) == list(range(50)) != runs[0]


def test_sample_of_data_urls_needs_no_directory():
    assert media_bytes(data_url(b"abc", "image/png"), "x") == b"abc"
