"""The trained state on disk, by parameter and not by rank: readable by any layout, without DeepSpeed and without
unpickling.

Rank r of n writes `state-<r>-of-<n>.safetensors`. Each tensor in it is a stretch of one flattened fp32 quantity of
one parameter, kind being `weight`, `exp_avg` or `exp_avg_sq`, or of a slice of it. It is called
`<kind>:<parameter>:<start>`, or `<kind>:<parameter>:<axis>.<index>.<count>.<groups>:<start>` with the fields of the
`Slice`; start is its first element of the flattened parameter, or slice. Together the files hold every element once;
`state.json` says which parameters there are, their whole shapes, how many steps the optimizer has taken, and by which
layout the files were written. Version 1 had no slices and no layout.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from parallel.host_copies import HostCopies, TensorFile, TextFile
from parallel.mesh import Layout
from parallel.shares import Share
from parallel.slices import WHOLE, Runs, Slice

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
INDEX_FILE = "state.json"
_VERSION = 2
_READABLE = (1, 2)
_PIECE = 1 << 20  # elements that are put in their places at a time: with their positions 40 MB


@dataclass(frozen=True)
class Stretch:
    """Elements `start` to `start + len(values)` of the flattened `kind` of `parameter`, or of a part of it; values is
    1-D fp32.
    """

    kind: str
    parameter: str
    start: int
    values: Tensor
    part: Slice | None = None
    """What the elements are counted in; None: in the whole parameter."""

    @property
    def key(self) -> str:
        """What it is called in a file."""
        return stretch_key(self.kind, self.parameter, self.start, self.part)


def stretch_key(kind: str, parameter: str, start: int, part: Slice | None) -> str:
    """What a stretch is called in a file."""
    sliced = "" if part is None else f"{part.axis}.{part.index}.{part.count}.{part.groups}:"
    return f"{kind}:{parameter}:{sliced}{start}"


class _Saved(NamedTuple):
    """A stretch in a file that is open."""

    part: Slice | None
    start: int
    numel: int
    file: Any
    key: str

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def values(self, start: int, stop: int) -> Tensor:
        """Elements of what it is a stretch of: fp32 [stop - start]."""
        return self.file.get_slice(self.key)[start - self.start : stop - self.start]


def state_file(rank: int, ranks: int) -> str:
    """The name of one rank's file."""
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def rank_file(rank: int, ranks: int, stretches: Iterable[Stretch], copies: HostCopies | None = None) -> TensorFile:
    """One rank's file, to be written.

    Args:
        copies: where the values are copied to; None: on the host they stay where they are, and are not to change until
            the file is written.
    """
    if copies is None:
        tensors = {s.key: s.values.detach().cpu().contiguous() for s in stretches}
    else:
        tensors = {s.key: copies.copy(s.key, s.values) for s in stretches}
    return TensorFile(state_file(rank, ranks), tensors)


def stream_rank(
    folder: Path, rank: int, ranks: int, shares: Sequence[Share], read: Callable[[str, Share], Tensor]
) -> Path:
    """Write one rank's file as `rank_file` has it, a stretch in memory at a time.

    Args:
        read: the values of a kind of a share: fp32 [numel].
    """
    header: dict[str, Any] = {}
    end = 0
    for share in shares:
        for kind in KINDS:
            key = stretch_key(kind, share.parameter, share.start, share.part)
            header[key] = {"dtype": "F32", "shape": [share.numel], "data_offsets": [end, end + 4 * share.numel]}
            end += 4 * share.numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / state_file(rank, ranks)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for share in shares:
            for kind in KINDS:
                file.write(read(kind, share).contiguous().numpy().tobytes())
    return path


def index_file(
    *, ranks: int, optimizer_step: int, shapes: Mapping[str, torch.Size], layout: Layout | None = None
) -> TextFile:
    """`state.json`, to be written by one rank.

    Args:
        ranks: how many files there are.
        shapes: of all parameters, whole.
        layout: of the ranks that held them; None where the files were not cut by one.
    """
    index = {
        "version": _VERSION,
        "ranks": ranks,
        "optimizer_step": optimizer_step,
        **({} if layout is None else {"layout": vars(layout)}),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
    }
    return TextFile(INDEX_FILE, json.dumps(index, indent=1) + "\n")


