"""The command `numbaloss`: score, compare, demo, doctor."""

import argparse
import contextlib
import json
import math
import os
import re
import sys

_FILES = """\
Files of logits (..., classes): .npy, .npz or FILE.npz:NAME, .safetensors[:NAME] or its index.json, a _logits_ file of
llama.cpp, a folder or a quoted pattern of shards, raw binary with --dtype and --shape; "-" is a .npy file on stdin.
Targets, weights and groups: the same, integers or numbers (...). Files are read in blocks: memory does not grow.

exit codes: 0 done; 1 a --fail-if holds; 2 bad arguments or files; 130 interrupted, after the result of the rows so far.
docs/FILES.md describes the object that --json prints. NaN and infinity are null there.
"""


def main(argv=None):
    """Runs the command and returns its exit code."""
    try:
        arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has gone; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(error)


def _fail(error):
    print(f"numbaloss: {error}", file=sys.stderr)
    return 2


def _parser():
    from . import __version__

    parser = argparse.ArgumentParser(prog="numbaloss", description="Scores logits: loss, perplexity, accuracy.")
    parser.add_argument("--version", action="version", version=f"numbaloss {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def of_files(name, help, run):
        command = commands.add_parser(
            name, help=help, epilog=_FILES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    score = of_files("score", "loss, perplexity and accuracy of logits in a file", _score)
    score.add_argument("logits", metavar="LOGITS")
    score.add_argument("targets", metavar="TARGETS", nargs="?", help="default: those in the file LOGITS")
    score.add_argument("--groups", metavar="G", help="file with an integer for each target: its document")
    score.add_argument("--calibration", action="store_true", help="calibration error, and the best temperature")
    score.add_argument("--bytes", type=int, metavar="N", help="length of the text, for bits per byte")
    score.add_argument(
        "--per-token", metavar="OUT", help="write the log probability of each scored target: .npy, .jsonl or .parquet"
    )
    compare = of_files("compare", "divergence and agreement of two files of logits", _compare)
    compare.add_argument("base", metavar="BASE")
    compare.add_argument("candidate", metavar="CANDIDATE")
    compare.add_argument("targets", metavar="TARGETS", nargs="?", help="default: those in a _logits_ file, or none")
    for command, ks in (score, ""), (compare, "5,10"):
        command.add_argument("--weights", metavar="W", help="file with one weight for each target")
        command.add_argument(
            "--shift", type=int, default=0, metavar="N", help="logits at t predict the target at t + N (default: 0)"
        )
        command.add_argument(
            "--ignore-index", type=int, default=-100, metavar="I", help="targets that do not count (default: -100)"
        )
        command.add_argument(
            "--dtype", metavar="D", help="of the logits, if the file does not tell: bfloat16, float32, ..."
        )
        command.add_argument("--shape", type=_integers, metavar="N,T,V", help="of raw binary logits; one may be -1")
        command.add_argument(
            "--top-k", type=_integers, default=_integers(ks), metavar="K,K", help=f"default: {ks or 'none'}"
        )
        command.add_argument("--memory", type=_size, default=256 << 20, metavar="SIZE", help="default: 256M")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
        command.add_argument(
            "--resume", metavar="STATE", help="save the state in this file; go on from it if it exists"
        )
        command.add_argument(
            "--details", action="store_true", help="more in the JSON: positions, histogram, worst tokens"
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--report", metavar="OUT.html", help="write a page with figures and plots")
        command.add_argument(
            "--fail-if",
            action="append",
            default=[],
            type=_condition,
            metavar="'NAME>X'",
            help="exit code 1 if this holds, or cannot be told, of a number in the JSON: 'kl.mean>0.01'",
        )

    demo = commands.add_parser("demo", help="make a small language model, score it, check the result; needs no files")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="versions, threads, SIMD, cache, GPU, and what to do about each")
    doctor.set_defaults(run=_doctor)
    return parser


def _joined(argv):
    """argparse takes the "-1,8,99" of "--shape -1,8,99" for an option."""
    out = []
    for text in argv:
        if out and out[-1] == "--shape":
            out[-1] = f"--shape={text}"
        else:
            out.append(text)
    return out


def _integers(text):
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers with commas between, got {text!r}") from None


def _size(text):
    found = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"expected bytes as 512M or 4G, got {text!r}")
    return int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ")


def _condition(text):
    found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>|==)\s*(\S+)\s*", text)
    try:
        return text, found[1], found[2], float(found[3])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected NAME>NUMBER, also >=, <, <= or ==, got {text!r}") from None


