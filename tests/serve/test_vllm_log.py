"""Which flag an error in vLLM's log is about."""

import pytest

from serve.vllm_flags import CheckedFlags
from serve.vllm_log import blamed_flags

ENGINE = "(EngineCore pid=7) ERROR 11-28 12:00:00 [core.py:1] "

BLAMED = [
    ("ValueError: Load format `zzz` is not supported", "--load-format zzz", "--load-format zzz"),
    ("ModuleNotFoundError: No module named 'zzz'", "--worker-cls=zzz.Zzz", "--worker-cls zzz.Zzz"),
    ("ValueError: Unsupported backend: ZZZ", '--attention-config={"backend":"Zzz"}', "--attention"),
    ("ValueError: block_size (7) is no multiple of 16", "--block-size 7", "--block-size 7"),
    ("ValueError: give --swap another", "--swap 3", "--swap 3"),
    ("OSError: No such file: '/zzz/a.json'", "--lora-modules zzz=/zzz", "--lora-modules zzz=/zzz"),
    ("OSError: /zzz is not a directory", "--enable-lora --tokenizer /zzz", "--tokenizer /zzz"),
]
"""An error, flags, and how the fault begins."""

NOT_BLAMED = [
    ("RuntimeError: out of memory at 32 sequences", "--max-num-seqs 32"),
    ("OSError: no file /models/tiny/zzz", "--load-format tiny"),
    ("OSError: the key secret is wrong", "--api-key secret"),
    ("RuntimeError: seed of no generator", "--seed 3"),
    ("RuntimeError: --seeds", "--seed 3"),
]
"""An error of the engine, and flags that it says nothing about."""


def faults(tmp_path, error, flags):
    log = tmp_path / "log"
    log.write_text(f"{ENGINE}{error}\nRuntimeError: Engine core initialization failed.\n")
    return [str(fault) for fault in blamed_flags(log, flags.split())]


@pytest.mark.parametrize(("error", "flags", "start"), BLAMED)
def test_a_flag_is_found_by_its_value_or_its_name(tmp_path, error, flags, start):
    (fault,) = faults(tmp_path, error, flags)
    assert fault.startswith(start)
    assert f"ends vLLM: {error}" in fault


@pytest.mark.parametrize(("error", "flags"), NOT_BLAMED)
def test_an_error_about_something_else_blames_no_flag(tmp_path, error, flags):
    assert faults(tmp_path, error, flags) == []


def test_a_value_of_which_vllm_makes_an_object_is_found_as_it_was_given(tmp_path):
    log = tmp_path / "log"
    log.write_text(f"{ENGINE}FileNotFoundError: No such file: '/zzz/a.json'\n")
    read = ("--lora-modules=LoRAModulePath(name='z')",)
    (fault,) = blamed_flags(log, CheckedFlags(("--lora-modules", "z=/zzz"), read))
    assert fault.where == "--lora-modules z=/zzz"


def test_the_first_error_that_names_a_flag_counts(tmp_path):
    error = f"ValueError: unexpected\n{ENGINE}KeyError: 'zzz'"
    assert len(faults(tmp_path, error, "--load-format zzz --quantization zz")) == 1
