"""The data sets, read in the layouts that they are released in, and the loader that makes batches of them.

A layout reads the samples of each split; `Pairs` is one split; `plan` says which samples make which batch, and `loader`
makes them. What is random in training (order, crops, texts) is a function of (seed, epoch, sample) alone: neither the
number of workers nor a resumed run changes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html
import json
import math
import os
import re
import signal
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch.utils.data import DataLoader, Dataset

from mope import BERT, InputError, regular_file

GREY = (124, 116, 104)  # stands for an image that is missing or damaged: ImageNet's mean colour
MAX_BAD, BAD_IN_ANY_CASE = 0.01, 3  # this share of a split's images may be bad, or this many if that is more
HELD_OUT = 0.1  # share of training that becomes validation where a data set has none
Image.init()  # fills OPEN; "JPEG" opens MPO too. Others are not opened: for EPS, Pillow would run a program
FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000") if f in Image.OPEN]
T = Image.Transpose
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270,
           7: T.TRANSVERSE, 8: T.ROTATE_90}  # EXIF orientation -> what undoes it


class Sample(NamedTuple):
    id: str
    image: Path | np.ndarray  # a file, or pixels [S, S, 3] uint8
    text: str
    label: object  # a class name, a list of them, None if nobody knows it, or what `pick_text` makes one of


# Layouts: one class for each data set ------------------------------------------------------------------


class Layout:
    """What the layouts share. A subclass says what its folder looks like (`tree`), which file holds a split, and how a
    line of it becomes a sample (or None, to drop it; any exception makes an error message). To add one of your own:

        class Memes(Layout):
            tree = "{train,val,test}.tsv: image, text and label in each line; img/"
            files = ("{}.tsv",)

            def parse(self, line, split, where):
                image, text, label = line.split("\\t")
                return Sample(where, self.folder / "img" / image, text, label)

    Then name it in DATASETS, and its defaults in DEFAULTS of train.py.
    """

    tree = ""  # the expected tree and where to get it, for error messages
    files = ("{}.jsonl",)  # where a split can be, the first that exists; {} is train, val (or else dev) or test
    flip = True  # may a training image be mirrored?
    classes: list[str] | None = None  # None: those of the training split, sorted
    texts_vary = False  # does `pick_text` give a sample another text in each epoch?
    may_hold_out = False  # is a validation split held out of train where val.jsonl and dev.jsonl are absent?
    ids_name_kinds = False  # is an id "kind-number"? Then the picture of the routing shows the kinds too.

    def __init__(self, folder: Path):
        self.folder = folder
        self.noted: dict[str, Counter] = defaultdict(Counter)  # by split: how often something was met and mended

    def pick_text(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample with a text (and the label that follows from it), where texts vary."""
        return sample

    def require(self, *paths: Path) -> Path:
        """Return the first of the paths that exists, or raise an error that says what the folder should look like."""
        for path in paths:
            if path.exists():
                return path
        raise InputError(f"no {' or '.join(map(str, paths))}\nExpected in {self.folder}:\n{self.tree.rstrip()}\n"
                         "Give the folder with --data-dir. `python train.py` alone needs no data.")

    def file(self, split: str) -> Path:
        names = ("val", "dev") if split == "val" else (split,)
        return self.require(*(self.folder / pattern.format(name) for pattern in self.files for name in names))

    def entries(self, path: Path, split: str) -> Iterator[tuple[str | Path, str]]:
        """Yield ("file:line", line) for every line that is not blank, of UTF-8 with or without byte order mark."""
        for number, raw in enumerate(regular_file(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            where = f"{path}:{number}"
            with self.explained(where, raw):
                line = raw.decode("utf-8").strip()
            if line:
                yield where, line

    def read(self, split: str) -> Iterator[Sample]:
        """Yield the samples of a split, checked; whole numbers as labels are read as names."""
        for where, entry in self.entries(self.file(split), split):
            with self.explained(where, entry):
                sample = self.parse(entry, split, where)
                if sample is None:
                    continue
                names = [str(name) if type(name) is int else name for name in names_of(sample.label)]
                if not all(isinstance(word, str) for word in (sample.text, *names)):
                    raise TypeError("text and label must be strings")
                if sample.label is None and split != "test":
                    raise ValueError(f"no label, which the {split} split needs")
                # JSON can hold half of a surrogate pair, which would stop the tokenizer or a file later.
                "".join((sample.id, str(sample.image), sample.text, *names)).encode()
                sample = sample._replace(label=names if isinstance(sample.label, list) else names[0] if names else None)
            self.noted[split]["rows without a label: they get a prediction and no score"] += sample.label is None
            yield sample

    @contextlib.contextmanager
    def explained(self, where: str | Path, found: str | bytes):
        """Turn whatever goes wrong with a file from outside into one message that names it."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{where}: {type(error).__name__}: {str(error)[:80]}; found {found[:60]!a}; expected:\n"
                             f"{self.tree.strip()}") from None

    def load_split(self, split: str) -> list[Sample]:
        """Return all samples of a split. Images that do not exist are noted, and left out of training."""
        samples = list(self.read(split))
        if not samples:
            raise InputError(f"{self.folder}: the {split} split is empty")
        images = {sample.image for sample in samples if isinstance(sample.image, Path)}
        missing = set(check_damaged([str(image) for image in images if not os.path.isfile(image)], samples, split))
        if not missing:
            return samples
        what = "left out of training" if split == "train" else "kept with a grey image"
        self.noted[split][f"images do not exist: {what}, for instance {min(missing)}"] = len(missing)
        return [sample for sample in samples if split != "train" or str(sample.image) not in missing]


def names_of(label: object) -> list:
    return label if isinstance(label, list) else [] if label is None else [label]


class JsonLines(Layout):
    """A user's own data, and prepared copies of Food-101 and MM-IMDb."""

    tree = """
    train.jsonl, val.jsonl (or dev.jsonl; without it, 10 % of train are held out), test.jsonl
    one object a line: {"image": "path, relative to this folder", "text": "...", "label": "name"}
    ("img" for "image" works; a list of names as label makes it a multi-label task)"""
    may_hold_out = True

    def parse(self, line: str, split: str, where: str) -> Sample | None:
        row = json.loads(line)
        image = self.folder / (row["image"] if "image" in row else row["img"])
        return Sample(str(row.get("id", Path(where).name)), image, row["text"], row.get("label"))


class Food101(JsonLines):
    """UPMC Food-101: photograph and page title, 101 classes."""

    tree = """
    images/{train,test}/<class>/<class>_<n>.jpg
    texts/{train,test}_titles.csv      (or a prepared copy: {train,val,test}.jsonl)
    from https://www.kaggle.com/datasets/gianmarco96/upmcfood101 (8.3 GB), for instance by
    curl -L -o food101.zip https://www.kaggle.com/api/v1/datasets/download/gianmarco96/upmcfood101"""
    files = ("{}.jsonl", "texts/{}_titles.csv")

    def parse(self, line: str, split: str, where: str) -> Sample | None:
        if line.startswith("{"):
            return super().parse(line, split, where)
        # No csv reader: train_titles.csv has a quote that never closes, which would swallow 16 rows in silence.
        name, _, rest = line.partition(",")
        title, comma, label = rest.rpartition(",")
        if not comma:
            raise ValueError("no image,title,class")
        self.noted[split]["rows name a .txt for their .jpg: mended"] += name.endswith(".txt")
        name = name.removesuffix(".txt").removesuffix(".jpg") + ".jpg"
        title = title.removeprefix('"').removesuffix('"').replace('""', '"')
        title = html.unescape(re.sub(r'^\[\["?|"?\]\]$', "", title)).strip()  # some are wrapped: [["..."]]
        return Sample(name, self.require(self.folder / "images" / split) / label / name, title, label)


class MMIMDb(JsonLines):
    """MM-IMDb: poster and plot, the 23 most frequent genres, several a film."""

    tree = """
    split.json, dataset/<id>.json (with lists "plot" and "genres"), dataset/<id>.jpeg
    (or a prepared copy: {train,dev,test}.jsonl)
    from https://archive.org/download/mmimdb/mmimdb.tar.gz (8 GB)"""
    classes = (
        "Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery Sci-Fi Fantasy Family "
        "Biography War History Music Animation Musical Western Sport Short Film-Noir").split()
    files = ("{}.jsonl", "split.json")
    may_hold_out = False

    def entries(self, path: Path, split: str) -> Iterator[tuple[str | Path, str]]:
        if path.suffix == ".jsonl":
            return super().entries(path, split)
        with self.explained(path, "no list of ids for this split"):
            ids = list(json.loads(regular_file(path).read_text("utf-8"))["dev" if split == "val" else split])
        films = [self.require(self.folder / "dataset" / f"{film}.json") for film in ids]
        return ((film, regular_file(film).read_text("utf-8", errors="replace")) for film in films)

    def parse(self, line: str, split: str, where: str | Path) -> Sample | None:
        if isinstance(where, Path):
            film = json.loads(line)
            if not isinstance(film["plot"], list) or not isinstance(film["genres"], list):
                raise TypeError("expected a list")
            sample = Sample(where.stem, where.with_suffix(".jpeg"), max(film["plot"], key=len), film["genres"])
        else:
            sample = super().parse(line, split, where)
        genres = [genre for genre in names_of(sample.label) if genre in self.classes]
        for other in set(names_of(sample.label)) - set(genres):
            self.noted[split][f"times the genre {other}, which is none of the 23: ignored"] += 1
        if sample.label is None or genres:
            return sample._replace(label=genres or None)
        self.noted[split]["films without any of the 23 genres: dropped"] += 1


class SnliVE(Layout):
    """SNLI-VE: photograph and hypothesis -> entailment, neutral or contradiction."""

    tree = """
    snli_ve_{train,dev,test}.jsonl, flickr30k_images/<id>.jpg
    from https://github.com/necla-ml/SNLI-VE and
    https://storage.googleapis.com/allennlp-public-data/snli-ve/flickr30k_images.tar.gz"""
    files = ("snli_ve_{}.jsonl",)
    flip = False  # "the man on the left"
    classes = ["entailment", "neutral", "contradiction"]

    def parse(self, line: str, split: str, where: str) -> Sample | None:
        row = json.loads(line)
        if row["gold_label"] == "-":
            self.noted[split]["pairs on whose label the annotators did not agree (-): dropped"] += 1
            return None
        photo = row["Flickr30K_ID" if "Flickr30K_ID" in row else "Flikr30kID"]  # older files spell it without the c
        image = self.require(self.folder / "flickr30k_images") / (str(photo).removesuffix(".jpg") + ".jpg")
        return Sample(str(row.get("pairID", Path(where).name)), image, row["sentence2"], row["gold_label"])


class Grocery(Layout):
    """Grocery Store Dataset, a task of our own: a photograph, and one sentence about some product of the same group,
    -> which of the 81 products. The text narrows it down to the group, the photograph alone leaves look-alikes."""

    tree = """
    dataset/classes.csv (numbered from 0), dataset/{train,val,test}.txt (path,product,group a line),
    the photographs and descriptions they name; from git clone https://github.com/marcusklasson/GroceryStoreDataset"""
    files = ("dataset/{}.txt", "{}.txt")
    texts_vary = True
    repeat = 1  # pairs a photograph

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.root = self.require(folder / "dataset" / "classes.csv", folder / "classes.csv").parent
        self.description: dict[str, list[str]] = {}  # of each product, its sentences
        self.group: dict[str, list[str]] = {}  # of each product, all products of its group
        groups = defaultdict(list)
        for where, line in list(self.entries(self.root / "classes.csv", ""))[1:]:
            with self.explained(where, line):
                product, number, group, _, _, file = line.split(",")
                if int(number) != len(self.group) or product in self.group:
                    raise ValueError(f"product {product!r} has number {number}; expected {len(self.group)}, once")
                text = regular_file(self.require(self.root / file.strip().lstrip("/"))).read_text("utf-8")
                self.description[product] = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))
                groups[group].append(product)
                self.group[product] = groups[group]
        self.classes = self.classes or list(self.group)

    def parse(self, line: str, split: str, where: str) -> Sample:
        path, number, _ = (part.strip() for part in line.split(","))
        return Sample(path, self.root / path, "", dict(enumerate(self.group))[int(number)])

    def read(self, split: str) -> Iterator[Sample]:
        for sample in super().read(split):
            for copy in range(self.repeat):
                yield sample._replace(id=f"{sample.id}#{copy}") if copy else sample

    def pick_text(self, sample: Sample, rng: np.random.Generator) -> Sample:
        product = rng.choice(self.group[sample.label])
        return sample._replace(text=str(rng.choice(self.description[product])))


