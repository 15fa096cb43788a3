"""Train, evaluate and compare MoPE. The method is in mope.py, the data sets are in data.py.

    python train.py                                           a toy that needs neither data nor GPU
    python train.py --dataset food101 --device cuda
    torchrun --nproc_per_node=4 train.py --dataset food101 --batch-size 128
    python train.py --resume runs/food101                     go on after Ctrl-C, a crash or a kill
    python train.py --dataset food101 --help                  all flags, with the defaults of that data set
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from mope import BERT, InputError, MoPE, ViT, count, experts_per_sample, experts_used, load_bert, load_vit, regular_file

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes; torchrun sets both
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # which of them this is
AS_MANY_AS_MOPE = -1  # as many static prompts as MoPE has prompts of all kinds

# A flag overrides each of these. text_length counts word pieces with [CLS] and [SEP]; the toy's own encoders are None,
# and its temperature keeps the router from learning too fast at its high rate.
DEFAULTS = {
    "shapes":     dict(epochs=4, batch_size=64, lr=1e-2, text_length=16, vision=None, text=None, image_size=32,
                       static=4, experts=6, dynamic=4, mapper=64, prior_prompts=0, temperature=0.4, workers=0),
    "food101":    dict(epochs=10, batch_size=32, lr=1.5e-3, text_length=128),
    "mmimdb":     dict(epochs=10, batch_size=32, lr=1.5e-3, text_length=256),
    "snli_ve":    dict(epochs=6, batch_size=64, lr=1.5e-3, text_length=64),
    "grocery":    dict(epochs=4, batch_size=32, lr=1.5e-3, text_length=64),
    "grocery_ve": dict(epochs=3, batch_size=32, lr=1.5e-3, text_length=96),
    "jsonl":      dict(epochs=10, batch_size=32, lr=1.5e-3, text_length=128),
}

# --method chooses one of these: they differ in sizes, in what is trained and in what the head sees.
METHODS = {
    "mope":        dict(),
    "mapped":      dict(experts=0),  # static and mapped prompts
    "vanilla":     dict(experts=0, mapped=False, static=AS_MANY_AS_MOPE),  # static prompts alone
    "late-concat": dict(experts=0, mapped=False, static=0, prior_prompts=0),  # a head on two frozen features
    "finetune":    dict(experts=0, mapped=False, static=0, prior_prompts=0, finetune=True, lr=1e-4),
    "image-only":  dict(experts=0, mapped=False, static=AS_MANY_AS_MOPE, prior_prompts=0, head="main", main="vision"),
    "text-only":   dict(experts=0, mapped=False, static=AS_MANY_AS_MOPE, prior_prompts=0, head="main", main="text"),
}


# Training ----------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Everything that training changes beside weights, optimizer and scaler. No state of random generators is kept:
    the order of the data and the router's noise follow from the seed, the epoch or step, and the sample or process."""
    epoch: int = 0
    step: int = 0  # of this epoch
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    seconds: float = 0.0  # of training in all epochs, validation aside
    damaged: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "val": []})  # unreadable images
    log: list[dict] = field(default_factory=list)  # a line an epoch


@dataclass
class Run:
    """One run: its settings, model and data, and how far it is."""
    config: dict
    out: Path
    device: torch.device
    dtype: torch.dtype  # of matrix products
    model: MoPE | None = None
    splits: dict[str, data.Pairs] = field(default_factory=dict)
    tokenizer: data.Tokenizer | None = None
    loaders: dict[str, data.DataLoader] = field(default_factory=dict)
    network: torch.nn.Module | None = None  # the model in DistributedDataParallel, if there are several processes
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    progress: Progress = field(default_factory=Progress)
    stop_signals: list[int] = field(default_factory=list)  # signals that ask for a stop

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> data.DataLoader:
        """Return this process's batches of an epoch, from step `start` on. Worker processes are started once."""
        c, pairs = self.config, self.splits[split]
        if split not in self.loaders:
            self.loaders[split] = data.loader(pairs, self.tokenizer, c["image_size"], c["workers"], self.device.type)
        self.loaders[split].batch_sampler[:] = data.plan(  # a list that the loader reads at the start of each epoch
            pairs, c["batch_size"], c["seed"], epoch, start, RANK, WORLD, c["accumulate"])
        return self.loaders[split]

    def forward(self, batch: dict, network: torch.nn.Module | None = None) -> tuple:
        """Return logits, routing, importance loss and the labels on the device, for a batch of a loader."""
        keys, pinned = ("images", "texts", "labels"), self.device.type == "cuda"  # an Apple GPU might copy freed memory
        images, texts, labels = (batch[key].to(self.device, non_blocking=pinned) for key in keys)
        if self.config["compile"]:  # one graph for all lengths of texts, and for the last batch of an evaluation
            torch._dynamo.maybe_mark_dynamic(texts, [1] if self.model.training else [0, 1])
            if not self.model.training:
                torch._dynamo.maybe_mark_dynamic(images, 0)
        inputs = (images, texts) if self.config["main"] == "vision" else (texts, images)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return *(network or self.model)(*inputs), labels

    def loss(self, batch: dict, network: torch.nn.Module | None = None) -> torch.Tensor:
        """Return the task's loss plus the weighted importance loss."""
        logits, _, importance_loss, labels = self.forward(batch, network)
        return task_loss(logits, labels) + self.config["importance"] * importance_loss


