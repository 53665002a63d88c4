"""A proof as a page that needs no other file. Pure.

Texts of the guest are on it: every one is escaped, and the page runs nothing and loads nothing, whatever they say.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from pullback.model.consoletext import plain
from pullback.model.proofs import Proof
from pullback.units import format_duration, format_size

#: Lines of the console that are on the page.
_LINES = 300
_STYLE = """\
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#1b1f24;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em} h2{font-size:1.1em;margin-top:1.8em}
.good{color:#116329}.bad{color:#a40e26} .verdict{font-weight:600}
table{border-collapse:collapse;width:100%} td,th{text-align:left;vertical-align:top;padding:.3em .8em .3em 0;
border-bottom:1px solid #d8dee4} th{font-weight:600;white-space:nowrap}
img{max-width:100%;border:1px solid #d8dee4} pre{background:#f6f8fa;padding:1em;overflow-x:auto;font-size:12.5px;
white-space:pre-wrap;overflow-wrap:anywhere} .said{white-space:pre-wrap;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{color:#d1d7e0;background:#151b23}td,th,img{border-color:#3d444d}
pre{background:#0d1117}.good{color:#57ab5a}.bad{color:#f47067}}
"""
#: What the page may do: show itself and pictures that are inside of it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(proof: Proof, console: str, picture: bytes | None) -> str:
    """The page: verdict, signs, picture, figures, the end of the console."""
    verdict = "proven" if proof.proven else "did not come up"
    title = f"{proof.machine}: {verdict}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(proof.machine)}</h1>",
        f'<p class="verdict {"good" if proof.proven else "bad"}">{_text(_verdict(proof))}</p>',
        "<h2>Signs</h2>",
        _table(("sign", "seen", "after", "what"), _signs(proof)),
        *([f"<p>{_text(_why(proof))}</p>"] if proof.signs.why else []),
        "<h2>Screen</h2>",
        _picture(proof, picture),
        "<h2>Figures</h2>",
        _table((), _figures(proof)),
        *_list("Not as it was", proof.left_out),
        *_list("Notes", proof.notes),
        *_console(console),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    """A text as HTML: what a terminal or a browser would obey is gone."""
    return escape(plain(text))


def _verdict(proof: Proof) -> str:
    if proof.proven and proof.figures.up is not None:
        return f"Proven: it came up in {format_duration(proof.figures.up)}."
    return f"It did not come up: {proof.problem}."


def _why(proof: Proof) -> str:
    return f"Chosen because {proof.signs.why}."


def _signs(proof: Proof) -> Iterable[Sequence[str]]:
    for seen in proof.seen:
        mark = f'<span class="{"good" if seen.good else "bad"}">{"yes" if seen.good else "no"}</span>'
        after = "" if seen.seconds is None else format_duration(seen.seconds)
        yield _text(str(seen.sign)), mark, after, f'<div class="said">{_text(seen.said)}</div>'


def _figures(proof: Proof) -> Iterable[Sequence[str]]:
    figures = proof.figures
    fetched = "" if figures.fetched is None else f", {format_size(figures.fetched)} from the repository"
    rows = [
        ("restore point", f"{proof.point}, of {proof.created:%Y-%m-%d %H:%M:%S} UTC"),
        ("booted", f"{proof.at:%Y-%m-%d %H:%M:%S} UTC, {format_duration(figures.seconds)} in all"),
        ("machine", f"{proof.cpus} processors ({proof.accel}), {format_size(proof.memory)} of memory"),
        ("network", proof.network),
        ("processor time", format_duration(figures.cpu)),
        ("disks", f"{format_size(figures.read)} read{fetched}, {format_size(figures.written)} written and thrown away"),
        *proof.system.items(),
    ]
    return [(f"<b>{_text(name)}</b>", _text(value)) for name, value in rows]


def _picture(proof: Proof, picture: bytes | None) -> str:
    if picture is None:
        return f"<p>{_text((proof.no_picture or 'there is no picture').capitalize())}.</p>"
    data = base64.b64encode(picture).decode()
    return f'<p><img alt="the screen of the machine" src="data:image/png;base64,{data}"></p>'


def _list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [f"<h2>{title}</h2><ul>", *(f"<li>{_text(item)}</li>" for item in items), "</ul>"]


def _console(console: str) -> list[str]:
    lines = plain(console).splitlines()
    if not any(line.strip() for line in lines):
        return ["<h2>Console</h2><p>It said nothing on its serial port.</p>"]
    cut = f"<p>The last {_LINES} of {len(lines)} lines; all are in console.log.</p>" if len(lines) > _LINES else ""
    return [f"<h2>Console</h2>{cut}<pre>{_text(chr(10).join(lines[-_LINES:]))}</pre>"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
