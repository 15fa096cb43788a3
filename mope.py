"""Conditional prompt tuning for multimodal fusion, with a mixture of prompt experts (MoPE), in one file.

This file implements paper A: Jiang, Liu, Chen, "Conditional Prompt Tuning for Multimodal Fusion", arXiv 2312.03734.
Paper B is its successor, arXiv 2403.10568. We could read the abstracts, public notes on the papers, and facts about
the code published for paper B, but not the full texts. "Our choice" marks what they leave open.

The idea. Two pretrained Transformers stay frozen. One modality, y (the "prior" one), is encoded first. Then every
layer of the encoder of the other modality, x (the "main" one), gets a few prompts, most of them made from psi, the
feature of y. The tokens of x attend to them, so what is seen of x depends on y:

    y --> frozen encoder --> psi --> normalise --+--> router --> mixture of experts --> dynamic prompts --+
               ^              |                  +--> small MLP ----------------------> mapped prompt  ---+
         prior prompts        |                       learned ------------------------> static prompts ---+
                              v                                                                           v
      logits <--- linear head <--- feature of x <---- frozen encoder, prompted in every layer <----- all prompts
                                                                    ^
                                                                    x
    shapes:  psi [B, D_y]  -->  each kind of prompts [L, B, l, D]  -->  all prompts [L, B, P, D]

What is trained, with ViT-B/16 + BERT-base, 101 classes and the defaults: 4 prior prompts a layer (36,864 numbers), 6
static prompts a layer (55,296), 16 experts of 6 prompts a layer (884,736), the routers (147,456), the MLP (168,976) and
the head (155,237), in all 1,448,565 numbers or 0.74 % of all parameters; the abstract of paper A says 0.7 %.

Symbols, used in every shape below. An index y, as in D_y, marks the prior modality.

    B  batch                     L  layers of an encoder, i one of them     P  prompts of a layer, all kinds together
    N  tokens, [CLS] included    D  width of an encoder                     l  prompts of one kind in a layer
    H  attention heads           C  classes                                 k  experts of a layer, j one of them
    S  side of an image          psi [B, D_y]  feature of y                 r_i [B, k]  routing: weights of the experts
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InputError(ValueError):
    """A file, name or setting given from outside is wrong; the message says what to do about it."""


# The method: three kinds of prompts, the mixture of prompt experts, the importance loss ----------------


ROUTER_SPEED = 16  # how fast routers learn: our choice, explained where they are made


class ConditionalPrompts(nn.Module):
    """Turn psi, the feature of the prior modality, into prompts for every layer of the main encoder (paper A).

        static   [l, D] a layer  global-level: learned, the same for every input
        dynamic  [l, D] a layer  instance-level: a mixture of k learned experts, weighted for this input by a router
        mapped   [1, D] a layer  instance-level: made from psi by a two-layer MLP

    Each kind can be left out: n_static=0, n_experts=0 or n_dynamic=0, mapped=False. A single expert (k = 1) needs no
    router: it is always on. Here L is `layers`, D `dim`, D_y `prior_dim`, k `n_experts`, and l `n_static` or
    `n_dynamic`; learned prompts start uniformly in [-init_bound, init_bound]. All layers are computed at once.
    """

    def __init__(self, layers: int, dim: int, prior_dim: int, init_bound: float, n_static: int = 6, n_experts: int = 16,
                 n_dynamic: int = 6, mapped: bool = True, mapper_width: int = 16, temperature: float = 0.1):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature is {temperature}; expected a finite number above 0")
        self.layers, self.dim, self.temperature = layers, dim, float(temperature)
        self.k = n_experts if n_dynamic else 0
        self.static = new_prompts(init_bound, layers, n_static, dim) if n_static else None
        self.experts = new_prompts(init_bound, layers, self.k, n_dynamic, dim) if self.k else None

        # The routers of all layers are one matrix. Adam changes every weight by about the learning rate in a step. A
        # logit is a sum over D_y inputs, so its change would grow with D_y: the softmax would saturate within the first
        # hundred steps, and the router would stop learning. So `route` divides by D_y (the 1/fan-in rule of muP, arXiv
        # 2203.03466): at a temperature of 0.1 and a learning rate of 0.001, a step moves a logit by at most about 0.16,
        # for any encoder. `std` cancels the other factors: logits start with a deviation of about 1.
        self.router = nn.Linear(prior_dim, layers * self.k, bias=False) if self.k > 1 else None
        if self.router is not None:
            nn.init.normal_(self.router.weight, std=self.temperature * math.sqrt(prior_dim) / ROUTER_SPEED)

        # The sources give no width of the mapper. With 16, our choice, 0.74 % of all parameters are trained.
        self.mapper = nn.Sequential(
            nn.Linear(prior_dim, mapper_width), nn.GELU(), nn.Linear(mapper_width, layers * dim)) if mapped else None

    def route(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Return two routings of a normalised psi, each r_i = softmax(W_i psi * c / D_y / temperature), [B, L, k].

        W_i [k, D_y] is the router of layer i, and c is ROUTER_SPEED. The first routing mixes the experts, and in
        training its logits are noisy. The second never has noise: the importance loss and the metrics see it.
        """
        if self.router is None:
            always_on = psi.new_ones(psi.shape[0], self.layers, 1)
            return always_on, always_on
        scaled = psi * (ROUTER_SPEED / psi.shape[-1])
        logits = self.router(scaled).view(-1, self.layers, self.k) / self.temperature  # [B, L, k]
        # The noise has a standard deviation of 1/k², as in the code for paper B; no other source gives one.
        noise = torch.randn_like(logits) / self.k ** 2 if self.training else 0
        return (logits + noise).softmax(-1), logits.softmax(-1)

    def forward(self, psi: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Turn psi [B, D_y] into prompts [L, B, P, D] and the noise-free routing [B, L, k]; None for what is absent."""
        # Our choice: prompts are made from a normalised psi, because features of different encoders differ in scale.
        psi = F.layer_norm(psi, psi.shape[-1:])
        prompts, routing = [], None
        if self.static is not None:
            prompts.append(self.static.unsqueeze(1).expand(-1, psi.shape[0], -1, -1))  # [L, B, l, D]
        if self.experts is not None:
            weights, routing = self.route(psi)  # each [B, L, k]
            # For top-1 routing, insert here: weights = weights * F.one_hot(weights.argmax(-1), self.k)
            # A dense mixture: dynamic prompts of layer i = the sum over j of r_i,j E_i,j, with experts E_i,j [l, D].
            prompts.append(torch.einsum("BLk,LklD->LBlD", weights, self.experts))  # [L, B, l, D]
        if self.mapper is not None:
            prompts.append(self.mapper(psi).view(-1, self.layers, 1, self.dim).transpose(0, 1))  # [L, B, 1, D]
        return (torch.cat(prompts, dim=2) if prompts else None), routing


def new_prompts(bound: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def importance_loss(routing: Tensor, threshold: float = 0.05) -> Tensor:
    """Return the mean over layers of CV(Imp)², where Imp(j) is expert j's weight summed over the batch.

    CV is standard deviation / mean over the experts; routing is [B, L, k], free of noise. The loss is 0 if the experts
    share the batch evenly, and k - 1 if one takes everything. Without it, routing may degenerate: the router gives a
    few experts nearly all the weight for every input, and the others get almost no gradient and stay untrained.

    A layer whose CV² is below the threshold counts in the value but gets no gradient, so experts need not be used
    exactly alike. Only totals over the batch count: each sample may still be sent to a single expert. The batch is one
    micro-batch of one process; the smaller it is, the larger CV² is by chance. The sources disagree on the threshold
    (0.05 or 0.1) and on CV or CV². Our choice: CV² < 0.05, layer by layer, with the population standard deviation.
    """
    importance = routing.float().sum(0)  # [L, k]
    cv2 = importance.var(-1, unbiased=False) / importance.mean(-1) ** 2  # [L]
    return torch.where(cv2 < threshold, cv2.detach(), cv2).mean()


def experts_used(routing: Tensor) -> Tensor:
    """Return exp(entropy of the mean routing), [B, L, k] -> [L]: k if all experts are used alike, 1 if only one is."""
    return torch.special.entr(routing.float().mean(0)).sum(-1).exp()


def experts_per_sample(routing: Tensor) -> Tensor:
    """Return exp(mean entropy of a sample's routing), [B, L, k] -> [L]: 1 if each goes to one expert, k if to all."""
    return torch.special.entr(routing.float()).sum(-1).mean(0).exp()


# Fusion ------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    logits: Tensor  # [B, C]
    routing: Tensor | None  # [B, L, k], free of noise; None without experts
    importance: Tensor  # the importance loss, a scalar: add 0.01 times it to the task's loss; 0 without a router


class MoPE(nn.Module):
    """Encode the prior modality, prompt the frozen main encoder with it, and classify from both features.

        model = MoPE(load_vit("vit_b_16"), load_bert("bert-base-uncased"), num_classes=101)  # text prompts vision
        logits, routing, importance = model(images, input_ids)

    To prompt text with vision, swap them: MoPE(load_bert(...), load_vit(...), ...) and model(input_ids, images).
    Each layer of the prior encoder gets `n_prior_prompts` ordinary learned prompts, as in the code for paper B; with 0
    of them, that encoder needs no backward pass. The head gets both features, our choice, or with head="main" the main
    one alone, as in the code for paper B; without router and mapper, the prior modality is then not used at all, and
    `n_prior_prompts` has to be 0. With finetune=True the encoders are trained too, for comparison; either way the model
    sets their `requires_grad`. Other arguments go to `ConditionalPrompts`. Trained weights stay in float32; for speed,
    cast the frozen ones with `cast_frozen`, and run under autocast.

    Any encoder can take the place of either of ours: a module with `dim` (its width), `depth` (its layers) and
    `prompt_init_bound` (0.06 for our ViT-B/16, 0.3 for our BERT) that keeps this contract. The README has an example.
    - `encoder(x, prompts)` returns a feature [B, D]; prompts are [L, B, P, D] or None, and all layers have one width.
    - Layer i attends to prompts[i], gradients pass through to them, and a mask of tokens leaves them all visible.
    - With causal attention, the prompts go in front: tokens cannot attend to what comes after them.
    - x is one tensor, so a mask travels inside it: as a padding id, or as ids and mask stacked.
    A prior encoder that ignores its prompts needs n_prior_prompts=0; it then gets None.
    """

    def __init__(self, main: nn.Module, prior: nn.Module, num_classes: int, n_prior_prompts: int = 4,
                 head: str = "both", finetune: bool = False, **prompt_sizes):
        super().__init__()
        if head not in ("both", "main"):
            raise InputError(f"head is {head!r}; expected 'both' or 'main'")
        self.sizes = dict(num_classes=num_classes, n_prior_prompts=n_prior_prompts, head=head, finetune=finetune,
                          **prompt_sizes)
        self.main, self.prior, self.finetune = main, prior, finetune
        self.prompts = ConditionalPrompts(main.depth, main.dim, prior.dim, main.prompt_init_bound, **prompt_sizes)
        self.prior_prompts = new_prompts(
            prior.prompt_init_bound, prior.depth, n_prior_prompts, prior.dim) if n_prior_prompts else None
        self.head_sees_psi = head == "both"
        self.head = nn.Linear(main.dim + (prior.dim if self.head_sees_psi else 0), num_classes)
        self.one_modality = not self.head_sees_psi and self.prompts.router is None and self.prompts.mapper is None
        if self.one_modality and n_prior_prompts:
            raise InputError("nothing of the prior modality reaches the head; set n_prior_prompts to 0")

        for encoder in (main, prior):
            frozen = encoder in self.frozen_encoders()
            encoder.requires_grad_(not frozen)
            if not frozen and isinstance(encoder, Encoder):
                encoder.source = None  # it will differ from the file that it was loaded from
        self.train()

    def frozen_encoders(self) -> list[nn.Module]:
        """Return the encoders that are not trained: both, or with `finetune` only a prior one that is not used."""
        unused = [self.prior] if self.one_modality else []
        return unused if self.finetune else [self.main, self.prior]

    def train(self, mode: bool = True) -> MoPE:
        """Set the mode as usual, but keep frozen encoders in evaluation mode."""
        super().train(mode)
        for encoder in self.frozen_encoders():
            encoder.eval()
        return self

    def cast_frozen(self, dtype: torch.dtype) -> MoPE:
        """Cast the frozen matrices to `dtype` once, which autocast would do in every step; then run under autocast."""
        for module in (*self.main.modules(), *self.prior.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not any(p.requires_grad for p in module.parameters()):
                module.to(dtype)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Output:
        """Classify a batch, x of the main modality and y of the prior one.

        Images are [B, 3, S, S] uint8, RGB and not normalised; texts are ids [B, N] int64 with [CLS] and [SEP], padded
        at the end.
        """
        dtype = self.head.weight.dtype  # prompts and head are computed in the precision of their weights
        prior_prompts = self.prior_prompts  # [L_y, l, D_y], the same for the whole batch
        if prior_prompts is not None:
            prior_prompts = prior_prompts.unsqueeze(1).expand(-1, y.shape[0], -1, -1)  # [L_y, B, l, D_y]
        if self.one_modality:  # nothing depends on psi
            psi = torch.zeros(x.shape[0], self.prior.dim, dtype=dtype, device=x.device)
        else:
            psi = self.prior(y, prior_prompts).to(dtype)  # [B, D_y]
        with torch.autocast(psi.device.type, enabled=False):
            prompts, routing = self.prompts(psi)  # [L, B, P, D], [B, L, k]
        feature = self.main(x, prompts).to(dtype)  # [B, D]

        for encoder, its_prompts, out in ((self.prior, prior_prompts, psi), (self.main, prompts, feature)):
            expected = torch.is_grad_enabled() and its_prompts is not None and its_prompts.requires_grad
            if expected and not out.requires_grad:
                raise InputError(f"{type(encoder).__name__} ignores its prompts, or lets no gradient through to them; "
                                 "layer i has to attend to prompts[i], as the docstring of MoPE says")
        with torch.autocast(psi.device.type, enabled=False):  # the head gets psi as it is, not normalised
            logits = self.head(torch.cat([feature, psi], dim=-1) if self.head_sees_psi else feature).float()  # [B, C]
        importance = importance_loss(routing) if self.prompts.router is not None else logits.new_zeros(())
        return Output(logits, routing, importance)

    def trained_state(self) -> dict:
        """Return what was trained, as plain data for `torch.save`, with the model's sizes and its backbones' facts.

        Layers of a frozen encoder that you unfroze count as trained while they require a gradient: call it before you
        freeze them again.
        """
        weights = {name: t.detach().cpu().clone() for name, t in self.trained_tensors().items()}
        return {"weights": weights, "sizes": dict(self.sizes), "backbones": self.compatibility_facts()}

    def load_trained_state(self, state: dict) -> MoPE:
        """Load what `trained_state` returned. The mode stays as it is: call `eval()` to predict.

        Raises InputError for other backbones or settings, and for weights that are missing, unexpected or misshapen.
        """
        if not isinstance(state, dict) or not {"weights", "backbones"} <= state.keys():
            raise InputError(f"a trained state holds weights and backbones, but this is {str(state)[:60]}")
        facts = self.compatibility_facts()
        for fact, there in state["backbones"].items():
            here = facts.get(fact)
            if fact.endswith("sha256") and there and not here:
                print(f"{fact} is unknown; the state fits only the weights that it was trained with, {there}",
                      file=sys.stderr)
            if here != there and None not in (here, there) and not fact.endswith("name"):
                raise InputError(f"{fact} is {here}, but the state was trained with {there}, of {state['backbones']}")
        tensors = self.trained_tensors()
        check_same_tensors(tensors, state["weights"], "the trained state")
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(state["weights"][name])
        return self

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the tensors outside frozen encoders, and those inside that require a gradient."""
        frozen = {id(t) for encoder in self.frozen_encoders() for t in encoder.state_dict(keep_vars=True).values()
                  if not t.requires_grad}
        return {name: t for name, t in self.state_dict(keep_vars=True).items() if id(t) not in frozen}

    def compatibility_facts(self) -> dict:
        """Return what must agree for trained weights to fit, besides shapes; None = unknown. A name may differ."""
        router = {"temperature": self.prompts.temperature, "router speed": ROUTER_SPEED}
        facts = router if self.prompts.router is not None else {}
        for part, encoder in (("main", self.main), ("prior", self.prior)):
            if isinstance(encoder, Encoder):  # one of ours; of others nothing is known
                known = {fact: getattr(encoder, fact, None) for fact in Encoder.FACTS} | (encoder.source or {})
                facts |= {f"{part} {fact}": value for fact, value in known.items()}
        return facts

    def report(self) -> str:
        """Return a table of total, frozen and trainable parameters by part."""
        prompts = self.prompts
        parts = {"main encoder": self.main, "prior encoder": self.prior, "prior prompts": self.prior_prompts,
                 "static prompts": prompts.static, "experts": prompts.experts, "router": prompts.router,
                 "mapper": prompts.mapper, "head": self.head, "all": self}
        lines = [f"{'parameters':<16}{'total':>14}{'frozen':>14}{'trainable':>14}"]
        for name, part in parts.items():
            total, trained = count(part)
            lines.append(f"{name:<16}{total:>14,}{total - trained:>14,}{trained:>14,}")
        return "\n".join(lines) + f"  = {trained / total:.2%}"  # of the last part, all


def count(part: nn.Module | Tensor | None) -> tuple[int, int]:
    """Return the number of parameters of a part, and how many of them are trained."""
    tensors = [] if part is None else [part] if isinstance(part, Tensor) else list(part.parameters())
    return sum(t.numel() for t in tensors), sum(t.numel() for t in tensors if t.requires_grad)


# How prompts enter a layer -----------------------------------------------------------------------------


class Block(nn.Module):
    """A Transformer layer that can be prompted; pre-norm as in ViT, post-norm as in BERT.

    The papers insert the prompts into the sequence and throw their outputs away after the layer. Within a layer, tokens
    touch each other only in attention, since norms and MLP treat each one alone. So a prompt affects the tokens only
    through its key and its value. We compute these, and no query, attention output or MLP of a prompt: the tokens come
    out the same, with less work. Where a prompt stands does not matter, since attention knows no positions. In a
    pre-norm layer prompts pass through norm1, as inserted tokens would.
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
                n_out: int | None = None) -> Tensor:
        """Compute a layer: x [B, N, D], prompts [B, P, D], mask [B, 1, 1, N + P] with True = visible -> [B, N, D].

        With `n_out` it returns the first n_out tokens only; of the last layer, [CLS] can be all that is needed.
        """
        dtype = self.attn.qkv.weight.dtype  # not float32 after `cast_frozen`; casting before `cat` is cheaper
        h = (self.norm1(x) if self.pre_norm else x).to(dtype)
        context = h
        if prompts is not None:
            prompts = (self.norm1(prompts) if self.pre_norm else prompts).to(dtype)
            context = torch.cat([h, prompts], dim=1)  # [B, N + P, D]
        if n_out is not None:
            x, h = x[:, :n_out], h[:, :n_out]
        x = x + self.attn(h, context, mask)

        if self.pre_norm:
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self.mlp(x))


class Attention(nn.Module):
    """Multi-head attention: queries from x, keys and values from context, which is x with the prompts. `qkv` is used as
    a matrix (its rows are sliced) and not called as a layer: a hook on it, or a LoRA layer in its place, is ignored."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # one matrix, rows in the order query, key, value
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let the queries of x [B, Nq, D] attend to the keys and values of context [B, Nk, D] -> [B, Nq, D]."""
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
        query = F.linear(x, weight[:dim], bias[:dim])  # [B, Nq, D]
        key, value = F.linear(context, weight[dim:], bias[dim:]).chunk(2, dim=-1)  # each [B, Nk, D]

        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = attend(query, key, value, mask)  # of [B, H, Nq, D/H] and twice [B, H, Nk, D/H]
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, H, Nq, D/H] -> [B, Nq, D]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(query keyᵀ / √d) value for query [B, H, Nq, d], key and value [B, H, Nk, d]; d = D/H.

    mask [B, 1, 1, Nk]: True = this key is visible; None = all are.
    """
    # We use PyTorch's fused kernel on CUDA, and on a CPU where no gradient is needed; where one is, it is no faster in
    # float32 and slower in bfloat16. On Apple GPUs it has misread masks that are broadcast over heads (pytorch#184180).
    if query.device.type == "cuda" or (query.device.type == "cpu" and not key.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, H, Nq, Nk]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


# The two encoders --------------------------------------------------------------------------------------
# Names inside follow the checkpoints of timm and DINOv2; what only a BERT has is named as in BERT's.


class Encoder(nn.Module):
    """What ViT and BERT share: a stack of blocks, each with prompts of its own."""

    FACTS = "heads", "eps", "pad_id", "pooling", "image_size", "mean", "std"  # not seen in trained shapes
    source: dict | None = None  # name and hash of the file that it was loaded from; set by the loaders
    prompt_init_bound: float  # prompts for this encoder start uniformly in [-bound, bound]

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int, eps: float, pre_norm: bool):
        super().__init__()
        if dim % heads:
            raise InputError(f"{heads} heads cannot share a width of {dim}")
        self.dim, self.depth, self.heads, self.eps = dim, depth, heads, eps
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, eps, pre_norm) for _ in range(depth))

    def run_blocks(self, x: Tensor, prompts: Tensor | None, mask: Tensor | None, n_out: int | None) -> Tensor:
        """Send x [B, N, D] through all blocks -> [B, N or n_out, D]; mask [B, N], True = a real token, or None."""
        if mask is not None:  # every token sees every prompt: [B, 1, 1, N + P]
            mask = F.pad(mask, (0, 0 if prompts is None else prompts.shape[2]), value=True)[:, None, None]
        prompts = [None] * self.depth if prompts is None else prompts.unbind()
        for i, (block, given) in enumerate(zip(self.blocks, prompts, strict=True), 1):  # given [B, P, D]
            x = block(x, given, mask, n_out if i == self.depth else None)
        return x


class ViT(Encoder):
    """Vision Transformer (arXiv 2010.11929); mean and std, by default ImageNet's, normalise pixels in 0..1."""

    def __init__(self, image_size: int = 224, patch_size: int = 16, dim: int = 768, depth: int = 12,
                 heads: int = 12, mlp_dim: int = 3072, eps: float = 1e-6, mean: tuple = (0.485, 0.456, 0.406),
                 std: tuple = (0.229, 0.224, 0.225)):
        super().__init__(dim, depth, heads, mlp_dim, eps, pre_norm=True)
        if image_size % patch_size:
            raise InputError(f"image size {image_size} is not a multiple of the patch size {patch_size}; "
                             f"try {max(1, round(image_size / patch_size)) * patch_size}")
        self.image_size, self.patch_size, self.mean, self.std = image_size, patch_size, tuple(mean), tuple(std)
        self.prompt_init_bound = math.sqrt(6 / (3 * patch_size ** 2 + dim))  # as in VPT (arXiv 2203.12119)

        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, dim) * 0.02)
        self.norm = nn.LayerNorm(dim, eps)
        self.register_buffer("shift", 255 * torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", 255 * torch.tensor(self.std).view(3, 1, 1), persistent=False)

    def tokens(self, images: Tensor, prompts: Tensor | None = None, n_out: int | None = None) -> Tensor:
        """Encode images [B, 3, S, S], uint8, not normalised -> normed tokens [B, N or n_out, D], [CLS] first."""
        if images.is_floating_point() or images.shape[1:] != (3, self.image_size, self.image_size):
            raise InputError(f"images are {images.dtype} {list(images.shape)}; expected uint8 pixels of 0 to 255, not "
                             f"normalised, [B, 3, {self.image_size}, {self.image_size}]")
        x = self.patch_embed((images - self.shift) / self.scale).flatten(2).transpose(1, 2)  # [B, N - 1, D]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # [B, N, D]
        return self.norm(self.run_blocks(x, prompts, None, n_out))

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Encode images [B, 3, S, S] -> feature [B, D], the [CLS] token."""
        return self.tokens(images, prompts, n_out=1)[:, 0]


class BERT(Encoder):
    """BERT (arXiv 1810.04805), post-norm, without the pooler, which only next-sentence prediction used."""

    prompt_init_bound = 0.3  # from the code for paper B
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

    def tokens(self, ids: Tensor, prompts: Tensor | None = None, n_out: int | None = None) -> Tensor:
        """Encode ids [B, N], each row one real id or more and then pad_id -> hidden states [B, N or n_out, D]."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(f"texts are {ids.dtype} {list(ids.shape)}; expected the ids of word pieces, int64 [B, N]")
        if ids.shape[1] > self.max_length:
            raise InputError(f"a text of {ids.shape[1]} word pieces; this BERT reads at most {self.max_length}")
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.shape[1]]  # [B, N, D]
        x = self.norm(x + self.token_type_embeddings.weight[0])  # a single text: every token is of type 0
        return self.run_blocks(x, prompts, ids != self.pad_id, n_out)

    def forward(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Encode ids [B, N] -> feature [B, D]: the mean over real tokens, or with pooling "cls" the first token.

        The code for paper B reads [CLS]. The mean is our choice: predicting masked words does not train [CLS] to
        summarise a sentence, and predicting the next sentence does so only weakly.
        """
        if self.pooling == "cls":
            return self.tokens(ids, prompts, n_out=1)[:, 0]
        real = (ids != self.pad_id).unsqueeze(-1)  # [B, N, 1]
        return (self.tokens(ids, prompts) * real).sum(1) / real.sum(1)  # [B, D]


# The method ends here ----------------------------------------------------------------------------------
# What follows finds, checks and renames pretrained weights; a first reading can skip it.
# A name is tried in order as a local path, in the cache, and as a download. The names of `VISION` are kept in the cache
# of torch.hub and checked by hash; BERTs and timm's ViTs in that of huggingface_hub, bert-base-uncased at one revision.

TORCHVISION, DINOV2 = "https://download.pytorch.org/models/", "https://dl.fbaipublicfiles.com/dinov2/"
VISION = {  # name -> url, first digits of the sha256
    "vit_b_16": (TORCHVISION + "vit_b_16-c867db91.pth", "c867db91"),
    "vit_b_32": (TORCHVISION + "vit_b_32-d86f8d99.pth", "d86f8d99"),
    "vit_l_16": (TORCHVISION + "vit_l_16-852ce7e3.pth", "852ce7e3"),
    "dinov2_vits14": (DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1bc15cd2ec"),
    "dinov2_vitb14": (DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f85de91b42"),
}
BERT_BASE = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"  # hub id, revision
BERT_FORMATS = "model.safetensors", "pytorch_model.bin"
HEADS = {64: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # the usual ones, by width; 64 is a toy

# Names in the public files -> names here, by regular expressions that are applied in this order.
VIT_NAMES = {  # torchvision's; of timm's and DINOv2's names, only the last one differs from ours
    r"^class_token": "cls_token", r"^conv_proj": "patch_embed", r"^encoder\.pos_embedding": "pos_embed",
    r"^encoder\.layers\.encoder_layer_": "blocks.", r"^encoder\.ln\.": "norm.", r"\.ln_": ".norm",
    r"self_attention\.in_proj_": "attn.qkv.", r"self_attention\.out_proj": "attn.proj",
    r"mlp\.(linear_1|0)\.": "mlp.fc1.", r"mlp\.(linear_2|3)\.": "mlp.fc2.", r"^patch_embed\.proj": "patch_embed"}
BERT_NAMES = {
    r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias",  # in older files
    r"^embeddings\.LayerNorm": "norm", r"^embeddings\.": "", r"^encoder\.layer\.": "blocks.",
    r"attention\.output\.dense": "attn.proj", r"attention\.output\.LayerNorm": "norm1",
    r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2", r"output\.LayerNorm": "norm2"}
# Other programs may nest an encoder's tensors under one of ENTRIES, and begin every name with a prefix, which is read
# off the name that ends in one of FIRST_TENSORS. UNUSED are heads and the like.
ENTRIES = ("model", "state_dict", "model_state_dict", "state_dict_ema", "teacher", "student")
PREFIXES = r"((module|_orig_mod|backbone|encoder|model|vit|bert|teacher|student)\.)+"
FIRST_TENSORS = ("cls_token", "class_token", "embeddings.word_embeddings.weight")
UNUSED = (r"(heads?|head_dist|fc|pre_logits|mask_token|cls|classifier|qa_outputs|pooler|lm_head|predictions|dropout|"
          r"seq_relationship|embeddings\.position_ids|embeddings\.token_type_ids)(\.|$)")


def load_vit(name: str, image_size: int = 224, heads: int | None = None) -> ViT:
    """Load a ViT in float32, for images of that size. Raises InputError.

    The name is one of `VISION`, a file in the format of torchvision, DINOv2 or timm, or the hub id or folder of a plain
    ViT of timm (config.json, model.safetensors). Most sizes are read off the tensors. Mean and std are those of the
    config.json, or else ImageNet's. The number of heads is `heads`, or else the config.json's, or else the usual one of
    the width, which is wrong for a few models: MoCo v3's ViT-S has 12.
    """
    path, config = find_vit(name)
    weights = read_weights(path)
    with explained(f"{path}: not a plain ViT of torchvision, DINOv2 or timm"):
        weights = rename(weights, VIT_NAMES)
        # LayerScale multiplies the output of each branch in DINOv2; scaling the rows of its last matrix does the same.
        for key in [key for key in weights if key.endswith(".gamma")]:
            gamma, last = weights.pop(key), key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
            weights[f"{last}.weight"] = gamma[:, None] * weights[f"{last}.weight"]
            weights[f"{last}.bias"] = gamma * weights[f"{last}.bias"]
        dim, _, patch_size, _ = weights["patch_embed.weight"].shape
        depth = len([key for key in weights if key.endswith(".attn.qkv.weight")])
        heads = heads or config.get("model_args", {}).get("num_heads") or HEADS.get(dim)
        if heads is None:
            raise InputError(f"{path}: a ViT of width {dim}; heads are known for the widths {list(HEADS)}")
        pixels = config.get("pretrained_cfg", config)
        pixels = {key: tuple(map(float, pixels[key])) for key in ("mean", "std") if key in pixels}
        vit = ViT(image_size, patch_size, dim, depth, heads, len(weights["blocks.0.mlp.fc1.weight"]), **pixels)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], image_size // patch_size)
    also = f", with {heads} heads, for pixels of mean {vit.mean} and std {vit.std}"
    return load_checked(vit, weights, path, name, also)


def load_bert(name: str, pooling: str = "mean") -> BERT:
    """Load a BERT in float32 from a folder (config.json, weights, tokenizer) or a hub id. Raises InputError."""
    repo, revision = BERT_BASE if name == "bert-base-uncased" and not Path(name).exists() else (name, None)
    folder = find(repo, "bert-base-uncased", BERT_FORMATS, revision)
    path = next((folder / file for file in BERT_FORMATS if (folder / file).exists()), folder / BERT_FORMATS[0])
    config = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
              "layer_norm_eps": 1e-12, **read_config(folder / "config.json")}  # older files leave these out
    kind = config["model_type"], config["hidden_act"], config["position_embedding_type"]
    if kind != ("bert", "gelu", "absolute"):
        raise InputError(f"{folder / 'config.json'}: {kind}; only ('bert', 'gelu', 'absolute') is implemented")
    weights = read_weights(path)
    with explained(f"{folder}: not the configuration and weights of a BERT"):
        sizes = [config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                         "intermediate_size", "max_position_embeddings", "type_vocab_size")]
        eps, pad_id = float(config["layer_norm_eps"]), int(config.get("pad_token_id") or 0)
        bert = BERT(*sizes, eps=eps, pad_id=pad_id, pooling=pooling)
        weights = rename(weights, BERT_NAMES)
        # The files hold three matrices where `Attention` has one.
        for key in [key for key in weights if ".attention.self.query." in key]:
            parts = [weights.pop(key.replace("query", part), torch.zeros(0)) for part in ("query", "key", "value")]
            weights[key.replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    bert.folder = folder
    return load_checked(bert, weights, path, name)


@contextlib.contextmanager
def explained(what: str):
    """Tell in one sentence what goes wrong with a file from outside: damaged and foreign files fail in many ways."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({(str(error).strip() or repr(error)).splitlines()[0][:150]})") from None


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Give the tensors of a public file the names used here, and leave out what the encoders have no use for."""
    first = next((name for name in weights if name.endswith(FIRST_TENSORS)), "")
    prefix = (re.match(PREFIXES, first) or [""])[0]
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    unused = [name for name in weights if re.match(f"({PREFIXES})?{UNUSED}", name)]
    weights = {name: tensor for name, tensor in weights.items() if name not in unused}
    for pattern, replacement in names.items():
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    if prefix or unused:
        took = f"took the prefix {prefix} off all names; " if prefix else ""
        print(f"{took}not used: {', '.join(unused) or 'none'}"[:300], file=sys.stderr)
    return weights


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize positions [1, 1 + n², D] of an n×n grid of patches -> [1, 1 + side², D], bicubically with antialias, as
    timm does. (DINOv2's own code uses no antialias and an offset of 0.1, and the features are not quite the same.)"""
    n = math.isqrt(positions.shape[1] - 1)
    if n == side or n ** 2 != positions.shape[1] - 1:  # not a square: `load_checked` refuses it
        return positions
    grid = positions[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_checked(encoder: Encoder, weights: dict[str, Tensor], path: Path, name: str, also: str = "") -> Encoder:
    """Load all weights or none, note where they came from, and say so in a line."""
    check_same_tensors(encoder.state_dict(), weights, path)
    for key, tensor in weights.items():
        if (tensor.dtype, tensor.layout) != (torch.float32, torch.strided) or not tensor.isfinite().all():
            raise InputError(f"{path}: {key} is sparse, quantised ({tensor.dtype}) or not finite; get the weights as "
                             "they were released")
    encoder.load_state_dict(weights)
    encoder.source = {"name": str(name), "sha256": sha256(path)}
    print(f"loaded {len(weights)} tensors, {count(encoder)[0]:,} parameters, from {path}{also}", file=sys.stderr)
    return encoder.eval()


def check_same_tensors(expected: dict[str, Tensor], given: dict[str, Tensor], origin: str | Path) -> None:
    """Raise InputError unless names and shapes are equal: nothing missing, nothing left over."""
    problems = {"missing": expected.keys() - given.keys(), "unexpected": given.keys() - expected.keys(),
                "misshapen": {n for n in expected.keys() & given.keys() if expected[n].shape != given[n].shape}}
    found = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
             for what, names in problems.items() if names]
    if found:
        raise InputError(f"{origin}: {'; '.join(found)} of {len(expected)} tensors; it is not for this model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a pickle opened with weights_only=True, in float32."""
    with regular_file(path).open("rb") as file:
        start = file.read(24)
    with explained(f"{path}: not a file of tensors alone, or cut short; it begins with {start!r}. If that is a web "
                   "page or a git-LFS pointer (run `git lfs pull`), get what it stands for; else download it again"):
        safe = path.suffix == ".safetensors"
        weights = read_safetensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        while entry := next((entry for entry in ENTRIES if isinstance(weights.get(entry), dict)), None):
            print(f"{path}: took the entry {entry!r}", file=sys.stderr)
            weights = weights[entry]
        return {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read u64 little-endian n; n bytes of JSON {name: {dtype, shape, data_offsets}}; then the data, from offset 0."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    data = memoryview(bytearray(path.read_bytes()))
    first = 8 + int.from_bytes(data[:8], "little")  # where the data begin
    header, tensors = json.loads(bytes(data[8:first])), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if dtype := dtypes.get(entry["dtype"]):  # if one of another type is needed, it will be reported as missing
            start, end = (first + offset for offset in entry["data_offsets"])
            tensors[name] = torch.frombuffer(data[start:end], dtype=dtype).view(entry["shape"])  # fails if cut short
    return tensors


def read_config(path: Path) -> dict:
    with explained(f"{path}: not a file of settings"):
        return dict(json.loads(regular_file(path).read_text("utf-8")))


def regular_file(path: Path) -> Path:
    """Return the path if a regular file is there; a named pipe would wait for ever, and a device can be endless."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_vit(name: str) -> tuple[Path, dict]:
    """Return the file of a vision encoder, and its config.json if it has one."""
    if name not in VISION or Path(name).exists():
        path = find(name, f"a name among {', '.join(VISION)}")
        return (path / "model.safetensors", read_config(path / "config.json")) if path.is_dir() else (path, {})
    url, digest = VISION[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    with explained(f"could not download {url}; without a network, put it at {path}"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest)  # nothing half-written stays
    if not sha256(regular_file(path)).startswith(digest):
        raise InputError(f"{path} is damaged: its sha256 should begin with {digest}; delete it to get it anew")
    return path, {}


def find(name: str, alternative: str, formats: tuple = ("model.safetensors",), revision: str | None = None) -> Path:
    """Return a local file or folder, or else a hub id's folder, with weights in the first of `formats` found there."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise InputError(f"{name}: no such file or folder; expected one, or a hub id (owner/name), or {alternative}")
    with explained(f"{name} is not here, and the Hugging Face hub did not give it; without a network, give a folder "
                   "with its weights, config.json and tokenizer.json"):
        from huggingface_hub import snapshot_download  # it comes with tokenizers

        for weights in formats:
            files = [weights, "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"]
            path = Path(snapshot_download(name, revision=revision, allow_patterns=files))
            if (path / weights).exists():
                break
        return path
