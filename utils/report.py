"""One HTML page that shows what a run gave: tables that sort, pictures that compare, charts, settings. It needs no
server, no network and no other file, and without JavaScript it is still all there, as plain tables and pictures."""

import base64
import hashlib
import io
import json
from pathlib import Path

import jinja2

from utils.metrics import METRICS

TEMPLATE = Path(__file__).with_name("report.html")
DIGITS = {"psnr": 2, "psnr_y": 2, "laplacian": 3, "shift_px": 3, "scale": 5, "seconds": 3}  # others: 4
PICTURE_PX, SMALL_PX = 768, 384  # the longest side of a picture; up to the second it is exact, and shown enlarged


def data_uri(kind, data):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(label, image, caption=""):
    """What the page shows of a PIL image in RGB: up to SMALL_PX a side its own pixels, enlarged by a whole factor;
    beyond that a JPEG of quality 92 without subsampling, reduced to at most PICTURE_PX a side."""
    file, factor = io.BytesIO(), SMALL_PX // max(image.size)
    if factor:
        image.save(file, "PNG")
    else:
        image = image.copy()
        image.thumbnail((PICTURE_PX, PICTURE_PX))
        image.save(file, "JPEG", quality=92, subsampling=0)
    return {"label": label, "caption": caption, "uri": data_uri("png" if factor else "jpeg", file.getvalue()),
            "width": image.width * max(factor, 1), "enlarged": factor > 1}


def chart(figure):
    """A matplotlib figure as an SVG image."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return data_uri("svg+xml", file.getvalue())


def number(name, value, sign=""):
    return f"{value:{sign}.{DIGITS.get(name, 4)}f}"


def means_table(rows, sign=""):
    """Lists of cells, the headings first, of {row: {"label": text, metric: {mean, lo, hi} or a number}}."""
    names = [name for name in next(iter(rows.values())) if name != "label"]

    def cell(name, value):
        if not isinstance(value, dict):
            return number(name, value, sign)
        mean, lo, hi = (number(name, value[key], sign) for key in ("mean", "lo", "hi"))
        return f"{mean} [{lo},\N{NO-BREAK SPACE}{hi}]"

    lines = [[values["label"], *(cell(name, values[name]) for name in names)] for values in rows.values()]
    return [["", *names], *lines]


def item_name(score):
    """What a score, {"image": name, maybe "crop": number, ...}, belongs to."""
    return f"{score['image']}, crop {score['crop']}" if score.get("crop") else score["image"]


def items_table(scores, rows, best):
    """(columns, {item: [cell]}) of scores, dicts of image, row and metrics: a line for each image, a column for each
    of METRICS and row. columns: [(metric, row)]; with a row `best`, what it gains over the input comes first."""
    values = {}
    for score in scores:
        values.setdefault(item_name(score), {})[score["row"]] = score
    columns = [(name, row) for name in METRICS if name in scores[0] for row in rows]
    gain = f"{best} \N{MINUS SIGN} input"
    if best:
        columns = [(name, gain) for name in METRICS if name in scores[0]] + columns
    lines = {item: [number(name, of[best][name] - of["input"][name], "+") if row == gain else
                    number(name, of[row][name]) for name, row in columns] for item, of in values.items()}
    return columns, lines


def section(heading, rows=None, gains=None, best=None, scores=(), pictures=None, notes=None, about="", charts=()):
    """A part of the page.

    rows: of means_table, one for each row of `scores`; gains: the same of row `best` minus the others. pictures:
    {item: [picture(...)]}, compared two at a time, at first the first two. notes: {item: JSON-safe parameters of its
    degradation, or what else belongs to it, or None}. charts: [chart(figure)]. item: as item_name calls it."""
    columns, lines = items_table(scores, rows, best) if scores else ([], {})
    return {
        "heading": heading, "about": about, "means": means_table(rows) if rows else [],
        "gains": means_table(gains, "+") if gains else [], "best": rows[best]["label"] if best else "",
        "columns": columns, "lines": lines, "pictures": pictures or {}, "charts": charts,
        "notes": {item: in_words(note) for item, note in (notes or {}).items() if note is not None},
    }


def in_words(note):
    """(in short, in full): the steps of a degradation's parameters by their types, then with all numbers."""
    steps = note if isinstance(note, list) and all(isinstance(step, dict) for step in note) else []
    short = ", ".join(str(step.get("type", "?")) for step in steps) or "parameters"
    return short, "\n".join(map(as_text, steps)) if steps else as_text(note)


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_report(path, title, about, sections, details):
    """Write the page. sections: of section(); about: text; details: {heading: {name: JSON-safe value}}, to be opened.

    Every text may come from a stranger, in a file's name or a prompt: all are escaped, and the page's own policy lets
    no script run but its own and nothing load from anywhere."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    details = {heading: {name: as_text(value) for name, value in values.items()}
               for heading, values in details.items()}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, about=about, sections=sections, details=details)
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name may be no Unicode
