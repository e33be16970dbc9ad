"""Image files, read and written safely: every picture of the project comes in through `load_image` and leaves through
`save_image`.

Pixels are uint8 RGB in the colour space of the file. An RGB ICC profile is handed back and not applied, so that the
restored file carries the same profile and the values are converted once, by the viewer. CMYK has no RGB values of its
own and is converted to sRGB. Transparent pixels are composited over white (their hidden colour is arbitrary) and the
alpha channel is handed back apart."""
import os
import threading
import uuid
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms

MAX_PIXELS = 200_000_000
MIN_SIDE_PX = 16
EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .avif .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .psd .qoi .sgi".split()
)
# Only formats that Pillow decodes itself and knows by their first bytes: EPS would start Ghostscript, and TGA takes
# text for an image.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "PSD", "QOI", "SGI")
_ALPHA_FORMATS = ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = ExifTags.Base.Orientation
# Tags of a TIFF that describe its own storage (sizes, strips, samples, embedded profiles): wrong in another file.
_STORAGE_TAGS = frozenset([*range(254, 267), 273, *range(277, 282), 284, *range(317, 348), *range(512, 533),
                           700, 33723, 34377, 34675])
_limit_lock = threading.Lock()


class UnreadableImage(ValueError):
    """A file that cannot be used as an image. str() is "<path>: <reason>"."""

    def __init__(self, path, reason):
        super().__init__(str(path), " ".join(str(reason).split()))

    def __str__(self):
        return f"{self.args[0]}: {self.args[1]}"


