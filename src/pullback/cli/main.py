"""The command `pullback`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pullback.cli import (
    backup,
    boot,
    checkpoint,
    completion,
    copy,
    diff,
    doctor,
    events,
    export,
    files,
    forget,
    job,
    key,
    machines,
    mount,
    overlay,
    points,
    prove,
    repository,
    restore,
    rollback,
    serve,
    show,
    snapshot,
    verify,
)
from pullback.errors import Exit
from pullback.version import __version__

app = typer.Typer(
    name="pullback",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(repository.init)
app.command("backup")(backup.backup)
app.command("list")(points.listing)
app.command("show")(show.show)
app.command("restore")(restore.restore)
app.command("rollback")(rollback.rollback)
app.command("boot")(boot.boot)
app.command("serve")(serve.serve)
app.command("mount")(mount.mount)
app.command("files")(files.files)
app.command("prove")(prove.prove)
app.command("verify")(verify.verify)
app.command("diff")(diff.diff)
app.command("forget")(forget.forget)
app.command("copy")(copy.copy)
app.command("unlock")(repository.unlock)
app.command("doctor")(doctor.doctor)
app.command("info")(machines.info)
app.command("recover")(machines.recover)
app.command("untrack")(machines.untrack)
app.command("events")(events.events)
app.command("completion")(completion.command_of(app))
app.add_typer(key.app, name="key")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(export.app, name="export")
app.add_typer(job.app, name="job")
app.add_typer(overlay.app, name="overlay")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pullback {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Live, incremental backup of QEMU/KVM virtual machines.

    Exit codes: 0 done, 1 failed, 2 usage, 3 done but a chain did not continue, 10 no repository,
    11 busy, 12 wrong password, 13 verification failed, 130/143 interrupted and cleaned up.
    """


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="pullback")
    except KeyboardInterrupt:  # before or after a command's own handling
        sys.exit(int(Exit.INTERRUPTED))
    except BrokenPipeError:  # `pullback list | head`
        sys.stderr.close()
        sys.exit(int(Exit.FAILED))


if __name__ == "__main__":
    main()
