"""More that happens to a machine of `fates` whose backups go to a repository in restic's format.

Others forget and prune, in between and under a backup; another machine shares it; the cache goes; and a
backup is killed before any of its operations on the repository.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path
from random import Random

from fates import Fates
from hindered import Seen, command, hindered, small_packs
from historian import SIZES, differing
from kit import Box, MakeBox, restic_of
from pullback import errors
from pullback.programs import qemu
from pullback.repo import Kind
from pullback.units import MiB
from victim import eventually, running


class Lots(Fates):
    """See the module."""

    def __init__(self, make_box: MakeBox, mix: Counter[str]) -> None:
        super().__init__(make_box, mix, kind="restic")
        self._neighbour: Box | None = None
        self._theirs: dict[str, dict[str, bytes]] = {}

    # -- others --------------------------------------------------------------------------------

    def forget(self, rolls: Random) -> None:
        """Some points go, the newest among them or not, and what only they needed."""
        gone = rolls.sample(sorted(self.points), rolls.randrange(1, len(self.points) + 1))
        if rolls.random() < 0.3:
            gone = [list(self.points)[-1]]
        restic_of(self.box).run("unlock", timeout=60)  # the locks of the dead
        restic_of(self.box).run("forget", *gone, *(["--prune"] if rolls.random() < 0.8 else []), timeout=60)
        for point in gone:
            del self.points[point]
        self.mix["change: point forgotten"] += len(gone)

    def lose_cache(self, rolls: Random) -> None:
        """What is known of the repository here."""
        shutil.rmtree(self.box.access.caches, ignore_errors=True)

    def neighbour(self, rolls: Random) -> None:
        """Another machine backs up to the same repository, while we do."""
        if self._neighbour is None:
            self._neighbour = self.make_box(qemu.Disk(id="vda", path=Path("n.qcow2")), size=2 * MiB, name="web02")
        other = self._neighbour
        other.write("vda", rolls.randrange(1, 256), 512 * rolls.randrange(4000), 512 * rolls.randrange(1, 90))
        failed: list[BaseException] = []

        def work() -> None:
            try:
                report = other.backup(repository=self.box.place, access=self.box.access)
                self._theirs[report.point.id] = other.image()
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            self.backup(rolls)
        finally:
            thread.join()
        if failed:
            raise failed[0]

    # -- a backup that is disturbed ------------------------------------------------------------

    def pruned_under(self, rolls: Random) -> None:
        """Our lock is removed in the middle of a backup, points are forgotten, and all is pruned that nothing needs."""
        if not self.running:
            self.let_go()
        if self.job is not None or (self.running and self.snapshots):
            return
        gone = rolls.sample(sorted(self.points), rolls.randrange(0, len(self.points) + 1))
        at, struck = rolls.randrange(5, 40), []
        seen = Seen()

        def strike(number: int, operation: str, kind: Kind) -> None:
            if number == at:
                struck.append(number)
                restic = restic_of(self.box)
                restic.run("unlock", "--remove-all", timeout=60)
                restic.run("forget", *gone, "--prune", timeout=60) if gone else restic.run("prune", timeout=60)

        seen.strike = strike
        request = self._request(rolls, list(SIZES)) | {"fleecing": None}
        try:
            with hindered(seen), small_packs():
                report = self.box.backup(**request)
        except (errors.RepositoryChanged, errors.BusyError) as error:
            assert struck
            self._refused(f"{type(error).__name__} under a backup")
            report = None
        for point in gone if struck else ():
            del self.points[point]
        if report is not None:
            self._pointed(report.point.id, str(report.point.checkpoint), list(SIZES))
            self.mix["check: a point made while its repository was pruned"] += bool(struck)
        with self.machine() as machine:
            self.look(machine, rolls)

    def killed(self, rolls: Random) -> None:
        """A backup of ours is killed before one of its operations on the repository."""
        if not self.running or self.job is not None or self.snapshots:
            return
        known, held = {point.id for point in self.box.points()}, set(self.box.leftovers())
        with command(self.box, str(rolls.randrange(5, 45))) as process:
            said, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 3, -9), said
        self.mix["killed: backup" if process.returncode == -9 else "not killed in time: backup"] += 1
        eventually(lambda: running(self.box), seconds=4, what="running again")
        eventually(lambda: set(self.box.leftovers()) <= held, seconds=10, what="cleared by the guard")
        [*made] = [point for point in self.box.points() if point.id not in known]
        with self._patiently() as machine:
            found = {item.name: {disk.target for disk in item.disks} for item in machine.checkpoint_list().checkpoints}
        for name in list(self.past.checkpoints):
            mine = self.past.checkpoints[name]
            lost = set(mine.at) - found.get(name, set())
            assert not lost or name.startswith("auto."), (name, lost)
            if lost:
                self.past.delete(name, lost)
        # One that was not kept may stay until the next backup, which does not need it.
        for name in sorted(set(found) - set(self.past.checkpoints)):
            assert name.startswith("auto.")
            self._made(name, sorted(found[name]), documented=False)
        for point in made:
            self.points[point.id] = {target: bytes(self.past.disks[target].content) for target in SIZES}
            name = str(point.checkpoint)
            if name in found:  # the point is complete
                for target in SIZES:
                    number = self.past.checkpoints[name].number if target in found[name] else None
                    self.parents[target], self.rests[target] = (number, self.past.disks[target].size), point.id
            self._restored(point.id)
        with self.machine() as machine:
            self.look(machine, rolls)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """And every point is what it was, for us and for restic."""
        super().close()
        for point in self.points:
            self._restored(point)
        for point, content in self._theirs.items():
            got = self.box.restored(point, machine="web02")
            assert not differing(got["vda"], content["vda"]), point
        mine = {point.id for point in self.box.points()}
        assert mine == set(self.points)
        assert {point.id for point in self.box.points("web02")} == set(self._theirs)
        self.check()

    def check(self) -> None:
        """restic reads all of it."""
        restic_of(self.box).run("unlock", timeout=60)
        said = restic_of(self.box).run("check", "--read-data", timeout=300)
        assert "no errors were found" in said
        self.mix["check: restic check --read-data"] += 1
