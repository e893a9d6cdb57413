"""Flags after `--`: how vLLM's own parser reads them, and what the plan and the access rules make
of that.
"""

import json

import pytest
from commands import run_module

from checkpoint.endpoint import KEY_VARIABLE
from checkpoint.faults import BadInput
from serve.__main__ import run
from serve.environment import environment_and_flags
from serve.preflight import checked_settings
from serve.vllm_flags import (
    CheckedFlags,
    flag_faults,
    flag_value,
    flags_after,
    named_flags,
    setting_values,
    switched_on,
)

FILE = "max-model-len: 8K\nhost: 0.0.0.0\nenable-prefix-caching: true\n"

READ = {
    "--max-model-len 8k": ["--max-model-len=8000"],
    "--max-model-len=8K": ["--max-model-len=8192"],
    "--max_model_len 8192": ["--max-model-len=8192"],
    "--max-model-len auto": ["--max-model-len=-1"],
    "--max-num-b 4k": ["--max-num-batched-tokens=4000"],
    "--hos 0.0.0.0": ["--host=0.0.0.0"],
    "-tp 2": ["--tensor-parallel-size=2"],
    "--kv-cache-memory-bytes 2G": ["--kv-cache-memory-bytes=2147483648"],
    "--limit-mm-per-prompt.image=3": ['--limit-mm-per-prompt={"image": 3}'],
    "--no-enable-prefix-caching": ["--no-enable-prefix-caching"],
    "--api-key one two": ["--api-key=one", "--api-key=two"],
    "--host None": ["--host="],
    "--seed -7": ["--seed=-7"],
    '--compilation-config {"mode":0}': None,
    '--limit-mm-per-prompt {"image":{"count":3,"width":512}}': None,
    "--config FILE": ["--enable-prefix-caching", "--host=0.0.0.0", "--max-model-len=8192"],
    "--port 9000 --config FILE --max-model-len 4096": [
        "--enable-prefix-caching",
        "--host=0.0.0.0",
        "--max-model-len=4096",
        "--port=9000",
    ],
}
"""Flags, and how vLLM reads them: what is on the command line goes before the file. Of those with
None, only that they are not refused is looked at.
"""

REFUSED = {
    "--max-num-sequences 4": "--max-num-sequences 4 (did you mean --max-num-seqs?)",
    "--max-num-seqs many": "invalid int value: 'many' (correct it, or leave it out)",
    "--max-num-seqs 0": "--max-num-seqs: 0: Input should be greater than or equal to 1",
    "--gpu-memory-utilization 1.5": "1.5: Input should be less than or equal to 1",
    "--max-model-len -2": "-2: Input should be greater than or equal to -1",
    "--mm-processor-cache-gb -1": "-1.0: Input should be greater than or equal to 0",
    "--video-pruning-rate 1": "1.0: Input should be less than 1",
    "--video-pruning-rate=-0.5": "-0.5: Input should be greater than or equal to 0",
    "--video-pruning-rate -0.5": "write a negative number behind a sign of equality",
    "--gpu-memory-utilization nan": "nan is no number",
    "--kv-offloading-size nan": "nan is no number",
    "--api-server-count 0": "--api-server-count: 0: it is at least 1",
    "--renderer-num-workers 0": "0: it is at least 1",
    "--kv-cache-memory-bytes 0": "0: it is at least 1",
    "--cudagraph-capture-sizes 8 -1": "-1: it is at least 1",
    "--seed 99999999999999999999": "it is at most 18446744073709551615",
    "--ssl-cert-reqs 3": "3: it is at most 2",
    '--media-io-kwargs {"video":5}': "--media-io-kwargs: video: Input should be a valid dictionary",
    '--limit-mm-per-prompt {"image":1.5}': "image.int: Input should be a valid integer",
    "--scheduler-cls zzz": "--scheduler-cls: 'zzz' is not of the form MODULE.NAME",
    "--worker-cls zzz.Zzz": "--worker-cls: 'zzz.Zzz': there is no module zzz",
    "--middleware json.zzz.Zzz": "'json.zzz.Zzz': there is no module json.zzz",
    "--worker-extension-cls zzz.zz.Z": "'zzz.zz.Z': No module named 'zzz'",
    "--logits-processors json:loads zzz": "'zzz' is not of the form MODULE:NAME",
    "--distributed-executor-backend zzz": "'zzz' is not of the form MODULE.NAME",
    "--max-model-len 8.5K": "Decimals are not allowed with binary suffixes",
    "--mamba-ssm-cache-dtype float17": "invalid choice: 'float17'",
    "--media-io-kwargs no": "Value no cannot be converted to loads. (",
    "--seed": "argument --seed: expected one argument",
    "--max-num": "ambiguous option: --max-num could match",
    "--enable-auto-tool-choice": "--enable-auto-tool-choice requires --tool-call-parser",
    "--config nowhere.yaml": "No such file or directory: 'nowhere.yaml'",
    "--config=FILE": "is ignored by vLLM",
    "--model other": "DIR is the model, so leave --model out",
    "--help": "they print a text and end vLLM",
    "stray": "unrecognized arguments: stray (vllm serve --help=all names every flag)",
}
"""Flags, and what the fault says."""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """All of the flags above, as one process that has imported vLLM reads them, by their text."""
    file = tmp_path_factory.mktemp("flags") / "flags.yaml"
    file.write_text(FILE)
    texts = [*READ, *REFUSED]
    given = [text.replace("FILE", str(file)).split() for text in texts]
    _, flags = environment_and_flags(*given)
    return dict(zip(texts, flags, strict=True))


