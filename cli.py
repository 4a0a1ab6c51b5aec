"""The command line that the three programs share: its flags, the settings they make, and errors in one line.

A program's main calls make_parser, parse and describe; `run` calls main. From Python, Settings and fill do the same
without flags.
"""
import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path

import torch
from torch._dynamo.exc import ShortenTraceback

from interrupt import at_ctrl_c
from plan import DELTAS, Sparsity, fit_steps, make_plan, relative_time
from sparse_kernels import NO_KERNEL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OFFLOADS = ("none", "caches", "all")
RANGES = {"width": (int, 64, 2048), "height": (int, 64, 2048), "frames": (int, 1, 1001), "fps": (int, 1, 120),
          "steps": (int, 1, 1000), "guidance": (float, 0, 100), "seed": (int, 0, 2**63 - 1)}

# ---------------------------------------------------------------------------------------------------------
# errors


class Fail(Exception):
    """Something that the user can put right. Its text is one line: what is wrong, and what to do."""


def note(text):
    """Tell the user that something was adjusted, or has no effect."""
    with suppress(OSError):                                          # stderr may be a file on a full disk
        print(f"note: {text}", file=sys.stderr)


# Libraries say in many words that memory ran out, in a RuntimeError or OSError that is used for other things, too:
# CUDA, cuBLAS, cuDNN (whose convolutions then find no engine), torch on a CPU, mmap, and Windows' paging file (1455).
OUT_OF_MEMORY = re.compile(
    r"out of memory|(?:can't|cannot|unable to) allocate|not enough memory|STATUS_ALLOC_FAILED|os error 1455|"
    r"unable to find an engine|valid cuDNN algorithm", re.IGNORECASE)
ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|[KMGTP]iB)")  # made here: without memory nothing is compiled


def out_of_memory(error):
    """Does this exception say that memory ran out?"""
    if isinstance(error, MemoryError):                               # Python's, numpy's and safetensors'
        return True
    return isinstance(error, RuntimeError | OSError) and bool(OUT_OF_MEMORY.search(str(error)))


def memory_advice(error):
    """The line for an out_of_memory exception: how much was asked for, if it tells, and which flags help."""
    asked = ASKED.search(str(error))
    more = ""
    if asked and asked[2] == "bytes":
        more = f" ({int(asked[1]) / 1e9:.2f} GB more were needed)"
    elif asked:
        more = f" ({asked[1]} {asked[2]} more were needed)"
    return (f"out of memory{more}; --dense needs no caches, a smaller --width and --height need less of everything, "
            "--dtype bfloat16 half of float32, --offload all less of a GPU")


def check_finite(x, part, dtype, before=None):
    """Begin to look for NaN and infinity in x, which `part` made in `dtype`, without waiting for the device.
    -> a function that ends this: it raises Fail if there are any. before: such a function of an earlier x, which is
    ended now, when the device has more to do."""
    finite = x.isfinite().all().to("cpu", non_blocking=True)         # ()
    copied = torch.cuda.Event() if x.is_cuda else None
    if copied:
        copied.record()

    def end():
        if copied:
            copied.synchronize()
        if not finite:
            raise Fail(f"{part} gave NaN or infinity, so there is nothing to show; {not_finite_advice(dtype)}")
    if before:
        before()
    return end


def not_finite_advice(dtype):
    """The usual cause of NaN or infinity, and the flag that helps."""
    if dtype == torch.float32:
        return "usually the weights are damaged: fetch them again; --dense tells whether the caches are to blame"
    return "usually a number is too large for half precision: try --dtype float32, then fetch the weights again"


