"""The files beside the weights: which belong to the model, whether they are sound, their content.

What an export copies is decided by rules that allow: tokenizer, processor, chat template, licence,
model card, and the Python files that auto_map names with what they import. Optimizer states, other
formats of the weights, earlier exports and logs stay behind.

Does not import torch.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import read_json
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.json_differences import json_differences
from checkpoint.reading import parse_json, read_small_file

_ALLOWED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Patterns of the names that are copied, in upper and lower case."""

_DOCUMENTS = (
    "*.md",
    "README*",
    "MODEL_CARD*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "COPYRIGHT*",
    "CITATION*",
)
"""The same for what people read: the model card, its parts on safety or privacy, the licence."""

_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", "*.html")
"""Of what people look at; nothing that serves a model reads them."""

_NAMED_KEYS = 3
"""Keys of a JSON file that are named when it differs."""

_READMES = ("README*",)
_BACKUPS = ("*~", "*.bak", "*.orig", "*.old", "*.tmp", "*.swp")

_WITH_AUTO_MAP = ("config.json", "tokenizer_config.json", "*processor_config.json")
_WRITTEN = ("config.json", "model.safetensors.index.json", "hf_quant_config.json")
_COPY = "copy it from the released checkpoint"
_COPY_SOURCE = "copy it from the source"


@dataclass(frozen=True)
class Companions:
    """The files beside the weights of one directory, as they were when it was opened.

    Attributes:
        directory: Where they are.
        digests: SHA-256 of every file that an export copies, by relative path.
        config_digest: SHA-256 of config.json, of which an export writes its own version.
        left_out: Names of the other files and folders; folders end with a slash.
        nbytes: Bytes of the copied files.
    """

    directory: Path
    digests: dict[str, str]
    config_digest: str
    left_out: tuple[str, ...]
    nbytes: int

    def summary(self) -> str:
        """One line for the plan."""
        text = f"copies {len(self.digests)} files beside the weights ({self.nbytes / 1e6:.1f} MB)"
        if self.left_out:
            text = f"{text}; leaves out {len(self.left_out)}: {shortened(', '.join(self.left_out))}"
        return text

    def copy_to(self, target: Path) -> None:
        """Copy the files.

        Raises:
            BadInput: One has changed since the directory was opened.
            OSError: With the name of the copy, as for a full disk.
        """
        changed = []
        for name, digest in {**self.digests, "config.json": self.config_digest}.items():
            data = read_small_file(self.directory / name, self.directory)
            if hashlib.sha256(data).hexdigest() != digest:
                what = "has changed during the run"
                changed.append(Fault(str(self.directory / name), what, "run again"))
            elif name in self.digests:
                copy = target / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                try:
                    copy.write_bytes(data)
                except OSError as error:
                    error.filename = str(copy)
                    raise
        if changed:
            raise BadInput(*changed)

    def copy_faults(self, target: Path) -> Iterator[Fault]:
        """Yield one fault for each file of a copy that is not the same, byte for byte.

        Readmes may differ: on the Hub, a copy has its own.

        Args:
            target: The directory that `copy_to` has written to.
        """
        for name, digest in self.digests.items():
            if _matches(name, _READMES):
                continue
            path = target / name
            if not path.exists():
                yield Fault(str(path), f"no such file, unlike in {self.directory}", _COPY_SOURCE)
                continue
            try:
                data = read_small_file(path, target)
            except BadInput as bad:
                yield from bad.faults
                continue
            if hashlib.sha256(data).hexdigest() != digest:
                what = f"differs from that of {self.directory}{self._keys(name, data)}"
                yield Fault(str(path), what, _COPY_SOURCE)
        for path in sorted(target.iterdir()):
            if _is_allowed(path.name) and path.name not in self.digests:
                what = f"does not exist in {self.directory}"
                yield Fault(str(path), what, "remove it, if nobody needs it")

    def _keys(self, name: str, data: bytes) -> str:
        """Which keys of a JSON file differ, as the end of a sentence; empty for other files."""
        if not name.endswith(".json"):
            return ""
        try:
            original = parse_json(read_small_file(self.directory / name), self.directory / name)
            differences = json_differences(parse_json(data, Path(name)), original)
        except BadInput:
            return ""
        keys = [key for key, _, _ in itertools.islice(differences, _NAMED_KEYS)]
        return f" in {shortened(', '.join(keys))}"


def find_companions(directory: Path, weights: tuple[str, ...]) -> Companions:
    """Find and read the files beside the weights.

    Args:
        directory: A checkpoint.
        weights: Names of its weight files.

    Raises:
        BadInput: With every one that must not or cannot be read.
    """
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    copied = [name for name in names if _is_allowed(name) or _is_document(directory / name)]
    copied += _needed_python(directory, names)
    digests = {}
    nbytes = 0
    faults: list[Fault] = []
    for name in sorted(set(copied)):
        try:
            data = read_small_file(directory / name, directory)
        except BadInput as bad:
            faults += bad.faults
            continue
        digests[name] = hashlib.sha256(data).hexdigest()
        nbytes += len(data)
    if faults:
        raise BadInput(*faults)
    config = hashlib.sha256(read_small_file(directory / "config.json")).hexdigest()
    taken = {name.partition("/")[0] for name in (*digests, *weights, *_WRITTEN, "__pycache__")}
    left_out = []
    for name in names:
        if name not in taken:
            left_out.append(f"{name}/" if (directory / name).is_dir() else name)
    return Companions(directory, digests, config, tuple(left_out), nbytes)


