"""What ranks send each other in a step, and the seconds of it, by formula.

By rings: of S bytes over n ranks an all-gather or a reduce-scatter sends (n - 1) / n S from each rank, an
all-reduce twice that, and each receives as much. The latency of a collective is not counted, nor what its
kernels take of the GPU's multiprocessors. Letters: W bytes of all weights as they are kept, W_r of those in
no decoder layer, P trained weights, n ranks of a shard group.
"""

from dataclasses import dataclass

from fastdpo.model.cards import Card
from fastdpo.planning.fake_model import Unit
from fastdpo.planning.step_time import StepTime

REPLICATE, SHARD, HYBRID = "replicate", "shard", "hybrid"
# The share of a link's rate on the data sheet that collectives reach: an assumption, not measured yet.
LINK_SHARE = 0.7
# Bytes/s one way of a GPU's network to other nodes: 400 Gb/s each, an assumption.
NETWORK = 50e9
GRADIENT = 4  # bytes: gradients travel in fp32


@dataclass(frozen=True)
class Ranks:
    """GPUs of a node, and nodes; a rank is one GPU."""

    gpus: int
    nodes: int = 1

    @property
    def all(self) -> int:
        return self.gpus * self.nodes

    def shards(self, mode: str) -> int:
        """Parts that weights, gradients and states are kept in."""
        return {REPLICATE: 1, SHARD: self.all, HYBRID: self.gpus}[mode]

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that differ."""
        if self.all == 1:
            return (REPLICATE,)
        several = self.nodes > 1 and self.gpus > 1
        return (REPLICATE, SHARD, HYBRID) if several else (REPLICATE, SHARD)


@dataclass(frozen=True)
class Model:
    """The weights of a model in the units that are gathered: `layers` decoder layers, and the rest."""

    layers: int
    layer: Unit
    root: Unit

    @property
    def size(self) -> int:
        """Bytes of all weights as they are kept."""
        return self.layers * self.layer.size + self.root.size

    @property
    def trained(self) -> int:
        """Weights that train."""
        return self.layers * self.layer.trained + self.root.trained


@dataclass(frozen=True)
class Traffic:
    """Of a step: bytes that a rank sends, and the seconds of them that can and cannot pass beside the
    computation. copied: bytes that gathering and reducing read and write in the GPU's memory."""

    sent: float
    beside: float
    exposed: float
    copied: float = 0.0


def traffic(mode: str, ranks: Ranks, model: Model, card: Card, microbatches: float) -> Traffic:
    """replicate: one all-reduce of the gradients at a step's end, beside which nothing is computed.

    shard and hybrid, each microbatch: layers are gathered in the forward and again in the backward, the
    root's weights once; all gradients are reduce-scattered. FSDP2 gathers a layer while the one before it
    computes, and reduces while the next one does, so that only the first gather (root and first layer) and
    the last reduction (the same two) are waited for. What was gathered is copied out of one buffer, and what
    is reduced into one. hybrid all-reduces what was reduced over the nodes, each microbatch too."""
    gradients = GRADIENT * model.trained
    if mode == REPLICATE:
        sent = 2 * (ranks.all - 1) / ranks.all * gradients
        return Traffic(sent, 0.0, sent / _rate(mode, ranks, card))
    n, first = ranks.shards(mode), model.root.size + model.layer.size
    gathered, last = 2 * model.size - model.root.size, GRADIENT * (model.root.trained + model.layer.trained)
    part, rate = (n - 1) / n, _rate(mode, ranks, card)
    across = 2 * (ranks.nodes - 1) / ranks.nodes / n if mode == HYBRID else 0.0
    sent = part * (gathered + gradients) + across * gradients
    seconds = part * (gathered + gradients) / rate + across * gradients / _network()
    exposed = part * (first + last) / rate + across * last / _network()
    copied = 2 * (gathered + gradients)
    return Traffic(*(microbatches * one for one in (sent, seconds - exposed, exposed, copied)))


def _rate(mode: str, ranks: Ranks, card: Card) -> float:
    """Bytes/s that a rank sends: by its link, and where a ring goes over nodes, which it leaves by one GPU's
    network for each of a node's rings, no faster than all networks of a node together."""
    inside = LINK_SHARE * card.link if ranks.gpus > 1 else float("inf")
    over_nodes = ranks.nodes > 1 and mode != HYBRID
    return min(inside, ranks.gpus * _network()) if over_nodes else inside


def _network() -> float:
    return LINK_SHARE * NETWORK


def seconds(time: StepTime, moved: Traffic, card: Card) -> float:
    """Of a step: the computation of the slowest rank, or what passes beside it where that takes longer; then
    what passes beside nothing, the copies and the update."""
    compute = time.seconds - time.update
    return max(compute, moved.beside) + moved.exposed + moved.copied / card.bandwidth + time.update
