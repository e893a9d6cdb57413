"""The templates of report and card, and how they are rendered."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>])")


def render_markdown(template: str, /, **values: object) -> str:
    """Render a template of Markdown. Its filter `text` makes foreign text harmless.

    Args:
        template: Its file name.
        values: What it shows.
    """
    # Autoescaping would put HTML entities into code blocks; the templates escape with `text`.
    environment = _environment(autoescape=False)
    environment.filters["text"] = escape_markdown
    return environment.get_template(template).render(values)


def render_html(template: str, /, **values: object) -> str:
    """Render a template of HTML. Every value is escaped.

    Args:
        template: Its file name.
        values: What it shows.
    """
    return _environment(autoescape=True).get_template(template).render(values)


def escape_markdown(value: object) -> str:
    """Return a text that Markdown shows as it is, on one line and without HTML."""
    text = " ".join(str(value).split())
    escaped = _MARKDOWN.sub(r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def show_bytes(count: float) -> str:
    """Return a number of bytes as people write it: `15.40 GB`, `7.3 MB`, `812 kB`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB"


def show_share(share: float) -> str:
    """Return a share in percent with one decimal: `95.8 %`."""
    return f"{100 * share:.1f} %"


def show_points(difference: float | None) -> str:
    """Return a difference of shares in points with its sign; a dash for None."""
    if difference is None:
        return "–"
    return f"{100 * difference:+.1f}"


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["bytes"] = show_bytes
    environment.filters["share"] = show_share
    environment.filters["points"] = show_points
    return environment
