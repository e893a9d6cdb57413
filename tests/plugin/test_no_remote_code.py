"""No Python file of a checkpoint runs in vLLM, whatever its configuration files name."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from serve.environment import find_python
from tests.editing import edit_json

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("planted_code.py")
PLANTED = "from pathlib import Path\nPath({mark!r}).touch()\nraise SystemExit('planted')\n"


KINDS = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoVideoProcessor",
    "AutoFeatureExtractor",
    "AutoTokenizer",
)

FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "generation_config.json",
)
"""Files of a checkpoint in which transformers looks for a class, or may do so one day."""


def plant(directory: Path, mark: Path) -> None:
    """Make every file that names a class name one in a module that leaves a mark."""
    code = PLANTED.format(mark=str(mark))
    for name in ("configuration", "modeling", "planted", "custom_generate/generate"):
        path = directory / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    edit_json(
        directory / "tokenizer_config.json",
        lambda raw: raw.update(auto_map={"AutoTokenizer": ["planted.Tokenizer", None]}),
    )
    auto_map = {kind: f"planted.{kind}" for kind in KINDS}
    for name in FILES:
        path = directory / name
        if not path.exists():
            path.write_text("{}")
        edit_json(path, lambda raw: raw.update(auto_map=raw.get("auto_map", {}) | auto_map))

    def plant_in_parts(raw):
        for part in ("llm_config", "vision_config"):
            raw[part]["auto_map"] = auto_map

    edit_json(directory / "config.json", plant_in_parts)


TEMPLATE = """{{% for name in ['__class__', '__init__', '__globals__'] %}}{{% endfor %}}
{{{{ ().__class__.__base__.__subclasses__() }}}}
{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}
{{{{ lipsum.__globals__['os'].popen('touch {mark}').read() }}}}
{{{{ messages.__class__.__mro__[1].__subclasses__() }}}}
"""
"""What leaves a sandbox that is none."""


@pytest.mark.parametrize("kind", ["bf16", "export"])
def test_planted_modules_are_never_executed(tiny, fp8, tmp_path, kind):
    directory = Path(shutil.copytree(tiny if kind == "bf16" else fp8, tmp_path / "checkpoint"))
    mark = tmp_path / "executed"
    plant(directory, mark)
    (directory / "chat_template.jinja").write_text(TEMPLATE.format(mark=mark))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "plugin"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [str(find_python()), str(SCRIPT), str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not mark.exists()
    assert result.returncode == 0, result.stderr[-3000:]
    name, refused = result.stdout.splitlines()[-2:]
    assert name == "NanoVLConfig"
    assert "SecurityError" in refused