class LoadedImage(NamedTuple):
    """rgb (H, W, 3) uint8, upright. alpha (H, W) uint8 or None. icc_profile of rgb or None (None means sRGB).
    exif: bytes with the orientation reset to 1, or None. format: Pillow's name of the format found in the content."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    icc_profile: bytes | None
    exif: bytes | None
    format: str


def list_images(root, recursive=True):
    """Image files below `root`, sorted, hidden files and folders ignored; a file is returned as [file].
    Symlinked folders are followed, each real folder once. FileNotFoundError when there is none."""
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such file or folder; check the path")

    def fail(error):
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions") from error

    paths, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if recursive and not name.startswith("."))
        paths += [Path(folder, name) for name in names
                  if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS]
    if not paths:
        where = "in or below it" if recursive else "in it"
        raise FileNotFoundError(f"{root}: no image {where}; expected files such as .png, .jpg, .webp or .tif")
    return sorted(paths)


def _open_image(source, max_pixels, name):
    if isinstance(source, (str, Path)):
        try:
            if os.path.getsize(source) == 0:
                raise UnreadableImage(name, "empty file (0 bytes)")
        except OSError as error:
            raise UnreadableImage(name, error.strerror) from error
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Pillow's own bomb limit would warn above 89 MP and refuse above 179 MP, whatever max_pixels says.
    with _limit_lock:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
        except Image.UnidentifiedImageError as error:
            raise UnreadableImage(name, "not an image") from error
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
            raise UnreadableImage(name, error) from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UnreadableImage(name, f"{width}x{height} px is more than {max_pixels} pixels; raise --max_pixels")
    return image


def _read_exif(image, name):
    try:
        # Not image.getexif(): for a PNG without EXIF that decodes the whole image to look behind it.
        return Image.Image.getexif(image)
    except Exception as error:
        warnings.warn(f"{name}: damaged EXIF ignored ({error})", stacklevel=3)
        return Image.Exif()


def _exif_bytes(exif, name):
    for tag in _STORAGE_TAGS & set(exif):
        del exif[tag]
    if not exif:
        return None
    exif[_ORIENTATION] = 1
    try:
        return exif.tobytes()
    except Exception as error:
        warnings.warn(f"{name}: damaged EXIF dropped ({error})", stacklevel=3)
        return None


def image_size(source, max_pixels=MAX_PIXELS, name=None):
    """(height, width) of the upright image, from the header alone: of a file inside an archive no more is read.
    `source` as for `load_image`.
    UnreadableImage when it is not an image or has more than `max_pixels`."""
    name = name or source
    with _open_image(source, max_pixels, name) as image:
        width, height = image.size
        # Pillow turns a TIFF itself: its size is upright already.
        is_turned = image.format != "TIFF" and _read_exif(image, name).get(_ORIENTATION) in (5, 6, 7, 8)
        return (width, height) if is_turned else (height, width)


def load_image(source, max_pixels=MAX_PIXELS, name=None):
    """Decode the first frame of an image file, upright, as a LoadedImage.
    source: a path; or an open file, or the bytes of one, together with a `name` for messages. The format is found in
    the content.
    16-bit grey is scaled by 1/257, float grey in [0, 1] by 255; other float ranges are refused.
    UnreadableImage when it cannot be decoded in full, or has more than `max_pixels` by its header (nothing is then
    decoded)."""
    name = name or source
    with _open_image(source, max_pixels, name) as image:
        try:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its preview
            image.load()
        except Exception as error:
            raise UnreadableImage(name, error) from error
        if frames > 1:
            warnings.warn(f"{name}: {frames} frames, only the first is used", stacklevel=2)
        exif = _read_exif(image, name)
        icc_profile = image.info.get("icc_profile")
        upright = image
        if (orientation := exif.get(_ORIENTATION, 1)) in _UPRIGHT:
            upright = image.transpose(_UPRIGHT[orientation])
        try:
            rgb, alpha = _split_alpha(upright, icc_profile, name)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, UnreadableImage) else UnreadableImage(name, error) from error
        # A profile of another colour space (grey, CMYK) does not describe the RGB values returned here.
        if icc_profile and (icc_profile[16:20] != b"RGB " or image.mode == "CMYK"):
            icc_profile = None
        return LoadedImage(rgb, alpha, icc_profile, _exif_bytes(exif, name), image.format)


def load_rgb(source, max_pixels=MAX_PIXELS, name=None):
    """The (H, W, 3) uint8 pixels of `load_image`."""
    return load_image(source, max_pixels, name).rgb


def _split_alpha(image, icc_profile, name):
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_grey_to_uint8(np.asarray(image), name)[..., None], 3, axis=2), None
    if image.mode == "CMYK" and icc_profile:
        try:
            srgb = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(BytesIO(icc_profile)), ImageCms.createProfile("sRGB"), outputMode="RGB")
            return np.array(srgb), None
        except (ImageCms.PyCMSError, OSError) as error:
            warnings.warn(f"{name}: damaged CMYK profile ignored ({error})", stacklevel=3)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")), None
    rgba = np.array(image.convert("RGBA")).astype(np.uint16)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8), alpha[..., 0].astype(np.uint8)


def _grey_to_uint8(grey, name):
    if grey.dtype.kind == "f":
        if not (grey.min() >= 0 and grey.max() <= 1):  # also when a value is NaN
            raise UnreadableImage(name, f"float values from {grey.min():g} to {grey.max():g}; save it scaled to [0, 1]")
        return np.round(grey * 255).astype(np.uint8)
    if grey.min() < 0 or grey.max() > 65535:
        raise UnreadableImage(name, f"integer values from {grey.min()} to {grey.max()}; save it with 8 or 16 bits")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def save_image(path, rgb, alpha=None, icc_profile=None, exif=None, quality=95):
    """Write an image atomically, in the format of the extension of `path`.
    rgb: (H, W, 3) uint8, as composited over white where `alpha` (H, W) uint8 is given: the stored colours are such
    that compositing them over white gives `rgb` again. Formats without alpha (JPEG, BMP) store `rgb` alone.
    quality: 1 to 100, for the lossy formats. ValueError for an extension that cannot be written."""
    path = Path(path)
    Image.init()
    image_format = Image.EXTENSION.get(path.suffix.lower())
    if image_format not in _FORMATS or image_format not in Image.SAVE:
        raise ValueError(f"{path}: cannot write the format {path.suffix!r}; use .png, .jpg, .webp or .tif")
    pixels = rgb
    if alpha is not None and image_format in _ALPHA_FORMATS:
        opacity = np.maximum(alpha, 1)[..., None].astype(np.float32) / 255
        colour = np.clip(np.round(255 - (255 - rgb.astype(np.float32)) / opacity), 0, 255)
        pixels = np.concatenate([colour.astype(np.uint8), alpha[..., None]], axis=2)
    options = {"quality": quality} if image_format in ("JPEG", "WEBP", "AVIF") else {}
    if image_format == "JPEG":
        options["subsampling"] = 0
    if icc_profile:
        options["icc_profile"] = icc_profile
    if exif:
        options["exif"] = exif
    # A name of fixed length: the name of the image plus a suffix may be too long for the file system.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, image_format, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
