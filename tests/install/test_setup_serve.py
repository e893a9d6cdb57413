from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from serve.setup_environment import DECODER, set_up

ROOT = Path(__file__).parents[2]

# The end of what pip 26.3 prints when a build backend fails.
BUILD_FAILED = """\
  error: subprocess-exited-with-error
      error: invalid command 'bdist_wheel'
      [end of output]
  note: This error originates from a subprocess, and is likely not a problem with pip.
error: metadata-generation-failed
note: This is an issue with the package mentioned above, not pip.
hint: See above for details."""


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (BUILD_FAILED, "pip install: invalid command 'bdist_wheel'"),
        ("ERROR: No matching distribution found for a\nnote: b", "No matching distribution found"),
        (
            "/usr/bin/python: No module named pip",
            "pip install: /usr/bin/python: No module named pip",
        ),
    ],
)
def test_the_reason_that_pip_gives_is_shown(printed, reason, tmp_path):
    (tmp_path / "printed").write_text(printed)
    found = f'{{"versions": {{"vllm": "0.33.0"}}, "cpu": false, "purelib": "{tmp_path}"}}'
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f"if [ \"$1\" = -c ]; then echo '{found}'; exit 0; fi\n"
        f"cat {tmp_path}/printed >&2; exit 1\n"
    )
    python.chmod(0o755)
    with pytest.raises(BadInput) as caught:
        set_up(python)
    assert reason in str(caught.value)


def test_serving_decodes_with_the_release_that_calibration_decodes_with():
    for name in ("requirements.txt", "requirements-serve-cpu.txt", "requirements-serve-cuda.txt"):
        assert DECODER in (ROOT / name).read_text(encoding="utf-8").splitlines()
