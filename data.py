"""The data sets, read in the layouts that they are released in, and the loader that makes batches of them.

A data set class yields the samples of each split; `Pairs` is one split; `loader` makes batches. What is random
in training (order, crops, drawn texts) is a function of (seed, epoch, sample) alone: neither the number of
workers nor a resumed run changes it.
"""

from __future__ import annotations

import html
import json
import os
import re
import signal
import textwrap
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mope import InputError

GREY = (124, 116, 104)  # stands for an image that is missing or damaged: ImageNet's mean colour
MAX_BAD = 0.01  # share of a split's images that may be missing or damaged
FONT = ImageFont.load_default  # Pillow's own, called with a size
HELD_OUT = 0.1  # share of training that becomes validation where a data set has none


class Sample(NamedTuple):
    id: str
    image: Path | np.ndarray  # a file, or pixels [S, S, 3] uint8
    text: str
    label: object  # a class name, a list of them, or what the data set's `draw` makes one of


# ---------------------------------------------------------------------------------------------------------
# One split


class Pairs(Dataset):
    """One split of a data set: samples, classes, and the notes on defects that loading found."""

    def __init__(self, source: Layout, split: str, samples: list[Sample], classes: list[str], seed: int):
        self.source, self.split, self.samples, self.classes, self.seed = source, split, samples, classes, seed
        self.index = {name: i for i, name in enumerate(classes)}
        self.multilabel = isinstance(samples[0].label, list)
        self.train = split == "train"
        self.notes: list[str] = source.notes[split]
        self.image_size = 224  # set by `loader`

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, i: int, epoch: int = 0) -> Sample:
        """Sample i; where texts are drawn, anew in each training epoch, and always alike in evaluation."""
        return self.source.draw(self.samples[i], self.rng(i, epoch))

    def lengths(self, epoch: int) -> np.ndarray:
        """Of the texts, in steps of 64 characters, some 16 word pieces."""
        drawn = (self.sample(i, epoch) for i in range(len(self))) if self.source.draws else self.samples
        return np.array([len(sample.text) // 64 for sample in drawn])

    def rng(self, i: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, i] if self.train else [0, i])

    def target(self, label: str | list[str]) -> int | np.ndarray:
        """A class name -> its number; a list of them -> [C] of zeros and ones."""
        if not self.multilabel:
            return self.index[label]
        target = np.zeros(len(self.classes), np.float32)
        target[[self.index[name] for name in label]] = 1
        return target

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """(epoch, i) -> i, image [3, S, S] uint8, text, target, and the file's name if it could not be read."""
        epoch, i = key
        rng = self.rng(i, epoch)
        sample = self.source.draw(self.samples[i], rng)
        try:
            image, damaged = decode(sample.image, self.image_size, rng if self.train else None, self.source.flip), ""
        except MemoryError:
            raise
        except Exception:  # Pillow raises many types for damaged files; what is damaged is counted and limited
            grey = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
            image, damaged = torch.from_numpy(grey).permute(2, 0, 1), str(sample.image)
        return i, image, sample.text, self.target(sample.label), damaged


def check_damaged(damaged: list[str], samples: list[Sample], split: str) -> None:
    """Raise InputError if more than 1 % of the images that a split names are missing or damaged."""
    count = len({str(sample.image) for sample in samples}) if damaged else 0
    if len(damaged) > MAX_BAD * count:
        listed = "\n  ".join(damaged[:10])
        raise InputError(f"{len(damaged)} of {count:,} images of {split} are missing or cannot be read, more than "
                         f"{MAX_BAD:.0%}; download them again or take their rows out. The first:\n  {listed}")


def decode(source: Path | str | np.ndarray, size: int, rng: np.random.Generator | None = None,
           flip: bool = False) -> torch.Tensor:
    """An image -> upright RGB [3, size, size] uint8.

    Without rng, the short side is resized to size * 256 / 224 and the centre is cut out; with it, a crop of 60 to
    100 % of the area and of an aspect between 3:4 and 4:3 is drawn (we: mild), as far as the image is long and high
    enough, and mirrored half of the time if `flip`.
    Raises what Pillow raises for a damaged file.
    """
    if isinstance(source, np.ndarray):
        return resize(source, size)
    with Image.open(source) as image:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work; `draft` picks the smallest that is
        # still as large as asked (the shortest crop below is 0.67 of a side), so that nothing has to be enlarged.
        image.draft("RGB", (round(size * 256 / 224),) * 2 if rng is None else (round(1.5 * size),) * 2)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        image.load()

    width, height = image.size
    mirrored = False
    if rng is None:
        w = h = min(width, height) * 224 / 256
        left, top = (width - w) / 2, (height - h) / 2
    else:
        area, aspect = rng.uniform(0.6, 1) * width * height, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        mirrored = flip and rng.random() < 0.5
    left, top = round(left), round(top)
    pixels = resize(np.array(image.crop((left, top, left + max(1, round(w)), top + max(1, round(h))))), size)
    return pixels.flip(-1) if mirrored else pixels


def resize(pixels: np.ndarray, size: int) -> torch.Tensor:
    """[h, w, 3] uint8 -> [3, size, size] uint8, as Pillow's bicubic filter does it, in less than half the time."""
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    if x.shape[1:] == (size, size):
        return x
    return F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0]


