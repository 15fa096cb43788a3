"""Conditional prompt tuning for multimodal fusion, with a mixture of prompt experts (MoPE), in one file.

Paper A, which this file implements: Jiang, Liu, Chen, "Conditional Prompt Tuning for Multimodal Fusion",
arXiv 2312.03734. Paper B is its successor, arXiv 2403.10568. Our sources are the abstracts, public notes on the
papers, and facts from the code published for paper B, not the full texts. Where they do not settle a point, a comment
says "we": the decision is ours.

The idea. Two pretrained Transformers stay frozen. One modality, y ("prior"), is encoded first; its feature psi
then steers the encoder of the other, x ("main"), by a few prompt tokens given to every one of its layers:

    y --> frozen encoder --> psi --+--> router --> mixture of prompt experts --> dynamic prompts --+
                                   +--> small MLP -----------------------------> mapped prompt  ---+--> layers of x
                                        learned, the same for every input -----> static prompts ---+
    x --> frozen encoder, prompted in every layer --> feature --> [feature, psi] --> linear head --> logits

Only prompts, experts, router, MLP and head are trained: 0.74 % of all parameters with ViT-B/16 + BERT-base and 101
classes, where the abstract of paper A says 0.7 %.

Symbols, used in every shape below; those of the prior modality carry a y where both occur, as in D_y:

    B  batch                     L  layers of an encoder, i one of them     P  prompts of a layer, all kinds together
    N  tokens, [CLS] included    D  width of an encoder                     l  prompts of one kind in a layer
    H  attention heads           C  classes                                 k  experts of a layer, j one of them
    S  side of an image          psi [B, D_y]  feature of y                 r_i [B, k]  routing: weights of the experts

Contents: attention and block - ViT - BERT - the three prompts - importance loss - fusion - pretrained weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import urllib.request
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InputError(ValueError):
    """A file, name or setting given from outside is wrong; the message says what to do about it."""


class NoSuchFile(InputError):
    """A server answers that it has no such file."""


# ---------------------------------------------------------------------------------------------------------
# Attention and block


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v for queries q [B, H, Nq, d], keys k and values v [B, H, Nk, d]; d = D/H.

    mask [B, 1, 1, Nk]: True = this key is visible; None = all are.
    """
    if q.device.type != "cpu" or not k.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, mask)

    # On a CPU the fused kernel above is the faster one forward only; with a backward pass the two are alike in float32,
    # and the fused one is slower in bfloat16.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, Nq, Nk]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention whose queries and whose keys and values may come from different sequences.

    `qkv` is never called, its rows are read: a hook on it, or another layer put in its place, has no effect.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # one matrix, rows in the order q, k, v, as checkpoints store it
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries of x [B, Nq, D] over keys and values of context [B, Nk, D] -> [B, Nq, D]."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[:dim], bias[:dim])
        k, v = F.linear(context, weight[dim:], bias[dim:]).chunk(2, dim=-1)

        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D/H]
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, H, Nq, D/H] -> [B, Nq, D]


