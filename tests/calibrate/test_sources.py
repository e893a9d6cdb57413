"""A source of samples is one class: registered, named in a recipe, and read by the flow."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from accuracy.settings import Accuracy
from calibrate.prompts import build_prompt
from calibrate.samples import Sample, Skipped
from calibrate.sources.hub import HubSource
from calibrate.sources.jsonl import JsonlSource
from calibrate.sources.source import Source, known_sources, register_source, unregister_source
from checkpoint.faults import BadInput, Fault
from checkpoint.video import Video
from pipeline.inputs import (
    available_samples,
    media_digests,
    prompts_of,
    source_digests,
    trained_on_sources,
)
from quantize.distill.settings import Distill
from recipes.loading import SHIPPED, load_recipe


class Countdown(Source):
    """Questions with numbers that fall; those that can be divided by `bad` cannot be used."""

    type: Literal["countdown"]
    start: Annotated[int, Field(ge=1)]
    """The first number."""
    bad: int = 1000
    """Its multiples are bad samples."""
    file: Path | None = None
    """A file that decides the samples."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield as many samples as are wanted, as far as there are numbers."""
        for number in range(self.start, max(0, self.start - samples), -1):
            if number % self.bad == 0:
                skipped.add(Fault(f"countdown: sample {number}", "is bad", "leave it out"))
                continue
            messages = [{"role": "user", "content": f"Is it {number}? Seed {seed}."}]
            yield Sample(str(number), messages, "countdown")

    def files(self) -> list[Path]:
        """The file, if there is one."""
        return [self.file] if self.file else []


def test_llava_rows_become_messages_with_their_media_in_place(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhat colour?"},
        {"from": "gpt", "value": "red"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    for name in ("llava", "sharegpt"):
        source = known_sources()[name](type=name, path=tmp_path / "rows.json")
        (sample,) = source.read(1, 0, Skipped())
        assert sample.messages == [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": (tmp_path / "a.png").as_uri()}},
                    {"type": "text", "text": "\nWhat colour?"},
                ],
            },
            {"role": "assistant", "content": "red"},
        ]


WEATHER = {"name": "weather", "arguments": {"city": "Ulm"}}


def sharegpt(tmp_path, turns, **columns):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns, **columns}))
    source = known_sources()["sharegpt"](type="sharegpt", path=tmp_path / "rows.jsonl")
    (sample,) = source.read(1, 0, Skipped())
    return sample


@pytest.mark.parametrize("result", ["observation", "tool"])
@pytest.mark.parametrize("calls", [[WEATHER], [WEATHER, WEATHER]])
def test_the_tools_of_sharegpt_become_calls_and_results(tmp_path, tiny_checkpoint, result, calls):
    turns = [
        {"from": "human", "value": "Does it rain?"},
        {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls)},
        {"from": result, "value": '{"rain": true}'},
        {"from": "gpt", "value": "It does."},
    ]
    tool = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
    sample = sharegpt(tmp_path, turns, tools=json.dumps([tool]))
    assert [message["role"] for message in sample.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    made = [{"type": "function", "function": call} for call in calls]
    assert sample.messages[1] == {"role": "assistant", "content": "", "tool_calls": made}
    assert sample.messages[2]["content"] == '{"rain": true}'
    assert sample.tools == [{"type": "function", "function": tool}]
    # The tiny checkpoint's template has no place for tools.
    with pytest.raises(BadInput, match="the chat template ignores tools"):
        build_prompt(sample, tiny_checkpoint.config, tiny_checkpoint.tokenizer, Video())


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "function_call", "value": "weather(Ulm)"}, "function_call is weather"),
        ({"from": "function_call", "value": '{"name": "x"}'}, 'function_call is {"name": "x"}'),
        ({"from": "function_call", "value": "[[" * 9999}, "function_call is "),
        ({"from": "tool", "value": "<tool_response>7</tool_response>"}, "with markup"),
        ({"from": "critic", "value": "Good."}, "a turn is "),
    ],
)
def test_turns_that_are_no_calls_are_refused(tmp_path, turn, message):
    with pytest.raises(BadInput, match=message) as caught:
        sharegpt(tmp_path, [{"from": "human", "value": "Hello"}, turn])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("path", [".", "train.parquet"])
