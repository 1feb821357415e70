"""The command line. The only module that prints or exits: stdout carries data, stderr carries talk and progress.

Imports nothing heavy before a command needs it, so that `reshard --help` is instant.
"""

import atexit
import gc
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from . import __version__
from .errors import ReshardError, told
from .inputs.limits import numeral
from .text.escapes import in_json, visible

if TYPE_CHECKING:
    from .text.progress import Progress

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFECT = 70  # exit code, as of sysexits.h: what nobody has foreseen

Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(separator: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    def parse(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        parts = text.split(separator)
        if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) and int(part) for part in parts):
            raise ReshardError(
                f'{option.opts[0]} {text}: numbers from 1 on are needed, with "{separator}" between them', f"for example {option.metavar}"
            )
        return tuple(map(int, parts))

    return parse


def _ranks(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if (found := numeral(text)) is None:
        raise ReshardError(f'--tp {text}: a number of ranks is needed, 1 to 65536, or "auto"')
    return found


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_mesh = _options(
    click.option("--tp", callback=_ranks, metavar="N|auto", help="Tensor parallel ranks; auto: the fewest that fit --device-memory."),
    click.option("--pp", type=int, default=1, metavar="N", help="Pipeline stages."),
    click.option("--ep", type=int, default=1, metavar="N", help="Expert parallel groups; divides --tp."),
    click.option("--split", callback=_numbers(":"), metavar="3:3:2", help="Unequal tensor parallel ranks, by whole KV groups."),
    click.option(
        "--pp-layers", callback=_numbers(","), metavar="10,11,11", help="Layers of each stage (default: earlier ones get the extra)."
    ),
    click.option("--to", default=None, metavar="FORMAT", help="native (default), vllm, or hf: Hugging Face files."),
    click.option("--engine-version", metavar="V", help="Version of the engine that will load the format."),
    click.option(
        "--max-file-size", metavar="5GB", help="With --to hf: split anew, as transformers would, instead of restoring the originals."
    ),
    click.option("--no-pad", is_flag=True, help="Refuse to pad the vocabulary."),
    click.option("--no-repeat", is_flag=True, help="Refuse to repeat KV heads."),
)
_device = _options(
    click.option("--device-memory", metavar="24GiB", help="Memory of one device: does it fit?"),
    click.option("--context", type=click.IntRange(1), metavar="TOKENS", help="Tokens per sequence in the KV cache."),
    click.option("--batch", type=click.IntRange(1), default=1, metavar="N", help="Sequences in the KV cache."),
)
_source = _options(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id."),
    click.option("--family", metavar="NAME|FILE", help="Family table to use: a name, or your own TOML file."),
)
_talk = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option(
        "--progress", "progress_kind", type=click.Choice(["auto", "json", "none"]), default="auto", help="How to show progress, on stderr."
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but results of --json, and errors."),
)
_workers = click.option(
    "--workers", type=click.IntRange(1, 256), default=None, metavar="N", help="Threads (default: one per CPU, at most 8)."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reshard")
def cli() -> None:
    """Convert checkpoints between parallel layouts: exactly, at the speed of cp, in little memory.

    \b
    SRC: a checkpoint directory, a Hub id (org/name), or what convert wrote.
      reshard plan    SRC --tp 8         what would be written, and what it needs
      reshard convert SRC OUT --tp 8     write one directory per rank
      reshard verify  OUT --against SRC  prove it
      reshard convert OUT BACK --to hf   the original files again, byte for byte
      reshard generate OUT --prompt "…"  run the model
    """


@cli.command(short_help="What is this: family, sizes, dtypes, files, layout.")
@click.argument("src", metavar="SRC")
@click.option("--draft-table", is_flag=True, help="Print a starter table for --family: what names and shapes tell.")
@_source
@_talk
def inspect(src: str, draft_table: bool, revision: str | None, family: str | None, as_json: bool, progress_kind: str, quiet: bool) -> None:
    """What is this: family, sizes, dtypes, files, layout, provenance.

    For a family that has no table: --draft-table > my.toml, edit it, and convert with --family my.toml.
    """
    from .jobs import inspect as describe

    if draft_table:
        from .authoring import draft

        start = draft.draft(describe.published(src, revision))
        _show(start.to_json() if as_json else in_json(start.text.rstrip("\n")))
        if not quiet and not as_json:
            click.echo(visible(start.words()), err=True)
        return
    found = describe.describe(src, revision, family)
    _show(found.to_json() if as_json else found.text(), quiet and not as_json)


@cli.command(short_help="Dry run: what each rank gets, disk and memory needed.")
@click.argument("src", metavar="SRC")
@_mesh
@_device
@_source
@_workers
@_talk
def plan(src: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Dry run: bytes per rank, what each layer becomes, disk and memory needed, sizes that work."""
    from . import api

    report = api.plan(src, **_arguments(given))
    _show(report.to_json() if as_json else report.text(), quiet and not as_json)


@cli.command()
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@_mesh
@_device
@_source
@_workers
@click.option("--overwrite", is_flag=True, help="Write, and replace what is in OUT once the new is complete.")
@click.option("--checksum", is_flag=True, help="Re-run: compare all of the source with OUT, not a sample of each tensor.")
@click.option("--no-check", is_flag=True, help="Re-run: do not read OUT to see that it is whole.")
@click.option("--sha256", is_flag=True, help="Record the SHA-256 of every source file (one more read); a finished OUT gets them added.")
@click.option(
    "--fsync/--no-fsync", default=True, help="Have everything on the device before publishing it, against power cuts (default), or not."
)
@_talk
def convert(src: str, out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Write shards for a mesh, or Hugging Face files (--to hf).

    Re-running a finished conversion is a no-op, exit 0: OUT is read once to see that it is whole (exit 1 if it is damaged; --no-check
    leaves that out), and is compared with a sample of each source tensor, or with every byte where times differ. A destination with
    anything else in it is refused. --overwrite always writes.
    """
    from . import api

    if given["pp"] == 1 and all(given[option] is None for option in ("tp", "split", "pp_layers", "to")):
        raise ReshardError("how many ranks? neither --tp nor --to was given", "--tp 8 for shards; --to hf for Hugging Face files")
    from .jobs.plan import said
    from .store import publish

    publish.published = None
    try:
        with _Talk(progress_kind, quiet) as progress:
            result = api.convert(src, out, **_arguments(given), progress=progress)
        _deaf()  # what is left is to say so
    except KeyboardInterrupt:
        if publish.published is None:
            raise
        click.echo(visible(f"{out}: is complete; the signal to stop came too late"), err=True)
        return
    if as_json:
        _show(result.to_json())
        return
    _say(quiet, *result.lines(src, *said(given["revision"], given["family"])))


@cli.command(short_help="Check OUT by its manifest, and against the original.")
@click.argument("out", metavar="OUT")
@click.option("--against", metavar="SRC", help="Compare every element with the original, bit by bit.")
@click.option("--sha256", is_flag=True, help="Hash the files that merging would write; an error where no digest of them is known.")
@click.option("--hub", metavar="ID", help="Compare these hashes with those that the Hub publishes; downloads no file.")
@click.option("--strict", is_flag=True, help="Files that the manifest does not list are a mismatch; otherwise they are unproven.")
@click.option("--only", metavar="RUNG", help="One of integrity, weights, sha256, numerics.")
@click.option("--numerics/--no-numerics", default=None, help="Run the model against the original (default: where it can be run here).")
@click.option("--exhaustive", is_flag=True, help="Run it on every row of the vocabulary.")
@click.option("--layers", is_flag=True, help="Run it layer by layer, in the memory of one, if it is larger than the machine's.")
@click.option("--processes", is_flag=True, help="Run it with a process per rank, connected by gloo, in place of threads.")
@click.option("--require", metavar="CHECKS", help="Exit 1 unless these pass: names with commas, or proven for all four, whole.")
@_source
@_workers
@_talk
def verify(out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Check OUT, rung by rung; "proven" only where all four passed. Exit 1 on a mismatch, or where --require is not met.

    \b
    integrity  sizes and digests, by the manifest
    weights    every element is the original's    --against SRC
    sha256     merging makes the published files  digests recorded, or --hub ID
    numerics   the model computes the same        --against SRC, transformers

    Digests prove integrity, not authenticity: whoever can change OUT can change its digests,
    too. Compare the root digest (reshard inspect OUT) with one from a source you trust, or use --hub.
    """
    from . import api

    with _Talk(progress_kind, quiet) as progress:
        report = api.verify(out, **_arguments(given), progress=progress)
    if as_json:
        from .jobs.convert import usage

        _show(report.to_json() | usage())
    else:
        _say(quiet and report.ok, *report.lines())
    if not report.ok:
        sys.exit(1)


@cli.command(short_help="A line per tensor, equal in every layout of the same weights.")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@click.option("--rank", type=int, metavar="N", help="Only this rank's share, as JSON.")
@click.option("--combine", is_flag=True, help="PATHs are the shares of all ranks: add them up.")
@click.option("--seed", default="", metavar="TEXT", help="Other multipliers; fingerprints of one seed compare.")
@_source
@_workers
@_talk
def fingerprint(
    paths: tuple[str, ...],
    rank: int | None,
    combine: bool,
    seed: str,
    revision: str | None,
    family: str | None,
    workers: int | None,
    as_json: bool,
    progress_kind: str,
    quiet: bool,
) -> None:
    """A line per logical tensor and one for the model: equal for every layout of the same weights. Not cryptographic.

    Each rank's node can hash its own files, and the shares add up:

    \b
    reshard fingerprint OUT --rank 3 > share-3.json
    reshard fingerprint --combine share-*.json
    """
    from . import api
    from .jobs import fingerprint as prints
    from .store.location import local

    found: prints.Fingerprint | prints.Share
    if combine:
        if rank is not None or seed:
            raise ReshardError("--combine adds up shares that are there; --rank and --seed make one", "leave them out")
        found = prints.combine(prints.read_share(local(path, "a share")) for path in paths)
    elif len(paths) != 1:
        raise ReshardError(f"{len(paths)} paths are given, one is fingerprinted at a time", "to add up shares: --combine FILE…")
    else:
        with _Talk(progress_kind, quiet) as progress:
            found = api.fingerprint(
                paths[0], rank=rank, seed=seed, revision=revision, family=family, workers=workers or 0, progress=progress
            )
    _show(found.to_json() if as_json or isinstance(found, prints.Share) else found.text())


@cli.command("explain", short_help="Say what an element is, and where it came from.")
@click.argument("out", metavar="OUT")
@click.argument("element", metavar="ELEMENT")
@_source
@_talk
def explain_command(
    out: str, element: str, revision: str | None, family: str | None, as_json: bool, progress_kind: str, quiet: bool
) -> None:
    """Say where ELEMENT is, which logical element it is, and where it came from; or where an element of the original went.

    \b
    3:layers.7.attn.qkv[700,12]                  of a stored tensor of rank 3
    model.layers.7.self_attn.k_proj.weight[3,4]  of a tensor of the original
    attn.k[7,0,3,4]                              of a logical tensor
    model.norm.weight                            all of it
    """
    from . import api

    found = api.explain(out, element, revision=revision, family=family)
    _show(found.to_json() if as_json else "\n".join(found.lines()))


@cli.command("diff", short_help="Compare two checkpoints of any layouts, tensor by tensor.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--family", metavar="NAME|FILE", help="Family table to use, for both.")
@_workers
@_talk
def diff_command(a: str, b: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Compare the tensors of A and B, whatever their layouts: bits, and how large the differences are. Exit 1 if any differ."""
    from . import api

    with _Talk(progress_kind, quiet) as progress:
        found = api.diff(a, b, **_arguments(given), progress=progress)
    _show(found.to_json() if as_json else "\n".join(found.lines()), quiet and found.equal and not as_json)
    if not found.equal:
        sys.exit(1)


@cli.command("check-table", short_help="Damage a family table in every way, and see what notices.")
@click.argument("family", metavar="FAMILY")
@click.option("--with", "given", metavar="PATH", help="A checkpoint of the family to try it on, beside made-up ones.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only so many damages, spread over all.")
@click.option("--all", "each", is_flag=True, help="List every damage, and what noticed it.")
@_talk
def check_table(family: str, given: str | None, sample: int | None, each: bool, as_json: bool, progress_kind: str, quiet: bool) -> None:
    """Exchange, transpose, shift and drop every row and axis of a table, and say what notices each damage.

    FAMILY is the name of a shipped table, or a TOML file of your own: what is not noticed in it, nothing protects. Exit 1 if there is any.
    """
    from . import api

    with _Talk(progress_kind, quiet) as progress:
        found = api.check_table(family, given=given, sample=sample, progress=progress)
    _show(found.to_json() if as_json else "\n".join(found.lines(each)), quiet and found.ok and not as_json)
    if not found.ok:
        sys.exit(1)


@cli.command(short_help="Run the model from its shards.")
@click.argument("out", metavar="OUT")
@click.option("--prompt", "-p", "texts", multiple=True, metavar="TEXT", help="A prompt; several are run together.")
@click.option("--prompts", "file", metavar="FILE", help="Prompts, one per line or JSON lines; - is stdin.")
@click.option("--tokens", multiple=True, metavar='"1 2 3"', help="A prompt as token ids.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="New tokens per prompt, at most.")
@click.option("--temperature", type=float, metavar="T", help="0 is greedy (default: what generation_config.json says, else greedy).")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest tokens that together have probability P.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed draws the same text, on any mesh.")
@click.option("--chat/--no-chat", default=None, help="Put prompts into the chat template (default: where there is one).")
@click.option("--tp", type=int, metavar="N", help="Tensor parallel ranks, where they are to be others than those of OUT.")
@click.option("--pp", type=int, default=1, metavar="N", help="Pipeline stages.")
@click.option("--ep", type=int, default=1, metavar="N", help="Expert parallel groups; divides --tp.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute in another type than the stored one.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run; cuda: a GPU per rank.")
@click.option("--hash", "hashed", is_flag=True, help="Compare the shards with their digests first.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    metavar="S",
    help="A rank that is lost ends the job within this.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all is done, instead of text as it comes.")
@click.option("--quiet", "-q", is_flag=True, help="No account on stderr.")
def generate(
    out: str,
    texts: tuple[str, ...],
    file: str | None,
    tokens: tuple[str, ...],
    tp: int | None,
    pp: int,
    ep: int,
    hashed: bool,
    **given: Any,
) -> None:
    """Generate text with the model in OUT, a shard directory or a published checkpoint, one process per rank.

    The text goes to stdout as it comes, rates and memory to stderr. Under torchrun this is one rank of the job:
    torchrun --nproc-per-node N -m reshard.runtime generate OUT …
    """
    import time
    from importlib import import_module

    began = time.monotonic()
    from .layout.mesh import Mesh
    from .store.location import local

    prompts: list[str | list[int]] = list(texts)
    for ids in tokens:
        words = re.split(r"[\s,]+", ids.strip(" ,"))
        if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
            raise ReshardError(f"--tokens {ids}: token ids are needed, numbers from 0 on", 'for example --tokens "1 2 3"')
        prompts.append(list(map(int, words)))
    if bool(prompts) == (file is not None):
        raise ReshardError(
            "prompts are given twice: --prompts FILE, and others" if prompts else "there is no prompt",
            '--prompt "…", --tokens "…" or --prompts FILE',
        )
    mesh = None if (tp, pp, ep) == (None, 1, 1) else Mesh(1 if tp is None else tp, pp, ep)
    given |= {"most": given.pop("max_tokens"), "verify": "hash" if hashed else None}
    job = import_module("reshard.runtime.job")
    try:
        job.start(
            job.Job(
                local(out, "a model to run"), tuple(prompts) or None, file and os.fspath(local(file, "prompts")), mesh, **given, began=began
            )
        )
    except KeyboardInterrupt as error:
        _fail("interrupted", None, _ended_by(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Options as the functions of the API take them; what was not given is left to their defaults."""
    arguments = {name: value for name, value in given.items() if value is not None and not name.startswith("no_")}
    for option in ("pad", "repeat", "check"):
        if given.get(f"no_{option}"):
            arguments[option] = False
    return arguments


class _Talk:
    """Progress that ends in good order, whatever happens."""

    def __init__(self, kind: str, quiet: bool) -> None:
        from .text.progress import reporter

        self.progress: Progress = reporter("none" if quiet and kind == "auto" else kind)  # type: ignore[arg-type]

    def __enter__(self) -> "Progress":
        return self.progress

    def __exit__(self, *_: object) -> None:
        self.progress.finish()


def _show(data: dict[str, Any] | str, silent: bool = False) -> None:
    if not silent:
        _print(in_json(json.dumps(data, indent=1, ensure_ascii=False)) if isinstance(data, dict) else visible(data))


def _say(quiet: bool, *lines: str) -> None:
    if not quiet:
        _print(visible("\n".join(lines)))


def _print(text: str) -> None:
    """To stdout. A reader that has gone away (`| head`) is no mismatch: as a shell has it, that is 128 + SIGPIPE."""
    try:
        click.echo(text)
    except BrokenPipeError:
        _hush(sys.stdout)
        sys.exit(141)


def _hush(stream: TextIO) -> None:
    from .text.progress import hush

    hush(stream)


def _open_all() -> None:
    """Standard streams that were closed (`2>&-`) lead nowhere, or files would be opened in their place, and written to as such."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _interrupted(number: int, _: FrameType | None) -> None:
    _deaf()  # once is enough: what follows is clearing up
    raise KeyboardInterrupt(number)


def _deaf() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the one place where errors are printed and exit codes are chosen."""
    gc.set_threshold(50_000)  # plans are many small values, few of them garbage: looking for cycles so often takes a tenth of starting up
    atexit.register(gc.freeze)  # nor is there need to look for them at the end
    _open_all()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy moves bytes here; its linear algebra need not start threads
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes; in JSON this is how to write them
    try:
        sys.exit(cli.main(arguments, prog_name="reshard", standalone_mode=False) or 0)
    except ReshardError as error:
        _fail(error.message, error.hint, error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        _fail("interrupted; what was not finished has been removed", None, _ended_by(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.ClickException as error:
        usage = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "reshard"
        _fail(error.format_message(), f"{usage} --help shows what there is", 2)
    except OSError as error:
        _hush(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", None, 3)
    except Exception as error:
        if (words := _starved(error)) is not None:
            _fail(*words, 3)
        _fail(*_defect(error), DEFECT)


def _ended_by(error: BaseException) -> int:
    """The exit code for a signal, as of a shell: 128 and its number."""
    cause = error.__context__ if isinstance(error, click.exceptions.Abort) else error
    return 128 + int(next(iter(cause.args if cause else ()), signal.SIGINT))


def _starved(error: Exception) -> tuple[str, str] | None:
    """Message and hint where the machine had too little of something, not the program a defect; else None."""
    if isinstance(error, MemoryError):
        return "out of memory", "raise the limit (ulimit -v, or that of the container), or use fewer --workers"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no more threads can be started", "raise the limit (ulimit -u, ulimit -v), or use fewer --workers"
    if isinstance(error, ImportError) and not (error.name or "").startswith("reshard"):
        first = next(line for line in str(error.__cause__ or error).splitlines() if line.strip())
        return f"a module cannot be loaded: {first}", "raise the limit on memory (ulimit -v) if there is one, or install reshard again"
    return None


def _defect(error: Exception) -> tuple[str, str]:
    """Message and hint for what should never happen. The traceback goes to a file, or, with RESHARD_DEBUG set, to stderr."""
    import tempfile
    import traceback

    trace = "".join(traceback.format_exception(error))
    if os.environ.get("RESHARD_DEBUG"):
        click.echo(visible(trace), err=True)
        there = "the traceback is above"
    else:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="reshard-", suffix=".txt", encoding="utf-8", errors="replace", delete=False
            ) as file:
                file.write(f"reshard {__version__}, Python {sys.version}\n{shlex.join(sys.argv)}\n\n{trace}")
            there = f"the traceback is in {file.name}"
        except OSError:
            there = "RESHARD_DEBUG=1 prints the traceback"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119
    first = str(error).partition("\n")[0][:200]
    return f"a defect in reshard {__version__}, at {where}: {type(error).__name__}: {first}", f"please report it: {there}"


def _fail(message: str, hint: str | None, code: int) -> None:
    try:
        click.echo(visible(f"error: {told(message, hint)}"), err=True)
    except OSError:  # a full disk under stderr, a terminal that was closed
        _hush(sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
