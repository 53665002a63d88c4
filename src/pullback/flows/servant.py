"""What goes on in the process that serves: the restore point is opened there, and its disks are read.

It is a process of its own, so that its threads and libfuse's are not ours, and that it can be ended at once. See
`serve.words` for how it is talked to.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from pullback import errors, repo
from pullback.extents import Extent
from pullback.flows.sources import ChainSource
from pullback.model import urls
from pullback.model.points import Point
from pullback.programs import process
from pullback.serve.blocks import Blocks
from pullback.serve.disk import Disk, Workers
from pullback.serve.late import LateDisk
from pullback.serve.patience import Patience, PatientStore
from pullback.serve.source import PointSource, Source, is_damage
from pullback.serve.words import Setup, Teller

#: Threads that load, beside the processors: while some wait for the repository, others decode.
_MORE_THREADS = 2
_MOST_THREADS = 16
_DETACH_SECONDS = 10.0
#: Gets disks by target.
Early = Callable[[Mapping[str, LateDisk]], None]


class Servant:
    """The disks of a restore point, to be read by the threads of a server."""

    def __init__(self, setup: Setup, teller: Teller, early: Early | None = None) -> None:
        """Open all. Raises what opening a repository and finding a point do, `VerificationFailed`.

        `early` gets the disks before they are there.
        """
        self.setup = setup
        self.teller = teller
        self.patience = Patience(teller, patient=setup.patient)
        self._stack = ExitStack()
        self.repository = self._repository()
        self.point: Point = self.repository.point(setup.machine, setup.point)
        late = {target: LateDisk(target, self.point.disk(target).size) for target in setup.targets}
        if early is not None:
            early(late)
        blocks, sources = Blocks(setup.cache), [self._source(target) for target in setup.targets]
        self._workers = Workers(self._threads())
        self.disks = {
            target: Disk(target, source, blocks, self._workers, self._lost)
            for target, source in zip(setup.targets, sources, strict=True)
        }
        self._late = late

    def _repository(self) -> repo.Repository:
        place = urls.repository(self.setup.repository)
        if isinstance(place, urls.DirectoryRepository):
            return repo.open_directory(place.path)
        location, environ, notice = place.location, self.setup.environ, self.teller.notice
        store = PatientStore(lambda: repo.open_store(location, environ=environ, notice=notice), self.patience)
        return repo.lending.borrow(store, self.setup.lent, caches=Path(self.setup.caches))

    def _source(self, target: str) -> Source:
        if isinstance(self.repository, repo.ResticRepository):
            return PointSource(self.repository.endpoint(self.point, target))
        assert isinstance(self.repository, repo.Directory)
        directory = Path(self.setup.directory)
        return self._stack.enter_context(ChainSource(self.repository, self.point, target, directory, self.patience))

    def _threads(self) -> int:
        far = self.repository.store.connections if isinstance(self.repository, repo.ResticRepository) else 0
        return min(max((os.cpu_count() or 1) + _MORE_THREADS, far), _MOST_THREADS)

    def _lost(self, target: str, extent: Extent, error: errors.PullbackError) -> None:
        if is_damage(error):
            self.teller.damaged(target, extent, error)

    def start(self) -> None:
        """Begin to load, when nothing forks any more."""
        self._workers.start()
        for target, late in self._late.items():
            late.be(self.disks[target])

    def close(self) -> None:
        """Let go of all."""
        self._workers.close()
        self._stack.close()


def begin(setup: int, words: int, *, gone: Callable[[], None] | None = None, early: Early | None = None) -> Servant:
    """The servant that two inherited descriptors describe. What fails is told before it is raised.

    `early` gets the disks as soon as the point is found: who asks them waits until they are there.

    `gone` is called, in a thread, as soon as the process that started us is not there any more; without it
    this one ends then.
    """
    teller = Teller(words)
    try:
        threading.Thread(target=_watch, args=(words, gone or partial(os._exit, 1)), name="watch", daemon=True).start()
        servant = Servant(Setup.from_file(setup), teller, early)
    except BaseException as error:
        teller.failed(error)
        raise
    servant.start()
    return servant


def _watch(words: int, gone: Callable[[], None]) -> None:
    """Nothing is ever sent to us: the end is all that can be read."""
    poll = select.poll()
    poll.register(words, select.POLLIN | select.POLLHUP)
    poll.poll()
    gone()


def detach(directory: str) -> None:
    """Unmount a file system of ours at once, in use or not, dead or alive."""
    with suppress(errors.ProgramFailed):
        process.run(["fusermount3", "-u", "-z", directory], timeout=_DETACH_SECONDS)


def silence() -> None:
    """Standard error was for the start. What clients do wrong later must not fill a disk."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
