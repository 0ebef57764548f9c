"""Golden cases of the multi-crop: single operations and whole chains, and statistics of draws;
DINOv2's frequencies and its blur.

Pixels are checked twice: as a worker makes them with PIL ("worker"), and cut out and changed by
tensor operations ("device"; a box also by matrices, as small images in memory are cut).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_lite.data import exact, resample
from dino_lite.data.crops import COLUMNS, JITTER, ORDERS, MultiCrop, Photometric
from dino_lite.data.photometric import Normalize, change
from golden.check import Check

NUM_RUNS = 5  # of as many draws as the reference made; a distance is the median over them
NUM_PICTURES = 300  # crops per kind whose pixels are made
KINDS = ("global1", "global2", "local")  # the case's names of our crops 0, 1 and 2
ONE_FLOAT = 1e-5  # normalized pixels reach 2.6: float32 rounding of two formulas


# ------------------------------------------------------------------------------ A11: operations


def a11(case: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """Every operation with given parameters, as grey levels from PIL's result."""
    mean_limit = number(case["tolerance"]["levels"], r"mean \|diff\| <= ([\d.]+)")
    p99_limit = number(case["tolerance"]["levels"], r"max\(([\d.]+)")
    p99_factor = number(case["tolerance"]["levels"], r"([\d.]+) x the measured")
    for name, op in case["data"]["ops"].items():
        wanted = tensors[f"{name}/out.u8_hwc"].numpy()
        measured = op["float_torchvision_vs_pil_levels"]["p99"]
        limits = mean_limit, max(p99_limit, p99_factor * measured)
        image = source_image(op["input"], tensors, folder)
        yield from levels(f"worker {name}", operate(op, image), wanted, *limits)
        for found in operate_on_device(op, np.asarray(image)):
            yield from levels(f"device {name}", found, wanted, *limits)
    normalize = Normalize(**case["hyper"]["normalize"])
    wanted = tensors["normalize/out.chw"]
    inputs = [tensors[name] for name in sorted(tensors) if name.startswith("in.")]
    # The case does not say which input was normalized: it is the one that comes nearest.
    errors = [(normalize(u8.permute(2, 0, 1)) - wanted).abs().max().item() for u8 in inputs]
    yield Check("normalize", min(errors), ONE_FLOAT)


def operate(op: dict[str, Any], image: Image.Image) -> np.ndarray:
    """The project's answer to one entry of the case's `ops`."""
    kind = op["op"]
    if kind == "resized_crop":
        return np.asarray(exact.resized_crop(image, op["box"], op["size"]))
    if kind == "solarize" and op["threshold"] != 128:  # which is the only one a crop asks for
        return exact.solarize(np.asarray(image), op["threshold"])
    return exact.augment(image, parameters_of(op))


