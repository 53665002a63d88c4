"""QEMU's block jobs: ending ours, and naming other people's. Source: QAPI job.json."""

from __future__ import annotations

from contextlib import suppress

from pullback import errors
from pullback.engine import replies
from pullback.engine.monitor import Monitor

_END_SECONDS = 15.0


async def types(monitor: Monitor) -> dict[str, str]:
    """The type (backup, mirror, commit, stream …) of every job, by id."""
    return {job: kind for job, (kind, _) in (await _listed(monitor)).items()}


async def statuses(monitor: Monitor) -> dict[str, str]:
    """The status (running, paused, concluded …) of every job, by id."""
    return {job: status for job, (_, status) in (await _listed(monitor)).items()}


async def _listed(monitor: Monitor) -> dict[str, tuple[str, str]]:
    return {
        replies.text(record, "id", "job"): (
            replies.text(record, "type", "job"),
            replies.text(record, "status", "job"),
        )
        for record in replies.objects(await monitor.execute("query-jobs"), "query-jobs")
    }


async def end(monitor: Monitor, prefix: str) -> None:
    """Cancel the jobs whose id begins with `prefix`, wait for their end, and dismiss them.

    A `sync=none` backup never ends by itself: cancelled is its success.
    """
    for job, (_, status) in (await _listed(monitor)).items():
        if job.startswith(prefix):
            await _end(monitor, job, status)


async def _end(monitor: Monitor, job: str, status: str) -> None:
    if status != "concluded":
        with suppress(errors.RefusedError):  # it may conclude by itself just now
            await monitor.execute("job-cancel", {"id": job})

    async def concluded() -> bool:
        listed = await _listed(monitor)
        return job not in listed or listed[job][1] == "concluded"

    await monitor.poll(concluded, what="job-cancel", timeout=_END_SECONDS)
    if job in await _listed(monitor):
        await monitor.execute("job-dismiss", {"id": job})
