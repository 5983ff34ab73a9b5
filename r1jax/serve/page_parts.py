"""Pieces of a page that any evaluation may need: the frame, cards, charts with legends, cells of figures."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from r1jax import __version__
from r1jax.serve.chart_style import HUE
from r1jax.tasks.intervals import figure_text


def write_html(
    path: Path,
    *,
    title: str,
    lead: str,
    notice: str,
    banners: Sequence[str],
    sections: Mapping[str, str],
    script: str = "",
) -> None:
    """Writes a page that needs nothing else; an existing file is replaced only once the new one is complete.

    Args:
      path: File to write; its folder must exist.
      title: Heading, plain text.
      lead: HTML below it.
      notice: What the software is not, plain text.
      banners: HTML above it, see `banner`.
      sections: HTML by heading; empty ones are left out.
      script: JavaScript of the page; no other runs.
    """
    sections = {name: body for name, body in sections.items() if body}
    page = Template(resources.files("r1jax.serve").joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title),
        banner="".join(banners),
        lead=lead,
        notice=escape(notice),
        links="".join(f'<a href="#{slug(name)}">{name}</a>' for name in sections),
        sections="\n".join(
            f'<section id="{slug(name)}"><h2>{name}</h2>{body}</section>' for name, body in sections.items()
        ),
        version=__version__,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(page, "utf-8")
    os.replace(temporary, path)


def banner(head: str, text: str) -> str:
    """A strip across the top of the page, of plain text."""
    return (
        f'<div class="banner" role="note"><div class="inner"><strong>{escape(head)}</strong><span>{escape(text)}</span>'
        "</div></div>"
    )


def warning(text: str) -> str:
    """A warning across the top of the page, of plain text."""
    return f'<div class="banner"><div class="inner"><strong>WARNING</strong><span>{escape(text)}</span></div></div>'


def slug(name: str) -> str:
    """The id of a section by its heading."""
    return name.lower().replace(" ", "-")


def card(what: str, figure: dict[str, Any], unit: str, more: str, extra: str = "") -> str:
    """A large figure with its interval; `more` and `extra` are HTML."""
    value, interval = figure_text(figure, unit)
    number, _, suffix = value.partition(" ")
    return (
        f'<div class="card"><div class="what">{escape(what)}</div><div class="number">{number}<small>{suffix}</small>'
        f'</div>{extra}<div class="range">{interval}</div><div class="more">{more}</div></div>'
    )


def chart_figure(title: str, svg: str, legend: str, note: str, table: str = "") -> str:
    """A chart with its legend, a note below and possibly a table, all HTML."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<figure class="chart"><h3>{title}</h3>{svg}{legend}{note}{table}</figure>'


def void_figure(title: str, why: str) -> str:
    """A chart that there is not, and why."""
    return f'<figure class="chart"><h3>{title}</h3><p class="void">{why}</p></figure>'


def mode_legend(items: Sequence[tuple[str, str, str]]) -> str:
    """Legend of modes: the mode, its text and possibly its figure, each HTML."""
    dashes = {"both": "", "image-only": "8 3", "record-only": "2.5 2.5"}
    entries = (
        f"<li>{swatch('--' + HUE[mode], dashes[HUE[mode]], 3)}<span>{text}</span><span>{figure}</span></li>"
        for mode, text, figure in items
    )
    row = "" if any(figure for _, _, figure in items) else " row"
    return f'<ul class="legend{row}">{"".join(entries)}</ul>'


def swatch(variable: str, dashes: str, width: int) -> str:
    """A short line in a variable of the page."""
    style = f"stroke:var({variable});stroke-width:{width}"
    path = f'<path d="M1 4h28" stroke-dasharray="{dashes}" style="{style}"/>'
    return f'<svg viewBox="0 0 30 8" aria-hidden="true">{path}</svg>'


def figure_cell(figure: dict[str, Any], unit: str) -> str:
    """A figure and its interval for a cell of a table."""
    value, interval = figure_text(figure, unit)
    return f"{value}<small>{interval}</small>"


def provenance_list(provenance: Mapping[str, str]) -> str:
    """What made the figures, as a list of names and values in plain text."""
    if not provenance:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance.items())
    return f'<div class="sheet"><dl>{rows}</dl></div>'