def operate_on_device(op: dict[str, Any], pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The same by tensor operations, in each way there is."""
    if op["op"] == "resized_crop":
        yield cut(pixels, op["box"], op["size"])
        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        boxes = torch.tensor(op["box"], dtype=torch.float32).view(1, 1, 4)
        yield resample.resized_crops(whole, boxes, op["size"])[0, 0].permute(1, 2, 0).numpy()
    elif op["op"] != "solarize" or op["threshold"] == 128:
        yield change_one(pixels, parameters_of(op))


def cut(pixels: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    """A box as a worker cuts it out for the device."""
    return resample.resized_crop(pixels, box, size)


def change_one(pixels: np.ndarray, params: Sequence[float]) -> np.ndarray:
    """One crop, changed as on the device."""
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return change(batch, torch.tensor([params]))[0].permute(1, 2, 0).numpy()


def parameters_of(op: dict[str, Any]) -> list[float]:
    """COLUMNS that ask for one entry of the case's `ops`."""
    if op["op"] == "sequence":
        return parameters(op["steps"])
    names = {"grayscale": "gray", "hflip": "flip", "pil_gaussian_blur": "blur"}
    value = op.get("factor", op.get("radius", op.get("sigma", 1.0)))
    return [float(v) for v in (COLUMNS | {names.get(op["op"], op["op"]): value}).values()]


def parameters(jitter: Sequence[tuple[str, float]], **others: float) -> list[float]:
    """COLUMNS of an ordered list of (operation, factor); operations not listed stay neutral."""
    listed = [JITTER.index(name) for name, _ in jitter]
    order = ORDERS.index((*listed, *(i for i in range(len(JITTER)) if i not in listed)))
    columns = COLUMNS | dict(jitter) | {"order": order} | others
    return [float(value) for value in columns.values()]


def source_image(name: str, tensors: dict[str, Tensor], folder: Path) -> Image.Image:
    """An input by its name: a tensor of the case or a file beside it."""
    if f"in.{name}.u8_hwc" in tensors:
        return Image.fromarray(tensors[f"in.{name}.u8_hwc"].numpy())
    with Image.open(folder / name) as image:
        return image.convert("RGB")


def levels(
    name: str, found: np.ndarray, wanted: np.ndarray, mean_limit: float, p99_limit: float
) -> Iterator[Check]:
    """Mean and 99th percentile of the distance in grey levels."""
    if found.shape != wanted.shape:
        yield Check(f"{name}: shape {found.shape} for {wanted.shape}", float("inf"), 0.0)
        return
    distance = np.abs(found.astype(int) - wanted.astype(int))
    yield Check(f"{name} mean", float(distance.mean()), mean_limit)
    yield Check(f"{name} p99", float(np.percentile(distance, 99)), p99_limit)


def number(text: str, pattern: str) -> float:
    """The first group of `pattern` in a case's tolerance text."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in the tolerance {text!r}")
    return float(match[1])


# ------------------------------------------------------------------- A10: chains and statistics


def a10(case: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """Recorded chains pixel by pixel; then boxes, parameters and pixels of thousands of draws."""
    hyper, data, tolerance = case["hyper"], case["data"], case["tolerance"]
    image = source_image(data["image_png"], tensors, folder)
    normalize = Normalize(**hyper["normalize"])
    yield from chains(data["chains"], tensors, image, normalize, tolerance["chains"])
    sigmas = number(tolerance["statistics"], r"(\d+) sigma")
    ks_limit = number(tolerance["statistics"], r"below ([\d.]+)\*sqrt")
    multi_crop = MultiCrop(
        global_size=hyper["global_size"],
        local_size=hyper["local_size"],
        num_local=1,
        global_scale=hyper["global_crops_scale"],
        local_scale=hyper["local_crops_scale"],
        ratio=hyper["aspect_range"],
    )
    num = max(data["statistics"][kind]["draws"] for kind in KINDS)
    epochs, indices = np.divmod(np.arange(NUM_RUNS * num), num)
    heights, widths = (np.full(len(epochs), side) for side in (image.height, image.width))
    boxes, params = multi_crop.draw(epochs, indices, heights, widths)
    for s, kind in enumerate(KINDS):
        reference = data["statistics"][kind]
        quantities = Quantities(multi_crop.kinds[s], boxes[s], params[s], epochs, image.size)
        of_kind = {key: value for key, value in tensors.items() if key.startswith(f"{kind}/")}
        yield from counts(kind, quantities, reference, sigmas)
        yield from distributions(kind, quantities, reference, of_kind, ks_limit)
        size = hyper["local_size" if kind == "local" else "global_size"]
        for where in (exact.apply, apply_on_device):
            made = pictures(quantities, image, size, where, **hyper["normalize"])
            for check in pixels(kind, made, reference["draws"], of_kind, sigmas):
                yield check._replace(name=f"{where.__name__} {check.name}")


def chains(
    listed: dict[str, Any],
    tensors: dict[str, Tensor],
    image: Image.Image,
    normalize: Normalize,
    tolerance: str,
) -> Iterator[Check]:
    """Crops with recorded parameters, before and after normalization."""
    mean_limit = number(tolerance, r"mean \|diff\| <= ([\d.]+)/255")
    p99_limit = number(tolerance, r"percentile <= ([\d.]+)/255")
    for name, chain in listed.items():
        wanted = tensors[f"{name}/out.u8_hwc"]
        params = parameters(
            chain["jitter"],
            flip=float(chain["flip"]),
            gray=float(chain["gray"]),
            blur=chain["blur"] or 0.0,
            solarize=float(chain["solarize"]),
        )
        for where in (exact.apply, apply_on_device):
            found = where(image, chain["box"], params, chain["size"])
            title = f"{name} {where.__name__}"
            yield from levels(title, found, wanted.numpy(), mean_limit, p99_limit)
        if f"{name}/out.normalized_chw" in tensors:
            floats = normalize(wanted.permute(2, 0, 1))
            error = (floats - tensors[f"{name}/out.normalized_chw"]).abs().max()
            yield Check(f"{name} normalized", float(error), ONE_FLOAT)


def apply_on_device(
    image: Image.Image, box: Sequence[int], params: Sequence[float], size: int
) -> np.ndarray:
    """What `exact.apply` does, by tensor operations."""
    return change_one(cut(np.asarray(image), box, size), params)


class Quantities:
    """Many draws of one kind of crop of one image, named as the case names them."""

    def __init__(
        self,
        kind: Photometric,
        boxes: np.ndarray,
        params: np.ndarray,
        run: np.ndarray,
        image_size: tuple[int, int],
    ) -> None:
        width, height = image_size
        self.kind, self.boxes, self.params, self.run = kind, boxes, params, run
        self.values = dict(zip(COLUMNS, params.T.astype(np.float64), strict=True))
        # A factor that is exactly neutral was not applied (a draw hits it once in 2^24).
        neutral = (self.values[name] == COLUMNS[name] for name in JITTER)
        self.jittered = ~np.logical_and.reduce(list(neutral))
        top, left, high, wide = boxes.T.astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0/0 where the box fills the side
            self.continuous = {
                "crop_area_fraction": high * wide / (height * width),
                "crop_log_aspect_w_over_h": np.log(wide / high),
                "crop_top_relative": top / (height - high),
                "crop_left_relative": left / (width - wide),
                "blur_radius": np.where(self.values["blur"] > 0, self.values["blur"], np.nan),
            }
        for name in JITTER:
            applied = np.where(self.jittered, self.values[name], np.nan)
            self.continuous[f"jitter_{name}"] = applied

    def runs(self, name: str) -> list[np.ndarray]:
        """A continuous quantity, run by run, sorted, without the draws to which it is foreign."""
        rows = (self.continuous[name][self.run == i] for i in range(NUM_RUNS))
        return [np.sort(row[~np.isnan(row)]) for row in rows]


def counts(
    kind: str, ours: Quantities, reference: dict[str, Any], sigmas: float
) -> Iterator[Check]:
    """How often each operation is applied, against the nominal probability and the reference."""
    total, num, spec = len(ours.run), reference["draws"], ours.kind
    happened = {name: ours.values[name] > 0 for name in ("flip", "gray", "blur", "solarize")}
    happened |= {"jitter": ours.jittered, "jitter_and_gray": ours.jittered & happened["gray"]}
    nominal = {name: getattr(spec, f"{name}_prob") for name in happened if "_" not in name}
    nominal["jitter_and_gray"] = nominal["jitter"] * nominal["gray"]
    for name, count in reference["counts"].items():
        found = int(happened[name].sum())
        p = nominal[name]
        allowed = sigmas * np.sqrt(p * (1 - p) / total)
        yield Check(f"{kind} {name} nominal", abs(found / total - p), allowed)
        yield proportion(f"{kind} {name}", found, total, count, num, sigmas)
    orders = ours.values["order"][ours.jittered].astype(int)
    num_jittered = sum(reference["jitter_order_counts"].values())
    for letters, count in reference["jitter_order_counts"].items():
        order = ORDERS.index(tuple("bcsh".index(letter) for letter in letters))
        found = int((orders == order).sum())
        yield proportion(f"{kind} order {letters}", found, len(orders), count, num_jittered, sigmas)


def proportion(name: str, k: int, n: int, k_ref: int, n_ref: int, sigmas: float) -> Check:
    """Two counts of the same event: the difference of their fractions against its deviation."""
    p = (k + k_ref) / (n + n_ref)
    deviation = (p * (1 - p) * (1 / n + 1 / n_ref)) ** 0.5
    return Check(name, abs(k / n - k_ref / n_ref), sigmas * deviation)


def distributions(
    kind: str, ours: Quantities, reference: dict[str, Any], tensors: dict[str, Tensor], limit: float
) -> Iterator[Check]:
    """Kolmogorov-Smirnov distance of each continuous quantity to the reference's quantiles."""
    for name in ours.continuous:
        quantiles = tensors.get(f"{kind}/out.{name}.quantiles101")
        runs = ours.runs(name)
        if quantiles is None or min(map(len, runs)) == 0:
            continue
        counted = tensors.get(f"{kind}/out.{name}.hist")
        n_ref = reference["counts"]["jitter"] if counted is None else int(counted.sum())
        distances = [ks_distance(run, quantiles.numpy()) for run in runs]
        n = np.mean([len(run) for run in runs])
        allowed = limit * np.sqrt(1 / n_ref + 1 / n)
        yield Check(f"{kind} {name} KS", float(np.median(distances)), float(allowed))


def ks_distance(sample: np.ndarray, quantiles: np.ndarray) -> float:
    """Largest distance of a sorted sample's distribution from the quantiles, steps allowed for."""
    p = np.linspace(0, 1, len(quantiles))
    tiny = 1e-6 * max(1e-12, np.ptp(quantiles))  # equal values, computed in another order
    below = np.searchsorted(sample, quantiles - tiny, "left") / len(sample)
    up_to = np.searchsorted(sample, quantiles + tiny, "right") / len(sample)
    return float(np.maximum(0, np.maximum(below - p, p - up_to)).max())


def pictures(
    ours: Quantities,
    image: Image.Image,
    size: int,
    apply: Callable[[Image.Image, Sequence[int], Sequence[float], int], np.ndarray],
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Mean and mean square of each channel of NUM_PICTURES normalized crops: (2, n, 3)."""
    boxes, params = ours.boxes[:NUM_PICTURES].tolist(), ours.params[:NUM_PICTURES].tolist()
    moments = []
    for box, row in zip(boxes, params, strict=True):
        made = apply(image, box, row, size).reshape(-1, 3)
        floats = (made / 255 - np.array(mean)) / np.array(std)
        moments.append([floats.mean(0), np.square(floats).mean(0)])
    return np.array(moments).transpose(1, 0, 2)


def pixels(
    kind: str, moments: np.ndarray, num_ref: int, tensors: dict[str, Tensor], sigmas: float
) -> Iterator[Check]:
    """Statistics of normalized pixels per channel, within `sigmas` of their sampling error."""
    mean, square = moments  # n 3 each
    n = len(mean)
    std = np.sqrt(square - mean**2)
    center = mean.mean(0)
    about_center = square - 2 * center * mean + center**2  # mean of (x - center)² of each draw
    pixel_std = np.sqrt(about_center.mean(0))
    band = sigmas * np.sqrt(1 / num_ref + 1 / n)

    def spread_error(x: np.ndarray) -> np.ndarray:
        """Deviation of one draw's part in x.std(0)."""
        return ((x - x.mean(0)) ** 2).std(0) / (2 * x.std(0))

    found = {
        "pixel_mean": (center, mean.std(0)),
        "pixel_std": (pixel_std, about_center.std(0) / (2 * pixel_std)),
        "mean_of_image_std": (std.mean(0), std.std(0)),
        "std_over_draws_of_image_mean": (mean.std(0), spread_error(mean)),
        "std_over_draws_of_image_std": (std.std(0), spread_error(std)),
    }
    for name, (value, deviation) in found.items():
        wanted = tensors.get(f"{kind}/out.{name}")
        if wanted is None:
            continue
        ratio = np.abs(value - wanted.numpy()) / (band * deviation)
        yield Check(f"{kind} {name} ({n} crops, bands)", float(ratio.max()), 1.0)


# ------------------------------------------------------------------------------- B26: DINOv2's own


def b26(case: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """How often operations are applied where the blur's probabilities are turned round, as in
    DINOv2's code; its blur of one patch.
    """
    hyper, num = case["hyper"], case["data"]["draws"]
    sigmas = number(case["tolerance"]["statistics"], r"(\d+) sigma")
    multi_crop = MultiCrop(
        global_size=224,
        local_size=96,
        num_local=1,
        global_scale=hyper["global_crops_scale"],
        local_scale=hyper["local_crops_scale"],
        global_1=Photometric(blur_prob=1 - 1.0, blur_radius=hyper["blur_sigma"]),
        global_2=Photometric(blur_prob=1 - 0.1, blur_radius=hyper["blur_sigma"], solarize_prob=0.2),
        local=Photometric(blur_prob=1 - 0.5, blur_radius=hyper["blur_sigma"]),
        blur_kernel=hyper["blur_kernel"],
    )
    epochs, indices = np.divmod(np.arange(NUM_RUNS * num), num)
    side = np.full(len(epochs), 300)
    drawn = multi_crop.draw(epochs, indices, side, side)
    names = {"gaussian_blur": "blur", "hflip": "flip", "rgb_to_grayscale": "gray"}
    for s, kind in enumerate(KINDS):
        ours = Quantities(multi_crop.kinds[s], drawn.boxes[s], drawn.params[s], epochs, (300, 300))
        for name, fraction in case["data"]["applied_fraction"][kind].items():
            jittered = name == "adjust_hue"
            happened = ours.jittered if jittered else ours.values[names.get(name, name)] > 0
            counted = round(fraction * num)
            title = f"{kind} {name}"
            yield proportion(title, int(happened.sum()), len(epochs), counted, num, sigmas)
    limit = number(case["tolerance"]["blur"], r"max (\d+) grey")
    pixels = tensors["in.u8_hwc"].numpy()
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for name, wanted in tensors.items():
        if not name.startswith("out.blur"):
            continue
        params = parameters([], blur=number(name, r"sigma([\d.]+)\."))
        worker = exact.augment(Image.fromarray(pixels), params, multi_crop.blur_kernel)
        device = change(batch, torch.tensor([params]), blur_kernel=multi_crop.blur_kernel)
        for where, found in (("worker", worker), ("device", device[0].permute(1, 2, 0).numpy())):
            distance = np.abs(found.astype(int) - wanted.numpy().astype(int)).max()
            yield Check(f"{where} {name}", float(distance), limit)
