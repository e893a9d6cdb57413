"""Reads vLLM's log: what ended it, and which flag that was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoint.faults import Fault, shortened
from serve.vllm_flags import canonical, flags_with_values, is_flag, named_flags

LAST_LINES = 12
_LONGEST_LINE = 400

_ERROR = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:[A-Za-z_][\w.]*)?(?:Error|Exception|error): .+)$"
)


_ENGINE = "(EngineCore"
"""How lines of vLLM's log begin that its engine's process writes."""


_UNBLAMED = {"--api-key", "--config", "--host", "--port", "--root-path", "--served-model-name"}
"""Flags that are not looked for in errors: any may name a server or a checkpoint, and a key is not
repeated."""


def death_message(log: Path, what: str) -> str:
    """Return `what`, the first error in the log and the log's end.

    The first error is the cause; vLLM's last one only refers to a "root cause above".
    """
    lines = read_log(log).splitlines()
    errors = _errors(lines)
    parts = [f"{what}: {_line(errors[0][1])}" if errors else what]
    if lines:
        parts.append(f"last lines of {log}:")
        parts += ["  " + _line(line) for line in lines[-LAST_LINES:]]
    return "\n".join(parts)


def refusal(log: Path) -> str | None:
    """Return the error that ended vLLM before its engine's process had started, None where there is
    none: until then it reads and checks its configuration.
    """
    text = read_log(log)
    if _ENGINE in text:
        return None
    lines = text.splitlines()
    errors = _errors(lines)
    if not errors:
        return None
    return _reason(lines, *errors[0])


def blamed_flags(log: Path, flags: Sequence[str]) -> Iterator[Fault]:
    """Yield a fault for flags that have ended a starting vLLM.

    It is that of the flag that an error of its log names, by its value or its name, and else that
    of all where its engine had not begun to start.

    Args:
        log: The log.
        flags: Those of the user.
    """
    lines = read_log(log).splitlines()
    for number, error in _errors(lines):
        reason = _reason(lines, number, error)
        for flag, value in _values(flags):
            if _is_blamed(reason, flag, value):
                where = f"{flag} {shortened(value, 60)}".rstrip()
                yield Fault(where, f"ends vLLM: {shortened(reason)}", "correct it, or leave it out")
                return
    refused = refusal(log)
    if flags and refused:
        what = f"vLLM refuses its configuration: {shortened(refused)}"
        yield Fault("flags after --", what, "correct them")


def _values(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield flags with their values as vLLM reads them, then, of names in full, as they were given:
    of some values vLLM makes objects.
    """
    names = named_flags(flags)
    given = [pair for pair in flags_with_values(list(flags)) if canonical(pair[0]) in names]
    for flag, value in [*flags_with_values(flags), *given]:
        yield flag, "" if is_flag(value) else value


def _is_blamed(reason: str, flag: str, value: str) -> bool:
    name = canonical(flag)
    if name in _UNBLAMED:
        return False
    words = {name, *_words(value)}
    if name.count("-") > 2:  # of one word, such as --seed, any error may have
        words.add(name.removeprefix("--").replace("-", "_"))
    return any(_has_word(reason, word) for word in words)


def _has_word(reason: str, word: str) -> bool:
    """Return whether a word is in an error, and not as a part of a path or another name.

    vLLM writes some values in capitals.
    """
    end = r"(?![\w-])" if word.startswith("/") else r"(?![\w/-])"  # what is below a folder is its
    pattern = rf"(?<![\w/.-]){re.escape(word)}{end}"
    return re.search(pattern, reason, re.IGNORECASE) is not None


def _words(value: str) -> Iterator[str]:
    """Yield what an error may repeat of a flag's value: texts in it, and the two ends of what
    Python would import. Numbers are anywhere.
    """
    try:
        texts = list(_texts(json.loads(value)))
    except ValueError:
        texts = [value]
    for text in texts:
        parts = re.split("[.:=]", text) if re.fullmatch(r"\w+([.:=][\w/]+)+", text) else [text]
        for word in {text, parts[0], parts[-1]}:
            if len(word) > 1 and not re.fullmatch(r"[\d.]+", word):
                yield word


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _reason(lines: Sequence[str], number: int, error: str) -> str:
    """Return what an error of the log says; pydantic's reason follows in a line of its own."""
    if "validation error" in error and number + 1 < len(lines):
        reason = re.sub(r"^(\([^)]*\))?\s*(Value error, )?", "", lines[number + 1])
        return re.sub(r" \[type=\w+\b.*\]$", "", reason)
    return error


def _errors(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Return the errors in a log, with the numbers of their lines."""
    found = []
    for number, line in enumerate(lines):
        match = _ERROR.match(line.rstrip())
        if match:
            found.append((number, match[1]))
    return found


def _line(text: str) -> str:
    """A line of the log; of one that holds a request's media, beginning and end."""
    return text if len(text) <= _LONGEST_LINE else shortened(text, _LONGEST_LINE)


def read_log(log: Path) -> str:
    """Return all that vLLM has printed."""
    return log.read_text(encoding="utf-8", errors="replace")
