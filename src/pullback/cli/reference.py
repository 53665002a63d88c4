"""docs/commands.md, made from the command line itself.

    python -m pullback.cli.reference          print it
    python -m pullback.cli.reference FILE     write it

Arguments and options come from typer, the documents of `--json` from `documents`, and what else is
to be said about a command stands here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pullback.cli import documents, pages, signatures
from pullback.cli.documents import Document, Field, Kind
from pullback.cli.main import app
from pullback.cli.signatures import Parameter
from pullback.cli.signatures import parameters as parameters

#: The beginning of the page: what is the same for all commands.
TOP = """\
# Commands

<!-- Written by `make docs` from the command line. Do not edit it here. -->

    pullback COMMAND [OPTIONS] …

- **MACHINE** is a QEMU process by its QMP socket: `qmp:/run/web01.sock`. A QMP socket serves one client at a time.
  Or it is a machine that is off, by its images: `images:vda=/srv/a.qcow2,vdb=raw:/srv/b.raw`. A comma in a path is
  doubled. `qcow2:` or `raw:` before a path says its format. Without it, an image is qcow2 if it begins as one and
  names no other file, and raw if it looks like no other format; all else is refused. `backup` needs `--name`.
- **REPO** is a directory of restore points: `dir:/srv/backup`. `-r` can be left out where `PULLBACK_REPOSITORY` is set.
- **POINT** is the id of a restore point, the start of one, `latest` (the default), or a date in local time, which
  means the last point not after it: `2026-11-24` is the end of that day; `"2026-11-24 06:00"` and
  `2026-11-24T06:00:18` are moments. With several machines in a repository, `latest` and dates need `--machine NAME`.
