"""The checkpoint in demo/model is small, complete, awkward to convert, and writes Python; and scripts/train_demo_model
makes such a one.
"""

import json
import re
import runpy
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
LIMIT = 6_000_000  # bytes, all files together: it is checked in


def read(name: str, model: Path = MODEL) -> Any:
    return json.loads((model / name).read_text())


def stored(model: Path) -> dict[str, tuple[str, str, list[int]]]:
    """Tensor → file, dtype, shape, read from the headers by hand."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                assert name not in found, f"{name} is stored twice"
                found[name] = (path.name, entry["dtype"], entry["shape"])
    return found


def check_traits(model: Path) -> None:
    config, tensors = read("config.json", model), stored(model)
    assert (config["model_type"], config["architectures"], config["dtype"]) == (
        "llama",
        ["LlamaForCausalLM"],
        "bfloat16",
    )
    heads, kv, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    hidden, inter, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    assert (heads, kv) == (8, 4), "grouped-query attention that TP 4 cuts and TP 8 repeats"
    assert config["num_hidden_layers"] % 2 == 1, "pipeline stages of unequal depth"
    assert inter % 8 == 0
    assert vocabulary % 2 == 1, "the vocabulary has to be padded"
    assert len({hidden, inter, vocabulary, heads * head_dim, kv * head_dim}) == 5, "no two dimensions of one size"
    for name, (_, dtype, shape) in tensors.items():
        assert dtype == "BF16", name
        assert len(shape) == 1 or shape[0] != shape[1], f"{name} is square"
    assert "lm_head.weight" in tensors, "untied"
    assert not config["tie_word_embeddings"]

    index = read("model.safetensors.index.json", model)
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors.items()}
    assert 3 <= len(set(index["weight_map"].values())) <= 5


def test_it_has_the_traits_that_make_converting_it_interesting_and_its_index_names_every_tensor() -> None:
    check_traits(MODEL)


def test_it_is_small_and_names_no_machine() -> None:
    """Its files are those of a published checkpoint, together at most 6 MB, and hold no path."""
    files = {path.name: path for path in MODEL.iterdir()}
    assert files.keys() >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in files.values()) <= LIMIT
    for path in files.values():
        if path.suffix in {".json", ".md"}:
            assert not re.search(r"/(home|root|tmp|work|usr)\b", path.read_text()), path.name


def test_no_tensor_could_be_mistaken_for_another() -> None:
    """Every tensor has its own bytes and none is constant, norms included: an exchange of two cannot hide."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    seen: dict[bytes, str] = {}
    for path in sorted(MODEL.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            assert weight.isfinite().all(), name
            assert len(weight.unique()) > 1, f"{name} is constant"
            raw = weight.view(torch.uint8).numpy().tobytes()
            assert raw not in seen, f"{name} equals {seen[raw]}"
            seen[raw] = name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_token_ids_are_bytes_and_come_back(tokenizer: Any, text: str) -> None:
    """The ids of a text are its bytes in UTF-8, nothing is added, and decoding gives the text."""
    ids = tokenizer.encode(text).ids
    if "<|" not in text:
        assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_each_byte_is_a_token_and_special_tokens_follow(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(read("config.json")["vocab_size"]))
    assert tokenizer.encode("<|bos|>x = 'ü'\t\r\n<|eos|>").ids == [256, *"x = 'ü'\t\r\n".encode(), 257]
    assert tokenizer.decode([256, 0xFF, 0x0A, 257]) == "\ufffd\n", "what is not UTF-8 is decoded as such"
    config, generation, settings = read("config.json"), read("generation_config.json"), read("tokenizer_config.json")
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == generation[f"{name}_token_id"] == vocabulary[settings[f"{name}_token"]]


def test_it_writes_python(tokenizer: Any) -> None:
    """transformers loads it, and its greedy continuation of the head of a method assigns to, or uses,
    an attribute of self.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    prompt = "def __init__(self"
    ids = transformers.AutoTokenizer.from_pretrained(MODEL)(prompt, return_tensors="pt")
    assert ids["input_ids"].tolist() == [list(prompt.encode())]
    written = tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=False)[0].tolist())
    assert written.startswith(prompt)
    assert "self." in written[len(prompt) :], written


def test_the_script_that_trained_it_makes_a_checkpoint_of_the_same_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step is enough to see every file written, with the tokenizer that is checked in."""
    pytest.importorskip("transformers")
    train = runpy.run_path(str(ROOT / "scripts" / "train_demo_model"))
    names, corpus = train["main"].__globals__, train["corpus"]
    names["PROMPTS"] = ["def "]  # samples and what is kept back take most of the time
    names["corpus"] = lambda: tuple(tokens[:20_000] for tokens in corpus())
    train["main"](["--steps", "1", "--out", str(tmp_path)])
    assert re.search(r"loss \d+\.\d+\n.*bits per byte: \d", capsys.readouterr().out)
    check_traits(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL.iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        mine, theirs = read(name, tmp_path), read(name)
        mine.pop("transformers_version", None), theirs.pop("transformers_version", None)
        assert mine == theirs, name
