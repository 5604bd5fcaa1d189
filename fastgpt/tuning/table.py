"""Tuned entries of the launch tables: their file, and their form in ``configs.TABLE``."""

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
    """A tuned entry of the launch tables.

    ``at``: the passes it was measured with. ``ms``, ``present_ms``: milliseconds of these passes in
    a training step, with ``config`` and with the entry of ``configs.TABLE``. ``noise``: the ratio
    of two measurements of the latter. ``n_tried``: the number of configurations timed."""

    key: Key
    config: Any
    at: list[str]
    ms: float
    present_ms: float
    noise: float
    n_tried: int

    @property
    def gain(self) -> float:
        """The speed-up over the entry of ``configs.TABLE``."""
        return self.present_ms / self.ms


@dataclass
class Table:
    """The tuned entries of a device, and their file."""

    device: torch.device
    lines: dict[Key, Line] = field(default_factory=dict)
    rejected: list[tuple[Key, Any, str]] = field(default_factory=list)  # with the reason
    workloads: list[str] = field(default_factory=list)  # whose entries are all decided

    @classmethod
    def read(cls, device: torch.device) -> "Table":
        """Read the device's file. Empty if there is none, or, with a warning, if it is damaged."""
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
        """Write the device's file atomically."""
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
        held = json.loads(json.dumps(held))  # tuples become lists, for the checksum too
        write_json({**held, "sha256": tuned_table.checksum(held)}, path)

    def changes(self) -> list[Line]:
        """The entries that differ from ``configs.TABLE``."""
        return [
            line
            for line in self.lines.values()
            if not same(line.config, choices(line.key, self.device)[0])
        ]

    def why_not(self, key: Key, config: Any) -> str | None:
        """The reason for which a configuration was rejected before, or None."""
        for rejected, other, why in self.rejected:
            if rejected == key and same(other, config):
                return why
        return None


def exported(table: Table) -> list[str]:
    """The changed entries as source lines for ``configs.TABLE``."""
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
    """The candidates for an entry, that of ``configs.TABLE`` first."""
    dtype = torch.bfloat16 if key.dtype == "half" else getattr(torch, key.dtype)
    capability = _host.capability(device)
    return candidates(key.op, key.kernel, capability, dtype, key.size, key.options)


def name_of(key: Key) -> str:
    """A readable name of an entry."""
    size = [] if key.size == configs.ANY else [str(key.size)]
    return " ".join((key.op, key.kernel, *size, *key.options))


def summary(table: Table, left: int) -> str:
    """The result in one line."""
    undecided = f"; {left} are not decided yet: the next run continues with them" if left else ""
    return f"{len(table.lines)} launches measured, {len(table.changes())} changed{undecided}"
