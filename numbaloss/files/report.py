"""A Score or a Comparison as one HTML page: figures, plots and tables. It loads nothing and runs no script."""

import math
import os
import secrets
from contextlib import suppress

from .._version import __version__
from .compare import DIVERGENCES, Comparison
from .plots import (
    QUANTILE_NAMES,
    by_position,
    calibration,
    escaped,
    figures,
    groups,
    histogram,
    note,
    number,
    place,
    table,
)
from .readers import FileError
from .score import Score

_ROLES = {
    Score: ("logits", "targets", "weights", "groups"),
    Comparison: ("base", "candidate", "targets", "weights"),
}
_DIVERGENCE = {"kl": "KL(base ‖ candidate)", "reverse_kl": "KL(candidate ‖ base)", "js": "Jensen-Shannon"}

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5f6670; --grid: #e3e5e8; --line: #2563a8;
  --mark: #c2410c; --warn: #fff4e0; --warn-edge: #d97706; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e4e6e9; --soft: #9aa1ab;
  --grid: #33373d; --line: #6ea8e6; --mark: #f59e5b; --warn: #35290f; --warn-edge: #d97706; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; }
.soft, th { color: var(--soft); }
.files { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; }
.files dt { color: var(--soft); }
.files dd { margin: 0; font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.note { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: .6rem .9rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th { font-weight: 500; text-align: left; }
th, td { padding: .28rem 1.6rem .28rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td { text-align: right; }
th + th, thead th:not(:first-child) { text-align: right; }
.figures td { text-align: left; }
figure { margin: .5rem 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure.small { max-width: 26rem; }
svg * { stroke-linejoin: round; }
svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .3rem; }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  tr { break-inside: avoid; } * { print-color-adjust: exact; } }
"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<p class="soft">numbaloss {version}</p>
<h1><bdi>{title}</bdi></h1>
{body}
</main>
</body>
</html>
"""


def write_report(path, result, title=None, *, names=()):
    """Writes a Score or a Comparison as one HTML page that needs nothing else: no network, no scripts.

    What was not asked for (`details`, `calibration`, `groups`) is left out. The same result gives the same bytes.

    Args:
        path: of the .html file; it appears under this name when it is complete.
        result: what `score` or `compare` returns, or the `result` of their Interrupted.
        title: of the page, or None.
        names: of the files: logits, targets, weights, groups; of a Comparison base, candidate, targets, weights. None
            stands for one that there is not.
    Raises:
        FileError (a ValueError): the file cannot be written.
        ImportError: matplotlib is missing.
    """
    name = check_path(path)
    kind = next((kind for kind in _ROLES if isinstance(result, kind)), None)
    if kind is None:
        raise TypeError(f"result: expected a Score or a Comparison, got {type(result).__name__}")
    if isinstance(names, (str, bytes, os.PathLike)):
        raise TypeError(f"names: expected a sequence of names, got {type(names).__name__}")
    roles = _ROLES[kind]
    if len(names) > len(roles):
        raise ValueError(f"names: expected at most {len(roles)}, for {', '.join(roles)}, got {len(names)}")
    files = [(role, os.fsdecode(file)) for role, file in zip(roles, names) if file is not None]
    body = _header(result, files) + (_score(result) if kind is Score else _comparison(result))
    title = escaped(kind.__name__ if title is None else title)
    page = _PAGE.format(title=title, css=_CSS, version=__version__, body="\n".join(body))
    _write(name, page.encode())


def check_path(path):
    """The path as a str, if `write_report` could write there: to be told before the files are read, not after."""
    name = os.fsdecode(path)
    if os.path.splitext(name)[1].lower() not in (".html", ".htm"):
        raise ValueError(f"report: expected a name that ends in .html, got {name!r}")
    if os.path.exists(name) and not os.path.isfile(name):
        raise FileError(name, "expected a file name to write to, got something else that exists")
    if not os.path.isdir(os.path.dirname(os.path.realpath(name))):
        raise FileError(name, "cannot be written: its folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError('report: needs matplotlib: pip install "numbaloss[cli]"') from None
    return name


def _write(name, data):
    path = os.path.realpath(name)
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        try:
            with open(part, "xb") as file:
                file.write(data)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        raise FileError(name, f"cannot be written: {error.strerror or error}") from error


# The parts of the page: each returns a list of HTML fragments.


def _header(result, files):
    parts = []
    if files:
        rows = "".join(f"<dt>{role}</dt><dd><bdi>{escaped(file)}</bdi></dd>" for role, file in files)
        parts.append(f'<dl class="files">{rows}</dl>')
    target = f"t&nbsp;{'+' if result.shift > 0 else '-'}&nbsp;{abs(result.shift)}" if result.shift else "t"
    where = f"Shift {result.shift}: logits at position t belong to the target at {target}."
    parts.append(f"<p>{result.tokens:,} tokens of {result.rows:,} rows count. {where}</p>")
    if not result.complete:
        parts.append(note(f"Interrupted: these are the figures of the first {result.rows:,} rows, not of all."))
    if result.better_shift is not None:
        parts.append(note(f"Shift {result.better_shift} fits the first rows far better than {result.shift}."))
    if result.floor is not None:
        parts.append(
            f'<p class="soft">llama.cpp wrote these log probabilities: those more than {number(result.floor, ".6g")} '
            "nats below the largest of their row are cut off there.</p>"
        )
    return parts


def _score(result):
    rows = [*_counts(result), ("loss", f"{_loss(result._asdict())} nats")]
    if result.groups is not None:
        error = number(result.group_standard_error, ".3g")
        rows.append(("its error by group", f"± {error} (clustered, {len(result.groups):,} groups)"))
    rows += [("perplexity", number(result.perplexity)), ("bits per token", number(result.bits_per_token))]
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", number(result.bits_per_byte)))
    rows.append(("accuracy", number(result.accuracy, ".4%")))
    rows += [(f"top-{k} accuracy", number(share, ".4%")) for k, share in (result.top_k or {}).items()]
    if result.calibration_error is not None:
        bins = f" ({len(result.calibration)} bins)" if result.calibration else ""
        rows.append(("calibration error", number(result.calibration_error, ".4g") + bins))
        best, low, high = (number(x, ".4f") for x in result.temperature or (math.nan,) * 3)
        interval = f"{best} (95 % interval {low} to {high})" if result.temperature else "none from 1/4 to 4"
        rows.append(("best temperature", interval))
    parts = figures(rows + _times(result))
    parts += by_position(result) + calibration(result) + groups(result)
    columns = {"target": "target", "argmax": "most likely"}
    return parts + _worst("Tokens with the largest loss", result.worst, columns, "loss")


def _comparison(result):
    parts = figures(_counts(result) + _times(result))
    if result.base is not None and result.candidate is not None:
        parts += _losses(result)
    parts += ["<h2>Divergences, in nats</h2>", *_divergences(result)]
    agreement = dict(result.agreement)
    top, error = agreement.pop("top_1", math.nan), agreement.pop("standard_error", math.nan)
    rows = [("same most likely class", f"{number(top, '.4%')} ± {number(error, '.2%')}")]
    for name, share in agreement.items():
        k = name.removeprefix("top_")
        rows.append((f"base's is among candidate's top {escaped(k)}", number(share, ".4%")))
    parts += ["<h2>Agreement</h2>", *figures(rows), *histogram(result)]
    columns = {"base": "base's most likely", "candidate": "candidate's"}
    return parts + _worst("Tokens with the largest KL(base ‖ candidate)", result.worst, columns, "KL")


def _losses(result):
    pair = result.base, result.candidate
    rows = [("loss, nats", *(_loss(x) for x in pair))]
    for name, spec in ("perplexity", ".7g"), ("bits_per_token", ".7g"), ("accuracy", ".4%"):
        rows.append((name.replace("_", " "), *(number(x[name], spec) for x in pair)))
    parts = ["<h2>Losses</h2>", table(("", "base", "candidate"), rows)]
    rows, change = [], result.difference
    if change is not None:
        error = number(change["standard_error"], ".3g")
        rows.append(("candidate - base, of the same tokens", f"{number(change['mean'])} ± {error} nats"))
        rows.append(("ratio of the perplexities", number(change["perplexity_ratio"])))
    if result.rms_probability_change is not None:
        change = number(result.rms_probability_change, ".4%")
        rows.append(("RMS change of the target's probability", change))
    return parts + figures(rows)


def _divergences(result):
    found = [getattr(result, name) for name in DIVERGENCES]
    rows = [("mean", *(f"{number(x['mean'])} ± {number(x['standard_error'], '.2g')}" for x in found))]
    rows += [(what, *(number(x[name], ".4g") for x in found)) for name, what in QUANTILE_NAMES.items()]
    rows.append(("largest", *(number(x["max"], ".4g") for x in found)))
    rows.append(("at", *(place(x["max_at"]) for x in found)))
    return [table(("", *(_DIVERGENCE[name] for name in DIVERGENCES)), rows)]


def _loss(found):
    return f"{number(found['loss'], '.9g')} ± {number(found['standard_error'], '.3g')}"


def _counts(result):
    rows = [("tokens", f"{result.tokens:,}")]
    return rows if result.weight == result.tokens else [*rows, ("sum of weights", number(result.weight, ".9g"))]


def _times(result):
    rate = result.bytes / result.seconds / 1e9 if result.seconds > 0 else math.nan
    return [("seconds", number(result.seconds, ".3f")), ("GB/s", number(rate, ".2f"))]


def _worst(heading, tokens, columns, value):
    if not tokens:
        return []
    rows = []
    for token in tokens:
        cells = [escaped(token[name]) for name in columns]
        rows.append((place(token["index"]), *cells, number(token["value"], "#.6g")))
    return [f"<h2>{heading}</h2>", table(("index", *columns.values(), value), rows)]
