"""What a family of checkpoints is: settings and names, both ways."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from triglot.config import ModelConfig
from triglot.interop.links import Link


class Family(NamedTuple):
    """How a kind of config.json and its tensors are read and written."""

    read: Callable[[Mapping[str, Any]], ModelConfig]
    """Raises CheckpointError for what is computed otherwise here."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """What `read` makes the same model of, if the family has such a model."""
    links: Callable[[ModelConfig], Iterator[Link]]
    follows: Callable[[ModelConfig, str], bool]
    """Whether a tensor that some files hold follows from others."""
    prefix: str
    """Of the names of the model's tensors but its projection's; some files leave it out."""
