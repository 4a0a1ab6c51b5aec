"""What the three model files share: the words of the command line, loading weights, writing results, errors.

Nothing of the method is here. A model file's main calls, in this order: make_parser and parse, check_memory and
check_weights, load_weights, denoise, write_png or write_video; and run calls main.
"""
import argparse
import json
import math
import os
import re
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from cache import SKIP_PRESETS, fit_steps, make_plan, skip_preset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Tensors that some exports carry twice or that are no weights; every other name must be the model's.
IGNORED = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids"}
VIDEO_SUFFIXES = (".mp4", ".webp", ".gif", ".png")

# ---------------------------------------------------------------------------------------------------------
# errors


class Fail(Exception):
    """Something the user can put right: its text, one line, says what is wrong and what to do."""


def note(text):
    """Tell the user about something that was adjusted."""
    print(f"note: {text}", file=sys.stderr)


def run(main):
    """Call main; a Fail, Ctrl-C or a lack of memory ends in one line on stderr and a non-zero exit."""
    try:
        main()
    except Fail as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                          # `... | head` closed our stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; --dense needs no caches, a smaller --width and --height need less of everything")

# ---------------------------------------------------------------------------------------------------------
# the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high):
    """An argparse type: a number from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number from {low} to {high}")
        return value
    return parse


def step_list(text):
    try:
        steps = tuple(int(s) for s in text.removesuffix(",").split(","))
    except ValueError:
        steps = (-1,)
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers like 1,2,4,7")
    return steps


def measure_steps(text):
    """"10": every tenth step. "1,2,4,7": those. "10,": step 10 alone."""
    steps = step_list(text)
    if steps == (0,) and "," not in text:
        raise argparse.ArgumentTypeError("'every 0 steps' means nothing; give a number from 1 or a list like 1,2,4,7")
    return steps if "," in text else steps[0]


def frame_count(text):
    """A video's length: its first frame stands alone, every four after it share one frame of latents."""
    frames = number(int, 1, 1001)(text)
    if frames % 4 != 1:
        below = frames // 4 * 4 + 1 if frames % 4 else frames - 3
        raise argparse.ArgumentTypeError(f"{text} frames cannot be made: take 4 n + 1, like {below} or {below + 4}")
    return frames


def skip_steps(text):
    return text if text in SKIP_PRESETS else step_list(text)


def make_parser(doc, configs, video=False):
    """The words that every model file takes, or every video model. -> parser, and its group of Chipmunk's own words, for a
    model to add to"""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--model", choices=list(configs), default="tiny",
        help="tiny: trained weights that come with this repository; others are downloaded (default: tiny)")
    add("--weights", metavar="DIR_OR_REPO", help="take the weights from this folder or Hugging Face repository instead")
    add("--width", type=number(int, 64, 2048), help="pixels, rounded to a multiple of 16 (default: the model's)")
    add("--height", type=number(int, 64, 2048), help="likewise")
    if video:
        add("--frames", type=frame_count, help="the video's length, 4 n + 1; 1 makes a picture (default: the model's)")
        add("--fps", type=number(int, 1, 120), help="frames per second (default: the model's)")
    add("--steps", type=number(int, 1, 1000), help="denoising steps (default: the model's)")
    add("--guidance", type=number(float, 0, 100), help="how strictly to follow the prompt (default: the model's)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, same machine: same file (default: 0)")
    kinds = f" ({', '.join(VIDEO_SUFFIXES)}: every fourth frame)" if video else ""
    add("--out", type=Path, help=f"file to write{kinds}, replaced if it is there (default: a new name in this folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", choices=list(DTYPES), help="default: bfloat16; float32 for tiny on a CPU")
    chipmunk = parser.add_argument_group("Chipmunk", "what to recompute, and when (defaults: the model's preset)")
    add = chipmunk.add_argument
    add("--dense", action="store_true", help="recompute everything at every step: the plain model")
    add("--compare", action="store_true", help="dense and Chipmunk from the same noise, side by side, with PSNR, SSIM and both times")
    add("--delta", choices=["mass", "paper"], help="how the remembered part of attention is added (cache.py)")
    add("--attn-keys", type=number(float, 0, 1), metavar="SHARE", help="attention columns recomputed at a sparse step, 0 to 1")
    add("--measure-steps", type=measure_steps, metavar="N|LIST",
        help="choose attention columns anew every N steps, or at the listed steps (1,2,4,7; a single one: 5,)")
    add("--skip-steps", type=skip_steps, metavar="LIST|NAME",
        help=f"step caching: these steps rerun only the final layer; a list, or one of {', '.join(SKIP_PRESETS)}")
    add("--show-plan", action="store_true", help="print what every step does, then stop")
    return parser, chipmunk


