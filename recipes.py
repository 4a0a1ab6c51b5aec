"""What train_tiny.py trains: for each embedded model its tokenizers, its stages, and what it does in its own way."""
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import flux_chipmunk
import hunyuan_chipmunk
import scenes
import wan_chipmunk
from text_encoders import load_clip_tokenizer, load_t5_tokenizer, tokenize

# ---------------------------------------------------------------------------------------------------------
# tokenizers, laid out as the big repositories'. Every printable character has a token: any prompt can be read


def make_unigram(folder, captions, special, template):
    """A T5-like tokenizer.json that knows the captions' words and spells others. Its special tokens come first, the
    first is the padding; template puts some around the text."""
    words = Counter(word for caption in captions for word in re.findall("[a-z]+", caption.lower()))
    vocab = [(token, 0.0) for token in special]
    vocab += [(f"▁{word}", math.log(count / words.total())) for word, count in words.most_common()]
    vocab += [(letter, -20.0) for letter in ("▁", *map(chr, range(33, 127)))]    # a word as a whole is likelier
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=special.index("<unk>")))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    around = [(token, special.index(token)) for token in template.split() if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    return load_t5_tokenizer(folder / "tokenizer.json")


def train_bpe(folder, captions, vocab):
    """A CLIP-like vocab.json and merges.txt (byte-level BPE) from captions."""
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    clip.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    clip.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab - 514, end_of_word_suffix="</w>", special_tokens=[]))
    merges = json.loads(clip.to_str())["model"]["merges"]                        # pairs of tokens
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return load_clip_tokenizer(folder)

# ---------------------------------------------------------------------------------------------------------
# what differs between the models


