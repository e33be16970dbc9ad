"""Pictures in and out: from a file or a web address, cropped to a size, and as PNG that knows how it was made."""

import hashlib
import json
import os
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from my_dataset.images import MAX_PIXELS, UnreadableImage, list_images, load_image

TIMEOUT_S = 20.0
MAX_BYTES = 50_000_000
MAX_REDIRECTS = 5
CHUNK_BYTES = 65536
URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
FITS = ("crop", "pad", "stretch", "keep")
PARAMETERS_KEY = "parameters"  # of the PNG text chunk


class FetchError(ValueError):
    """A picture that could not be had from its address. str() is "<url>: <reason>"."""

    def __init__(self, url, reason):
        super().__init__(f"{url}: {' '.join(str(reason).split())}")


def find_pictures(sources):
    """Paths and addresses named by `sources`: a folder stands for its images. FileNotFoundError where there is none."""
    return [found for source in sources
            for found in ([source] if URL.match(source) else list_images(source, recursive=False))]


def fetch(url, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES):
    """The content of an http or https address, at most `max_bytes` after decompression, all of it within `timeout_s`
    seconds. FetchError names the address and what was wrong."""
    content, deadline = Future(), time.monotonic() + timeout_s

    def work():
        try:
            content.set_result(download(url, deadline, max_bytes))
        except Exception as error:  # raised again below
            content.set_exception(error)

    # requests limits the wait for each answer of a socket, not a name's look-up, a handshake and headers in all. A
    # daemon, because what does not end must not keep the program.
    threading.Thread(target=work, daemon=True).start()
    try:
        return content.result(timeout_s)
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise FetchError(url, f"no complete answer within {timeout_s:g} s; raise --timeout") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise FetchError(url, f"could not be fetched ({type(error).__name__}); check the address and the "
                         "network") from error


def download(url, deadline, max_bytes):
    """As `fetch`, until about `deadline` of time.monotonic, with requests' own errors."""
    target = url
    with requests.Session() as session:
        for _ in range(MAX_REDIRECTS + 1):
            # requests would follow by itself, and read the body of each redirect whatever its size
            if split_address(target, url).scheme not in ("http", "https"):
                raise FetchError(url, f"only http:// and https:// are fetched, not {target.partition(':')[0]}:")
            with session.get(target, stream=True, timeout=time_left(deadline), allow_redirects=False) as response:
                if not response.is_redirect:
                    return read_body(response, url, deadline, max_bytes)
                target = urljoin(target, response.headers["location"])
    raise FetchError(url, f"more than {MAX_REDIRECTS} redirects")


def split_address(target, url):
    """urlsplit's parts of `target`. FetchError names `url`, which led there."""
    try:
        return urlsplit(target)
    except ValueError as error:
        raise FetchError(url, error) from error