def train(run: Run, state: dict | None) -> None:
    """Train from the start, or from a checkpoint, and evaluate on the test split."""
    run.optimizer = torch.optim.AdamW((p for p in run.model.parameters() if p.requires_grad), lr=run.config["lr"],
                                      weight_decay=run.config["weight_decay"], fused=run.device.type in ("cpu", "cuda"))
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)  # otherwise it does nothing
    if WORLD > 1:  # signals, losses and metrics go over the CPU (`start_processes`), gradients from GPU to GPU
        group = dist.new_group(backend="nccl", timeout=PATIENCE) if run.device.type == "cuda" else None
        run.network = DistributedDataParallel(run.model, process_group=group, broadcast_buffers=False,
                                              gradient_as_bucket_view=True)
    run.batches("train")  # refuses a batch size that does not fit before anything is written
    with lock(run.out), orderly_stop(run):
        if state:
            restore(run, state)
        elif RANK == 0:  # which alone writes; again, since another run may have finished here in the meantime
            check_new(run.out)
            save(run, "last.pt")
        loop(run)
        finish(run)


def loop(run: Run) -> None:
    """Train all epochs that are left. A step takes --batch-size samples, over all processes and micro-batches."""
    config, model, at, pairs = run.config, run.model, run.progress, run.splits["train"]
    optimizer, scaler, network, accumulate = run.optimizer, run.scaler, run.network, config["accumulate"]
    epochs, steps = config["epochs"], pairs.steps(config["batch_size"])
    metric = "f1_micro" if pairs.multilabel else "accuracy"

    while at.epoch < epochs:
        model.train()
        micro_batches = iter(run.batches("train", at.epoch, at.step))  # a resumed epoch goes on where it stopped
        began = time.perf_counter()
        for _ in progress_bar(range(at.step, steps), f"epoch {at.epoch + 1}/{epochs}", initial=at.step, total=steps):
            step = at.epoch * steps + at.step  # of all epochs
            torch.manual_seed(int(np.random.SeedSequence([config["seed"], step, RANK]).generate_state(1)[0]))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, epochs * steps, config["lr"])

            # The gradient, from one micro-batch after the other.
            loss = torch.zeros((), device=run.device)
            for micro in range(accumulate):
                batch = next(micro_batches)
                if batch["damaged"]:
                    damaged = at.damaged["train"] + batch["damaged"]
                    at.damaged["train"] = data.check_damaged(damaged, pairs.samples, "train")
                if WORLD > 1:  # average gradients in the last backward pass only, as DDP's no_sync() does
                    network.require_backward_grad_sync = micro == accumulate - 1
                part = run.loss(batch, network) / accumulate
                scaler.scale(part).backward()
                loss += part.detach()

            # The step. If the loss or the gradient is not finite, check_step raises before the weights change.
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            loss, stop = check_step(run, loss, norm)
            at.losses.append(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            at.step += 1
            at.seconds += time.perf_counter() - began
            began = time.perf_counter()
            if stop:
                raise Stopped(stop)

        # At the end of an epoch: save (torchrun may not wait for more), validate, log a line, keep the best weights.
        save(run, "last.pt")
        at.damaged["train"] = data.check_damaged(gather(at.damaged["train"]), pairs.samples, "train")
        validation, rows = evaluate(run, "val")
        at.damaged["val"] = rows["damaged"]
        best = max((line["validation"][metric] for line in at.log), default=-1)
        at.log.append({"epoch": at.epoch + 1, "train_loss": sum(at.losses) / steps, "validation": validation,
                       "seconds": round(at.seconds, 1)})
        at.epoch, at.step, at.losses = at.epoch + 1, 0, []
        routing = "".join(f"  {what} {min(validation[key]):.1f}-{max(validation[key]):.1f}" for key, what in (
            ("experts_used", "experts used"), ("experts_per_sample", "by each sample")) if key in validation)
        speed = at.epoch * steps * config["batch_size"] / at.seconds
        say(f"epoch {at.epoch}/{epochs}  train loss {at.log[-1]['train_loss']:.4f}  validation {metric} "
            f"{validation[metric]:.4f}  loss {validation['loss']:.4f}{routing}  {speed:.1f} images/s")
        if validation[metric] > best:
            save(run, "best.pt")
        save(run, "last.pt")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, from the step alone: a linear warm-up over the first 5 %, then a cosine to zero."""
    warmup = max(1, round(0.05 * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * (step + 1) / warmup if step < warmup else peak * cosine


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy for one label per sample [B], unweighted binary cross-entropy for several [B, C]."""
    return (F.binary_cross_entropy_with_logits if labels.is_floating_point() else F.cross_entropy)(logits, labels)


def check_step(run: Run, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, int]:
    """Return a step's loss and the number of the signal that asks to stop (or 0), the same in all processes. It is the
    one place in a step that waits for the device. Raises InputError if loss or norm is not finite. With a scaler
    (float16), such a norm is no error: it skips the step and lowers the scale; only a scale below 1 is one."""
    if not run.scaler.is_enabled():
        loss = loss.masked_fill(~torch.isfinite(norm), math.nan)  # so that all processes see it
    loss, stop = loss.cpu(), torch.tensor(run.stop_signals[0] if run.stop_signals else 0)
    if WORLD > 1:
        dist.all_reduce(loss.div_(WORLD))
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    if not math.isfinite(loss):
        raise InputError(f"the loss or its gradient is not finite at epoch {run.progress.epoch + 1}, step "
                         f"{run.progress.step + 1}; {run.out}/last.pt was saved before it. Start anew with a lower --lr"
                         + (", or resume with --precision float32" if run.dtype != torch.float32 else ""))
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise InputError("float16 gradients overflow in every step; resume with --precision float32 or bfloat16")
    return loss.item(), int(stop)


# Evaluation --------------------------------------------------------------------------------------------

SCORES = ("accuracy", "f1_micro", "f1_macro")


@torch.no_grad()
def evaluate(run: Run, split: str) -> tuple[dict, dict]:
    """Evaluate a whole split: return its metrics, and the rows behind them in the split's order. No sample counts
    twice, however many processes share the split. Raises InputError for logits that are not finite."""
    run.model.eval()
    rows, damaged, pairs = [], [], run.splits[split]
    for batch in progress_bar(run.batches(split), f"evaluating {split}"):
        if run.stop_signals and WORLD == 1:
            raise Stopped(run.stop_signals[0])
        logits, routing, _, labels = run.forward(batch)
        routing = logits.new_zeros(len(logits), 0, 0) if routing is None else routing
        rows.append((batch["index"].clone(), logits, labels.clone(), routing))  # what a worker sent keeps a file open
        damaged += batch["damaged"]

    # They stay on the device up to here; of several processes, each had its own samples.
    mine = [tuple(torch.cat(column).cpu() for column in zip(*rows))] if rows else []
    index, logits, labels, routing = (torch.cat(column) for column in zip(*gather(mine)))
    order = index.argsort()
    logits, labels, routing = logits[order], labels[order], routing[order]
    if not logits.isfinite().all():
        raise InputError(f"{(~logits.isfinite()).any(-1).sum()} of {len(logits)} samples of {split} get logits that "
                         "are not finite: start anew with a lower --lr, or try --precision float32")
    result = metrics(logits, labels, pairs.classes)
    if routing.numel():
        for name, values in (("experts_used", experts_used(routing)), ("busiest_expert", routing.mean(0).amax(-1)),
                             ("experts_per_sample", experts_per_sample(routing))):
            result[name] = [round(value, 3) for value in values.tolist()]  # one a layer
    damaged = data.check_damaged(gather(damaged), pairs.samples, split)
    return result, dict(logits=logits, labels=labels, routing=routing, damaged=damaged)


def metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Score a whole split: accuracy, or for several labels a sample F1 at a threshold of 0.5; each also by class.
    Samples whose label nobody knows (-1) do not count."""
    known = (labels >= 0).view(len(labels), -1).all(-1)
    logits, labels = logits[known], labels[known]
    if not len(labels):
        return {"samples": 0}
    if labels.is_floating_point():
        chosen, true = logits > 0, labels > 0
        hit, wrong = (chosen & true).sum(0), (chosen ^ true).sum(0)
        by_class = 2 * hit / (2 * hit + wrong).clamp(min=1)  # 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0
        micro = 2 * hit.sum() / (2 * hit + wrong).sum().clamp(min=1)
        scores = dict(f1_micro=micro.item(), f1_macro=by_class.mean().item())
    else:
        right = logits.argmax(-1) == labels
        scores = dict(accuracy=right.float().mean().item())
        by_class = torch.stack([right[labels == c].float().mean() for c in range(len(classes))])  # nan: no such sample
    return {"samples": len(labels), "loss": task_loss(logits, labels).item(), **scores,
            "by_class": {name: round(v, 4) for name, v in zip(classes, by_class.tolist()) if v == v}}


def interval(pairs: data.Pairs, rows: dict) -> list[float]:
    """Return a 95 % bootstrap interval of the accuracy over images, since pairs that share one are not independent."""
    known, right = (rows["labels"] >= 0).numpy(), (rows["logits"].argmax(-1) == rows["labels"]).numpy()
    images = np.array([str(s.image) if isinstance(s.image, Path) else s.id for s in pairs.samples])
    _, image = np.unique(images[known], return_inverse=True)
    hits, counts, rng = np.bincount(image, right[known]), np.bincount(image), np.random.default_rng(0)
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(1000))
    return np.quantile([hits[draw].sum() / counts[draw].sum() for draw in draws], [0.025, 0.975]).round(4).tolist()


def finish(run: Run) -> None:
    """Evaluate the best weights on test, once; write results.json, predictions.csv and routing.png; tell mistakes."""
    config, at, pairs = run.config, run.progress, run.splits["test"]
    best = from_first(lambda: load_checkpoint(run.out / "best.pt"))  # the others may have no access to it
    if differ := [key for key in config.keys() - MAY_CHANGE if best["config"].get(key) != config[key]]:
        raise InputError(f"{run.out}/best.pt is of another run, with another {', '.join(sorted(differ))}")
    run.model.load_trained_state(best["trained"])
    test, rows = evaluate(run, "test")
    if "accuracy" in test:
        test["accuracy_95"] = interval(pairs, rows)
    chosen, (total, trained) = best["progress"]["log"][-1], count(run.model)
    images = run.splits["train"].steps(config["batch_size"]) * config["batch_size"] * config["epochs"]
    damaged = {*at.damaged["train"], *at.damaged["val"], *rows["damaged"]}
    results = dict(
        dataset=config["dataset"], seed=config["seed"], epochs=config["epochs"], best_epoch=chosen["epoch"], test=test,
        validation=chosen["validation"], trainable_parameters=trained, total_parameters=total,
        seconds=round(at.seconds, 1), images_per_second=round(images / at.seconds, 1), damaged_images=len(damaged),
        peak_memory_gib=peak_memory(run.device), device=str(run.device), precision=config["precision"])

    write(run.out / "predictions.csv", predictions(pairs, rows))
    if routed := rows["routing"].numel() > 0:
        picture = io.BytesIO()
        data.plot_routing(pairs, rows["routing"]).save(picture, "PNG")
        write(run.out / "routing.png", picture.getvalue())
    write(run.out / "results.json", json.dumps(results, indent=1))  # last: with it, the run is finished
    worst = sorted(test.get("by_class", {}).items(), key=lambda item: item[1])[:5]
    say("worst classes:", ", ".join(f"{name} {score:.2f}" for name, score in worst) or "none has a score")
    if not pairs.multilabel:
        names, guesses = pairs.classes, zip(rows["labels"].tolist(), rows["logits"].argmax(-1).tolist())
        confused = Counter(f"{names[a]} taken for {names[b]}" for a, b in guesses if a not in (b, -1))
        say("most confused:", ", ".join(f"{pair} {n}×" for pair, n in confused.most_common(5)) or "none")
    if damaged:
        say(f"{len(damaged)} images could not be read: grey ones stood for them")
    scores = "  ".join(f"{name} {test[name]:.4f}" for name in SCORES if name in test) or "no score"
    say(f"test, with the weights of epoch {results['best_epoch']}: {scores} on {test['samples']:,} labelled samples; "
        f"results.json, predictions.csv{', routing.png' if routed else ''} are in {run.out}")


def predictions(pairs: data.Pairs, rows: dict) -> str:
    """Return predictions.csv: a line a sample. Where a sample can have several labels, they are a JSON list."""
    file, classes = io.StringIO(), np.array(pairs.classes, object)
    table = csv.writer(file)
    table.writerow(["id", "image", "text", "label", "prediction", "probability"])
    probabilities = rows["logits"].sigmoid() if pairs.multilabel else rows["logits"].softmax(-1)
    for i, (p, label) in enumerate(zip(probabilities.double().numpy(), rows["labels"].numpy())):
        name, image, text, true = pairs.sample(i)
        chosen, probability = classes[p.argmax()], p.max().round(4)
        if pairs.multilabel:
            columns = classes[label > 0], classes[p > 0.5], p[p > 0.5].round(4)
            known, chosen, probability = (json.dumps(column.tolist(), ensure_ascii=False) for column in columns)
            true = true and known
        table.writerow([name, image if isinstance(image, Path) else "", text, true, chosen, probability])
    return file.getvalue()


# Predict, summarize, benchmark -------------------------------------------------------------------------

PRODUCT = 4096  # side of the matrices whose product stands for the hardware's limit


def predict(run: Run, inputs: list[str]) -> None:
    """Score the rows of a file into predictions.csv beside it, or print what the model says of one pair."""
    pairs, target = run.splits["test"], Path(inputs[0]).with_name("predictions.csv")
    if len(inputs) == 1 and target.exists():
        raise InputError(f"{target} exists and is not written over; move it away")
    _, rows = evaluate(run, "test")
    if len(inputs) == 1:
        write(target, predictions(pairs, rows))
        return say(f"{len(pairs):,} rows are scored in {target}")
    [probability] = rows["logits"].sigmoid() if pairs.multilabel else rows["logits"].softmax(-1)
    for p, c in zip(*probability.topk(min(5, len(pairs.classes)))):
        say(f"{p:.3f}  {pairs.classes[c]}")
    if rows["routing"].numel():
        say("busiest expert by layer:", ", ".join(f"{e + 1} ({w:.2f})" for w, e in zip(*rows["routing"][0].max(-1))))


def summarize(folders: list[Path]) -> str:
    """Return a Markdown table of finished runs: a row for those that differ in the seed only, mean ± deviation. A row
    begins with the method, and with the flags that were given and are not the same in all rows."""
    rows, given = defaultdict(list), {}
    for path in folders:
        try:
            config, results = (json.loads(regular_file(path / f"{n}.json").read_bytes()) for n in ("config", "results"))
            config = {k: v for k, v in config["config"].items() if k not in (*INCIDENTAL, "seed")}
            defaults = vars(parse(["--dataset", config["dataset"], "--method", config["method"]])) | {"dataset": None}
            share, key = results["trainable_parameters"] / results["total_parameters"], json.dumps(config)
            rows[key].append({**results["test"], "trainable": f"{share:.2%}", "seed": results["seed"]})
            given[key] = {k: v for k, v in config.items() if v != defaults.get(k)}
        except Exception as error:  # files of other programs fail in many ways
            raise InputError(f"{path}: not the folder of a finished run of this version ({error})") from None

    configs = [json.loads(key) for key in rows]
    vary = {k for k in configs[0] if len({str(config.get(k)) for config in configs}) > 1}
    columns = {name: f"test {name}" for name in SCORES if any(name in run for runs in rows.values() for run in runs)}
    columns |= {"experts_used": "experts used", "experts_per_sample": "per sample", "busiest_expert": "busiest"}
    table = [["method and flags", "trainable", *columns.values(), "seeds"]]
    table.append(["---"] * len(table[0]))
    for config, chosen, runs in zip(configs, given.values(), rows.values()):
        flags = (f"--{'no-' * (v is False)}{k.replace('_', '-')}{'' if isinstance(v, bool) else f' {v}'}"
                 for k, v in chosen.items() if k in vary)
        cells = [" ".join((config["method"], *flags)), runs[0]["trainable"]]
        for name in columns:
            values = [np.mean(run[name]) for run in runs if name in run]  # of routing, the mean over the layers
            deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{deviation}" if values else "")
        table.append([*cells, ", ".join(str(run["seed"]) for run in runs)])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def benchmark(run: Run, repeats: int = 10) -> None:
    """Print what loader, training step and evaluation take, and their share of a large matrix product's rate."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config, model = run.config, run.model
    if run.splits:
        batches = iter(run.batches("train"))
        batch, began = next(batches), time.perf_counter()
        many = max(2 * repeats, 10 * config["workers"])  # beside these, what workers have ready by now counts little
        images = sum(len(other["index"]) for _, other in zip(range(many), batches))
        say(f"loader alone: {images / (time.perf_counter() - began):.1f} images/s with --workers {config['workers']}")
    else:  # random inputs, texts as long as a title
        n, side = config["batch_size"], config["image_size"]
        batch = dict(images=torch.randint(256, (n, 3, side, side), dtype=torch.uint8),
                     texts=torch.randint(1, 30_000, (n, 24)), labels=torch.randint(101, (n,)))
    n, device, trainable = len(batch["labels"]), run.device, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=device.type in ("cpu", "cuda"))
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device).to(run.dtype)
    synchronize = getattr(torch, device.type).synchronize

    def step() -> None:
        run.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    work = {"training step": step, "evaluation": lambda: run.forward(batch), "large product": lambda: a @ b}
    seconds = defaultdict(list)
    for _ in range(repeats + 2):  # the first two warm up
        for name, do in work.items():
            model.train(name == "training step")
            with torch.set_grad_enabled(name == "training step"):
                synchronize()
                began = time.perf_counter()
                do()
                synchronize()
                seconds[name].append(time.perf_counter() - began)

    # PyTorch counts the operations, on two samples that stand for all; those of fused attention it would miss.
    part, flops = {name: values[:2] for name, values in batch.items()}, {"large product": 2 * PRODUCT ** 3}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = run.loss(part, model.forward)  # not compiled
        flops["evaluation"] = counter.get_total_flops() * n // len(part["labels"])
        loss.backward()
        flops["training step"] = counter.get_total_flops() * n // len(part["labels"])
    times = {name: np.median(values[2:]) for name, values in seconds.items()}
    rates = {name: flops[name] / t / 1e9 for name, t in times.items()}
    for name, t in times.items():
        say(f"{name:<14} {1000 * t:9.1f} ms  {flops[name] / 1e9:9.1f} GFLOP  {rates[name]:9.1f} GFLOP/s",
            f" ({PRODUCT} squared, {config['precision']})" if name == "large product" else
            f" {n / t:8.1f} images/s  {rates[name] / rates['large product']:.0%} of the product")
    say(f"batch {n}, {batch['texts'].shape[1]} tokens of text, {device}, peak memory {peak_memory(device)} GiB")