def say(text):
    """Print a line of results. By then the file is written; the exit status tells if stdout cannot take the line.
    Raises BrokenPipeError if it is closed (`... | head`), else Fail."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_stdout()
        raise Fail(f"cannot print to stdout: {error.strerror}") from None


def forget_stdout():
    """What stdout still holds goes nowhere; else Python tries, and fails, to print it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call main. A Fail, Ctrl-C, or a lack of memory, a kernel or a compiler ends in one line on stderr and a non-zero
    exit status."""
    if sys.stdout is not None:                                       # in an encoding that lacks a character
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:                                           # closed; progress bars want one
        sys.stderr = open(os.devnull, "w")
    at_ctrl_c(signal.default_int_handler)
    if "TORCHELASTIC_RUN_ID" not in os.environ:                      # torchrun's are deaf while they wait for others
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # after every `finally`: nothing stays half-written
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")      # else tenths of a GPU lie in gaps
    try:
        main()
    except Fail as error:
        sys.exit(f"error: {' '.join(str(error).splitlines())}")
    except KeyboardInterrupt:
        at_ctrl_c(lambda *_: os._exit(130))                          # a second one: torch's exit functions would speak
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        forget_stdout()
        sys.exit(1)
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            sys.exit(f"error: {memory_advice(error)}")
        if NO_KERNEL.search(str(error)):
            said = str(error).splitlines()[0]
            sys.exit(f"error: no kernel can do this on this GPU ({said}); try --dtype float32, or --device cpu")
        if "Failed to find C compiler" in str(error):
            sys.exit("error: Triton's kernels need a C compiler; install one (gcc or clang), or try --device cpu")
        if isinstance(error, ShortenTraceback):                      # no C++ compiler, no Triton, a GPU too old for it
            said = str(error).splitlines()[0]
            sys.exit(f"error: --compile failed ({said}); on a CPU it needs a C++ compiler (g++ or clang++), on a GPU "
                     "Triton; or leave it out")
        if isinstance(error, OSError) and error.errno:               # of the system: a full disk, a folder's permission
            sys.exit(f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
        raise

# ---------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class Settings:
    """What one generation does. None stands for the model's own value until `fill` puts it there."""
    model: str = "tiny"
    weights: str | Path | None = None    # a folder or Hugging Face repository; None: the model's, also after fill
    width: int | None = None             # pixels
    height: int | None = None
    frames: int | None = None            # these three: videos only
    fps: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dense: bool = False                  # recompute everything at every step
    preset: str = "balanced"             # what is recomputed: "columns" | "quality" | "balanced" | "fast"
    sparsity: Sparsity | None = None     # that in detail, instead of a preset; None after fill: nothing is cached
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    offload: str | None = None           # "none" | "caches" | "all" live on the host; None, also after fill: what must
    compile: bool = False                # the transformer's blocks, by torch.compile


def fill(settings, configs):
    """Settings with every value there: the model's own values, sizes in multiples of 16, a device that exists.
    Raises Fail for a model, device or dtype that does not exist, and for a number that cannot be."""
    if settings.model not in list(configs):
        raise Fail(f"no model {settings.model!r}; choose from {', '.join(configs)}")
    if settings.weights is not None and not str(settings.weights):
        raise Fail("--weights is empty; it wants a folder, or a Hugging Face repository like owner/name")
    for name, kind, words in (("weights", str | Path | None, "a path or a name"), ("dense", bool, "True or False"),
                              ("compile", bool, "True or False")):
        if not isinstance(getattr(settings, name), kind):
            raise Fail(f"{name} {getattr(settings, name)!r} is not {words}")
    config = configs[settings.model]
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for name, (kind, low, high) in RANGES.items():
        value = given[name]
        if value is None and name != "seed":                         # the model's own
            continue
        a_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if not (a_number and low <= value <= high):
            raise Fail(f"{name} {value!r} is not {range_words(kind, low, high)}")
        settings = replace(settings, **{name: kind(value)})          # NumPy's numbers, too
    own = {name: getattr(config, name, None) for name, value in given.items() if value is None and name != "weights"}
    settings = replace(settings, **own)

    if settings.frames and settings.frames % 4 != 1:                 # the first, then four to a frame of latents
        below = (settings.frames - 1) // 4 * 4 + 1
        raise Fail(f"{settings.frames} frames cannot be made: take 4 n + 1, like {below} or {below + 4}")
    sparsity = settings.sparsity
    if settings.dense:
        sparsity = None
    elif sparsity is None:
        sparsity = preset(config, settings.preset, settings.steps)
    else:
        check_sparsity(sparsity, settings.steps)
    device = pick_device(settings.device)
    small = settings.model == "tiny" and device.type == "cpu"
    dtype = ("float32" if small else "bfloat16") if settings.dtype is None else settings.dtype
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise Fail(f"no dtype {dtype!r} to compute in; choose from {', '.join(DTYPES)}")
    if settings.offload not in (None, *OFFLOADS):
        raise Fail(f"cannot offload {settings.offload!r}; choose from {', '.join(OFFLOADS)}")
    if device.type == "cuda":
        check_capability(torch.cuda.get_device_capability(device), dtype, sparsity)
    return replace(settings, width=round_size("width", settings.width), height=round_size("height", settings.height),
                   sparsity=sparsity, device=device, dtype=dtype)