@pytest.mark.parametrize("name", ["parquet", "hub"])
def test_a_parquet_file_and_its_folder_are_read(name, path, tmp_path):
    import datasets

    rows = {"messages": [[{"role": "user", "content": "Hello"}]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    key = "path" if name == "parquet" else "name"
    source = known_sources()[name].model_validate({"type": name, key: str(tmp_path / path)})
    (sample,) = source.read(1, 0, Skipped())
    assert sample.messages == [{"role": "user", "content": "Hello"}]


ROWS = {"messages": [[{"role": "user", "content": "Hello"}]] * 5}


def _write_lines(path):
    lines = [json.dumps({"messages": messages}) for messages in ROWS["messages"]]
    path.write_text("\n\n".join(lines) + "\n")


def _write_array(path):
    path.write_text(json.dumps([{"messages": messages} for messages in ROWS["messages"]]))


def _write_parquet(path):
    import datasets

    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(ROWS).to_parquet(path)


def _save(path):
    import datasets

    datasets.Dataset.from_dict(ROWS).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "key", "written", "given", "write"),
    [
        ("jsonl", "path", "rows.jsonl", "rows.jsonl", _write_lines),
        ("jsonl", "path", "rows.json", "rows.json", _write_array),
        ("llava", "path", "rows.json", "rows.json", _write_array),
        ("sharegpt", "path", "rows.jsonl", "rows.jsonl", _write_lines),
        ("llava", "path", "rows.parquet", "rows.parquet", _write_parquet),
        ("parquet", "path", "rows.parquet", "rows.parquet", _write_parquet),
        ("parquet", "path", "data/train.parquet", "data", _write_parquet),
        ("hub", "name", "data/train.parquet", "data", _write_parquet),
        ("hub", "name", "saved", "saved", _save),
    ],
)
def test_a_source_counts_its_rows(tmp_path, name, key, written, given, write):
    write(tmp_path / written)
    source = known_sources()[name].model_validate({"type": name, key: str(tmp_path / given)})
    assert source.count(1024) == 5
    assert source.count(3) == 3


def test_a_source_that_cannot_be_counted_is_taken_to_have_enough(tmp_path):
    values = [{"type": "synthetic"}, {"type": "hub", "name": str(tmp_path / "nowhere")}]
    for value in values:
        assert known_sources()[value["type"]].model_validate(value).count(7) == 7


def test_what_several_sources_hold_together_is_available(tmp_path):
    _write_lines(tmp_path / "rows.jsonl")
    lines = f"{{type: jsonl, path: {tmp_path / 'rows.jsonl'}}}"
    assert available_samples(recipe(lines, lines, samples=1024).calibrate) == 10
    assert available_samples(recipe(lines, lines, samples=8).calibrate) == 8
    assert available_samples(recipe(lines, "{type: synthetic}", samples=99).calibrate) == 99


@pytest.fixture
def countdown():
    register_source(Countdown)
    yield Countdown
    unregister_source(Countdown)


def recipe(*sources: str, **fields: int):
    """The tiny recipe with other sources."""
    overrides = [f"calibrate.sources=[{', '.join(sources)}]"]
    for name, value in fields.items():
        overrides.append(f"calibrate.{name}={value}")
    return load_recipe(SHIPPED / "tiny/fp8.yaml", overrides)


def prompts(loaded, checkpoint, max_skipped: int = 0):
    section = loaded.calibrate
    found = prompts_of(section, "calibrate", checkpoint, loaded.video, Skipped(max_skipped))
    return list(found)


def test_the_sources_that_ship_with_us_are_known():
    assert {"jsonl", "hub", "synthetic"} <= known_sources().keys()


def test_a_source_of_a_tests_own_is_read_through_a_recipe(countdown, tiny_checkpoint):
    loaded = recipe("{type: countdown, start: 9}", samples=3, seed=5)
    built = prompts(loaded, tiny_checkpoint)
    ids = [prompt.sample_id for prompt in built]
    assert ids == ["countdown: sample 9", "countdown: sample 8", "countdown: sample 7"]
    assert "Is it 9? Seed 5." in tiny_checkpoint.tokenizer.decode(built[0].token_ids)


def test_it_is_mixed_with_the_others_by_weight(countdown, tiny_checkpoint):
    sources = ("{type: countdown, start: 99, weight: 3}", "{type: synthetic, kinds: {order: 1}}")
    built = prompts(recipe(*sources, samples=8), tiny_checkpoint)
    assert len(built) == 8
    assert sum(prompt.group == "countdown" for prompt in built) == 6


