"""Converting: open, lay out, plan, check everything, then write and publish. A re-run of a finished job writes nothing.

Knows the order of things; how each is done is known elsewhere.
"""

import os
import shlex
import shutil
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from ..checkpoints import manifest
from ..checkpoints import target as output
from ..checkpoints.companions import Left, words
from ..checkpoints.manifest import Listed
from ..checkpoints.published import Original
from ..checkpoints.shards import folder, scalar, shard_digest, tensors_json
from ..checkpoints.source import Source, open_source
from ..checkpoints.target import Output
from ..containers.safetensors import BITS
from ..engine import worker as engine
from ..engine.worker import Key, Writer, in_items
from ..errors import PlaceError, ReshardError, failed
from ..layout.join import Plan, plan
from ..layout.mesh import Mesh
from ..store import publish
from ..store.digest import FileDigest, of, of_blocks
from ..store.directory import Directory, unchanged
from ..store.local import Pool, Stamp, check_stamp
from ..store.workfolder import left_by_killed, told
from ..tables.formats import Format
from ..tables.row import Constant
from ..text.progress import Progress, Silent, until
from ..text.units import decimal
from ..threads import count
from . import same_job
from .verdict import WIDTH

OURS = (manifest.NAME, "source")  # names in a shard directory that a carried file must not take


@dataclass(frozen=True)
class Options:
    """How to convert, apart from what to what."""

    workers: int = 0  # 0: one per CPU that this process may use, at most 8
    overwrite: bool = False
    checksum: bool = False
    sha256: bool = False
    fsync: bool = True
    pad: bool = True
    repeat: bool = True
    engine_version: str | None = None
    check: bool = True  # a re-run: that OUT is whole

    @property
    def threads(self) -> int:
        return count(self.workers)


