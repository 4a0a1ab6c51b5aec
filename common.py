"""What the three model files share: the words of the command line, loading weights, writing results, errors.

Nothing of the method is here. A model file's main calls, in this order: make_parser and chosen_sparsity, the check_
functions, load_weights, write_png; and run calls main.
"""
import argparse
import json
import math
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from cache import SKIP_PRESETS, fit_steps, skip_preset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Tensors that some exports carry twice or that are no weights; every other name must be the model's.
IGNORED = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids"}

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
    if steps == (0,):
        raise argparse.ArgumentTypeError("'every 0 steps' means nothing; give a number from 1 or a list like 1,2,4,7")
    return steps if "," in text else steps[0]


def skip_steps(text):
    return text if text in SKIP_PRESETS else step_list(text)


def make_parser(doc, configs):
    """The words that every model file takes. -> parser, and its group of Chipmunk's own words, for a model to add to"""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--model", choices=list(configs), default="tiny",
        help="tiny: trained weights that come with this repository; others are downloaded (default: tiny)")
    add("--weights", metavar="DIR_OR_REPO", help="take the weights from this folder or Hugging Face repository instead")
    add("--width", type=number(int, 64, 2048), help="pixels, rounded to a multiple of 16 (default: the model's)")
    add("--height", type=number(int, 64, 2048), help="likewise")
    add("--steps", type=number(int, 1, 1000), help="denoising steps (default: the model's)")
    add("--guidance", type=number(float, 0, 100), help="how strictly to follow the prompt (default: the model's)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, same machine: same file (default: 0)")
    add("--out", type=Path, help="file to write, replaced if it is there (default: a new name in this folder)")
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


def chosen_sparsity(args, sparsity, steps, made_for):
    """The preset, which lists steps of `made_for`, for a run of `steps`, with what the command line says instead.
    Raises Fail where a listed step cannot be had."""
    said = {"delta": args.delta, "attn_keys": args.attn_keys, "mlp_keys": getattr(args, "mlp_keys", None),
            "measure": args.measure_steps, "skip": args.skip_steps}
    for word, listed in ("--measure-steps", args.measure_steps), ("--skip-steps", args.skip_steps):
        if isinstance(listed, tuple) and max(listed) >= steps:
            raise Fail(f"{word} {max(listed)}: this run has the steps 0 to {steps - 1}")
    if isinstance(args.skip_steps, tuple) and 0 in args.skip_steps:
        raise Fail("step 0 cannot be skipped: there is nothing to reuse yet; leave 0 out of --skip-steps")
    sparsity = replace(fit_steps(sparsity, steps, made_for), **{name: value for name, value in said.items() if value is not None})
    return replace(sparsity, skip=skip_preset(sparsity.skip, steps)) if isinstance(sparsity.skip, str) else sparsity


def show_plan(plan):
    print("step  attention  MLP")
    for step in plan:
        print(f"{step.index:4}  {step.attn:9}  {step.mlp}")


def round_size(name, pixels, multiple=16):
    rounded = max(multiple, round(pixels / multiple) * multiple)
    if rounded != pixels:
        note(f"{name} {pixels} rounded to {rounded}, a multiple of {multiple}")
    return rounded


def check_prompt(prompt):
    """Raises Fail where there is nothing to draw."""
    if not (prompt or "").strip():
        raise Fail('no prompt; say what to draw: --prompt "a red circle on a blue background"')
    try:
        prompt.encode()
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
    return device

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


def load_weights(make_model, files, device, dtype):
    """A model with the weights in files, tensor by tensor, so that there is never a second copy.

    make_model() -> module, built without memory. Strict: every tensor is used once and has the right shape, none is
    left over (check_weights)."""
    check_weights(make_model, files)
    with torch.device("meta"):
        model = make_model()
    for file in files:
        with safe_open(file, "pt", device=str(device)) as tensors:
            for name in set(tensors.keys()) - IGNORED:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Parameter(tensors.get_tensor(name).to(dtype), requires_grad=False))
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
    pixels = (127.5 * (picture.float().clamp(-1, 1) + 1)).byte().permute(1, 2, 0).cpu().numpy()  # (H, W, 3), truncated as the original does
    temporary = temporary_name(file)
    try:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)
        temporary.replace(file)
    except OSError as error:
        raise Fail(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def sparsity_settings(sparsity):
    """The command-line words that give this sparsity."""
    measure = sparsity.measure if isinstance(sparsity.measure, int) else "".join(f"{i}," for i in sparsity.measure)
    return {"delta": sparsity.delta, "attn-keys": sparsity.attn_keys, "mlp-keys": sparsity.mlp_keys, "measure-steps": measure,
            "skip-steps": ",".join(map(str, sparsity.skip)) or "none"}


def describe(prompt, settings):
    """What goes into a result's metadata: the prompt, the seed, every setting, and the command that makes it again."""
    words = [Path(sys.argv[0]).name, f"--prompt={prompt}"]
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
    return {"Software": "Chipmunk", "prompt": prompt, "seed": str(settings["seed"]), "settings": json.dumps(settings),
            "command": f"python {shlex.join(words)}"}


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (..., H, W) in -1..1, in dB; infinite where they are equal."""
    return 10 * math.log10(4 / error) if (error := (a.double() - b.double()).square().mean().item()) else math.inf


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of pictures (B, 3, H, W) in -1..1, mean over channels: Gaussian window of
    11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03. 1 where they are equal."""
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()                                   # (11,)

    def blur(picture):                                               # (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        picture = picture.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(picture, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                        # the range of values is 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean().item()