def peak_memory(device: torch.device) -> float | None:
    """Return GiB: on a GPU what tensors took at most; else what this process took, where Linux tells."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    with contextlib.suppress(OSError, TypeError):
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20, 2)


# Encoders for the toy: two unimodal Transformers, pretrained here since nobody else did ----------------

PRETRAIN = dict(dim=64, depth=4, heads=4, mlp_dim=128, patch_size=16, text_depth=2, steps=700, text_steps=300, seed=0)


def pretrain(parent: Path) -> tuple[Path, Path]:
    """Return the file of a tiny ViT and the folder of a tiny BERT, made once for each PRETRAIN. The ViT sees pictures:
    each patch names what it shows, [CLS] the object in a white frame. The BERT sees questions: its feature names all
    words, a third of them masked (these alone give nearly equal means). A prompt then has to point as the frame did."""
    folder = parent / f"shapes-encoders-{hashlib.sha256(json.dumps(PRETRAIN).encode()).hexdigest()[:8]}"
    if not folder.exists():
        p = argparse.Namespace(**PRETRAIN)
        torch.manual_seed(p.seed)
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as name:  # renamed when it is whole
            made = Path(name, "encoders")
            (made / "bert").mkdir(parents=True)
            torch.save(pretrain_vision(p).state_dict(), made / "vit.pth")
            pretrain_text(p, made / "bert")
            with contextlib.suppress(OSError):  # another process may have made the same ones meanwhile
                made.rename(folder)
    return folder / "vit.pth", folder / "bert"


def fit(parameters: list, steps: int, what: str, step_loss) -> None:
    """Minimise step_loss() -> (loss, accuracy), and print the accuracy of the last ten steps."""
    optimizer, accuracies = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True), []
    for step in progress_bar(range(steps), f"pretraining {what}"):
        loss, accuracy = step_loss()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        accuracies.append(float(accuracy))
    say(f"pretrained a tiny {what} encoder: {steps} steps, accuracy {sum(accuracies[-10:]) / 10:.3f}")


def pretrain_vision(p: argparse.Namespace) -> ViT:
    images, cells = (torch.from_numpy(a) for a in data.make_shapes(20_000, np.random.default_rng(100 + p.seed)))
    images = images.permute(0, 3, 1, 2).contiguous()  # [n, 3, S, S]
    q = images.shape[-1] // 2
    vit = ViT(2 * q, p.patch_size, p.dim, p.depth, p.heads, p.mlp_dim)
    name_patch, name_marked = (torch.nn.Linear(p.dim, 3 * 5) for _ in range(2))  # shape, color, place; 0 is none
    border = F.pad(torch.zeros(q - 2, q - 2, dtype=torch.bool), (1, 1, 1, 1), value=True)

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
    return vit


def pretrain_text(p: argparse.Namespace, folder: Path) -> None:
    texts = [sample.text for sample in data.Shapes(folder).read("train")][:5_000]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
    sizes = dict(vocab_size=len(words), hidden_size=p.dim, num_hidden_layers=p.text_depth, num_attention_heads=p.heads,
                 intermediate_size=p.mlp_dim, max_position_embeddings=16, type_vocab_size=1)
    (folder / "config.json").write_text(json.dumps(sizes))  # what it leaves out is as in BERT
    (folder / "vocab.txt").write_text("\n".join(words))
    bert, name_words = BERT(*sizes.values()), torch.nn.Linear(p.dim, len(words))
    ids = [torch.tensor([2, *map(words.index, text.split()), 3]) for text in texts]
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


# Settings ----------------------------------------------------------------------------------------------

ACTIONS = ("out", "checkpoint", "eval", "predict", "resume", "summarize", "benchmark")
# A resumed or evaluated run may go on in another place, on another machine or in another manner; all else has to stay.
MAY_CHANGE = ("data_dir", "vision", "text", "device", "workers", "accumulate", "compile", "precision")
INCIDENTAL = ("device", "workers", "compile")  # tables ignore these; accumulate changes the importance loss


def parse(argv: list[str] | None, stored: dict | None = None) -> argparse.Namespace:
    """Read the command line. What it leaves out is as in a stored run, or else as data set and method have it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=list(DEFAULTS), help="shapes needs no data")
    first.add_argument("--method", choices=list(METHODS), default="mope", help="what to train, as a set of flags below")
    first.add_argument("--benchmark", action="store_true", help="time it; without --dataset on random weights")
    known = first.parse_known_args(argv)[0]
    dataset = known.dataset or ("food101" if known.benchmark else "shapes")
    parser = argparse.ArgumentParser(description=__doc__, parents=[first], allow_abbrev=False, formatter_class=type(
        "", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}))
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # data and model
    flag("--data-dir", default=f"data/{dataset}", help="the data set's folder")
    flag("--train-size", type=float, help="train on N samples, or on a fraction below 1, drawn by --seed")
    flag("--text-length", type=at_least(3), help="word pieces kept of a text; lower it if memory runs out")
    flag("--vision", default="vit_b_16", help="vit_b_16, vit_b_32, vit_l_16, dinov2_vits14, dinov2_vitb14, a file of "
         "such weights, or a plain ViT of timm: its hub id or folder")
    flag("--text", default="bert-base-uncased", help="bert-base-uncased, another hub id of a BERT, or a folder")
    flag("--image-size", type=at_least(1), default=224, help="a multiple of the patch size; a lower one is faster")
    flag("--pooling", choices=("mean", "cls"), default="mean", help="the feature of a text")
    flag("--main", choices=("vision", "text"), default="vision", help="the modality that is prompted with the other")
    flag("--static", type=at_least(0), default=6, help="static prompts a layer")
    flag("--experts", type=at_least(0), default=16, help="prompt experts a layer")
    flag("--dynamic", type=at_least(0), default=6, help="prompts that an expert holds")
    flag("--temperature", type=at_least(1e-6, float), default=0.1, help="of the router; a higher one slows it down")
    flag("--mapped", action=switch, default=True, help="one prompt a layer mapped from the other modality")
    flag("--mapper", type=at_least(1), default=16, help="hidden width of the MLP that maps it")
    flag("--prior-prompts", type=at_least(0), default=4, help="learned prompts a layer of the prior encoder")
    flag("--head", choices=("both", "main"), default="both", help="whose features the classifier sees")
    flag("--finetune", action=switch, default=False, help="train the encoders too")
    flag("--importance", type=at_least(0, float), default=0.01, help="weight of the importance loss")
    # training
    flag("--epochs", type=at_least(1), help="passes over the training samples")
    flag("--batch-size", type=at_least(1), help="samples a step, over all processes and micro-batches")
    flag("--accumulate", type=at_least(1), default=1, help="micro-batches a step; raise it if memory runs out")
    flag("--lr", type=at_least(0, float), help="peak, after a warm-up over 5 %% of the steps; then a cosine to zero")
    flag("--weight-decay", type=at_least(0, float), default=1e-3, help="of AdamW")
    flag("--seed", type=at_least(0), default=0, help="of everything random in training")
    # machine
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the first that is there")
    flag("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="of matrix products; auto: on GPUs bfloat16 where they are fast at it, else float16; float32 elsewhere")
    flag("--compile", action=switch, default=False, help="torch.compile: faster steps after several minutes")
    flag("--workers", type=at_least(0), default=min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
         help="processes that read images; 0 reads in the main one")
    # runs
    flag("--out", type=Path, default=Path("runs", dataset), help="folder of the run")
    flag("--checkpoint", metavar="FILE", type=Path, help="best.pt or last.pt of a run, for --eval or --predict")
    flag("--eval", action="store_true", help="evaluate the checkpoint on the test split")
    flag("--predict", nargs="+", metavar="INPUT", help="an image and a text, or a file of rows (image, relative to it, "
         "and text), whose scores go into predictions.csv beside it")
    flag("--resume", metavar="RUN", type=Path, help="continue the run in this folder")
    flag("--summarize", nargs="+", metavar="RUN", type=Path, help="finished runs as a Markdown table")

    parser.set_defaults(**DEFAULTS[dataset])
    prompts = parser.get_default("static") + parser.get_default("dynamic") + 1
    parser.set_defaults(**{k: prompts if v == AS_MANY_AS_MOPE else v for k, v in METHODS[known.method].items()})
    parser.set_defaults(**stored or {})
    return parser.parse_args(argv)


def at_least(least: float, kind: type = int):
    """Return the type of a flag: a number of a kind, from `least` on."""
    def number(text: str) -> float:
        if not least <= kind(text) < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text}: expected {least} or more, below 2⁶³")
        return kind(text)
    return number