# ---------------------------------------------------------------------------------------------------------
# Layouts: one class each. `read(split)` yields samples and notes the defects that it meets.


class Layout:
    """What the data sets share. A subclass says what its folder looks like and reads it."""

    tree = ""  # the expected tree and where to get it, for the error message
    flip = True  # may a training image be mirrored?
    classes: list[str] | None = None  # None: those of the training split, sorted
    draws = False  # does `draw` make another text in each epoch?
    has_kinds = False  # do ids start with the kind of a question, "color by shape-17"?

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: dict[str, list[str]] = defaultdict(list)

    def draw(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample

    def require(self, *paths: Path) -> Path:
        """The first of the paths that exists, or an error that says what the folder should look like."""
        for path in paths:
            if path.exists():
                return path
        raise InputError(f"no {' or '.join(map(str, paths))}\nExpected in {self.folder}:\n{self.tree.rstrip()}\n"
                         "Give the folder with --data-dir. `python train.py` alone needs no data.")

    def load_split(self, split: str) -> list[Sample]:
        """All samples of a split; images that do not exist are noted, and left out of training."""
        try:
            samples = list(self.read(split))
            for s in samples:  # half a surrogate pair, as JSON can hold, would stop the tokenizer or a file later
                "".join((s.id, s.text, *names_of(s.label))).encode()
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.folder}: the {split} split cannot be read ({error!r}); expected:\n"
                             f"{self.tree.strip()}") from error
        images = {s.image for s in samples if isinstance(s.image, Path)}
        missing = sorted(str(image) for image in images if not os.path.exists(image))
        if missing:
            what = "left out" if split == "train" else "kept with a grey image"
            self.notes[split].append(f"{len(missing)} images do not exist: {what}, for instance {missing[0]}")
        if not samples:
            raise InputError(f"{self.folder}: the {split} split is empty")
        check_damaged(missing, samples, split)
        gone = set(missing) if split == "train" else ()
        return [s for s in samples if str(s.image) not in gone] if gone else samples


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", line) of every line that is not blank, of a UTF-8 file with or without a byte order mark."""
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 ({error}); convert the file to UTF-8") from None
        if line:
            yield f"{path}:{number}", line