class GroceryVE(Grocery):
    """The same photographs as an entailment task, two pairs a photograph: the first two sentences of the description
    of this product, of another of its group (neutral), or of another group (contradiction)."""

    flip = False
    repeat = 2
    classes = SnliVE.classes

    def pick_text(self, sample: Sample, rng: np.random.Generator) -> Sample:
        product, group = sample.label, self.group[sample.label]
        candidates = {"entailment": [product], "neutral": [p for p in group if p != product],
                      "contradiction": [p for p in self.group if p not in group]}
        label = rng.choice([name for name, products in candidates.items() if products])
        text = " ".join(self.description[rng.choice(candidates[label])][:2])
        return sample._replace(text=text, label=str(label))


# The toy -----------------------------------------------------------------------------------------------
# An image has four quadrants, three of them with an object; no two objects share a shape or a colour.

COLORS = {"red": (215, 45, 40), "green": (50, 165, 65), "blue": (50, 85, 215), "yellow": (235, 205, 45)}
WORDS = {"shape": ("circle", "square", "triangle", "cross"), "color": tuple(COLORS),
         "place": ("top left", "top right", "bottom left", "bottom right")}
QUESTIONS = {"color": ("what color is {} ?", "tell me the color of {}"),
             "shape": ("what shape is {} ?", "tell me the shape of {}"),
             "place": ("where is {} ?", "tell me the place of {}")}
