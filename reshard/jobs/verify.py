"""Verifying: integrity against the manifest, and bit-exact weights against the original by the same plan, comparing
instead of writing.

The other checks are elsewhere: sha256 in verify_sha256, numerics in the runtime.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import xxhash
from msgspec import UNSET, structs

from ..checkpoints import manifest
from ..checkpoints.blocks import Block, Blocks, read_described
from ..checkpoints.companions import Carried, Left
from ..checkpoints.manifest import Listed, Manifest
from ..checkpoints.published import WEIGHTS
from ..checkpoints.shards import Described, Shards, described, scalar
from ..checkpoints.source import Source, open_source
from ..checkpoints.target_shards import table_texts
from ..engine import worker
from ..engine.sample import sample
from ..engine.worker import Key, Place
from ..errors import MismatchError, PlaceError, ReshardError, failed
from ..layout.cut import Layout
from ..layout.join import Plan, plan
from ..store.digest import BLOCK, FileDigest
from ..store.directory import Directory, reading
from ..store.local import Pool, buffer
from ..store.publish import NOBODYS
from ..store.store import short
from ..tables.row import Constant
from ..text.progress import Progress, Silent, until
from ..threads import each
from .verdict import Check, Report

FEW = 64 << 10  # bytes: below, importing ctypes takes longer than they do

# --- integrity --------------------------------------------------------------------------------------------------------


def integrity(out: Path, threads: int, progress: Progress | None = None, strict: bool = False) -> Check:
    """Every file has the size and digest that the manifest gives it, every tensor and block its own; nothing is
    missing.

    Files that no manifest lists prove nothing: named as unproven, as a failure where an engine might load them, or if
    `strict`.
    """
    progress = progress or Silent()
    check = Check("integrity")
    try:
        known = manifest.load(out)
    except MismatchError as error:
        check.failures.append(error.message)
        return check
    listed = list(known.files())
    if manifest.root_of(out, known) != known.root:
        check.failures.append(f"{manifest.NAME}: its root digest does not match its contents")
    progress.start("checking digests", sum(file.size for file in listed))
    pool = Pool()
    check.files = len(listed)
    for file in listed:
        path = out / file.name
        if not path.is_file():
            check.failures.append(f"{file.name}: is missing")
        elif (size := path.stat().st_size) != file.size:
            check.failures.append(f"{file.name}: has {size} bytes, expected {file.size}")
    strays = sorted({*_files_in(out)} - {manifest.NAME, manifest.LEFT, *(file.name for file in listed)})
    loaded = [name for name in strays if _might_be_loaded(name)]
    check.failures += [f"{name}: is not listed in {manifest.NAME}, and an engine might load it" for name in loaded]
    if others := [name for name in strays if not _might_be_loaded(name)]:
        check.numbers = {"unlisted": others}
        if strict:
            check.failures += [f"{name}: is not listed in {manifest.NAME}" for name in others]
        else:
            check.notes.append(f"{manifest.NAME} does not list {_names(others)}: not checked")
    broken = {failure.split(":")[0] for failure in check.failures}
    whole = [file for file in listed if file.name not in broken]
    weights = {rank.weights.name: rank.tensors for rank in known.ranks}
    lock = threading.Lock()

    def check_file(file: Listed) -> None:
        found = _digest_small(pool, out / file.name, file.size, progress.advance)
        if found != file.digest:
            with lock:
                check.failures.append(f"{file.name}: digest {found}, the manifest says {file.digest}")
                broken.add(file.name)

    def check_block(block: Block) -> None:
        digest = block.found(pool.read(out / block.file, block.offset, block.size))
        progress.advance(block.size)
        if digest != block.digest:
            with lock:
                check.failures.append(f"{block.file}: {block.where} have digest {digest}, expected {block.digest}")

    def blocks() -> Iterator[Block]:
        for file in whole:
            if file.name in weights and weights[file.name].name not in broken:
                try:
                    mine = Blocks.read(out, file, weights[file.name])
                    check.failures += mine.contradictions()
                    check.tensors += len(mine.tensors)
                    progress.advance(mine.start)
                    yield from mine
                except MismatchError as error:
                    check.failures.append(error.message)

    try:
        each((file for file in whole if file.name not in weights), check_file, threads)
        each(blocks(), check_block, threads)
    except OSError as error:
        raise failed("reading", out, error) from error
    finally:
        pool.close()
    check.failures.sort()
    check.bytes = sum(file.size for file in whole)
    if not check.failures:
        check.failures += _contradictions(out, known)
    progress.finish()
    return check


def _files_in(out: Path) -> Iterator[str]:
    """Every file of a directory, through links, too; but for the work of jobs that are at it."""
    seen = set()
    for base, folders, files in os.walk(out, followlinks=True):
        real = os.path.realpath(base)
        # links may lead round
        folders[:] = [] if real in seen else [name for name in folders if Path(base) != out or name not in NOBODYS]
        seen.add(real)
        yield from (str(Path(base, name).relative_to(out)) for name in files)


def _might_be_loaded(name: str) -> bool:
    """Whether an engine might take a file for weights: what ends in .safetensors, and what transformers looks for."""
    return name.lower().endswith(".safetensors") or name in {file for pair in WEIGHTS for file in pair}


def _names(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _contradictions(out: Path, known: Manifest) -> list[str]:
    """Where manifest.json or a tensors.json, although its digest is right, says other things than tables,
    config.json and headers.
    """
    try:
        source = open_source(out)
    except PlaceError:
        raise
    except ReshardError as error:
        return [f"{manifest.NAME}, config.json and the tables contradict each other: {error.message}"]
    layout = source.layout
    shards, found = Shards(layout, known.version), []
    for shard, rank in zip(shards, known.ranks, strict=True):
        wanted = described(shard, layout, {name: [b""] for name, _, _ in shard.tensors})
        if _undigested(read_described(out / rank.tensors.name)) != _undigested(wanted):
            found.append(f"{rank.tensors.name}: contradicts the tables and config.json")
    kept = {
        manifest.FILES,
        *(str(manifest.residue_path(out, original.name).relative_to(out)) for original in source.originals),
    }
    kept |= {manifest.SUMS} if source.sums else set()
    kept |= table_texts(layout).keys()
    odd = sorted(kept ^ {file.name for file in known.source})
    found += [f"{manifest.NAME}: {'does not list' if name in kept else 'lists'} {name}" for name in odd]
    engines = (
        {f"{layout.format.engine['name']} {version}" for version in layout.format.engine["versions"]}
        if layout.format.engine
        else {None}
    )
    if known.engine not in engines:
        found.append(f"{manifest.NAME}: engine {known.engine!r} is not one that the format supports")
    same = {key: getattr(known, key) for key in ("engine", "origin", "ranks", "carried", "source")}
    if known != structs.replace(
        manifest.made(layout, plan=shards.digest, **same), version=known.version, root=known.root
    ):
        found.append(f"{manifest.NAME}: contradicts the tables and config.json")
    return found


def _undigested(said: Described) -> Described:
    """The same without digests, which were checked with the bytes."""
    return structs.replace(
        said, tensors=tuple(structs.replace(tensor, digest="", blocks=UNSET) for tensor in said.tensors)
    )


def _digest_small(pool: Pool, path: Path, size: int, advance: Callable[[int], None]) -> str:
    state = xxhash.xxh3_128()
    for at in range(0, size, BLOCK):
        piece = pool.read(path, at, min(BLOCK, size - at))
        state.update(piece)
        advance(len(piece))
    return state.hexdigest()


# --- weights ----------------------------------------------------------------------------------------------------------


class Comparer:
    """A sink that reads what a writer would have written, and compares; padding, too, where it is `padded` by us."""

    than = "the source"

    def __init__(self, place: Place, pool: Pool, check: Check, lock: threading.Lock, padded: bool = True) -> None:
        self.place, self.pool, self.check, self.lock, self.padded = place, pool, check, lock, padded
        self._buffer = buffer(worker.TILE)
        self._seen: dict[Key, int] = {}
        self.bad: dict[Key, str] = {}  # the failure of each

    def put(self, key: Key, offset: int, data: memoryview) -> None:
        path, entry = self.place.locate(key)
        found = self._buffer[: len(data)]
        self.pool.read_into(path, entry.offset + offset, found)
        self._seen[key] = self._seen.get(key, 0) + len(data)
        if key in self.bad or _equal(found, data):
            return
        first = offset + next(at for at, (mine, theirs) in enumerate(zip(found, data, strict=True)) if mine != theirs)
        self.fail(
            key,
            f"{short(path)}: {key[1]} differs from {self.than}, first at byte {first} of {entry.nbytes}",
        )

    def done(self, keys: Iterable[Key]) -> None:
        for key in keys:
            path, entry = self.place.locate(key)
            at = self._seen.pop(key, 0)
            # zero padding stands at the end
            while self.padded and at < entry.nbytes and key not in self.bad and entry.strides is None:
                found = self._buffer[: min(worker.TILE, entry.nbytes - at)]
                self.pool.read_into(path, entry.offset + at, found)
                if bytes(found).count(0) < len(found):
                    self.fail(key, f"{short(path)}: {key[1]}: padding is not zero from byte {at} on")
                at += len(found)
            with self.lock:
                self.check.tensors += 1
                self.check.bytes += entry.nbytes

    def fail(self, key: Key, failure: str) -> None:
        self.bad[key] = failure
        with self.lock:
            self.check.failures.append(failure)


def _equal(a: memoryview, b: memoryview) -> bool:
    """Two buffers of one length, compared by the C library: without copies, and without the interpreter's lock.
    A few bytes as they are.
    """
    if len(a) <= FEW:
        return bytes(a) == bytes(b)
    from ctypes import byref, c_char, c_size_t

    return _memcmp()(byref(c_char.from_buffer(a)), byref(c_char.from_buffer(b)), c_size_t(len(a))) == 0


@cache
def _memcmp() -> Callable[..., int]:
    from ctypes import CDLL

    return CDLL(None).memcmp


def weights(out: Source, source: Source, threads: int, progress: Progress | None = None) -> Check:
    """Every stored element equals the source's, replicas too, padding is zero; residues and carried files are equal."""
    progress = progress or Silent()
    check, lock, pool = Check("weights"), threading.Lock(), Pool()
    _same_model(out, source)
    joined = plan(source.layout, out.layout)
    progress.start("comparing weights", sum(entry.nbytes for _, entry in source.places.values()))
    compared: set[Key] = set()

    class Counting(Comparer):
        def done(self, keys: Iterable[Key]) -> None:
            keys = list(keys)
            with lock:
                compared.update(keys)
            super().done(keys)

    try:
        halt = threading.Event()
        advance = until(halt, progress.advance)
        ours = out.zero_padding

        def sink() -> Comparer:
            return Counting(out, pool, check, lock, ours)

        worker.run(joined, source, out, sink, workers=threads, pool=pool, progress=advance, stop=halt)
        constants = {(slot.rank, slot.name(point)): slot for slot in out.layout.constants for point in slot.points()}
        rest = Comparer(out, pool, check, lock, ours)
        rest.done([key for key in out.places if key not in compared and key not in constants])
        for key, slot in constants.items():
            path, entry = out.locate(key)
            assert isinstance(slot.template, Constant)
            if bytes(pool.read(path, entry.offset, entry.nbytes)) != scalar(slot.template):
                (check.failures if ours else check.notes).append(f"{path.name}: {key[1]} is not {slot.template.value}")
        if out.keeps_residues and {file.name for file in out.originals} == {file.name for file in source.originals}:
            _residues(out, source, pool, check)
        else:
            _buffers(out, source, pool, check)
            if out.keeps_residues:
                check.notes.append(f"{source.where} is split into other files than merging would write")
        _carried(out.carried, source.carried, pool, check)
    finally:
        pool.close()
    progress.finish()
    check.failures += doubles(out, source, threads, progress).failures
    check.failures.sort()
    return check


