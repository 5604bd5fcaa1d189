"""bench/scaling.py: its times against sums by hand, its timeline against the roofline, and its
output. That the predicted collectives are the real ones: test_scaling_processes.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import roofline
import scaling
import torch
from _ceilings import DEVICES
from _scaling_links import Cluster, sent_bytes
from _scaling_step import buckets, ddp, fsdp
from _scaling_timeline import Gradient, Timeline, timeline
from small_models import small_config

from fastgpt import GPT, GPTConfig

H200 = DEVICES["h200"]
NODES = Cluster(450.0)

# -- a collective


def test_bytes_of_a_ring_by_hand() -> None:
    assert sent_bytes("all-gather", 800, 8) == 700
    assert sent_bytes("reduce-scatter", 800, 8) == 700
    assert sent_bytes("all-reduce", 800, 8) == 1400
    assert sent_bytes("all-reduce", 800, 1) == 0


@pytest.mark.parametrize(
    ("gpus", "network", "gb_per_s"),
    [
        (8, 50.0, 370.0),  # NCCL's maintainer on a ring of eight H100s
        (64, 50.0, 370.0),  # eight adapters together are faster than NVLink
        (64, 25.0, 8 * 0.94 * 25.0),
    ],
)
def test_a_large_tensor_moves_at_the_bandwidth_of_the_slowest_link(
    gpus: int, network: float, gb_per_s: float
) -> None:
    payload = 64 << 30
    cluster = Cluster(450.0, network)
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        reached = sent_bytes(kind, payload, gpus) / cluster.ms(kind, payload, gpus) / 1e6
        assert reached == pytest.approx(gb_per_s, rel=0.01) and reached < gb_per_s


def test_latency_of_a_small_tensor_by_hand() -> None:
    """In µs, at 4 bytes: a ring's grows with the GPUs, a tree's with their logarithm."""
    assert 1e3 * NODES.ms("all-gather", 4, 2) == pytest.approx(8.4 + 3.4, abs=0.01)
    ring = 14.0 + (1023 - 127) * 1.9 + 127 * 4.0
    assert 1e3 * NODES.ms("reduce-scatter", 4, 1024) == pytest.approx(ring, abs=0.01)
    tree = 14.0 + 2 * (7 * 1.25 + 7 * 8.5)
    assert 1e3 * NODES.ms("all-reduce", 4, 1024) == pytest.approx(tree, abs=0.01)
    assert NODES.ms("all-reduce", 1 << 30, 1) == 0


def test_nodes_are_whole() -> None:
    assert [NODES.nodes(gpus) for gpus in (1, 3, 8, 16, 1024)] == [1, 1, 1, 2, 128]
    for gpus in (0, 9, 12):
        with pytest.raises(ValueError, match=f"multiple of it, got {gpus}"):
            NODES.nodes(gpus)


# -- a step

MIB = 1 << 20


def gradient(name: str, mib: float, ready_ms: float = 0.0, itemsize: int = 4) -> Gradient:
    return Gradient(name, (int(mib * MIB) // itemsize, 1), itemsize, ready_ms)


def test_buckets_by_hand() -> None:
    """Closed at 1 MiB, the others at 25 MiB; 16-bit gradients have buckets of their own."""
    sizes = (0.5, 0.5, 20, 4, 2, 10)
    gradients = [gradient(str(number), mib) for number, mib in enumerate(sizes)]
    gradients.insert(3, gradient("half", 3, itemsize=2))
    names = [[g.name for g in bucket] for bucket in buckets(gradients)]
    assert names == [["0", "1"], ["half"], ["2", "3", "4"], ["5"]]


def two_blocks() -> Timeline:
    """11 ms forward, 22 ms backward; 2 MiB a block and 32 MiB of embeddings."""
    gradients = (
        gradient("transformer.ln_f.weight", 0.25, 1.0),
        gradient("transformer.h.1.mlp.c_fc.weight", 2, 8.0),
        gradient("transformer.h.1.ln_1.weight", 0.25, 8.0),
        gradient("transformer.h.0.mlp.c_fc.weight", 2, 18.0),
        gradient("transformer.h.0.ln_1.weight", 0.25, 18.0),
        gradient("transformer.wte.weight", 32, 22.0),
    )
    return Timeline((1.0, 4.0, 4.0, 2.0), (2.0, 8.0, 10.0, 2.0), gradients)


def memory_ms(nbytes: float) -> float:
    return nbytes / H200.tb_per_s / 1e9


NUMEL = round(36.75 * MIB) // 4


@pytest.mark.parametrize("step", [ddp, fsdp])
def test_one_gpu_computes_and_talks_to_nobody(step: Any) -> None:
    found = step(two_blocks(), NODES, H200, 1, 3)
    accumulate, update = 12, 32
    expected = 3 * 33 + memory_ms(NUMEL * (2 * accumulate + update))
    assert found.ms == pytest.approx(expected)
    assert (found.exposed_ms, found.communication_ms, found.collectives) == (0, 0, ())


def test_ddp_hides_all_but_the_last_bucket() -> None:
    found = ddp(two_blocks(), NODES, H200, 8)
    count = NODES.ms("all-reduce", 8, 8)
    assert found.collectives == (
        ("all-reduce", 8),
        ("all-reduce", int(2.25 * MIB)),
        ("all-reduce", int(34.5 * MIB)),
        ("all-reduce", 4),
    )
    last = NODES.ms("all-reduce", int(34.5 * MIB), 8)  # the embeddings, and what came before them
    loss = NODES.ms("all-reduce", 4, 8)
    assert found.exposed_ms == pytest.approx(count + last + loss)
    assert found.ms == pytest.approx(count + 33 + last + loss + memory_ms(32 * NUMEL))


def test_ddp_on_slow_links_waits_for_them() -> None:
    """From the first bucket on there is no pause in the communication."""
    slow = Cluster(0.1)
    found = ddp(two_blocks(), slow, H200, 8)
    count = slow.ms("all-reduce", 8, 8)
    expected = count + 11 + 8 + (found.communication_ms - count) + memory_ms(32 * NUMEL)
    assert found.ms == pytest.approx(expected)


def test_accumulated_gradients_are_sent_once() -> None:
    one, three = (ddp(two_blocks(), NODES, H200, 8, number) for number in (1, 3))
    assert one.collectives == three.collectives
    assert one.exposed_ms == pytest.approx(three.exposed_ms)


def test_fsdp_cannot_hide_the_first_gather_and_the_last_scatter() -> None:
    found = fsdp(two_blocks(), NODES, H200, 8)
    kinds = [kind for kind, _ in found.collectives]
    gather, scatter = "all-gather", "reduce-scatter"
    assert kinds == [
        "all-reduce",
        *4 * [gather],  # embeddings, norms, two blocks
        *[gather, gather, scatter, scatter],  # the blocks again, then their gradients
        *2 * [scatter],  # norms, embeddings
        *2 * ["all-reduce"],  # the loss, the gradients' norms
    ]
    embeddings = 32 * MIB
    root = NODES.ms("all-gather", embeddings, 8)
    last = sum(NODES.ms("reduce-scatter", nbytes, 8) for nbytes in (3 * MIB // 4, embeddings))
    sums = sum(NODES.ms("all-reduce", nbytes, 8) for nbytes in (8, 4, 4 * 6))
    # the copy of the embeddings into the buffer runs beside the norms' reduce-scatter
    hidden = min(memory_ms(2 * embeddings), NODES.ms("reduce-scatter", 3 * MIB // 4, 8))
    assert found.exposed_ms == pytest.approx(root + last + sums, abs=hidden + 1e-9)
    assert found.exposed_ms > root + last


def test_fsdp_on_slow_links_is_bound_by_them() -> None:
    found = fsdp(two_blocks(), Cluster(0.1), H200, 8)
    assert found.communication_ms <= found.ms < found.communication_ms + 33


def test_fsdp_gathers_twice_a_micro_batch_and_pads_rows() -> None:
    """On 64 GPUs 100 rows become 128."""
    rows = Gradient("transformer.h.0.mlp.c_fc.weight", (100, 10), 2, 1.0)
    norm = Gradient("transformer.ln_f.weight", (64,), 2, 1.0)
    root = Gradient("transformer.wte.weight", (64, 10), 2, 1.0)
    one = Timeline((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (norm, rows, root))
    found = fsdp(one, NODES, H200, 64, 2).collectives
    assert found.count(("all-gather", 128 * 10 * 2)) == 2 * 2
    assert found.count(("reduce-scatter", 128 * 10 * 4)) == 1


# -- the timeline


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_timeline_is_the_roofline_cut_into_pieces(params: str, recompute: bool) -> None:
    config = small_config()
    variant = "fastgpt-recompute" if recompute else "fastgpt"
    whole = roofline.measure(variant, config, 8, params=params)
    found = timeline(config, 8, params, H200, recompute)
    assert found.ms == pytest.approx(whole.ms)
    assert len(found.forward) == len(found.backward) == config.n_layer + 2
    assert min(found.forward[1:-1]) > 0 and min(found.backward[1:-1]) > 0
    ready = [g.ready_ms for g in found.gradients]
    assert ready == sorted(ready) and ready[0] >= 0
    with torch.device("meta"):
        expected = dict(GPT(config).named_parameters())
    assert {g.name: g.shape for g in found.gradients} == {n: p.shape for n, p in expected.items()}
    # the embeddings come last: the tied weight gets its second part there
    assert {g.name for g in found.gradients[-2:]} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert ready[-1] == pytest.approx(sum(found.backward))


# -- the program


def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    arguments = ["--gpus", "64", "1", "8", "--gradient_accumulation_steps=2", f"--out={folder}"]
    assert scaling.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "DDP, predicted, not measured" in shown and "FSDP2, predicted, not measured" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((folder / "scaling.json").read_text())
    assert run["cluster"] == {
        "nvlink_gb_per_s": 450.0,
        "network_gb_per_s": 50.0,
        "gpus_per_node": 8,
    }
    payload = 4 * sum(p.numel() for p in meta_parameters())  # DDP's, all gradients
    for name in ("ddp", "fsdp"):
        one, eight, many = run["parallel"][name]
        assert [row["gpus"] for row in (one, eight, many)] == [1, 8, 64]
        assert one["efficiency"] == 1 and one["sent_bytes"] == 0
        assert 0.5 < many["efficiency"] < eight["efficiency"] < 1
        assert many["tokens"] == 64 * 2 * 32 * 1024
        assert many["tokens_per_s"] == pytest.approx(64 * one["tokens_per_s"] * many["efficiency"])
    assert run["parallel"]["ddp"][1]["sent_bytes"] == 2 * (payload + 8 + 4) * 7 / 8
    assert scaling.main(arguments) == 2
    assert str(folder / "scaling.json") in capsys.readouterr().err


def meta_parameters() -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        return list(GPT(GPTConfig()).parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--gpus", "4", "12"], "multiple of it, got 12"),
        (["--gpus", "2", "2"], "gpus must be one or more, each once, got 2 2"),
        (["--parallel", "ddp", "ddp"], "parallel must be one or more, each once, got ddp ddp"),
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--gpus_per_node=0"], "gpus_per_node must be at least 1, got 0"),
        (["--network=-1"], "network must be positive and finite, got -1.0"),
        (["--nvlink=nan"], "nvlink must be positive and finite, got nan"),
        (["--tflops=0"], "tflops must be positive, got 0.0"),
    ],
)
def test_wrong_arguments(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        scaling.main(wrong)
    assert left.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