def _shared(arguments):
    names = "weights", "shift", "ignore_index", "dtype", "shape", "top_k", "memory", "resume", "device"
    values = {name: getattr(arguments, name) for name in names}
    return values | {"details": arguments.details or bool(arguments.report)}


def _score(arguments):
    from .files import Score, score

    own = {"groups": arguments.groups, "calibration": arguments.calibration or bool(arguments.report)}
    own |= {"text_bytes": arguments.bytes, "per_token": arguments.per_token}
    files = [arguments.logits, arguments.targets, arguments.weights, arguments.groups]
    return _run(arguments, score, Score, files[:2], files[2:], own, score_rows)


def _compare(arguments):
    from .files import Comparison, compare

    files = [arguments.base, arguments.candidate, arguments.targets, arguments.weights]
    return _run(arguments, compare, Comparison, files[:3], files[3:], {}, comparison_rows)


def _run(arguments, function, kind, paths, others, own, rows_of):
    """Run a pass over files, tell its result, and give the exit code."""
    from .files import Interrupted

    for text, name, _, _ in arguments.fail_if:  # before an hour's pass; what is inside a field shows at its end
        if name.partition(".")[0] not in kind._fields:
            raise ValueError(f"--fail-if: expected the name of a number in the JSON, got {text!r}")
    if arguments.report:
        from .files.report import check_path, write_report

        check_path(arguments.report)
    code = 0
    try:
        with _progress_bar() as progress:
            result = function(*paths, **_shared(arguments), **own, progress=progress)
    except Interrupted as interrupted:
        result, code = interrupted.result, 130
    if arguments.json:
        print(to_json(result))
    else:
        _print_table(rows_of(result))
    if not result.complete:
        print(f"numbaloss: interrupted after {result.rows:,} rows", file=sys.stderr)
    if result.better_shift is not None:
        note = f"--shift {result.better_shift} fits the first rows far better than {result.shift}"
        print(f"numbaloss: note: {note}", file=sys.stderr)
    if arguments.report:
        write_report(arguments.report, result, names=[*paths, *others])
    found = _flat(result)
    for text, name, _, _ in arguments.fail_if:
        if name not in found:
            raise ValueError(f"--fail-if: expected the name of a number in the JSON, got {text!r}")
    failed = [text for text, name, sign, limit in arguments.fail_if if _holds(found[name], sign, limit)]
    for text in failed:
        print(f"numbaloss: failed: {text}", file=sys.stderr)
    return code or int(bool(failed))


def _holds(value, sign, limit):
    if value is None or math.isnan(value):
        return True
    signs = {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit, "==": value == limit}
    return signs[sign]


def _flat(result):
    """{dotted name: number or None} of a result."""
    found = {}

    def visit(name, value):
        if isinstance(value, dict):
            for key, x in value.items():
                visit(f"{name}.{key}", x)
        elif value is None or isinstance(value, (int, float)):
            found[name] = value

    for name, value in result._asdict().items():
        visit(name, value)
    return found


def _demo(_):
    from .demo import main as demo

    return demo()


def _doctor(_):
    from .doctor import main as doctor

    return doctor()


def _rate(result):
    return result.bytes / result.seconds / 1e9 if result.seconds > 0 else math.nan


