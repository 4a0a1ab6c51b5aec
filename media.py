"""Writes pictures (PNG) and videos (MP4), and compares them.

Pictures are float tensors (3, H, W) with values in -1..1, videos are such frames one after the other. A file appears
whole or not at all.
"""
import math
import os
import secrets
from itertools import chain, count, islice

import torch
import torch.nn.functional as F

from cli import Fail

# ---------------------------------------------------------------------------------------------------------
# the file to write


def check_out(out, suffixes):
    """Raises Fail, before any work is done, if the file `out` cannot be written."""
    if out.suffix.lower() not in suffixes:
        raise Fail(f"--out {out}: the name must end in {' or '.join(suffixes)}, like a{suffixes[0]}")
    if os.path.isdir(out):
        raise Fail(f"--out {out}: this is a folder")
    if not os.path.isdir(out.parent):
        raise Fail(f"--out {out}: there is no folder {out.parent}; make it first")
    if len(os.fsencode(out.name)) > 240:
        raise Fail(f"--out {out.name[:40]}...: the name is too long; take a shorter one")
    trial = temporary_name(out)
    try:                                                             # permission bits do not tell what a system allows
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise Fail(f"--out {out}: the folder {out.parent} cannot be written ({error.strerror}); "
                   "choose another") from None


def temporary_name(file):
    """The name that a file has until it is complete: another one for every run."""
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")


def write_whole(file, new, write):
    """write(temporary name); when that is complete it becomes `file`, or, if new, the first of file, file-2, ... that
    is not there. -> the file. Raises Fail, and leaves nothing behind, if that is impossible."""
    temporary = temporary_name(file)
    try:
        write(temporary)
        if new:
            file = claim(file)
        temporary.replace(file)
        return file
    except OSError as error:                                         # PyAV's are OSErrors too
        raise Fail(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def claim(file):
    """Make the first of file, file-2, file-3, ... that is not there, empty: two runs cannot both make one."""
    for number in count(1):
        name = file if number == 1 else file.with_stem(f"{file.stem}-{number}")
        try:
            name.touch(exist_ok=False)
            return name
        except FileExistsError:
            continue

# ---------------------------------------------------------------------------------------------------------
# writing


def to_bytes(picture):
    """(3, H, W), values in -1..1 -> (H, W, 3) uint8 array, truncated as the originals do. Raises Fail at NaN, which
    would be black."""
    if picture.isnan().any():
        raise Fail("the decoder gave NaN: nothing to show; try --dtype float32, then fetch the weights again")
    levels = 127.5 * (picture.float().clamp(-1, 1) + 1)              # (3, H, W) in 0..255
    return levels.byte().permute(1, 2, 0).contiguous().cpu().numpy()


def to_image(picture):
    """(3, H, W), values in -1..1 -> PIL image."""
    from PIL import Image
    return Image.fromarray(to_bytes(picture))


def write_png(file, picture, texts, new=False):
    """Write a picture (3, H, W), with texts {key: str} in its text chunks. new: take another name if the file is there,
    instead of replacing it. -> the file. Raises Fail if that is impossible."""
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    image = to_image(picture)
    return write_whole(file, new, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def write_video(file, frames, fps, texts, new=False):
    """Write frames, an iterable of (3, H, W) with H and W even: as .mp4, or as .png every fourth side by side.
    texts {key: str} go into its metadata; new as in write_png. -> the file. Raises Fail if that is impossible."""
    if file.suffix.lower() == ".png":
        strip = torch.cat(list(islice(frames, 0, None, 4)), dim=2)   # (3, H, W times frames)
        return write_png(file, strip, texts, new)
    frames = map(to_bytes, frames)
    return write_whole(file, new, lambda temporary: write_mp4(temporary, frames, fps, texts))


def write_mp4(file, frames, fps, texts):
    """H.264 that browsers and phones play, index in front; BT.709 colours, and says so. frames: (H, W, 3) uint8 arrays.

    x264's macroblock tree is off: if the width is no multiple of 256, its vector code reads memory that nobody wrote,
    and the same frames give another file at every run."""
    import av
    first = next(frames)
    path = str(file.absolute())                                      # FFmpeg takes a relative "12:30.mp4" for a URL
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as video:
        video.metadata.update(texts)
        stream = video.add_stream("libx264", rate=fps, options={"crf": "14", "x264-params": "mbtree=0"})
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        context, bt709 = stream.codec_context, 1
        context.colorspace = context.color_primaries = context.color_trc = bt709
        for pixels in chain([first], frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            video.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        video.mux(stream.encode())                                   # what the encoder still holds

# ---------------------------------------------------------------------------------------------------------
# comparing


def comparison(dense, ours, dense_seconds, seconds):
    """How like the dense pictures (B, 3, H, W) ours are, and how much sooner they were there, in one line."""
    return (f"left dense {dense_seconds:.2f} s, right Chipmunk {seconds:.2f} s ({dense_seconds / seconds:.2f}x); "
            f"PSNR {psnr(dense, ours):.2f} dB, SSIM {ssim(dense, ours):.4f}")


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in -1..1, in dB; infinite if they are equal."""
    errors = [(x.double() - y.double()).square().mean().item() for x, y in zip(a, b)]    # one by one: videos are large
    error = sum(errors) / len(errors)
    return 10 * math.log10(4 / error) if error else math.inf


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of pictures (B, 3, H, W) in -1..1, the mean over them and their
    channels: Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03. 1 if they are equal."""
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()                                   # (11,)

    def blur(picture):                                               # (3, H, W) -> (3, 1, H - 10, W - 10)
        columns = F.conv2d(picture[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(columns, window.view(1, 1, 1, 11))

    def similarity(a, b):
        a, b = a.double(), b.double()
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                    # the range of values is 2
        likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()
    return sum(similarity(x, y) for x, y in zip(a, b)) / len(a)
