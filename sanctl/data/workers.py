"""Work in several processes whose results come in order, no more of them than will be needed soon.

It is torch's DataLoader that runs the processes: it hands tensors over in shared memory, and
notices when a process dies.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sanctl.errors import SanctlError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of Linux's prctl (sys/prctl.h)
_MOST_WORKERS = 16
_FEW_ITEMS = 256  # fewer than this are done sooner than processes have started


def worker_count(wanted: int | None, items: int) -> int:
    """Return how many processes to use: as many as wanted, or what suits machine and work."""
    if wanted is not None:
        return wanted
    if items < _FEW_ITEMS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


class Chunks(Sampler[list[int]]):
    """The numbers 0..length-1 in lists of at most `size`."""

    def __init__(self, length: int, size: int) -> None:
        self._length = length
        self._size = size

    def __len__(self) -> int:
        return -(-self._length // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in range(0, self._length, self._size):
            yield list(range(begin, min(begin + self._size, self._length)))


class Workers(Generic[Item, Result]):
    """Applies a function to items, in processes that stay until this object goes.

    Args:
        function: Its results are sent between processes. An error that it expects is to be
            returned; what it raises would arrive in another message with its traceback.
        items: Iterated anew, in this process, by every iteration over this object.
        count: Number of processes; 0 works in this one.
        pin_memory: Puts tensors into memory from which a GPU copies faster.
    """

    def __init__(
        self,
        function: Callable[[Item], Result | UserError],
        items: Sampler[Item],
        count: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._function = function
        self._items = items
        self._count = count
        self._pin_memory = pin_memory
        self._loader: DataLoader[Result | UserError] | None = None

    def __iter__(self) -> Iterator[Result]:
        """Yield the results in the order of the items.

        Raises:
            UserError: The function returned it.
            SanctlError: A process died.
        """
        try:
            results = self._start()
            while True:
                with _deaths.raised():
                    result = next(results, _end)
                if result is _end:
                    return
                if isinstance(result, UserError):
                    raise result
                yield cast(Result, result)
        except (Exception, KeyboardInterrupt) as error:
            # The processes must go now: whoever keeps the error would keep them, and when a
            # garbage collection ends them it waits seconds for each.
            self._loader = results = None
            if self._count and _is_death(error):
                reason = (str(error) or type(error).__name__).splitlines()[0]
                _forget_frames(error)
                raise SanctlError(
                    f"a data worker died ({reason}); it may have run out of memory or of shared "
                    "memory: try fewer workers"
                ) from error
            raise

    def _start(self) -> Iterator[Result | UserError]:
        if self._loader is None:
            self._loader = self._make_loader()
        with _interrupt_held(), _schedulers_signals_held():
            results = iter(self._loader)  # the first time, this starts the processes
        _deaths.take_over()
        return results

    def _make_loader(self) -> DataLoader[Result | UserError]:
        return _QuietLoader(
            _Function(self._function),
            batch_size=None,  # an item of the sampler is the work of one call
            sampler=self._items,
            collate_fn=_unchanged,
            num_workers=self._count,
            pin_memory=self._pin_memory,
            persistent_workers=self._count > 0,
            worker_init_fn=partial(
                _prepare, bound=threading.current_thread() is threading.main_thread()
            ),
            generator=torch.Generator(),  # or every iteration would draw from the default one
        )


class _Deaths:
    """Lets the death of a worker raise only where somebody waits for results.

    torch raises from its handler of SIGCHLD, which may run in any line of the main thread: amid
    the saving of a checkpoint, say. Without that handler a worker that dies while it writes a
    result would be waited for without end.
    """

    def __init__(self) -> None:
        self._raise_if_any: Callable[[int, FrameType | None], object] | None = None
        self._waited_for = False

    def take_over(self) -> None:
        """Stand in for the handler that torch installs with the first worker."""
        handler = signal.getsignal(signal.SIGCHLD)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(handler) and handler != self._handle:
            self._raise_if_any = handler
            signal.signal(signal.SIGCHLD, self._handle)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise what has happened since the last time, and what happens now."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are handled in the main thread alone
            return
        self._waited_for = True
        try:
            self._handle(signal.SIGCHLD, None)
            yield
        finally:
            self._waited_for = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waited_for and self._raise_if_any is not None:
            self._raise_if_any(number, frame)


_deaths = _Deaths()
_end = object()


def _is_death(error: BaseException) -> bool:
    """Whether the error tells of a worker's death, as torch found it or as its connection did."""
    text = str(error)
    if text.startswith("Caught "):  # raised by the function, in a worker that lives
        return False
    if isinstance(error, RuntimeError):
        return text.startswith(("DataLoader worker", "Pin memory thread"))
    return isinstance(error, ConnectionError | EOFError)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the lines that the error went through hold: the workers, among others."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Keep Ctrl-C waiting: while a process forks, Python would swallow what its handler raises."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread alone
        return
    held: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(*held[0])


@contextmanager
def _schedulers_signals_held() -> Iterator[None]:
    """Keep them waiting, also in the processes that start, until those are prepared for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _QuietLoader(DataLoader[Result]):
    """Gives no advice to use fewer processes than asked for."""

    def check_worker_number_rationality(self) -> None:
        """Say nothing."""


class _Function(Dataset[Result]):
    """Makes a function look like a data set, which is what a DataLoader calls in its workers."""

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self._function = function

    def __getitem__(self, item: Any) -> Result:
        return self._function(item)


def _unchanged(result: Any) -> Any:
    return result


def _prepare(_: int, bound: bool) -> None:
    if bound:  # to the thread that started this process, says Linux: it must be one that stays
        _end_with_parent()
    # Ctrl-C reaches every process of the terminal, and the signals of a cluster's scheduler every
    # process of a job; the main one ends its workers in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    _hear_parent_alone()
    sys.excepthook = _report_unless_left
    cv2.setNumThreads(0)


def _end_with_parent() -> None:
    """Let the kernel end this process when its parent is killed, and had no time to do so."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:  # not Linux
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _hear_parent_alone() -> None:
    """Let SIGTERM end this process only where its parent sends it."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    threading.Thread(target=_leave_when_told, name="sigterm", daemon=True).start()


def _leave_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def _report_unless_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report what a thread of a worker failed on, unless the main process merely went away."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