class _Tied(Comparer):
    than = "the tensor it is tied to"


def doubles(
    out: Source, source: Source, threads: int, progress: Progress | None = None, sampled: bool = False
) -> Check:
    """What the source stores and `out` holds only under the name that it is tied to: equal, bit by bit,
    or in a sample.
    """
    progress = progress or Silent()
    check, lock = Check("tied"), threading.Lock()
    once = source.layout.beyond(out.layout)
    if not once:
        return check
    joined = plan(out.layout, replace(source.layout, pieces=once))
    if sampled:
        joined, progress = sample(joined, out, source), Silent()
    sizes = source.layout.logical_bytes()
    progress.start("comparing tied tensors", sum(sizes.get(name, 0) for name in once))
    _hold_against(
        joined, out, source, lambda pool: _Tied(source, pool, check, lock, padded=not sampled), threads, progress
    )
    return check


def check_tied(
    source: Source, out: Layout, threads: int, progress: Progress | None = None, sampled: bool = False
) -> None:
    """Tensors that `out` stores once where the source has two must be equal: ReshardError otherwise."""
    if not (lost := source.layout.beyond(out)):
        return
    kept = {name: pieces for name, pieces in source.layout.pieces.items() if name not in lost}
    once = replace(source, layout=replace(source.layout, pieces=kept, tied=out.tied))
    if found := doubles(once, source, threads, progress, sampled).failures:
        names = ", ".join(f"{other} and {name}" for name, other in out.tied.items())
        raise ReshardError(
            f"{source.where}: config.json sets tie_word_embeddings, but {names} are not equal: {found[0]}",
            "an engine would use one for both: set tie_word_embeddings to false in config.json to keep both",
        )