def resolve(argv: list[str] | None) -> tuple[argparse.Namespace, dict, dict | None]:
    """Return the command line, the run's whole configuration, and the checkpoint to go on from (or None)."""
    args, state = parse(argv), None
    if bool(args.eval or args.predict) != bool(args.checkpoint):
        raise InputError("--checkpoint FILE goes with --eval or --predict")
    if sum(map(bool, (args.eval, args.predict, args.resume, args.summarize, args.benchmark))) > 1:
        raise InputError("give one of --eval, --predict, --resume, --summarize and --benchmark")
    if len(args.predict or ()) > 2 or args.out == Path():
        raise InputError("--predict takes a file of rows, or an image and a text in quotes" if args.predict else
                         "--out is empty; give the run a folder of its own")
    if path := args.checkpoint or args.resume and args.resume / "last.pt":
        state = from_first(lambda: load_checkpoint(path))  # the others may have no access to the file
        if state["config"].keys() != vars(args).keys() - set(ACTIONS):
            raise InputError(f"{path} is of another version of train.py, with {sorted(map(str, state['config']))}")
        stored = {**state["config"], "out": path.parent}
        args = parse(argv, stored)
        for key in stored.keys() - MAY_CHANGE:
            if getattr(args, key) != stored[key]:
                raise InputError(f"--{key.replace('_', '-')} {getattr(args, key)} contradicts {path}, which was made "
                                 f"with {stored[key]}; leave it out, or start a new run with another --out")
    config = {k: v for k, v in vars(args).items() if k not in ACTIONS} | {"dataset": args.dataset or "shapes"}
    if args.benchmark and not args.dataset and args.vision + args.text != "vit_b_16" + "bert-base-uncased":
        raise InputError("--benchmark times ViT-B/16 and BERT-base; to time other encoders, name a --dataset")
    return args, config, state


