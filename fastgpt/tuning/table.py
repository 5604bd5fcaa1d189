"""What was decided: lines, their file, and how they stand in ``configs.TABLE``."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgpt._files import write_json
from fastgpt.kernels import _host, configs, tuned_table
from fastgpt.kernels.candidates import candidates, same
from fastgpt.kernels.configs import Key, decoded, decoded_key, encoded


@dataclass
class Line:
    """What was decided for a line of the launch tables.

    ``at``: the passes it was measured with. ``ms``, ``present_ms``: milliseconds of these passes in
    a training step, with ``config`` and with the line of ``configs.TABLE``. ``noise``: the ratio
    of two measurements of the latter. ``n_tried``: configurations that were timed."""

    key: Key
    config: Any
    at: list[str]
    ms: float
    present_ms: float
    noise: float
    n_tried: int

    @property
    def gain(self) -> float:
        """How many times as fast as the line of ``configs.TABLE``."""
        return self.present_ms / self.ms


@dataclass
class Table:
    """The file of a device, and what it decides."""

    device: torch.device
    lines: dict[Key, Line] = field(default_factory=dict)
    rejected: list[tuple[Key, Any, str]] = field(default_factory=list)  # and why
    workloads: list[str] = field(default_factory=list)  # of which all lines are decided

    @classmethod
    def read(cls, device: torch.device) -> "Table":
        """Empty where there is no file, or, with a warning, a damaged one."""
        with tuned_table.notice_of_damage(device):
            held = tuned_table.read(device)
            lines = [
                Line(**{**one, "key": decoded_key(one["key"]), "config": decoded(one["config"])})
                for one in held.get("lines", [])
            ]
            rejected = [
                (decoded_key(key), decoded(config), str(why))
                for key, config, why in held.get("rejected", [])
            ]
            return cls(device, {one.key: one for one in lines}, rejected, held.get("workloads", []))
        return cls(device)

    def write(self) -> None:
        """Atomically."""
        path = tuned_table.path_of(self.device)
        assert path is not None
        held: dict[str, Any] = {
            "made_for": tuned_table.made_for(self.device),
            "workloads": self.workloads,
            "lines": [
                {**vars(one), "key": one.key, "config": encoded(one.config)}
                for one in self.lines.values()
            ],
            "rejected": [[key, encoded(config), why] for key, config, why in self.rejected],
        }
        held = json.loads(json.dumps(held))  # tuples are lists in the file, and for its checksum
        write_json({**held, "sha256": tuned_table.checksum(held)}, path)

    def changes(self) -> list[Line]:
        """The lines that ``configs.TABLE`` has otherwise."""
        return [
            line
            for line in self.lines.values()
            if not same(line.config, choices(line.key, self.device)[0])
        ]

    def why_not(self, key: Key, config: Any) -> str | None:
        """Why a configuration was rejected before."""
        for rejected, other, why in self.rejected:
            if rejected == key and same(other, config):
                return why
        return None


def exported(table: Table) -> list[str]:
    """Lines for ``configs.TABLE``: those that are not there."""
    found = []
    for line in table.changes():
        key = line.key
        given = [*key[:-1], *([key.options] if key.options else [])]
        while given[-1] == configs.ANY and len(given) > 2:
            given.pop()
        arguments = ", ".join(repr(x) for x in given).replace("'", '"')
        value = repr(line.config).replace("'", '"')
        found.append(f"Key({arguments}): {value},  # {line.gain:.2f} times as fast")
    return found


def choices(key: Key, device: torch.device) -> list[Any]:
    """What may stand in a line, that of ``configs.TABLE`` first."""
    dtype = torch.bfloat16 if key.dtype == "half" else getattr(torch, key.dtype)
    capability = _host.capability(device)
    return candidates(key.op, key.kernel, capability, dtype, key.size, key.options)


def name_of(key: Key) -> str:
    """A line, for a reader."""
    size = [] if key.size == configs.ANY else [str(key.size)]
    return " ".join((key.op, key.kernel, *size, *key.options))


def summary(table: Table, left: int) -> str:
    """In one line."""
    undecided = f"; {left} are not decided yet: the next time goes on with them" if left else ""
    return f"{len(table.lines)} launches measured, {len(table.changes())} changed{undecided}"
