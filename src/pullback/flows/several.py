"""Backing up several machines, or one to several repositories, with one command.

Each backup is on its own: what one meets does not keep the others from being made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pullback import errors
from pullback.flows import backup, hooks
from pullback.model.hooks import Hooks
from pullback.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One backup that is to be made."""

    #: What the user called the machine.
    machine: str
    request: backup.Request
    hooks: Hooks = field(default_factory=Hooks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one."""

    task: Task
    #: What was made; None if it failed.
    report: backup.Report | None = None
    error: errors.PullbackError | None = None
    #: Sentences about hooks that failed afterwards.
    warnings: tuple[str, ...] = ()


async def backups(tasks: Sequence[Task], progress: Progress, *, parallel: int = 1) -> tuple[Outcome, ...]:
    """Make them all, `parallel` at a time; the outcomes are in the order of the tasks.

    Backups of one machine are made one after the other, because it has one lock.
    """
    free = asyncio.Semaphore(parallel)
    turns: dict[str, asyncio.Lock] = {}
    alone = len(tasks) == 1

    async def one(task: Task) -> Outcome:
        async with turns.setdefault(str(task.request.machine), asyncio.Lock()), free:
            return await _backup(task, progress if alone else _Named(progress, f"{task.machine}/"))

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(one(task)) for task in tasks]
    return tuple(work.result() for work in running)


async def _backup(task: Task, progress: Progress) -> Outcome:
    subject = hooks.Subject(machine=task.machine, repository=task.request.repository.url)
    warnings: Sequence[str] = ()
    try:
        async with hooks.around(task.hooks, subject) as told:
            report = await backup.backup(task.request, progress)
            point = report.point
            told.succeeded(point=point.id, read=point.read, stored=point.stored, warned=bool(report.broken))
        warnings = told.warnings
    except errors.PullbackError as error:
        return Outcome(task=task, error=error)
    for warning in warnings:
        progress.note(warning)
    return Outcome(task=task, report=report, warnings=tuple(warnings))


class _Named:
    """A `Progress` in which the disks of several machines do not mix."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress = progress
        self._prefix = prefix

    def start(self, subject: str, total: int) -> None:
        self._progress.start(self._prefix + subject, total)

    def advance(self, subject: str, done: int) -> None:
        self._progress.advance(self._prefix + subject, done)

    def finish(self, subject: str) -> None:
        self._progress.finish(self._prefix + subject)

    def note(self, message: str) -> None:
        self._progress.note(f"{self._prefix.rstrip('/')}: {message}")