def pick_device(name: str) -> torch.device:
    ready = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in ready if ready[n]) if name == "auto" else name
    if not ready[name]:
        raise InputError(f"--device {name}: PyTorch {torch.__version__} finds none; use --device auto or another build")
    if name != "cuda":
        return torch.device(name)
    device, count = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if device.index >= count:
        raise InputError(f"more processes than the {count} GPUs here; give torchrun --nproc_per_node={count} or less")
    torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"  # from Ampere on
    return getattr(torch, "float32" if name == "auto" else name)


# The files of a run: each is written whole or not at all -----------------------------------------------


def save(run: Run, name: str) -> None:
    """Write a checkpoint: what was trained, and all that it takes to go on as if nothing had happened."""
    if RANK > 0:
        return
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}
    pairs, file = run.splits["train"], io.BytesIO()
    torch.save(dict(config=run.config, versions=versions, progress=asdict(run.progress), classes=pairs.classes,
                    multilabel=pairs.multilabel, digests=digests(run), trained=run.model.trained_state(),
                    optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict()), file)
    write(run.out / name, file.getvalue())
    write(run.out / "config.json", json.dumps({"config": run.config, "versions": versions}, indent=1))
    write(run.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.progress.log))


def restore(run: Run, state: dict) -> None:
    """Load the weights of a checkpoint; and in training, go on from there, which needs the same data as well."""
    for part, now in digests(run).items():
        then = state["digests"].get(part)
        if now == then or not run.optimizer and part != "tokenizer":
            continue
        told = f"the {part} is not what {run.out} began with ({now}, not {then})"
        if part != "test split":
            raise InputError(f"{told}; give --data-dir or --text with that, or start a new run")
        say(told)  # nothing trained depends on it, and its damaged images may have been replaced
    run.model.load_trained_state(state["trained"])
    if not run.optimizer:  # an evaluation
        return
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run began in another precision
            run.scaler.load_state_dict(state["scaler"])
        run.progress = Progress(**state["progress"])
    except Exception as error:  # states of other programs fail in many ways
        raise InputError(f"{run.out}/last.pt is not of this version of train.py ({error!r})") from None
    say(f"resumed {run.out} at epoch {run.progress.epoch + 1}, step {run.progress.step}")


