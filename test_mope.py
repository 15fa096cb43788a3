"""Tests: `python test_mope.py [name ...]`, or pytest. CPU only, no network; what needs real weights skips without them.

Real weights and photographs are looked for in $MOPE_SHARED, or ../shared. There would lie
    weights/dinov2_vits14/dinov2_vits14_pretrain.pth, weights/all-MiniLM-L6-v2/ (a BERT folder),
    golden/encoders.pt (what the two give, computed with other libraries), and
    data/{food101,mmimdb,snli_ve,grocery}: small stand-ins in the layouts of these data sets, whose sizes are tested.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unittest
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.EpsImagePlugin
import PIL.ImageFont
import tokenizers
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

import data
import mope
import train
from mope import BERT, ConditionalPrompts, InputError, MoPE, ViT, importance_loss, load_bert, load_vit

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it
if not os.environ.get("MOPE_BENCHMARK"):
    torch.set_num_threads(1)  # as in the programs that tests start: another number of threads rounds differently
HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("MOPE_SHARED", HERE.parent / "shared"))


# Helpers -----------------------------------------------------------------------------------------------


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        raise unittest.SkipTest(f"no {SHARED / path}: real weights and photographs are optional")
    return SHARED / path


STARTED = []  # programs, which `folder` kills with their workers, whatever is left of them


@contextlib.contextmanager
def folder():
    """Yield a temporary folder and make it the current one; what is downloaded goes below it too."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, TORCH_HOME=name):
        with mock.patch("torch.hub._hub_dir", None):
            os.chdir(name)
            try:
                yield Path(name)
            finally:
                os.chdir(before)
                while STARTED:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(STARTED.pop().pid, signal.SIGKILL)


if "pytest" in sys.modules:
    @sys.modules["pytest"].fixture
    def root():
        """Hand it to each test that asks for it, as the runner at the end of this file does."""
        with folder() as path:
            yield path


def refused(call, *words: str, kind: type = InputError) -> str:
    """The call must raise an exception of that kind whose message holds the words; the message is returned."""
    try:
        call()
    except kind as error:
        for word in words:
            assert word in str(error), f"{word!r} not in: {error}"
        return str(error)
    raise AssertionError(f"{kind.__name__} expected")


def output(call) -> str:
    """Return what the call prints, on either stream; argparse may end it."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            call()
        except SystemExit as left:
            print("exit code", left.code)
    return said.getvalue()


def read(path: Path):
    """Return what a file of a run holds: a checkpoint, a table or JSON."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return torch.load(path, weights_only=True) if path.suffix in (".pt", ".pth") else json.loads(path.read_text())


@functools.cache
def lacks_bfloat16() -> bool:
    trial = "import torch; m = torch.ones(1024, 1024).bfloat16(); m @ m"
    return bool(subprocess.run([sys.executable, "-c", trial], capture_output=True).returncode)


def need_bfloat16() -> None:
    if lacks_bfloat16():
        raise unittest.SkipTest("this processor refuses its bfloat16 instructions; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "
                                "may avoid them")


def tiny(text_layers: int = 2, **kwargs) -> MoPE:
    torch.manual_seed(0)
    vit = ViT(image_size=32, patch_size=8, dim=24, depth=3, heads=2, mlp_dim=48)
    bert = BERT(vocab_size=50, dim=16, depth=text_layers, heads=2, mlp_dim=32, max_length=16)
    sizes = dict(n_static=2, n_experts=4, n_dynamic=3)
    return MoPE(vit, bert, 5, **{**sizes, **kwargs})


def pixels(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def words(n: int = 4, length: int = 9) -> torch.Tensor:
    """Return ids with paddings of different lengths."""
    ids = torch.randint(1, 50, (n, length), generator=torch.Generator().manual_seed(2))
    for i in range(n):
        ids[i, length - i:] = 0
    return ids


def make_vit(path: Path, dim: int = 64) -> None:
    """Write a random file in torchvision's format, with torchvision's own model."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=dim // 64,
                                               hidden_dim=dim, mlp_dim=64, num_classes=7)
    torch.nn.init.normal_(vit.heads.head.weight)
    torch.save(vit.state_dict(), path)


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red green blue round thing , .".split()


def make_bert(path: Path) -> dict:
    """Write a random BERT folder with vocab.txt, and return the weights under BERT's names."""
    path.mkdir(parents=True, exist_ok=True)
    config = dict(model_type="bert", hidden_act="gelu", vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=2, intermediate_size=64, max_position_embeddings=40, type_vocab_size=2,
                  layer_norm_eps=1e-12, pad_token_id=0)
    (path / "config.json").write_text(json.dumps(config))
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    layer = {"attention.self.query": (32, 32), "attention.self.key": (32, 32), "attention.self.value": (32, 32),
             "attention.output.dense": (32, 32), "attention.output.LayerNorm": (32,), "intermediate.dense": (64, 32),
             "output.dense": (32, 64), "output.LayerNorm": (32,)}
    modules = {"embeddings.LayerNorm": (32,), "pooler.dense": (32, 32)}
    modules |= {f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), 32), "embeddings.position_embeddings.weight": (40, 32),
              "embeddings.token_type_embeddings.weight": (2, 32)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    g = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=g) * 0.1 for name, shape in shapes.items()}
    torch.save(weights, path / "pytorch_model.bin")
    return weights


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        header[name] = dict(dtype=kind, shape=list(tensor.shape), data_offsets=[len(blob), len(blob) + len(raw)])
        blob += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + blob)


def make_food(root: Path, train_count: int = 40, test_count: int = 12) -> Path:
    """Write a small folder in the layout of UPMC Food-101, in which the colour of the picture is the class."""
    rng = np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 30)}
    for split, count in (("train", train_count), ("test", test_count)):
        lines = []
        for i in range(count):
            name = ("red", "green")[i % 2]
            image = np.clip(np.array(colours[name]) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            file = root / "images" / split / name / f"{name}_{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
            lines.append(f'{file.name},"a photo of a round thing, {i}",{name}')
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{split}_titles.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


@functools.cache
def inputs() -> tempfile.TemporaryDirectory:
    """Make the tiny data and backbones that tests copy, once."""
    made = tempfile.TemporaryDirectory()
    make_food(Path(made.name, "food"))
    make_vit(Path(made.name, "vit.pth"))
    make_bert(Path(made.name, "bert"))
    return made


def arguments(root: Path, *more: str) -> list[str]:
    """Copy tiny data and backbones below root, unless they are there; return the command line that trains on them."""
    if not (root / "vit.pth").exists():
        shutil.copytree(inputs().name, root, dirs_exist_ok=True)
    return ["--dataset", "food101", "--data-dir", f"{root}/food", "--vision", f"{root}/vit.pth", "--text",
            f"{root}/bert", "--image-size", "32", "--text-length", "16", "--batch-size", "6",
            "--epochs", "3", "--workers", "0", "--device", "cpu", "--precision", "float32", *more]


def trained(root: Path, name: str = "run", *flags: str) -> Path:
    """Train in a folder below root, an epoch unless flags say otherwise, and return that folder."""
    train.main(arguments(root, "--out", f"{root}/{name}", "--epochs", "1", *flags))
    return root / name


def stop_in_the_first_step(argv: list[str]) -> None:
    """Leave a run behind that has written last.pt and nothing else."""
    with mock.patch("train.task_loss", side_effect=KeyboardInterrupt):
        refused(lambda: train.main(argv), kind=KeyboardInterrupt)


def start(argv: list[str], patch: str = "", **environment: str) -> subprocess.Popen:
    """Start train.py as a program of its own, after some lines that patch what it imports."""
    program = (f"import os, runpy, sys, torch\n{patch}\nsys.path.insert(0, '.')\n"
               "runpy.run_path('train.py', run_name='__main__')")
    STARTED.append(subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}))
    return STARTED[-1]


def ended(process: subprocess.Popen, code: int = 0, timeout: int = 150) -> tuple[str, str]:
    """Wait for a program, check its exit code, and return its output and errors."""
    said, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, f"{process.returncode}: {errors}"
    return said, errors


def same(a, b) -> bool:
    """Say whether two values are equal to the last bit, tensors included and seconds aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Encoders: parity with the libraries -------------------------------------------------------------------


def test_vit_equals_torchvision(root):
    torch.manual_seed(0)
    vits = torchvision.models
    for reference, size in ((vits.VisionTransformer(32, 8, 3, 4, 64, 96, num_classes=7), 32),
                            (vits.vit_b_16(weights=None), 224)):
        torch.nn.init.normal_(reference.class_token)
        torch.save(reference.state_dict(), root / "vit.pth")
        vit = load_vit(str(root / "vit.pth"), size)
        reference.heads = torch.nn.Identity()
        images = pixels(4 if size == 32 else 1, size)
        normalised = (images / 255 - torch.tensor(vit.mean).view(3, 1, 1)) / torch.tensor(vit.std).view(3, 1, 1)
        with torch.no_grad():
            assert (vit(images) - reference.eval()(normalised)).abs().max() <= 1e-5


def test_real_dinov2_equals_golden():
    golden = torch.load(shared("golden/encoders.pt"), weights_only=True)
    for size in (224, 518):
        vit = load_vit(str(shared("weights/dinov2_vits14/dinov2_vits14_pretrain.pth")), size)
        images, cls, mean = (golden[f"{name}_{size}"] for name in ("images", "vit_cls", "vit_patch_mean"))
        with torch.no_grad():
            tokens = vit.tokens(images)
            for ours, theirs in ((vit(images), cls), (tokens[:, 0], cls), (tokens[:, 1:].mean(1), mean)):
                assert (ours - theirs).abs().max() <= 1e-4


def test_real_bert_equals_golden():
    golden = torch.load(shared("golden/encoders.pt"), weights_only=True)
    bert = load_bert(str(shared("weights/all-MiniLM-L6-v2")))
    ids, real = golden["input_ids"], golden["attention_mask"].bool()
    assert [e.ids for e in data.load_tokenizer(bert, 64).encode_batch(golden["texts"])] == ids.tolist()
    with torch.no_grad():
        assert (bert.tokens(ids) - golden["bert_last_hidden"])[real].abs().max() <= 1e-4


def test_layer_scale_is_folded(root):
    """A file in DINOv2's format gives what the block gives that is written out with LayerScale."""
    torch.manual_seed(0)
    vit = ViT(image_size=28, patch_size=14, dim=64, depth=2, heads=4, mlp_dim=64).eval()
    weights = {k.replace("patch_embed.", "patch_embed.proj."): v.clone() for k, v in vit.state_dict().items()}
    weights["mask_token"] = torch.zeros(1, 64)
    gammas = {f"blocks.{i}.ls{j}.gamma": torch.rand(64) for i in range(2) for j in (1, 2)}
    torch.save(weights | gammas, root / "dino.pth")
    loaded = load_vit(str(root / "dino.pth"), 28)
    images = pixels(2, 28)
    with torch.no_grad():
        x = (images - vit.shift) / vit.scale
        x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(x).flatten(2).mT], 1) + vit.pos_embed
        for i, block in enumerate(vit.blocks):
            h = block.norm1(x)
            x = x + gammas[f"blocks.{i}.ls1.gamma"] * block.attn(h, h)
            x = x + gammas[f"blocks.{i}.ls2.gamma"] * block.mlp(block.norm2(x))
        assert (loaded(images) - vit.norm(x)[:, 0]).abs().max() <= 1e-5


def test_prompts_as_keys_and_values_equal_insert_and_drop():
    """Both encoders give, with padding too, what plain layers give with prompts inserted and their outputs dropped."""
    model, calls = tiny(), []

    def insert_and_drop(self, x, prompts, mask, n_out):
        calls.append(self)
        if mask is not None:
            mask = F.pad(mask, (5, 0), value=True)[:, None, None]
        for i, block in enumerate(self.blocks):
            x = block(torch.cat([prompts[i], x], 1), None, mask)[:, 5:]
        return x

    for encoder, inputs_ in ((model.main, pixels()), (model.prior, words())):
        prompts = torch.randn(encoder.depth, 4, 5, encoder.dim) * 0.5
        with torch.no_grad():
            ours = encoder(inputs_, prompts)
            with mock.patch.object(mope.Encoder, "run_blocks", insert_and_drop):
                assert (ours - encoder(inputs_, prompts)).abs().max() <= 1e-5 and calls.pop() is encoder
        assert (ours - encoder(inputs_)).abs().max() > 1e-3, "prompts change the feature"


def test_padding_unused_tokens_and_positions_change_no_feature():
    """Padding changes none; the last layer of a ViT computes [CLS] alone; positions are resized only when needed."""
    model, ids = tiny().eval(), words(1)
    bert, vit = model.prior, model.main
    for pooling, p in itertools.product(("mean", "cls"), (None, torch.randn(bert.depth, 1, 3, bert.dim))):
        bert.pooling = pooling
        assert (bert(ids, p) - bert(F.pad(ids, (0, 7)), p)).abs().max() <= 1e-5
    prompts = torch.randn(vit.depth, 4, 2, vit.dim)
    with torch.no_grad():
        assert torch.allclose(vit(pixels(), prompts), vit.tokens(pixels(), prompts)[:, 0], atol=1e-6)

    positions = torch.randn(1, 1 + 16, 8)
    smaller, larger = mope.resize_positions(positions, 2), mope.resize_positions(torch.ones(1, 17, 8), 7)
    assert mope.resize_positions(positions, 4) is positions
    assert smaller.shape == (1, 5, 8) and torch.equal(smaller[:, 0], positions[:, 0])
    assert torch.allclose(larger, torch.ones(1, 50, 8), atol=1e-5)


# The method: prompts, router, importance, fusion -------------------------------------------------------


def test_each_prompt_type_can_be_absent():
    full = dict(n_static=2, n_experts=4, n_dynamic=3, mapped=True)
    lengths = {}
    for absent in (None, "n_static", "n_experts", "n_dynamic", "mapped"):
        prompts = ConditionalPrompts(3, 24, 16, 0.1, **full | ({absent: 0} if absent else {}))
        made, routing = prompts(torch.randn(4, 16))
        lengths[absent] = made.shape[2]
        assert made.shape[:2] == (3, 4) and (routing is None) == (absent in ("n_experts", "n_dynamic"))
    assert lengths == {None: 6, "n_static": 4, "n_experts": 3, "n_dynamic": 3, "mapped": 5}

    model = tiny(n_static=0, n_experts=0, mapped=False, n_prior_prompts=0)
    logits, routing, importance = model.eval()(pixels(), words())
    features = torch.cat([model.main(pixels()), model.prior(words())], -1)
    assert routing is None and importance == 0
    assert torch.allclose(logits, model.head(features)), "without prompts, it is two plain encoders and a head"


