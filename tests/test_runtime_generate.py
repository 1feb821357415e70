"""Generating: the tokens are transformers', on any mesh, in any batch; the text streams whole; a job of processes ends
as one.

Ranks are threads here, but for the command line, which starts processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from running import ROOT, WATCHDOG, environment, process, refused, reshard

from reshard import api
from reshard.errors import ReshardError
from reshard.inputs import limits
from reshard.layout.mesh import Mesh
from reshard.runtime import template as chat_template
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.generate import Generated, Options, check, generate
from reshard.runtime.load import load_model
from reshard.runtime.sampling import Sampling
from reshard.runtime.text import Stream, Tokenizer, generation_config, stop_tokens

DEMO = ROOT / "demo/model"
PROMPTS = [b"def ", b"import os\n\n\nclass Reader:\n    def __init__(self", b"# a"]
IDS = [list(prompt) for prompt in PROMPTS]
MESHES = {"tp1": Mesh(1), "tp2": Mesh(2), "tp4": Mesh(4), "pp2": Mesh(1, 2), "tp2 pp2": Mesh(2, 2)}
SCRIPTS = Path(sys.executable).parent


def run(mesh: Mesh, prompts: list[list[int]], options: Options, seen: list[Any] | None = None) -> Generated:
    """Generate with the demo model in float32, on threads; every rank must say the same."""

    def work(world: Any) -> Generated:
        decoder = load_model(DEMO, torch.float32, mesh=mesh, world=world)
        return generate(
            decoder,
            prompts,
            options,
            (lambda *said: seen.append(said)) if seen is not None and world.rank == 0 else None,
        )

    found = run_threads(mesh.world, work)
    assert all((other.tokens, other.reasons) == (found[0].tokens, found[0].reasons) for other in found)
    return found[0]


@cache
def reference(count: int) -> list[list[int]]:
    """What transformers generates greedily, each prompt alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    found = []
    for ids in IDS:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, attention_mask=torch.ones(1, len(ids))
        )
        found.append(out[0, len(ids) :].tolist())
    return found


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_greedy_tokens_are_those_of_transformers(mesh: Mesh) -> None:
    """Greedy tokens of a ragged batch in float32 are what transformers generates for each prompt alone,
    on every mesh.
    """
    done = run(mesh, IDS, Options(40))
    assert done.tokens == reference(40)
    assert done.reasons == ["length"] * len(IDS)
    assert len({tuple(tokens) for tokens in done.tokens}) == len(IDS)  # else a batch that mixes its rows up would pass


def test_drawn_tokens_depend_on_seed_and_prompt_alone() -> None:
    """The same seed draws the same tokens on every mesh and in any batch with the prompt at the same place;
    another seed draws others.
    """
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=5)
    first = run(Mesh(1), IDS, Options(24, sampling)).tokens
    assert run(Mesh(4), IDS, Options(24, sampling)).tokens == first
    assert run(Mesh(1, 2), IDS[:1], Options(24, sampling)).tokens == first[:1]
    assert run(Mesh(1), IDS, Options(24, Sampling(0.9, 40, 0.95, seed=6))).tokens != first