def preset(config, name, steps):
    """A model's preset for a run of `steps`. None, dense, if these are too few for it to be faster than that.
    Raises Fail if there is no such preset."""
    if not isinstance(name, str) or name not in config.presets:
        raise Fail(f"no preset {name!r}; choose from {', '.join(config.presets)}")
    sparsity = fit_steps(config.presets[name], steps, config.steps)
    if relative_time(make_plan(steps, sparsity), config.costs) < 1:
        return sparsity
    note(f"in {count(steps, 'step')}, preset {name} is not faster than dense; so nothing is reused")
    return None


def count(n, noun):
    return f"{n} {noun}{'s' * (n != 1)}"


def check_sparsity(sparsity, steps):
    """Raises Fail for what no run of `steps` can do."""
    if not isinstance(sparsity, Sparsity):
        raise Fail(f"sparsity {sparsity!r} is not a plan.Sparsity; a preset goes by preset='columns'")
    full = () if isinstance(sparsity.full, int) else sparsity.full
    for i in (*full, *sparsity.skip):
        if i >= steps:
            raise Fail(f"no step {i} to compute in full or to skip: this run has the steps 0 to {steps - 1}")


def range_words(kind, low, high):
    return f"a {'whole ' if kind is int else ''}number from {low} to {high}"


def round_size(name, pixels, multiple=16):
    """The nearest multiple, and a note if that is another size."""
    rounded = max(multiple, round(pixels / multiple) * multiple)
    if rounded != pixels:
        note(f"{name} {pixels} rounded to {rounded}, a multiple of {multiple}")
    return rounded


def pick_device(text):
    """cpu or a CUDA GPU; None: a GPU if there is one -> torch.device. Raises Fail if it is not there."""
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None and "TORCHELASTIC_RUN_ID" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))       # torchrun's processes have one each
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        if out_of_memory(error):
            raise Fail(f"{text} is full; end what else runs there, or try another --device") from None
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Fail(f"no device {str(text)!r} to run on here; try --device cpu")
    if device.type == "cpu":
        return torch.device("cpu")                                   # safetensors does not know cpu:1
    if device.index is not None:
        torch.cuda.set_device(device)                                # Triton launches on the current one
    return device


def check_capability(capability, dtype, sparsity):
    """Raises Fail for a GPU before Ampere, like T4 (7, 5), unless it runs what it can: float32 without kernels."""
    kernels = sparsity and sparsity.delta != "none"
    if capability < (8, 0) and (dtype == torch.bfloat16 or kernels):
        raise Fail(f"this GPU (compute capability {capability[0]}.{capability[1]}) has no bfloat16, and Chipmunk's "
                   "kernels need 8.0; --dense --dtype float32 works, or --device cpu")


def check_prompt(prompt, negative_prompt=None):
    """Raises Fail if there is nothing to draw, or text that no tokenizer can read."""
    for text in (prompt, negative_prompt):
        if not isinstance(text, str | None):
            raise Fail(f"the prompt {text!r} is not text")
    if not (prompt or "").strip():
        raise Fail('no prompt; say what to draw: --prompt "a red circle on a blue background"')
    try:
        (prompt + (negative_prompt or "")).encode()
    except UnicodeEncodeError:
        raise Fail("the prompt is no valid UTF-8; check the terminal's encoding") from None


def note_unknown_words(tokenizer, prompts):
    """Say which words an embedded model has never seen: its tokenizer has a token for each word of its world."""
    words = dict.fromkeys(re.findall(r"[^\W\d_]+(?:['’]\w+)?", " ".join(prompts).lower()))
    unknown = [word for word in words if tokenizer.token_to_id(f"▁{word}") is None]
    if unknown:
        note(f"the tiny model does not know {', '.join(unknown[:5])}; README.md has the words of its small world")

# ---------------------------------------------------------------------------------------------------------
# flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")

    def print_help(self, file=None):                                 # argparse's hides that it cannot
        say(self.format_help().rstrip())