def digests(run: Run) -> dict[str, str]:
    tokenizer = json.loads(run.tokenizer.to_str()) | {"padding": None}  # which differs with --compile
    tokenizer = hashlib.sha256(json.dumps(tokenizer).encode()).hexdigest()
    return {"tokenizer": tokenizer, **{f"{name} split": pairs.digest for name, pairs in run.splits.items()}}


def load_checkpoint(path: Path) -> dict:
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; expected last.pt or best.pt in the folder of a run")
    try:
        state = torch.load(regular_file(path), map_location="cpu", weights_only=True)
        _ = state["progress"]["log"], state["optimizer"], state["scaler"], state["multilabel"], list(state["classes"])
        return {**state, **{key: dict(state[key]) for key in ("config", "trained", "digests")}}
    except Exception as error:  # whatever a damaged file, or one of another program, makes of torch.load
        raise InputError(f"{path}: not a checkpoint of this version of train.py ({str(error)[:200]})") from None


def write(path: Path, content: str | bytes) -> None:
    """Write a file as a temporary one beside it, sync that, then rename it. Of several processes, the first does."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot sync
                    raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(out: Path) -> None:
    """Raise InputError if the folder holds anything that a run would write over."""
    for name in ("config.json", "last.pt", "best.pt", "log.jsonl", "results.json", "predictions.csv", "routing.png"):
        if (out / name).exists():
            raise InputError(f"{out} holds {name}; nothing is written over: --resume {out}, or give another --out")


def lock(out: Path) -> io.TextIOWrapper:
    """Refuse a second run in one folder while the file returned is open; the lock ends when its process does."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "lock").open("w")
    try:
        import fcntl
        if RANK == 0:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process is training in {out}; wait for it, or give another --out") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


