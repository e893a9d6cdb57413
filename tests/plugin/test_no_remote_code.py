"""No Python file of a checkpoint runs in vLLM, whatever its configuration files name."""

import os
import shutil
from pathlib import Path

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


def test_planted_modules_are_never_executed(vllm_process, tiny, fp8, tmp_path):
    directories = []
    for kind, checkpoint in (("bf16", tiny), ("export", fp8)):
        directory = Path(shutil.copytree(checkpoint, tmp_path / kind))
        mark = tmp_path / f"executed {kind}"
        plant(directory, mark)
        (directory / "chat_template.jinja").write_text(TEMPLATE.format(mark=mark))
        directories.append(str(directory))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "plugin"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "VLLM_NO_USAGE_STATS": "1"}
    result = vllm_process.run(SCRIPT, *directories, environment=environment)
    assert list(tmp_path.glob("executed*")) == []
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines.count("NanoVLConfig") == len(directories)
    assert [line for line in lines if "SecurityError" in line] == ["SecurityError"] * 2
