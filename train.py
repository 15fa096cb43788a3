"""Train, evaluate, compare and look at MoPE: `python train.py --help`. A plain loop; the method is in mope.py."""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from mope import BERT, InputError, MoPE, ViT, count, effective_experts, load_bert, load_vit

# What a data set decides, and any flag overrides. lr and weight decay are AdamW's; text_length counts word pieces,
# [CLS] and [SEP] included.
DEFAULTS = {
    "shapes":     dict(epochs=4, batch_size=64, lr=1e-2, weight_decay=1e-3, text_length=16, vision=None, text=None,
                       image_size=32, static=4, experts=6, dynamic=4, mapper=64, prior_prompts=0, workers=0,
                       precision="float32"),
    "food101":    dict(epochs=10, batch_size=32, lr=3e-3, weight_decay=1e-3, text_length=128),
    "mmimdb":     dict(epochs=10, batch_size=32, lr=3e-3, weight_decay=1e-3, text_length=256),
    "snli_ve":    dict(epochs=6, batch_size=64, lr=3e-3, weight_decay=1e-3, text_length=64),
    "grocery":    dict(epochs=4, batch_size=32, lr=3e-3, weight_decay=1e-3, text_length=64),
    "grocery_ve": dict(epochs=3, batch_size=32, lr=3e-3, weight_decay=1e-3, text_length=96),
    "jsonl":      dict(epochs=10, batch_size=32, lr=3e-3, weight_decay=1e-3, text_length=128),
}

# What --method compares differs in sizes, in what is trained and in what the head sees; a flag overrides its part.
# ALL stands for as many prompts a layer as MoPE has.
ALL = -1
METHODS = {
    "mope":        dict(),
    "mapped":      dict(experts=0),
    "vanilla":     dict(experts=0, mapped=False, static=ALL),
    "late-concat": dict(experts=0, mapped=False, static=0, prior_prompts=0),
    "finetune":    dict(experts=0, mapped=False, static=0, prior_prompts=0, finetune=True, lr=1e-4),
    "image-only":  dict(experts=0, mapped=False, static=ALL, prior_prompts=0, head="main", main="vision"),
    "text-only":   dict(experts=0, mapped=False, static=ALL, prior_prompts=0, head="main", main="text"),
}

# flag -> default (the first of several choices; a type where there is none or the data set decides), help
FLAGS = {
    "data": {
        "data-dir": (str, "the data set's folder; default data/<dataset>"),
        "train-size": (float, "train on N samples, or on a fraction below 1, drawn by --seed"),
        "text-length": (int, "word pieces kept of a text; lower it if memory runs out"),
    },
    "model": {
        "method": (tuple(METHODS), "what to train, as a set of the flags below"),
        "vision": ("vit_b_16", "vit_b_16, vit_b_32, vit_l_16, dinov2_vits14, dinov2_vitb14, or a file of such weights"),
        "text": ("bert-base-uncased", "bert-base-uncased, another hub id owner/name of a BERT, or a folder"),
        "image-size": (224, "a multiple of the patch size; a lower one is faster"),
        "pooling": (("mean", "cls"), "the feature of a text"),
        "main": (("vision", "text"), "the modality that is prompted with the other"),
        "static": (6, "static prompts a layer"),
        "experts": (16, "prompt experts a layer"),
        "dynamic": (6, "prompts that an expert holds"),
        "temperature": (0.1, "of the router's softmax"),
        "mapped": (True, "one prompt a layer mapped from the other modality"),
        "mapper": (16, "hidden width of the MLP that maps it"),
        "prior-prompts": (4, "learned prompts a layer of the prior encoder"),
        "head": (("both", "main"), "the features that the classifier sees, of both modalities or of the main one"),
        "finetune": (False, "train the encoders too"),
        "importance": (0.01, "weight of the importance loss"),
    },
    "training": {
        "epochs": (int, "passes over the training samples"),
        "batch-size": (int, "samples a step, over all processes and micro-batches"),
        "accumulate": (1, "micro-batches a step; raise it if memory runs out"),
        "lr": (float, "peak learning rate, after a warm-up over 5 % of the steps; then a cosine to zero"),
        "weight-decay": (float, "of AdamW"),
        "seed": (0, "of everything random in training"),
    },
    "machine": {
        "device": (("auto", "cuda", "mps", "cpu"), "auto is the first of the others that is there"),
        "precision": (("auto", "float32", "bfloat16", "float16"), "auto is bfloat16 where the hardware is good at it"),
        "compile": (False, "torch.compile: faster steps after a minute or two"),
        "workers": (2, "processes that read images; 0 reads in the main one"),
    },
}

# A resumed or evaluated run may go on in another place, machine or manner; all else must stay as it was.
MOVABLE = ("data_dir", "vision", "text", "device", "workers", "accumulate", "compile", "precision")
# Runs that differ in these alone are the same run. (Accumulated steps are not: the importance loss and the router's
# noise are those of a micro-batch.)
INCIDENTAL = ("device", "workers", "compile")


