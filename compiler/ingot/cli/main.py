"""The `ingot` command: finds the verb, runs it, and turns whatever goes wrong into one message and an exit code.

Exit codes: 0 done, 1 the answer is no (check, verify) or the model failed, 2 bad input, 70 a bug in ingot, 130
interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from ingot import IngotError, __version__

#: Verb -> what it does, in the order of the help page. Verb NAME is `command` in the module `ingot.cli.NAME`.
VERBS = {
    "compile": "Compile a model to one self-contained library.",
    "run": "Run a compiled model on files.",
    "bench": "Measure a compiled model's speed and memory.",
    "verify": "Compare a compiled model with ONNX Runtime or LiteRT.",
    "tune": "Search the best kernels for a model, on the board itself.",
    "inspect": "Show what is inside a model or a library.",
    "check": "Tell whether a library runs on a board, or a model can be compiled.",
    "log": "List, merge, prune and verify tuning logs.",
    "targets": "List the boards, or explain one.",
}

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 70, 130, 141
DEBUG_VARIABLE = "INGOT_DEBUG"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Debug:
    """Whether --debug was given, before or after the verb."""

    given = False


def _set_debug(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    _Debug.given = _Debug.given or value


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
    )


class Verbs(click.Group):
    """A group that imports a verb's module when the verb is used: most of them need the compiler, some nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; None if there is none of that name."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"ingot.cli.{cmd_name}").command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; raise UsageError with the nearest ones for an unknown word."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "the verbs are: " + ", ".join(VERBS)
            raise click.UsageError(f"ingot has no verb {args[0][:60]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of verbs without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def main(  # type: ignore[override] # click's overloads differ by standalone_mode, which this ignores
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **_extra: object
    ) -> NoReturn:
        """Run and exit. Never shows a traceback, except with --debug."""
        if "_INGOT_COMPLETE" in os.environ:
            super().main(args=args, prog_name="ingot")
        _Debug.given = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
        sys.exit(_guarded(self, list(sys.argv[1:] if args is None else args)))


def _guarded(group: click.Group, arguments: list[str]) -> int:
    """Run the command and return its exit code, whatever happens."""
    try:
        with group.make_context("ingot", arguments) as context:
            code = group.invoke(context)
        _flush()
    except BaseException as error:  # the last line of defence: nothing may end in a traceback
        if isinstance(error, SystemExit):
            raise
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: BaseException) -> int:
    """Say on standard error what went wrong; return the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, EOFError, click.Abort)):
        _complain("interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _silence()
        return EXIT_BROKEN_PIPE
    if _Debug.given:
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        error.show(file=sys.stderr)
        return error.exit_code
    if isinstance(error, IngotError):
        _complain(f"error: {error}")
        if error.exit_code == EXIT_BUG and not _Debug.given:
            _complain("  this is a bug in ingot; --debug shows where, please report it with the model")
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        _silence()
        where = f"\n  where:   {error.filename}" if error.filename else ""
        _complain(f"error: the disk is full{where}\n  do:      free some space, or choose another disk")
        return EXIT_BAD_INPUT
    if isinstance(error, MemoryError):
        _complain("error: out of memory\n  do:      close other programs, or use a machine with more memory")
        return EXIT_FAILED
    text = " ".join(str(error).split())[:300]
    _complain(f"error: this is a bug in ingot: {type(error).__name__}: {text}")
    if not _Debug.given:
        _complain("  do:      run it again with --debug, and report what it prints")
    return EXIT_BUG


def _complain(text: str) -> None:
    # A reader of standard error that went away must not hide the exit code.
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _flush() -> None:
    """Write what is still buffered now, where a full disk or a broken pipe can be told."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _silence() -> None:
    """Drop what standard output still holds: at exit, Python would try to write it and complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    subcommand_metavar="VERB [ARGS]...",
)
@click.version_option(__version__, prog_name="ingot", message="%(prog)s %(version)s")
def cli() -> None:
    """A trained model (ONNX, TFLite) in, one self-contained library for a named board out.

    \b
      ingot compile model.onnx --target raspberry-pi-4 -o model.so
      ingot run model.so --input photo.jpg --top 5 --labels labels.txt
    """


cli.params.append(_debug_option())


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that temporary files and child processes go the same way as after Ctrl-C.
    raise SystemExit(128 + signal.SIGTERM)


def main() -> NoReturn:
    """Entry point of the `ingot` program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: there is nobody to read it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - lives as long as we do
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows escapes, not a traceback
    signal.signal(signal.SIGTERM, _terminate)
    cli.main()


if __name__ == "__main__":
    main()
