"""Looking at a machine that runs, and changing nothing: no lock is taken, and nothing is cleared away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pullback import errors, state
from pullback.engine import capabilities, disks, guestagent, monitor, opened, pause, qemu, recovery
from pullback.engine import jobs as block_jobs
from pullback.model.disks import Disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is seen."""

    #: What restore points are filed under; None: it has neither name nor uuid.
    name: str | None
    #: QEMU's run state: running, paused …
    status: str
    can: capabilities.Capabilities
    disks: tuple[Disk, ...]
    #: Block jobs by id, with their kinds; ours among them.
    jobs: Mapping[str, str]
    #: Ids of jobs of ours that no process works on, and that do not last.
    dead: tuple[str, ...]
    #: The guest agent's socket, if a program in the guest has opened it.
    agent: Path | None


async def look(socket: Path, directories: state.Directories, *, name: str | None = None) -> Sight:
    """Look at the machine behind a QMP socket. Raises the monitor's errors, and `ForeignManager`."""
    async with monitor.connect(socket.absolute()) as qmp:
        await qemu.refuse_foreign(qmp)
        can = await capabilities.discover(qmp, directories.cache)
        found, _ = await disks.find(qmp, has_graph=can.graph)
        return Sight(
            name=name or await _name(qmp),
            status=await pause.run_state(qmp),
            can=can,
            disks=found,
            jobs=await block_jobs.types(qmp),
            dead=tuple(await _dead(qmp, directories)),
            agent=await guestagent.find(qmp),
        )


async def _name(qmp: monitor.Monitor) -> str | None:
    try:
        return await qemu.identity_of(qmp, None)
    except errors.MachineUnnamed:
        return None


async def _dead(qmp: monitor.Monitor, directories: state.Directories) -> list[str]:
    """While nobody else is connected, a record that does not last has no living maker."""
    recorded = state.jobs_of(directories, socket=qmp.socket, machine="")
    known = {job.record.job for job in recorded}
    dead = [job.record.job for job in recorded if not opened.lasting(job, qmp.process)]
    return sorted({*dead, *(stray for stray in await recovery.strays(qmp) if stray not in known)})


async def agent_answers(socket: Path) -> str | None:
    """Does a guest agent answer at its socket? Why not, as a clause; None if it does."""
    try:
        async with guestagent.connect(socket):
            return None
    except guestagent.AgentFailed as error:
        return str(error)
