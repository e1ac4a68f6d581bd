"""HTML pages: the templates of all reports, and the function that fills them.

A page is one file that loads nothing: styles and images are inside it, and its Content-Security-Policy forbids the
rest. Names, captions and messages come from outside; templates escape every value.
"""

import base64
import functools
from dataclasses import dataclass
from typing import Any

import jinja2


@dataclass(frozen=True)
class Link:
    """A link, as a cell of a table or in a text."""

    label: str
    href: str


def render(template: str, **values: Any) -> str:
    """Fills a template of `templates/` with values.

    Raises:
      jinja2.UndefinedError: if the template uses a value that is missing.
    """
    return _environment().get_template(template).render(values)


def data_url(data: bytes, kind: str) -> str:
    """An image inside a page; `kind` is its format in lower case, such as `png`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
