"""
Text encoders: a prompt becomes the states that a diffusion transformer reads.

    T5Encoder        FLUX.1 (T5 v1.1 XXL) and Wan2.1 (UMT5 XXL): one state per token
    CLIPTextEncoder  FLUX.1 and HunyuanVideo (CLIP-L): one pooled state per prompt
    LlamaEncoder     HunyuanVideo (Llama 3 8B, as LLaVA tuned it): one state per token
    tokenize         prompts -> ids, with load_t5_tokenizer (Llama's too) or load_clip_tokenizer

    ids, mask, cut = tokenize(load_t5_tokenizer("tokenizer_2/tokenizer.json"), ["a cat"], length=512, pad_id=0)
    states = T5Encoder(T5_XXL)(ids)  # (1, 512, 4096)

Parameters are named as in the Hub's safetensors files. Some exports repeat encoder.embed_tokens.weight
(shared.weight again) or carry text_model.embeddings.position_ids (0 to 76): a loader drops these two.

Shapes: B prompts, L tokens, C channels (dim), H heads, D channels of a head.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn


@dataclass(frozen=True)
class T5Config:
    vocab: int
    dim: int
    heads: int
    head_dim: int
    ff: int
    layers: int
    buckets: int = 32             # of relative positions, half of them for each direction
    max_distance: int = 128       # from here on every distance falls into the last bucket
    per_layer_bias: bool = False  # False: T5, the position bias of block 0 serves all; True: UMT5, each has its own


@dataclass(frozen=True)
class CLIPConfig:
    vocab: int
    dim: int
    heads: int
    ff: int
    layers: int
    length: int = 77  # positions, so the longest prompt


@dataclass(frozen=True)
class LlamaConfig:
    vocab: int
    dim: int
    heads: int                    # of queries
    kv_heads: int                 # of keys and values, each shared by heads / kv_heads query heads
    ff: int
    layers: int
    theta: float = 500000.0       # RoPE's base


T5_XXL = T5Config(vocab=32128, dim=4096, heads=64, head_dim=64, ff=10240, layers=24)
UMT5_XXL = T5Config(vocab=256384, dim=4096, heads=64, head_dim=64, ff=10240, layers=24, per_layer_bias=True)
CLIP_L = CLIPConfig(vocab=49408, dim=768, heads=12, ff=3072, layers=12)
LLAMA_8B = LlamaConfig(vocab=128320, dim=4096, heads=32, kv_heads=8, ff=14336, layers=32)


def relative_position_buckets(length, buckets, max_distance, device=None):
    """
    Bucket of each (query, key) pair by signed distance (T5, arXiv 1910.10683, section 2.1). A direction has
    n = buckets / 2 of them: the first n / 2 hold one distance each, the rest widen up to max_distance.

    Returns (length, length) int64 in [0, buckets), the upper half for keys that come after the query.
    """
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # (L, L) key - query
    distance = offset.abs()
    n = buckets // 2
    exact = n // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # 1 at max_distance
    far = (exact + (growth * (n - exact)).long()).clamp(max=n - 1)
    return torch.where(distance < exact, distance, far) + n * (offset > 0)


class T5Block(nn.Module):
    def __init__(self, config, has_bias):
        super().__init__()
        self.head_dim = config.head_dim
        C, HD, ff = config.dim, config.heads * config.head_dim, config.ff
        attention = nn.ModuleDict({name: nn.Linear(C, HD, bias=False) for name in ("q", "k", "v")})
        attention["o"] = nn.Linear(HD, C, bias=False)
        if has_bias:
            attention["relative_attention_bias"] = nn.Embedding(config.buckets, config.heads)
        mlp = nn.ModuleDict({name: nn.Linear(C, ff, bias=False) for name in ("wi_0", "wi_1")})
        mlp["wo"] = nn.Linear(ff, C, bias=False)
        self.layer = nn.ModuleList([
            nn.ModuleDict({"layer_norm": nn.RMSNorm(C, eps=1e-6), "SelfAttention": attention}),
            nn.ModuleDict({"layer_norm": nn.RMSNorm(C, eps=1e-6), "DenseReluDense": mlp})])

    def position_bias(self, buckets, mask):
        """buckets (L, L), mask (B, L) or None -> what to add to the attention scores (B or 1, H, L, L)."""
        bias = self.layer[0].SelfAttention.relative_attention_bias(buckets)  # (L, L, H)
        bias = bias.permute(2, 0, 1)[None].contiguous()                      # (1, H, L, L)
        if mask is None:
            return bias
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)  # (B, H, L, L)

    def forward(self, x, bias):
        h, attention = self.layer[0].layer_norm(x), self.layer[0].SelfAttention
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (attention.q, attention.k, attention.v))         # (B, H, L, D)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 does not divide by sqrt(D)
        x = x + attention.o(o.transpose(1, 2).flatten(2))                       # (B, L, C)
        h, mlp = self.layer[1].layer_norm(x), self.layer[1].DenseReluDense
        return x + mlp.wo(F.gelu(mlp.wi_0(h), approximate="tanh") * mlp.wi_1(h))  # (B, L, C)


class T5Encoder(nn.Module):
    """
    The encoder half of T5 v1.1 or UMT5, in float32 or bfloat16 (the XXL models overflow float16). Norms and
    softmax compute in float32 either way.

    ids (B, L) int64, mask (B, L) bool, True at the tokens to attend to -> (B, L, dim), the last hidden
    state after the final norm. Without a mask padding is attended to as well: FLUX.1 wants that.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab, config.dim)
        blocks = nn.ModuleList(T5Block(config, i == 0 or config.per_layer_bias) for i in range(config.layers))
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": nn.RMSNorm(config.dim, eps=1e-6)})

    def forward(self, ids, mask=None):
        buckets = relative_position_buckets(ids.shape[1], self.config.buckets, self.config.max_distance, ids.device)
        x = self.shared(ids)  # (B, L, C)
        for i, block in enumerate(self.encoder.block):
            if i == 0 or self.config.per_layer_bias:
                bias = block.position_bias(buckets, mask)  # (B or 1, H, L, L)
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


class CLIPLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        C, ff = config.dim, config.ff
        self.layer_norm1 = nn.LayerNorm(C, eps=1e-5)
        self.self_attn = nn.ModuleDict({name: nn.Linear(C, C) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(C, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, ff), "fc2": nn.Linear(ff, C)})

    def forward(self, x):
        h, attention = self.layer_norm1(x), self.self_attn
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (attention.q_proj, attention.k_proj, attention.v_proj))  # (B, H, L, D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.out_proj(o.transpose(1, 2).flatten(2))                        # (B, L, C)
        h = self.mlp.fc1(self.layer_norm2(x))                                           # (B, L, ff)
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))                           # (B, L, C), OpenAI's quick_gelu


class CLIPTextEncoder(nn.Module):
    """
    The text half of CLIP.

    ids (B, L) int64, L <= config.length -> hidden (B, L, dim) after the final norm, and pooled (B, dim),
    hidden at the first end-of-text token. Attention is causal, so the padding behind that token cannot
    reach pooled and there is no mask. Raises ValueError if L is too long.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocab, config.dim),
                "position_embedding": nn.Embedding(config.length, config.dim)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))}),
            "final_layer_norm": nn.LayerNorm(config.dim, eps=1e-5)})

    def forward(self, ids):
        B, L = ids.shape
        if L > self.config.length:
            raise ValueError(f"{L} tokens, but this CLIP has {self.config.length} positions")
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[:L]  # (B, L, C)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        hidden = self.text_model.final_layer_norm(x)
        # End of text is the highest id of OpenAI's vocabulary. It is also the padding: argmax takes the first.
        pooled = hidden[torch.arange(B, device=ids.device), ids.argmax(dim=-1)]  # (B, C)
        return hidden, pooled


class LlamaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.dim // config.heads
        C, ff, kv = config.dim, config.ff, config.kv_heads * self.head_dim
        self.input_layernorm = nn.RMSNorm(C, eps=1e-5)
        self.self_attn = nn.ModuleDict({name: nn.Linear(C, out, bias=False) for name, out in (
            ("q_proj", C), ("k_proj", kv), ("v_proj", kv), ("o_proj", C))})
        self.post_attention_layernorm = nn.RMSNorm(C, eps=1e-5)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(C, ff, bias=False), "up_proj": nn.Linear(C, ff, bias=False),
                                  "down_proj": nn.Linear(ff, C, bias=False)})

    def forward(self, x, rope):
        h, attention, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (attention.q_proj, attention.k_proj, attention.v_proj))  # (B, H or H_kv, L, D) each
        q, k = rotate_halves(q, rope), rotate_halves(k, rope)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)    # (B, H, L, D)
        x = x + attention.o_proj(o.transpose(1, 2).flatten(2))                          # (B, L, C)
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))             # (B, L, C)


def rotate_halves(x, rope):
    """Rotate pairs (channel i, channel i + D / 2) of x (B, H, L, D) by cos, sin (L, D / 2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                                           # (B, H, L, D / 2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LlamaEncoder(nn.Module):
    """
    Llama 3 without its head, as an encoder.

    ids (B, L) int64 -> (B, L, dim), the states `skip` layers before the end, without the final norm (which
    the checkpoints carry all the same). Attention is causal, so padding behind the prompt cannot reach it and
    there is no mask; the states of the padding itself mean nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)

    def forward(self, ids, skip=2):
        x = self.embed_tokens(ids)                                                      # (B, L, C)
        D = self.config.dim // self.config.heads
        omega = self.config.theta ** -(torch.arange(0, D, 2, device=ids.device) / D)    # (D / 2,)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * omega         # (L, D / 2)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers[:len(self.layers) - skip]:
            x = layer(x, rope)
        return x


def load_t5_tokenizer(file):
    """The Tokenizer in a tokenizer.json, less any padding and truncation set there: tokenize does both."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_clip_tokenizer(folder):
    """
    CLIP's byte-level BPE as a Tokenizer, from vocab.json and merges.txt in folder: lower case, white space only
    separates, every word ends in </w>, <|startoftext|> and <|endoftext|> stand around the prompt.
    Source: simple_tokenizer.py of OpenAI's CLIP, without its repair of broken Unicode and HTML, and with control
    characters dropped and every Chinese character a word: as the CLIPTokenizer of transformers 4, which the original
    models were run with.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    # A word is an English ending, a run of letters, one digit, or a run of anything else but white space.
    words = r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges), unk_token=end, end_of_word_suffix="</w>"))
    clean = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    tokenizer.normalizer = normalizers.Sequence([clean, normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)])
    return tokenizer


def tokenize(tokenizer, prompts, length, pad_id):
    """
    Encode a list of B prompts to length tokens each. Short ones are padded on the right with pad_id (0 for T5,
    <|endoftext|> for CLIP), long ones lose the end of the text but keep the special tokens around it.

    Returns ids (B, length) int64; mask (B, length) bool, False at padding; cut, for each prompt the number of
    tokens it lost. Raises ValueError if the special tokens alone exceed length. Leaves tokenizer as it was.
    """
    room = length - tokenizer.num_special_tokens_to_add(is_pair=False)
    if room < 0:
        raise ValueError(f"no prompt fits into {length} tokens: {length - room} of them are special tokens")
    ids = torch.full((len(prompts), length), pad_id)            # (B, length)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)  # (B, length)
    cut = []
    for i, text in enumerate(tokenizer.encode_batch(prompts, add_special_tokens=False)):
        cut.append(max(0, len(text) - room))
        text.truncate(room)
        tokens = tokenizer.post_process(text).ids               # with the special tokens
        ids[i, :len(tokens)] = torch.tensor(tokens)
        mask[i, :len(tokens)] = True
    return ids, mask, cut