def number(kind, low, high):
    """An argparse type: a number of `kind`, int or float, from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {range_words(kind, low, high)}")
        return value
    return parse


def step_list(text):
    """"1,2,4" -> (1, 2, 4)"""
    try:
        steps = tuple(int(s) for s in text.removesuffix(",").split(","))
    except ValueError:
        steps = (-1,)
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers like 1,2,4,7")
    return steps


def full_steps(text):
    """"10": every tenth step. "1,2,4,7": those. "10,": step 10 alone."""
    steps = step_list(text)
    if steps == (0,) and "," not in text:
        raise argparse.ArgumentTypeError("'every 0 steps' means nothing; give a number from 1 or a list like 1,2,4,7")
    return steps if "," in text else steps[0]


def skip_steps(text):
    steps = () if text == "none" else step_list(text)
    if 0 in steps:
        raise argparse.ArgumentTypeError("step 0 cannot be skipped: there is nothing to reuse yet; leave 0 out")
    return steps


def make_parser(doc, configs, video=False):
    """The flags that all three programs take, or both video programs.
    -> the parser, and its group of Chipmunk's own flags, so that a program can add to either"""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="what to draw")
    add("--model", choices=list(configs), default="tiny",
        help="tiny: trained weights that come with this repository; others are downloaded (default: tiny)")
    add("--weights", metavar="DIR_OR_REPO", help="take the weights from this folder or Hugging Face repository instead")
    add("--width", type=number(*RANGES["width"]), help="pixels, rounded to a multiple of 16 (default: the model's)")
    add("--height", type=number(*RANGES["height"]), help="likewise")
    if video:
        add("--frames", type=number(*RANGES["frames"]),
            help="the video's length, 4 n + 1; 1 makes a picture (default: the model's)")
        add("--fps", type=number(*RANGES["fps"]), help="frames per second (default: the model's)")
    add("--steps", type=number(*RANGES["steps"]), help="denoising steps (default: the model's)")
    add("--guidance", type=number(*RANGES["guidance"]), help="how strictly to follow the prompt (default: the model's)")
    add("--seed", type=number(*RANGES["seed"]), default=0, help="same seed, same machine: same file (default: 0)")
    kinds = " (.mp4; .png: every fourth frame side by side)" if video else ""
    add("--out", type=Path, help=f"file to write{kinds}, replaced if it is there (default: a new name in this folder)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", choices=list(DTYPES), help="default: bfloat16; float32 for tiny on a CPU")
    add("--offload", choices=OFFLOADS,
        help="what lives in host memory: nothing, Chipmunk's caches, or weights too (default: what must)")
    add("--compile", action="store_true",
        help="compile the transformer's blocks (torch.compile): the first steps are slow, Wan2.1's others faster")

    chipmunk = parser.add_argument_group("Chipmunk", "what to recompute, and when (defaults: the model's preset)")
    add = chipmunk.add_argument
    add("--dense", action="store_true", help="recompute everything at every step: the plain model")
    add("--compare", action="store_true",
        help="dense and Chipmunk from the same noise, side by side, with PSNR, SSIM and both times")
    add("--preset", choices=list(configs["tiny"].presets),
        help="how much to recompute; what follows changes it (default: balanced)")
    add("--delta", choices=DELTAS,
        help="what a sparse step computes anew of attention (cache.py); none: no sparse steps")
    add("--attn-keys", type=number(float, 0, 1), metavar="SHARE",
        help="attention columns recomputed at a sparse step, 0 to 1")
    add("--full-steps", type=full_steps, metavar="N|LIST",
        help="compute in full step 1 and every N counted back from the last but one, or a list (1,2,4,7; or 5,)")
    add("--skip-steps", type=skip_steps, metavar="LIST",
        help="step caching: these steps compute nothing, their velocity is extrapolated; a list, or none")
    add("--show-plan", action="store_true", help="print what every step does and the memory it takes, then stop")
    return parser, chipmunk


def parse(parser, configs, show_need):
    """Read and check the command line -> its flags (argparse.Namespace), and the filled Settings that they make.
    --show-plan prints the plan, calls show_need(settings) and ends the program. Raises Fail for what cannot be done."""
    args = parser.parse_args()
    config = configs[args.model]
    given = {field.name: value for field in fields(Settings) if (value := getattr(args, field.name, None)) is not None}
    steps = args.steps or config.steps
    sparsity = chosen_sparsity(args, config, steps)
    plan = make_plan(steps, sparsity)
    settings = Settings(**given | {"dense": sparsity is None}, sparsity=sparsity)
    if args.dense and args.compare:
        raise Fail("--dense and --compare exclude each other; --compare draws both")
    if args.compare and all(step.mode == "dense" for step in plan):
        raise Fail(f"nothing to compare: in {count(steps, 'step')} this is the dense model; take more --steps or other "
                   "flags")
    note_idle_flags(args, sparsity, plan)
    if args.show_plan:
        show_plan(plan)
        show_need(fill(settings, configs))
        sys.exit()
    return args, fill(settings, configs)