def to_json(result):
    """A Score or Comparison as one JSON object; docs/FILES.md."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x  # NaN and infinity are no JSON

    return json.dumps(plain({**result._asdict(), "gb_per_second": _rate(result)}), allow_nan=False)


def score_rows(result):
    """[(name, value)] of a Score, for people."""
    rows = [("tokens", f"{result.tokens:,}")]
    if result.weight != result.tokens:
        rows.append(("sum of weights", f"{result.weight:.9g}"))
    rows += [
        ("loss", f"{result.loss:.9g} nats"),
        ("standard error", f"{result.standard_error:.3g}"),
        ("perplexity", f"{result.perplexity:.7g}"),
        ("bits per token", f"{result.bits_per_token:.7g}"),
        ("accuracy", f"{result.accuracy:.4%}"),
    ]
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.7g}"))
    rows += [(f"top-{k} accuracy", f"{share:.4%}") for k, share in (result.top_k or {}).items()]
    if result.calibration_error is not None:
        rows.append(("calibration error", f"{result.calibration_error:.4g} ({len(result.calibration)} bins)"))
        found = result.temperature
        interval = "none from 1/4 to 4" if found is None else "{:.4f} ({:.4f} to {:.4f})".format(*found)
        rows.append(("best temperature", interval))
    if result.groups is not None:
        rows.append(("groups", f"{len(result.groups):,}"))
        rows.append(("  standard error", f"{result.group_standard_error:.3g} (clustered)"))
    return rows + _pass_rows(result)


def comparison_rows(result):
    """[(name, value)] of a Comparison, for people."""
    rows = [("tokens", f"{result.tokens:,}")]
    if result.base is not None:
        difference = result.difference
        rows += [
            ("perplexity", f"{result.base['perplexity']:.7g} base, {result.candidate['perplexity']:.7g} candidate"),
            ("  their ratio", f"{difference['perplexity_ratio']:.7g}"),
            ("loss difference", f"{difference['mean']:.6g} nats, standard error {difference['standard_error']:.3g}"),
            ("target probability", f"{result.rms_probability_change:.4%} RMS change"),
        ]
    for name, title in ("kl", "KL(base||cand.)"), ("reverse_kl", "KL(cand.||base)"), ("js", "Jensen-Shannon"):
        found = getattr(result, name)
        rows.append((title, f"{found['mean']:.6g} nats, standard error {found['standard_error']:.3g}"))
        quantiles = ", ".join(f"{key.replace('_', '.')} {found[key]:.4g}" for key in ("median", "p90", "p99", "p99_9"))
        rows.append(("", f"{quantiles}, max {found['max']:.4g} at {found['max_at']}"))
    shares = {k.replace("_", "-"): v for k, v in result.agreement.items() if k != "standard_error"}
    rows.append(("agreement", ", ".join(f"{k} {share:.4%}" for k, share in shares.items())))
    return rows + _pass_rows(result)


def _pass_rows(result):
    rows = [] if result.floor is None else [("floor", f"{result.floor:g} nats below the largest")]
    rows.append(("shift", f"{result.shift}"))
    return [*rows, ("seconds", f"{result.seconds:.3f}"), ("GB/s", f"{_rate(result):.2f}")]


def print_score(result):
    """A Score as a table."""
    _print_table(score_rows(result))


def _print_table(rows):
    """By rich on a terminal, as plain lines elsewhere or without rich."""
    try:
        if not sys.stdout.isatty():
            raise ImportError("plain lines for files and pipes")
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, value in rows:
            print(f"{name:<20}{value}")
    else:
        table = Table("", "", show_header=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


@contextlib.contextmanager
def _progress_bar():
    """A callback progress(done, total) that draws on stderr; None where nobody watches or rich is missing."""
    try:
        if not sys.stderr.isatty():
            raise ImportError("nobody watches")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text
    except ImportError:
        yield None
        return

    class Rate(TextColumn):
        def render(self, task):
            return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(""), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
