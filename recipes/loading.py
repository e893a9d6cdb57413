"""Reads a recipe and applies `key=value` overrides; every mistake is one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from pydantic import ValidationError

from checkpoint.faults import BadInput, Fault, nearest, raise_if_any, shortened
from checkpoint.settings import Section
from recipes.bounds import MOST_CHARACTERS, bounds_fault
from recipes.schema import Recipe

SHIPPED = Path(__file__).parent
"""Directory of the recipes that ship with the project."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides by dotted name.

    Args:
        path: A YAML file.
        overrides: Such as `calibrate.samples=64` or `quantize.layers.0.format=nvfp4`.

    Raises:
        BadInput: With every fault: no such file, not YAML, unknown or misspelt keys, wrong types,
            values out of range.
    """
    path = Path(path)
    values = _read_yaml(path)
    raise_if_any(list(_apply_overrides(values, overrides)))
    raw = OmegaConf.to_container(values, resolve=False)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise BadInput(*_recipe_faults(path, error.errors())) from None
    raise_if_any(_seed_faults(path, recipe))
    return recipe


def _seed_faults(path: Path, recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault for each section that would draw the samples that the gate is measured on."""
    held_out = recipe.accuracy.seed
    seeds = {"calibrate": recipe.calibrate.seed}
    if recipe.distill is not None:
        seeds["distill"] = recipe.distill.seed
    for section, seed in seeds.items():
        if seed == held_out:
            where = f"{shortened(str(path))}: accuracy.seed"
            what = f"is {_shown(held_out)} like {section}.seed, so the samples are not held out"
            yield Fault(where, what, "give another seed")


def _read_yaml(path: Path) -> Any:
    where = shortened(str(path))
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise BadInput(Fault(where, "no such recipe", nearest(where, _shipped()))) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with NUL
        what = f"cannot be read: {_one_line(error)}"
        raise BadInput(Fault(where, what, "give a YAML file")) from None
    try:
        too_large = bounds_fault(text)
        values = None if too_large else OmegaConf.create(text)
    except Exception as error:  # YAML's constructors raise whatever a value makes them raise
        what = f"cannot be read as YAML: {_one_line(error)}"
        raise BadInput(Fault(where, what, "fix the file")) from None
    if too_large:
        raise BadInput(Fault(where, too_large, "write a smaller recipe"))
    if not OmegaConf.is_dict(values):
        what = "does not contain a mapping of fields"
        raise BadInput(Fault(where, what, "start from recipes/tiny/fp8.yaml"))
    return values


def _shipped() -> list[str]:
    """The shipped recipes as a user would write them."""
    names = []
    for path in SHIPPED.rglob("*.yaml"):
        near = path.is_relative_to(Path.cwd())
        names.append(str(path.relative_to(Path.cwd()) if near else path))
    return sorted(names)


def _apply_overrides(values: Any, overrides: Iterable[str]) -> Iterator[Fault]:
    seen: set[str] = set()
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not key:
            what = "is not a recipe and not key=value"
            yield Fault(shortened(text), what, "for example calibrate.samples=64")
            continue
        if key in seen:
            yield Fault(shortened(key), "is given twice", "give it once")
            continue
        seen.add(key)
        try:
            value = _parse_value(value_text)
        except Exception as error:
            what = f"the value is not YAML: {_one_line(error)}"
            yield Fault(shortened(text), what, "quote it")
            continue
        try:
            OmegaConf.update(values, key, value, merge=False)
        except Exception as error:
            what = f"there is no such field: {_one_line(error)}"
            yield Fault(shortened(key), what, "write the field's dotted name")


def _parse_value(text: str) -> Any:
    """The value of an override; raises whatever YAML raises."""
    too_large = bounds_fault(text)
    if too_large:
        raise ValueError(f"it {too_large}")
    parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return parsed["value"]


_MESSAGES = {
    "model_type": "should be a mapping of fields",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "path_type": "should be a path",
    "too_short": "should have at least one entry",
}
"""What is shown for errors that pydantic words for Python programmers."""


def _recipe_faults(path: Path, errors: Sequence[Any]) -> list[Fault]:
    unpacked = []
    for error in errors:
        location = tuple(error["loc"])
        if error["type"] == "nested_section":
            context = error["ctx"]
            for inner in context["errors"]:
                unpacked.append((inner, location + tuple(inner["loc"]), context["fields"]))
        else:
            unpacked.append((error, location, _fields_at(location[:-1])))
    faults = []
    locations = [location for _, location, _ in unpacked]
    for error, location, fields in unpacked:
        if error["type"] == "too_short" and _is_above_another(location, locations):
            continue  # pydantic does not count items that have errors themselves
        faults.append(_fault(path, error, location, fields))
    return faults


def _is_above_another(location: tuple[Any, ...], locations: Iterable[tuple[Any, ...]]) -> bool:
    return any(len(other) > len(location) == _shared(location, other) for other in locations)


def _shared(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    """Number of parts that two locations begin with."""
    count = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _fault(
    path: Path, error: Mapping[str, Any], location: tuple[Any, ...], valid: list[str]
) -> Fault:
    """A pydantic error as field, value, what is allowed and what to do."""
    name = ".".join(str(part) for part in location) or "recipe"
    where = f"{path}: {shortened(name)}"
    if error["type"] == "extra_forbidden":
        remedy = nearest(shortened(location[-1]), valid) if valid else "remove it"
        return Fault(where, "unknown field", remedy)
    if error["type"] == "missing":
        return Fault(where, "is missing", "add it")
    message = _MESSAGES.get(error["type"], str(error["msg"]))
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    what = f"is {_shown(error['input'])}: {shortened(message, 400)}"
    return Fault(where, what, "fix the recipe or the override")


def _shown(value: Any) -> str:
    """A value as a recipe would have it, at most 80 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return repr(value)[:80]
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return "a number of thousands of digits"


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at a pydantic error location."""
    section: type[Section] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            found = _section_in(section.model_fields[part].annotation)
            if found is not None:
                section = found
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `tuple[Rule, ...]` or `Distill | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in get_args(annotation):
        found = _section_in(part)
        if found is not None:
            return found
    return None


def _one_line(error: Exception) -> str:
    return shortened(error) or type(error).__name__