def test_dynamic_prompts_are_the_mixture_of_the_paper():
    prompts = ConditionalPrompts(3, 24, 16, 0.1, n_static=0, n_experts=4, n_dynamic=2, mapped=False).eval()
    psi = torch.randn(5, 16)
    made, routing = prompts(psi)
    normal = F.layer_norm(psi, (16,))
    for layer in range(3):  # written out with loops, as the equations read
        logits = (mope.ROUTER_SPEED / 16 * normal) @ prompts.router.weight[4 * layer:4 * layer + 4].T / 0.1
        for b in range(5):
            r = logits[b].softmax(-1)
            assert torch.allclose(r, routing[b, layer], atol=1e-6)
            mixed = sum(r[j] * prompts.experts[layer, j] for j in range(4))
            assert torch.allclose(mixed, made[layer, b], atol=1e-6)


def test_router_noise_is_for_training_only():
    """And one expert needs no router."""
    prompts = ConditionalPrompts(3, 24, 16, 0.5, n_static=0, mapped=False)
    psi = torch.randn(4, 16)
    (one, clean_one), (two, clean_two) = prompts.train()(psi), prompts(psi)
    assert not torch.equal(one, two) and torch.equal(clean_one, clean_two), "importance sees no noise"
    assert torch.equal(prompts.eval()(psi)[0], prompts(psi)[0])
    model = tiny(n_experts=1)
    logits, routing, importance = model(pixels(), words())
    assert model.prompts.router is None and importance == 0 and torch.equal(routing, torch.ones(4, 3, 1))
    assert not any("router" in name for name, _ in model.named_parameters())


def test_router_starts_alike_and_moves_alike_whatever_the_width():
    moved = []
    for width in (64, 384, 768):
        torch.manual_seed(0)
        prompts = ConditionalPrompts(12, 24, width, 0.1, n_static=0, n_experts=16, n_dynamic=1, mapped=False).eval()
        psi = torch.randn(64, width) * 5 + 1

        def logits(psi: torch.Tensor) -> torch.Tensor:  # [B, L, k], up to a constant, read off the softmax
            return (lambda logs: logs - logs.mean(-1, keepdim=True))(prompts(psi)[1].log())

        before = logits(psi).detach()
        assert 0.85 < before.std() < 1.15, f"width {width}: logits start with a deviation of {before.std():.2f}"
        optimizer = torch.optim.AdamW(prompts.router.parameters(), lr=1.5e-3)
        (-prompts(psi[:1])[1].log()[..., 0].mean()).backward()
        optimizer.step()
        moved.append((logits(psi[:1]) - before[:1]).abs().max().item())
        assert 0.02 < moved[-1] < 0.5, f"width {width}: a step moves logits by {moved[-1]:.3f}"
    assert max(moved) < 1.5 * min(moved)


def test_importance_loss():
    uniform, one_expert = torch.full((8, 3, 4), 0.25), torch.eye(4)[1].expand(8, 3, 4)
    turns = F.one_hot(torch.arange(8) % 4, 4).float().unsqueeze(1)
    assert importance_loss(uniform) == 0
    assert abs(importance_loss(one_expert) - 3) < 1e-6, "k - 1 when one expert takes everything"
    assert importance_loss(turns) == 0, "specialised but balanced routing costs nothing"
    assert importance_loss(one_expert.bfloat16()).dtype == torch.float32
    for routing, used, each in ((uniform, 4.0, 4.0), (one_expert, 1.0, 1.0), (turns, 4.0, 1.0)):
        assert torch.allclose(mope.experts_used(routing), torch.tensor([used]))
        assert torch.allclose(mope.experts_per_sample(routing), torch.tensor([each]))

    # the gradient stops layer by layer: CV² is about 0.003 in the first, below 0.05, and far above in the second
    logits = torch.zeros(8, 2, 4)
    logits[:, 0, 0], logits[:, 1, 0] = 0.1, 2.0
    loss = importance_loss(logits.requires_grad_().softmax(-1))
    loss.backward()
    assert loss > 0.1 and logits.grad[:, 0].abs().max() == 0 and logits.grad[:, 1].abs().max() > 0


def test_frozen_stays_bitwise_and_every_trainable_moves():
    for main_is_text in (False, True):
        model = tiny()
        x, y = pixels(), words()
        if main_is_text:
            model = MoPE(model.prior, model.main, 5, n_experts=4)
            x, y = y, x
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            logits, _, importance = model(x, y)
            (F.cross_entropy(logits, torch.arange(4)) + importance).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            frozen = name.startswith(("main.", "prior."))
            assert p.requires_grad != frozen, name
            assert torch.equal(p, before[name]) == frozen, name
            if name == "prompts.experts":  # every expert of every layer
                assert (p != before[name]).flatten(2).any(-1).all()


def test_modes_of_training_and_evaluation():
    model = tiny().train()
    assert model.training and model.prompts.training
    assert not any(m.training for encoder in (model.main, model.prior) for m in encoder.modules()), "they are frozen"
    assert all(m.training for m in tiny(finetune=True).train().modules())
    model.eval()
    with torch.no_grad():
        assert same(tuple(model(pixels(), words())), tuple(model(pixels(), words())))
    for count in (0, 4):
        model, psi = tiny(n_prior_prompts=count), []
        model.prior.register_forward_hook(lambda module, inputs, output: psi.append(output))
        model(pixels(), words())
        assert psi[0].requires_grad == bool(count), "a prior without prompts runs without autograd"