def parse(parser, configs, stem):
    """The command line, read and checked -> args, config. args then says what will be done: the model's own values where the
    user gave none, device and dtype as torch's, and beside the words sparsity, plan (None: dense) and folder, where the
    weights are. stem: of the default file name. --show-plan prints the plan and ends the program."""
    args = parser.parse_args()
    config = configs[args.model]
    for name in ("width", "height", "frames", "fps", "steps", "guidance", "negative_prompt"):
        if name in args and getattr(args, name) is None:
            setattr(args, name, getattr(config, name))
    args.sparsity = chosen_sparsity(args, config.sparsity, config.steps)
    args.plan = None if args.dense else make_plan(args.steps, args.sparsity)
    if args.show_plan:
        show_plan(args.plan or make_plan(args.steps, replace(args.sparsity, measure=(), skip=())))
        sys.exit()
    check_prompt(args.prompt, args.negative_prompt if "negative_prompt" in args else "")
    if args.dense and args.compare:
        raise Fail("--dense and --compare exclude each other; --compare draws both")
    args.width, args.height = round_size("width", args.width), round_size("height", args.height)
    args.device = pick_device(args.device)
    args.dtype = DTYPES[args.dtype or ("float32" if args.model == "tiny" and args.device.type == "cpu" else "bfloat16")]
    args.folder = args.weights or (Path(__file__).parent / config.weights if args.model == "tiny" else config.weights)
    args.out = check_out(args.out, stem, VIDEO_SUFFIXES if "frames" in args and args.frames > 1 else (".png",))
    return args, config


def chosen_sparsity(args, sparsity, made_for):
    """The preset, which lists steps of a run of `made_for`, for this run, with what the command line says instead.
    Raises Fail where a listed step cannot be had."""
    said = {"delta": args.delta, "attn_keys": args.attn_keys, "mlp_keys": args.mlp_keys if "mlp_keys" in args else None,
            "measure": args.measure_steps, "skip": args.skip_steps}
    for word, listed in ("--measure-steps", args.measure_steps), ("--skip-steps", args.skip_steps):
        if isinstance(listed, tuple) and max(listed) >= args.steps:
            raise Fail(f"{word} {max(listed)}: this run has the steps 0 to {args.steps - 1}")
    if isinstance(args.skip_steps, tuple) and 0 in args.skip_steps:
        raise Fail("step 0 cannot be skipped: there is nothing to reuse yet; leave 0 out of --skip-steps")
    sparsity = replace(fit_steps(sparsity, args.steps, made_for), **{name: value for name, value in said.items() if value is not None})
    return replace(sparsity, skip=skip_preset(sparsity.skip, args.steps)) if isinstance(sparsity.skip, str) else sparsity


def show_plan(plan):
    print("step  attention  MLP")
    for step in plan:
        print(f"{step.index:4}  {step.attn:9}  {step.mlp}")


def round_size(name, pixels, multiple=16):
    rounded = max(multiple, round(pixels / multiple) * multiple)
    if rounded != pixels:
        note(f"{name} {pixels} rounded to {rounded}, a multiple of {multiple}")
    return rounded


def check_prompt(prompt, negative=""):
    """Raises Fail where there is nothing to draw."""
    if not (prompt or "").strip():
        raise Fail('no prompt; say what to draw: --prompt "a red circle on a blue background"')
    try:
        (prompt + negative).encode()
    except UnicodeEncodeError:
        raise Fail("the prompt is no valid UTF-8; check the terminal's encoding") from None