class _Copy(Comparer):
    than = "a lower rank's copy"


def replicas(out: Source, threads: int, progress: Progress | None = None) -> Check:
    """What several ranks hold is the same on all of them."""
    progress = progress or Silent()
    check, lock, layout = Check("replicas"), threading.Lock(), out.layout
    first = {name: set(map(id, layout.distinct(name))) for name in layout.pieces}
    again = {
        name: tuple(piece for piece in held if id(piece) not in first[name]) for name, held in layout.pieces.items()
    }
    again = {name: held for name, held in again.items() if held}
    if not again:
        return check
    joined = plan(layout, replace(layout, pieces=again), range(layout.mesh.world))
    sizes = layout.logical_bytes()
    progress.start("comparing replicas", sum(sizes.get(name, 0) for name in again))
    _hold_against(joined, out, out, lambda pool: _Copy(out, pool, check, lock, padded=False), threads, progress)
    return check


def _hold_against(
    joined: Plan, a: Source, b: Source, sink: Callable[[Pool], Comparer], threads: int, progress: Progress
) -> None:
    """Carry out a plan, with comparing in the place of writing."""
    halt = threading.Event()
    with closing(Pool()) as pool:
        advance = until(halt, progress.advance)
        worker.run(joined, a, b, lambda: sink(pool), workers=threads, pool=pool, progress=advance, stop=halt)
    progress.finish()