class JsonLines(Layout):
    """A user's own data, and prepared copies of Food-101 and MM-IMDb."""

    tree = """
    train.jsonl, val.jsonl (or dev.jsonl; without it, 10 % of train are held out), test.jsonl
    one object a line: {"image": "path, relative to this folder", "text": "...", "label": "name"}
    ("img" for "image" works; a list of names as label makes it a multi-label task)"""

    def objects(self, path: Path) -> Iterator[tuple[str, dict]]:
        """("file:line", object) of a file of JSON objects, one a line."""
        for where, line in numbered_lines(path):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, found {line[:60]!r}")
            yield where, row

    def read(self, split: str) -> Iterator[Sample]:
        names = ("val", "dev") if split == "val" else (split,)
        path = self.require(*(self.folder / f"{name}.jsonl" for name in names))
        for where, row in self.objects(path):
            image, text, label = row.get("image", row.get("img")), row.get("text"), row.get("label")
            several = isinstance(label, list) and all(isinstance(name, str) for name in label)
            if not isinstance(image, str) or not isinstance(text, str) or not (several or isinstance(label, str)):
                raise InputError(f"{where}: expected strings \"image\" and \"text\", and a \"label\" that is a string "
                                 f"or a list of strings; found {json.dumps(row)[:200]}")
            yield Sample(str(row.get("id", where)), self.folder / image, text, label)


class Food101(JsonLines):
    """UPMC Food-101: photograph and page title, 101 classes."""

    tree = """
    images/{train,test}/<class>/<class>_<n>.jpg
    texts/{train,test}_titles.csv      (or a prepared copy: {train,val,test}.jsonl)
    from https://www.kaggle.com/datasets/gianmarco96/upmcfood101, for instance by
    curl -L -o food101.zip https://www.kaggle.com/api/v1/datasets/download/gianmarco96/upmcfood101"""

    def read(self, split: str) -> Iterator[Sample]:
        if (self.folder / f"{split}.jsonl").exists() or split == "val":
            yield from super().read(split)
            return
        images = self.require(self.folder / "images" / split)
        path = self.require(self.folder / "texts" / f"{split}_titles.csv")
        mended = 0
        # No csv reader: train_titles.csv has a quote that never closes, which would swallow 16 rows in silence.
        for where, line in numbered_lines(path):
            name, _, rest = line.partition(",")
            title, comma, label = rest.rpartition(",")
            if not comma:
                raise InputError(f"{where}: expected image,title,class; found {line[:80]!r}")
            if name.endswith(".txt"):
                name, mended = name.removesuffix(".txt") + ".jpg", mended + 1
            yield Sample(name, images / label / name, clean_title(title), label)
        if mended:
            self.notes[split].append(f"{mended} rows name a .txt for their .jpg: mended")


def clean_title(title: str) -> str:
    """Undo CSV quotes, [["..."]] wrappers and HTML entities."""
    title = title.removeprefix('"').removesuffix('"').replace('""', '"')
    title = re.sub(r'^\[\["?|"?\]\]$', "", title)
    return html.unescape(title).strip()


class MMIMDb(JsonLines):
    """MM-IMDb: poster and plot, the 23 most frequent genres, several a film."""

    tree = """
    split.json, dataset/<id>.json, dataset/<id>.jpeg      (or a prepared copy: {train,dev,test}.jsonl)
    from https://archive.org/download/mmimdb/mmimdb.tar.gz (8 GB)"""
    classes = (
        "Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery Sci-Fi Fantasy Family "
        "Biography War History Music Animation Musical Western Sport Short Film-Noir").split()

    def read(self, split: str) -> Iterator[Sample]:
        prepared = (self.folder / "train.jsonl").exists()
        dropped, without = Counter(), 0
        for sample in super().read(split) if prepared else self.films(split):
            genres = [genre for genre in names_of(sample.label) if genre in self.classes]
            dropped.update(set(names_of(sample.label)) - set(genres))
            without += not genres
            if genres:
                yield sample._replace(label=genres)
        if dropped:
            counts = ", ".join(f"{name} {n}" for name, n in dropped.most_common())
            self.notes[split].append(f"other genres than the 23 ignored: {counts}; {without} films without one dropped")

    def films(self, split: str) -> Iterator[Sample]:
        split_file = self.require(self.folder / "split.json")
        for name in json.loads(split_file.read_text("utf-8"))["dev" if split == "val" else split]:
            path = self.require(self.folder / "dataset" / f"{name}.json")
            film = json.loads(path.read_text("utf-8"))
            plots = film.get("plot") if isinstance(film, dict) else None
            if not isinstance(plots, list) or not plots or "genres" not in film:
                raise InputError(f"{path}: expected a list \"plot\" and \"genres\"; found {str(film)[:200]}")
            plot = max(plots, key=len)  # max keeps the first of several that are equally long
            yield Sample(name, path.with_suffix(".jpeg"), plot, film["genres"])