# ---------------------------------------------------------------------------------------------------------
# Settings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags as typed: what was not given is None, so that a resumed run can tell a contradiction."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="The defaults of each data set: DEFAULTS in train.py.")
    parser.add_argument("--dataset", choices=list(DEFAULTS), help="default shapes, which needs no data")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, (default, text) in flags.items():
            choices, value = (default, default[0]) if isinstance(default, tuple) else (None, default)
            text = text.replace("%", "%%")
            if isinstance(value, type):
                group.add_argument(f"--{flag}", type=value, help=text)
                continue
            own = DEFAULTS["shapes"].get(flag.replace("-", "_"), value)
            shown = f" (shapes: {'its own' if own is None else own})" if own != value else ""
            if isinstance(value, bool):
                text += f"; default {'on' if value else 'off'}"
                group.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help=text)
            else:
                text += f"; default {value}{shown}"
                group.add_argument(f"--{flag}", type=type(value), choices=choices, help=text)

    group = parser.add_argument_group("runs")
    group.add_argument("--out", type=Path, help="folder of the run; default runs/<dataset>")
    group.add_argument("--overwrite", action="store_true", help="replace a run of other settings in --out")
    group.add_argument("--checkpoint", metavar="FILE", type=Path, help="best.pt or last.pt of a run, for:")
    action = group.add_mutually_exclusive_group()
    action.add_argument("--eval", action="store_true", help="evaluate it on the test split")
    action.add_argument("--predict", nargs=2, metavar=("IMAGE", "TEXT"), help="what it says of one pair")
    action.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this folder")
    action.add_argument("--summarize", nargs="+", metavar="RUN", type=Path, help="finished runs as a Markdown table")
    action.add_argument("--benchmark", action="store_true", help="time loader, training step and evaluation, without "
                        "--dataset on random weights and inputs")
    return parser.parse_args(argv)


def defaults(dataset: str, method: str) -> dict:
    """The whole configuration of a data set and a method, before any flag."""
    config = {}
    for flag, (default, _) in (item for flags in FLAGS.values() for item in flags.items()):
        value = default[0] if isinstance(default, tuple) else default
        config[flag.replace("-", "_")] = None if isinstance(value, type) else value
    config.update(dataset=dataset, data_dir=f"data/{dataset}", **DEFAULTS[dataset])
    prompts = config["static"] + config["dynamic"] + config["mapped"]
    config.update(METHODS[method], method=method)
    return {key: prompts if value == ALL else value for key, value in config.items()}


def resolve(args: argparse.Namespace) -> tuple[dict, dict | None, Path]:
    """-> the run's whole configuration, the checkpoint to go on from (or None), the run's folder."""
    actions = ("out", "overwrite", "resume", "checkpoint", "eval", "predict", "summarize", "benchmark")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in actions}
    if bool(args.eval or args.predict) != bool(args.checkpoint):
        raise InputError("--checkpoint FILE goes with --eval or --predict IMAGE TEXT")
    if (args.resume or args.checkpoint) and (args.out or args.overwrite) or (args.resume and args.checkpoint):
        raise InputError("--resume goes on in its own folder, and --checkpoint writes nothing: give one of them, "
                         "without --out or --overwrite")

    if args.resume or args.checkpoint:
        path = args.checkpoint or args.resume / "last.pt"
        state = load_checkpoint(path)
        for key, value in given.items():
            stored = state["config"].get(key)
            if key not in MOVABLE and value != stored:
                raise InputError(f"--{key.replace('_', '-')} {value} contradicts {path}, which was made with {stored}; "
                                 "leave it out, or start a new run with another --out")
        config, out = {**state["config"], **given}, path.parent
    else:
        if args.benchmark and not args.dataset and (args.vision or args.text):
            raise InputError("--benchmark times ViT-B/16 and BERT-base; to time other encoders, name a --dataset")
        dataset = args.dataset or ("food101" if args.benchmark else "shapes")
        config, state = {**defaults(dataset, args.method or "mope"), **given}, None
        out = args.out or Path("runs", dataset)

    least = dict(epochs=1, batch_size=1, accumulate=1, text_length=3, image_size=1, static=0, experts=0, dynamic=0,
                 prior_prompts=0, mapper=1, temperature=1e-6, workers=0, importance=0, lr=0, weight_decay=0, seed=0)
    for key, bound in least.items():
        if not bound <= config[key] < 2 ** 63:
            raise InputError(f"--{key.replace('_', '-')} {config[key]}: expected {bound} or more, below 2⁶³")
    if not state and not args.overwrite and not args.benchmark:
        check_out(out, config)
    return config, state, out


def read_run(folder: Path, name: str) -> dict:
    """The config.json or results.json of a run."""
    try:
        return json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise InputError(f"{folder / name} cannot be read; expected the folder of a run") from None


def check_out(out: Path, config: dict) -> None:
    """Never write over another run unasked; exit 0 if this very run is finished already."""
    if not (out / "config.json").exists():
        return
    old = read_run(out, "config.json").get("config", {})
    for key in (k for k in config if k not in INCIDENTAL):
        # Of shapes, which makes encoders for itself:
        drawn = key in ("vision", "text") and config[key] is None and "shapes-encoders-" in str(old.get(key))
        if config[key] not in (old.get(key), "auto") and not drawn:
            raise InputError(f"{out} holds a run of other settings ({key}: {old.get(key)}, now {config[key]}); "
                             "give another --out, or --overwrite to replace it")
    if (out / "results.json").exists():
        print(f"{out} holds this run, finished: {(out / 'results.json').read_text()}")
        sys.exit(0)
    if (out / "last.pt").exists():
        raise InputError(f"{out} holds this run, unfinished; continue it with: python train.py --resume {out}")


