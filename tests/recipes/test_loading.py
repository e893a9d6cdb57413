"""Reading recipes: every mistake is one sentence that names the field and the remedy.

No text of a recipe or an override ends in a traceback, hangs, or takes the memory of the machine.
"""

import time
from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from recipes.loading import SHIPPED, load_recipe

TINY = SHIPPED / "tiny/fp8.yaml"
REQUIRED = "model: tiny\noutput: out/x\nquantize:\n  layers: [{format: fp8}]\n"


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe with more text than the required fields, and reads it."""

    def read(more: str, required: str = REQUIRED):
        path = tmp_path / "recipe.yaml"
        path.write_text(required + more, encoding="utf-8")
        return load_recipe(path)

    return read


def only_fault(call) -> str:
    """The one fault that a call raises, as a sentence."""
    with pytest.raises(BadInput) as caught:
        call()
    assert len(caught.value.faults) == 1, str(caught.value)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    return text


# Overrides


def test_overrides_reach_any_field_by_its_dotted_name():
    overrides = [
        "calibrate.samples=64",
        "quantize.layers.0.kind=mlp",
        "video.pruning_rate=0.5",
        "serve.max_images=2",
        "model=a b",
    ]
    recipe = load_recipe(TINY, overrides)
    assert recipe.calibrate.samples == 64
    assert recipe.quantize.layers[0].kind == "mlp"
    assert recipe.video.pruning_rate == 0.5
    assert recipe.serve.max_images == 2
    assert recipe.model == "a b"


def test_an_override_reaches_into_a_section_that_is_null():
    recipe = load_recipe(SHIPPED / "tiny/nvfp4.yaml", ["quantize.auto.bits=5"])
    assert recipe.quantize.auto.bits == 5


def test_an_override_of_a_section_the_recipe_does_not_have():
    assert load_recipe(TINY, ["distill.steps=3"]).distill.steps == 3


def test_an_override_replaces_a_list_as_a_whole():
    recipe = load_recipe(TINY, ["quantize.layers=[{format: bf16}, {format: fp8, kind: mlp}]"])
    assert [rule.format for rule in recipe.quantize.layers] == ["bf16", "fp8"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibrate.sample=64", "calibrate.sample: unknown field .did you mean samples"),
        (
            "distill.learning_rat=1",
            "distill.learning_rat: unknown field .did you mean learning_rate",
        ),
        ("calibrat.samples=64", "calibrat: unknown field .did you mean calibrate"),
        ("quantize.layers.0.formt=fp8", "formt: unknown field .did you mean format"),
        ("calibrate.sources.0.paths=x", r"sources\.0\.paths: unknown field"),
        ("calibrate.video_pruning_rate=0.5", "video_pruning_rate: unknown field"),
        ("serve.video_pruning_rate=0.5", "video_pruning_rate: unknown field"),
        ("video.rate=0.5", "video.rate: unknown field .choose from fps, max_frames, pruning_rate"),
        ("calibrate.samples=many", "calibrate.samples: is 'many': .*integer"),
        ("calibrate.samples=0", "calibrate.samples: is 0: .*greater than or equal to 1"),
        ("calibrate.samples=64.5", "calibrate.samples: is 64.5: .*integer"),
        ("calibrate.samples=", "calibrate.samples: is null: .*integer"),
        ("video.pruning_rate=1", "video.pruning_rate: is 1: .*less than 1"),
        ("calibrate.sources=[]", "calibrate.sources: .*at least one entry"),
        ("calibrate.sources=[{type: csv}]", "unknown source type 'csv'"),
        ("quantize.kv_cache=int4", "kv_cache: is 'int4': should be 'fp8'"),
        ("quantize.memory=stream", "memory: is 'stream': should be 'auto', 'whole' or 'layers'"),
        ("quantize=fp8", "quantize: is 'fp8': should be a mapping of fields"),
        ("quantize.layers=fp8", "quantize.layers: is 'fp8': should be a list"),
        ("accuracy.tasks.names=[chrt]", "unknown task 'chrt': did you mean chart"),
        ("output=3", "output: is 3: should be a path"),
        ("output=", "output: is null: should be a path"),
        ("output=/", "output: is '/': give a directory that does not exist yet"),
        ("output=~nobody-here/x", "output: .*there is no home directory for ~nobody-here"),
        ("calibrate.samples", "is not a recipe and not key=value"),
        ("=3", "is not a recipe and not key=value"),
        ("model.name=x", "model: is {'name': 'x'}: should be a valid string"),
        ("quantize.layers.7.kind=mlp", "there is no such field: list index out of range"),
        ("quantize.layers.x.kind=mlp", "there is no such field: Index 'x'"),
        ("output=[1", "the value is not YAML"),
        ("device=${x", "the value is not YAML"),
        ("device=!!int x", "the value is not YAML: invalid literal for int"),
        ("device=!x y", "the value is not YAML"),
        ("device=*x", "the value is not YAML: found undefined alias"),
        ("device=a\nb: c", "the value is not YAML"),
        ("device=\0", "the value is not YAML"),
        ("device=\ud800", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_one_clear_error(override, message):
    with pytest.raises(BadInput, match=message) as caught:
        load_recipe(TINY, [override])
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("key", ["calibrate..samples", ".calibrate", "calibrate.", "calibrate]"])
def test_a_key_that_is_not_a_dotted_name_is_an_unknown_field(key):
    assert "unknown field" in only_fault(lambda: load_recipe(TINY, [f"{key}=3"]))


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(BadInput) as caught:
        load_recipe(TINY, ["calibrate.samples=x", "accuracy.sed=3", "video.pruning_rate=2"])
    assert len(caught.value.faults) == 3


def test_all_wrong_sources_are_named_and_their_list_is_not_called_empty():
    sources = "[{type: jsonl}, {type: synthetic, weight: 0}]"
    with pytest.raises(BadInput) as caught:
        load_recipe(TINY, [f"calibrate.sources={sources}"])
    path_missing, weight_wrong = caught.value.faults
    assert "calibrate.sources.0.path: is missing" in str(path_missing)
    assert "calibrate.sources.1.weight: is 0: should be greater than 0" in str(weight_wrong)


def test_an_override_given_twice_is_refused():
    overrides = ["calibrate.samples=3", "video.fps=1", "calibrate.samples=4"]
    assert "calibrate.samples: is given twice" in only_fault(lambda: load_recipe(TINY, overrides))


def test_a_long_override_is_shortened():
    only_fault(lambda: load_recipe(TINY, ["x" * 100_000]))
    only_fault(lambda: load_recipe(TINY, ["x" * 100_000 + "=1"]))
    only_fault(lambda: load_recipe(TINY, ["calibrate.samples=" + "x" * 100_000]))


# Numbers


@pytest.mark.parametrize(
    "more",
    [
        "calibrate: {samples: true}",
        "calibrate: {samples: yes}",
        "video: {pruning_rate: false}",
        "accuracy: {tasks: {items: true}}",
        "distill: {video_pruning_rates: [true]}",
        "calibrate: {sources: [{type: synthetic, weight: true}]}",
        "calibrate: {sources: [{type: synthetic, kinds: {chart: true}}]}",
        "device: true",
    ],
)
def test_true_is_not_a_number_and_not_a_name(more, recipe):
    assert "should not be true or false" in only_fault(lambda: recipe(more))


def test_true_is_what_it_is_where_it_belongs(recipe):
    assert recipe("distill: {gradient_checkpointing: true}").distill.gradient_checkpointing is True


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+400"])
@pytest.mark.parametrize(
    "field",
    [
        "accuracy: {max_kl: %s}",
        "accuracy: {min_top1: %s}",
        "video: {fps: %s}",
        "calibrate: {samples: %s}",
        "distill: {learning_rate: %s}",
        "calibrate: {sources: [{type: synthetic, weight: %s}]}",
    ],
)
def test_a_number_that_is_not_finite_is_refused(field, value, recipe):
    assert "should be a finite number" in only_fault(lambda: recipe(field % value))


@pytest.mark.parametrize("digits", ["9" * 30, "-" + "9" * 30, "0x" + "f" * 5000])
@pytest.mark.parametrize("field", ["samples", "seed"])
def test_an_integer_that_no_library_takes_is_refused(field, digits, recipe):
    found = only_fault(lambda: recipe(f"calibrate: {{{field}: {digits}}}"))
    assert f"calibrate.{field}" in found
    assert "should be an integer of at most 64 bits" in found


def test_an_integer_that_python_does_not_convert_is_refused(recipe):
    digits = "9" * 5000
    assert "Exceeds the limit" in only_fault(lambda: recipe(f"calibrate: {{samples: {digits}}}"))


@pytest.mark.parametrize("value", ["{a: 1}", "[1]", "!!binary aGVsbG8=", "'', x"])
def test_something_else_where_a_number_is_expected(value, recipe):
    with pytest.raises(BadInput, match=r"calibrate\.samples: is .*should be a valid integer"):
        recipe(f"calibrate: {{samples: {value}}}")


# Files


def test_a_missing_field_is_named(recipe):
    required = "model: tiny\nquantize:\n  layers: [{format: fp8}]\n"
    assert "output: is missing (add it)" in only_fault(lambda: recipe("", required))


@pytest.mark.parametrize("text", ["", "# a comment\n", "null\n"])
def test_an_empty_recipe_misses_what_is_required(text, recipe):
    with pytest.raises(BadInput) as caught:
        recipe("", text)
    missing = [fault.where.rpartition(": ")[2] for fault in caught.value.faults]
    assert missing == ["model", "output", "quantize"]


def test_a_misspelt_recipe_names_the_nearest(monkeypatch):
    monkeypatch.chdir(SHIPPED.parent)
    with pytest.raises(BadInput, match=r"did you mean recipes/tiny/fp8\.yaml"):
        load_recipe(Path("recipes/tiny/fp88.yaml"))


def test_a_misspelt_recipe_names_the_nearest_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"did you mean .*recipes/tiny/fp8\.yaml"):
        load_recipe(SHIPPED / "tiny/fp88.yaml")


def test_a_recipe_is_read_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(TINY).model == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- a", "does not contain a mapping of fields"),
        ("3", "cannot be read as YAML: "),
        (f"{REQUIRED}---\na: 1\n", "cannot be read as YAML: expected a single document"),
        ("model:\ttiny\n\toutput: x", "cannot be read as YAML"),
        ("model: a\0b", "cannot be read as YAML"),
        ('model: "\\ud800"', "cannot be read as YAML"),
        ("? [a]\n: 1", "cannot be read as YAML"),
        ("null: 1", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_not_a_recipe(text, message, recipe):
    assert message in only_fault(lambda: recipe("", text))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (REQUIRED.encode("utf-16"), "can't decode byte"),
        ("model: é".encode("latin-1"), "can't decode byte"),
    ],
    ids=["UTF-16", "Latin-1"],
)
def test_a_file_in_another_encoding(data, message, tmp_path):
    (tmp_path / "r.yaml").write_bytes(data)
    assert message in only_fault(lambda: load_recipe(tmp_path / "r.yaml"))


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "r.yaml").write_text(REQUIRED, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").model == "tiny"


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    assert "Is a directory" in only_fault(lambda: load_recipe(tmp_path))
    assert "Not a directory" in only_fault(lambda: load_recipe(TINY / "x"))
    assert "File name too long" in only_fault(lambda: load_recipe("x" * 5000))
    assert "null byte" in only_fault(lambda: load_recipe("a\0b"))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("model: other", "model"),
        ("calibrate: {samples: 3}\ncalibrate: {seed: 3}", "calibrate"),
        ("calibrate: {samples: 3, samples: 4}", "samples"),
        ("calibrate: {sources: [{type: jsonl, path: a, path: b}]}", "path"),
    ],
)
def test_a_key_given_twice_is_refused(more, key, recipe):
    assert f"found duplicate key {key}" in only_fault(lambda: recipe(more))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "invalid literal for int"),
        ("!!float x", "could not convert string to float"),
        ("!!timestamp 2024-99-99", "month must be in 1..12"),
        ("!!timestamp 2024-01-01", "'date' is not a supported primitive type"),
        ("!!binary x!", "failed to decode base64 data"),
        ("!!set {a, b}", "'set' is not a supported primitive type"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("!unknown x", "could not determine a constructor"),
        ("'${'", "no viable alternative at input"),
    ],
)
def test_a_value_that_yaml_cannot_make_is_one_sentence(value, message, recipe):
    assert message in only_fault(lambda: recipe(f"device: {value}"))


def test_a_date_is_text(recipe):
    assert recipe("device: 2024-13-45").device == "2024-13-45"


def nested(opening: str, closing: str, depth: int) -> str:
    return f"device: {opening * depth}{closing * depth}"


# Five lines of aliases to the line before are 9^8 values.
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
for _name, _before in zip("bcdefghi", "abcdefgh", strict=True):
    BOMB += f"{_name}: &{_name} [{', '.join([f'*{_before}'] * 9)}]\n"

TOO_LARGE = {
    "brackets": (nested("[", "]", 100_000), "is nested more than 32 levels deep"),
    "a few brackets": (nested("[", "]", 40), "is nested more than 32 levels deep"),
    "braces": (nested("{a: ", "}", 1000), "is nested more than 32 levels deep"),
    "brackets that stay open": ("device: " + "[" * 100_000, "is nested more than 32 levels deep"),
    "bomb": (BOMB, "has more than 20,000 values, those of aliases included"),
    "alias to itself": ("device: &a [*a]", "has an alias inside the value"),
    "alias to a mapping above": ("calibrate: &a {sources: [*a]}", "has an alias inside the value"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(30_000)), "has more than 20,000 values"),
    "long text": ("device: " + "x" * 1_000_000, "has more than 1,000,000 characters"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_recipe_that_is_too_large_is_refused_at_once(name, recipe):
    text, message = TOO_LARGE[name]
    start = time.monotonic()
    assert message in only_fault(lambda: recipe(text))
    assert time.monotonic() - start < 5


def test_an_endless_file_is_refused_at_once():
    start = time.monotonic()
    assert "has more than 1,000,000 characters" in only_fault(lambda: load_recipe("/dev/zero"))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("value", ["[" * 100_000, "[" * 100 + "]" * 100, "&a [*a]"])
def test_an_override_that_is_too_large_is_refused_at_once(value):
    assert "the value is not YAML: it " in only_fault(
        lambda: load_recipe(TINY, [f"device={value}"])
    )


def test_an_alias_is_allowed(recipe):
    more = """
calibrate: {sources: &sources [{type: synthetic, kinds: {chart: 1}}]}
accuracy: {sources: *sources}
"""
    loaded = recipe(more)
    assert loaded.accuracy.sources == loaded.calibrate.sources


# Paths


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(TINY, ["output=~/x", "model=~/bf16"])
    assert recipe.output == tmp_path / "x"
    assert recipe.model == str(tmp_path / "bf16")


def test_a_path_with_nul_is_refused(recipe):
    required = REQUIRED.replace("out/x", '"a\\0b"')
    assert "should be text without NUL" in only_fault(lambda: recipe("", required))