class SnliVE(JsonLines):
    """SNLI-VE: photograph and hypothesis -> entailment, neutral or contradiction."""

    tree = """
    snli_ve_{train,dev,test}.jsonl, flickr30k_images/<id>.jpg
    from https://github.com/necla-ml/SNLI-VE and
    https://storage.googleapis.com/allennlp-public-data/snli-ve/flickr30k_images.tar.gz"""
    flip = False  # "the man on the left"
    classes = ["entailment", "neutral", "contradiction"]

    def read(self, split: str) -> Iterator[Sample]:
        path = self.require(self.folder / f"snli_ve_{'dev' if split == 'val' else split}.jsonl")
        images = self.require(self.folder / "flickr30k_images")
        unlabelled = 0
        for where, row in self.objects(path):
            photo = row.get("Flickr30K_ID", row.get("Flikr30kID"))  # older files spell it without the c
            label, hypothesis = row.get("gold_label"), row.get("sentence2")
            if photo is None or not isinstance(label, str) or not isinstance(hypothesis, str):
                raise InputError(f"{where}: expected Flickr30K_ID and strings sentence2 and gold_label; found "
                                 f"{json.dumps(row)[:200]}")
            if label == "-":  # the annotators did not agree
                unlabelled += 1
                continue
            name = str(photo).removesuffix(".jpg") + ".jpg"
            yield Sample(str(row.get("pairID", where)), images / name, hypothesis, label)
        if unlabelled:
            self.notes[split].append(f"{unlabelled} pairs without an agreed label (-) dropped")


class Grocery(Layout):
    """Grocery Store Dataset, a task of ours: a photograph, and one sentence about some product of the same group
    -> which of the 81 products. The text narrows it down to the group, the photograph alone leaves look-alikes."""

    tree = """
    dataset/classes.csv, dataset/{train,val,test}.txt, the photographs and descriptions that they name
    from git clone https://github.com/marcusklasson/GroceryStoreDataset"""
    draws = True
    repeat = 1  # pairs a photograph

    def read(self, split: str) -> Iterator[Sample]:
        root = self.folder / "dataset" if (self.folder / "dataset").is_dir() else self.folder
        if not hasattr(self, "group"):
            self.read_classes(self.require(root / "classes.csv"), root)
        for _, line in numbered_lines(self.require(root / f"{split}.txt")):
            path, product, _ = (field.strip() for field in line.split(","))
            for copy in range(self.repeat):
                yield Sample(f"{path}#{copy}" if copy else path, root / path, "", self.products[int(product)])

    def read_classes(self, path: Path, root: Path) -> None:
        """classes.csv -> products by number; of each, the sentences of its description, and its group's products."""
        self.description: dict[str, list[str]] = {}
        self.group: dict[str, list[str]] = {}
        groups = defaultdict(list)
        for _, line in list(numbered_lines(path))[1:]:
            product, _, group, _, _, file = line.split(",")
            text = self.require(root / file.strip().lstrip("/")).read_text("utf-8")
            self.description[product] = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))
            groups[group].append(product)
            self.group[product] = groups[group]
        self.products = list(self.group)
        self.classes = self.classes or self.products

    def draw(self, sample: Sample, rng: np.random.Generator) -> Sample:
        product = rng.choice(self.group[sample.label])
        return sample._replace(text=rng.choice(self.description[product]))