def pick_device(name: str) -> torch.device:
    ready = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in ready if ready[n])
    if not ready[name]:
        raise InputError(f"--device {name}: PyTorch {torch.__version__} finds no such device here; "
                         "use --device auto, or install the build of PyTorch for it")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine; give torchrun "
                             f"--nproc_per_node={torch.cuda.device_count()} or less")
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """-> the precision of matrix products, and why."""
    why = "as asked"
    if device.type == "cpu" and name in ("auto", "bfloat16"):
        [gain, *_] = gather([bfloat16_gain()])  # all processes go by the first
        if name == "bfloat16" and not gain:
            raise InputError("--precision bfloat16: this processor announces instructions for it and then refuses "
                             "them, as some virtual machines do; give --precision float32")
        if name == "auto":
            name = "bfloat16" if gain >= 1.5 else "float32"
            why = f"bfloat16 products are {gain:.1f} times as fast here" if gain else "bfloat16 products fail here"
    elif name == "auto":
        good = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name, why = ("bfloat16", "it multiplies bfloat16 fast") if good else ("float32", "it has no fast bfloat16")
    return getattr(torch, name), why


TRIAL = """
import timeit, torch
torch.set_num_threads(1)
m = torch.ones(1024, 1024)
one, other = (min(timeit.repeat(lambda: a @ a, number=1, repeat=5)) for a in (m, m.bfloat16()))
print(one / other)"""


def bfloat16_gain() -> float:
    """How many times as fast as float32 this processor multiplies bfloat16 matrices; 0 if it cannot at all.

    Tried in a process of its own, since an instruction that is announced and then refused kills the process.
    """
    child = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True)
    return 0.0 if child.returncode else float(child.stdout)


# ---------------------------------------------------------------------------------------------------------
# Files of a run: all are written whole or not at all


def write(path: Path, content: str | dict | Image.Image) -> None:
    """Text, a checkpoint or a picture: to a temporary file beside it, synced, then renamed."""
    buffer = io.BytesIO()
    if isinstance(content, dict):
        torch.save(content, buffer)
    elif isinstance(content, str):
        buffer.write(content.encode())
    else:
        content.save(buffer, "PNG")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected last.pt or best.pt in the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "config": dict(state["config"]), "trained": dict(state["trained"])}
    except Exception as error:  # whatever a damaged file makes of torch.load
        raise InputError(f"{path}: not a checkpoint of train.py ({type(error).__name__})") from None


def versions() -> dict[str, str]:
    packages = ("torch", "pillow", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


# ---------------------------------------------------------------------------------------------------------
# Processes (one, or several under torchrun) and signals


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words: object) -> None:
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def gather(items: list) -> list:
    """The items of all processes in one list, in every process."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_damaged(names: list[str], pairs: data.Pairs) -> list[str]:
    """All damaged images that any process met, once each; raises InputError where they are too many."""
    names = sorted(set(gather(names)))
    data.check_damaged(names, pairs.samples, pairs.split)
    return names


class Stopped(Exception):
    """Ctrl-C or SIGTERM (its number is the argument) came, and the step in hand is finished."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)
CAUGHT = []  # the signal that asks for an orderly stop; a second one leaves at once