# Processes (one, or several under torchrun) and signals ------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
PATIENCE = datetime.timedelta(hours=2)  # how long a process waits for another one
# Where no terminal is, in a log, progress is told once a minute.
SELDOM = {} if sys.stderr and sys.stderr.isatty() else dict(delay=60, mininterval=60, maxinterval=60)
progress_bar = functools.partial(tqdm, leave=False, disable=RANK > 0, **SELDOM)


def start_processes() -> None:
    """Let the processes of torchrun talk."""
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if WORLD > 1 and missing or WORLD == 1 and tasks > 1:
        raise InputError(f"{max(WORLD, tasks)} processes cannot talk without {', '.join(sorted(missing))}: start them "
                         "by torchrun --nproc_per_node=N train.py, or a single one without WORLD_SIZE and SLURM_NTASKS")
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def say(*words: object) -> None:
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def gather(items: list) -> list:
    """Return the items of all processes in one list, in every process."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_first(make):
    """Return what the first process makes, in every process."""
    made = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(made)
    return made[0]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or another of SIGNALS (its number is the argument) came, and the step in hand is finished."""


@contextlib.contextmanager
def orderly_stop(run: Run):
    """Meanwhile a signal ends the run after the step in hand, with a checkpoint; the same one later ends it at once."""
    asked: dict[int, float] = {}

    def request_stop(number: int, frame: object) -> None:
        # Within two seconds it is no second request: SLURM tells every process, and torchrun then tells its own again.
        if time.monotonic() - asked.setdefault(number, time.monotonic()) > 2:
            os._exit(128 + number)
        run.stop_signals.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more to leave at once\n")

    before = {n: signal.signal(n, request_stop) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}  # by nohup
    try:
        yield
    except Stopped:
        if run.progress.epoch < run.config["epochs"]:  # later, last.pt is complete and the model holds the best weights
            save(run, "last.pt")
        say(f"stopped; continue with: python train.py --resume {run.out}")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Main --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.summarize:
        return say(summarize(args.summarize))
    start_processes()
    args, config, state = resolve(argv)
    device = pick_device(config["device"])
    dtype = pick_precision(config["precision"], device)
    config["precision"] = str(dtype).removeprefix("torch.")
    config["compile"] &= not args.predict  # it would take longer than the answer
    torch.set_float32_matmul_precision("high")  # TF32 where float32 products remain on a GPU
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention may stop to plan for each new length of texts
    run = Run(config, args.out, device, dtype)

    if args.benchmark and not args.dataset:
        encoders = {"vision": ViT(config["image_size"]), "text": BERT(pooling=config["pooling"])}
        run.model = build(config, 101, device, dtype, encoders)
        return benchmark(run)
    if config["dataset"] == "shapes":
        torch.set_num_threads(1)  # its matrices are tiny: beside any other load, waiting for a second thread is slow
    if not (state or args.benchmark):
        check_new(args.out)

    # Data first: a missing folder is found before any model is built.
    trained_for = (state["classes"], state["multilabel"]) if args.checkpoint else None
    run.splits = {"test": data.unlabelled(args.predict, *trained_for)} if args.predict else data.load(
        config["dataset"], config["data_dir"], config["train_size"], config["seed"], trained_for)
    classes = run.splits["test"].classes
    if state and state["classes"] != classes:
        raise InputError(f"{config['data_dir']}: other classes than those the checkpoint was trained on")
    for name, split in run.splits.items():
        say(f"{name}: {len(split):,} samples", *(f"\n  {note}" for note in split.notes))
    say(f"{len(classes)} classes: {', '.join(map(repr, classes[:5]))}{', …' if len(classes) > 5 else ''}")
    say(f"device: {device}, {config['precision']}, {WORLD} process{'es' if WORLD > 1 else ''}")
    if config["vision"] is None or config["text"] is None:  # shapes has encoders of its own
        for key, made in zip(("vision", "text"), pretrain(args.out.parent)):
            config[key] = config[key] or str(made)
    run.model = build(config, len(classes), device, dtype)
    say(run.model.report())
    bert = run.model.prior if config["main"] == "vision" else run.model.main
    run.tokenizer = data.load_tokenizer(bert, config["text_length"], 16 if config["compile"] else None)
    if args.benchmark:
        return benchmark(run)
    if not args.checkpoint:
        return train(run, state)
    restore(run, state)
    if args.predict:
        return predict(run, args.predict)
    say(f"{args.checkpoint}, test:", json.dumps(evaluate(run, "test")[0]))


