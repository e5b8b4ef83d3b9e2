"""The journal of a run: every sample is on disk as soon as it is taken, so a killed run goes on where it was."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from sim.errors import InputError
from sim.files import write_whole
from sim.measurements import Machine, Measurements, Sample, header_line, read, sample_lines


class Journal:
    """Samples by key, those of an earlier unfinished run on the same machine among them."""

    def __init__(self, path: Path, machine: Machine) -> None:
        """InputError where the file cannot be written, or is of another machine."""
        self.path = path
        self.machine = machine
        self.taken: dict[tuple[str, str, tuple[int, ...]], Sample] = {}
        self._earlier()
        # Written anew: a line that was cut off is gone, and what follows starts on a line of its own.
        write_whole(path, header_line(self.machine) + sample_lines(self.taken.values()))
        try:
            self._file: BinaryIO = path.open("ab")
        except OSError as error:
            raise InputError(path, f"cannot be written ({error.strerror}); choose another --out") from None
        self.resumed = len(self.taken)

    def _earlier(self) -> None:
        if not self.path.exists():
            return
        before = read(self.path)
        if not self.machine.same_as(before.machine):
            raise InputError(
                self.path,
                f"holds measurements of {before.machine.device.full_name} on another machine or with other versions; "
                "remove it, or choose another --out",
            )
        self.machine = before.machine
        self.taken = {sample.key: sample for sample in before.samples}

    def add(self, *samples: Sample) -> None:
        """Keep samples, several of them all or none."""
        self.taken |= {sample.key: sample for sample in samples}
        try:
            self._file.write(sample_lines(samples))
            self._file.flush()
        except OSError as error:
            raise InputError(self.path, f"cannot be written ({error.strerror}); choose another --out") from None

    def measurements(self) -> Measurements:
        """All that is there."""
        return Measurements(self.machine, tuple(self.taken.values()))

    def remove(self) -> None:
        """The result is written: nothing is left to go on with."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.taken:
            self.path.unlink(missing_ok=True)