def test_inputs_and_encoders_that_do_not_fit_are_refused():
    refused(lambda: tiny()(pixels().float() / 255, words()), "torch.float32", "uint8")
    refused(lambda: tiny()(pixels(size=40), words()), "[4, 3, 40, 40]", "[B, 3, 32, 32]")
    refused(lambda: tiny()(pixels()[:, :1], words()), "[4, 1, 32, 32]", "[B, 3, 32, 32]")
    for bad in (0, float("nan"), float("inf")):
        refused(lambda: tiny(temperature=bad), f"temperature is {bad}")
    for x, y, *hints in ((words(), pixels(), "uint8", "[4, 3, 32, 32]"), (pixels(), words()[0], "texts are", "[B, N]"),
                         (pixels()[0], words(), "[3, 32, 32]"), (pixels()[None], words(), "[1, 4, 3, 32, 32]")):
        refused(lambda: tiny()(x, y), *hints)
    refused(lambda: ViT(32, 8, 24, 2, 5, 24), "5 heads", "width of 24")
    refused(lambda: tiny()(pixels(), words(length=17)), "17 word pieces", "at most 16")
    for layers in (2, 4):
        refused(lambda: tiny().main(pixels(), torch.zeros(layers, 4, 1, 24)), kind=ValueError)

    class Deaf(torch.nn.Module):
        dim, depth, prompt_init_bound, hears = 24, 3, 0.1, False

        def forward(self, x: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
            assert prompts.shape[:2] == (3, 4) and prompts.shape[3] == 24
            feature = x.float().mean((1, 2, 3))[:, None].expand(-1, 24)
            return feature + prompts.mean((0, 2)) if self.hears else feature

    model = MoPE(Deaf(), tiny().prior, 5)
    refused(lambda: model(pixels(), words()), "Deaf ignores its prompts")
    with torch.no_grad():
        model(pixels(), words())  # without gradients it cannot be known
    model.main.hears = True
    model.main.register_buffer("mean", torch.zeros(3))  # such names mean something in our encoders only
    assert model.load_trained_state(model.trained_state())(pixels(), words()).logits.shape == (4, 5)


def test_head_can_see_one_feature():
    """Where it sees the main encoder alone, and no prompt comes from the other, that one does not run."""
    for head, width in (("both", 40), ("main", 24)):
        model = tiny(head=head)
        assert model.head.in_features == width and model(pixels(), words()).logits.shape == (4, 5)
    refused(lambda: tiny(head="all"), "all", "both")
    model = tiny(head="main", n_experts=0, mapped=False, n_prior_prompts=0).eval()
    with mock.patch.object(model.prior, "forward", side_effect=AssertionError("not needed")):
        logits = model(pixels(), words()).logits
    assert torch.equal(logits, model(pixels(), words().flip(0)).logits)
    refused(lambda: tiny(head="main", n_experts=0, mapped=False), "n_prior_prompts")


def test_frozen_matrices_can_be_held_in_bfloat16():
    """Those in training are not; and the head is exact under autocast."""
    model = tiny()
    model.main.blocks[0].requires_grad_(True)
    kinds = {name: p.dtype for name, p in model.cast_frozen(torch.bfloat16).main.named_parameters()}
    assert kinds["blocks.0.mlp.fc1.weight"] == torch.float32 and kinds["blocks.1.mlp.fc1.weight"] == torch.bfloat16

    need_bfloat16()
    model, features = tiny().eval(), []
    exact = model(pixels(), words()).logits
    model.cast_frozen(torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["main.blocks.0.attn.qkv.weight"] == torch.bfloat16
    assert kinds["main.blocks.0.norm1.weight"] == kinds["prompts.experts"] == torch.float32
    model.head.register_forward_hook(lambda module, inputs, output: features.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded, routing, _ = model(pixels(), words())
    [(feature, output_)] = features
    assert routing.dtype == rounded.dtype == feature.dtype == output_.dtype == torch.float32
    assert torch.equal(rounded, F.linear(feature, model.head.weight, model.head.bias))
    assert 0 < (rounded - exact).abs().max() < 0.1
    rounded.sum().backward()
    assert model.prompts.experts.grad.dtype == torch.float32


def test_export_with_any_batch_size():
    model, batch = tiny().eval(), torch.export.Dim("B", min=2, max=64)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    exported = torch.export.export(model, (pixels(), words()), dynamic_shapes=shapes).module()
    assert (exported(pixels(7), words(7)).logits - model(pixels(7), words(7)).logits).abs().max() < 1e-5


def test_trainable_share_of_vit_b_16_and_bert_base():
    with torch.device("meta"):
        model = MoPE(ViT(), BERT(), 101)
    trained_, total = mope.count(model)[::-1]
    assert total == sum(p.numel() for p in model.parameters())
    assert trained_ == sum(p.numel() for p in model.parameters() if p.requires_grad) <= 0.0075 * total
    assert all(part in model.report() for part in (f"{total:,}", f"{trained_:,}", f"{trained_ / total:.2%}"))


def test_trained_state_goes_to_a_fresh_process(root):
    arguments(root)
    vit, bert = load_vit(f"{root}/vit.pth", 32), load_bert(f"{root}/bert")
    model = MoPE(vit, bert, 5, n_experts=4).eval()
    images, ids, state = pixels(), words() % len(WORDS), model.trained_state()
    torch.save((state, images, ids), root / "saved.pt")
    program = f"""if True:
        import torch, mope
        state, *inputs = torch.load("{root}/saved.pt", weights_only=True)
        model = mope.MoPE(mope.load_vit("{root}/vit.pth", 32), mope.load_bert("{root}/bert"), 5, n_experts=4)
        torch.save(model.load_trained_state(state).eval()(*inputs).logits.detach(), "{root}/logits.pt")"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HERE, capture_output=True)
    assert torch.equal(read(root / "logits.pt"), model(images, ids).logits)

    torch.save({k: v + 1 for k, v in read(root / "vit.pth").items()}, root / "other.pth")
    other = load_vit(f"{root}/other.pth", 32)
    for backbone, classes, settings, given, *hints in (
            (other, 5, {}, state, "main sha256", "vit.pth"), (vit, 5, {}, {"model": 1}, "weights and backbones"),
            (vit, 5, dict(temperature=0.2), state, "temperature is 0.2"), (vit, 6, {}, state, "misshapen", "head")):
        wrong = MoPE(backbone, bert, classes, n_experts=4, **settings)
        refused(lambda: wrong.load_trained_state(given), *hints)
    sizes = dict(image_size=32, patch_size=8, dim=64, depth=2, mlp_dim=64)
    said = output(lambda: MoPE(ViT(**sizes, heads=4), bert, 5, n_experts=4).load_trained_state(state))
    assert "main sha256 is unknown" in said, "these weights may be random"
    refused(lambda: MoPE(ViT(**sizes, heads=2), bert, 5, n_experts=4).load_trained_state(state), "main heads is 2")
    with mock.patch("mope.ROUTER_SPEED", 4):  # as somebody may set it in a copy
        refused(lambda: model.load_trained_state(state), "router speed is 4", "trained with 16")

    # what counts is what a tensor is, not whether it requires a gradient when it is saved
    names = state["weights"].keys()
    assert model.requires_grad_(False).trained_state()["weights"].keys() == names
    assert not any(name.startswith(("main.", "prior.")) for name in names)
    tuned = MoPE(vit, bert, 5, finetune=True).trained_state()
    assert any(name.startswith("main.") for name in tuned["weights"])
    assert "main sha256" not in tuned["backbones"], "its encoders are not those of the files"
    vit, bert = load_vit(f"{root}/vit.pth", 32), load_bert(f"{root}/bert")
    image_only = MoPE(vit, bert, 5, n_experts=0, mapped=False, n_prior_prompts=0, head="main", finetune=True)
    assert not any(name.startswith("prior.") for name in image_only.trained_state()["weights"])
    assert vit.source is None and bert.source, "an encoder that is not used is not trained either"


# Weight files ------------------------------------------------------------------------------------------


def test_broken_weight_files_are_explained(root):
    good = root / "good.pth"
    make_vit(good)
    weights, whole = read(good), good.read_bytes()
    torch.save(weights, root / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy, page = (root / "legacy.pth").read_bytes(), b"<!DOCTYPE html><html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    cut = whole[:-1000], whole[:len(whole) // 2], legacy[:-1000], legacy[:50]
    for content, *hints in (*((content, "cut short", "download") for content in cut),
                            (b"", "b''", "download"), (page, "<!DOCTYPE", "download"), (pointer, "git-lfs", "download"),
                            (b"cos\nsystem\n(S'true'\ntR.",)):
        (root / "odd.pth").write_bytes(content)
        assert "\n" not in refused(lambda: load_vit("odd.pth", 32), "odd.pth", *hints)
    refused(lambda: load_vit(root / "none.pth"), "none.pth: no such file")
    assert load_vit(good, 32, heads=2).heads == 2 and "with 4 heads" in output(lambda: load_vit(good, 32))

    ones, quantised = torch.ones(64), torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)
    biases = ones.to_sparse(), quantised, ones[0].clone(), ones.to(torch.int8), None, ones.to(torch.complex64)
    for state, hint in (
            ([1, 2], "not a file of tensors"), ({"conv1.weight": torch.zeros(3)}, "not a plain ViT"),
            (weights | {"register_tokens": torch.zeros(1)}, "1 unexpected (register_tokens)"),
            ({k: v for k, v in weights.items() if k != "encoder.ln.bias"}, "1 missing (norm.bias)"),
            (weights | {"encoder.ln.bias": torch.zeros(5)}, "misshapen"), (weights | {7: torch.ones(1)}, ""),
            (weights | {"encoder.pos_embedding": torch.zeros(1, 6, 64)}, "1 misshapen (pos_embed)"),
            (weights | {"conv_proj.weight": torch.tensor(1.0)}, ""), (weights | {"class_token": 3}, ""),
            *((weights | {"encoder.ln.bias": bias}, "") for bias in biases)):
        torch.save(state, root / "odd.pth")
        assert "\n" not in refused(lambda: load_vit("odd.pth", 32), "odd.pth", hint)
    weights["encoder.ln.bias"][3] = math.inf
    torch.save(weights, root / "inf.pth")
    refused(lambda: load_vit("inf.pth", 32), "inf.pth", "norm.bias", "not finite")
    refused(lambda: load_vit("good.pth", 30), "30", "multiple of the patch size 8")
    make_vit(root / "wide.pth", dim=128)
    refused(lambda: load_vit("wide.pth", 32), "width 128", "heads")


def test_broken_bert_folders_are_explained(root):
    bert, path = root / "bert", root / "bert/model.safetensors"
    weights = make_bert(bert)
    (root / "empty").mkdir()
    for name, *hints in ((root / "nowhere", "nowhere", "no such file or folder"), (root / "empty", "config.json"),
                         ("bert-bass", "bert-bass", "hub id")):
        refused(lambda: load_bert(str(name)), *hints)
    refused(lambda: load_vit("vit_b_61"), "vit_b_61", "vit_b_16", "no such file")
    write_safetensors(path, weights)
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:300], b"", b"<html>", b"\xff" * 100,
                    whole.replace(b'"data_offsets": [0, ', b'"data_offsets": [9, ')):
        assert content != whole
        path.write_bytes(content)
        refused(lambda: load_bert(str(bert)), "model.safetensors", "download it again")
    path.write_bytes(whole)
    config = read(bert / "config.json")
    for change, hint in ((dict(model_type="roberta"), "roberta"), (dict(hidden_act="relu"), "relu"),
                         (dict(hidden_size="x"), "not the configuration"), (dict(num_hidden_layers=3), "missing"),
                         (None, "config.json")):
        (bert / "config.json").write_text("{" if change is None else json.dumps(config | change))
        refused(lambda: load_bert(str(bert)), hint)


def test_hub_id_is_downloaded_by_huggingface_hub(root):
    weights, gone = make_bert(root), OSError("404\nand more")
    with mock.patch("huggingface_hub.snapshot_download", side_effect=[str(root), str(root), gone]) as download:
        assert torch.equal(load_bert("someone/small-bert").norm.weight, weights["embeddings.LayerNorm.weight"])
        refused(lambda: load_bert("bert-base-uncased"), "google-bert/bert-base-uncased", "404)", "give a folder")
    first, second, base = download.call_args_list
    assert first.args == second.args == ("someone/small-bert",)
    assert [call.kwargs["allow_patterns"][0] for call in (first, second)] == ["model.safetensors", "pytorch_model.bin"]
    assert (*base.args, base.kwargs["revision"]) == mope.BERT_BASE


def test_plain_vits_of_timm_bring_their_own_statistics(root):
    """They are model.safetensors and config.json, in a folder or on the hub."""
    timm, hub_id = root / "timm", "timm/vit_base_patch16_224.augreg_in21k"
    timm.mkdir()
    vit = ViT(32, 8, 64, 2, 4, 64, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    weights = {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in vit.state_dict().items()}
    write_safetensors(timm / "model.safetensors", weights | {"head.weight": torch.ones(7, 64)})
    config = dict(architecture="vit", pretrained_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3))
    (timm / "config.json").write_text(json.dumps(config))
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(timm)) as download:
        for name in (str(timm), hub_id):
            loaded = load_vit(name, 32)
            assert loaded.mean == loaded.std == (0.5,) * 3
            with torch.no_grad():
                assert torch.equal(loaded(pixels()), vit(pixels()))
    assert [call.args[0] for call in download.call_args_list] == [hub_id]
    said = output(lambda: print(load_vit(f"{timm}/model.safetensors", 32).mean))
    assert "pixels of mean (0.485, 0.456, 0.406) and std" in said, "a bare file: it says what it takes"
    assert said.endswith("\n(0.485, 0.456, 0.406)\n")

    for change in ({"reg_token": torch.ones(1, 4, 64)}, {"cls_token": None},
                   {"blocks.0.attn.q_norm.weight": torch.ones(16)}):
        torch.save({k: v for k, v in {**weights, **change}.items() if v is not None}, root / "other.pth")
        refused(lambda: load_vit(f"{root}/other.pth", 32), "other.pth")
    (timm / "config.json").write_text(json.dumps({**config, "model_args": {"num_heads": 8}}))
    assert load_vit(str(timm), 32).blocks[0].attn.heads == 8
    (timm / "config.json").write_text("[1]")
    refused(lambda: load_vit(str(timm), 32), "config.json")


def test_named_vision_weights_are_checked_by_hash(root):
    """They come from a server, here one on the loopback interface."""
    www, cached = root / "www", root / "hub/checkpoints/vit.pth"
    www.mkdir()
    make_vit(www / "vit.pth")
    shutil.copy(www / "vit.pth", www / "vit2.pth")
    digest = hashlib.sha256((www / "vit.pth").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(www))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, none = f"http://127.0.0.1:{server.server_port}", "0" * 8
        with mock.patch.dict(mope.VISION, good=(f"{url}/vit.pth", digest[:8]), bad=(f"{url}/./vit2.pth", none),
                             gone=(f"{url}/gone.pth", none)):
            assert load_vit("good", 32).source["sha256"] == digest
            refused(lambda: load_vit("bad", 32), "vit2.pth", "hash")
            cached.write_bytes(bytes(64) + cached.read_bytes()[64:])
            refused(lambda: load_vit("good", 32), "vit.pth is damaged", "sha256", "delete it")
            refused(lambda: load_vit("gone", 32), "gone.pth", "404", "put it at")
        server.shutdown()
    assert cached.exists() and not list(cached.parent.glob("vit2*"))


# Data --------------------------------------------------------------------------------------------------


def test_food101_defects(root):
    make_food(root)
    path = root / "texts/train_titles.csv"
    rows = path.read_text().splitlines()
    rows[2] = 'red_2.jpg,"a ""quoted"" title, with &#8211; and &amp;,red'  # and the quote never closes
    rows[3] = rows[3].replace(".jpg", ".txt")
    rows[4] = 'red_4.jpg,"[[""Wrapped""]]",red'
    path.write_text("\r\n".join(rows) + "\r\n")
    splits = data.load("food101", root)
    samples = {s.id: s for name in ("train", "val") for s in splits[name].samples}
    assert len(samples) == 40 and len(splits["val"]) == 4 and splits["train"].classes == ["green", "red"]
    assert samples["red_2.jpg"].text == 'a "quoted" title, with – and &'
    assert samples["green_3.jpg"].image.exists() and samples["red_4.jpg"].text == "Wrapped"
    again = data.load("food101", root, seed=5)
    assert [s.id for s in again["val"].samples] == [s.id for s in splits["val"].samples]
    for content, hints in (("no commas here\n", ["train_titles.csv:1", "no image,title,class"]), ("", ["empty"])):
        path.write_text(content)
        refused(lambda: data.load("food101", root), *hints)
    path.unlink()
    refused(lambda: data.load("food101", root), "train_titles.csv", "Expected", "kaggle", "python train.py")
    refused(lambda: data.load("food101", root / "x"), "x", "images/{train,test}", "python train.py")


def test_missing_images_are_counted_and_limited(root):
    make_food(root, train_count=400, test_count=202)
    (root / "images/train/red/red_0.jpg").unlink()
    (root / "images/test/red/red_0.jpg").unlink()
    splits = data.load("food101", root)
    assert len(splits["train"]) + len(splits["val"]) == 399 and len(splits["test"]) == 202
    assert "1 images do not exist: left out" in splits["train"].notes[0] and "red_0.jpg" in splits["train"].notes[0]
    _, image, _, target, damaged = splits["test"][0, 0]
    assert tuple(image[:, 5, 5].tolist()) == data.GREY and "red_0.jpg" in damaged and target == 1
    for i in (2, 4, 6):  # up to three of any number may be missing; more have to be 1 %
        assert len(data.load("food101", root)["test"]) == 202
        (root / f"images/test/red/red_{i}.jpg").unlink()
    refused(lambda: data.load("food101", root), "4 of 202", "red_2.jpg")
    make_food(root / "food", train_count=60)
    (root / "food/images/train/red/red_0.jpg").unlink()
    splits = data.load("food101", root / "food")
    assert len(splits["train"]) + len(splits["val"]) == 59, "one missing image of sixty is no reason to refuse"


def test_damaged_images_are_counted_and_limited(root):
    argv = arguments(root, "--epochs", "2", "--out", f"{root}/run")
    food = root / "food"
    file = food / "images/test/red/red_0.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    pairs = data.load("food101", food)["test"]
    assert "red_0.jpg" in pairs[0, 0][-1] and not pairs[0, 1][-1]
    names = [str(sample.image) for sample in pairs.samples]
    assert data.check_damaged(2 * names[:3], pairs.samples, "test") == sorted(names[:3]), "three in any case"
    refused(lambda: data.check_damaged(names[:4], pairs.samples, "test"), "4 of 12", "of test", names[0])
    Image.new("RGB", (8, 8)).save(file)
    with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 10):  # a decompression bomb is not an OSError
        assert "red_0.jpg" in pairs[0, 0][-1]
    with mock.patch("data.resize", side_effect=MemoryError):
        refused(lambda: pairs[0, 1], kind=MemoryError)  # no damage
    file.write_bytes(whole)

    # those of validation are not counted towards training
    files = {split: sorted((food / "images" / split).rglob("*.jpg")) for split in ("train", "test")}
    for split, part in (("train", files["test"]), ("val", files["train"]), ("test", files["test"])):
        rows = [json.dumps({"image": str(file), "text": "a thing", "label": file.parent.name}) for file in part]
        (food / f"{split}.jsonl").write_text("\n".join(rows))
    files["train"][0].write_bytes(b"damaged")
    with mock.patch.object(data, "BAD_IN_ANY_CASE", 0):
        with mock.patch.object(data, "MAX_BAD", 0.03):  # one of validation's 40, none of training's 12
            train.main(argv)
        assert read(root / "run/results.json")["damaged_images"] == 1
        refused(lambda: train.main([*argv, "--out", f"{root}/b"]), "1 of 40", "of val", files["train"][0].name)

    # those of training stop at the first step
    for split in ("train", "val", "test"):
        (food / f"{split}.jsonl").unlink()
    for file in files["train"]:
        file.write_bytes(b"damaged")
    with mock.patch("train.evaluate", side_effect=AssertionError("after an epoch")):
        refused(lambda: train.main([*argv, "--out", f"{root}/c"]), "6 of 36", "of train")


def test_every_kind_of_image_becomes_upright_rgb(root):
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    base = Image.fromarray(noise).resize((48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    deep = Image.fromarray(np.asarray(base.convert("L"), np.uint16) * 257)
    kinds = {"rgb.png": base, "grey.png": base.convert("L"), "palette.png": base.convert("P"),
             "alpha.png": base.convert("RGBA"), "cmyk.jpg": base.convert("CMYK"), "la.png": base.convert("LA"),
             "deep.png": deep, "turned.png": base.transpose(Image.Transpose.ROTATE_90),
             "clear.png": Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "float.tiff": Image.new("F", (40, 40))}
    for name, image in kinds.items():
        image.save(root / name, **({"exif": exif} if name == "turned.png" else {}))
    refused(lambda: data.decode(root / "float.tiff", 32), "floating", kind=ValueError)
    *names, clear, _ = kinds
    images = {name: data.decode(root / name, 32) for name in names}
    for name, image in images.items():
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        reference = images["grey.png" if name in ("grey.png", "la.png", "deep.png") else "rgb.png"]
        assert (image.float() - reference.float()).abs().mean() < (40 if name == "palette.png" else 12), name
    assert data.decode(root / clear, 32).min() == 255, "transparent is white"
    form = root / "photo"
    red = Image.new("RGB", (40, 40), "red")
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO"):
        more = dict(save_all=True, append_images=[Image.new("RGB", (40, 40))]) if kind == "MPO" else {}
        red.save(form, kind, **more)
        assert data.decode(form, 32)[0].min() > 240, f"{kind}; of several pictures, the first"


def test_decoding_and_resizing_lose_nothing(root):
    """A large JPEG at a reduced scale gives what full decoding gives, to a rounding; and resizing is Pillow's.

    Random crops leave the global generator alone.
    """
    x, y = np.meshgrid(np.arange(640), np.arange(480))
    image = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.sin(y / 30), (x + y) % 256 / 2], -1)
    Image.fromarray(image.astype(np.uint8)).save(root / "large.jpg", quality=95)
    # evaluation; and training with a crop that starts in the corner, as crops are whole pixels at either scale
    corner = mock.Mock(uniform=lambda low, high: high if high == 1 and low > 0 else 0, random=lambda: 1)
    for rng in (None, corner):
        reduced = data.decode(root / "large.jpg", 112, rng).float()
        with mock.patch("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *args: None):
            full = data.decode(root / "large.jpg", 112, rng).float()
        assert not torch.equal(reduced, full) and (reduced - full).abs().mean() < 1.0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).resize((480, 360))
    for size in (112, 224, 448):
        expected = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert (data.resize(np.array(image), size).int() - expected.int()).abs().max() <= 2

    image.save(root / "a.png")
    before = torch.random.get_rng_state()
    one, two, other = (data.decode(root / "a.png", 32, np.random.default_rng(seed), True) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_depend_on_neither_workers_nor_resume(root):
    """And workers live as long as they are needed."""
    config = vars(train.parse(arguments(root, "--workers", "2")))
    splits = data.load("food101", root / "food")
    pairs, tokenizer = splits["train"], data.load_tokenizer(load_bert(str(root / "bert")), 12)
    run = train.Run(config, root, torch.device("cpu"), torch.float32, None, splits, tokenizer)
    for split in ("train", "val", "test"):
        loader = run.batches(split, 0)
        assert loader.persistent_workers == (split != "test") and run.batches(split, 1) is loader

    loaders = {workers: data.loader(pairs, tokenizer, 32, workers) for workers in (0, 2)}

    def batches(workers: int, epoch: int, start: int = 0, **kwargs) -> list:
        loaders[workers].batch_sampler[:] = data.plan(pairs, 12, 1, epoch, start, **kwargs)
        return list(loaders[workers])

    one, two = batches(0, 3), batches(2, 3)
    assert len(one) == 3 and same(one, two) and not same(one, batches(0, 4))
    assert same(one[2:], batches(0, 3, start=2)) and same(one[1:], batches(2, 3, start=1)), "workers live on"
    assert one[0]["texts"][:, 0].unique().tolist() == [2] and one[0]["texts"].shape[1] <= 12
    assert {row[row != 0][-1].item() for row in one[0]["texts"]} == {3}, "[SEP] survives truncation"

    dealt = [batches(0, 3, rank=r, world=2, accumulate=3) for r in (0, 1)]
    assert [len(d) for d in dealt] == [9, 9] and all(len(b["index"]) == 2 for d in dealt for b in d)
    first = sorted(i for d in dealt for b in d[:3] for i in b["index"].tolist())
    assert first == sorted(one[0]["index"].tolist()), "a step has the same samples however it is dealt out"
    seen = [i for r in (0, 1) for batch in data.plan(splits["test"], 8, rank=r, world=2) for _, i in batch]
    assert sorted(seen) == list(range(12)), "evaluation sees every sample once"
    assert [len(part) for part in data.plan(splits["test"], 8, accumulate=2)] == [4, 4, 2, 2], "and takes less memory"
    refused(lambda: batches(0, 0, world=5), "--batch-size 12", "5")
    refused(lambda: data.plan(pairs, 64), "--batch-size of 36 or less")
    with mock.patch("torch.utils.data.get_worker_info"):  # in a worker: too little memory has to be noticed there
        batch = data.collate(tokenizer, [pairs[0, 0], pairs[0, 1]])
    assert all(batch[name].is_shared() for name in ("index", "images", "texts", "labels"))


def test_evaluation_keeps_no_files_open(root):
    """What a worker sends lies in shared memory, and each tensor of it holds a file open."""
    config = vars(train.parse(arguments(root, "--workers", "1", "--batch-size", "1")))
    cpu, splits = torch.device("cpu"), data.load("food101", root / "food")
    splits["test"].samples *= 20
    model = train.build(config, 2, cpu, torch.float32)
    run = train.Run(config, root, cpu, torch.float32, model, splits, data.load_tokenizer(model.prior, 16))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        assert train.evaluate(run, "test")[0]["samples"] == 240
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_train_size_is_seeded_and_stratified(root):
    """And texts of similar length share a batch."""
    make_food(root)

    def pick(size, seed):
        return [s.id for s in data.load("food101", root, size, seed)["train"].samples]

    for size, count in ((10, 10), (0.5, 18), (1, 1), (1.0, 1)):
        chosen = pick(size, 0)
        assert len(chosen) == count and abs(sum("red" in c for c in chosen) - count / 2) <= 1
    assert pick(10, 0) == pick(10, 0) != pick(10, 1)
    refused(lambda: pick(1000, 0), "--train-size 1000", "36")
    refused(lambda: pick(math.nan, 0), "--train-size nan")

    samples = [data.Sample(str(i), np.zeros((8, 8, 3), np.uint8), "x" * (64 * (i % 10)), "a") for i in range(200)]
    for split, most in (("train", 3), ("test", 1)):
        pairs = data.Pairs(data.JsonLines(root), split, samples, ["a"], False, 0)
        batches = [[i for _, i in batch] for batch in data.plan(pairs, 10)]
        assert sorted(sum(batches, [])) == list(range(200))
        spread = [len({i % 10 for i in batch}) for batch in batches]
        assert sum(spread) / len(spread) <= most, "random batches hold about 6.5 lengths"


def write_rows(root: Path, **labels: list) -> Path:
    """Write {train,val,test}.jsonl on the pictures of `make_food`, a row for each label; ... stands for none."""
    root.mkdir(exist_ok=True)
    for name in ("red", "green"):
        Image.new("RGB", (40, 40), name).save(root / f"{name}.jpg")
    for split, given in labels.items():
        rows = [{"image": ("red.jpg", "green.jpg")[i % 2], "text": f"a photo of thing {i}"}
                | ({} if label is ... else {"label": label}) for i, label in enumerate(given)]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_jsonl_errors_name_file_and_line(root):
    good = '{"image": "a.png", "text": "x", "label": "b"}'
    other, several = good.replace('"b"', '"c"'), good.replace('"b"', '["b", "c"]')
    Image.new("RGB", (8, 8)).save(root / "a.png")

    def load(**files: str | bytes) -> dict:
        for name in ("train", "val", "test"):
            content = files.get(name, "\n".join([good, other] * 3))
            (root / f"{name}.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
        return data.load("jsonl", root)

    assert len(load(train="\ufeff" + good + "\n\n" + other)["train"]) == 2, "a byte order mark and blank lines"
    train_ = load(train=several, val=several, test=several)["train"]
    assert train_.multilabel and train_.classes == ["b", "c"] and train_[0, 0][3].tolist() == [1, 1]
    for content, hint in (
            (good + "\n" + good.encode("utf-16").decode("latin-1"), "train.jsonl:2"), ("[1]", "train.jsonl:1"),
            (good.encode() + b'\n{"text": "\xe9"}', "train.jsonl:2"), (good + "\n{", "train.jsonl:2"),
            (good.replace('"x"', r'"\ud83d"'), "surrogates"), (good.replace('"b"', r'"\ud83d"'), "surrogates"),
            (good.replace("a.png", r"\ud83d.png"), "surrogates"), (good.replace('"b"', "1.5"), "must be strings"),
            (good.replace("a.png", "a" * 999), "missing or cannot be read"), (good.replace('"b"', "null"), "no label"),
            (good + "\n" + several, "one of the")):
        message = refused(lambda: load(train=content), hint)
        assert hint != "surrogates" or len(message) < 500
    refused(lambda: load(val='{"image": "a.png", "label": "b"}'), "val.jsonl:1")
    refused(lambda: load(val=several), "one of the 2 classes")
    refused(lambda: load(test=""), "test split is empty")
    refused(lambda: load(test=good.replace('"b"', '"z"')), "'z'")


def make_grocery(root: Path, numbers: tuple = (0, 1, 2)) -> Path:
    """Write a small folder in the layout of the Grocery Store Dataset: two groups, three products."""
    (root / "dataset").mkdir(parents=True, exist_ok=True)
    rows = ["Class Name,Class ID,Coarse,ID,Image,Description"]
    for name, group, number in zip(("Apple", "Pear", "Milk"), ("Fruit", "Fruit", "Dairy"), numbers):
        (root / f"dataset/{name}.txt").write_text(f"This is {name}. It is good. It is cheap.")
        rows.append(f"{name},{number},{group},0,/{name}.png,/{name}.txt")
    (root / "dataset/classes.csv").write_text("\n".join(rows))
    Image.new("RGB", (8, 8)).save(root / "dataset/a.png")
    for split in ("train", "val", "test"):
        (root / f"dataset/{split}.txt").write_text("a.png, 0, 0\na.png, 1, 0\na.png, 2, 1\n")
    return root


def test_prepared_copy_of_mmimdb_is_read_whole(root):
    (root / "split.json").write_text('{"train": ["1"], "dev": ["1"], "test": ["1"]}')
    Image.new("RGB", (8, 8)).save(root / "1.jpeg")
    for split in ("train", "dev", "test"):
        (root / f"{split}.jsonl").write_text(json.dumps({"image": "1.jpeg", "text": split, "label": ["Drama"]}))
    assert data.load("mmimdb", root)["val"].samples[0].text == "dev"


def test_layout_errors_name_the_file(root):
    (root / "dataset").mkdir()
    (root / "split.json").write_text('{"train": ["1"], "test": ["1"]}')
    Image.new("RGB", (8, 8)).save(root / "dataset/1.jpeg")
    for film in ('{"plot": [], "genres": ["Drama"]}', '{"plot": "x", "genres": ["Drama"]}', "[1]", "{}"):
        (root / "dataset/1.json").write_text(film)
        refused(lambda: data.load("mmimdb", root), "1.json", "lists \"plot\" and \"genres\"")
    (root / "dataset/1.json").write_text('{"plot": ["x"], "genres": ["Drama"]}')
    refused(lambda: data.load("mmimdb", root), "no list of ids for this split", "'dev'", "split.json")
    (root / "flickr30k_images").mkdir()
    (root / "snli_ve_train.jsonl").write_text('{"Flickr30K_ID": 1, "sentence2": 7, "gold_label": "neutral"}')
    refused(lambda: data.load("snli_ve", root), "snli_ve_train.jsonl:1", "must be strings")
    write_rows(root, train="aabb", test="aabb")
    assert [len(split) for split in data.load("jsonl", root).values()] == [3, 1, 4], "one of four is held out"
    write_rows(root, train=[["a"]])
    refused(lambda: data.load("jsonl", root), "a single training sample")

    (root / "dataset/classes.csv").write_text("header\nonly,two")
    (root / "dataset/train.txt").touch()
    refused(lambda: data.load("grocery", root), "classes.csv:2", "only,two", "expected")
    assert data.load("grocery", make_grocery(root / "good"))["train"].classes == ["Apple", "Pear", "Milk"]
    for numbers in ((0, 1, -1), (0, 1, 1), (1, 0, 2), (1, 2, 3)):
        refused(lambda: data.load("grocery", make_grocery(root / "bad", numbers)), "classes.csv:", "number")
    for number in ("-1", "3", "x"):
        (root / "good/dataset/train.txt").write_text(f"a.png, {number}, 0")
        refused(lambda: data.load("grocery", root / "good"), "train.txt:1", "a.png")


def test_shapes_need_both_modalities():
    images, cells = data.make_shapes(300, np.random.default_rng(0))
    assert images.shape == (300, 32, 32, 3) and images.dtype == np.uint8
    there = cells[..., 0] > 0
    assert (there.sum(1) == 3).all() and (cells[~there][:, 1] == 0).all() and (cells[..., 2] == [1, 2, 3, 4]).all()
    for column in (0, 1):  # no two objects of an image share a shape or a colour
        assert all(len(set(row[row > 0])) == 3 for row in cells[..., column])
    tiles = images.reshape(300, 2, 16, 2, 16, 3).swapaxes(2, 3).reshape(300, 4, 256, 3)
    assert ((tiles.max(-1) != tiles.min(-1)).any(-1) == there).all(), "the ground is grey"

    samples, again, test = (data.Shapes(Path()).load_split(name) for name in ("val", "val", "test"))
    answers = {}
    for sample in samples:
        answers.setdefault(sample.text, set()).add(sample.label)
    assert min(map(len, answers.values())) >= 3, "a question alone leaves its answer open"
    assert all(a.text == b.text and (a.image == b.image).all() for a, b in zip(samples, again))
    assert not any((a.image == b.image).all() for a, b in zip(samples, test))


def test_default_run_pretrains_its_encoders_once(root):
    # torch.set_num_threads would outlast this test, and another number of threads rounds differently
    few = mock.patch("data.make_shapes", lambda n, rng, make=data.make_shapes: make(min(n, 512), rng))
    with few, mock.patch.dict(train.PRETRAIN, steps=3, text_steps=3), mock.patch("torch.set_num_threads"):
        with mock.patch.dict(data.Shapes.sizes, train=256, val=64, test=64):
            train.main(["--epochs", "1", "--out", f"{root}/a"])
            encoders = {file: file.read_bytes() for file in root.glob("shapes-encoders-*/**/*") if file.is_file()}
            assert {file.name for file in encoders} == {"vit.pth", "config.json", "pytorch_model.bin", "vocab.txt"}
            with mock.patch("train.fit", side_effect=AssertionError("pretrained again")):
                train.main(["--epochs", "1", "--seed", "1", "--out", f"{root}/b"])
                train.main(["--epochs", "1", "--image-size", "48", "--out", f"{root}/larger"])
            assert all(file.read_bytes() == content for file, content in encoders.items())
    results = read(root / "b/results.json")
    assert results["dataset"] == "shapes" and results["test"]["samples"] == 64
    weights = read(root / "b/best.pt")["trained"]["weights"]
    assert not any(name.startswith(("main.", "prior.")) for name in weights), "the encoders are frozen"


def test_real_layouts():
    counts = {"food101": (2374, 264, 2485, 81), "mmimdb": (996, 149, 398, 23), "snli_ve": (5260, 592, 1800, 3),
              "grocery": (2640, 296, 2485, 81), "grocery_ve": (5280, 592, 4970, 3)}
    for name, (*sizes, classes) in counts.items():
        splits = data.load(name, shared(f"data/{name.removesuffix('_ve') if 'grocery' in name else name}"))
        assert [len(splits[s]) for s in ("train", "val", "test")] == sizes, name
        assert len(splits["train"].classes) == classes
        assert splits["train"].multilabel == (name == "mmimdb")
        drawn = [splits["train"].sample(3, epoch).text for epoch in range(8)]
        assert (len(set(drawn)) > 1) == name.startswith("grocery"), "pairs are drawn anew each epoch"
        assert len({splits["test"].sample(3, epoch).text for epoch in range(8)}) == 1
    assert splits["train"].notes == []


def test_picture_of_the_routing():
    """It needs no new Pillow (before 10.1 there is one font of one size, of Latin-1 only), and tells of the kinds."""
    even, each = torch.full((4, 2), 0.5), torch.eye(2)[[0, 1, 0, 1]]
    for routing, bits in ((even, 0.0), (each, 1.0)):
        names, mean, told, most = data.routing_by_kind(["a", "b", "a", "b"], routing)
        assert names == ["a", "b"] and torch.equal(mean, routing[:2])
        assert abs(told - bits) < 1e-6 and abs(most - 1) < 1e-6
    *_, told, most = data.routing_by_kind(list("abcd"), each)
    assert abs(told - 1) < 1e-6 and abs(most - 1) < 1e-6, "two experts tell one bit of two"

    text, grey = "long " * 40 + "寿司 …", np.zeros((8, 8, 3), np.uint8)
    samples = [data.Sample(f"{'ab'[i % 2]}-{i}", grey, f"{text} {i}", "a") for i in range(6)]
    pairs = data.Pairs(data.Shapes(Path()), "test", samples, ["a", "b"], False, 0)
    pairs.image_size = 8
    routing = torch.eye(4)[[0, 1] * 3][:, None].expand(6, 3, 4)
    whole = data.plot_routing(pairs, routing)
    assert len(whole.getcolors(1 << 24)) > 50
    assert data.plot_routing(pairs, torch.full((6, 3, 200), 1 / 200)).height > 6 * data.TILE, "each is a busy one"
    if not hasattr(PIL.ImageFont, "load_default_imagefont"):
        raise unittest.SkipTest("this Pillow cannot load the old font by name")
    old = PIL.ImageFont.load_default_imagefont()
    with mock.patch("PIL.ImageFont.load_default", lambda: old):  # with a size: TypeError, as before 10.1
        assert data.plot_routing(pairs, routing).size == whole.size


def test_layout_of_ones_own_as_the_docstring_shows(root):
    [example] = re.findall(r"\n( +class Memes.*?)\n\n +Then name it", data.Layout.__doc__, re.S)
    space = {"Layout": data.Layout, "Sample": data.Sample}
    exec(textwrap.dedent(example), space)
    (root / "img").mkdir()
    Image.new("RGB", (8, 8)).save(root / "img/a.png")
    for split in ("train", "val", "test"):
        (root / f"{split}.tsv").write_text("a.png\tfunny\tyes\na.png\tnot\tno\n")
    with mock.patch.dict(data.DATASETS, memes=space["Memes"]):
        splits = data.load("memes", root)
    assert splits["train"].classes == ["no", "yes"] and not splits["test"][0, 1][-1]


# Training ----------------------------------------------------------------------------------------------


def test_metrics_and_learning_rate():
    logits, labels = torch.tensor([[2.0, 1], [0, 1], [3, 0], [0, 5]]), torch.tensor([0, 0, 0, 1])
    result = train.metrics(logits, labels, ["a", "b"])
    assert result["accuracy"] == 0.75 and result["by_class"] == {"a": 0.6667, "b": 1.0}
    chosen = torch.tensor([[1.0, 1, -1], [1, -1, -1], [-1, 1, -1]])
    true = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0]])
    result = train.metrics(chosen, true, ["a", "b", "c"])
    # a: TP 2; b: TP 1, FP 1, FN 1; c: nothing
    assert abs(result["f1_micro"] - 6 / 8) < 1e-6 and abs(result["f1_macro"] - (1 + 0.5 + 0) / 3) < 1e-6
    rates = [train.learning_rate(s, 100, 1.0) for s in range(100)]
    assert max(rates) == 1 and rates.index(1.0) in (4, 5) and rates[0] == 0.2
    assert all(a > b for a, b in zip(rates[5:], rates[6:])) and 0 < rates[-1] < 0.01


def test_run_writes_its_files_and_learns(root):
    out, flags = root / "run", ["--lr", "0.01", "--epochs", "4"]
    trained(root, "run", *flags)
    results, config = read(out / "results.json"), read(out / "config.json")
    assert results["test"]["accuracy"] >= 0.9 and results["epochs"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "caught while training only"
    assert set("dataset seed validation trainable_parameters total_parameters seconds images_per_second "
               "damaged_images".split()) <= results.keys()
    assert config["config"]["lr"] == 0.01 and torch.__version__.startswith(config["versions"]["torch"])
    assert (out / "last.pt").stat().st_size < 12 * results["trainable_parameters"] + 50_000, "AdamW has two a weight"
    header, *lines = (out / "predictions.csv").read_text().splitlines()
    assert header == "id,image,text,label,prediction,probability" and len(lines) == 12
    with Image.open(out / "routing.png") as picture:
        assert picture.width > 200 and len(picture.getcolors(1 << 24)) > 50
    assert not list(out.glob("*.tmp"))

    # the same again is refused, never overwritten
    before = (out / "best.pt").read_bytes()
    refused(lambda: trained(root, "run", *flags), "nothing is written over", f"--resume {out}", "another --out")
    refused(lambda: train.main(["--resume", str(out), "--lr", "0.5"]), "--lr 0.5 contradicts")
    assert (out / "best.pt").read_bytes() == before

    # evaluation and prediction need the checkpoint and the backbones only
    checkpoint = ["--checkpoint", f"{out}/best.pt"]
    assert f'"accuracy": {results["test"]["accuracy"]}' in ended(start(["--eval", *checkpoint]))[0]
    photo = shutil.copy(root / "food/images/test/red/red_0.jpg", root)
    shutil.rmtree(root / "food")
    with mock.patch("train.MoPE.compile", side_effect=AssertionError("a single pair is not worth it")):
        said = output(lambda: train.main(["--predict", photo, "a photo", *checkpoint, "--compile"]))
    assert re.search(r"^[01]\.\d+  red$", said, re.M) and "busiest expert" in said
    refused(lambda: train.main(["--predict", __file__, "x", *checkpoint]), "cannot")


def test_interrupted_or_killed_and_resumed_equals_uninterrupted(root):
    """SIGINT and SIGTERM come at once to a program and its workers: exit code 130, and the same end to the last bit.

    Another gets a real SIGKILL at an instant that nobody chose.
    """
    hook = ("import mope, signal, time; n, old = [], mope.MoPE.forward\n"
            "def forward(*a):\n"
            "    n.append(1)\n"
            "    if {}\n"
            "    return old(*a)\n"
            "mope.MoPE.forward = forward")
    argv = arguments(root)
    signals = "len(n) == 9: [os.killpg(os.getpgrp(), s) for s in (signal.SIGINT, signal.SIGTERM)]"
    stopped = start([*argv, "--workers", "2", "--out", f"{root}/stopped"], hook.format(signals))
    killed = start([*argv, "--out", f"{root}/killed"], hook.format("1: time.sleep(0.05)"))
    while not (root / "killed/log.jsonl").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    ended(killed, -signal.SIGKILL)
    assert not (root / "killed/results.json").exists()
    said, errors = ended(stopped, 130)
    assert f"python train.py --resume {root}/stopped" in said
    assert errors.count("once more to leave at once") == 2 and "Traceback" not in errors
    at = read(root / "stopped/last.pt")["progress"]
    assert at["epoch"] == 1 and 0 < at["step"] < 6, "stopped inside the second epoch"

    train.main([*argv, "--out", f"{root}/whole"])
    for name in ("stopped", "killed"):
        train.main(["--resume", f"{root}/{name}", "--workers", "0"])
        runs = root / "whole", root / name
        for file, key in itertools.product(("last.pt", "best.pt"), ("trained", "optimizer", "progress")):
            assert same(*(read(run / file)[key] for run in runs)), f"{name}/{file}: {key} differs"
        logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
        assert same(*logs) and [line["epoch"] for line in logs[0]] == [1, 2, 3]
        one, two = (read(run / "results.json") for run in runs)
        assert one["test"] == two["test"] and one["validation"] == two["validation"]


def test_signals_stop_in_order_and_the_same_again_at_once(root):
    assert {s.name for s in train.SIGNALS} == {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"}
    run_ = train.Run({}, Path(), torch.device("cpu"), torch.float32)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    before = [signal.getsignal(number) for number in train.SIGNALS]
    try:
        with train.orderly_stop(run_):
            for number in 2 * train.SIGNALS:  # SLURM and torchrun may both deliver one
                os.kill(os.getpid(), number)
            assert run_.stop_signals == 2 * [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            later = time.monotonic() + 3
            with mock.patch("time.monotonic", return_value=later), mock.patch("os._exit") as left:
                os.kill(os.getpid(), signal.SIGTERM)
            left.assert_called_once_with(128 + signal.SIGTERM)
        assert [signal.getsignal(number) for number in train.SIGNALS] == before
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    loss = train.task_loss
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        with mock.patch("train.task_loss", lambda *args: os.kill(os.getpid(), number) or loss(*args)):
            refused(lambda: trained(root, number.name), kind=train.Stopped)
        assert read(root / number.name / "last.pt")["progress"]["step"] == 1, "saved"


def test_numbers_that_are_not_finite_are_refused(root):
    """The loss stops training before the weights change; and neither evaluation nor prediction gives a score."""
    count, models, loss, build = itertools.count(1), [], train.task_loss, train.build
    poisoned = mock.patch("train.task_loss", lambda *args: loss(*args) * (math.nan if next(count) == 3 else 1))
    with poisoned, mock.patch("train.build", lambda *args: models.append(build(*args)) or models[-1]):
        refused(lambda: trained(root), "epoch 1, step 3", "last.pt", "--lr")
    assert all(p.isfinite().all() for p in models[0].parameters())
    assert read(root / "run/last.pt")["progress"]["step"] == 0
    train.main(["--resume", f"{root}/run"])
    assert (root / "run/results.json").exists()

    for experts in ("4", "0"):
        out = trained(root, experts, "--experts", experts)
        state = read(out / "best.pt")
        state["trained"]["weights"]["head.bias"][0] = math.nan
        torch.save(state, out / "nan.pt")
        photo = f"{root}/food/images/test/red/red_0.jpg"
        (root / "rows.jsonl").write_text(json.dumps({"image": photo, "text": "a photo"}))
        for action in (["--eval"], ["--predict", f"{root}/rows.jsonl"], ["--predict", photo, "a photo"]):
            refused(lambda: train.main([*action, "--checkpoint", f"{out}/nan.pt"]), "not finite", "float32")
        assert not (root / "predictions.csv").exists()


def test_parts_of_a_batch_give_the_weights_of_the_whole(root):
    """Micro-batches do, and so do two processes under torchrun, with gloo, which evaluate every sample once.

    They do so without router noise and importance loss, which belong to a micro-batch.
    """
    argv = arguments(root, "--experts", "1", "--epochs", "1")
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                            str(HERE / "train.py"), *argv, "--out", f"{root}/two"], stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train.main([*argv, "--out", f"{root}/one"])
    train.main([*argv, "--out", f"{root}/micro", "--accumulate", "3"])
    ended(two)
    one, *others = (read(root / name / "last.pt")["trained"]["weights"] for name in ("one", "micro", "two"))
    for name, other in itertools.product(one, others):
        assert torch.allclose(one[name], other[name], atol=2e-5), name
    a, b = (read(root / name / "results.json")["test"] for name in ("one", "two"))
    assert a["samples"] == b["samples"] == 12 and a["accuracy"] == b["accuracy"]


def test_half_precisions_train(root):
    """A CPU can take the path of a GPU: frozen matrices in half precision, autocast, the scaler of float16."""
    for precision in ("float16", "bfloat16"):
        if precision == "bfloat16":
            need_bfloat16()
        out = trained(root, precision, "--precision", precision, "--lr", "0.01", "--epochs", "3")
        results, state = read(out / "results.json"), read(out / "last.pt")
        assert results["precision"] == precision and results["test"]["accuracy"] >= 0.9
        assert all(w.dtype == torch.float32 for w in state["trained"]["weights"].values())
        assert bool(state["scaler"]) == (precision == "float16")


def test_compiled_model_meets_few_shapes():
    """Nothing is compiled after the first epoch, whatever the length of texts, as a backend that only counts finds.

    And a batch may hold one sample.
    """
    from torch._dynamo.testing import CompileCounter

    def small() -> MoPE:
        return MoPE(ViT(32, 8, 24, 1, 2, 48), BERT(50, 16, 1, 2, 32, 64), 5)

    counter, model, compiled = CompileCounter(), small(), []
    model.compile(backend=counter)
    for _ in range(2):
        for length in (16, 32, 48, 64):
            model(pixels(), torch.ones(4, length, dtype=torch.long)).logits.sum().backward()
        compiled.append(counter.frame_count)
    assert 0 < compiled[0] == compiled[1] <= 2

    model = small().eval()
    exact = model(pixels(1), words(1)).logits
    model.compile(backend=CompileCounter())
    run = train.Run({"compile": True, "main": "vision"}, Path(), torch.device("cpu"), torch.float32, model)
    with torch.no_grad():
        for n in (4, 1, 3):
            logits = run.forward(dict(images=pixels(n), texts=words(n), labels=torch.zeros(n)))[0]
            assert len(logits) == n and (n > 1 or torch.allclose(logits, exact, atol=1e-5))


def test_defaults_follow_method_data_set_and_machine():
    def settings(*flags: str) -> dict:
        return train.resolve(["--out", "run", *flags])[1]

    mope_, vanilla = settings(), settings("--method", "vanilla")
    assert (vanilla["static"], vanilla["experts"], vanilla["mapped"]) == (4 + 4 + 1, 0, False)
    assert {k for k in mope_ if mope_[k] != vanilla[k]} == {"method", "static", "experts", "mapped"}
    assert settings("--dataset", "food101", "--method", "vanilla")["static"] == 13
    assert settings("--method", "vanilla", "--static", "26")["static"] == 26, "a flag overrides its part"
    tuned = settings("--method", "finetune", "--lr", "0.5")
    assert tuned["finetune"] and tuned["static"] == tuned["prior_prompts"] == 0 and tuned["lr"] == 0.5
    assert settings("--method", "finetune")["lr"] < mope_["lr"]
    for method, main in (("image-only", "vision"), ("text-only", "text")):
        alone = settings("--method", method)
        assert alone["main"] == main and alone["head"] == "main" and not alone["experts"] and not alone["mapped"]

    for cores, processes, workers in ((2, "1", 2), (64, "1", 8), (8, "4", 2), (2, "4", 1)):
        with mock.patch("os.sched_getaffinity", return_value=set(range(cores)), create=True), mock.patch.dict(
                os.environ, LOCAL_WORLD_SIZE=processes):
            assert train.parse(["--dataset", "food101"]).workers == workers
            assert train.parse([]).workers == 0, "the toy needs none"
    for dataset, *wanted in (("food101", "default: 128", "default: data/food101", "default: 0.0015"),
                             ("mmimdb", "default: 256", "default: data/mmimdb"),
                             ("shapes", "default: 0.01", "default: 0.4")):
        said = " ".join(output(lambda: train.parse(["--dataset", dataset, "--help"])).split())
        for word in (*wanted, "several minutes", "torchrun", "exit code 0"):
            assert word in said, f"{word} not in the help of {dataset}: {said}"


def test_every_method_trains(root):
    for method in ("mapped", "late-concat", "finetune", "text-only"):
        said = output(lambda: trained(root, method, "--method", method))
        assert f"results.json, predictions.csv are in {root}/{method}" in said, "without routing.png"
        results = read(root / method / "results.json")
        everything = results["trainable_parameters"] == results["total_parameters"]
        assert everything == (method == "finetune")
    train.main(["--eval", "--checkpoint", f"{root}/finetune/best.pt"])
    weights = read(trained(root, "run", "--main", "text") / "last.pt")["trained"]["weights"]
    assert weights["prompts.static"].shape == (2, 6, 32), "BERT's layers and width"


def test_summarize_makes_a_table(root):
    def finished(name: str, accuracy: float, **config) -> Path:
        (root / name).mkdir()
        defaults = vars(train.parse(["--dataset", "shapes", "--method", config.get("method", "mope")]))
        config = {**{k: v for k, v in defaults.items() if k not in train.ACTIONS}, **config}
        test = {"accuracy": accuracy, "experts_used": [2.0, 4.0], "experts_per_sample": [1.0, 2.0],
                "busiest_expert": [0.5, 0.3]}
        results = dict(seed=config["seed"], test=test, trainable_parameters=1, total_parameters=8)
        (root / name / "config.json").write_text(json.dumps({"config": config}))
        (root / name / "results.json").write_text(json.dumps(results))
        return root / name

    runs = [finished("a", 0.5, seed=0), finished("b", 0.7, seed=1), finished("c", 0.25, experts=2, mapped=False),
            finished("d", 0.1, method="vanilla", main="text")]
    head, _, *rows = [line[2:-2].split(" | ") for line in train.summarize(runs).splitlines()]
    assert head == "method and flags,trainable,test accuracy,experts used,per sample,busiest,seeds".split(",")
    first = "mope | 12.50% | 0.600 ± 0.141 | 3.000 ± 0.000 | 1.500 ± 0.000 | 0.400 ± 0.000 | 0, 1"
    assert rows[0] == first.split(" | ")
    assert rows[1][:3] == ["mope --experts 2 --no-mapped", "12.50%", "0.250"]
    assert rows[2][0] == "vanilla --main text", "what a method sets by itself is not shown"
    mixed = train.summarize([runs[0], finished("e", 0.9, seed=0, precision="bfloat16")])
    assert "| mope --precision bfloat16 |" in mixed and "±" not in mixed, "other precisions are no other seeds"
    other = train.summarize([runs[0], finished("f", 0.9, dataset="jsonl", mapped=True)])
    assert "| mope --dataset shapes |" in other and "| mope --dataset jsonl" in other
    (root / "run.log").write_text("")
    for wrong in ("none", "run.log"):
        refused(lambda: train.summarize([root / wrong]), wrong, "finished run")
    contents = b"", b"{", b"\xff", b"null", b"[]", b"{}", b'"x"', b'{"config": 1}', b'{"test": 1}'
    for name, content in itertools.product(("config.json", "results.json"), contents):
        good = (runs[0] / name).read_bytes()
        (runs[0] / name).write_bytes(content)
        refused(lambda: train.summarize(runs), str(runs[0]))
        (runs[0] / name).write_bytes(good)


def test_benchmark_counts_and_times(root):
    argv = arguments(root)
    make_vit(root / "vit.pth", 384)
    with mock.patch("train.PRODUCT", 64):
        said = output(lambda: train.main(["--benchmark", *argv]))
    for line in (r"loader alone: [\d.]+ images/s", r"training step +[\d.]+ ms .* images/s +\d+% of the product",
                 r"evaluation +[\d.]+ ms +0\.[1-9] GFLOP ", r"batch 6, \d+ tokens of text, cpu"):
        assert re.search(line, said), f"{line} not in {said}"


def test_command_line_errors_are_one_message(root):
    argv = arguments(root)
    (root / "bad.pt").write_bytes(b"x")
    with mock.patch("train.build", side_effect=AssertionError("data come first")):
        refused(lambda: train.main([*argv, "--data-dir", f"{root}/nothing"]), "nothing", "Expected", "python train.py")
    for flags, *hints in ((["--eval"], "--checkpoint"), (["--resume", str(root)], "last.pt", "no such checkpoint"),
                          ([*argv, "--text-length", "100"], "--text-length 100", "40"),
                          (["--benchmark", "--vision", "vit_l_16"], "name a --dataset"),
                          (["--benchmark", "--resume", str(root)], "give one of"),
                          (["--eval", "--checkpoint", f"{root}/bad.pt"], "bad.pt", "not a checkpoint")):
        refused(lambda: train.main(flags), *hints)
    for flags, hint in ((["--epochs", "0"], "--epochs: 0: expected 1 or more"), (["--seed", str(2 ** 63)], "--seed: 9"),
                        (["--accumulate", "0"], "--accumulate: 0")):
        said = output(lambda: train.main([*argv, *flags]))
        assert hint in said and "exit code 2" in said, said

    if not torch.cuda.is_available():
        refused(lambda: train.main([*argv, "--device", "cuda"]), "--device cuda", "--device auto")
    with mock.patch("torch.cuda.is_available", return_value=True), mock.patch(
            "torch.cuda.device_count", return_value=2), mock.patch.dict(os.environ, LOCAL_RANK="2"):
        refused(lambda: train.pick_device("cuda"), "2 GPUs", "--nproc_per_node=2")
    for environment, world, hint in (({"RANK": "0"}, 2, "torchrun"), ({"SLURM_NTASKS": "4"}, 1, "torchrun"),
                                     ({"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}, 2, "MASTER_PORT")):
        with mock.patch.dict(os.environ, environment, clear=True), mock.patch("train.WORLD", world):
            with mock.patch("torch.distributed.init_process_group", side_effect=AssertionError):
                refused(train.start_processes, hint)
    with mock.patch.dict(os.environ, {"RANK": "0", "SLURM_NTASKS": "1"}, clear=True):
        train.start_processes()
        assert not torch.distributed.is_initialized(), "RANK alone makes no group"
    alone = os.environ | {"RANK": "3", "PYTHONPATH": str(HERE)}
    said = subprocess.run([sys.executable, "-c", "import train; print(train.RANK)"], env=alone, capture_output=True)
    assert said.stdout == b"0\n", "a single process writes, whatever RANK says"


def test_errors_of_the_machine_are_one_sentence():
    ours = ((torch.OutOfMemoryError("CUDA out of memory"), "--accumulate"), (MemoryError(), "--batch-size"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--accumulate"),
            (RuntimeError("MPS backend out of memory (...)"), "--accumulate"),
            (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "--shm-size"),
            (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  File ...\n"
                          "RuntimeError: unable to allocate shared memory(shm) for file </t>"), "--shm-size"),
            (OSError(28, "No space left on device", "last.pt"), "last.pt: No space left"))
    numbers = (errno.EIO, errno.EFBIG, errno.ENOENT, errno.EPIPE, errno.EROFS, errno.ESTALE)
    for error, word in (*ours, *((OSError(n, os.strerror(n)), os.strerror(n)) for n in numbers),
                        (RuntimeError("Caught KeyError in DataLoader worker process 0."), "Traceback"),
                        (RuntimeError("out of resource: shared memory, Required: 99"), "Traceback"),  # a GPU's
                        (ZeroDivisionError(), "Traceback")):  # a bug of ours is shown in full
        with mock.patch("train.main", side_effect=error):
            said = output(lambda: print(train.cli()))
        *said, code = said.splitlines()
        assert code == "1" and word in "\n".join(said) and (len(said) == 1 or word == "Traceback"), said


# Every run ends and harms nothing; nothing is wrong in silence; what is good is not refused ------------


def test_every_failure_ends_the_program(root):
    """It does so with two loader workers, and in each of two processes; the reason is told last."""
    argv, fail_in_a_step = arguments(root), "torch.nn.utils.clip_grad_norm_ = lambda *a: 1 / 0"
    refuse_a_fork = ("n, fork = [], os.fork\n"
                     "def refuse():\n"
                     "    n.append(1)\n"
                     "    if len(n) == 2: raise BlockingIOError(11, 'no more processes')\n"
                     "    return fork()\n"
                     "os.fork = refuse")
    both, workers = [*argv, "--out"], [*argv, "--workers", "2", "--out"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        two = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))
    pipe = start([*workers, f"{root}/c"])
    cases = (("division by zero", 1, start([*workers, f"{root}/a"], fail_in_a_step)),
             ("no more processes", 1, start([*workers, f"{root}/b"], refuse_a_fork)),
             ("Broken pipe", 1, pipe), ("--data-dir", 2, start([*argv, "--data-dir", f"{root}/nothing"])),
             ("division by zero", 1, start([*both, f"{root}/d"], fail_in_a_step, RANK="1", LOCAL_RANK="1", **two)),
             ("", None, start([*both, f"{root}/d"], RANK="0", LOCAL_RANK="0", **two)))
    pipe.stdout.readline()
    pipe.stdout.close()  # as with `| head -1`
    pipe.stdout = None
    for reason, code, process in cases:
        _, said = process.communicate(timeout=100)  # workers hold these pipes as well
        assert process.returncode in ((code,) if code else (1, 2)), f"{reason}: {process.returncode} {said}"
        assert reason in said.splitlines()[-1] and (code != 2 or said.startswith("error: ")), said


def test_only_regular_files_are_opened(root):
    """A named pipe would be read for ever, and a device grows without bound."""
    arguments(root)
    make_grocery(write_rows(root, train=["b", "c"], val=["b", "c"], test=["b", "c"]))
    (root / "film/dataset").mkdir(parents=True)
    (root / "film/split.json").write_text('{"train": ["1"], "dev": ["1"], "test": ["1"]}')
    bert, told = load_bert("bert"), []
    Path("bert/tokenizer.json").touch()
    cases = ((lambda: data.decode(Path("red.jpg"), 32), "red.jpg"), (lambda: data.load("jsonl", root), "train.jsonl"),
             (lambda: data.load("food101", root / "food"), "food/texts/train_titles.csv"),
             (lambda: data.load("mmimdb", root / "film"), "film/dataset/1.json", "film/split.json"),
             (lambda: data.load("grocery", root), "dataset/Pear.txt", "dataset/classes.csv"),
             (lambda: data.load_tokenizer(bert, 16), "bert/tokenizer.json", "bert/vocab.txt"),  # one hides the other
             (lambda: load_bert("bert"), "bert/pytorch_model.bin", "bert/config.json"),
             (lambda: load_vit("vit.pth"), "vit.pth"),
             (lambda: train.main(["--eval", "--checkpoint", "best.pt"]), "best.pt"),
             (lambda: data.unlabelled(["rows.jsonl"], ["b", "c"], False), "rows.jsonl"))
    for path, call in ((Path(name), call) for call, *names in cases for name in names):
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            path.unlink(missing_ok=True)
            make(path)
            check = functools.partial(refused, call, "not a regular file", path.name)
            work = threading.Thread(daemon=True, target=lambda: told.append(check()))
            work.start()
            work.join(10)
            assert told and told.pop(), f"{path}: read, or still waiting after 10 s"
        path.unlink()


def test_no_picture_starts_a_program(root):
    """Pillow would hand an EPS, whatever its name, to the Ghostscript that it finds in PATH."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (root / "photo.jpg").write_bytes(eps)
    (root / "gs").write_text(f"#!/bin/sh\ntouch {root}/started\n")
    (root / "gs").chmod(0o755)
    with mock.patch.dict(os.environ, PATH=f"{root}:{os.environ['PATH']}"):
        for gs in ("gs_binary", "gs_windows_binary"):
            if hasattr(PIL.EpsImagePlugin, gs):
                setattr(PIL.EpsImagePlugin, gs, None)  # forget what it found before
        refused(lambda: data.decode(root / "photo.jpg", 32), kind=Exception)
        assert not (root / "started").exists()
        with contextlib.suppress(Exception), Image.open(root / "photo.jpg") as image:
            image.load()
        assert (root / "started").exists(), "this test would notice it"


def test_nothing_is_written_over(root):
    for name in ("config.json", "results.json", "best.pt", "last.pt", "log.jsonl", "predictions.csv", "routing.png"):
        out = root / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("somebody's")
        refused(lambda: trained(root, out.name), name, "nothing is written over", "--out")
        assert (out / name).read_text() == "somebody's" and not (out / "last.pt.tmp").exists()
    refused(lambda: trained(root, "new", "--batch-size", "64"), "fill no batch")
    here = set(os.listdir())
    assert "new" not in here, "the corrected command can be given"
    refused(lambda: train.main(arguments(root, "--out", "")), "--out is empty")
    assert set(os.listdir()) == here, "an empty name is no folder"

    file, before = root / "file", set(root.iterdir())
    train.write(file, "old")
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        refused(lambda: train.write(file, "new"), kind=OSError)
    assert file.read_text() == "old" and set(root.iterdir()) == before | {file}, "a failed write leaves the old file"
    for number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # of a file system that cannot sync
        with mock.patch("os.fsync", side_effect=OSError(number, "cannot sync")):
            train.write(file, str(number))
        assert file.read_text() == str(number)


def test_one_process_trains_in_a_folder(root):
    """The second is refused; one that was killed leaves the folder free, even where a worker of it lives on."""
    holder = ("import os, time\n"
              "def hold(*a):\n"
              "    if os.fork(): print('held', flush=True)\n"
              "    time.sleep(100)\n"
              "torch.nn.utils.clip_grad_norm_ = hold")
    argv, run = arguments(root, "--out", f"{root}/run"), root / "run"
    process = start(argv, holder)
    assert "held\n" in iter(process.stdout.readline, ""), process.stderr.read()
    (run / "config.json").unlink()
    (run / "log.jsonl").unlink()
    (run / "last.pt").rename(root / "last.pt")
    refused(lambda: train.main(argv), "another process", "--out")
    process.kill()
    process.wait()
    (root / "last.pt").rename(run / "last.pt")
    train.main(["--resume", str(run)])


def test_tokenizer_and_encoder_belong_together(root):
    make_bert(root)
    bert = BERT(len(WORDS), 16, 1, 2, 16, 40)
    bert.folder = root
    for text, settings, ids in (
            ("Réd", {}, [2, 8, 3]), ("Réd", {"do_lower_case": False}, [2, 1, 3]),
            ("réd", {"do_lower_case": False, "strip_accents": True}, [2, 8, 3]),
            ("réd", {"strip_accents": False}, [2, 1, 3]), ("中文", {}, [2, 1, 1, 3]),
            ("中文", {"tokenize_chinese_chars": False}, [2, 1, 3])):
        (root / "tokenizer_config.json").write_text(json.dumps(settings))
        assert data.load_tokenizer(bert, 16).encode(text).ids == ids, f"{text}, {settings}"

    for change, hint in (({"pad_id": 1}, "[PAD] is 0, not 1"), ({"folder": root / "none"}, "vocab.txt")):
        with mock.patch.multiple(bert, **change):
            refused(lambda: data.load_tokenizer(bert, 16), hint)
    n = len(WORDS)
    for vocabulary, *hints in (([*WORDS, "surplus"], f"ids go up to {n}", f"{n} embeddings"),
                               ([word.strip("[]") for word in WORDS], str(root), "BERT")):
        (root / "vocab.txt").write_text("\n".join(vocabulary))
        refused(lambda: data.load_tokenizer(bert, 16), *hints)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.save(str(root / "tokenizer.json"))
    refused(lambda: data.load_tokenizer(bert, 16), "does not belong", "[CLS] and [SEP]")


def test_resume_needs_the_data_and_encoders_as_they_were(root):
    run = ["--resume", f"{root}/run"]
    stop_in_the_first_step(arguments(root, "--out", f"{root}/run"))
    titles, config = "food/texts/train_titles.csv", "bert/config.json"
    for name, change in ((titles, lambda text: "\n".join(text.split("\n")[:-1][::-1])),  # another order
                         (titles, lambda text: text.replace("photo", "x", 1)),  # text
                         (titles, lambda text: text.replace("green_1.jpg,", "red_0.jpg,", 1).replace(
                             '1",green', '1",red', 1)),  # label
                         ("food/images/train/red/red_0.jpg", lambda text: text + "\0"),  # size of a picture
                         ("bert/vocab.txt", lambda text: text.replace("red\ngreen", "green\nred")),
                         (config, lambda text: text.replace('heads": 2', 'heads": 4')),
                         (config, lambda text: text.replace("1e-12", "1e-3"))):
        path = root / name
        before = path.read_bytes()
        after = change(before.decode("latin-1")).encode("latin-1")
        assert after != before, name
        path.write_bytes(after)
        with mock.patch("train.loop", side_effect=AssertionError(f"{name}: not noticed")):
            refused(lambda: train.main(run), "but the state was trained with" if name == config else "is not what")
        path.write_bytes(before)

    # nothing trained depends on what a config.json says of other programs, nor on test rows, which damaged pictures may
    # have forced to change
    settings = read(root / config)
    (root / config).write_text(json.dumps({**settings, "transformers_version": "5.0"}))
    titles = root / "food/texts/test_titles.csv"
    titles.write_text(titles.read_text().split("\n", 1)[1])
    assert "the test split is not what" in output(lambda: train.main(run))
    assert read(root / "run/results.json")["test"]["samples"] == 11


def test_validation_that_fails_loses_no_epoch(root):
    with mock.patch("train.evaluate", side_effect=InputError("too many are damaged")):
        refused(lambda: trained(root), "damaged")
    at = read(root / "run/last.pt")["progress"]
    assert at["epoch"] == 0 and at["step"] == len(at["losses"]) == 6
    with mock.patch("train.Run.loss", side_effect=AssertionError("trained twice")):
        train.main(["--resume", f"{root}/run"])
    assert (root / "run/results.json").exists()


def test_odd_metadata_do_no_harm(root):
    def exif(*entries: tuple) -> bytes:
        packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)

    turn = (0x0112, 3, 1, 6)
    odd = exif((0x010F, 2, 99, 99_999), turn, (0x829A, 5, 7, 1 << 31), (0x8769, 4, 1, 77_777))
    chunks = {"long text": [(b"tEXt", b"Comment\0" + b"a" * 1_500_000)], "broken": [(b"eXIf", b"\xff" * 9)],
              "cut": [(b"eXIf", exif(turn)[:13])], "odd": [(b"eXIf", odd)],
              "long zipped text": [(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000))] * 3}
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    base = Image.fromarray(np.stack([4 * x, 3 * y, x + y], -1).astype(np.uint8))
    plain = data.decode(np.array(base), 64)
    base.save(root / "plain.png")
    whole = (root / "plain.png").read_bytes()
    for name, extra in chunks.items():  # behind the header, which ends at byte 33
        packed = [struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
                  for kind, content in extra]
        (root / name).write_bytes(whole[:33] + b"".join(packed) + whole[33:])
    base.save(root / "doubled", "JPEG", quality=95, exif=b"Exif\0\0" * 2 + exif(turn))
    base.save(root / "odd.jpg", "JPEG", quality=95, exif=b"Exif\0\0" + odd)
    for name in (*chunks, "doubled", "odd.jpg"):
        with mock.patch("data.resize", lambda pixels_, size: torch.from_numpy(pixels_).permute(2, 0, 1)):
            image = data.decode(root / name, 64).float()
        expected = plain.rot90(-1, (1, 2)) if name in ("odd", "doubled", "odd.jpg") else plain
        expected = expected[:, 4:60, 4:60].float()
        assert image.shape == expected.shape and (image - expected).abs().mean() < 4, name
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    samples = [data.Sample(str(i), root / "bad.png", "", "a") for i in range(9)]
    damaged = data.Pairs(data.JsonLines(root), "test", samples, ["a", "b"], False, 0)[0, 0][-1]
    assert re.fullmatch(r".*bad\.png: .{5,}", damaged), "the reason stands beside the name"


def test_weights_in_wrappings_are_unwrapped(root):
    """Either file type, old and new names and settings, heads of fine-tuned models, prefixes of training programs."""
    bert, ids = root / "bert", torch.tensor([[2, 5, 6, 8, 3]])
    weights = make_bert(bert)
    expected = load_bert(str(bert))(ids)

    def prefixed(state: dict, prefix: str) -> dict:
        return {prefix + name: tensor for name, tensor in state.items()}

    old = prefixed({k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                    for k, v in weights.items()} | {"embeddings.position_ids": torch.arange(40)}, "bert.")
    tops = {f"{name}.weight": torch.ones(2, 32) for name in ("classifier", "qa_outputs", "cls.seq_relationship",
                                                             "pooler.dense", "lm_head", "dropout")}
    for state in (prefixed(weights, "bert.") | tops, prefixed(weights, "module.bert.") | prefixed(tops, "module."),
                  prefixed(weights, "_orig_mod."), {"state_dict": prefixed(weights, "encoder.")},
                  {"model": {"state_dict": prefixed(weights, "model.")}, "epoch": 3},
                  old | {"cls.predictions.bias": torch.zeros(15)}):
        zipped = "cls.predictions.bias" not in state
        torch.save(state, bert / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        loaded = []
        said = output(lambda: loaded.append(load_bert(str(bert))(ids)))
        assert torch.equal(loaded[0], expected)
        named = ("classifier" in said) == any("classifier" in name for name in state)
        assert named and "took" in said, said
    make_vit(root / "vit.pth")
    vit_weights, seen = read(root / "vit.pth"), load_vit(f"{root}/vit.pth", 32)(pixels())
    for entry, prefix in (("teacher", "backbone."), ("student", "module.vit.")):
        torch.save({entry: prefixed(vit_weights, prefix)}, root / "vit.pth")
        assert torch.equal(load_vit(f"{root}/vit.pth", 32)(pixels()), seen)

    # buffers that nothing needs, of types that a model has no use for; and a config.json as older files have it
    (bert / "pytorch_model.bin").unlink()
    write_safetensors(bert / "model.safetensors", weights)
    assert torch.equal(load_bert(str(bert))(ids), expected)
    write_safetensors(bert / "model.safetensors", weights | {"embeddings.position_ids": torch.arange(40)[None]})
    content = (bert / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for unknown in (b'"I64"', b'"U16"', b'"F8_E4M3"'):
        header = content[8:8 + length].replace(b'"I64"', unknown)
        (bert / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length:])
        assert torch.equal(load_bert(str(bert))(ids), expected), unknown
    config = read(bert / "config.json")
    for key in ("model_type", "layer_norm_eps", "pad_token_id", "hidden_act"):
        config.pop(key)
    (bert / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_bert(str(bert))(ids), expected)


def test_labels_can_be_numbers_or_lacking_or_several(root):
    """Whole numbers are names; test rows without a label get a prediction; names need not fit the terminal.

    Several labels are joined so that they can be parted. Classes are shown, and have to be several.
    """
    rows = root / "rows"
    more = ["--dataset", "jsonl", "--data-dir", "~/rows"]
    for label in ("a", []):
        write_rows(rows, train=[label] * 8, val=[label], test=[label])
        refused(lambda: data.load("jsonl", rows), "classes", "expected two or more")
    write_rows(rows, train=[["a"], []] * 4, val=[["a"]], test=[[]])
    assert data.load("jsonl", rows)["train"].classes == ["a"], "a question of yes or no"

    with mock.patch.dict(os.environ, HOME=str(root)):
        write_rows(rows, train=["a", "a ", "b", "c", "d", "e"] * 2, val=["a"], test=["a"])
        said = output(lambda: stop_in_the_first_step(arguments(root, *more, "--out", f"{root}/many")))
        assert "6 classes: 'a', 'a ', 'b', 'c', 'd', …" in said
        write_rows(rows, train=[0, 1] * 20, val=[0, 1], test=[..., 1, None])
        said, table = output(lambda: trained(root, "run", *more)), read(root / "run/predictions.csv")
        assert "2 classes: '0', '1'" in said and "on 1 labelled samples" in said
        assert [row["label"] for row in table] == ["", "1", ""] and {row["prediction"] for row in table} <= {"0", "1"}
        assert table[0]["image"] == f"{rows}/red.jpg" and table[0]["text"] == "a photo of thing 0"
        write_rows(rows, test=[...])
        assert "no score" in output(lambda: trained(root, "unknown", *more))

        labels = [["a|b", 'c"'], ["a|b"], ['c"'], []]
        write_rows(rows, train=labels * 5, val=labels, test=labels[:2])
        table = read(trained(root, "several", *more) / "predictions.csv")
        assert list(table[0]) == ["id", "image", "text", "label", "prediction", "probability"]
        assert [json.loads(row["label"]) for row in table] == labels[:2]
        for row in table:
            chosen, probability = json.loads(row["prediction"]), json.loads(row["probability"])
            assert len(chosen) == len(probability) and set(chosen) <= {"a|b", 'c"'}
            assert all(p > 0.5 for p in probability) and row["image"].endswith(".jpg")

        write_rows(rows, train=["grün", "rød"] * 20, val=["grün"], test=["rød", "grün"])
        argv = arguments(root, *more, "--epochs", "1", "--out", f"{root}/names")
        assert r"gr\xfcn" in ended(start(argv, PYTHONIOENCODING="ascii"))[0]
        assert not (HERE / "~").exists() and (root / "names/results.json").exists()


def test_checkpoints_of_other_programs_are_told_in_a_sentence(root):
    path, resume = root / "run/last.pt", ["--resume", f"{root}/run"]
    stop_in_the_first_step(arguments(root, "--out", str(path.parent)))
    good = read(path)
    changed = (dict(config=1), dict(config={"lr": 1}), dict(config={**good["config"], "new": 1}),
               dict(trained=None), dict(trained={}), dict(progress=[]), dict(progress={"log": [], "new": 1}),
               dict(classes=None), dict(optimizer={}), dict(digests={}))
    without = [{k: v for k, v in good.items() if k != name} for name in good if name != "versions"]
    for content in (None, 3, [1], {}, {"model": {}}, *without, *({**good, **change} for change in changed)):
        torch.save(content, path)
        with mock.patch("train.loop", side_effect=AssertionError(f"accepted {str(content)[:200]}")):
            assert "\n" not in refused(lambda: train.main(resume))

    torch.save(good, path)
    train.main([*resume, "--precision", "float16"])  # a run may go on in another manner
    assert read(root / "run/config.json")["config"]["precision"] == "float16"
    shutil.copy(trained(root, "other", "--lr", "0.02", "--epochs", "3") / "best.pt", root / "run")
    (root / "run/results.json").unlink()
    refused(lambda: train.main(resume), "best.pt is of another run", "lr")
    assert not (root / "run/results.json").exists()


def test_new_rows_are_scored(root):
    with mock.patch("train.MoPE.compile"):  # of which predicting does without
        checkpoint = ["--checkpoint", f"{trained(root, 'run', '--compile')}/best.pt"]
    new, score = root / "new", ["--predict", f"{root}/new/rows.jsonl", *checkpoint]
    shutil.copytree(root / "food/images/test", new / "pictures")
    names = sorted(str(f.relative_to(new)) for f in new.rglob("*.jpg"))
    rows = [{"image": name, "text": f"a photo of a round thing, {i}"} for i, name in enumerate(names)]
    (new / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main(score)
    table, before = read(new / "predictions.csv"), (new / "predictions.csv").read_bytes()
    assert [row["image"] for row in table] == [f"{new}/{name}" for name in names]
    assert {row["label"] for row in table} == {""} and {row["prediction"] for row in table} <= {"red", "green"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in table)
    refused(lambda: train.main(score), "predictions.csv", "move it")
    assert (new / "predictions.csv").read_bytes() == before

    for inputs_ in ([f"{new}/rows.jsonl"], [f"{new}/{names[0]}", "a photo"]):  # it can go to loader processes
        sent = pickle.loads(pickle.dumps(data.unlabelled(inputs_, ["red"], False)))
        assert len(sent) == (12 if len(inputs_) == 1 else 1)

    (new / "odd.jsonl").write_text('{"image": "a.jpg"}')
    for inputs_, hint in ((["new/odd.jsonl"], "odd.jsonl:1"), (["new/none.jsonl"], "none.jsonl"),
                          (["a", "b", "c"], "--predict takes"), ([names[0], "caf\udce9"], "surrogates")):
        refused(lambda: train.main(["--predict", f"{root}/{inputs_[0]}", *inputs_[1:], *checkpoint]), hint)

    # --eval reads the test split alone, and takes the classes from the checkpoint
    shutil.rmtree(root / "food/images/train")
    (root / "food/texts/train_titles.csv").unlink()
    said = output(lambda: train.main(["--eval", *checkpoint]))
    assert '"samples": 12' in said and "train:" not in said
    titles = root / "food/texts/test_titles.csv"
    titles.write_text(titles.read_text().replace(",green", ",blue"))
    (root / "food/images/test/green").rename(root / "food/images/test/blue")
    refused(lambda: train.main(["--eval", *checkpoint]), "'blue'", "classes")


# Devices that are not here: what a CPU can show --------------------------------------------------------


def test_forward_pass_on_tensors_that_only_claim_to_be_on_a_gpu():
    """Types and devices work out under autocast with held matrices, in training and evaluation, for either modality."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    there = mock.Mock(return_value=True)  # else autocast would switch itself off
    halves, either = (torch.bfloat16, torch.float16), (False, True)
    for dtype, text_is_main, training in itertools.product(halves, either, either):
        model, seen = tiny(), []
        if text_is_main:
            model = MoPE(model.prior, model.main, 5)
        model.cast_frozen(dtype).train(training)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            for module in model.modules():  # as Module.to("cuda") does, which cannot move fake tensors
                for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    claimed = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    is_parameter = isinstance(t, torch.nn.Parameter)
                    setattr(module, name, torch.nn.Parameter(claimed, t.requires_grad) if is_parameter else claimed)
                if isinstance(module, mope.Attention):
                    module.register_forward_hook(lambda module, inputs, output: seen.append(
                        {t.dtype for t in (*inputs[:2], output)}))
            x, y = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.ones(4, 9, dtype=torch.long)
            with mock.patch("torch.cuda.is_available", there), mock.patch("torch.cuda.is_bf16_supported", there):
                autocast = torch.autocast("cuda", dtype)
            with autocast:
                logits, routing, importance = model(*((y, x) if text_is_main else (x, y)))
            assert seen == [{dtype}] * 5, "cast before they are joined"
            loss = train.task_loss(logits, torch.zeros(4, dtype=torch.long)) + importance
            for t in (logits, routing, importance, loss):
                assert t.dtype == torch.float32 and t.device.type == "cuda"
            assert loss.requires_grad


def test_only_pinned_memory_is_copied_without_waiting():
    pairs = data.Pairs(data.JsonLines(Path()), "val", [], ["a", "b"], False, 0)
    for kind, quickly in (("cuda", True), ("mps", False), ("cpu", False)):
        run = train.Run({"compile": False, "main": "vision"}, Path(), torch.device(kind), torch.float32,
                        lambda *inputs: (1, 2, 3))
        batch = {name: mock.Mock() for name in ("images", "texts", "labels")}
        with mock.patch("torch.autocast", mock.MagicMock()):
            run.forward(batch)
        for tensor in batch.values():
            [(_, asked)] = tensor.to.call_args_list
            assert bool(asked.get("non_blocking")) == quickly, kind
        assert data.loader(pairs, None, 32, 0, kind).pin_memory == quickly


def test_fused_attention_is_for_devices_that_read_its_mask():
    """Apple GPUs take the plain formula; "meta" tensors stand for theirs. On a CPU both give the same."""
    q, k, v = (torch.randn(2, 3, 4, 8) for _ in range(3))
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])[:, None, None]
    assert torch.allclose(mope.attend(q, k, v, mask), mope.attend(q, k.clone().requires_grad_(), v, mask), atol=1e-6)
    with mock.patch.object(mope.F, "scaled_dot_product_attention", side_effect=AssertionError("fused")):
        assert mope.attend(*(t.to("meta") for t in (q, k, v, mask))).shape == q.shape
        refused(lambda: mope.attend(q, k, v, mask), "fused", kind=AssertionError)


def test_precision_and_ranks_follow_the_cards(root):
    """Ranks have the checkpoint from the first; each takes the card of its own number; gradients share their memory."""
    gpu = torch.device("cuda", 3)
    for capability, kind in (((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                             ((9, 0), torch.bfloat16)):
        with mock.patch("torch.cuda.get_device_capability", return_value=capability):
            assert train.pick_precision("auto", gpu) == kind and train.pick_precision("float32", gpu) == torch.float32
    for kind in ("cpu", "mps"):
        assert train.pick_precision("auto", torch.device(kind)) == torch.float32

    stop_in_the_first_step(arguments(root, "--out", f"{root}/run"))
    state = train.load_checkpoint(root / "run/last.pt")
    with mock.patch.multiple(train, RANK=1, WORLD=2, from_first=lambda make: state):
        with mock.patch("train.load_checkpoint", side_effect=AssertionError("rank 1 has no such file")):
            assert train.resolve(["--resume", "/elsewhere/run"])[1] == state["config"]
    four = dict(is_available=lambda: True, device_count=lambda: 4, set_device=mock.Mock())
    with mock.patch.multiple(torch.cuda, **four), mock.patch.dict(os.environ, LOCAL_RANK="3"):
        assert train.pick_device("cuda") == gpu
    four["set_device"].assert_called_once_with(gpu)
    with mock.patch("train.WORLD", 2), mock.patch("torch.distributed.new_group") as group:
        for kind in ("cpu", "cuda"):
            run = train.Run({"lr": 1.0, "weight_decay": 0.0}, root, torch.device(kind), torch.float32, tiny())
            with mock.patch("train.DistributedDataParallel", side_effect=InputError("wrapped")) as wrapped:
                refused(lambda: train.train(run, None), "wrapped")
            asked = wrapped.call_args.kwargs
            assert asked["broadcast_buffers"] is False and asked["gradient_as_bucket_view"] is True
        group.assert_called_once_with(backend="nccl", timeout=train.PATIENCE)


# README ------------------------------------------------------------------------------------------------


def test_readme_snippets_run_as_typed(root):
    """Run all Python in the README, top to bottom, with small encoders in place of the two that it names."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    space, original = {}, data.load_tokenizer
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(arguments(root, "--image-size", "224", "--epochs", "1", "--out", "runs/food101"))
        for name in ("apple.jpg", "pears.jpg"):
            shutil.copy(root / "food/images/test/red/red_0.jpg", name)
        small = {"vit_b_16": f"{root}/vit.pth", "bert-base-uncased": f"{root}/bert"}
        with mock.patch("mope.load_vit", lambda name, *sizes: load_vit(small.get(name, name), *sizes)), \
                mock.patch("mope.load_bert", lambda name, *pooling: load_bert(small.get(name, name), *pooling)), \
                mock.patch("data.load_tokenizer", lambda bert, length: original(bert, 16)):
            for block in blocks:
                exec(block, space)
    assert len(blocks) == 4 and "['green', 'red']" in said.getvalue() and (space["model"].main.dim == 64)
    assert space["program"].module()(*(t.repeat(3, *[1] * (t.dim() - 1)) for t in (space["images"], space["texts"]))
                                     ).shape == (6, 2), "any batch size"
    model, frozen = space["model"], {name: p.clone() for name, p in space["model"].main.named_parameters()}
    x, ids = torch.randn(4, 7, 64), torch.randint(5, len(WORDS), (4, 9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(x, ids).logits
    F.cross_entropy(before, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompts.parameters())
    optimizer.step()
    assert not torch.equal(model(x, ids).logits, before), "the prompts steer layers that know nothing of prompts"
    assert all(torch.equal(p, frozen[name]) for name, p in model.main.named_parameters())
    assert model.load_trained_state(model.trained_state()) is model


def test_readme_commands_parse():
    """All parse: every `python train.py FLAGS`, and the `run NAME FLAGS` and `on NAME FLAGS` of the sweeps, where a
    shell variable counts as 1."""
    parsed = 0
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        for command in re.split(r";|&&|\n|\bdo\b", block.replace("\\\n", " ")):
            words_ = shlex.split(command, comments=True) or [""]
            start = words_.index("train.py") + 1 if "train.py" in words_ else {"run": 2, "on": 2}.get(words_[0])
            if start is not None:
                train.parse(["1" if "$" in word else word for word in words_[start:] if word != "$@"])
                parsed += 1
    assert parsed >= 10


# Speed and memory, on an idle machine: MOPE_BENCHMARK=1 python test_mope.py benchmark ------------------


def need_idle_machine() -> None:
    if not os.environ.get("MOPE_BENCHMARK"):
        raise unittest.SkipTest("takes minutes and an idle machine: set MOPE_BENCHMARK=1")


def medians(calls: dict, repeats: int = 7) -> dict[str, float]:
    """Return the seconds that each call takes, measured in turn, the first time not counted."""
    seconds = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(repeats + 1), calls.items()):
        began = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def tell(*words_: object) -> None:
    print(*words_, file=sys.__stdout__)


def step(model: torch.nn.Module, dtype: torch.dtype, images: torch.Tensor, ids: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(model.training):
        out = model(images, ids)
    if model.training:
        (out.logits.float().logsumexp(-1).mean() + out.importance).backward()


class InsertAndDrop(torch.nn.Module):
    """Do it as the papers say, on PyTorch's own layers: insert the prompts and drop their outputs."""

    def __init__(self, dim: int = 768, depth: int = 12):
        super().__init__()

        def layers(norm_first: bool, eps: float) -> torch.nn.ModuleList:
            layer = torch.nn.TransformerEncoderLayer(dim, 12, 4 * dim, 0.0, "gelu", eps, True, norm_first)
            return torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).layers

        self.embed, self.words = torch.nn.Conv2d(3, dim, 16, 16), torch.nn.Embedding(30522, dim)
        self.cls = torch.nn.Parameter(torch.zeros(1, 1, dim))
        self.positions, self.places = (torch.nn.Parameter(torch.randn(1, n, dim) * 0.02) for n in (197, 512))
        self.vision, self.text = layers(True, 1e-6), layers(False, 1e-12)
        self.norm, self.norm_text = torch.nn.LayerNorm(dim, 1e-6), torch.nn.LayerNorm(dim, 1e-12)
        self.requires_grad_(False)
        self.prompts = ConditionalPrompts(depth, dim, dim, 0.05)
        self.head = torch.nn.Linear(2 * dim, 101)

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> mope.Output:
        psi = self.norm_text(self.words(ids) + self.places[:, :ids.shape[1]])
        for layer in self.text:
            psi = layer(psi, src_key_padding_mask=ids == 0)
        psi = psi.mean(1)
        x = self.embed(images.float() / 255).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for layer, own in zip(self.vision, self.prompts(psi.float())[0]):
            x = layer(torch.cat([x, own], 1))[:, :197]
        return mope.Output(self.head(torch.cat([self.norm(x)[:, 0], psi], -1)), None, 0)


def test_benchmark_against_insert_and_drop():
    """Training and evaluation are timed; and training with 64 experts against 1, which takes no longer."""
    need_idle_machine()
    torch.manual_seed(0)
    batch, large = ((pixels(n, 224), torch.randint(1, 30_000, (n, 24))) for n in (8, 32))
    for dtype, training, least in ((torch.float32, True, 1.15), (torch.float32, False, 0), (torch.bfloat16, True, 1.6),
                                   (torch.bfloat16, False, 1.2)):
        if dtype == torch.bfloat16:
            need_bfloat16()
        ours, usual = MoPE(ViT(), BERT(), 101, n_prior_prompts=0).cast_frozen(dtype), InsertAndDrop()
        ours.train(training), usual.train(training)
        t = medians({"ours": lambda: step(ours, dtype, *batch), "usual": lambda: step(usual, dtype, *batch)})
        tell(f"{dtype}, {'training' if training else 'evaluation'}: {8 / t['ours']:.2f} images/s, "
             f"{t['usual'] / t['ours']:.2f} times insert-and-drop")
        assert t["usual"] / t["ours"] >= least
    models = {k: MoPE(ViT(), BERT(), 101, n_prior_prompts=0, n_experts=k).cast_frozen(torch.bfloat16) for k in (1, 64)}
    t = medians({k: lambda k=k: step(models[k], torch.bfloat16, *large) for k in models}, repeats=9)
    tell(f"64 experts against 1, batch 32: {t[64] / t[1]:.3f} times the time")
    assert t[64] / t[1] <= 1.03


def test_benchmark_memory():
    need_idle_machine()
    peak = {}
    for flags in ("--method mope", "--method finetune", "--experts 1", "--experts 64"):
        said, _ = ended(start(["--benchmark", "--device", "cpu", "--batch-size", "8", "--prior-prompts", "0",
                               *flags.split()], OMP_NUM_THREADS=str(torch.get_num_threads())), timeout=900)
        peak[flags] = float(re.search(r"peak memory ([\d.]+) GiB", said)[1])
    tell(f"peak memory of the process at batch 8, GiB: {peak}")
    assert peak["--method mope"] <= 0.55 * peak["--method finetune"]
    assert peak["--experts 64"] <= 1.05 * peak["--experts 1"]


def test_benchmark_loader(root):
    """One core is compared with decoding in full, resizing and cropping apart, and normalising floats on the CPU."""
    need_idle_machine()
    t, bicubic = torchvision.transforms, torchvision.transforms.InterpolationMode.BICUBIC
    floats = [t.ToTensor(), t.Normalize(ViT(8, 8, 8, 1, 1).mean, ViT(8, 8, 8, 1, 1).std)]
    usual = {"training": t.Compose([t.RandomResizedCrop(224, (0.6, 1), interpolation=bicubic),
                                    t.RandomHorizontalFlip(), *floats]),
             "evaluation": t.Compose([t.Resize(256, bicubic), t.CenterCrop(224), *floats])}
    rng = np.random.default_rng(0)  # a picture with as many bytes a pixel as an ordinary photograph: 0.2
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for width in (500, 640, 960, 1280):
        large = np.array(image.resize((width, width * 3 // 4))) + rng.normal(0, 6, (width * 3 // 4, width, 3))
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(root / "a.jpg", quality=85)
        for split, transform in usual.items():
            drawn = np.random.default_rng(0) if split == "training" else None
            s = medians({"ours": lambda: data.decode(root / "a.jpg", 224, drawn, flip=True),
                         "usual": lambda: transform(Image.open(root / "a.jpg").convert("RGB"))}, repeats=50)
            tell(f"{split}, {width} px wide: {1 / s['ours']:.0f} images/s a core, {s['usual'] / s['ours']:.2f} times")
            assert s["usual"] / s["ours"] >= 1.8
    torch.set_num_threads(threads)


if __name__ == "__main__":
    chosen = [(name, test) for name, test in list(globals().items()) if name.startswith("test_") and callable(test)
              and (len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]))]
    passed = failed = 0
    for name, test in chosen:
        began, said = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), folder() as path:
                test(*[path] * test.__code__.co_argcount)
            passed += 1
            print(f"ok    {name}  ({time.perf_counter() - began:.1f} s)", flush=True)
        except unittest.SkipTest as reason:
            print(f"skip  {name}: {reason}", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAIL  {name}\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed or not passed))