def pick_device(text):
    """cpu or a CUDA GPU. Raises Fail where it is not there."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Fail(f"no device {text!r} to run on here; try --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                                # the one that Triton launches on
    return device if device.type == "cuda" else torch.device("cpu")  # cpu:1 is the same, but safetensors does not know it

# ---------------------------------------------------------------------------------------------------------
# weights


def reason(error):
    """The first line of an error from a library."""
    return (str(error) or type(error).__name__).splitlines()[0]


def weight_files(weights, names):
    """Paths of the named files in a folder or Hugging Face repository (downloaded to its cache, with progress bars).
    Raises Fail where one is missing, access is not granted or there is no network."""
    if os.path.isdir(weights):
        for name in names:
            if not os.path.isfile(Path(weights) / name):
                raise Fail(f"{weights} has no {name}; --weights wants a folder laid out like the model's repository")
        return [Path(weights) / name for name in names]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
        raise Fail(f"no folder {weights}; --weights wants a folder, or a Hugging Face repository like owner/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()                                    # its retries would bury the one line below
    try:
        return [Path(hf_hub_download(str(weights), name)) for name in names]
    except GatedRepoError:
        raise Fail(f"{weights} is gated: accept its licence at https://huggingface.co/{weights}, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Fail(f"no folder and no Hugging Face repository {weights} (or it is private: log in with `hf auth login`)") from None
    except LocalEntryNotFoundError:
        raise Fail(f"cannot reach the Hugging Face Hub to download {weights}; check the network, or give a folder with --weights") from None
    except EntryNotFoundError as error:
        raise Fail(f"{weights} lacks a file that this model needs: {reason(error)}") from None
    except Exception as error:                                       # names it rejects, broken connections, full disks: many kinds
        raise Fail(f"downloading {weights} failed ({reason(error)}); run again to go on, or give a folder with --weights") from None


def sharded_files(weights, name):
    """Paths of a file that may come in shards: those that name.index.json lists, or the file itself."""
    try:
        index, = weight_files(weights, [f"{name}.index.json"])
    except Fail:                                                     # no index, no network, ...: the file itself will tell
        return weight_files(weights, [name])
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Fail(f"{index} is no list of shards; fetch it again") from None
    return weight_files(weights, [f"{name.rpartition('/')[0]}/{shard}" for shard in shards])


def load_tokenizer(load, path):
    """load(path), or Fail where the file is damaged."""
    try:
        return load(path)
    except Exception as error:                                       # the tokenizers library raises nothing narrower
        raise Fail(f"{path} is no tokenizer that can be read ({reason(error)}); fetch it again") from None


def read_headers(files):
    """{tensor name: (file, shape)} over safetensors files. Raises Fail where one is damaged or of another format."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in set(tensors.keys()) - IGNORED:
                    if name in found:
                        raise Fail(f"{file} repeats {name}, which {found[name][0]} has; fetch both again")
                    found[name] = file, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise Fail(f"{file} is no complete safetensors file ({reason(error)}); fetch it again") from None
    return found


def check_weights(make_model, files):
    """Raises Fail where files are not exactly the model's: names the file and the first tensor that differs."""
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in make_model().state_dict().items()}
    found = read_headers(files)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise Fail(f"{files[0]} is not this model's: it lacks the tensor {name}; check --model and --weights")
        file, shape = found[name]
        if name not in expected:
            raise Fail(f"{file} is not this model's: it has a tensor {name} too many; check --model and --weights")
        if shape != expected[name]:
            raise Fail(f"{file} is not this model's: {name} is {list(shape)}, not {list(expected[name])}; check --model and --weights")