def is_for_people(name: str) -> bool:
    """Whether a file is a document or a picture, which no answer depends on."""
    if _matches(name, _BACKUPS):
        return False
    return _matches(name, _DOCUMENTS) or _matches(name, _PICTURES)


def is_readme(name: str) -> bool:
    """Whether a file is the model card, which may be rewritten at any time."""
    return _matches(name, _READMES)


def is_known(name: str) -> bool:
    """Whether a model may have a file of this name beside its weights, Python files left out."""
    return _is_allowed(name)


def needed_python(directory: Path) -> list[str]:
    """Return the Python files that an auto_map names, and those that they import."""
    return _needed_python(directory, [path.name for path in directory.iterdir()])


def _is_allowed(name: str) -> bool:
    return _matches(name, _ALLOWED)


def _is_document(path: Path) -> bool:
    """Whether a file is to be read by people; folders and empty files are left out."""
    if not _matches(path.name, _DOCUMENTS) or _matches(path.name, _BACKUPS):
        return False
    if path.is_dir():
        return False
    return not path.is_file() or path.stat().st_size > 0


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern.upper()) for pattern in patterns)


def _needed_python(directory: Path, names: list[str]) -> list[str]:
    """The Python files that an auto_map names, with the local files that they import."""
    waiting: list[str] = []
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _WITH_AUTO_MAP):
            waiting += _auto_map_files(directory / name)
    found: list[str] = []
    while waiting:
        name = waiting.pop()
        if name in found or not (directory / name).exists():
            continue
        found.append(name)
        waiting += _imported_files(directory, name)
    return found


def _auto_map_files(path: Path) -> Iterator[str]:
    try:
        auto_map = read_json(path).get("auto_map")
    except BadInput:
        return  # companion_faults reports it
    values: list[Any] = list(auto_map.values()) if isinstance(auto_map, dict) else []
    for value in values:
        for target in value if isinstance(value, list) else [value]:
            # "configuration.Name", with "organization/repository--" before it on the Hub.
            module = str(target).rpartition("--")[2].rpartition(".")[0]
            if module and all(part.isidentifier() for part in module.split(".")):
                yield f"{module.replace('.', '/')}.py"


def _imported_files(directory: Path, name: str) -> Iterator[str]:
    """Files of the directory that a Python file may import; of a package, its __init__.py too."""
    try:
        tree = ast.parse(read_small_file(directory / name, directory))
    except (BadInput, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # companion_faults reports it
    folder = Path(name).parent
    for node in ast.walk(tree):
        modules: list[str] = []
        base = Path(".")
        if isinstance(node, ast.ImportFrom):
            for _ in range(max(0, node.level - 1)):
                base = Path("..") / base
            base = folder / base if node.level else base
            module = node.module or ""
            modules = [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            place = base / module.replace(".", "/")
            for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                inside = ".." not in file.parts and bool(module)
                if inside and (directory / file).is_file():
                    yield str(file)


def companion_faults(directory: Path) -> Iterator[Fault]:
    """Yield what would stop a server, or prompts from being built: one fault for each file."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).exists():
            yield Fault(str(directory / name), "no such file", _COPY)
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" and _is_allowed(path.name):
            yield from _json_faults(path)
    yield from _template_faults(directory)
    for name in _needed_python(directory, [path.name for path in directory.iterdir()]):
        yield from _python_faults(directory / name, directory)


def _json_faults(path: Path) -> Iterator[Fault]:
    try:
        data = read_small_file(path)
        value = read_json(path) if path.name != "tokenizer.json" else parse_json(data, path)
    except BadInput as bad:
        yield from bad.faults
        return
    if value == {} and path.name.startswith("tokenizer"):
        yield Fault(str(path), "is an empty JSON object", _COPY)
    elif path.name == "tokenizer.json":
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # tokenizers raises bare exceptions
            yield Fault(str(path), f"is not a tokenizer: {shortened(error)}", _COPY)


def _template_faults(directory: Path) -> Iterator[Fault]:
    path = directory / "chat_template.jinja"
    template: Any
    try:
        if path.exists():
            template = read_small_file(path).decode("utf-8")
        elif (directory / "chat_template.json").exists():
            path = directory / "chat_template.json"
            template = read_json(path).get("chat_template")
        else:
            settings = read_json(directory / "tokenizer_config.json")
            template = settings.get("chat_template")
    except UnicodeDecodeError:
        yield Fault(str(path), "is not UTF-8 text", _COPY)
        return
    except BadInput as bad:
        if path.exists():
            yield from bad.faults
        return
    if not template:
        yield Fault(str(path), "no such file, so no chat is possible", _COPY)
        return
    if not isinstance(template, str):
        return  # several named templates
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        # Private, and what `apply_chat_template` itself compiles with: other environments do not
        # know the tag `generation`. tests/checkpoint/test_companions.py fails when it goes.
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        yield Fault(str(path), f"is not a chat template: {shortened(error)}", _COPY)


def _python_faults(path: Path, directory: Path) -> Iterator[Fault]:
    try:
        ast.parse(read_small_file(path, directory))
    except BadInput as bad:
        yield from bad.faults
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield Fault(str(path), f"is not Python: {shortened(error)}", _COPY)
