"""The plots and tables of a report, as fragments of HTML."""

import io
import math
import re
from html import escape
from itertools import accumulate

from .compare import QUANTILES

GROUPS = 40  # shown at most
QUANTILE_NAMES = {"median": "median", **{name: f"{100 * q:g} %" for name, q in QUANTILES.items() if name != "median"}}

# What the plots are drawn in, and what stands in the page for it: there it follows light and dark.
_INK, _GRID, _LINE, _MARK = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {_INK: "currentColor", _GRID: "var(--grid)", _LINE: "var(--line)", _MARK: "var(--mark)"}
_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # the page's own font
    "svg.hashsalt": "numbaloss",  # the same ids each time
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.color": _INK,
    "ytick.major.width": 0.6,
    "ytick.minor.size": 0,
}


# Plots, each with its heading, or [] if there is nothing to draw.


def by_position(result):
    bins = result.by_position or []
    loss = [x["loss"] if x["weight"] and math.isfinite(x["loss"]) else math.nan for x in bins]
    if sum(x == x for x in loss) < 2:
        return []

    def draw(figure):
        axes = figure.subplots()
        axes.stairs(loss, [*(x["first"] for x in bins), bins[-1]["last"] + 1], baseline=None, color=_LINE)
        _mean(axes.axhline, result.loss)
        axes.set(xlabel="position", ylabel="loss, nats")
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _figure(
        "position", "Loss by position", draw, (7.2, 2.7), "The mean loss by position. Dashed: of all tokens."
    )


def calibration(result):
    bins = [x for x in result.calibration or [] if math.isfinite(x["confidence"] + x["accuracy"]) and x["weight"] > 0]
    if not bins:
        return []
    x, y, weight = ([b[name] for b in bins] for name in ("confidence", "accuracy", "weight"))

    def draw(figure):
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color=_INK, linewidth=0.7, linestyle="dashed")
        axes.vlines(x, x, y, color=_MARK, linewidth=1)
        axes.scatter(x, y, [10 + 600 * w / sum(weight) for w in weight], color=_LINE, linewidth=0, zorder=3)
        axes.set(xlabel="probability of the most likely class", ylabel="share of times that it is right")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")

    text = "On the dashed line a model is as sure as it should be, below it too sure. Areas grow with the weight."
    return _figure("calibration", "Calibration", draw, (4.2, 4), text, small=True)


def groups(result):
    if not result.groups:
        return []
    loss = {x["group"]: math.inf if math.isnan(x["loss"]) else x["loss"] for x in result.groups}
    groups = sorted(result.groups, key=lambda x: (-loss[x["group"]], x["group"]))[:GROUPS]
    parts, drawn = ["<h2>Groups</h2>"], [x for x in groups if math.isfinite(x["loss"])]
    if len(groups) < len(result.groups):
        parts.append(f"<p>The {len(groups)} of {len(result.groups):,} groups with the largest loss.</p>")

    def draw(figure):
        axes = figure.subplots()
        loss, at = [x["loss"] for x in drawn], range(len(drawn))
        if math.isfinite(result.loss):
            axes.hlines(at, result.loss, loss, color=_GRID, linewidth=1.5)
        _mean(axes.axvline, result.loss)
        axes.scatter(loss, at, 22, color=_LINE, linewidth=0, zorder=3)
        axes.set_yticks(at, [str(x["group"]) for x in drawn])
        axes.set(xlabel="loss, nats", ylabel="group", ylim=(len(drawn) - 0.4, -0.6))
        axes.grid(False, axis="y")

    if len(drawn) > 1:
        text = "The mean loss of each group. Dashed: of all tokens."
        parts += _figure("groups", None, draw, (7.2, 0.7 + 0.17 * len(drawn)), text)
    rows = []
    for x in groups:
        numbers = number(x["loss"], "#.6g"), number(x["perplexity"], "#.6g"), number(x["accuracy"], ".2%")
        rows.append((str(x["group"]), f"{x['tokens']:,}", *numbers))
    return [*parts, table(("group", "tokens", "loss", "perplexity", "accuracy"), rows)]


