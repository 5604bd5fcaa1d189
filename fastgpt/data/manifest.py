"""``manifest.json``: the files of a data set, and the input and options of their preparation.

manifest = read_manifest("data/owt")      # None for a data set of nanoGPT's
manifest.verify("data/owt")               # verify the checksum of every token file
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgpt._files import parsed_json, sha256_of, write_json

NAME = "manifest.json"
DTYPES = ("uint16", "uint32")
_VERSION = 1
_KEYS = {"version", "dtype", "vocab_size", "tokenizer", "splits", "settings"}


@dataclass(frozen=True)
class Shard:
    """One token file.

    Attributes:
        file: its name within the folder.
        tokens: its number of ids.
        sha256: SHA-256 of its bytes, in hex.
    """

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split in order, and the number of documents in them."""

    documents: int
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        dtype: dtype of the token files, ``"uint16"`` or ``"uint32"``, in native byte order.
        vocab_size: every id is below it.
        tokenizer: its name, file and fingerprint.
        splits: ``"train"`` and ``"val"``.
        settings: the input and the options of ``prepare``, as JSON values.
    """

    dtype: str
    vocab_size: int
    tokenizer: dict[str, str]
    splits: dict[str, Split]
    settings: dict[str, Any]

    @property
    def dialogues(self) -> bool:
        """Whether the documents are dialogues, each starting with the token
        ``settings["end_of_text"]``."""
        return "dialogues" in self.settings.get("source", {})

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json``, atomically."""
        write_json({"version": _VERSION, **asdict(self)}, folder / NAME)

    def verify(self, folder: Path) -> None:
        """Verify the checksum of every token file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a checksum differs.
        """
        for split in self.splits.values():
            for shard in split.shards:
                found = sha256_of(folder / shard.file)
                if found != shard.sha256:
                    raise ValueError(
                        f"{folder / shard.file} is damaged: its SHA-256 is {found}, but "
                        f"{folder / NAME} has {shard.sha256}"
                    )


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest in ``folder``, or None.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        found = parsed_json(path.read_text(encoding="utf-8"))
        if found["version"] != _VERSION or set(found) != _KEYS or found["dtype"] not in DTYPES:
            raise ValueError(f"it is not of version {_VERSION}")
        splits = {
            name: Split(split["documents"], tuple(Shard(**shard) for shard in split["shards"]))
            for name, split in found["splits"].items()
        }
        if set(splits) != {"train", "val"} or not all(split.shards for split in splits.values()):
            raise ValueError("splits must be train and val, each with a shard")
        for shard in (shard for split in splits.values() for shard in split.shards):
            if Path(shard.file).name != shard.file or type(shard.tokens) is not int:
                raise ValueError(f"{shard} is not a token file of this folder")
        if not isinstance(found["tokenizer"], dict):
            raise TypeError("tokenizer must be an object")
        return Manifest(
            found["dtype"], found["vocab_size"], found["tokenizer"], splits, found["settings"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a usable manifest: {error}") from error
