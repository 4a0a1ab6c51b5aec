"""Text encoders and tokenizers against transformers; names and shapes against the published checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from text_encoders import (CLIP_L, T5_XXL, UMT5_XXL, CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder,
                           load_clip_tokenizer, load_t5_tokenizer, relative_position_buckets, tokenize)

CHECKPOINTS = Path(__file__).resolve().parent.parent / "shared" / "checkpoints"
CORPUS = ["a small red circle above a large blue square on a white background", "the cat's toy; they'll say it's 10!",
          "two stars move left, one ring grows. Don't stop - never!", "a café, a naïve heart & a diamond (3.14)"] * 4
PROMPTS = ["a red circle", "", "  two   spaces\tand\na newline ", "It's the cat's, they'll say: don't!! I'd 'VE'm",
           "12 monkeys, 3.14 & 2024...", "naïve café — “ÉCOLE” 東京 🙂", "cafe\u0301 n\u0303 \u212b İ ẞ",
           "\u00a0\u3000\u200b", "a <|endoftext|> b </s> c <pad>", "<|StartOfText|>x<|ENDOFTEXT|>", "'start 'revolt odd's s's ''s",
           "unseen ж ⅷ ² ½ ٣ ㋀", "snake_case-and-dash/slash", "circle " * 90]


# ---------------------------------------------------------------------------------------- encoders

@torch.no_grad()
def randomise(model):
    """Draw every parameter, norms and biases too, so that nothing hides at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.mul_(0.3).add_(1)
        elif "shared" in name or "_embedding" in name:  # rows from 1 down to 1e-3: there the norms' eps matters
            p.mul_(torch.logspace(0, -3, len(p))[:, None])
        elif p.ndim == 2 and "attention_bias" not in name:
            p.mul_(p.shape[1] ** -0.5)
    return model.eval()


def assert_close(got, want):
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()


def t5_pair(per_layer_bias):
    """Ours and transformers' T5 (or UMT5) with the same weights, copied by name."""
    transformers = pytest.importorskip("transformers")
    name = "UMT5" if per_layer_bias else "T5"
    theirs = getattr(transformers, f"{name}EncoderModel")(getattr(transformers, f"{name}Config")(
        vocab_size=97, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"))
    config = T5Config(97, dim=48, heads=4, head_dim=8, ff=80, layers=3, per_layer_bias=per_layer_bias)
    ours = randomise(T5Encoder(config))
    state = ours.state_dict()
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})  # theirs is tied
    return ours, theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("per_layer_bias", [False, True], ids=["t5", "umt5"])
@pytest.mark.parametrize("length", [1, 7, 300])  # 300: beyond max_distance
def test_t5_equals_transformers(per_layer_bias, length):
    ours, theirs = t5_pair(per_layer_bias)
    ids = torch.randint(97, (3, length), generator=torch.Generator().manual_seed(1))
    assert_close(ours(ids), theirs(input_ids=ids).last_hidden_state)
    valid = (length + 1) // 2
    mask = torch.arange(length) < torch.tensor([[1], [valid], [length]])
    masked = ours(ids, mask)
    assert_close(masked, theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
    assert_close(masked[1:2, :valid], ours(ids[1:2, :valid]))  # a masked token is as good as absent


@torch.no_grad()
def test_t5_bfloat16_error_is_within_that_of_transformers():
    ours, theirs = t5_pair(per_layer_bias=False)
    ids = torch.randint(97, (4, 64), generator=torch.Generator().manual_seed(1))
    exact = ours.bfloat16().double()(ids)  # of the rounded weights
    error = (ours.bfloat16()(ids) - exact).norm()
    assert error <= 1.1 * (theirs.bfloat16()(input_ids=ids).last_hidden_state - exact).norm()
    assert error <= 0.05 * exact.norm()


def test_relative_position_buckets():
    buckets = relative_position_buckets(300, buckets=32, max_distance=128)
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]  # one distance each below 8
    assert buckets[0, [15, 16, 31, 32, 63, 64, 90, 91, 299]].tolist() == [25, 26, 27, 28, 29, 30, 30, 31, 31]
    assert torch.equal(buckets.tril(-1), (buckets - 16).triu(1).T)         # the same towards earlier keys