class Block(nn.Module):
    """A Transformer layer that can be prompted; pre-norm as in ViT, post-norm as in BERT.

    Prompts are only ever attended to. The papers insert them into the sequence and throw their outputs away
    after the layer; so no query, no attention output and no MLP of theirs is ever used, and giving the layer
    their keys and values alone computes the same numbers with less work.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, eps: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, mlp_dim), act=nn.GELU(), fc2=nn.Linear(mlp_dim, dim)))  # exact (erf) GELU

    def forward(self, x: Tensor, prompts: Tensor | None = None, mask: Tensor | None = None,
                queries: int | None = None) -> Tensor:
        """x [B, N, D], prompts [B, P, D], mask [B, 1, 1, N + P] -> [B, N, D].

        With `queries`, only its first so many tokens are computed: a feature read off [CLS] needs no other output
        of the last layer.
        """
        h = self.norm1(x) if self.pre_norm else x
        context = h
        if prompts is not None:
            context = torch.cat([h, self.norm1(prompts) if self.pre_norm else prompts], dim=1)  # [B, N + P, D]
        if queries is not None:
            x, h = x[:, :queries], h[:, :queries]
        x = x + self.attn(h, context, mask)

        if self.pre_norm:
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self.mlp(x))


# ---------------------------------------------------------------------------------------------------------
# The two encoders. Inside, names are those of DINOv2's checkpoints, and of BERT's for what only a BERT has. An encoder
# takes one tensor and optionally prompts [L, B, P, D], knows nothing of where they come from, and returns a feature
# [B, D]. Another encoder can take the place of either: `MoPE` needs dim, depth, prompt_scale and this call.


class Encoder(nn.Module):
    """What ViT and BERT share: a stack of blocks, each with prompts of its own."""

    source: dict | None = None  # name and sha256 of the file that the weights came from; set by the loaders
    prompt_scale: float  # bound of the uniform start of prompts for this encoder

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int, eps: float, pre_norm: bool):
        super().__init__()
        self.dim, self.depth = dim, depth
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, eps, pre_norm) for _ in range(depth))

    def run(self, x: Tensor, prompts: Tensor | None, mask: Tensor | None, queries: int | None) -> Tensor:
        """x [B, N, D] through all blocks -> [B, N or `queries`, D]; mask [B, N], True = a real token, or None."""
        if mask is not None:
            if prompts is not None:
                mask = F.pad(mask, (0, prompts.shape[2]), value=True)  # every token sees every prompt
            mask = mask[:, None, None]  # [B, 1, 1, N + P]

        prompts = [None] * self.depth if prompts is None else prompts.unbind()
        for block, p in zip(self.blocks, prompts, strict=True):  # p [B, P, D]
            x = block(x, p, mask, queries if block is self.blocks[-1] else None)
        return x


class ViT(Encoder):
    """Vision Transformer (arXiv 2010.11929): torchvision's and DINOv2's weights both fit."""

    mean = (0.485, 0.456, 0.406)  # of ImageNet: the statistics of both families
    std = (0.229, 0.224, 0.225)

    def __init__(self, image_size: int = 224, patch_size: int = 16, dim: int = 768, depth: int = 12,
                 heads: int = 12, mlp_dim: int = 3072, eps: float = 1e-6):
        super().__init__(dim, depth, heads, mlp_dim, eps, pre_norm=True)
        if image_size % patch_size:
            raise InputError(f"image size {image_size} is not a multiple of the patch size {patch_size}; "
                             f"try {max(1, round(image_size / patch_size)) * patch_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.prompt_scale = math.sqrt(6 / (3 * patch_size ** 2 + dim))  # the uniform bound of VPT

        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, dim) * 0.02)
        self.norm = nn.LayerNorm(dim, eps)
        self.register_buffer("shift", 255 * torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", 255 * torch.tensor(self.std).view(3, 1, 1), persistent=False)

    def tokens(self, images: Tensor, prompts: Tensor | None = None, queries: int | None = None) -> Tensor:
        """images [B, 3, S, S], uint8, not normalised -> tokens [B, N, D] after the final norm, [CLS] first."""
        if images.is_floating_point() or images.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(f"images are {images.dtype} {list(images.shape)}; expected uint8 pixels of 0 to 255, not "
                             f"normalised, [B, 3, {self.image_size}, {self.image_size}]")
        images = (images - self.shift) / self.scale
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, N - 1, D]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.run(x, prompts, None, queries))

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S] -> feature [B, D], the [CLS] token."""
        return self.tokens(images, prompts, queries=1)[:, 0]