def load_weights(make_model, files, device, dtype, float32=()):
    """A model with the weights in files, tensor by tensor, so that there is never a second copy.

    make_model() -> module, built without memory. float32: parts of names of those that are float32 whatever dtype says.
    Strict: every tensor is used once and has the right shape, none is left over (check_weights)."""
    check_weights(make_model, files)
    with torch.device("meta"):
        model = make_model()
    for file in files:
        with safe_open(file, "pt", device=str(device)) as tensors:
            for name in set(tensors.keys()) - IGNORED:
                parent, _, leaf = name.rpartition(".")
                tensor = tensors.get_tensor(name).to(torch.float32 if any(part in name for part in float32) else dtype)
                setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def check_memory(make_model, dtype, device, caches=0):
    """Raises Fail, before anything is downloaded, where a model's weights and `caches` bytes do not fit."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_model().parameters()) * dtype.itemsize
    free = free_memory(device)
    if free is not None and weights + caches > free:
        less = "--dense (no caches)" if weights < free else "--dtype bfloat16" if dtype == torch.float32 else "--model tiny or a larger machine"
        raise Fail(f"{device} has {free / 1e9:.2f} GB free, but this needs {(weights + caches) / 1e9:.2f} GB "
                   f"({weights / 1e9:.2f} of weights, {caches / 1e9:.2f} of caches); {less} helps")


def free_memory(device):
    """Bytes that can be allocated on a device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        return None
    try:                                                             # a container's own limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except OSError:
        return free

# ---------------------------------------------------------------------------------------------------------
# results


def denoise(sample, args):
    """Run sample(plan, progress) -> latents, state as args say, and for --compare densely as well.
    -> latents, state, seconds, and the dense latents and their seconds (or None, None)"""
    def timed(plan, title):
        start = time.perf_counter()
        x, state = sample(plan, lambda steps: tqdm(steps, title, leave=False))
        x.sum().item()                                               # wait for the device
        return x, state, time.perf_counter() - start
    if not args.compare:
        return *timed(args.plan, "denoising"), None, None
    if args.device.type == "cuda":                                   # compile every kernel first, so that both times are fair
        first_sparse = next((step.index for step in args.plan if step.attn == "sparse"), 0)
        timed(args.plan[:first_sparse + 1], "warming up")
        timed(None, "warming up")
    result = timed(args.plan, "denoising")
    dense, _, dense_seconds = timed(None, "dense")
    return *result, dense, dense_seconds


def check_out(out, stem, suffixes):
    """The file to write: `out`, or the first free name stem.png, stem-2.png, ... in this folder.
    Raises Fail, before any work is done, where it cannot be written."""
    if out is None:
        names = (Path(f"{stem}{'' if i == 1 else f'-{i}'}{suffixes[0]}") for i in range(1, sys.maxsize))
        out = next(name for name in names if not name.exists())
    if out.suffix.lower() not in suffixes:
        raise Fail(f"--out {out}: the name must end in {' or '.join(suffixes)}")
    if os.path.isdir(out) or not os.path.isdir(out.parent):
        raise Fail(f"--out {out}: {'this is a folder' if os.path.isdir(out) else f'there is no folder {out.parent}; make it first'}")
    if len(os.fsencode(out.name)) > 240:
        raise Fail(f"--out {out.name[:40]}...: the name is too long; take a shorter one")
    try:                                                             # a permission bit does not tell what the system allows
        temporary_name(out).touch()
        temporary_name(out).unlink()
    except OSError:
        raise Fail(f"--out {out}: the folder {out.parent} cannot be written; choose another") from None
    return out


def temporary_name(file):
    """Where a file is written before it gets its name."""
    return file.with_name(f".{file.name}.tmp")


