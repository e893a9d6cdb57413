"""How a directory is served: its manifest, the command line, and vLLM's own flags."""

import argparse
import json
import logging
from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from checkpoint.video import Video
from serve.options import add_setting_options, given_settings
from serve.settings import MANIFEST, Serve, ServeSettings, gate_passed, override, settings_for

VIDEO = {"pruning_rate": 0.9, "fps": 1.0, "max_frames": 64}


@pytest.fixture
def directory(tmp_path):
    """A directory whose manifest has a video section."""
    write_manifest(tmp_path, {"video": VIDEO, "serve": {"max_model_len": 4096}})
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the project so far."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                records.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger("hybridquant"), "handlers", [Handler()])
    return records


def write_manifest(directory, manifest):
    (directory / MANIFEST).write_text(json.dumps(manifest))


def faults(call, *arguments):
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    return [str(fault) for fault in caught.value.faults]


def test_without_a_manifest_the_defaults_apply_and_nothing_is_logged(tmp_path, warnings):
    assert settings_for(tmp_path) == ServeSettings()
    assert settings_for(tmp_path, {"video.pruning_rate": 0.5}).video == Video(pruning_rate=0.5)
    assert gate_passed(tmp_path) is None
    assert warnings == []


def test_a_directory_is_served_as_its_manifest_describes(directory, warnings):
    settings = settings_for(directory)
    assert settings.video == Video(**VIDEO)
    assert settings.max_model_len == 4096
    assert warnings == []


def test_values_that_repeat_the_manifest_are_not_warned_about(directory, warnings):
    overrides = {"video.pruning_rate": 0.9, "video.fps": None, "port": 0}
    settings = settings_for(directory, overrides, ["--video-pruning-rate", "0.9"])
    assert settings.video == Video(**VIDEO)
    assert settings.port == 0
    assert warnings == []


@pytest.mark.parametrize(
    ("overrides", "flags", "video"),
    [
        ({"video.pruning_rate": 0.0}, [], Video(pruning_rate=0.0, fps=1, max_frames=64)),
        ({"video.fps": 2}, [], Video(pruning_rate=0.9, fps=2, max_frames=64)),
        (
            {"video.fps": 4, "video.max_frames": 8},
            [],
            Video(pruning_rate=0.9, fps=4, max_frames=8),
        ),
        ({}, ["--video-pruning-rate=0.5"], Video(pruning_rate=0.5, fps=1, max_frames=64)),
        (
            {"video.pruning_rate": 0.1},
            ["--video_pruning_rate", "0.5"],
            Video(pruning_rate=0.5, fps=1, max_frames=64),
        ),
        (
            {},
            ["--media-io-kwargs", '{"video": {"fps": 4, "num_frames": 16}}'],
            Video(pruning_rate=0.9, fps=4, max_frames=16),
        ),
        # vLLM takes 32 frames where its flag gives no number.
        (
            {},
            ["--media-io-kwargs.video.fps=4"],
            Video(pruning_rate=0.9, fps=4, max_frames=32),
        ),
    ],
)
def test_another_video_than_the_manifests_is_one_warning_with_both(
    directory, warnings, overrides, flags, video
):
    assert settings_for(directory, overrides, flags).video == video
    (warning,) = warnings
    assert str(Video(**VIDEO)) in warning
    assert str(video) in warning
    assert "\n" not in warning


def test_vllms_sampling_without_fps_is_warned_about(directory, warnings):
    settings_for(directory, {}, ["--media-io-kwargs.video.num_frames=64"])
    (warning,) = warnings
    assert "--media-io-kwargs gives no fps" in warning


def test_a_manifest_without_video_is_served_with_the_defaults_and_one_warning(tmp_path, warnings):
    write_manifest(tmp_path, {"serve": {}})
    settings = settings_for(tmp_path, {"video.fps": 1})
    assert settings.video == Video(fps=1)
    (warning,) = warnings
    assert "has no video section" in warning
    assert str(settings.video) in warning


def test_a_manifest_of_version_0_1_is_refused_in_one_sentence(tmp_path):
    write_manifest(tmp_path, {"serve": {"video_pruning_rate": 0.9, "max_model_len": None}})
    (fault,) = faults(settings_for, tmp_path)
    assert "hybridquant.json: serve.video_pruning_rate" in fault
    assert "version 0.1" in fault
    assert '"video": {"pruning_rate": 0.9}' in fault


