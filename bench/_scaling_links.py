"""What a collective costs on GPUs that NVLink joins into nodes and a network joins across them: the
bytes that each GPU sends, and the time that takes.

The model and its constants are NCCL's own, by which it chooses between its algorithms
(``src/graph/tuning.cc``, v2.28):

    time = base latency + steps * latency of a step + payload / bandwidth

- A ring passes W - 1 parts of 1/W of the payload from neighbour to neighbour, an all-reduce twice
  that. Of the neighbours in a node one is reached over the network; as each GPU's network adapter
  serves a ring of its own, all adapters of the node together carry what each NVLink port carries.
- Trees, for all-reduce alone, send the payload up and down: few steps even on many nodes.

Left out: the protocol for messages of a few KB (LL), sums in the switches (NVLink SHARP), and what
other traffic or a slow GPU cost.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]

# The share of a link's rate that is left for data.
# NVLink: of 450 GB/s NCCL reaches 370 (its maintainer: NVIDIA/nccl-tests issue 212).
_NVLINK_SHARE = 370 / 450
# InfiniBand NDR: 46 to 48 GB/s of 50 (NVIDIA/nccl-tests issue 290).
_NETWORK_SHARE = 47 / 50


@dataclass(frozen=True)
class Cluster:
    """Equal nodes.

    ``nvlink_gb_per_s``: what one GPU can send to the others of its node, GB/s, while it receives as
    much; ``network_gb_per_s``: what one GPU can send to other nodes. Both are rates of the links,
    of which data gets ``_NVLINK_SHARE`` and ``_NETWORK_SHARE``.
    """

    nvlink_gb_per_s: float
    network_gb_per_s: float = 50.0  # 400 Gb/s
    gpus_per_node: int = 8

    def nodes(self, gpus: int) -> int:
        """How many nodes ``gpus`` fill. Raises ValueError unless that is one, or whole ones."""
        if gpus < 1 or (gpus > self.gpus_per_node and gpus % self.gpus_per_node):
            raise ValueError(
                f"gpus must lie between 1 and gpus_per_node ({self.gpus_per_node}) or be a "
                f"multiple of it, got {gpus}"
            )
        return -(-gpus // self.gpus_per_node)

    def data_gb_per_s(self, gpus: int) -> float:
        """What data can pass from each GPU to the next one in a ring."""
        nvlink = _NVLINK_SHARE * self.nvlink_gb_per_s
        if self.nodes(gpus) == 1:
            return nvlink
        return min(nvlink, _NETWORK_SHARE * self.network_gb_per_s * self.gpus_per_node)

    def ms(self, kind: Kind, payload: int, gpus: int) -> float:
        """Milliseconds of the fastest way; 0 on one GPU, which has nobody to talk to.

        ``payload``: bytes of the whole tensor: what an all-gather returns and a reduce-scatter is
        given on each GPU.
        """
        if gpus == 1:
            return 0.0
        times = [self._ring_us(kind, payload, gpus, protocol) for protocol in _RING]
        if kind == "all-reduce":
            times += [self._tree_us(payload, gpus, protocol) for protocol in _TREE]
        return min(times) / 1e3

    def _ring_us(self, kind: Kind, payload: int, gpus: int, protocol: "_Protocol") -> float:
        nodes = self.nodes(gpus)
        rounds = _rounds(kind)
        steps = rounds * (gpus - 1)
        across = 0 if nodes == 1 else 2 * nodes if kind == "all-reduce" else nodes - 1
        latency = (steps - across) * protocol.nvlink_us + across * protocol.network_us
        return protocol.us(latency, sent_bytes(kind, payload, gpus), self.data_gb_per_s(gpus))

    def _tree_us(self, payload: int, gpus: int, protocol: "_Protocol") -> float:
        nodes = self.nodes(gpus)
        inside = gpus // nodes - 1
        across = int(math.log2(nodes))
        latency = 2 * (inside * protocol.nvlink_us + across * protocol.network_us)
        if nodes == 1:
            protocol = replace(protocol, share=protocol.share_in_node)
        return protocol.us(latency, 2 * payload, self.data_gb_per_s(gpus))


@dataclass(frozen=True)
class _Protocol:
    """How NCCL moves the bytes: latencies in µs, of the start and of a step over NVLink and over
    the network, and the share of the bandwidth that is used for data."""

    base_us: float
    nvlink_us: float
    network_us: float
    share: float
    share_in_node: float = 1.0  # of a tree in one node

    def us(self, latency: float, nbytes: float, gb_per_s: float) -> float:
        return self.base_us + latency + nbytes / (self.share * gb_per_s * 1e3)


# Simple, then LL128: of 128 bytes 120 are data, and no step waits for a fence.
_RING = (_Protocol(8.4, 3.4, 14.0, 1.0), _Protocol(14.0, 1.9, 4.0, 0.92))
_TREE = (
    _Protocol(8.4, 4.0, 14.0, 0.92, 0.92),
    _Protocol(14.0, 1.25, 8.5, 0.92 * 120 / 128, 0.92 * 7 / 9),
)


def _rounds(kind: Kind) -> int:
    """An all-reduce is a reduce-scatter and an all-gather."""
    return 2 if kind == "all-reduce" else 1


def sent_bytes(kind: Kind, payload: int, gpus: int) -> float:
    """What each GPU sends in a ring, and receives: no algorithm on point-to-point links can do with
    less (Patarasuk & Yuan 2009). ``payload`` as in ``Cluster.ms``."""
    return _rounds(kind) * payload * (gpus - 1) / gpus


# NVIDIA's data sheets give both directions together, twice this: NVLink 3, 600 GB/s; NVLink 4,
# 900 GB/s; NVLink 5, 1,800 GB/s. A DGX of each has eight GPUs and, from the H100 on, an adapter of
# 400 Gb/s for each.
NVLINK_GB_PER_S = {"a100": 300.0, "h100": 450.0, "h200": 450.0, "b200": 900.0}