def write_png(file, picture, texts):
    """Write picture (3, H, W), values in -1..1, with texts {key: str} in its text chunks; whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with whole_file(file) as temporary:
        Image.fromarray(to_bytes(picture)).save(temporary, format="PNG", pnginfo=info)


def write_video(file, frames, fps, texts):
    """Write frames (T, 3, H, W), or one (3, H, W) at a time, values in -1..1, as .mp4, .webp or .gif, or every
    fourth side by side as .png, with texts {key: str} in its metadata; whole or not at all. H and W are even."""
    if file.suffix.lower() == ".png":
        return write_png(file, torch.cat(list(islice(frames, 0, None, 4)), dim=2), texts)        # (3, H, W times frames)
    pixels = (to_bytes(frame) for frame in frames)
    with whole_file(file) as temporary:
        if file.suffix.lower() == ".mp4":
            write_mp4(temporary, pixels, fps, texts)
        else:
            write_animation(temporary, pixels, fps, texts, file.suffix[1:].upper())


def write_mp4(file, frames, fps, texts):
    """H.264 that browsers and phones play, index in front; BT.709 colours, and says so. frames: (H, W, 3) uint8 arrays."""
    import av
    first = next(frames)
    with av.open(str(file), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as video:
        video.metadata.update(texts)
        stream = video.add_stream("libx264", rate=fps, options={"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        context, bt709 = stream.codec_context, 1
        context.colorspace = context.color_primaries = context.color_trc = bt709
        for pixels in chain([first], frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            video.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        video.mux(stream.encode())                                   # what the encoder still holds


def write_animation(file, frames, fps, texts, kind):
    """A lossless WEBP, or a GIF; it plays for ever. The texts are JSON in its EXIF description, or in its comment."""
    from PIL import Image
    pictures = (Image.fromarray(pixels) for pixels in frames)
    exif, description = Image.Exif(), 0x010E
    exif[description] = json.dumps(texts)
    extra = {"exif": exif, "lossless": True} if kind == "WEBP" else {"comment": json.dumps(texts)}
    next(pictures).save(file, format=kind, save_all=True, append_images=pictures, duration=1000 / fps, loop=0, **extra)


def to_bytes(picture):
    """(3, H, W), values in -1..1 -> (H, W, 3) uint8 array, truncated as the originals do."""
    return (127.5 * (picture.float().clamp(-1, 1) + 1)).byte().permute(1, 2, 0).contiguous().cpu().numpy()


@contextmanager
def whole_file(file):
    """A temporary name to write to, which becomes `file` where that went well and is removed where not."""
    temporary = temporary_name(file)
    try:
        yield temporary
        temporary.replace(file)
    except OSError as error:                                         # PyAV's are OSErrors too
        raise Fail(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def settings(args):
    """Every word of the command line that makes the same result again. -> {word: value}"""
    words = ("model", "weights", "negative_prompt", "width", "height", "frames", "fps", "steps", "guidance", "seed", "dense", "compare")
    said = {word.replace("_", "-"): getattr(args, word) for word in words if word in args and getattr(args, word) is not None}
    said |= {"device": args.device.type, "dtype": str(args.dtype).removeprefix("torch.")}
    if args.dense:
        return said
    sparsity = args.sparsity
    measure = sparsity.measure if isinstance(sparsity.measure, int) else "".join(f"{i}," for i in sparsity.measure)
    said |= {"delta": sparsity.delta, "attn-keys": sparsity.attn_keys, "measure-steps": measure,
             "skip-steps": ",".join(map(str, sparsity.skip)) or "none"}
    return said | ({"mlp-keys": sparsity.mlp_keys} if "mlp_keys" in args else {})


def describe(args):
    """What goes into a result's metadata: the prompt, the seed, every setting, and the command that makes it again."""
    said = settings(args)
    words = [Path(sys.argv[0]).name, f"--prompt={args.prompt}"]
    for name, value in said.items():
        words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}={value}"]
    return {"Software": "Chipmunk", "prompt": args.prompt, "seed": str(args.seed), "settings": json.dumps(said),
            "command": f"python {shlex.join(words)}"}


def comparison(dense, ours, dense_seconds, seconds):
    """How like the dense pictures (B, 3, H, W) ours are, and how much sooner they were there, in one line."""
    return (f"left dense {dense_seconds:.2f} s, right Chipmunk {seconds:.2f} s ({dense_seconds / seconds:.2f}x); "
            f"PSNR {psnr(dense, ours):.2f} dB, SSIM {ssim(dense, ours):.4f}")


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (..., H, W) in -1..1, in dB; infinite where they are equal."""
    error = sum((x.double() - y.double()).square().mean().item() for x, y in zip(a, b)) / len(a)     # one by one: videos are large
    return 10 * math.log10(4 / error) if error else math.inf


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of pictures (B, 3, H, W) in -1..1, mean over them and their channels: Gaussian
    window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03. 1 where they are equal."""
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()                                   # (11,)

    def blur(picture):                                               # (3, H, W) -> (3, 1, H - 10, W - 10)
        return F.conv2d(F.conv2d(picture[:, None], window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    def similarity(a, b):
        a, b = a.double(), b.double()
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                    # the range of values is 2
        ratio = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        return ratio.mean().item()
    return sum(similarity(x, y) for x, y in zip(a, b)) / len(a)