def histogram(result):
    bins = result.histogram or []
    total = sum(n for _, _, n in bins)
    positive = [(a, b, n) for a, b, n in bins if a > 0 and math.isfinite(b)]
    below = list(accumulate(n for _, _, n in positive))
    drawn = [x for x, n in zip(positive, below) if n > total / 1000]  # the least of them go on and on
    if not drawn:
        return []
    edges, share = [drawn[0][0]], []
    for a, b, n in drawn:
        if a > edges[-1]:  # a gap
            edges, share = [*edges, a], [*share, math.nan]
        edges, share = [*edges, b], [*share, n / total / math.log2(b / a)]
    tail = [sum(n for a, _, n in bins if a >= low) / total for low, _, _ in drawn]
    marks = [(result.kl[name], 1 - q, QUANTILE_NAMES[name]) for name, q in QUANTILES.items()]
    marks = [x for x in [*marks, (result.kl["max"], 1 / total, "largest")] if edges[0] <= x[0] < math.inf]
    bottom = min(0.5 / total, 0.05)

    def draw(figure):
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="KL(base ‖ candidate), nats", ylabel="share of tokens")
        axes.stairs(share, edges, baseline=bottom, fill=True, color=_LINE, alpha=0.35, linewidth=0)
        axes.plot([a for a, _, _ in drawn], tail, color=_INK, linewidth=1.2)
        for x, y, what in marks:
            axes.plot(x, y, "o", color=_MARK, markersize=4)
            axes.annotate(what, (x, y), (6, 0), textcoords="offset points", verticalalignment="center", fontsize=8)
        low, high = math.log10(edges[0]), math.log10(edges[-1])
        axes.set(xlim=(10.0 ** math.floor(low), 10.0 ** math.ceil(high + 0.15)), ylim=(bottom, 1.6))
        axes.xaxis.set_major_formatter(lambda x, _: _power(x))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")

    text = "Line: the tokens whose KL is at least so much. Bars: the tokens by their KL, for each doubling of it."
    zeros, infinite = (sum(n for a, _, n in bins if a == x) for x in (0, math.inf))
    left = [(zeros, "whose KL is 0"), (infinite, "whose KL is infinite")]
    left.append((sum(n for _, _, n in positive) - sum(n for _, _, n in drawn), f"with less than {edges[0]:.2g}"))
    left = ", ".join(f"{n:,} {what}" for n, what in left if n)
    return _figure("kl", "Distribution of KL", draw, (7.2, 3.4), text + (f" Not drawn: {left}." if left else ""))


def _mean(line, loss):
    if math.isfinite(loss):
        line(loss, color=_MARK, linewidth=0.9, linestyle="dashed")


def _power(x):
    """A power of ten on an axis."""
    if 1e-3 <= x <= 1e3:
        return f"{x:g}"
    return "10" + str(round(math.log10(x))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _figure(name, heading, draw, size, caption, small=False):
    """An SVG that draw(figure) draws, with ids of its own that begin with `name`, in the colours of the page."""
    import matplotlib.style
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=size)
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub("|".join(_COLOURS), lambda found: _COLOURS[found[0]], svg)
    svg = f'<svg role="img" aria-label="{escaped(caption)}" viewBox="{box}">{svg.strip()}'
    kind = ' class="small"' if small else ""
    return [
        *([f"<h2>{heading}</h2>"] if heading else []),
        f"<figure{kind}>{svg}<figcaption>{escaped(caption)}</figcaption></figure>",
    ]


# Text.


def number(x, spec=".7g"):
    return format(x, spec) if math.isfinite(x) else str(float(x)).replace("nan", "NaN")


def escaped(x):
    """As HTML. Control characters, which HTML knows none of, and halves of characters are replaced."""
    text = "".join("\ufffd" if (c < " " and c not in "\t\n") or "\x7f" <= c < "\xa0" else c for c in str(x))
    return escape(text.encode("utf-8", "replace").decode())


def place(index):
    return f"[{', '.join(str(int(i)) for i in index)}]" if index else ""


def note(text):
    return f'<p class="note" role="note">{escaped(text)}</p>'


def figures(rows):
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return [f'<div class="wide"><table class="figures"><tbody>{cells}</tbody></table></div>'] if rows else []


def table(head, rows):
    head = "".join(f'<th scope="col">{x}</th>' for x in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{x}</td>" for x in row[1:])}</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
