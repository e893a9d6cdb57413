"""The tensor layout computed from a config equals the released one, and the tiny checkpoint follows
it.
"""

import json
from pathlib import Path

import pytest

from checkpoint.files import TensorFiles
from checkpoint.layout import expected_tensors, language_model_linears
from checkpoint.opened import open_bf16
from tiny.checkpoint import write_tiny

RELEASED_LAYOUT = Path(__file__).parents[1] / "data" / "full12b" / "layout.json"
SAFETENSORS_DTYPES = {"torch.bfloat16": "BF16", "torch.int64": "I64"}


def test_the_12b_config_gives_exactly_the_released_760_tensors(full12b):
    released = {}
    for name, (shape, dtype) in json.loads(RELEASED_LAYOUT.read_text()).items():
        released[name] = (shape, SAFETENSORS_DTYPES[dtype])
    ours = {}
    for name, spec in expected_tensors(full12b).items():
        ours[name] = (list(spec.shape), spec.dtype)
    assert ours == released
    assert len(ours) == 760


def test_the_12b_has_136_quantizable_linears(full12b):
    linears = language_model_linears(full12b)
    assert len(linears) == 28 * 2 + 28 * 2 + 6 * 4
    specs = expected_tensors(full12b)
    assert all(specs[f"{linear.name}.weight"].shape == linear.shape for linear in linears)


def test_the_tiny_checkpoint_has_the_layout_of_its_config(tiny):
    checkpoint = open_bf16(tiny)
    assert dict(checkpoint.tensors.specs) == expected_tensors(checkpoint.config)
    assert checkpoint.layout == expected_tensors(checkpoint.config)
    assert list(checkpoint.linears) == language_model_linears(checkpoint.config)


def test_the_tiny_checkpoint_is_the_same_byte_for_byte(tiny, tmp_path):
    write_tiny(tmp_path / "again")
    files = sorted(path.name for path in tiny.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tiny / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_tiny_checkpoint_has_the_released_schema(tiny_config, full12b):
    """Every key of the released config, on every level, and no other; all mixer kinds, two
    attention layers.
    """

    def keys(value, prefix=""):
        found = set()
        if isinstance(value, dict):
            for key, inner in value.items():
                found.add(f"{prefix}{key}")
                found |= keys(inner, f"{prefix}{key}.")
        return found

    resized = {
        "vision_config.args.hidden_size",
        "vision_config.args.num_hidden_layers",
        "vision_config.args.num_attention_heads",
        "vision_config.args.intermediate_size",
    }
    assert keys(tiny_config.raw) - resized == keys(full12b.raw)
    kinds = {tiny_config.mixer_kind(layer) for layer in range(tiny_config.depth)}
    assert kinds == {"mamba", "mlp", "attention"}
    assert tiny_config.pattern.count("*") >= 2


def test_sharded_weights_read_like_a_single_file(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:50],
        "model-00002-of-00002.safetensors": names[50:],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {}
    for file, part in parts.items():
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = TensorFiles(tmp_path)
    assert dict(sharded.specs) == dict(TensorFiles(tiny).specs)
    assert all(sharded.read(name).equal(tensors[name]) for name in names)


@pytest.mark.parametrize(
    "key", ["max_sequence_length", "video_pruning_rate", "norm_std", "template"]
)
def test_every_key_of_config_json_is_kept(tiny, tiny_config, key):
    assert tiny_config.raw[key] == json.loads((tiny / "config.json").read_text())[key]