def test_stop_tokens_end_one_text_and_no_other() -> None:
    """A text ends before its first stop token, for the reason "stop"; the others go on as if it were not there."""
    expected = reference(40)
    stop = next(
        token
        for token in expected[0][3:]
        if all(token not in other for other in expected[1:]) or token == expected[0][3]
    )
    seen: list[Any] = []
    done = run(Mesh(2), IDS, Options(40, stop=frozenset([stop])), seen)
    for found, whole, reason in zip(done.tokens, expected, done.reasons, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert (found, reason) == (whole[:end], "stop" if stop in whole else "length")
    assert "stop" in done.reasons
    for number, tokens in enumerate(done.tokens):
        assert [(token, reason) for prompt, token, reason in seen if prompt == number] == [
            (t, None) for t in tokens
        ] + [(None, done.reasons[number])]


def test_a_text_ends_where_positions_do() -> None:
    """Prompt and new tokens together never take more positions than the model has, whatever else is in the batch."""
    done = run(Mesh(1), IDS, Options(50, positions=len(IDS[1]) + 2))
    assert done.tokens == [tokens[: len(IDS[1]) + 2 - len(ids)] for tokens, ids in zip(reference(50), IDS, strict=True)]
    assert done.reasons == ["length"] * 3


def test_long_prompts_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose logits would take too much goes through in parts, and nothing changes."""
    monkeypatch.setattr("reshard.runtime.generate._LOGITS", 5 * 3 * 259)
    assert run(MESHES["tp2 pp2"], IDS, Options(12)).tokens == [tokens[:12] for tokens in reference(40)]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 2 has no tokens"),
        ([[1] * 8], "prompt 1 has 8 tokens; the model has 8 positions"),
        ([[1, 300]], "prompt 1: token id 300 is not between 0 and 258"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompts: list[list[int]], words: str) -> None:
    """An empty, too long or unknown prompt is refused, with its number and both sizes."""
    with pytest.raises(ReshardError, match=words):
        check(prompts, 259, 8)
    check([[1] * 7], 259, 8)


# --- sampling ---------------------------------------------------------------------------------------------------------


def drawn(sampling: Sampling, logits: list[float], count: int = 3000) -> Counter[int]:
    return Counter(sampling.choose(torch.tensor(logits), 0, step) for step in range(count))


def test_draws_follow_the_probabilities() -> None:
    """Tokens are drawn as often as the softmax of logits over temperature says; top-k and top-p leave exactly the
    likeliest.
    """
    logits = [0.0, 3.0, 1.0, 2.0]
    for temperature in (0.5, 1.0, 2.0):
        wanted = (torch.tensor(logits) / temperature).softmax(0)
        found = drawn(Sampling(temperature), logits)
        for token, share in enumerate(wanted.tolist()):
            assert abs(found[token] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9, (
                temperature,
                token,
            )
    assert set(drawn(Sampling(1.0, top_k=2), logits)) == {1, 3}
    assert set(drawn(Sampling(1.0, top_p=0.65), logits)) == {1, 3}  # 0.64 and 0.24: the first does not quite suffice
    assert set(drawn(Sampling(1.0, top_p=0.63), logits)) == {1}
    assert (
        set(drawn(Sampling(1.0, top_p=1e-9), logits))
        == set(drawn(Sampling(1.0, top_k=1), logits))
        == set(drawn(Sampling(), logits))
        == {1}
    )


# which JSON can say, and no number is
WRONG: list[object] = ["1", "", True, -1, float("nan"), float("inf"), 10**400, [], [1], {}]


def test_what_was_asked_for_goes_before_generation_config() -> None:
    """generation_config.json counts where it says do_sample, an option goes before it, and nothing at all is greedy."""
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert Sampling.of({}) == Sampling.of(said | {"do_sample": False}) == Sampling()
    assert Sampling.of(said, seed=4) == Sampling(0.6, 20, 0.9, 4)
    assert Sampling.of(said, temperature=0.0) == Sampling(0.0, 20, 0.9)
    assert Sampling.of(said, top_p=0.5) == Sampling(0.6, 20, 0.5)
    assert Sampling.of({}, top_k=5) == Sampling(1.0, 5)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ReshardError, match=f"--{next(iter(wrong)).replace('_', '-')} is .* must be"):
            Sampling.of({}, **wrong)
    for key, values in {"temperature": WRONG, "top_p": [*WRONG, 0, 1.5], "top_k": [*WRONG, 1.5]}.items():
        for value in values:
            with pytest.raises(ReshardError, match=f"generation_config.json: {key} is .* must be"):
                Sampling.of({"do_sample": True, key: value})


def test_stop_tokens_are_one_or_several(tmp_path: Path) -> None:
    """eos_token_id may be a number or a list, of generation_config.json or else of config.json."""
    assert generation_config(tmp_path) == {}
    assert stop_tokens({"eos_token_id": [1, 2]}, {"eos_token_id": 3}) == {1, 2}
    assert stop_tokens({"eos_token_id": 0}, {"eos_token_id": 3}) == {0}
    assert stop_tokens({}, {"eos_token_id": 3}) == {3}
    assert stop_tokens({}, {"text_config": {"eos_token_id": [4]}}) == {4}
    assert stop_tokens({}, {}) == frozenset()
    for value in [*(value for value in WRONG if value not in ([], [1])), [[1]], [True], 1.0, 7, [1, 7], ["1"]]:
        with pytest.raises(ReshardError, match=r"generation_config\.json: eos_token_id has .* 0 to 6"):
            stop_tokens({"eos_token_id": value}, {}, tmp_path, 7)


# --- text -------------------------------------------------------------------------------------------------------------

TEXT = "naïve — 日本語 🎉🎉 and  two spaces\n\tdef f(x): return 'é'\n" * 2


def trained(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer of merged bytes, or of words with a fallback to bytes as Llama 2 has it."""
    if kind == "bytes":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>"],
        )
        made.train_from_iterator([TEXT, "日本 日語 語本"], trainer)
    else:
        vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
        for character in sorted(set("▁" + TEXT.replace(" ", "▁")) - set("日🎉é")):
            vocabulary[character] = len(vocabulary)
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        made.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        )
        made.add_special_tokens(["<s>"])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_streamed_text_is_the_whole_text(kind: str, tmp_path: Path) -> None:
    """What a stream gives, token by token, is the text of all tokens; no part has half a character;
    special tokens are not shown.
    """
    tokenizer = trained(tmp_path, kind)
    ids = [1 if kind == "fallback" else 0, *tokenizer.encode(TEXT)]
    assert len(ids) > len(TEXT) / 4
    stream = Stream(tokenizer)
    parts = [stream.put(token) for token in ids]
    assert all("�" not in part for part in parts)
    assert "".join(parts) + stream.end() == tokenizer.decode(ids) == TEXT
    assert any(part == "" for part in parts[1:]), "nothing had to be held back"