class _Index(NamedTuple):
    """What `state.json` says."""

    ranks: int
    optimizer_step: int
    shapes: dict[str, torch.Size]
    layout: Layout | None


def _read_index(folder: Path) -> _Index:
    """Raises ValueError, naming the file, where it is damaged or of another version."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index.get("version")
        if version in _READABLE:
            shapes = {name: torch.Size(shape) for name, shape in index["parameters"].items()}
            layout = Layout(**index["layout"]) if "layout" in index else None
            return _Index(int(index["ranks"]), int(index["optimizer_step"]), shapes, layout)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path}: version {version}, this program reads {' and '.join(map(str, _READABLE))}")


class WeightReader(Protocol):
    """Weights by parameter, wherever they were saved."""

    @property
    def folder(self) -> Path:
        """Where they are."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Every parameter's, whole."""

    def read(self, kind: str, name: str, start: int, numel: int, part: Slice | None = None) -> Tensor:
        """Elements `start` to `start + numel` of the flattened quantity, of which `weight` is one, or of a part of it:
        fp32 [numel].
        """


class StateReader:
    """Reads any stretch of a saved state, whatever layout wrote it. Use as a context manager: it keeps the files open.

    Args:
        nearest: the file that most is expected in, from 0 to 1 for the first to the last: it is looked into first, and
            then those next to it, only as long as something is missing. None: all files are opened, and must be whole.

    Raises ValueError for a folder whose files do not hold every element of every parameter once, or, with `nearest`, of
    what is asked for; and for a damaged `state.json`.
    """

    def __init__(self, folder: Path, *, nearest: float | None = None) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.ranks = index.ranks
        """How many files there are."""
        self.optimizer_step = index.optimizer_step
        self.shapes = index.shapes
        self.layout = index.layout
        """Of the ranks that wrote it, where it says so."""
        self._open_files = ExitStack()
        self._saved: dict[tuple[str, str], list[_Saved]] = defaultdict(list)
        middle = 0.0 if nearest is None else nearest * (self.ranks - 1)
        self._unopened = deque(sorted(range(self.ranks), key=lambda rank: abs(rank - middle)))
        if nearest is None:
            while self._unopened:
                self._open_next()
            self._check_whole()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def parts(self, name: str) -> set[Slice | None]:
        """Which parts of a parameter the open files hold stretches of."""
        return {saved.part for saved in self._saved[WEIGHT, name]}

    @property
    def num_open(self) -> int:
        """How many of the files were opened."""
        return self.ranks - len(self._unopened)

    def _open_next(self) -> dict[tuple[str, str], list[_Saved]]:
        """Opens one more file and returns what it holds."""
        path = self.folder / state_file(self._unopened.popleft(), self.ranks)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the state in {self.folder} is not whole")
        try:
            file = self._open_files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): the state in {self.folder} is not whole") from error
        found: dict[tuple[str, str], list[_Saved]] = defaultdict(list)
        for key in file.keys():
            kind, name, *sliced, start = key.split(":")
            part = Slice(*map(int, sliced[0].split("."))) if sliced else None
            (numel,) = file.get_slice(key).get_shape()
            found[kind, name].append(_Saved(part, int(start), numel, file, key))
        for what, saved in found.items():
            self._saved[what] += saved
        return found

    def _check_whole(self) -> None:
        for name, shape in self.shapes.items():
            for kind in KINDS:
                held = _covered(self._saved[kind, name], shape)
                if held != shape.numel():
                    raise ValueError(
                        f"{self.folder}: {kind} of {name} is not whole (has {held} of {shape.numel()} elements)"
                    )

    def read(self, kind: str, name: str, start: int, numel: int, part: Slice | None = None) -> Tensor:
        """Elements `start` to `start + numel` of the flattened quantity, or of a part of it: fp32 [numel] on the CPU.
        Holds little more than these, whatever the files' slices.
        """
        values, shape = torch.empty(numel), self.shapes[name]
        found = sum(_copy(saved, values, start, part, shape) for saved in self._saved[kind, name])
        while found < numel and self._unopened:
            found += sum(_copy(saved, values, start, part, shape) for saved in self._open_next()[kind, name])
        if found == numel:
            self._require_once(kind, name)
        else:
            raise ValueError(
                f"{self.folder}: {kind} of {name} is not whole (has {found} of {numel} elements asked for)"
            )
        return values

    def _require_once(self, kind: str, name: str) -> None:
        """Raises ValueError where the open files hold elements twice: as many as were asked for are not all of them
        then.
        """
        saved = self._saved[kind, name]
        kinds = {None if s.part is None else (s.part.axis, s.part.count, s.part.groups) for s in saved}
        ends: dict[Slice | None, int] = {}
        for stretch in sorted(saved, key=lambda s: s.start):
            if len(kinds) > 1 or stretch.start < ends.get(stretch.part, 0):
                raise ValueError(f"{self.folder}: {kind} of {name} is there twice from element {stretch.start} on")
            ends[stretch.part] = stretch.stop

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight of a parameter, in its shape."""
        shape = self.shapes[name]
        return self.read(WEIGHT, name, 0, shape.numel()).reshape(shape)


def _covered(saved: list[_Saved], shape: torch.Size) -> int:
    """How many elements of a parameter the stretches hold, up to the first gap or double in each of its slices; 0 where
    these are not of one kind.
    """
    if len({None if s.part is None else (s.part.axis, s.part.count, s.part.groups) for s in saved}) > 1:
        return 0
    ends: dict[Slice | None, int] = defaultdict(int)
    for stretch in sorted(saved, key=lambda s: s.start):
        if stretch.start != ends[stretch.part]:
            return sum(ends.values())
        ends[stretch.part] += stretch.numel
    return sum(ends.values())


def _copy(saved: _Saved, values: Tensor, start: int, part: Slice | None, shape: torch.Size) -> int:
    """Put what a stretch has of `values`, the elements from `start` on of a part of a parameter, in its place there;
    how many these are.
    """
    stop = start + len(values)
    if saved.part == part:
        low, high = max(start, saved.start), min(stop, saved.stop)
        if low < high:
            values[low - start : high - start] = saved.values(low, high)
        return max(high - low, 0)
    theirs, ours = runs_of(saved.part, shape), runs_of(part, shape)
    first, last = (int(ours.positions(at, at + 1)) for at in (start, stop - 1))
    low, high = max(theirs.before(first), saved.start), min(theirs.before(last + 1), saved.stop)
    count = 0
    for at in range(low, high, _PIECE):
        end = min(at + _PIECE, high)
        places = ours.elements(theirs.positions(at, end))
        wanted = (places >= start) & (places < stop)
        if wanted.any():
            values[places[wanted] - start] = saved.values(at, end)[wanted]
            count += int(wanted.sum())
    return count


def runs_of(part: Slice | None, shape: torch.Size) -> Runs:
    """Where a part of a parameter of this whole shape stands in it."""
    return WHOLE if part is None else part.runs(shape)


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """Every parameter of a saved state: name -> fp32 tensor on the CPU. One process, no group: for export.

    A tied parameter appears once, under the name that `nn.Module.named_parameters` gives it.
    """
    with StateReader(folder) as reader:
        return {name: reader.weight(name) for name in reader.shapes}


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Copy the saved fp32 weights into `model`. Raises ValueError naming the parameters that differ in name or
    shape.
    """
    with StateReader(folder) as reader, torch.no_grad():
        require_same_parameters({n: p.shape for n, p in model.named_parameters()}, reader.shapes, folder)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.weight(name))


def require_same_parameters(model: Mapping[str, torch.Size], saved: Mapping[str, torch.Size], folder: Path) -> None:
    """Raise ValueError when the two differ, naming up to five of the parameters."""
    differing = [
        f"{name}: {tuple(saved[name]) if name in saved else 'absent'} in the checkpoint, "
        f"{tuple(model[name]) if name in model else 'absent'} in the model"
        for name in sorted(model.keys() | saved.keys())
        if model.get(name) != saved.get(name)
    ]
    if differing:
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise ValueError(f"{folder} holds another model: {'; '.join(differing[:5])}{more}")