@dataclass(frozen=True)
class Stage:
    name: str
    size: int                  # pixels of a picture's side
    scenes: int                # distinct ones
    batch: int
    steps: int
    lr: tuple                  # first and last, linear between, after a short warm-up
    frames: int = 0            # of a video; 0: pictures
    crop: int = 0              # side of the squares that an autoencoder learns from, pixels
    text: int = 0              # tokens of text that a transformer reads; more are cut off
    guidance: float = 0.0      # the most that the student learns; 0: no distillation
    ema: float = 0.999         # decay of the averaged weights
    more: tuple = ()           # shapes that its scenes show more often than the others

    @property
    def grid(self):
        """(h, w) or (t, h, w) in tokens."""
        side = self.size // 16
        return (1 + self.frames // 4, side, side) if self.frames else (side, side)


@dataclass(frozen=True)
class Recipe:
    """What one model does in its own way."""
    program: object            # the model's file
    files: dict                # part -> its safetensors file
    autoencoder: str           # which part that is
    painters: tuple            # the parts that are trained together: the transformer and its text encoders
    zero: str                  # pattern of the transformer's parameters that start at zero: blocks that do nothing yet
    stages: tuple              # of Stage: the autoencoder's, then the painters'
    make_scene: Callable       # (rng, train, plain, more) -> Scene
    make_reader: Callable      # (folder, captions, config), writes tokenizers -> read(B prompts, length) -> (B, L), ...
    encode: Callable           # (autoencoder, pictures) -> mean and log variance of the latents (B, 2 z, ...)
    make_layout: Callable      # (config, stage, device) -> the model's layout
    velocity: Callable         # (painters, latents, t, what `read` gave, guidance, layout) -> shaped as the latents
    middle: str                # the transformer's block that tells outlines
    text_first: bool           # do that block's tokens begin with the text?


def flux_reader(folder, captions, config):
    t5 = make_unigram(folder / "tokenizer_2", captions, ["<pad>", "</s>", "<unk>"], "$A </s>")
    clip = train_bpe(folder / "tokenizer", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts, length):
        return tokenize(t5, prompts, length, 0)[0], tokenize(clip, prompts, config.clip.length, end)[0]
    return read


def flux_velocity(painters, x, t, tokens, guidance, layout):
    t5_ids, clip_ids = tokens
    text, pooled = painters.t5(t5_ids), painters.clip(clip_ids)[1]
    v = painters.flux(flux_chipmunk.patchify(x), t, text, pooled, guidance, layout)
    return flux_chipmunk.unpatchify(v, x.shape[2] // 2, x.shape[3] // 2)


def wan_reader(folder, captions, config):
    umt5 = make_unigram(folder / "tokenizer", captions, ["<pad>", "</s>", "<unk>"], "$A </s>")
    return lambda prompts, length: tokenize(umt5, prompts, length, 0)[:2]


def wan_velocity(painters, x, t, tokens, guidance, layout):
    ids, mask = tokens
    return painters.wan(x, 1000 * t, painters.umt5(ids, mask) * mask[..., None], layout)


def hunyuan_reader(folder, captions, config):
    special = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<unk>"]
    llama = make_unigram(folder / "tokenizer", captions, special, "<|begin_of_text|> $A")
    clip = train_bpe(folder / "tokenizer_2", captions, config.clip.vocab)
    end = clip.token_to_id("<|endoftext|>")

    def read(prompts, length):
        texts = [config.template.format(prompt) for prompt in prompts]
        ids, mask, _ = tokenize(llama, texts, config.crop + length, 0)
        return ids, mask[:, config.crop:], tokenize(clip, prompts, config.clip.length, end)[0]
    return read


def hunyuan_velocity(painters, x, t, tokens, guidance, layout):
    llama_ids, mask, clip_ids = tokens
    text, pooled = painters.llama(llama_ids)[:, -mask.shape[1]:], painters.clip(clip_ids)[1]
    return painters.hunyuan(x, t, text, pooled, guidance, layout, mask)


HARDEST = "house", "house", "star"     # for FLUX.1 to learn, by what it drew wrong after its first guided stage

RECIPES = {
    "flux": Recipe(
        program=flux_chipmunk, files={part: file for part, (file,) in flux_chipmunk.CONFIGS["tiny"].files.items()},
        autoencoder="autoencoder", painters=("flux", "t5", "clip"), zero=r"\.lin\.|final_layer",
        stages=(Stage("autoencoder", 512, 3_000, 32, 1_200, (1e-3, 1e-5), crop=256),
                Stage("flow 128", 128, 60_000, 2048, 1_500, (1e-3, 1e-3), text=32),
                Stage("flow 256", 256, 50_000, 512, 5_000, (1e-3, 1e-3), text=32),
                Stage("flow 512", 512, 60_000, 256, 33_388, (1e-3, 2e-5), text=128),
                Stage("guided 512", 512, 60_000, 256, 750, (3e-4, 0.0), text=128, guidance=5.0, ema=0.99),
                Stage("flow 512 again", 512, 60_000, 128, 21_925, (5e-4, 1e-5), text=128, more=HARDEST),
                Stage("guided 512 again", 512, 60_000, 256, 750, (3e-4, 0.0), text=128, guidance=5.0, ema=0.99,
                      more=HARDEST)),
        make_scene=scenes.make_scene, make_reader=flux_reader, velocity=flux_velocity,
        middle="single_blocks.1", text_first=True,
        encode=lambda autoencoder, pictures: autoencoder.encoder(pictures),
        make_layout=lambda config, stage, device:
            flux_chipmunk.make_layout(config.flux, *stage.grid, stage.text, device)),
    "wan": Recipe(
        program=wan_chipmunk, files=wan_chipmunk.FILES, autoencoder="vae", painters=("wan", "umt5"),
        zero=r"time_proj|scale_shift_table|attn2\.to_out|^proj_out",
        stages=(Stage("autoencoder 1", 256, 6_000, 64, 800, (1e-3, 1e-3), frames=1, crop=128),
                Stage("autoencoder 17", 256, 1_200, 8, 5_200, (1e-3, 1e-5), frames=17, crop=128),
                Stage("pictures 128", 128, 60_000, 2048, 1_500, (1e-3, 1e-3), frames=1, text=64),
                Stage("pictures 256", 256, 50_000, 512, 5_000, (1e-3, 1e-3), frames=1, text=64),
                Stage("flow 256", 256, 40_000, 256, 7_500, (1e-3, 1e-5), frames=17, text=64)),
        make_scene=scenes.make_moving_scene, make_reader=wan_reader, velocity=wan_velocity,
        middle="blocks.3", text_first=False,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos, {})),
        make_layout=lambda config, stage, device:
            wan_chipmunk.make_layout(config.wan, stage.grid, config.window, device)),
    "hunyuan": Recipe(
        program=hunyuan_chipmunk, files=hunyuan_chipmunk.FILES, autoencoder="vae",
        painters=("hunyuan", "llama", "clip"), zero=r"norm1(_context)?\.linear|norm\.linear|norm_out\.linear|^proj_out",
        stages=(Stage("autoencoder 1", 256, 6_000, 128, 900, (1e-3, 1e-3), frames=1, crop=128),
                Stage("autoencoder 17", 256, 1_200, 16, 3_500, (1e-3, 1e-5), frames=17, crop=128),
                Stage("pictures 128", 128, 60_000, 2048, 1_500, (1e-3, 1e-3), frames=1, text=32),
                Stage("pictures 256", 256, 50_000, 512, 2_200, (1e-3, 1e-3), frames=1, text=32),
                Stage("flow 256", 256, 40_000, 256, 22_084, (1e-3, 2e-5), frames=17, text=32),
                Stage("guided 256", 256, 40_000, 128, 750, (3e-4, 0.0), frames=17, text=32, guidance=7.0, ema=0.99)),
        make_scene=scenes.make_moving_scene, make_reader=hunyuan_reader, velocity=hunyuan_velocity,
        middle="single_transformer_blocks.2", text_first=False,
        encode=lambda vae, videos: vae.quant_conv(vae.encoder(videos)),
        make_layout=lambda config, stage, device:
            hunyuan_chipmunk.make_layout(config.hunyuan, stage.grid, stage.text, device))}
