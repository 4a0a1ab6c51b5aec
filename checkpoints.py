"""Finds, checks and loads checkpoints, and knows the memory that they need.

Weights come straight from safetensors files, in a folder or from the Hugging Face Hub. Loading is strict: every
tensor of a file is used once and has the model's shape, and none is missing.
"""
import difflib
import json
import math
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cli import Fail, out_of_memory

# Tensors that some exports carry twice or that are no weights; every other name must be the model's.
IGNORED = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids"}
PREFIX = "model.diffusion_model."                                    # of every name in some single files
FLOATS = "F16", "BF16", "F32", "F64"                                 # what a tensor may be, in safetensors' words

# ---------------------------------------------------------------------------------------------------------
# finding files


def reason(error):
    """The first line of an error from a library."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Missing(Fail):
    """A file that a folder or repository does not have."""


def weight_files(weights, names):
    """Paths of the named files in a folder or Hugging Face repository (downloaded to its cache, with progress bars).
    Raises Missing if one is not there, Fail if it cannot be read, access is not granted, or there is no network."""
    if os.path.isfile(weights):
        kind = "quantised and not supported" if str(weights).endswith(".gguf") else "a file"
        raise Fail(f"{weights} is {kind}; --weights wants a folder laid out like the model's repository")
    if os.path.isdir(weights):
        files = [Path(weights) / name for name in names]
    else:
        files = cached_files(weights, names) or download(str(weights), names)
    for name, file in zip(names, files):
        try:                                                         # libraries would hide what the system says
            with open(file, "rb") as opened:
                opened.read(1)
        except FileNotFoundError:
            raise Missing(f"{weights} has no {name}; --weights wants a folder laid out like the model's repository"
                          ) from None
        except OSError as error:
            raise cannot_read(file, error) from None
    return files


def is_repository(weights):
    """Can this be a Hugging Face repository, owner/name, rather than a folder that is not there?"""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)))


def cached_files(weights, names):
    """Paths of the named files in the Hugging Face cache, without asking the network. None if one is not there."""
    if os.path.isdir(weights) or not is_repository(weights):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    try:
        files = [try_to_load_from_cache(str(weights), name) for name in names]
    except HFValidationError:                                        # a name with rules broken, like a--b/c
        return None
    return [Path(file) for file in files] if all(isinstance(file, str) for file in files) else None


def at_hand(weights, name):
    """Is the named file, whole or in shards, in this folder, or in the cache of this Hugging Face repository?"""
    names = name, f"{name}.index.json"
    if os.path.isdir(weights):
        return any((Path(weights) / name).exists() for name in names)
    return any(cached_files(weights, [name]) for name in names)


def cannot_read(file, error):
    """What to raise for an OSError: a file that cannot be read is not damaged."""
    return error if out_of_memory(error) else Fail(f"cannot read {file}: {error.strerror or reason(error)}")


def no_folder(weights):
    """What to raise for a folder that is not there. It names those beside it that have a similar name."""
    folder, beside = Path(weights), []
    with suppress(OSError):
        beside = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
    near = [str(folder.with_name(name)) for name in difflib.get_close_matches(folder.name, beside, cutoff=0.4)]
    similar = f"; similar: {', '.join(near)}" if near else ""
    return Fail(f"no folder {weights}; --weights wants a folder, or a Hugging Face repository like owner/name "
                f"(with no folder owner here){similar}")


def reach_hub(repository, name):
    """Raises Fail if nothing answers when the Hugging Face Hub is asked for this file; hf_hub_download asks for 23 s to
    minutes. What the Hub answers does not matter here."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    try:
        get_hf_file_metadata(hf_hub_url(repository, name), timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 5)))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        pass
    except Exception as error:                                       # what it is depends on huggingface-hub's version
        if out_of_memory(error):
            raise
        raise Fail(f"cannot reach the Hugging Face Hub to download {name} of {repository} ({reason(error)}); "
                   "check the network, or give a folder with --weights") from None