- **TARGET** is a disk: `vda`, `sda`, `nvme0n1`. `pullback info` shows the disks of a machine. The rule is in
  [design](design.md#disks).

Data goes to standard output, messages and progress to standard error. Bars are drawn on a terminal only. Exit codes
are in [exit codes](exit-codes.md).
"""
_JSON = """\
## Documents of `--json`

With `--json`, standard output has one JSON object a line: any number of `note`, `progress` and `event`, then exactly
one `result` or `error`. (A command that stays after its result, and then fails to end well, adds an `error`.) Members
may be added in later versions; none is removed or changes its meaning within a major version. Sizes are bytes.
"""
#: What is to be said about a command besides its options. Blocks after <!-- run --> are run by a test.
NOTES = {
    "init": """\
The format is restic's, version 2: encrypted and compressed, and `restic` can read it. The password comes from
`PULLBACK_PASSWORD_FILE` or `PULLBACK_PASSWORD_COMMAND` (or restic's variables, or the configuration); on a terminal you
are asked twice. A repository that is there is never touched (exit code 2). The directory above it must be there; so
must a bucket. A `dir:` repository has no password, and needs no `init`.

```sh
pullback init -r /srv/backup
pullback init -r s3:https://s3.example.com/bucket/web
```
""",
    "forget": """\
A rule holds for each machine by itself. Without options of the rule it is the `keep` of the configured repository. Of
each hour, day, week, month or year (UTC) the newest point is kept, for the last N of them that have one; what any
option keeps is kept. The newest point of a machine stays whatever the rule says, because the next increment builds on
it. A rule that keeps nothing is refused. A disk that the newest point does not have may be read whole when it comes
back.

Named points go whatever they are. If the newest of a machine goes, its next backup reads every disk whole, and says so
(exit code 3). Data is only removed by `--prune`, which also removes what earlier runs left; each needs the repository
for itself (exit code 11 while a backup runs). Other programs' snapshots in the repository are never touched. It is done
by the program `restic`. Not for `dir:` repositories.

```sh
pullback forget --keep-last 3 --keep-daily 14 --keep-monthly 12 --prune -r /srv/backup --dry-run
pullback forget 1f2e3d4c -r /srv/backup
```
""",
    "copy": """\
What the other repository has already, points and data, is not copied again. Each repository has its own password: a
configured one that of the configuration, else that of the environment, for both, unless `--to-password-file` or
`--to-password-command` names the other one's. A copy has an id of its own. The next backup to the other repository
builds upon a copy as upon any point. It is done by the program `restic`, which takes one set of keys for buckets. Not
for `dir:` repositories.

```sh
pullback copy --to s3:https://s3.example.com/bucket/web -r /srv/backup --to-password-file /root/cloud.password
pullback copy latest --machine web01 --to cloud -r main
```
""",
    "unlock": """\
A lock is stale if it was not refreshed for half an hour, or if its process was on this host and has ended. Others are
shown and stay. What `--remove-all` takes from a living backup makes that backup check everything again, or fail; no
restore point is hurt.

```sh
pullback unlock -r /srv/backup
```
""",
    "doctor": """\
It looks at programs, the configuration, our directories, machines (monitor, engine, disks, checkpoints, guest agent,
room for scratch) and repositories (access and password, damaged points, locks, writing, clock, room, age of the newest
points), each with a remedy. What is found out about a build of QEMU is kept in the cache, and a repository gets a lock
for a moment; nothing else is changed. A checkpoint for a repository that is not there is only told where everything
configured is looked at.

The exit code is 0 if all is well, 1 if there is a problem, 3 if there are only warnings. With `--quiet`, only what is
not well is printed.

```sh
pullback doctor
pullback doctor web01 --quiet
pullback doctor qmp:/run/web01-pullback.sock -r /srv/backup --json
```
""",
    "key list": """\
`*` marks the one that opened the repository. Host, user and time are what its maker wrote.
""",
    "key add": """\
A repository may have 20. Each opens all of it.

```sh
pullback key add -r /srv/backup --new-password-file /root/second.password
```
""",
    "key remove": """\
The key that opened the repository stays, so there is always one. Whoever knew the password and has a copy of the
key file can still read what is stored.
""",
    "key passwd": """\
The new key is stored and tried before the old one goes. Other keys stay.
""",
    "backup": """\
The first backup of a disk reads everything that is not known to be zero. Each later one reads what changed since the
restore point before, if the disk's checkpoint proves that nothing is missing. Otherwise that disk is read whole, the
reason is printed, and the exit code is 3 if the chain should have continued. `--strict` makes it 1. The restore point
is made in both cases.

A disk that is read-only, removable, firmware or without medium takes no part unless `--disk` names it.

<!-- run -->
```sh
pullback backup qmp:/run/web01-pullback.sock -r dir:/srv/backup --dry-run
pullback backup qmp:/run/web01-pullback.sock -r dir:/srv/backup --exclude vdb
pullback backup qmp:/run/web01-pullback.sock -r dir:/srv/backup --level full --json
```
""",
    "list": """\
A restore point whose manifest cannot be used is listed as damaged, with the reason.

<!-- run -->
```sh
pullback list -r dir:/srv/backup
PULLBACK_REPOSITORY=dir:/srv/backup pullback list --json
```
""",
    "show": """\
Restore points share chunks. What would be freed is what no other point of the repository has. Forgetting several points
frees more than the sum, because it frees what only they share.

<!-- run -->
```sh
pullback show -r dir:/srv/backup
pullback show latest -r dir:/srv/backup --json
```
""",
    "files": """\
A small machine of ours reads the disks: a kernel and a few programs from the distribution's packages, which it needs
once (in /var/cache/pullback/guest, or in the user's cache). It has no network, and no device but the disks, through
overlays that are thrown away; journals of file systems are replayed there. It knows ext2 to ext4, XFS, btrfs, FAT,
exFAT, NTFS, ISO 9660, and logical volumes. What it says is checked: a name cannot lead out of the place where files are
written, and links that lead out, device nodes, pipes and sockets are left out. See [files.md](files.md).

```sh
pullback files latest -r /srv/backup
pullback files latest ls vda2:/etc -r /srv/backup
pullback files latest get /etc/hosts -r /srv/backup
pullback files latest get vg0/home:/home/ada --to ada.tar -r /srv/backup --machine web01
pullback files 2026-11-20 get /var/lib/app/app.db --to - -r /srv/backup | sha256sum
```
""",
    "prove": """\
The machine is made again as the restore point describes it, without a network, on disks that are thrown away. It is
proven when all is seen that was asked for. Without `--agent`, `--console-text`, `--run` and `--still-running`, what the
machine had decides, and it is said. A screenshot, the console and the figures are written to a new directory:
`report.html`, `report.json`, `screen.png`, `console.log`. If one does not come up, the exit code is 13. With `--all`, a
restore point that cannot be tried does not keep the others from it. See [prove.md](prove.md).

```sh
pullback prove latest -r /srv/backup --machine web01
pullback prove latest -r /srv/backup --run 'systemctl is-system-running --wait' --fsck
pullback prove --all --newest -r /srv/backup --quiet
```
""",
    "restore": """\
Each disk becomes one file, `DIR/TARGET.raw` or `DIR/TARGET.qcow2`, or goes where `--to TARGET=PLACE` says: a file, a
block device, an NBD server; or all go to the disks of another machine that does not run. See [restore.md](restore.md).
A file, of mode 0600, gets its name when it is whole, durable and proven; if a block is not what was stored, the file is
removed and the exit code is 13. Zeroes become holes.

With all disks, a directory also gets what the machine was besides: its firmware's variables, the state of its TPM, and
how it was started, with the new paths. `--as NAME` makes that a copy that can run beside the original.

<!-- run -->
```sh
pullback restore -r dir:/srv/backup --to /srv/restored --disk vda
pullback restore latest -r dir:/srv/backup --to /srv/restored --format qcow2
pullback restore -r dir:/srv/backup --to vda=/srv/web01.qcow2 --check
pullback restore -r dir:/srv/backup --to /srv/web02 --as web02
```
""",
    "rollback": """\
The machine is stopped and reset, its disks are written where they are, and it runs again from its beginning: a guest
sees what it would after its power was cut. `--after held` leaves it standing still, `--after quit` ends QEMU. First a
restore point of the machine as it is is made in the same repository, unless `--no-safety` says otherwise; `latest`
never means such a one. Only chunks that differ are written, and the running bitmaps notice it, so the next backup is an
increment. A disk that had another size then is refused, and so is a machine with other disks, unless `--disk` names
those that are meant.

What is to be written is kept in the state directory first (`--staging`: elsewhere). Interrupted before it writes, the
command leaves the disks as they were. Interrupted later, the same command finishes it, also without the repository;
until then every other command on these disks is refused (exit code 11). See [rollback.md](rollback.md).

```sh
pullback rollback qmp:/run/web01-pullback.sock -r /srv/backup --dry-run
pullback rollback qmp:/run/web01-pullback.sock 2026-11-24T06:00 -r /srv/backup
pullback rollback images:vda=/srv/web01.qcow2 1f2e3d4c --name web01 -r /srv/backup
```
""",
    "boot": """\
The machine starts within seconds, whatever the size of its disks: what it reads comes from the restore point, what it
writes goes to overlays in `--to`. Meanwhile the overlays are filled. When they hold all, they are whole images, the
repository is not needed any more, and the command ends; the machine runs on.

What was saved of its hardware is made anew by an allow-list; what is left out is told. Its network cards are connected
to nothing unless `--network` says so, because the original may still run. If the repository goes away, reads wait. When
this command ends early (Ctrl-C, SIGTERM, SIGKILL), the machine stays, its reads wait, and the same command goes on; one
that was shut down is filled all the same. Exit code 13: damaged ranges; the machine gets I/O errors just there. See
[boot.md](boot.md).

```sh
pullback boot -r /srv/backup --machine web01 --to /var/lib/vms/web01 --network bridge=br0 --detach
pullback boot latest -r dir:/srv/backup --to /var/lib/vms/test --as web01-test --memory 2G
```
""",
    "serve": """\
Each disk is an NBD export with its target as name. Without options the server listens on a private unix socket that
only this user can reach; on TCP it wants TLS, with the client proven too, or `--insecure`. Every block is compared with
its hash before it is handed out. One that is damaged gives an I/O error, just there, and is told on standard error (an
`event` with `--json`); all else is served on. See [serve.md](serve.md).

```sh
pullback serve -r /srv/backup
pullback serve 1f2e3d4c -r /srv/backup --disk vda --socket /run/vda.sock
pullback serve -r /srv/backup --copy-on-write --overlay /srv/try-out
pullback serve -r /srv/backup --listen 0.0.0.0:10809 --tls-x509 /etc/pullback/tls
```
""",
    "mount": """\
`DIR/TARGET.raw` is a disk, `DIR/pflash1.fd` a firmware device, `DIR/point.json` what the restore point says of itself.
They can be read by this user alone. A damaged block gives an I/O error, just there. See [serve.md](serve.md).

```sh
pullback mount latest /mnt/web01 -r /srv/backup
fdisk -l /mnt/web01/vda.raw
fusermount3 -u /mnt/web01
```
""",
    "verify": """\
Of a `dir:` repository, every image of the point is read and compared with its hashes, with the images of parents that a
disk needs.

Of one in restic's format, what leads to the data is always looked at: snapshot, trees, manifest, digests, and whether
each chunk is in an index and its pack is there and long enough. `--read-data` reads the packs too, and proves each
chunk. With `--all`, every file of the repository is looked at, whether a point needs it or not, and the exit code is
13 if one is bad. A bad pack or index is remembered in the local cache: the next backup from here stores again what the
live disks still hold.

`--against` freezes the machine as a backup does, makes no checkpoint, and reads what its bitmaps call unchanged since
the point (`latest`: for each disk the last point of which it has the checkpoint). What differs was changed without a
trace.

<!-- run -->
```sh
pullback verify -r dir:/srv/backup
pullback verify --all -r dir:/srv/backup
pullback verify --against qmp:/run/web01-pullback.sock -r dir:/srv/backup
```
""",
    "diff": """\
Ranges are whole pieces of 4 KiB in which a byte differs; with `--quick` whole chunks, as they are hashed. Of a disk
that was resized, the part that both points have is compared.

<!-- run -->
```sh
pullback diff latest -r dir:/srv/backup
pullback diff latest latest -r dir:/srv/backup --quick --json
```
""",
    "info": """\
Also shows whether this build of QEMU has one of two defects that Pullback works around. They are tried on a process of
the same binary, without a guest, and the answer is kept.

<!-- run -->
```sh
pullback info qmp:/run/web01-pullback.sock
```
""",
    "recover": """\
Every command clears away what dead jobs have left before it does its own work. This one does nothing else, and shows
what it found. Snapshots, exports and jobs that last are no leftovers: they are listed, and go on.

<!-- run -->
```sh
pullback recover qmp:/run/web01-pullback.sock
pullback recover qmp:/run/web01-pullback.sock --end --json
```
""",
    "untrack": """\
The next backup of the machine reads everything. Restore points are not touched. Bitmaps of other tools are not touched.
Documents of checkpoints are kept under the machine's name, so images need `--name` for these to go too.

<!-- run -->
```sh
pullback untrack qmp:/run/web01-pullback.sock
```
""",
    "completion": """\
Names of machines and repositories come from the [configuration](configuration.md).

```sh
source <(pullback completion bash)
pullback completion bash >/usr/share/bash-completion/completions/pullback
pullback completion zsh >/usr/local/share/zsh/site-functions/_pullback
pullback completion fish >/usr/share/fish/vendor_completions.d/pullback.fish
```
""",
    "checkpoint create": """\
One transaction makes a bitmap on each disk, so a checkpoint is one instant, and needs no pause. It is stored in the
images, and goes on across stop and start. A machine that is off can be given one too. FILE has the members of libvirt's
`domaincheckpoint`; options win over it.

<!-- run -->
```sh
pullback checkpoint create qmp:/run/web01-pullback.sock --as monday --description "before the upgrade"
pullback checkpoint list qmp:/run/web01-pullback.sock --size
pullback checkpoint changes qmp:/run/web01-pullback.sock vda --since monday
pullback checkpoint info qmp:/run/web01-pullback.sock monday --xml > /srv/monday.xml
pullback checkpoint delete qmp:/run/web01-pullback.sock monday
```
""",
    "checkpoint list": """\
The tree comes from the bitmaps on the disks; time, description and parent from documents in the state directory. A
checkpoint whose bitmaps are missing or worthless is shown as unusable, with the reason. Those called `auto.…` belong
to the backups of a repository.
""",
    "checkpoint info": """\
With `--json` it has the document, and the machine's disks as they were at that moment.
""",
    "checkpoint current": """\
There is none (`no-checkpoint`) if no bitmap records.
""",
    "checkpoint parent": """\
There is none (`no-checkpoint`) above a root.
""",
    "checkpoint delete": """\
What its bitmaps hold goes to the checkpoint before, in one transaction over all disks. Deleting the oldest frees what
changed up to the next. Deleting what a backup made is possible, and the next backup to that repository reads the disk
whole then; it is said.
""",
    "checkpoint redefine": """\
Its bitmaps must be there and sound on every disk that the document lists (`checkpoint-inconsistent` otherwise).
""",
    "checkpoint changes": """\
Ranges are whole granules of 64 KiB, cut at the end of the disk: more than what changed, never less.
""",
    "overlay create": """\
The guest writes to the overlay from then on, and the image below stays as it is, with the checkpoints as they were. In
the overlay the same checkpoints go on, so the next backup is an increment. Several disks: `--disk` again, or `--all`.
The overlay has the mode and owner of the image. Start the machine on the overlay from then on.

<!-- run -->
```sh
pullback overlay create qmp:/run/web01-pullback.sock vda
pullback overlay commit qmp:/run/web01-pullback.sock vda
```
""",
    "overlay commit": """\
The guest runs on. The file of the overlay is removed if `overlay create` made it. If it fails half way, the machine
runs on the overlay as before (`overlay-not-committed`); after Ctrl-C too. Only of a running machine.
""",
    "events": """\
QEMU's own events reach only who is connected, and a QMP socket serves one client. So the machine is looked at every
`--interval` seconds, and what differs is told, whoever did it. What begins and ends between two looks is not told.
Between looks nothing is held, and who comes during one waits for its end. While another command works on the machine,
one event `busy` says who. With `--follow` it ends with 0 when the machine is gone, or by Ctrl-C.
""",
    "snapshot create": """\
A snapshot stays when the command has ended. A keeper process lets go of it when scratch runs full, or when `--owner`
ends. FILE has the members of a `domainblocksnapshot`; options win over it. Several at once are possible. A checkpoint
is of the disks in the snapshot.

What is asked of a machine that is off lasts only as long as the command: it prints its result, and stays. So does
`--wait`. Ctrl-C or SIGTERM ends the command and the snapshot; the exit code is 0 then.

<!-- run -->
```sh
pullback snapshot create qmp:/run/web01-pullback.sock --as before --checkpoint tuesday
pullback export start qmp:/run/web01-pullback.sock --snapshot before --disk vda --as old-vda
pullback export list qmp:/run/web01-pullback.sock
pullback export stop qmp:/run/web01-pullback.sock old-vda
pullback snapshot delete qmp:/run/web01-pullback.sock before
```
""",
    "snapshot list": """\
Also those that other programs made through the library.
""",
    "snapshot info": """\
With `--json` it has the document and the exports.
""",
    "snapshot delete": """\
Clients that read it get errors.
""",
    "export start": """\
What is printed for each export: its name, its URI, and the metadata contexts that tell changes, as
`qemu:dirty-bitmap:CHECKPOINT`. QEMU has one NBD server: where the first export put it, later ones must be too. Without
`--listen` and `--socket` it is a private unix socket, for this user alone, and ours to be joined by later exports.

On TCP there is TLS with `--tls-x509` (clients need a certificate of the same authority), or `--tls-psk`. Without, it
takes `--insecure`. Where FILE says `tls='yes'` and no option names credentials, they are those in `$PULLBACK_TLS_DIR`,
else `/etc/pullback/tls`. A client gives its own by the URI: `nbds://HOST:PORT/NAME?tls-certificates=DIR`, or
`nbds://USER@HOST:PORT/NAME?tls-psk-file=FILE`.

A snapshot is always read-only. Disks themselves are served as they are being written, with `--writable` for writing:
to restore into a machine that is off. FILE has the members of a `domainblockexport`. Of a machine that is off, and
with `--wait`, the command stays as `snapshot create` does.
""",
    "export list": """\
Exports that Pullback did not start are shown by `info`.
""",
    "export stop": """\
Those of a job end with the job.
""",
    "job begin": """\
As `virsh backup-begin MACHINE BACKUP.xml [CHECKPOINT.xml]`, by the rules of libvirt's `domainbackup`. The job stays
when the command has ended: a pull until `job end` or `job abort`, a push until it is through. How to read a
pull is printed: for each disk the export's name, URI, and the context that tells changes.

Beyond libvirt: a pull needs no `server`, and is then on a private unix socket; a `server` with TCP needs no port; it
needs TLS or `--insecure`. Of a machine that is off, and with `--wait`, the command stays: Ctrl-C or SIGTERM ends a pull
well (exit code 0), and undoes a push that still copies (130, 143); a push that is through is ended.

<!-- run -->
```sh
echo '{"mode": "pull"}' > /srv/pull.json
echo '{"name": "wednesday"}' > /srv/wednesday.json
pullback job begin qmp:/run/web01-pullback.sock /srv/pull.json /srv/wednesday.json
pullback job stats qmp:/run/web01-pullback.sock
pullback job info qmp:/run/web01-pullback.sock --xml
pullback job end qmp:/run/web01-pullback.sock
echo '{"mode": "pull", "incremental": "wednesday"}' | pullback job begin qmp:/run/web01-pullback.sock -
pullback job abort qmp:/run/web01-pullback.sock
```
""",
    "job info": """\
There is none (`no-job`) between jobs.
""",
    "job stats": """\
With `--follow`, a line whenever a disk has moved (`progress` with `--json`), and at the end how the job ended. The
machine is free for other commands between looks.
""",
    "job wait": """\
The machine is free for other commands meanwhile. A push that is through is ended by its keeper some seconds later; with
JOB, how it ended is told then. If a disk could not be copied, or the job came to nothing meanwhile,
the exit code is 1; if the time is over, 11.
""",
    "job end": """\
A push that still copies is not ended (`busy`). One that could not copy a disk is undone, and its error told. A push
that is through is ended by its keeper too, some seconds later: with JOB, how it ended is told then, and the exit code
is 1 if it came to nothing.
""",
    "job abort": """\
What its checkpoint recorded goes to the checkpoint before, so nothing is lost for later increments.
""",
    "job speed": """\
In a pull the client decides how fast it reads.
""",
    "job pause": """\
It rests until `job resume`.
""",
    "job resume": """\
It goes on as fast as before.
""",
}


def commands() -> dict[str, Callable[..., Any]]:
    """Every command with its function; those of groups by both words."""
    return signatures.commands(app)


def page() -> str:
    """The whole page."""
    parts = [TOP]
    for name, callback in commands().items():
        parts += _command(name, callback)
    parts.append(_JSON)
    for document in documents.COMMON.values():
        parts += [f"### {document.title}\n", _document(document)]
    return "\n".join(parts)


def _command(name: str, callback: Callable[..., Any]) -> Iterator[str]:
    known = parameters(callback)
    yield f"## pullback {name}\n"
    yield f"    {usage(name, known)}\n"
    yield f"{inspect.getdoc(callback)}\n"
    yield NOTES[name]
    yield pages.table(("argument or option", "meaning"), map(row, known))
    for document in documents.RESULTS[name]:
        yield f"### `{name} --json`: {document.title[:1].lower()}{document.title[1:]}\n"
        yield _document(document)


def usage(name: str, known: Iterable[Parameter]) -> str:
    """How a command is written: `pullback restore --to DIR [POINT] [OPTIONS]`."""
    words = [f"pullback {name}"]
    for parameter in known:
        if parameter.is_argument:
            words.append(parameter.value if parameter.required else f"[{parameter.value}]")
        elif parameter.required:
            words.append(f"{parameter.names[0]} {parameter.value}")
    return " ".join([*words, "[OPTIONS]"])


def row(parameter: Parameter) -> tuple[str, str]:
    """How a parameter is written, in backticks, and all that is to be said about it."""
    spelling = parameter.value if parameter.is_argument else f"{', '.join(parameter.names)} {parameter.value}".strip()
    facts = [str(parameter.info.help)]
    if parameter.required:
        facts.append("Required.")
    elif isinstance(parameter.default, str):
        facts.append(f"Default: `{parameter.default!s}`.")
    if parameter.info.envvar:
        facts.append(f"Environment: `{parameter.info.envvar}`.")
    return f"`{spelling}`", " ".join(facts)


def _document(document: Document) -> str:
    return pages.table(("member", "type", "meaning"), _members(document.fields, ""))


def _members(fields: Iterable[Field], above: str) -> Iterator[Sequence[str]]:
    for field in fields:
        kind = f"{field.kind} or null" if field.optional else str(field.kind)
        words = f": {' or '.join(f'`{word}`' for word in field.words)}" if len(field.words) > 1 else ""
        yield f"`{above}{field.name}`", kind, field.meaning + words
        suffix = "[]." if field.kind is Kind.OBJECTS else "."
        yield from _members(field.inside, f"{above}{field.name}{suffix}")


def main() -> None:
    """Print the page, or write it to the file that is named."""
    pages.give(page())


if __name__ == "__main__":
    main()