def _same_model(out: Source, source: Source) -> None:
    mine, theirs = out.layout.model.tensors, source.layout.model.tensors
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or (a.sizes, a.dtypes, a.layers) != (b.sizes, b.dtypes, b.layers):
            one, other = (f"{t.sizes} {'/'.join(t.dtypes)}" if t else "missing" for t in (a, b))
            raise MismatchError(
                f"{name} is {one} in {out.where}, {other} in {source.where}", "these are different models"
            )


def _buffers(out: Source, source: Source, pool: Pool, check: Check) -> None:
    """Buffers kept aside, as far as both have them: what transformers would not write may be missing."""
    for name in out.layout.model.aside:
        if name not in source.tensors:
            (check.notes if out.keeps_residues else check.failures).append(f"{name}: is not in the source")
            continue
        (mine, (_, n, path, start)), (theirs, (_, m, other, there)) = out.buffer(name), source.buffer(name)
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape) or pool.read(path, start, n) != pool.read(
            other, there, m
        ):
            check.failures.append(f"{out.originals[out.tensors[name][0]].name}: {name} differs from the source")


def _residues(out: Source, source: Source, pool: Pool, check: Check) -> None:
    mine = {original.name: original for original in out.originals}
    for original in source.originals:
        other = mine[original.name]
        if (other.size, other.holes) != (original.size, original.holes):
            check.failures.append(f"{original.name}: differs from the file that the shards were made from")
            continue
        for (_, length, path, at), (_, _, other_path, other_at) in zip(
            source.residue(original), out.residue(other), strict=True
        ):
            for start in range(0, length, BLOCK):
                n = min(BLOCK, length - start)
                if pool.read(path, at + start, n) != pool.read(other_path, other_at + start, n):
                    check.failures.append(f"{original.name}: header or buffers differ from what the shards recorded")
                    break
        check.files += 1


def _carried(out: Sequence[Carried], source: Sequence[Carried], pool: Pool, check: Check) -> None:
    there = {file.name: file for file in out}
    for file in source:
        other = there.get(file.name)
        if other is None:
            check.failures.append(f"{file.name}: was not copied")
        elif other.size != file.size or pool.read(file.path, 0, file.size) != pool.read(other.path, 0, other.size):
            check.failures.append(f"{file.name}: differs from the source's")
        check.files += 1
    if more := sorted(there.keys() - {file.name for file in source}):
        check.notes.append(f"the source has no {_names(more)} to compare with")


