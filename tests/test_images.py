"""Image files: the loader's faults and the writer's promises. Every file is made here with Pillow."""
import os
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from my_dataset.images import (
    MAX_PIXELS,
    UnreadableImage,
    image_size,
    list_images,
    load_image,
    load_rgb,
    save_image,
)

ORIENTATION, MAKE, EXPOSURE_IFD = 0x0112, 0x010F, 0x8769


def gradient(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 2], axis=-1).astype(np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def png_with_size(width, height):
    """A PNG of a few bytes whose header claims any size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# ---- listing


def test_listing_is_sorted_recursive_and_case_insensitive(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.TIF", "sub/deep/d.webp"):
        write(tmp_path / name, gradient())
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpg", "b.PNG", "sub/c.TIF", "sub/deep/d.webp"]
    assert [path.name for path in list_images(tmp_path, recursive=False)] == ["a.jpg", "b.PNG"]


def test_listing_ignores_hidden_and_system_files(tmp_path):
    image = write(tmp_path / "a.png", gradient())
    for name in ("Thumbs.db", ".DS_Store", ".hidden.png", "._a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path / ".cache" / "b.png", gradient())
    assert list_images(tmp_path) == [image]


def test_listing_of_a_symlink_loop_terminates(tmp_path):
    write(tmp_path / "sub" / "a.png", gradient())
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]


def test_listing_follows_a_symlinked_folder(tmp_path):
    write(tmp_path / "elsewhere" / "a.png", gradient())
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "link")
    assert list_images(tmp_path / "root") == [tmp_path / "root" / "link" / "a.png"]


def test_listing_of_a_file_is_that_file(tmp_path):
    path = write(tmp_path / "a.png", gradient())
    assert list_images(path) == [path]


@pytest.mark.parametrize("make", (lambda path: None, lambda path: path.mkdir()), ids=("missing", "empty"))
def test_listing_of_nothing_is_an_error_naming_the_folder(tmp_path, make):
    make(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="photos: no "):
        list_images(tmp_path / "photos")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_without_permission_is_an_error(tmp_path):
    write(tmp_path / "a.png", gradient())
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="closed: cannot be listed"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ("übung ñ.png", "photo of a cat.png", "🦊.png", "x" * 250 + ".png"))
def test_unicode_spaces_emoji_and_long_names_work(tmp_path, name):
    save_image(tmp_path / name, gradient())
    (path,) = list_images(tmp_path)
    assert path.name == name
    assert np.array_equal(load_rgb(path), gradient())


# ---- files that are no images


@pytest.mark.parametrize("content, reason", ((b"", "empty file"), (b"hello\n" * 50, "not an image")))
def test_zero_bytes_and_text_are_unreadable(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for reader in (image_size, load_image):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        load_rgb(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", (".jpg", ".png", ".webp", ".tif"))
def test_a_truncated_file_is_unreadable_though_its_header_is_fine(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = write(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage):
        load_image(path)
    if suffix == ".jpg":
        assert image_size(path) == (64, 64)


def test_a_bomb_is_refused_by_its_header_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_with_size(20000, 20000))
    for reader in (image_size, load_image):
        with pytest.raises(UnreadableImage, match="20000x20000 px is more than .* --max_pixels"):
            reader(path)


def test_max_pixels_is_the_only_limit(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_with_size(20000, 20000))
    before = Image.MAX_IMAGE_PIXELS
    assert image_size(path, max_pixels=400_000_000) == (20000, 20000)
    assert Image.MAX_IMAGE_PIXELS == before
    small = write(tmp_path / "small.png", gradient(10, 10))
    assert load_rgb(small, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(UnreadableImage):
        load_rgb(small, max_pixels=99)
    assert MAX_PIXELS == 200_000_000


def test_eps_is_never_handed_to_ghostscript(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="not an image"):
        image_size(tmp_path / "a.png")


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "two\nlines")))
    assert str(error) == "a.png: two lines"


# ---- pixels


def test_a_wrong_extension_is_decoded_by_content(tmp_path):
    write(tmp_path / "a.webp", gradient(), lossless=True)
    os.rename(tmp_path / "a.webp", tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.format == "WEBP"
    assert np.array_equal(loaded.rgb, gradient())


def test_bytes_are_decoded_like_a_file(tmp_path):
    path = write(tmp_path / "a.png", gradient())
    assert np.array_equal(load_rgb(path.read_bytes(), name="row 3"), gradient())
    with pytest.raises(UnreadableImage, match="row 3: not an image"):
        load_rgb(b"nothing", name="row 3")


@pytest.mark.parametrize("suffix", (".png", ".tif"))
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256 * 16).reshape(16, 256).astype(np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(ramp).save(path)
    rgb = load_rgb(path)
    assert np.array_equal(rgb[..., 0], np.round(ramp / 257).astype(np.uint8))
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_16_bit_rgb_keeps_its_brightness(tmp_path):
    cv2 = pytest.importorskip("cv2")
    image = gradient()
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1].astype(np.uint16) * 257)
    assert np.abs(load_rgb(tmp_path / "a.png").astype(int) - image).max() <= 1


def test_float_tiff_in_0_1_is_scaled_and_other_ranges_are_refused(tmp_path):
    ramp = np.linspace(0, 1, 512, dtype=np.float32).reshape(16, 32)
    Image.fromarray(ramp).save(tmp_path / "unit.tif")
    assert np.array_equal(load_rgb(tmp_path / "unit.tif")[..., 1], np.round(ramp * 255).astype(np.uint8))
    for name, values in (("high", ramp * 300), ("low", ramp - 0.5), ("nan", np.where(ramp > 0.5, np.nan, ramp))):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(UnreadableImage, match="float values"):
            load_rgb(tmp_path / f"{name}.tif")


def test_integers_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((16, 16), 70000, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="integer values from 70000"):
        load_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ("1", "L", "P", "YCbCr", "CMYK"))
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("YCbCr", "CMYK") else "a.png")
    Image.new("RGB", (20, 16), (255, 255, 255)).convert(mode).save(path)
    rgb = load_rgb(path)
    assert rgb.shape == (16, 20, 3) and rgb.dtype == np.uint8
    assert rgb.min() >= 253


def test_cmyk_with_a_profile_becomes_srgb_through_it(tmp_path, monkeypatch):
    cmyk = Image.new("CMYK", (20, 16), (0, 255, 255, 0))
    cmyk.save(tmp_path / "a.jpg", icc_profile=srgb_profile(), quality=100)
    seen = {}

    def convert(image, source, target, outputMode):  # noqa: N803, the name is ImageCms's
        seen.update(mode=image.mode, profile=source.tobytes(), output=outputMode)
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    loaded = load_image(tmp_path / "a.jpg")
    assert seen == {"mode": "CMYK", "profile": srgb_profile(), "output": "RGB"}
    assert loaded.rgb[0, 0].tolist() == [1, 2, 3]
    assert loaded.icc_profile is None


def test_cmyk_with_a_damaged_profile_warns_and_falls_back(tmp_path):
    Image.new("CMYK", (20, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", icc_profile=b"x" * 200, quality=100)
    with pytest.warns(UserWarning, match="damaged CMYK profile"):
        red, green, blue = load_rgb(tmp_path / "a.jpg")[8, 8]
    assert red > 240 and green < 15 and blue < 15


def test_an_rgb_profile_is_handed_back_and_not_applied(tmp_path):
    profile = srgb_profile()
    write(tmp_path / "a.png", gradient(), icc_profile=profile)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.icc_profile == profile
    assert np.array_equal(loaded.rgb, gradient())


def test_a_grey_profile_is_not_handed_to_rgb(tmp_path):
    profile = bytearray(srgb_profile())
    profile[16:20] = b"GRAY"
    Image.new("L", (20, 16), 9).save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert load_image(tmp_path / "a.png").icc_profile is None


def test_rgba_is_composited_over_white_and_alpha_returned_apart(tmp_path):
    rgba = np.dstack([np.full((16, 20, 3), (255, 0, 0)), np.linspace(0, 255, 320).reshape(16, 20)]).astype(np.uint8)
    loaded = load_image(write(tmp_path / "a.png", rgba))
    alpha = rgba[..., 3].astype(float)
    assert np.array_equal(loaded.alpha, rgba[..., 3])
    assert np.abs(loaded.rgb[..., 1] - (255 - alpha)).max() <= 0.5
    assert (loaded.rgb[..., 0] == 255).all()
    assert loaded.rgb[0, 0].tolist() == [255, 255, 255]  # not the hidden red


def test_la_and_palette_transparency_are_composited(tmp_path):
    Image.merge("LA", [Image.new("L", (20, 16), value) for value in (0, 51)]).save(tmp_path / "la.png")
    la = load_image(tmp_path / "la.png")
    assert la.alpha[0, 0] == 51 and la.rgb[0, 0].tolist() == [204, 204, 204]
    palette = Image.new("P", (20, 16), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((3, 4), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    p = load_image(tmp_path / "p.png")
    assert p.rgb[0, 0].tolist() == [255, 255, 255] and p.alpha[0, 0] == 0
    assert p.rgb[4, 3].tolist() == [0, 0, 255] and p.alpha[4, 3] == 255


@pytest.mark.parametrize("suffix", (".gif", ".webp", ".tif"))
def test_several_frames_give_the_first_and_a_warning(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 16), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="2 frames, only the first"):
        red, _, blue = load_rgb(tmp_path / f"a{suffix}")[8, 8]
    assert red > 240 and blue < 15


@pytest.mark.filterwarnings("error")
def test_the_preview_in_a_cameras_mpo_is_no_second_frame(tmp_path):
    frames = [Image.fromarray(gradient()), Image.new("RGB", (10, 10))]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    loaded = load_image((tmp_path / "a.mpo").rename(tmp_path / "a.jpg"))
    assert loaded.format == "MPO" and loaded.rgb.shape == (24, 40, 3)


# ---- EXIF


def write_rotated(path, orientation):
    """Store gradient() so that a viewer that obeys the tag shows it upright."""
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[MAKE] = "camera"
    (image if undo is None else image.transpose(undo)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", (".png", ".tif"))
def test_all_exif_orientations_become_upright_and_the_tag_is_reset(tmp_path, orientation, suffix):
    path = write_rotated(tmp_path / f"a{suffix}", orientation)
    assert image_size(path) == (24, 40)
    loaded = load_image(path)
    assert np.array_equal(loaded.rgb, gradient())
    exif = Image.Exif()
    exif.load(loaded.exif)
    assert exif[ORIENTATION] == 1 and exif[MAKE] == "camera"


@pytest.mark.parametrize("suffix", (".png", ".jpg", ".webp", ".tif"))
def test_a_saved_copy_is_not_rotated_twice_and_keeps_exif_and_profile(tmp_path, suffix):
    loaded = load_image(write_rotated(tmp_path / "a.tif", 6))
    out = tmp_path / f"out{suffix}"
    save_image(out, loaded.rgb, icc_profile=srgb_profile(), exif=loaded.exif)
    again = load_image(out)
    assert again.rgb.shape == (24, 40, 3)
    assert again.icc_profile == srgb_profile()
    with Image.open(out) as image:
        assert image.getexif()[ORIENTATION] == 1 and image.getexif()[MAKE] == "camera"


def test_the_header_of_a_png_without_exif_is_read_without_decoding(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", gradient())
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(path) == (24, 40)


def test_exif_of_a_camera_keeps_its_sub_tags(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(EXPOSURE_IFD)[0x829A] = 0.5  # exposure time
    write(tmp_path / "a.jpg", gradient(), exif=exif)
    save_image(tmp_path / "b.jpg", gradient(), exif=load_image(tmp_path / "a.jpg").exif)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif().get_ifd(EXPOSURE_IFD)[0x829A] == 0.5


def test_damaged_exif_is_ignored_with_a_warning(tmp_path):
    write(tmp_path / "a.jpg", gradient(), exif=b"Exif\x00\x00garbage", format="PNG")
    with pytest.warns(UserWarning, match="a.jpg: damaged EXIF ignored"):
        loaded = load_image(tmp_path / "a.jpg")
    assert loaded.rgb.shape == (24, 40, 3) and loaded.exif is None


def test_exif_that_cannot_be_written_is_dropped_with_a_warning(tmp_path, monkeypatch):
    path = write_rotated(tmp_path / "a.png", 6)

    def fail(self):
        raise struct.error("argument out of range")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    with pytest.warns(UserWarning, match="a.png: damaged EXIF dropped"):
        loaded = load_image(path)
    assert loaded.exif is None and np.array_equal(loaded.rgb, gradient())


# ---- writing


@pytest.mark.parametrize("suffix", (".png", ".webp", ".tif"))
def test_alpha_survives_and_the_picture_over_white_is_the_same(tmp_path, suffix):
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (32, 32), dtype=np.uint8)
    alpha[:8] = 255
    rgba = np.dstack([rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), alpha])
    before = load_image(write(tmp_path / "in.png", rgba))
    save_image(tmp_path / f"out{suffix}", before.rgb, alpha=before.alpha, quality=100)
    after = load_image(tmp_path / f"out{suffix}")
    assert np.array_equal(after.alpha, alpha)
    if suffix != ".webp":  # lossy
        assert np.abs(after.rgb.astype(int) - before.rgb).max() <= 1
        assert np.array_equal(after.rgb[:8], rgba[:8, :, :3])


def test_jpeg_stores_the_composite_without_alpha(tmp_path):
    save_image(tmp_path / "a.jpg", np.full((16, 16, 3), 200, np.uint8), alpha=np.zeros((16, 16), np.uint8))
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.alpha is None and abs(int(loaded.rgb[0, 0, 0]) - 200) <= 1


def test_quality_changes_the_size_of_a_jpeg(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_image(tmp_path / "low.jpg", noise, quality=20)
    save_image(tmp_path / "high.jpg", noise)
    assert (tmp_path / "low.jpg").stat().st_size < (tmp_path / "high.jpg").stat().st_size / 2


def test_a_jpeg_keeps_its_colour_in_full_resolution(tmp_path):
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    save_image(tmp_path / "a.jpg", stripes)
    assert np.abs(load_rgb(tmp_path / "a.jpg").astype(int) - stripes).max() < 30


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(path, gradient())
    old = path.read_bytes()

    def fill_disk(self, file, *args, **kwargs):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space"):
        save_image(path, gradient() // 2)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    save_image(tmp_path / "a.png", gradient())
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ("a.xyz", "a", "a.pdf"))
def test_an_unknown_output_format_is_an_error_naming_the_file(tmp_path, name):
    with pytest.raises(ValueError, match="cannot write the format"):
        save_image(tmp_path / name, gradient())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_read_files_are_closed(tmp_path):
    path = write(tmp_path / "a.tif", gradient())
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_with_size(20000, 20000))
    kept = []  # exceptions keep their frames, and so whatever was left open in them
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        kept.append((load_rgb(path), image_size(path)))
        with pytest.raises(UnreadableImage) as caught:
            load_rgb(bomb)
        kept.append(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
