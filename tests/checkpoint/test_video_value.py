"""How video is seen is one value: its ranges, and who reads it from where."""

import logging
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from accuracy.__main__ import compared_video
from checkpoint.faults import BadInput
from checkpoint.video import UNPRUNED, Video
from export.manifest import Manifest, read_manifest, write_manifest
from recipes.loading import SHIPPED, load_recipe
from recipes.schema import Recipe

RECIPE = SHIPPED / "tiny/fp8.yaml"


def test_the_defaults_are_the_reports():
    assert Video().model_dump() == {"pruning_rate": 0.75, "fps": 2.0, "max_frames": 128}
    assert Video(pruning_rate=0) == UNPRUNED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pruning_rate", -0.01),
        ("pruning_rate", 1),
        ("pruning_rate", float("nan")),
        ("pruning_rate", "half"),
        ("pruning_rate", True),
        ("fps", 0),
        ("fps", -1),
        ("fps", float("inf")),
        ("fps", float("nan")),
        ("max_frames", 0),
        ("max_frames", 1.5),
        ("max_frames", True),
    ],
)
def test_a_value_out_of_its_range_is_refused(field, value):
    with pytest.raises(ValidationError) as caught:
        Video(**{field: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (field,)


@pytest.mark.parametrize(
    ("field", "value"), [("pruning_rate", 0), ("pruning_rate", 0.999), ("max_frames", 1)]
)
def test_a_value_at_the_end_of_its_range_is_taken(field, value):
    assert getattr(Video(**{field: value}), field) == value


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Video(rate=0.5)


def test_a_value_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Video().fps = 1.0


def test_another_rate_keeps_the_sampling():
    video = Video(pruning_rate=0.5, fps=1, max_frames=16)
    assert video.with_rate(0.9) == Video(pruning_rate=0.9, fps=1, max_frames=16)
    assert video.pruning_rate == 0.5


def test_another_rate_is_checked():
    with pytest.raises(ValidationError):
        Video().with_rate(1.0)


def test_a_value_is_shown_in_one_line():
    assert str(Video()) == "EVS rate 0.75, 2 fps, 128 frames"
    assert str(UNPRUNED) == "EVS rate 0, 2 fps, 128 frames"


# Recipes


def sections_in(annotation) -> list[type[BaseModel]]:
    """The sections inside an annotation such as `tuple[Rule, ...]` or `Distill | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = []
    for part in get_args(annotation):
        found += sections_in(part)
    return found


def fields_below(section, prefix="") -> list[str]:
    """Every field of a recipe by its dotted name."""
    found = []
    for name, info in section.model_fields.items():
        inner = sections_in(info.annotation)
        if not inner:
            found.append(f"{prefix}{name}")
        for below in inner:
            found += fields_below(below, f"{prefix}{name}.")
    return found


def test_only_one_section_of_a_recipe_sets_how_video_is_seen():
    fields = fields_below(Recipe)
    assert "calibrate.samples" in fields
    words = ("rate", "fps", "frame")
    found = {name for name in fields if any(word in name.rpartition(".")[2] for word in words)}
    assert found == {
        "video.pruning_rate",
        "video.fps",
        "video.max_frames",
        "distill.video_pruning_rates",
        "distill.learning_rate",
    }


@pytest.fixture
def job(tiny_checkpoint, tmp_path):
    """A job of the pipeline for a recipe, as far as it opens prompts and makes manifests."""
    from checkpoint.processes import ALONE
    from checkpoint.run_state import RunState
    from pipeline.job import Job
    from quantize.policy import make_policy

    overrides = [
        "video.pruning_rate=0.5",
        "video.fps=1",
        "video.max_frames=3",
        f"output={tmp_path / 'out'}",
        "calibrate.sources=[{type: synthetic, kinds: {video_event: 1}}]",
        "accuracy.sources=[{type: synthetic, kinds: {video_event: 1}}]",
    ]
    recipe = load_recipe(RECIPE, overrides)
    family = tiny_checkpoint.config.family
    quantize = recipe.quantize
    policy = make_policy(quantize.layers, tiny_checkpoint.linears, quantize.kv_cache, family)
    state = RunState(recipe.output, {})
    return Job(recipe, tiny_checkpoint, policy, "cpu", ALONE, state, None)


WANTED = Video(pruning_rate=0.5, fps=1, max_frames=3)


def test_calibration_and_held_out_prompts_see_the_recipes_video(job):
    from calibrate.samples import Skipped

    for prompts in (job.calibration_prompts(Skipped()), job.held_out_prompts()):
        prompt = next(prompts)
        assert prompt.video == WANTED
        (clip,) = prompt.media
        assert clip.tiles <= 3
        assert prompt.length < len(prompt.token_ids)


def test_the_manifest_carries_the_recipes_video_and_gives_it_back(job, tmp_path):
    from pipeline.job import Record, make_manifest

    manifest = make_manifest(job, Record({}, {}), {})
    assert manifest.video == WANTED
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path).video == WANTED
    assert compared_video(tmp_path, None) == WANTED


def test_the_server_sees_the_manifests_video(job, tmp_path):
    from pipeline.job import Record, make_manifest
    from serve.settings import settings_for

    write_manifest(tmp_path, make_manifest(job, Record({}, {}), {}))
    assert settings_for(tmp_path).video == WANTED


def test_a_distillation_without_rates_of_its_own_takes_the_recipes():
    recipe = load_recipe(SHIPPED / "tiny/nvfp4_qad.yaml", ["distill.video_pruning_rates=null"])
    assert recipe.distill.video_pruning_rates is None
    assert recipe.video.pruning_rate == 0.75


# Comparing


@pytest.fixture
def exported(tmp_path):
    """A directory that was calibrated with another video than the default."""
    write_manifest(tmp_path, Manifest({}, {}, {}, {}, video=WANTED))
    return tmp_path


def test_clips_are_compared_as_the_manifest_says(exported, caplog):
    assert compared_video(exported, None) == WANTED
    assert compared_video(exported, 0.5) == WANTED
    assert caplog.records == []


def test_another_rate_than_the_manifests_is_one_warning(exported, caplog):
    with caplog.at_level(logging.INFO, "hybridquant"):
        video = compared_video(exported, 0.9)
    assert video == WANTED.with_rate(0.9)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "was calibrated at EVS rate 0.5 and is compared at 0.9" in record.getMessage()


def test_without_a_manifest_the_defaults_hold_as_in_serving(tiny, caplog):
    from serve.settings import ServeSettings

    assert compared_video(tiny, None) == Video() == ServeSettings().video
    assert compared_video(tiny, 0.0) == UNPRUNED
    assert caplog.records == []


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_a_fault(rate, exported):
    with pytest.raises(BadInput, match=r"--video-pruning-rate: is .* not including 1"):
        compared_video(exported, rate)


def test_a_manifest_with_a_rate_out_of_range_is_a_fault(exported):
    from tests.editing import edit_json

    edit_json(exported / "hybridquant.json", lambda m: m["video"].update(pruning_rate=3))
    with pytest.raises(BadInput, match=r"hybridquant\.json: video\.pruning_rate is 3"):
        compared_video(exported, None)