def chosen_sparsity(args, config, steps):
    """What the flags say to recompute in a run of `steps`. -> Sparsity; None: everything.
    Raises Fail if they list a step that the run does not have."""
    if args.dense:
        return None
    chosen = args.preset or Settings.preset
    changes = {"delta": args.delta, "attn_keep": args.attn_keys, "full": args.full_steps, "skip": args.skip_steps}
    if "mlp_keys" in args:                                           # FLUX alone has this flag
        changes["mlp_keep"] = args.mlp_keys
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return preset(config, chosen, steps)
    sparsity = replace(fit_steps(config.presets[chosen], steps, config.steps), **changes)
    check_sparsity(sparsity, steps)
    if relative_time(make_plan(steps, sparsity), config.costs) >= 1:
        note("by the published model's step times, a run with these flags is not faster than --dense")
    return sparsity


def note_idle_flags(args, sparsity, plan):
    """Say which flags have no effect. sparsity: the chosen one."""
    idle, why = ("attn_keys", "mlp_keys", "full_steps"), "--delta none"
    if args.dense:
        idle, why = ("preset", *idle, "delta", "skip_steps"), "--dense"
    elif args.delta is None:
        why = f"preset {args.preset or Settings.preset}, which has no sparse steps (preset columns has)"
    given = [f"--{name.replace('_', '-')}" for name in idle if getattr(args, name, None) is not None]
    if given and (args.dense or sparsity.delta == "none"):
        note(f"{', '.join(given)}: no effect with {why}")
    elif isinstance(args.skip_steps, tuple):
        computed = [str(i) for i in args.skip_steps if not plan[i].skip]
        if computed:
            note(f"--skip-steps {','.join(computed)}: no effect, as these steps are computed in full (--show-plan)")


def show_plan(plan):
    say("\n".join(["step  mode", *(f"{step.index:4}  {step.mode}" for step in plan)]))

# ---------------------------------------------------------------------------------------------------------
# what a result says and remembers


def work_line(settings, attn, saved, mlp=None):
    """How much was computed and saved, in one line. attn, mlp: work on columns in shares of a dense run's. A step
    that measures works on some columns twice, so in few steps these may be more than 1: then all were recomputed."""
    if settings.sparsity.delta == "none":
        computed = sum(not step.skip for step in make_plan(settings.steps, settings.sparsity))
        return f"computed {computed} of {settings.steps} steps; saved {saved:.1%} of the operations"
    columns = f"{min(attn, 1):.1%} of attention columns"
    if mlp is not None:
        columns += f" and {min(mlp, 1):.1%} of MLP columns"
    if saved < 0:
        return f"recomputed {columns}; took {-saved:.1%} more operations than --dense"
    return f"recomputed {columns}; saved {saved:.1%} of the operations"


def describe(args, settings):
    """What goes into a result's metadata: the prompt, the seed, every setting, and the command that makes it again.
    args, settings: as parse returned them. -> {str: str}"""
    said = recorded_flags(args, settings)
    command = ["python", Path(sys.argv[0]).name, f"--prompt={args.prompt}"]
    for flag, value in said.items():
        if value is True:
            command.append(f"--{flag}")
        elif value is not False:
            command.append(f"--{flag}={value}")
    return {"Software": "Chipmunk", "prompt": args.prompt, "seed": str(settings.seed),
            "settings": json.dumps(said), "command": shlex.join(command)}


def recorded_flags(args, settings):
    """Every flag that makes the same result again -> {flag: value}"""
    names = ("model", "weights", "negative_prompt", "width", "height", "frames", "fps", "steps", "guidance", "seed")
    said = {name.replace("_", "-"): getattr(settings, name) for name in names if getattr(settings, name) is not None}
    said |= {"dense": settings.dense, "compare": args.compare, "compile": settings.compile,
             "device": settings.device.type, "dtype": str(settings.dtype).removeprefix("torch.")}
    sparsity = settings.sparsity
    if sparsity is None:
        return said
    full = sparsity.full
    if not isinstance(full, int):
        full = "".join(f"{i}," for i in full)
    said |= {"preset": settings.preset, "delta": sparsity.delta,
             "skip-steps": ",".join(map(str, sparsity.skip)) or "none"}
    if sparsity.delta != "none":                                     # else these have no effect
        said |= {"attn-keys": sparsity.attn_keep, "full-steps": full}
        if "mlp_keys" in args:
            said["mlp-keys"] = sparsity.mlp_keep
    return said
