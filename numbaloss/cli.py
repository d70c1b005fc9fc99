"""The command `numbaloss`: score, demo, doctor."""

import argparse
import contextlib
import json
import math
import os
import sys

_SCORE = """\
LOGITS (..., classes) and TARGETS (...) are .npy files, .npz files or FILE.npz:NAME; "-" is stdin (.npy). Files are read
in blocks: memory does not grow with them, and the result does not depend on the blocks.

--json prints one object: tokens (that count), weight (their sum), loss (nats), perplexity, bits_per_token, accuracy,
standard_error (of the loss), shift, better_shift (a neighbouring shift that fits far better, or null), seconds (reading
and computing, without compiling), bytes (read), gb_per_second. NaN and infinity are null.

exit codes: 0 done; 2 bad arguments or files; 130 interrupted.
"""


def main(argv=None):
    """Runs the command and returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
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
    except (ValueError, TypeError) as error:
        return _fail(error)


def _fail(error):
    print(f"numbaloss: {error}", file=sys.stderr)
    return 2


def _parser():
    from . import __version__

    parser = argparse.ArgumentParser(prog="numbaloss", description="Scores logits: loss, perplexity, accuracy.")
    parser.add_argument("--version", action="version", version=f"numbaloss {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    score = commands.add_parser(
        "score",
        help="loss, perplexity and accuracy of logits in a file",
        epilog=_SCORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("logits", metavar="LOGITS")
    score.add_argument("targets", metavar="TARGETS")
    score.add_argument("--weights", metavar="W", help="file with one weight for each target")
    score.add_argument(
        "--shift", type=int, default=0, metavar="N", help="logits at t predict the target at t + N (default: 0)"
    )
    score.add_argument(
        "--ignore-index", type=int, default=-100, metavar="I", help="targets that do not count (default: -100)"
    )
    score.add_argument("--per-token", metavar="OUT.npy", help="write the log probability of each scored target")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)

    demo = commands.add_parser("demo", help="make a small language model, score it, check the result; needs no files")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="versions, threads, SIMD, cache, GPU, and what to do about each")
    doctor.set_defaults(run=_doctor)
    return parser


def _score(arguments):
    from .files import score

    with _progress_bar() as progress:
        result = score(
            arguments.logits,
            arguments.targets,
            weights=arguments.weights,
            shift=arguments.shift,
            ignore_index=arguments.ignore_index,
            per_token=arguments.per_token,
            progress=progress,
        )
    if arguments.json:
        print(to_json(result))
    else:
        print_score(result)
    return 0


def _demo(_):
    from .demo import main as demo

    return demo()


def _doctor(_):
    from .doctor import main as doctor

    return doctor()


def _rate(result):
    return result.bytes / result.seconds / 1e9 if result.seconds > 0 else math.nan


def to_json(result):
    """A Score as one JSON object; see `numbaloss score --help`."""
    values = {**result._asdict(), "gb_per_second": _rate(result)}
    # NaN and infinity are no JSON
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(values, allow_nan=False)


def print_score(result):
    """A Score as a table: by rich on a terminal, as plain lines elsewhere or without rich."""
    rows = [
        ("tokens", f"{result.tokens:,}"),
        ("loss", f"{result.loss:.9g} nats"),
        ("standard error", f"{result.standard_error:.3g}"),
        ("perplexity", f"{result.perplexity:.7g}"),
        ("bits per token", f"{result.bits_per_token:.7g}"),
        ("accuracy", f"{result.accuracy:.4%}"),
        ("shift", f"{result.shift}"),
        ("seconds", f"{result.seconds:.3f}"),
        ("GB/s", f"{_rate(result):.2f}"),
    ]
    if result.weight != result.tokens:
        rows.insert(1, ("sum of weights", f"{result.weight:.9g}"))
    try:
        if not sys.stdout.isatty():
            raise ImportError("plain lines for files and pipes")
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, value in rows:
            print(f"{name:<16}{value}")
    else:
        table = Table("", "", show_header=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if result.better_shift is not None:
        print(
            f"numbaloss: note: --shift {result.better_shift} fits the first rows far better than {result.shift}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _progress_bar():
    """A callback progress(done, total) that draws on stderr; None where nobody watches or rich is missing."""
    try:
        if not sys.stderr.isatty():
            raise ImportError("nobody watches")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