class GroceryVE(Grocery):
    """The same photographs as an entailment task of ours, two pairs a photograph: the first two sentences of the
    description of this product, of another of its group (neutral), or of another group (contradiction)."""

    flip = False
    repeat = 2
    classes = SnliVE.classes

    def draw(self, sample: Sample, rng: np.random.Generator) -> Sample:
        own, group = sample.label, self.group[sample.label]
        candidates = {"entailment": [own], "neutral": [p for p in group if p != own],
                      "contradiction": [p for p in self.products if p not in group]}
        label = rng.choice([name for name, products in candidates.items() if products])
        text = " ".join(self.description[rng.choice(candidates[label])][:2])
        return sample._replace(text=text, label=str(label))


# The toy. An image has four quadrants, three of them with an object; no two objects share a shape or a colour.
COLORS = {"red": (215, 45, 40), "green": (50, 165, 65), "blue": (50, 85, 215), "yellow": (235, 205, 45)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {"color": ("what color is {} ?", "tell me the color of {}"),
             "shape": ("what shape is {} ?", "tell me the shape of {}"),
             "place": ("where is {} ?", "tell me the place of {}")}
CALLS = {"color": "the {} thing", "shape": "the {}"}  # an object is called by what is not asked for


def draw_shapes(n: int, rng: np.random.Generator, quadrant: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """-> images [n, S, S, 3] uint8 of side S = 2 * quadrant, and cells [n, 4, 3]: shape, color and place of what is
    in each quadrant, as numbers from 1; shape and color are 0 where it is empty."""
    def different(high: int) -> np.ndarray:  # three different numbers below high for each image, [n, 3]
        return rng.random((n, high)).argsort(1)[:, :3]

    cells = np.zeros((n, 4, 3), int)
    cells[..., 2] = np.arange(1, 5)
    kinds = np.stack([different(len(SHAPES)), different(len(COLORS))], -1) + 1  # [n, 3, 2]
    np.put_along_axis(cells[..., :2], different(4)[..., None], kinds, 1)

    # A shape is an inequality on the offset (x, y) from its centre, in units of its radius. We draw 200 of each
    # shape with other centres and radii, once, and every object is one of them.
    centre, radius = rng.uniform(6, 10, (2, 200, 1, 1)), rng.uniform(4.5, 6.5, (200, 1, 1))
    grid = np.arange(quadrant) + 0.5
    x, y = (grid - centre[0]) / radius, (grid[:, None] - centre[1]) / radius  # [200, 1, Q], [200, Q, 1]
    square = np.maximum(abs(x), abs(y))
    masks = np.stack([np.zeros_like(square, bool), np.hypot(x, y) < 1, square < 0.85,
                      (2 * abs(x) < y + 1) & (y < 0.9), (np.minimum(abs(x), abs(y)) < 0.3) & (square < 1)])
    inside = masks[cells[..., 0], rng.integers(200, size=(n, 4))]  # [n, 4, Q, Q]

    paint = np.array([(0, 0, 0), *COLORS.values()])[cells[..., 1]] * rng.uniform(0.75, 1, (n, 4, 1))  # [n, 4, 3]
    ground = rng.integers(90, 210, (n, 1, 1, 1, 1))
    images = np.where(inside[..., None], paint[:, :, None, None], ground).astype(np.uint8)  # [n, 4, Q, Q, 3]
    images = images.reshape(n, 2, 2, quadrant, quadrant, 3).swapaxes(2, 3)
    return images.reshape(n, 2 * quadrant, 2 * quadrant, 3), cells


class Shapes(Layout):
    """Generated: a picture of three coloured shapes, and a question about one of them -> the answer.

    Without the picture four answers are left, without the question nine.
    """

    flip = False
    has_kinds = True
    classes = [*COLORS, *SHAPES, *PLACES]
    sizes = {"train": 20_000, "val": 1_000, "test": 2_000}

    def read(self, split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(self.sizes).index(split))
        images, cells = draw_shapes(self.sizes[split], rng)
        names = {"shape": SHAPES, "color": tuple(COLORS), "place": PLACES}
        for i, (image, objects) in enumerate(zip(images, cells)):
            there = dict(zip(names, rng.choice(objects[objects[:, 0] > 0])))
            by = rng.choice(["shape", "color"])
            asked = rng.choice([name for name in names if name != by])
            call = CALLS[by].format(names[by][there[by] - 1])
            text = QUESTIONS[asked][rng.integers(2)].format(call)
            yield Sample(f"{asked} by {by}-{i}", image, text, names[asked][there[asked] - 1])


DATASETS = {"shapes": Shapes, "food101": Food101, "mmimdb": MMIMDb, "snli_ve": SnliVE, "grocery": Grocery,
            "grocery_ve": GroceryVE, "jsonl": JsonLines}


# ---------------------------------------------------------------------------------------------------------
# Splits


def load(dataset: str, folder: str | Path, train_size: float | None = None, seed: int = 0) -> dict[str, Pairs]:
    """-> the splits "train", "val" and "test".

    `train_size` (a count, or a fraction below 1) keeps a stratified part of train, drawn by `seed`; a validation
    split that a data set lacks is held out of train, stratified, by a fixed seed. Raises InputError.
    """
    source = DATASETS[dataset](Path(folder))
    if source.tree and not source.folder.is_dir():
        source.require(source.folder)
    splits = {}
    has_val = not isinstance(source, JsonLines) or dataset in ("snli_ve", "mmimdb") or any(
        (source.folder / f"{name}.jsonl").exists() for name in ("val", "dev"))
    for split in ("train", "val", "test") if has_val else ("train", "test"):
        splits[split] = source.load_split(split)

    classes = source.classes or sorted({name for s in splits["train"] for name in names_of(s.label)})
    if not has_val:
        held_out = set(stratified(splits["train"], max(1, round(HELD_OUT * len(splits["train"]))), seed=0))
        splits["val"] = [s for i, s in enumerate(splits["train"]) if i in held_out]
        splits["train"] = [s for i, s in enumerate(splits["train"]) if i not in held_out]
        if not splits["train"]:
            raise InputError(f"{source.folder}: a single training sample, held out for validation; expected more")
        source.notes["val"].append(f"held out of train: {HELD_OUT:.0%} of each label, by a fixed seed")
    if train_size is not None:
        splits["train"] = [splits["train"][i] for i in stratified(splits["train"], train_size, seed)]

    several, known = isinstance(splits["train"][0].label, list), {*classes, *getattr(source, "products", ())}
    for split, samples in splits.items():
        for s in samples:
            if not known.issuperset(names_of(s.label)) or isinstance(s.label, list) != several:
                raise InputError(f"{source.folder}, {split}, {s.id}: label {s.label!r}; expected "
                                 f"{'a list' if several else 'one'} of the {len(classes)} classes of train")
    return {split: Pairs(source, split, splits[split], classes, seed) for split in ("train", "val", "test")}


def names_of(label: str | list[str]) -> list[str]:
    return label if isinstance(label, list) else [label]


def stratified(samples: list[Sample], size: float, seed: int) -> list[int]:
    """Indices, in order, of a part that holds each label in the proportion of the whole.

    Every sample gets its rank within its label, shuffled, as a fraction; those with the smallest are taken.
    """
    count = round(size * len(samples)) if size < 1 else size
    if not 0 < count <= len(samples) or count != int(count):
        raise InputError(f"--train-size {size}: expected 1 to {len(samples)} samples, or a fraction of them")
    rng = np.random.default_rng(seed)
    by_label = defaultdict(list)
    for i in rng.permutation(len(samples)):
        by_label[tuple(names_of(samples[i].label))].append(int(i))
    order = sorted(((rank + rng.random()) / len(members), i)
                   for members in by_label.values() for rank, i in enumerate(members))
    return sorted(i for _, i in order[:int(count)])


# ---------------------------------------------------------------------------------------------------------
# A picture of the routing


def draw_routing(pairs: Pairs, routing: torch.Tensor, busiest: int = 6, shown: int = 5) -> Image.Image:
    """routing.png: the mean routing weight of each expert by layer, and what the busiest of one layer like best.

    routing [n, L, k] of all samples. The layer is the one whose routing differs most between samples. Where samples
    have a kind of question, the mean routing of each kind in that layer is drawn too.
    """
    n, layers, k = routing.shape
    layer = int(routing.var(0).sum(-1).argmax())
    names = [str(e + 1) for e in range(k)]
    share = routing[:, layer].mean(0)
    used = [e for e in share.argsort(descending=True)[:busiest].tolist() if share[e] > 0.01]
    kinds = sorted({s.id.rpartition("-")[0] for s in pairs.samples}) if pairs.source.has_kinds else []
    tile, row, cell = 112, 172, 34
    right = max(200 + cell * k, 560)
    height = max(80 + row * len(used), 190 + cell * (layers + len(kinds)))
    page = Image.new("RGB", (right + 130 + (tile + 40) * shown, height), "white")
    pen = ImageDraw.Draw(page)

    heat_map(pen, 20, 20, routing.mean(0), [f"layer {i + 1}" for i in range(layers)], names,
             f"Mean routing weight (%) of each expert, {n:,} {pairs.split} samples")
    if kinds:
        members = [torch.tensor([s.id.rpartition("-")[0] == kind for s in pairs.samples]) for kind in kinds]
        heat_map(pen, 20, 110 + cell * layers, torch.stack([routing[m, layer].mean(0) for m in members]), kinds, names,
                 f"The same in layer {layer + 1}, by kind of question")

    pen.text((right, 20), f"Layer {layer + 1}: its busiest experts, and the samples that weight them most", "black",
             FONT(18))
    for y, e in zip(range(70, height, row), used):
        pen.text((right, y + tile // 2 - 20), f"expert {e + 1}\n{100 * share[e]:.0f} %", "black", FONT(16))
        for column, i in enumerate(distinct(pairs, routing[:, layer, e].argsort(descending=True).tolist(), shown)):
            x = right + 110 + column * (tile + 40)
            _, image, text, _, _ = pairs[0, i]
            page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile)), (x, y))
            words = textwrap.wrap(text, 24, max_lines=3, placeholder=" …")
            pen.text((x, y + tile + 2), "\n".join(words), "black", FONT(11))
    return page


def distinct(pairs: Pairs, order: list[int], count: int) -> list[int]:
    """The first samples of an order that have different texts, since one text always routes alike."""
    chosen: dict[str, int] = {}
    for i in order:
        chosen.setdefault(pairs.sample(i).text, i)
        if len(chosen) == count:
            break
    return list(chosen.values())


def heat_map(pen: ImageDraw.ImageDraw, x: int, y: int, values: torch.Tensor, rows: list[str], columns: list[str],
             title: str, cell: int = 34) -> None:
    """values [rows, columns] between 0 and 1, from white to dark blue, each printed in its cell as a percentage."""
    pen.text((x, y), title, "black", FONT(18))
    for j, name in enumerate(columns):
        pen.text((x + 130 + j * cell + cell // 2, y + 32), name, "black", FONT(12), anchor="mm")
    for i, name in enumerate(rows):
        pen.text((x, y + 45 + i * cell + cell // 2), name, "black", FONT(14), anchor="lm")
        for j, value in enumerate(values[i].tolist()):
            left, upper = x + 130 + j * cell, y + 45 + i * cell
            shade = tuple(round(255 + (dark - 255) * value ** 0.5) for dark in (8, 48, 107))
            pen.rectangle((left, upper, left + cell - 2, upper + cell - 2), shade)
            pen.text((left + cell // 2, upper + cell // 2), f"{100 * value:.0f}",
                     "white" if value > 0.2 else "black", FONT(12), anchor="mm")


# ---------------------------------------------------------------------------------------------------------
# Batches


def load_tokenizer(folder: Path, length: int, multiple: int | None = None) -> Tokenizer:
    """The tokenizer of a BERT folder; truncates at `length`, keeping [SEP]; pads to the longest text of a batch, or to
    the next multiple, so that torch.compile meets few lengths."""
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            settings = folder / "tokenizer_config.json"
            lower = not settings.exists() or json.loads(settings.read_text("utf-8")).get("do_lower_case", True)
            tokenizer = BertWordPieceTokenizer.from_file(str(folder / "vocab.txt"), lowercase=lower)._tokenizer
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{folder}: expected tokenizer.json or vocab.txt of a BERT ({error})") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]") or 0, pad_token="[PAD]",
                             pad_to_multiple_of=multiple)
    return tokenizer


def collate(tokenizer: Tokenizer, rows: list[tuple]) -> dict:
    """-> index [B], images [B, 3, S, S] uint8, texts [B, N] ids, labels [B] or [B, C], damaged file names."""
    index, images, texts, targets, damaged = zip(*rows)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return {"index": torch.tensor(index), "images": torch.stack(images), "texts": torch.tensor(ids),
            "labels": torch.stack([torch.as_tensor(t) for t in targets]), "damaged": [name for name in damaged if name]}


class Batches:
    """Which samples make each batch of this process, as (epoch, index) pairs.

    Set `epoch`, and `start` to skip the steps that an interrupted epoch has done, before iterating. In training
    `batch_size` samples make a step, dealt out over processes and micro-batches, and an incomplete last step is
    dropped; in evaluation every sample comes exactly once over all processes. Texts of like length meet in a batch,
    which is padded to its longest: in evaluation all are sorted, in training the samples of ten steps at a time.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1,
                 accumulate: int = 1):
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch = self.start = 0
        count, parts = len(pairs), world * accumulate
        self.steps = count // batch_size if pairs.train else -(-count // batch_size)
        if pairs.train and batch_size % parts:
            raise InputError(f"--batch-size {batch_size} cannot be dealt out evenly over {world} processes with "
                             f"--accumulate {accumulate}; give a multiple of {parts}")
        if not self.steps:
            raise InputError(f"{count} training samples do not fill a batch; give --batch-size {count} or lower")

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        lengths, size = self.pairs.lengths(self.epoch), self.batch_size
        if self.pairs.train:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(len(lengths))[:self.steps * size]
            for start in range(0, len(order), 10 * size):
                part = order[start:start + 10 * size]
                part[:] = part[lengths[part].argsort(kind="stable")]
            order = rng.permutation(order.reshape(self.steps, size)).flatten()
        else:
            order = lengths.argsort(kind="stable")

        for step in range(self.start, self.steps):
            own = order[step * size:(step + 1) * size][self.rank::self.world]
            for part in np.split(own, self.accumulate):
                if len(part):
                    yield [(self.epoch, int(i)) for i in part]


def start_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # both are for the main process, which ends its workers
        signal.signal(number, signal.SIG_IGN)


def loader(pairs: Pairs, tokenizer: Tokenizer, image_size: int, batches: Batches, workers: int = 0,
           device: str = "cpu") -> DataLoader:
    """A DataLoader of batches as `collate` makes them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would compete with the workers
    pairs.image_size = image_size
    return DataLoader(
        pairs, batch_sampler=batches, collate_fn=partial(collate, tokenizer), pin_memory=device == "cuda",
        num_workers=workers, persistent_workers=pairs.train and workers > 0, worker_init_fn=start_worker,
        generator=torch.Generator())  # its own: the global one belongs to the router's noise