def time_left(deadline):
    """Seconds until `deadline`. TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def read_body(response, url, deadline, max_bytes):
    """The body of a streamed answer, within the limits. FetchError for an error status, text and too much."""
    if response.status_code != 200:
        raise FetchError(url, f"the server answered {response.status_code} {response.reason}")
    content_type = response.headers.get("content-type", "")
    if content_type.startswith("text/"):
        raise FetchError(url, f"not an image but {content_type}; give the address of the picture itself")
    too_large = FetchError(url, f"more than {max_bytes} bytes; raise --max_bytes")
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    # read1 returns what has arrived: a server that sends a byte now and then must not get past the deadline
    while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
        body += chunk
        if len(body) > max_bytes:
            raise too_large
        time_left(deadline)
    return bytes(body)


def open_picture(source, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS):
    """The picture at a path or http(s) address: PIL, upright, RGB, transparency over white. info["sha256"]: of its
    file; info["icc_profile"]: as in the file, not applied.

    FetchError, FileNotFoundError, UnreadableImage (no image, or more than `max_pixels`): one line that names it."""
    source = str(source)
    if URL.match(source):
        content = fetch(source, timeout_s, max_bytes)
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: no such file; check the path")
        content = Path(source).read_bytes()
    loaded = load_image(content, max_pixels, name=source)
    picture = Image.fromarray(loaded.rgb)
    picture.info["sha256"] = hashlib.sha256(content).hexdigest()
    if loaded.icc_profile:
        picture.info["icc_profile"] = loaded.icc_profile
    return picture


def center_box(width, height, target_width, target_height):
    """(left, top, right, bottom) in px of the largest centred box of the target's shape, sides rounded down; the odd
    pixel is left over at the right and bottom. In whole numbers: int(100 * (29 / 100)) would be 28."""
    if width * target_height > target_width * height:
        cropped = max(1, height * target_width // target_height)
        left = (width - cropped) // 2
        return left, 0, left + cropped, height
    cropped = max(1, width * target_height // target_width)
    top = (height - cropped) // 2
    return 0, top, width, top + cropped


def fit_picture(picture, target_width, target_height, fit="crop", multiple=16):
    """The picture at the target's size: "crop" its centre, "pad" it with white, "stretch" it, or "keep" its own size,
    cropped at the centre to multiples of `multiple` px. Resized by Lanczos; info is kept. ValueError for a size below 1
    or a picture smaller than `multiple`."""
    if min(target_width, target_height) < 1:
        raise ValueError(f"{target_width}x{target_height} px: both sides must be 1 or more")
    if fit == "keep":
        target_width, target_height = (side // multiple * multiple for side in picture.size)
        if not (target_width and target_height):
            raise ValueError(f"--fit keep: {picture.width}x{picture.height} px is smaller than the {multiple} px that "
                             "the model needs; use --fit crop")
        left, top = (picture.width - target_width) // 2, (picture.height - target_height) // 2
        fitted = picture.crop((left, top, left + target_width, top + target_height))
    elif fit == "pad":
        fitted = ImageOps.pad(picture, (target_width, target_height), Image.Resampling.LANCZOS, color="white")
    else:
        box = center_box(*picture.size, target_width, target_height) if fit == "crop" else (0, 0, *picture.size)
        fitted = picture.crop(box).resize((target_width, target_height), Image.Resampling.LANCZOS)
    fitted.info = dict(picture.info)
    return fitted


def resize_image_center_crop(image_path_or_url, target_width, target_height, **limits):
    """The picture at a path or address as PIL RGB of target_width x target_height px: the largest centred box of that
    shape, resized by Lanczos. limits: timeout_s, max_bytes, max_pixels; errors as in `open_picture`."""
    if min(target_width, target_height) < 1:
        raise ValueError(f"{target_width}x{target_height} px: both sides must be 1 or more")
    return fit_picture(open_picture(image_path_or_url, **limits), target_width, target_height)


def picture_name(source):
    """Name of a picture for records that leave this machine: a file's own, an address without its query."""
    if URL.match(str(source)):
        return urlsplit(str(source))._replace(query="", fragment="", netloc=urlsplit(str(source)).hostname).geturl()
    return Path(source).name


def save_png(path, picture, parameters):
    """Write a PIL image as PNG in one rename, `parameters`, JSON-safe, in its text chunk."""
    path, text = Path(path), PngInfo()
    text.add_text(PARAMETERS_KEY, json.dumps(parameters, ensure_ascii=False, allow_nan=False))
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, "PNG", pnginfo=text, icc_profile=picture.info.get("icc_profile"))
    os.replace(temporary, path)


def read_parameters(path):
    """The parameters that `save_png` has put into a PNG. UnreadableImage where there are none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.text.get(PARAMETERS_KEY)
    except OSError as error:
        raise UnreadableImage(path, "not a PNG file that can be read") from error
    try:
        parameters = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise UnreadableImage(path, "no parameters of recipes.flux_img2img in it") from error
    return parameters