CALLS = {"color": "the {} thing", "shape": "the {}"}  # an object is called by what is not asked for


def make_shapes(n: int, rng: np.random.Generator, quadrant: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return images [n, S, S, 3] uint8 of side S = 2 * quadrant, and cells [n, 4, 3]: shape, color and place of what is
    in each quadrant, as numbers from 1; shape and color are 0 where it is empty."""
    def different(high: int) -> np.ndarray:  # three different numbers below high for each image, [n, 3]
        return rng.random((n, high)).argsort(1)[:, :3]

    cells = np.zeros((n, 4, 3), int)
    cells[..., 2] = np.arange(1, 5)
    kinds = np.stack([different(len(WORDS["shape"])), different(len(COLORS))], -1) + 1  # [n, 3, 2]
    np.put_along_axis(cells[..., :2], different(4)[..., None], kinds, 1)

    # A shape is an inequality on the offset (x, y) from its centre, in units of its radius. We make 200 of each
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
    return images.reshape(n, 2, 2, quadrant, quadrant, 3).swapaxes(2, 3).reshape(n, 2 * quadrant, -1, 3), cells


class Shapes(Layout):
    """Generated: a picture of three coloured shapes, and a question about one of them -> the answer, one of twelve. The
    question alone leaves four answers. The picture alone leaves nine: three shapes, three colours, three places."""

    flip = False
    ids_name_kinds = True
    classes = [*WORDS["color"], *WORDS["shape"], *WORDS["place"]]
    sizes = {"train": 20_000, "val": 1_000, "test": 2_000}

    def read(self, split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(self.sizes).index(split))
        images, cells = make_shapes(self.sizes[split], rng)
        for i, (image, objects) in enumerate(zip(images, cells)):
            there = dict(zip(WORDS, rng.choice(objects[objects[:, 0] > 0])))
            by = rng.choice(["shape", "color"])
            asked = rng.choice([name for name in WORDS if name != by])
            called = WORDS[by][there[by] - 1]
            text = QUESTIONS[asked][rng.integers(2)].format(CALLS[by].format(called))
            yield Sample(f"{asked} of {called}-{i}", image, text, WORDS[asked][there[asked] - 1])


DATASETS = {"shapes": Shapes, "food101": Food101, "mmimdb": MMIMDb, "snli_ve": SnliVE, "grocery": Grocery,
            "grocery_ve": GroceryVE, "jsonl": JsonLines}


# Splits ------------------------------------------------------------------------------------------------


def load(dataset: str, folder: str | Path, train_size: float | None = None, seed: int = 0,
         test_for: tuple[list[str], bool] | None = None) -> dict[str, Pairs]:
    """Return the splits "train", "val" and "test", or, to evaluate a trained model, "test" alone.

    `train_size` (a count, or a fraction below 1) keeps a stratified part of train, drawn by `seed`; a validation split
    that a data set lacks is held out of train, stratified, by a fixed seed. `test_for` are classes and multilabel of
    the trained model. Raises InputError.
    """
    source = DATASETS[dataset](Path(folder).expanduser())
    has_val = not source.may_hold_out or any((source.folder / f"{name}.jsonl").exists() for name in ("val", "dev"))
    names = ["test"] if test_for else ["train", "val", "test"]
    splits = {name: source.load_split(name) for name in names if name != "val" or has_val}
    if test_for:
        classes, several = test_for
    else:
        whole = splits["train"]
        classes = source.classes or sorted({name for sample in whole for name in names_of(sample.label)})
        several = isinstance(whole[0].label, list)
        if len(classes) < (1 if several else 2):
            raise InputError(f"{source.folder}: classes {classes}; expected two or more, or one where labels are lists")
        if not has_val:
            held = stratified(whole, max(1, round(HELD_OUT * len(whole))), seed=0)
            splits["val"] = [whole[i] for i in held]
            splits["train"] = [whole[i] for i in sorted({*range(len(whole))} - {*held})]
            if not splits["train"]:
                raise InputError(f"{source.folder}: a single training sample, held out for validation; expected more")
            source.noted["val"][f"samples held out of train: {HELD_OUT:.0%} of each label, by a fixed seed"] = len(held)
        if train_size is not None:
            splits["train"] = [splits["train"][i] for i in stratified(splits["train"], train_size, seed)]

    known = {*classes, *getattr(source, "group", ())}
    for split, samples in splits.items():
        for s in samples:
            fits = isinstance(s.label, list) == several and known.issuperset(names_of(s.label))
            if s.label is not None and not fits:
                raise InputError(f"{source.folder}, {split}, {s.id}: label {str(s.label)[:80]!r}; expected "
                                 f"{'a list' if several else 'one'} of the {len(classes)} classes of train")
    return {split: Pairs(source, split, splits[split], classes, several, seed) for split in names}


def unlabelled(inputs: list[str], classes: list[str], several: bool) -> Pairs:
    """Return rows to be scored: those of a .jsonl file with images relative to it, or the one pair (image, text)."""
    source = JsonLines(Path(inputs[0]).parent)
    source.tree = 'one object a line: {"image": "path, relative to this file", "text": "..."}'
    source.file = lambda split: Path(inputs[0])
    if len(inputs) == 2:
        row = {"id": inputs[0], "image": Path(inputs[0]).name, "text": inputs[1]}
        source.entries = lambda path, split: [("the pair", json.dumps(row))]
    samples = [sample._replace(label=None) for sample in source.load_split("test")]
    for name in ("file", "entries"):  # loader processes cannot be sent a lambda
        vars(source).pop(name, None)
    return Pairs(source, "test", samples, classes, several, seed=0)


def stratified(samples: list[Sample], size: float, seed: int) -> list[int]:
    """Return indices, in order, of a part that holds each label in the proportion of the whole. Every sample gets its
    rank within its label, shuffled, as a fraction; those with the smallest are taken."""
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


class Pairs(Dataset):
    """One split of a data set: samples, classes, and notes on what loading met and mended."""

    def __init__(self, source: Layout, split: str, samples: list[Sample], classes: list[str], multilabel: bool,
                 seed: int):
        self.source, self.split, self.samples, self.classes = source, split, samples, classes
        self.multilabel, self.seed, self.train = multilabel, seed, split == "train"
        self.notes = [f"{n} {what}" for what, n in source.noted[split].items() if n]
        self.image_size = 224  # set by `loader`

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def digest(self) -> str:
        """The number of samples, and a hash of their order, ids, texts, labels and files with their sizes."""
        seen, images = hashlib.sha256(), {sample.image for sample in self.samples if isinstance(sample.image, Path)}
        sizes = {image: image.stat().st_size if os.path.isfile(image) else None for image in images}
        for name, image, text, label in map(self.sample, range(len(self))):
            file = f"{image.name} {sizes[image]}" if isinstance(image, Path) else ""
            seen.update(repr((name, file, text, label)).encode())
        return f"{len(self)} samples, {seen.hexdigest()[:12]}"

    def sample(self, i: int, epoch: int = 0) -> Sample:
        """Return sample i; where texts vary, with another one in each training epoch, and one only in evaluation."""
        sample = self.samples[i]
        return self.source.pick_text(sample, self.rng(i, epoch)) if self.source.texts_vary else sample

    def rng(self, i: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, i] if self.train else [0, i])

    def steps(self, batch_size: int) -> int:
        """Return the batches of an epoch, over all processes."""
        steps = len(self) // batch_size if self.train else -(-len(self) // batch_size)
        if not steps:
            raise InputError(f"{len(self)} training samples fill no batch; give a --batch-size of {len(self)} or less")
        return steps

    def target(self, label: str | list[str] | None) -> int | np.ndarray:
        """Turn a class name into its number, a list of them into [C] of zeros and ones; -1 stands for no label."""
        if not self.multilabel:
            return -1 if label is None else self.classes.index(label)
        return np.array([-1 if label is None else name in label for name in self.classes], np.float32)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """Return i, image [3, S, S] uint8, text, target, and the file with the reason if it could not be read."""
        epoch, i = key
        rng = self.rng(i, epoch)
        sample = self.source.pick_text(self.samples[i], rng)
        try:
            image, damaged = decode(sample.image, self.image_size, rng if self.train else None, self.source.flip), ""
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types for damaged files; what is damaged is counted and limited
            grey = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
            image, damaged = torch.from_numpy(grey).permute(2, 0, 1), f"{sample.image}: {str(error)[:100]}"
        return i, image, sample.text, self.target(sample.label), damaged


def check_damaged(damaged: list[str], samples: list[Sample], split: str) -> list[str]:
    """Return the damaged images of a split, once each; raise InputError if they are too many."""
    damaged = sorted(set(damaged))
    count = len({str(sample.image) for sample in samples}) if damaged else 0
    if damaged and len(damaged) > min(count - 1, max(MAX_BAD * count, BAD_IN_ANY_CASE)):
        raise InputError(f"{len(damaged)} of {count:,} images of {split} are missing or cannot be read, more than "
                         f"{MAX_BAD:.0%} or {BAD_IN_ANY_CASE}; download them again or take their rows out. The first:"
                         + "".join(f"\n  {name}" for name in damaged[:10]))
    return damaged


def decode(source: Path | str | np.ndarray, size: int, rng: np.random.Generator | None = None,
           flip: bool = False) -> torch.Tensor:
    """Turn an image file or pixels [h, w, 3] into upright RGB [3, size, size] uint8. Pixels are only resized.

    Without rng, the short side is resized to size * 256 / 224 and the centre is cut out. With it, a crop of 60 to 100 %
    of the area and of an aspect between 3:4 and 4:3 is taken (our choice: mild), as far as the image is long and high
    enough, and mirrored half of the time if `flip`. Raises what Pillow raises for a damaged file.
    """
    if isinstance(source, np.ndarray):
        return resize(source, size)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text is no reason to refuse the pixels
    with Image.open(regular_file(Path(source)), formats=FORMATS) as image:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work; `draft` picks the smallest that is
        # still as large as asked (the shortest crop below is 0.67 of a side), so that nothing has to be enlarged.
        image.draft("RGB", (round(size * 256 / 224),) * 2 if rng is None else (round(1.5 * size),) * 2)
        orientation = 1
        with contextlib.suppress(Exception):  # of the metadata only this matters, and odd ones do no harm
            orientation = image.getexif().get(0x0112, 1)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])

    width, height = image.size
    if rng is None:
        w = h = min(width, height) * 224 / 256
        left, top = (width - w) / 2, (height - h) / 2
    else:
        area, aspect = rng.uniform(0.6, 1) * width * height, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    left, top = round(left), round(top)
    pixels = resize(np.array(image.crop((left, top, left + max(1, round(w)), top + max(1, round(h))))), size)
    return pixels.flip(-1) if rng is not None and flip and rng.random() < 0.5 else pixels


def resize(pixels: np.ndarray, size: int) -> torch.Tensor:
    """Resize [h, w, 3] -> [3, size, size], uint8, as Pillow's bicubic filter does it, in less than half the time."""
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True)[0]


