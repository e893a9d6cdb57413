"""Records the methods of vLLM that the plug-in overrides, from the sources of a version of vLLM.

    python -m dev.overridden_methods SITE VERSION     # SITE holds the folder vllm/

Writes them into tests/data/overridden_methods.json beside those of other versions. Nothing is
imported, so a version for GPUs can be recorded on any machine. The plug-in is compared with every
version in the file by tests/plugin/test_expected_classes.py.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoint.atomic import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugin" / "hybridquant_vllm"
RECORD = ROOT / "tests" / "data" / "overridden_methods.json"

Method = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FoundClass:
    """A class in a source file.

    Attributes:
        module: The dotted name of the file's module.
        node: The class.
    """

    module: str
    node: ast.ClassDef

    def method(self, name: str) -> Method | None:
        """Return a method of the class's own."""
        for node in self.node.body:
            if isinstance(node, Method) and node.name == name:
                return node
        return None


class Sources:
    """Python modules below folders, parsed when they are needed.

    Args:
        sites: The folders that packages are in.
    """

    def __init__(self, *sites: Path) -> None:
        self._sites = sites
        self._trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module | None:
        """Return a parsed module; None if there is none of this name."""
        if module in self._trees:
            return self._trees[module]
        file = self._file(module)
        if file is None:
            return None
        self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[module]

    def imports(self, module: str) -> Mapping[str, tuple[str, str]]:
        """Return what a module imports; see `imported`."""
        tree = self.tree(module)
        file = self._file(module)
        if tree is None or file is None:
            return {}
        is_package = file.name == "__init__.py"
        return imported(tree, module if is_package else module.rpartition(".")[0])

    def _file(self, module: str) -> Path | None:
        path = Path(*module.split("."))
        for site in self._sites:
            for file in (site / path.with_suffix(".py"), site / path / "__init__.py"):
                if file.is_file():
                    return file
        return None

    def find(self, module: str, name: str) -> FoundClass | None:
        """Return a class by the name that a module has for it, also where that is imported.

        Args:
            module: The dotted name of the module.
            name: The class's name in it; `module.Class` if it is reached through a module.
        """
        tree = self.tree(module)
        if tree is None:
            return None
        name, _, rest = name.partition(".")
        if rest:
            origin = self.imports(module).get(name)
            return None if origin is None else self.find(".".join(origin), rest)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return FoundClass(module, node)
        origin = self.imports(module).get(name)
        return None if origin is None else self.find(*origin)

    def bases(self, found: FoundClass) -> Iterator[FoundClass]:
        """Yield the bases of a class that are below the folders."""
        for base in found.node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            parent = self.find(found.module, ast.unparse(target))
            if parent is not None:
                yield parent

    def inherited(self, found: FoundClass, method: str) -> Method | None:
        """Return the method that a class has from itself or from its bases."""
        own = found.method(method)
        if own is not None:
            return own
        for parent in self.bases(found):
            theirs = self.inherited(parent, method)
            if theirs is not None:
                return theirs
        return None


def imported(tree: ast.Module, package: str) -> Mapping[str, tuple[str, str]]:
    """Return (module, name) of what a module imports by `from … import`, by its name there.

    Args:
        tree: The module.
        package: The dotted name of its package, which `from .` refers to.
    """
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = package.split(".")
                parent = parts[: len(parts) - node.level + 1]
                origin = ".".join([*parent, origin]).rstrip(".")
            for alias in node.names:
                names[alias.asname or alias.name] = (origin, alias.name)
    return names


def plugin_classes(sources: Sources) -> Iterator[FoundClass]:
    """Yield all classes of the plug-in, one of `sources`' packages."""
    for file in sorted(PLUGIN.glob("*.py")):
        module = f"{PLUGIN.name}.{file.stem}"
        for node in ast.walk(sources.tree(module) or ast.Module([], [])):
            if isinstance(node, ast.ClassDef):
                yield FoundClass(module, node)


def signature(method: Method) -> str:
    """Return a method's decorators and arguments, without types: `classmethod f(cls, a, b=1)`."""
    arguments = copy.deepcopy(method.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    words = [ast.unparse(decorator) for decorator in method.decorator_list]
    if isinstance(method, ast.AsyncFunctionDef):
        words.append("async")
    return " ".join([*words, f"{method.name}({ast.unparse(arguments)})"])


def overridden(site: Path) -> dict[str, tuple[Method, Method]]:
    """Return the plug-in's methods that override vLLM's, by class and method, each with vLLM's.

    Args:
        site: The folder that vllm/ is in.
    """
    sources = Sources(PLUGIN.parent, site)
    found = {}
    for owner in plugin_classes(sources):
        for parent in sources.bases(owner):
            if not parent.module.startswith("vllm."):
                continue
            for method in owner.node.body:
                if not isinstance(method, Method):
                    continue
                theirs = sources.inherited(parent, method.name)
                if theirs is not None:
                    found[f"{owner.node.name}.{method.name}"] = (method, theirs)
    return found


def signatures(site: Path) -> dict[str, str]:
    """Return the signatures of vLLM's methods that the plug-in overrides, as they are recorded."""
    return {name: signature(theirs) for name, (_, theirs) in overridden(site).items()}


def _run() -> int:
    parser = command_parser("dev.overridden_methods", __doc__)
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("version", metavar="VERSION")
    given = parse_command(parser)
    if not (given.site / "vllm" / "__init__.py").is_file():
        raise BadInput(Fault(str(given.site), "holds no vllm/__init__.py", "give site-packages"))
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record[given.version] = signatures(given.site)
    write_json(RECORD, dict(sorted(record.items())))
    print(f"{RECORD}: {len(record[given.version])} methods of vLLM {given.version}")
    return 0


if __name__ == "__main__":
    main(_run)
