"""Images: each source gives what it holds, only what is asked for is decoded, and each refusal says why."""

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stiffcore.errors import InputError
from stiffcore.networks.images import NORMALIZE, Images, images_in_memory, load_images, network_input
from stiffcore.study import image_digest

CIFAR10_FIRST = [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]


def refused(*args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_images(*args, **options)
    return str(caught.value)


def some_pixels(n: int, height: int = 4, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.fixture
def npz(tmp_path) -> Path:
    np.savez(tmp_path / "a.npz", x=some_pixels(6), y=np.array([1, 0, 1, 2, 0, -1]))
    return tmp_path / "a.npz"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Classes `bird` (2 images), `cat` (1), `dog` (3), beside things that are no images."""
    root, pixels = tmp_path / "pets", some_pixels(6)
    names = ["bird/b.png", "bird/a.PNG", "cat/a.bmp", "dog/3.png", "dog/1.jpg", "dog/2.webp"]
    for name, image in zip(names, pixels, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    (root / "readme.txt").write_text("x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    return root


# ----------------------------------------------------------------------------------------------- samples


def test_the_samples_are_the_first_twenty_test_images():
    images = load_images("samples", count=20)
    assert images.x.shape == (20, 32, 32, 3)
    assert images.x.dtype == np.uint8
    assert images.y.tolist() == CIFAR10_FIRST
    assert images.index.tolist() == list(range(20))
    assert images.source.startswith("samples (foolbox ")
    assert len({images.digest(i) for i in range(len(images))}) == 20


def test_one_image_is_the_default_and_foolbox_is_never_imported():
    before = "foolbox" in sys.modules
    assert len(load_images("samples")) == 1
    assert ("foolbox" in sys.modules) == before


def test_the_photographs_are_of_imagenet_s_size_and_labelled():
    images = load_images("imagenet-samples", index=[0, 10])  # the second is 1024 x 683
    assert images.x.shape == (2, 224, 224, 3)
    assert images.x.dtype == np.uint8
    assert images.y.tolist() == [243, 541]


def test_absent_samples_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    assert "pip install 'stiffcore[demo]'" in refused("samples")


# ----------------------------------------------------------------------------------------------- cifar10


def test_cifar10_without_its_files_says_where_they_should_be(tmp_path):
    assert "--data-root" in refused("cifar10")
    message = refused("cifar10", data_root=tmp_path)
    assert "--download" in message
    assert str(tmp_path / "cifar-10-batches-py") in message


def test_a_failed_download_is_reported(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def unreachable(self: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    message = refused("cifar10", data_root=tmp_path, download=True)
    assert "download failed" in message
    assert "network is unreachable" in message


def test_cifar10_reads_the_test_batch(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    # the real sums are of the real files; these stand-ins have the same layout
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = some_pixels(4, 32, 32)
    planes = pixels.transpose(0, 3, 1, 2).reshape(4, -1)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": planes, "labels": [3, 1, 1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c", "d"]}))
    images = load_images("cifar10", data_root=tmp_path, index=[3, 1])
    assert np.array_equal(images.x, pixels[[3, 1]])
    assert images.y.tolist() == [0, 1]
    assert images.y.dtype == np.int64


# --------------------------------------------------------------------------------------------------- npz


def test_an_npz_gives_its_images(npz):
    images = load_images(str(npz), count=6)
    assert np.array_equal(images.x, some_pixels(6))
    assert images.y.tolist() == [1, 0, 1, 2, 0, -1]
    assert images.source == str(npz)


def test_each_thing_wrong_with_an_npz_is_named_at_once(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((2, 3, 4, 4)), y=np.zeros((2, 1)))
    message = refused(str(path))
    assert "x is float64 (2, 3, 4, 4)" in message
    assert "y is float64 (2, 1)" in message
    np.savez(path, a=np.zeros(1))
    message = refused(str(path))
    assert "no array 'x' (it has 'a')" in message
    assert "no array 'y'" in message
    np.savez(path, x=some_pixels(3), y=np.zeros(2, dtype=int))
    assert "2 labels" in refused(str(path))
    np.savez(path, x=some_pixels(0), y=np.zeros(0, dtype=int))
    assert "(0, 4, 5, 3)" in refused(str(path))
    np.savez(path, x=np.uint8(3), y=np.int64(3))
    message = refused(str(path))
    assert "x is uint8 ()" in message
    assert "y is int64 ()" in message


def test_an_npz_of_objects_a_damaged_one_and_an_absent_one_are_refused(tmp_path):
    np.savez(tmp_path / "o.npz", x=some_pixels(1), y=np.array([{}], dtype=object))
    assert "Python objects" in refused(str(tmp_path / "o.npz"))
    for content in (b"", b"junk", (tmp_path / "o.npz").read_bytes()[:100]):
        (tmp_path / "d.npz").write_bytes(content)
        assert "damaged" in refused(str(tmp_path / "d.npz"))
    assert "there is no file" in refused(str(tmp_path / "absent.npz"))


# ------------------------------------------------------------------------------------------------ folder


def test_a_folder_is_labelled_by_its_sorted_classes(folder):
    images = load_images(str(folder), count=6)
    assert images.y.tolist() == [0, 0, 1, 2, 2, 2]
    assert images.x.shape == (6, 4, 5, 3)
    pixels = some_pixels(6)
    # the lossless ones, in sorted order of their names: bird/a.PNG, bird/b.png, cat/a.bmp, dog/3.png
    assert np.array_equal(np.asarray(images.x)[[0, 1, 2, 5]], pixels[[1, 0, 2, 3]])
    assert images.source == f"{folder} (3 classes)"


def test_other_colour_modes_become_rgb(tmp_path):
    (tmp_path / "c").mkdir()
    Image.fromarray(some_pixels(1)[0, :, :, 0]).save(tmp_path / "c" / "a.png")
    x = load_images(str(tmp_path)).x
    assert np.array_equal(x[0], np.repeat(some_pixels(1)[0, :, :, :1], 3, axis=2))


def test_only_chosen_images_are_decoded(folder):
    (folder / "cat" / "a.bmp").write_bytes(b"junk")
    assert load_images(str(folder), index=[0, 5]).y.tolist() == [0, 2]
    message = refused(str(folder), index=[2])
    assert "a.bmp cannot be read" in message


def test_the_first_image_of_another_size_is_named(folder):
    Image.fromarray(some_pixels(1, 7, 8)[0]).save(folder / "cat" / "a.bmp")
    message = refused(str(folder), count=6)
    assert "a.bmp is 8x7" in message
    assert "a.PNG is 5x4" in message


def test_a_folder_without_class_folders_says_so(tmp_path):
    assert "no class folder" in refused(str(tmp_path))
    Image.fromarray(some_pixels(1)[0]).save(tmp_path / "a.png")
    assert "lie in it directly" in refused(str(tmp_path))


def test_an_unknown_source_lists_the_known_ones(tmp_path):
    message = refused(str(tmp_path / "nowhere"))
    for form in ("samples", "cifar10", ".npz", "folder of class folders"):
        assert form in message


# ------------------------------------------------------------------------------------------------ choice


def test_an_index_keeps_its_order(npz):
    images = load_images(str(npz), index=[4, 0, 2])
    assert images.index.tolist() == [4, 0, 2]
    assert images.y.tolist() == [0, 1, 1]
    assert np.array_equal(images.x, some_pixels(6)[[4, 0, 2]])


def test_bad_indices_are_all_named(npz):
    message = refused(str(npz), index=[0, 6, -1, 2, 2])
    assert "has 6 images" in message
    assert "6, -1" in message
    assert "twice: 2" in message
    assert "empty" in refused(str(npz), index=[])


def test_per_label_takes_the_first_of_each_known_label_in_source_order(npz):
    images = load_images(str(npz), per_label=1)
    assert images.index.tolist() == [0, 1, 3]
    assert images.y.tolist() == [1, 0, 2]
    message = refused(str(npz), per_label=2)
    assert "label 2 has 1" in message
    assert "per_label 1" in message


def test_per_label_of_the_samples():
    images = load_images("samples", per_label=1)
    assert images.index.tolist() == [CIFAR10_FIRST.index(label) for label in dict.fromkeys(CIFAR10_FIRST)]


def test_per_label_needs_known_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=some_pixels(2), y=np.array([-1, -1]))
    assert "no known label" in refused(str(tmp_path / "a.npz"), per_label=1)


def test_a_count_beyond_the_source_is_refused(npz):
    assert "has 6 images, 7 were asked for" in refused(str(npz), count=7)


def test_choices_exclude_each_other_and_are_positive(npz):
    message = refused(str(npz), count=0, index=[0], per_label=-1)
    assert "count and index and per_label exclude each other" in message
    assert "count is 0" in message
    assert "per_label is -1" in message


# -------------------------------------------------------------------------------------------- the arrays


@pytest.mark.parametrize("normalize", list(NORMALIZE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_input_normalises_in_the_dtype(normalize, dtype):
    image = some_pixels(1)[0]
    x = network_input(image, normalize, dtype)
    assert x.shape == (1, 3, 4, 5)
    assert x.dtype == dtype
    assert x.is_contiguous()
    mean, std = (np.array(v) for v in NORMALIZE[normalize])
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(x.numpy(), expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_a_floating_image_passes_through():
    image = np.random.default_rng(0).normal(size=(2, 7))
    image.flags.writeable = False
    x = network_input(image, "none", torch.float64)
    assert x.shape == (1, 2, 7)
    assert np.array_equal(x[0].numpy(), image)


@pytest.mark.parametrize(
    ("image", "normalize", "said"),
    [
        (np.zeros((4, 4, 3), np.uint8), "mnist", "unknown normalize"),
        (np.zeros((3, 4, 4)), "cifar10", "use normalize 'none'"),
        (np.zeros((3, 4, 4), np.uint8), "none", r"uint8 \(3, 4, 4\)"),
        (np.zeros((4, 4, 3), np.int64), "none", "int64"),
        (np.full((1, 2), np.nan), "none", "2 values that are NaN"),
    ],
)
def test_network_input_refuses_what_it_cannot_take(image, normalize, said):
    with pytest.raises(InputError, match=said):
        network_input(image, normalize, torch.float32)


def test_digests_see_bytes_shape_and_dtype():
    def digest(x: np.ndarray) -> str:
        n = np.arange(len(x), dtype=np.int64)
        return Images(x, n, n, "test").digest(0)

    x = some_pixels(2)
    assert digest(x) == digest(x.copy()) == digest(np.asfortranarray(x))
    changed = x.copy()
    changed[0, 0, 0, 0] += 1
    forms = [x, changed, x.swapaxes(1, 2), x / 255, (x / 255).astype(np.float32)]
    assert len({digest(form) for form in forms}) == len(forms)


def test_arrays_that_do_not_go_together_are_all_named():
    with pytest.raises(InputError) as caught:
        Images(np.zeros((2, 4, 4), np.uint8), np.zeros(3, np.int64), np.zeros(2, np.int32), "test")
    for part in ("x is uint8 (2, 4, 4)", "y is int64 (3,)", "index is int32 (2,)"):
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------ pixels and labels


def in_a_class(tmp_path: Path, name: str, write) -> Path:
    """The root of a folder of one class with one file, which `write` makes."""
    (tmp_path / "c").mkdir(exist_ok=True)
    write(tmp_path / "c" / name)
    return tmp_path


def pixels_of(tmp_path: Path, name: str, image: Image.Image, **options: object) -> np.ndarray:
    return load_images(str(in_a_class(tmp_path, name, lambda path: image.save(path, **options)))).x[0]


def deep_png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits; colour 0 grey, 2 RGB, 6 RGBA."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_grey_of_sixteen_bits_is_scaled_to_eight(tmp_path, suffix):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = pixels_of(tmp_path, f"a{suffix}", Image.fromarray(grey))
    assert np.array_equal(found, np.repeat((grey // 257)[:, :, None], 3, axis=2))
    x = load_images(str(tmp_path)).x
    assert np.array_equal(x[0, 0, :, 0], (grey // 257)[0])
    assert np.array_equal(x[:, 0, :, 0], (grey // 257)[:1])


def test_colours_of_sixteen_bits_keep_their_high_byte(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    root = in_a_class(tmp_path, "a.png", lambda path: path.write_bytes(deep_png(rgb, 2)))
    assert np.array_equal(load_images(str(root)).x[0], rgb >> 8)


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".gif", ".ppm", ".jfif"])
def test_other_ordinary_formats_are_read(tmp_path, suffix):
    flat = np.zeros((4, 5, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    found = pixels_of(
        tmp_path, f"a{suffix}", Image.fromarray(flat), **({"format": "JPEG"} if suffix == ".jfif" else {})
    )
    assert np.abs(found.astype(int) - flat).max() <= 2


@pytest.mark.parametrize("mode", ["P", "L", "1", "CMYK", "YCbCr"])
def test_palettes_and_other_colours_become_rgb_as_pillow_has_them(tmp_path, mode):
    image = Image.fromarray(some_pixels(1)[0]).convert(mode)
    found = pixels_of(tmp_path, "a.tif" if mode in ("CMYK", "YCbCr") else "a.png", image)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_an_alpha_channel_is_nothing_where_it_is_opaque_and_refused_where_not(tmp_path, suffix):
    rgb, options = some_pixels(1)[0], {"lossless": True} if suffix == ".webp" else {}
    opaque = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
    assert np.array_equal(pixels_of(tmp_path, f"a{suffix}", opaque, **options), rgb)
    opaque.putpixel((2, 1), (1, 2, 3, 254))
    opaque.save(tmp_path / "c" / f"a{suffix}", **options)
    assert "transparent" in refused(str(tmp_path))


def test_a_transparent_colour_is_refused_where_a_pixel_has_it(tmp_path):
    image = Image.fromarray(some_pixels(1)[0]).convert("P")
    unused = next(i for i in range(256) if i not in set(image.tobytes()))
    assert pixels_of(tmp_path, "a.gif", image, transparency=unused).shape == (4, 5, 3)
    image.save(tmp_path / "c" / "a.gif", transparency=image.getpixel((0, 0)))
    assert "transparent" in refused(str(tmp_path))
    (tmp_path / "c" / "a.gif").unlink()
    grey = np.full((2, 2), 4096, np.uint16)
    image = Image.fromarray(grey)
    image.save(tmp_path / "c" / "b.png", transparency=4096)
    if "transparency" in Image.open(tmp_path / "c" / "b.png").info:
        assert "transparent" in refused(str(tmp_path))


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", ".webp"])
def test_several_frames_are_refused_by_their_number(tmp_path, suffix):
    frames = [Image.fromarray(pixels) for pixels in some_pixels(3)]
    root = in_a_class(
        tmp_path, f"a{suffix}", lambda path: frames[0].save(path, save_all=True, append_images=frames[1:])
    )
    assert "3 frames" in refused(str(root))


def test_a_photograph_is_upright_as_its_file_says(tmp_path):
    upright = some_pixels(1, 4, 6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    found = pixels_of(tmp_path, "a.png", Image.fromarray(np.rot90(upright)), exif=exif)
    assert np.array_equal(found, upright)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype):
    image = Image.fromarray(np.linspace(0, 1, 16).reshape(4, 4).astype(dtype))
    root = in_a_class(tmp_path, "a.tif", image.save)
    assert "range" in refused(str(root))


def test_a_program_is_never_run_for_an_image_whatever_its_name(tmp_path, monkeypatch):
    import PIL.EpsImagePlugin

    def run(*args: object, **options: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for suffix in (".png", ".jpg", ".tif"):
        root = in_a_class(tmp_path, f"a{suffix}", lambda path: path.write_bytes(eps))
        assert "cannot be read as an image" in refused(str(root))
        (tmp_path / "c" / f"a{suffix}").unlink()


def grey_tiff(values: np.ndarray, *, colour: int = 1, sample: int = 1, orientation: int = 1) -> bytes:
    """A TIFF that is not compressed; colour 0 has 0 for white, sample 2 is signed."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: colour, 273: 0, 274: orientation}
    tags |= {277: 1, 278: height, 279: values.nbytes, 339: sample}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values.tobytes()


@pytest.mark.parametrize("dtype", ["<u1", "<u2"])
def test_a_grey_tiff_is_turned_upright_without_being_scrambled(tmp_path, dtype):
    high = np.arange(8).reshape(2, 4) * 30
    data = grey_tiff((high * (257 if dtype == "<u2" else 1)).astype(dtype), orientation=6)
    root = in_a_class(tmp_path, "a.tif", lambda path: path.write_bytes(data))
    assert np.array_equal(load_images(str(root)).x[0][..., 0], np.rot90(high, -1))


@pytest.mark.parametrize(
    ("dtype", "options", "why"),
    [("<u2", {"colour": 0}, "0 for white"), ("<u1", {"sample": 2}, "range"), ("<u2", {"sample": 2}, "range")],
)
def test_tiffs_that_pillow_misreads_are_refused(tmp_path, dtype, options, why):
    data = grey_tiff(np.arange(8, dtype=dtype).reshape(2, 4), **options)
    assert why in refused(str(in_a_class(tmp_path, "a.tif", lambda path: path.write_bytes(data))))


def test_eight_bits_with_0_for_white_are_read_as_they_are_meant(tmp_path):
    values = np.arange(8, dtype="u1").reshape(2, 4)
    root = in_a_class(tmp_path, "a.tif", lambda path: path.write_bytes(grey_tiff(values, colour=0)))
    assert np.array_equal(load_images(str(root)).x[0][..., 0], 255 - values)


@pytest.mark.parametrize(("bits", "colour", "row"), [(2, 0, b"\x30"), (4, 0, b"\x0f"), (16, 2, bytes(range(12)))])
def test_a_transparent_colour_in_other_bits_than_eight_is_refused(tmp_path, bits, colour, row):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    # the colour of the second pixel
    key = row[6:] if colour else struct.pack(">H", 2**bits - 1)
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert "transparent colour" in refused(str(in_a_class(tmp_path, "a.png", lambda path: path.write_bytes(data))))


def test_images_that_are_passed_over_are_named(folder):
    (folder / "cat" / "0001").write_bytes(b"x")
    Image.fromarray(some_pixels(1)[0]).save(folder / "loose.png")
    (folder / "cat" / "b.heic").write_bytes(b"x")
    (folder / "dog" / "more").mkdir()
    images = load_images(str(folder), count=6)
    assert len(images) == 6
    for name in ("loose.png", "cat/b.heic", "cat/0001", "dog/more"):
        assert name in images.source
    assert "notes.txt" not in images.source


def test_an_image_of_more_pixels_than_memory_holds_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    root = in_a_class(tmp_path, "a.png", Image.new("1", (9000, 9000)).save)
    assert (tmp_path / "c" / "a.png").stat().st_size < 20_000

    def decode(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "convert", decode)
    message = refused(str(root), allowed=100 << 20)
    assert "9000 x 9000" in message
    assert "100 MiB are allowed" in message


def bomb(path: Path, shape: tuple[int, ...], content: bytes, compression: int) -> Path:
    """An .npz whose x declares a shape; what it holds is `content`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", header.getvalue() + content)
        archive.writestr("y.npy", npy(np.zeros(shape[0], np.int64) if shape[0] < 99 else np.zeros(1, np.int64)))
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npz_that_declares_more_than_it_holds_is_refused_before_anything_is_allocated(tmp_path, compression):
    path = bomb(tmp_path / "a.npz", (10_000_000, 32, 32, 3), b"\0" * 9999, compression)
    tracemalloc.start()
    try:
        message = refused(str(path), allowed=1 << 60)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert "declares 28.61 GiB" in message


def test_an_npz_of_which_memory_holds_no_image_is_refused_and_of_others_one_image_is_held(tmp_path):
    path = bomb(tmp_path / "a.npz", (40, 500, 500, 3), bytes(40 * 500 * 500 * 3), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 40_000
    assert "are allowed" in refused(str(path), allowed=500_000)
    tracemalloc.start()
    try:
        images = load_images(str(path), allowed=20 << 20, count=40)
        assert [image.sum() for image in images] == [0] * 40
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert images.x.shape == (40, 500, 500, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_of_an_npz_are_read_one_by_one_in_any_order(tmp_path, save, order):
    x = np.random.default_rng(0).integers(0, 256, (50, 7, 5, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", y=np.arange(50), more=np.zeros(9), x=np.asarray(x, order=order))
    index = [7, 3, 49, 0, 48, 11]
    images = load_images(str(tmp_path / "a.npz"), index=index)
    assert np.array_equal(images.x, x[index])
    assert [images.digest(i) for i in (5, 0)] == [image_digest(x[11]), image_digest(x[7])]
    assert images.y.tolist() == index


def test_a_flipped_bit_of_an_npz_is_found_though_its_image_was_not_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", x=some_pixels(6), y=np.arange(6))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[raw.rindex(some_pixels(6)[5].tobytes()) + 3] ^= 1
    (tmp_path / "a.npz").write_bytes(raw)
    assert "damaged" in refused(str(tmp_path / "a.npz"), count=1)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([2.7, 1], "got 2.7"),
        ([1, float("nan")], "got nan"),
        ([1, float("inf")], "got inf"),
        (["cat", "dog"], "cat, dog"),
        ([None, 1], "None"),
        ([1 + 0j, 1], "complex128"),
        (np.array([2**63, 1], np.uint64), str(2**63)),
        ([[1], [2]], r"y is int64 \(2, 1\)"),
        ([1, [2]], "must be arrays"),
    ],
)
def test_labels_are_whole_numbers(labels, said):
    with pytest.raises(InputError, match=said):
        images_in_memory(np.zeros((2, 3)), labels)


@pytest.mark.parametrize(
    "labels", [[2, -1], [2.0, -1.0], np.array([2, -1], np.int8), torch.tensor([2, -1]), torch.tensor([2.0, -1.0])]
)
def test_whole_labels_of_any_type_are_taken(labels):
    assert images_in_memory(np.zeros((2, 3)), labels).y.tolist() == [2, -1]
    assert images_in_memory(np.zeros((2, 3))).y.tolist() == [-1, -1]


def test_labels_of_an_npz_are_whole_numbers_too(tmp_path):
    for labels in ([2, -1], [2.0, -1.0], np.array([2, -1], ">i4")):
        np.savez(tmp_path / "a.npz", x=some_pixels(2), y=np.array(labels))
        assert load_images(str(tmp_path / "a.npz"), count=2).y.tolist() == [2, -1]
    for labels, said in (([2.7, 1], "2.7"), ([np.nan, 1], "nan"), (np.array([2**63, 1], np.uint64), str(2**63))):
        np.savez(tmp_path / "b.npz", x=some_pixels(2), y=np.array(labels))
        assert said in refused(str(tmp_path / "b.npz"))


def test_arrays_in_memory_keep_their_numbers():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    narrow = x.bfloat16()
    assert np.array_equal(images_in_memory(narrow).x, narrow.float().numpy())
    assert images_in_memory(narrow).x.dtype == np.float32
    swapped = x.numpy().astype(">f4")
    assert np.array_equal(images_in_memory(swapped).x, x.numpy())
    assert network_input(images_in_memory(swapped).x[0], "none", torch.float64).dtype == torch.float64
    assert np.array_equal(images_in_memory(x.requires_grad_()).x, x.detach().numpy())


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((2, 4, 4, 3), np.uint16), "0..255"),
        (np.zeros((2, 4, 4, 3), bool), "bool"),
        (np.zeros((2, 3), complex), "complex128"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"channels come first: give x.transpose\(0, 2, 3, 1\)"),
        (np.uint8(3), "no image"),
        (np.zeros((0, 3)), "no image"),
        ([Path("a.png")], "object"),
        (np.float64(1), "float64"),
        (torch.rand(2, 5).to_sparse(), "must be arrays"),
        (torch.rand(2, 3, device="meta"), "must be arrays"),
        (torch.rand(2, 3).to(torch.float8_e4m3fn), "must be arrays"),
        (np.ma.masked_array(np.ones((2, 3)), mask=[[0, 0, 1], [0, 0, 0]]), "masked"),
    ],
)
def test_arrays_that_are_no_images_are_named(x, said):
    with pytest.raises(InputError, match=said):
        images_in_memory(x)