@pytest.mark.parametrize("text", READ)
def test_flags_are_read_as_vllm_reads_them(checked, text):
    flags = checked[text]
    assert list(flag_faults(flags)) == []
    if READ[text] is not None:
        assert list(flags.read) == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_flags_that_vllm_refuses_are_one_fault(checked, text):
    (fault,) = flag_faults(checked[text])
    assert REFUSED[text] in str(fault)
    assert "\n" not in str(fault)


def checked_flags_of(given, *read):
    return CheckedFlags(tuple(given), tuple(read))


def test_the_sequence_is_what_was_given():
    flags = checked_flags_of(["--max-num", "4"], "--max-num-seqs=4")
    assert list(flags) == ["--max-num", "4"]
    joined = flags_after(["--seed", "7"], flags)
    assert list(joined) == ["--seed", "7", "--max-num", "4"]
    assert named_flags(joined) == {"--seed", "--max-num-seqs"}
    assert flags_after(["--seed", "7"], ["--a"]) == ("--seed", "7", "--a")


def test_every_reader_takes_what_vllm_reads():
    flags = checked_flags_of(["--config", "x.yaml"], "--no-enable-lora", "--max-model-len=8000")
    assert named_flags(flags) == {"--enable-lora", "--max-model-len"}
    assert switched_on(flags) == {"--max-model-len"}
    assert flag_value(flags, "--max-model-len") == "8000"
    assert setting_values(flags) == {"max_model_len": 8000}


@pytest.mark.parametrize(
    ("limits", "images", "videos"),
    [
        ({"image": 3, "video": 0}, 3, 0),
        ({"video": {"count": 2, "num_frames": 16}}, 999, 2),
        ({"video": {"num_frames": 16}, "audio": 1}, 999, 999),
    ],
)
def test_limits_of_media_are_settings(limits, images, videos):
    values = {"max_images": images, "max_videos": videos}
    assert setting_values(["--limit-mm-per-prompt", json.dumps(limits)]) == values


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_an_address_that_others_reach_needs_a_key_however_it_is_written(tiny, probed, no_key):
    probed({"read": [["--host", "0.0.0.0"]]})
    with pytest.raises(BadInput, match=r"host 0\.0\.0\.0: can be reached from other machines"):
        run([str(tiny), "--dry-run", "--", "--hos", "0.0.0.0"])


def test_an_address_and_a_key_of_a_file_are_taken(tiny, probed, no_key, capsys, restored_logging):
    probed({"read": [["--host", "0.0.0.0"], ["--port", 9000], ["--api-key", ["secret"]]]})
    assert run([str(tiny), "--dry-run", "--", "--config", "flags.yaml"]) == 0
    line = capsys.readouterr().out
    assert line.rstrip().endswith("--config flags.yaml")
    # The file's go first where vLLM is given no others.
    for flag in ("--host", "--port", "secret"):
        assert flag not in line


def test_what_vllm_refuses_ends_the_command_with_2_and_comes_with_the_other_faults(
    tiny_copy, probed
):
    (tiny_copy / "tokenizer.json").unlink()
    probed({"refused": "unrecognized arguments: --max-num-seqz 4", "known": ["--max-num-seqs"]})
    flags = ("--dry-run", "--port", "-1", "--", "--max-num-seqz", "4")
    done = run_module("serve", tiny_copy, *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    asking, refused, *others = done.stderr.splitlines()
    assert asking.startswith("asking vLLM")
    assert refused.startswith("error: flags after --: vLLM refuses them: unrecognized arguments:")
    assert refused.endswith("--max-num-seqz 4 (did you mean --max-num-seqs?)")
    assert [line.split(":")[1].strip() for line in others] == [
        "port",
        str(tiny_copy / "tokenizer.json"),
    ]


def test_a_parser_that_cannot_be_had_is_a_warning(probed, tiny):
    probed({"unread": "RuntimeError: Failed to infer device type"})
    done = run_module("serve", tiny, "--dry-run", "--", "--max-model-len", "4096")
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "vLLM was not asked about its flags" in line
    assert "Failed to infer device type" in line


def test_a_length_that_vllm_chooses_goes_before_the_manifests(tiny_copy, probed):
    manifest = {"video": {}, "serve": {"max_model_len": 4096}}
    (tiny_copy / "hybridquant.json").write_text(json.dumps(manifest))
    probed({"read": [["--max-model-len", -1]]})
    environment, (flags,) = environment_and_flags(["--max-model-len", "auto"])
    assert checked_settings(tiny_copy, {}, (), environment).max_model_len == 4096
    assert checked_settings(tiny_copy, {}, flags, environment).max_model_len is None