@dataclass(frozen=True)
class Result:
    """What a conversion did. `root`: the digest over all files, None for Hugging Face files. Times in seconds, sizes in bytes.

    `already`: OUT held it; then `decided_by` is what told that the source is the same (see `rerun`), `checked` whether OUT was found whole,
    and `added` what was added to it.
    """

    out: Path
    already: bool
    root: str | None
    read: int
    written: int
    seconds: float
    left: tuple[Left, ...] = ()
    towers: tuple[str, ...] = ()  # that stand whole on several ranks
    decided_by: str | None = None
    checked: bool = False
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what killed conversions to other destinations have left near this one

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "already": self.already,
            **({"decided_by": self.decided_by, "checked": self.checked, "added": list(self.added)} if self.already else {}),
            "root": self.root,
            "bytes_read": self.read,
            "bytes_written": self.written,
            "seconds": round(self.seconds, 3),
            "left": [file._asdict() for file in self.left],
            "towers": list(self.towers),
            "notes": list(self.notes),
            **usage(),
        }

    def lines(self, src: str, *options: str) -> list[str]:
        """What a person wants to know, the next command last; `options` are what it must say of the source, too."""
        if self.already:
            how = {"sample": "same source, by a sample: --checksum compares everything", "content": "same source, byte by byte"}
            unchecked = "" if self.checked else "; OUT was not checked"
            why = f"same plan, {how.get(self.decided_by or '', f'same source, by {self.decided_by}')}{unchecked}"
            done = textwrap.wrap(f"{self.out} is already what this job would write ({why})", WIDTH, break_on_hyphens=False)
            done += [f"added: {', '.join(self.added)}"] if self.added else []
        else:
            rate = decimal(round(self.read / max(self.seconds, 1e-9)))
            done = [f"{self.out}: {decimal(self.written)} written in {self.seconds:.1f} s ({rate}/s)"]
        if self.towers:
            done += textwrap.wrap(f"carried whole: {', '.join(self.towers)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        done += words(self.left, WIDTH)
        if self.root is not None:
            done.append(f"root digest: {self.root}")
        done += [f"note: {note}" for note in self.notes]
        out, src = (f"./{name}" if name.startswith("-") else name for name in (str(self.out), src))
        return [*done, f"next: {shlex.join(['reshard', 'verify', out, '--against', src, *options])}"]


def usage() -> dict[str, int]:
    """This process' own account of itself: peak memory and bytes moved by system calls."""
    found = {}
    for path, keys in (("/proc/self/status", {"VmHWM": "peak_memory"}), ("/proc/self/io", {"rchar": "io_read", "wchar": "io_written"})):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key in keys:
                number, _, unit = value.strip().partition(" ")
                found[keys[key]] = int(number) * (1024 if unit == "kB" else 1)
    return found


@dataclass(frozen=True)
class Job:
    """A conversion, planned and checked, not begun."""

    source: Source
    output: Output
    plan: Plan
    engine: str | None

    @property
    def towers(self) -> tuple[str, ...]:
        """What stands beside the language model, and is not cut among several ranks."""
        rows = self.source.layout.model.family.rows if self.output.layout.mesh.world > 1 else ()
        return tuple(dict.fromkeys(row.tower for row in rows if row.tower))

    @property
    def reads(self) -> int:
        """Bytes of tensors that will be read, each once."""
        model = self.source.layout.model
        return sum(
            tensor.elements * BITS[tensor.dtypes[0]] // 8
            if len(tensor.dtypes) == 1
            else sum(tensor.elements // len(tensor.dtypes) * BITS[dtype] // 8 for dtype in tensor.dtypes)
            for name, tensor in model.tensors.items()
            if name not in self.source.layout.alias
        )


def prepare(source: Source, to: str, mesh: Mesh, options: Options, max_file_size: int | None = None) -> Job:
    """Everything that can be refused is refused here, before anything is written."""
    out = output.outputs(source, to, mesh, max_file_size)
    engine_name = _engine(to, out.layout.format, options.engine_version)
    if not options.pad and out.layout.padding:
        axis, (size, padded) = next(iter(out.layout.padding.items()))
        raise ReshardError(
            f"--no-pad: axis {axis} of {size} would be padded to {padded}", "choose a size that divides it, or leave out --no-pad"
        )
    if not options.repeat and out.layout.repeats:
        axis, times = next(iter(out.layout.repeats.items()))
        size = out.layout.model.sizes[axis]
        raise ReshardError(
            f"--no-repeat: each of the {size} of axis {axis} would be stored {times} times",
            f"choose --tp {size} or less, or leave out --no-repeat",
        )
    joined = plan(source.layout, out.layout)
    if any(BITS[dtype] % 8 for tensor in out.layout.model.tensors.values() for dtype in tensor.dtypes):
        for copy in joined.copies():
            in_items(copy, source.locate((copy.src.rank, copy.src_name))[1], out.entries[copy.dst.rank, copy.dst_name][1])
    return Job(source, out, joined, engine_name)


def _engine(to: str, table: Format, version: str | None) -> str | None:
    """The engine and version that a format is written for; versions that no table describes are refused by name."""
    known = table.engine
    if not known:
        if version is not None:
            raise ReshardError(f'--engine-version {version}: format "{to}" belongs to no engine', "leave it out")
        return None
    versions = [str(v) for v in known["versions"]]
    wanted = version or versions[-1]
    if not any(wanted == v or wanted.startswith(f"{v}.") for v in versions):
        raise ReshardError(
            f"--engine-version {wanted}: {known['name']} {wanted} lays out its shards differently, or nobody has looked",
            f"supported: {known['name']} {', '.join(versions)}",
        )
    return f"{known['name']} {next(v for v in versions if wanted == v or wanted.startswith(f'{v}.'))}"


def convert(job: Job, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Write the output of a job to `out` and publish it. Raises before writing whatever can be told before."""
    progress = progress or Silent()
    began = time.monotonic()
    source = job.source
    publish.check_destination(out, source.root)
    publish.recover(out)
    busy = publish.occupied(out)
    if busy and not options.overwrite:
        with unchanged(Directory(out)):
            found = same_job.finished(job, out, options, progress)
        found, added = _add_sha256(job, out, found, options, progress) if options.sha256 else (found, ())
        _check_unchanged(source.stamps)
        found.remember()
        seconds = time.monotonic() - began
        return Result(out, True, _root(out), 0, 0, seconds, source.left, job.towers, found.by, found.checked, added, _notes(out))
    if busy:
        if (theirs := same_job.irreplaceable(out, job)) is not None:
            raise ReshardError(
                f"{out}: holds {theirs}, which is no part of a checkpoint: --overwrite would delete it",
                "choose another destination, or move it away",
            )
        publish.check_replaceable(out)
    carried = _carried(job)
    publish.check_space(out, job.output.bytes + sum(file.size for file in source.carried) + _residue_bytes(job))
    if source.layout.beyond(job.output.layout):
        from .verify import check_tied

        check_tied(source, job.output.layout, options.threads, progress)
    if options.sha256:
        from . import verify_sha256

        source = verify_sha256.hashed(source, options.threads, progress)
        job = replace(job, source=source)
    with (
        publish.Publication(out, replace=busy, durable=options.fsync) as publication,
        closing(Pool(os.O_RDWR)) as pool,
        closing(Pool(stamps=source.stamps)) as reader,
    ):
        job.output.below(publication.work)
        try:
            _lay_files(job, pool, reader)
            digests: dict[Key, list[bytes]] | None = {} if job.output.shards else None
            progress.start("converting", job.reads)
            _move(job, options, pool, reader, digests, progress)
            root = _finish(job, carried, reader, digests)
            pool.close()
            _check_unchanged(source.stamps)
            if source.directory is not None:
                source.directory.check()
        except OSError as error:
            raise failed("writing", out, error) from error
        if options.fsync:
            publication.sync(options.threads)
        try:
            publication.commit(manifest.NAME if job.output.shards else "config.json")
        except KeyboardInterrupt:
            if publish.published is None:  # else it came while names were moved, and the job is done
                raise
    progress.finish()
    return Result(out, False, root, job.reads, job.output.bytes, time.monotonic() - began, source.left, job.towers, notes=_notes(out))


def _move(job: Job, options: Options, pool: Pool, reader: Pool, digests: dict[Key, list[bytes]] | None, progress: Progress) -> None:
    out = job.output
    halt = threading.Event()
    engine.run(
        job.plan,
        job.source,
        out,
        lambda: Writer(out, pool, digests),
        workers=options.threads,
        pool=reader,
        progress=until(halt, progress.advance),
        stop=halt,
    )
    if digests is None:
        return
    rest = Writer(out, pool, digests)
    rest.done([key for key in out.entries if key not in digests])  # constants, padding alone, empty tensors


def _lay_files(job: Job, pool: Pool, reader: Pool) -> None:
    """Create every file at its full size, with everything in it that is no tensor."""
    out = job.output
    for name, size in out.sizes.items():
        path = out.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        for offset, data in out.literals.get(name, ()):
            pool.write(path, offset, data)
        for offset, length, place, at in out.moved.get(name, ()):
            for piece in reader.chunks(place, at, length):
                pool.write(path, offset, piece)
                offset += len(piece)
    for slot in out.layout.constants if out.shards else ():
        for point in slot.points():
            path, entry = out.locate((slot.rank, slot.name(point)))
            assert isinstance(slot.template, Constant)
            pool.write(path, entry.offset, scalar(slot.template))
    for name, data in out.whole.items():
        (out.root / name).write_bytes(data)


def _finish(job: Job, carried: Sequence[tuple[str, Path, int]], reader: Pool, digests: Mapping[Key, list[bytes]] | None) -> str | None:
    """Everything beside the weights: carried files, residues, tables, tensors.json, the manifest; times of restored files."""
    out, source = job.output, job.source
    along = [_copy(name, path, mtime, out.root, reader) for name, path, mtime in carried]
    if digests is None:
        for name, mtime in out.mtimes.items():
            os.utime(out.root / name, ns=(mtime, mtime))
        return None
    kept = _keep_source(job, reader)
    ranks = []
    for shard in out.shards:
        mine = {name: digests[shard.rank, name] for name, _, _ in shard.tensors}
        text = tensors_json(shard, out.layout, mine)
        name = f"{folder(shard.rank)}/tensors.json"
        _write(out.root / name, text)
        weights = Listed(shard.file, shard.size, shard_digest(shard.prologue, (of_blocks(mine[name]) for name, _, _ in shard.tensors)))
        ranks.append((weights, Listed(name, len(text), of(text))))
    text, root = manifest.dump(out.layout, engine=job.engine, origin=source.origin, plan=out.plan, ranks=ranks, carried=along, source=kept)
    _write(out.root / manifest.NAME, text)
    return root


def _keep_source(job: Job, reader: Pool) -> list[Listed]:
    """The folder `source`: residues, tables, files.json. Residues have the times of the files they are from."""
    out, source = job.output, job.source
    kept = []
    for original in source.originals:
        path = manifest.residue_path(out.root, original.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        size, digest = _stream(path, _pieces(source, original, reader))
        os.utime(path, ns=(original.mtime_ns, original.mtime_ns))
        kept.append(Listed(str(path.relative_to(out.root)), size, digest))
    data = _source_texts(job)
    for name, content in data.items():
        _write(out.root / name, content)
        kept.append(Listed(name, len(content), of(content)))
    if source.left:
        _write(out.root / manifest.LEFT, manifest.dump_left(source.left))
    return kept


def _source_texts(job: Job) -> dict[str, bytes]:
    """The small files of the folder `source`."""
    family, table = job.output.layout.model.family, job.output.layout.format
    texts = {f"source/families/{name}.toml": text for name, text in family.texts.items()}
    texts |= {f"source/formats/{name}.toml": text for name, text in table.texts.items()}
    data = {name: text.encode() for name, text in texts.items()} | {manifest.FILES: manifest.dump_originals(job.source.originals)}
    if job.source.sums:
        data[manifest.SUMS] = manifest.dump_sums(job.source.sums)
    return data


def _pieces(source: Source, original: Original, reader: Pool) -> Iterator[bytearray]:
    for _, length, path, at in source.residue(original):
        yield from reader.chunks(path, at, length)


def _copy(name: str, path: Path, mtime_ns: int, root: Path, reader: Pool) -> Listed:
    size = path.stat().st_size
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise PlaceError(
            f"{name}: another file was written under this name: the file system takes upper and lower case for the same",
            "choose a destination that tells them apart",
        )
    size, digest = _stream(target, reader.chunks(path, 0, size))
    os.utime(target, ns=(mtime_ns, mtime_ns))
    return Listed(name, size, digest)


def _stream(path: Path, pieces: Iterator[bytearray]) -> tuple[int, str]:
    state, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for piece in pieces:
            state.update(piece)
            size += file.write(piece)
    return size, state.hexdigest()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _carried(job: Job) -> list[tuple[str, Path, int]]:
    """The files that are copied: name, where it is, modification time in ns. Raises ReshardError where we write one of that name."""
    files = [(file.name, file.path, file.mtime_ns) for file in job.source.carried]
    if "config.json" not in {name for name, _, _ in files}:
        why = next((file.why for file in job.source.left if file.name == "config.json"), "it is not there")
        raise ReshardError(f"{job.source.where}: config.json cannot be copied ({why})", "nothing opens a checkpoint without it")
    taken = {*OURS, *(folder(rank) for rank in range(job.output.layout.mesh.world))} if job.output.shards else set()
    taken |= {*job.output.sizes, *job.output.whole}
    above = {str(parent) for name in taken for parent in PurePosixPath(name).parents}
    for name, _, _ in files:
        if name in above or any(part in taken for part in (name, *map(str, PurePosixPath(name).parents))):
            raise ReshardError(f"{job.source.where}: {name} would be carried over a file of the same name", "rename or move it first")
    return files


def _residue_bytes(job: Job) -> int:
    return sum(high - low for original in job.source.originals for low, high in original.residue()) if job.output.shards else 0


def _check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise PlaceError if a file that was read is not what it was when it was opened first."""
    for path, stamp in stamps.items():
        try:
            status = path.stat()
        except FileNotFoundError:
            status = None
        check_stamp(path, stamp, status)


def _add_sha256(
    job: Job, out: Path, found: same_job.Finished, options: Options, progress: Progress
) -> tuple[same_job.Finished, tuple[str, ...]]:
    """Add to finished shards the SHA-256 of the source's files, as far as they lack it: what `convert --sha256` would have written.

    Merging the shards must make files of these digests, which proves the content. Everything else is linked into a new directory, which
    takes the place of the old as any conversion does: a reader finds the one or the other.
    """
    from . import verify_sha256

    if not job.output.shards:
        return found, ()  # Hugging Face files have no place for them
    known = manifest.load(out)
    lacking = {original.name for original in manifest.load_originals(out) if not original.sha256}
    if verify_sha256.hashable(job.source) and (lacking or not manifest.load_sums(out, known)):
        source = verify_sha256.hashed(job.source, options.threads, progress)
    elif any(original.sha256 and original.name in lacking for original in job.source.originals):
        source = job.source
    else:
        return found, ()
    digests = {original.name: original.sha256 for original in source.originals if original.sha256} | source.sums
    wanted = {name: FileDigest("sha256", digest, "is that of the source's") for name, digest in digests.items()}
    if failures := verify_sha256.sha256(open_source(out), wanted, options.threads, progress).failures:
        raise ReshardError(
            f"{out}: is not empty, and the source has other contents: {failures[0]}",
            "choose another destination, or --overwrite to replace it",
        )
    texts = _source_texts(replace(job, source=source))
    kept = [file for file in known.source if file.name not in texts]
    kept += [Listed(name, len(text), of(text)) for name, text in texts.items()]
    texts[manifest.NAME], _ = manifest.dump(
        job.output.layout, engine=job.engine, origin=known.origin, plan=known.plan, ranks=known.ranks, carried=known.carried, source=kept
    )
    publish.check_replaceable(out)
    with publish.Publication(out, replace=True, durable=options.fsync) as publication:
        try:
            _link(out, publication.work)
            for name, text in texts.items():
                (publication.work / name).unlink(missing_ok=True)  # never through the link
                _write(publication.work / name, text)
            _check_unchanged(source.stamps)
        except OSError as error:
            raise failed("writing", out, error) from error
        if options.fsync:
            publication.sync(options.threads)
        publication.commit(manifest.NAME)
    return replace(found, by="sha256"), ("SHA-256",)


def _link(out: Path, work: Path) -> None:
    """The same files in another directory of the same file system, whatever they are."""

    def theirs(folder_: str, names: list[str]) -> list[str]:
        return [name for name in names if name in publish.NOBODYS] if Path(folder_) == out else []

    def link(path: str, to: str) -> None:
        try:
            os.link(path, to, follow_symlinks=False)
        except OSError as error:
            raise PlaceError(
                f"{path}: cannot be linked to {to}: {error.strerror}",
                "--sha256 adds to a finished directory by way of hard links; here --overwrite --sha256 does it, by writing all of it anew",
            ) from error

    shutil.copytree(out, work, symlinks=True, ignore=theirs, copy_function=link, dirs_exist_ok=True)


def _notes(out: Path) -> tuple[str, ...]:
    """What killed conversions to other destinations in the same place have left there."""
    return tuple(map(told, left_by_killed(Path(os.path.realpath(out)).parent)))


def _root(out: Path) -> str | None:
    return manifest.load(out).root if manifest.present(out) else None