def against(out: Path, source: Source, threads: int, progress: Progress | None = None) -> Report:
    """Bit-exact weights against a source."""
    return Report(out, (weights(open_source(out), source, threads, progress),))


@dataclass(frozen=True)
class Wish:
    """What to verify. `only`: one check; `published`: name → digest that the Hub publishes; `sha256`: an error where no
    digest is known; `strict`: files that no manifest lists are a failure; `required`: what has to pass."""

    only: str | None = None
    sha256: bool = False
    published: Mapping[str, FileDigest] | None = None
    numerics: Callable[[Path, Source | None, Progress], Check] | None = None
    strict: bool = False
    required: tuple[str, ...] = ()


def verify(
    out: Path, source: Source | None = None, threads: int = 2, progress: Progress | None = None, wish: Wish = Wish()
) -> Report:
    """Run the checks in the order of `CHECKS`; those after one that fails are skipped.

    All of it is of one conversion: where `out` is replaced meanwhile it begins anew, and ends in Replaced if that
    happens again and again.
    """
    talk = progress or Silent()

    def run(directory: Directory) -> Report:
        try:
            return _verify(out, source, threads, talk, wish, directory)
        finally:
            talk.finish()

    return reading(out, run)


def _verify(
    out: Path, source: Source | None, threads: int, progress: Progress, wish: Wish, directory: Directory
) -> Report:
    shards = manifest.present(out)
    if not shards and source is None and wish.published is None:
        manifest.check_lost(out)
        raise ReshardError(f"{out}: has no manifest to verify against", "give the original: --against SRC")
    opened: list[Source] = []

    def open_out() -> Source:
        if not opened:
            opened.append(open_source(out, source.layout.model.family if source is not None else None))
        return opened[0]

    def weigh() -> Check:
        assert source is not None
        return weights(open_out(), source, threads, progress)

    def restore() -> Check:
        from . import verify_sha256

        known = wish.published if wish.published is not None else verify_sha256.recorded(open_out())
        if not known and not wish.sha256 and wish.only is None:
            return Check("sha256", skipped="no digests of the original files recorded: convert --sha256, or --hub ID")
        check = verify_sha256.sha256(open_out(), known, threads, progress)
        check.failures += replicas(open_out(), threads, progress).failures  # files are made of the lowest rank's
        return check

    def compute() -> Check:
        if wish.numerics is None:
            return Check("numerics", skipped="not requested: --numerics, --only numerics")
        if source is not None:
            _same_model(open_out(), source)
        return wish.numerics(out, source, progress)

    no_manifest = None if shards else "no manifest"
    wanted: dict[str, tuple[str | None, Callable[[], Check]]] = {
        "integrity": (no_manifest, lambda: integrity(out, threads, progress, wish.strict)),
        "weights": (None if source is not None else "nothing to compare with: --against SRC", weigh),
        "sha256": (None, restore),
        "numerics": (None, compute),
    }
    checks: list[Check] = []
    for name, (missing, run) in wanted.items():
        if wish.only not in (None, name):
            continue
        if missing is not None:
            if wish.only == name:
                raise ReshardError(f"{out}: --only {name}: {missing}")
            checks.append(Check(name, skipped=missing))
            continue
        if any(check.failures for check in checks):
            checks.append(Check(name, skipped="an earlier check failed"))
            continue
        began = time.monotonic()
        try:
            check = run()
        except PlaceError:
            raise
        except ReshardError as error:
            if name != "weights" or not (out / "config.json").is_file():  # no damage, but no checkpoint
                raise
            check = Check(name, failures=[error.message])
        directory.check()
        check.seconds = time.monotonic() - began
        checks.append(check)
    return Report(out, tuple(checks), _left(out if shards else None, source), wish.required)


def _left(out: Path | None, source: Source | None) -> tuple[Left, ...]:
    """What is not in a directory of what lay beside the weights: as its conversion noted it,
    and as it lies there now.
    """
    noted: tuple[Left, ...] = ()
    with suppress(MismatchError):  # whatever is wrong with it, integrity says it
        noted = manifest.load_left(out) if out is not None else ()
    known = {file.name: file for file in (*noted, *(source.left if source is not None else ()))}
    return tuple(known[name] for name in sorted(known))