def download(repository, names):
    """weight_files for a Hugging Face repository like owner/name."""
    if not is_repository(repository) or os.path.isdir(Path(repository).parent):
        raise no_folder(repository)
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError)
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()                                    # its retries would bury the one line below
    reach_hub(repository, next((name for name in names if not cached_files(repository, [name])), names[0]))
    files = []
    for name in names:
        try:
            files.append(Path(hf_hub_download(repository, name)))
        except GatedRepoError:
            raise Fail(f"{repository} is gated: accept its licence at https://huggingface.co/{repository}, "
                       "then log in with `hf auth login`") from None
        except RepositoryNotFoundError:
            raise Fail(f"no folder and no Hugging Face repository {repository} "
                       "(or it is private: log in with `hf auth login`)") from None
        except LocalEntryNotFoundError:                              # not in the cache, and not to be had
            if constants.HF_HUB_OFFLINE:
                raise Missing(f"{name} of {repository} is not in the cache, and HF_HUB_OFFLINE is set; unset it to "
                              "download, or give a folder with --weights") from None
            raise Fail(f"cannot reach the Hugging Face Hub to download {name} of {repository}; "
                       "check the network, or give a folder with --weights") from None
        except EntryNotFoundError as error:
            raise Missing(f"{repository} lacks a file that this model needs: {reason(error)}") from None
        except Exception as error:                                   # broken connections, full disks: many kinds
            if out_of_memory(error):
                raise
            raise Fail(f"downloading {repository} failed ({reason(error)}); "
                       "run again to go on, or give a folder with --weights") from None
    return files


def sharded_files(weights, name):
    """Paths of a file that may come in shards: those that name.index.json lists, or the file itself."""
    index_name = f"{name}.index.json"
    if not cached_files(weights, [index_name]) and cached_files(weights, [name]):
        return weight_files(weights, [name])                         # nobody is asked for an index
    try:
        index, = weight_files(weights, [index_name])
    except Missing:
        return weight_files(weights, [name])
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shards = []
    if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(shard)) for shard in shards):
        raise Fail(f"{index} is no list of shards; fetch it again")
    return weight_files(weights, [str(PurePosixPath(name).with_name(shard)) for shard in shards])

# ---------------------------------------------------------------------------------------------------------
# checking and loading


def load_tokenizer(load, path, vocab):
    """load(path), for a model that knows `vocab` tokens. Raises Fail if the file is damaged, or not for this model: the
    published ones leave up to 84 embeddings without a token, ours up to 301."""
    try:
        tokenizer = load(path)
    except Exception as error:                                       # the tokenizers library raises nothing narrower
        if out_of_memory(error):
            raise
        raise Fail(f"{path} is no tokenizer that can be read ({reason(error)}); fetch it again") from None
    tokens = 1 + max(tokenizer.get_vocab().values())
    if not vocab - 400 <= tokens <= vocab:
        raise Fail(f"{path} has {tokens} tokens, but the model knows {vocab}: it is another model's, or cut; "
                   "check --model and --weights, or fetch it again")
    return tokenizer


def read_headers(files):
    """{tensor name: (file, its name there, shape)} of safetensors files, without the prefix that single files may have.
    Raises Fail if one cannot be read, is damaged or of another format, or has tensors that are no floats."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                stored = sorted(set(tensors.keys()) - IGNORED)
                prefix = PREFIX if all(name.startswith(PREFIX) for name in stored) else ""
                for name in stored:
                    entry, short = tensors.get_slice(name), name.removeprefix(prefix)
                    if short in found:
                        raise Fail(f"{file} repeats {name}, which {found[short][0]} has; fetch both again")
                    if entry.get_dtype() not in FLOATS:
                        raise Fail(f"{file} cannot be used: {name} is {entry.get_dtype()}, not one of "
                                   f"{', '.join(FLOATS)}; fetch weights that are not quantised")
                    found[short] = file, name, tuple(entry.get_shape())
        except SafetensorError as error:
            with open(file, "rb") as opened:
                if opened.read(4) == b"GGUF":
                    raise Fail(f"{file} is a GGUF file, quantised; fetch the safetensors files instead") from None
            raise Fail(f"{file} is no complete safetensors file ({reason(error)}); fetch it again") from None
        except OSError as error:
            raise cannot_read(file, error) from None
    return found


def as_named(name, shape):
    """The layout of a checkpoint that has the model's own names and shapes."""
    return [(name, shape)]