def build(config: dict, classes: int, device: torch.device, dtype: torch.dtype, encoders: dict | None = None) -> MoPE:
    """Return the model, with pretrained encoders unless others are given."""
    encoders = encoders or {"vision": load_vit(config["vision"], config["image_size"]),
                            "text": load_bert(config["text"], config["pooling"])}
    if config["text_length"] > encoders["text"].max_length:
        raise InputError(f"--text-length {config['text_length']}: the BERT reads {encoders['text'].max_length} at most")
    torch.manual_seed(config["seed"])  # prompts, router, MLP and head
    model = MoPE(encoders.pop(config["main"]), *encoders.values(), classes, n_prior_prompts=config["prior_prompts"],
                 head=config["head"], finetune=config["finetune"], n_static=config["static"],
                 n_experts=config["experts"], n_dynamic=config["dynamic"], mapped=config["mapped"],
                 mapper_width=config["mapper"], temperature=config["temperature"]).cast_frozen(dtype).to(device)
    if config["compile"]:
        model.compile()
    return model


def cli() -> int:
    """Run main() and return the exit code; expected errors are told in a sentence instead of a traceback."""
    code = 1
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except SystemExit as left:  # argparse has said why
        return left.code
    except KeyboardInterrupt as stopped:
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except Exception as error:
        message = str(error).strip()
        if isinstance(error, InputError):
            code = 2
        elif isinstance(error, OSError):
            message = f"{error.filename or 'output'}: {error.strerror or error}; mend that, then go on with --resume"
        elif re.search(r"DataLoader worker \(pid|shared memory(\(shm\)| object)", message):  # too little, as a rule
            message = (f"{message.splitlines()[-1]}; --resume with fewer --workers, 0 for none, or in a container by "
                       "docker run --shm-size 8g")
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", message):
            message = ("out of memory; --resume with a higher --accumulate, or start with a lower --batch-size, "
                       "--image-size or --text-length")
        else:
            sys.excepthook(*sys.exc_info())
            return code
    print(f"error: {message}", file=sys.stderr)  # after the complaints of iterators that end with the exception
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # class names that the terminal cannot print
    if (exit_code := cli()) or WORLD > 1:  # leave without waiting for workers, which ignore SIGTERM, or other processes
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise for the workers that die now
        for child in torch.multiprocessing.active_children():
            child.kill()
        os._exit(exit_code)