@torch.no_grad()
def test_clip_equals_transformers():
    transformers = pytest.importorskip("transformers")
    ours = randomise(CLIPTextEncoder(CLIPConfig(99, dim=48, heads=4, ff=80, layers=3)))
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        hidden_act="quick_gelu", bos_token_id=97, eos_token_id=98, pad_token_id=98)).eval()
    prefixed = any(name.startswith("text_model.") for name in theirs.state_dict())  # until transformers 5
    theirs.load_state_dict({name.removeprefix("" if prefixed else "text_model."): p for name, p in ours.state_dict().items()})
    ids = torch.randint(97, (3, 77), generator=torch.Generator().manual_seed(1))
    for row, end in zip(ids, (1, 40, 76)):
        row[end:] = 98  # the end of the text, then padding with the same id
    hidden, pooled = ours(ids)
    want = theirs(input_ids=ids)
    assert_close(hidden, want.last_hidden_state)
    assert_close(pooled, want.pooler_output)
    assert_close(ours(ids[:2, :41])[1], pooled[:2])  # padding does not reach the pooled state


def test_clip_rejects_a_prompt_longer_than_its_positions():
    with pytest.raises(ValueError, match="12 tokens.* 9 positions"):
        CLIPTextEncoder(CLIPConfig(99, dim=8, heads=2, ff=8, layers=1, length=9))(torch.zeros(1, 12, dtype=torch.long))


@pytest.mark.parametrize("checkpoint, encoder, config", [
    ("t5_v1_1_xxl_encoder", T5Encoder, T5_XXL), ("umt5_xxl_encoder", T5Encoder, UMT5_XXL),
    ("clip_l_text", CLIPTextEncoder, CLIP_L)])
def test_text_encoders_have_the_published_names_and_shapes(checkpoint, encoder, config):
    file = CHECKPOINTS / f"{checkpoint}.json"
    if not file.exists():
        pytest.skip(f"no {file}")
    redundant = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids"}  # in some exports only
    published = json.loads(file.read_text())["tensors"]
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in encoder(config).state_dict().items()}
    assert shapes == {name: shape for name, shape in published.items() if name not in redundant}


# -------------------------------------------------------------------------------------- tokenizers

@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """vocab.json and merges.txt as CLIP orders them: bytes, bytes ending a word, merges, start, end."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>"))
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ð"})  # without byte D0, as in "ж", to have an unknown
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    words = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    folder = tmp_path_factory.mktemp("clip")
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words + ["<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory):
    """A tokenizer.json built like T5's, with a truncation and a padding set that must not matter."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    file = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("length", [2, 8, 77])
def test_clip_tokenizer_equals_transformers(clip_folder, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(clip_folder)
    ours = load_clip_tokenizer(clip_folder)
    end = ours.token_to_id("<|endoftext|>")
    assert end == ours.get_vocab_size() - 1 == theirs.eos_token_id
    ids, mask, cut = tokenize(ours, PROMPTS, length, pad_id=end)
    want = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(ids, want.input_ids)
    assert torch.equal(mask, want.attention_mask.bool())
    assert cut == [max(0, len(prompt) - length) for prompt in theirs(PROMPTS).input_ids]


def test_clip_tokenizer_words(clip_folder):
    def tokens(prompt):
        return load_clip_tokenizer(clip_folder).encode(prompt, add_special_tokens=False).tokens

    assert tokens("A  RED\n circle") == ["a</w>", "red</w>", "circle</w>"]
    assert tokens("10!!")[:2] == ["1</w>", "0</w>"]
    assert tokens("") == []


@pytest.mark.parametrize("length", [1, 8, 256])
def test_t5_tokenizer_equals_transformers(t5_file, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(t5_file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    ids, mask, cut = tokenize(load_t5_tokenizer(t5_file), PROMPTS, length, pad_id=0)
    want = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(ids, want.input_ids)
    assert torch.equal(mask, want.attention_mask.bool())
    assert cut == [max(0, len(prompt) - length) for prompt in theirs(PROMPTS).input_ids]


def test_tokenize_cuts_and_pads(t5_file):
    tokenizer = load_t5_tokenizer(t5_file)
    before = tokenizer.to_str()
    full = tokenizer.encode("a small red circle").ids
    n = len(full)
    ids, mask, cut = tokenize(tokenizer, ["a small red circle", ""], n - 2, pad_id=0)
    assert ids.tolist() == [full[:n - 3] + [1], [1] + [0] * (n - 3)]
    assert mask.sum(1).tolist() == [n - 2, 1] and cut == [2, 0]
    ids, mask, cut = tokenize(tokenizer, ["a small red circle"], n, pad_id=0)
    assert ids[0].tolist() == full and mask.all() and cut == [0]
    ids, mask, cut = tokenize(tokenizer, [], 4, pad_id=0)
    assert ids.shape == mask.shape == (0, 4) and ids.dtype == torch.int64 and mask.dtype == torch.bool and cut == []
    with pytest.raises(ValueError, match="0 tokens"):
        tokenize(tokenizer, ["a"], 0, pad_id=0)
    assert tokenizer.to_str() == before
