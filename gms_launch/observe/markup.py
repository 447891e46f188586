"""Documents of HTML that need nothing from anywhere: no network, no font, no script. Pure.

Elements are ElementTree's, which escapes all text and every attribute. What a control character would break is taken
out. A strict content security policy stands in the page itself: even what should slip through could load nothing, run
nothing and send nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

#: What neither HTML nor XML may contain.
_NO_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")

Child = Element | str


def clean(text: str) -> str:
    """The text, with a mark for each character that no document may contain."""
    return _NO_TEXT.sub("\ufffd", text)


def el(tag: str, *children: Child, **attributes: object) -> Element:
    """An element. `class_` is class, an underscore in another name is a hyphen, and None leaves an attribute out."""
    names = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    made = Element(tag, {k: clean(f"{v:.6g}" if isinstance(v, float) else str(v)) for k, v in names.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + clean(child)
        else:
            made.text = (made.text or "") + clean(child)
    return made


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], numbers: Sequence[int] = ()) -> Element:
    """A table that scrolls by itself where it is too wide. `numbers` are the columns that stand to the right."""
    right = dict.fromkeys(numbers, "number")
    body = [el("tr", *(el("td", cell, class_=right.get(k)) for k, cell in enumerate(row))) for row in rows]
    return scrolls(
        caption,
        el(
            "table",
            el("caption", caption),
            el("thead", el("tr", *(el("th", name, scope="col", class_=right.get(k)) for k, name in enumerate(head)))),
            el("tbody", *body),
        ),
    )


def scrolls(label: str, inner: Element) -> Element:
    """What may be wider than the window, to be moved with the keyboard too."""
    return el("div", inner, class_="scrolls", role="region", aria_label=label, tabindex="0")


def document(title: str, body: Iterable[Element]) -> str:
    """A whole page."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    head = el("head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": policy(digest)})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "meta", {"name": "color-scheme", "content": "light dark"})
    SubElement(head, "meta", {"name": "referrer", "content": "no-referrer"})
    head.append(el("title", title))
    style = SubElement(head, "style")
    style.text = STYLE
    skip = el("a", "to the content", href="#main", class_="skip")
    page = el("html", head, el("body", skip, *body), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def policy(digest: str) -> str:
    """What a page may do: be styled by the one sheet with this digest, and nothing else."""
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


#: On paper the colours are those of a light screen.
STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f6f7f9; --text: #1b1f24; --dim: #59636e; --line: #d0d7de; --link: #0550ae;
  --good: #2da44e; --shadow: #54aeff; --waking: #d4a72c; --dying: #cf222e; --proof: #ffaba8; --none: #e16f24;
  --silence: #8250df;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #0d1117; --card: #161b22; --text: #e6edf3; --dim: #9198a1; --line: #3d444d; --link: #79c0ff;
    --good: #3fb950; --shadow: #388bfd; --waking: #d29922; --dying: #f85149; --proof: #8e2f2c; --none: #db6d28;
    --silence: #ab7df8;
  }
}
* { box-sizing: border-box; }
html { background: var(--ground); }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 80rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
p { margin: 0.4rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 0.5rem; background: var(--ground); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; list-style: none; margin: 0.5rem 0; padding: 0; }
.dim { color: var(--dim); }
.alarm { border-left: 4px solid var(--dying); padding-left: 0.75rem; font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 0.75rem 0; }
dt { color: var(--dim); font-size: 0.85rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.scrolls { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: 0.25rem; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.badge { border-radius: 1rem; padding: 0.1rem 0.7rem; border: 2px solid var(--line); }
.badge.full { border-color: var(--good); }
.badge.degraded { border-color: var(--waking); }
.badge.none { border-color: var(--none); }
.badge.down { border-color: var(--dying); }
svg { display: block; min-width: 60rem; width: 100%; height: auto; }
svg text { fill: var(--text); font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg .dim { fill: var(--dim); }
svg .row { font-weight: 600; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .label { paint-order: stroke; stroke: var(--ground); stroke-width: 4px; }
svg .line { stroke: var(--line); }
svg .step { stroke: var(--dim); stroke-dasharray: 2 3; }
svg .lane { fill: var(--card); }
svg .break { stroke: var(--text); fill: none; }
svg .mark { fill: var(--ground); stroke: var(--text); stroke-width: 1.5; }
rect.serves, rect.full { fill: var(--good); }
rect.parked { fill: var(--shadow); }
rect.starting, rect.degraded { fill: var(--waking); }
rect.dying, rect.down { fill: var(--dying); }
rect.proof { fill: var(--proof); }
rect.silence { fill: var(--silence); }
rect.none, rect.held { fill: var(--none); }
rect.begins { fill: var(--line); }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, .skip { display: none; }
  .scrolls { overflow: visible; }
  svg { min-width: 0; break-inside: avoid; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  * { print-color-adjust: exact; }
}
"""
