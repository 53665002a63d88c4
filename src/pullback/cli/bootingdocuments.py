"""What `boot` prints with `--json`."""

from __future__ import annotations

from pullback.cli.schema import TARGET, Document, F, Field, I, Kind, N, T, result

_MACHINE = (
    Field("point", T, "the restore point's id"),
    Field("machine", T, "the name of the machine that was started"),
    Field("created", T, "the restore point's instant, UTC, ISO 8601"),
    Field("pid", I, "the QEMU process; null: somebody else is to start it (`--no-start`)", optional=True),
    Field("resumed", F, "it ran already"),
    Field("monitor", T, "its monitor, as other commands take it"),
    Field("agent", T, "the guest agent's socket", optional=True),
    Field("screen", T, "the socket of a VNC server", optional=True),
    Field("console", T, "the file that takes what its first serial port says"),
    Field("script", T, "the file with the command that starts it"),
    Field("words", Kind.TEXTS, "the words of that command"),
    Field("accel", T, "how its processors run", words=("kvm", "tcg")),
    Field("network", T, "what its network cards are connected to: none, isolated, user, bridge=NAME"),
    Field(
        "left_out",
        Kind.OBJECTS,
        "what of the saved machine was not made anew",
        (
            Field("what", T, "in the words of its command line"),
            Field("why", T, "the reason"),
            Field("of_host", F, "it was the old host's, and has its counterpart here"),
        ),
    ),
    Field("started_after", N, "seconds from the beginning of the command until it ran"),
)

#: Command -> what it prints at the end if it did not fail.
RESULTS: dict[str, tuple[Document, ...]] = {
    "boot": (
        result(
            "boot",
            "The machine's disks are whole (with `--detach`: it runs). "
            "The event `machine-started` (`machine-ready` with `--no-start`) has the same facts earlier",
            *_MACHINE,
            Field("filled", F, "the disks are whole, and the repository is not needed any more"),
            Field("runs", F, "the machine runs"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk",
                (
                    TARGET,
                    Field("path", T, "its image, qcow2"),
                    Field("size", I, "bytes"),
                    Field("data", I, "bytes of the restore point that are not zero; null: unknown yet", optional=True),
                ),
            ),
        ),
    ),
}
