"""The entry point: registers the commands without importing them, and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from cyclopts import App, CycloptsError

from rankwise._version import __version__
from rankwise.cli.common import EXIT_DEFECT, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_OK, PlainConsole, printable
from rankwise.errors import RankwiseError, without_secrets

MESSAGES: Final = "https://rankwise.readthedocs.io/en/latest/reference/messages.html"
ISSUES: Final = "https://github.com/rankwise/rankwise/issues"

COMMANDS: Final[dict[str, str]] = {
    "demo": "Show the whole story on the built-in model and facts, on a laptop CPU in minutes.",
    "simulate": "Plant style and fact updates: what a rank holds, and what scaling collapse is and is not.",
    "inspect": "Show what an update is made of: the spectrum of every module of an adapter or of tuned - base.",
    "plan": "Choose a rank and an alpha for every module, under a budget or an error, and write trainers' configs.",
    "convert": "Write an adapter in another rank, scaling rule, layout or file format: the same function.",
    "lint": "Find mistakes in rank, alpha, rule and patterns, and what a serving runtime would do with them.",
    "check": "Measure whether a scaling rule is stable over ranks, for this model, data, optimizer and init.",
    "extract": "Make a LoRA adapter out of a full fine-tune: ranks by module, errors certified.",
    "probe": "Say before any training how much there is to learn, what holds it, and what to start with.",
    "train": "Fine-tune with LoRA at high rank, watched for collapse; recall and forgetting are measured.",
    "sweep": "Train rank x rule x learning rate x seed, on one machine or a Ray cluster, and say what the grid says.",
    "report": "Write one self-contained page out of any records: a sweep's answer first, comparisons, every figure.",
    "recall": "Measure what an adapter recalls of a data set, in bits, and what it forgot.",
}
"""Command -> its line in the help. The function of the same name stands in `rankwise.cli.NAME`."""

HELP: Final = "What rank, what scaling, what learning rate? Measure LoRA updates instead of guessing."
EPILOGUE: Final = (
    "Exit codes: 0 done; 1 a defect of rankwise; 2 bad input or usage; 3 a check ran and failed; 130 interrupted."
)


def build_app() -> App:
    """Return the application; no command is imported before it is called."""
    app = App(
        name="rankwise",
        help=HELP,
        help_epilogue=EPILOGUE,
        help_format="plaintext",  # markdown would import a parser: 60 ms of a 300 ms budget
        version=__version__,
        console=PlainConsole(),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for name, line in COMMANDS.items():
        app.command(f"rankwise.cli.{name}:{name}", name=name, help=line)
    return app


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code. All errors end here."""
    try:
        code = build_app()(list(words), exit_on_error=False, print_error=False)
        sys.stdout.flush()
        if not words:  # the help was shown, but nothing was asked
            return EXIT_INPUT
        return code if isinstance(code, int) else EXIT_OK
    except CycloptsError as error:
        command = [words[0]] if words and words[0] in COMMANDS else []
        _say(f"{str(error).strip()}\nSee: {' '.join(['rankwise', *command, '--help'])}")
        return EXIT_INPUT
    except RankwiseError as error:
        _say(f"{error}\n{MESSAGES}#{error.slug}")
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("rankwise: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            return _defect()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails again
        _say(f"stdout cannot be written: {error.strerror}")
        return EXIT_INPUT
    except MemoryError as error:
        _say(f"there is not enough memory for this input ({error or 'allocation failed'})")
        return EXIT_INPUT
    except Exception:
        return _defect()


def _defect() -> int:
    print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
    print(f"rankwise: this is a defect of rankwise itself; please report it: {ISSUES}", file=sys.stderr)
    return EXIT_DEFECT


def _say(message: str) -> None:
    print(f"rankwise: error: {printable(without_secrets(message))}", file=sys.stderr)


def main() -> None:
    """Run the command line of this process and exit."""
    if sys.stdout is None:  # started with stdout closed (`>&-`)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path need not be text, and must not end the run when printed
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