@pytest.mark.parametrize(
    ("manifest", "field"),
    [
        ({"video": {"rate": 0.9}}, "video.rate"),
        ({"video": {"pruning_rate": "0.9"}}, "video.pruning_rate"),
        ({"video": {"pruning_rate": 1.0}}, "video.pruning_rate"),
        ({"video": 0.75}, "video"),
        ({"serve": {"port": 1}}, "serve.port"),
        ({"serve": {"max_model_len": 4096.5}}, "serve.max_model_len"),
        ({"serve": ["x"]}, "serve"),
        ({"gate": True}, "gate"),
    ],
)
def test_a_manifest_that_holds_something_else_is_refused(tmp_path, manifest, field):
    write_manifest(tmp_path, {"video": {}} | manifest)
    (fault,) = faults(settings_for, tmp_path)
    assert fault.startswith(f"{tmp_path / MANIFEST}: {field}: ")


def test_all_faults_of_manifest_and_command_line_come_at_once(tmp_path):
    write_manifest(tmp_path, {"video": {"fps": 0, "frames": 3}, "serve": {"max_images": -1}})
    found = faults(settings_for, tmp_path, {"port": 70000}, ["--video-pruning-rate", "1.5"])
    assert [fault.removeprefix(f"{tmp_path / MANIFEST}: ").split(":")[0] for fault in found] == [
        "serve.max_images",
        "video.fps",
        "video.frames",
        "video.pruning_rate",
        "port",
    ]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("video.pruning_rate", 1.0, "less than 1"),
        ("video.pruning_rate", -0.1, "greater than or equal to 0"),
        ("video.pruning_rate", float("nan"), "a finite number"),
        ("video.fps", 0, "greater than 0"),
        ("video.max_frames", 0, "greater than or equal to 1"),
        ("max_model_len", 255, "greater than or equal to 256"),
        ("max_images", -1, "greater than or equal to 0"),
        ("max_videos", -1, "greater than or equal to 0"),
        ("port", 65536, "less than or equal to 65535"),
        ("port", "http", "a valid integer"),
        ("gpu_memory_utilization", 0, "greater than 0"),
        ("gpu_memory_utilization", 1.1, "less than or equal to 1"),
        ("tensor_parallel_size", 0, "greater than or equal to 1"),
        ("dtype", "int8", "'bfloat16', 'float16' or 'float32'"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(name, value, allowed):
    (fault,) = faults(override, ServeSettings(), {name: value})
    assert fault.startswith(f"{name}: is {value!r} (allowed: {allowed}")


def test_names_that_are_no_setting_are_faults():
    (fault,) = faults(override, ServeSettings(), {"video.pruning_rat": 0.5})
    assert fault == "video.pruning_rat: is not a setting (did you mean pruning_rate?)"


def test_the_recipes_section_is_what_a_manifest_may_hold():
    assert set(Serve.model_fields) < set(ServeSettings.model_fields)
    assert "video" not in Serve.model_fields
    assert "port" not in Serve.model_fields


def test_the_gate_of_the_manifest(tmp_path):
    for passed in (True, False, None):
        write_manifest(tmp_path, {"gate": {"passed": passed}})
        assert gate_passed(tmp_path) is passed


def test_every_setting_has_an_option_with_its_description_and_default():
    parser = argparse.ArgumentParser()
    add_setting_options(parser)
    shown = " ".join(parser.format_help().split())
    for name, field in (ServeSettings.model_fields | Video.model_fields).items():
        if name == "video":
            continue
        assert field.description
        assert " ".join(field.description.split()) in shown
        if field.default is not None:
            assert f"(default: {field.default})" in shown
    assert "--video-pruning-rate" in shown


def test_options_become_settings_by_their_dotted_names():
    parser = argparse.ArgumentParser()
    add_setting_options(parser)
    line = "--video-pruning-rate 0.5 --fps 1 --port 0 --allowed-local-media-path here --host ::"
    overrides = given_settings(parser.parse_args(line.split()))
    assert override(ServeSettings(), overrides) == ServeSettings(
        video=Video(pruning_rate=0.5, fps=1),
        port=0,
        host="::",
        allowed_local_media_path=Path("here"),
    )


def test_a_command_may_offer_some_settings_only():
    parser = argparse.ArgumentParser()
    add_setting_options(parser, ["video.pruning_rate"])
    assert given_settings(parser.parse_args([])) == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--port", "1"])