def test_a_text_that_ends_inside_a_character_shows_what_there_is(tmp_path: Path) -> None:
    """Bytes that never become a character are shown as such at the end, and not before."""
    tokenizer = Tokenizer(DEMO)
    stream = Stream(tokenizer)
    assert [stream.put(token) for token in "aé".encode()[:2]] == ["a", ""]
    assert stream.end() == "�"
    assert stream.end() == ""


TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "blocks": "{%- for m in messages %}\n    {%- if m.role == 'user' -%}\n    Q: {{ m | tojson }}\n    {% "
    "endif %}\n{%- endfor %}\nA:",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content.split('x')[0] "
    "}}{% endfor %}"
    "{% generation %}é{% endgeneration %}{{ eos_token }}{{ 'n' if tools is none else 'y' }}",
}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "list", "chat_template.jinja"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(name: str, where: str, tmp_path: Path) -> None:
    """A conversation becomes the text that transformers makes of it, wherever the template stands."""
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
    }
    if where == "tokenizer_config.json":
        said["chat_template"] = TEMPLATES[name]
    elif where == "list":
        said["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": TEMPLATES[name]},
        ]
    else:
        (tmp_path / where).write_text(TEMPLATES[name])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    messages = [
        {"role": "user", "content": "  héxllo "},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": '"b"<'},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "failed"),
    ],
)
def test_templates_are_programs_of_strangers(template: str, words: str, tmp_path: Path) -> None:
    """A template that reaches for more than messages, or refuses them, is an error in words."""
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ReshardError, match=words):
        Tokenizer(tmp_path).render([{"role": "user", "content": "a"}])