# Batches -----------------------------------------------------------------------------------------------


def plan(pairs: Pairs, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1,
         accumulate: int = 1) -> list[list[tuple[int, int]]]:
    """Return the batches of this process in an epoch, from step `start` on, as lists of (epoch, index).

    `batch_size` samples make a step, dealt out over processes and micro-batches. In training an incomplete last step is
    dropped; in evaluation every sample comes exactly once over all processes. A batch is padded to its longest text, so
    texts of similar length are put together: in evaluation all are sorted, in training ten steps at a time.
    """
    lengths = np.array([len(pairs.sample(i, epoch).text) // 64 for i in range(len(pairs))])  # 64: some 16 word pieces
    order, steps = lengths.argsort(kind="stable"), pairs.steps(batch_size)
    if pairs.train:
        if batch_size % (world * accumulate):
            raise InputError(f"--batch-size {batch_size} cannot be dealt out evenly over {world} processes with "
                             f"--accumulate {accumulate}; give a multiple of {world * accumulate}")
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[:steps * batch_size]
        for ten in range(0, len(order), 10 * batch_size):
            part = order[ten:ten + 10 * batch_size]
            part[:] = part[lengths[part].argsort(kind="stable")]
        order = rng.permutation(order.reshape(steps, batch_size)).flatten()

    mine = [order[step * batch_size:(step + 1) * batch_size][rank::world] for step in range(start, steps)]
    micro_batches = [part for batch in mine for part in np.array_split(batch, accumulate)]
    return [[(epoch, int(i)) for i in part] for part in micro_batches if len(part)]


def loader(pairs: Pairs, tokenizer: Tokenizer, image_size: int, workers: int = 0, device: str = "cpu") -> DataLoader:
    """Return a DataLoader for the batches of a `plan`, which are put into its list `batch_sampler`. Its workers outlive
    an epoch, since starting them can take seconds; those of the test split are needed only once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would compete with the workers
    pairs.image_size = image_size
    return DataLoader(
        pairs, batch_sampler=[], collate_fn=functools.partial(collate, tokenizer), pin_memory=device == "cuda",
        num_workers=workers, persistent_workers=workers > 0 and pairs.split != "test", worker_init_fn=start_worker,
        generator=torch.Generator())  # its own: the global one belongs to the router's noise


def start_worker(_: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # for the main process, which finishes its step first
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)  # Windows lacks the last two


def collate(tokenizer: Tokenizer, rows: list[tuple]) -> dict:
    """Return index [B], images [B, 3, S, S] uint8, texts [B, N] ids, labels [B] or [B, C], damaged files."""
    index, images, texts, targets, damaged = zip(*rows)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    batch = {"index": torch.tensor(index), "images": torch.stack(images), "texts": torch.tensor(ids),
             "labels": torch.stack([torch.as_tensor(t) for t in targets])}
    if torch.utils.data.get_worker_info():  # left to the worker's queue, too little memory would hang the program
        batch = {name: tensor.share_memory_() for name, tensor in batch.items()}
    return batch | {"damaged": [name for name in damaged if name]}


def load_tokenizer(bert: BERT, length: int, multiple: int | None = None) -> Tokenizer:
    """Return the tokenizer in a BERT's folder, which has to belong to that BERT. It truncates at `length`, keeping
    [SEP], and pads to the longest text of a batch, or to the next multiple, so that torch.compile meets few lengths."""
    folder = bert.folder
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(regular_file(folder / "tokenizer.json")))
        else:
            settings = folder / "tokenizer_config.json"
            c = json.loads(regular_file(settings).read_text("utf-8")) if settings.exists() else {}
            tokenizer = BertWordPieceTokenizer.from_file(
                str(regular_file(folder / "vocab.txt")), handle_chinese_chars=c.get("tokenize_chinese_chars", True),
                lowercase=c.get("do_lower_case", True), strip_accents=c.get("strip_accents"))._tokenizer
        tokenizer.no_padding()
        empty, ids, size = tokenizer.encode("").ids, tokenizer.get_vocab(), bert.word_embeddings.num_embeddings
        pad, ends, last = ids.get("[PAD]"), [ids.get("[CLS]"), ids.get("[SEP]")], max(ids.values())
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{folder}: expected tokenizer.json or vocab.txt of a BERT ({error})") from None
    for right, wrong in ((pad == bert.pad_id, f"[PAD] is {pad}, not {bert.pad_id}"),
                         (empty == ends, f"an empty text gives {empty}, not [CLS] and [SEP], which are {ends}"),
                         (last < size, f"ids go up to {last}, past {size} embeddings")):
        if not right:
            raise InputError(f"{folder}: the tokenizer does not belong to this BERT: {wrong}")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=bert.pad_id, pad_token="[PAD]", pad_to_multiple_of=multiple)
    return tokenizer


# A picture of the routing ------------------------------------------------------------------------------

CELL, TILE = 34, 112  # the sides of a cell of a heat map and of a sample's image, in pixels


def plot_routing(pairs: Pairs, routing: torch.Tensor, busiest: int = 6, shown: int = 5) -> Image.Image:
    """Return routing.png for the routing [n, L, k] of all samples: the mean weight of each expert by layer, and for the
    layer whose routing differs most between samples, the mean of each kind and what the busiest experts are for."""
    n, layers, k = routing.shape
    layer = int(routing.var(0, unbiased=False).sum(-1).argmax())
    weights, title = routing[:, layer], f"Layer {layer + 1}"
    share = weights.mean(0)
    used = [e for e in share.argsort(descending=True)[:busiest].tolist() if share[e] > min(0.01, 0.1 / k)]
    kinds = [sample.id.rpartition("-")[0] if pairs.source.ids_name_kinds else "" for sample in pairs.samples]
    kinds, by_kind, told, most = routing_by_kind(kinds, weights)
    right, row = max(200 + CELL * k, 560), TILE + 60
    height = max(80 + row * len(used), 190 + CELL * (layers + len(kinds)))
    page = Image.new("RGB", (right + 130 + (TILE + 40) * shown, height), "white")
    pen = ImageDraw.Draw(page)
    heat_map(pen, 20, 20, routing.mean(0), [f"layer {i + 1}" for i in range(layers)],
             f"Mean routing weight (%) of each expert, {n:,} {pairs.split} samples")
    if kinds != [""]:
        heat_map(pen, 20, 110 + CELL * layers, by_kind, kinds,
                 f"{title} by kind: it tells {told:.1f} of at most {most:.1f} bits of a sample's kind")
    write(pen, right, 20, f"{title}: its busiest experts, and the samples that weight them most", 18)
    for y, e in zip(range(70, height, row), used):
        write(pen, right, y + TILE // 2 - 20, f"expert {e + 1}\n{100 * share[e]:.0f} %", 16)
        first: dict[str, int] = {}  # samples of one text route alike, so only the first is shown
        for i in weights[:, e].argsort(descending=True).tolist():
            first.setdefault(pairs.sample(i).text, i)
        for x, i in zip(range(right + 110, page.width - TILE, TILE + 40), first.values()):
            _, image, text, _, _ = pairs[0, i]
            page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((TILE, TILE)), (x, y))
            write(pen, x, y + TILE + 2, "\n".join(textwrap.wrap(text, 24, max_lines=3, placeholder=" …")), 11)
    return page


def routing_by_kind(kinds: list[str], routing: torch.Tensor) -> tuple[list[str], torch.Tensor, float, float]:
    """Return the kinds, the mean routing of each [kinds, k], the mutual information of kind and expert in bits, and its
    upper bound: the entropy of the kinds, or the bits of k experts."""
    names = sorted(set(kinds))
    member = torch.tensor([[kind == name for kind in kinds] for name in names]).float()  # [kinds, n]
    share, mean = member.mean(1), member @ routing / member.sum(1, keepdim=True)
    of_kinds, of_experts, within = (torch.special.entr(p).sum(-1) / math.log(2) for p in (share, share @ mean, mean))
    return names, mean, float(of_experts - share @ within), min(float(of_kinds), math.log2(routing.shape[-1]))


def heat_map(pen: ImageDraw.ImageDraw, x: int, y: int, values: torch.Tensor, rows: list[str], title: str) -> None:
    """Paint values [rows, k] between 0 and 1 from white to dark blue, each printed in its cell as a percentage."""
    write(pen, x, y, title, 18)
    columns = range(x + 130, x + 130 + CELL * values.shape[1], CELL)
    for number, left in enumerate(columns, 1):
        write(pen, left + CELL // 2, y + 32, str(number), 12, anchor="mm")
    for top, name, row in zip(range(y + 45, y + 45 + CELL * len(rows), CELL), rows, values.tolist()):
        write(pen, x, top + CELL // 2, name, 14, anchor="lm")
        for left, value in zip(columns, row):
            shade = tuple(round(255 + (dark - 255) * value ** 0.5) for dark in (8, 48, 107))
            pen.rectangle((left, top, left + CELL - 2, top + CELL - 2), shade)
            middle, color = (left + CELL // 2, top + CELL // 2), "white" if value > 0.2 else "black"
            write(pen, *middle, f"{100 * value:.0f}", 12, color, "mm")


def write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, color="black", anchor=None) -> None:
    try:
        font = ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):  # before Pillow 10.1, or without FreeType: one size, and Latin-1 only
        font, text = ImageFont.load_default(), text.encode("latin-1", "replace").decode("latin-1")
    pen.text((x, y), text, color, font, anchor)