def catch(number: int, frame: object) -> None:
    CAUGHT.append(number)
    os.write(2, b"\nstopping after this step; once more to leave at once\n")
    for n in SIGNALS:
        signal.signal(n, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------
# Model, evaluation, metrics


@dataclass
class Run:
    """What main() prepares and the rest uses."""

    config: dict
    out: Path
    device: torch.device
    dtype: torch.dtype  # of matrix products
    model: MoPE
    loaders: dict[str, DataLoader]

    def forward(self, batch: dict, network: torch.nn.Module | None = None) -> tuple:
        """A batch of a loader -> what MoPE.forward returns, and the labels on the device."""
        images, texts, labels = (batch[k].to(self.device, non_blocking=True) for k in ("images", "texts", "labels"))
        x, y = (images, texts) if self.config["main"] == "vision" else (texts, images)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return *(network or self.model)(x, y), labels

    def loss(self, batch: dict, network: torch.nn.Module | None = None) -> torch.Tensor:
        """The task's loss and the weighted importance loss of a batch."""
        logits, _, importance, labels = self.forward(batch, network)
        return task_loss(logits, labels) + self.config["importance"] * importance


def build(config: dict, classes: int, device: torch.device, dtype: torch.dtype,
          encoders: dict | None = None) -> tuple[MoPE, Path | None]:
    """-> the model, of pretrained encoders unless others are given, and the folder of its tokenizer."""
    encoders = encoders or {"vision": load_vit(config["vision"], config["image_size"]),
                            "text": load_bert(config["text"], config["pooling"])}
    text = encoders["text"]
    if config["text_length"] > text.max_length:
        raise InputError(f"--text-length {config['text_length']}: {config['text']} reads at most {text.max_length}")
    torch.manual_seed(config["seed"])  # prompts, router, MLP and head
    sizes = ("prior_prompts", "head", "finetune", "static", "experts", "dynamic", "temperature", "mapped")
    model = MoPE(encoders.pop(config["main"]), *encoders.values(), classes, hidden=config["mapper"],
                 **{key: config[key] for key in sizes}).hold_frozen(dtype).to(device)
    if config["compile"]:
        model.compile()
    return model, text.folder


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for one label [B]; unweighted binary cross-entropy for several [B, C]."""
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


def metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Of a whole split: accuracy, or for several labels a sample F1 at a threshold of 0.5; each also by class."""
    result = {"samples": len(labels), "loss": task_loss(logits, labels).item()}
    if labels.is_floating_point():
        chosen, true = logits > 0, labels > 0
        hit, wrong = (chosen & true).sum(0), (chosen ^ true).sum(0)
        by_class = 2 * hit / (2 * hit + wrong).clamp(min=1)  # 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0
        micro = 2 * hit.sum() / (2 * hit + wrong).sum().clamp(min=1)
        result.update(f1_micro=micro.item(), f1_macro=by_class.mean().item())
    else:
        right = logits.argmax(-1) == labels
        result.update(accuracy=right.float().mean().item())
        by_class = torch.stack([right[labels == c].float().mean() for c in range(len(classes))])  # nan: no such sample
    return {**result, "by_class": {name: round(v, 4) for name, v in zip(classes, by_class.tolist()) if v == v}}


@torch.no_grad()
def evaluate(run: Run, split: str) -> tuple[dict, dict]:
    """A whole split -> its metrics, and the rows behind them in the split's order; no sample counts twice."""
    run.model.eval()
    rows, damaged, loader = [], [], run.loaders[split]
    for batch in tqdm(loader, "evaluating", disable=None if RANK == 0 else True, leave=False):
        if CAUGHT and WORLD == 1:
            raise Stopped(CAUGHT[0])
        logits, routing, _, _ = run.forward(batch)
        routing = logits.new_zeros(len(logits), 0, 0) if routing is None else routing
        rows.append((batch["index"], logits.float().cpu(), batch["labels"], routing.cpu()))
        damaged += batch["damaged"]
    run.model.train()

    rows = gather(rows)  # every process had its own samples of the split
    damaged = gather_damaged(damaged, loader.dataset)
    index, logits, labels, routing = (torch.cat(column) for column in zip(*rows))
    order = index.argsort()
    logits, labels, routing = logits[order], labels[order], routing[order]
    result = metrics(logits, labels, loader.dataset.classes)
    if routing.numel():
        result["effective_experts"] = [round(e, 3) for e in effective_experts(routing).tolist()]
        result["busiest_expert"] = [round(share, 3) for share in routing.mean(0).amax(-1).tolist()]
    return result, dict(logits=logits, labels=labels, routing=routing, damaged=damaged)


# ---------------------------------------------------------------------------------------------------------
# Encoders for the toy: two unimodal Transformers, pretrained here since nobody else did

PRETRAIN = dict(dim=64, depth=4, heads=4, mlp_dim=128, patch_size=16, text_depth=2, steps=700, text_steps=300, seed=0)


def pretrain(parent: Path) -> tuple[Path, Path]:
    """-> the file of a tiny ViT and the folder of a tiny BERT, made once for each PRETRAIN.

    The ViT sees pictures only: each patch names what it shows, and [CLS] names the object that a white frame marks.
    The BERT sees questions only: its feature names their words, a third of them masked. (Masked words alone give all
    questions nearly the same mean.) A prompt then has to do what the frame did: point.
    """
    key = hashlib.sha256(json.dumps(PRETRAIN).encode()).hexdigest()[:8]
    folder = parent / f"shapes-encoders-{key}"
    if not folder.exists():
        p = argparse.Namespace(**PRETRAIN)
        torch.manual_seed(p.seed)
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as name:  # renamed when it is whole
            made = Path(name, folder.name)
            (made / "bert").mkdir(parents=True)
            pretrain_vision(p, made / "vit.pth")
            pretrain_text(p, made / "bert")
            if not folder.exists():  # another run may have made them meanwhile
                made.rename(folder)
    return folder / "vit.pth", folder / "bert"


def fit(parameters: list, steps: int, what: str, step_loss) -> None:
    """Minimise step_loss() -> (loss, accuracy); prints the accuracy of the last ten steps."""
    optimizer, accuracies = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True), []
    for step in tqdm(range(steps), f"pretraining {what}", leave=False, disable=None):
        loss, accuracy = step_loss()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        accuracies.append(float(accuracy))
    say(f"pretrained a tiny {what} encoder: {steps} steps, accuracy {sum(accuracies[-10:]) / 10:.3f}")


