"""Feed-forward on one rank: dense, or experts chosen by a router. Returns partial sums without the output bias."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import Routing, Spec
from .weights import Weights, multiply, rms_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_python": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def xielu(x: Tensor, weights: Weights) -> Tensor:
    """Quadratic for positive x, exponential for negative x; the curvatures and the slope are weights."""
    beta = weights["mlp.act_beta"]
    above, below = F.softplus(weights["mlp.act_alpha_p"]), beta + F.softplus(weights["mlp.act_alpha_n"])
    left = (torch.expm1(x.minimum(weights["mlp.act_eps"])) - x) * below
    return torch.where(x > 0, above * x * x, left) + beta * x


LEARNED: dict[str, Callable[[Tensor, Weights], Tensor]] = {"xielu": xielu}  # activations that have weights


@dataclass(frozen=True)
class Share:
    """The experts of this rank, [first, last). `bias`: of the ranks that share them, this one adds the output bias."""

    first: int
    last: int
    bias: bool


def feed_forward(x: Tensor, weights: Weights, spec: Spec, share: Share | None) -> Tensor:
    """x [batch, seq, hidden] → this rank's part of [batch, seq, hidden]."""
    if "moe.router" in weights:
        assert spec.routing is not None and share is not None
        flat = x.flatten(0, 1)
        out = experts(flat, weights, spec, spec.routing, share, flat)
        if "shared.gate_up" in weights:
            more = dense(flat, weights, "shared", spec)
            if "shared.router" in weights:
                more = more * torch.sigmoid(weights.linear(flat, "shared.router"))
            out = out + more
        return out.view_as(x)
    return dense(x, weights, "mlp", spec)


def dense(x: Tensor, weights: Weights, part: str, spec: Spec) -> Tensor:
    if f"{part}.gate_up" in weights:
        rows = weights[f"{part}.gate_up"].shape[0] // 2
        inner = _gated(weights.linear(x, f"{part}.gate_up", runs=(rows, rows)), spec)
    else:
        inner = weights.linear(x, f"{part}.up")
        inner = (
            LEARNED[spec.activation](inner, weights)
            if spec.activation in LEARNED
            else ACTIVATIONS[spec.activation](inner)
        )
    return weights.linear(inner, f"{part}.down", bias=False)


def _gated(x: Tensor, spec: Spec) -> Tensor:
    gate, up = x.chunk(2, -1)
    if spec.gate_limit is None:
        return ACTIVATIONS[spec.activation](gate) * up
    gate, up = gate.clamp(max=spec.gate_limit), up.clamp(-spec.gate_limit, spec.gate_limit)
    return (up + spec.up_offset) * (gate * torch.sigmoid(gate * spec.gate_alpha))


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "chosen": lambda logits: logits,
    "sparsemixer": lambda logits: logits,
}


def route(
    x: Tensor, weights: Weights, routing: Routing, eps: float = 1e-6, part: str = "moe"
) -> tuple[Tensor, Tensor, list[int]]:
    """x [tokens, hidden] → expert ids and weights, both [tokens, top], and the experts in use; equal on all ranks."""
    if "moe.router_norm" in weights:
        x = rms_norm(x, weights["moe.router_norm"], eps) * routing.divide**-0.5
    scores = SCORES[routing.score](weights.linear(x.float() if routing.wide else x, f"{part}.router").float())
    ranking, groups = _ranking(scores, weights, routing)
    chosen = ranking.topk(routing.top, -1)[1]
    router = weights.routers[part]
    if router.imposed is not None:
        chosen = torch.where(router.imposed < 0, chosen, router.imposed)
    if router.decisions is not None:
        router.decisions.append((chosen, _margin(ranking, groups, chosen, routing)))
    used = sorted(set(chosen.flatten().tolist()))
    router.routed.update(used)
    shares = _mixed(scores, chosen, routing.jitter) if routing.score == "sparsemixer" else scores.gather(1, chosen)
    if routing.score == "chosen":
        shares = shares.softmax(-1)
    if routing.renormalize:
        shares = shares / (shares.norm(routing.renormalize, -1, keepdim=True) + 1e-20)
    if "moe.expert_factor" in weights:
        shares = shares * weights["moe.expert_factor"][chosen]
    return chosen, shares * routing.scale, used


def _mixed(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """SparseMixer weights: each choice is a softmax over the experts left that score close to the best of them."""
    shares, rest = [], logits
    for expert in chosen.split(1, -1):
        best = rest.amax(-1, keepdim=True)
        far = (best - logits) / logits.abs().maximum(best) > 2 * jitter
        shares.append(rest.masked_fill(far, float("-inf")).softmax(-1).gather(1, expert))
        rest = rest.scatter(1, expert, float("-inf"))
    return torch.cat(shares, -1)


def _ranking(scores: Tensor, weights: Weights, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """The scores by which experts are chosen, [tokens, experts], and those of their groups, [tokens, groups].

    With groups, experts outside of a token's best groups score -inf.
    """
    if "moe.score_bias" in weights:
        scores = scores + weights["moe.score_bias"].float()
    if routing.groups <= 1:
        return scores, None
    grouped = scores.view(len(scores), routing.groups, -1)
    groups = grouped.topk(routing.group_best, -1)[0].sum(-1)
    best = groups.topk(routing.group_top, -1)[1]
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1), groups


def _margin(ranking: Tensor, groups: Tensor | None, chosen: Tensor, routing: Routing) -> Tensor:
    """[tokens] the gap between the worst expert (or group) chosen and the best one not chosen: small gaps are ties."""
    rest = ranking.scatter(1, chosen, float("-inf")).amax(-1)
    margin = ranking.gather(1, chosen).amin(-1) - rest
    if groups is None or routing.group_top == routing.groups:
        return margin
    best = groups.sort(-1, descending=True)[0]
    return margin.minimum(best[:, routing.group_top - 1] - best[:, routing.group_top])


def experts(x: Tensor, weights: Weights, spec: Spec, routing: Routing, share: Share, seen: Tensor) -> Tensor:
    """x [tokens, hidden] → what this rank's experts contribute, of the same shape; the router looks at `seen`."""
    chosen, shares, used = route(seen, weights, routing, spec.eps)
    out = torch.zeros_like(x)
    rows = weights.rows("moe.gate_up") // 2
    biases, last = weights.get("moe.gate_up_bias"), weights.get("moe.down_bias") if share.bias else None
    for expert in used:
        if not share.first <= expert < share.last:
            continue
        own = expert - share.first
        token, place = torch.where(chosen == expert)
        matrix = weights.matrix("moe.gate_up", x.dtype, (rows, rows), own)
        before, after = (shares[token, place, None], 1) if routing.weigh_input else (1, shares[token, place, None])
        inner = _gated(multiply((x[token] * before).to(x.dtype), matrix, None if biases is None else biases[own]), spec)
        part = multiply(inner, weights.matrix("moe.down", x.dtype, expert=own), None if last is None else last[own])
        out.index_add_(0, token, (part * after).to(x.dtype))
    return out