def test_its_bad_samples_are_skipped_and_counted(countdown, tiny_checkpoint):
    loaded = recipe("{type: countdown, start: 5, bad: 4}", samples=3)
    ids = [prompt.sample_id for prompt in prompts(loaded, tiny_checkpoint, max_skipped=1)]
    assert ids == ["countdown: sample 5", "countdown: sample 3"]
    with pytest.raises(BadInput, match=r"countdown: sample 4: is bad \(leave it out\)"):
        prompts(loaded, tiny_checkpoint)


def test_its_fields_are_checked_like_those_of_any_section(countdown):
    with pytest.raises(BadInput, match=r"calibrate\.sources\.0\.start: is 0: .*greater than or"):
        recipe("{type: countdown, start: 0}")
    with pytest.raises(BadInput, match=r"sources\.0\.strt: unknown field \(did you mean start"):
        recipe("{type: countdown, strt: 3, start: 3}")


def test_a_recipe_with_it_survives_its_own_manifest(countdown):
    loaded = recipe("{type: countdown, start: 9}")
    dumped = json.loads(json.dumps(loaded.model_dump(mode="json")))
    (source,) = dumped["calibrate"]["sources"]
    assert source == {"type": "countdown", "weight": 1.0, "start": 9, "bad": 1000, "file": None}
    assert type(loaded).model_validate(dumped) == loaded


def test_a_run_remembers_the_content_of_its_files(countdown, tmp_path):
    (tmp_path / "numbers").write_text("9 8 7")
    loaded = recipe(f"{{type: countdown, start: 9, file: {tmp_path / 'numbers'}}}")
    before = source_digests(loaded)
    assert list(before) == [str(tmp_path / "numbers")]
    (tmp_path / "numbers").write_text("9 8 6")
    assert source_digests(loaded) != before


@pytest.mark.parametrize("source", ["hub, name", "parquet, path", "llava, path"])
def test_a_run_remembers_the_content_of_a_folder(tmp_path, source):
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"messages": []}')
    (folder / "picture.png").write_bytes(b"of a row")
    loaded = recipe(f"{{type: {source}: {folder}}}")
    before = source_digests(loaded)
    assert str(folder / "data" / "train.jsonl") in before
    (folder / "data" / "train.jsonl").write_text('{"messages": [1]}')
    changed = source_digests(loaded)
    assert changed != before
    (folder / "more.parquet").write_bytes(b"rows")
    assert source_digests(loaded) != changed
    assert not HubSource(type="hub", name="ORG/DATASET").files()


def question(*media):
    """A row that asks about some media, by their paths."""
    parts = [{"type": "video" if name.endswith("mp4") else "image", "path": name} for name in media]
    return json.dumps({"messages": [{"role": "user", "content": [*parts, "What is it?"]}]})


