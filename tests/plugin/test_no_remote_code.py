"""No Python file of a checkpoint runs in vLLM, whatever its configuration files name."""

import os
import shutil
from pathlib import Path

from tests.editing import edit_json

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("planted_code.py")
PLANTED = "from pathlib import Path\nPath({mark!r}).touch()\nraise SystemExit('planted')\n"


def plant(directory: Path, mark: Path) -> None:
    """Make every file that names a class name one in a module that leaves a mark."""
    code = PLANTED.format(mark=str(mark))
    for name in ("configuration", "modeling", "planted"):
        (directory / f"{name}.py").write_text(code)
    edit_json(
        directory / "tokenizer_config.json",
        lambda raw: raw.update(auto_map={"AutoTokenizer": ["planted.Tokenizer", None]}),
    )
    auto_map = {"AutoProcessor": "planted.Processor", "AutoImageProcessor": "planted.Images"}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.exists():
            path.write_text("{}")
        edit_json(path, lambda raw: raw.update(auto_map=auto_map))


def test_planted_modules_are_never_executed(vllm_process, tiny, fp8, tmp_path):
    directories = []
    for kind, checkpoint in (("bf16", tiny), ("export", fp8)):
        directory = Path(shutil.copytree(checkpoint, tmp_path / kind))
        plant(directory, tmp_path / f"executed {kind}")
        directories.append(str(directory))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "plugin"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "VLLM_NO_USAGE_STATS": "1"}
    result = vllm_process.run(SCRIPT, *directories, environment=environment)
    assert list(tmp_path.glob("executed*")) == []
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines().count("NanoVLConfig") == len(directories)