HOSTILE = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
        "took more than 1 s of CPU time",
    ),
    "a long power": ("{% set x = 9 ** (9 ** 8) %}{{ x % 7 }}", "of CPU time|of memory"),
    "a long text": ("{{ 'a' * 10**10 }}", "of memory"),
    "an indent": ("{{ 'a'|indent(3*10**9) }}", "of memory"),
    "a wide number": ("{{ '%999999999d' % 1 }}", "of memory"),
    "a join": ("{{ range(99999)|map('string')|join('x'*10000)|length }}", "of memory"),
    "output": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 16777216 characters"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    "deep parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply|too many nested|failed"),
    "deep blocks": ("{% if true %}" * 2000 + "x" + "{% endif %}" * 2000, "nested|failed"),
    "a division": ("{{ 1/0 }}", "division by zero"),
    "an index": ("{{ [].pop() }}", "failed"),
    "a file": ("{% include '/etc/passwd' %}", "failed"),
    "half a pair": ("{{ '\\ud800' }}", "invalid text"),
    "a clock": ("{{ strftime_now.__globals__['__builtins__']['__import__']('os').system('touch PWNED') }}", "failed"),
    "a format": ("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "failed"),
    "no UTF-8": (b"\xff{{ x }}", "not UTF-8"),
    "large": ("x" * ((1 << 20) + 1), "at most 1048576 are read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_may_take_little_and_no_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time, memory and output are bounded, and this process takes none of them: an error in words, whatever the
    template does.
    """
    template, words = HOSTILE[name]
    program = "import sys; sys.path[:] = {path!r}; from reshard.inputs import limits; limits.TEMPLATE_SECONDS = 1; "
    monkeypatch.setattr(chat_template, "_PROGRAM", program + "from reshard.runtime.template import serve; serve()")
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(ReshardError, match=words) as error:
        Tokenizer(tmp_path).chat([{"role": "user", "content": "a"}])
    assert "--no-chat" in (error.value.hint or "") or name == "large"
    assert not (tmp_path / "PWNED").exists()


def test_rendering_keeps_to_the_timeout_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(str(HOSTILE["loops"][0]))
    with pytest.raises(ReshardError, match=r"took more than 0\.5 s \(--timeout\)"):
        Tokenizer(tmp_path).chats([[{"role": "user", "content": "a"}]], 0.5)


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_do_not_wait_for_a_template_that_never_ends(tp: int, tmp_path: Path) -> None:
    """They have not met when it is rendered: the error names the template, never a rank that did not come."""
    out = tmp_path / "out"
    assert reshard("convert", DEMO, out, "--tp", str(tp)).code == 0
    (out / "chat_template.jinja").write_text(str(HOSTILE["loops"][0]))
    done = process("generate", out, "--prompt", "a", "--timeout", "0.5")
    refused(done, 2, "its chat template took more than 0.5 s (--timeout)", "--no-chat")


def test_many_conversations_are_rendered_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    started: list[Any] = []
    popen = chat_template.subprocess.Popen
    monkeypatch.setattr(
        chat_template.subprocess, "Popen", lambda *given, **more: started.append(given) or popen(*given, **more)
    )
    tokenizer = Tokenizer(tmp_path)
    assert started == []
    found = tokenizer.chats([[{"role": "user", "content": f"é{at}"}] for at in range(100)])
    assert [tokenizer.decode(ids) for ids in found] == [f"<é{at}>" for at in range(100)] and len(started) == 1


def test_the_process_of_a_template_imports_no_torch() -> None:
    code = (
        "import sys; from reshard.runtime import template; import jinja2.sandbox, jinja2.ext; "
        "sys.exit('torch' in sys.modules)"
    )
    assert process(code=code).code == 0


# --- the command line, refusing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at TP 2."""
    out = tmp_path_factory.mktemp("generate") / "tp2"
    api.convert(str(DEMO), str(out), tp=2)
    return out


def test_wrong_use_is_refused_in_words(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot work is refused before any process is started, with the remedy."""
    monkeypatch.delenv("RANK", raising=False)
    refused(reshard("generate", tmp_path / "none", "--prompt", "a"), 2, "no such directory", "reshard convert")
    refused(reshard("generate", "org/name", "--prompt", "a"), 2, "reshard convert org/name OUT")
    refused(reshard("generate", shards), 2, "no prompt was given", "--prompt")
    refused(reshard("generate", shards, "--prompt", "a", "--prompts", "-"), 2, "does not go with")
    refused(reshard("generate", shards, "--tokens", "1 x"), 2, "1 x", "expected token ids")
    refused(reshard("generate", shards, "--prompts", tmp_path / "none"), 2, "No such file")
    refused(reshard("generate", shards, "--prompt", "a", "--ep", "3", "--tp", "2"), 2, "--ep 3 does not divide")
    (tmp_path / "empty").write_text("\n\n")
    refused(reshard("generate", shards, "--prompts", tmp_path / "empty"), 2, "no prompts")
    (tmp_path / "wrong").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    refused(reshard("generate", shards, "--prompts", tmp_path / "wrong"), 2, "line 2")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in DEMO.iterdir():
        if path.name != "tokenizer.json":
            (bare / path.name).symlink_to(path)
    refused(reshard("generate", bare, "--prompt", "a"), 2, "tokenizer.json: no such file", '--tokens "1 2 3"')
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    refused(reshard("generate", shards, "--prompt", "a"), 2, "PyTorch", "pip install 'reshard[runtime]'")


def test_generate_imports_nothing_heavy_before_it_must() -> None:
    """The command line and its help import neither torch nor the runtime."""
    code = "import sys; from reshard import cli\ntry: cli.main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += (
        "print([name for name in sys.modules if name in ('torch', 'numpy', 'tokenizers') or "
        "name.startswith('reshard.runtime')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# --- the command line, running ----------------------------------------------------------------------------------------


def hostile(folder: Path) -> Path:
    """A folder with a `runtime` and a `reshard` of the user's own, and other names that are easily taken for ours."""
    for name in ("runtime", "reshard", "torch"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('the wrong one was imported')\n")
    return folder


def settings(**more: str) -> dict[str, str]:
    """The environment of a user: nothing that tells Python where reshard is."""
    return (
        {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
        | {"OMP_NUM_THREADS": "1"}
        | more
    )


def test_a_job_of_processes_generates_what_threads_do(shards: Path, tmp_path: Path) -> None:
    """`reshard generate` starts the ranks itself, in any folder, and its JSON has the tokens, texts, reasons,
    times and sizes.
    """
    prompts = tmp_path / "prompts"
    prompts.write_text("def \n" + json.dumps({"tokens": IDS[1]}) + "\n")
    words = ["generate", str(shards), "--prompts", str(prompts), "--max-tokens", "30", "--dtype", "float32", "--json"]
    done = subprocess.run(
        [SCRIPTS / "reshard", *words], cwd=hostile(tmp_path / "here"), env=settings(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [text["tokens"] for text in found["texts"]] == [tokens[:30] for tokens in reference(40)[:2]]
    assert [text["text"] for text in found["texts"]] == [bytes(tokens[:30]).decode() for tokens in reference(40)[:2]]
    assert [text["finish"] for text in found["texts"]] == ["length"] * 2
    assert (found["ranks"], found["mesh"], found["new_tokens"], found["steps"]) == (2, "TP 2", 60, 29)
    assert found["memory"]["weights"][0] == found["memory"]["weights"][1] > 2 * 1_500_000
    assert 0 < found["share_in_collectives"] < 1
    assert found["bandwidth"] > 0
    assert found["machine_bandwidth"] > 0
    assert (
        found["seconds"]["total"] >= found["seconds"]["start"] + found["seconds"]["load"] + found["seconds"]["decode"]
    )
    assert done.stderr == ""


def children(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with positions for a text that no test waits for."""
    folder = tmp_path_factory.mktemp("long")
    source = Path(shutil.copytree(DEMO, folder / "model"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 16}))
    api.convert(str(source), str(folder / "tp2"), tp=2)
    return folder / "tp2"


@pytest.fixture
def decoding(long: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A job that is decoding, and its ranks' processes. Its own timeout is one that no busy machine reaches."""
    words = [
        "generate",
        str(long),
        "--prompt",
        "def ",
        "--max-tokens",
        "60000",
        "--timeout",
        f"{WATCHDOG:.0f}",
        "--tp",
        "4",
    ]
    job = subprocess.Popen(
        [SCRIPTS / "reshard", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings()
    )
    assert job.stdout is not None
    for _ in range(8):
        assert job.stdout.read(1)
    yield job, children(job.pid)
    job.kill()
    job.communicate()


def wait_for(processes: list[int]) -> None:
    """Until all have ended: pytest's limit is for those that do not."""
    while any(Path(f"/proc/{process}").exists() and "Z" not in _state(process) for process in processes):
        time.sleep(0.05)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_rank_that_is_killed_ends_the_job(decoding: tuple[subprocess.Popen[str], list[int]]) -> None:
    """When a rank is killed the command says which, and in which phase, exits 3, and leaves no process behind."""
    job, ranks = decoding
    assert len(ranks) == 4
    os.kill(ranks[2], signal.SIGKILL)
    out, err = job.communicate(timeout=WATCHDOG)
    assert job.returncode == 3, err
    assert "error: rank 2 was killed in decode" in err
    assert "Traceback" not in err
    assert out.endswith("\n")
    wait_for(ranks)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_no_rank_outlives_the_command(
    number: int, code: int, decoding: tuple[subprocess.Popen[str], list[int]]
) -> None:
    """Ctrl-C, SIGTERM, a terminal that is closed, and even SIGKILL of the command end all ranks."""
    job, ranks = decoding
    if number == signal.SIGHUP:  # goes to all processes of the terminal
        for rank in ranks:
            os.kill(rank, number)
    job.send_signal(number)
    _, err = job.communicate(timeout=WATCHDOG)
    assert job.returncode == code
    assert "Traceback" not in err
    wait_for(ranks)


def test_two_nodes_of_torchrun_are_one_job(shards: Path, tmp_path: Path) -> None:
    """torchrun on two nodes, started as a module or as a command, generates what one process does; one rank speaks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ways: list[list[str | Path]] = [["-m", "reshard.runtime"], ["--no-python", SCRIPTS / "reshard"]]
    nodes = []
    for number, way in enumerate(ways):
        words = [
            "--nnodes",
            "2",
            "--node-rank",
            number,
            "--nproc-per-node",
            "1",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
            *way,
        ]
        words += ["generate", shards, "--prompt", "def ", "--max-tokens", "20", "--dtype", "float32", "-q"]
        nodes.append(
            subprocess.Popen(
                [SCRIPTS / "torchrun", *map(str, words)],
                cwd=hostile(tmp_path / str(number)),
                env=settings(PYTHONSAFEPATH="1", GLOO_SOCKET_IFNAME="lo"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [node.communicate(timeout=WATCHDOG) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert ended[0][0] == "def " + bytes(reference(40)[0][:20]).decode() + "\n"
    assert ended[1][0] == ""
