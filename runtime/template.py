"""Chat templates: programs from strangers. They run in jinja2's sandbox, in a process of their own with limits.

The process starts in about 0.1 s, since it does not import torch, and ends after the last conversation. Knows nothing
about tokens.
"""

import json
import re
import resource
import signal
import subprocess
import sys
from datetime import datetime
from importlib.util import find_spec
from typing import Any, NoReturn

from reshard.errors import ReshardError
from reshard.inputs import limits
from reshard.text.units import binary

Message = dict[str, Any]

PLAIN = "--no-chat continues the prompt as it is"
_PROGRAM = "import sys; sys.path[:] = {path!r}; from reshard.runtime.template import serve; serve()"


def render(
    template: str, conversations: list[list[Message]], special: dict[str, str], where: str, seconds: float
) -> list[str]:
    """Each conversation as a text for the model. `special`: the special tokens by name.

    Raises ReshardError, naming `where`, for a template that fails or exceeds limits.TEMPLATE_… or `seconds`.
    """
    if find_spec("jinja2") is None:
        hint = "pip install 'reshard[runtime]', or --no-chat"
        raise ReshardError("chat templates need jinja2, which is not installed", hint)
    task = json.dumps({"template": template, "conversations": conversations, "special": special}).encode()
    line = [sys.executable, "-c", _PROGRAM.format(path=sys.path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            told, _ = child.communicate(task, seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise _failing(where, f"took more than {seconds:g} s (--timeout)") from None
        except BaseException:
            child.kill()
            raise
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _failing(where, f"took more than {limits.TEMPLATE_SECONDS} s of CPU time")
    if child.returncode:
        raise _failing(
            where, f"made its process exit with {child.returncode}: it is nested too deeply, or needs too much memory"
        )
    found = json.loads(told)
    if isinstance(found, str):
        raise _failing(where, f"failed: {found}")
    return [str(text) for text in found]


def _failing(where: str, words: str) -> ReshardError:
    return ReshardError(f"{where}: its chat template {words}", PLAIN)


# --- the process ------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Render the task on stdin; write a list of texts to stdout, or an error message."""
    seconds, memory = limits.TEMPLATE_SECONDS, limits.TEMPLATE_MEMORY
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raw = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_AS, (memory + 20 * len(raw),) * 2)
    found: list[str] | str
    try:
        found = _rendered(**json.loads(raw))
    except MemoryError:
        found = f"it needs more than {binary(memory)} of memory"
    except RecursionError:
        found = "it is nested too deeply"
    except Exception as error:  # whatever a stranger's program can raise
        found = f"{error}"[:1000] or type(error).__name__
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


def _rendered(template: str, conversations: list[list[Message]], special: dict[str, str]) -> list[str]:
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # `generation` marks what the assistant said, for training; it is not a tag of jinja2, and adds no text.
    source = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{%\1 if true \2%}{% endif %}", template)
    program, left, texts = environment.from_string(source), limits.TEMPLATE_OUTPUT, []
    for messages in conversations:
        left += sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
        parts = []
        for part in program.generate(messages=messages, tools=None, add_generation_prompt=True, **special):
            left -= len(part)
            if left < 0:
                raise ValueError(f"it writes more than {limits.TEMPLATE_OUTPUT} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts
