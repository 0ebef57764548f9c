"""Suffixes of image files: which are read here, and what reads the others."""

from __future__ import annotations

from importlib.util import find_spec

POINTER = b"version https://git-lfs"  # the start of a file that Git LFS has not fetched
FETCH = "is a pointer of Git LFS: git lfs pull fetches the file"
HEIF = "pip install 'dino-lite[heif]'"
_OTHERS = {".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
# Format of each suffix, by Pillow's names; loading Pillow's own list would import every plugin.
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".pbm", ".pgm", ".pnm", ".ppm"), "PPM"),
    **{".jp2": "JPEG2000", ".npy": "NPY", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP"},
    **{".webp": "WEBP", ".avif": "AVIF", ".tga": "TGA"},
    **(_OTHERS if find_spec("pillow_heif") else {}),
}
# Lower-case suffixes of the files that `decode` reads here.
SUFFIXES = tuple(sorted(suffix.encode() for suffix in FORMATS))
# Those of images that it does not read here, and what to do about it ("": convert the files).
KNOWN = {
    **{suffix.encode(): HEIF for suffix in _OTHERS if suffix not in FORMATS},
    **dict.fromkeys((b".jxl", b".svg", b".psd", b".exr", b".hdr", b".dcm", b".ico"), ""),
    # raw files of cameras
    **dict.fromkeys((b".3fr", b".arw", b".cr2", b".cr3", b".crw", b".dng", b".erf", b".nef"), ""),
    **dict.fromkeys((b".nrw", b".orf", b".pef", b".raf", b".raw", b".rw2", b".srw", b".x3f"), ""),
}