def pretrain_vision(p: argparse.Namespace, path: Path) -> None:
    images, cells = (torch.from_numpy(a) for a in data.draw_shapes(20_000, np.random.default_rng(100 + p.seed)))
    images = images.permute(0, 3, 1, 2).contiguous()  # [n, 3, S, S]
    q = images.shape[-1] // 2
    vit = ViT(2 * q, p.patch_size, p.dim, p.depth, p.heads, p.mlp_dim)
    name_patch, name_marked = (torch.nn.Linear(p.dim, 3 * 5) for _ in range(2))  # shape, color, place; 0 is none
    border = torch.ones(q, q, dtype=torch.bool)
    border[1:-1, 1:-1] = False

    def step_loss() -> tuple[torch.Tensor, torch.Tensor]:
        i, rows = torch.randint(len(images), (128,)), torch.arange(128)
        marked = (torch.rand(128, 4) * (cells[i, :, 0] > 0)).argmax(1)  # one of the objects
        x = images[i].view(-1, 3, 2, q, 2, q)
        tile = x[rows, :, marked // 2, :, marked % 2]  # [128, 3, q, q]
        x[rows, :, marked // 2, :, marked % 2] = tile.masked_fill(border, 255)
        tokens = vit.tokens(x.view(-1, 3, 2 * q, 2 * q))
        patches, one = name_patch(tokens[:, 1:]).view(-1, 5), name_marked(tokens[:, 0]).view(-1, 3, 5)
        target = cells[i][rows, marked]  # [128, 3]
        loss = F.cross_entropy(patches, cells[i].flatten()) + F.cross_entropy(one.flatten(0, 1), target.flatten())
        return 3 * loss, (one.argmax(-1) == target).all(-1).float().mean()

    fit([*vit.parameters(), *name_patch.parameters(), *name_marked.parameters()], p.steps, "vision", step_loss)
    torch.save(vit.state_dict(), path)


def pretrain_text(p: argparse.Namespace, folder: Path) -> None:
    texts = [sample.text for sample in data.Shapes(folder).read("train")][:5_000]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
    sizes = dict(vocab_size=len(words), hidden_size=p.dim, num_hidden_layers=p.text_depth, num_attention_heads=p.heads,
                 intermediate_size=p.mlp_dim, max_position_embeddings=16, type_vocab_size=1)
    (folder / "config.json").write_text(json.dumps(
        dict(model_type="bert", hidden_act="gelu", layer_norm_eps=1e-12, **sizes)))
    bert = BERT(*sizes.values())
    name_words = torch.nn.Linear(p.dim, len(words))
    number = {word: i for i, word in enumerate(words)}
    ids = [torch.tensor([2, *(number[word] for word in text.split()), 3]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # [n, N]

    def step_loss() -> tuple[torch.Tensor, torch.Tensor]:
        sentence = ids[torch.randint(len(ids), (128,))]
        hidden = (torch.rand(sentence.shape) < 0.3) & (sentence > 4)
        psi = bert(sentence.masked_fill(hidden, 4))
        guess = name_words(F.layer_norm(psi, psi.shape[-1:]))  # [128, words]
        target = torch.zeros_like(guess).scatter_(1, sentence, 1.0)
        return F.binary_cross_entropy_with_logits(guess, target), ((guess > 0) == (target > 0)).float().mean()

    fit([*bert.parameters(), *name_words.parameters()], p.text_steps, "text", step_loss)
    torch.save(bert.state_dict(), folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(words))


# ---------------------------------------------------------------------------------------------------------
# The run


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A pure function of the step: linear warm-up over the first 5 %, then a cosine to zero."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.summarize:
        print(summarize(args.summarize))
        return
    config, state, out = resolve(args)
    device = pick_device(config["device"])
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun sets it
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    dtype, why = pick_precision(config["precision"], device)
    config["precision"] = str(dtype).removeprefix("torch.")
    torch.set_float32_matmul_precision("high")  # TF32 where float32 products remain on a GPU

    if args.predict:
        config["compile"] = False  # not for a single pair
        return predict(Run(config, out, device, dtype, None, {}), state, *args.predict)
    if config["dataset"] == "shapes":
        torch.set_num_threads(1)  # its matrices are tiny: beside any other load, waiting for a second thread is slow
    if args.benchmark and not args.dataset:
        return benchmark(Run(config, out, device, dtype, None, {}))

    # Data first: a missing folder is found before any model is built.
    splits = data.load(config["dataset"], config["data_dir"], config["train_size"], config["seed"])
    classes = splits["train"].classes
    if state and state["classes"] != classes:
        raise InputError(f"{config['data_dir']}: other classes than those the checkpoint was trained on")
    for name, split in splits.items():
        say(f"{name}: {len(split):,} samples", *(f"\n  {note}" for note in split.notes))
    say(f"device: {device}, {config['precision']} ({why}), {WORLD} process{'es' if WORLD > 1 else ''}")

    for turn in (True, False):  # the first process of each machine downloads, or pretrains, for the others
        if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            if config["vision"] is None or config["text"] is None:  # shapes has encoders of its own
                vision, text = pretrain(out.parent)
                config.update(vision=config["vision"] or str(vision), text=config["text"] or str(text))
            model, folder = build(config, len(classes), device, dtype)
        if WORLD > 1:
            dist.barrier()
    say(model.report())
    tokenizer = data.load_tokenizer(folder, config["text_length"], 16 if config["compile"] else None)
    run = Run(config, out, device, dtype, model, {})
    for name, split in splits.items():
        if args.eval and name != "test":
            continue
        batches = data.Batches(split, config["batch_size"], config["seed"], RANK, WORLD,
                               config["accumulate"] if name == "train" else 1)
        run.loaders[name] = data.loader(split, tokenizer, config["image_size"], batches, config["workers"], device.type)

    if args.benchmark:
        benchmark(run)
    elif args.eval:
        model.load_trained_state(state["trained"])
        say(f"{args.checkpoint}, test:", json.dumps(evaluate(run, "test")[0]))
    else:
        out.mkdir(parents=True, exist_ok=True)
        train(run, state)


def train(run: Run, state: dict | None) -> None:
    """The training loop, from the start or from a checkpoint, and the final evaluation."""
    config, out, device, model, loader = run.config, run.out, run.device, run.model, run.loaders["train"]
    batches, epochs, accumulate = loader.batch_sampler, config["epochs"], config["accumulate"]
    steps, samples = batches.steps, len(loader.dataset)
    metric = "f1_micro" if loader.dataset.multilabel else "accuracy"
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config["lr"], weight_decay=config["weight_decay"],
                                  fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    network = DistributedDataParallel(model) if WORLD > 1 else model

    # All that training changes beside weights, optimizer and scaler. Random numbers need no state: data and
    # router noise are functions of the seed, the epoch or step, and the sample or process.
    at = dict(epoch=0, step=0, losses=[], damaged=[], damaged_validation=[], seconds=0.0, log=[])
    if state:
        if state.get("samples", samples) != samples:
            raise InputError(f"{config['data_dir']}: {samples:,} training samples, but {out} began with "
                             f"{state['samples']:,}, whose order it follows; give the --data-dir with those")
        model.load_trained_state(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run began in another precision
            scaler.load_state_dict(state["scaler"])
        at = state["at"]
        say(f"resumed {out} at epoch {at['epoch'] + 1}, step {at['step']} of {steps}")

    def save(name: str) -> None:
        if RANK == 0:
            write(out / name, dict(
                config=config, versions=versions(), at=at, classes=loader.dataset.classes,
                samples=samples, multilabel=loader.dataset.multilabel, trained=model.trained_state(),
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict()))

    if not state:
        if RANK == 0:
            for name in ("results.json", "best.pt", "log.jsonl", "predictions.csv", "routing.png"):
                (out / name).unlink(missing_ok=True)  # of the run that --overwrite replaces
        save("last.pt")
    if RANK == 0:
        write(out / "config.json", json.dumps({"config": config, "versions": versions()}, indent=1))

    pending = []  # losses still on the device
    every = 1 if device.type == "cpu" and WORLD == 1 else 10  # steps between two looks at them

    def look() -> int:
        """Bring pending losses to the host (nothing else in a step waits for the device) -> a signal to stop for."""
        values = torch.stack([*pending, pending[0].new_tensor(CAUGHT[0] if CAUGHT else 0)])
        if WORLD > 1:  # all processes see the same losses and the same signal, and leave together
            values[:-1] /= WORLD
            dist.all_reduce(values[:-1])
            dist.all_reduce(values[-1:], dist.ReduceOp.MAX)
        *losses, signalled = values.tolist()
        pending.clear()
        at["losses"] += losses
        if not math.isfinite(sum(losses)):
            step = next(i for i, loss in enumerate(at["losses"], 1) if not math.isfinite(loss))
            raise InputError(f"the loss or its gradient is not finite at epoch {at['epoch'] + 1}, step {step}; "
                             f"{out}/last.pt is from before. Start anew with a lower --lr"
                             + (", or resume with --precision float32" if run.dtype != torch.float32 else ""))
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise InputError("float16 gradients overflow in every step; resume with --precision float32 or bfloat16")
        return int(signalled)

    before = {number: signal.signal(number, catch) for number in SIGNALS}
    try:
        while at["epoch"] < epochs:
            began = time.perf_counter()
            batches.epoch, batches.start = at["epoch"], at["step"]
            micro_batches = iter(loader)
            for _ in tqdm(range(at["step"], steps), f"epoch {at['epoch'] + 1}/{epochs}", initial=at["step"],
                          total=steps, leave=False, disable=None if RANK == 0 else True):
                step = at["epoch"] * steps + at["step"]
                torch.manual_seed(int(np.random.SeedSequence([config["seed"], step, RANK]).generate_state(1)[0]))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, epochs * steps, config["lr"])

                loss = torch.zeros((), device=device)
                for micro in range(accumulate):
                    batch = next(micro_batches)
                    at["damaged"] += batch["damaged"]
                    if batch["damaged"] and WORLD == 1:  # several processes compare theirs after the epoch
                        at["damaged"] = gather_damaged(at["damaged"], loader.dataset)
                    synchronise = WORLD == 1 or micro == accumulate - 1
                    with nullcontext() if synchronise else network.no_sync():
                        part = run.loss(batch, network) / accumulate
                        scaler.scale(part).backward()
                    loss += part.detach()

                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                if not scaler.is_enabled():  # with a scaler, an infinite gradient is ordinary: it skips the step
                    loss = loss.masked_fill(~torch.isfinite(norm), math.nan)  # `look` stops; nothing is saved before
                pending.append(loss)

                last = at["step"] == steps - 1
                stop = look() if len(pending) == every or last or (WORLD == 1 and CAUGHT) else 0
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                at["step"] += 1
                if stop:
                    at["seconds"] += time.perf_counter() - began
                    raise Stopped(stop)

            at["seconds"] += time.perf_counter() - began
            at["damaged"] = gather_damaged(at["damaged"], loader.dataset)
            validation, rows = evaluate(run, "val")
            at["damaged_validation"] = rows["damaged"]
            train_loss = sum(at["losses"]) / steps
            at.update(epoch=at["epoch"] + 1, step=0, losses=[])
            at["log"].append({"epoch": at["epoch"], "train_loss": train_loss, "validation": validation,
                              "seconds": round(at["seconds"], 1)})
            experts = validation.get("effective_experts")
            say(f"epoch {at['epoch']}/{epochs}  train loss {train_loss:.4f}  validation {metric} "
                f"{validation[metric]:.4f}  loss {validation['loss']:.4f}  "
                + (f"experts used {min(experts):.1f}-{max(experts):.1f} of {config['experts']}  " if experts else "")
                + f"{at['epoch'] * steps * config['batch_size'] / at['seconds']:.1f} images/s")
            if validation[metric] > max((line["validation"][metric] for line in at["log"][:-1]), default=-1):
                save("best.pt")
            if RANK == 0:
                write(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in at["log"]))
            save("last.pt")

        finish(run, at)
    except Stopped:
        if at["epoch"] < epochs:  # later, last.pt is complete and the model holds the best weights
            save("last.pt")
        say(f"stopped; continue with: python train.py --resume {out}")
        raise
    finally:
        CAUGHT.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(run: Run, at: dict) -> None:
    """Evaluate the best weights on test, once; write results.json, predictions.csv and routing.png."""
    [best] = gather([load_checkpoint(run.out / "best.pt")] if RANK == 0 else [])  # from the process that wrote it
    run.model.load_trained_state(best["trained"])
    epoch = best["at"]["log"][-1]
    images = run.loaders["train"].batch_sampler.steps * run.config["batch_size"] * run.config["epochs"]
    test, rows = evaluate(run, "test")
    total, trained = count(run.model)
    results = dict(
        dataset=run.config["dataset"], seed=run.config["seed"], epochs=run.config["epochs"],
        best_epoch=epoch["epoch"], test=test, validation=epoch["validation"],
        trainable_parameters=trained, total_parameters=total, seconds=round(at["seconds"], 1),
        images_per_second=round(images / at["seconds"], 1), peak_memory_gib=peak_memory(run.device),
        damaged_images=len({*at["damaged"], *at["damaged_validation"], *rows["damaged"]}), device=str(run.device),
        precision=run.config["precision"])
    if RANK > 0:
        return
    pairs = run.loaders["test"].dataset
    write_predictions(run.out / "predictions.csv", pairs, rows)
    written = ["results.json", "predictions.csv"]
    if rows["routing"].numel():
        write(run.out / "routing.png", data.draw_routing(pairs, rows["routing"]))
        written.append("routing.png")
    write(run.out / "results.json", json.dumps(results, indent=1))  # last: with it, the run is finished
    print_mistakes(test["by_class"], pairs.classes, rows)
    scores = "  ".join(f"{name} {test[name]:.4f}" for name in SCORES if name in test)
    if results["damaged_images"]:
        say(f"{results['damaged_images']} images could not be read: grey ones stood for them")
    say(f"test, with the weights of epoch {results['best_epoch']}: {scores} on {test['samples']:,} samples; "
        f"{', '.join(written)} are in {run.out}")


SCORES = ("accuracy", "f1_micro", "f1_macro")


def peak_memory(device: torch.device) -> float | None:
    """GiB: on a GPU what tensors took at most; else what this process took, where Linux tells."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return found and round(int(found[1]) / 2 ** 20, 2)


# ---------------------------------------------------------------------------------------------------------
# To look at


def write_predictions(path: Path, pairs: data.Pairs, rows: dict) -> None:
    """A line a sample: id, text, label, prediction, probability; several labels are joined by |."""
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(["id", "text", "label", "prediction", "probability"])
    probabilities = rows["logits"].sigmoid() if pairs.multilabel else rows["logits"].softmax(-1)
    for i, (p, label) in enumerate(zip(probabilities, rows["labels"])):
        sample = pairs.sample(i)
        chosen = (p > 0.5).nonzero().flatten().tolist() if pairs.multilabel else [int(p.argmax())]
        true = label.nonzero().flatten().tolist() if pairs.multilabel else [int(label)]
        table.writerow([sample.id, sample.text, *("|".join(pairs.classes[c] for c in cs) for cs in (true, chosen)),
                        "|".join(f"{p[c]:.4f}" for c in chosen)])
    write(path, file.getvalue())


def print_mistakes(by_class: dict[str, float], classes: list[str], rows: dict, count: int = 5) -> None:
    """The classes that score worst, and which class is taken for which other most often."""
    worst = sorted(by_class.items(), key=lambda item: item[1])[:count]
    say("worst classes:", ", ".join(f"{name} {score:.2f}" for name, score in worst))
    if rows["labels"].is_floating_point():
        return
    pairs = zip(rows["labels"].tolist(), rows["logits"].argmax(-1).tolist())
    confused = Counter((true, guess) for true, guess in pairs if true != guess).most_common(count)
    say("most confused:", ", ".join(f"{classes[a]} taken for {classes[b]} {n}×" for (a, b), n in confused) or "none")


@torch.no_grad()
def predict(run: Run, state: dict, image: str, text: str) -> None:
    """Print the five most probable classes of one pair, and the experts that its routing used."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!a} is not UTF-8; give the text in that encoding") from None
    try:
        drawn = run.config["dataset"] == "shapes"  # its pictures are never cropped
        pixels = data.decode(np.array(Image.open(image).convert("RGB")) if drawn else image, run.config["image_size"])
    except Exception as error:  # Pillow's are of many types
        raise InputError(f"{image}: not an image that can be read ({error})") from None
    classes = state["classes"]
    run.model, folder = build(run.config, len(classes), run.device, run.dtype)
    run.model.load_trained_state(state["trained"]).eval()
    ids = data.load_tokenizer(folder, run.config["text_length"]).encode(text).ids
    logits, routing, _, _ = run.forward(dict(images=pixels[None], texts=torch.tensor([ids]), labels=torch.zeros(1)))
    probability = (logits.float().sigmoid() if state["multilabel"] else logits.float().softmax(-1))[0]
    for p, c in zip(*probability.topk(min(5, len(classes)))):
        say(f"{p:.3f}  {classes[c]}")
    if routing is not None:
        weight, expert = routing[0].max(-1)
        say("busiest expert of each layer:", ", ".join(f"{e + 1} ({w:.2f})" for e, w in zip(expert.tolist(), weight)))


# ---------------------------------------------------------------------------------------------------------
# To compare


def summarize(folders: list[Path]) -> str:
    """Finished runs -> a Markdown table: a row for runs that differ in the seed only, with mean ± standard deviation.

    Its first columns are the settings in which the rows differ, but for what a method sets by itself.
    """
    rows = defaultdict(list)
    for folder in folders:
        config, results = (read_run(folder, name) for name in ("config.json", "results.json"))
        config = {k: v for k, v in config["config"].items() if k not in (*INCIDENTAL, "seed")}
        rows[json.dumps(config)].append(results)

    configs = [json.loads(key) for key in rows]
    own = [defaults(c["dataset"], c["method"]) for c in configs]
    keys = [k for k in configs[0] if len({str(c[k]) for c in configs}) > 1
            and (k in ("dataset", "method") or any(c[k] != o[k] for c, o in zip(configs, own)))]
    scores = [name for name in SCORES if any(name in r["test"] for results in rows.values() for r in results)]
    table = [[*keys, "trainable", *(f"test {name}" for name in scores), "experts used", "busiest", "seeds"]]
    table.append(["---"] * len(table[0]))

    def spread(values: list[float]) -> str:
        mean = statistics.mean(values) if values else None
        return "" if not values else f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")

    for config, results in zip(configs, rows.values()):
        tests = [r["test"] for r in results]
        share = results[0]["trainable_parameters"] / results[0]["total_parameters"]
        routed = [[statistics.mean(t[name]) for t in tests if name in t]
                  for name in ("effective_experts", "busiest_expert")]
        table.append([*(str(config[k]) for k in keys), f"{share:.2%}",
                      *(spread([t[name] for t in tests if name in t]) for name in scores), *map(spread, routed),
                      ", ".join(str(r["seed"]) for r in results)])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


PRODUCT = 4096  # side of the matrices whose product stands for the hardware's limit


def benchmark(run: Run, repeats: int = 10) -> None:
    """Print what loader, training step and evaluation take, and their share of a large matrix product's rate."""
    config, model = run.config, run.model
    if model is None:  # no data set named: random weights and inputs, texts as long as a title
        encoders = {"vision": ViT(config["image_size"]), "text": BERT(pooling=config["pooling"])}
        model = run.model = build(config, 101, run.device, run.dtype, encoders)[0]
        n, side = config["batch_size"], config["image_size"]
        batch = dict(images=torch.randint(256, (n, 3, side, side), dtype=torch.uint8),
                     texts=torch.randint(1, 30_000, (n, 24)), labels=torch.randint(101, (n,)))
    else:
        batches = iter(run.loaders["train"])
        batch, began = next(batches), time.perf_counter()
        count = sum(len(b["index"]) for b in itertools.islice(batches, 2 * repeats))
        say(f"loader alone: {count / (time.perf_counter() - began):.1f} images/s with --workers {config['workers']}")

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=run.device.type in ("cpu", "cuda"))
    synchronize = getattr(torch, run.device.type).synchronize
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=run.device).to(run.dtype)

    def step() -> None:
        run.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = {"training step": step, "evaluation": lambda: run.forward(batch), "large product": lambda: a @ b}
    seconds = {name: [] for name in work}
    for i in range(repeats + 2):  # the first two warm up
        for name, do in work.items():
            model.train(name == "training step")
            with torch.set_grad_enabled(name == "training step"):
                synchronize()
                began = time.perf_counter()
                do()
                synchronize()
                seconds[name] += [time.perf_counter() - began] if i > 1 else []

    # What the step multiplies, as PyTorch counts it (a CPU's fused attention it would miss), on two samples for all.
    part = {name: values[:2] for name, values in batch.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = run.loss(part, model.forward)  # not compiled
        flops = {"evaluation": counter.get_total_flops()}
        loss.backward()
        flops["training step"] = counter.get_total_flops()
    flops = {name: value * len(batch["labels"]) // len(part["labels"]) for name, value in flops.items()}
    flops["large product"] = 2 * PRODUCT ** 3
    rate = {name: flops[name] / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        t = statistics.median(times)
        say(f"{name:<14} {1000 * t:9.1f} ms  {flops[name] / 1e9:9.1f} GFLOP  {rate[name] / 1e9:9.1f} GFLOP/s"
            + (f"  {len(batch['labels']) / t:8.1f} images/s  {rate[name] / rate['large product']:.0%} of the product"
               if name != "large product" else f"  ({PRODUCT} squared, {config['precision']})"))
    say(f"batch {len(batch['labels'])}, {batch['texts'].shape[1]} tokens of text, {run.device}, peak memory "
        f"{peak_memory(run.device)} GiB")


# ---------------------------------------------------------------------------------------------------------


def cli() -> None:
    """main(), with everything that is not a bug of ours told in a sentence."""
    code, message = 1, ""
    try:
        main()
        code = 0
    except InputError as error:
        code, message = 2, str(error)
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # killed, as a rule for want of memory shared between processes
            message = f"{error}; give a lower --workers, 0 for none; an interrupted run goes on with --resume"
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            message = ("out of memory; give a lower --batch-size, --text-length or --image-size, or a higher "
                       "--accumulate, which makes a training step of smaller parts, and with which a run can go on: "
                       "--resume")
        else:
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        message = (f"{error.filename or 'a file of the run'}: {error.strerror}; the files of a run are whole, as they "
                   "were before; mend that, then repeat the command, or continue the run with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        print(f"error: {message}", file=sys.stderr)
    if WORLD > 1:  # all is written; while Python shuts down, a thread that gloo left behind can abort the process
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    cli()
