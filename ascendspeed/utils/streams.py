"""Standard streams for a command: a closed pipe, a full disk or a closed descriptor does not end its work."""

import errno
import io
import os
import sys

_losses: dict[int, OSError] = {}
"""File descriptor of a standard stream -> error that ended its output."""


class _LossyStream(io.TextIOWrapper):
    """A text stream that discards everything after the first write that fails, and remembers the error."""

    def __init__(self, stream: io.TextIOWrapper, descriptor: int) -> None:
        """`stream`: the open stream to replace."""
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=descriptor == 2 or stream.line_buffering,
            write_through=stream.write_through,
        )
        self._replaced = stream  # it would close the shared buffer when it is collected
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """Number of characters taken: all of them."""
        try:
            return super().write(text)
        except OSError as error:
            discard(self._descriptor, error)
            return len(text)

    def flush(self) -> None:
        """Raises no `OSError`."""
        try:
            super().flush()
        except OSError as error:
            discard(self._descriptor, error)
            super().flush()


def protect() -> None:
    """Replaces stdout and stderr of this process, so that printing raises no `OSError`.

    Characters that the locale cannot encode are escaped. Streams that something else has replaced stay.
    """
    for descriptor in range(3):  # a file that is opened later must not get one of these numbers
        if not _is_open(descriptor):
            _redirect_to_null(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            closed = io.FileIO(descriptor, "w", closefd=False)
            stream = io.TextIOWrapper(io.BufferedWriter(closed), encoding="utf-8")
        elif stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        setattr(sys, name, _LossyStream(stream, descriptor))


def discard(descriptor: int, error: OSError) -> None:
    """Records the error that ended the output of a stream, and sends what follows to the null device."""
    _losses[descriptor] = error
    _redirect_to_null(descriptor)


def raise_loss(descriptor: int = 1) -> None:
    """Raises the `OSError` that ended the output of a stream, once; for a command that handles it itself."""
    error = _losses.pop(descriptor, None)
    if error is not None:
        raise error


def unreported_loss() -> OSError | None:
    """Error that ended stdout, unless its reader closed the pipe: a reader may stop when it has enough."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = _losses.get(1)
    return None if error is None or error.errno == errno.EPIPE else error


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