def check_weights(make_model, files, layout=as_named):
    """Raises Fail, with the file and the first tensor that differs, if files are not exactly the model's.

    make_model() -> the module. layout(name, shape) -> the tensors [(name, shape)] of the files whose rows, in this
    order, are the parameter; a name followed by [0] or [1] stands for the first or second half of the tensor's rows.
    -> {parameter: (shape, [(file, the tensor's name there, half or None)])}"""
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in make_model().state_dict().items()}
    found, expected, sources = read_headers(files), {}, {}
    for parameter, own_shape in parameters.items():
        sources[parameter] = own_shape, []
        for piece, shape in layout(parameter, own_shape):
            name, _, half = piece.removesuffix("]").partition("[")
            expected[name] = shape
            if name in found:
                sources[parameter][1].append((*found[name][:2], int(half) if half else None))
    advice = "check --model and --weights"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise Fail(f"{files[0]} is not this model's: it lacks the tensor {name}; {advice}")
        file, _, shape = found[name]
        if name not in expected:
            raise Fail(f"{file} is not this model's: it has a tensor {name} too many; {advice}")
        if shape != expected[name]:
            raise Fail(f"{file} is not this model's: {name} is {list(shape)}, not {list(expected[name])}; {advice}")
    return sources


def load_weights(make_model, files, device, dtype, float32=(), layout=as_named):
    """A model with the weights in files, tensor by tensor, so that there is never a second copy.

    make_model() -> the module. device: where it goes, or a function of the module that tells {parameter: device}.
    float32: parts of names; parameters with such a name stay float32 whatever dtype is. layout: as in check_weights.
    Raises Fail if files are not exactly the model's (check_weights)."""
    sources = check_weights(make_model, files, layout)
    with torch.device("meta"):
        model = make_model()
    homes, opened = device(model) if callable(device) else dict.fromkeys(sources, device), {}
    with ExitStack() as stack:
        for parameter, (shape, pieces) in sources.items():
            rows = []
            for file, name, half in pieces:
                key = file, str(homes[parameter])
                if key not in opened:
                    opened[key] = stack.enter_context(safe_open(file, "pt", device=key[1]))
                tensor = opened[key].get_tensor(name)
                rows.append(tensor if half is None else tensor.chunk(2)[half])
            tensor = (torch.cat(rows) if len(rows) > 1 else rows[0]).view(shape)
            wide = any(part in parameter for part in float32)
            tensor = tensor.to(torch.float32 if wide else dtype)
            parent, _, leaf = parameter.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    return model.eval()

# ---------------------------------------------------------------------------------------------------------
# memory


def check_memory(make_model, dtype, device):
    """Raises Fail, before anything is downloaded, if a model's weights do not fit."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_model().parameters()) * dtype.itemsize
    free = free_memory(device)
    if weights <= free:
        return
    advice = "--dtype bfloat16" if dtype == torch.float32 else "--model tiny or a larger machine"
    raise Fail(f"{device} has {free / 1e9:.2f} GB free, but this needs {weights / 1e9:.2f} GB of weights; "
               f"{advice} helps")


def free_memory(device):
    """Bytes that can be allocated on a device; of the host's memory the share of one of torchrun's processes."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(index)
        used = torch.cuda.memory_allocated(index)
        free += torch.cuda.memory_reserved(index) - used             # what torch keeps for its next tensors
        return min(free, int(torch.cuda.get_per_process_memory_fraction(index) * total) - used)
    return min(psutil.virtual_memory().available, cgroup_memory()) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cgroup_memory(root=Path("/")):
    """Bytes that this process's control groups (Linux, version 1 or 2; a container has one) still allow, infinite if
    they set no limit. What they count as used includes files that the kernel keeps in memory and would give up."""
    files = {"": ("sys/fs/cgroup", "memory.max", "memory.current", ""),
             "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:                                        # no Linux
        return math.inf
    free = math.inf
    for line in lines:                                               # 0::/a/b, or in version 1 4:memory:/a/b
        _, controllers, path = line.split(":", 2)
        for controller in files.keys() & set(controllers.split(",")):
            top, limit, used, prefix = files[controller]
            group = root / top / path.lstrip("/")
            while True:                                              # a group's parents limit it, too
                if (group / limit).exists() and (group / limit).read_text().strip() != "max":
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    kept = sum(int(stat[f"{prefix}{name}_file"]) for name in ("active", "inactive"))
                    free = min(free, int((group / limit).read_text()) - int((group / used).read_text()) + kept)
                if group == root / top:
                    break
                group = group.parent
    return free
