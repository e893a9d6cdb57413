"""The plug-in's subclasses take what each tested version of vLLM calls them with.

Traps, each named where it is met:

- vLLM reads flags off a class and caches them (`model.py`).
- `UnscaledEncoderLayer` is put in the place of a class whose attributes it keeps (`tower.py`).
"""

import ast
import json
from pathlib import Path

import pytest

from dev.overridden_methods import RECORD, overridden, signature, signatures
from serve.environment import find_python

VERSIONS = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site():
    """Where the installed vLLM is."""
    (found,) = Path(find_python()).parent.parent.glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def methods(site):
    """The plug-in's methods, and those of the installed vLLM that they override."""
    return overridden(site)


def arguments_of(text):
    """Decorators that change how a method is called, and the arguments, of a recorded signature."""
    head, _, rest = text.partition("(")
    *words, name = head.split()
    function = ast.parse(f"def {name}({rest}: pass").body[0]
    return set(words) - {"abstractmethod", "override"}, function.args


def names(arguments):
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]


def required(arguments):
    """Names of the arguments that a caller must give."""
    positional = names(arguments)
    found = positional[: len(positional) - len(arguments.defaults)]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            found.append(argument.arg)
    return found


def misfit(ours, theirs):
    """Why a method cannot take another one's place; "" if it can."""
    our_words, our_arguments = arguments_of(ours)
    their_words, their_arguments = arguments_of(theirs)
    if our_words - {"property"} != their_words - {"property"}:
        return f"is {our_words}, not {their_words}"
    given = names(their_arguments)
    taken = names(our_arguments)
    if our_arguments.vararg is None and taken[: len(given)] != given:
        return f"takes {taken}, and is given {given}"
    keywords = {argument.arg for argument in our_arguments.kwonlyargs} | set(taken)
    for argument in their_arguments.kwonlyargs:
        if argument.arg not in keywords and our_arguments.kwarg is None:
            return f"takes no {argument.arg}"
    if their_arguments.kwarg is not None and our_arguments.kwarg is None:
        return "does not take arguments of any name"
    known = {*given, *(argument.arg for argument in their_arguments.kwonlyargs)}
    missing = [name for name in required(our_arguments) if name not in known]
    return f"needs {missing}" if missing else ""


def test_both_versions_are_recorded():
    assert set(VERSIONS) == {"0.32", "0.33"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(set().union(*VERSIONS.values())))
def test_a_method_takes_what_vllm_gives_it(version, name, methods):
    ours, _ = methods[name]
    assert misfit(signature(ours), VERSIONS[version][name]) == ""


def test_the_record_is_that_of_the_installed_vllm(site):
    """Record it again with `python -m dev.overridden_methods` when the plug-in overrides more."""
    assert signatures(site) == VERSIONS["0.32"]


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ("f(self, a)", "f(self, a, b=1)", "takes"),
        ("f(self, b)", "f(self, a)", "takes"),
        ("f(self, a, *, c)", "f(self, a)", "needs"),
        ("f(self, a)", "f(self, a, *, c=1)", "takes no c"),
        ("f(self, a)", "f(self, a, **more)", "does not take"),
        ("f(cls, a)", "classmethod f(cls, a)", "is"),
        ("f(self, a)", "async f(self, a)", "is"),
    ],
)
def test_a_method_that_does_not_fit_is_found(ours, theirs, why):
    assert misfit(ours, theirs).startswith(why)