def test_a_run_remembers_the_media_that_its_rows_name(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.png", "clips/b.mp4", "clips/beyond.mp4", "clips/unnamed.mp4"):
        (tmp_path / name).write_bytes(b"1")
    rows = [question("a.png", "clips/b.mp4"), "{}", question("clips/missing.mp4")]
    rows += [question("data:image/png;base64,AA=="), question("clips/beyond.mp4")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    source = f"calibrate.sources=[{{type: jsonl, path: {tmp_path / 'rows.jsonl'}}}]"
    few = load_recipe(SHIPPED / "tiny/fp8.yaml", ["model=m", source, "calibrate.samples=1"])
    all_rows = load_recipe(SHIPPED / "tiny/fp8.yaml", ["model=m", source])
    before = media_digests(few), media_digests(all_rows)
    assert set(before[0]) == {str(tmp_path), str(tmp_path / "clips")}
    assert before[0][str(tmp_path)].startswith("1 file, newest a.png (")
    assert before[0][str(tmp_path / "clips")].startswith("2 files, newest b.mp4 (")
    (tmp_path / "clips" / "unnamed.mp4").write_bytes(b"another")
    assert (media_digests(few), media_digests(all_rows)) == before
    # A run that does not get so far is resumed all the same.
    (tmp_path / "clips" / "beyond.mp4").write_bytes(b"another")
    assert media_digests(few) == before[0]
    assert media_digests(all_rows) != before[1]
    (tmp_path / "clips" / "b.mp4").write_bytes(b"another")
    changed = media_digests(few)
    assert changed.pop(str(tmp_path / "clips")) != before[0].pop(str(tmp_path / "clips"))
    assert changed == before[0]


def test_media_beside_llava_rows_and_of_the_same_size_are_noticed(tmp_path):
    turn = {"from": "human", "value": "<image>What is it?"}
    rows = [{"image": "a.png", "conversations": [turn]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "media").mkdir()
    picture = tmp_path / "media" / "a.png"
    picture.write_bytes(b"1")
    paths = f"path: {tmp_path / 'rows.json'}, media: {tmp_path / 'media'}"
    loaded = recipe(f"{{type: llava, {paths}}}")
    before = media_digests(loaded)
    assert list(before) == [str(tmp_path / "media")]
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1))
    assert media_digests(loaded) != before


def test_what_is_trained_on_and_judged_by_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    mine = [{"type": "jsonl", "path": tmp_path / "a.jsonl"}, {"type": "hub", "name": "ORG/SET"}]
    trained = Distill(sources=[{"type": "synthetic"}, *mine])
    other = [{"type": "synthetic"}, {"type": "jsonl", "path": "b.jsonl"}]
    same = [{"type": "jsonl", "path": "a.jsonl"}, {"type": "hub", "name": "ORG/SET"}]
    assert trained_on_sources(trained, Accuracy(sources=other)) == []
    assert trained_on_sources(trained, Accuracy(sources=same)) == ["a.jsonl", "ORG/SET"]


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (gzip.compress(b"{}"), "is compressed with gzip (decompress it)"),
        (bz2.compress(b"{}"), "is compressed with bzip2 (decompress it)"),
        (lzma.compress(b"{}"), "is compressed with xz (decompress it)"),
        (bytes.fromhex("28b52ffd"), "is compressed with Zstandard (decompress it)"),
        (b"PK\x03\x04", "is compressed with ZIP (decompress it)"),
        ("{}".encode("utf-16"), "is UTF-16 text (write the file in UTF-8)"),
    ],
    ids=["gzip", "bzip2", "xz", "zstandard", "zip", "utf-16"],
)
def test_a_file_that_is_no_text_in_utf_8_says_what_it_is(tmp_path, start, what):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start)
    with pytest.raises(BadInput) as caught:
        next(JsonlSource(type="jsonl", path=path).read(1, 0, Skipped(limit=9)))
    assert str(caught.value) == f"{path}: {what}"


def test_an_unknown_type_names_the_nearest(countdown):
    with pytest.raises(BadInput, match="unknown source type 'countdwn': did you mean countdown"):
        recipe("{type: countdwn, start: 3}")
    with pytest.raises(BadInput, match="unknown source type 'json': did you mean jsonl"):
        recipe("{type: json, path: x}")


def test_a_type_that_nothing_is_near_to_is_answered_with_all():
    known = "hub, jsonl, llava, parquet, sharegpt, synthetic"
    with pytest.raises(BadInput, match=f"'excel': choose from {known}"):
        recipe("{type: excel}")


@pytest.mark.parametrize("value", ["countdown", "null", "3", "[a]"])
def test_a_source_that_is_not_a_mapping_is_answered_with_an_example(value):
    with pytest.raises(BadInput, match=r"give a mapping with a type, such as \{type: jsonl"):
        recipe(value)


@pytest.mark.parametrize("value", ["{}", "{path: x}", "{type: null}", "{type: [a]}", "{type: {}}"])
def test_a_source_without_a_usable_type_is_a_fault(value):
    with pytest.raises(BadInput, match=r"unknown source type .*choose from hub, jsonl, llava"):
        recipe(value)


def test_a_source_is_unknown_again_when_it_is_unregistered(countdown):
    unregister_source(Countdown)
    assert "countdown" not in known_sources()


def test_a_value_of_python_code_needs_no_type_by_name():
    source = JsonlSource(type="jsonl", path=Path("samples.jsonl"))
    assert source.files() == [Path("samples.jsonl")]
    assert source.weight == 1


def test_a_source_that_implements_nothing_says_so():
    class Empty(Source):
        type: Literal["empty"]

    with pytest.raises(NotImplementedError):
        Empty(type="empty").read(1, 0, Skipped())