class BERT(Encoder):
    """BERT (arXiv 1810.04805), post-norm, without the pooler, which only next-sentence prediction used."""

    prompt_scale = 0.3  # the bound of the uniform start of prompts for text, from the authors' code for paper B
    folder: Path | None = None  # where the tokenizer lies; set by the loader

    def __init__(self, vocab_size: int = 30522, dim: int = 768, depth: int = 12, heads: int = 12,
                 mlp_dim: int = 3072, max_length: int = 512, type_vocab: int = 2, eps: float = 1e-12,
                 pad_id: int = 0, pooling: str = "mean"):
        super().__init__(dim, depth, heads, mlp_dim, eps, pre_norm=False)
        if pooling not in ("cls", "mean"):
            raise InputError(f"pooling is {pooling!r}; expected 'cls' or 'mean'")
        self.max_length, self.pad_id, self.pooling = max_length, pad_id, pooling
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(max_length, dim)
        self.token_type_embeddings = nn.Embedding(type_vocab, dim)
        self.norm = nn.LayerNorm(dim, eps)
        for embedding in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(embedding.weight, std=0.02)

    def tokens(self, ids: Tensor, prompts: Tensor | None = None, queries: int | None = None) -> Tensor:
        """ids [B, N], padded with pad_id -> last hidden states [B, N, D].

        A text of padding alone gives nan; a tokenizer makes [CLS] and [SEP] of an empty one.
        """
        if ids.shape[1] > self.max_length:
            raise InputError(f"a text of {ids.shape[1]} word pieces; this BERT reads at most {self.max_length}")
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.shape[1]]
        x = self.norm(x + self.token_type_embeddings.weight[0])  # a single text: every token is of type 0
        return self.run(x, prompts, ids != self.pad_id, queries)

    def forward(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """ids [B, N] -> feature [B, D]: the mean over real tokens, or with pooling "cls" the first token.

        The authors' code reads [CLS]. We take the mean: in an encoder trained on masked words, little or nothing
        ever asked [CLS] to summarise the sentence.
        """
        if self.pooling == "cls":
            return self.tokens(ids, prompts, queries=1)[:, 0]
        real = (ids != self.pad_id).unsqueeze(-1)  # [B, N, 1]
        return (self.tokens(ids, prompts) * real).sum(1) / real.sum(1)


# ---------------------------------------------------------------------------------------------------------
# The method: three kinds of prompts, the mixture of prompt experts, the importance loss


def uniform(bound: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class ConditionalPrompts(nn.Module):
    """psi, the feature of the prior modality -> prompts for every layer of the main encoder (paper A).

        static   P_s,i  [l, D]  learned, the same for every input
        dynamic  P_d,i  [l, D]  a mixture of k experts, mixed for this input
        mapped   P_m,i  [1, D]  a two-layer MLP of psi

    Each can be absent: static=0, experts=0 or dynamic=0, mapped=False. No loop runs over layers or experts.
    """

    def __init__(self, layers: int, dim: int, prior_dim: int, bound: float, static: int = 6, experts: int = 16,
                 dynamic: int = 6, mapped: bool = True, hidden: int = 16, temperature: float = 0.1):
        super().__init__()
        self.layers, self.dim, self.temperature = layers, dim, float(temperature)
        self.k = experts if dynamic else 0
        self.static = uniform(bound, layers, static, dim) if static else None
        self.experts = uniform(bound, layers, self.k, dynamic, dim) if self.k else None

        # All routers are one matrix. We start it small: divided by a temperature of 0.1, logits of ordinary
        # size would saturate the softmax at once. (On the toy of the README a start of 1 did as well.)
        self.router = nn.Linear(prior_dim, layers * self.k, bias=False) if self.k > 1 else None
        if self.router is not None:
            nn.init.normal_(self.router.weight, std=0.02)

        # Our sources give no width of the mapper. 16 makes 0.74 % trainable in all, with ViT-B/16 + BERT-base
        # and 101 classes.
        self.mapper = nn.Sequential(
            nn.Linear(prior_dim, hidden), nn.GELU(), nn.Linear(hidden, layers * dim)) if mapped else None

    def route(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """r_i = softmax(W_r,i psi / tau + noise) of a normalised psi: to mix with, and free of noise, both [B, L, k].

        tau is the temperature.
        """
        if self.router is None:
            return (psi.new_ones(psi.shape[0], self.layers, 1),) * 2
        logits = self.router(psi).view(-1, self.layers, self.k) / self.temperature
        # Noise while training only. Of its size we know only the 1/k² of the code for paper B. (On the
        # toy of the README none did as well.)
        noise = torch.randn_like(logits) / self.k ** 2 if self.training else 0
        return (logits + noise).softmax(-1), logits.softmax(-1)

    def forward(self, psi: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """psi [B, D_y] -> prompts [L, B, P, D] and the noise-free routing [B, L, k]; None where absent."""
        psi = F.layer_norm(psi, psi.shape[-1:])  # we: encoders differ in scale, router and MLP should not
        prompts, routing = [], None
        if self.static is not None:
            prompts.append(self.static.unsqueeze(1).expand(-1, psi.shape[0], -1, -1))  # [L, B, l, D]
        if self.experts is not None:
            mix, routing = self.route(psi)
            # P_d,i = sum_j r_i,j E_i,j, where E_i,j [l, D] is expert j: a dense mixture, every expert weighted
            prompts.append(torch.einsum("BLk,LklD->LBlD", mix, self.experts))
        if self.mapper is not None:
            prompts.append(self.mapper(psi).view(-1, self.layers, 1, self.dim).transpose(0, 1))  # [L, B, 1, D]
        return (torch.cat(prompts, dim=2) if prompts else None), routing


def importance_loss(routing: Tensor, threshold: float = 0.05) -> Tensor:
    """Mean over layers of CV(Imp)², Imp(j) = sum over the batch of r_j; routing [B, L, k], free of noise.

    0 when all experts are used equally, k - 1 when one takes everything. In a layer whose CV² is below the
    threshold the gradient stops: the router may specialise as long as it does not degenerate. The sources
    disagree on the threshold (0.05 or 0.1) and on CV or CV²; we take CV² < 0.05, layer by layer, with the
    population standard deviation. The batch is that of this process and of this forward pass.
    """
    importance = routing.float().sum(0)  # [L, k]
    cv2 = importance.var(-1, unbiased=False) / importance.mean(-1) ** 2  # [L]
    return torch.where(cv2 < threshold, cv2.detach(), cv2).mean()


def effective_experts(routing: Tensor) -> Tensor:
    """exp(entropy of the mean routing), a layer each: k = all used alike, 1 = degenerated. [B, L, k] -> [L]."""
    return torch.special.entr(routing.float().mean(0)).sum(-1).exp()


# ---------------------------------------------------------------------------------------------------------
# Fusion


class Output(NamedTuple):
    logits: Tensor  # [B, C]
    routing: Tensor | None  # [B, L, k], free of noise; None without experts
    importance: Tensor  # scalar, to be added to the task's loss with a weight; 0 without a router


class MoPE(nn.Module):
    """Encode the prior modality, prompt the frozen main encoder with it, classify both features.

        model = MoPE(load_vit("vit_b_16"), load_bert("bert-base-uncased"), num_classes=101)  # text -> vision
        logits, routing, importance = model(images, input_ids)

    Swap the encoders, and the inputs, for vision -> text. `prior_prompts` are ordinary learned prompts for the
    prior encoder, as in the authors' code; with 0 of them nothing in it needs a gradient. The head sees both features
    (`head="both"`; we: the authors' code uses the main one only) or "main" alone, which without router and mapper
    is a model of one modality. `finetune=True` trains the encoders too, for comparison. The rest goes to
    `ConditionalPrompts`. Weights stay in float32: for speed, `hold_frozen` and autocast.
    """

    def __init__(self, main: nn.Module, prior: nn.Module, num_classes: int, prior_prompts: int = 4,
                 head: str = "both", finetune: bool = False, **prompt_sizes):
        super().__init__()
        if head not in ("both", "main"):
            raise InputError(f"head is {head!r}; expected 'both' or 'main'")
        self.main, self.prior, self.finetune = main, prior, finetune
        self.prompts = ConditionalPrompts(main.depth, main.dim, prior.dim, main.prompt_scale, **prompt_sizes)
        self.prior_prompts = uniform(
            prior.prompt_scale, prior.depth, prior_prompts, prior.dim) if prior_prompts else None
        self.head_sees_psi = head == "both"
        self.head = nn.Linear(main.dim + prior.dim * self.head_sees_psi, num_classes)
        self.one_modality = not self.head_sees_psi and self.prompts.router is None and self.prompts.mapper is None
        if self.one_modality and prior_prompts:
            raise InputError("nothing of the prior modality reaches the head; set prior_prompts to 0")

        # Frozen by module, never by the names of parameters.
        for encoder in (main, prior):
            encoder.requires_grad_(encoder not in self.frozen())
            if encoder not in self.frozen():
                encoder.source = None  # it will not be what its file holds
        self.train()

    def frozen(self) -> list[nn.Module]:
        """The encoders that are not trained; with `finetune`, the prior one if it is not used."""
        return [self.main, self.prior] if not self.finetune else [self.prior] if self.one_modality else []

    def train(self, mode: bool = True) -> MoPE:
        """As usual, but frozen encoders stay in evaluation mode."""
        super().train(mode)
        for encoder in self.frozen():
            encoder.eval()
        return self

    def hold_frozen(self, dtype: torch.dtype) -> MoPE:
        """Keep the frozen matrices in `dtype` instead of casting them in every step; then run under autocast."""
        for module in (*self.main.modules(), *self.prior.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not any(p.requires_grad for p in module.parameters()):
                module.to(dtype)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Output:
        """x: batch of the main modality, y: of the prior one; images [B, 3, S, S] uint8 or ids [B, N]."""
        if self.one_modality:
            psi = self.head.weight.new_zeros(x.shape[0], self.prior.dim)
        else:
            p = self.prior_prompts  # [L_y, l, D_y], the same for the whole batch
            psi = self.prior(y, None if p is None else p.unsqueeze(1).expand(-1, y.shape[0], -1, -1))  # [B, D_y]
        with torch.autocast(psi.device.type, enabled=False):  # router and prompts in the precision of their weights
            prompts, routing = self.prompts(psi.to(self.head.weight.dtype))
        feature = self.main(x, prompts)  # [B, D]
        logits = self.head(torch.cat([feature, psi], dim=-1) if self.head_sees_psi else feature)

        no_router = self.prompts.router is None
        importance = logits.new_zeros((), dtype=torch.float32) if no_router else importance_loss(routing)
        return Output(logits.float(), routing, importance)

    def trained_state(self) -> dict:
        """What was trained, as plain data for `torch.save`, and which backbone files and settings it belongs to."""
        weights = {name: t.detach().cpu().clone() for name, t in self.own().items()}
        return {"weights": weights, "belongs_to": self.belongs_to()}

    def own(self) -> dict[str, Tensor]:
        """All tensors but those of frozen encoders, whether or not they require a gradient just now."""
        frozen = {id(t) for encoder in self.frozen() for t in encoder.state_dict(keep_vars=True).values()
                  if not t.requires_grad}
        return {name: t for name, t in self.state_dict(keep_vars=True).items() if id(t) not in frozen}

    def belongs_to(self) -> dict:
        """What weights of the right names and shapes could still be wrong for; None = not known, which fits all."""
        facts = {"temperature": self.prompts.temperature}
        for part, encoder in (("main", self.main), ("prior", self.prior)):
            facts |= {f"{part} {fact}": value for fact, value in (getattr(encoder, "source", None) or {}).items()}
            facts |= {f"{part} {fact}": getattr(encoder, fact, None) for fact in ("pooling", "image_size")}
        return facts

    def load_trained_state(self, state: dict) -> MoPE:
        """The reverse; the mode stays: call `eval()` to predict. Raises InputError for other backbones or settings,
        and for weights missing, unexpected or misshapen."""
        if not {"weights", "belongs_to"} <= state.keys():
            raise InputError(f"a trained state holds weights and belongs_to, but this has {sorted(state)[:5]}")
        have = self.belongs_to()
        for fact, want in state["belongs_to"].items():
            if None not in (want, have.get(fact)) and want != have[fact] and not fact.endswith("name"):
                raise InputError(f"{fact} is {have[fact]}, but what was trained belongs to: {state['belongs_to']}")
        own = self.own()
        check_total(own, state["weights"], "the trained state")
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(state["weights"][name])
        return self

    def report(self) -> str:
        """A table: total, frozen and trainable parameters by part."""
        p = self.prompts
        parts = {"main encoder": self.main, "prior encoder": self.prior, "prior prompts": self.prior_prompts,
                 "static prompts": p.static, "experts": p.experts, "router": p.router, "mapper": p.mapper,
                 "head": self.head, "all": self}
        lines = [f"{'parameters':<16}{'total':>14}{'frozen':>14}{'trainable':>14}"]
        for name, part in parts.items():
            total, trained = count(part)
            lines.append(f"{name:<16}{total:>14,}{total - trained:>14,}{trained:>14,}")
        return "\n".join(lines) + f"  = {trained / total:.2%}"


def count(part: nn.Module | Tensor | None) -> tuple[int, int]:
    """Parameters of a part, and how many of them are trained."""
    tensors = [] if part is None else [part] if isinstance(part, Tensor) else list(part.parameters())
    return sum(t.numel() for t in tensors), sum(t.numel() for t in tensors if t.requires_grad)


# ---------------------------------------------------------------------------------------------------------
# Pretrained weights. A path wins, then the cache (torch's hub folder), then a download, checked by its hash where that
# is known, else by its length.

TORCHVISION, DINOV2 = "https://download.pytorch.org/models/", "https://dl.fbaipublicfiles.com/dinov2/"
VISION = {  # name -> url, first digits of the sha256
    "vit_b_16": (TORCHVISION + "vit_b_16-c867db91.pth", "c867db91"),
    "vit_b_32": (TORCHVISION + "vit_b_32-d86f8d99.pth", "d86f8d99"),
    "vit_l_16": (TORCHVISION + "vit_l_16-852ce7e3.pth", "852ce7e3"),
    "dinov2_vits14": (DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth",
                      "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": (DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
                      "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
}
BERT_BASE, BERT_BASE_REVISION = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"
BERT_BASE_HASHES = {
    "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "tokenizer.json": "ce64fce797c24f68df90b40a3f74f579b336a493db14bd583fd520ea0d8c9a98",
}


def load_vit(name: str, image_size: int = 224) -> ViT:
    """A ViT in float32 from a name of `VISION` or a file in torchvision's or DINOv2's format, made for images that
    are normalised with ImageNet's statistics. Raises InputError.

    Sizes are read off the tensors, but for the number of heads, which follows from the width in the public ones.
    """
    path = find_vit(name)
    weights = rename_vit(read_weights(path), path)
    try:
        dim, _, patch_size, _ = weights["patch_embed.weight"].shape
        mlp_dim = len(weights["blocks.0.mlp.fc1.weight"])
        positions = weights["pos_embed"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a ViT of torchvision or DINOv2 ({error!r})") from None
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        raise InputError(f"{path}: {positions.shape[1]} positions; expected [CLS] and a square of patches")
    heads = {64: 4, 384: 6, 768: 12, 1024: 16}  # 64: a toy
    if dim not in heads:
        raise InputError(f"{path}: a ViT of width {dim}; heads are known for the widths {list(heads)}")

    vit = ViT(image_size, patch_size, dim, count_blocks(weights), heads[dim], mlp_dim)
    weights["pos_embed"] = resize_positions(positions, image_size // patch_size)
    return fill(vit, weights, path, name)


def load_bert(name: str, pooling: str = "mean") -> BERT:
    """A BERT in float32 from a folder (config.json, weights, tokenizer) or a hub id. Raises InputError."""
    folder = find_bert(name)
    path = next((folder / f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).exists()), None)
    if path is None or not (folder / "config.json").exists():
        raise InputError(f"{folder}: no {'config.json' if path else 'model.safetensors or pytorch_model.bin'} in "
                         "it; expected config.json, the weights and tokenizer.json or vocab.txt of a BERT")
    try:
        c = json.loads((folder / "config.json").read_text("utf-8"))
        kind = c["model_type"], c["hidden_act"], c.get("position_embedding_type", "absolute")
        bert = BERT(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                    c["intermediate_size"], c["max_position_embeddings"], c["type_vocab_size"],
                    eps=c["layer_norm_eps"], pad_id=c.get("pad_token_id") or 0, pooling=pooling)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: not the configuration of a BERT ({error!r})") from None
    if kind != ("bert", "gelu", "absolute"):
        raise InputError(f"{folder / 'config.json'}: {kind}; only ('bert', 'gelu', 'absolute') is implemented")

    bert.folder = folder
    return fill(bert, rename_bert(read_weights(path)), path, name)


def rename_vit(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """torchvision's or DINOv2's names -> ours; DINOv2's LayerScale becomes part of the projections."""
    if "class_token" in weights:  # torchvision
        table = {r"^class_token": "cls_token", r"^conv_proj": "patch_embed", r"^encoder\.pos_embedding": "pos_embed",
                 r"^encoder\.layers\.encoder_layer_": "blocks.", r"^encoder\.ln\.": "norm.", r"\.ln_": ".norm",
                 r"self_attention\.in_proj_": "attn.qkv.", r"self_attention\.out_proj": "attn.proj",
                 r"mlp\.(linear_1|0)\.": "mlp.fc1.", r"mlp\.(linear_2|3)\.": "mlp.fc2."}
        return rename(weights, table, unused=r"heads\.")

    weights = rename(weights, {r"^patch_embed\.proj": "patch_embed"}, unused="mask_token|head")
    # LayerScale multiplies the output channels of a branch, so scaling the last matrix's rows does the same.
    for i in range(count_blocks(weights)):
        for scale, last in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = weights.pop(f"blocks.{i}.{scale}", None)
            for name in (f"blocks.{i}.{last}.weight", f"blocks.{i}.{last}.bias"):
                if gamma is not None and name in weights:
                    weights[name] = torch.einsum("o...,o->o...", weights[name], gamma)
    return weights


def rename_bert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's names, old or new, with or without the prefix -> ours; query, key and value become one matrix."""
    table = {r"^bert\.": "", r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias",
             r"^embeddings\.LayerNorm": "norm", r"^embeddings\.": "", r"^encoder\.layer\.": "blocks.",
             r"attention\.output\.dense": "attn.proj", r"attention\.output\.LayerNorm": "norm1",
             r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2", r"output\.LayerNorm": "norm2"}
    weights = rename(weights, table, unused=r"(bert\.)?(pooler|embeddings\.position_ids)|cls\.")
    for i in range(count_blocks(weights)):
        for kind in ("weight", "bias"):
            names = [f"blocks.{i}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            if all(name in weights for name in names):
                weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([weights.pop(name) for name in names])
    return weights


def rename(weights: dict[str, Tensor], table: dict[str, str], unused: str) -> dict[str, Tensor]:
    """Apply the regular expressions of a table in order to all names; drop what the encoder has no use for."""
    renamed = {}
    for name, tensor in weights.items():
        if not re.match(unused, name):
            for pattern, replacement in table.items():
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor.float()
    return renamed


def count_blocks(weights: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + n², D] of an n×n grid of patches -> [1, 1 + side², D].

    Bicubic with antialias, as timm does. DINOv2's own code uses no antialias and an offset of 0.1: the two
    differ, and a feature made with one is not quite the feature made with the other.
    """
    n = math.isqrt(positions.shape[1] - 1)
    if n == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def check_total(own: dict[str, Tensor], given: dict[str, Tensor], origin: str | Path) -> None:
    """Raise InputError unless names and shapes are equal: nothing missing, nothing left over."""
    shapes = [name for name in own if name in given and own[name].shape != given[name].shape]
    problems = {"missing": own.keys() - given.keys(), "unexpected": given.keys() - own.keys(), "misshapen": shapes}
    found = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
             for what, names in problems.items() if names]
    if found:
        raise InputError(f"{origin}: {'; '.join(found)} of {len(own)} tensors; this is not the model it is read as")


def fill(encoder: Encoder, weights: dict[str, Tensor], path: Path, name: str) -> Encoder:
    """Load all weights or none, note where they came from, say so in a line."""
    check_total(encoder.state_dict(), weights, path)
    encoder.load_state_dict(weights)
    encoder.source = {"name": str(name), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    print(f"loaded {len(weights)} tensors, {count(encoder)[0]:,} parameters, from {path}", file=sys.stderr)
    return encoder.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, which is opened with weights_only=True."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(weights, dict) and all(isinstance(t, Tensor) for t in weights.values()):
            return weights
        wrong = "it holds something else than named tensors"
    except Exception as error:  # what torch.load and json raise for a damaged file is of many types
        with path.open("rb") as file:
            start = file.read(200).lstrip()
        if not start:
            wrong = "it is empty"
        elif start.startswith(b"<"):
            wrong = "it is a web page, not the file that the page links to"
        elif start.startswith(b"version https://git-lfs"):
            wrong = "it is a git-LFS pointer (run `git lfs pull`)"
        else:
            wrong = f"it is cut short or of another format ({(str(error) or repr(error)).splitlines()[0][:100]})"
    raise InputError(f"{path}: not a file of weights: {wrong}; give the file of the release, or download it again")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """u64 little-endian n; n bytes of JSON {name: {dtype, shape, data_offsets}}; the data, where offsets start at 0."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    data = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")  # where the data begin
    header = json.loads(data[8:first])
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        (start, end), dtype, count = t["data_offsets"], dtypes[t["dtype"]], math.prod(t["shape"])
        if not 0 <= start <= end <= len(data) - first or end - start != count * dtype.itemsize:
            raise ValueError(f"the data of {name} lie outside the file")
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=first + start).view(t["shape"])
    return tensors


def cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_vit(name: str) -> Path:
    """The file of a vision encoder: a path, or a name of `VISION` in the cache, or downloaded there."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name not in VISION:
        raise InputError(f"vision encoder {name!r}: no such file, nor one of the names {', '.join(VISION)}")
    url, sha256 = VISION[name]
    return download(url, cache_folder() / url.rsplit("/", 1)[1], sha256)


def find_bert(name: str) -> Path:
    """The folder of a text encoder: a path, or a hub id in the cache, or downloaded there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repo = BERT_BASE if name == "bert-base-uncased" else str(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        raise InputError(f"text encoder {name!r}: no such folder, nor a hub id (owner/name) or bert-base-uncased")
    revision, hashes = (BERT_BASE_REVISION, BERT_BASE_HASHES) if repo == BERT_BASE else ("main", {})
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url, folder = f"{endpoint}/{repo}/resolve/{revision}", cache_folder() / repo.replace("/", "--")

    for choice in (["config.json"], ["model.safetensors", "pytorch_model.bin"], ["tokenizer.json", "vocab.txt"]):
        if any((folder / file).exists() for file in choice):
            continue
        for file in choice:
            try:
                if file == "vocab.txt":  # alone, it does not say whether letters are lowered
                    with contextlib.suppress(NoSuchFile):
                        download(f"{url}/tokenizer_config.json", folder / "tokenizer_config.json")
                download(f"{url}/{file}", folder / file, hashes.get(file, ""))
                break
            except NoSuchFile:  # try the other format
                if file == choice[-1]:
                    raise
            except InputError as error:
                raise InputError(f"{error}; it needs config.json, model.safetensors and tokenizer.json there") from None
    return folder


def download(url: str, path: Path, sha256: str = "") -> Path:
    """Fetch url to path unless it is there: complete and, where its hash is known, checked; or not at all."""
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # other processes may want it too
    print(f"downloading {url} to {path}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as reply:
            length = reply.headers["Content-Length"]
        torch.hub.download_url_to_file(url, str(partial), sha256 or None, progress=sys.stderr.isatty())
        if length and partial.stat().st_size != int(length):
            raise OSError(f"{partial.stat().st_size:,} of {int(length):,} bytes arrived")
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        # URLError and HTTPError are OSErrors; a wrong hash is a RuntimeError, an unknown kind of address a ValueError
        partial.unlink(missing_ok=True)
        if getattr(error, "code", None) in (401, 403, 404):  # hubs answer 401 to a name that they do not know
            raise NoSuchFile(f"{url} does not exist, or not for everybody ({error}); check the name") from None
        raise InputError(f"could not download {url} ({error}); without a network, put that file at {path}") from None
    return path
